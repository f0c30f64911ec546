"""Complete the settings and the JSON from each other.

The JSON is DeepSpeed's: the installed version says what it knows (known.py), and what it does with
a key is what happens. This program owns the batch sizes, the learning rate, the decay and the
length, and refuses what it does not do (features.py), what the machine cannot do (optimizers.py),
and what would fail later (clashes.py). All problems come in one message.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_classifier import distributed
from ds_classifier.config.batch_sizes import AUTO, BatchError, BatchSizes, settle_batch
from ds_classifier.config.command_line import CommandLine
from ds_classifier.config.deepspeed_json import schedules
from ds_classifier.config.deepspeed_json.clashes import check_clashes
from ds_classifier.config.deepspeed_json.draft import INT, Draft, name_of
from ds_classifier.config.deepspeed_json.features import NEVER, check_features, reports
from ds_classifier.config.deepspeed_json.known import check_keys, default_of, keys_of_top_level
from ds_classifier.config.deepspeed_json.optimizers import SECTION, kernel_of, settle_optimizer
from ds_classifier.config.deepspeed_json.precision import (
    BUCKET_MULTIPLE,
    BUCKETS,
    check_numbers,
    rename_old_keys,
    settle_precision,
    settle_zero,
)
from ds_classifier.config.deepspeed_json.schedules import LENGTH, WARM_UP, settle_schedule
from ds_classifier.config.settings import Settings, check_settings

BATCH_KEYS = tuple(BatchSizes(1, 1, 1).ds_numbers())


@dataclass(frozen=True)
class Resolved:
    """The settings and the JSON, with every number filled in and no contradictions.

    settings: global_batch is the resolved one.
    ds_config: what DeepSpeed gets. Final after `with_parameters`.
    batch: the same numbers as in ds_config.
    shaping: the sections of the JSON, as the user wrote them, that a resumed run may not change.
    notes: lines that say what became of keys of the JSON.
    """

    settings: Settings
    ds_config: dict[str, Any]
    batch: BatchSizes
    shaping: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def constant_rate(self) -> bool:
        """Returns True if the learning rate is the same at every step, however long the run is."""
        return self.open_ended and "scheduler" not in self.ds_config and not self._warm_up

    @property
    def open_ended(self) -> bool:
        """Returns True if the learning rate of a step does not depend on the length of the run."""
        if "scheduler" in self.ds_config:
            return LENGTH not in self.ds_config["scheduler"]["params"]
        return self.settings.schedule in ("", "constant")

    @property
    def peak_lr(self) -> float:
        """The highest learning rate; with Muon that of the matrices, which the log shows."""
        if self.ds_config.get("scheduler", {}).get("type") in schedules.SETS_ALL_RATES:
            return self.settings.lr
        return self.ds_config["optimizer"]["params"].get("muon_lr", self.settings.lr)

    @property
    def _warm_up(self) -> int:
        return max(0, self.settings.warmup_steps)

    @property
    def kernel(self) -> str:
        """The name of DeepSpeed's builder of the optimizer's kernel; "" if it needs none."""
        optimizer = self.ds_config["optimizer"]
        offload = "offload_optimizer" in self.ds_config["zero_optimization"]
        return kernel_of(optimizer["type"], optimizer["params"], offload)

    @property
    def reports(self) -> list[str]:
        """The keys of the JSON at whose wish DeepSpeed reports on the run."""
        return reports(self.ds_config)

    def with_part(self, steps: int) -> Resolved:
        """Return a copy in which the JSON's schedule is that of a part of the run.

        steps: the number of steps of the part, which begins with the warm-up.
        """
        if "scheduler" not in self.ds_config or self.open_ended:
            return self
        scheduler = self.ds_config["scheduler"]
        length = {LENGTH: steps, WARM_UP: self.settings.warm_up(steps)}
        scheduler = scheduler | {"params": scheduler["params"] | length}
        return replace(self, ds_config=self.ds_config | {"scheduler": scheduler})

    def with_settings(self, settings: Settings) -> Resolved:
        """Return a copy with settings in which the data have decided the rest."""
        return replace(self, settings=settings)

    def with_parameters(self, parameters: int) -> Resolved:
        """Return a copy in which both bucket sizes of ZeRO are numbers.

        Those that the JSON does not set become a quarter of the parameters. DeepSpeed's default of
        5e8 elements would be allocated in full at every backward pass.
        """
        zero = dict(self.ds_config["zero_optimization"])
        quarter = max(parameters // 4 // BUCKET_MULTIPLE * BUCKET_MULTIPLE, 1_000_000)
        for key in BUCKETS:
            if zero.get(key, AUTO) == AUTO:
                zero[key] = quarter
        return replace(self, ds_config=self.ds_config | {"zero_optimization": zero})

    def with_batch(self, batch: BatchSizes) -> Resolved:
        """Return a copy that trains on other batch sizes, for a rehearsal."""
        return replace(self, batch=batch, ds_config=self.ds_config | batch.ds_numbers())


def resolve(command: CommandLine, raw: dict[str, Any], *, world_size: int) -> Resolved:
    """Complete settings and JSON from each other, for a number of ranks.

    raw: the JSON as the user wrote it.
    The classes and the parameters are added later, by `Resolved.with_settings` and
    `Resolved.with_parameters`.
    Raises ValueError with every problem found, one per line.
    """
    distributed.import_deepspeed()  # which the checks ask
    problems: list[str] = []
    advised, ranks = raw, world_size
    while True:
        draft = Draft(advised, command, keys_of_top_level())
        batch, ranks = _settle(draft, ranks)
        new = [problem for problem in draft.problems if problem not in problems]
        if not new:
            break
        problems += new
        # What is found in the JSON as the messages advise it would be the next round's.
        advised = draft.advised
    if problems:
        raise ValueError(_joined(problems, command.deepspeed_config))
    ds = draft.ds | batch.ds_numbers()
    if batch.accumulation > 1:
        ds["data_types"] = {"grad_accum_dtype": "fp32"} | ds.get("data_types", {})
    # DeepSpeed's own progress lines say less than ours and cost device syncs.
    ds.setdefault("steps_per_print", NEVER)
    settings = draft.settings.replace(global_batch=batch.total)
    shaping = {
        "gradient_clipping": ds["gradient_clipping"],
        "optimizer": raw.get("optimizer"),
        "scheduler": schedules.written_out(raw.get("scheduler"), ds.get("scheduler")),
    }
    return Resolved(settings, ds, batch, shaping, tuple(draft.notes))


def _settle(draft: Draft, ranks: int) -> tuple[BatchSizes, int]:
    """Check and complete the draft once; return the batch and the number of ranks to go on with."""
    rename_old_keys(draft)
    check_features(draft)
    for key in BATCH_KEYS:
        draft.check_type((key,), INT, 1)
    check_numbers(draft)
    check_keys(draft)
    settle_zero(draft)
    settle_precision(draft)
    settle_optimizer(draft)
    settle_schedule(draft)
    if draft.takes_decay:
        draft.settle((*SECTION, "weight_decay"), "weight_decay")
    try:
        batch = settle_batch(draft.ds, draft.settings, ranks)
    except BatchError as error:
        draft.problems.append(str(error))
        draft.advised |= error.advised
        batch, ranks = BatchSizes(1, 1, ranks), error.ranks or ranks
    _name_autos(draft)
    check_clashes(draft, batch.accumulation)
    _check_settings(draft)
    _check_extend(draft)
    return batch, ranks


def _check_settings(draft: Draft) -> None:
    """Check the settings; a number of the JSON goes by its key there."""
    for problem in check_settings(draft.settings):
        flag, _, message = problem.partition(": ")
        owner = draft.owners.get(flag.removeprefix("--"), flag)
        if owner.startswith("--"):
            draft.problems.append(problem)
        else:
            draft.refuse(tuple(owner.split(".")), message)


def _check_extend(draft: Draft) -> None:
    settings = draft.settings
    kind = draft.get("scheduler", "type")
    if 0 < settings.extend <= settings.iterations:
        draft.problems.append(
            f"--extend: got {settings.extend}; need the number of steps in all, more than the "
            f"{settings.iterations} of --iterations"
        )
    elif settings.extend and kind and LENGTH not in draft.section("scheduler", "params"):
        draft.problems.append(
            f"--extend: got {settings.extend}; need none with {kind}, whose rates do not depend on "
            f"the length of the run; do: --iterations {settings.extend}, and the run goes on"
        )


def _name_autos(draft: Draft) -> None:
    """Leave what is still "auto" to DeepSpeed's defaults, and say which values those are."""
    for path in draft.autos_left():
        # The batch has a line of its own; the buckets get their sizes later, and change no number.
        if path[-1] not in (*BATCH_KEYS, *BUCKETS):
            draft.drop(*path)
            draft.autos[name_of(path)] = default_of(path, draft.known)
    if draft.autos:
        values = ", ".join(f"{name} {value}" for name, value in draft.autos.items())
        draft.notes.append(f"auto: {values}")


def _joined(problems: list[str], path: Path | None) -> str:
    """Return one message that lists all problems."""
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems ({path} and flags):\n" + "\n".join(
        f"  {i}. {problem}" for i, problem in enumerate(problems, 1)
    )
