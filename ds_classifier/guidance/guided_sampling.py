"""Load what guided sampling needs: a classifier, something to sample from, and their process.

Samples come from guided-diffusion's UNet, or from the exact denoiser of a small training set. They
are guided by a trained classifier, or by the exact posterior of that training set ("bayes").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ds_classifier.checkpoint.weights import WeightsFile, load_classifier, refuse_not_finite
from ds_classifier.common.false_colours import FalseColours
from ds_classifier.config import Settings
from ds_classifier.data.arrays import Arrays
from ds_classifier.data.labels.targets import ONE_CLASS, Targets
from ds_classifier.data.shards import open_shards
from ds_classifier.data.splits import refuse_other_samples
from ds_classifier.diffusion import GaussianDiffusion, create_gaussian_diffusion
from ds_classifier.guidance.exact_denoiser import ExactDenoiser, read_images
from ds_classifier.guidance.gradient import CondFn, bayes_gradient, classifier_gradient
from ds_classifier.guidance.known_distribution import KnownDistribution, open_exact
from ds_classifier.guidance.predicted_x0 import differentiable, predicted_x0_gradient
from ds_classifier.guidance.sampling import (
    Denoiser,
    ReverseProcess,
    exact_denoiser,
    sample_classes,
    to_arrays,
    to_pixels,
    unet_denoiser,
)
from ds_classifier.guidance.unet import UNetModel, load_unet
from ds_classifier.model.own import cast_floating

ON = ("x_t", "predicted_x0")  # what the classifier is shown
MOST_COLOURED = 1000  # training arrays that the colours of samples are chosen by


@dataclass(frozen=True)
class GuidedSampling:
    """A denoiser to sample from, and a classifier that guides it.

    settings: those of the images and the process, respaced as for sampling.
    classifier, source: the classifier and its file of weights; None if the exact posterior guides,
        or nothing does.
    exact: the exact denoiser of the distribution that the training set was drawn from, where it is
        known, else of the training set; None if a UNet is sampled from.
    images, labels: the training set, [M, C, S, S], see `to_x_start`, and [M] int64, or [M, K] fp32
        (see `data/labels/targets.py`); None without one.
    unet: the UNet to sample from; None with a training set.
    device: the device that samples are drawn on.
    names: of all classes; their numbers where neither the classifier nor a training set has names.
    origin: what samples.json records of the classifier and the denoiser.
    arrays: what is sampled, if it is arrays; None for images.
    targets: the kind of the classifier's targets, which decides what can be asked for.
    """

    settings: Settings
    classifier: nn.Module | None
    source: WeightsFile | None
    exact: ExactDenoiser | KnownDistribution | None
    images: Tensor | None
    labels: Tensor | None
    unet: UNetModel | None
    device: torch.device
    names: list[str]
    origin: dict[str, Any]
    arrays: Arrays | None = None
    targets: Targets = ONE_CLASS

    @functools.cached_property
    def process(self) -> ReverseProcess:
        """The reverse process that is sampled, respaced if the settings say so."""
        return ReverseProcess(create_gaussian_diffusion(**self.settings.diffusion_kwargs()))

    @functools.cached_property
    def original(self) -> GaussianDiffusion:
        """The diffusion process before respacing."""
        settings = self.settings.replace(timestep_respacing="")
        return create_gaussian_diffusion(**settings.diffusion_kwargs())

    @property
    def pixels(self) -> bool:
        """Shows whether what is sampled has values 0 .. 255, of which x_0 is in [-1, 1]."""
        return self.arrays is None or self.arrays.pixels

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser that is sampled from."""
        if self.unet is not None:
            return unet_denoiser(self.unet, self.process)
        return exact_denoiser(self.exact, self.process)

    def cond_fn(
        self,
        scale: float,
        *,
        joint_temperature: float = 1.0,
        marginal_temperature: float = 1.0,
        classifier_on: str = ON[0],
    ) -> CondFn | None:
        """Return the guidance gradient at a scale, or None at scale 0.

        classifier_on: one of ON, what the classifier is shown. It and the temperatures (see
        `classifier_gradient`) do not apply to the exact posterior.
        """
        if scale == 0:
            return None
        if self.classifier is None:
            return bayes_gradient(self.exact, self.original, scale=scale)
        how = dict(
            scale=scale,
            joint_temperature=joint_temperature,
            marginal_temperature=marginal_temperature,
            targets=self.targets,
        )
        if classifier_on == ON[0]:
            return classifier_gradient(self.classifier, **how)
        denoiser = self.denoiser
        if self.unet is None:
            denoiser = differentiable(self.exact, self.process.diffusion)
        clean = self.original.model_timesteps(torch.zeros(1, dtype=torch.int64))
        return predicted_x0_gradient(self.classifier, denoiser, self.process, clean, **how)

    def asked(self, classes: str, eta: float | None) -> np.ndarray:
        """Return what samples are asked to show, one after the other and again from the first.

        classes: "3,7" or "cat,dog"; "" for all. Where an image may show several, "3+7,cat" too.
        eta: of values, see `guidance/gradient.py`; None for classes.
        Returns [A] int64, classes; [A, K] uint8, several classes as 0 and 1; or [1] fp32, eta.
        Raises ValueError for others, and for one of the two where the targets need the other.
        """
        if self.targets.kind == "values":
            if eta is None or classes:
                raise ValueError(
                    f"got {'--classes' if classes else 'no --eta'}; need --eta for {self.targets}: "
                    "above 0 for larger values, below 0 for smaller ones, in 1 / unit of the "
                    f"value; do: --eta {self.targets.moving_eta:.2g}, which moves the mean by "
                    "about one spread"
                )
            return np.array([eta], np.float32)
        if eta is not None:
            raise ValueError(
                f"--eta: got {eta:g}; need a classifier of values, not of {self.targets}; do: "
                "drop it, or ask for --classes"
            )
        num_classes = self.settings.num_classes
        wanted = [[k] for k in range(num_classes)]
        if classes:
            wanted = [self._numbers(part.strip()) for part in classes.split(",")]
        if self.targets.kind == "classes":
            return np.array([np.isin(range(num_classes), w) for w in wanted], np.uint8)
        return np.array(wanted)[:, 0]

    def _numbers(self, text: str) -> list[int]:
        """Return the class, or the classes of one image, in a part of --classes; see `asked`."""
        last = self.settings.num_classes - 1
        number = {name: i for i, name in enumerate(self.names)}
        number |= {str(i): i for i in range(last + 1)}
        several = self.targets.kind == "classes"
        split = several and text not in number  # a name may have a plus in it
        parts = [part.strip() for part in text.split("+")] if split else [text]
        if unknown := [part for part in parts if part not in number]:
            raise ValueError(
                f"--classes: got {unknown[0]!r}; need numbers from 0 to {last}, or names such as "
                f"{self.names[0]!r}, with commas between them"
                + (", and + between those of one image" if several else "")
            )
        return [number[part] for part in parts]

    def draw(
        self,
        labels: np.ndarray,
        scale: float,
        *,
        joint_temperature: float,
        marginal_temperature: float,
        batch_size: int,
        use_ddim: bool,
        clip_denoised: bool,
        seed: int,
        progress: Callable[[int, int], None],
        classifier_on: str = ON[0],
    ) -> np.ndarray:
        """Draw a sample per label, guided at a scale, on all ranks together: uint8 [N, S, S, C].

        Of arrays that are no pixels: x_0, fp32 [N, S, S, C].

        labels: what is asked for, [N] or [N, K], see `asked`. scale, temperatures, classifier_on:
            see `cond_fn`.
        batch_size: samples at a time, per rank. The others: see `sample_classes`.
        Raises FloatingPointError if there are samples that are not finite.
        """
        settings = self.settings
        return sample_classes(
            self.process,
            self.denoiser,
            self.cond_fn(
                scale,
                joint_temperature=joint_temperature,
                marginal_temperature=marginal_temperature,
                classifier_on=classifier_on,
            ),
            labels,
            shape=(settings.in_channels, settings.image_size, settings.image_size),
            batch_size=batch_size,
            seed=seed,
            device=self.device,
            ddim=use_ddim,
            clip_denoised=clip_denoised,
            finish=to_pixels if self.pixels else to_arrays,
            progress=progress,
        )

    def colours(self, samples: np.ndarray) -> FalseColours | None:
        """Return how samples of arrays are shown, by their training set if there is one.

        samples: as `draw` returns them. None for images.
        """
        if self.arrays is None:
            return None
        if self.images is None:
            return FalseColours(samples)
        return FalseColours(self.images[:MOST_COLOURED].permute(0, 2, 3, 1).numpy())


def load_guided_sampling(
    classifier_path: Path | None,
    given: dict[str, Any],
    *,
    unguided: bool = False,
    data_dir: str,
    model_path: str,
    unet: dict[str, Any],
    classifier_fp16: bool,
    unet_fp16: bool,
    device: torch.device,
) -> GuidedSampling:
    """Load a classifier, and a training set or a UNet.

    classifier_path: see `weights.open_weights`; None stands for the exact posterior of data_dir,
        or, if unguided, for no guide: samples can then be drawn at scale 0 only.
    given: the settings that the user named. timestep_respacing may differ from the classifier's.
    data_dir: shards of a small training set, whose exact denoiser is sampled from. If it is "",
        model_path is the file of a UNet, and unet its architecture (see `create_unet`).
    Raises ValueError if something cannot be loaded, or if its settings or classes do not agree.
    """
    settings, classifier, source = load_guide(
        classifier_path, given, fp16=classifier_fp16, device=device
    )
    targets = Targets.from_json(None if source is None else source.targets)
    guide: dict[str, Any] | None = None if unguided else {"path": "bayes"}
    if source is not None:
        guide = {"path": str(source.path), "step": source.step, "sha256": source.sha256}
    if not data_dir:
        if not settings.num_classes:  # no classifier says it: guided-diffusion's number, or none
            settings = settings.replace(num_classes=1000 if unet["class_cond"] else 1)
        if unet["class_cond"] and targets.kind in ("classes", "values"):
            raise ValueError(
                f"--class_cond: got True; need False for a classifier of {targets}: the UNet takes "
                "one class per image"
            )
        if create_gaussian_diffusion(**settings.diffusion_kwargs()).alphas_cumprod[-1] == 0:
            raise ValueError(
                f"--model_path: got the {settings.noise_schedule} process, whose last level has no "
                "signal, so that a UNet's noise says nothing of x_0; do: give --data_dir"
            )
        model = load_unet(
            Path(model_path),
            **unet,
            image_size=settings.image_size,
            in_channels=settings.in_channels,
            num_classes=settings.num_classes,
            fp16=unet_fp16,
            device=device,
        )
        denoiser = {"model_path": model_path, **unet, "use_fp16": unet_fp16}
        origin = {"classifier": guide, "denoiser": denoiser}
        numbers = [str(number) for number in range(settings.num_classes)]
        names = (source.classes if source else None) or numbers
        recorded = None if source is None else source.arrays
        arrays = None if recorded is None else Arrays.from_json(recorded)
        return GuidedSampling(
            *(settings, classifier, source, None, None, None, model, device, names, origin, arrays),
            targets,
        )
    shards = open_shards(data_dir)
    names, arrays = shards.manifest.classes, shards.manifest.arrays
    if source is None and arrays is not None:
        settings = settings.replace(
            **{"image_size": arrays.size, "in_channels": arrays.channels} | given
        )
    elif source is not None and source.kind != "file":
        try:
            refuse_other_samples(shards.manifest, data_dir, source.arrays, str(source.path))
        except ValueError as error:
            raise ValueError(f"--data_dir: {error}") from None
    of_data = shards.manifest.targets
    _refuse_other_targets(of_data, data_dir, source, bayes=source is None and not unguided)
    images, labels = read_images(
        shards, image_size=settings.image_size, channels=settings.in_channels
    )
    if settings.num_classes not in (0, len(names)):
        raise ValueError(
            f"--data_dir: got {len(names)} classes in {data_dir}; need the "
            f"{settings.num_classes} of {classifier_path or '--num_classes'}"
        )
    settings = settings.replace(num_classes=len(names))
    # The denoiser needs no classes; the first of several stands for them.
    one = labels.argmax(dim=1) if of_data.vectors else labels
    exact = open_exact(shards.manifest, images, one, device)
    origin = {"classifier": guide, "denoiser": {"data_dir": data_dir}}
    return GuidedSampling(
        *(settings, classifier, source, exact, images, labels, None, device, names, origin),
        *(arrays, targets),
    )


def _refuse_other_targets(
    of_data: Targets, data_dir: str, source: WeightsFile | None, *, bayes: bool
) -> None:
    """Raise ValueError for a training set whose targets are not those of the guide.

    source: the classifier's; None without one. bayes: the exact posterior guides.
    """
    if source is not None and of_data != (targets := Targets.from_json(source.targets)):
        raise ValueError(
            f"--data_dir: got {data_dir}, with {of_data}; need the targets of {source.path}, "
            f"{targets}; do: give the shards that it was trained on"
        )
    if bayes and of_data.vectors:
        raise ValueError(
            f"--classifier_path: got bayes; need a classifier for {data_dir}, with {of_data}: the "
            "exact posterior is of one class per image"
        )


def load_guide(
    path: Path | None,
    given: dict[str, Any],
    *,
    fp16: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Settings, nn.Module | None, WeightsFile | None]:
    """Load a classifier for sampling, on the device, and the settings to sample with.

    path, given: see `load_guided_sampling`; for path None only settings are returned.
    Raises ValueError as `load_classifier` does, for weights that are not finite, or if `given`
    contradicts recorded settings.
    """
    if path is None:
        return Settings(**given), None, None
    # The process is the one of the classifier's training; only its respacing may differ.
    respacing = {name: value for name, value in given.items() if name == "timestep_respacing"}
    source, classifier = load_classifier(path, given)
    refuse_not_finite(classifier.state_dict(), path, classifier)
    source.refuse_contradicting_flags({n: v for n, v in given.items() if n not in respacing})
    cast_floating(classifier.to(device), torch.float16 if fp16 else torch.float32)
    return source.settings.replace(**respacing), classifier, source
