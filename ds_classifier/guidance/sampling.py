"""The reverse process: DDPM and DDIM steps with classifier guidance, and whole sampling loops.

Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol & Dhariwal 2021 (learned variances), Dhariwal
& Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (guidance: Alg. 1 and 2).
Tables are float64 numpy and used as fp32, as in guided-diffusion.

Shapes: N samples, C channels, S x S pixels. t: [N] int64, index in the (respaced) process.
cond_fn(x, timesteps, y=y) -> [N, C, S, S], scale * grad log p(y | x), is called with the timesteps
that a network is shown, those of the original process; `guidance.py` makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ds_classifier import distributed
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.diffusion import GaussianDiffusion
from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.guidance.gradient import CondFn
from ds_classifier.loss import from_x_start


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says at x_t.

    x_start: [N, C, S, S] fp32, the estimate of x_0, not clipped.
    variance_share: [N, C, S, S], where log variance lies between its bounds: 0 the posterior's, 1
        beta_t's (Improved DDPM Eq. 15); None where it is not learned.
    """

    x_start: Tensor
    variance_share: Tensor | None


Denoiser = Callable[[Tensor, Tensor, Tensor], Prediction]  # of x_t, t, y


class ReverseProcess:
    """p(x_{t-1} | x_t) of a diffusion process, for a denoiser's prediction.

    A variance that is not learned is beta_t, the reference's choice ("fixed large").
    """

    def __init__(self, diffusion: GaussianDiffusion):
        self.diffusion = diffusion
        betas, alpha_bar = diffusion.betas, diffusion.alphas_cumprod
        before = np.append(1.0, alpha_bar[:-1])  # alpha_bar_{t-1}
        posterior_variance = betas * (1.0 - before) / (1.0 - alpha_bar)  # DDPM Eq. 7
        # At t = 0 it is 0 and has no logarithm; the next one stands in.
        posterior_variance = np.append(posterior_variance[1:2], posterior_variance[1:])
        beta_variance = np.append(posterior_variance[:1], betas[1:])
        self._tables = {
            "alpha_bar": alpha_bar,
            "alpha_bar_before": before,
            "signal_recip": np.sqrt(1.0 / alpha_bar),
            "noise_to_signal": np.sqrt(1.0 / alpha_bar - 1.0),
            "mean_of_x_start": betas * np.sqrt(before) / (1.0 - alpha_bar),  # DDPM Eq. 7
            "mean_of_x_t": (1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - alpha_bar),
            "log_posterior_variance": np.log(posterior_variance),
            "log_beta": np.log(betas),
            "log_beta_variance": np.log(beta_variance),
        }

    def _at(self, name: str, t: Tensor) -> Tensor:
        """A table's numbers at t, [N, 1, 1, 1] fp32."""
        numbers = torch.from_numpy(self._tables[name]).to(t.device)[t]
        return numbers.float()[:, None, None, None]

    def x_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 of x_t and the noise in it (DDPM Eq. 4, solved)."""
        return self._at("signal_recip", t) * x_t - self._at("noise_to_signal", t) * noise

    def noise_from_x_start(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """The noise in x_t if x_0 is x_start."""
        return (self._at("signal_recip", t) * x_t - x_start) / self._at("noise_to_signal", t)

    def mean_log_variance(
        self, x_t: Tensor, t: Tensor, prediction: Prediction
    ) -> tuple[Tensor, Tensor]:
        """Of p(x_{t-1} | x_t), each [N, C, S, S] (DDPM Eq. 7, Improved DDPM Eq. 15)."""
        mean = self._at("mean_of_x_start", t) * prediction.x_start
        mean = mean + self._at("mean_of_x_t", t) * x_t
        share = prediction.variance_share
        if share is None:
            return mean, self._at("log_beta_variance", t).expand_as(x_t)
        largest, least = self._at("log_beta", t), self._at("log_posterior_variance", t)
        return mean, share * largest + (1.0 - share) * least

    def guided_mean(
        self, mean: Tensor, variance: Tensor, x_t: Tensor, t: Tensor, cond_fn: CondFn, y: Tensor
    ) -> Tensor:
        """The mean moved along the classifier's gradient (Beat GANs Alg. 1)."""
        return mean + variance * cond_fn(x_t, self.diffusion.model_timesteps(t), y=y).float()

    def ddpm_step(
        self,
        x_t: Tensor,
        t: Tensor,
        prediction: Prediction,
        noise: Tensor,
        *,
        cond_fn: CondFn | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """A draw of x_{t-1}; at t = 0 the mean itself. noise: [N, C, S, S] standard normal."""
        mean, log_variance = self.mean_log_variance(x_t, t, prediction)
        if cond_fn is not None:
            mean = self.guided_mean(mean, log_variance.exp(), x_t, t, cond_fn, y)
        drawn = (t != 0).float()[:, None, None, None]
        return mean + drawn * torch.exp(0.5 * log_variance) * noise

    def ddim_step(
        self,
        x_t: Tensor,
        t: Tensor,
        prediction: Prediction,
        *,
        cond_fn: CondFn | None = None,
        y: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x_{t-1} without randomness (DDIM Eq. 12, eta 0), and the x_0 it heads for.

        Guided, the noise is moved against the classifier's gradient (Beat GANs Alg. 2).
        """
        x_start = prediction.x_start
        noise = self.noise_from_x_start(x_t, t, x_start)
        if cond_fn is not None:
            gradient = cond_fn(x_t, self.diffusion.model_timesteps(t), y=y).float()
            noise = noise - (1.0 - self._at("alpha_bar", t)).sqrt() * gradient
            x_start = self.x_start_from_noise(x_t, t, noise)
        before = self._at("alpha_bar_before", t)
        return before.sqrt() * x_start + (1.0 - before).sqrt() * noise, x_start


def unet_denoiser(unet: nn.Module, process: ReverseProcess) -> Denoiser:
    """A guided-diffusion UNet as a denoiser; told y where it is class-conditional."""

    def predict(x_t: Tensor, t: Tensor, y: Tensor) -> Prediction:
        given = None if unet.num_classes is None else y
        output = unet(x_t, process.diffusion.model_timesteps(t), given).float()
        return prediction_of_output(process, x_t, t, output)

    return predict


def prediction_of_output(
    process: ReverseProcess, x_t: Tensor, t: Tensor, output: Tensor
) -> Prediction:
    """A network's output, the noise [N, C, S, S] and maybe its variance too [N, 2C, S, S], read."""
    channels = x_t.shape[1]
    if output.shape[1] == channels:
        return Prediction(process.x_start_from_noise(x_t, t, output), None)
    noise, variance = output.split(channels, dim=1)
    return Prediction(process.x_start_from_noise(x_t, t, noise), (variance + 1.0) / 2.0)


def exact_denoiser(exact: ExactDenoiser, process: ReverseProcess) -> Denoiser:
    """The exact denoiser of a training set; it is not told the class."""
    alphas_cumprod = torch.from_numpy(process.diffusion.alphas_cumprod)

    def predict(x_t: Tensor, t: Tensor, y: Tensor) -> Prediction:
        alpha_bar = alphas_cumprod.to(t.device)[t]
        return Prediction(exact.posterior(x_t, alpha_bar).x_start, None)

    return predict


@torch.no_grad()
def sample(
    process: ReverseProcess,
    denoiser: Denoiser,
    noise: Callable[[int], Tensor],
    y: Tensor,
    *,
    cond_fn: CondFn | None = None,
    ddim: bool = False,
    clip_denoised: bool = True,
) -> Tensor:
    """A batch of samples, [N, C, S, S] fp32, about in [-1, 1].

    noise(i): [N, C, S, S] standard normal; i = T is where the sampling starts, i = t the noise
        added in step t, which DDIM does not ask for.
    y: [N] int64, the classes asked for. clip_denoised: keep estimates of x_0 within [-1, 1].
    """
    steps = process.diffusion.num_timesteps
    x = noise(steps)
    for i in reversed(range(steps)):
        t = torch.full((len(x),), i, device=x.device)
        prediction = denoiser(x, t, y)
        if clip_denoised:
            clipped = prediction.x_start.clamp(-1.0, 1.0)
            prediction = Prediction(clipped, prediction.variance_share)
        if ddim:
            x, _ = process.ddim_step(x, t, prediction, cond_fn=cond_fn, y=y)
        else:
            x = process.ddpm_step(x, t, prediction, noise(i), cond_fn=cond_fn, y=y)
    return x


def keyed_steps(seed: int, positions: Tensor, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    """The noise of samples at these positions, [N] int64, for `sample`: theirs wherever drawn."""
    return lambda i: keyed_noise(seed, f"sampling step {i}", positions, shape)


def to_pixels(x: Tensor) -> Tensor:
    """[N, C, S, S] in [-1, 1] -> [N, S, S, C] uint8, cut off as guided-diffusion does."""
    return from_x_start(x).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def sample_classes(
    process: ReverseProcess,
    denoiser: Denoiser,
    cond_fn: CondFn | None,
    labels: np.ndarray,
    *,
    shape: tuple[int, ...],
    batch_size: int,
    seed: int,
    device: torch.device,
    ddim: bool = False,
    clip_denoised: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """A sample for every label, on all ranks together: uint8 [N, S, S, C], the same on each.

    labels: [N] int64, the classes asked for. shape: (C, S, S). progress: called with samples done.
    Sample n's noise depends on (seed, n) alone, and batches have the same samples on any number of
    ranks, so images are those of one rank as far as its device rounds alike.
    """
    ranks, rank = distributed.world_size(), distributed.rank()
    pixels = []
    for first in range(0, len(labels), ranks * batch_size):
        # A rank past the end repeats the last sample, so that all take part in the gathering.
        start = first + rank * batch_size
        positions = torch.arange(start, start + batch_size, device=device)
        positions = positions.clamp_max(len(labels) - 1)
        y = torch.from_numpy(labels).to(device)[positions]
        noise = keyed_steps(seed, positions, shape)
        x = sample(
            process,
            denoiser,
            noise,
            y,
            cond_fn=cond_fn,
            ddim=ddim,
            clip_denoised=clip_denoised,
        )
        pixels.append(distributed.all_gather(to_pixels(x)).flatten(0, 1).cpu().numpy())
        progress(min(first + ranks * batch_size, len(labels)))
    return np.concatenate(pixels)[: len(labels)]
