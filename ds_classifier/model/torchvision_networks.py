"""torchvision's classification networks, made noise-aware: `--classifier torchvision:NAME`.

The timestep scales and shifts the output of each norm, h (1 + scale) + shift per channel, as in
Dhariwal & Nichol 2021, section 3.1 (adaptive group normalization). The layer that makes them from
the timestep is zero at the start, so that a network with torchvision's weights begins as what it
is. Images in [-1, 1] are brought to torchvision's normalisation inside.

Names: `network.` before torchvision's own, `time_embed.` and `scale_shift.` for the timestep.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ds_classifier.common.text import first_line
from ds_classifier.model.encoder import timestep_embedding

PREFIX = "torchvision:"
EMBEDDING = 128  # numbers of the embedding of a timestep
# Mean and standard deviation of ImageNet's pixels in 0 .. 1, by which all its weights normalise.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# These expect [-1, 1]: their weights undo that normalisation (transform_input).
OF_PLUS_MINUS_ONE = ("inception_v3", "googlenet")


def is_torchvision(classifier: str) -> bool:
    """Return whether a --classifier names one of torchvision's networks."""
    return classifier.startswith(PREFIX)


def create(
    classifier: str,
    arguments: dict[str, Any],
    *,
    num_classes: int,
    image_size: int,
    in_channels: int,
) -> TimedNetwork:
    """Build one of torchvision's networks with random weights.

    classifier: "torchvision:NAME". arguments: keywords of torchvision's function.
    in_channels: other than 3 gives a new first convolution.
    Raises ValueError for a name that torchvision does not have, arguments or sizes that it does not
    take, and a network without norms.
    """
    name = check_name(classifier)
    from torchvision import models

    sized: dict[str, Any] = {}
    if name.startswith("vit_"):
        sized["image_size"] = image_size
    elif name.startswith("maxvit_"):
        sized["input_size"] = (image_size, image_size)
    elif name in OF_PLUS_MINUS_ONE:
        sized |= {"aux_logits": False, "init_weights": True}
    try:
        network = models.get_model(
            name, weights=None, **{"num_classes": num_classes} | sized | arguments
        )
    except Exception as error:  # torchvision asserts, and fails by chance, for a wrong size
        given = ", ".join(
            [f"image_size {image_size}", *(f"{k} {v!r}" for k, v in arguments.items())]
        )
        raise ValueError(
            f"--classifier: got {classifier} for {given}, which torchvision cannot build "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    norms = norms_of(network)
    if not norms:
        with_norms = f"{name}_bn" if name.startswith("vgg") else "resnet18"
        raise ValueError(
            f"--classifier: got {classifier}, which has no norms for the timestep to scale and "
            f"shift; do: {PREFIX}{with_norms}"
        )
    if in_channels != 3:
        _replace_first_convolution(network, in_channels)
    return TimedNetwork(
        network, norms, normalised=in_channels == 3 and name not in OF_PLUS_MINUS_ONE
    )


def check_name(classifier: str) -> str:
    """Return the NAME of "torchvision:NAME"; raise ValueError if torchvision does not have it."""
    from torchvision import models

    name, names = classifier.removeprefix(PREFIX), models.list_models(module=models)
    if name not in names:
        raise ValueError(
            f"--classifier: got {classifier}; need one of torchvision's classification networks: "
            f"{', '.join(names)}"
        )
    return name


def norms_of(network: nn.Module) -> list[nn.Module]:
    """Return the norms that the timestep scales and shifts, in the order of their names."""
    return [
        m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm)
    ]


def _replace_first_convolution(network: nn.Module, in_channels: int) -> None:
    """Put a convolution of other images in place of the first one."""
    name, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    parent, _, own = name.rpartition(".")
    kept = inspect.signature(nn.Conv2d).parameters.keys() & vars(first).keys()
    options = {key: getattr(first, key) for key in kept - {"in_channels", "bias"}}
    replaced = nn.Conv2d(in_channels, bias=first.bias is not None, **options)
    setattr(network.get_submodule(parent), own, replaced)


class TimedNetwork(nn.Module):
    """A network whose norms are scaled and shifted by the timestep.

    norms: layers of it, which return [N, C, H, W] or, layer norms, [N, ..., C].
    normalised: whether it takes images as torchvision normalises them, or in [-1, 1].
    """

    def __init__(self, network: nn.Module, norms: list[nn.Module], *, normalised: bool):
        super().__init__()
        self.time_embed = nn.Sequential(
            nn.Linear(EMBEDDING, EMBEDDING),
            nn.SiLU(),
            nn.Linear(EMBEDDING, EMBEDDING),
            nn.SiLU(),
        )
        self.scale_shift = nn.ModuleList(nn.Linear(EMBEDDING, 2 * _channels(m)) for m in norms)
        for layer in self.scale_shift:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.network = network  # last, so that the last layer of all is its head
        self.normalised = normalised
        if normalised:
            # x / 2 + 1 / 2 is in 0 .. 1; then (x - MEAN) / STD.
            mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
            self.register_buffer("input_scale", 0.5 / std, persistent=False)
            self.register_buffer("input_shift", (0.5 - mean) / std, persistent=False)
        self._of_batch: list[Tensor] = []  # scale and shift of each norm, [N, 2C]
        for number, norm in enumerate(norms):
            norm.register_forward_hook(self._hook(number, channels_last=_is_channels_last(norm)))

    def _hook(self, number: int, *, channels_last: bool) -> Any:
        """Return the hook that scales and shifts what a norm returns."""

        def modulate(module: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
            both = self._of_batch[number]
            ones = (1,) * (h.dim() - 2)
            shape = (len(both), *ones, -1) if channels_last else (len(both), -1, *ones)
            scale, shift = (part.reshape(shape) for part in both.chunk(2, dim=1))
            return h * (1 + scale) + shift

        return modulate

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        embedding = timestep_embedding(timesteps, EMBEDDING).to(x.dtype)
        embedding = self.time_embed(embedding)
        self._of_batch = [layer(embedding) for layer in self.scale_shift]
        try:
            return self.network(x * self.input_scale + self.input_shift if self.normalised else x)
        finally:
            self._of_batch = []  # else the graph of the last step would be kept


def _channels(norm: nn.Module) -> int:
    """Return the number of channels of a norm."""
    if isinstance(norm, nn.LayerNorm):
        return norm.normalized_shape[0]
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features


def _is_channels_last(norm: nn.Module) -> bool:
    """Return whether a norm returns [N, ..., C]."""
    from torchvision.models.convnext import LayerNorm2d

    return isinstance(norm, nn.LayerNorm) and not isinstance(norm, LayerNorm2d)


def download(classifier: str) -> dict[str, Tensor]:
    """Download torchvision's default weights of a network, on the CPU.

    Raises ValueError if there are none, or if they cannot be downloaded.
    """
    from torchvision import models

    name = check_name(classifier)
    weights = models.get_model_weights(name).DEFAULT
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:  # RuntimeError: of another hash
        raise ValueError(
            f"got torchvision, whose weights of {name} cannot be downloaded "
            f"({type(error).__name__}: {first_line(error)}); do: bring {weights.url} here, and "
            "give the file"
        ) from None


def as_timed(
    weights: dict[str, Tensor], own: dict[str, Tensor], image_size: int
) -> dict[str, Tensor]:
    """Return torchvision's weights of a plain network under the names of a `TimedNetwork`.

    own: the state dict of that network; what torchvision's weights lack keeps its values there.
    Weights of another kind are returned unchanged, for another check to name the fault.
    A ViT's positional embedding for another image size is interpolated. Auxiliary heads, which only
    train, are left out.
    """
    names = {f"network.{name}" for name in weights}
    plain = {name for name in own if name.startswith("network.")}
    if not plain <= names:
        return weights
    weights = {f"network.{name}": value for name, value in weights.items()}
    timed = {name: value for name, value in own.items() if name not in plain}
    extra = {n for n in names - plain if not n.lower().startswith("network.aux")}
    position = "network.encoder.pos_embedding"
    if position in plain and weights[position].shape != own[position].shape:
        from torchvision.models.vision_transformer import interpolate_embeddings

        patch = own["network.conv_proj.weight"].shape[-1]
        resized = interpolate_embeddings(
            image_size, patch, {"encoder.pos_embedding": weights[position]}
        )
        weights[position] = resized["encoder.pos_embedding"]
    return timed | {name: weights[name] for name in (*plain, *extra)}
