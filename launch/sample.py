"""Draw guided samples, and measure guidance: `python launch/sample.py --classifier_path RUN ...`.

Flags have the names and defaults of guided-diffusion's classifier_sample.py. Also through the
deepspeed launcher or torchrun, on any number of ranks: the images are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier import distributed
from ds_classifier.common import files
from ds_classifier.config import RECIPES, Settings
from ds_classifier.config.command_line import add_setting_flags, boolean
from ds_classifier.config.settings import GROUPS
from ds_classifier.distributed import failures

if TYPE_CHECKING:
    from ds_classifier.checkpoint.weights import WeightsFile
    from ds_classifier.diffusion import GaussianDiffusion

BAYES = "bayes"  # instead of a classifier's path: the best possible one of the training set
# guided-diffusion's defaults (`model_and_diffusion_defaults`).
UNET = dict(
    num_channels=128,
    num_res_blocks=2,
    channel_mult="",
    num_heads=4,
    num_head_channels=-1,
    num_heads_upsample=-1,
    attention_resolutions="16,8",
    class_cond=False,
    use_scale_shift_norm=True,
    resblock_updown=False,
    use_new_attention_order=False,
    learn_sigma=False,
)
# Flags of guided-diffusion's script that change nothing in sampling.
WITHOUT_EFFECT = ("dropout", "use_checkpoint", "use_kl", "rescale_learned_sigmas")
OF_MODEL = ("classifier", "diffusion")  # groups of settings that a file of weights does not tell
# Arguments, but for the classifier's and the denoiser's, that decide what is drawn.
OF_SAMPLING = (
    "classifier_scale",
    "joint_temperature",
    "marginal_temperature",
    "classifier_use_fp16",
    "num_samples",
    "batch_size",
    "use_ddim",
    "clip_denoised",
    "seed",
)
LEVELS = 20  # noise levels at which --measure compares with the Bayes-optimal classifier
LEVEL_IMAGES = 256  # training images shown at each of them, at most


def main(argv: list[str] | None = None) -> int:
    arguments, given = parse(sys.argv[1:] if argv is None else argv)
    distributed.quiet_libraries()
    try:
        run(arguments, given)
    except (ValueError, OSError) as error:
        return failures.report(error)
    return 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """The arguments, and the settings of the classifier and the process that flags give."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draw samples of a diffusion model guided by a classifier.",
        epilog=textwrap.dedent("""\
            examples:
              python launch/sample.py --classifier_path runs/digits32 --data_dir data/train \\
                  --classifier_scale 0 1 10 --num_samples 100 --timestep_respacing 100 --measure
              python launch/sample.py --classifier_path 64x64_classifier.pt --classifier_depth 4 \\
                  --model_path 64x64_diffusion.pt MODEL_FLAGS --timestep_respacing 250

            A run or checkpoint brings its settings; a .pt needs guided-diffusion's MODEL_FLAGS, or
            its recipe.
            """),
    )
    add = parser.add_argument
    add("--classifier_path", default="", help="a run, a checkpoint, a .pt or .safetensors file; or "
        "bayes: the best possible classifier of the images in data_dir")  # fmt: skip
    add("--model_path", default="", help="guided-diffusion's UNet, a .pt")
    add("--data_dir", default="", help="instead of a UNet: shards of a small training set, whose "
        "exact denoiser is sampled from")  # fmt: skip
    add("--classifier_scale", type=_finite, nargs="+", default=[1.0], metavar="X", help="[1.0]")
    add(
        "--joint_temperature", type=_finite, default=1.0, metavar="X", help="of the asked logit [1]"
    )
    add("--marginal_temperature", type=_finite, default=1.0, metavar="X", help="of all logits [1]")
    add("--num_samples", type=int, default=10000, metavar="N", help="at each scale [10000]")
    add("--classes", default="", metavar="K,K", help="asked for in turn (default: all)")
    add("--batch_size", type=int, default=16, metavar="N", help="samples at a time and rank [16]")
    add("--use_ddim", type=boolean, nargs="?", const=True, default=False, metavar="BOOL")
    add("--clip_denoised", type=boolean, default=True, metavar="BOOL", help="[True]")
    add("--use_fp16", type=boolean, default=False, metavar="BOOL", help="of the UNet [False]")
    add("--classifier_use_fp16", type=boolean, default=False, metavar="BOOL", help="[False]")
    add("--seed", type=_seed, default=0, help="of the noise; sample n is the same for any N [0]")
    add("--out_dir", type=Path, help="(default: samples/ of the run, else samples/)")
    add("--measure", action="store_true", help="with data_dir: tell how well the classifier guides")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    add("--predict_xstart", type=boolean, default=False, help=argparse.SUPPRESS)
    for name in WITHOUT_EFFECT:
        add(f"--{name}", help=argparse.SUPPRESS)
    unet = parser.add_argument_group("UNet")
    for name, default in UNET.items():
        kind = boolean if isinstance(default, bool) else type(default)
        unet.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=f"[{default}]")
    own = {action.dest for action in parser._actions}
    add_setting_flags(parser, OF_MODEL)
    arguments = parser.parse_args(argv)
    flags = {k: v for k, v in vars(arguments).items() if k not in own and k != "recipe"}
    if not arguments.classifier_path:
        parser.error("got no --classifier_path; need one; to sample unguided: --classifier_scale 0")
    if bool(arguments.model_path) == bool(arguments.data_dir):
        parser.error("need one of --model_path and --data_dir, to sample from")
    if arguments.classifier_path == BAYES and not arguments.data_dir:
        parser.error("--classifier_path bayes: need --data_dir, whose images it knows")
    for name in ("joint_temperature", "marginal_temperature"):
        if arguments.classifier_path == BAYES and getattr(arguments, name) != 1:
            parser.error(
                f"--{name}: got {getattr(arguments, name):g}; need 1 for --classifier_path bayes, "
                "which has probabilities and no logits"
            )
    shown = [f"{scale:g}" for scale in arguments.classifier_scale]
    if twice := [scale for scale in shown if shown.count(scale) > 1]:
        parser.error(
            f"--classifier_scale: got {twice[0]} twice, to six digits; need different ones, since "
            "each has a folder of its name"
        )
    if arguments.measure and not arguments.data_dir:
        parser.error("--measure: need --data_dir, whose images tell what is right")
    if arguments.predict_xstart:
        parser.error("--predict_xstart: got True; need a UNet that predicts the noise")
    if arguments.num_samples < 1 or arguments.batch_size < 1:
        parser.error("--num_samples and --batch_size need at least 1")
    # How a recipe trains is of no account here; an export does not even record all of it.
    recipe = RECIPES.get(arguments.recipe, {})
    of_model = {f.name for name in OF_MODEL for f in dataclasses.fields(GROUPS[name])}
    return arguments, {**{k: v for k, v in recipe.items() if k in of_model}, **flags}


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"got {text!r}; need a finite number")
    return number


def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]{1,20}", text) or int(text) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"got {text!r}; need a whole number from 0 to 2^64 - 1")
    return int(text)


def run(arguments: argparse.Namespace, given: dict) -> None:
    """Sample at every scale; files and tables on rank 0. Raises ValueError for wrong use."""
    device = distributed.init()
    import numpy as np

    from ds_classifier.diffusion import create_gaussian_diffusion
    from ds_classifier.guidance import exact_denoiser, sample_files, sampling

    def load():
        settings, classifier, source = load_classifier(arguments, given, device)
        exact = training_set = None
        if arguments.data_dir:
            training_set = exact_denoiser.read_images(
                arguments.data_dir, image_size=settings.image_size, channels=settings.in_channels
            )
            exact = exact_denoiser.ExactDenoiser(*training_set, device=device)
            settings = with_classes(settings, exact.num_classes, arguments)
        return settings, classifier, source, exact, training_set

    settings, classifier, source, exact, training_set = distributed.together(load, device)
    process = sampling.ReverseProcess(create_gaussian_diffusion(**settings.diffusion_kwargs()))
    original = create_gaussian_diffusion(
        **settings.replace(timestep_respacing="").diffusion_kwargs()
    )
    if exact is not None:
        denoiser = sampling.exact_denoiser(exact, process)
    else:
        unet = distributed.together(lambda: load_unet(arguments, settings, device), device)
        denoiser = sampling.unet_denoiser(unet, process)
    classes = parse_classes(arguments.classes, settings.num_classes)
    labels = classes[np.arange(arguments.num_samples) % len(classes)]
    out = arguments.out_dir or (source.home if source else Path()) / "samples"
    samples = []
    for scale in arguments.classifier_scale:
        began = time.monotonic()
        pixels = sampling.sample_classes(
            process,
            denoiser,
            gradient_of(scale, arguments, classifier, exact, original),
            labels,
            shape=(settings.in_channels, settings.image_size, settings.image_size),
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            device=device,
            ddim=arguments.use_ddim,
            clip_denoised=arguments.clip_denoised,
            progress=Progress(scale, len(labels)),
        )
        folder = sample_files.scale_folder(out, scale)
        path = distributed.on_rank_0(
            lambda f=folder, p=pixels: str(sample_files.write_samples(f, p, labels)), device
        )
        distributed.say(f"scale {scale:g}: {path}, {time.monotonic() - began:.0f} s")
        samples.append(pixels)

    def finish() -> None:
        overview = out / "overview.png"
        sample_files.write_overview(overview, arguments.classifier_scale, samples, labels)
        facts = origin(arguments, settings, source, classes.tolist())
        files.replace_text(out / "samples.json", json.dumps(facts, indent=1))
        (out / "fidelity.json").unlink(missing_ok=True)  # an earlier one's, of other samples
        print(f"a row a class: {overview}", flush=True)
        if arguments.measure:
            report = measure(arguments, classifier, exact, original, training_set, samples, labels)
            files.replace_text(out / "fidelity.json", json.dumps(report, indent=1))
            print(f"written: {out / 'fidelity.json'}", flush=True)

    distributed.on_rank_0(finish, device)
    distributed.finish()


def load_classifier(arguments: argparse.Namespace, given: dict, device):
    """(settings, classifier, its source); for bayes neither of the two."""
    import torch

    from ds_classifier.checkpoint.weights import load_classifier as load

    if arguments.classifier_path == BAYES:
        return Settings(**given), None, None
    # Which levels are walked through may be chosen anew; what they are may not.
    respaced = {name: value for name, value in given.items() if name == "timestep_respacing"}
    source, classifier = load(Path(arguments.classifier_path), given)
    source.refuse_contradicting_flags({n: v for n, v in given.items() if n not in respaced})
    settings = source.settings.replace(**respaced)
    classifier.to(device, torch.float16 if arguments.classifier_use_fp16 else None)
    return settings, classifier, source


def origin(
    arguments: argparse.Namespace,
    settings: Settings,
    source: WeightsFile | None,
    classes: list[int],
) -> dict:
    """What made the samples, for samples.json: JSON-able, and enough to make them again."""
    classifier = {"path": arguments.classifier_path}
    if source is not None:
        classifier |= {"path": str(source.path), "step": source.step, "sha256": source.sha256}
    denoiser = {"data_dir": arguments.data_dir}
    if arguments.model_path:
        unet = {name: getattr(arguments, name) for name in (*UNET, "use_fp16")}
        denoiser = {"model_path": arguments.model_path, **unet}
    return {
        "classifier": classifier,
        "denoiser": denoiser,
        "diffusion": settings.diffusion_kwargs(),
        "classes": classes,
        **{name: getattr(arguments, name) for name in OF_SAMPLING},
    }


def with_classes(settings: Settings, num_classes: int, arguments: argparse.Namespace) -> Settings:
    """The settings with the data's class count, which the classifier must share."""
    if settings.num_classes not in (0, num_classes):
        raise ValueError(
            f"--data_dir: got {num_classes} classes in {arguments.data_dir}; need the "
            f"{settings.num_classes} of {arguments.classifier_path}"
        )
    return settings.replace(num_classes=num_classes)


def load_unet(arguments: argparse.Namespace, settings: Settings, device):
    """guided-diffusion's UNet; ValueError where its file was built with other flags."""
    import torch

    from ds_classifier.checkpoint.weights import read_weights
    from ds_classifier.guidance.unet import create_unet

    unet = create_unet(
        image_size=settings.image_size,
        in_channels=settings.in_channels,
        num_classes=settings.num_classes,
        **{name: getattr(arguments, name) for name in UNET},
    )
    try:
        unet.load_state_dict(read_weights(Path(arguments.model_path)))
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        raise ValueError(
            f"--model_path: {arguments.model_path} was built with other flags ({lines[1].strip()}"
            f"{' ...' if len(lines) > 2 else ''}); do: give its MODEL_FLAGS"
        ) from None
    unet.to(device).eval().requires_grad_(False)
    if arguments.use_fp16:
        unet.set_precision(torch.float16)
    return unet


def parse_classes(text: str, num_classes: int):
    """'3,7' -> [3, 7]; '' -> all. [K] int64 numpy."""
    import numpy as np

    if not text:
        return np.arange(num_classes)
    parts = [part.strip() for part in text.split(",")]
    classes = [int(part) if re.fullmatch("[0-9]{1,9}", part) else -1 for part in parts]
    if min(classes) < 0 or max(classes) >= num_classes:
        raise ValueError(
            f"--classes: got {text!r}; need numbers from 0 to {num_classes - 1}, like 3,7"
        )
    return np.array(classes)


def gradient_of(
    scale: float, arguments: argparse.Namespace, classifier, exact, original: GaussianDiffusion
):
    """The cond_fn of a scale; None at 0."""
    from ds_classifier.guidance import gradient

    if scale == 0:
        return None
    if classifier is None:
        if original.rescale_timesteps and original.num_timesteps != 1000:
            raise ValueError("--classifier_path bayes: got --rescale_timesteps; do: drop it")
        return gradient.bayes_gradient(exact, original.alphas_cumprod, scale=scale)
    return gradient.classifier_gradient(
        classifier,
        scale=scale,
        joint_temperature=arguments.joint_temperature,
        marginal_temperature=arguments.marginal_temperature,
    )


def measure(
    arguments: argparse.Namespace, classifier, exact, original, training_set, samples, labels
) -> dict:
    """Tables of how well the classifier guides, printed; returned as JSON-able numbers."""
    import torch

    from ds_classifier.guidance import fidelity

    images, own_labels, _ = training_set
    judge = fidelity.Judge(images.permute(0, 2, 3, 1).numpy(), own_labels.numpy())
    shares = {
        f"{scale:g}": judge.share(pixels, labels)
        for scale, pixels in zip(arguments.classifier_scale, samples, strict=True)
    }
    print(f"share of {len(labels)} samples that an SVM on the clean images takes for their class:")
    for scale, share in shares.items():
        print(f"  scale {scale:>5s}  {100 * share:5.1f} %")
    levels = []
    if classifier is not None:
        device = next(classifier.parameters()).device
        last = original.num_timesteps - 1
        stride = max(1, len(images) // LEVEL_IMAGES)
        shown = slice(None, LEVEL_IMAGES * stride, stride)
        print(fidelity.HEADER, flush=True)
        for level in fidelity.compare_with_bayes(
            classifier,
            exact,
            original,
            images[shown].to(device),
            own_labels[shown].to(device),
            timesteps=torch.linspace(0, last, LEVELS + 1).round().long().tolist(),
            seed=arguments.seed,
        ):
            print(fidelity.level_line(level), flush=True)
            levels.append(level)
    return {"shares": shares, "levels": [dataclasses.asdict(level) for level in levels]}


class Progress:
    """How far a scale's samples are: a line a quarter minute, where it takes longer."""

    def __init__(self, scale: float, samples: int):
        self.scale, self.samples = scale, samples
        self.began = self.told = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.told < 15 or done == self.samples:
            return
        self.told = now
        left = (now - self.began) * (self.samples - done) / done
        distributed.say(f"scale {self.scale:g}: {done} of {self.samples}, {left:.0f} s left")


if __name__ == "__main__":
    sys.exit(main())
