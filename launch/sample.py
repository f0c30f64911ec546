"""Draw guided samples, and measure guidance: `ds-classifier sample --classifier_path RUN ...`.

Flags have the names and defaults of guided-diffusion's classifier_sample.py. The deepspeed launcher
and torchrun start it on any number of ranks, which draw the same images.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by its path: use the source tree that it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from ds_classifier.common import installation

    installation.check()

from ds_classifier import distributed
from ds_classifier.common import files
from ds_classifier.common.progress import Progress
from ds_classifier.common.text import count
from ds_classifier.config import RECIPES
from ds_classifier.config.command_line import add_setting_flags
from ds_classifier.config.parser import Parser, boolean
from ds_classifier.config.settings import GROUPS
from ds_classifier.diffusion import create_gaussian_diffusion, range_in_words, timestep_range
from ds_classifier.distributed import failures

if TYPE_CHECKING:
    import numpy as np

    from ds_classifier.guidance.guided_sampling import GuidedSampling

BAYES = "bayes"  # in place of a classifier's path: the exact posterior of the training set
# guided-diffusion's defaults (`model_and_diffusion_defaults`).
UNET = dict(
    num_channels=128, num_res_blocks=2, channel_mult="", attention_resolutions="16,8",
    num_heads=4, num_head_channels=-1, num_heads_upsample=-1, use_new_attention_order=False,
    class_cond=False, learn_sigma=False, use_scale_shift_norm=True, resblock_updown=False,
)  # fmt: skip
# Flags of guided-diffusion's script that change nothing in sampling.
WITHOUT_EFFECT = ("dropout", "use_checkpoint", "use_kl", "rescale_learned_sigmas")
OF_MODEL = ("classifier", "diffusion")  # groups of settings that a bare file does not record
# Arguments that decide how samples are drawn, and all that samples.json records by their names.
OF_DRAWING = ("joint_temperature", "marginal_temperature", "classifier_on", "batch_size",
              "use_ddim", "clip_denoised", "seed")  # fmt: skip
RECORDED = ("classifier_use_fp16", "num_samples", "eta", *OF_DRAWING)


def main(argv: list[str] | None = None, prog: str = "sample.py") -> int:
    """Draw the samples that the command asks for, and return the exit code."""
    arguments, given = parse(sys.argv[1:] if argv is None else argv, prog)
    distributed.quiet_libraries()
    try:
        return run(arguments, given)
    except (ValueError, OSError) as error:
        return failures.report(error)
    except KeyboardInterrupt:
        return failures.interrupted()


def parse(argv: list[str], prog: str = "sample.py") -> tuple[argparse.Namespace, dict]:
    """Return the arguments, and the settings of classifier and process that the user named."""
    parser = Parser(
        prog=prog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draw samples of a diffusion model guided by a classifier.",
        epilog=textwrap.dedent("""\
            examples:
              ds-classifier sample --classifier_path runs/digits32 --data_dir data/train \\
                  --classifier_scale 0 1 10 --num_samples 100 --timestep_respacing 100 --measure
              ds-classifier sample --noise_schedule cosine --classifier_path CLASSIFIER.pt \\
                  --model_path DIFFUSION.pt MODEL_FLAGS --timestep_respacing 250

            A run, a checkpoint and an export record their settings. A bare .pt needs the flags of
            its noise process, and the UNet needs guided-diffusion's MODEL_FLAGS.
            """),
    )
    add = parser.add_argument
    add("--classifier_path", default="", help="a run, a checkpoint, a .pt or .safetensors file; or "
        "bayes: the exact posterior of the images in data_dir; without it, --classifier_scale 0 "
        "samples unguided")  # fmt: skip
    add("--model_path", default="", help="guided-diffusion's UNet, a .pt")
    add("--data_dir", default="", help="in place of a UNet: shards of a small training set, whose "
        "exact denoiser is sampled from")  # fmt: skip
    add("--classifier_scale", type=_finite, nargs="+", default=[1.0], metavar="X", help="scales to "
        "sample at, one after the other [1.0]")  # fmt: skip
    add(
        "--joint_temperature",
        type=_finite,
        default=1.0,
        metavar="X",
        help="temperature of the requested class's logit [1]",
    )
    add("--marginal_temperature", type=_finite, default=1.0, metavar="X", help="temperature "
        "of the sum over all classes [1]")  # fmt: skip
    add("--classifier_on", default="x_t", choices=("x_t", "predicted_x0"), help="what the "
        "classifier is shown: the noisy x_t, or, at t = 0, the denoiser's prediction of x_0, for "
        "a classifier of clean images [x_t]")  # fmt: skip
    add(
        "--num_samples",
        type=int,
        default=10000,
        metavar="N",
        help="samples to draw at each scale [10000]",
    )
    add(
        "--classes",
        default="",
        metavar="K,K",
        help="classes to sample in turn, as numbers or names (default: all); of a classifier of "
        "several classes per image also K+K, for both in one image",
    )
    add("--eta", type=_finite, metavar="X", help="of a classifier of values: steer to larger ones "
        "(above 0) or smaller ones (below 0), in 1 / unit of the value")  # fmt: skip
    add("--batch_size", type=int, default=16, metavar="N", help="samples at a time per rank [16]")
    add("--use_ddim", type=boolean, nargs="?", const=True, default=False, metavar="BOOL",
        help="sample by DDIM in place of DDPM [False]")  # fmt: skip
    add("--clip_denoised", type=boolean, default=None, metavar="BOOL", help="clip the "
        "predicted x_0 to [-1, 1] [True; False for arrays but uint8 pixels]")  # fmt: skip
    add(
        "--use_fp16",
        type=boolean,
        default=False,
        metavar="BOOL",
        help="run the UNet in fp16 [False]",
    )
    add("--classifier_use_fp16", type=boolean, default=False, metavar="BOOL", help="run the "
        "classifier in fp16 [False]")  # fmt: skip
    add(
        "--seed",
        type=_seed,
        default=0,
        help="seed of the noise; sample n is the same for any N [0]",
    )
    add("--out_dir", type=Path, help="(default: samples/ of the run, else samples/)")
    add(
        "--measure",
        action="store_true",
        help="with data_dir: measure how well the classifier guides",
    )
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
    if problem := _problem(arguments):
        parser.error(problem)
    # How a recipe trains does not matter here, and an export does not even record all of it.
    recipe = RECIPES.get(arguments.recipe, {})
    of_model = {f.name for name in OF_MODEL for f in dataclasses.fields(GROUPS[name])}
    return arguments, {**{k: v for k, v in recipe.items() if k in of_model}, **flags}


def _problem(arguments: argparse.Namespace) -> str:
    """Return what is wrong with the arguments together; "" if nothing is."""
    bayes = arguments.classifier_path == BAYES
    if not arguments.classifier_path and any(arguments.classifier_scale):
        return (
            "got no --classifier_path; need one to guide by; do: give it, or --classifier_scale 0 "
            "alone to sample unguided"
        )
    if not arguments.classifier_path and arguments.measure:
        return "--measure: got no --classifier_path; need one, or bayes, whose guidance is measured"
    if bool(arguments.model_path) == bool(arguments.data_dir):
        return "need one of --model_path and --data_dir, to sample from"
    if bayes and not arguments.data_dir:
        return "--classifier_path bayes: need --data_dir, the training set that it is exact for"
    for name in ("joint_temperature", "marginal_temperature"):
        if bayes and (value := getattr(arguments, name)) != 1:
            return (
                f"--{name}: got {value:g}; need 1 for --classifier_path bayes, which has "
                "probabilities and no logits"
            )
    if bayes and arguments.classifier_on != "x_t":
        return "--classifier_on: got predicted_x0; need x_t for --classifier_path bayes"
    shown = [f"{scale:g}" for scale in arguments.classifier_scale]
    if twice := [scale for scale in shown if shown.count(scale) > 1]:
        return (
            f"--classifier_scale: got {twice[0]} twice, to six digits; need different ones, since "
            "each has a folder of its name"
        )
    if arguments.measure and not arguments.data_dir:
        return "--measure: need --data_dir, whose exact posterior is the measure"
    if arguments.predict_xstart:
        return "--predict_xstart: got True; need a UNet that predicts the noise"
    if arguments.num_samples < 1 or arguments.batch_size < 1:
        return "--num_samples and --batch_size need at least 1"
    return ""


def _finite(text: str) -> float:
    """Return a finite number from a flag."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"got {text!r}; need a finite number")
    return number


def _seed(text: str) -> int:
    """Return a seed, 0 to 2^64 - 1, from a flag."""
    if not re.fullmatch("[0-9]{1,20}", text) or int(text) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"got {text!r}; need a whole number from 0 to 2^64 - 1")
    return int(text)


def run(arguments: argparse.Namespace, given: dict) -> int:
    """Sample at every scale; rank 0 writes files and tables. Return the exit code.

    Raises ValueError for wrong use.
    """
    device = distributed.init()
    import numpy as np

    from ds_classifier.checkpoint.weights import home_of
    from ds_classifier.guidance import fidelity, sample_files
    from ds_classifier.guidance.exact_denoiser import ExactDenoiser
    from ds_classifier.guidance.guided_sampling import load_guided_sampling
    from ds_classifier.report.page import write_report

    named = arguments.classifier_path not in ("", BAYES)
    classifier_path = Path(arguments.classifier_path) if named else None

    def find_place() -> str:
        """Return the directory for the samples, which can be written."""
        home = Path() if classifier_path is None else home_of(classifier_path)
        out = arguments.out_dir or home / "samples"
        files.refuse_unwritable("--out_dir", out)
        return str(out)

    out = Path(distributed.on_rank_0(find_place, device))
    guided = distributed.together(
        lambda: load_guided_sampling(
            classifier_path,
            given,
            unguided=not arguments.classifier_path,
            data_dir=arguments.data_dir,
            model_path=arguments.model_path,
            unet={name: getattr(arguments, name) for name in UNET},
            classifier_fp16=arguments.classifier_use_fp16,
            unet_fp16=arguments.use_fp16,
            device=device,
        ),
        device,
    )
    settings, source = guided.settings, guided.source
    if arguments.clip_denoised is None:
        arguments.clip_denoised = guided.pixels
    for note in source.notes() if source else []:
        distributed.say(note)
    if source and source.settings.t_range:
        process = create_gaussian_diffusion(**source.settings.diffusion_kwargs())
        trained = timestep_range(source.settings.t_range, process)
        distributed.say(f"the classifier was trained at {range_in_words(trained, process)} alone")
    asked = guided.asked(arguments.classes, arguments.eta)
    labels = asked[np.arange(arguments.num_samples) % len(asked)]
    steps, scales = guided.process.diffusion.num_timesteps, arguments.classifier_scale
    distributed.say(
        f"drawing {count(len(labels), 'sample')} at {count(len(scales), 'scale')}, "
        f"{count(steps, 'step')} each"
    )
    if guided.exact is not None:
        like = ", which they will resemble" if isinstance(guided.exact, ExactDenoiser) else ""
        distributed.say(f"by the exact denoiser of {guided.exact}{like}")
    drawn = _draw_scales(guided, labels, out, arguments)
    if not drawn:
        distributed.finish()
        return failures.FAILED
    scales, samples = list(drawn), list(drawn.values())

    def finish() -> None:
        """Write the overview, the facts, and the measures if they are asked for."""
        overview = out / "overview.png"
        colours = guided.colours(samples[0])
        shown = samples if colours is None else [colours(drawn) for drawn in samples]
        rows = sample_files.write_overview(overview, scales, shown, labels, guided.names)
        recorded = asked.tolist()  # classes
        if guided.targets.kind == "classes":
            recorded = [sample_files.classes_asked(one) for one in asked]
        elif arguments.eta is not None:
            recorded = []
        facts = {
            **guided.origin,
            "diffusion": settings.diffusion_kwargs(),
            "classes": recorded,
            "classifier_scale": scales,
            **{name: getattr(arguments, name) for name in RECORDED},
        }
        files.replace_text(out / "samples.json", json.dumps(facts, indent=1))
        (out / "fidelity.json").unlink(missing_ok=True)  # it is of an earlier run's samples
        present = len(sample_files.groups(labels))
        if colours is not None:
            print(f"the colours of the pictures are {colours.words}", flush=True)
        row = "class" if guided.targets.kind in ("class", "soft") else "request"
        which = row if rows == present else f"{row} for the first {rows} of {present:,}"
        print(f"a row per {which}: {overview}", flush=True)
        if arguments.measure:
            print(f"measuring by {guided.exact}", flush=True)
            with Progress("noise levels") as progress:
                measures = fidelity.measure(
                    guided, scales, samples, labels, seed=arguments.seed, progress=progress
                )
            print("\n".join(measures.lines()))
            files.replace_text(out / "fidelity.json", json.dumps(measures.as_json(), indent=1))
            print(f"written: {out / 'fidelity.json'}", flush=True)

    distributed.on_rank_0(finish, device)
    distributed.finish()
    code = 0 if len(drawn) == len(arguments.classifier_scale) else failures.FAILED
    if source is None or source.kind != "checkpoint" or distributed.rank() != 0:
        return code
    of_run = out.resolve() == (source.home / "samples").resolve()
    if of_run and failures.tolerate("report.html", lambda: write_report(source.home)):
        print(f"written: {source.home}/report.html")
    return code


def _draw_scales(
    guided: GuidedSampling, labels: np.ndarray, out: Path, arguments: argparse.Namespace
) -> dict[float, np.ndarray]:
    """Draw the samples of every scale, write them on rank 0, and return them by scale.

    A scale at which samples are not finite is left out, with an error on the screen; the files of
    its folder stay as they are.
    """
    drawing = {name: getattr(arguments, name) for name in OF_DRAWING}
    drawn = {}
    for scale in arguments.classifier_scale:
        began = time.monotonic()
        try:
            with Progress("samples", shown=distributed.rank() == 0) as progress:
                phase = functools.partial(progress, phase=f"scale {scale:g}")
                pixels = guided.draw(labels, scale, **drawing, progress=phase)
        except FloatingPointError as error:  # all ranks raise it
            if distributed.rank() == 0:
                message = f"error: scale {scale:g}: {error}; none of this scale is written; do: "
                distributed.show(message + _remedy(arguments, scale), error=True)
            continue
        path = distributed.on_rank_0(
            functools.partial(_write, guided, out, scale, pixels, labels), guided.device
        )
        distributed.say(f"scale {scale:g}: {path}, {time.monotonic() - began:.0f} s")
        drawn[scale] = pixels
    return drawn


def _write(
    guided: GuidedSampling, out: Path, scale: float, drawn: np.ndarray, labels: np.ndarray
) -> str:
    """Write the samples of a scale, and return the path of the npz."""
    from ds_classifier.guidance import sample_files

    folder = sample_files.scale_folder(out, scale)
    if (colours := guided.colours(drawn)) is None:
        return str(sample_files.write_samples(folder, drawn, labels))
    values = guided.arrays.values_of_x_0(drawn)
    return str(sample_files.write_samples(folder, colours(drawn), labels, values))


def _remedy(arguments: argparse.Namespace, scale: float) -> str:
    """Return what to do about samples that are not finite."""
    guided = scale != 0 and arguments.classifier_path != BAYES
    networks = {"use_fp16": arguments.model_path, "classifier_use_fp16": guided}
    fp16 = [f"--{name}" for name, used in networks.items() if used and getattr(arguments, name)]
    if fp16:
        return f"drop {' and '.join(fp16)}, whose numbers end at 65504"
    return "choose a scale nearer to 0" if scale else "choose another UNet"


if __name__ == "__main__":
    sys.exit(main())
