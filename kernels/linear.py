"""A linear layer with what follows it in a transformer: a gate, or the residual sum.

y = x W^T + b + residual, or value * gelu(gate) of the halves of x W^T + b (Shazeer 2020,
arXiv:2002.05202). As library calls each is a pass over memory of its own; a kernel of ours writes
the result once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd.errors import UsageError
from fastsd.kernels import dispatch
from fastsd.kernels.geglu import geglu

SINCE = (9, 0)  # compute capability: Hopper's, whose tensor memory accelerator reads the tiles


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
    implementation: str = "library",
) -> Tensor:
    """Multiply x (…, C) by weight (O, C), and add bias (O,) and residual (…, O).

    All of one floating dtype. gated: return (…, O / 2), the result's first half times gelu of its
    second, and take no residual. implementation: "library" (torch), or "triton", which computes
    half precision. Returns (…, O) in x's dtype; sums are fp32. Raises UsageError for an unknown
    name, or for what triton does not compute.
    """
    if implementation == "library":
        y = F.linear(x, weight, bias)
        if gated:
            return geglu(y)
        return y if residual is None else residual + y
    dispatch.require("linear", implementation, x.device)
    if not fits(weight, x.dtype):
        raise UsageError(
            "linear by triton computes fp16 and bf16, of whole 16 bytes of channels, on GPUs since "
            f"Hopper, not {x.dtype} of {x.shape[-1]} channels here; use 'library'"
        )
    if x.shape[-1] != weight.shape[1]:
        raise UsageError(f"linear: a weight of {weight.shape[1]} channels, {x.shape[-1]} given")
    outputs = weight.shape[0] // (2 if gated else 1)
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    residual = None if residual is None or gated else residual.expand(out.shape).contiguous()
    torch.ops.fastsd.linear(x.contiguous(), weight.contiguous(), bias, residual, gated, out)
    return out


def candidates(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
) -> dict[str, Callable[[], Tensor]]:
    """Return what can compute this on its device, by name, ready to be tried."""
    return dispatch.candidates(
        "linear",
        x.device,
        partial(linear, x, weight, bias, residual=residual, gated=gated),
        without=() if fits(weight, x.dtype) else ("triton",),
    )


def fits(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel multiplies rows in `dtype` by a weight (O, C, …) where that is."""
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < SINCE:
        return False
    halves = (torch.float16, torch.bfloat16)
    return weight.dtype == dtype and dtype in halves and weight.shape[1] % 8 == 0


dispatch.launched(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool gated, Tensor(a!) out) -> ()",
)
