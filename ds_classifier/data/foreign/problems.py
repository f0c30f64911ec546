"""Problems of shards: grouped by kind, and listed with what explains most samples first."""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_classifier.common.text import count

# Kinds of problems, in addition to those of a sample in data/scan.py.
SHARD, COUNT, METADATA = "shard", "count", "metadata"
NO_CLASS, NO_SAMPLE, GAP, COPY = "no class", "no sample", "gap", "copy"
MAX_SHARDS = 20  # examples of SHARD, COUNT and METADATA, which name different files
MAX_EXAMPLES = 5  # examples of other kinds


@dataclass
class Kind:
    """All problems of one kind.

    first: location and name of the shard that has the first one.
    number: the number of problems. samples: the number of samples that they explain, if known.
    examples: what is wrong -> the first message that says so.
    """

    first: tuple[str, str]
    number: int = 0
    samples: int = 0
    examples: dict[str, str] = field(default_factory=dict)


class Problems:
    """The problems of shards by kind. False if there are none."""

    def __init__(self) -> None:
        self.kinds: dict[str, Kind] = {}

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def add(
        self, kind: str, first: tuple[str, str], message: str, *, words: str = "", samples: int = 1
    ) -> None:
        """Add a problem. The other arguments are those of Kind.

        words: what is wrong, without the name of the sample, as messages that say the same are
        listed once; empty for the whole message.
        """
        self._add(kind, Kind(first, 1, samples, {words or message: message}))

    def update(self, other: Problems) -> None:
        """Add all problems of another shard."""
        for kind, found in other.kinds.items():
            self._add(kind, found)

    def _add(self, kind: str, found: Kind) -> None:
        total = self.kinds.setdefault(kind, Kind(found.first))
        total.number += found.number
        total.samples += found.samples
        limit = MAX_SHARDS if kind in (SHARD, COUNT, METADATA) else MAX_EXAMPLES
        for words, message in found.examples.items():
            if len(total.examples) < limit:
                total.examples.setdefault(words, message)

    def message(self, advice: dict[str, str]) -> str:
        """Return the error message: the kinds that explain most samples first, each with advice.

        advice: kind -> what to do; the messages of other kinds have their own.
        """
        lines = ["these shards cannot be used as they are, nothing was written:"]
        for name, kind in sorted(self.kinds.items(), key=lambda item: -item[1].samples):
            lines += kind.examples.values()
            if more := kind.number - len(kind.examples):
                lines.append(f"... and {count(more, 'more problem')} like this")
            if name in advice:
                lines.append(f"do: {advice[name]}")
        return "\n  ".join(lines)
