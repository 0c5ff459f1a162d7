"""A residual sum with a bias in Triton, in one launch: torch adds each in a pass of its own."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.sizes import cdiv, next_power_of_2

LANES = 128  # channels of a tile
TILE = 2048


@triton.jit(do_not_specialize=["pixels"])
def residual_sum(x, h, bias, out, C, pixels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """out = x + h + bias over one tile of all pictures' pixels, (pixels, C)."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < pixels)[:, None] & (c < C)[None, :]
    at = p[:, None].to(tl.int64) * C + c[None, :]
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


def launch(x: Tensor, h: Tensor, bias: Tensor, out: Tensor) -> None:
    """Write x + h + bias to out, all channels-last (B, C, H, W); bias is (C,)."""
    C = x.shape[1]
    pixels = x.numel() // C
    block_c = min(LANES, next_power_of_2(C))
    block_p = TILE // block_c
    residual_sum[(cdiv(pixels, block_p), cdiv(C, block_c))](
        x, h, bias, out, C, pixels, BLOCK_P=block_p, BLOCK_C=block_c
    )
