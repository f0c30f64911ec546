"""Labels as sources hold them -> several classes, probabilities or a number per image."""

from __future__ import annotations

import ast
import fnmatch
import itertools
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

SUM_TOLERANCE = 1e-3  # of the sum of probabilities, which are then scaled to the sum 1
LARGEST = 1e30  # value or weight, so that fp32 holds it and its reciprocal
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WHOLE = re.compile("[0-9]{1,18}")
HOT = {"0": 0, "1": 1, "-1": -1, "0.0": 0, "1.0": 1, "-1.0": -1, "false": 0, "true": 1}

# What one image is labelled with, by the kind that was asked for: a class name or number; several
# of them; a vector with a number for each class; a number.
Label = str | int | tuple[str | int, ...] | np.ndarray | float
Where = Callable[[int], str]  # the place of a row, for messages


def named_columns(
    given: str, names: Sequence[str], place: str, *, others: Sequence[str | None] = ()
) -> list[str]:
    """Return the columns that --columns label=a,b,c names; a pattern such as p_* stands for many.

    others: columns of something else, which a pattern does not mean.
    Raises ValueError for a name that fits no column.
    """
    found: dict[str, None] = {}
    for name in given.split(","):
        fitting = [n for n in fnmatch.filter(names, name) if n not in others]
        fitting = [name] if name in names else fitting
        if not fitting:
            raise ValueError(f"--columns: got label={name}; {place} has the columns {list(names)}")
        found |= dict.fromkeys(fitting)
    return list(found)


def several_for_one(names: Sequence[str]) -> ValueError:
    """Return the error for several columns of labels where images have one."""
    return ValueError(
        f"--columns: got {len(names)} columns for label; need one; do: name one, or --targets "
        "classes, soft or logits, which have one for each class"
    )


def read_labels(asked: str, rows: Sequence[object], where: Where, *, columns: bool) -> list[Label]:
    """Return the labels of rows, for every kind of `targets.ASKED` but "class".

    rows: a label for each image, as its source has it: a list, an array, or a text of several.
    columns: the items of each row come from several columns, or from the columns of an array.
    Raises ValueError that names the first row with another kind of label.
    """
    if asked == "values":
        return [_number(row, where(i)) for i, row in enumerate(rows)]
    if asked == "classes":
        return _hot_rows(rows, where) if columns else _class_sets(rows, where)
    return _probabilities(rows, where, logits=asked == "logits")


def read_weights(rows: Sequence[object], where: Where) -> list[float]:
    """Return the weights of samples. Raises ValueError for one below 0, or if all are 0."""
    weights = [_number(row, where(i), "weight") for i, row in enumerate(rows)]
    for i, weight in enumerate(weights):
        if weight < 0:
            raise ValueError(f"{where(i)}: got weight {weight:g}; need 0 or more; do: correct it")
        if 0 < weight < 1 / LARGEST:
            raise ValueError(
                f"{where(i)}: got weight {weight:g}; need 0, or {1 / LARGEST:g} or more; do: "
                "multiply all weights by one number, which changes nothing else"
            )
    if weights and not any(weights):
        raise ValueError(f"{where(0)}: got weight 0 in all rows; need one above 0; do: drop them")
    return weights


def _number(value: object, where: str, what: str = "value") -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{where}: got {what} {_short(value)}; need a finite number; do: correct it, or remove "
            "the image"
        )
    if abs(number) > LARGEST:
        raise ValueError(
            f"{where}: got {what} {_short(value)}; need {LARGEST:g} at most; do: give it in "
            "another unit"
        )
    return number


# -------------------------------------------------------------------------------- several classes


def _class_sets(rows: Sequence[object], where: Where) -> list[Label]:
    """Return the classes of each row: those a list or a text names, or those with a 1."""
    texts = [row for row in rows if isinstance(row, str)]
    separator = next((s for s in "|;," if any(s in text for text in texts)), None)
    sets = [_class_set(row, separator, where(i)) for i, row in enumerate(rows)]
    whole = all(
        isinstance(item, int) or (isinstance(item, str) and _WHOLE.fullmatch(item))
        for items in sets
        for item in items
    )
    if whole and any(isinstance(item, str) for items in sets for item in items):
        sets = [tuple(map(int, items)) for items in sets]
    lengths = {len(items) for items in sets}
    # As lists of class numbers, each would say that its image is of both classes.
    if len(lengths) == 1 and max(lengths) > 1 and {*itertools.chain(*sets)} <= {0, 1, -1}:
        return _hot_rows(sets, where)
    return sets


def _class_set(row: object, separator: str | None, where: str) -> tuple[str | int, ...]:
    """Return the classes in a list, or in a text. separator: of texts; None: blanks."""
    if isinstance(row, str) and row.strip().startswith("["):
        try:
            row = ast.literal_eval(row.strip())
        except (ValueError, SyntaxError):
            raise ValueError(f"{where}: got {_short(row)}; need a list of classes") from None
    if row is None:
        row = ()
    if isinstance(row, str):
        row = [part.strip() for part in row.split(separator) if part.strip()]
    if isinstance(row, int) and not isinstance(row, bool):
        row = [row]
    items = list(row) if isinstance(row, list | tuple | np.ndarray) else [None]
    for item in items:
        if not isinstance(item, str | int) or isinstance(item, bool) or not str(item).strip():
            raise ValueError(
                f"{where}: got {_short(row)}; need a list of class names or numbers, or a text "
                "with | between them; do: correct it"
                + (", or --targets soft" if isinstance(item, float) else "")
            )
    return tuple(items)


def _hot_rows(rows: Sequence[object], where: Where) -> list[Label]:
    """Return vectors of 0 and 1 [K] uint8. Rows may have -1 in place of 0, as CelebA's have."""
    vectors, seen = [], {}
    for i, row in enumerate(rows):
        found = [HOT.get(str(item).strip().lower()) for item in row]  # type: ignore[attr-defined]
        if None in found:
            wrong = list(row)[found.index(None)]  # type: ignore[call-overload]
            raise ValueError(
                f"{where(i)}: got {_short(wrong)}; need 0 or 1 for each class; do: correct it, or "
                "--targets soft, if these are probabilities"
            )
        for value in found:
            seen.setdefault(value, i)
        vectors.append(np.array(found, np.int8))
    if {0, -1} <= seen.keys():
        i = max(seen[0], seen[-1])
        raise ValueError(
            f"{where(i)}: got 0 and -1; need 0 and 1, or -1 and 1, for each class; do: decide for "
            "one of them"
        )
    return [(vector > 0).astype(np.uint8) for vector in vectors]


# ---------------------------------------------------------------------------------- probabilities


def _probabilities(rows: Sequence[object], where: Where, *, logits: bool) -> list[Label]:
    """Return vectors that sum to 1, [K] fp32."""
    vectors = []
    for i, row in enumerate(rows):
        vector = _numbers(row, where(i))
        if len(vector) < 2:
            raise ValueError(
                f"{where(i)}: got {_short(row)}; need a number for each of several classes; do: "
                "name their columns, as in --columns label=a,b,c, or --targets values"
            )
        if vectors and len(vector) != len(vectors[0]):
            raise ValueError(
                f"{where(i)}: got {len(vector)} numbers; need {len(vectors[0])}, as in the first "
                "row; do: give one for each class"
            )
        if not logits:
            total = vector.sum()
            if (vector < 0).any() or not abs(total - 1) <= SUM_TOLERANCE:
                raise ValueError(
                    f"{where(i)}: got {_short(row)}, of which the least is {vector.min():.4g} and "
                    f"the sum {total:.6g}; need probabilities, 0 or more with the sum 1; do: "
                    "correct them, or --targets logits, if they are logits"
                )
        else:
            with np.errstate(over="ignore"):  # of a difference, whose exponential is 0
                vector = np.exp(vector - vector.max())
        vectors.append((vector / vector.sum()).astype(np.float32))
    return vectors


def _numbers(row: object, where: str) -> np.ndarray:
    """Return the numbers in a list, or in a text, [K] fp64."""
    if isinstance(row, str):
        row = [part for part in re.split(r"[\s|;,]+", row.strip("[] \t")) if part]
    try:
        vector = np.asarray(row, np.float64)
    except (TypeError, ValueError):
        vector = np.array(math.nan)
    if vector.ndim != 1 or not len(vector) or not np.isfinite(vector).all():
        raise ValueError(
            f"{where}: got {_short(row)}; need a list of finite numbers, one for each class; do: "
            "correct it, or remove the image"
        )
    return vector


# ------------------------------------------------------------------------------------ one class


def refuse_other_kind(where: str, label: object) -> None:
    """Raise ValueError for a label that stands for several classes; it says how to convert it."""
    if isinstance(label, float):
        raise ValueError(
            f"{where}: got label {label}; need one class per image; do: --targets values, to learn "
            "bins of the number, or give the classes names"
        )
    if isinstance(label, list | dict) or (
        isinstance(label, str) and re.fullmatch(r"\[.*\]", label.strip())
    ):
        raise ValueError(
            f"{where}: got label {_short(label)}; need one class per image; do: --targets classes, "
            "for several, or --targets soft or logits, if it has a number for each class"
        )


def refuse_numbers(place: str, column: str, labels: Sequence[object]) -> None:
    """Raise ValueError if all labels are numbers, and not all are whole ones."""
    texts = [str(label).strip() for label in labels]
    if not all(map(_NUMBER.fullmatch, texts)):
        return
    broken = next((text for text in texts if not float(text).is_integer()), None)
    if broken is not None:
        raise ValueError(
            f"{place}: got numbers such as {broken} in the column {column}; need one class per "
            "image; do: --targets values, to learn bins of the number, or give the classes names"
        )


def _short(value: object) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 60 else f"{text[:60]}..."
