"""How far apart two tensors are."""

from __future__ import annotations

from torch import Tensor


def relative_l2(ours: Tensor, truth: Tensor) -> float:
    """||ours - truth|| / ||truth|| in float64, after a check that the shapes are equal."""
    assert ours.shape == truth.shape
    difference = ours.double() - truth.double()
    return float(difference.norm() / truth.double().norm())
