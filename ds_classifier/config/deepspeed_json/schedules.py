"""The learning rate: DeepSpeed's schedulers, and the numbers that they share with the settings."""

from __future__ import annotations

import inspect
from typing import Any

from ds_classifier.config.batch_sizes import AUTO
from ds_classifier.config.deepspeed_json.draft import INT, NUMBER, Draft, shown, type_of
from ds_classifier.config.deepspeed_json.known import nearest, refuse_name
from ds_classifier.config.deepspeed_json.optimizers import SECTION as OPTIMIZER

SECTION = ("scheduler", "params")
# The parameter that is the highest rate; the schedules without one multiply the optimizer's.
PEAKS = {"WarmupLR": "warmup_max_lr", "WarmupDecayLR": "warmup_max_lr", "OneCycle": "cycle_max_lr"}
SETS_ALL_RATES = (*PEAKS, "LRRangeTest")  # whatever the optimizer's lr is
LENGTH = "total_num_steps"  # of the schedules that end with the run
WARM_UP = "warmup_num_steps"
# What a missing key meant in version 0.1, which wrote none of them out; it had only WarmupDecayLR.
BEFORE = {
    "warmup_type": "linear",
    "warmup_min_lr": 0.0,
    "warmup_max_lr": AUTO,
    WARM_UP: AUTO,
    LENGTH: AUTO,
}
LEAST = {WARM_UP: 1, "warmup_min_lr": 0, "lr_range_test_step_size": 1, "cycle_first_step_size": 1}


def settle_schedule(draft: Draft) -> None:
    """Check the scheduler, and give its numbers and the optimizer's rate one value.

    What the JSON leaves out is DeepSpeed's default, except the length, which is the run's.
    """
    if draft.settings.schedule:
        draft.drop("scheduler")  # a flag replaces it
    scheduler = _check_type(draft)
    if scheduler is None:
        draft.drop("scheduler")
        draft.settle((*OPTIMIZER, "lr"), "lr")
        _say_rates_of_muon(draft)
        _warm_up_without_one(draft)
        return
    params = draft.ds["scheduler"].setdefault("params", {})
    takes = {name: p.default for name, p in list(_signature(scheduler).items())[1:]}
    _check_params(draft, params, takes)
    kind = draft.ds["scheduler"]["type"]
    defaults = {}
    if LENGTH in takes:
        draft.settle((*SECTION, LENGTH), "iterations")
    if WARM_UP in takes:
        _settle_warm_up(draft, takes[WARM_UP], defaults, ends=LENGTH in takes)
    for name, default in takes.items():
        if name not in params and name in ("warmup_type", "warmup_min_lr", "cos_min_ratio"):
            params[name] = default
            if name == "warmup_type":
                defaults[name] = default
    _settle_rate(draft, kind, takes, defaults)
    if kind in SETS_ALL_RATES:
        _say_replaced(draft, kind)
    else:
        _say_rates_of_muon(draft)
    for name, default in takes.items():
        if default is inspect.Parameter.empty and name not in params:
            draft.refuse((*SECTION, name), f"missing; need a number, for {kind}", 0.0)
    if defaults:
        text = ", ".join(f"{name} {value}" for name, value in defaults.items())
        draft.notes.append(f"{kind}: {text} (DeepSpeed's defaults)")
    if params.get("last_batch_iteration", -1) != -1:
        why = "not supported here: a resumed run sets it"
        draft.refuse((*SECTION, "last_batch_iteration"), why, advice="do: remove it")
    params.pop("last_batch_iteration", None)


def _warm_up_without_one(draft: Draft) -> None:
    """Let --warmup_steps count without a scheduler, and refuse one as long as the run."""
    settings = draft.settings
    if settings.warmup_steps > 0 and not settings.schedule:
        draft.settings = settings.replace(lr_schedule="constant")
    if settings.warmup_steps >= settings.iterations:
        draft.problems.append(
            f"--warmup_steps: got {settings.warmup_steps}; need fewer than the "
            f"{settings.iterations} of --iterations"
        )


def _signature(made: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(made).parameters)


def _check_type(draft: Draft) -> Any:
    """Return DeepSpeed's class of the scheduler; None without one."""
    from deepspeed.runtime import lr_schedules

    section = draft.section("scheduler")
    if not section or (not section.get("type") and not section.get("params")):
        return None
    kind, kinds = section.get("type"), lr_schedules.VALID_LR_SCHEDULES
    if kind not in kinds:
        near = [name for name in kinds if name.lower() == str(kind).lower()]
        near = near[0] if near else nearest(str(kind), kinds)
        if near is None:
            draft.refuse(
                ("scheduler",),
                f"got the type {shown(kind)}; need one of {', '.join(kinds)}",
                advice="do: remove it, and use --lr_schedule",
            )
            return None
        advice = f"did you mean {near!r}?"
        draft.refuse(("scheduler", "type"), f"got {shown(kind)}", near, advice=advice)
    if not isinstance(section.setdefault("params", {}), dict):
        draft.refuse(SECTION, f"got {shown(section['params'])}; need a section {{...}}")
    return getattr(lr_schedules, section["type"])


def _check_params(draft: Draft, params: dict[str, Any], takes: dict[str, Any]) -> None:
    owned = (LENGTH, WARM_UP, *PEAKS.values())
    for key in [key for key in params if key not in takes]:
        refuse_name(draft, (*SECTION, key), "scheduler", takes)
    for key, value in params.items():
        # DeepSpeed also takes a rate per group of parameters; here all have one.
        if key.endswith("_lr") and isinstance(value, list) and value == value[:1] * len(value):
            params[key] = value[0] if value else value
    for key, value in list(params.items()):
        path = (*SECTION, key)
        if value == AUTO and key not in owned:
            if takes[key] is inspect.Parameter.empty:
                draft.refuse(path, 'got "auto"; need a number: no setting owns it', 0.0)
            else:
                draft.fill_auto(path, takes[key])
        else:
            wanted = type_of(takes[key]) or NUMBER
            wanted = INT if key.endswith(("_steps", "_step_size", "_count")) else wanted
            if wanted == INT and takes[key].__class__ is float:
                wanted = NUMBER
            draft.check_type(path, wanted, LEAST.get(key))
    if params.get("warmup_type", "log") not in ("log", "linear"):
        draft.refuse(
            (*SECTION, "warmup_type"),
            f"got {shown(params['warmup_type'])}; need linear or log",
        )


def _settle_warm_up(draft: Draft, default: Any, defaults: dict[str, Any], *, ends: bool) -> None:
    """Settle the warm-up's steps: the JSON's or the flag's; "auto" follows the run's length.

    ends: whether the schedule ends with the run.
    """
    value = draft.get(*SECTION, WARM_UP)
    if draft.settings.warmup_steps >= 0 or value not in (None, AUTO):
        draft.settle((*SECTION, WARM_UP), "warmup_steps")
    elif value == AUTO:
        steps = draft.settings.warm_up(draft.settings.iterations)
        draft.set(*SECTION, WARM_UP, steps)
        if not ends:  # more --iterations may not change the rates of a run under way
            draft.settings = draft.settings.replace(warmup_steps=steps)
    else:
        draft.set(*SECTION, WARM_UP, default)
        defaults[WARM_UP] = default
        draft.settings = draft.settings.replace(warmup_steps=default)


def _settle_rate(draft: Draft, kind: str, takes: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Settle the highest rate, which is the scheduler's where it has one, else the optimizer's."""
    own = draft.get(*OPTIMIZER, "lr", default=AUTO)
    if kind not in SETS_ALL_RATES or draft.get(*SECTION, PEAKS.get(kind, "")) == AUTO != own:
        draft.settle((*OPTIMIZER, "lr"), "lr")
        if kind in PEAKS:
            draft.set(*SECTION, PEAKS[kind], draft.settings.lr)
        return
    if kind in PEAKS:
        peak = PEAKS[kind]
        value, default = draft.get(*SECTION, peak), takes[peak]
        if value is None and default is None and own != AUTO:
            draft.set(*SECTION, peak, own)  # the newer WarmupLR takes the optimizer's
        elif value is None and isinstance(default, float) and "lr" not in draft.owners:
            draft.set(*SECTION, peak, default)
            defaults[peak] = default
        draft.settle((*SECTION, peak), "lr")
    elif "lr" not in draft.owners and own != AUTO:
        draft.settle((*OPTIMIZER, "lr"), "lr")
    if own not in (AUTO, draft.settings.lr):
        draft.notes.append(f"optimizer.params.lr: {own} has no effect, since {kind} sets the rate")
    draft.set(*OPTIMIZER, "lr", draft.settings.lr)


def _say_replaced(draft: Draft, kind: str) -> None:
    """Say which parameters of the optimizer a scheduler replaces, besides lr."""
    for key in ("muon_lr", "adam_lr"):
        if (rate := draft.get(*OPTIMIZER, key)) is not None:
            draft.notes.append(
                f"optimizer.params.{key}: {rate} has no effect, since {kind} sets the rate"
            )
    if kind != "OneCycle" or not draft.get(*SECTION, "cycle_momentum", default=True):
        return
    if draft.has_muon:
        draft.notes.append("OneCycle: it moves no momenta of Muon (cycle_momentum has no effect)")
    elif betas := draft.get(*OPTIMIZER, "betas"):
        draft.notes.append(
            f"optimizer.params.betas: {betas} have no effect, since {kind} moves the first one "
            "and sets the second one to 0.99 (cycle_momentum)"
        )


def _say_rates_of_muon(draft: Draft) -> None:
    """Say which rates a schedule that multiplies the optimizer's begins from, if there are two."""
    own, lr = draft.section(*OPTIMIZER), draft.settings.lr
    matrices, rest = own.get("muon_lr", lr), own.get("adam_lr", lr)
    if (matrices, rest) == (lr, lr):
        return
    text = f"muon_lr {matrices} for matrices, which the log shows, and adam_lr {rest} for the rest"
    unused = "; lr has no effect" if lr not in (matrices, rest) else ""
    draft.notes.append(f"Muon: the highest rate is {text}{unused}")


def written_out(scheduler: Any, completed: Any) -> Any:
    """Return a section of the user with what it leaves out of the warm-up written out.

    completed: the section that DeepSpeed gets. So a checkpoint also shows what was left out.
    """
    if not isinstance(scheduler, dict) or not completed:
        return scheduler
    own, filled = scheduler.get("params") or {}, completed["params"]
    missing = {key: filled[key] for key in BEFORE if key in filled and key not in own}
    missing.pop(LENGTH, None)  # it is the run's, then and now
    return scheduler | {"params": missing | own}


def meant(key: str, section: Any) -> Any:
    """Return a section that a checkpoint records, with what its missing keys meant when it was
    written.

    key: of the section in the JSON.
    """
    if key != "scheduler" or not isinstance(section, dict):
        return section
    if section.get("type") != "WarmupDecayLR":
        return section
    return section | {"params": BEFORE | (section.get("params") or {})}
