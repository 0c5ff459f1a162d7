"""Layer normalisation, with the sum before it, in one pass over memory.

Ba et al. 2016, arXiv:1607.06450. A transformer adds each layer's result to what it read and
normalises the sum for the next.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd.kernels import dispatch
from fastsd.kernels.fp8 import in_fp8


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    added: Tensor | None = None,
    added_bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    implementation: str = "library",
) -> tuple[Tensor, Tensor]:
    """Return t = x + added + added_bias, and t normalised over its last axis, by weight and bias.

    x, added: (…, C), any float dtype; t is in it; statistics are fp32. added: None for nothing, and
    then t is x. added_bias: (C,), to be added with added, or None. weight, bias: (C,), of what is
    normalised. multiplier: (), fp32: return that in fp8 (e4m3), times this. implementation:
    "library" (torch) or "triton" (one launch). Raises UsageError for an unknown name.
    """
    if implementation == "library":
        more = added if added is None or added_bias is None else added + added_bias
        total = x if more is None else x + more
        y = F.layer_norm(total, (x.shape[-1],), weight, bias, eps)
        return total, y if multiplier is None else in_fp8(y, multiplier)
    dispatch.require("layer_norm", implementation, x.device)
    x = x.contiguous()
    added = None if added is None else added.contiguous()
    total = x if added is None else torch.empty_like(x)
    out = torch.empty_like(x, dtype=None if multiplier is None else torch.float8_e4m3fn)
    sum_ = None if added is None else total
    torch.ops.fastsd.layer_norm(x, added, added_bias, weight, bias, eps, multiplier, sum_, out)
    return total, out


def candidates(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    added: Tensor | None = None,
    added_bias: Tensor | None = None,
) -> dict[str, Callable[[], Tensor]]:
    """Return what can compute this on its device, by name, ready to be tried."""

    def compute(*, implementation: str) -> Tensor:
        return layer_norm(
            x, weight, bias, eps, added=added, added_bias=added_bias, implementation=implementation
        )[1]

    return dispatch.candidates("layer_norm", x.device, compute)


dispatch.launched(
    "layer_norm",
    "(Tensor x, Tensor? added, Tensor? added_bias, Tensor weight, Tensor bias, float eps, "
    "Tensor? multiplier, Tensor(a!)? total, Tensor(b!) out) -> ()",
    writes=("total", "out"),
)
