"""value * gelu(gate), as feed-forward layers have it: Shazeer 2020, arXiv:2002.05202."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd.kernels import dispatch
from fastsd.kernels.fp8 import in_fp8


def geglu(
    x: Tensor, *, multiplier: Tensor | None = None, implementation: str = "library"
) -> Tensor:
    """(…, 2 C), values and then gates, any float dtype -> (…, C), in x's dtype.

    gelu is the exact one, by erf; triton's is right to 2e-7 |x|. multiplier: (), fp32: return it in
    fp8 (e4m3), times this. implementation: "library" (torch) or "triton" (one launch). Raises
    UsageError for an unknown name.
    """
    if implementation == "library":
        value, gate = x.chunk(2, dim=-1)
        y = value * F.gelu(gate)
        return y if multiplier is None else in_fp8(y, multiplier)
    dispatch.require("geglu", implementation, x.device)
    dtype = x.dtype if multiplier is None else torch.float8_e4m3fn
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=dtype, device=x.device)
    torch.ops.fastsd.geglu(x.contiguous(), multiplier, out)
    return out


def candidates(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return what can compute this on its device, by name, ready to be tried."""
    return dispatch.candidates("geglu", x.device, partial(geglu, x))


dispatch.launched("geglu", "(Tensor x, Tensor? multiplier, Tensor(a!) out) -> ()")
