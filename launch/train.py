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
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier import distributed
from ds_classifier.common.urls import shown, without_logins
from ds_classifier.config import CommandLine, Settings, parse_training_command
from ds_classifier.config.deepspeed_json import Resolved, fill_bucket_sizes, read_ds_config, resolve
from ds_classifier.data.shards import ShardSet
from ds_classifier.data.store import open_named
from ds_classifier.distributed import failures, launcher
from ds_classifier.distributed.stopping import STOPPED, StopRequests, StopVote
from ds_classifier.distributed.watchdog import Watchdog
from ds_classifier.training import events
from ds_classifier.training.run_dir import DONE, write_run_files
from ds_classifier.training.run_lock import RunLock

if TYPE_CHECKING:
    from ds_classifier.training.job import Job


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
            from ds_classifier.training.job import facts_of, find_start
            from ds_classifier.training.rehearsal import preflight

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

    from ds_classifier.checkpoint import disk
    from ds_classifier.checkpoint.writer import check_room
    from ds_classifier.diffusion import create_schedule_sampler
    from ds_classifier.distributed import deepspeed_engine
    from ds_classifier.distributed.memory import MemoryAdvice
    from ds_classifier.loss import noised_classifier
    from ds_classifier.model import create_classifier
    from ds_classifier.training.header import announce
    from ds_classifier.training.job import (
        Job,
        Start,
        facts_of,
        find_start,
        load_given_weights,
        lr_factor,
    )
    from ds_classifier.training.rehearsal import preflight
    from ds_classifier.training.rehearsal.costs import rehearsed

    settings, run_dir = resolved.settings, Path(resolved.settings.run_dir)
    # Everything that can be wrong is built before the ranks meet, so that errors come at once.
    torch.manual_seed(settings.seed)
    classifier = create_classifier(**settings.model_kwargs())
    parameters = sum(p.numel() for p in classifier.parameters())
    ds_config = fill_bucket_sizes(resolved.ds_config, parameters)
    module = noised_classifier(classifier, settings)
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

    batch = rehearsed(resolved.batch) if command.dry_run else resolved.batch
    engine = deepspeed_engine.create_engine(
        module, ds_config | batch.ds_numbers(), lr_factor(settings)
    )
    sampler = create_schedule_sampler(
        settings.schedule_sampler, module.diffusion.num_timesteps, device
    )
    if start.state is not None:
        disk.load(start.checkpoint, start.state, engine=engine, sampler=sampler)
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
        from ds_classifier.report.page import write_report

        failures.tolerate("report.html", lambda: write_report(run_dir))
    return code


def train(job: Job) -> int:
    """Train to the last step, or until asked to stop; returns the exit code."""
    from ds_classifier.checkpoint.writer import CheckpointWriter
    from ds_classifier.evaluation.evaluate import evaluate
    from ds_classifier.evaluation.image_grid import marked_sheet, save_grid
    from ds_classifier.evaluation.predictions import predict_grid
    from ds_classifier.training import loop
    from ds_classifier.training.job import arithmetic, facts_of, guessing
    from ds_classifier.training.log import read_rows
    from ds_classifier.training.sanity import SanityWatch
    from ds_classifier.training.skipped_steps import SkippedSteps

    settings, batch = job.resolved.settings, job.resolved.batch
    engine, stop, watch, run_dir = job.engine, job.stop, job.watch, job.run_dir
    state, facts = job.start.state, facts_of(job.resolved, job.shards)
    loader, val_loader = job.loaders(engine.global_steps)
    bad_samples = loop.BadSamples(
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
        on_failure=lambda step, message: events.append(
            run_dir, "save failed", step=step, message=message
        ),
    )

    def save(val_loss: float | None) -> None:
        counts = {
            "samples": engine.global_steps * batch.total,
            "bad_samples": bad_samples.total(),
            "world_size": batch.world_size,
        }
        writer.save(facts | counts, val_loss=val_loss)

    def show_images() -> None:
        """The grid of images and predictions, of this step, for the report and TensorBoard."""
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
            logger.image("val_pictures", sheet, engine.global_steps)

    def validate() -> dict[str, float]:
        """The means over all noise levels, and those at t = 0 beside them, as NAME_t0."""
        keywords = dict(samples=job.val_samples, device=engine.device, noised=settings.noised)

        def batches():
            return stop.batches(watch.batches(val_loader))

        means, bad = evaluate(engine.module, batches(), **keywords)
        at_0, _ = evaluate(engine.module, batches(), t=0, **keywords)
        means |= {f"{name}_t0": at_0[name] for name in ("loss", "acc@1", "acc@5")}
        if distributed.rank() == 0:
            failures.tolerate("the grid of images", show_images)
        return means | ({"bad_samples": bad} if bad else {})

    logger = start_log(job)
    sanity = SanityWatch(guessing(job.shards), val_samples=job.val_samples)
    if distributed.rank() == 0:
        rows = run_dir / "log.jsonl"
        failures.tolerate("a look at the log so far", lambda: sanity.recall(read_rows(rows)))
    try:
        finished = loop.train(
            engine,
            iter(loader),
            cadence=loop.Cadence(
                iterations=settings.iterations,
                log=settings.log_interval,
                save=settings.save_interval,
                evaluate=settings.eval_interval,
            ),
            sampler=job.sampler,
            num_timesteps=engine.module.diffusion.num_timesteps,
            seed=settings.seed,
            noised=settings.noised,
            compiled=settings.compile,
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
            sanity=sanity,
        )
    except loop.TooManyBadSamples:
        with watch.during("save"):
            writer.finish()
        raise
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
    steps = "1 step" if step == 1 else f"{step:,} steps"
    distributed.say(f"finished: {steps}; everything is in {run_dir}/")
    return 0


def start_log(job: Job):
    """The run's logger, and a word of this start in its history; every rank calls it."""
    from ds_classifier.distributed.deepspeed_engine import describe_device
    from ds_classifier.training.job import guessing
    from ds_classifier.training.log import RunLogger

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
        guessing=dataclasses.asdict(guessing(job.shards)),
        val_samples=job.val_samples,
    )
    if job.start.state is None:
        events.append(run_dir, "start", **began)
    else:
        events.append(run_dir, "resume", reached=reached, **began)
    return logger


def rehearse(job: Job) -> int:
    """--dry_run: what `dry_run.py` measures, on this job."""
    from ds_classifier.distributed.stopping import Stopped
    from ds_classifier.training.job import arithmetic, facts_of
    from ds_classifier.training.rehearsal.costs import rehearsed
    from ds_classifier.training.rehearsal.dry_run import TIMED_STEPS, dry_run

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

    from ds_classifier.training.rehearsal.overfit import overfit_batch

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


if __name__ == "__main__":
    sys.exit(main())
