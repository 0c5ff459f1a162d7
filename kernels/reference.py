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


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    implementation: str = "reference",
) -> Tensor:
    """Normalise as `kernels.group_norm.group_norm_silu` does, in fp64, from the formula."""
    B, C, H, W = x.shape
    grouped = x.double().reshape(B, groups, C // groups, H, W)
    mean = grouped.mean(dim=(2, 3, 4), keepdim=True)
    variance = (grouped - mean).square().mean(dim=(2, 3, 4), keepdim=True)
    y = ((grouped - mean) / (variance + eps).sqrt()).reshape(B, C, H, W)
    y = y * weight.double().view(1, -1, 1, 1) + bias.double().view(1, -1, 1, 1)
    out: Tensor = (y * torch.sigmoid(y)).float()
    return out


def sampler_step_(
    sources: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    guidance: Tensor | None = None,
) -> None:
    """Step as `kernels.sampler_step.sampler_step_` does.

    Products and sums are separate operations, each rounded alone: an element's value then cannot
    depend on where it stands in the batch.
    """
    state = sources[:-2]
    slots = len(state)
    numbers = coefficients.index_select(0, row)[0]
    mixing = numbers[3 : 3 + slots * (slots + 2)].view(slots, slots + 2, 1, 1, 1, 1)
    m = prediction.to(sources.dtype)
    if guidance is not None:
        unconditional, conditional = m.chunk(2)
        m = unconditional + guidance * (conditional - unconditional)
    sources[-2].copy_(numbers[1] * state[0] + numbers[2] * m)
    total = mixing[:, 0] * sources[0]
    for i in range(1, len(sources)):
        total += mixing[:, i] * sources[i]
    state.copy_(total)
