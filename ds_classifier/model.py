"""The noise-aware classifier: the encoder half of a guided-diffusion UNet and a pooled head.

Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", section 4.1 and Table 12.
Parameter names and shapes are those of guided-diffusion's `EncoderUNetModel`, so that its published
classifiers load here unchanged, and ours load there.

Shapes: N images, C channels, H x W pixels, T = H*W tokens, E = 4 * width embedding, K classes.
Precision: weights may be fp32, bf16 or fp16. Timesteps are embedded in fp32; group norm and
softmax accumulate in fp32 inside their kernels; logits are fp32.
Layout: weights stay contiguous, since DeepSpeed flattens them. Activations run channels_last on
GPUs, for their convolutions, and contiguous on CPUs, where PyTorch's channels_last group norm has a
backward 4 to 25 times slower than the contiguous one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEAD_CHANNELS = 64  # channels of an attention head, fixed in the published classifiers
NORM_GROUPS = 32  # groups of every group norm, fixed there too

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")

# Width of each resolution level as a multiple of classifier_width; from 64 px on the reference's.
CHANNEL_MULT = {
    8: (1, 2),
    16: (1, 2, 4),
    32: (1, 2, 4),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def default_channel_mult(image_size: int) -> tuple[float, ...]:
    """Return the multipliers of the levels; an unlisted size has those of the next smaller one."""
    listed = [size for size in CHANNEL_MULT if size <= image_size]
    if not listed:
        raise ValueError(
            f"image_size: got {image_size}; need at least {min(CHANNEL_MULT)} pixels; "
            "do: enlarge the images, or give the levels with --classifier_channel_mult"
        )
    return CHANNEL_MULT[max(listed)]


def parse_channel_mult(text: str, image_size: int) -> tuple[float, ...]:
    """Return (1, 2, 4) for '1,2,4', and the default of the image size for ''; raise ValueError."""
    if not text:
        return default_channel_mult(image_size)
    try:
        mult = tuple(float(part) for part in text.split(","))
    except ValueError:
        mult = ()
    if not mult or min(mult) <= 0:
        raise ValueError(
            f"classifier_channel_mult: got {text!r}; need positive numbers separated by commas, "
            "one a resolution level; do: write it like 1,2,4"
        )
    return mult


def create_classifier(
    *,
    image_size: int,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    num_classes: int = 1000,
    in_channels: int = 3,
    classifier_channel_mult: str = "",
) -> EncoderUNetModel:
    """Build the classifier that the reference's flags of the same names describe.

    image_size: pixels of a side; a multiple of 2^(levels-1).
    classifier_width: channels at multiplier 1. classifier_depth: residual blocks per level.
    classifier_attention_resolutions: "32,16,8": attention where the feature map has that side.
    classifier_pool: how features become logits: attention, adaptive, spatial or spatial_v2.
    classifier_channel_mult: "1,2,4", a multiplier per level; "" means the default of the size.

    Returns a module: forward(x [N, in_channels, S, S] in [-1, 1], timesteps [N]) -> logits [N, K].
    Raises ValueError for values with which the architecture cannot be built.
    """
    mult = parse_channel_mult(classifier_channel_mult, image_size)
    channels = [int(m * classifier_width) for m in mult]
    try:
        resolutions = [int(part) for part in classifier_attention_resolutions.split(",") if part]
    except ValueError:
        raise ValueError(
            f"classifier_attention_resolutions: got {classifier_attention_resolutions!r}; need "
            "whole numbers separated by commas; do: write it like 32,16,8"
        ) from None
    attention_ds = {image_size // resolution for resolution in resolutions if resolution > 0}
    _check_architecture(
        image_size=image_size,
        channels=channels,
        attention_ds=attention_ds,
        depth=classifier_depth,
        pool=classifier_pool,
        num_classes=num_classes,
        in_channels=in_channels,
    )
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=in_channels,
        width=classifier_width,
        channels=channels,
        depth=classifier_depth,
        attention_ds=attention_ds,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
        num_classes=num_classes,
    )


def _check_architecture(
    *, image_size, channels, attention_ds, depth, pool, num_classes, in_channels
) -> None:
    levels = len(channels)
    factor = 2 ** (levels - 1)
    if image_size < factor or image_size % factor:
        below = image_size // factor * factor
        nearest = f"{below} or {below + factor}" if below else f"{factor}"
        raise ValueError(
            f"image_size: got {image_size}; need a multiple of {factor}, since {levels} levels "
            f"halve the image {levels - 1} times; do: use {nearest}, or give fewer levels with "
            "--classifier_channel_mult"
        )
    for width in channels:
        if width == 0 or width % NORM_GROUPS:
            raise ValueError(
                f"classifier_width: got {width} channels at a level; need a multiple of "
                f"{NORM_GROUPS}, the groups of its norms; do: change --classifier_width or "
                "--classifier_channel_mult"
            )
    attended = {channels[-1]}
    attended |= {width for level, width in enumerate(channels) if 2**level in attention_ds}
    for width in sorted(attended):
        if width % HEAD_CHANNELS:
            raise ValueError(
                f"classifier_attention_resolutions: got attention over {width} channels; need a "
                f"multiple of {HEAD_CHANNELS}, the channels of a head; do: attend at deeper levels "
                "only, or widen the model"
            )
    if depth < 1:
        raise ValueError(
            f"classifier_depth: got {depth}; need at least 1 block per level; do: use 2"
        )
    if pool not in POOLS:
        raise ValueError(f"classifier_pool: got {pool!r}; need one of {', '.join(POOLS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes: got {num_classes}; need at least 2 classes")
    if not 1 <= in_channels <= 4:
        raise ValueError(f"in_channels: got {in_channels}; need 1 to 4")


class GroupNorm(nn.GroupNorm):
    """A group norm of 32 groups; its kernels accumulate in fp32 in every precision."""

    def __init__(self, channels: int):
        super().__init__(NORM_GROUPS, channels)


class Conv2d(nn.Conv2d):
    """A convolution whose output has the memory format of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16 and x.device.type == "cpu":
            # The fp16 convolution backward of CPU libraries is 80 times slower than fp32. Only this
            # operation is computed in fp32 there; everything else stays fp16.
            weight, bias = self.weight.float(), self.bias.float()
            return F.conv2d(x.float(), weight, bias, self.stride, self.padding).half()
        return super().forward(x)


def zero_init(module: nn.Module) -> nn.Module:
    """Start a residual branch at zero, so that a fresh block passes its input through."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def tokens(x: Tensor) -> Tensor:
    """Return [N, C, H, W] as tokens [N, T, C]; a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def project(x: Tensor, layer: nn.Conv1d) -> Tensor:
    """Apply the reference's 1x1 Conv1d to tokens [..., C] -> [..., C'] as a matrix product."""
    return F.linear(x, layer.weight[:, :, 0], layer.bias)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Return the sinusoidal embedding of timesteps [N], [N, dim] fp32 (Vaswani et al. 2017, 3.5).

    Cosines first, then sines; timesteps may be fractional.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponent)[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def double(x: Tensor) -> Tensor:
    """Repeat every pixel as a square of four: [N, C, H, W] -> [N, C, 2H, 2W]."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


class ResBlock(nn.Module):
    """A residual block: norm, SiLU, conv; norm, scaled and shifted by the timestep; SiLU, conv."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        *,
        use_scale_shift_norm: bool,
        down: bool = False,
        up: bool = False,
    ):
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.down, self.up = down, up
        self.in_layers = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), Conv2d(channels, out_channels, 3, padding=1)
        )
        emb_outputs = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_outputs))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Identity(),  # the reference's dropout, always 0 in its classifiers
            zero_init(Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # [N, C, H, W], [N, E] -> [N, C', H', W']
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        if self.up:
            h, x = double(h), double(x)
        h = conv(h)
        emb = self.emb_layers(emb)[:, :, None, None]
        norm, act, _, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h + emb)
        return self.skip_connection(x) + conv(act(h))


class Downsample(nn.Module):
    """A strided convolution between levels, if the residual blocks do not halve."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class AttentionBlock(nn.Module):
    """A self-attention over the pixels of a feature map, added to it.

    new_order: of the qkv layer's outputs; q, k, v are split before the heads, else after them.
    """

    def __init__(
        self, channels: int, *, head_channels: int = HEAD_CHANNELS, new_order: bool = False
    ):
        super().__init__()
        self.num_heads, self.new_order = channels // head_channels, new_order
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        n, c, height, width = x.shape
        qkv = project(tokens(self.norm(x)), self.qkv)  # [N, T, heads * 3 * c/heads]
        if self.new_order:
            qkv = qkv.view(n, height * width, 3, self.num_heads, -1).transpose(2, 3)
        else:  # the "legacy order" of the reference's classifiers: q, k, v of a head are adjacent
            qkv = qkv.view(n, height * width, self.num_heads, 3, -1)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [N, heads, T, c/heads]
        h = F.scaled_dot_product_attention(q, k, v)
        h = project(h.transpose(1, 2).reshape(n, height * width, c), self.proj_out)
        return x + h.view(n, height, width, c).permute(0, 3, 1, 2)


class AttentionPool2d(nn.Module):
    """An attention pool as in CLIP: the mean token is the query. [N, C, H, W] -> [N, K]."""

    def __init__(self, side: int, channels: int, num_classes: int):
        super().__init__()
        self.num_heads = channels // HEAD_CHANNELS
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        x = tokens(x)  # [N, T, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # [N, 1 + T, C]
        x = x + self.positional_embedding.t()[None]
        weight, bias = self.qkv_proj.weight[:, :, 0], self.qkv_proj.bias
        # Only the output of the mean token is used, so only its query is computed.
        q = F.linear(x[:, :1], weight[:c], bias[:c]).view(n, 1, self.num_heads, HEAD_CHANNELS)
        kv = F.linear(x, weight[c:], bias[c:]).view(n, -1, 2, self.num_heads, HEAD_CHANNELS)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each [N, heads, 1 + T, 64]
        pooled = F.scaled_dot_product_attention(q.transpose(1, 2), k, v)  # [N, heads, 1, 64]
        return project(pooled.reshape(n, c), self.c_proj)


class TimestepSequential(nn.Sequential):
    """A sequence that passes the timestep embedding to the layers that take it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class EncoderUNetModel(nn.Module):
    """The classifier p(y | x_t, t).

    forward(x [N, C, S, S] in [-1, 1], timesteps [N]) -> logits [N, K] fp32.

    activation_checkpointing: an attribute; if set, the backward computes the inside of each block
    again from its input (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        width: int,
        channels: Sequence[int],
        depth: int,
        attention_ds: set[int],
        use_scale_shift_norm: bool,
        resblock_updown: bool,
        pool: str,
        num_classes: int,
    ):
        super().__init__()
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.width, self.pool = width, pool
        self.activation_checkpointing = False
        emb_channels = 4 * width

        def block(c: int, out: int, down: bool = False) -> ResBlock:
            return ResBlock(
                c, emb_channels, out, use_scale_shift_norm=use_scale_shift_norm, down=down
            )

        self.time_embed = nn.Sequential(
            nn.Linear(width, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        c = channels[0]
        self.input_blocks = nn.ModuleList(
            [TimestepSequential(Conv2d(in_channels, c, 3, padding=1))]
        )
        features = c  # the sum of the channels of all blocks' outputs, which the spatial pools read
        for level, level_channels in enumerate(channels):
            for _ in range(depth):
                layers: list[nn.Module] = [block(c, level_channels)]
                c = level_channels
                if 2**level in attention_ds:
                    layers.append(AttentionBlock(c))
                self.input_blocks.append(TimestepSequential(*layers))
                features += c
            if level < len(channels) - 1:
                halve = block(c, c, down=True) if resblock_updown else Downsample(c)
                self.input_blocks.append(TimestepSequential(halve))
                features += c
        self.middle_block = TimestepSequential(block(c, c), AttentionBlock(c), block(c, c))
        features += c
        side = image_size // 2 ** (len(channels) - 1)
        self.out = self._head(pool, c, features, side, num_classes)

    @staticmethod
    def _head(pool: str, c: int, features: int, side: int, num_classes: int) -> nn.Sequential:
        if pool == "attention":
            return nn.Sequential(GroupNorm(c), nn.SiLU(), AttentionPool2d(side, c, num_classes))
        if pool == "adaptive":
            conv = zero_init(Conv2d(c, num_classes, 1))
            mean = nn.AdaptiveAvgPool2d((1, 1))
            return nn.Sequential(GroupNorm(c), nn.SiLU(), mean, conv, nn.Flatten())
        if pool == "spatial":
            return nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, num_classes))
        assert pool == "spatial_v2", pool
        return nn.Sequential(
            nn.Linear(features, 2048), GroupNorm(2048), nn.SiLU(), nn.Linear(2048, num_classes)
        )

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.width).to(dtype))  # [N, E]
        layout = torch.channels_last if x.is_cuda else torch.contiguous_format
        h = x.to(dtype).contiguous(memory_format=layout)
        pooled = []  # spatial pools: the mean of every block's feature map
        for module in (*self.input_blocks, self.middle_block):
            if self.activation_checkpointing and torch.is_grad_enabled():
                h = checkpoint(module, h, emb, use_reentrant=False, preserve_rng_state=False)
            else:
                h = module(h, emb)
            if self.pool.startswith("spatial"):
                pooled.append(h.mean(dim=(2, 3)))
        return self.out(torch.cat(pooled, dim=1) if pooled else h).float()
