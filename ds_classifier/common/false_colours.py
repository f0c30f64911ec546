"""Show arrays of any number of channels in colours."""

from __future__ import annotations

import numpy as np

SPAN = 2.5  # standard deviations on either side of the mean that the colours cover


class FalseColours:
    """Maps arrays of C channels to colours: the first three, or three principal components of more.

    One or two channels are shown by the first, in grey. Each colour covers SPAN standard deviations
    on either side of the mean of the arrays that it was made for.
    words: what the colours are, for a caption.
    """

    def __init__(self, arrays: np.ndarray):
        """Choose the colours by clean arrays, [N, S, S, C] floating."""
        x = np.asarray(arrays, np.float64).reshape(-1, arrays.shape[-1])
        channels = x.shape[1]
        self._mean, self._axes = x.mean(axis=0), np.eye(channels)[:, :3]
        self.words = "the first three channels"
        if channels < 3:
            self._axes = self._axes[:, :1]
            self.words = "the first channel" if channels == 2 else "the channel"
        elif channels > 3:
            vectors = np.linalg.eigh(np.cov(x, rowvar=False))[1][:, :-4:-1]  # of largest variance
            largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(3)]
            self._axes = vectors * np.sign(largest)  # the sign of a component is arbitrary
            self.words = f"three principal components of {channels} channels"
        self._span = SPAN * np.maximum(((x - self._mean) @ self._axes).std(axis=0), 1e-12)

    def __call__(self, arrays: np.ndarray) -> np.ndarray:
        """Return arrays, [..., C] floating, as uint8 [..., 3]; what lies beyond is clipped."""
        shown = (np.asarray(arrays, np.float64) - self._mean) @ self._axes / self._span
        pixels = ((np.nan_to_num(shown) + 1) * 127.5).clip(0, 255).round().astype(np.uint8)
        return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))
