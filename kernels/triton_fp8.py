"""Rounding to fp8 (e4m3) in Triton, as `kernels.fp8` does, for kernels that write it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(y, multiplier, dtype: tl.constexpr, FP8: tl.constexpr):
    """y in dtype; in fp8 first times what `multiplier` points to, and cut to what fp8 holds."""
    if FP8:
        y = tl.minimum(tl.maximum(y * tl.load(multiplier), -448.0), 448.0)
    return y.to(dtype)
