"""Group normalisation, with what stands before and after it, in one pass over memory.

y = (x + added - mean) / sqrt(var + eps) * weight + bias, mean and variance over a group's channels
and all pixels; and silu(y) where a convolution follows. Wu & He 2018, arXiv:1803.08494; Elfwing et
al. 2017, arXiv:1702.03118.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd.errors import UsageError
from fastsd.kernels import dispatch
from fastsd.kernels.fp8 import in_fp8


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    added: Tensor | None = None,
    silu: bool = False,
    multiplier: Tensor | None = None,
    implementation: str = "library",
) -> Tensor:
    """Normalise x (B, C, H, W) group by group, scale by weight (C,), add bias (C,).

    Any float dtype; statistics are fp32. added: (B or 1, C), to every pixel first. silu: apply it
    to the result. multiplier: (), fp32: return fp8 (e4m3), times this. implementation: "library"
    (torch, any layout), or "triton" (two launches) and "triton-group" (one, where a group fits in a
    program's registers, else two), which compute and return channels-last.
    Returns (B, C, H, W) in x's dtype. Raises UsageError if groups does not divide C, or for an
    unknown name.
    """
    if implementation == "library":
        if added is not None:
            x = x + added[:, :, None, None]
        y = torch.group_norm(x, groups, weight, bias, eps)  # F's refuses one value a group
        y = F.silu(y) if silu else y
        return y if multiplier is None else in_fp8(y, multiplier)
    dispatch.require("group_norm", implementation, x.device)
    if x.shape[1] % groups:
        raise UsageError(f"{groups} groups do not divide {x.shape[1]} channels")
    x = x.contiguous(memory_format=torch.channels_last)
    kind = None if multiplier is None else torch.float8_e4m3fn
    out = torch.empty_like(x, dtype=kind, memory_format=torch.channels_last)
    if added is not None and added.stride(1) != 1:
        added = added.contiguous()
    by_group = implementation == "triton-group" and _fits(x, groups)
    torch.ops.fastsd.group_norm(
        x, weight, bias, groups, eps, added, silu, multiplier, by_group, out
    )
    return out


def candidates(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    added: Tensor | None = None,
    silu: bool = False,
) -> dict[str, Callable[[], Tensor]]:
    """Return what can compute this on its device, by name, ready to be tried, the library's first.

    All give the result channels-last, as the convolution after it reads it.
    """

    def compute(*, implementation: str) -> Tensor:
        out = group_norm(
            x, weight, bias, groups, eps, added=added, silu=silu, implementation=implementation
        )
        return out.contiguous(memory_format=torch.channels_last)

    found = dispatch.candidates("group_norm", x.device, compute)
    if "triton-group" in found and not _fits(x, groups):
        del found["triton-group"]
    return found


def _fits(x: Tensor, groups: int) -> bool:
    from fastsd.kernels import triton_group_norm  # triton may be absent, and is slow to import

    return triton_group_norm.fits(x.shape[1], groups, x.shape[2] * x.shape[3])


dispatch.launched(
    "group_norm",
    "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? added, bool silu, "
    "Tensor? multiplier, bool by_group, Tensor(a!) out) -> ()",
)
