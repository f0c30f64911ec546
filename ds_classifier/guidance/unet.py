"""guided-diffusion's UNet, which predicts the noise in x_t and its variance, to sample from.

Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", section 3. Parameter names
and shapes are those of guided-diffusion's `UNetModel`, so that its published models of all sizes
load here unchanged. Its first half is built from the classifier's blocks (`model.encoder`). Dropout
is left out, as it does nothing in sampling.

Shapes: N images, C channels, S x S pixels, E = 4 * width numbers in an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_classifier.checkpoint.fitting import misfit
from ds_classifier.checkpoint.weights import read_weights, refuse_not_finite
from ds_classifier.model.encoder import (
    NORM_GROUPS,
    AttentionBlock,
    Conv2d,
    Downsample,
    GroupNorm,
    ResBlock,
    TimestepSequential,
    default_channel_mult,
    double,
    timestep_embedding,
    zero_init,
)


def create_unet(
    *,
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    class_cond: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_new_attention_order: bool,
    learn_sigma: bool,
    num_classes: int = 1000,
    in_channels: int = 3,
) -> UNetModel:
    """Build the UNet that the reference's flags of the same names describe.

    num_channels: channels at multiplier 1.
    num_res_blocks: residual blocks per level in the first half; one more in the second.
    channel_mult: a multiplier per level, like "1,2,3,4"; "" means the default of the image size.
    num_heads: heads per attention in the first half; num_heads_upsample in the second (-1 means
        num_heads). Both are ignored unless num_head_channels, the channels per head, is -1.
    class_cond: the UNet takes the class, one of num_classes, as input.
    learn_sigma: the UNet also predicts the variance.

    Returns a module: forward(x [N, C, S, S], timesteps [N], y [N] or None) -> [N, C or 2C, S, S].
    Raises ValueError for values that the architecture cannot be built with.
    """
    try:
        mult = (
            tuple(int(part) for part in channel_mult.split(","))
            if channel_mult
            else default_channel_mult(image_size)
        )
        sides = [int(part) for part in attention_resolutions.split(",") if part]
    except ValueError as error:
        raise ValueError(
            f"channel_mult {channel_mult!r}, attention_resolutions {attention_resolutions!r}, "
            f"image_size {image_size}: {error}"
        ) from None
    factor = 2 ** (len(mult) - 1)
    if image_size < 1 or image_size % factor:
        raise ValueError(
            f"image_size: got {image_size}; need a multiple of {factor} for {len(mult)} levels"
        )
    if num_res_blocks < 1:
        raise ValueError(f"num_res_blocks: got {num_res_blocks}; need at least 1")
    channels = [int(m * num_channels) for m in mult]
    heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
    attention_ds = {image_size // side for side in sides if side > 0}
    attended = {c for level, c in enumerate(channels) if 2**level in attention_ds}
    for c in channels:
        if c < 1 or c % NORM_GROUPS:
            raise ValueError(
                f"num_channels: got {c} at a level; need a multiple of {NORM_GROUPS}, not 0"
            )
    divisors = [num_heads, heads_up] if num_head_channels == -1 else [num_head_channels]
    for c in attended | {channels[-1]}:
        if any(divisor < 1 or c % divisor for divisor in divisors):
            raise ValueError(
                f"num_heads, num_heads_upsample, num_head_channels: got {num_heads}, {heads_up}, "
                f"{num_head_channels}; need divisors of {c}, the channels of a level with attention"
            )
    return UNetModel(
        in_channels=in_channels,
        out_channels=2 * in_channels if learn_sigma else in_channels,
        width=num_channels,
        channels=channels,
        depth=num_res_blocks,
        attention_ds=attention_ds,
        heads=(num_heads, heads_up),
        head_channels=None if num_head_channels == -1 else num_head_channels,
        new_order=use_new_attention_order,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        num_classes=num_classes if class_cond else None,
    )


def load_unet(
    path: Path,
    *,
    fp16: bool = False,
    device: torch.device | str = "cpu",
    **architecture: Any,
) -> UNetModel:
    """Load a UNet from guided-diffusion's file, in eval mode, parameters without gradients.

    fp16: compute its blocks in fp16. architecture: see `create_unet`.
    Raises ValueError if the file was written by a UNet of another architecture, or if its weights
    are not finite.
    """
    unet, weights = create_unet(**architecture), read_weights(path)
    try:
        unet.load_state_dict(weights)
    except RuntimeError:
        fault = misfit(weights, unet.state_dict(), "guided-diffusion's UNetModel")
        raise ValueError(
            f"--model_path: got {path}, {fault}; if it was built with other flags, do: give its "
            "MODEL_FLAGS"
        ) from None
    refuse_not_finite(weights, path)
    unet.to(device).eval().requires_grad_(False)
    if fp16:
        unet.set_precision(torch.float16)
    return unet


class Upsample(nn.Module):
    """A doubling of the side and a convolution, between levels without resblock_updown."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return an image of twice the side: [N, C, S, S] -> [N, C, 2S, 2S]."""
        return self.conv(double(x))


class UNetModel(nn.Module):
    """The UNet. Use `create_unet` to build it.

    width: channels of the timestep embedding before its layers.
    channels: channels of each level. depth: residual blocks per level.
    attention_ds: the factors of downsampling at which there is attention.
    heads: heads per attention in the first and the second half, unless head_channels is given.
    new_order: the layout of queries, keys and values (the reference's use_new_attention_order).
    num_classes: None for a UNet that does not take the class.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        width: int,
        channels: Sequence[int],
        depth: int,
        attention_ds: set[int],
        heads: tuple[int, int],
        head_channels: int | None,
        new_order: bool,
        use_scale_shift_norm: bool,
        resblock_updown: bool,
        num_classes: int | None,
    ):
        super().__init__()
        self.width, self.num_classes = width, num_classes
        emb_channels = 4 * width

        def block(c: int, out: int, *, down: bool = False, up: bool = False) -> ResBlock:
            """Return a residual block that may halve or double the side."""
            return ResBlock(
                c, emb_channels, out, use_scale_shift_norm=use_scale_shift_norm, down=down, up=up
            )

        def attention(c: int, heads: int) -> AttentionBlock:
            """Return an attention block for c channels."""
            return AttentionBlock(c, head_channels=head_channels or c // heads, new_order=new_order)

        self.time_embed = nn.Sequential(
            nn.Linear(width, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)
        c = channels[0]
        self.input_blocks = nn.ModuleList(
            [TimestepSequential(Conv2d(in_channels, c, 3, padding=1))]
        )
        kept = [c]  # channels of each block's output; the second half reads them, last first
        for level, level_channels in enumerate(channels):
            for _ in range(depth):
                layers: list[nn.Module] = [block(c, level_channels)]
                c = level_channels
                if 2**level in attention_ds:
                    layers.append(attention(c, heads[0]))
                self.input_blocks.append(TimestepSequential(*layers))
                kept.append(c)
            if level < len(channels) - 1:
                halve = block(c, c, down=True) if resblock_updown else Downsample(c)
                self.input_blocks.append(TimestepSequential(halve))
                kept.append(c)
        self.middle_block = TimestepSequential(block(c, c), attention(c, heads[0]), block(c, c))
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(channels))):
            for i in range(depth + 1):
                layers = [block(c + kept.pop(), channels[level])]
                c = channels[level]
                if 2**level in attention_ds:
                    layers.append(attention(c, heads[1]))
                if level > 0 and i == depth:
                    layers.append(block(c, c, up=True) if resblock_updown else Upsample(c))
                self.output_blocks.append(TimestepSequential(*layers))
        self.out = nn.Sequential(
            GroupNorm(c), nn.SiLU(), zero_init(Conv2d(c, out_channels, 3, padding=1))
        )

    def set_precision(self, dtype: torch.dtype) -> None:
        """Compute the blocks in fp16 or bf16; embeddings and the last layers stay in fp32."""
        for blocks in (self.input_blocks, self.middle_block, self.output_blocks):
            blocks.to(dtype)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise in x, and its variance if that was learned.

        x [N, C, S, S]; timesteps [N]; y [N] int64, or None if the UNet does not take the class.
        Returns [N, C, S, S] or, with the variance, [N, 2C, S, S] fp32.
        """
        emb = self.time_embed(timestep_embedding(timesteps, self.width))  # [N, E] fp32
        if self.num_classes is not None:
            emb = emb + self.label_emb(y)
        dtype = self.input_blocks[0][0].weight.dtype
        emb = emb.to(dtype)
        h = x.to(dtype).contiguous()  # see "Layout" in model.encoder
        kept = []
        for module in self.input_blocks:
            h = module(h, emb)
            kept.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, kept.pop()], dim=1), emb)
        return self.out(h.float())
