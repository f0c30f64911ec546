"""Train a noise-aware classifier: `deepspeed launch/train.py --deepspeed_config JSON [flags]`.

The same command again continues the run. Where training starts, the first that applies:
1. --resume_checkpoint PATH;
2. the newest checkpoint in the run directory that verifies (all damaged: an error);
3. --init_from PATH, weights only;
4. fresh weights.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier import distributed
from ds_classifier.config import CommandLine, Settings, changed_settings, parse_training_command
from ds_classifier.data.shards import ShardSet
from ds_classifier.data.store import RemoteShardSet, open_split
from ds_classifier.ds_config import Resolved, fill_bucket_sizes, read_ds_config, resolve

DONE = "DONE"  # marks a finished run: a launcher's exit code cannot be trusted


def main(argv: list[str] | None = None) -> int:
    command = parse_training_command(sys.argv[1:] if argv is None else argv)
    try:
        return run(command)
    except ValueError as error:
        distributed.complain(str(error))
        return 2
    except (FloatingPointError, OSError) as error:
        # A loader worker's error comes with its traceback; the last line says what is wrong.
        distributed.complain(str(error).strip().splitlines()[-1])
        return 1


def run(command: CommandLine) -> int:
    """Train as the command says; returns the exit code. Raises ValueError for wrong use."""
    world_size = distributed.world_size()
    if command.settings.expect_world not in (0, world_size):
        raise ValueError(
            f"--expect_world: got world size {world_size}; need {command.settings.expect_world}; "
            "do: look at the hostfile's path, which the launcher forgives if it is wrong"
        )
    resolved = resolve(command, read_ds_config(command.deepspeed_config), world_size=world_size)
    shards, val_shards, resolved = open_data(resolved)
    return train_on(resolved, shards, val_shards, Path(resolved.settings.run_dir))


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
        return open_split(
            location,
            cache_dir=settings.cache_dir,
            cache_gb=settings.cache_gb,
            image_size=settings.image_size,
        )
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def train_on(
    resolved: Resolved, shards: ShardSet, val_shards: ShardSet | None, run_dir: Path
) -> int:
    """Build everything, find where to start, train; returns the exit code."""
    distributed.quiet_libraries()
    import torch

    from ds_classifier import checkpoint
    from ds_classifier import engine as engines
    from ds_classifier.diffusion import create_gaussian_diffusion, create_schedule_sampler
    from ds_classifier.evaluation import evaluate
    from ds_classifier.export import load_initial_weights
    from ds_classifier.logger import RunLogger
    from ds_classifier.model import create_classifier
    from ds_classifier.noised_classifier import NoisedClassifier
    from ds_classifier.shutdown import STOPPED, StopVote
    from ds_classifier.training import BadSamples, Cadence, train

    settings, ds_config, batch = resolved.settings, resolved.ds_config, resolved.batch
    # Everything that can be wrong is built before the ranks meet, so that errors come at once.
    torch.manual_seed(settings.seed)
    classifier = create_classifier(**settings.model_kwargs())
    parameters = sum(p.numel() for p in classifier.parameters())
    ds_config = fill_bucket_sizes(ds_config, parameters)
    diffusion = create_gaussian_diffusion(**settings.diffusion_kwargs())
    device = distributed.init()
    check_ranks(ds_config, shards, val_shards, device)
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
        distributed.finish()
        return 0
    origin = f"checkpoint {found}, step {state['step']}" if state else f"seed {settings.seed}"
    if state is None and settings.init_from:
        source = Path(settings.init_from)
        origin = distributed.on_rank_0(lambda: load_initial_weights(classifier, source), device)
    distributed.on_rank_0(lambda: write_run_files(run_dir, resolved, ds_config), device)

    module = NoisedClassifier(classifier, diffusion)
    factor = None
    if settings.anneal_lr is not None:
        factor = engines.linear_anneal(settings.iterations) if settings.anneal_lr else constant
    engine = engines.create_engine(module, ds_config, factor)
    if state is not None:
        checkpoint.load(found, state, engine=engine, sampler=sampler)
    first_step = engine.global_steps

    loader, val_loader = create_loaders(resolved, shards, val_shards, first_step, device)
    announce(resolved, shards, val_shards, run_dir, origin, engine)

    bad_samples = BadSamples(
        run_dir,
        device=device,
        known=state["bad_samples"] if state else 0,
        limit=settings.max_bad_samples,
        epoch_samples=shards.manifest.samples,
    )

    def save() -> None:
        counts = {
            "samples": engine.global_steps * batch.total,
            "bad_samples": bad_samples.total(),
            "world_size": batch.world_size,
        }
        checkpoint.save(
            run_dir / "checkpoints",
            engine=engine,
            sampler=sampler,
            state=facts | counts,
            keep_last=settings.keep_last,
        )

    def validate() -> dict[str, float]:
        """The means over all noise levels, and those at t = 0 beside them, as NAME_t0."""
        keywords = dict(samples=val_shards.manifest.samples, device=device)
        means, bad = evaluate(module, val_loader, noised=settings.noised, **keywords)
        at_0, _ = evaluate(module, val_loader, noised=settings.noised, t=0, **keywords)
        means |= {f"{name}_t0": at_0[name] for name in ("loss", "acc@1", "acc@5")}
        return means | ({"bad_samples": bad} if bad else {})

    logger = RunLogger(run_dir, first_step=first_step)
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
        max_skipped_steps=min(settings.max_skipped_steps, settings.iterations),
        bad_samples=bad_samples,
        save=save,
        validate=validate if val_loader is not None else None,
        stop=StopVote(),
        logger=logger,
    )
    logger.close()
    step = engine.global_steps
    if finished:
        distributed.on_rank_0(lambda: (run_dir / DONE).write_text(f"step {step}\n"), device)
        distributed.say(f"finished: {step} steps; everything is in {run_dir}/")
    else:
        distributed.say(f"stopped on request after step {step}; run the same command to go on")
    distributed.finish()
    return 0 if finished else STOPPED


def read_done(run_dir: Path) -> str | None:
    """What a finished run left in DONE, or None."""
    return (run_dir / DONE).read_text().strip() if (run_dir / DONE).exists() else None


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


def find_checkpoint(settings: Settings, run_dir: Path, device) -> tuple[Path | None, dict | None]:
    """The checkpoint to continue from and its state.json, on all ranks; (None, None) for none."""
    from ds_classifier import checkpoint

    def find() -> list | None:
        if settings.resume_checkpoint:
            found = checkpoint.resolve_checkpoint(Path(settings.resume_checkpoint))
        else:
            found = checkpoint.newest_valid(run_dir / "checkpoints", distributed.say)
        return None if found is None else [str(found), checkpoint.read_state(found)]

    answer = distributed.on_rank_0(find, device)
    return (None, None) if answer is None else (Path(answer[0]), answer[1])


def refuse_changes(state: dict, settings: Settings, facts: dict) -> None:
    """Raise ValueError if the checkpoint is of another training than the one asked for."""
    changes = changed_settings(state["settings"], settings)
    changes += [
        f"{key} of the JSON: {state['deepspeed'][key]} in the checkpoint, {value} now"
        for key, value in facts["deepspeed"].items()
        if state["deepspeed"][key] != value
    ]
    if state["classes"] != facts["classes"]:
        changes.append(
            f"classes: {len(state['classes'])} in the checkpoint, others in the data now"
        )
    elif state["data"] != facts["data"]:
        changes.append(
            f"data: {settings.data_dir} is not the data that the checkpoint was trained on"
        )
    if changes:
        raise ValueError(
            f"{settings.resume_checkpoint or settings.run_dir} was trained otherwise:\n  "
            + "\n  ".join(changes)
            + "\ndo: give the settings as they were, or choose another --run_dir (with --init_from "
            "to start it from these weights)"
        )


def write_run_files(run_dir: Path, resolved: Resolved, ds_config: dict) -> None:
    """What this start of the run was made of: settings, JSON, environment, command."""
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(resolved.settings)
    (run_dir / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (run_dir / "deepspeed.json").write_text(json.dumps(ds_config, indent=1) + "\n")
    (run_dir / "env.json").write_text(json.dumps(environment(), indent=1) + "\n")
    with open(run_dir / "command.sh", "a") as file:
        file.write(launched_as(resolved.batch.world_size))


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


def environment() -> dict[str, object]:
    """Versions, host, and the state of the source tree."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import ds_classifier

    packages = {}
    for name in (
        "torch",
        "deepspeed",
        "webdataset",
        "torchvision",
        "numpy",
        "pillow",
        "safetensors",
    ):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    tree = Path(__file__).resolve().parents[1]
    git = {}
    for fact, arguments in (("commit", ["rev-parse", "HEAD"]), ("changes", ["status", "--short"])):
        try:
            answer = subprocess.run(
                ["git", "-C", str(tree), *arguments], capture_output=True, text=True, timeout=10
            )
            git[fact] = answer.stdout.strip() if answer.returncode == 0 else None
        except (OSError, subprocess.TimeoutExpired):
            git[fact] = None
    return {
        "ds_classifier": ds_classifier.__version__,
        "python": platform.python_version(),
        "packages": packages,
        "host": platform.node(),
        "git": git,
    }


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
        **pixels,
    )
    loader = create_loader(dataset, positions, workers=workers)
    if val_shards is None:
        return loader, None
    val_positions = ValidationPositions(
        val_shards.manifest.samples, batch=batch.micro, rank=rank, world_size=world_size
    )
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
