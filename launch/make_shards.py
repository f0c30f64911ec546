"""Make shards of pictures, and check them: `python launch/make_shards.py convert SOURCE OUT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier.data.convert import convert
from ds_classifier.data.shards import verify
from ds_classifier.data.sources import open_source


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make_shards.py", description=__doc__.split(":")[0] + ".")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "convert",
        help="write a source as shards under OUT/train and OUT/val",
        description="Write pictures as shards under OUT/train (and OUT/val), with one class list. "
        "Pictures are copied untouched; the training split is shuffled once.",
    )
    command.add_argument(
        "source",
        help="a folder with a directory a class, or with CLASS_picture.jpg files; "
        "ILSVRC2012_img_train.tar, as downloaded; a .csv with columns path and label, or a .jsonl "
        "with these keys; Hugging Face .parquet, a file or a folder; shards; or the word digits, "
        "the handwritten digits that scikit-learn carries",
    )
    command.add_argument("out", type=Path, help="where train/ and val/ are written")
    command.add_argument("--val", help="a second source, for validation, of the same classes")
    command.add_argument(
        "--val_labels",
        metavar="FILE",
        help="classes of --val ILSVRC2012_img_val.tar: ILSVRC2012_devkit_t12.tar.gz or its folder, "
        "or Kaggle's LOC_val_solution.csv",
    )
    command.add_argument(
        "--samples_per_shard", type=int, default=1000, help="at most so many [1000]"
    )
    command.add_argument("--shuffle_seed", type=int, default=0, help="of the one shuffle [0]")
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        "verify",
        help="check shards against their manifest and index",
        description="Check the structure of every shard against the manifest and the index.",
    )
    command.add_argument("folder", type=Path, nargs="+", help="a split, such as data/train")
    command.add_argument("--hash", action="store_true", help="also read all bytes and compare them")
    command.add_argument("--decode", action="store_true", help="also decode all pictures")
    command.set_defaults(run=_verify)
    return parser


def _convert(arguments: argparse.Namespace) -> int:
    if arguments.samples_per_shard < 1:
        raise ValueError(f"--samples_per_shard: got {arguments.samples_per_shard}; need at least 1")
    source = open_source(arguments.source, arguments.val, arguments.val_labels)
    with _Progress() as progress:
        manifests = convert(
            source,
            arguments.out,
            samples_per_shard=arguments.samples_per_shard,
            shuffle_seed=arguments.shuffle_seed,
            progress=progress,
        )
    for split, manifest in manifests.items():
        megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
        print(
            f"{arguments.out / split}: {manifest.samples:,} pictures of {len(manifest.classes)} "
            f"classes in {len(manifest.shards)} shards, {megabytes:.1f} MB"
        )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    damaged = False
    for folder in arguments.folder:
        with _Progress() as progress:
            problems = verify(
                folder,
                check_hash=arguments.hash,
                check_decode=arguments.decode,
                progress=lambda done, total, progress=progress: progress("verify", done, total),
            )
        for problem in problems:
            print(problem)
        print(f"{folder}: {f'{len(problems)} problems' if problems else 'whole'}")
        damaged |= bool(problems)
    return 1 if damaged else 0


class _Progress:
    """A bar a phase, while a person watches."""

    def __enter__(self):
        self._bar, self._phase = None, None
        return self

    def __call__(self, phase: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._phase != phase:
            self.__exit__()
            self._phase = phase
            self._bar = tqdm(total=total, desc=phase, disable=None, leave=False)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    sys.exit(main())
