"""Write splits to object storage: a directory here stands for OUT there.

    OUT/SPLIT.partial/plan.json        what is being written
    OUT/SPLIT.partial/NAME.json, NAME.index.npy   the facts of a shard that is complete; with
                                       NAME.targets.npy and NAME.weights.npy if it has them
    OUT/SPLIT/NAME.tar                 its shard
    OUT/SPLIT/targets.npy, weights.npy (where there are some), index.npy, manifest.json
                                       written last, in this order; then SPLIT.partial is removed

Nothing can be renamed in object storage, so shards are uploaded under their final names as soon as
they are complete. A split without a manifest is not finished, and no program here reads it. In the
directory, an uploaded shard is a file of the same size without content, which takes no space.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ds_classifier.common import files
from ds_classifier.data.remote.fetch import PATIENCE, insist
from ds_classifier.data.remote.objects import Request, refuse_unusable
from ds_classifier.data.shards import BESIDE, INDEX, MANIFEST

SPLITS = ("train", "val")
UPLOAD_S = 600.0  # seconds that a request which sends or lists much may take
FAILED = {
    "names": "could not be listed", "download": "could not be read", "put": "was not written",
    "delete": "could not be cleared",
}  # fmt: skip
PLAN = "plan.json"
WRITTEN_LAST = (*BESIDE, INDEX, MANIFEST)


class Mirror:
    """A directory that stands for OUT in object storage.

    url: OUT. folder: the directory; an empty one is filled with what OUT holds.
    Raises ValueError for a URL that cannot be used; OSError if the storage does not answer.
    """

    def __init__(self, url: str, folder: Path):
        refuse_unusable(url)
        self.url, self.folder = url.rstrip("/"), folder
        for split in SPLITS:
            self._copy_state(split)

    def _copy_state(self, split: str) -> None:
        """Copy manifest and index of a finished split, or the facts of an unfinished one."""
        whole, partial = f"{self.url}/{split}", f"{self.url}/{split}.partial"
        objects, facts = (names_in(place) for place in (whole, partial))
        if MANIFEST in objects or (objects and PLAN not in facts):
            here = self.folder / split
            here.mkdir()
            _ask("download", whole, names=[n for n in WRITTEN_LAST if n in objects],
                      path=str(here))  # fmt: skip
            if MANIFEST in objects and facts:  # left by a run that was killed at its very end
                _ask("delete", partial, names=list(facts))
            for name in objects.keys() - set(WRITTEN_LAST):
                if "/" not in name:
                    _hollow(here / name, objects[name])
        elif facts:
            here = self.folder / f"{split}.partial"
            here.mkdir()
            _ask("download", partial, names=list(facts), path=str(here))
            for path in set(here.glob("*.json")) - {here / PLAN}:
                shard = json.loads(path.read_text(encoding="utf-8"))
                if objects.get(shard["name"]) == shard["bytes"]:
                    _hollow(here / shard["name"], shard["bytes"])

    def begin(self, partial: Path) -> None:
        """Upload the plan of a split whose shards will be written."""
        self._upload(partial / PLAN, f"{partial.name}/{PLAN}")

    def add_shard(self, path: Path) -> None:
        """Upload a shard that is complete, then its facts, and free its space here."""
        split, partial = path.parent.stem, path.parent.name
        self._upload(path, f"{split}/{path.name}")
        for suffix in (*(f".{name}" for name in (INDEX, *BESIDE)), ".json"):
            if path.with_suffix(suffix).exists():
                self._upload(path.with_suffix(suffix), f"{partial}/{path.stem}{suffix}")
        _hollow(path, path.stat().st_size)

    def finish(self, folder: Path) -> None:
        """Upload index and manifest from the directory of a split, and remove its facts there."""
        for name in WRITTEN_LAST:
            if (folder / name).exists():
                self._upload(folder / name, f"{folder.stem}/{name}")
        partial = f"{self.url}/{folder.stem}.partial"
        facts = names_in(partial)
        _ask("delete", partial, names=list(facts))

    def _upload(self, path: Path, name: str) -> None:
        _ask("put", f"{self.url}/{name}", path=str(path))


def names_in(url: str) -> dict[str, int]:
    """Return name -> bytes of all objects below a URL of object storage; names may hold slashes."""
    return _ask("names", url)


def _ask(do: str, url: str, **arguments) -> dict:
    """Do one action in the storage, again after a failure; return the head of its answer."""

    def attempt() -> dict:
        with Request(do, url, limit_s=UPLOAD_S, **arguments) as request:
            return request.head

    return insist(url, attempt, PATIENCE, failed=FAILED[do])


def _hollow(path: Path, size: int) -> None:
    """Make a file of `size` bytes that takes no space."""
    with open(path, "wb") as file:
        file.truncate(size)


@contextmanager
def mirrored(url: str) -> Iterator[Mirror]:
    """Yield the mirror of OUT at a URL in a temporary directory; its errors name the URL."""
    with tempfile.TemporaryDirectory(prefix="ds_classifier-") as scratch:
        try:
            yield Mirror(url, Path(scratch))
        except (ValueError, OSError) as error:
            for path in Path(scratch).glob("*.txt"):  # lists of bad files, which the error names
                _ask("put", f"{url.rstrip('/')}/{path.name}", path=str(path))
            raise ValueError(files.problem(error).replace(scratch, url.rstrip("/"))) from None
