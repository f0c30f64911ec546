"""Compute the loss per sample: images -> x_start -> x_t -> logits -> loss.

`NoisedClassifier` is the module that DeepSpeed wraps. Only `to_x_start` and its inverse decide how
pixel values become x_0.

Posterior targets (`RecentImages`) are p(class | x_t) over recent training images in place of the
label. The label of x_0 is one draw from p(y | x_t), whose expectation over a set of images x_i, the
image's own x_0 among them, is known (alpha and sigma: x_t = alpha x_0 + sigma noise):

    w_i = softmax_i( -||x_t - alpha x_i||^2 / (2 sigma^2) )      p(y | x_t) = sum_{i in class y} w_i

Cross-entropy against it has the same minimiser as against the label, and less variance. Xu, Tong &
Jaakkola 2023, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models", do
the same for scores. Where x_t can belong to no other image, at low noise, it equals the label.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function as span

from ds_classifier.common.user_code import described, load_function
from ds_classifier.config import Settings
from ds_classifier.diffusion import GaussianDiffusion, create_gaussian_diffusion

# (logits [N, K] fp32, targets [N] int64 or [N, K] fp32, timesteps [N]) -> losses [N] fp32.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

CHUNK_NUMBERS = 1 << 23  # fp32 numbers of recent images at a time: 32 MiB
EMPTY = -1  # label of a place without an image
TRIED = 3  # made-up samples on which a loss of the user's is tried


def to_x_start(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return x_0 for images in any layout: uint8 values 0 .. 255 become -1 .. 1.

    Floating values are x_0 already, and only change their dtype.
    """
    x = images.to(dtype)
    return x if images.is_floating_point() else x / 127.5 - 1.0


def from_x_start(x: Tensor) -> Tensor:
    """Return pixel values 0 .. 255, floating, for x in -1 .. 1; x beyond that is clipped."""
    return ((x + 1.0) * 127.5).clamp(0, 255)


def cross_entropy(logits: Tensor, targets: Tensor, t: Tensor) -> Tensor:
    """Return the cross-entropy per sample, [N] fp32, of logits [N, K].

    targets: labels [N] int64, or probabilities [N, K] fp32. t is not used.
    """
    return F.cross_entropy(logits, targets, reduction="none")


def binary_cross_entropy(logits: Tensor, targets: Tensor, t: Tensor) -> Tensor:
    """Return the mean over classes of the binary cross-entropy, [N] fp32, of logits [N, K].

    targets: [N, K] fp32, the probability of each class by itself. t is not used.
    """
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.mean(dim=1)


def users_loss(name: str, num_classes: int, *, vectors: bool) -> Loss:
    """Return the function that --loss names, once it was tried on made-up logits.

    name: "package.module:function". vectors: its targets are [N, K] fp32, and not labels.
    Raises ValueError if it cannot be imported, raises an error, changes its targets, or does not
    return a finite loss per sample that has a finite gradient with respect to the logits.
    """
    loss = load_function("--loss", name)
    n = TRIED + (num_classes == TRIED)  # which a loss per class cannot be mistaken for
    labels = torch.arange(n) % num_classes
    targets = F.one_hot(labels, num_classes).float() if vectors else labels
    given = torch.linspace(-1, 1, n * num_classes).view(n, num_classes).requires_grad_()
    tried = f"logits [{n}, {num_classes}], targets {list(targets.shape)} and t [{n}]"
    t = torch.zeros(n, dtype=torch.int64)
    try:
        found = loss(given, own := targets.clone(), own_t := t.clone())
        if torch.is_tensor(found) and found.shape == (n,) and found.requires_grad:
            found.sum().backward()
    except Exception as error:  # a function of the user's can raise anything
        raise ValueError(
            f"--loss: got {name!r}, which fails for {tried}: {described(error)}"
        ) from error
    if not torch.is_tensor(found):
        fault = f"returns a {type(found).__name__}"
    elif found.shape != (n,):
        fault = f"returns the shape {list(found.shape)}"
    elif given.grad is None:
        fault = "returns a loss without a gradient with respect to the logits"
    elif not (found.isfinite().all() and given.grad.isfinite().all()):
        fault = f"returns {found.tolist()} or a gradient that is not finite"
    elif not (torch.equal(own, targets) and torch.equal(own_t, t)):
        fault = "changes its targets or t in place"
    else:
        return loss
    raise ValueError(
        f"--loss: got {name!r}, which {fault} for {tried}; need a loss per sample, [{n}], whose "
        "gradient trains the classifier"
    )


class NoisedClassifier(nn.Module):
    """A classifier of images that a diffusion process has noised, and its loss.

    Pixels and noise stay fp32 up to x_t, which the classifier casts to its own precision.
    """

    def __init__(
        self, classifier: nn.Module, diffusion: GaussianDiffusion, loss: Loss = cross_entropy
    ):
        super().__init__()
        self.classifier = classifier
        self.diffusion = diffusion
        self.loss = loss
        self.train()

    def train(self, mode: bool = True) -> NoisedClassifier:
        """Set the mode of this module; the classifier stays in eval mode (see model/own.py)."""
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        t: Tensor,
        noise: Tensor | None,
        recent: RecentImages | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Classify x_t of a batch.

        images: [N, S, S, C], see `to_x_start`. labels: [N] int64, or targets [N, K] fp32.
        t: [N] int64 in 0 .. T - 1.
        noise: [N, S, S, C] fp32; None for clean images, which the network sees with timestep t.
        recent: the images whose class posterior is the target in place of the labels.
        Returns losses [N] fp32 and logits [N, K] fp32.
        """
        with span("model: forward"):
            x_start = to_x_start(images)
            x_t = x_start if noise is None else self.diffusion.q_sample(x_start, t, noise)
            targets = labels
            if recent is not None:
                scales = self.diffusion.scales(t)
                targets = recent.class_posterior(x_t, x_start, labels, *scales)
            x_t = x_t.permute(0, 3, 1, 2)  # [N, C, S, S]; in memory this is channels_last already
            logits = self.classifier(x_t, self.diffusion.model_timesteps(t))
            return self.loss(logits, targets, t).float(), logits


def noised_classifier(
    classifier: nn.Module, settings: Settings, kind: str = "class"
) -> NoisedClassifier:
    """Return the classifier with the settings' diffusion, compilation and checkpointing.

    kind: of the data's targets, one of KINDS, which decides the loss.
    Raises ValueError if the network has no activation checkpointing.
    """
    if hasattr(classifier, "activation_checkpointing"):
        classifier.activation_checkpointing = settings.activation_checkpointing
    elif settings.activation_checkpointing:
        raise ValueError(
            f"--activation_checkpointing: got True with --classifier {settings.classifier}; need a "
            "network with the attribute activation_checkpointing, which its forward obeys; do: "
            "drop the flag"
        )
    if settings.compile:
        classifier.compile()  # in place: the parameters keep their names
    diffusion = create_gaussian_diffusion(**settings.diffusion_kwargs())
    loss = binary_cross_entropy if kind == "classes" else cross_entropy
    if settings.loss:
        vectors = kind in ("classes", "soft") or bool(settings.posterior_images)
        loss = users_loss(settings.loss, settings.num_classes, vectors=vectors)
    return NoisedClassifier(classifier, diffusion, loss)


class RecentImages:
    """The last `size` images of the training stream with their labels; the same on every rank.

    size: M. image_shape: (S, S, C). dtype: of the images. vectors: whether a label is a vector of
    targets, [K] fp32, and not a class. Holds M * S * S * C numbers of images on the device.
    """

    def __init__(
        self,
        size: int,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.uint8,
        vectors: bool = False,
    ):
        numbers = image_shape[0] * image_shape[1] * image_shape[2]
        self.size, self._num_classes = size, num_classes
        self._images = torch.zeros(size, numbers, dtype=dtype, device=device)
        shape, of_labels = ((size, num_classes), torch.float32) if vectors else ((size,), None)
        self._labels = torch.full(shape, EMPTY, dtype=of_labels, device=device)
        self._chunk = max(1, CHUNK_NUMBERS // numbers)

    def add(self, images: Tensor, labels: Tensor, positions: Tensor) -> None:
        """Add images, the next ones of the stream and in its order; the oldest leave.

        images: [n, S, S, C] of its dtype. labels: [n] int64 or [n, K] fp32, EMPTY for images that
        did not decode.
        positions: [n] int64. They decide the places, so that a resumed run adds up in one order.
        """
        places = positions[-self.size :] % self.size
        self._images.index_copy_(0, places, images[-self.size :].flatten(1))
        self._labels.index_copy_(0, places, labels[-self.size :])

    @torch.no_grad()
    def class_posterior(
        self, x_t: Tensor, x_start: Tensor, labels: Tensor, alpha: Tensor, sigma: Tensor
    ) -> Tensor:
        """Return p(y | x_t) over these images and each image's own x_0, [N, K] fp32.

        Of vectors it is their expectation given x_t.
        x_t, x_start: [N, S, S, C] fp32. labels: [N] int64, or [N, K] fp32. alpha, sigma: [N] fp32,
        sigma > 0.
        """
        x, own = x_t.flatten(1), x_start.flatten(1)
        signal, precision = alpha[:, None], alpha[:, None] / sigma.square()[:, None]
        # ||x_t||^2 is the same for every image and cancels.
        own_logit = (x * own).sum(1) - alpha * own.square().sum(1) / 2  # [N]
        parts = []
        for start in range(0, self.size, self._chunk):
            images = to_x_start(self._images[start : start + self._chunk])  # [m, D]
            half_norms = images.square().sum(1) / 2
            parts.append(torch.addmm(-signal * half_norms, x, images.T))
        logits = torch.cat([own_logit[:, None], *parts], dim=1) * precision  # [N, 1 + M]
        vectors = self._labels.dim() == 2
        empty = (self._labels[:, 0] if vectors else self._labels) < 0
        logits[:, 1:].masked_fill_(empty, -torch.inf)
        weights = logits.softmax(dim=1)
        if vectors:
            return torch.addmm(weights[:, :1] * labels, weights[:, 1:], self._labels)
        mass = x.new_zeros(len(x), self._num_classes)
        mass.scatter_(1, labels[:, None], weights[:, :1])
        mass.index_add_(1, self._labels.clamp_min(0), weights[:, 1:])
        return mass
