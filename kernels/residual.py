"""What ends a resnet: the sum of its input, its last convolution and that one's bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastsd.kernels import dispatch


def residual(x: Tensor, h: Tensor, bias: Tensor, *, implementation: str = "library") -> Tensor:
    """Return x + h + bias: (B, C, H, W) twice, any float dtype, and (C,).

    implementation: "library" (torch, two passes) or "triton" (one, channels-last). Raises
    UsageError for an unknown name.
    """
    if implementation == "library":
        return x + (h + bias[:, None, None])
    dispatch.require("residual", implementation, x.device)
    x, h = (t.contiguous(memory_format=torch.channels_last) for t in (x, h))
    out = torch.empty_like(x, memory_format=torch.channels_last)
    torch.ops.fastsd.residual(x, h, bias, out)
    return out


def candidates(x: Tensor, h: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return what can compute this on its device, by name, ready to be tried."""
    return dispatch.candidates("residual", x.device, partial(residual, x, h, bias))


dispatch.launched("residual", "(Tensor x, Tensor h, Tensor bias, Tensor(a!) out) -> ()")
