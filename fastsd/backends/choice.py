"""Which kernel computes each layer: every one that can is tried on this GPU, at the layer's shape.

What runs, agrees with the library and takes least is used, and remembered for the next time. Trying
takes up to a minute, most of it Triton's compiling, when a model of new shapes is loaded for the
first time, and nothing in a request. What was found so for SD1.5 and SDXL comes with fastsd for the
GPUs and the torch that it was found on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

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
    residual,
    sampler_step,
)
from fastsd.models.layers import (
    GEGLU,
    Attention,
    Conv3x3,
    GroupNorm,
    LayerNorm,
    Level,
    Resnet,
    Transformer,
    TransformerBlock,
    Upsample,
    doubled,
)
from fastsd.models.unet import UNet
from fastsd.models.vae import Decoder, PixelAttention

Candidates = Mapping[str, Callable[[], Tensor]]
# Latents along a side at which a decoder's norms are tried: what wins there does at any size, and
# the maps of a large picture take gigabytes.
DECODED = 64


def fastest_attention(
    unet: UNet,
    dtype: torch.dtype,
    device: torch.device,
    *,
    torchs: bool = False,
    decoder: nn.Module | None = None,
) -> list[str]:
    """Let every attention use what is fastest at its shape, for a guidance pair; say what.

    torchs: of torch's own kernels only, which its compiler takes. decoder: of a VAE, for one
    picture of the UNet's size; a tiny one has no attention.
    """
    said = []
    pixels = [m for m in decoder.modules() if isinstance(m, PixelAttention)] if decoder else []
    for layer in pixels[:1]:
        tokens, width = unet.config.sample_size**2, layer.to_q.out_features

        def one() -> Candidates:
            shape = (1, 1, tokens, width)  # noqa: B023
            return attention.candidates(
                *(torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
            )

        shape = f"1x{tokens}x{tokens}x{width}"
        said.append(_settle("attention", shape, dtype, device, one, pixels))
    for (tokens, keys, heads, width), layers in attention_shapes(unet).items():

        def make() -> Candidates:
            q, k, v = (
                torch.randn(2, n, heads, width, dtype=dtype, device=device).transpose(1, 2)  # noqa: B023
                for n in (tokens, keys, keys)  # noqa: B023
            )
            found = attention.candidates(q, k, v)
            return {n: call for n, call in found.items() if not (torchs and n in dispatch.NEEDS)}

        shape = f"{tokens}x{keys}x{width}x{heads}{' torch only' if torchs else ''}"
        said.append(_settle("attention", shape, dtype, device, make, layers))
    return said


def fastest_norms(
    unet: UNet, decoder: nn.Module, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """Let every group normalisation use what is fastest at its shape; say what.

    decoder: one of a VAE; a tiny one has no norms.
    """
    said = []
    for (rows, channels, side, groups, silu, added), layers in norm_shapes(unet, decoder).items():

        def make() -> Candidates:
            shape = (rows, channels, side, side)  # noqa: B023
            x, weight, bias, row = (
                torch.randn(shape_, dtype=dtype, device=device)
                for shape_ in (shape, channels, channels, (rows, channels))  # noqa: B023
            )
            return group_norm.candidates(
                x.contiguous(memory_format=torch.channels_last),
                weight,
                bias,
                groups,  # noqa: B023
                1e-5,
                added=row if added else None,  # noqa: B023
                silu=silu,  # noqa: B023
            )

        shape = f"{rows}x{channels}x{side}x{side}"
        kind = f"{shape} in {groups}{' silu' if silu else ''}{' added' if added else ''}"
        said.append(_settle("group_norm", kind, dtype, device, make, layers))
    return said


def fastest_between(unet: UNet, dtype: torch.dtype, device: torch.device) -> dict[str, list[str]]:
    """Let every layer norm and gate use what is fastest at its shape, for a guidance pair.

    Returns what is said of each op.
    """
    said: dict[str, list[str]] = {"layer_norm": [], "geglu": []}
    for (tokens, width), (norms, gates) in token_shapes(unet).items():

        def numbers(width: int) -> Tensor:
            return torch.randn(2, tokens, width, dtype=dtype, device=device)  # noqa: B023

        def norm() -> Candidates:
            x, added, rows = (numbers(width) for _ in range(3))  # noqa: B023
            lead = rows[0, 2] if any(layer.lead is not None for layer in norms) else None  # noqa: B023
            return layer_norm.candidates(x, rows[0, 0], rows[0, 1], 1e-5, added=added, lead=lead)

        def gate() -> Candidates:
            return geglu.candidates(numbers(8 * width))  # noqa: B023

        shape = f"2x{tokens}x{width}"
        said["layer_norm"].append(_settle("layer_norm", shape, dtype, device, norm, norms))
        said["geglu"].append(_settle("geglu", shape, dtype, device, gate, gates))
    return said


def fastest_sums(
    unet: UNet, decoder: nn.Module, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """Let every resnet whose sum adds a bias use what is fastest at its shape; say what."""
    shapes: dict[tuple[int, int, int], list[Resnet]] = {}
    for rows, side, level in _all_levels(unet, decoder):
        for module in level.modules():
            if isinstance(module, Resnet) and module.bias is not None:
                shapes.setdefault((rows, len(module.bias), side), []).append(module)
    said = []
    for (rows, channels, side), layers in shapes.items():

        def make() -> Candidates:
            x, h = (
                torch.randn(rows, channels, side, side, dtype=dtype, device=device)  # noqa: B023
                for _ in range(2)
            )
            last = torch.channels_last
            given = (x.contiguous(memory_format=last), h.contiguous(memory_format=last))
            return residual.candidates(*given, torch.ones(channels, dtype=dtype, device=device))  # noqa: B023

        shape = f"{rows}x{channels}x{side}x{side}"
        said.append(_settle("residual", shape, dtype, device, make, layers))
    return said


def fastest_convolutions(
    unet: UNet, decoder: nn.Module, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """Let every resnet's and up-sampler's convolution use what is fastest at its shape; say what.

    Each is tried with what else it may save: the sum that ends a resnet, for which it has to be
    faster than a convolution and `fastest_sums`' choice, or the doubling of a map.
    """
    said = []
    shapes = convolution_shapes(unet, decoder)
    for (rows, channels, side, out, role, biased, sum_by), layers in shapes.items():

        def make() -> Candidates:
            x, weight, summed = (
                torch.randn(shape, dtype=dtype, device=device).contiguous(
                    memory_format=torch.channels_last
                )
                for shape in (
                    (rows, channels, side, side),  # noqa: B023
                    (out, channels, 3, 3),  # noqa: B023
                    (rows, out, side, side),  # noqa: B023
                )
            )
            weight /= 3 * channels**0.5  # noqa: B023
            bias = torch.ones(out, dtype=dtype, device=device) if biased else None  # noqa: B023
            if role == "up":  # noqa: B023
                found = conv3x3.candidates(x, weight, bias, upsample=True)
                return found | {"library": lambda: F.conv2d(doubled(x), weight, bias, padding=1)}
            if role == "first":  # noqa: B023
                return conv3x3.candidates(x, weight, bias)
            found = conv3x3.candidates(x, weight, bias, residual=summed)

            def library() -> Tensor:
                y = F.conv2d(x, weight, padding=1)
                if bias is None:
                    return summed + y
                return residual.residual(summed, y, bias, implementation=sum_by)  # noqa: B023

            return found | {"library": library}

        shape = f"{rows}x{channels}x{side}x{side} to {out}, {role}{', bias' if biased else ''}"
        said.append(_settle("conv3x3", shape, dtype, device, make, layers))
    return said


@cache
def fastest_step(device: torch.device) -> dispatch.Choice:
    """Choose what computes the sampler's step: the one that is fastest for a picture of SD1.5."""

    def make() -> Candidates:
        slots, side = 4, 64
        sources = torch.randn(slots + 3, 1, 4, side, side, device=device)
        prediction = torch.randn(2, 4, side, side, dtype=torch.float16, device=device)
        coefficients = torch.randn(2, 5 + (slots + 1) * (slots + 3), device=device)
        return sampler_step.candidates(
            sources,
            prediction.contiguous(memory_format=torch.channels_last),
            coefficients / 8,
            torch.ones(1, dtype=torch.int64, device=device),
            torch.tensor(7.5, device=device),
        )

    times = _times("sampler_step", "1x4x64x64", torch.float32, device, make)
    return dispatch.Choice("sampler_step", next(iter(times)), f"measured: {_said(times)}")


def _settle(
    op: str,
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    make: Callable[[], Candidates],
    layers: Iterable[
        Attention | PixelAttention | Conv3x3 | GroupNorm | LayerNorm | GEGLU | Resnet | Upsample
    ],
) -> str:
    """Give `layers`, all of one shape, what is fastest; say what."""
    times = _times(op, shape, dtype, device, make)
    for layer in layers:
        layer.implementation = next(iter(times))
        if isinstance(layer, Upsample) and layer.implementation != "library":
            layer.phase_()
    return f"{op} {shape}: {_said(times)}"


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
    op: str, shape: str, dtype: torch.dtype, device: torch.device, make: Callable[[], Candidates]
) -> dict[str, float]:
    """Try what `make` gives, or remember it: name -> ms, the fastest first."""
    gpu = torch.cuda.get_device_name(device)
    ran = f"{op} {shape} {dtype} {gpu} torch {torch.__version__}"
    tried = f"of {', '.join(dispatch.able(op, device))}"

    def measure() -> dict[str, float]:
        with torch.cuda.device(device):
            times = dispatch.try_out(f"{op} {shape}", make())
            torch.cuda.empty_cache()
        return times

    ours = f"fastsd {fastsd.__version__} {_kernels()}"
    return measured(f"{ran} {ours} {tried}", measure, shipped=f"{ran} {tried}")


# --- the shapes of a model's layers, at its own size ----------------------------------------------


def attention_shapes(unet: UNet) -> dict[tuple[int, int, int, int], list[Attention]]:
    """Group attentions by (queries, keys, heads, head width)."""
    shapes: dict[tuple[int, int, int, int], list[Attention]] = {}
    for side, level in _levels(unet):
        for block in level.modules():
            if isinstance(block, TransformerBlock):
                for layer, keys in ((block.attn1, side * side), (block.attn2, 77)):
                    width = layer.to_q.out_features // layer.heads
                    shape = (side * side, keys, layer.heads, width)
                    shapes.setdefault(shape, []).append(layer)
    return shapes


def token_shapes(unet: UNet) -> dict[tuple[int, int], tuple[list[LayerNorm], list[GEGLU]]]:
    """Group what stands between the products of transformers by (tokens, width)."""
    shapes: dict[tuple[int, int], tuple[list[LayerNorm], list[GEGLU]]] = {}
    for side, level in _levels(unet):
        for block in level.modules():
            if isinstance(block, TransformerBlock):
                shape = (side * side, block.norm1.normalized_shape[0])
                norms, gates = shapes.setdefault(shape, ([], []))
                norms += [block.norm1, block.norm2, block.norm3]
                gates += [m for m in block.ff.modules() if isinstance(m, GEGLU)]
    return shapes


ConvolutionShape = tuple[int, int, int, int, str, bool, str]


def convolution_shapes(
    unet: UNet, decoder: nn.Module
) -> dict[ConvolutionShape, list[Conv3x3 | Upsample]]:
    """Group resnets' and up-samplers' convolutions by (rows, channels, side, channels out, role,
    whether a bias is added, by what the sum is).

    Roles are "first" and "last" of a resnet, and "up", after a doubling. Without those that are in
    int8, or in a tiny decoder.
    """
    shapes: dict[ConvolutionShape, list[Conv3x3 | Upsample]] = {}
    for rows, side, level in _all_levels(unet, decoder):
        for module in level.modules():
            roles: list[tuple[str, Conv3x3 | Upsample, nn.Conv2d, Tensor | None, str]] = []
            if isinstance(module, Upsample):
                roles = [("up", module, module.conv, module.conv.bias, "")]
            elif isinstance(module, Resnet):
                first, last = module.conv1, module.conv2
                roles = [
                    ("first", first, first, first.bias, ""),
                    ("last", last, last, module.bias, module.implementation),
                ]
            for role, layer, conv, bias, sum_by in roles:
                if isinstance(conv.weight, Tensor):
                    widths = (conv.in_channels, side, conv.out_channels)
                    shape = (rows, *widths, role, bias is not None, sum_by)
                    shapes.setdefault(shape, []).append(layer)
    return shapes


NormShape = tuple[int, int, int, int, bool, bool]


def norm_shapes(unet: UNet, decoder: nn.Module) -> dict[NormShape, list[GroupNorm]]:
    """Group norms by (rows, channels, side, groups, whether SiLU follows, whether a row is added).

    Rows are a guidance pair's in the UNet (of SD1.x the first norms see what both share, once), one
    in a decoder.
    """
    shapes: dict[NormShape, list[GroupNorm]] = {}

    def add(norm: GroupNorm, rows: int, side: int, added: bool = False) -> None:
        shape = (rows, norm.num_channels, side, norm.num_groups, norm.silu, added)
        shapes.setdefault(shape, []).append(norm)

    add(unet.conv_norm_out, 2, unet.config.sample_size)
    if isinstance(decoder, Decoder):
        add(decoder.conv_norm_out, 1, DECODED * 2 ** (len(decoder.up_blocks) - 1))
    for rows, side, level in _all_levels(unet, decoder):
        for module in level.modules():
            if isinstance(module, Resnet):
                add(module.norm1, rows, side, added=module.lead is not None)
                row = module.time_emb_proj is not None or module.shift is not None
                add(module.norm2, rows, side, added=row)
            elif isinstance(module, Transformer):
                add(module.norm, rows, side)
            elif isinstance(module, PixelAttention):
                add(module.group_norm, rows, side)
    return shapes


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
