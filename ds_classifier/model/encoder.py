"""The noise-aware classifier: the encoder half of a guided-diffusion UNet and a pooled head.

Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", section 4.1 and Table 12.
Parameter names and shapes are those of guided-diffusion's `EncoderUNetModel`, so that its published
classifiers load here unchanged, and classifiers trained here load there.

Shapes: N images, C channels, H x W pixels, T = H*W tokens, E = 4 * width embedding, K classes.
Precision: weights may be fp32, bf16 or fp16. Timesteps are embedded in fp32; group norm and
softmax accumulate in fp32 inside their kernels; logits are returned in fp32.
Layout: weights are contiguous, since DeepSpeed flattens them, and so are activations. On GPUs,
PyTorch's group norm copies a channels_last input and returns a contiguous output
(native_group_norm in aten/src/ATen/native/group_norm.cpp), so that channels_last would cost a copy
at each norm and mix two layouts in each sum. On CPUs, the backward of its channels_last group norm
is 4 to 25 times slower than that of the contiguous one. A compiled model chooses the layouts inside
it by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEAD_CHANNELS = 64  # channels of an attention head, fixed in the published classifiers
NORM_GROUPS = 32  # groups of each group norm, fixed in the published classifiers

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")

# Width of each resolution level as a multiple of classifier_width, by image size. The entries from
# 64 on are the reference's.
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
    """Return the level widths for an image size; those of the next smaller size if not listed.

    Raises ValueError below the smallest listed size.
    """
    listed = [size for size in CHANNEL_MULT if size <= image_size]
    if not listed:
        raise ValueError(
            f"image_size: got {image_size}; need at least {min(CHANNEL_MULT)} pixels; "
            "do: enlarge the images, or give the levels with --classifier_channel_mult"
        )
    return CHANNEL_MULT[max(listed)]


def parse_channel_mult(text: str, image_size: int) -> tuple[float, ...]:
    """Parse "1,2,4" to (1, 2, 4), and "" to the default of the image size."""
    if not text:
        return default_channel_mult(image_size)
    try:
        mult = tuple(float(part) for part in text.split(","))
    except ValueError:
        mult = ()
    if not mult or min(mult) <= 0:
        raise ValueError(
            f"classifier_channel_mult: got {text!r}; need positive numbers separated by commas, "
            "one per resolution level; do: write it like 1,2,4"
        )
    return mult


def create_encoder(
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
    """Build the encoder from the reference's flags of the same names.

    image_size: side in pixels; a multiple of 2^(levels-1).
    classifier_width: channels at multiplier 1.
    classifier_depth: residual blocks per level.
    classifier_attention_resolutions: "32,16,8" adds attention to feature maps with these sides.
    classifier_use_scale_shift_norm: apply the timestep as scale and shift, not as a shift alone.
    classifier_resblock_updown: halve with residual blocks, not with strided convolutions.
    classifier_pool: the head: attention, adaptive, spatial or spatial_v2.
    num_classes: K. in_channels: C of the images or arrays, 1 or more.
    classifier_channel_mult: "1,2,4", one multiplier per level; "" for the default of the size.

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
    """Raise ValueError for values with which the architecture cannot be built."""
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
                f"{NORM_GROUPS}, the groups of each norm; do: change --classifier_width or "
                "--classifier_channel_mult"
            )
    attended = {channels[-1]}
    attended |= {width for level, width in enumerate(channels) if 2**level in attention_ds}
    for width in sorted(attended):
        if width % HEAD_CHANNELS:
            raise ValueError(
                f"classifier_attention_resolutions: got attention over {width} channels; need a "
                f"multiple of {HEAD_CHANNELS}, the channels of a head; do: use attention at deeper "
                "levels only, or a wider model"
            )
    if depth < 1:
        raise ValueError(
            f"classifier_depth: got {depth}; need at least 1 block per level; do: use 2"
        )
    if pool not in POOLS:
        raise ValueError(f"classifier_pool: got {pool!r}; need one of {', '.join(POOLS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes: got {num_classes}; need at least 2 classes")
    if in_channels < 1:
        raise ValueError(f"in_channels: got {in_channels}; need 1 or more")


class GroupNorm(nn.GroupNorm):
    """A group norm with 32 groups; its kernels accumulate in fp32 for weights of any precision."""

    def __init__(self, channels: int):
        super().__init__(NORM_GROUPS, channels)


class Conv2d(nn.Conv2d):
    """A convolution whose output has the memory format of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16 and x.device.type == "cpu":
            # The backward of an fp16 convolution on CPUs is 80 times slower than that of an fp32
            # one. So this operation is computed in fp32; all others stay in fp16.
            weight, bias = self.weight.float(), self.bias.float()
            return F.conv2d(x.float(), weight, bias, self.stride, self.padding).half()
        return super().forward(x)


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters to zero, so that a new residual block returns its input."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def tokens(x: Tensor) -> Tensor:
    """Turn [N, C, H, W] into [N, T, C]; a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def project(x: Tensor, layer: nn.Conv1d) -> Tensor:
    """Apply the reference's 1x1 Conv1d to tokens [..., C] -> [..., C'] as a matrix product."""
    return F.linear(x, layer.weight[:, :, 0], layer.bias)


def needs_gradient(module: nn.Module, *inputs: Tensor) -> bool:
    """Return whether a module's output depends on anything that is trained."""
    return any(tensor.requires_grad for tensor in (*inputs, *module.parameters()))


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Compute the sinusoidal embedding of timesteps [N]: [N, dim] fp32.

    Vaswani et al. 2017, "Attention Is All You Need", section 3.5. The first half are cosines, the
    second half sines. Timesteps may be fractional.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponent)[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def double(x: Tensor) -> Tensor:
    """Repeat each pixel twice along both sides: [N, C, H, W] -> [N, C, 2H, 2W]."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


class ResBlock(nn.Module):
    """A residual block: norm, SiLU, conv; norm, timestep, SiLU, conv; plus the input.

    use_scale_shift_norm: the timestep scales and shifts the second norm's output; if False, it is
        added before that norm.
    down, up: halve or double the sides before the first conv.
    """

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
            nn.Identity(),  # in place of the reference's dropout, which is 0 in its classifiers
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
    """A strided convolution between levels, used if the residual blocks do not halve."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class AttentionBlock(nn.Module):
    """A self-attention over the pixels of a feature map, added to it.

    new_order: the order of the qkv layer's outputs. True: q of all heads, k of all heads, v of all
        heads. False, as in the reference's classifiers: q, k, v of the first head, and so on.
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
        else:  # the reference's "legacy order"
            qkv = qkv.view(n, height * width, self.num_heads, 3, -1)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [N, heads, T, c/heads]
        h = F.scaled_dot_product_attention(q, k, v)
        h = project(h.transpose(1, 2).reshape(n, height * width, c), self.proj_out)
        return x + h.view(n, height, width, c).permute(0, 3, 1, 2)


class AttentionPool2d(nn.Module):
    """A pooling by attention, as in CLIP: [N, C, H, W] -> [N, K].

    The mean of all tokens is the only query; keys and values come from the mean and all tokens.
    """

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
        # Only the output at the mean token is used, so only its query is computed.
        q = F.linear(x[:, 0], weight[:c], bias[:c]).view(n, 1, self.num_heads, HEAD_CHANNELS)
        kv = F.linear(x, weight[c:], bias[c:]).view(n, -1, 2, self.num_heads, HEAD_CHANNELS)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each [N, heads, 1 + T, 64]
        pooled = F.scaled_dot_product_attention(q.transpose(1, 2), k, v)  # [N, heads, 1, 64]
        return project(pooled.reshape(n, c), self.c_proj)


class TimestepSequential(nn.Sequential):
    """A block of layers; passes the timestep embedding to the residual blocks among them."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class EncoderUNetModel(nn.Module):
    """The classifier p(y | x_t, t).

    forward(x [N, C, S, S] in [-1, 1], timesteps [N]) -> logits [N, K] fp32; it raises ValueError
        for x of another size or other channels.
    activation_checkpointing: an attribute, False by default. If True, the backward computes the
        inside of each block again from its input (Chen et al. 2016, "Training Deep Nets with
        Sublinear Memory Cost").
    memory_format: an attribute; the layout in which activations enter the first block.
    """

    memory_format = torch.contiguous_format

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
        features = c  # sum of the channels of all blocks' outputs, the input of the spatial pools
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

    def __str__(self) -> str:
        """Return one line; `repr` is torch's, with one for each of some hundred layers."""
        millions = sum(parameter.numel() for parameter in self.parameters()) / 1e6
        return (
            f"{type(self).__name__}({self.image_size} px, {self.in_channels} channels, "
            f"{self.num_classes} classes, {millions:.2f} M parameters)"
        )

    @staticmethod
    def _head(pool: str, c: int, features: int, side: int, num_classes: int) -> nn.Sequential:
        """Build the head that turns features into logits."""
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
        if x.shape[1:] != (self.in_channels, self.image_size, self.image_size):
            raise ValueError(
                f"x: got {list(x.shape)}; need [N, {self.in_channels}, {self.image_size}, "
                f"{self.image_size}], which this classifier was built for"
            )
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.width).to(dtype))  # [N, E]
        h = x.to(dtype).contiguous(memory_format=self.memory_format)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        pooled = []  # for the spatial pools: the mean of each block's feature map, [N, C]
        for module in (*self.input_blocks, self.middle_block):
            if recompute and needs_gradient(module, h, emb):
                h = checkpoint(module, h, emb, use_reentrant=False, preserve_rng_state=False)
            else:
                h = module(h, emb)
            if self.pool.startswith("spatial"):
                pooled.append(h.mean(dim=(2, 3)))
        return self.out(torch.cat(pooled, dim=1) if pooled else h).float()
