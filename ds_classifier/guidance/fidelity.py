"""Measure how well a classifier guides, where the right answer is known.

Two truths are known. Of a small training set: its exact denoiser (`exact_denoiser.py`) stands in
for a diffusion model, and its class posterior is the best possible classifier of these images; it
knows them by heart. Of the made-up images of `common.gaussians`: the distribution that they were
drawn from (`known_distribution.py`), to which a classifier that generalises comes close. Measures:

- at each noise level, how far the classifier's p(y | x_t) and its gradient are from the best ones;
- the share of guided samples that show the class asked for, as another classifier sees it;
- for a known distribution, the Frechet distance of the samples to the classes asked for.

All of that is of one class per image. Of other targets (`data/labels/targets.py`), what the labels
of the samples' nearest training images say is measured alone; see `NEAREST`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ds_classifier.common import text
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.diffusion import GaussianDiffusion
from ds_classifier.guidance.exact_denoiser import ExactDenoiser
from ds_classifier.guidance.gradient import classifier_gradient, exact_posterior
from ds_classifier.guidance.guided_sampling import GuidedSampling
from ds_classifier.guidance.known_distribution import KnownDistribution
from ds_classifier.loss import to_x_start

LEVELS = 20  # intervals between the noise levels that `compare_evenly` takes
LEVEL_IMAGES = 256  # images that it shows at each level, at most
FRESH = 1 << 20  # streams of `GaussianClasses.draw` from here on are of images in no data set
# Below this doubt, 1 - p(y | x_t), log p(y | x_t) is flat and there is no gradient to compare.
DOUBT = 1e-6


@dataclass(frozen=True)
class LevelFidelity:
    """A comparison of a classifier with the best possible one at a noise level, over images.

    t, log_snr: the noise level, in the original process.
    not_finite: the number of images whose logits or gradient are not finite. They count as wrong,
        and are in no mean.
    kl: mean of KL(p_Bayes(y | x_t) || p(y | x_t)), in nats; None if no image is finite.
    accuracy, bayes_accuracy: shares of images whose class comes first.
    compared: the share of images about whose class the best classifier is in doubt, and where x_t
        has a signal. The gradients of log p(own class | x_t) are compared on these:
    cosine: the mean cosine between the two gradients; None if there are no such images.
    length_ratio: the root mean square length of the classifier's gradient over that of the best
        one; None likewise.
    """

    t: int
    log_snr: float
    not_finite: int
    kl: float | None
    accuracy: float
    bayes_accuracy: float
    compared: float
    cosine: float | None
    length_ratio: float | None


@torch.no_grad()
def compare_with_bayes(
    classifier: nn.Module,
    exact: ExactDenoiser | KnownDistribution,
    diffusion: GaussianDiffusion,
    images: Tensor,
    labels: Tensor,
    *,
    timesteps: Sequence[int],
    seed: int,
    batch_size: int = 128,
) -> Iterator[LevelFidelity]:
    """Yield a comparison with the Bayes-optimal classifier per noise level.

    diffusion: the original process, not respaced.
    images: [M, C, S, S] uint8, on the device; labels: [M].
    """
    model_gradient = classifier_gradient(classifier)
    for level in timesteps:
        rows = []  # per batch, [n, 8]
        for start in range(0, len(images), batch_size):
            x_start = to_x_start(images[start : start + batch_size])
            y = labels[start : start + batch_size]
            positions = torch.arange(start, start + len(y), device=y.device)
            noise = keyed_noise(seed, f"fidelity {level}", positions, tuple(x_start.shape[1:]))
            t = torch.full_like(y, level)
            x = diffusion.q_sample(x_start, t, noise)
            shown = diffusion.model_timesteps(t)
            best = exact_posterior(exact, diffusion, x, t, y)
            log_p = classifier(x, shown).double().log_softmax(dim=1)
            p_best = best.log_class.exp()
            gap = torch.where(p_best > 0, p_best * (best.log_class - log_p), 0.0)
            own = model_gradient(x, shown, y=y).flatten(1).double()
            ideal = best.gradient.flatten(1).double()
            gap, length = gap.sum(dim=1), own.square().sum(dim=1)
            finite = gap.isfinite() & length.isfinite()
            in_doubt = best.log_class.gather(1, y[:, None])[:, 0] < -DOUBT
            columns = [
                finite & (log_p.argmax(dim=1) == y),
                best.log_class.argmax(dim=1) == y,
                in_doubt & (ideal.abs().amax(dim=1) > 0),
                finite,
                gap,
                torch.cosine_similarity(own, ideal, dim=1),
                length,
                ideal.square().sum(dim=1),
            ]
            rows.append(torch.stack([column.double() for column in columns], dim=1).cpu())
        numbers = torch.cat(rows)
        right, best_right, compared = numbers[:, :3].mean(dim=0).tolist()
        finite = numbers[numbers[:, 3] > 0]
        kept = finite[finite[:, 2] > 0, 5:]
        kl = float(finite[:, 4].mean()) if len(finite) else None
        cosine = ratio = None
        if len(kept):
            cosine, own_square, ideal_square = kept.mean(dim=0).tolist()
            ratio = math.sqrt(own_square / ideal_square)
        broken = len(numbers) - len(finite)
        snr = diffusion.log_snr[level].item()
        yield LevelFidelity(level, snr, broken, kl, right, best_right, compared, cosine, ratio)


class Judge:
    """An independent classifier of clean images: a support vector machine on their pixels."""

    def __init__(self, images: Tensor, labels: Tensor):
        """Train it. images: [M, C, S, S], uint8 or x_0 of arrays; labels: [M].

        Raises ValueError without scikit-learn.
        """
        try:
            from sklearn.svm import SVC
        except ImportError:
            raise ValueError(
                "measuring guidance needs scikit-learn; do: pip install scikit-learn"
            ) from None
        pixels = images.permute(0, 2, 3, 1).numpy()
        self._svc = SVC().fit(self._features(pixels), labels.numpy())

    @staticmethod
    def _features(images: np.ndarray) -> np.ndarray:
        """Return [M, D] fp32: pixels in [0, 1], or x_0 of arrays."""
        features = images.reshape(len(images), -1).astype(np.float32)
        return features / 255.0 if images.dtype == np.uint8 else features

    def share(self, samples: np.ndarray, asked: np.ndarray) -> float:
        """Return the share of samples, uint8 [N, ...], that it assigns to the class asked for."""
        return float((self._svc.predict(self._features(samples)) == asked).mean())


# What is measured of samples whose targets are not one class, by kind.
NEAREST = {
    "classes": "share whose nearest training image has all classes asked for",
    "soft": "mean probability of the class asked for, in the label of the nearest training image",
    "values": "mean value of the nearest training images",
}


def nearest_mean(guided: GuidedSampling, samples: np.ndarray, asked: np.ndarray) -> float:
    """Return what `NEAREST` names, of samples of a classifier of other targets than one class.

    guided: with a training set. samples: [N, S, S, C], uint8 or x_0. asked: [N], or [N, K] uint8.
    """
    clean = to_x_start(guided.images).flatten(1).to(guided.device)
    x = to_x_start(torch.from_numpy(samples)).permute(0, 3, 1, 2).flatten(1).to(guided.device)
    nearest = [torch.cdist(part, clean).argmin(dim=1).cpu() for part in x.split(LEVEL_IMAGES)]
    labels = guided.labels[torch.cat(nearest)]
    if guided.targets.kind == "values":
        return float(torch.tensor(guided.targets.values)[labels].mean())
    wanted = torch.from_numpy(asked)
    if guided.targets.kind == "classes":
        return float((labels >= wanted).all(dim=1).float().mean())
    return float(labels.gather(1, wanted[:, None]).mean())


def judge_of(guided: GuidedSampling) -> Judge | KnownDistribution:
    """Return what says which class a sample shows: the distribution if it is known, else an SVM.

    Raises ValueError as `Judge` does.
    """
    if isinstance(guided.exact, KnownDistribution):
        return guided.exact
    return Judge(guided.images, guided.labels)


@dataclass(frozen=True)
class Guidance:
    """The measures of a guided sampling.

    truth: "distribution" if that of the images is known, else "training set".
    samples: the number of samples at each scale.
    shares: by scale ("0", "2.5", ...), the share of samples assigned to the class asked for; of
        other targets than one class, what `NEAREST` names.
    levels: per noise level, a comparison with the best classifier by that truth; empty if that one
        guided.
    training_levels: the same by the training set, where the truth is the distribution.
    frechet: by scale, and "exact" for as many exact samples, the distance to the distribution;
        empty where that is not known.
    kind: of the targets.
    """

    truth: str
    samples: int
    shares: dict[str, float]
    levels: list[LevelFidelity]
    training_levels: list[LevelFidelity] = field(default_factory=list)
    frechet: dict[str, float] = field(default_factory=dict)
    kind: str = "class"

    def as_json(self) -> dict[str, Any]:
        """Return the content of fidelity.json."""
        return {name: value for name, value in asdict(self).items() if name != "samples"}

    def lines(self) -> list[str]:
        """Return the measures as tables for the screen."""
        if self.kind != "class":
            rows = [[scale, measured(self.kind, mean)] for scale, mean in self.shares.items()]
            return [
                f"{NEAREST[self.kind]}, of {text.count(self.samples, 'sample')}:",
                *text.table(["scale", "mean"], rows),
                "Not compared with the best possible classifier, which is of one class per image.",
            ]
        judge = "an SVM, trained on the clean images,"
        heads, rows = ["scale", "share"], [[s, text.percent(v)] for s, v in self.shares.items()]
        if self.frechet:
            judge = "the best classifier of their distribution"
            heads.append("Frechet distance")
            rows = [[*row, f"{self.frechet[row[0]]:.3f}"] for row in rows]
            rows.append(["exact samples", "", f"{self.frechet['exact']:.3f}"])
        lines = [
            f"share of {text.count(self.samples, 'sample')} that {judge} assigns to the class "
            "asked for:",
            *text.table(heads, rows),
        ]
        for truth, levels in (self.truth, self.levels), ("training set", self.training_levels):
            if levels:
                lines += [LEVEL_TABLES[truth], *level_table(levels)]
        return lines


def measured(kind: str, mean: float, digits: int = 1) -> str:
    """Return a number of `Guidance.shares` as text, a share with this number of digits."""
    return f"{mean:.5g}" if kind == "values" else text.percent(mean, digits)


def measure(
    guided: GuidedSampling,
    scales: Sequence[float],
    samples: Sequence[np.ndarray],
    asked: np.ndarray,
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Guidance:
    """Measure samples and the classifier that guided them.

    guided: with a training set. samples: per scale, uint8 [N, S, S, C]. asked: [N] or [N, K], what
    was asked for. seed: of the noise. progress: called with the levels done and their number.
    Raises ValueError without scikit-learn, which judges samples of an unknown distribution.
    """
    exact, images, labels = guided.exact, guided.images, guided.labels
    names, kind = [f"{scale:g}" for scale in scales], guided.targets.kind
    if kind != "class":
        means = [nearest_mean(guided, drawn, asked) for drawn in samples]
        shares = dict(zip(names, means, strict=True))
        return Guidance("training set", len(asked), shares, [], kind=kind)
    comparisons = {"training set": (exact, images, labels)}
    if isinstance(exact, KnownDistribution):
        truth = "distribution"
        of_training = ExactDenoiser(images, labels, exact.num_classes, device=guided.device)
        fresh = np.arange(LEVEL_IMAGES) % exact.num_classes
        pixels = torch.from_numpy(exact.gaussians.draw(fresh, FRESH)).permute(0, 3, 1, 2)
        comparisons = {
            truth: (exact, pixels, torch.from_numpy(fresh)),
            "training set": (of_training, images, labels),
        }
        frechet = {n: exact.frechet(s, asked) for n, s in zip(names, samples, strict=True)}
        frechet["exact"] = exact.frechet(exact.gaussians.draw(asked, FRESH + 1), asked)
    else:
        truth, frechet = "training set", {}
    judge = judge_of(guided)
    shares = {n: judge.share(s, asked) for n, s in zip(names, samples, strict=True)}
    levels: dict[str, list[LevelFidelity]] = {name: [] for name in comparisons}
    if guided.classifier is not None:
        total = len(comparisons) * (LEVELS + 1)
        for name, comparison in comparisons.items():
            for level in compare_evenly(guided, *comparison, seed):
                levels[name].append(level)
                progress(sum(map(len, levels.values())), total)
    first, *others = levels.values()
    return Guidance(truth, len(asked), shares, first, *others, frechet=frechet)


def compare_evenly(
    guided: GuidedSampling,
    exact: ExactDenoiser | KnownDistribution,
    images: Tensor,
    labels: Tensor,
    seed: int,
) -> Iterator[LevelFidelity]:
    """Yield `compare_with_bayes` at LEVELS + 1 evenly spaced levels, on evenly spaced images.

    images: [M, C, S, S] uint8. labels: [M].
    """
    device = guided.device
    stride = max(1, len(images) // LEVEL_IMAGES)
    shown = slice(None, LEVEL_IMAGES * stride, stride)
    last = guided.original.num_timesteps - 1
    return compare_with_bayes(
        guided.classifier,
        exact,
        guided.original,
        images[shown].to(device),
        labels[shown].to(device),
        timesteps=torch.linspace(0, last, LEVELS + 1).round().long().tolist(),
        seed=seed,
    )


_COMPARED = """\
Gradients are of log p(own class): the share of images on which they are compared (the best
classifier is in doubt), the cosine between the two, and the length of the classifier's over that of
the best one."""
LEVEL_TABLES = {
    "training set": "Classifier and best possible classifier of the training images, on these "
    f"images noised to t.\n{_COMPARED}",
    "distribution": "Classifier and best possible classifier of the distribution, on new images of "
    f"it noised to t.\n{_COMPARED}",
}


def level_table(levels: Iterable[LevelFidelity]) -> list[str]:
    """Return the comparison as a table, a line per noise level.

    Lines at the end name the levels with images whose numbers were not finite.
    """
    levels = list(levels)
    heads = "t", "log-SNR", "KL(Bayes||model)", "accuracy", "Bayes", "compared", "cosine", "length"
    rows = [
        (
            str(row.t),
            f"{row.log_snr:.2f}",
            "-" if row.kl is None else f"{row.kl:.3f}",
            text.percent(row.accuracy),
            text.percent(row.bayes_accuracy),
            text.percent(row.compared, 0),
            "-" if row.cosine is None else f"{row.cosine:.2f}",
            "-" if row.length_ratio is None else f"{row.length_ratio:.2f}",
        )
        for row in levels
    ]
    return text.table(heads, rows, left=0) + [
        f"t = {row.t}: {row.not_finite} not finite, counted as wrong, in no mean"
        for row in levels
        if row.not_finite
    ]
