"""Does the classifier guide? Measured on a small training set, where the right answer is known.

The exact denoiser of the training set (`exact_denoiser.py`) stands in for a diffusion model, and
its class posterior is that of the best possible classifier. Two measures:

- at each noise level, how far the classifier's p(y | x_t) and its gradient are from the best ones;
- of guided samples, the share that an independent classifier takes for the class asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.diffusion import GaussianDiffusion
from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.guidance.gradient import classifier_gradient
from ds_classifier.loss import to_x_start

# Where x_t leaves less doubt of its class, log p(y | x_t) is flat: there is no gradient to compare.
DOUBT = 1e-6


@dataclass(frozen=True)
class LevelFidelity:
    """A classifier beside the best possible one at a noise level; means over images.

    t: of the original process. kl: KL(p_Bayes(y | x_t) || p(y | x_t)) in nats.
    accuracy, bayes_accuracy: shares of images whose class comes first.
    compared: share of images where the best classifier doubts their class. Over these: cosine,
    the mean of the two gradients' of log p(own class | x_t), and length_ratio, the root mean square
    length of the classifier's over that of the best; None if there are none.
    """

    t: int
    kl: float
    accuracy: float
    bayes_accuracy: float
    compared: float
    cosine: float | None
    length_ratio: float | None


@torch.no_grad()
def compare_with_bayes(
    classifier: nn.Module,
    exact: ExactDenoiser,
    diffusion: GaussianDiffusion,
    images: Tensor,
    labels: Tensor,
    *,
    timesteps: Sequence[int],
    seed: int,
    batch_size: int = 128,
) -> Iterator[LevelFidelity]:
    """The classifier against the Bayes-optimal one of a training set, a row a noise level.

    diffusion: the original process, not respaced. images: [M, C, S, S] uint8 of the training set,
    or some of them, on the device; labels: [M].
    """
    model_gradient = classifier_gradient(classifier)
    alphas_cumprod = torch.from_numpy(diffusion.alphas_cumprod).to(images.device)
    for level in timesteps:
        found = []  # of each batch, [n, 7]
        for start in range(0, len(images), batch_size):
            x_start = to_x_start(images[start : start + batch_size])
            y = labels[start : start + batch_size]
            positions = torch.arange(start, start + len(y), device=y.device)
            noise = keyed_noise(seed, f"fidelity {level}", positions, tuple(x_start.shape[1:]))
            t = torch.full_like(y, level)
            x = diffusion.q_sample(x_start, t, noise)
            shown = diffusion.model_timesteps(t)
            best = exact.posterior(x, alphas_cumprod[t], y)
            log_p = classifier(x, shown).double().log_softmax(dim=1)
            p_best = best.log_class.exp()
            gap = torch.where(p_best > 0, p_best * (best.log_class - log_p), 0.0)
            own = model_gradient(x, shown, y=y).flatten(1).double()
            ideal = best.gradient.flatten(1).double()
            columns = [
                gap.sum(dim=1),
                log_p.argmax(dim=1) == y,
                best.log_class.argmax(dim=1) == y,
                best.log_class.gather(1, y[:, None])[:, 0] < -DOUBT,
                torch.cosine_similarity(own, ideal, dim=1),
                own.square().sum(dim=1),
                ideal.square().sum(dim=1),
            ]
            found.append(torch.stack([column.double() for column in columns], dim=1).cpu())
        numbers = torch.cat(found)
        kl, right, best_right, compared = numbers[:, :4].mean(dim=0).tolist()
        kept = numbers[numbers[:, 3] > 0, 4:]
        cosine = ratio = None
        if len(kept):
            cosine, own_square, ideal_square = kept.mean(dim=0).tolist()
            ratio = math.sqrt(own_square / ideal_square)
        yield LevelFidelity(level, kl, right, best_right, compared, cosine, ratio)


class Judge:
    """An independent classifier of clean images: a support vector machine on their pixels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        """images: uint8 [M, ...]; labels: [M]. Raises ValueError without scikit-learn."""
        try:
            from sklearn.svm import SVC
        except ImportError:
            raise ValueError(
                "measuring guidance needs scikit-learn; do: pip install scikit-learn"
            ) from None
        self._svc = SVC().fit(self._features(images), labels)

    @staticmethod
    def _features(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float32) / 255.0

    def share(self, samples: np.ndarray, asked: np.ndarray) -> float:
        """The share of samples, uint8 [N, ...] like `images`, taken for the class asked for."""
        return float((self._svc.predict(self._features(samples)) == asked).mean())


HEADER = (
    "beside the best possible classifier, on training images noised to t; gradients of log p of\n"
    "their class: the share of images that leave it a doubt, and of these the cosine to its\n"
    "gradient and the length over its\n"
    f"{'t':>6s}{'KL(Bayes||model)':>18s}{'accuracy':>10s}{'Bayes':>9s}"
    f"{'gradients: compared':>22s}{'cosine':>8s}{'length':>8s}"
)


def level_line(row: LevelFidelity) -> str:
    """A row of the table that HEADER heads."""
    gradients = "       -       -"
    if row.cosine is not None:
        gradients = f"{row.cosine:8.2f}{row.length_ratio:8.2f}"
    return (
        f"{row.t:6d}{row.kl:18.3f}{100 * row.accuracy:9.1f}%{100 * row.bayes_accuracy:8.1f}%"
        f"{100 * row.compared:21.0f}%{gradients}"
    )
