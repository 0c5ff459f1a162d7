"""The sampler step in Triton: guidance, the clean picture and the new state in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.sizes import cdiv, next_power_of_2

BLOCK = 512


@triton.jit
def step(
    sources,
    prediction,
    coefficients,
    row,
    guidance,
    elements,
    picture,
    pixels,
    columns,
    stride_b,
    stride_c,
    stride_p,
    STATE: tl.constexpr,
    SOURCES: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace sources[:STATE] by A [x, slots] + b D + c noise, sources[STATE] by D, over BLOCK
    elements.

    sources: STATE + 2 times `elements` numbers: x, the slots, D (written only), the noise. A
    picture has `picture` elements in planes of `pixels`; the strides are the prediction's.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    numbers = coefficients + tl.load(row) * columns

    b, rest = i // picture, i % picture
    at = b * stride_b + rest // pixels * stride_c + rest % pixels * stride_p
    m = tl.load(prediction + at, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        half = elements // picture * stride_b
        conditional = tl.load(prediction + half + at, mask=inside, other=0.0).to(tl.float32)
        m = m + tl.load(guidance) * (conditional - m)
    x = tl.load(sources + i, mask=inside, other=0.0)
    clean = tl.load(numbers + 1) * x + tl.load(numbers + 2) * m

    # Every source is read before the first result is written over one of them.
    j = tl.arange(0, SOURCES)[:, None]
    given = tl.load(
        sources + j.to(tl.int64) * elements + i[None, :],
        mask=(j < STATE + 2) & inside[None, :],
        other=0.0,
    )
    given = tl.where(j == STATE, clean[None, :], given)
    for slot in tl.static_range(STATE):
        mixing = tl.load(numbers + 3 + slot * (STATE + 2) + j, mask=j < STATE + 2, other=0.0)
        result = tl.sum(mixing * given, axis=0)
        tl.store(sources + slot * elements + i, result, mask=inside)
    tl.store(sources + STATE * elements + i, clean, mask=inside)


def launch(
    sources: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    row: Tensor,
    guidance: Tensor | None,
) -> None:
    """Step as `kernels.sampler_step.sampler_step_` says."""
    elements = sources[0].numel()
    state = len(sources) - 2
    _, C, H, W = sources.shape[1:]
    stride_b, stride_c, _, stride_p = prediction.stride()
    step[(cdiv(elements, BLOCK),)](
        sources,
        prediction,
        coefficients,
        row,
        coefficients if guidance is None else guidance,
        elements,
        C * H * W,
        H * W,
        coefficients.shape[1],
        stride_b,
        stride_c,
        stride_p,
        STATE=state,
        SOURCES=next_power_of_2(state + 2),
        GUIDED=guidance is not None,
        BLOCK=BLOCK,
    )
