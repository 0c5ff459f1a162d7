"""The 3x3 convolution in Triton: an implicit product of pixels by output channels.

A row of the product is an output pixel, a column an output channel, and the sum runs over nine taps
of C channels each, read from the map where they lie: nothing is unfolded. Source of the scheme:
Chetlur et al. 2014, arXiv:1410.0759. The tiles are untimed first choices.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 32  # 64 spills registers on sm_80
WARPS, STAGES = 8, 3


@triton.jit
def add_taps(
    total,
    x,
    weight,
    pixel,
    inside,
    n,
    C,
    O,
    tap_at,
    columns,
    BLOCK_K: tl.constexpr,
):
    """Add one tap's product over the C channels of one source."""
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            x + pixel[:, None] * C + c[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + n[None, :] * columns + tap_at + c[:, None],
            mask=(n < O)[None, :] & (c < C)[:, None],
            other=0.0,
        )
        total = tl.dot(a, w, total)
    return total


@triton.jit
def conv3x3(
    x,
    skip,
    weight,
    bias,
    shift,
    residual,
    out,
    pixels,
    C,
    S,
    O,
    H,
    W,
    out_H,
    out_W,
    STRIDE: tl.constexpr,
    UP: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of output pixels by channels. x: (B, H, W, C), weight: (O, 3, 3, C + S)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    picture = m // (out_H * out_W)
    row = m // out_W % out_H * STRIDE
    column = m % out_W * STRIDE
    columns = 9 * (C + S)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for tap in range(9):  # not unrolled: the code would be nine times as long
        i = row + tap // 3 - 1
        j = column + tap % 3 - 1
        inside = (i >= 0) & (i < H * UP) & (j >= 0) & (j < W * UP) & (m < pixels)
        pixel = ((picture * H + i // UP) * W + j // UP).to(tl.int64)
        at = tap * (C + S)
        total = add_taps(total, x, weight, pixel, inside, n, C, O, at, columns, BLOCK_K)
        if HAS_SKIP:
            at = at + C
            total = add_taps(total, skip, weight, pixel, inside, n, S, O, at, columns, BLOCK_K)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < O, other=0.0).to(tl.float32)[None, :]
    mask = (m < pixels)[:, None] & (n < O)[None, :]
    if HAS_SHIFT:
        total += tl.load(shift + picture[:, None] * O + n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    where = m[:, None].to(tl.int64) * O + n[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + where, total.to(out.dtype.element_ty), mask=mask)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: int,
    upsample: bool,
    out: Tensor,
) -> None:
    """Convolve as `kernels.convolution.conv3x3` says; every map channels-last."""
    B, C, H, W = x.shape
    O, out_H, out_W = out.shape[1:]
    pixels = B * out_H * out_W
    conv3x3[(cdiv(pixels, BLOCK_M), cdiv(O, BLOCK_N))](
        x,
        x if skip is None else skip,
        weight,
        x if bias is None else bias,
        x if shift is None else shift.contiguous(),
        x if residual is None else residual,
        out,
        pixels,
        C,
        0 if skip is None else skip.shape[1],
        O,
        H,
        W,
        out_H,
        out_W,
        STRIDE=stride,
        UP=2 if upsample else 1,
        HAS_SKIP=skip is not None,
        HAS_BIAS=bias is not None,
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=WARPS,
        num_stages=STAGES,
    )
