"""Rounding to fp8 (e4m3) in Triton, as `kernels.fp8` does, for kernels that write it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def factor_of(multiplier, FP8: tl.constexpr):
    """What `rounded` multiplies by, to be read before all else, so that nothing waits for it."""
    if FP8:
        return tl.load(multiplier)
    else:
        return 1.0


@triton.jit
def rounded(y, factor, dtype: tl.constexpr, FP8: tl.constexpr):
    """y in dtype; in fp8 first times `factor`, and cut to what fp8 holds. NaN stays NaN."""
    if FP8:
        y = tl.clamp(y * factor, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return y.to(dtype)
