"""Our Triton kernels against the references, case by case; run as a program, prints {case: error}.

With TRITON_INTERPRET=1 Triton runs kernels in Python on CPU tensors, and only a process that starts
so does: tests/kernels/test_triton.py starts one. On a GPU the compiled kernels run, here as there.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsd.backends.for_gpu import spare_passes_
from fastsd.config import SD15
from fastsd.kernels import reference
from fastsd.kernels.attention import attention as our_attention
from fastsd.kernels.conv3x3 import conv3x3 as our_conv3x3
from fastsd.kernels.geglu import geglu as our_geglu
from fastsd.kernels.group_norm import group_norm as our_group_norm
from fastsd.kernels.layer_norm import layer_norm as our_layer_norm
from fastsd.kernels.linear import linear as our_linear
from fastsd.kernels.residual import residual as our_residual
from fastsd.kernels.sampler_step import sampler_step_
from fastsd.models.layers import use_kernel
from fastsd.models.unet import UNet
from tests.distances import relative_l2

Case = Callable[[str], float]  # device -> relative L2 error
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32

# (B, C, H, W): groups as wide as SD1.5's, SDXL's and a VAE's (4 to 80 channels), odd sizes, more
# pixels than are FEW, more splits than are put together at once.
MAPS = (
    (1, 320, 4, 4),
    (1, 640, 5, 7),
    (3, 960, 3, 5),
    (2, 1280, 4, 4),
    (1, 1920, 3, 3),
    (1, 2560, 3, 3),
    (1, 128, 33, 32),
    (1, 128, 23, 23),
    (1, 512, 1, 1),
)
SMALL = (3, 96, 5, 7)  # several pictures, splits and tiles, which cut groups of 3 channels
# As large as they are, where a GPU runs them: in the interpreter they would take minutes.
TRUE_MAPS = ((2, 320, 64, 64), (2, 960, 32, 32), (2, 1920, 16, 16), (2, 1280, 8, 8))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def group_norm(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    offset: float = 0.0,
    scale: float = 1.0,
    channels_last: bool = True,
    rows: int = 0,
    silu: bool = True,
    fp8: bool = False,
    implementation: str = "triton",
) -> Case:
    """offset, scale: x = scale * (normal + offset), where channels differ in mean and spread.

    rows: how many rows are added to the channels, 1 or one a picture; 0: nothing is. fp8: return
    fp8, some of it cut.
    """

    def run(device: str) -> float:
        C = shape[1]
        spread = 0.5 + draw(C, seed=4).abs().view(1, C, 1, 1)
        x = scale * (draw(*shape) * spread + draw(C, seed=3).view(1, C, 1, 1) + offset)
        x, weight, bias = (t.to(device, dtype) for t in (x, draw(C, seed=1), draw(C, seed=2)))
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        # as the UNet splits them off a row of all resnets
        wide = draw(max(1, rows), C + 24, seed=5).to(device, dtype)
        options: dict[str, Any] = dict(added=wide[:, 8:-16] if rows else None, silu=silu)
        if fp8:
            options["multiplier"] = torch.tensor(200.0, device=device)
        given = (x, weight, bias, 32, 1e-5)
        out = our_group_norm(*given, **options, implementation=implementation)
        assert out.dtype == (torch.float8_e4m3fn if fp8 else dtype) and out.shape == x.shape
        assert out.is_contiguous(memory_format=torch.channels_last)
        return relative_l2(out, reference.group_norm(*given, **options))

    return run


def layer_norm(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    added: bool = True,
    added_bias: bool = False,
    offset: float = 0.0,
    fp8: bool = False,
) -> Case:
    """added_bias: add a row too. offset: x = normal + offset. fp8: return fp8, some of it cut."""

    def run(device: str) -> float:
        C = shape[-1]
        x, more = ((draw(*shape, seed=i) + offset).to(device, dtype) for i in (0, 1))
        weight, bias = (draw(C, seed=i).to(device, dtype) for i in (2, 3))
        options: dict[str, Any] = dict(added=more if added else None)
        if added_bias:
            options["added_bias"] = draw(C, seed=4).to(device, dtype)
        if fp8:
            options["multiplier"] = torch.tensor(200.0, device=device)
        total, out = our_layer_norm(x, weight, bias, 1e-5, **options, implementation="triton")
        expected_total, expected = reference.layer_norm(x, weight, bias, 1e-5, **options)
        assert out.dtype == (torch.float8_e4m3fn if fp8 else dtype) and total.dtype == dtype
        return max(relative_l2(out, expected), relative_l2(total, expected_total))

    return run


def geglu(shape: tuple[int, ...], dtype: torch.dtype, *, fp8: bool = False) -> Case:
    def run(device: str) -> float:
        x = (2 * draw(*shape)).to(device, dtype)
        multiplier = torch.tensor(100.0, device=device) if fp8 else None
        out = our_geglu(x, multiplier=multiplier, implementation="triton")
        return relative_l2(out, reference.geglu(x, multiplier=multiplier))

    return run


def attention(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float16,
    scale: float = 1.0,
    fp8: bool = False,
) -> Case:
    """shape: (B, M, Nq, N, K), as projections give them. scale: of the queries. fp8: return it."""
    B, heads, queries, keys, width = shape

    def run(device: str) -> float:
        q, k, v = (
            draw(B, n, heads, width, seed=i).to(device, dtype).transpose(1, 2)
            for i, n in enumerate((queries, keys, keys))
        )
        multiplier = torch.tensor(400.0, device=device) if fp8 else None
        out = our_attention(scale * q, k, v, multiplier=multiplier, implementation="triton")
        assert out.dtype == (torch.float8_e4m3fn if fp8 else dtype)
        assert out.transpose(1, 2).is_contiguous()
        given = ((scale * q).float(), k.float(), v.float())
        return relative_l2(out, reference.attention(*given, multiplier=multiplier))

    return run


def linear(
    rows: tuple[int, ...],
    channels: int,
    outputs: int,
    *,
    dtype: torch.dtype = torch.float16,
    gated: bool = False,
    ends: bool = False,
    biased: bool = True,
) -> Case:
    """ends: add a residual."""

    def run(device: str) -> float:
        out_channels = outputs * (2 if gated else 1)
        weight = draw(out_channels, channels, seed=1) / channels**0.5
        given = [draw(*rows, channels), weight, draw(out_channels, seed=2)]
        x, weight, bias = (t.to(device, dtype) for t in given)
        options: dict[str, Any] = dict(bias=bias if biased else None, gated=gated)
        if ends:
            options["residual"] = draw(*rows, outputs, seed=3).to(device, dtype)
        out = our_linear(x, weight, **options, implementation="triton")
        assert out.dtype == dtype and out.shape == (*rows, outputs)
        return relative_l2(out, reference.linear(x, weight, **options))

    return run


def residual(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    def run(device: str) -> float:
        x, h = (draw(*shape, seed=i).to(device, dtype) for i in (0, 1))
        bias = draw(shape[1], seed=2).to(device, dtype)
        out = our_residual(x, h, bias, implementation="triton")
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        return relative_l2(out, reference.residual(x, h, bias))

    return run


def sampler_step(
    slots: int, guided: bool, *, dtype: torch.dtype = torch.float16, channels_last: bool = True
) -> Case:
    def run(device: str) -> float:
        B, C, H, W = shape = (3, 4, 9, 17)
        sources = draw(slots + 3, *shape).to(device)
        prediction = draw((2 if guided else 1) * B, C, H, W, seed=1).to(device, dtype)
        if channels_last:
            prediction = prediction.contiguous(memory_format=torch.channels_last)
        columns = 3 + (1 + slots) * (3 + slots) + 2
        coefficients = draw(5, columns, seed=2).to(device)
        row = torch.tensor([3], device=device)
        guidance = torch.tensor(7.5, device=device) if guided else None
        given = (prediction, coefficients, row, guidance)
        expected = sources.clone()
        reference.sampler_step_(expected, *given)
        noise = sources[-1].clone()
        sampler_step_(sources, *given, implementation="triton")
        assert torch.equal(sources[-1], noise), "the noise is only read"
        return relative_l2(sources[:-1], expected[:-1])

    return run


def conv3x3(
    shape: tuple[int, int, int, int],
    out_channels: int,
    *,
    dtype: torch.dtype = torch.float16,
    ends: bool = False,
    fp8: bool = False,
    upsample: bool = False,
) -> Case:
    """ends: add a residual. fp8: multiply in it, from what a norm wrote."""

    def run(device: str) -> float:
        x, weight = draw(*shape), draw(out_channels, shape[1], 3, 3, seed=1) / 3 / shape[1] ** 0.5
        bias = draw(out_channels, seed=2).to(device, dtype)
        options: dict[str, Any] = dict(upsample=upsample)
        if ends:
            size = [(2 if upsample else 1) * side for side in shape[2:]]
            options["residual"] = draw(shape[0], out_channels, *size, seed=3).to(device, dtype)
        if fp8:
            options["scale"] = (0.5 + draw(out_channels, seed=4).abs()).to(device)
        x, weight = (t.to(device, torch.float8_e4m3fn if fp8 else dtype) for t in (x, weight))
        more: dict[str, Any] = dict(dtype=dtype, implementation="triton")
        out = our_conv3x3(x, weight, bias, **options, **more)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        return relative_l2(out, reference.conv3x3(x, weight, bias, **options))

    return run


def small_unet(device: str, dtype: torch.dtype, *, linear: bool = False) -> UNet:
    torch.manual_seed(0)
    small = replace(
        SD15.unet,
        widths=(32, 64),
        depths=(1, 0),
        heads=(2, 2),
        layers_per_level=1,
        context_width=16,
        norm_groups=4,
        linear_projection=linear,
    )
    return UNet(small).requires_grad_(False).to(device, dtype)


def unet(implementation: str) -> Case:
    """A whole small UNet with our norms against itself with the library's: every way they are
    called there, with rows for each picture and one for all."""

    def run(device: str) -> float:
        model = small_unet(device, FULL)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.normal_()
                module.bias.normal_()
        x, text = draw(2, 4, 4, 6).to(device), draw(2, 7, 16, seed=1).to(device)
        kv = model.context(text)
        rows = model.time_rows(torch.tensor([10.0, 700.0], device=device))
        both = torch.cat([rows[0], rows[1]])  # another a picture, and one for both
        expected = torch.stack([model(x, both, kv), model(x, rows[0], kv)])
        use_kernel(model, "group_norm", implementation)
        for op in ("layer_norm", "geglu"):
            use_kernel(model, op, "triton")
        ours = torch.stack([model(x, both, kv), model(x, rows[0], kv)])
        return relative_l2(ours, expected)

    return run


def products(*, linear: bool) -> Case:
    """A whole small UNet, rewritten for a GPU, with our convolutions and linear layers and with the
    library's; norms of tokens add the biases that were moved to them."""

    def run(device: str) -> float:
        model = small_unet(device, HALF, linear=linear)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        spare_passes_(model, norms_add=True)
        x, text = draw(2, 4, 8, 8).to(device, HALF), draw(2, 7, 16, seed=1).to(device, HALF)
        given = (x, model.time_rows(torch.tensor([10.0], device=device))[0], model.context(text))
        expected = model(*given)
        for op in ("conv3x3", "layer_norm", "linear"):
            use_kernel(model, op, "triton")
        return relative_l2(model(*given), expected)

    return run


# Triton's interpreter cuts off what fp8 cannot hold, where GPUs round to the nearest.
FP8_ERROR = 5e-3 if torch.cuda.is_available() else 1e-1
# name -> (case, the largest error that passes)
CASES: dict[str, tuple[Case, float]] = {
    **{f"norm {'x'.join(map(str, s))} fp16": (group_norm(s, HALF), 5e-4) for s in MAPS},
    "norm bf16": (group_norm(SMALL, BRAIN), 4e-3),
    "norm fp32": (group_norm(SMALL, FULL), 1e-6),
    "norm of NCHW": (group_norm(SMALL, FULL, channels_last=False), 1e-6),
    "norm far from zero": (group_norm(SMALL, FULL, offset=1000.0), 2e-4),
    "norm of large numbers": (group_norm(SMALL, HALF, scale=2000.0), 5e-4),
    "norm of small numbers": (group_norm(SMALL, FULL, scale=1e-3), 1e-6),
    "norm without silu": (group_norm(SMALL, FULL, silu=False), 1e-6),
    "norm of a sum": (group_norm(SMALL, FULL, rows=3), 1e-6),
    "norm of a sum, one row": (group_norm(SMALL, FULL, rows=1, silu=False), 1e-6),
    **{
        f"norm by group {'x'.join(map(str, shape))} rows={rows}": (
            group_norm(shape, HALF, rows=rows, implementation="triton-group"),
            5e-4,
        )
        for shape, rows in zip(MAPS, (0, 1, 3, 0, 0, 0, 1, 1, 0), strict=True)
    },
    "norm by group fp32": (
        group_norm(SMALL, FULL, rows=3, silu=False, implementation="triton-group"),
        1e-6,
    ),
    "norm by group far from zero": (
        group_norm(SMALL, FULL, offset=1000.0, implementation="triton-group"),
        2e-4,
    ),
    **{
        f"norm to fp8 by {name}": (
            group_norm(SMALL, HALF, rows=1, fp8=True, implementation=name),
            FP8_ERROR,
        )
        for name in ("triton", "triton-group")
    },
    **{f"layer norm {C} fp16": (layer_norm((2, 9, C), HALF), 5e-4) for C in (320, 640, 1280)},
    "layer norm of three": (layer_norm((3, 5, 320), HALF, added_bias=True), 5e-4),
    "layer norm of one row": (layer_norm((1, 40), FULL, added=False), 1e-6),
    "layer norm bf16": (layer_norm((3, 96), BRAIN), 4e-3),
    "layer norm far from zero": (layer_norm((5, 320), FULL, offset=1000.0), 2e-4),
    "layer norm to fp8": (layer_norm((5, 320), HALF, fp8=True), FP8_ERROR),
    "attention 77 keys": (attention((2, 8, 150, 77, 40)), 2e-3),
    "attention 65 keys": (attention((1, 2, 70, 65, 64)), 2e-3),
    "attention 96 keys": (attention((1, 2, 70, 96, 80)), 2e-3),
    "attention one key": (attention((1, 2, 3, 1, 64)), 2e-3),
    "attention 128 keys": (attention((1, 1, 128, 128, 160)), 2e-3),
    "attention to fp8": (attention((1, 2, 70, 77, 64), fp8=True), FP8_ERROR),
    "attention beyond fp16": (attention((1, 2, 40, 77, 64), scale=200.0), 2e-3),
    "residual fp16": (residual((2, 320, 9, 17), HALF), 5e-4),
    "residual fp32": (residual((1, 3, 5, 7), FULL), 1e-6),
    "gate fp16": (geglu((2, 9, 2560), HALF), 5e-4),
    "gate fp32": (geglu((17, 600), FULL), 1e-6),
    "gate bf16": (geglu((17, 64), BRAIN), 4e-3),
    "gate to fp8": (geglu((17, 640), HALF, fp8=True), FP8_ERROR),
    "linear and a sum": (linear((2, 150), 320, 640, ends=True), 5e-4),
    "linear, odd sizes": (linear((3, 5, 7), 40, 72, ends=True, biased=False), 5e-4),
    "linear alone": (linear((130,), 64, 96), 5e-4),
    "linear and a gate": (linear((2, 150), 320, 1280, gated=True), 1e-3),
    "linear and a gate, odd sizes": (linear((3, 43), 72, 136, gated=True, biased=False), 1e-3),
    **{
        f"step {n} slots guided={g}": (sampler_step(n, g), 1e-6)
        for n in range(5)
        for g in (False, True)
    },
    "conv 320 to 320": (conv3x3((1, 320, 16, 16), 320), 5e-4),
    "conv odd sizes, a sum": (conv3x3((2, 40, 9, 17), 72, ends=True), 5e-4),
    "conv of few pixels, in splits": (conv3x3((2, 320, 8, 8), 136, ends=True), 5e-4),
    "conv of three small maps": (conv3x3((3, 64, 4, 4), 64, ends=True), 5e-4),
    "conv upsampled": (conv3x3((1, 64, 8, 8), 64, upsample=True, ends=True), 1e-3),
    "conv upsampled, odd sizes": (conv3x3((2, 24, 5, 19), 40, upsample=True), 1e-3),
    "conv to 3 channels": (conv3x3((1, 128, 12, 12), 3), 5e-4),
    "conv of fp8": (conv3x3((2, 128, 9, 17), 64, ends=True, fp8=True), 5e-4),
    "conv of fp8, in splits": (conv3x3((1, 320, 8, 8), 32, fp8=True), 5e-4),
    **{f"unet, {name}": (unet(name), 1e-5) for name in ("triton", "triton-group")},
    **{
        f"unet, our products, linear={each}": (products(linear=each), 5e-3)
        for each in (True, False)
    },
    "step fp32 NCHW": (sampler_step(4, True, dtype=FULL, channels_last=False), 1e-6),
    "step bf16": (sampler_step(2, True, dtype=BRAIN), 1e-6),
}

if torch.cuda.is_available():  # Triton's interpreter multiplies bf16's bit patterns as integers
    CASES["linear bf16"] = (linear((2, 70), 64, 96, dtype=BRAIN, ends=True), 4e-3)
    CASES["conv bf16"] = (conv3x3((1, 64, 8, 8), 64, dtype=BRAIN, ends=True), 4e-3)
    CASES |= {
        f"norm {'x'.join(map(str, s))} fp16": (group_norm(s, HALF, rows=1), 5e-4) for s in TRUE_MAPS
    }


def measured(name: str, device: str) -> float:
    """Return a case's error; infinity, and why on stderr, where it raises one."""
    try:
        return CASES[name][0](device)
    except Exception:  # noqa: BLE001  (compilers have their own, and the other cases count)
        print(f"{name}: {traceback.format_exc()}", file=sys.stderr)
        return math.inf


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False  # it is held to fp32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    json.dump({name: measured(name, device) for name in CASES}, sys.stdout)
