"""Every op in plain torch, from its formula: the truth that the fast ones are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsd.kernels.fp8 import in_fp8


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    multiplier: Tensor | None = None,
) -> Tensor:
    """Attend as `kernels.attention.attention` does, in fp32, from the formula."""
    scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    out = scores.softmax(dim=-1) @ v.float()
    return out.to(q.dtype) if multiplier is None else in_fp8(out, multiplier)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    phases: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    """Convolve as `kernels.conv3x3.conv3x3` does, in fp64, tap by tap; phases are not read."""
    x, weight = x.double(), weight.double()
    if upsample:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    H, W = x.shape[-2:]
    padded = x.new_zeros((*x.shape[:2], H + 2, W + 2))
    padded[:, :, 1:-1, 1:-1] = x
    y = torch.zeros((), dtype=torch.float64, device=x.device)
    for i in range(3):
        for j in range(3):
            tap = padded[:, :, i : i + H, j : j + W]
            y = y + torch.einsum("bchw,oc->bohw", tap, weight[:, :, i, j])
    if scale is not None:
        y = y * scale.double().view(1, -1, 1, 1)
    if bias is not None:
        y = y + bias.double().view(1, -1, 1, 1)
    out: Tensor = (y if residual is None else y + residual.double()).float()
    return out


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
) -> Tensor:
    """Normalise as `kernels.group_norm.group_norm` does, in fp64, from the formula."""
    B, C, H, W = x.shape
    x = x.double() if added is None else x.double() + added.double()[:, :, None, None]
    grouped = x.reshape(B, groups, C // groups, H, W)
    mean = grouped.mean(dim=(2, 3, 4), keepdim=True)
    variance = (grouped - mean).square().mean(dim=(2, 3, 4), keepdim=True)
    y = ((grouped - mean) / (variance + eps).sqrt()).reshape(B, C, H, W)
    y = y * weight.double().view(1, -1, 1, 1) + bias.double().view(1, -1, 1, 1)
    y = y * torch.sigmoid(y) if silu else y
    return y.float() if multiplier is None else in_fp8(y, multiplier)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    added: Tensor | None = None,
    added_bias: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise as `kernels.layer_norm.layer_norm` does, in fp64, from the formula."""
    total = x
    if added is not None:
        more = added.double() if added_bias is None else added.double() + added_bias.double()
        total = (x.double() + more).to(x.dtype)
    t = total.double()
    apart = t - t.mean(dim=-1, keepdim=True)
    variance = apart.square().mean(dim=-1, keepdim=True)
    y = apart / (variance + eps).sqrt() * weight.double() + bias.double()
    return total, y.float() if multiplier is None else in_fp8(y, multiplier)


def geglu(x: Tensor, *, multiplier: Tensor | None = None) -> Tensor:
    """Gate as `kernels.geglu.geglu` does, in fp64, from the formula."""
    value, gate = x.double().chunk(2, dim=-1)
    y = value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return y.float() if multiplier is None else in_fp8(y, multiplier)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Multiply as `kernels.linear.linear` does, in fp64."""
    y = x.double() @ weight.double().t()
    if bias is not None:
        y = y + bias.double()
    if gated:
        return geglu(y)
    return (y if residual is None else y + residual.double()).float()


def residual(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    """Add as `kernels.residual.residual` does, in fp64."""
    return (x.double() + h.double() + bias.double()[:, None, None]).float()


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
