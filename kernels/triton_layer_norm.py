"""A residual sum and the LayerNorm of it in Triton: one launch, all read and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.sizes import cdiv, next_power_of_2
from fastsd.kernels.triton_fp8 import factor_of, rounded

TILE = 4096  # elements that a program holds at once


@triton.jit(do_not_specialize=["rows"])
def add_layer_norm(
    x,
    added,
    added_bias,
    weight,
    bias,
    multiplier,
    total,
    out,
    C,
    rows,
    eps,
    ADDED: tl.constexpr,
    BIASED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """total = x + added + added_bias; out = its LayerNorm, over BLOCK_R rows of C numbers each."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    mask = (r < rows)[:, None] & (c < C)[None, :]
    at = r[:, None].to(tl.int64) * C + c[None, :]
    factor = factor_of(multiplier, FP8)
    gain = tl.load(weight + c, mask=c < C, other=0.0)
    offset = tl.load(bias + c, mask=c < C, other=0.0)
    v = tl.load(x + at, mask=mask, other=0.0)
    if ADDED:
        more = tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
        if BIASED:
            more += tl.load(added_bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        v = (v.to(tl.float32) + more).to(total.dtype.element_ty)  # as it is read again
        tl.store(total + at, v, mask=mask)
    v = v.to(tl.float32)
    v = tl.where(mask, v - (tl.sum(v, axis=1) / C)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, axis=1) / C + eps)
    y = v * scale[:, None] * gain.to(tl.float32)[None, :] + offset.to(tl.float32)[None, :]
    tl.store(out + at, rounded(y, factor, out.dtype.element_ty, FP8), mask=mask)


def launch(
    x: Tensor,
    added: Tensor | None,
    added_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    multiplier: Tensor | None,
    total: Tensor | None,
    out: Tensor,
) -> None:
    """Write x + added + added_bias to total, if that is asked for, and its LayerNorm to out.

    added_bias, weight, bias: (C,). All others (…, C).
    """
    C = x.shape[-1]
    rows = x.numel() // C
    block_c = next_power_of_2(C)
    block_r = max(1, TILE // block_c)
    add_layer_norm[(cdiv(rows, block_r),)](
        x,
        x if added is None else added,
        weight if added_bias is None else added_bias,
        weight,
        bias,
        weight if multiplier is None else multiplier,
        x if total is None else total,
        out,
        C,
        rows,
        eps,
        ADDED=added is not None,
        BIASED=added_bias is not None,
        FP8=multiplier is not None,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )
