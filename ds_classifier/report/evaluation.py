"""The report's parts on evaluations: numbers against noise, images, confusion."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from ds_classifier.common.text import short
from ds_classifier.report import plots
from ds_classifier.report.data import RunData

Record = dict[str, Any]

OLDER_SHOWN = 8  # evaluations behind the newest
CLASSES_IN_MATRIX = 24  # with more, the pairs most often confused are listed
CLASSES_BESIDE = 12  # with more, the matrix takes the whole width
PAIRS_SHOWN = 20
MATRIX_WIDTH = 900  # pixels of its cells together
JPEG_SIDE = 64  # pixels; larger tiles are embedded as JPEG, since noise makes large PNGs


def _no_evaluation(run: RunData) -> str:
    return (
        '<div class="empty">No evaluation yet. <code>python launch/evaluate.py '
        f"{escape(str(run.path))}</code> measures the newest checkpoint at every noise level and "
        "makes this page anew.</div>"
    )


# ------------------------------------------------------------------------------ against noise


def noise_levels(run: RunData) -> str:
    """Accuracy, loss, calibration and gradient against log-SNR; a table of the same."""
    if not run.evaluations:
        return _no_evaluation(run)
    newest, older = run.evaluations[-1], _older(run.evaluations)
    ours, bayes = newest["classifier"], newest.get("bayes")
    charts = [
        f'<figure class="chart">{svg}</figure>' for svg in plots.evaluation_svgs(newest, older)
    ]
    overall = ours["uniform_t"]
    words = (
        f"{newest['name']}: {newest['data']['samples']:,} images, {newest['precision']}. Under "
        f"uniform t: top 1 {_share(overall['acc@1'])}, cross-entropy {_plain(overall['loss'])}, "
        f"calibration error {_share(overall['ece'])}."
    )
    if older:
        shown = f"{len(older)} of them" if len(older) < len(run.evaluations) - 1 else "fainter"
        words += f" Earlier evaluations stand behind, {shown}."
    if bayes:
        words += (
            f" Bayes: the exact posterior of the {bayes['pictures']:,} training images; of "
            "held-out ones it is far too sure at little noise."
        )
    return f'<p>{escape(words)}</p><div class="charts">{"".join(charts)}</div>{_table(newest)}'


def _older(evaluations: Sequence[Record]) -> list[Record]:
    """Of those before the newest, at most OLDER_SHOWN, evenly spaced, with the same classes."""
    before = [r for r in evaluations[:-1] if r["classes"] == evaluations[-1]["classes"]]
    if len(before) <= OLDER_SHOWN:
        return before
    places = np.linspace(0, len(before) - 1, OLDER_SHOWN).round().astype(int)
    return [before[i] for i in places]


def _table(record: Record) -> str:
    ours, bayes = record["classifier"], record.get("bayes")
    heads = ["t", "log-SNR", *(column.label or column.name for column in LEVEL_COLUMNS)]
    heads += ["Bayes acc@1", "Bayes loss"] * bool(bayes)
    pairs = [(ours["uniform_t"], bayes and bayes["uniform_t"])]
    pairs += zip(ours["levels"], bayes["levels"] if bayes else ours["levels"], strict=True)
    rows = []
    for row, optimum in pairs:
        cells = [
            str(row.get("t", "uniform")),
            f"{row['log_snr']:.2f}" if "log_snr" in row else "",
            *(
                (_share if column.unit == "%" else _plain)(row.get(column.name))
                for column in LEVEL_COLUMNS
            ),
        ]
        if bayes:
            cells += [_share(optimum["acc@1"]), _plain(optimum["loss"])]
        rows.append(cells)
    title = f"{plots.weights_name(record)}, all {len(ours['levels'])} levels in numbers"
    return f"<details><summary>{escape(title)}</summary>{table(heads, rows)}</details>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """An HTML table of plain words, escaped here."""
    head = "".join(f"<th>{escape(word)}</th>" for word in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 1000 else short(value)


# ------------------------------------------------------------------------------ images


def image_grid(run: RunData) -> str:
    """Validation images at rising noise, each with what it is taken for."""
    grid = run.grid
    if grid is None:
        return (
            '<div class="empty">No images yet: a validation in training, or '
            f"<code>python launch/evaluate.py {escape(str(run.path))}</code>, takes them.</div>"
        )
    told, names = grid.predictions, run.classes or []
    columns = len(told.t)
    cells = ['<div class="corner">t<br>log-SNR</div>']
    cells += [
        f'<div class="level">{t}<br>{snr:.1f}</div>'
        for t, snr in zip(told.t, told.log_snr, strict=True)
    ]
    right = [0] * columns
    for i, label in enumerate(told.labels):
        name = class_name(names, label)
        cells.append(f'<div class="truth" title="{name}">{name}</div>')
        for j in range(columns):
            predicted, sure = told.predicted[i][j], told.confidence[i][j]
            hit = predicted == label
            right[j] += hit
            words = class_name(names, predicted)
            share = "-" if sure is None else f"{100 * sure:.0f}&#8239;%"
            cells.append(
                f'<figure class="{"hit" if hit else "miss"}">'
                f'<img src="{_data_uri(grid.tiles[i, j])}" alt="">'
                f'<figcaption title="{words}"><i>{"✓" if hit else "✗"}</i><em>{words}</em>'
                f"<b>{share}</b></figcaption></figure>"
            )
    cells.append('<div class="truth">right</div>')
    cells += [f'<div class="sum">{count} of {len(told.labels)}</div>' for count in right]
    step = f" at step {told.step:,}" if told.step is not None else ""
    shrunk = f" Shown at 1/{told.shrunk} of their size." if told.shrunk > 1 else ""
    words = (
        f"Held-out images{step}, from nearly clean to nearly noise; under each what the "
        f"classifier takes it for, and how sure it is.{shrunk}"
    )
    style = f"grid-template-columns: 92px repeat({columns}, minmax(0, 1fr))"
    return f'<p>{escape(words)}</p><div class="images" style="{style}">{"".join(cells)}</div>'


def class_name(names: Sequence[str], label: int) -> str:
    """Escaped; the number where it has no name."""
    return escape(str(names[label])) if 0 <= label < len(names) else f"class {label}"


def _data_uri(tile: np.ndarray) -> str:
    """uint8 [h, w, 3] as an address that holds the image itself."""
    form = "PNG" if tile.shape[0] <= JPEG_SIDE else "JPEG"
    kept = io.BytesIO()
    Image.fromarray(tile).save(kept, format=form, **({"quality": 85} if form == "JPEG" else {}))
    data = base64.b64encode(kept.getvalue()).decode()
    return f"data:image/{form.lower()};base64,{data}"


# ------------------------------------------------------------------------------ confusion


def confusion(run: RunData) -> str:
    """Few classes: the matrix. Many: the pairs most often confused."""
    found = [record for record in run.evaluations if record.get("confusion")]
    if not found:
        return _no_evaluation(run)
    record = found[-1]
    told, names = record["confusion"], record["classes"]
    triples = list(zip(told["label"], told["predicted"], told["samples"], strict=True))
    totals = [0] * len(names)
    for label, _, count in triples:
        totals[label] += count
    wrong = sum(count for label, predicted, count in triples if label != predicted)
    words = (
        f"{plots.weights_name(record)} at t = {told['t']}, nearly clean: {wrong:,} of "
        f"{sum(totals):,} images taken for another class."
    )
    pairs = sorted((t for t in triples if t[0] != t[1]), key=lambda t: (-t[2], t[0], t[1]))
    rows = [
        [names[label], names[predicted], f"{count:,}", f"{100 * count / totals[label]:.0f} %"]
        for label, predicted, count in pairs[:PAIRS_SHOWN]
    ]
    often = ["class", "taken for", "images", "of the class"]
    if len(names) <= CLASSES_IN_MATRIX:
        matrix = _matrix(triples, totals, names)
        if len(names) <= CLASSES_BESIDE and rows:
            matrix = f'<div class="beside">{matrix}{table(often, rows[:10], "words")}</div>'
        return f"<p>{escape(words)}</p>{matrix}"
    hits = {label: count for label, predicted, count in triples if label == predicted}
    seen = sorted(
        (hits.get(label, 0) / total, label) for label, total in enumerate(totals) if total
    )
    worst = [
        [names[label], f"{totals[label]:,}", f"{100 * share:.0f} %"]
        for share, label in seen[:PAIRS_SHOWN]
    ]
    words += f" Of {len(names):,} classes, the {len(rows)} pairs most often confused"
    words += f" and the {len(worst)} classes least often known:"
    return (
        f'<p>{escape(words)}</p><div class="two">'
        + table(often, rows, "words")
        + table(["class", "images", "right"], worst, "words")
        + "</div>"
    )


def _matrix(triples: Sequence[tuple[int, int, int]], totals: list[int], names: list[str]) -> str:
    """A row a class, a column a prediction; shaded by the share of the row."""
    counts = {(label, predicted): count for label, predicted, count in triples}
    rows = []
    for i, name in enumerate(names):
        cells = [_cell(counts.get((i, j), 0), totals[i], right=i == j) for j in range(len(names))]
        hit = f"{100 * counts.get((i, i), 0) / totals[i]:.0f} %" if totals[i] else "-"
        rest = f'<td class="rest">{totals[i]:,}</td><td class="rest">{hit}</td>'
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}{rest}</tr>")
    heads = "".join(f"<th><span>{escape(name)}</span></th>" for name in names)
    heads += "".join(f'<th class="rest"><span>{word}</span></th>' for word in ("images", "right"))
    long = " long" if max(map(len, names)) > 4 else ""
    return (
        f'<table class="matrix{long}" style="--cell: {min(42, MATRIX_WIDTH // len(names))}px">'
        f"<thead><tr><th>class ↓ taken for →</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(count: int, total: int, *, right: bool) -> str:
    if not count:
        return "<td></td>"
    share, color = count / total, "0, 114, 178" if right else "213, 94, 0"
    # Few wrong ones of many must be seen: shaded by the root of their share.
    alpha = 0.85 * (share if right else math.sqrt(share))
    ink = "; color: #fff" if alpha > 0.55 else ""
    return f'<td style="background: rgba({color}, {alpha:.2f}){ink}">{count}</td>'
