"""What a recipe costs on many GPUs, computed: `python launch/scaling.py --recipe imagenet64`.

Nothing is measured: docs/scaling.md says what is assumed.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier.config import RECIPES, Settings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scaling.py",
        description="Step time, bytes sent and hours of a recipe on many GPUs, computed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--recipe", choices=sorted(RECIPES), default="imagenet64", help="what is trained")
    add("--num_classes", type=two_or_more, default=1000, help="classes")
    add("--gpus", type=positive, nargs="+", default=[1, 8, 64, 512, 4096], help="how many")
    add("--peak", type=above_zero, default=989.4, help="TFLOP/s of a GPU in 16 bits (H100 SXM)")
    add("--mfu", type=share, default=0.25, help="share of the peak reached: an assumption")
    add("--wire", type=above_zero, default=25.0, help="GB/s between nodes, for each GPU")
    add("--inside", type=above_zero, default=200.0, help="GB/s between the 8 GPUs of a node")
    add(
        "--micro_batch",
        type=positive,
        default=64,
        help="pictures that a GPU takes at a time, at most",
    )
    add("--global_batch", type=positive, help="pictures a step (None: the recipe's)")
    add("--images_a_core", type=above_zero, help="what a loader core gives (None: not told)")
    arguments = parser.parse_args(argv)
    if not (arguments.global_batch or RECIPES[arguments.recipe].get("global_batch")):
        parser.error(f"--global_batch: recipe {arguments.recipe} has none; need one")
    print("\n".join(tables(arguments)))
    return 0


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}; need at least 1")
    return value


def two_or_more(text: str) -> int:
    if (value := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"got {text}; need at least 2")
    return value


def above_zero(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}; need more than 0, and a finite number")
    return value


def share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"got {text}; need more than 0, at most 1")
    return value


def tables(arguments: argparse.Namespace) -> list[str]:
    """A line a number of GPUs."""
    from ds_classifier.fitting import tensors_of
    from ds_classifier.flops import forward_flops
    from ds_classifier.scaling import Job, step

    settings = Settings(**RECIPES[arguments.recipe]).replace(num_classes=arguments.num_classes)
    common = dict(
        parameters=sum(t.numel() for t in tensors_of(settings).values()),
        forward_flops=forward_flops(settings.model_kwargs()),
        global_batch=arguments.global_batch or settings.global_batch,
        peak_flops=1e12 * arguments.peak,
        mfu=arguments.mfu,
    )
    lines = [
        f"{arguments.recipe}: {common['parameters'] / 1e6:.1f} M parameters, "
        f"{common['forward_flops'] / 1e9:.1f} GFLOP forward a picture, global batch "
        f"{common['global_batch']}",
        f"{'GPUs':>5} {'micro x acc':>11} {'ZeRO':>4} {'sent MB':>8} {'compute ms':>10} "
        f"{'comm. ms':>9} {'efficiency':>10} {'img/s':>9} {'hours':>7} {'GPU-h':>7} {'cores':>6}",
    ]
    for gpus in arguments.gpus:
        job = Job(**common, wire=1e9 * (arguments.wire if gpus > 8 else arguments.inside))
        for stage in (1, 2):
            s = step(job, gpus, stage=stage, largest_micro_batch=arguments.micro_batch)
            if s is None:
                lines.append(
                    f"{gpus:5} the global batch does not divide into whole pictures for each GPU"
                )
                break
            if stage == 2 and s.accumulation == 1:
                continue  # it sends what ZeRO 1 sends
            rate, hours = job.global_batch / s.seconds, settings.iterations * s.seconds / 3600
            cores = rate / gpus / arguments.images_a_core if arguments.images_a_core else 0.0
            lines.append(
                f"{gpus:5} {f'{s.micro_batch} x {s.accumulation}':>11} {stage:4} "
                f"{s.sent / 1e6:8.0f} {1e3 * s.compute:10.1f} {1e3 * s.communication:9.1f} "
                f"{100 * s.efficiency:9.0f}% {rate:9,.0f} {hours:7.1f} {gpus * hours:7.0f} "
                f"{f'{cores:.1f}' if cores else '-':>6}"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
