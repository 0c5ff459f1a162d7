"""Group normalisation and SiLU in one pass over memory, for maps that are channels-last.

y = silu((x - mean) / sqrt(var + eps) * weight + bias), mean and variance over a group's channels
and all pixels. Wu & He 2018, arXiv:1803.08494; Elfwing et al. 2017, arXiv:1702.03118.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd.errors import UsageError
from fastsd.kernels import dispatch


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    implementation: str = "library",
) -> Tensor:
    """Normalise x (B, C, H, W) group by group, scale by weight (C,), add bias (C,), then SiLU.

    Any float dtype; statistics are fp32. implementation: "library" (torch, any layout) or "triton",
    which computes and returns channels-last. Returns (B, C, H, W) in x's dtype.
    Raises UsageError if groups does not divide C, or for an unknown name.
    """
    if implementation == "library":
        return F.silu(F.group_norm(x, groups, weight, bias, eps))
    dispatch.require("group_norm_silu", implementation, x.device)
    if x.shape[1] % groups:
        raise UsageError(f"{groups} groups do not divide {x.shape[1]} channels")
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    torch.ops.fastsd.group_norm_silu(x, weight, bias, groups, eps, out)
    return out


@torch.library.custom_op("fastsd::group_norm_silu", mutates_args=("out",))
def _group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, out: Tensor
) -> None:
    from fastsd.kernels import triton_group_norm  # triton may be absent, and is slow to import

    triton_group_norm.launch(x, weight, bias, groups, eps, out)


@_group_norm_silu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, out: Tensor) -> None:
    return None
