"""Train a noise-aware classifier: `deepspeed launch/train.py --deepspeed_config JSON [flags]`.

The same command again continues the run. Where training starts, the first that applies:
1. --resume_checkpoint PATH;
2. the newest checkpoint in the run directory that verifies (all damaged: an error);
3. --init_from PATH, weights only;
4. fresh weights.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier import distributed, events, failures, launcher
from ds_classifier.config import CommandLine, Settings, parse_training_command
from ds_classifier.data.shards import ShardSet, neighbours
from ds_classifier.data.store import RemoteShardSet, open_named
from ds_classifier.data.urls import shown, without_logins
from ds_classifier.ds_config import Resolved, fill_bucket_sizes, read_ds_config, resolve
from ds_classifier.run_files import (
    DONE,
    find_checkpoint,
    read_done,
    refuse_changes,
    write_run_files,
)
from ds_classifier.run_lock import RunLock
from ds_classifier.shutdown import STOPPED, StopRequests, StopVote
from ds_classifier.watchdog import Watchdog


def main(argv: list[str] | None = None) -> int:
    with StopRequests() as requests:
        command = parse_training_command(sys.argv[1:] if argv is None else argv)
        try:
            return run(command, requests)
        except (ValueError, OSError) as error:  # before the ranks met, or on all of them
            return failures.tell(error)


def run(command: CommandLine, requests: StopRequests) -> int:
    """Train as the command says; returns the exit code. Raises ValueError for wrong use."""
    distributed.quiet_libraries()
    world_size = distributed.world_size()
    if command.settings.expect_world not in (0, world_size):
        raise ValueError(
            f"--expect_world: got world size {world_size}; need {command.settings.expect_world}; "
            "do: look at the hostfile's path, which the launcher forgives if it is wrong"
        )
    if problem := launcher.hostfile_problem():
        raise ValueError(problem)
    if command.overfit_steps:
        # The schedule is the whole run's; a few hundred steps may not leave its warm-up.
        settings = command.settings.replace(anneal_lr=False)
        command = dataclasses.replace(command, settings=settings)
    try:
        resolved = resolve(command, read_ds_config(command.deepspeed_config), world_size=world_size)
        shards, val_shards, resolved = open_data(resolved)
    except (ValueError, OSError) as error:
        if world_size > 1:  # the others may have none, and would wait
            distributed.refuse(failures.summary(error))
        raise
    # Where errors are recorded, and STOP is looked for.
    home = Path(resolved.settings.run_dir)
    if command.instead:
        home = Path(tempfile.gettempdir()) / f"ds_classifier-{os.getuid()}"
    requests.also_by(max_minutes=resolved.settings.max_minutes, run_dir=home)
    with Watchdog(home, minutes=resolved.settings.time_outs()) as watch:
        if command.preflight:
            from ds_classifier import preflight

            device = preflight.join(resolved, shards, val_shards)
            find_start(resolved, facts_of(resolved, shards), device)
            preflight.look(resolved, shards, device)
            watch.leave()
            distributed.finish()
            return 0
        return train_on(command, resolved, shards, val_shards, watch, requests)


def open_data(resolved: Resolved) -> tuple[ShardSet, ShardSet | None, Resolved]:
    """Open the shards, and settle the number of classes by them."""
    settings = resolved.settings
    shards = _open("--data_dir", settings.data_dir, settings)
    val_shards = None
    if settings.val_data_dir:
        val_shards = _open("--val_data_dir", settings.val_data_dir, settings)
    classes = shards.manifest.classes
    if val_shards is not None and val_shards.manifest.classes != classes:
        raise ValueError(
            f"--val_data_dir: got {len(val_shards.manifest.classes)} classes in "
            f"{shown(settings.val_data_dir)}; need the same list as the {len(classes)} in "
            f"{shown(settings.data_dir)}; do: convert both in one call, with --val"
        )
    if settings.num_classes not in (0, len(classes)):
        raise ValueError(
            f"--num_classes: got {settings.num_classes}; need {len(classes)}, as many as "
            f"{shown(settings.data_dir)} has; do: drop the flag"
        )
    settings = settings.replace(num_classes=len(classes))
    return shards, val_shards, dataclasses.replace(resolved, settings=settings)


def _open(flag: str, location: str, settings: Settings) -> ShardSet:
    try:
        return open_named(
            location,
            cache_dir=settings.cache_dir,
            cache_gb=settings.cache_gb,
            image_size=settings.image_size,
        )
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def train_on(
    command: CommandLine,
    resolved: Resolved,
    shards: ShardSet,
    val_shards: ShardSet | None,
    watch: Watchdog,
    requests: StopRequests,
) -> int:
    """Build everything, find where to start, do what was asked for; returns the exit code."""
    import torch

    from ds_classifier import checkpoint, preflight
    from ds_classifier import engine as engines
    from ds_classifier.checkpoint_writer import check_room
    from ds_classifier.diffusion import create_gaussian_diffusion, create_schedule_sampler
    from ds_classifier.memory import MemoryAdvice
    from ds_classifier.model import create_classifier
    from ds_classifier.noised_classifier import NoisedClassifier
    from ds_classifier.run_costs import rehearsed

    settings, run_dir = resolved.settings, Path(resolved.settings.run_dir)
    # Everything that can be wrong is built before the ranks meet, so that errors come at once.
    torch.manual_seed(settings.seed)
    classifier = create_classifier(**settings.model_kwargs())
    parameters = sum(p.numel() for p in classifier.parameters())
    ds_config = fill_bucket_sizes(resolved.ds_config, parameters)
    diffusion = create_gaussian_diffusion(**settings.diffusion_kwargs())
    device = preflight.join(resolved, shards, val_shards)
    requests.defer()
    watch.join()
    lock = RunLock(run_dir)
    if command.dry_run:
        distributed.on_rank_0(lock.refuse_if_held, device)
    elif not command.instead:
        distributed.on_rank_0(lambda: lock.acquire(distributed.say), device)
        watch.release_at_end(lock.release)
    start = Start.fresh(settings)
    if not command.overfit_steps:
        start = find_start(resolved, facts_of(resolved, shards), device)
    if start is None:
        watch.leave()
        distributed.finish()
        return 0
    start = load_given_weights(classifier, start, settings, shards.manifest.classes, device)
    if not command.instead:
        words = launched_as(resolved.batch.world_size)
        distributed.on_rank_0(lambda: check_room(run_dir / "checkpoints", parameters), device)
        distributed.on_rank_0(lambda: write_run_files(run_dir, resolved, ds_config, words), device)

    classifier.activation_checkpointing = settings.activation_checkpointing
    if settings.compile:
        classifier.compile()  # in place: parameter names stay what they are
    module = NoisedClassifier(classifier, diffusion)
    batch = rehearsed(resolved.batch) if command.dry_run else resolved.batch
    engine = engines.create_engine(module, ds_config | batch.ds_numbers(), lr_factor(settings))
    sampler = create_schedule_sampler(settings.schedule_sampler, diffusion.num_timesteps, device)
    if start.state is not None:
        checkpoint.load(start.checkpoint, start.state, engine=engine, sampler=sampler)
    watch.advice = MemoryAdvice(device, micro_batch=batch.micro, image_size=settings.image_size)
    job = Job(resolved, shards, val_shards, start, engine, sampler, StopVote(requests), watch)
    announce(job, command)
    if command.overfit_steps:
        code = overfit(job, steps=command.overfit_steps)
    elif command.dry_run:
        code = rehearse(job)
    else:
        code = train(job)
    watch.leave()
    distributed.finish()
    if distributed.rank() == 0 and not command.instead:  # alone: nobody waits for it any more
        from ds_classifier.report import write_report

        failures.tolerate("report.html", lambda: write_report(run_dir))
    return code


@dataclasses.dataclass(frozen=True)
class Start:
    """Where training starts. state: of the checkpoint, if from one, which rank 0 has at its path.
    origin: in words. notes: what of other weights could not be kept. initialized: from those."""

    origin: str
    checkpoint: Path | None = None
    state: dict[str, Any] | None = None
    notes: Sequence[str] = ()
    initialized: bool = False

    @classmethod
    def fresh(cls, settings: Settings) -> Start:
        return cls(f"seed {settings.seed}")


@dataclasses.dataclass(frozen=True)
class Job:
    """What the ranks have built together, before its first step."""

    resolved: Resolved
    shards: ShardSet
    val_shards: ShardSet | None
    start: Start
    engine: Any
    sampler: Any
    stop: StopVote
    watch: Watchdog

    @property
    def run_dir(self) -> Path:
        return Path(self.resolved.settings.run_dir)

    def loaders(self, first_step: int, *, resolved: Resolved | None = None):
        """See `create_loaders`; resolved: another batch or length than the job's."""
        return create_loaders(
            resolved or self.resolved, self.shards, self.val_shards, first_step, self.engine.device
        )


def facts_of(resolved: Resolved, shards: ShardSet) -> dict[str, Any]:
    """What a checkpoint says of the training that it is of."""
    return {
        "settings": resolved.settings.recorded(),
        "classes": shards.manifest.classes,
        "data": shards.manifest.fingerprint,
        "deepspeed": resolved.shaping,
    }


def find_start(resolved: Resolved, facts: dict[str, Any], device) -> Start | None:
    """The checkpoint to go on from, or fresh weights; None, and said so, of a finished run."""
    settings, run_dir = resolved.settings, Path(resolved.settings.run_dir)
    found, state = find_checkpoint(settings, run_dir, device)
    if state is not None:
        refuse_changes(state, settings, facts)
    finished = distributed.on_rank_0(lambda: read_done(run_dir), device)
    if finished is not None:
        distributed.say(
            f"{run_dir} is finished ({finished}). To train again, choose another --run_dir."
        )
        return None
    if state is None:
        return Start.fresh(settings)
    return Start(f"checkpoint {found}, step {state['step']}", found, state)


def load_given_weights(
    classifier, start: Start, settings: Settings, names: list[str], device
) -> Start:
    """Those of --init_from, where no checkpoint goes before them. names: of the classes."""
    from ds_classifier.initial_weights import load_initial_weights

    if start.state is not None or not settings.init_from:
        return start
    source = Path(settings.init_from)
    origin, *notes = distributed.on_rank_0(
        lambda: load_initial_weights(classifier, source, settings, names), device
    )
    return dataclasses.replace(start, origin=origin, notes=notes, initialized=True)


def lr_factor(settings: Settings) -> Callable[[int], float] | None:
    """The learning rate of step k as a share of the peak; None: the JSON's scheduler decides."""
    from ds_classifier.engine import linear_anneal

    if settings.anneal_lr is None:
        return None
    return linear_anneal(settings.iterations) if settings.anneal_lr else lambda step: 1.0


def train(job: Job) -> int:
    """Train to the last step, or until asked to stop; returns the exit code."""
    from ds_classifier import training
    from ds_classifier.checkpoint_writer import CheckpointWriter
    from ds_classifier.evaluation import evaluate
    from ds_classifier.picture_grid import marked_sheet, save_grid
    from ds_classifier.predictions import predict_grid
    from ds_classifier.sanity import SanityWatch
    from ds_classifier.skipped_steps import SkippedSteps

    settings, batch = job.resolved.settings, job.resolved.batch
    engine, stop, watch, run_dir = job.engine, job.stop, job.watch, job.run_dir
    state, facts = job.start.state, facts_of(job.resolved, job.shards)
    loader, val_loader = job.loaders(engine.global_steps)
    bad_samples = training.BadSamples(
        run_dir,
        device=engine.device,
        known=state["bad_samples"] if state else 0,
        limit=settings.max_bad_samples,
        epoch_samples=job.shards.manifest.samples,
    )
    writer = CheckpointWriter(
        run_dir / "checkpoints",
        engine=engine,
        sampler=job.sampler,
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        max_failed=settings.max_failed_saves,
    )

    def save(val_loss: float | None) -> None:
        counts = {
            "samples": engine.global_steps * batch.total,
            "bad_samples": bad_samples.total(),
            "world_size": batch.world_size,
        }
        writer.save(facts | counts, val_loss=val_loss)

    val_samples = job.val_shards.manifest.samples if job.val_shards is not None else 0

    def show_pictures() -> None:
        """The grid of pictures and predictions, of this step, for the report and TensorBoard."""
        grid = predict_grid(
            engine.module.classifier,
            engine.module.diffusion,
            job.val_shards,
            image_size=settings.image_size,
            channels=settings.in_channels,
            device=engine.device,
            step=engine.global_steps,
        )
        if grid is not None:
            (run_dir / "eval").mkdir(exist_ok=True)
            save_grid(grid, run_dir / "eval" / "validation.pictures.png")
            sheet = marked_sheet(grid, job.shards.manifest.classes)
            logger.picture("val_pictures", sheet, engine.global_steps)

    def validate() -> dict[str, float]:
        """The means over all noise levels, and those at t = 0 beside them, as NAME_t0."""
        keywords = dict(samples=val_samples, device=engine.device, noised=settings.noised)

        def batches():
            return stop.batches(watch.batches(val_loader))

        means, bad = evaluate(engine.module, batches(), **keywords)
        at_0, _ = evaluate(engine.module, batches(), t=0, **keywords)
        means |= {f"{name}_t0": at_0[name] for name in ("loss", "acc@1", "acc@5")}
        if distributed.rank() == 0:
            failures.tolerate("the grid of pictures", show_pictures)
        return means | ({"bad_samples": bad} if bad else {})

    logger = start_log(job)
    finished = training.train(
        engine,
        iter(loader),
        cadence=training.Cadence(
            iterations=settings.iterations,
            log=settings.log_interval,
            save=settings.save_interval,
            evaluate=settings.eval_interval,
        ),
        sampler=job.sampler,
        num_timesteps=engine.module.diffusion.num_timesteps,
        seed=settings.seed,
        noised=settings.noised,
        skipped=SkippedSteps(
            engine,
            run_dir=run_dir,
            limit=min(settings.max_skipped_steps, settings.iterations),
            key_of=loader.dataset.key,
        ),
        bad_samples=bad_samples,
        save=save,
        check_saves=writer.check,
        validate=validate if val_loader is not None else None,
        validate_first=job.start.initialized,
        stop=stop,
        watch=watch,
        logger=logger,
        arithmetic=arithmetic(job),
        sanity=SanityWatch(guessing(job.shards), val_samples=val_samples),
    )
    with watch.during("save"):
        writer.finish()
    logger.close()
    step = engine.global_steps
    if not finished:
        events.append(run_dir, "stop", step=step, reason=stop.reason)
        again = "the same command"
        if settings.resume_checkpoint:  # which would start from that one each time
            again += " without --resume_checkpoint"
        distributed.say(f"stopped by {stop.reason} after step {step}; run {again} to go on")
        return STOPPED
    distributed.on_rank_0(lambda: (run_dir / DONE).write_text(f"step {step}\n"), engine.device)
    events.append(run_dir, "finish", step=step)
    distributed.say(f"finished: {step} steps; everything is in {run_dir}/")
    return 0


def start_log(job: Job):
    """The run's logger, and a word of this start in its history; every rank calls it."""
    from ds_classifier.engine import describe_device
    from ds_classifier.logger import RunLogger

    run_dir, settings, step = job.run_dir, job.resolved.settings, job.engine.global_steps
    reached = events.last_logged_step(run_dir)  # before the log is cut to what is resumed from
    logger = distributed.together(
        lambda: RunLogger(run_dir, first_step=step, wandb=settings.wandb), job.engine.device
    )
    began = dict(
        step=step,
        iterations=settings.iterations,
        world_size=job.resolved.batch.world_size,
        host=platform.node(),
        device=describe_device(job.engine.device),
    )
    if job.start.state is None:
        events.append(run_dir, "start", **began)
    else:
        events.append(run_dir, "resume", reached=reached, **began)
    return logger


def rehearse(job: Job) -> int:
    """--dry_run: what `dry_run.py` measures, on this job."""
    from ds_classifier.dry_run import TIMED_STEPS, dry_run
    from ds_classifier.run_costs import rehearsed
    from ds_classifier.shutdown import Stopped

    first, batch = job.engine.global_steps, rehearsed(job.resolved.batch)
    settings = job.resolved.settings.replace(iterations=first + 100 * TIMED_STEPS)
    short = dataclasses.replace(job.resolved, settings=settings, batch=batch)
    loader, val_loader = job.loaders(first, resolved=short)
    try:
        dry_run(
            job.engine,
            loader,
            val_loader,
            settings=job.resolved.settings,
            batch=job.resolved.batch,
            first_step=first,
            sampler=job.sampler,
            facts=facts_of(job.resolved, job.shards),
            arithmetic=arithmetic(job),
            stop=job.stop,
            watch=job.watch,
        )
    except Stopped:
        distributed.say(f"stopped by {job.stop.reason}")
        return STOPPED
    return 0


def overfit(job: Job, *, steps: int) -> int:
    """--overfit_batch: exit code 0 if the batch was learnt by heart, 1 if not."""
    from itertools import islice

    from ds_classifier.overfit import overfit_batch

    settings, batch = job.resolved.settings, job.resolved.batch
    loader, _ = job.loaders(0)
    result = overfit_batch(
        job.engine,
        list(islice(iter(loader), batch.accumulation)),
        steps=steps,
        log_interval=settings.log_interval,
        num_classes=settings.num_classes,
        num_timesteps=job.engine.module.diffusion.num_timesteps,
        seed=settings.seed,
        noised=settings.noised,
        stop=job.stop,
        watch=job.watch,
    )
    if result.stopped:
        distributed.say(f"stopped by {job.stop.reason} after step {result.steps}")
        return STOPPED
    distributed.say(str(result))
    return 0 if result.learnt else failures.FAILED


def arithmetic(job: Job):
    """What a rank's pictures a second are in operations."""
    import torch

    from ds_classifier import engine as engines
    from ds_classifier.flops import Arithmetic, forward_flops

    device = job.engine.device
    return Arithmetic(
        forward_flops(job.resolved.settings.model_kwargs()),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        precision=engines.precision(job.engine),
    )


def guessing(shards: ShardSet):
    """What is known of the labels without looking; of very many, of a million of them."""
    from ds_classifier.sanity import Guessing

    every = max(1, len(shards.index) // 1_000_000)
    return Guessing.of(shards.index["label"][::every], len(shards.manifest.classes))


def launched_as(world_size: int) -> str:
    """Shell lines that start the run again; several nodes need their hostfile added."""
    arguments = [without_logins(word) for word in sys.argv if not word.startswith("--local_rank")]
    launcher = [sys.executable]
    if "LOCAL_RANK" in os.environ and world_size > 1:
        launcher = ["deepspeed", "--num_gpus", str(distributed.local_world_size())]
        if world_size > distributed.local_world_size():
            launcher = ["deepspeed", "--hostfile", "HOSTS"]
    folder = shlex.quote(os.getcwd())
    return f"# world size {world_size}\ncd {folder}\n{shlex.join([*launcher, *arguments])}\n"


def create_loaders(
    resolved: Resolved, shards: ShardSet, val_shards: ShardSet | None, first_step: int, device
):
    """This rank's training batches from a step on, and the validation batches if there are any."""
    from ds_classifier.data.loader import (
        ShardDataset,
        TrainingPositions,
        ValidationPositions,
        create_loader,
        default_workers,
    )
    from ds_classifier.data.order import SampleOrder

    settings, batch = resolved.settings, resolved.batch
    rank, world_size = distributed.rank(), batch.world_size
    workers = settings.workers
    if workers < 0:
        workers = default_workers(distributed.local_world_size())
    pixels = dict(image_size=settings.image_size, channels=settings.in_channels)
    order = SampleOrder(
        [shard.samples for shard in shards.manifest.shards], **settings.order_kwargs()
    )
    positions = TrainingPositions(
        order,
        first_step=first_step,
        steps=settings.iterations,
        global_batch=batch.total,
        micro_batch=batch.micro,
        rank=rank,
        world_size=world_size,
    )
    distributed.raise_together(cache_problem(resolved, shards, order, first_step), device)
    dataset = ShardDataset(
        shards,
        order=order,
        batches=positions,
        seed=settings.seed,
        random_crop=settings.random_crop,
        random_flip=settings.random_flip,
        fast=settings.resize == "fast",
        **pixels,
    )
    loader = create_loader(dataset, positions, workers=workers)
    if val_shards is None:
        return loader, None
    val_positions = ValidationPositions(
        val_shards.manifest.samples, batch=batch.micro, rank=rank, world_size=world_size
    )
    # Validation is always exact: its figures stand beside those of other runs.
    return loader, create_loader(
        ShardDataset(val_shards, batches=val_positions, **pixels),
        val_positions,
        workers=min(workers, 1),
    )


def cache_problem(resolved: Resolved, shards: ShardSet, order, first_step: int) -> str | None:
    """Why this node's cache cannot hold the shards that it reads side by side, or None."""
    from ds_classifier.data.order import node_shards

    settings, batch = resolved.settings, resolved.batch
    if not isinstance(shards, RemoteShardSet) or not settings.cache_gb:
        return None
    first = distributed.rank() - distributed.local_rank()
    side_by_side = node_shards(
        order,
        first_step,
        global_batch=batch.total,
        ranks=range(first, first + distributed.local_world_size()),
        world_size=batch.world_size,
    )
    need = sum(shards.manifest.shards[shard].bytes for shard in side_by_side) / 1e9
    if need <= settings.cache_gb:
        return None
    return (
        f"--cache_gb: got {settings.cache_gb:g}; need at least {need:.3g} for the "
        f"{len(side_by_side)} shards that a node reads side by side, better twice that; do: raise "
        "it, or lower --lanes"
    )


def announce(job: Job, command: CommandLine) -> None:
    """The header of a run: what is trained on what, and how the numbers came about."""
    from ds_classifier import engine as engines

    settings, batch = job.resolved.settings, job.resolved.batch
    engine, shards, say = job.engine, job.shards, distributed.say
    parameters = sum(p.numel() for p in engine.module.parameters())
    schedule = {None: "the JSON's WarmupDecayLR", True: "linear to 0", False: "constant"}
    if settings.anneal_lr is None and "scheduler" not in job.resolved.ds_config:
        schedule[None] = "constant"
    held_out = "no validation"
    if job.val_shards is not None:
        held_out = f"{_split(job.val_shards)} in {shown(settings.val_data_dir)} to validate on"
    say(
        f"classifier  {parameters:,} parameters, {arithmetic(job).forward / 1e9:.3g} GFLOP forward "
        f"an image; {settings.image_size} px, {settings.num_classes} classes; "
        f"{settings.noise_schedule} noise, {settings.diffusion_steps} steps"
    )
    say(f"data        {_split(shards)} in {shown(settings.data_dir)}; {held_out}")
    if neighbours(shards.index).sorted_by_class and settings.shuffle_shards != "lane":
        say(f"{'':12}its shards are sorted by class: --shuffle_shards lane would mix them better")
    say(f"batch       {batch}; {shards.manifest.samples / batch.total:.1f} steps an epoch")
    say(
        f"engine      {engines.precision(engine)}, ZeRO {engine.zero_optimization_stage()}, on "
        f"{engines.describe_device(engine.device)}; lr {settings.lr:g}, "
        f"{schedule[settings.anneal_lr]}"
    )
    length = f"{settings.iterations:,} steps in all"
    if command.overfit_steps:
        length = f"one batch again and again, {command.overfit_steps} steps at most"
    say(f"start       from {job.start.origin}; {length}")
    for note in job.start.notes:
        say(f"  NOTE      {note}")
    where = "stays as it is" if command.instead else "(log.jsonl, progress.csv, tb/, checkpoints/)"
    say(f"run         {job.run_dir}/ {where}")


def _split(shards: ShardSet) -> str:
    count = len(shards.manifest.shards)
    return f"{shards.manifest.samples:,} pictures ({count} shard{'s' * (count > 1)})"


if __name__ == "__main__":
    sys.exit(main())
