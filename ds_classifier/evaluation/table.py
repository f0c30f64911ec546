"""An evaluation's record as tables on the screen, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]

CLASSES_SHOWN = 12  # of more classes, the worst
NAME_WIDTH = 40


def level_table(record: Record) -> list[str]:
    """A line a noise level, under uniform t first; the Bayes-optimal numbers beside, if there."""
    ours, bayes = record["classifier"], record.get("bayes")
    lines = [
        f"{'t':>9} {'log-SNR':>8} {'acc@1 %':>8} {'acc@5 %':>8} {'loss':>7} {'ECE %':>6} "
        f"{'|grad|':>8}"
    ]
    if bayes:
        lines[0] += f"   {'Bayes acc@1 %':>13} {'loss':>8} {'|grad|':>8}"
    pairs = [(ours["uniform_t"], bayes and bayes["uniform_t"])]
    pairs += zip(ours["levels"], bayes["levels"] if bayes else ours["levels"], strict=True)
    for row, optimum in pairs:
        snr = f"{row['log_snr']:8.2f}" if "log_snr" in row else " " * 8
        line = (
            f"{row.get('t', 'uniform'):>9} {snr} {_percent(row['acc@1'])} {_percent(row['acc@5'])} "
            f"{_number(row['loss'], 7)} {_percent(row['ece'], 6)} {_number(row['grad_norm'], 8)}"
        )
        if bayes:
            line += (
                f"   {_percent(optimum['acc@1'], 13)} {_number(optimum['loss'], 8)} "
                f"{_number(optimum['grad_norm'], 8)}"
            )
        lines.append(line)
    for row, _ in pairs:
        if row["not_finite"]:
            where = f"t = {row['t']}" if "t" in row else "uniform t"
            lines.append(f"{where}: {row['not_finite']} not finite, counted as wrong, in no mean")
    return lines


def class_table(record: Record) -> list[str]:
    """A line a class that has samples, its accuracy at the chosen levels; the worst of many."""
    chosen = record["classifier"]["per_class"]
    samples = chosen[0]["samples"]
    seen = [k for k, count in enumerate(samples) if count]
    title = "class"
    if len(seen) > CLASSES_SHOWN:
        seen = sorted(seen, key=lambda k: chosen[0]["correct@1"][k] / samples[k])[:CLASSES_SHOWN]
        title = f"class (the worst {CLASSES_SHOWN} under uniform t)"
    heads = ["uniform t" if level["t"] is None else f"t = {level['t']}" for level in chosen]
    shown = heads[:4]  # as many as fit the width
    lines = [
        f"{title:<{NAME_WIDTH}} {'samples':>8}   acc@1 %" + "".join(f"{head:>10}" for head in shown)
    ]
    for k in seen:
        accuracies = [level["correct@1"][k] / samples[k] for level in chosen[: len(shown)]]
        name = record["classes"][k]
        name = name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 3] + "..."
        cells = "".join(f"{100 * value:10.1f}" for value in accuracies)
        lines.append(f"{name:<{NAME_WIDTH}} {samples[k]:>8}          {cells}")
    return lines


def series_table(records: Sequence[Record]) -> list[str]:
    """A line a checkpoint: under uniform t, and accuracy at t = 0 and at log-SNR 0."""
    width = max(10, *(len(record["name"]) for record in records))
    lines = [
        f"{'weights':<{width}} {'acc@1 %':>8} {'acc@5 %':>8} {'loss':>7} {'ECE %':>6} {'|grad|':>8}"
    ]
    chosen = [level["t"] for level in records[0]["classifier"]["per_class"][1:]][:3]
    lines[0] += "".join(f"   {f'acc@1 t={t}':>11}" for t in chosen)
    for record in records:
        row = record["classifier"]["uniform_t"]
        at = {level["t"]: level["acc@1"] for level in record["classifier"]["levels"]}
        lines.append(
            f"{record['name']:<{width}} {_percent(row['acc@1'])} {_percent(row['acc@5'])} "
            f"{_number(row['loss'], 7)} {_percent(row['ece'], 6)} {_number(row['grad_norm'], 8)}"
            + "".join(f"   {_percent(at.get(t), 11)}" for t in chosen)
        )
    return lines


def _percent(value: float | None, width: int = 8) -> str:
    return "-".rjust(width) if value is None else f"{100 * value:{width}.1f}"


def _number(value: float | None, width: int) -> str:
    """Three decimals while they fit, else three digits and an exponent."""
    if value is None:
        return "-".rjust(width)
    plain = f"{value:.3f}"
    if len(plain) < width and (value == 0 or abs(value) >= 0.01):
        return plain.rjust(width)
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+").rjust(width)
