"""Sums of the metrics by quartile of t, kept on the device until they are read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_classifier import distributed
from ds_classifier.data.labels.targets import ONE_CLASS, Targets
from ds_classifier.diffusion import GaussianDiffusion
from ds_classifier.evaluation.metrics import QUARTILES, Answers, metrics_of

# Edges of the bins of a sample's loss, nats: half octaves. The first bin lies below the first edge,
# the last one above the last edge.
LOSS_EDGES = tuple(2.0 ** (k / 2) for k in range(-16, 11))


def describe_quartiles(diffusion: GaussianDiffusion) -> str:
    """Return the log-SNRs at which the quartiles of t begin and end."""
    steps = diffusion.num_timesteps
    last = [-(-steps * (q + 1) // QUARTILES) - 1 for q in range(QUARTILES)]
    levels = (diffusion.log_snr[t].round(1) + 0.0 for t in (0, *last))  # + 0.0: no "-0.0"
    *borders, end = (f"{level:.1f}" for level in levels)
    return f"q0 to q{QUARTILES - 1} lie between the log-SNRs {', '.join(borders)} and {end}"


class Reading(NamedTuple):
    """The means of all ranks since the last reading.

    means: by the metric's name, and by NAME_q0 .. NAME_q3; quartiles without samples are left out.
    weight: number of samples behind them.
    losses: number of samples per quartile and bin of the loss,
        [QUARTILES, len(LOSS_EDGES) + 1] fp64, on the CPU.
    """

    means: dict[str, float]
    weight: float
    losses: Tensor


class Meter:
    """The weighted sums of the metrics over batches, of this rank until they are read.

    targets: of the data; they decide which metrics there are.
    """

    def __init__(
        self, num_timesteps: int, device: torch.device | str, targets: Targets = ONE_CLASS
    ):
        self.num_timesteps, self.targets = num_timesteps, targets
        self._metrics = metrics_of(targets)
        self._values = bin_values(targets, device)
        # [quartile, (the metrics, weight, weight per bin of the loss)] fp64: counts stay exact.
        columns = len(self._metrics) + 1 + len(LOSS_EDGES) + 1
        self._sums = torch.zeros(QUARTILES, columns, dtype=torch.float64, device=device)
        self._edges = torch.tensor(LOSS_EDGES, device=device)
        self._bins = torch.arange(len(LOSS_EDGES) + 1, device=device)

    @torch.no_grad()
    def add(
        self, *, losses: Tensor, logits: Tensor, labels: Tensor, t: Tensor, weights: Tensor
    ) -> None:
        """Add a batch.

        losses, t, weights: [N]. logits: [N, K]. labels: see Answers. A sample of weight 0 is not
        counted.
        """
        answers = Answers(losses, logits, labels, self._values)
        columns = [metric.per_sample(answers) for metric in self._metrics.values()]
        columns.append(torch.ones_like(losses))
        values = torch.stack([column.to(losses.dtype) for column in columns], dim=1)
        bins = torch.bucketize(losses, self._edges)[:, None] == self._bins  # [N, bins]
        values = torch.cat([values, bins.float()], dim=1)
        # The loss of an undecodable sample may be nan, and 0 * nan is nan: select, do not multiply.
        counted = torch.where(weights[:, None] > 0, values * weights[:, None], 0.0).double()
        quartile = t * QUARTILES // self.num_timesteps
        self._sums.index_add_(0, quartile, counted)

    def read(self) -> Reading:
        """Return the means over all ranks, and set the sums to zero. Waits for the device."""
        sums = distributed.all_reduce_sum(self._sums.clone()).cpu()
        self._sums.zero_()
        metrics = len(self._metrics)
        sums, losses = sums[:, : metrics + 1], sums[:, metrics + 1 :]
        total = sums.sum(dim=0)
        weight = float(total[-1])
        means: dict[str, float] = {}
        for i, name in enumerate(self._metrics):
            if weight > 0:
                means[name] = float(total[i] / weight)
            for q in range(QUARTILES):
                if sums[q, -1] > 0:
                    means[f"{name}_q{q}"] = float(sums[q, i] / sums[q, -1])
        return Reading(means, weight, losses)


def bin_values(targets: Targets, device: torch.device | str) -> Tensor | None:
    """Return the values of the bins less their mean, [K] fp32; None for targets that are no bins.

    Errors are differences of values, which fp32 would lose in values such as 1e9 to 1e9 + 1.
    """
    if targets.values is None:
        return None
    values = torch.tensor(targets.values, dtype=torch.float64)
    return (values - values.mean()).to(device, torch.float32)


def by_position(trained: Tensor) -> Tensor:
    """Return positions, t and losses of a step on all ranks, [3, n] fp64, without bad samples.

    Samples come in the order of the stream, so the result does not depend on the number of ranks.
    Positions are exact up to 2^53. Every rank must call it.

    trained: what this rank trained on, as train_step returns it.
    """
    everyone = distributed.all_gather(trained)  # [W, accumulation, 3, micro-batch]
    samples = everyone.transpose(0, 2).flatten(1)  # [3, global batch]
    samples = samples[:, samples[0].argsort()]
    return samples[:, samples[0] >= 0]
