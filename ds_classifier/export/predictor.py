"""Use a trained classifier in Python: `ds_classifier.load(path)` returns a Predictor.

`Predictor.predict` takes clean images and noises them itself, as evaluation does. Inside a sampler,
where images are noisy already, `Predictor.gradient` is the gradient of log p(y | x_t), and
`classifier(x_t, diffusion.model_timesteps(t))` has the logits.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ds_classifier.checkpoint.weights import open_weights, refuse_not_finite
from ds_classifier.common.keyed_noise import keyed_noise
from ds_classifier.common.text import first_line
from ds_classifier.config import RECIPES, Settings
from ds_classifier.data.arrays import Arrays, channels_first, described, values_of
from ds_classifier.data.images import center_crop, decode, with_channels
from ds_classifier.data.labels.targets import ONE_CLASS, Targets
from ds_classifier.diffusion import GaussianDiffusion, create_gaussian_diffusion
from ds_classifier.evaluation.evaluate import VALIDATION_SEED
from ds_classifier.guidance.gradient import classifier_gradient
from ds_classifier.loss import to_x_start
from ds_classifier.model import create_classifier
from ds_classifier.model.own import load_weights

SHOWN = 60  # characters of class names in the description of a Predictor


@dataclass(frozen=True)
class Predictor:
    """A trained classifier and the diffusion process that it was trained on.

    classifier: in eval mode, fp32; forward(x_t [N, C, S, S], timesteps [N]) -> logits [N, K] fp32,
        where x_0 is in [-1, 1] before noise.
    diffusion: has q_sample, alphas_cumprod, model_timesteps and num_timesteps, called T below.
    classes: names in the order of the logits; None for a bare file of weights.
    step: the training step of the weights; None for a bare file.
    path: the checkpoint or file that the weights were read from.
    arrays: what it was trained on, with the scale and shift of x_0; None: images.
    targets: the kind of its labels: one class, several classes, soft, or values in bins.
    """

    classifier: nn.Module
    diffusion: GaussianDiffusion
    settings: Settings
    classes: list[str] | None
    step: int | None
    path: Path
    arrays: Arrays | None = None
    targets: Targets = ONE_CLASS

    def __repr__(self) -> str:
        """Return the facts that a user of the classifier needs, one per line."""
        size, channels = self.settings.image_size, self.settings.in_channels
        names = "no names are recorded"
        if self.classes is not None:
            names = textwrap.shorten(", ".join(self.classes), SHOWN, placeholder=" ...")
        parameters = list(self.classifier.parameters())
        millions = sum(parameter.numel() for parameter in parameters) / 1e6
        dtype = str(parameters[0].dtype).removeprefix("torch.")
        step = "" if self.step is None else f", step {self.step:,}"
        shown = f"images   {size} x {size} pixels, {channels} channels"
        if self.arrays is not None:
            shown = f"arrays   {self.arrays}, x_0 = {self.arrays.scaling}"
        return (
            f"Predictor from {self.path}{step}\n"
            f"  {self.targets.nouns:7}  {self.settings.num_classes:,}: {names}\n"
            f"  targets  {self.targets}\n"
            f"  {shown}\n"
            f"  noise    {self.settings.noise_schedule}, t from 0 to "
            f"{self.diffusion.num_timesteps - 1}, log-SNR from {self.diffusion.log_snr[0]:.1f} to "
            f"{self.diffusion.log_snr[-1]:.1f}\n"
            f"  network  {millions:.2f} M parameters, {dtype}, on {self.device}"
        )

    @property
    def device(self) -> torch.device:
        """The device of the classifier."""
        return next(self.classifier.parameters()).device

    def read(self, images: str | Path | Image.Image | Iterable[str | Path | Image.Image]) -> Tensor:
        """Read images as validation does: resized and centre-cropped to S x S.

        images: paths and Pillow's images of any mode and size; one, or any number of them. As in
            training, they are not turned by their EXIF orientation.
        Returns [N, S, S, C] uint8. For a classifier of arrays it reads paths of .npy files, finite
        numbers of the kind that it was trained on, uint8 or floating: [N, C, S, S], as they are
        stored; float16 and float32 together, and float64, become float32.
        Raises ValueError for an image that does not decode or is neither a path nor Pillow's, with
        its place in `images`; OSError for a file that cannot be opened.
        """
        size, channels = self.settings.image_size, self.settings.in_channels
        pixels = []
        if self.arrays is not None:
            return self._read_arrays([images] if isinstance(images, _ONE) else images)
        for i, source in enumerate([images] if isinstance(images, _ONE) else images):
            if not isinstance(source, _ONE):
                raise ValueError(
                    f"images[{i}]: got {_tensor_of(source)[0]}; need a path or an image of Pillow"
                )
            try:
                with warnings.catch_warnings():  # Pillow warns of odd EXIF data
                    warnings.simplefilter("ignore")
                    if isinstance(source, Image.Image):
                        image = with_channels(source, channels)
                    else:
                        image = decode(Path(source).read_bytes(), channels)
                pixels.append(center_crop(image, size))
            except ValueError as error:
                raise ValueError(f"images[{i}], {source}: {error}") from None
        return torch.from_numpy(np.array(pixels, np.uint8).reshape(-1, size, size, channels))

    def _read_arrays(self, paths: Iterable[str | Path]) -> Tensor:
        """Read .npy files; see `read`."""
        arrays, found = self.arrays, []
        shape, kind = (arrays.channels, arrays.size, arrays.size), np.dtype(arrays.dtype).kind
        for i, path in enumerate(paths):
            if not isinstance(path, (str, Path)):
                raise ValueError(
                    f"images[{i}]: got {_tensor_of(path)[0]}; need the path of an .npy, since the "
                    f"classifier reads arrays of {arrays}; do: np.save them, or give values to "
                    "predict()"
                )
            try:
                values = channels_first(values_of(Path(path).read_bytes()))
                if values.shape != shape or values.dtype.kind != kind:
                    raise ValueError(
                        f"holds {described(values)}; need {arrays}; do: give arrays as they were "
                        "before conversion for training"
                    )
                arrays.x_0(values)
            except ValueError as error:
                raise ValueError(f"images[{i}], {path}: {error}") from None
            found.append(values)
        dtype = (
            np.result_type(*{values.dtype for values in found}) if found else np.dtype(arrays.dtype)
        )
        return torch.from_numpy(np.array(found, dtype).reshape(-1, *shape))

    def _x_start(self, images: Tensor) -> Tensor:
        """Return x_0 [N, S, S, C] fp32 of images, or of the values of arrays in that layout."""
        if self.arrays is None or self.arrays.pixels:
            return to_x_start(images)
        shift, scale = (
            torch.tensor(numbers, device=images.device)
            for numbers in (self.arrays.shift, self.arrays.scale)
        )
        return (images.float() - shift) * scale

    @torch.no_grad()
    def predict(
        self,
        images: Tensor | np.ndarray,
        t: int | Tensor | np.ndarray = 0,
        noise: Tensor | np.ndarray | None = None,
    ) -> Tensor:
        """Return p(y | x_t) for clean images noised to level t.

        images: [N, S, S, C] uint8. Of a classifier of arrays: their values, [N, C, S, S], of which
            this makes x_0 by the recorded shift and scale: uint8 if they are in training, else
            floating.
        t: whole, 0 (almost clean) to T - 1 (almost noise); one for all images, or [N].
        noise: standard normal, of the shape of images. None draws the noise of evaluation's
            positions 0 .. N - 1, which is the same at each call and level.
        Returns [N, K] fp32, on the classifier's device; nan where the logits are not finite. They
        are softmax probabilities, of bins if the targets are values; of the kind "classes", each
        is the probability of a class by itself (sigmoid).
        Raises ValueError for other shapes, types or levels.
        """
        shape = (self.settings.image_size, self.settings.image_size, self.settings.in_channels)
        floating = self.arrays is not None and self.arrays.dtype != "uint8"
        asked = shape if self.arrays is None else (shape[2], *shape[:2])
        got, images = _tensor_of(images)
        right = images is not None and images.shape[1:] == asked
        if not right or not (
            images.is_floating_point() if floating else images.dtype == torch.uint8
        ):
            kind = "floating" if floating else "torch.uint8"
            raise ValueError(
                f"images: got {got}; need [N, {', '.join(map(str, asked))}] {kind}; do: read them "
                "with read()"
            )
        count, device = len(images), self.device
        levels = self._levels(t, count)
        if noise is None:
            positions = torch.arange(count, device=device)
            noise = keyed_noise(VALIDATION_SEED, "validation", positions, shape)
            if self.arrays is not None:
                noise = noise.permute(0, 3, 1, 2)
        else:
            got, noise = _tensor_of(noise)
            if noise is None or not noise.is_floating_point() or noise.shape != images.shape:
                raise ValueError(f"noise: got {got}; need {list(images.shape)}, floating")
        if count == 0:  # the classifier's attention cannot reshape an empty batch
            return torch.empty(0, self.settings.num_classes, device=device)
        images, noise = images.to(device), noise.to(device).float()
        if self.arrays is not None:
            images, noise = images.permute(0, 2, 3, 1), noise.permute(0, 2, 3, 1)
        x_t = self.diffusion.q_sample(self._x_start(images), levels, noise)
        timesteps = self.diffusion.model_timesteps(levels)
        logits = self.classifier(x_t.permute(0, 3, 1, 2), timesteps)
        return logits.sigmoid() if self.targets.kind == "classes" else logits.softmax(dim=1)

    def gradient(
        self,
        x_t: Tensor | np.ndarray,
        t: int | Tensor | np.ndarray,
        y: float | Tensor | np.ndarray,
    ) -> Tensor:
        """Return the gradient of log p(y | x_t) with respect to x_t, which guidance adds.

        x_t: [N, C, S, S], noisy images of the process, `alpha x_0 + sigma noise` with x_0 in
            [-1, 1], or arrays that are scaled and shifted. For a sampler of another process, see
            `guidance.Guide`.
        t: the noise level of x_t, 0 to T - 1; one for all images, or [N].
        y: the classes to steer to, 0 to K - 1; one for all images, or [N]. Of the kind "classes"
            also several, [N, K]: 1 for those to steer to, 0 for those not asked for. Of values it
            is eta, in 1 / unit of the value: above 0 to larger values, below 0 to smaller ones
            (see `guidance.gradient`).
        Returns [N, C, S, S] fp32, on the classifier's device. It is guidance's classifier_gradient
        at scale 1, which also takes 16-bit classifiers and temperatures.
        Raises ValueError for other shapes, types, levels or classes.
        """
        got, x_t = _tensor_of(x_t)
        shape = (self.settings.in_channels, *[self.settings.image_size] * 2)
        if x_t is None or not x_t.is_floating_point() or x_t.shape[1:] != shape:
            raise ValueError(
                f"x_t: got {got}; need [N, {', '.join(map(str, shape))}], floating: images in "
                "[-1, 1], noised to level t"
            )
        count, x_t = len(x_t), x_t.to(self.device).float()
        levels = self._levels(t, count)
        asked = self._asked(y, count).to(self.device)
        if count == 0:  # see predict
            return torch.zeros_like(x_t)
        cond_fn = classifier_gradient(self.classifier, targets=self.targets)
        return cond_fn(x_t, self.diffusion.model_timesteps(levels), y=asked)

    def _asked(self, y: Any, count: int) -> Tensor:
        """Return what `gradient` is asked to steer `count` images to; [count] or [count, K]."""
        shape = (count, self.settings.num_classes)
        if self.targets.kind == "values":
            eta = _tensor_of(np.array(y) if isinstance(y, (int, float, list, tuple)) else y)[1]
            if eta is None or eta.shape not in ((), (count,)) or not eta.isfinite().all():
                raise ValueError(
                    f"y: got {_shown(y)}; need eta, a finite number, or one for each of {count} "
                    "images"
                )
            return eta.float().expand(count)
        if self.targets.kind == "classes" and np.ndim(y) == 2:
            several = y if torch.is_tensor(y) else torch.from_numpy(np.array(y, np.float32))
            if several.shape != shape or not ((several == 0) | (several == 1)).all():
                raise ValueError(
                    f"y: got {_shown(y)}; need a class, [N] classes, or {list(shape)} of 0 and 1"
                )
            return several
        return _whole_numbers("y", y, *shape, "the classes' numbers")

    def _levels(self, t: Any, count: int) -> Tensor:
        """Return the noise levels of `count` images, [count] int64, on the classifier's device."""
        levels = self.diffusion.num_timesteps
        return _whole_numbers("t", t, count, levels, "the process's noise levels").to(self.device)


_ONE = (str, Path, Image.Image)  # what Predictor.read takes as a single image


def _whole_numbers(name: str, value: Any, count: int, limit: int, what: str) -> Tensor:
    """Return an argument as numbers from 0 to limit - 1, one for each of `count` images, int64.

    name, what: of the argument, and of its numbers, for the message.
    Raises ValueError if it is neither such a number nor one per image.
    """
    listed = isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value)
    numbers = _tensor_of(np.array(value) if listed and value else value)[1]
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        numbers = torch.tensor(value if value in range(limit) else -1)  # int64 would overflow
    if (
        numbers is None
        or numbers.dtype == torch.bool
        or numbers.is_floating_point()
        or numbers.shape not in ((), (count,))
        or bool(((numbers.long() < 0) | (numbers.long() >= limit)).any())
    ):
        raise ValueError(
            f"{name}: got {_shown(value)}; need 0 to {limit - 1}, {what}, a whole number or one "
            f"for each of {count} images"
        )
    return numbers.long().expand(count)


def _shown(value: Any) -> str:
    """Return a value for a message; a tensor's repr may have several lines."""
    return " ".join(repr(value).split())


def _tensor_of(value: Any) -> tuple[str, Tensor | None]:
    """Return a description of a value, and the value as a tensor; None if it cannot be one."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "uif":
        value = torch.from_numpy(value.copy())  # torch takes no negative strides
    if not torch.is_tensor(value):
        return f"a {type(value).__name__}", None
    return f"{list(value.shape)} {value.dtype}", value


def load(
    path: str | Path, *, device: str | torch.device = "cpu", recipe: str = "", **settings: Any
) -> Predictor:
    """Load a classifier from a run (its newest checkpoint), a checkpoint, or a file of weights.

    path: the directory of a run, a checkpoint or an export, or a .pt or .safetensors file such as
        guided-diffusion's published ones.
    device: the device to put the classifier on.
    recipe, settings: settings of a bare file, by the names of the flags (noise_schedule="cosine").
        Its architecture is inferred from its tensors, its noise process is not. A run, a checkpoint
        and an export record their settings, which these may not contradict.
    A network that is built by a function of yours (--classifier) is loaded only if it is named
    here: load(path, classifier="package.module:factory").
    Raises ValueError if there is no classifier at path, if its weights are not finite, if settings
    contradict it, or if torch cannot use the device.
    """
    if recipe and recipe not in RECIPES:
        raise ValueError(f"recipe: got {recipe!r}; need one of {', '.join(RECIPES)}")
    _check_types(settings)
    _check_device(device)
    of_recipe = RECIPES.get(recipe, {})
    # How a recipe trains does not matter here, and an export does not even record all of it.
    used = Settings().model_kwargs() | Settings().diffusion_kwargs()
    given = {name: value for name, value in of_recipe.items() if name in used} | settings
    try:
        source, weights = open_weights(Path(path), given)
        classifier = create_classifier(**source.settings.model_kwargs())
        refuse_not_finite(weights, source.path, classifier)
        diffusion = create_gaussian_diffusion(**source.settings.diffusion_kwargs())
    except ValueError as error:
        if "--" not in str(error):
            raise
        raise ValueError(f"{error}; a flag --name is load(..., name=...)") from None
    if source.kind == "file" and "noise_schedule" not in given:
        note = f"{source.notes()[-1]}; if it is another: load(..., noise_schedule=...)"
        warnings.warn(note, stacklevel=2)
    if wrong := source.contradicted_by(given):
        name, of = wrong[0], "" if wrong[0] in settings else f" of recipe {recipe}"
        raise ValueError(
            f"got {name} {given[name]!r}{of}; need none for {path}, in which it is "
            f"{getattr(source.settings, name)!r}; do: drop it"
        )
    load_weights(classifier, weights)
    return Predictor(
        classifier.eval().requires_grad_(False).to(device),
        diffusion,
        source.settings,
        source.classes,
        source.step,
        source.path,
        None if source.arrays is None else Arrays.from_json(source.arrays),
        Targets.from_json(source.targets),
    )


def _check_types(settings: dict[str, Any]) -> None:
    """Raise ValueError for settings that do not exist or have another type."""
    kinds = get_type_hints(Settings)
    if unknown := sorted(settings.keys() - kinds.keys()):
        raise ValueError(f"load: got {', '.join(unknown)}; need names of train.py's flags")
    for name, value in settings.items():
        kind = int | float if kinds[name] is float else kinds[name]
        if not isinstance(value, kind):
            raise ValueError(
                f"{name}: got {value!r}; need {getattr(kind, '__name__', kind)}, like "
                f"{getattr(Settings(), name)!r}"
            )


def _check_device(device: str | torch.device) -> None:
    """Raise ValueError for a device that torch does not know or cannot find."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise ValueError(
            f"device: got {device}; need one that torch can use ({first_line(error)}); "
            "do: device='cpu'"
        ) from None
