"""Rounding to fp8 (e4m3: Micikevicius et al. 2022, arXiv:2209.05433), by one scale or many."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def in_fp8(x: Tensor, multiplier: Tensor) -> Tensor:
    """Return x * multiplier, () or (C,), fp32, cut to what e4m3 holds, as torch.float8_e4m3fn."""
    return (x.float() * multiplier).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
