"""A run on one rank: build what it needs, and do what was asked for."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ds_classifier import distributed
from ds_classifier.checkpoint import disk
from ds_classifier.checkpoint.fixed_state import (
    refuse_unstorable,
    settle_fixed_state,
    trained_count,
)
from ds_classifier.checkpoint.writer import checkpoint_bytes
from ds_classifier.config import CommandLine, Settings
from ds_classifier.config.deepspeed_json import Resolved
from ds_classifier.data.augment import create_augmentation
from ds_classifier.data.shards import ShardSet
from ds_classifier.diffusion import (
    GaussianDiffusion,
    LossSecondMomentSampler,
    UniformSampler,
    create_gaussian_diffusion,
    create_schedule_sampler,
    timestep_range,
)
from ds_classifier.distributed import failures
from ds_classifier.distributed.engine import deepspeed_engine, deepspeed_reports
from ds_classifier.distributed.engine.deepspeed_engine import Group
from ds_classifier.distributed.memory import MemoryAdvice
from ds_classifier.distributed.stopping import STOPPED, StopRequests, StopVote
from ds_classifier.distributed.watchdog import Watchdog
from ds_classifier.evaluation.meter import Meter
from ds_classifier.loss import NoisedClassifier, noised_classifier
from ds_classifier.model import create_classifier
from ds_classifier.model.own import try_once
from ds_classifier.training import loop
from ds_classifier.training.between_steps import Checkpoints, Validation
from ds_classifier.training.logs.log import RunLogger, TrainingLog, read_rows
from ds_classifier.training.logs.lost import BadSamples, Lost, SkippedSteps, TooManyBadSamples
from ds_classifier.training.logs.profile import Profile
from ds_classifier.training.logs.sanity import SanityWatch
from ds_classifier.training.logs.screen import announce, way
from ds_classifier.training.parameter_groups import divide_parameters
from ds_classifier.training.rehearsal import preflight
from ds_classifier.training.rehearsal.costs import rehearsed
from ds_classifier.training.rehearsal.dry_run import dry_run
from ds_classifier.training.rehearsal.overfit import overfit
from ds_classifier.training.run_dir import DONE, append_event, last_logged_step
from ds_classifier.training.setup import Setup, facts_of, lr_factor
from ds_classifier.training.start import open_run
from ds_classifier.training.step import remember


def build(
    command: CommandLine,
    resolved: Resolved,
    shards: ShardSet,
    val_shards: ShardSet | None,
    *,
    watch: Watchdog,
    requests: StopRequests,
    shell_lines: str,
) -> Setup | None:
    """Join the other ranks and build everything.

    Returns None if there is nothing to do: the run is finished, or was to be looked at only.
    shell_lines: start this program again; they are kept in the run directory.
    """
    settings = resolved.settings
    # Everything that can be wrong is built before the ranks meet, so that errors come at once.
    module, groups = build_module(resolved, shards.manifest.targets.kind)
    classifier = module.classifier
    resolved = resolved.with_parameters(trained_count(classifier))
    device = preflight.join(resolved, shards, val_shards)
    if not command.preflight:
        requests.defer()
        watch.stop_asked = lambda: requests.reason
        watch.join()
    start = open_run(
        command,
        resolved,
        facts_of(resolved, shards),
        classifier=classifier,
        shell_lines=shell_lines,
        release_at_end=watch.release_at_end,
        device=device,
    )
    if command.preflight:
        preflight.look(resolved, shards, device, checkpoint_size=checkpoint_bytes(classifier))
    if start is None or command.preflight:
        return None
    resolved = resolved.with_part(start.part_steps)
    trained = resolved.with_batch(rehearsed(resolved.batch)) if command.dry_run else resolved
    if trained.kernel:
        deepspeed_engine.load_kernel(trained.kernel, device)
    checkpoint = None if start.state is None else Path(start.checkpoint)
    fixed = settle_fixed_state(classifier, checkpoint, device)
    engine = deepspeed_engine.create_engine(
        *(module, trained.ds_config, lr_factor(settings, start.part_steps), groups),
        muon_lr_scale=settings.muon_lr_scale,
    )
    if trained.reports:  # not before, since DeepSpeed's kernels would print their parameters
        deepspeed_reports.send_to_file(Path(settings.run_dir) / "deepspeed.log")
    sampler = _schedule_sampler(settings, module.diffusion, device)
    if checkpoint is not None:
        disk.load(checkpoint, start.state, engine=engine, sampler=sampler)
    watch.advice = MemoryAdvice(
        device, micro_batch=trained.batch.micro, image_size=settings.image_size
    )
    vote = StopVote(requests)
    return Setup(resolved, shards, val_shards, start, groups, engine, fixed, sampler, vote, watch)


def _schedule_sampler(
    settings: Settings, diffusion: GaussianDiffusion, device: torch.device
) -> UniformSampler | LossSecondMomentSampler:
    levels = timestep_range(settings.t_range, diffusion)
    return create_schedule_sampler(
        settings.schedule_sampler, diffusion.num_timesteps, device, levels=levels
    )


def all_of(*parts: Callable[[], Any]) -> list[Any]:
    """Return what each function returns. Raise ValueError with the problems of all of them."""
    found, problems = [], []
    for part in parts:
        try:
            found.append(part())
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n  ".join(problems))
    return found


def build_module(resolved: Resolved, kind: str) -> tuple[NoisedClassifier, list[Group] | None]:
    """Return the classifier and its loss, with the weights of the seed; a problem ends all ranks.

    Returns also the groups of its parameters, see `divide_parameters`.

    kind: of the data's targets. What is the user's is tried once: a network that is not the
    encoder, a loss, an augmentation.
    """
    settings = resolved.settings
    torch.manual_seed(settings.seed)
    try:
        classifier = create_classifier(**settings.model_kwargs())
        if settings.classifier:
            refuse_unstorable(classifier, settings.classifier)
            config = resolved.ds_config
            deepspeed_engine.refuse_single_numbers(classifier, settings.classifier, config)
            precision = deepspeed_engine.precision_of(config)
            try_once(
                classifier,
                settings.classifier,
                image_size=settings.image_size,
                in_channels=settings.in_channels,
                dtype=deepspeed_engine.DTYPES[precision],
            )
        optimizer = resolved.ds_config["optimizer"]["type"]
        diffusion = create_gaussian_diffusion(**settings.diffusion_kwargs())
        groups, module, *_ = all_of(
            lambda: divide_parameters(classifier, settings, optimizer),
            lambda: noised_classifier(classifier, settings, kind),
            lambda: timestep_range(settings.t_range, diffusion),
            lambda: create_augmentation(settings),
        )
        return module, groups
    except ValueError as error:
        if distributed.world_size() > 1:  # a module of the user's may be missing on one node only
            distributed.refuse(failures.summary(error))
        raise


def run(command: CommandLine, setup: Setup) -> int:
    """Do what the command asks for, on this rank, and return the exit code."""
    announce(setup, command)
    if command.overfit_steps:
        return overfit(setup, steps=command.overfit_steps)
    if command.dry_run:
        return dry_run(setup)
    try:
        return train(setup)
    finally:
        distributed.live("")


def train(setup: Setup) -> int:
    """Train to the last step, or until asked to stop; return the exit code."""
    run = assemble(setup)
    try:
        finished = loop.train(run)
    except TooManyBadSamples:
        run.checkpoints.save(None)  # what was learnt from the other samples is sound
        run.checkpoints.finish()
        raise
    run.checkpoints.finish()
    run.log.close()
    if "comms_logger" in setup.resolved.reports:
        deepspeed_reports.summarize_communication()
    run_dir, step, stop = setup.run_dir, run.step, setup.stop
    if not finished:
        append_event(run_dir, "stop", step=step, reason=stop.reason)
        again = "the same command"
        if setup.resolved.settings.resume_checkpoint:  # which would start from that one each time
            again += " without --resume_checkpoint"
        distributed.say(f"stopped by {stop.reason} after step {step}; run {again} to continue")
        return STOPPED
    device = setup.engine.device
    distributed.on_rank_0(lambda: (run_dir / DONE).write_text(f"step {step}\n", "utf-8"), device)
    append_event(run_dir, "finish", step=step)
    steps = "1 step" if step == 1 else f"{step:,} steps"
    distributed.say(f"finished: {steps}; everything is in {run_dir}/")
    return 0


def assemble(setup: Setup) -> loop.Run:
    """Return the parts of a training run, each of which knows the others that it needs."""
    settings, engine, run_dir = setup.resolved.settings, setup.engine, setup.run_dir
    recent = setup.recent_images()
    known = setup.steps_to_know(recent)
    loader, val_loader = setup.loaders(engine.global_steps - known)
    meter = Meter(engine.module.diffusion.num_timesteps, engine.device, setup.targets)
    state = setup.start.state
    bad_samples = BadSamples(
        run_dir,
        device=engine.device,
        known=state["bad_samples"] if state else 0,
        limit=settings.max_bad_samples,
        epoch_samples=setup.shards.manifest.samples,
    )
    skipped_steps = SkippedSteps(
        engine,
        run_dir=run_dir,
        limit=min(settings.max_skipped_steps, setup.start.part_steps),
        key_of=loader.dataset.key,
    )
    lost = Lost(bad_samples, skipped_steps)
    log = TrainingLog(
        open_log(setup),
        engine=engine,
        meter=meter,
        lost=lost,
        arithmetic=setup.arithmetic,
        sanity=watch_sanity(setup),
        iterations=settings.steps,
        num_classes=settings.num_classes,
        compiled=settings.compile,
    )
    batches = setup.watch.batches(iter(loader))
    for _ in range(known):
        remember(
            recent,
            [next(batches).to(engine.device) for _ in range(setup.resolved.batch.accumulation)],
        )
    return loop.Run(
        start=setup.start,
        cadence=loop.Cadence(
            iterations=settings.steps,
            log=settings.log_interval,
            validate=settings.eval_interval if val_loader is not None else 0,
            save=settings.save_interval,
        ),
        engine=engine,
        batches=batches,
        objective=setup.objective(recent),
        meter=meter,
        log=log,
        lost=lost,
        checkpoints=Checkpoints(setup, log, bad_samples),
        validation=Validation(setup, val_loader, log),
        stop=setup.stop,
        watch=setup.watch,
        profile=Profile(run_dir, settings.profile, engine=engine, pause=log.pause),
    )


def open_log(setup: Setup) -> RunLogger:
    """Open the files of the log, and note this start in events.jsonl; every rank calls it."""
    run_dir, settings, step = setup.run_dir, setup.resolved.settings, setup.engine.global_steps
    reached = last_logged_step(run_dir)  # before the log is cut to what is resumed from
    logger = distributed.together(
        lambda: RunLogger(run_dir, first_step=step, wandb=settings.wandb), setup.engine.device
    )
    began = dict(
        step=step,
        iterations=settings.steps,
        world_size=setup.resolved.batch.world_size,
        host=platform.node(),
        way=way(setup),
        device=deepspeed_engine.describe_device(setup.engine.device),
        guessing=dataclasses.asdict(setup.guessing),
        targets=setup.targets.to_json(),
        val_samples=setup.val_samples,
    )
    if setup.start.state is None:
        append_event(run_dir, "start", **began)
    else:
        append_event(run_dir, "resume", reached=reached, **began)
        if setup.start.part_begin == step > 0:
            append_event(run_dir, "extend", step=step, iterations=settings.steps)
    return logger


def watch_sanity(setup: Setup) -> SanityWatch:
    """Return the watch over the rows, which on rank 0 knows those logged before a resume."""
    sanity = SanityWatch(setup.guessing, val_samples=setup.val_samples)
    if distributed.rank() == 0:
        rows = setup.run_dir / "log.jsonl"
        failures.tolerate("a look at the log so far", lambda: sanity.recall(read_rows(rows)))
    return sanity
