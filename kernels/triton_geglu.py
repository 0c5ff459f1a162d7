"""value * gelu(gate) in Triton, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.sizes import cdiv
from fastsd.kernels.triton_fp8 import factor_of, rounded

TILE = 1024  # elements that a program has


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
    y = value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
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
