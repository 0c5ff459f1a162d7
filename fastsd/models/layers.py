"""The blocks that the UNet and the VAE are made of.

Parameter names are the diffusers layout's. No block holds per-call state, so one module may run in
many threads at once and may be built on the meta device. Knows no file and no sampler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.errors import UsageError
from fastsd.kernels import dispatch
from fastsd.kernels.attention import attention
from fastsd.kernels.conv3x3 import conv3x3, summed_taps
from fastsd.kernels.geglu import geglu
from fastsd.kernels.group_norm import group_norm
from fastsd.kernels.layer_norm import layer_norm
from fastsd.kernels.linear import linear
from fastsd.kernels.residual import residual

KV = tuple[Tensor, Tensor]  # keys and values of one cross-attention, each (B, M, N, K)


def sinusoid(t: Tensor, width: int, *, cos_first: bool = False, shift: float = 0.0) -> Tensor:
    """Embed numbers t: sin(t f_i), cos(t f_i) with f_i = 10000^(-i / (width/2 - shift)).

    t: any shape (…,), any dtype; width even. Returns (…, width), fp32. Source: Ho et al. 2020.
    """
    half = width // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float().unsqueeze(-1) * torch.exp(i * (-math.log(10000) / (half - shift)))
    waves = (angle.cos(), angle.sin()) if cos_first else (angle.sin(), angle.cos())
    return torch.cat(waves, dim=-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, M K) -> (B, M, N, K), a view."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, M, N, K) -> (B, N, M K)."""
    return x.transpose(1, 2).flatten(2)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C), contiguous: else every norm and product would copy it again."""
    return x.flatten(2).transpose(1, 2).contiguous()


def to_pixels(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H W, C) -> (B, C, H, W), a view that is channels-last."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)


def widen(x: Tensor, batch: int) -> Tensor:
    """Repeat x (B, …) to a batch of 2 B where guidance first tells its two rows apart."""
    # Not Tensor.repeat, which forgets channels-last.
    return x if x.shape[0] == batch else torch.cat([x, x])


@final
class Attention(nn.Module):
    """Self-attention, or cross-attention where context_width is given.

    upcast: attend in fp32 whatever the weights' dtype (SD2.1's fp16 scores overflow).
    implementation: which kernel attends, as `fastsd.kernels.dispatch` has them.
    to_qkv: makes queries, keys and values of x side by side, where those are one product.
    multiplier: of the layer that reads what is attended, if that one multiplies in fp8; else None.
    """

    multiplier: Tensor | None

    def __init__(
        self, width: int, heads: int, *, context_width: int | None = None, upcast: bool = False
    ) -> None:
        super().__init__()
        self.to_qkv: nn.Module | None
        self.register_module("to_qkv", None)
        self.heads = heads
        self.upcast = upcast
        self.implementation = "sdpa"
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width or width, width, bias=False)
        self.to_v = nn.Linear(context_width or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.register_buffer("multiplier", None)

    def keys_values(self, context: Tensor) -> KV:
        """Return what `context` (B, N, C) is attended by: K and V, each (B, M, N, K)."""
        return self.by_heads(self.to_k(context)), self.by_heads(self.to_v(context))

    def forward(self, x: Tensor, kv: KV | None = None) -> Tensor:
        """Attend from x (B, N, C) to kv, or to x itself. Returns (B, N, C), or kv's 2 B."""
        if kv is None and self.to_qkv is not None:
            q, k, v = (self.by_heads(each) for each in self.to_qkv(x).chunk(3, dim=-1))
        else:
            k, v = kv or self.keys_values(x)
            q = widen(self.by_heads(self.to_q(x)), k.shape[0])
        out = attention(q, k, v, multiplier=self.multiplier, implementation=self.implementation)
        joined = join_heads(out).to(x.dtype) if self.upcast else join_heads(out)
        projected: Tensor = self.to_out[0](joined)
        return projected

    def by_heads(self, x: Tensor) -> Tensor:
        """Split projected tokens (B, N, M K) as attention takes them, (B, M, N, K)."""
        return split_heads(x.float() if self.upcast else x, self.heads)


def adds(layer: nn.Module) -> bool:
    """Whether `layer` takes a sum or a gate after it as an argument, at no pass of its own.

    The layers that export and fp8 put in ours' place do not.
    """
    return bool(getattr(layer, "adds", False))


def summed(layer: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """Return residual + layer(x)."""
    out: Tensor = layer(x, residual) if adds(layer) else residual + layer(x)
    return out


@final
class Linear(nn.Linear):
    """A linear layer, and the gate or the sum after it.

    implementation: which kernel computes both, as `fastsd.kernels.dispatch` has them.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(in_width, width)
        self.implementation = "library"

    @property
    def adds(self) -> bool:
        """Whether a sum or a gate costs no pass of its own."""
        return self.implementation != "library"

    def forward(self, x: Tensor, residual: Tensor | None = None, *, gated: bool = False) -> Tensor:
        """(…, C_in), and what to add, (…, C) -> (…, C), or gated (…, C / 2)."""
        alone = residual is None and not gated
        return linear(
            x,
            self.weight,
            self.bias,
            residual=residual,
            gated=gated,
            implementation="library" if alone else self.implementation,
        )


@final
class Conv1x1(nn.Conv2d):
    """A convolution of single pixels, and the sum after it.

    as_product: compute it as a linear layer over channels-last pixels, whose bias costs nothing.
    implementation: which kernel computes that and a sum, as `fastsd.kernels.dispatch` has them.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(in_width, width, 1)
        self.as_product = False
        self.implementation = "library"

    @property
    def adds(self) -> bool:
        """Whether a sum costs no pass of its own."""
        return self.as_product and self.implementation != "library"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, C_in, H, W), and a map to add -> (B, C, H, W)."""
        if not self.as_product:
            out = super().forward(x)
            return out if residual is None else residual + out
        pixels = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return linear(
            pixels,
            torch.flatten(self.weight, 1),
            self.bias,
            residual=None if residual is None else residual.permute(0, 2, 3, 1),
            implementation="library" if residual is None else self.implementation,
        ).permute(0, 3, 1, 2)


@final
class Conv3x3(nn.Conv2d):
    """A convolution of 3x3 pixels, and the sum after it.

    implementation: which kernel computes it, as `fastsd.kernels.dispatch` has them.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(in_width, width, 3, padding=1)
        self.implementation = "library"

    @property
    def adds(self) -> bool:
        """Whether a sum costs no pass of its own."""
        return self.implementation != "library"

    def forward(
        self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """(B, C_in, H, W), another bias than its own (C,) and a map to add -> (B, C, H, W)."""
        bias = self.bias if bias is None else bias
        return conv3x3(x, self.weight, bias, residual=residual, implementation=self.implementation)


@final
class GroupNorm(nn.GroupNorm):
    """Group normalisation, and SiLU where a convolution follows.

    implementation: which kernel computes both, as `fastsd.kernels.dispatch` has them. multiplier:
    of the layer that reads what is normalised, if that one multiplies in fp8; else None.
    """

    multiplier: Tensor | None

    def __init__(self, groups: int, width: int, *, eps: float, silu: bool = False) -> None:
        super().__init__(groups, width, eps=eps)
        self.silu = silu
        self.implementation = "library"
        self.register_buffer("multiplier", None)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """(B, C, H, W), and what is first added to every pixel (B or 1, C) -> (B, C, H, W)."""
        return group_norm(
            x,
            self.weight,
            self.bias,
            self.num_groups,
            self.eps,
            added=added,
            silu=self.silu,
            multiplier=self.multiplier,
            implementation=self.implementation,
        )


@final
class LayerNorm(nn.LayerNorm):
    """Layer normalisation, and the residual sum before it.

    implementation: which kernel computes both, as `fastsd.kernels.dispatch` has them. added_bias:
    (C,), the bias of what is added, where its own layer was spared it; else None. multiplier: of
    the layer that reads what is normalised, if that one multiplies in fp8; else None.
    """

    multiplier: Tensor | None

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.implementation = "library"
        self.added_bias: nn.Parameter | None
        self.register_parameter("added_bias", None)
        self.register_buffer("multiplier", None)

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, N, C), and what is first added to it -> their sum, and the sum normalised."""
        return layer_norm(
            x,
            self.weight,
            self.bias,
            self.eps,
            added=added,
            added_bias=self.added_bias,
            multiplier=self.multiplier,
            implementation=self.implementation,
        )


@final
class GEGLU(nn.Module):
    """value * gelu(gate), both linear in x (Shazeer 2020).

    implementation: which kernel gates what the linear layer does not, as `fastsd.kernels.dispatch`
    has them. multiplier: of the layer after it, if that one multiplies in fp8; else None.
    """

    multiplier: Tensor | None

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * inner)
        self.implementation = "library"
        self.register_buffer("multiplier", None)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) -> (…, inner)."""
        if self.multiplier is None and adds(self.proj):
            gated: Tensor = self.proj(x, gated=True)
            return gated
        return geglu(self.proj(x), multiplier=self.multiplier, implementation=self.implementation)


@final
class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The layout numbers a dropout 1.
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, N, C), and what to add -> (B, N, C)."""
        gate, _, last = self.net
        out: Tensor = gate(x)
        return last(out) if residual is None else summed(last, out, residual)


@final
class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each after a norm, each added to x."""

    def __init__(self, width: int, heads: int, context_width: int, *, upcast: bool) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, heads, upcast=upcast)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width=context_width, upcast=upcast)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, kv: KV, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, N, C), the cross-attention's kv, and what is yet to be added to x -> x and its norm,
        which `ff` takes, to be added to x again.

        They have 2 B if kv has. Each sum is left to the norm after it, which may compute both.
        """
        x, normed = self.norm1(x, added)
        x, normed = self.norm2(x, self.attn1(normed))
        x, normed = self.norm3(widen(x, kv[0].shape[0]), self.attn2(normed, kv))
        return x, normed


@final
class Transformer(nn.Module):
    """`depth` transformer blocks over a map's pixels, between two projections, added to x.

    linear: the projections are linear layers (SD2, SDXL), not 1x1 convolutions (SD1).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int,
        depth: int,
        *,
        groups: int,
        linear: bool,
        upcast: bool,
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, width, eps=1e-6)
        self.linear = linear
        self.proj_in = nn.Linear(width, width) if linear else Conv1x1(width, width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, context_width, upcast=upcast) for _ in range(depth)
        )
        self.proj_out = Linear(width, width) if linear else Conv1x1(width, width)

    def forward(self, x: Tensor, kv: Iterator[KV]) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), or kv's 2 B, taking one of `kv` a block."""
        h = self.norm(x)
        h = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))
        added = None
        *blocks, last = cast(Sequence[TransformerBlock], self.transformer_blocks)
        for block in blocks:
            h, normed = block(h, next(kv), added)
            added = block.ff(normed)
        h, normed = last(h, next(kv), added)
        h = last.ff(normed, h)
        x, size = widen(x, h.shape[0]), x.shape[-2:]
        if not self.linear:
            return summed(self.proj_out, to_pixels(h, size), x)
        if adds(self.proj_out):
            return to_pixels(summed(self.proj_out, h, to_tokens(x)), size)
        return x + to_pixels(self.proj_out(h), size)  # x first: the sum takes its memory format


@final
class Resnet(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + t))).

    Where the widths differ, the first x goes through a 1x1 convolution. time_width: width of the
    time embedding that `time_emb_proj` projects to t; None where there is none. norm1_added: (1,
    C_in), what the first norm adds to x; norm2_added: (1, C), what the second adds in t's place;
    bias: (C,), what is added to the sum; each or None. implementation: which kernel adds that, as
    `fastsd.kernels.dispatch` has them.
    """

    def __init__(
        self, in_width: int, width: int, *, groups: int, eps: float, time_width: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_width, eps=eps, silu=True)
        self.conv1 = Conv3x3(in_width, width)
        self.time_emb_proj = None if time_width is None else nn.Linear(time_width, width)
        self.norm2 = GroupNorm(groups, width, eps=eps, silu=True)
        self.conv2 = Conv3x3(width, width)
        self.conv_shortcut = None if in_width == width else Conv1x1(in_width, width)
        self.norm1_added: nn.Parameter | None
        self.norm2_added: nn.Parameter | None
        self.bias: nn.Parameter | None
        for name in ("norm1_added", "norm2_added", "bias"):
            self.register_parameter(name, None)
        self.implementation = "library"

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """(B, C_in, H, W) and t (B or 1, C), already projected -> (B, C, H, W)."""
        h = self.conv1(self.norm1(x, self.norm1_added))
        h = self.norm2(h, self.norm2_added if t is None else t)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        out: Tensor
        if adds(self.conv2):
            out = self.conv2(h, self.bias, x)
        elif self.bias is None:
            out = x + self.conv2(h)
        else:
            out = residual(x, self.conv2(h), self.bias, implementation=self.implementation)
        return out


@final
class Downsample(nn.Module):
    """Halve H and W by a strided convolution; the VAE pads only right and below."""

    def __init__(self, width: int, *, one_sided: bool = False) -> None:
        super().__init__()
        self.one_sided = one_sided
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2), odd sizes rounded up (one_sided: down)."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.one_sided else x)
        return out


@final
class Upsample(nn.Module):
    """Repeat pixels to a size, twice the own by default, then convolve.

    as_copy: repeat the pixels of channels-last maps by a copy, to twice the size. implementation:
    which kernel does both then, as `fastsd.kernels.dispatch` has them; one of ours reads `phases`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.as_copy = False
        self.implementation = "library"
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.phases: nn.Parameter | None
        self.register_parameter("phases", None)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, *size)."""
        twice = (2 * x.shape[-2], 2 * x.shape[-1])
        size = tuple(size or twice)
        if self.implementation != "library" and size == twice:
            return conv3x3(
                x,
                self.conv.weight,
                self.conv.bias,
                phases=self.phases,
                upsample=True,
                implementation=self.implementation,
            )
        if self.as_copy and size == twice and x.shape[1] * x.element_size() % 8 == 0:
            x = doubled(x)
        else:
            x = F.interpolate(x, size=size, mode="nearest")
        out: Tensor = self.conv(x)
        return out

    @torch.no_grad()
    def phase_(self) -> None:
        """Make `phases` of the weights as they are now, in place if there are any."""
        made = summed_taps(self.conv.weight)
        if self.phases is None:
            self.phases = nn.Parameter(made, requires_grad=False)
        else:
            self.phases.copy_(made)


def doubled(x: Tensor) -> Tensor:
    """Repeat pixels to twice the size by a copy of 8 bytes at once, six times as fast as torch's
    kernel for it. (B, C, H, W) -> (B, C, 2 H, 2 W), channels-last."""
    B, C, H, W = x.shape
    # Flat before it is taken for words: strides of single pixels may be anything.
    words = x.permute(0, 2, 3, 1).reshape(-1).view(torch.int64).view(B, H, 1, W, 1, -1)
    repeated = words.expand(-1, -1, 2, -1, 2, -1).reshape(B, 2 * H, 2 * W, -1)
    return repeated.view(x.dtype).permute(0, 3, 1, 2)


@final
class PhasedUpsample(nn.Module):
    """`Upsample` to twice the size in 16 of its 36 products a pixel, the same but for rounding.

    Where pixels repeat, a pixel of each 2x2 block sees 2x2 pixels of the small map, through weights
    that are sums of the 3x3 kernel's: one small kernel for each of the block's four, and as all
    read the same map, one convolution.
    """

    def __init__(self, upsample: Upsample) -> None:
        super().__init__()
        self.upsample = upsample
        conv = upsample.conv
        self.phases = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Conv2d, conv.in_channels, 4 * conv.out_channels, 2, padding=1
        ).requires_grad_(False)
        assert conv.bias is not None
        self.phases.weight.copy_(summed_taps(conv.weight))
        self.phases.bias.copy_(conv.bias.repeat(4))

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, *size), channels-last."""
        height, width = x.shape[-2:]
        if size is not None and tuple(size) != (2 * height, 2 * width):
            out: Tensor = self.upsample(x, size)  # the last pixels are not repeated
            return out
        # Padded on both sides, each phase has a row and a column more than x: those for even rows
        # use theirs from the first on, those for odd rows from the second. One pass through memory.
        phases = self.phases(x).unflatten(1, (2, 2, -1)).permute(0, 4, 5, 1, 2, 3)
        i = torch.arange(2 * height, device=x.device)[:, None]
        j = torch.arange(2 * width, device=x.device)
        pixels: Tensor = phases[:, (i + 1) // 2, (j + 1) // 2, i % 2, j % 2]
        return pixels.permute(0, 3, 1, 2)


# op -> the layers that leave its choice to a value
LAYERS: Mapping[
    str,
    tuple[
        type[
            Attention
            | Conv1x1
            | Conv3x3
            | GEGLU
            | GroupNorm
            | LayerNorm
            | Linear
            | Resnet
            | Upsample
        ],
        ...,
    ],
] = MappingProxyType(
    {
        "attention": (Attention,),
        "conv3x3": (Conv3x3, Upsample),
        "group_norm": (GroupNorm,),
        "layer_norm": (LayerNorm,),
        "geglu": (GEGLU,),
        "linear": (Linear, Conv1x1),
        "residual": (Resnet,),
    }
)


def use_kernel(model: nn.Module, op: str, implementation: str) -> None:
    """Make every layer of `model` that computes `op` ("attention", …) use `implementation`.

    One of `fastsd.kernels.dispatch.IMPLEMENTATIONS`, else UsageError. For when a model is loaded,
    not while it runs.
    """
    dispatch.require(op, implementation)
    if op not in LAYERS:
        raise UsageError(f"no layer leaves the choice of {op}; {', '.join(LAYERS)} are chosen")
    for module in model.modules():
        if isinstance(module, LAYERS[op]):
            module.implementation = implementation
        if op == "conv3x3" and isinstance(module, Upsample) and implementation != "library":
            module.phase_()


@final
class Level(nn.Module):
    """Resnets, an attention after each as far as there are any, then a sampler or none.

    Down and up levels (one attention a resnet, or none) and the middle (one fewer) differ in these
    values only.
    """

    def __init__(
        self,
        resnets: Sequence[Resnet],
        attentions: Sequence[nn.Module] = (),
        sampler: Downsample | Upsample | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([sampler] if isinstance(sampler, Downsample) else [])
        self.upsamplers = nn.ModuleList([sampler] if isinstance(sampler, Upsample) else [])

    def forward(
        self,
        x: Tensor,
        rows: Iterator[Tensor] | None = None,
        kv: Iterator[KV] | None = None,
        *,
        saved: list[Tensor] | None = None,
        skips: list[Tensor] | None = None,
        only: slice = slice(None),
    ) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H', W').

        rows, kv: one time projection a resnet, one (K, V) a cross-attention, in this order; None in
        the VAE, which has neither.
        saved: list that a down level appends its outputs to. skips: the same list, from which an up
        level takes them, last first; it upsamples to the next one's size.
        only: run these resnets, each with its attention.
        """
        for resnet, attention_ in [*zip_longest(self.resnets, self.attentions)][only]:
            if skips is not None:
                x = torch.cat([x, widen(skips.pop(), x.shape[0])], dim=1)
            x = resnet(x, None if rows is None else next(rows))
            if attention_ is not None:
                x = attention_(x, kv)
            if saved is not None:
                saved.append(x)
        for sampler in self.downsamplers:
            x = sampler(x)
            if saved is not None:
                saved.append(x)
        for sampler in self.upsamplers:
            x = sampler(x, skips[-1].shape[-2:] if skips else None)
        return x
