"""Sample from the reverse process: DDPM and DDIM steps with classifier guidance, and whole loops.

Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol & Dhariwal 2021 (learned variances), Dhariwal
& Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (guidance: Alg. 1 and 2).
Tables are float64 numpy and used as fp32, as in guided-diffusion.

Shapes: N samples, C channels, S x S pixels. t: [N] int64, an index in the (respaced) process.
A cond_fn (`gradient.py`) is called as cond_fn(x_t, timesteps, y=y) and returns
scale * grad log p(y | x_t), [N, C, S, S]. The timesteps are the network's, of the original process.
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
from ds_classifier.guidance.known_distribution import KnownDistribution
from ds_classifier.loss import from_x_start

NAMED = 3  # samples that are not finite are named in an error, at most


@dataclass(frozen=True)
class Prediction:
    """A denoiser's output at x_t.

    x_start: [N, C, S, S] fp32, the estimate of x_0, not clipped.
    variance_share: [N, C, S, S], the place of the log variance between its bounds: 0 for the
        posterior's, 1 for beta_t's (Improved DDPM Eq. 15); None if the variance is not learned.
    """

    x_start: Tensor
    variance_share: Tensor | None


Denoiser = Callable[[Tensor, Tensor, Tensor], Prediction]  # takes x_t, t, y


class ReverseProcess:
    """The distribution p(x_{t-1} | x_t) of a diffusion process, given a denoiser's prediction.

    It works on points of a variance-preserving process: x_t here is the diffusion's x_t / scale.
    A variance that is not learned is beta_t, the reference's choice ("fixed large").
    """

    def __init__(self, diffusion: GaussianDiffusion):
        self.diffusion = diffusion
        betas, alpha_bar = diffusion.betas, diffusion.alphas_cumprod
        before = np.append(1.0, alpha_bar[:-1])  # alpha_bar_{t-1}
        posterior_variance = betas * (1.0 - before) / (1.0 - alpha_bar)  # DDPM Eq. 7
        # At t = 0 it is 0, which has no logarithm; the value at t = 1 is used there.
        posterior_variance = np.append(posterior_variance[1:2], posterior_variance[1:])
        beta_variance = np.append(posterior_variance[:1], betas[1:])
        with np.errstate(divide="ignore"):  # alpha_bar is 0 at a level without signal
            signal_recip, noise_to_signal = np.sqrt(1.0 / alpha_bar), np.sqrt(1.0 / alpha_bar - 1.0)
        self._tables = {
            "scale": diffusion.scale,
            "alpha_bar": alpha_bar,
            "alpha_bar_before": before,
            "signal_recip": signal_recip,
            "noise_to_signal": noise_to_signal,
            # Tweedie: x_0 = (x_t + (1 - alpha_bar) score) / sqrt(alpha_bar); 0 without signal.
            "x_start_of_score": np.where(alpha_bar > 0, (1.0 - alpha_bar) * signal_recip, 0.0),
            "mean_of_x_start": betas * np.sqrt(before) / (1.0 - alpha_bar),  # DDPM Eq. 7
            "mean_of_x_t": (1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - alpha_bar),
            "log_posterior_variance": np.log(posterior_variance),
            "log_beta": np.log(betas),
            "log_beta_variance": np.log(beta_variance),
        }

    def _at(self, name: str, t: Tensor) -> Tensor:
        """Return a table's numbers at t, [N, 1, 1, 1] fp32."""
        numbers = torch.from_numpy(self._tables[name]).to(t.device)[t]
        return numbers.float()[:, None, None, None]

    def x_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_0 for x_t and the noise in it (DDPM Eq. 4, solved for x_0)."""
        return self._at("signal_recip", t) * x_t - self._at("noise_to_signal", t) * noise

    def noise_from_x_start(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """Return the noise in x_t if x_0 is x_start."""
        alpha_bar = self._at("alpha_bar", t)
        return (x_t - alpha_bar.sqrt() * x_start) / (1.0 - alpha_bar).sqrt()

    def mean_log_variance(
        self, x_t: Tensor, t: Tensor, prediction: Prediction
    ) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of p(x_{t-1} | x_t), each [N, C, S, S].

        DDPM Eq. 7, Improved DDPM Eq. 15.
        """
        mean = self._at("mean_of_x_start", t) * prediction.x_start
        mean = mean + self._at("mean_of_x_t", t) * x_t
        share = prediction.variance_share
        if share is None:
            return mean, self._at("log_beta_variance", t).expand_as(x_t)
        largest, least = self._at("log_beta", t), self._at("log_posterior_variance", t)
        return mean, share * largest + (1.0 - share) * least

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a network of this process gets: the scaled x_t, and its times."""
        return self._at("scale", t) * x_t, self.diffusion.model_timesteps(t)

    def _gradient(self, x_t: Tensor, t: Tensor, cond_fn: CondFn, y: Tensor) -> Tensor:
        """Return the gradient of cond_fn with respect to x_t, fp32."""
        return self._at("scale", t) * cond_fn(*self.network_input(x_t, t), y=y).float()

    def guided_mean(
        self, mean: Tensor, variance: Tensor, x_t: Tensor, t: Tensor, cond_fn: CondFn, y: Tensor
    ) -> Tensor:
        """Return the mean, moved along the classifier's gradient (Beat GANs Alg. 1)."""
        return mean + variance * self._gradient(x_t, t, cond_fn, y)

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
        """Draw x_{t-1}; at t = 0 return the mean. noise: [N, C, S, S] standard normal."""
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
        """Return x_{t-1} without randomness (DDIM Eq. 12, eta 0), and the estimate of x_0.

        With a cond_fn, x_0 is moved along the classifier's gradient, and the noise against it (Beat
        GANs Alg. 2).
        """
        x_start = prediction.x_start
        if cond_fn is not None:
            gradient = self._gradient(x_t, t, cond_fn, y)
            x_start = x_start + self._at("x_start_of_score", t) * gradient
        noise = self.noise_from_x_start(x_t, t, x_start)
        before = self._at("alpha_bar_before", t)
        return before.sqrt() * x_start + (1.0 - before).sqrt() * noise, x_start


def unet_denoiser(unet: nn.Module, process: ReverseProcess) -> Denoiser:
    """Return a guided-diffusion UNet as a denoiser. A class-conditional one gets y."""

    def predict(x_t: Tensor, t: Tensor, y: Tensor) -> Prediction:
        """Run the UNet."""
        condition = None if unet.num_classes is None else y
        output = unet(*process.network_input(x_t, t), condition).float()
        return prediction_of_output(process, x_t, t, output)

    return predict


def prediction_of_output(
    process: ReverseProcess, x_t: Tensor, t: Tensor, output: Tensor
) -> Prediction:
    """Return the prediction in a network's output.

    output: the noise, [N, C, S, S], or noise and variance share in [-1, 1], [N, 2C, S, S].
    """
    channels = x_t.shape[1]
    if output.shape[1] == channels:
        return Prediction(process.x_start_from_noise(x_t, t, output), None)
    noise, variance = output.split(channels, dim=1)
    return Prediction(process.x_start_from_noise(x_t, t, noise), (variance + 1.0) / 2.0)


def exact_denoiser(exact: ExactDenoiser | KnownDistribution, process: ReverseProcess) -> Denoiser:
    """Return the exact denoiser of a training set, which does not take the class."""
    alphas_cumprod = torch.from_numpy(process.diffusion.alphas_cumprod)

    def predict(x_t: Tensor, t: Tensor, y: Tensor) -> Prediction:
        """Return E[x_0 | x_t]."""
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
) -> tuple[Tensor, Tensor]:
    """Draw a batch of samples, [N, C, S, S] fp32, roughly in [-1, 1].

    Also returns the t of each sample's first step that gave NaN or infinity, [N] int64; -1 if no
    step did. Such a sample stays without finite numbers, and is no image.

    noise: a function; noise(i) returns [N, C, S, S] standard normal. noise(T) is the starting
        point; noise(t) is added in step t, and not used by DDIM.
    y: [N] int64, the classes asked for.
    clip_denoised: clip estimates of x_0 to [-1, 1].
    """
    steps = process.diffusion.num_timesteps
    x = noise(steps)
    broke = torch.full((len(x),), -1, device=x.device)  # read once per batch, not per step
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
        finite = x.isfinite().flatten(1).all(dim=1)
        broke = torch.where(finite | (broke >= 0), broke, t)
    return x, broke


def keyed_steps(seed: int, positions: Tensor, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    """Return the `noise` of `sample` for the samples at these positions, [N] int64.

    It depends on (seed, position) alone, not on the batch or the rank.
    """
    return lambda i: keyed_noise(seed, f"sampling step {i}", positions, shape)


def to_pixels(x: Tensor) -> Tensor:
    """Return [N, C, S, S] in [-1, 1] as pixels, [N, S, S, C] uint8, truncated, not rounded."""
    return from_x_start(x).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_arrays(x: Tensor) -> Tensor:
    """Return [N, C, S, S] as x_0 of arrays, [N, S, S, C] fp32."""
    return x.float().permute(0, 2, 3, 1).contiguous()


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
    finish: Callable[[Tensor], Tensor] = to_pixels,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Draw a sample per label, on all ranks together: uint8 [N, S, S, C], the same on each rank.

    labels: [N] int64, the classes asked for. shape: (C, S, S). batch_size: samples per rank.
    finish: makes the samples that are returned from x_0, [n, C, S, S].
    progress: called with the number of samples drawn and N.
    The noise of sample n depends on (seed, n) alone, and a batch holds the same samples on any
    number of ranks, so the images are those of one rank if the devices round in the same way.
    Raises FloatingPointError on every rank after the first batch with samples that are not finite,
    naming them and the noise levels from which on they are not.
    """
    ranks, rank = distributed.world_size(), distributed.rank()
    pixels = []
    for first in range(0, len(labels), ranks * batch_size):
        # A rank past the end repeats the last sample, as all must take part in all_gather.
        start = first + rank * batch_size
        positions = torch.arange(start, start + batch_size, device=device)
        positions = positions.clamp_max(len(labels) - 1)
        y = torch.from_numpy(labels).to(device)[positions]
        noise = keyed_steps(seed, positions, shape)
        x, broke = sample(
            process,
            denoiser,
            noise,
            y,
            cond_fn=cond_fn,
            ddim=ddim,
            clip_denoised=clip_denoised,
        )
        broken = distributed.all_gather(broke).flatten().tolist()[: len(labels) - first]
        if max(broken) >= 0:
            levels = [process.diffusion.timestep_map[t] if t >= 0 else None for t in broken]
            raise FloatingPointError(_not_finite(first, levels))
        pixels.append(distributed.all_gather(finish(x)).flatten(0, 1).cpu().numpy())
        progress(min(first + ranks * batch_size, len(labels)), len(labels))
    return np.concatenate(pixels)[: len(labels)]


def _not_finite(first: int, levels: list[int | None]) -> str:
    """Return which samples of a batch are not finite, and from which noise level on.

    first: the number of the batch's first sample. levels: per sample, in the original process; None
    for a sample that is finite.
    """
    broken = [f"sample {first + i} from t = {t} on" for i, t in enumerate(levels) if t is not None]
    more = f", and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    return (
        f"{len(broken)} of the samples {first} to {first + len(levels) - 1} are not finite "
        f"({', '.join(broken[:NAMED])}{more})"
    )
