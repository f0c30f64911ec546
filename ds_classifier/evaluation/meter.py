"""Sums of loss and accuracy by quartile of t, kept on the device until somebody asks.

Keys and meaning are the reference's: loss, acc@1, acc@5, and the same with _q0 .. _q3, the quarters
of the timesteps from nearly clean (q0) to nearly pure noise (q3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_classifier import distributed

QUARTILES = 4
NAMES = ("loss", "acc@1", "acc@5")
# Bins of a sample's loss, nats: below the first edge, between two, above the last. Half octaves.
LOSS_EDGES = tuple(2.0 ** (k / 2) for k in range(-16, 11))


class Reading(NamedTuple):
    """Means over all ranks since the last reading; quartiles without samples are left out.

    weight: samples that they rest on. losses [QUARTILES, len(LOSS_EDGES) + 1] fp64, on the CPU:
    samples by their loss.
    """

    means: dict[str, float]
    weight: float
    losses: Tensor


class Meter:
    """Weighted sums over batches; all ranks' together when read."""

    def __init__(self, num_timesteps: int, device: torch.device | str):
        self.num_timesteps = num_timesteps
        # [quartile, (loss, acc@1, acc@5, weight, a weight a bin)] fp64: counts stay exact.
        columns = len(NAMES) + 1 + len(LOSS_EDGES) + 1
        self._sums = torch.zeros(QUARTILES, columns, dtype=torch.float64, device=device)
        self._edges = torch.tensor(LOSS_EDGES, device=device)
        self._bins = torch.arange(len(LOSS_EDGES) + 1, device=device)

    @torch.no_grad()
    def add(
        self, *, losses: Tensor, logits: Tensor, labels: Tensor, t: Tensor, weights: Tensor
    ) -> None:
        """losses, t, weights, labels [N]; logits [N, K]. A sample of weight 0 is not counted."""
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [N, 5]
        hits = top == labels[:, None]
        ones = torch.ones_like(losses)
        values = torch.stack([losses, hits[:, 0].float(), hits.any(dim=1).float(), ones], dim=1)
        bins = torch.bucketize(losses, self._edges)[:, None] == self._bins  # [N, bins]
        values = torch.cat([values, bins.float()], dim=1)
        # A bad sample's loss means nothing, and 0 * nan is nan: leave it out, do not weigh it.
        counted = torch.where(weights[:, None] > 0, values * weights[:, None], 0.0).double()
        quartile = t * QUARTILES // self.num_timesteps
        self._sums.index_add_(0, quartile, counted)

    def read(self) -> Reading:
        """What was added on all ranks; starts anew. Waits for the device."""
        sums = distributed.all_reduce_sum(self._sums.clone()).cpu()
        self._sums.zero_()
        sums, losses = sums[:, : len(NAMES) + 1], sums[:, len(NAMES) + 1 :]
        total = sums.sum(dim=0)
        weight = float(total[-1])
        means: dict[str, float] = {}
        for i, name in enumerate(NAMES):
            if weight > 0:
                means[name] = float(total[i] / weight)
            for q in range(QUARTILES):
                if sums[q, -1] > 0:
                    means[f"{name}_q{q}"] = float(sums[q, i] / sums[q, -1])
        return Reading(means, weight, losses)


def by_position(trained: Tensor) -> Tensor:
    """All ranks' positions, t and losses of a step, [3, n] fp64, without the bad samples.

    In the order of the stream, so that it does not depend on the number of ranks; positions are
    exact up to 2^53. trained: this rank's, as train_step returns it. Every rank must call it.
    """
    everyone = distributed.all_gather(trained)  # [W, accumulation, 3, micro-batch]
    samples = everyone.transpose(0, 2).flatten(1)  # [3, global batch]
    samples = samples[:, samples[0].argsort()]
    return samples[:, samples[0] >= 0]
