"""The record of an evaluation as tables for the screen, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds_classifier.common import text
from ds_classifier.evaluation.format import targets_of
from ds_classifier.evaluation.metrics import Shown, headline_of, level_columns

Record = dict[str, Any]

CLASSES_SHOWN = 12  # with more classes, the worst ones
NAME_WIDTH = 40
LEVELS_SHOWN = 4  # columns of class_table, as many as fit
BAYES_COLUMNS = ("acc@1", "loss", "mae", "grad_norm")


def level_table(record: Record) -> list[str]:
    """Return a line per noise level, the first under uniform t, with the exact posterior's numbers.

    Lines at the end name the levels that were trained, if not all were, and those with samples
    whose numbers were not finite.
    """
    ours, bayes = record["classifier"], record.get("bayes")
    columns = level_columns(len(record["classes"]), targets_of(record))
    heads = ["t", "log-SNR", *(column.head for column in columns)]
    rows = [
        [
            str(row.get("t", "uniform")),
            f"{row['log_snr']:.2f}" if "log_snr" in row else "",
            *_cells(row, columns),
        ]
        for row in _rows(ours)
    ]
    if bayes:
        of_bayes = [column for column in columns if column.name in BAYES_COLUMNS]
        first, *others = (column.head for column in of_bayes)
        heads += [f"Bayes {first}", *others]
        rows = [
            cells + _cells(row, of_bayes) for cells, row in zip(rows, _rows(bayes), strict=True)
        ]
    lines = [*text.table(heads, rows, left=0), *trained_levels(record)]
    for row in _rows(ours):
        if row["not_finite"]:
            where = f"t = {row['t']}" if "t" in row else "uniform t"
            lines.append(f"{where}: {row['not_finite']} not finite, counted as wrong, in no mean")
    return lines


def trained_levels(record: Record) -> list[str]:
    """Return a sentence on the levels that were trained; none if all were."""
    if "trained" not in record:
        return []
    trained = record["trained"]
    return [
        f"Trained at t = {trained['first']} to {trained['last']} alone (--t_range "
        f"{trained['t_range']})."
    ]


def class_table(record: Record) -> list[str]:
    """Return a line per class that has samples: its accuracy at the chosen levels.

    Where images have several classes, it is the average precision, and beside it the accuracy of
    the yes/no answers under uniform t. With more than CLASSES_SHOWN classes, only those with the
    lowest value under uniform t.
    """
    chosen = record["classifier"]["per_class"][:LEVELS_SHOWN]
    several = "ap" in chosen[0]
    samples = chosen[0]["samples"]
    seen = [k for k, count in enumerate(samples) if count]

    def value(level: dict[str, Any], k: int) -> float:
        return (level["ap"][k] or 0.0) if several else level["correct@1"][k] / samples[k]

    title = targets_of(record).noun
    if len(seen) > CLASSES_SHOWN:
        seen = sorted(seen, key=lambda k: value(chosen[0], k))[:CLASSES_SHOWN]
        title += f" (the worst {CLASSES_SHOWN} under uniform t)"
    levels = ["uniform t" if level["t"] is None else f"t = {level['t']}" for level in chosen]
    heads = [title, "samples", "AP %:" if several else "acc@1 %:", *levels, *["acc %"] * several]
    rows = []
    for k in seen:
        cells = [f"{100 * value(level, k):.1f}" for level in chosen]
        if several:
            cells.append(f"{100 * chosen[0]['correct'][k] / chosen[0]['answers'][k]:.1f}")
        name = record["classes"][k]
        name = name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 3] + "..."
        rows.append([name, str(samples[k]), "", *cells])
    return text.table(heads, rows)


def series_table(records: Sequence[Record]) -> list[str]:
    """Return a line per checkpoint: under uniform t, and its accuracy at the chosen levels."""
    chosen = [level["t"] for level in records[0]["classifier"]["per_class"][1:]][:3]
    targets = targets_of(records[0])
    columns, best = level_columns(len(records[0]["classes"]), targets), headline_of(targets)
    heads = ["weights", *(column.head for column in columns)]
    heads += [f"{best.name} t={t}" for t in chosen]
    rows = []
    for record in records:
        at = {level["t"]: level[best.name] for level in record["classifier"]["levels"]}
        cells = _cells(record["classifier"]["uniform_t"], columns)
        cells += [best.text(at.get(t)) for t in chosen]
        rows.append([record["name"], *cells])
    return text.table(heads, rows)


def _rows(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    return [numbers["uniform_t"], *numbers["levels"]]


def _cells(row: dict[str, Any], columns: Sequence[Shown]) -> list[str]:
    return [_cell(column, row.get(column.name)) for column in columns]


def _cell(column: Shown, value: float | None) -> str:
    """Return a number as its column shows it; very small and large ones with an exponent."""
    own = column.unit == "%" or column.digits is None
    if value is None or own or value == 0 or 0.01 <= abs(value) < 1000:
        return column.text(value)
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")
