"""Which kernel computes each layer: every one that can is tried on this GPU, at the layer's shape.

What runs, agrees with the library and takes least is used, and remembered for the next time. Trying
takes up to a minute, most of it Triton's compiling, when a model of new shapes is loaded for the
first time, and nothing in a request. What was found so for SD1.5 and SDXL comes with fastsd for the
GPUs and the torch that it was found on: there only the fastest is tried, whether it runs. Ops that
table does not have yet are tried there too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsd
from fastsd.backends.measured import measured
from fastsd.kernels import (
    attention,
    conv3x3,
    dispatch,
    geglu,
    group_norm,
    layer_norm,
    linear,
    residual,
    sampler_step,
)
from fastsd.models.layers import (
    GEGLU,
    Attention,
    Conv1x1,
    Conv3x3,
    GroupNorm,
    LayerNorm,
    Level,
    Linear,
    Resnet,
    Transformer,
    TransformerBlock,
    Upsample,
    doubled,
)
from fastsd.models.unet import UNet
from fastsd.models.vae import Decoder, PixelAttention

Candidates = Mapping[str, Callable[[], Tensor]]
Numbers = Callable[[Sequence[int]], Tensor]  # a shape -> a tensor of it
Layer = (
    Attention
    | PixelAttention
    | Conv1x1
    | Conv3x3
    | GroupNorm
    | LayerNorm
    | Linear
    | GEGLU
    | Resnet
    | Upsample
)
# Latents along a side at which a decoder's norms are tried: what wins there does at any size, and
# the maps of a large picture take gigabytes.
DECODED = 64


class Shape(Protocol):
    """What layers of an op are grouped by; its text is what times are remembered by."""

    def candidates(self, numbers: Numbers) -> Candidates:
        """Return what can compute such a layer, by name, the library's first."""


_Shape = TypeVar("_Shape", bound=Shape)


def use_fastest_(
    op: str, layers: Mapping[_Shape, Sequence[Layer]], dtype: torch.dtype, device: torch.device
) -> list[str]:
    """Let layers, grouped by their shapes, compute `op` by what is fastest; say what that is."""
    numbers = partial(torch.randn, dtype=dtype, device=device)
    said = []
    for shape, of_shape in layers.items():
        times = _times(op, str(shape), dtype, device, partial(shape.candidates, numbers))
        for layer in of_shape:
            layer.implementation = next(iter(times))
            if isinstance(layer, Upsample) and layer.implementation != "library":
                layer.phase_()
        said.append(f"{op} {shape}: {_said(times)}")
    return said


@cache
def fastest_step(device: torch.device) -> dispatch.Choice:
    """Choose what computes the sampler's step: the one that is fastest for a picture of SD1.5."""

    def candidates() -> Candidates:
        slots, side = 4, 64
        sources = torch.randn(slots + 3, 1, 4, side, side, device=device)
        prediction = torch.randn(2, 4, side, side, dtype=torch.float16, device=device)
        coefficients = torch.randn(2, sampler_step.columns(slots), device=device)
        return sampler_step.candidates(
            sources,
            prediction.contiguous(memory_format=torch.channels_last),
            coefficients / 8,
            torch.ones(1, dtype=torch.int64, device=device),
            torch.tensor(7.5, device=device),
        )

    times = _times("sampler_step", "1x4x64x64", torch.float32, device, candidates)
    return dispatch.Choice("sampler_step", next(iter(times)), f"measured: {_said(times)}")


def _said(times: Mapping[str, float]) -> str:
    """Say what is used and what it takes, and then what else was tried."""
    return ", ".join(f"{name} {1000 * ms:.0f} us" for name, ms in times.items())


@cache
def _kernels() -> str:
    """A word for the state of our kernels' code: times of another are not theirs."""
    digest = hashlib.sha256()
    for file in sorted(Path(dispatch.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def _times(
    op: str,
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    candidates: Callable[[], Candidates],
) -> dict[str, float]:
    """Try candidates, or remember what came of it: name -> ms, the fastest first."""
    gpu = torch.cuda.get_device_name(device)
    ran = f"{op} {shape} {dtype} {gpu} torch {torch.__version__}"
    tried = f"of {', '.join(dispatch.able(op, device))}"

    def measure() -> dict[str, float]:
        with torch.cuda.device(device):
            times = dispatch.try_out(f"{op} {shape}", candidates())
            torch.cuda.empty_cache()
        return times

    def runs(name: str) -> bool:
        with torch.cuda.device(device):
            found = _runs(name, f"{op} {shape}", candidates())
            torch.cuda.empty_cache()
        return found

    ours = f"fastsd {fastsd.__version__} {_kernels()}"
    return measured(f"{ran} {ours} {tried}", measure, shipped=f"{ran} {tried}", runs=runs)


def _runs(name: str, what: str, candidates: Candidates) -> bool:
    """Whether a candidate is there, runs, and agrees with the first."""
    first = next(iter(candidates))
    return name in dispatch.agreeing(
        what, {n: call for n, call in candidates.items() if n in (first, name)}
    )


# --- layers by their shapes, at the model's own size ----------------------------------------------


class AttentionShape(NamedTuple):
    """Of a guidance pair. torch_only: no kernels but torch's own, which its compiler traces."""

    tokens: int
    keys: int
    heads: int
    width: int
    torch_only: bool = False

    def __str__(self) -> str:
        sizes = f"{self.tokens}x{self.keys}x{self.width}x{self.heads}"
        return f"{sizes}{' torch only' if self.torch_only else ''}"

    def candidates(self, numbers: Numbers) -> Candidates:
        """Attend to as many keys as tokens, or to a text's."""
        q, k, v = (
            numbers((2, n, self.heads, self.width)).transpose(1, 2)
            for n in (self.tokens, self.keys, self.keys)
        )
        found = attention.candidates(q, k, v)
        return {
            n: call for n, call in found.items() if not (self.torch_only and n in dispatch.NEEDS)
        }


class PixelsShape(NamedTuple):
    """A decoder's attention of all pixels, of one head."""

    tokens: int
    width: int

    def __str__(self) -> str:
        return f"1x{self.tokens}x{self.tokens}x{self.width}"

    def candidates(self, numbers: Numbers) -> Candidates:
        """Attend in one picture."""
        q, k, v = (numbers((1, 1, self.tokens, self.width)) for _ in range(3))
        return attention.candidates(q, k, v)


class NormShape(NamedTuple):
    """A group normalisation. silu: it follows; added: a row is, before."""

    rows: int
    channels: int
    side: int
    groups: int
    silu: bool
    added: bool

    def __str__(self) -> str:
        kind = f"{' silu' if self.silu else ''}{' added' if self.added else ''}"
        return f"{self.rows}x{self.channels}x{self.side}x{self.side} in {self.groups}{kind}"

    def candidates(self, numbers: Numbers) -> Candidates:
        """Normalise a channels-last map."""
        weight, bias = (numbers((self.channels,)) for _ in range(2))
        return group_norm.candidates(
            _map(numbers, self.rows, self.channels, self.side),
            weight,
            bias,
            self.groups,
            1e-5,
            added=numbers((self.rows, self.channels)) if self.added else None,
            silu=self.silu,
        )


class LayerNormShape(NamedTuple):
    """What a layer normalisation reads. biased: norms add the bias of the product before it."""

    tokens: int
    width: int
    biased: bool

    def __str__(self) -> str:
        return f"2x{self.tokens}x{self.width}"

    def candidates(self, numbers: Numbers) -> Candidates:
        """Normalise a sum."""
        x, added = (numbers((2, self.tokens, self.width)) for _ in range(2))
        weight, bias, biased = (numbers((self.width,)) for _ in range(3))
        first = biased if self.biased else None
        return layer_norm.candidates(x, weight, bias, 1e-5, added=added, added_bias=first)


class GateShape(NamedTuple):
    """What a gate writes."""

    tokens: int
    width: int

    def __str__(self) -> str:
        return f"2x{self.tokens}x{self.width}"

    def candidates(self, numbers: Numbers) -> Candidates:
        """Gate four times the width, of eight."""
        return geglu.candidates(numbers((2, self.tokens, 8 * self.width)))


class LinearShape(NamedTuple):
    """A linear layer and what follows it. gate_by: what else would gate; "" where a sum follows."""

    tokens: int
    channels: int
    out: int
    gate_by: str = ""

    def __str__(self) -> str:
        sizes = f"2x{self.tokens}x{self.channels} to {self.out}"
        return f"{sizes}, {'gated' if self.gate_by else 'sum'}"

    def candidates(self, numbers: Numbers) -> Candidates:
        """Multiply the tokens of a guidance pair."""
        x = numbers((2, self.tokens, self.channels))
        out = self.out * (2 if self.gate_by else 1)
        weight, bias = numbers((out, self.channels)) / self.channels**0.5, numbers((out,))
        if not self.gate_by:
            summed = numbers((2, self.tokens, self.out))
            return linear.candidates(x, weight, bias, residual=summed)

        def library() -> Tensor:
            return geglu.geglu(F.linear(x, weight, bias), implementation=self.gate_by)

        return linear.candidates(x, weight, bias, gated=True) | {"library": library}


class SumShape(NamedTuple):
    """The sum that ends a resnet, with a bias."""

    rows: int
    channels: int
    side: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.channels}x{self.side}x{self.side}"

    def candidates(self, numbers: Numbers) -> Candidates:
        """Add channels-last maps."""
        x, h = (_map(numbers, *self) for _ in range(2))
        return residual.candidates(x, h, numbers((self.channels,)))


class ConvolutionShape(NamedTuple):
    """A 3x3 convolution, with what else it may save: a sum or the doubling of a map.

    role: "first" or "last" of a resnet, or "up", after a doubling. biased: a bias is added.
    sum_by: what would add to a last one.
    """

    rows: int
    channels: int
    side: int
    out: int
    role: str
    biased: bool
    sum_by: str = ""

    def __str__(self) -> str:
        sizes = f"{self.rows}x{self.channels}x{self.side}x{self.side} to {self.out}"
        return f"{sizes}, {self.role}{', bias' if self.biased else ''}"

    def candidates(self, numbers: Numbers) -> Candidates:
        """Convolve a channels-last map."""
        x = _map(numbers, self.rows, self.channels, self.side)
        weight = _map(numbers, self.out, self.channels, 3) / (3 * self.channels**0.5)
        bias = numbers((self.out,)) if self.biased else None
        if self.role == "first":
            return conv3x3.candidates(x, weight, bias)
        if self.role == "up":
            found = conv3x3.candidates(x, weight, bias, upsample=True)
            return found | {"library": lambda: F.conv2d(doubled(x), weight, bias, padding=1)}
        summed = _map(numbers, self.rows, self.out, self.side)

        def library() -> Tensor:
            y = F.conv2d(x, weight, padding=1)
            if bias is None:
                return summed + y
            return residual.residual(summed, y, bias, implementation=self.sum_by)

        return conv3x3.candidates(x, weight, bias, residual=summed) | {"library": library}


def _map(numbers: Numbers, rows: int, channels: int, side: int) -> Tensor:
    return numbers((rows, channels, side, side)).contiguous(memory_format=torch.channels_last)


def attentions(
    unet: UNet, decoder: nn.Module | None = None, *, torch_only: bool = False
) -> dict[AttentionShape | PixelsShape, list[Layer]]:
    """Group the UNet's attentions, and a decoder's for one picture of the UNet's size.

    torch_only: as `AttentionShape` has it. A tiny decoder has none.
    """
    found: dict[AttentionShape | PixelsShape, list[Layer]] = {}
    for layer in decoder.modules() if decoder is not None else ():
        if isinstance(layer, PixelAttention):
            shape = PixelsShape(unet.config.sample_size**2, layer.to_q.out_features)
            found.setdefault(shape, []).append(layer)
    for tokens, block in _blocks(unet):
        for attention_, keys in ((block.attn1, tokens), (block.attn2, 77)):
            width = attention_.to_q.out_features // attention_.heads
            of_tokens = AttentionShape(tokens, keys, attention_.heads, width, torch_only)
            found.setdefault(of_tokens, []).append(attention_)
    return found


def group_norms(unet: UNet, decoder: nn.Module) -> dict[NormShape, list[Layer]]:
    """Group both's group normalisations.

    Rows are a guidance pair's in the UNet (of SD1.x the first norms see what both share, once), one
    in a decoder.
    """
    found: dict[NormShape, list[Layer]] = {}

    def add(norm: GroupNorm, rows: int, side: int, added: bool = False) -> None:
        shape = NormShape(rows, norm.num_channels, side, norm.num_groups, norm.silu, added)
        found.setdefault(shape, []).append(norm)

    add(unet.conv_norm_out, 2, unet.config.sample_size)
    if isinstance(decoder, Decoder):
        add(decoder.conv_norm_out, 1, DECODED * 2 ** (len(decoder.up_blocks) - 1))
    for rows, side, level in _all_levels(unet, decoder):
        for module in level.modules():
            if isinstance(module, Resnet):
                add(module.norm1, rows, side, added=module.norm1_added is not None)
                row = module.time_emb_proj is not None or module.norm2_added is not None
                add(module.norm2, rows, side, added=row)
            elif isinstance(module, Transformer):
                add(module.norm, rows, side)
            elif isinstance(module, PixelAttention):
                add(module.group_norm, rows, side)
    return found


def layer_norms(unet: UNet) -> dict[LayerNormShape, list[Layer]]:
    """Group the norms of transformers."""
    found: dict[LayerNormShape, list[Layer]] = {}
    # But for a transformer's first all do, or none.
    biased = any(isinstance(m, LayerNorm) and m.added_bias is not None for m in unet.modules())
    for tokens, block in _blocks(unet):
        shape = LayerNormShape(tokens, block.norm1.normalized_shape[0], biased)
        found.setdefault(shape, []).extend((block.norm1, block.norm2, block.norm3))
    return found


def gates(unet: UNet) -> dict[GateShape, list[Layer]]:
    """Group the gates of transformers."""
    found: dict[GateShape, list[Layer]] = {}
    for tokens, block in _blocks(unet):
        shape = GateShape(tokens, block.norm1.normalized_shape[0])
        found.setdefault(shape, []).extend(m for m in block.ff.modules() if isinstance(m, GEGLU))
    return found


def linears(unet: UNet, *, feed_forward: bool = True) -> dict[LinearShape, list[Layer]]:
    """Group the linear layers that a gate or a residual sum follows, after the gates were chosen
    for. Without those that are in int8, and unless told otherwise with feed-forward layers'."""
    found: dict[LinearShape, list[Layer]] = {}

    def add(layer: nn.Module, tokens: int, gate_by: str = "") -> None:
        if isinstance(layer, (Linear, Conv1x1)) and isinstance(layer.weight, Tensor):
            out, channels = layer.weight.shape[:2]
            shape = LinearShape(tokens, channels, out // 2 if gate_by else out, gate_by)
            found.setdefault(shape, []).append(layer)

    for side, level in _levels(unet):
        for module in level.modules():
            if isinstance(module, Transformer):
                blocks = cast(Sequence[TransformerBlock], module.transformer_blocks)
                for block in blocks if feed_forward else ():
                    gate = cast(GEGLU, block.ff.net[0])
                    add(gate.proj, side * side, gate.implementation)
                if feed_forward:  # the others' sums are the next norm's
                    add(blocks[-1].ff.net[2], side * side)
                add(module.proj_out, side * side)
    return found


def sums(unet: UNet, decoder: nn.Module) -> dict[SumShape, list[Layer]]:
    """Group the resnets whose sum adds a bias."""
    found: dict[SumShape, list[Layer]] = {}
    for rows, side, level in _all_levels(unet, decoder):
        for module in level.modules():
            if isinstance(module, Resnet) and module.bias is not None:
                found.setdefault(SumShape(rows, len(module.bias), side), []).append(module)
    return found


def convolutions(unet: UNet, decoder: nn.Module) -> dict[ConvolutionShape, list[Layer]]:
    """Group resnets' and up-samplers' 3x3 convolutions, after their sums were chosen for.

    Without those that are in int8, or in a tiny decoder.
    """
    found: dict[ConvolutionShape, list[Layer]] = {}

    def add(
        layer: Conv3x3 | Upsample, rows: int, side: int, role: str, bias: Tensor | None, by: str
    ) -> None:
        conv = layer.conv if isinstance(layer, Upsample) else layer
        if isinstance(conv.weight, Tensor):
            sizes = (rows, conv.in_channels, side, conv.out_channels)
            shape = ConvolutionShape(*sizes, role, bias is not None, by)
            found.setdefault(shape, []).append(layer)

    for rows, side, level in _all_levels(unet, decoder):
        for module in level.modules():
            if isinstance(module, Upsample):
                add(module, rows, side, "up", module.conv.bias, "")
            elif isinstance(module, Resnet):
                add(module.conv1, rows, side, "first", module.conv1.bias, "")
                add(module.conv2, rows, side, "last", module.bias, module.implementation)
    return found


def _blocks(unet: UNet) -> Iterator[tuple[int, TransformerBlock]]:
    """Yield each transformer's blocks with how many tokens they see."""
    for side, level in _levels(unet):
        for block in level.modules():
            if isinstance(block, TransformerBlock):
                yield side * side, block


def _all_levels(unet: UNet, decoder: nn.Module) -> Iterator[tuple[int, int, Level]]:
    """Yield the levels of both with (rows, pixels along a side): a decoder sees one picture."""
    yield from ((2, side, level) for side, level in _levels(unet))
    if isinstance(decoder, Decoder):
        sides = [DECODED, *(DECODED * 2**i for i in range(len(decoder.up_blocks)))]
        for side, level in zip(sides, (decoder.mid_block, *decoder.up_blocks), strict=True):
            assert isinstance(level, Level)
            yield 1, side, level


def _levels(unet: UNet) -> Iterator[tuple[int, Level]]:
    """Yield each level of a UNet with how many latents along a side it sees."""
    deepest = len(unet.config.widths) - 1
    numbered = [*enumerate(unet.down_blocks), (deepest, unet.mid_block)]
    numbered += [(deepest - i, level) for i, level in enumerate(unet.up_blocks)]
    for i, level in numbered:
        assert isinstance(level, Level)
        yield -(-unet.config.sample_size // 2**i), level  # an odd side is rounded up
