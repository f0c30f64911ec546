"""Make shards of images, and check them: `python launch/make_shards.py convert SOURCE OUT`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier.common import files
from ds_classifier.common.urls import shown


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {files.problem(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("stopped; the same command again goes on", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def _stop(number: int, _) -> None:
    """A signal's end, as that by Ctrl-C: scratch files are removed on the way out."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make_shards.py", description=__doc__.split(":")[0] + ".")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "convert",
        help="write a source as shards under OUT/train and OUT/val",
        description="Write images as shards under OUT/train (and OUT/val), with one class list. "
        "Images are copied untouched unless --image_size is given; the training split is "
        "shuffled once. A killed conversion goes on where it was when called again.",
    )
    command.add_argument(
        "source",
        help="a folder with a directory a class, or with CLASS_image.jpg files; "
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
        "--image_size",
        type=int,
        help="store images halved as far as every crop at this size begins with [untouched]",
    )
    command.add_argument(
        "--form",
        choices=["jpg", "png"],
        help="of halved images: png, the very pixels, or jpg, quality 95 without chroma "
        "subsampling, a third of the size [jpg]",
    )
    command.add_argument(
        "--samples_per_shard", type=int, default=1000, help="at most so many [1000]"
    )
    command.add_argument("--shuffle_seed", type=int, default=0, help="of the one shuffle [0]")
    command.add_argument(
        "--part",
        type=_part,
        default=(0, 1),
        metavar="I/N",
        help="write every N-th shard from the I-th on (0 <= I < N), for N machines; then merge",
    )
    _add_workers(command)
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        "merge",
        help="finish what convert --part wrote",
        description="Write index and manifest when the shards of all parts are in one place.",
    )
    command.add_argument("out", type=Path, help="the OUT of the parts")
    command.set_defaults(run=_merge)

    command = commands.add_parser(
        "index",
        help="use shards made by others, where and as they are",
        description="Write OUT/train (and OUT/val) with a manifest and an index of WebDataset "
        "shards that stay where they are: a directory, or a URL that training then fetches from. "
        "Counts are compared with timm's _info.json, open_clip's sizes.json, img2dataset's stats "
        "and CLIP_benchmark's nshards.txt where they lie beside the shards.",
    )
    command.add_argument(
        "train",
        help="a directory; a pattern of paths or URLs like 'DIR/name-{0000..1023}.tar'; a URL of a "
        "directory with one of the files above; or such a file",
    )
    command.add_argument("out", type=Path, help="where train/ and val/ are written")
    command.add_argument(
        "--val", help="the same, for validation [what lies beside TRAIN and is called so]"
    )
    command.add_argument(
        "--label",
        type=_label,
        help="where a sample's label stands: cls, or json:KEY for a field of its .json [cls, or "
        "what _info.json says]",
    )
    command.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names, one a line [classnames.txt beside the shards, else numbers]",
    )
    _add_workers(command)
    command.set_defaults(run=_index)

    command = commands.add_parser(
        "verify",
        help="check shards against their manifest and index",
        description="Check the structure of every shard against the manifest and the index. Shards "
        "behind a URL are streamed whole for it. Exits with 1 where something is damaged, with 2 "
        "where a split could not be checked.",
    )
    command.add_argument("folder", nargs="+", help="a split, such as data/train, or its URL")
    command.add_argument("--hash", action="store_true", help="also read all bytes and compare them")
    command.add_argument("--decode", action="store_true", help="also decode all images")
    _add_workers(command)
    command.set_defaults(run=_verify)
    return parser


def _add_workers(command: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    command.add_argument("--workers", type=int, default=cores, help=f"processes [{cores}]")


def _part(text: str) -> tuple[int, int]:
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        i = n = -1
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"got {text!r}; need I/N with 0 <= I < N, like 0/4")
    return i, n


def _label(text: str) -> str:
    if text != "cls" and not (text.startswith("json:") and text != "json:"):
        raise argparse.ArgumentTypeError(f"got {text!r}; need cls or json:KEY")
    return text


def _convert(arguments: argparse.Namespace) -> int:
    for name in ("samples_per_shard", "workers", "image_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: got {value}; need at least 1")
    if arguments.form and not arguments.image_size:
        raise ValueError(
            f"--form: got {arguments.form} without --image_size; need the size that images are "
            "halved for; without it they are stored untouched"
        )
    from ds_classifier.data.convert.convert import Encoding, convert
    from ds_classifier.data.convert.sources import open_source

    source = open_source(arguments.source, arguments.val, arguments.val_labels)
    with _Progress() as progress:
        manifests = convert(
            source,
            arguments.out,
            encoding=Encoding(arguments.image_size, arguments.form or "jpg"),
            workers=arguments.workers,
            part=arguments.part,
            samples_per_shard=arguments.samples_per_shard,
            shuffle_seed=arguments.shuffle_seed,
            progress=progress,
        )
    if arguments.part[1] > 1 and None in manifests.values():
        i, n = arguments.part
        print(f"part {i} of {n} is written; when all are: make_shards.py merge {arguments.out}")
        return 0
    for split, manifest in manifests.items():
        _describe(arguments.out / split, manifest)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from ds_classifier.data.convert.convert import merge
    from ds_classifier.data.shards import open_shards

    merged = merge(arguments.out)
    if not merged:
        raise ValueError(f"OUT: got {arguments.out}, where no part of a conversion is left")
    for split in merged:
        _describe(arguments.out / split, open_shards(arguments.out / split).manifest)
    return 0


def _index(arguments: argparse.Namespace) -> int:
    if arguments.workers < 1:
        raise ValueError(f"--workers: got {arguments.workers}; need at least 1")
    from ds_classifier.data.foreign.index import index

    with _Progress() as progress:
        splits = index(
            arguments.train,
            arguments.out,
            val=arguments.val,
            labels=arguments.label,
            classes=arguments.classes,
            workers=arguments.workers,
            progress=progress,
        )
    for split, indexed in splits.items():
        folder, manifest = arguments.out / split, indexed.manifest
        megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
        checked = "nothing beside them tells their counts"
        if indexed.checked_by:
            checked = f"counts agree with {indexed.checked_by}"
        place = shown(manifest.location or str(folder))
        print(
            f"{folder}: {manifest.samples:,} images of {len(manifest.classes)} classes in "
            f"{_count(len(manifest.shards), 'shard')}, {megabytes:.1f} MB, at {place}; " + checked
        )
        if split == "train":
            found = indexed.neighbours
            print(
                f"  {found.alike:.1%} of neighbours share their class, {found.by_chance:.1%} in a "
                "random order"
                + ("; do: train with --shuffle_shards lane" if found.sorted_by_class else "")
            )
    return 0


def _describe(folder: Path, manifest) -> None:
    from ds_classifier.data.convert.convert import Encoding

    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    encoding = Encoding(manifest.image_size, manifest.form)
    print(
        f"{folder}: {manifest.samples:,} images of {len(manifest.classes)} classes in "
        f"{_count(len(manifest.shards), 'shard')}, {megabytes:.1f} MB, {encoding}"
    )
    if manifest.undecodable:
        print(
            f"  {_count(len(manifest.undecodable), 'image')} without pixels, such as "
            f"{manifest.undecodable[0]}: stored untouched, they will count as bad samples"
        )


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + "s" * (number != 1)


def _verify(arguments: argparse.Namespace) -> int:
    from ds_classifier.data.foreign.verify import verify

    damaged = unchecked = False
    for folder in arguments.folder:
        try:
            with _Progress() as progress:
                problems = verify(
                    folder,
                    check_hash=arguments.hash,
                    check_decode=arguments.decode,
                    workers=arguments.workers,
                    progress=lambda done, total, progress=progress: progress("verify", done, total),
                )
        except (ValueError, OSError) as error:  # the others can be checked all the same
            print(f"error: {files.problem(error)}", file=sys.stderr)
            unchecked = True
            continue
        for problem in problems:
            print(problem)
        print(f"{shown(folder)}: {_count(len(problems), 'problem') if problems else 'whole'}")
        damaged |= bool(problems)
    return 2 if unchecked else int(damaged)


class _Progress:
    """A bar a phase while a person watches; a line a minute where nobody does."""

    def __enter__(self):
        self._bar, self._phase = None, None
        return self

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        from tqdm import tqdm

        if self._phase != phase:
            self.__exit__()
            self._phase, self._told = phase, time.monotonic()
            shape = dict(desc=phase, unit=" images", disable=None, leave=False)
            # What an earlier call has written tells nothing of the rate.
            self._bar = tqdm(total=total, initial=done, **shape)
        self._bar.update(done - self._bar.n)
        if self._bar.disable and time.monotonic() - self._told > 60:
            self._told = time.monotonic()
            print(
                f"{phase}: {done:,} of {'unknown' if total is None else f'{total:,}'} images",
                file=sys.stderr,
            )

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
