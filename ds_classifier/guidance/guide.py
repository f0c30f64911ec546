"""Guide any sampler with a classifier of any noise process.

A sampler's x = alpha x_0 + sigma noise and a classifier's x_t are points of variance-preserving
processes once they are divided by their scale, sqrt(alpha^2 + sigma^2) (see `GaussianDiffusion`).
There, points of the same log-SNR, log(alpha^2 / sigma^2), have the same distribution. So the
classifier is asked at its own level of that log-SNR, and its gradient is mapped back to x by the
chain rule. x_0 has to be the same for both: pixels in [-1, 1], or latents with the same scale.

Guidance adds the gradient g of log p(y | x) to the score. What a network predicts then moves by

    noise       - sigma g                     score = -noise / sigma
    x_0         + sigma^2 / alpha g           Tweedie: x_0 = (x + sigma^2 score) / alpha
    v           - sigma / alpha g             v = alpha noise - sigma x_0, alpha^2 + sigma^2 = 1
    velocity    - sigma (alpha + sigma) / alpha g     of a flow: noise - x_0

For a flow with alpha = 1 - s, sigma = s, the last is -s / (1 - s) g. An EDM denoiser predicts x_0
with alpha = 1, so it moves by sigma^2 g.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ds_classifier.data.labels.targets import ONE_CLASS, Targets
from ds_classifier.diffusion import GaussianDiffusion
from ds_classifier.guidance.gradient import classifier_gradient

# How far each prediction moves, per unit of the gradient, by the names that diffusers has for them.
SHIFTS: dict[str, Callable[[Any, Any], Any]] = {
    "epsilon": lambda alpha, sigma: -sigma,
    "sample": lambda alpha, sigma: sigma**2 / alpha,
    "v_prediction": lambda alpha, sigma: -sigma / alpha,
    "flow_prediction": lambda alpha, sigma: -sigma * (alpha + sigma) / alpha,
}

Level = float | np.ndarray | Tensor  # alpha or sigma: a number for all images, or [N]
Asked = (
    Tensor | float
)  # what `gradient.py` takes as y; a number stands for [N] of it, int for int64


class Guide:
    """The gradient of a classifier at any noise level of any sampler.

    classifier: forward(x_t [N, C, S, S], times [N]) -> logits [N, K].
    diffusion: the process that it was trained on.
    scale, joint_temperature, marginal_temperature, targets: see `classifier_gradient`.

    Between the levels of the process, the network gets a time between theirs. At less noise than
    its cleanest level, it gets the time of that level. At more noise than its noisiest level it
    gets the time of that one, and the gradient is scaled down with alpha / sigma, as the exact one
    is in the limit of pure noise; where alpha is 0, so is the gradient.
    """

    def __init__(
        self,
        classifier: nn.Module,
        diffusion: GaussianDiffusion,
        *,
        scale: float = 1.0,
        joint_temperature: float = 1.0,
        marginal_temperature: float = 1.0,
        targets: Targets = ONE_CLASS,
    ):
        self._cond_fn = classifier_gradient(
            classifier,
            scale=scale,
            joint_temperature=joint_temperature,
            marginal_temperature=marginal_temperature,
            targets=targets,
        )
        self._diffusion = diffusion

    def __call__(self, x: Tensor, alpha: Level, sigma: Level, y: Asked) -> Tensor:
        """Return scale * grad_x log p(y | x), [N, C, S, S], fp32.

        x: [N, C, S, S], alpha x_0 + sigma noise. alpha, sigma: not negative; one for all images, or
        [N]. Numbers on a GPU are waited for. y: what is asked for, see `gradient.py`: one class or
        eta for all images, [N], or [N, K].
        """
        if isinstance(y, (int, float)):
            y = torch.full((len(x),), y, device=x.device)
        alpha, sigma = _numbers(alpha), _numbers(sigma)
        with np.errstate(divide="ignore"):
            log_snr = 2.0 * (np.log(alpha) - np.log(sigma))
        process = self._diffusion
        time = np.interp(-log_snr, -process.log_snr, process.times)
        shown = np.interp(-log_snr, -process.log_snr, process.scale) / np.hypot(alpha, sigma)
        factor = shown * np.exp(np.minimum(0.0, (log_snr - process.log_snr[-1]) / 2.0))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        times = torch.from_numpy(np.broadcast_to(time, len(x)).astype(np.float32)).to(x.device)
        return _like(factor, x) * self._cond_fn(_like(shown, x) * x, times, y=y)

    def shift(self, prediction: str, x: Tensor, alpha: Level, sigma: Level, y: Asked) -> Tensor:
        """Return what guidance adds to a network's prediction at x, [N, C, S, S].

        prediction: epsilon (the noise), sample (x_0), v_prediction or flow_prediction (noise -
            x_0), as diffusers names them. The other arguments: see `__call__`.
        It is 0 where alpha is 0: x then holds no information on the class.
        Raises ValueError for another prediction.
        """
        if prediction not in SHIFTS:
            raise ValueError(f"prediction: got {prediction!r}; need one of {', '.join(SHIFTS)}")
        alpha, sigma = _numbers(alpha), _numbers(sigma)
        with np.errstate(divide="ignore"):
            factor = np.where(alpha > 0, SHIFTS[prediction](alpha, sigma), 0.0)
        return _like(factor, x) * self(x, alpha, sigma, y)


def _numbers(level: Level) -> np.ndarray:
    """Return alpha or sigma as float64, [] or [N]."""
    return np.asarray(level.detach().cpu() if torch.is_tensor(level) else level, dtype=np.float64)


def _like(numbers: np.ndarray, x: Tensor) -> Tensor:
    """Return float64 numbers, [] or [N], as a tensor that multiplies x [N, C, S, S], in fp32 if x
    is in 16 bits."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.from_numpy(np.asarray(numbers)).to(x.device, dtype)[..., None, None, None]


def guide_denoiser(denoiser: Callable[..., Tensor], guide: Guide, y: Asked) -> Callable:
    """Return a denoiser, (x, sigma) -> E[x_0 | x], guided to y, see `Guide`.

    denoiser: takes x [N, C, S, S] = x_0 + sigma noise, sigma (one for all images, or [N]) and more
        that it may need, as the networks of k-diffusion and EDM do (Karras et al. 2022).
    """

    def guided(x: Tensor, sigma: Level, *arguments: Any, **named: Any) -> Tensor:
        """Return the estimate of x_0, moved by sigma^2 times the gradient."""
        estimate = denoiser(x, sigma, *arguments, **named)
        return (estimate + guide.shift("sample", x, 1.0, sigma, y)).to(estimate.dtype)

    return guided


def guide_scheduler_output(
    scheduler: Any,
    guide: Guide,
    model_output: Tensor,
    timestep: Tensor | float,
    model_input: Tensor,
    y: Asked,
) -> Tensor:
    """Return the guided output to give to a diffusers scheduler's `step` (Beat GANs Alg. 2).

        for t in scheduler.timesteps:
            x_t = scheduler.scale_model_input(x, t)
            output = guide_scheduler_output(scheduler, guide, unet(x_t, t).sample, t, x_t, y)
            x = scheduler.step(output, t, x).prev_sample

    scheduler: one with `alphas_cumprod`, such as DDPM, DDIM, PNDM, DPMSolverMultistep, Euler; of
        flow matching, such as FlowMatchEulerDiscrete, which does not scale its input; or of EDM,
        such as EDMEuler.
    model_output: [N, C or 2C, S, S]; a learned variance is returned unchanged.
    timestep: one of scheduler.timesteps, for all images.
    model_input: [N, C, S, S], the model's input.
    y: what is asked for, see `Guide`.
    At a level without signal, model_output is returned unchanged.
    Raises ValueError for another scheduler or prediction_type, or a timestep that it does not have.
    """
    t = torch.as_tensor(timestep).tolist()  # waits for the device only if the timestep is on it
    alpha, sigma, kind = _level(scheduler, t)
    if kind not in SHIFTS:
        raise ValueError(f"prediction_type: got {kind!r}; need one of {', '.join(SHIFTS)}")
    channels = model_input.shape[1]
    if (of_data := getattr(scheduler.config, "sigma_data", None)) is not None:
        # The output F is in D = c_skip x + c_out F, with c_out = sigma sigma_data c_in, negative
        # for a v_prediction (Karras et al. 2022, Table 1). D moves by sigma^2 times the gradient
        # at x, which is c_in times that at the input c_in x.
        moved = guide(model_input, alpha, sigma, y) * (sigma / alpha / of_data)
        moved = model_output[:, :channels] + (moved if kind == "epsilon" else -moved)
    else:
        moved = model_output[:, :channels] + guide.shift(kind, model_input, alpha, sigma, y)
    return torch.cat([moved.to(model_output.dtype), model_output[:, channels:]], dim=1)


def _level(scheduler: Any, t: Any) -> tuple[float, float, str]:
    """Return alpha and sigma of a scheduler's model input at timestep t, and what is predicted.

    Raises ValueError for a timestep that it does not have, or a scheduler of another kind.
    """
    config, name = scheduler.config, type(scheduler).__name__
    of_flow = name.startswith("FlowMatch")
    kind = "flow_prediction" if of_flow else getattr(config, "prediction_type", None)
    of_sigma = hasattr(config, "sigma_data") or getattr(config, "timestep_type", "") == "continuous"
    table = getattr(scheduler, "alphas_cumprod", None)
    if kind == "flow_prediction":
        last = config.num_train_timesteps
    elif of_sigma:
        last = math.inf
    elif table is not None:
        last = len(table) - 1
    else:
        raise ValueError(f"scheduler: got {name}; need one of diffusion, flow matching or EDM")
    if not isinstance(t, (int, float)) or not (of_sigma or 0 <= t <= last):
        raise ValueError(f"timestep: got {t}; need one number of scheduler.timesteps, 0 to {last}")
    if kind == "flow_prediction":
        return 1.0 - t / last, t / last, kind
    if of_sigma:  # t = ln(sigma) / 4
        sigma = math.exp(4.0 * t)
        scale = math.hypot(sigma, getattr(config, "sigma_data", 1.0))
        return 1.0 / scale, sigma / scale, kind
    alpha_bar = float(np.interp(t, np.arange(len(table)), table.cpu().double().numpy()))
    return math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar), kind
