"""The kinds of targets: one class, several classes, probabilities of classes, bins of a value.

What a batch holds of each, for n images and K classes:

    kind      labels of a batch        trained on
    class     [n] int64                the class of an image
    classes   [n, K] fp32, 0 or 1      all classes of an image, of which there may be none
    soft      [n, K] fp32, sum 1       probabilities of the classes, such as a teacher's
    values    [n] int64                the bin of a number; the bins, in order, are the classes
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("class", "classes", "soft", "values")
# What `convert --targets` accepts: logits are stored as the probabilities they stand for.
ASKED = ("class", "classes", "soft", "logits", "values")
# Kind -> what a target is, for messages.
MEANINGS = {
    "class": "one class per image",
    "classes": "several classes per image",
    "soft": "probabilities of the classes",
    "values": "bins of a value",
}


@dataclass(frozen=True)
class Targets:
    """The kind of a data set's targets; see the table above.

    values: of kind "values", the mean value of each bin, ascending, [K]; None for other kinds.
    edges: of kind "values", the K - 1 inner edges of the bins, ascending; a value that equals an
        edge belongs to the bin above it. None for other kinds.
    name: of kind "values", the column of the values; "" for other kinds.
    Raises ValueError for another kind, and for values and edges that are no bins.
    """

    kind: str = "class"
    values: tuple[float, ...] | None = None
    edges: tuple[float, ...] | None = None
    name: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"got targets of the kind {self.kind!r}; need one of {KINDS}")
        if self.kind == "values":
            sizes = (len(self.values or ()), len(self.edges or ()))
            numbers = [*(self.values or ()), *(self.edges or ())]
            if sizes[0] != sizes[1] + 1 or not all(map(math.isfinite, numbers)):
                raise ValueError(f"got {sizes[0]} bins with {sizes[1]} edges; need one edge less")

    @property
    def vectors(self) -> bool:
        """The label of an image is a vector with a number for each class, [K]."""
        return self.kind in ("classes", "soft")

    @property
    def noun(self) -> str:
        """The word for one of the classes: "bin" of a value, or "class"."""
        return "bin" if self.kind == "values" else "class"

    @property
    def nouns(self) -> str:
        """The plural of `noun`."""
        return "bins" if self.kind == "values" else "classes"

    @property
    def moving_eta(self) -> float:
        """An eta that moves the mean of the guided values by about one spread of the bins."""
        return 1 / statistics.pstdev(self.values)

    def __str__(self) -> str:
        of = f" of {self.name}" if self.kind == "values" else ""
        return MEANINGS[self.kind] + of

    def to_json(self) -> dict[str, Any]:
        """Return the fields that the kind has, as JSON holds them."""
        fields: dict[str, Any] = {"kind": self.kind}
        if self.kind == "values":
            fields |= {"values": list(self.values), "edges": list(self.edges), "name": self.name}
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any] | None) -> Targets:
        """Read what to_json returned; None stands for one class per image.

        Raises ValueError, TypeError or KeyError for anything else.
        """
        if fields is None:
            return cls()
        lists = {
            key: tuple(map(float, fields[key])) for key in ("values", "edges") if key in fields
        }
        return cls(str(fields["kind"]), name=str(fields.get("name", "")), **lists)


ONE_CLASS = Targets()
