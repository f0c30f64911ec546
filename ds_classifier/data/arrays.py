"""Arrays as training data: members KEY.npy that hold [C, S, S] numbers, such as latents of a VAE.

They are stored as they are given, and (value - shift) * scale, computed in fp32 when one is read,
is x_0. Arrays of uint8 without scale and shift are pixels, of which `loss.to_x_start` makes x_0.
Format: NumPy's .npy, versions 1.0 and 2.0, read without pickle:
https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ds_classifier.common.text import count

MAGIC = b"\x93NUMPY"
SUFFIX = ".npy"
DTYPES = ("uint8", "float16", "float32")
MOST_CHANNELS = 64
LARGEST_HEADER = 10_000  # bytes; NumPy's own limit
USUAL_STD = (0.3, 3.0)  # of x_0, beside noise whose standard deviation is 1


@dataclass(frozen=True)
class Arrays:
    """The facts that the arrays of a split have in common.

    channels: C, 1 to MOST_CHANNELS. size: S, their height and width. dtype: one of DTYPES.
    scale, shift: [C] numbers each; both None for pixels.
    mean, std: [C] each, of x_0 over the split; empty before it was read.
    """

    channels: int
    size: int
    dtype: str
    scale: list[float] | None
    shift: list[float] | None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    def __str__(self) -> str:
        return f"{self.channels} x {self.size} x {self.size} {self.dtype}"

    @property
    def pixels(self) -> bool:
        """Shows whether the values are 0 .. 255 and become x_0 as those of images do."""
        return self.scale is None

    @property
    def batch_dtype(self) -> type:
        """The type of batches of these arrays: float32 for x_0, uint8 for pixels."""
        return np.uint8 if self.pixels else np.float32

    @property
    def facts(self) -> list[Any]:
        """All that decides how training sees the arrays, apart from their bytes."""
        return [self.channels, self.size, self.dtype, self.scale, self.shift]

    @property
    def scaling(self) -> str:
        """The formula by which a value becomes x_0."""
        if self.pixels:
            return "value / 127.5 - 1"
        shift, scale = (_shown(numbers) for numbers in (self.shift, self.scale))
        value = "value" if shift == "0" else f"(value - {shift})"
        return value if scale == "1" else f"{value} * {scale}"

    @cached_property
    def _scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """The shift and the scale, [C, 1, 1] fp32 each."""
        both = np.array([self.shift, self.scale], np.float32)[..., None, None]
        return both[0], both[1]

    def decode(self, data: bytes) -> np.ndarray:
        """Return the bytes of a .npy as [S, S, C]: x_0 in fp32, or pixels in uint8.

        Raises ValueError for anything but a whole array of this shape and type with finite values.
        """
        values = values_of(data)
        if values.shape != (self.channels, self.size, self.size) or values.dtype.name != self.dtype:
            raise ValueError(f"holds {described(values)}; need {self}")
        return self.x_0(values)

    def x_0(self, values: np.ndarray) -> np.ndarray:
        """Return values as they are stored, [C, S, S], as `decode` does.

        Raises ValueError if they are not finite.
        """
        if not self.pixels:
            shift, scale = self._scaling
            x = values.astype(np.float32)
            x -= shift
            with np.errstate(over="ignore"):
                x *= scale
            if not np.isfinite(x).all():
                self._refuse_not_finite(values, x)
            values = x
        return values.transpose(1, 2, 0)

    def _refuse_not_finite(self, values: np.ndarray, x: np.ndarray) -> None:
        """Raise ValueError that says whether the values are not finite, or only x_0 is."""
        if broken := int(np.count_nonzero(~np.isfinite(values))):
            raise ValueError(f"holds {count(broken, 'number')} not finite")
        broken = int(np.count_nonzero(~np.isfinite(x)))
        raise ValueError(
            f"holds {count(broken, 'number')} of which x_0 = {self.scaling} is not finite in fp32"
        )

    def values_of_x_0(self, x: np.ndarray) -> np.ndarray:
        """Return values as they would be stored, [N, C, S, S], of x_0, [N, S, S, C] fp32.

        They are fp32. Pixels, uint8, stay as they are.
        """
        values = x.transpose(0, 3, 1, 2)
        if self.pixels:
            return values
        shift, scale = self._scaling
        return values / scale + shift

    def refuse_other_shape(self, image_size: int, channels: int) -> None:
        """Raise ValueError unless a classifier reads arrays of this shape."""
        if (image_size, channels) != (self.size, self.channels):
            raise ValueError(
                f"got --image_size {image_size} --in_channels {channels}, but the data are arrays "
                f"of {self}, which are not resized; need --image_size {self.size} --in_channels "
                f"{self.channels}; do: give these flags, also beside a recipe"
            )

    def with_scaling(self, scale: Sequence[float] | None, shift: Sequence[float] | None) -> Arrays:
        """Return a copy with another scale or shift: one number, or one per channel; None: as is.

        Raises ValueError for another count, for numbers that are not finite, and for a scale of 0.
        """
        if scale is None and shift is None:
            return self
        changed = {"mean": (), "std": ()}
        for name, numbers, usual in (("scale", scale, 1.0), ("shift", shift, 0.0)):
            own = getattr(self, name) or [usual]
            numbers = list(own if numbers is None else numbers)
            if len(numbers) not in (1, self.channels):
                raise ValueError(
                    f"--{name}: got {count(len(numbers), 'number')} for arrays of {self}; need 1 "
                    f"or {self.channels}, one per channel"
                )
            with np.errstate(over="ignore"):
                used = np.array(numbers, np.float32)
            if not np.isfinite(used).all() or (name == "scale" and 0 in used):
                not_0 = " and not 0" if name == "scale" else ""
                raise ValueError(
                    f"--{name}: got {_shown(numbers)}; need numbers that are finite{not_0} in fp32"
                )
            changed[name] = numbers * (self.channels // len(numbers))
        return replace(self, **changed)

    def remarks(self, *, advise: bool) -> list[str]:
        """Return a line on x_0 of a split that was read, and one if it suits no usual noise.

        advise: whether to return the second one.
        """
        lines = [
            f"arrays of {self}; x_0 = {self.scaling}, mean {_shown(self.mean, 3)}, standard "
            f"deviation {_shown(self.std, 3)}"
        ]
        usual = math.sqrt(sum(s * s for s in self.std) / len(self.std))
        if advise and not USUAL_STD[0] <= usual <= USUAL_STD[1] and usual > 0 and not self.pixels:
            scales = self.scale if len(set(self.scale)) > 1 else self.scale[:1]
            advised = " ".join(f"{scale / usual:.4g}" for scale in scales)
            lines.append(
                f"note: the noise has standard deviation 1, x_0 has {usual:.3g}; if the arrays are "
                f"to be scaled, as a VAE's latents are: give --scale {advised}, after you removed "
                "OUT or with another OUT"
            )
        return lines

    @classmethod
    def from_json(cls, fields: Any) -> Arrays:
        """Return the arrays of a manifest. Raises ValueError or TypeError for other content."""
        arrays = cls(**fields)
        sizes, scaling = (arrays.channels, arrays.size), (arrays.scale, arrays.shift)
        lists = [arrays.mean, arrays.std, *(numbers for numbers in scaling if numbers is not None)]
        if (
            any(type(n) is not int or n < 1 for n in sizes)
            or arrays.channels > MOST_CHANNELS
            or arrays.dtype not in DTYPES
            or (arrays.scale is None) != (arrays.shift is None)
            or (arrays.scale is None and arrays.dtype != "uint8")
            or any(type(numbers) is not list for numbers in lists)
            or any(len(numbers) != arrays.channels for numbers in lists)
            or any(type(n) not in (int, float) or not math.isfinite(n) for ns in lists for n in ns)
        ):
            raise ValueError("got arrays without channels, size, dtype, scale, shift, mean and std")
        return arrays

    def to_json(self) -> dict[str, Any]:
        """Return the fields, for a manifest."""
        return asdict(self)


def _shown(numbers: Iterable[float], digits: int = 6) -> str:
    """Return numbers for a message: one if all are equal."""
    texts = [f"{number:.{digits}g}" for number in numbers]
    return texts[0] if len(set(texts)) == 1 else f"[{', '.join(texts)}]"


def described(values: np.ndarray) -> str:
    """Return the shape and the type of an array, for a message."""
    return f"{' x '.join(map(str, values.shape)) or 'one number'} {values.dtype.name}"


# ------------------------------------------------------------------------------------ the format


def values_of(data: bytes) -> np.ndarray:
    """Return the array in the bytes of a .npy, of any shape and any type of numbers.

    Raises ValueError if it is not one, not whole, or would need pickle.
    """
    if not data.startswith(MAGIC):
        raise ValueError(f"got {data[:8]!r}..., which is not the start of a .npy")
    width = 2 if data[6:7] == b"\1" else 4  # bytes of the header's length
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if start > min(len(data), LARGEST_HEADER):
        raise ValueError("its header is cut short, or too long")
    dtype, shape, order = _header(data[:start])
    got, need = len(data) - start, dtype.itemsize * math.prod(shape)
    if got != need:
        raise ValueError(f"holds {got} bytes of numbers; its header says {need}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)


@lru_cache(maxsize=16)  # the arrays of a set have one header
def _header(head: bytes) -> tuple[np.dtype, tuple[int, ...], str]:
    """Return the type, the shape and the order of the numbers, "C" or "F"."""
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, fortran, dtype = read(file)
    except Exception as error:  # ast and NumPy's parsers raise many types for damaged text
        raise ValueError(f"its header cannot be read ({str(error)[:80]})") from None
    if dtype.kind not in "uif":
        raise ValueError(f"holds values of type {dtype}; need numbers")
    return dtype, shape, "F" if fortran else "C"


def to_npy(values: np.ndarray) -> bytes:
    """Return an array as the bytes of a .npy, version 1.0, in C order and little endian."""
    file = io.BytesIO()
    little = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
    np.lib.format.write_array(file, np.ascontiguousarray(little), (1, 0), allow_pickle=False)
    return file.getvalue()


# ------------------------------------------------------------------------------------ conversion


def channels_first(values: np.ndarray) -> np.ndarray:
    """Return an array of any usual layout, [S, S], [C, S, S] or [S, S, C], as [C, S, S].

    Arrays with C = S are taken for [C, S, S]. float64 becomes float32, which training computes in.
    Raises ValueError for other shapes and types.
    """
    values = values[None] if values.ndim == 2 else values
    shape = values.shape
    if values.ndim == 3 and shape[1] != shape[2] and shape[0] == shape[1]:
        values = np.moveaxis(values, -1, 0)
    if values.ndim != 3 or values.shape[1] != values.shape[2] or 0 in shape:
        raise ValueError(f"holds {described(values)}; need [C, S, S] or [S, S, C], square")
    if len(values) > MOST_CHANNELS:
        raise ValueError(f"holds {described(values)}; need {MOST_CHANNELS} channels at most")
    if values.dtype.name == "float64":
        with np.errstate(over="ignore"):  # inf is refused with the other numbers
            values = values.astype(np.float32)
    if values.dtype.name not in DTYPES:
        raise ValueError(f"holds {described(values)}; need {', '.join(DTYPES)} or float64")
    return values


def arrays_like(values: np.ndarray) -> Arrays:
    """Return what a set of arrays like this one, [C, S, S], has in common."""
    channels, size = values.shape[:2]
    dtype = values.dtype.name
    if dtype == "uint8":
        return Arrays(channels, size, dtype, None, None)
    return Arrays(channels, size, dtype, [1.0] * channels, [0.0] * channels)


class Survey:
    """A survey of the arrays in foreign shards, whose bytes are added in turn.

    kinds: of the arrays that can be read, by shape and type in words: what those of a kind have in
        common, and the tally of x_0.
    broken: the number of the others. reason: why the first of these cannot be read; "" without any.
    """

    def __init__(self, scale: Sequence[float] | None, shift: Sequence[float] | None):
        self._scaling = (scale, shift)
        self.kinds: dict[str, tuple[Arrays, Tally]] = {}
        self.broken, self.reason = 0, ""

    def add(self, data: bytes) -> None:
        """Add the bytes of a .npy."""
        try:
            values = values_of(data)
            if channels_first(values).shape != values.shape or values.dtype.name not in DTYPES:
                raise ValueError(f"holds {described(values)}; need [C, S, S], {', '.join(DTYPES)}")
            own = arrays_like(values)
            arrays, tally = self.kinds.get(str(own)) or (own.with_scaling(*self._scaling), Tally())
            tally.add(arrays.decode(data))
            self.kinds[str(own)] = arrays, tally
        except ValueError as error:
            self.broken, self.reason = self.broken + 1, self.reason or str(error)

    def update(self, other: Survey) -> None:
        """Add what another part of the set has."""
        for kind, (arrays, tally) in other.kinds.items():
            self.kinds.setdefault(kind, (arrays, Tally()))[1].update(tally)
        self.broken, self.reason = self.broken + other.broken, self.reason or other.reason

    @property
    def commonest(self) -> str | None:
        """The kind of most arrays; None if none can be read."""
        return max(self.kinds, key=self._number, default=None)

    def _number(self, kind: str) -> int:
        """Return the number of arrays of a kind."""
        arrays, tally = self.kinds[kind]
        return tally.numbers // arrays.size**2

    def finish(self) -> tuple[Arrays, int, str]:
        """Return the commonest kind with mean and std, the number of arrays of no use with it, and
        why the first of these is not; "" without any.

        Raises ValueError if those are more than half of all.
        """
        others = [kind for kind in self.kinds if kind != self.commonest]
        reason = f"holds {others[0]}; need {self.commonest}" if others else self.reason
        bad = self.broken + sum(map(self._number, others))
        good = self._number(self.commonest) if self.kinds else 0
        if not good:
            raise ValueError(self.reason)
        if good < bad:
            raise ValueError(
                f"got {count(bad + good, 'array')}, of which no more than {good:,} can be read "
                f"alike (another {reason}); need one shape and type; do: make the shards again"
            )
        arrays, tally = self.kinds[self.commonest]
        return tally.finish(arrays), bad, reason


class Tally:
    """The mean and standard deviation of x_0 per channel, of arrays that are added one by one.

    sums: [2, C] float64, of the values and of their squares. numbers: of a channel so far.
    """

    def __init__(self, numbers: int = 0, sums: Sequence[Sequence[float]] = ()):
        self.numbers, self.sums = numbers, np.array(sums or 0.0, np.float64)

    def add(self, x: np.ndarray) -> None:
        """Add an array as `Arrays.decode` returns it."""
        x = x.reshape(-1, x.shape[-1]).astype(np.float64)
        self.numbers += len(x)
        self.sums = self.sums + np.stack([x.sum(axis=0), np.square(x).sum(axis=0)])

    def update(self, other: Tally) -> None:
        """Add what another part of the set has."""
        self.numbers += other.numbers
        self.sums = self.sums + other.sums

    def to_json(self) -> list[Any]:
        """Return the arguments that make an equal tally."""
        return [self.numbers, self.sums.tolist()]

    def finish(self, arrays: Arrays) -> Arrays:
        """Return a copy of the arrays with mean and std; as is if nothing was added."""
        if not self.numbers:
            return replace(arrays, mean=[0.0] * arrays.channels, std=[0.0] * arrays.channels)
        mean, square = self.sums / self.numbers
        std = np.sqrt(np.maximum(square - mean**2, 0))
        if arrays.pixels:
            mean, std = mean / 127.5 - 1, std / 127.5
        return replace(arrays, mean=mean.tolist(), std=std.tolist())
