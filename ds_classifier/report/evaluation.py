"""The report's sections on evaluations: numbers against noise, images, confused classes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ds_classifier.common.text import percent, short
from ds_classifier.evaluation.format import targets_of
from ds_classifier.evaluation.metrics import Shown, level_columns
from ds_classifier.evaluation.table import trained_levels
from ds_classifier.report import plots
from ds_classifier.report.data import RunData

OLDER_SHOWN = 8  # evaluations drawn faintly behind the newest
CLASSES_IN_MATRIX = 24  # with more classes, the pairs most often confused are listed
CLASSES_BESIDE = 12  # with more classes, the matrix takes the whole width
PAIRS_SHOWN, PAIRS_BESIDE = 20, 10
MATRIX_WIDTH = 900  # pixels of its cells together
JPEG_SIDE = 32  # pixels; larger tiles are embedded as JPEG, since noise makes large PNGs


def _no_evaluation(run: RunData) -> str:
    return (
        f"No evaluation yet. To measure the newest checkpoint at every noise level and update this "
        f"page, run: ds-classifier evaluate {run.named}"
    )


# ------------------------------------------------------------------------------ noise levels


def noise_levels(run: RunData) -> dict[str, Any] | str:
    """Return accuracy, loss, calibration and gradient against log-SNR, as charts and a table."""
    if not run.evaluations:
        return _no_evaluation(run)
    newest, older = run.evaluations[-1], _older(run.evaluations)
    ours, bayes = newest["classifier"], newest.get("bayes")
    overall = ours["uniform_t"]
    text = (
        f"{newest['name']}: {newest['data']['samples']:,} images, {newest['precision']}. Under "
        f"uniform t: {plots.overall_text(overall, targets_of(newest))}."
    )
    text += "".join(f" {sentence}" for sentence in trained_levels(newest))
    if older:
        chosen = f", {len(older)} of them" if len(older) < len(run.evaluations) - 1 else ""
        text += f" Earlier evaluations are drawn faintly{chosen}."
    if bayes:
        text += " Bayes: the exact posterior "
        if bayes["pictures"] is None:
            text += "of the distribution that the images were drawn from."
        else:
            text += (
                f"given only the {bayes['pictures']:,} training images. On held-out images at low "
                "noise it is overconfident."
            )
    return {
        "text": text,
        "charts": plots.evaluation_svgs(newest, older),
        "summary": f"{plots.weights_name(newest)}, all {len(ours['levels'])} levels in numbers",
        "table": _level_table(
            ours, bayes, level_columns(len(newest["classes"]), targets_of(newest))
        ),
    }


def _older(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most OLDER_SHOWN evaluations before the newest, evenly spaced.

    Those of other classes are left out.
    """
    before = [r for r in evaluations[:-1] if r["classes"] == evaluations[-1]["classes"]]
    if len(before) <= OLDER_SHOWN:
        return before
    places = np.linspace(0, len(before) - 1, OLDER_SHOWN).round().astype(int)
    return [before[i] for i in places]


def _level_table(
    ours: dict[str, Any], bayes: dict[str, Any] | None, columns: Sequence[Shown]
) -> dict[str, Any]:
    """Return one row per noise level, after one for uniform t."""
    heads = ["t", "log-SNR", *(column.label or column.name for column in columns)]
    heads += ["Bayes acc@1", "Bayes loss"] * bool(bayes)
    pairs = [(ours["uniform_t"], bayes and bayes["uniform_t"])]
    pairs += zip(ours["levels"], bayes["levels"] if bayes else ours["levels"], strict=True)
    rows = []
    for row, optimum in pairs:
        cells = [row.get("t", "uniform"), f"{row['log_snr']:.2f}" if "log_snr" in row else ""]
        for column in columns:
            value = row.get(column.name)
            cells.append(percent(value) if column.unit == "%" else short(value))
        if bayes:
            cells += [percent(optimum["acc@1"]), short(optimum["loss"])]
        rows.append(cells)
    return {"heads": heads, "rows": rows}


# ------------------------------------------------------------------------------ images


def image_grid(run: RunData) -> dict[str, Any] | str:
    """Return validation images at rising noise levels, each with its predicted class."""
    if run.grid is None:
        return (
            "No images yet. A validation during training makes them, and so does: "
            f"ds-classifier evaluate {run.named}"
        )
    shown, names = run.grid.predictions, run.classes or []
    rows = []
    for i, label in enumerate(shown.labels):
        tiles = [
            {
                "right": shown.right(i, j),
                "source": data_uri(run.grid.tiles[i, j]),
                "name": class_name(names, predicted),
                "confidence": percent(shown.confidence[i][j], 0),
            }
            for j, predicted in enumerate(shown.predicted[i])
        ]
        classes = [label] if shown.several is None else shown.several[i]
        name = ", ".join(class_name(names, k) for k in classes) or "no class"
        rows.append({"name": name, "tiles": tiles})
    levels = [
        {
            "t": t,
            "log_snr": f"{snr:.1f}",
            "right": f"{sum(row['tiles'][j]['right'] for row in rows)} of {len(rows)}",
        }
        for j, (t, snr) in enumerate(zip(shown.t, shown.log_snr, strict=True))
    ]
    step = f" at step {shown.step:,}" if shown.step is not None else ""
    shrunk = f" Shown at 1/{shown.shrunk} of their size." if shown.shrunk > 1 else ""
    kind, colours = "images", ""
    if shown.colours:
        kind, colours = "arrays", f" Their colours are {shown.colours}."
    text = (
        f"Held-out {kind}{step}, from nearly clean to nearly noise. Under each one is the "
        f"predicted {run.targets.noun}, and how confident the classifier is.{colours}{shrunk}"
    )
    return {"text": text, "levels": levels, "rows": rows}


def class_name(names: Sequence[str], label: int) -> str:
    """Return the name of a class, or its number if it has no name."""
    return str(names[label]) if 0 <= label < len(names) else f"class {label}"


def data_uri(tile: np.ndarray) -> str:
    """Return an image, uint8 [h, w, 3], as an address that holds its bytes."""
    form = "PNG" if tile.shape[0] <= JPEG_SIDE else "JPEG"
    file = io.BytesIO()
    Image.fromarray(tile).save(file, format=form, **({"quality": 85} if form == "JPEG" else {}))
    data = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{form.lower()};base64,{data}"


# ------------------------------------------------------------------------------ confusion


def confusion(run: RunData) -> dict[str, Any] | str:
    """Return the confusion matrix of few classes, or the pairs of many most often confused.

    Where images have several classes, none is confused: the worst recognized ones are returned.
    """
    if run.targets.kind == "classes":
        return _worst_recognized(run)
    evaluated = [record for record in run.evaluations if record.get("confusion")]
    if not evaluated:
        return _no_evaluation(run)
    record = evaluated[-1]
    counted, names = record["confusion"], record["classes"]
    noun, nouns = run.targets.noun, run.targets.nouns
    triples = list(zip(counted["label"], counted["predicted"], counted["samples"], strict=True))
    totals = [0] * len(names)
    for label, _, images in triples:
        totals[label] += images
    wrong = sum(images for label, predicted, images in triples if label != predicted)
    text = (
        f"At t = {counted['t']}, nearly clean, {wrong:,} of {sum(totals):,} images are taken for "
        f"another {noun} ({plots.weights_name(record)})."
    )
    pairs = sorted((t for t in triples if t[0] != t[1]), key=lambda t: (-t[2], t[0], t[1]))
    rows = [
        [names[label], names[predicted], f"{images:,}", percent(images / totals[label], 0)]
        for label, predicted, images in pairs[:PAIRS_SHOWN]
    ]
    heads = [noun, "predicted", "images", f"of the {noun}"]
    if len(names) <= CLASSES_IN_MATRIX:
        beside = len(names) <= CLASSES_BESIDE and bool(rows)
        return {
            "text": text,
            "layout": "beside" if beside else "",
            "matrix": _matrix(triples, totals, names) | {"noun": noun},
            "tables": [{"heads": heads, "rows": rows[:PAIRS_BESIDE]}] * beside,
        }
    worst = _worst_classes(triples, totals, names)
    text += (
        f" Of {len(names):,} {nouns}, the {len(rows)} pairs most often confused and the "
        f"{len(worst)} {nouns} least often recognized:"
    )
    tables = [
        {"heads": heads, "rows": rows},
        {"heads": [noun, "images", "right"], "rows": worst},
    ]
    return {"text": text, "layout": "two", "matrix": None, "tables": tables}


def _worst_recognized(run: RunData) -> dict[str, Any] | str:
    """Return the classes of the lowest average precision, at the lowest t, and their numbers."""
    if not run.evaluations:
        return _no_evaluation(run)
    record = run.evaluations[-1]
    level, names = record["classifier"]["per_class"][:2][-1], record["classes"]
    seen = sorted((ap, k) for k, ap in enumerate(level["ap"]) if ap is not None)[:PAIRS_SHOWN]
    rows = [
        [
            *(names[k], f"{level['samples'][k]:,}", percent(ap, 0)),
            percent(level["correct"][k] / level["answers"][k], 0),
        ]
        for ap, k in seen
    ]
    place = "Under uniform t" if level["t"] is None else f"At t = {level['t']}"
    text = (
        f"{place} ({plots.weights_name(record)}), the {len(rows)} of {len(names):,} "
        "classes with the lowest average precision, and their right yes/no answers:"
    )
    table = {"heads": ["class", "images with it", "average precision", "right"], "rows": rows}
    return {"text": text, "layout": "", "matrix": None, "tables": [table]}


def _worst_classes(
    triples: Sequence[tuple[int, int, int]], totals: list[int], names: list[str]
) -> list[list[str]]:
    """Return name, number of images and accuracy of the classes with the lowest accuracy."""
    hits = {label: images for label, predicted, images in triples if label == predicted}
    accuracies = sorted((hits.get(k, 0) / total, k) for k, total in enumerate(totals) if total)
    return [
        [names[label], f"{totals[label]:,}", percent(accuracy, 0)]
        for accuracy, label in accuracies[:PAIRS_SHOWN]
    ]


def _matrix(
    triples: Sequence[tuple[int, int, int]], totals: list[int], names: list[str]
) -> dict[str, Any]:
    """Return one row per class and one column per prediction, shaded by the share of the row."""
    counts = {(label, predicted): images for label, predicted, images in triples}
    rows = [
        {
            "name": name,
            "cells": [_cell(counts.get((i, j), 0), totals[i], i == j) for j in range(len(names))],
            "images": f"{totals[i]:,}",
            "right": percent(counts.get((i, i), 0) / totals[i] if totals[i] else None, 0),
        }
        for i, name in enumerate(names)
    ]
    return {
        "names": names,
        "rows": rows,
        "cell": min(42, MATRIX_WIDTH // len(names)),
        "long": max(map(len, names)) > 4,
    }


def _cell(images: int, total: int, right: bool) -> dict[str, str]:
    if not images:
        return {"count": "", "style": ""}
    share, color = images / total, "0, 114, 178" if right else "213, 94, 0"
    alpha = 0.85 * (share if right else math.sqrt(share))  # the root makes few errors visible
    ink = "; color: #fff" if alpha > 0.55 else ""
    return {"count": str(images), "style": f"background: rgba({color}, {alpha:.2f}){ink}"}
