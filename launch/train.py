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
from datetime import timedelta
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier import distributed, events, failures
from ds_classifier.config import CommandLine, Settings, parse_training_command
from ds_classifier.data.shards import ShardSet, neighbours
from ds_classifier.data.store import RemoteShardSet, open_named
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
    world_size = distributed.world_size()
    if command.settings.expect_world not in (0, world_size):
        raise ValueError(
            f"--expect_world: got world size {world_size}; need {command.settings.expect_world}; "
            "do: look at the hostfile's path, which the launcher forgives if it is wrong"
        )
    resolved = resolve(command, read_ds_config(command.deepspeed_config), world_size=world_size)
    run_dir = Path(resolved.settings.run_dir)
    requests.also_by(max_minutes=resolved.settings.max_minutes, run_dir=run_dir)
    shards, val_shards, resolved = open_data(resolved)
    with Watchdog(run_dir, minutes=resolved.settings.time_outs()) as watch:
        return train_on(resolved, shards, val_shards, run_dir, watch, requests)


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
            f"{settings.val_data_dir}; need the same list as the {len(classes)} in "
            f"{settings.data_dir}; do: convert both in one call, with --val"
        )
    if settings.num_classes not in (0, len(classes)):
        raise ValueError(
            f"--num_classes: got {settings.num_classes}; need {len(classes)}, as many as "
            f"{settings.data_dir} has; do: drop the flag"
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
    resolved: Resolved,
    shards: ShardSet,
    val_shards: ShardSet | None,
    run_dir: Path,
    watch: Watchdog,
    requests: StopRequests,
) -> int:
    """Build everything, find where to start, train; returns the exit code."""
    distributed.quiet_libraries()
    import torch

    from ds_classifier import checkpoint
    from ds_classifier import engine as engines
    from ds_classifier.checkpoint_writer import CheckpointWriter, check_room
    from ds_classifier.diffusion import create_gaussian_diffusion, create_schedule_sampler
    from ds_classifier.evaluation import evaluate
    from ds_classifier.export import load_initial_weights
    from ds_classifier.logger import RunLogger
    from ds_classifier.memory import MemoryAdvice
    from ds_classifier.model import create_classifier
    from ds_classifier.noised_classifier import NoisedClassifier
    from ds_classifier.picture_grid import marked_sheet, save_grid
    from ds_classifier.predictions import predict_grid
    from ds_classifier.report import write_report
    from ds_classifier.skipped_steps import SkippedSteps
    from ds_classifier.training import BadSamples, Cadence, train

    settings, ds_config, batch = resolved.settings, resolved.ds_config, resolved.batch
    # Everything that can be wrong is built before the ranks meet, so that errors come at once.
    torch.manual_seed(settings.seed)
    classifier = create_classifier(**settings.model_kwargs())
    parameters = sum(p.numel() for p in classifier.parameters())
    ds_config = fill_bucket_sizes(ds_config, parameters)
    diffusion = create_gaussian_diffusion(**settings.diffusion_kwargs())
    # Longer than the watchdog's own time-outs, which tell more.
    device = distributed.init(timedelta(minutes=5 + max(settings.time_outs().values())))
    requests.defer()
    watch.join()
    check_ranks(ds_config, shards, val_shards, device)
    lock = RunLock(run_dir)
    distributed.on_rank_0(lambda: lock.acquire(distributed.say), device)
    watch.release_at_end(lock.release)
    sampler = create_schedule_sampler(settings.schedule_sampler, diffusion.num_timesteps, device)

    found, state = find_checkpoint(settings, run_dir, device)
    facts = {
        "settings": dataclasses.asdict(settings),
        "classes": shards.manifest.classes,
        "data": shards.manifest.fingerprint,
        "deepspeed": resolved.shaping,
    }
    if state is not None:
        refuse_changes(state, settings, facts)
    finished = distributed.on_rank_0(lambda: read_done(run_dir), device)
    if finished is not None:
        distributed.say(
            f"{run_dir} is finished ({finished}). To train again, choose another --run_dir."
        )
        watch.leave()
        distributed.finish()
        return 0
    origin = f"checkpoint {found}, step {state['step']}" if state else f"seed {settings.seed}"
    if state is None and settings.init_from:
        source = Path(settings.init_from)
        origin = distributed.on_rank_0(lambda: load_initial_weights(classifier, source), device)
    command = launched_as(batch.world_size)
    distributed.on_rank_0(lambda: check_room(run_dir / "checkpoints", parameters), device)
    distributed.on_rank_0(lambda: write_run_files(run_dir, resolved, ds_config, command), device)

    module = NoisedClassifier(classifier, diffusion)
    factor = None
    if settings.anneal_lr is not None:
        factor = engines.linear_anneal(settings.iterations) if settings.anneal_lr else constant
    engine = engines.create_engine(module, ds_config, factor)
    if state is not None:
        checkpoint.load(found, state, engine=engine, sampler=sampler)
    first_step = engine.global_steps
    watch.advice = MemoryAdvice(device, micro_batch=batch.micro, image_size=settings.image_size)
    stop = StopVote(requests)

    loader, val_loader = create_loaders(resolved, shards, val_shards, first_step, device)
    announce(resolved, shards, val_shards, run_dir, origin, engine)

    bad_samples = BadSamples(
        run_dir,
        device=device,
        known=state["bad_samples"] if state else 0,
        limit=settings.max_bad_samples,
        epoch_samples=shards.manifest.samples,
    )

    writer = CheckpointWriter(
        run_dir / "checkpoints",
        engine=engine,
        sampler=sampler,
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

    def show_pictures() -> None:
        """The grid of pictures and predictions, of this step, for the report and TensorBoard."""
        pixels = dict(image_size=settings.image_size, channels=settings.in_channels)
        where = dict(device=device, step=engine.global_steps)
        grid = predict_grid(module.classifier, diffusion, val_shards, **pixels, **where)
        if grid is not None:
            (run_dir / "eval").mkdir(exist_ok=True)
            save_grid(grid, run_dir / "eval" / "validation.pictures.png")
            sheet = marked_sheet(grid, shards.manifest.classes)
            logger.picture("val_pictures", sheet, engine.global_steps)

    def validate() -> dict[str, float]:
        """The means over all noise levels, and those at t = 0 beside them, as NAME_t0."""
        keywords = dict(samples=val_shards.manifest.samples, device=device)

        def batches():
            return stop.batches(watch.batches(val_loader))

        means, bad = evaluate(module, batches(), noised=settings.noised, **keywords)
        at_0, _ = evaluate(module, batches(), noised=settings.noised, t=0, **keywords)
        means |= {f"{name}_t0": at_0[name] for name in ("loss", "acc@1", "acc@5")}
        if distributed.rank() == 0:
            failures.tolerate("the grid of pictures", show_pictures)
        return means | ({"bad_samples": bad} if bad else {})

    began = dict(
        step=first_step,
        iterations=settings.iterations,
        world_size=batch.world_size,
        host=platform.node(),
        device=engines.describe_device(device),
    )
    reached = events.last_logged_step(run_dir)  # before the log is cut to what is resumed from

    def open_logger() -> RunLogger:
        return RunLogger(run_dir, first_step=first_step, wandb=settings.wandb)

    logger = distributed.together(open_logger, device)
    if state is None:
        events.append(run_dir, "start", **began)
    else:
        events.append(run_dir, "resume", reached=reached, **began)
    finished = train(
        engine,
        iter(loader),
        cadence=Cadence(
            iterations=settings.iterations,
            log=settings.log_interval,
            save=settings.save_interval,
            evaluate=settings.eval_interval,
        ),
        sampler=sampler,
        num_timesteps=diffusion.num_timesteps,
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
        stop=stop,
        watch=watch,
        logger=logger,
    )
    with watch.during("save"):
        writer.finish()
    logger.close()
    step = engine.global_steps
    if finished:
        distributed.on_rank_0(lambda: (run_dir / DONE).write_text(f"step {step}\n"), device)
        events.append(run_dir, "finish", step=step)
        distributed.say(f"finished: {step} steps; everything is in {run_dir}/")
    else:
        events.append(run_dir, "stop", step=step, reason=stop.reason)
        distributed.say(
            f"stopped by {stop.reason} after step {step}; run the same command to go on"
        )
    watch.leave()
    distributed.finish()
    if distributed.rank() == 0:  # alone: nobody waits for it any more
        failures.tolerate("report.html", lambda: write_report(run_dir))
    return 0 if finished else STOPPED


def check_ranks(ds_config: dict, shards: ShardSet, val_shards: ShardSet | None, device) -> None:
    """Raise ValueError on all ranks if one cannot do the precision or holds other shards."""
    from ds_classifier import engine as engines

    problem = engines.precision_problem(ds_config, device)
    data = [split and split.manifest.fingerprint for split in (shards, val_shards)]
    if distributed.broadcast_json(data, device) != data:
        problem = (
            "the training or validation shards here are not those of rank 0's node "
            f"({shards.folder}, {val_shards.folder if val_shards else 'no validation'}); do: copy "
            "them anew"
        )
    distributed.raise_together(problem, device)


def constant(step: int) -> float:
    """--anneal_lr False: the learning rate stays at its peak."""
    return 1.0


def launched_as(world_size: int) -> str:
    """Shell lines that start the run again; several nodes need their hostfile added."""
    arguments = [word for word in sys.argv if not word.startswith("--local_rank")]
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


def announce(
    resolved: Resolved,
    shards: ShardSet,
    val_shards: ShardSet | None,
    run_dir: Path,
    origin: str,
    engine,
) -> None:
    """The header of a run: what is trained on what, and how the numbers came about."""
    from ds_classifier import engine as engines

    settings, batch = resolved.settings, resolved.batch
    parameters = sum(p.numel() for p in engine.module.parameters())
    epoch_steps = shards.manifest.samples / batch.total
    held_out = f", {val_shards.manifest.samples} held out" if val_shards else ", no validation"
    schedule = {None: "the JSON's WarmupDecayLR", True: "linear to 0", False: "constant"}
    if settings.anneal_lr is None and "scheduler" not in resolved.ds_config:
        schedule[None] = "constant"
    say = distributed.say
    say(
        f"classifier  {parameters:,} parameters, {settings.image_size} px, {settings.num_classes} "
        f"classes; {settings.noise_schedule} noise, {settings.diffusion_steps} steps"
    )
    say(
        f"data        {settings.data_dir}: {shards.manifest.samples:,} pictures in "
        f"{len(shards.manifest.shards)} shards{held_out}"
    )
    if neighbours(shards.index).sorted_by_class and settings.shuffle_shards != "lane":
        say(f"{'':12}its shards are sorted by class: --shuffle_shards lane would mix them better")
    say(f"batch       {batch}; {epoch_steps:.1f} steps an epoch")
    say(
        f"engine      {engines.precision(engine)}, ZeRO {engine.zero_optimization_stage()}, on "
        f"{engines.describe_device(engine.device)}; lr {settings.lr:g}, "
        f"{schedule[settings.anneal_lr]}"
    )
    say(f"start       from {origin}; {settings.iterations} steps in all")
    say(f"run         {run_dir}/ (log.jsonl, progress.csv, tb/, checkpoints/)")


if __name__ == "__main__":
    sys.exit(main())
