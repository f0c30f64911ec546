"""Describe what the labels of a data set are: one class, several classes, soft, or values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

KINDS = ("class", "classes", "soft", "values")


@dataclass(frozen=True)
class Targets:
    """The kind of the labels.

    kind: one of KINDS.
    values, edges, name: of the kind "values": the mean value of each bin, ascending, [K]; the K - 1
        inner edges of the bins; the name of the column.
    """

    kind: str = "class"
    values: tuple[float, ...] | None = None
    edges: tuple[float, ...] | None = None
    name: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it for a JSON file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Targets:
        """Return it from a JSON file."""
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**lists)
