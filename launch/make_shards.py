"""Make shards of images, and check them: `ds-classifier convert SOURCE OUT`."""

from __future__ import annotations

import argparse
import functools
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from ds_classifier.common import installation

    installation.check()

from ds_classifier.common import files
from ds_classifier.common.progress import Progress
from ds_classifier.common.text import count, percent
from ds_classifier.common.urls import scheme, shown
from ds_classifier.config.parser import Parser
from ds_classifier.data.labels.targets import ASKED

if TYPE_CHECKING:
    from ds_classifier.data.remote.mirror import Mirror
    from ds_classifier.data.shards import Manifest

OUT_HELP = "the directory for train/ and val/, or its URL: s3://BUCKET/PATH, gs:// or az://"
MAX_NAMED = 5  # classes without images in a message


def main(argv: list[str] | None = None, prog: str = "make_shards.py") -> int:
    """Run one command and return its exit code."""
    arguments = _parser(prog).parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {files.problem(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def _stop(number: int, _) -> None:
    """Handle a signal as Ctrl-C is handled, so that scratch files are removed before the exit."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


# ---------------------------------------------------------------------------- the command line


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description=__doc__.split(":")[0] + ".")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands)
    command = commands.add_parser(
        "merge",
        help="finish a conversion that was written with convert --part",
        description="Write index and manifest once the shards of all parts are in one directory.",
    )
    command.add_argument("out", type=_output, help="the OUT of the parts")
    command.set_defaults(run=_merge)
    _add_index(commands)
    _add_verify(commands)
    return parser


def _add_convert(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "convert",
        help="write images as shards under OUT/train and OUT/val",
        description="Write images as shards under OUT/train (and OUT/val), with one class list. "
        "Images are copied untouched unless --image_size is given. The training split is shuffled "
        "once. To continue a conversion that was killed, run the same command again.",
    )
    command.add_argument(
        "source",
        help="a folder with one directory per class, or with CLASS_image.jpg files, or a folder "
        "of such splits, train/ and val/; ILSVRC2012_img_train.tar, as downloaded; a list of paths "
        "and labels (.csv, .tsv, .jsonl, .txt); Hugging Face .parquet, a file or a folder; arrays: "
        "folders of .npy, one .npz, or one .npy with --labels; shards; "
        "the word digits, for the handwritten digits in scikit-learn; gaussians, for made-up "
        "images whose best classifier is known; or torchvision:NAME, such as "
        "torchvision:CIFAR10, with --root",
    )
    command.add_argument("out", type=_output, help=OUT_HELP)
    command.add_argument(
        "--val",
        help="a second source, for validation, with the same classes; or the share of SOURCE to "
        "hold out, such as 10%%, chosen by a hash of each image",
    )
    command.add_argument(
        "--val_labels",
        metavar="FILE",
        help="labels for --val ILSVRC2012_img_val.tar: ILSVRC2012_devkit_t12.tar.gz or its folder, "
        "or Kaggle's LOC_val_solution.csv; for --val X.npy, see --labels",
    )
    command.add_argument(
        "--labels",
        metavar="FILE",
        help="labels of SOURCE if that is an .npy or .npz: .npy, or text with one in each line "
        "[those in the .npz; STEM_labels.npy or labels.npy beside the .npy]",
    )
    _add_scaling(command)
    command.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="the root of a source torchvision:NAME, where its data are on disk",
    )
    command.add_argument(
        "--download",
        action="store_true",
        help="let torchvision download its data to --root [use those on disk]",
    )
    command.add_argument(
        "--columns",
        type=_columns,
        metavar="COLUMNS",
        help="names of the columns: path=file,label=class in a list, image=img,label=fine_label in "
        "parquet and .npz [found if that is clear]; label=a,b,c or label=p_* for targets with a "
        "column for each class; weight=NAME for the weights of images in the loss",
    )
    command.add_argument(
        "--targets",
        choices=ASKED,
        default="class",
        help="what the labels of a list, parquet or arrays are: one class; several classes, as a "
        "list or columns of 0 and 1; soft, probabilities that sum to 1; a teacher's logits, stored "
        "as probabilities; values, numbers that are put into bins [class]",
    )
    command.add_argument(
        "--bins", type=int, metavar="K", help="of --targets values, with about equal counts [20]"
    )
    command.add_argument(
        "--image_size",
        type=int,
        help="store large images after the halvings with which a crop to this size begins anyway "
        "[store them untouched]",
    )
    command.add_argument(
        "--form",
        choices=["jpg", "png"],
        help="format of halved images: png is lossless; jpg is quality 95 without chroma "
        "subsampling, a third of the size [jpg]",
    )
    command.add_argument(
        "--samples_per_shard", type=int, default=1000, help="at most this many [1000]"
    )
    command.add_argument("--shuffle_seed", type=int, default=0, help="seed of the shuffle [0]")
    command.add_argument(
        "--part",
        type=_part,
        default=(0, 1),
        metavar="I/N",
        help="write every N-th shard, starting with the I-th (0 <= I < N), to share the work "
        "between N machines; then run merge",
    )
    _add_workers(command)
    command.set_defaults(run=_convert)


def _add_index(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "index",
        help="use shards that another program made, without copying or changing them",
        description="Write OUT/train (and OUT/val) with a manifest and an index of WebDataset "
        "shards that stay where they are: in a directory, or behind a URL from which training "
        "fetches them. The number of samples is compared with timm's _info.json, open_clip's "
        "sizes.json, img2dataset's stats and CLIP_benchmark's nshards.txt if they are found.",
    )
    command.add_argument(
        "train",
        help="a directory; a pattern of paths or URLs like 'DIR/name-{0000..1023}.tar'; the URL of "
        "a directory with one of the files above; or such a file",
    )
    command.add_argument("out", type=_output, help=OUT_HELP)
    command.add_argument(
        "--val", help="the same, for validation [the validation split that TRAIN holds]"
    )
    command.add_argument(
        "--label",
        type=_label,
        help="where to read the label of a sample: cls, or json:KEY for a field of its .json [what "
        "_info.json says, else cls]",
    )
    command.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names, one per line [classnames.txt next to the shards, else numbers]",
    )
    _add_scaling(command)
    _add_workers(command)
    command.set_defaults(run=_index)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "verify",
        help="check shards against their manifest and index",
        description="Check the structure of every shard against the manifest and the index. Shards "
        "behind a URL are downloaded for this, but not kept. The exit code is 1 if a split is "
        "damaged, and 2 if a split could not be checked.",
    )
    command.add_argument("folder", nargs="+", help="a split, such as data/train, or its URL")
    command.add_argument("--hash", action="store_true", help="also compare the sha256 of all bytes")
    command.add_argument("--decode", action="store_true", help="also decode all images")
    _add_workers(command)
    command.set_defaults(run=_verify)


def _add_scaling(command: Parser) -> None:
    for name, default in (("scale", 1), ("shift", 0)):
        command.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help=f"of arrays, one number or one per channel: x_0 = (value - shift) * scale "
            f"[{default}]",
        )


def _add_workers(command: Parser) -> None:
    cores = len(os.sched_getaffinity(0))
    command.add_argument(
        "--workers", type=int, default=cores, help=f"number of processes [{cores}]"
    )


def _part(text: str) -> tuple[int, int]:
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        i = n = -1
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"got {text!r}; need I/N with 0 <= I < N, like 0/4")
    return i, n


def _output(text: str) -> Path | str:
    """Return OUT: a directory, or its URL in object storage."""
    kind = scheme(text)
    if kind == "hf":
        raise argparse.ArgumentTypeError(
            f"got {shown(text)}, where this program cannot write; do: name a directory here, then "
            "hf upload ORG/NAME DIRECTORY --repo-type dataset"
        )
    if kind and kind not in ("s3", "gs", "az"):
        raise argparse.ArgumentTypeError(
            f"got {shown(text)}, where this program cannot write; need a directory, or "
            "s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH"
        )
    return re.sub("(?<=[^/:])/+$", "", text) if kind else Path(text)


@contextmanager
def _opened_output(out: Path | str) -> Iterator[tuple[Path, Mirror | None]]:
    """Yield the directory to write to, and the mirror that uploads from it if OUT is a URL."""
    if isinstance(out, Path):
        files.refuse_unwritable("OUT", out)
        yield out, None
        return
    from ds_classifier.data.remote.mirror import mirrored

    with mirrored(out) as mirror:
        yield mirror.folder, mirror


def _columns(text: str) -> dict[str, str]:
    pairs = [pair.split("=", 1) for pair in re.split(r",(?=[^,]*=)", text)]
    if any(len(pair) != 2 or pair[0] not in ("image", "path", "label", "weight") for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; need path=NAME,label=NAME for a list, image=NAME,label=NAME for "
            "parquet; both with weight=NAME or without"
        )
    return dict(pairs)


def _label(text: str) -> str:
    if text != "cls" and not (text.startswith("json:") and text != "json:"):
        raise argparse.ArgumentTypeError(f"got {text!r}; need cls or json:KEY")
    return text


def _require_positive(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: got {value}; need at least 1")


# -------------------------------------------------------------------------------- the commands


def _convert(arguments: argparse.Namespace) -> int:
    _require_positive(arguments, "samples_per_shard", "workers", "image_size")
    if arguments.form and not arguments.image_size:
        raise ValueError(
            f"--form: got {arguments.form} without --image_size; need the size that images are "
            "halved for, because images that are not halved are copied untouched"
        )
    from ds_classifier.data.convert.bins import BINS, with_bins
    from ds_classifier.data.convert.convert import Encoding, convert
    from ds_classifier.data.convert.hold_out import hold_out, parse_share
    from ds_classifier.data.convert.sources import open_source

    share = parse_share(arguments.val) if arguments.val else None
    if share and arguments.val_labels:
        raise ValueError(
            f"--val_labels: got {arguments.val_labels} with --val {arguments.val}, a share of the "
            "labelled images; do: drop it"
        )
    if arguments.bins is not None and (arguments.targets != "values" or arguments.bins < 2):
        raise ValueError(
            f"--bins: got {arguments.bins} with --targets {arguments.targets}; need 2 or more, "
            "with --targets values"
        )
    _refuse_inside(arguments.source, arguments.out)
    with _opened_output(arguments.out) as (out, mirror):
        source = open_source(
            arguments.source,
            None if share else arguments.val,
            arguments.val_labels,
            columns=arguments.columns,
            root=arguments.root,
            download=arguments.download,
            labels=arguments.labels,
            scale=arguments.scale,
            shift=arguments.shift,
            targets=arguments.targets,
        )
        for remark in source.remarks:
            print(remark)
        with Progress() as progress:
            if share:
                source = hold_out(source, share, workers=arguments.workers, progress=progress)
            if source.values_of:
                source, remarks = with_bins(source, arguments.bins or BINS)
                for remark in remarks:
                    print(remark)
            manifests = convert(
                source,
                out,
                encoding=Encoding(arguments.image_size, arguments.form or "jpg"),
                workers=arguments.workers,
                part=arguments.part,
                samples_per_shard=arguments.samples_per_shard,
                shuffle_seed=arguments.shuffle_seed,
                progress=progress,
                mirror=mirror,
            )
        if arguments.part[1] > 1 and None in manifests.values():
            i, n = arguments.part
            print(
                f"part {i} of {n} is written; after all parts: ds-classifier merge {arguments.out}"
            )
            return 0
        _describe(out, manifests, place=arguments.out)
    return 0


def _refuse_inside(source: str, out: Path | str) -> None:
    """Raise ValueError for an output inside of the source, which would be read the next time."""
    if isinstance(out, str):
        return
    folder, place = Path(source).resolve(), out.resolve()
    if folder.is_dir() and folder in (place, *place.parents):
        raise ValueError(
            f"OUT: got {out}, which is in the source {source}; need another place; do: name a "
            "directory beside it"
        )


def _merge(arguments: argparse.Namespace) -> int:
    from ds_classifier.data.convert.convert import merge
    from ds_classifier.data.shards import open_shards

    with _opened_output(arguments.out) as (out, mirror):
        merged = merge(out, mirror)
        if not merged:
            raise ValueError(
                f"OUT: got {arguments.out}, which holds no unfinished conversion; need the OUT of "
                "convert --part"
            )
        manifests = {split: open_shards(out / split).manifest for split in merged}
        _describe(out, manifests, place=arguments.out)
    return 0


def _describe(out: Path, manifests: dict, *, place: Path | str) -> None:
    """Print the contents of the splits that were converted, and what classes a split lacks.

    place: OUT, which `out` stands for if it is a URL.
    """
    from ds_classifier.data.convert.convert import Encoding
    from ds_classifier.data.shards import images_per_class, open_shards

    for split, manifest in manifests.items():
        shards = open_shards(out / split)
        images = images_per_class(shards)
        held = ""
        if split == "val" and manifest.held_out:
            fewest, most = min(images.values()), max(images.values())
            each = manifest.targets.noun
            held = f", {manifest.held_out} held out, {fewest:,} to {most:,} per {each}"
        stored = manifest.arrays or Encoding(manifest.image_size, manifest.form)
        print(f"{_contents(f'{place}/{split}', manifest, shards.contents)}, {stored}{held}")
        _describe_arrays(split, manifest)
        if manifest.undecodable:
            print(
                f"  {count(len(manifest.undecodable), 'image')} cannot be decoded, such as "
                f"{manifest.undecodable[0]}: stored untouched, training counts them as bad samples"
            )
        absent = [name for name, number in images.items() if not number]
        if absent and len(manifests) > 1:
            shown = ", ".join(absent[:MAX_NAMED]) + (", ..." if len(absent) > MAX_NAMED else "")
            lack = (
                "they cannot be learnt; do: hold out fewer images, or add some"
                if split == "train"
                else "no accuracy counts them; do: hold out more images, if they matter"
            )
            print(
                f"  classes without images in {split}: {len(absent):,} of "
                f"{len(manifest.classes):,} ({shown}); {lack}"
            )


def _describe_arrays(split: str, manifest: Manifest) -> None:
    """Print what training sees of arrays; nothing for images. The training split has the advice."""
    if manifest.arrays is not None:
        for line in manifest.arrays.remarks(advise=split == "train"):
            print(f"  {line}")


def _contents(folder: str, manifest: Manifest, labels: str = "") -> str:
    kind = "images" if manifest.arrays is None else "arrays"
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    return (
        f"{folder}: {manifest.samples:,} {kind} {labels or f'of {len(manifest.classes)} classes'} "
        f"in {count(len(manifest.shards), 'shard')}, {megabytes:.1f} MB"
    )


def _index(arguments: argparse.Namespace) -> int:
    _require_positive(arguments, "workers")
    from ds_classifier.data.foreign.index import index

    with _opened_output(arguments.out) as (out, mirror), Progress() as progress:
        splits = index(
            arguments.train,
            out,
            val=arguments.val,
            labels=arguments.label,
            classes=arguments.classes,
            scale=arguments.scale,
            shift=arguments.shift,
            workers=arguments.workers,
            progress=progress,
            mirror=mirror,
        )
    for split, indexed in splits.items():
        folder, manifest = f"{arguments.out}/{split}", indexed.manifest
        checked = "no metadata to compare the counts with"
        if indexed.checked_by:
            checked = f"counts agree with {indexed.checked_by}"
        location = shown(manifest.location or folder)
        print(f"{_contents(folder, manifest)}, at {location}; {checked}")
        if manifest.shard_keys:
            print("  keys begin anew in each shard: messages call a sample SHARD/KEY")
        _describe_arrays(split, manifest)
        bad, reason = indexed.bad_arrays
        if bad:
            print(f"  {count(bad, 'array')} will be bad samples in training, the first {reason}")
        if split == "train":
            pairs = indexed.neighbours
            print(
                f"  {percent(pairs.same_class)} of neighbours share their class, "
                f"{percent(pairs.by_chance)} in a random order"
                + ("; do: train with --shuffle_shards lane" if pairs.sorted_by_class else "")
            )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from ds_classifier.data.foreign.verify import verify
    from ds_classifier.data.shards import MANIFEST, make_again
    from ds_classifier.data.store import url_of

    damaged = unchecked = False
    for folder in arguments.folder:
        try:
            with Progress() as progress:
                problems = verify(
                    folder,
                    check_hash=arguments.hash,
                    check_decode=arguments.decode,
                    workers=arguments.workers,
                    progress=functools.partial(progress, phase="verify"),
                )
        except (ValueError, OSError) as error:  # the other folders are still checked
            print(f"error: {files.problem(error)}", file=sys.stderr)
            unchecked = True
            continue
        for problem in problems:
            print(problem)
        summary = count(len(problems), "problem") if problems else "no problems"
        if problems:
            summary += f"; do: restore the shards, or {make_again(url_of(folder, MANIFEST))}"
        print(f"{shown(folder)}: {summary}")
        damaged |= bool(problems)
    return 2 if unchecked else int(damaged)


if __name__ == "__main__":
    sys.exit(main())
