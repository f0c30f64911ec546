"""The DeepSpeed JSON: read, checked against what works here, completed from the settings.

DeepSpeed accepts unknown keys, "auto" and half a micro-batch without a warning. Therefore every
name and type is checked here first, and all problems are reported at once, each in the form: got,
need, do. Keys: DeepSpeed 0.19's configuration, without what a 70 M parameter classifier has no use
for.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_classifier.common import files
from ds_classifier.config.batch_sizes import AUTO, BatchSizes, settle_batch
from ds_classifier.config.command_line import CommandLine
from ds_classifier.config.settings import Settings, check_settings
from ds_classifier.config.shipped import find_config

_INT, _NUMBER, _BOOL, _STR = "a whole number", "a number", "true or false", "a string"
_PAIR = "a list of two numbers"

BUCKET_MULTIPLE = 2  # DeepSpeed asserts that the all-gather bucket has an even size

# Key -> type; a nested dict is a section.
SCHEMA: dict[str, Any] = {
    "train_batch_size": _INT,
    "train_micro_batch_size_per_gpu": _INT,
    "gradient_accumulation_steps": _INT,
    "gradient_clipping": _NUMBER,
    "prescale_gradients": _BOOL,
    "gradient_predivide_factor": _NUMBER,
    "communication_data_type": _STR,
    "steps_per_print": _INT,
    "wall_clock_breakdown": _BOOL,
    "memory_breakdown": _BOOL,
    "dump_state": _BOOL,
    "data_types": {"grad_accum_dtype": _STR},
    "optimizer": {
        "type": _STR,
        "params": {
            "lr": _NUMBER,
            "betas": _PAIR,
            "eps": _NUMBER,
            "weight_decay": _NUMBER,
            "torch_adam": _BOOL,
            "fused": _BOOL,
        },
    },
    "scheduler": {
        "type": _STR,
        "params": {
            "total_num_steps": _INT,
            "warmup_min_lr": _NUMBER,
            "warmup_max_lr": _NUMBER,
            "warmup_num_steps": _INT,
            "warmup_type": _STR,
        },
    },
    "fp16": {
        "enabled": _BOOL,
        "loss_scale": _NUMBER,
        "initial_scale_power": _INT,
        "loss_scale_window": _INT,
        "hysteresis": _INT,
        "consecutive_hysteresis": _BOOL,
        "min_loss_scale": _NUMBER,
    },
    "bf16": {"enabled": _BOOL, "immediate_grad_update": _BOOL, "check_grad_overflow": _BOOL},
    "zero_optimization": {
        "stage": _INT,
        "contiguous_gradients": _BOOL,
        "reduce_scatter": _BOOL,
        "reduce_bucket_size": _INT,
        "use_multi_rank_bucket_allreduce": _BOOL,
        "allgather_partitions": _BOOL,
        "allgather_bucket_size": _INT,
        "overlap_comm": _BOOL,
        "round_robin_gradients": _BOOL,
    },
}

# Keys that may be "auto": a setting owns the number, or it is derived.
AUTO_KEYS = {
    ("train_batch_size",),
    ("train_micro_batch_size_per_gpu",),
    ("gradient_accumulation_steps",),
    ("optimizer", "params", "lr"),
    ("optimizer", "params", "weight_decay"),
    ("scheduler", "params", "total_num_steps"),
    ("scheduler", "params", "warmup_max_lr"),
    ("scheduler", "params", "warmup_num_steps"),
    ("zero_optimization", "reduce_bucket_size"),
    ("zero_optimization", "allgather_bucket_size"),
}

# The smallest allowed values. With a smaller one DeepSpeed fails later, or not at all.
LEAST: dict[tuple[str, ...], float] = {
    ("gradient_clipping",): 0,
    ("gradient_predivide_factor",): 1,
    ("steps_per_print",): 1,
    ("optimizer", "params", "eps"): 0,
    ("scheduler", "params", "warmup_min_lr"): 0,
    ("scheduler", "params", "warmup_num_steps"): 1,
    ("fp16", "loss_scale"): 0,
    ("fp16", "initial_scale_power"): 0,
    ("fp16", "loss_scale_window"): 1,
    ("fp16", "hysteresis"): 1,
    ("fp16", "min_loss_scale"): 0,
    ("zero_optimization", "reduce_bucket_size"): 1,
    ("zero_optimization", "allgather_bucket_size"): 1,
}

# Keys that DeepSpeed has and this program refuses -> reason.
REFUSED = {
    "amp": "apex is not supported; use fp16 or bf16",
    "torch_autocast": "its fp16 is broken under ZeRO; use fp16 or bf16",
    "checkpoint": "checkpoints are written by this program",
    "tensorboard": "logs go to the run directory's tb/ already",
    "wandb": "logs go to the run directory already",
    "csv_monitor": "logs go to the run directory's progress.csv already",
    "flops_profiler": "it prints over the log; use a profiler of your own",
    "comms_logger": "it prints over the log; use a profiler of your own",
    "elasticity": "the global batch stays the same on any number of ranks already",
    "zero_optimization.offload_optimizer": "the optimizer state is under 1 GB; it needs no offload",
    "zero_optimization.offload_param": "the parameters are under 0.3 GB; they need no offload",
}


@dataclass(frozen=True)
class Resolved:
    """The settings and the JSON, with every number filled in and no contradictions.

    settings: global_batch is the resolved one.
    ds_config: what DeepSpeed gets. Final after `with_parameters`.
    batch: the same numbers as in ds_config.
    shaping: the sections of the JSON, as the user wrote them, that a resumed run may not change.
    """

    settings: Settings
    ds_config: dict[str, Any]
    batch: BatchSizes
    shaping: dict[str, Any]

    @property
    def constant_rate(self) -> bool:
        """Returns True if the learning rate is the same at every step, however long the run is."""
        return "scheduler" not in self.ds_config and not self.settings.anneal_lr

    def with_part(self, steps: int) -> Resolved:
        """Return a copy in which the JSON's schedule is that of a part of the run.

        steps: the number of steps of the part, which begins with the warm-up.
        """
        if "scheduler" not in self.ds_config:
            return self
        scheduler = self.ds_config["scheduler"]
        length = dict(total_num_steps=steps, warmup_num_steps=self.settings.warm_up(steps))
        scheduler = scheduler | {"params": scheduler["params"] | length}
        return replace(self, ds_config=self.ds_config | {"scheduler": scheduler})

    def with_classes(self, num_classes: int) -> Resolved:
        """Return a copy whose settings have the number of classes of the data."""
        return replace(self, settings=self.settings.replace(num_classes=num_classes))

    def with_parameters(self, parameters: int) -> Resolved:
        """Return a copy in which both bucket sizes of ZeRO are numbers.

        Those that the JSON does not set become a quarter of the parameters. DeepSpeed's default of
        5e8 elements would be allocated in full at every backward pass.
        """
        zero = dict(self.ds_config["zero_optimization"])
        quarter = max(parameters // 4 // BUCKET_MULTIPLE * BUCKET_MULTIPLE, 1_000_000)
        for key in ("reduce_bucket_size", "allgather_bucket_size"):
            if zero.get(key, AUTO) == AUTO:
                zero[key] = quarter
        return replace(self, ds_config=self.ds_config | {"zero_optimization": zero})

    def with_batch(self, batch: BatchSizes) -> Resolved:
        """Return a copy that trains on other batch sizes, for a rehearsal."""
        return replace(self, batch=batch, ds_config=self.ds_config | batch.ds_numbers())


def _text_of(path: Path) -> str:
    try:
        return files.read_text(path)
    except ValueError as error:
        raise ValueError(f"--deepspeed_config: {error}") from None


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read the JSON at a path, or the shipped one of that name.

    Raises ValueError for a missing or unreadable file, broken JSON or a duplicate key.
    """
    try:
        text = _text_of(find_config(path))
    except OSError as error:
        raise ValueError(
            f"--deepspeed_config: got {path}: {files.problem(error)}; need a DeepSpeed JSON"
        ) from None

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{path}: key {key!r} is given twice; do: remove one")
        return dict(pairs)

    try:
        raw = json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: got {type(raw).__name__}; need a JSON object")
    return raw


def resolve(command: CommandLine, raw: dict[str, Any], *, world_size: int) -> Resolved:
    """Complete settings and JSON from each other, for a number of ranks.

    raw: the JSON as the user wrote it.
    The classes and the parameters are added later, by `Resolved.with_classes` and
    `Resolved.with_parameters`.
    Raises ValueError with every problem found, one per line.
    """
    problems = check_settings(command.settings) + _check_keys(raw)
    if problems:
        raise ValueError(_joined(problems, command.deepspeed_config))
    ds = _whole_numbers_as_int(raw, SCHEMA)
    problems += _check_and_fill(ds, command)
    settings = _settle_numbers(ds, command, problems)
    problems += check_settings(settings)  # again, with the numbers of the JSON
    if 0 < settings.extend <= settings.iterations:
        problems.append(
            f"--extend: got {settings.extend}; need the number of steps in all, more than the "
            f"{settings.iterations} of --iterations"
        )
    try:
        batch = settle_batch(ds, settings, world_size)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(_joined(problems, command.deepspeed_config))
    ds.update(batch.ds_numbers())
    if batch.accumulation > 1:
        ds.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if settings.anneal_lr is not None:
        ds.pop("scheduler", None)  # --anneal_lr replaces the JSON's schedule
    # DeepSpeed's own progress lines say less than ours and cost device syncs.
    ds.setdefault("steps_per_print", 2**31)
    shaping = {key: raw.get(key) for key in ("gradient_clipping", "optimizer", "scheduler")}
    return Resolved(settings.replace(global_batch=batch.total), ds, batch, shaping)


def _joined(problems: list[str], path: Path) -> str:
    """Return one message that lists all problems."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems ({path} and flags):\n" + "\n".join(
        f"  {i}. {problem}" for i, problem in enumerate(problems, 1)
    )


def _check_keys(raw: dict[str, Any]) -> list[str]:
    """Return the problems with names and types."""
    problems: list[str] = []

    def walk(values: dict[str, Any], schema: dict[str, Any], path: tuple[str, ...]) -> None:
        for key, value in values.items():
            name = ".".join((*path, key))
            if name in REFUSED:
                problems.append(f"{name}: not supported here: {REFUSED[name]}; do: remove it")
            elif key not in schema:
                near = difflib.get_close_matches(key, schema, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(schema)}"
                problems.append(f"{name}: unknown key; {hint}")
            elif isinstance(schema[key], dict):
                if isinstance(value, dict):
                    walk(value, schema[key], (*path, key))
                else:
                    problems.append(f"{name}: got {value!r}; need a section {{...}}")
            elif value == AUTO:
                if (*path, key) not in AUTO_KEYS:
                    problems.append(f'{name}: got "auto"; need {schema[key]}: no setting owns it')
            elif not _has_type(value, schema[key]):
                problems.append(f"{name}: got {json.dumps(value)}; need {schema[key]}")

    walk(raw, SCHEMA, ())
    return problems


def _whole_numbers_as_int(values: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return a deep copy in which a whole number written as 5e8 is the int 500000000."""
    copy: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            copy[key] = _whole_numbers_as_int(value, schema[key])
        else:
            copy[key] = int(value) if schema[key] == _INT and value != AUTO else value
    return copy


def _has_type(value: Any, wanted: str) -> bool:
    if wanted == _PAIR:
        return (
            isinstance(value, list)
            and len(value) == 2
            and all(_has_type(number, _NUMBER) for number in value)
        )
    if wanted == _BOOL:
        return isinstance(value, bool)
    if wanted == _STR:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and (wanted == _NUMBER or float(value).is_integer())


def _check_and_fill(ds: dict[str, Any], command: CommandLine) -> list[str]:
    """Fill in this program's defaults; return the problems with values of the right type.

    A problem is a value that cannot work, or that contradicts the flags or the recipe.
    """
    return [
        *_below_least(ds),
        *_check_zero(ds),
        *_check_precision(ds, command),
        *_check_optimizer(ds),
        *_check_scheduler(ds),
        *_check_reference_recipe(ds, command),
    ]


def _below_least(ds: dict[str, Any]) -> Iterator[str]:
    for path, least in LEAST.items():
        section: Any = ds
        for part in path[:-1]:
            section = section.get(part, {})
        value = section.get(path[-1], AUTO)
        if value != AUTO and value < least:
            yield f"{'.'.join(path)}: got {value}; need at least {least}"


def _check_zero(ds: dict[str, Any]) -> Iterator[str]:
    if ds.get("communication_data_type", "fp32") not in ("fp32", "fp16", "bf16"):
        yield (
            f"communication_data_type: got {ds['communication_data_type']!r}; need fp32, fp16 or "
            "bf16"
        )
    zero = ds.setdefault("zero_optimization", {})
    if zero.setdefault("stage", 1) not in (1, 2):
        yield (
            f"zero_optimization.stage: got {zero['stage']}; need 1 or 2, on one rank too (stage 0 "
            "keeps no fp32 master weights to save; stage 3 has nothing to gain at this size)"
        )
    gathered = zero.get("allgather_bucket_size", AUTO)
    if gathered != AUTO and gathered % BUCKET_MULTIPLE:
        yield f"zero_optimization.allgather_bucket_size: got {gathered}; need an even number"


def _check_precision(ds: dict[str, Any], command: CommandLine) -> Iterator[str]:
    fp16, bf16 = (ds.get(name, {}).get("enabled", False) for name in ("fp16", "bf16"))
    if fp16 and bf16:
        yield "fp16.enabled, bf16.enabled: got both; need one at most"
    if bf16 and not ds["bf16"].get("check_grad_overflow", True):
        yield (
            "bf16.check_grad_overflow: got false; need true: else a single non-finite gradient "
            "would reach the weights; do: remove the key"
        )
    if command.classifier_use_fp16 is not None and command.classifier_use_fp16 != fp16:
        yield (
            f"--classifier_use_fp16: got {command.classifier_use_fp16}, but "
            f"{command.deepspeed_config} has fp16 {'on' if fp16 else 'off'}; do: drop the flag, "
            "since the JSON owns the precision"
        )
    grad_accum = ds.get("data_types", {}).get("grad_accum_dtype")
    if grad_accum not in (None, "fp32", "bf16", "fp16"):
        yield f"data_types.grad_accum_dtype: got {grad_accum!r}; need fp32, bf16 or fp16"


def _check_optimizer(ds: dict[str, Any]) -> Iterator[str]:
    if "gradient_clipping" not in ds:
        yield (
            "gradient_clipping: missing; need a number, since DeepSpeed clips at 1.0 by default; "
            "do: set it to 0.0 for no clipping"
        )
    optimizer = ds.setdefault("optimizer", {})
    if optimizer.setdefault("type", "AdamW") != "AdamW":
        yield f"optimizer.type: got {optimizer['type']!r}; need AdamW"
    params = optimizer.setdefault("params", {})
    if not params.setdefault("torch_adam", True):
        yield (
            "optimizer.params.torch_adam: got false; need true: DeepSpeed's own kernels must be "
            "compiled first and are no faster on ZeRO's flat tensors"
        )
    params.setdefault("fused", True)  # one pass over the flat tensors instead of eight
    betas = params.setdefault("betas", [0.9, 0.999])
    if not all(0 <= beta < 1 for beta in betas):
        yield f"optimizer.params.betas: got {betas}; need two numbers in [0, 1)"
    params.setdefault("eps", 1e-8)


def _check_scheduler(ds: dict[str, Any]) -> Iterator[str]:
    scheduler = ds.get("scheduler")
    if scheduler is None:
        return
    if scheduler.get("type") != "WarmupDecayLR":
        yield (
            f"scheduler.type: got {scheduler.get('type')!r}; need WarmupDecayLR; do: change it, or "
            "drop the section and use --anneal_lr True (linear to 0) or False (constant)"
        )
    params = scheduler.setdefault("params", {})
    params.setdefault("warmup_type", "linear")
    params.setdefault("warmup_min_lr", 0.0)
    if params["warmup_type"] not in ("linear", "log"):
        yield (f"scheduler.params.warmup_type: got {params['warmup_type']!r}; need linear or log")


def _check_reference_recipe(ds: dict[str, Any], command: CommandLine) -> Iterator[str]:
    if command.recipe != "reference":
        return
    needed = {"gradient_clipping": (ds.get("gradient_clipping"), 0)}
    if ds.get("fp16", {}).get("enabled"):
        needed["fp16.hysteresis"] = (ds["fp16"].get("hysteresis", 2), 1)  # 2: DeepSpeed's default
    for name, (got, need) in needed.items():
        if got is not None and got != need:
            yield f"{name}: got {got}; need {need} with --recipe reference"


def _settle_numbers(ds: dict[str, Any], command: CommandLine, problems: list[str]) -> Settings:
    """Give each number that JSON and settings share one value, in both.

    Returns the settings; changes ds; appends disagreements to problems.
    """
    settings = command.settings
    # Name of a number -> who set it.
    owners = {name: f"--{name} (flag, file or recipe)" for name in command.given}

    def settle(path: tuple[str, ...], name: str) -> None:
        nonlocal settings
        section = ds
        for part in path[:-1]:
            section = section[part]
        value = section.get(path[-1], AUTO)
        if value == AUTO:
            section[path[-1]] = getattr(settings, name)
        elif name in owners and getattr(settings, name) != value:
            problems.append(
                f"{'.'.join(path)}: got {value}, but {owners[name]} is {getattr(settings, name)}; "
                'need one number; do: write "auto" in the JSON'
            )
        else:
            settings = settings.replace(**{name: value})
            owners.setdefault(name, ".".join(path))

    settle(("optimizer", "params", "lr"), "lr")
    settle(("optimizer", "params", "weight_decay"), "weight_decay")
    if "scheduler" in ds and settings.anneal_lr is None:
        params = ds["scheduler"]["params"]
        settle(("scheduler", "params", "total_num_steps"), "iterations")
        if settings.warmup_steps < 0 and params.get("warmup_num_steps", AUTO) == AUTO:
            params["warmup_num_steps"] = settings.warm_up(settings.iterations)
        else:
            settle(("scheduler", "params", "warmup_num_steps"), "warmup_steps")
        settle(("scheduler", "params", "warmup_max_lr"), "lr")
    return settings
