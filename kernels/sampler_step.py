"""One row of a StepTable over the sampler's state: guidance, the clean picture, the new state.

Knows no sampler: every number comes from the row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsd.kernels import dispatch, reference


def columns(slots: int) -> int:
    """Return how many numbers of a row are read: c_in, p, q, A | b | c."""
    return 3 + (1 + slots) * (1 + slots + 2)


def sampler_step_(
    sources: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    guidance: Tensor | None = None,
    *,
    implementation: str = "library",
) -> None:
    """Replace x, the slots and D by what row `row` makes of them and of the model's prediction.

    m = prediction, or under guidance u + w (c - u) of its two halves
    D = p x + q m
    [x, s1..sS]' = A [x, s1..sS] + b D + c noise

    sources: (1 + S + 2, B, C, H, W) fp32, contiguous, in place: x, the slots, D (only written), the
    noise (only read). prediction: (B, C, H, W), any float dtype, contiguous or channels-last; with
    guidance (2 B, C, H, W), unconditional first. coefficients: (R, W) fp32; a row holds c_in, p, q,
    then A | b | c row by row, (1 + S, 1 + S + 2) numbers; what follows is not read. row: (1,)
    int64. guidance: (), fp32, the weight w. implementation: "library" (some thirty launches of
    torch, each rounding alone) or "triton" (one).
    """
    if implementation == "library":
        reference.sampler_step_(sources, prediction, coefficients, row, guidance)
        return
    dispatch.require("sampler_step", implementation, sources.device)
    if prediction.stride()[2] != prediction.shape[3] * prediction.stride()[3]:
        prediction = prediction.contiguous()
    torch.ops.fastsd.sampler_step(sources, prediction, coefficients, row, guidance)


def candidates(
    sources: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    guidance: Tensor | None = None,
) -> dict[str, Callable[[], Tensor]]:
    """Return what can step on this device, by name, ready to be tried, the library's first.

    Each begins with a copy of `sources` and returns the state that follows, and D.
    """

    def compute(*, implementation: str) -> Tensor:
        given = sources.clone()
        sampler_step_(given, prediction, coefficients, row, guidance, implementation=implementation)
        return given[:-1]

    return dispatch.candidates("sampler_step", sources.device, compute)


dispatch.launched(
    "sampler_step",
    "(Tensor(a!) sources, Tensor prediction, Tensor coefficients, Tensor row, Tensor? guidance) "
    "-> ()",
    writes=("sources",),
)
