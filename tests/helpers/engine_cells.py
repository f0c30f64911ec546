"""Train, save and load in DeepSpeed engines of several kinds: engine_cells.py FOLDER TASKS CELL...

A cell is STAGE-PRECISION-OPTIMIZER, such as 3o-bf16-lion: "o" offloads the optimizer to the CPU,
"p" the parameters too; -frozen at its end freezes half of the classifier, and gives it buffers;
-parts does so too, and trains the rest, and a single number, in groups. Every rank runs it. Tasks,
joined by commas, each for all cells:

- resume: train 6 steps, saving at steps 2 and 6; load step 2 into a fresh engine and train it to
  step 6. Prints whether all weights, state, losses and rates are the same.
- part: load step 2, train to step 4 and save it in FOLDER/part. For another number of ranks.
- close: load step 4 of FOLDER/part, train to step 6, and print the distance of the weights
  from those of the uninterrupted run.
- cross: load step 2 of the first cell into each of the others, and print whether what is saved then
  is the same, and the relative difference of the next loss.
- by_hand: train 6 steps, and by torch's AdamW with its own groups too. Prints how far the weights
  are from those, and how far they moved. For one rank.
- skip: train 4 steps, the second of them with an infinite gradient on one rank. Prints whether the
  weights stayed, the number of skipped steps, the optimizer's count and the rate of each step.

Prints one JSON line per task and cell on rank 0.
"""

import contextlib
import itertools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file

from ds_classifier import distributed
from ds_classifier.checkpoint import disk
from ds_classifier.checkpoint.fixed_state import settle_fixed_state
from ds_classifier.checkpoint.writer import CheckpointWriter
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.config import Settings
from ds_classifier.data.loader import Batch
from ds_classifier.diffusion import UniformSampler, stratified
from ds_classifier.distributed.engine import deepspeed_engine, deepspeed_state
from ds_classifier.evaluation.meter import Meter
from ds_classifier.loss import noised_classifier
from ds_classifier.model import create_classifier
from ds_classifier.training.parameter_groups import divide_parameters
from ds_classifier.training.step import Objective, train_step

GLOBAL, MICRO = 8, 2
SETTINGS = Settings().replace(
    image_size=8,
    classifier_width=32,
    classifier_channel_mult="1,2",
    classifier_depth=1,
    classifier_attention_resolutions="4",
    num_classes=10,
    noise_schedule="cosine",
)
PARTS = SETTINGS.replace(
    freeze="input_blocks.*",
    lr_scale="out.*=0.1,out.0.*=9,*.emb_layers.*=3",
    no_decay="norms,biases",
)
OPTIMIZERS = {
    "adamw": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}},
    "adam": {
        "type": "Adam",
        "params": {"lr": 1e-3, "weight_decay": 0.1, "adam_w_mode": False, "torch_adam": True},
    },
    "cpuadam": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
    "lion": {"type": "Lion", "params": {"lr": 1e-4, "weight_decay": 0.1}},
    "adagrad": {"type": "Adagrad", "params": {"lr": 1e-2}},
    "muon": {"type": "Muon", "params": {"lr": 1e-3, "momentum": 0.95, "torch_adam": True}},
    "sgd": {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}},
}
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {"total_num_steps": 8, "warmup_max_lr": 1e-3, "warmup_num_steps": 3},
}


def ds_config(cell: str) -> dict:
    """Return the JSON of a cell."""
    stage, precision, optimizer, *flags = cell.split("-")
    zero = {
        "stage": int(stage[0]),
        "reduce_bucket_size": 50_000,
        "allgather_bucket_size": 50_000,
        "overlap_comm": stage[0] == "2",
        "reduce_scatter": stage[0] != "3" or optimizer != "muon",
    }
    if stage[0] == "3":
        zero["stage3_param_persistence_threshold"] = 100
        zero["sub_group_size"] = 100_000
    if "o" in stage or "p" in stage:
        zero["offload_optimizer"] = {"device": "cpu"}
    if "p" in stage:
        zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_batch_size": GLOBAL,
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": GLOBAL // MICRO // distributed.world_size(),
        "gradient_clipping": 1.0 if "clip" in flags else 0.0,
        "optimizer": OPTIMIZERS[optimizer],
        "scheduler": SCHEDULER,
        "zero_optimization": zero,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if optimizer in ("adagrad", "sgd"):
        del config["scheduler"]
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3}
    elif precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"} if stage[0] != "3" else {}
    elif precision == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


class Cell:
    """A fresh engine of a cell."""

    def __init__(self, cell: str, device, seed: int = 0, checkpoint: Path | None = None):
        torch.manual_seed(seed + distributed.rank())  # rank 0's weights must win
        classifier = create_classifier(**SETTINGS.model_kwargs())
        groups = None
        if cell.endswith("-parts"):
            if not cell.startswith("3"):  # ZeRO 3 cannot cut it
                classifier.number = torch.nn.Parameter(torch.tensor(1.0))
            groups = divide_parameters(classifier, PARTS, OPTIMIZERS[cell.split("-")[2]]["type"])
        if cell.endswith(("-frozen", "-parts")):
            classifier.input_blocks.requires_grad_(False)
            classifier.register_buffer("count", torch.tensor(seed + distributed.rank()))
            classifier.register_buffer("mask", torch.tensor([0.1, -torch.inf, torch.randn(())]))
        self.made = {name: value.clone() for name, value in classifier.state_dict().items()}
        path = None if distributed.rank() else checkpoint
        self.fixed = settle_fixed_state(classifier, path, device)
        module = noised_classifier(classifier, SETTINGS)
        factor = deepspeed_engine.linear_anneal(8) if "scheduler" not in ds_config(cell) else None
        self.engine = deepspeed_engine.create_engine(module, ds_config(cell), factor, groups)
        self.sampler = UniformSampler(module.diffusion.num_timesteps)
        self.meter = Meter(module.diffusion.num_timesteps, device)
        self.losses, self.rates = [], []
        if checkpoint is not None:
            state = distributed.on_rank_0(lambda: disk.read_state(checkpoint), device)
            disk.load(checkpoint, state, engine=self.engine, sampler=self.sampler)

    def train(self, steps: int, spoil: int = -1) -> None:
        """Train until a number of steps is done. spoil: the step whose gradient is infinite."""
        while self.engine.global_steps < steps:
            step, ranks = self.engine.global_steps, distributed.world_size()
            batches = batches_of(step)
            spoil_it = step == spoil and distributed.rank() == ranks - 1
            with spoiled(self.engine) if spoil_it else contextlib.nullcontext():
                trained = train_step(self.engine, iter(batches), self.objective, self.meter)
            means = self.meter.read().means
            self.losses.append(means["loss"])
            self.rates.append(trained.lr)

    @property
    def objective(self) -> Objective:
        return Objective(self.sampler, 0, True)

    def save(self, folder: Path) -> Path:
        writer = CheckpointWriter(
            folder,
            engine=self.engine,
            sampler=self.sampler,
            fixed=self.fixed,
            keep_last=9,
            keep_every=0,
            max_failed=0,
        )
        writer.save({"settings": {"iterations": 8}})
        writer.finish()
        return folder / disk.step_name(self.engine.global_steps)


@contextlib.contextmanager
def spoiled(engine):
    """Make one gradient infinite, although the loss is finite."""
    *_, weight = engine.module.classifier.parameters()  # of the head, which every loss reaches
    hook = weight.register_hook(lambda grad: grad * torch.inf)
    yield
    hook.remove()


def batches_of(step: int) -> list[Batch]:
    """Return this rank's micro-batches of a step."""
    first, ranks = step * GLOBAL, distributed.world_size()
    own = [q for q in range(first, first + GLOBAL) if q % ranks == distributed.rank()]
    return [batch_at(own[i : i + MICRO]) for i in range(0, len(own), MICRO)]


def batch_at(positions: list[int]) -> Batch:
    """Return the images at these positions of the stream."""
    rows = [torch.Generator().manual_seed(q) for q in positions]
    images = [torch.randint(0, 256, (8, 8, 3), generator=g, dtype=torch.uint8) for g in rows]
    return Batch(
        images=torch.stack(images),
        labels=torch.tensor([q % 10 for q in positions]),
        positions=torch.tensor(positions),
        weights=torch.ones(len(positions)),
        importance=torch.ones(len(positions)),
        bad=[],
    )


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / disk.MODEL) | load_file(path / disk.OPTIMIZER)


def differing(one: Path, other: Path) -> list[str]:
    """Return the names of tensors that differ between two checkpoints, or that one lacks."""
    a, b = tensors(one), tensors(other)
    names = a.keys() ^ b.keys()
    return sorted(names | {n for n in a.keys() & b.keys() if not torch.equal(a[n], b[n])})


def stayed(cell: Cell, checkpoint: Path) -> list[str]:
    """Return the tensors of a checkpoint that are those of the classifier as it was made."""
    saved = load_file(checkpoint / disk.MODEL)
    return sorted(n for n, value in cell.made.items() if torch.equal(saved[n], value))


def distance(one: Path, other: Path) -> float:
    """Return the norm of the difference of the weights of two checkpoints."""
    a, b = (load_file(p / disk.MODEL) for p in (one, other))
    changed = [n for n in a if not torch.equal(a[n], b[n])]
    return sum(float((a[n] - b[n]).double().square().sum()) for n in changed) ** 0.5


def resume(cell: str, folder: Path, device) -> dict:
    whole = Cell(cell, device)
    whole.train(2)
    saved = whole.save(folder / "whole")
    whole.train(6)
    end = whole.save(folder / "whole")
    again = Cell(cell, device, seed=5, checkpoint=saved)
    same = again.save(folder / "again")
    again.train(6)
    again_end = again.save(folder / "again")
    if distributed.rank():
        return {}
    return {
        "loaded": differing(saved, same)[:3],
        "resumed": differing(end, again_end)[:3],
        "moved": distance(saved, end),
        "stayed": stayed(whole, again_end),
        "first": whole.losses[0],
        "losses": again.losses == whole.losses[2:],
        "rates": again.rates == whole.rates[2:],
        "state": json.loads((end / disk.STATE).read_text())["optimizer"],
        "kept": len(load_file(end / disk.OPTIMIZER)),
        "parameters": len(load_file(end / disk.MODEL)),
    }


def part(cell: str, folder: Path, device) -> dict:
    here = Cell(cell, device, seed=5, checkpoint=folder / "whole" / disk.step_name(2))
    here.train(4)
    here.save(folder / "part")
    return {}


def close(cell: str, folder: Path, device) -> dict:
    here = Cell(cell, device, seed=5, checkpoint=folder / "part" / disk.step_name(4))
    here.train(6)
    end = here.save(folder / "close")
    if distributed.rank():
        return {}
    return {"distance": distance(folder / "whole" / disk.step_name(6), end)}


def cross(cell: str, folder: Path, device, first: Path) -> dict:
    here = Cell(cell, device, seed=5, checkpoint=first / "whole" / disk.step_name(2))
    same = here.save(folder / "cross")
    here.train(3)
    if distributed.rank():
        return {}
    return {"loaded": differing(first / "whole" / disk.step_name(2), same), "loss": here.losses}


def by_hand(cell: str, folder: Path, device) -> dict:
    here = Cell(cell, device)
    here.train(6)
    torch.manual_seed(0)
    module = noised_classifier(create_classifier(**SETTINGS.model_kwargs()), SETTINGS)
    norms = [m for m in module.modules() if isinstance(m, torch.nn.GroupNorm)]
    of_norms = {parameter for norm in norms for parameter in norm.parameters()}
    groups = []
    for name, parameter in module.classifier.named_parameters():
        if name.split(".")[0] == "input_blocks":
            continue
        factor = 0.1 if name.split(".")[0] == "out" else 3.0 if ".emb_layers." in name else 1.0
        decays = parameter not in of_norms and not name.endswith("bias")
        decay = 0.1 if decays else 0.0
        groups.append({"params": [parameter], "factor": factor, "weight_decay": decay})
    adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    for step, rate in enumerate(here.rates):
        adam.zero_grad()
        for batch in batches_of(step):
            t, _ = here.sampler.sample(stratified(0, batch.positions, GLOBAL))
            noise = keyed_noise(0, "noise", batch.positions, tuple(batch.images.shape[1:]))
            losses, _ = module(batch.images, batch.labels, t, noise)
            (losses.sum() / GLOBAL).backward()
        for group in adam.param_groups:
            group["lr"] = rate * group["factor"]
        adam.step()
    saved = load_file(here.save(folder / "whole") / disk.MODEL)
    rows, moved = {"distance": 0.0}, {}
    for name, value in module.classifier.state_dict().items():
        rows["distance"] = max(rows["distance"], float((value - saved[name]).abs().max()))
        moved[name.split(".")[0]] = float((here.made[name] - saved[name]).abs().max())
    return rows | {"moved": moved, "rates": here.rates}


def skip(cell: str, folder: Path, device) -> dict:
    here = Cell(cell, device)
    here.train(1)
    before = [v.clone() for v in deepspeed_state.whole_copies(here.engine).values()]
    here.train(2, spoil=1)
    after = deepspeed_state.whole_copies(here.engine).values()
    stayed = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    here.train(4)
    scalars = deepspeed_state.OptimizerState(here.engine).scalars()
    skipped = here.engine.skipped_steps
    return {"stayed": stayed, "skipped": skipped, "scalars": scalars, "rates": here.rates}


def main() -> None:
    folder, tasks, *cells = sys.argv[1:]
    device = distributed.init()
    get_accelerator().is_fp16_supported = lambda: True
    torch.set_num_threads(1)
    for task, cell in itertools.product(tasks.split(","), cells):
        try:
            extra = {"first": Path(folder) / cells[0]} if task == "cross" else {}
            row = globals()[task](cell, Path(folder) / cell, device, **extra)
        except Exception as error:  # the other cells are to be seen
            if "STRICT" in os.environ:
                raise
            row = {"error": f"{type(error).__name__}: {error}"[:300]}
        if distributed.rank() == 0:
            print(json.dumps({"task": task, "cell": cell} | row), flush=True)
    distributed.finish()


if __name__ == "__main__":
    main()
