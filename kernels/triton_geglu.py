"""value * gelu(gate) in Triton, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.sizes import cdiv
from fastsd.kernels.triton_fp8 import factor_of, rounded

TILE = 1024  # elements that a program has


@triton.jit
def gelu(x):
    """x times the normal distribution's function of x, right to 2e-7 |x|: Abramowitz and Stegun
    1964, 7.1.26. With the library's erf the arithmetic took longer than the memory."""
    z = tl.abs(x) * 0.8493218002880191  # 2^-z^2 = e^(-x^2 / 2)
    t = 1.0 / (1.0 + 0.27273748 * z)
    series = 1.061405429 * t - 1.453152027
    series = series * t + 1.421413741
    series = series * t - 0.284496736
    series = series * t + 0.254829592
    tail = 0.5 * t * series * tl.exp2(-z * z)  # beyond |x|
    return x * tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit(do_not_specialize=["rows"])
def gated(
    x,
    multiplier,
    out,
    C,
    rows,
    FP8: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out (rows, C) = x[:, :C] * gelu(x[:, C:]), one tile."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (r < rows)[:, None] & (c < C)[None, :]
    at = r[:, None].to(tl.int64) * C + c[None, :]
    factor = factor_of(multiplier, FP8)
    from_ = x + at + r[:, None].to(tl.int64) * C
    value = tl.load(from_, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(from_ + C, mask=mask, other=0.0).to(tl.float32)
    y = value * gelu(gate)
    tl.store(out + at, rounded(y, factor, out.dtype.element_ty, FP8), mask=mask)


def launch(x: Tensor, multiplier: Tensor | None, out: Tensor) -> None:
    """Write x (…, 2 C), gated, to out (…, C)."""
    C = out.shape[-1]
    rows = out.numel() // C
    block_c = 512 if C % 512 == 0 else 256
    block_r = TILE // block_c
    gated[(cdiv(rows, block_r), cdiv(C, block_c))](
        x,
        x if multiplier is None else multiplier,
        out,
        C,
        rows,
        FP8=multiplier is not None,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )
