"""Every op in plain torch, in fp32: the truth that the fast ones are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, implementation: str = "reference"
) -> Tensor:
    """Attend as `kernels.attention.attention` does, from the formula; `implementation` is moot."""
    scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return (scores.softmax(dim=-1) @ v.float()).to(q.dtype)
