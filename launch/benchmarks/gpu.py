"""Measure a GPU within a few minutes, without data: speed, memory, precision, inputs, resuming.

Each part runs in a process of its own, hands over its rows one by one, and is ended when its time
is up, so that there is a table whatever happens. Without a GPU the same parts run at tiny sizes: a
rehearsal, whose figures say nothing.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch._inductor import config as inductor

from ds_classifier.checkpoint import disk
from ds_classifier.config import Settings, parse_training_command
from ds_classifier.diffusion import create_gaussian_diffusion
from ds_classifier.distributed.engine import deepspeed_engine
from ds_classifier.evaluation.evaluate import evaluate
from ds_classifier.guidance.gradient import classifier_gradient
from ds_classifier.guidance.sampling import ReverseProcess, keyed_steps, sample, unet_denoiser
from ds_classifier.guidance.unet import create_unet
from ds_classifier.model import EncoderUNetModel, create_classifier
from ds_classifier.training.logs.flops import forward_flops, peak_flops, training_flops
from ds_classifier.training.logs.profile import kernel_seconds

from .inputs import decoding_rows, noise_rows
from .measuring import seconds_of
from .parts import Part, Row, rows_of
from .programs import run_program, shards_for, trainer_row
from .step import Bench

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GRAPHS = "CUDA graphs"
CLASSES = 1000
PROFILED = 3  # steps recorded for the share of the time that the GPU idles
ENOUGH = 1.03  # a larger micro-batch must be faster by this factor to be looked beyond
SAMPLING_STEPS = 5  # DDIM steps timed


@dataclass(frozen=True)
class Plan:
    """The sizes of what is measured.

    model: flags of launch/train.py that all measurements share. seconds: timed per figure.
    images: the number of made-up training images. steps: those timed of a whole trainer.
    unet: keywords of create_unet, for the first of image_sizes.
    decoded_sizes: image sizes at which originals are decoded. decoded: images of a batch of these.
    """

    model: tuple[str, ...]
    image_sizes: tuple[int, ...]
    micro_batches: tuple[int, ...]
    seconds: float
    images: int
    steps: int
    unet: dict[str, Any]
    decoded_sizes: tuple[int, ...]
    decoded: int

    def words(self, px: int, micro: int, precision: str, compiled: bool = False) -> list[str]:
        """Return flags of launch/train.py."""
        words = [*self.model, "--image_size", str(px), "--batch_size", str(micro)]
        words += ["--deepspeed_config", f"zero1_{precision}"]
        return [*words, "--compile"] if compiled else words

    def settings(self, px: int) -> Settings:
        """Return the settings of a classifier of this image size."""
        settings = parse_training_command([*self.words(px, 1, "fp32"), "--data_dir", "x"]).settings
        return settings.replace(num_classes=CLASSES)


_UNET = dict(  # guided-diffusion's 64 px UNet, without classes
    image_size=64,
    num_channels=192,
    num_res_blocks=3,
    channel_mult="1,2,3,4",
    num_heads=1,
    num_head_channels=64,
    num_heads_upsample=-1,
    attention_resolutions="32,16,8",
    class_cond=False,
    use_scale_shift_norm=True,
    resblock_updown=True,
    use_new_attention_order=True,
    learn_sigma=True,
)
ON_GPU = Plan(
    (), (64, 128, 256), (16, 64, 128, 256, 512, 1024), 1.5, 2000, 30, _UNET, (256, 512), 64
)
_TINY = "--classifier_width 32 --classifier_channel_mult 1,2 --classifier_depth 1"
_TINY += " --classifier_attention_resolutions 4 --workers 0"
_TINY_UNET = dict(image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1,2")
_TINY_UNET |= dict(num_head_channels=32, attention_resolutions="4")
REHEARSAL = Plan(tuple(_TINY.split()), (8,), (2, 4), 0.02, 16, 2, _UNET | _TINY_UNET, (8,), 2)


# ---------------------------------------------------------------------------------------- parts


def fidelity(plan: Plan, known: list[Row]) -> Iterator[Row]:
    """Compare logits and input gradients with this CPU's in fp32, which the tests compare with the
    numbers recorded from guided-diffusion."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False  # NVIDIA's containers allow it
    px = plan.image_sizes[0]
    torch.manual_seed(0)
    model = create_classifier(**plan.settings(px).model_kwargs())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # none is zero, so that every layer shows
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    x = torch.randn(4, 3, px, px, generator=generator)

    def answers(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        model.to(device=device, dtype=dtype)
        inputs = x.clone().to(device).requires_grad_()
        logits = model(inputs, torch.arange(0, 1000, 250, device=device))
        logits.log_softmax(dim=1)[:, 0].sum().backward()
        return [logits.detach().cpu(), inputs.grad.cpu()]

    exact = answers(torch.device("cpu"), torch.float32)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for precision, dtype in deepspeed_engine.DTYPES.items():
        model.float().load_state_dict(weights)  # float(): else fp16 gets what bf16 has rounded
        got = answers(_device(), dtype)
        errors = [
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True)
        ]
        what = "fp32, TF32 off" if precision == "fp32" else precision
        yield {"px": px, "way": what, "error of logits": errors[0], "of gradients": errors[1]}


def eager(plan: Plan, known: list[Row], px: int) -> Iterator[Row]:
    """Measure training steps: larger micro-batches until one gains little, or does not fit; at the
    best of them the other memory format and fp16."""
    best: Row = {}
    for micro in plan.micro_batches:
        try:
            row = step_row(plan, px, micro)
        except torch.OutOfMemoryError:
            row = None
        if row is None:  # outside of the handler, which keeps the frames of the step and their GiB
            yield {"px": px, "micro-batch": micro, "note": "does not fit"}
            break
        yield row
        if best and row["images/s"] < ENOUGH * best["images/s"]:
            break
        best = row
    if not best:
        return
    micro = best["micro-batch"]
    yield step_row(plan, px, micro, layout="channels_last")
    yield step_row(plan, px, micro, precision="fp16")
    yield step_row(plan, px, micro, bare=True)


def compiled(plan: Plan, known: list[Row], px: int) -> Iterator[Row]:
    """Measure training steps of the compiled model at the micro-batch that was best without."""
    micro = (fastest(known, px) or _last_resort(plan))["micro-batch"]
    for layout, bare in (("contiguous", False), ("contiguous", True), ("channels_last", False)):
        torch.compiler.reset()
        yield step_row(plan, px, micro, layout=layout, compiled=True, bare=bare)
    if torch.cuda.is_available():  # on a CPU this would be the first of them again
        torch.compiler.reset()
        inductor.triton.cudagraphs = True  # as TORCHINDUCTOR_CUDAGRAPHS=1 sets it
        row = step_row(plan, px, micro, compiled=True)
        yield row | {"way": f"{row['way']}, {GRAPHS}"}


def trainer(plan: Plan, known: list[Row], px: int) -> Iterator[Row]:
    """Measure a whole trainer, which reads made-up images, in the fastest way known."""
    best = fastest(known, px, layout="contiguous") or _last_resort(plan)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = plan.words(px, best["micro-batch"], "bf16", "compiled" in best["way"])
        words += ["--data_dir", str(made_up_shards(plan, px, folder))]
        row = trainer_row(_program(), words, folder / "run", ranks=1, steps=plan.steps)
        rate = row["images_per_sec"]
        yield _speed(plan, px, rate, "bf16") | {
            "way": best["way"],
            "micro-batch": best["micro-batch"],
            "GiB": row["memory_gib"],
            "waits for data, %": 100 * row["data_wait_frac"],
            "of the step": rate / best["images/s"] if "images/s" in best else "",
            "start, s": row["start_s"],
        }


def resume(plan: Plan, known: list[Row]) -> Iterator[Row]:
    """Train twice from one checkpoint; compare with the training that was not interrupted."""
    px, micro = plan.image_sizes[0], plan.micro_batches[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = [*plan.words(px, micro, "bf16"), "--iterations", "8", "--save_interval", "4"]
        words += ["--data_dir", str(made_up_shards(plan, px, folder)), "--val_data_dir", "none"]

        def train(name: str, *more: str) -> dict[str, torch.Tensor]:
            run_program([sys.executable, _program(), *words, "--run_dir", folder / name, *more])
            return disk.read_model(folder / name / "checkpoints" / disk.step_name(8))

        whole = train("whole", "--keep_last", "3")
        half = str(folder / "whole" / "checkpoints" / disk.step_name(4))
        parts = [train(name, "--resume_checkpoint", half) for name in ("once", "again")]
        for what, a, b in (("resumed", whole, parts[0]), ("resumed again", *parts)):
            far = max(float((a[n] - b[n]).abs().max()) for n in a)
            equal = all(a[name].equal(b[name]) for name in a)
            note = "bit-equal" if equal else f"weights differ by up to {far:.1e}"
            yield {"px": px, "way": what, "micro-batch": micro, "note": note}


def inference(plan: Plan, known: list[Row]) -> Iterator[Row]:
    """Measure the evaluation, and DDIM steps of a UNet guided by the classifier, both in bf16."""
    px, device = plan.image_sizes[0], _device()
    micro = plan.micro_batches[len(plan.micro_batches) // 2]
    bench = Bench.of([*plan.words(px, micro, "bf16"), "--num_classes", str(CLASSES)])
    classifier, batch = bench.engine.module.classifier, bench.batch

    def evaluated() -> None:
        evaluate(bench.engine.module, [batch], samples=micro, device=device, noised=True)

    rate = micro / seconds_of(evaluated, device, plan.seconds)
    yield {"px": px, "way": "evaluation", "micro-batch": micro, "images/s": rate}
    unet = create_unet(**plan.unet).to(device).eval()
    unet.set_precision(torch.bfloat16)
    diffusion = create_gaussian_diffusion(timestep_respacing=f"ddim{SAMPLING_STEPS}")
    process = ReverseProcess(diffusion)
    positions = torch.arange(micro, device=device)
    y, noise = positions % CLASSES, keyed_steps(0, positions, (3, px, px))

    def sampled() -> None:
        guide = classifier_gradient(classifier)
        sample(process, unet_denoiser(unet, process), noise, y, cond_fn=guide, ddim=True)

    rate = SAMPLING_STEPS * micro / seconds_of(sampled, device, plan.seconds)
    what = f"guided DDIM, in images x steps, {sum(p.numel() for p in unet.parameters()):,} weights"
    yield {"px": px, "way": what, "micro-batch": micro, "images/s": rate}


def noise(plan: Plan, known: list[Row]) -> Iterator[Row]:
    """Measure drawing timesteps and noise at the best micro-batches, and its share of a step."""
    for px in plan.image_sizes:
        best = fastest(known, px) or _last_resort(plan)
        for row in noise_rows(px, best["micro-batch"], _device(), plan.seconds):
            if "images/s" in best:
                step = 1e3 * best["micro-batch"] / best["images/s"]  # ms
                row["of the step, %"] = 100 * row["ms"] / step
            yield row


def decoding(plan: Plan, known: list[Row]) -> Iterator[Row]:
    """Measure decoding JPEGs on a loader's worker, and on the GPU."""
    for px in plan.decoded_sizes:
        yield from decoding_rows(px, plan.decoded, _device(), plan.seconds)


# -------------------------------------------------------------------------------- measurements


def step_row(
    plan: Plan,
    px: int,
    micro: int,
    *,
    precision: str = "bf16",
    layout: str = "contiguous",
    compiled: bool = False,
    bare: bool = False,
) -> Row:
    """Measure a training step with noise and metrics under ZeRO 1, without a loader.

    bare: the same model without DeepSpeed, noise and metrics, by AdamW.
    """
    EncoderUNetModel.memory_format = LAYOUTS[layout]
    words = plan.words(px, micro, precision, compiled)
    with built(words) as bench:
        device = bench.engine.device
        step = bench.bare_step() if bare else bench.trainer_step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        step()
        first = time.perf_counter() - began
        step()
        seconds = seconds_of(step, device, plan.seconds)
        row = _speed(plan, px, micro / seconds, precision) | {
            "way": f"{'compiled' if compiled else 'eager'}, {layout}" + ", bare" * bare,
            "micro-batch": micro,
            "backend": "" if bare else torch.distributed.get_backend(),
            "first step, s": first,
        }
        if device.type == "cuda":
            row["GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
            if busy := busy_seconds(step):  # 0 where the profiler is not allowed to see kernels
                row["GPU idle, %"] = 100 * max(0.0, 1 - busy / seconds)
    return row


@contextmanager
def built(words: list[str]) -> Iterator[Bench]:
    """Build what flags of launch/train.py describe, in the memory of what was built before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    bench = Bench.of([*words, "--num_classes", str(CLASSES)])
    try:
        yield bench
    finally:
        bench.engine.destroy()  # the hooks of its optimizer would hold it, and all its weights


def busy_seconds(step: Callable[[], object]) -> float:
    """Return the seconds of a step for which kernels ran on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            step()
    return kernel_seconds(profiler.key_averages()) / PROFILED


def _speed(plan: Plan, px: int, rate: float, precision: str) -> Row:
    """Return the first columns of a row on training speed."""
    flops = rate * training_flops(forward_flops(plan.settings(px).model_kwargs()))
    return {"px": px, "precision": precision, "images/s": rate, "TFLOP/s": flops / 1e12}


def fastest(rows: list[Row], px: int, layout: str = "") -> Row | None:
    """Return the row of the fastest step of the trainer in bf16; None if there is none.

    layout: only that one; "" for any.
    """
    steps = [
        row
        for row in rows
        if row["part"] in ("eager", "compiled")
        and (row["px"], row.get("precision")) == (px, "bf16")
        and not row["way"].endswith(("bare", GRAPHS))
        and layout in row["way"]
    ]
    return max(steps, key=lambda row: row["images/s"], default=None)


def _last_resort(plan: Plan) -> Row:
    """Return a way that surely works, where no step was measured."""
    return {"way": "eager, contiguous", "micro-batch": plan.micro_batches[0]}


def made_up_shards(plan: Plan, px: int, folder: Path) -> Path:
    """Write smooth random images in two classes, and return the training split of their shards."""
    random = np.random.default_rng(0)
    source = folder / "images"
    for number in range(plan.images):
        few = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path = source / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        few.resize((px * 5 // 4, px * 5 // 4), Image.Resampling.BICUBIC).save(path, quality=90)
    return shards_for([*plan.words(px, 1, "fp32")], str(source), folder)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _program() -> Path:
    return Path(__file__).resolve().parents[1] / "train.py"


# ------------------------------------------------------------------------------------ the whole

PLANNED = 480  # seconds, of which each part gets at most its share; together they are more


def schedule(image_sizes: Sequence[int]) -> list[tuple[Part, tuple[int, ...], int]]:
    """Return the parts, the most important first: function, arguments and most seconds."""
    first, *more = image_sizes
    return [
        (fidelity, (), 40),
        *((eager, (first,), 60), (compiled, (first,), 150), (trainer, (first,), 90)),
        *((resume, (), 90), (inference, (), 60)),
        *((eager, (px,), 60) for px in more),
        *((noise, (), 45), (decoding, (), 30)),
        *((part, (px,), share) for px in more for part, share in ((compiled, 100), (trainer, 60))),
    ]


def measure(*, minutes: float, peak_tflops: float | None) -> list[Row]:
    """Measure everything that fits into the time, and return the rows; the last name the choice.

    peak_tflops: of the device in 16 bits; None: known by its name, or not.
    """
    plan = ON_GPU if torch.cuda.is_available() else REHEARSAL
    if plan is REHEARSAL:
        print("no GPU: a rehearsal at tiny sizes, whose figures say nothing", flush=True)
    ends, rows = time.monotonic() + 60 * minutes, []
    for part, arguments, share in schedule(plan.image_sizes):
        seconds = min(ends - time.monotonic(), share * 60 * minutes / PLANNED)
        for row in rows_of(part, (plan, list(rows), *arguments), seconds):
            px = arguments[0] if arguments else plan.image_sizes[0]
            rows.append({"part": part.__name__, "px": px, "way": "", **row})
            _show(rows[-1])
    for row in rows:
        if "TFLOP/s" in row and (peak := _peak(row["precision"], peak_tflops)):
            row["MFU, %"] = 100e12 * row["TFLOP/s"] / peak
    chosen = [(px, fastest(rows, px)) for px in plan.image_sizes]
    rows += [{"part": "choice", "px": px, **_choice(best)} for px, best in chosen if best]
    return rows


def _choice(best: Row) -> Row:
    flags = f"--batch_size {best['micro-batch']} --deepspeed_config zero1_bf16"
    flags += " --compile" * best["way"].startswith("compiled")
    if "channels_last" in best["way"]:
        flags += ", with channels_last as EncoderUNetModel.memory_format"
    return {k: best[k] for k in ("way", "images/s", "micro-batch")} | {"note": flags}


def _peak(precision: str, given: float | None) -> float | None:
    if given is not None:
        return 1e12 * given
    return (
        peak_flops(torch.cuda.get_device_name(), precision) if torch.cuda.is_available() else None
    )


def _show(row: Row) -> None:
    cells = (
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if v != ""
    )
    print("; ".join(cells), flush=True)
