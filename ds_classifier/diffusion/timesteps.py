"""Samplers of timesteps: which noise levels are trained how often.

A sampler maps numbers in [0, 1) to timesteps. `stratified` draws these numbers so that every step
trains all noise levels: of a global batch of B samples, one lies in each of B equal strata.

To add a way of drawing timesteps, write a class and add it to SCHEDULE_SAMPLERS. torch is imported
inside functions, so that `--help` can list the names at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def stratified(seed: int, positions: Tensor, global_batch: int) -> Tensor:
    """Return the numbers in [0, 1), [N] float64, whose timesteps the samples at positions get.

    The numbers of a global batch have one in each of its strata, in the order of the positions,
    which a random number of the batch turns around. So each is uniform, and independent of those of
    other steps, whatever the place of an image in its batch.
    positions: [N] int64, in the training stream. The numbers depend on (seed, position) alone.
    """
    from ds_classifier.common.keyed_noise import keyed_uniform

    within = (positions % global_batch + keyed_uniform(seed, "t", positions)) / global_batch
    return (within + keyed_uniform(seed, "t of batch", positions // global_batch)) % 1.0


class UniformSampler:
    """Draws every timestep with the same probability; all loss weights are 1."""

    needs_losses = False

    def __init__(self, num_timesteps: int, *, device: torch.device | str = "cpu"):
        self.num_timesteps = num_timesteps

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps, [N] int64, and loss weights, [N] fp32, for numbers in [0, 1), [N]."""
        import torch

        t = (uniform * self.num_timesteps).long()
        return t, torch.ones_like(t, dtype=torch.float32)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        assert not state


class NoisySampler(UniformSampler):
    """Draws t with p(t) = (2t + 1) / T^2: the noisiest levels twice as often as uniformly.

    All loss weights are 1, so the objective favours the noise levels at which a sampler decides
    what an image will show. The effect on guidance is measured in docs/guidance.md.
    """

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps, [N] int64, and loss weights, [N] fp32, for numbers in [0, 1), [N]."""
        # The inverse of the CDF ((t + 1) / T)^2. The root of the largest number may round to 1.
        t, weights = super().sample(uniform.sqrt())
        return t.clamp_max(self.num_timesteps - 1), weights


class LossSecondMomentSampler:
    """Draws t with p(t) ~ sqrt(E[L_t^2]) over the last losses at t (Improved DDPM Eq. 18).

    The draw is uniform until every t has `history` losses. Losses are weighted by 1 / (T p(t)), so
    that the mean of the objective is that of uniform t, and only its variance changes. The
    reference has this sampler too, but in classifier training it neither feeds losses to it nor
    uses its weights.
    """

    needs_losses = True

    def __init__(
        self,
        num_timesteps: int,
        *,
        device: torch.device | str = "cpu",
        history: int = 10,
        uniform_share: float = 0.001,
    ):
        self.num_timesteps, self.history, self.uniform_share = num_timesteps, history, uniform_share
        import torch

        self._losses = torch.zeros(num_timesteps, history, device=device)
        self._counts = torch.zeros(num_timesteps, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """Return p(t), [T] fp32, which sums to 1."""
        import torch

        rms = self._losses.square().mean(dim=1).sqrt()
        learnt = rms / rms.sum().clamp_min(1e-12) * (1 - self.uniform_share)
        learnt = learnt + self.uniform_share / self.num_timesteps
        warm = (self._counts >= self.history).all()
        return torch.where(warm, learnt, torch.full_like(learnt, 1 / self.num_timesteps))

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps, [N] int64, and loss weights, [N] fp32, for numbers in [0, 1), [N].

        The timesteps are the inverse CDF of the numbers.
        """
        import torch

        p = self.probabilities()
        cdf = p.double().cumsum(0)
        t = torch.searchsorted(cdf, uniform * cdf[-1], right=True).clamp_max(self.num_timesteps - 1)
        return t, 1.0 / (self.num_timesteps * p[t])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Add the losses of a step. t, losses: [B], of all ranks, in order of position."""
        import torch

        finite = losses.isfinite()
        t, losses = t[finite], losses[finite].float()
        t, order = t.sort(stable=True)
        seen = torch.bincount(t, minlength=self.num_timesteps)  # [T] losses of this step at each t
        nth = torch.arange(len(t), device=t.device) - (seen.cumsum(0) - seen)[t]
        last = nth >= seen[t] - self.history  # at most `history` losses per t are kept
        slot = (self._counts[t] + nth) % self.history
        self._losses[t[last], slot[last]] = losses[order][last]
        self._counts += seen

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps."""
        return {"losses": self._losses, "counts": self._counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self._losses.copy_(state["losses"])
        self._counts.copy_(state["counts"])


SCHEDULE_SAMPLERS = {
    "uniform": UniformSampler,
    "noisy": NoisySampler,
    "loss-second-moment": LossSecondMomentSampler,
}


def create_schedule_sampler(
    name: str, num_timesteps: int, device: torch.device | str
) -> UniformSampler | LossSecondMomentSampler:
    """Return a sampler of timesteps by its name.

    Raises ValueError for a name that SCHEDULE_SAMPLERS does not have.
    """
    if name not in SCHEDULE_SAMPLERS:
        raise ValueError(
            f"schedule_sampler: got {name!r}; need one of {', '.join(SCHEDULE_SAMPLERS)}"
        )
    return SCHEDULE_SAMPLERS[name](num_timesteps, device=device)
