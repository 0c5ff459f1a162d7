"""A linear layer in Triton, with what follows it: a gate, or a residual sum.

The library's product is a launch, and what follows another that reads and writes the whole result
again. A program has a tile of rows by outputs, which it adds to or gates before it is written. Both
outputs that a gate joins are multiplied with the rows that are loaded for one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastsd.kernels.tilings import Linear, gpu_of, plan
from fastsd.kernels.triton_geglu import gelu

GROUP = 8  # lots of rows whose outputs are computed near each other in time: they share weights


@triton.jit(do_not_specialize=["rows"])
def multiply(
    x,
    weight,
    bias,
    residual,
    out,
    C,
    O,
    rows,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of out (rows, O) = x weight^T + bias + residual, or if GATED of value * gelu(gate).

    x: describes (rows, C). weight: describes (O, C); if GATED (2 O, C), values before gates, as the
    bias has them.
    """
    lots = tl.cdiv(rows, BLOCK_R)
    in_group = GROUP * tl.cdiv(O, BLOCK_O)
    first = tl.program_id(0) // in_group * GROUP
    lines = min(lots - first, GROUP)
    top = (first + tl.program_id(0) % in_group % lines) * BLOCK_R
    left = tl.program_id(0) % in_group // lines * BLOCK_O
    y = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    if GATED:
        gate = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        a = x.load([top, c]).T
        y = tl.dot(weight.load([left, c]), a, y)
        if GATED:
            gate = tl.dot(weight.load([O + left, c]), a, gate)
    y = y.T
    if GATED:
        gate = gate.T
    r = top + tl.arange(0, BLOCK_R)
    o = left + tl.arange(0, BLOCK_O)
    mask = (r < rows)[:, None] & (o < O)[None, :]
    at = r[:, None].to(tl.int64) * O + o[None, :]
    if HAS_BIAS:
        y += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
        if GATED:
            gate += tl.load(bias + O + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    if GATED:
        y *= gelu(gate)
    if HAS_RESIDUAL:
        y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    out: Tensor,
) -> None:
    """Multiply as `kernels.linear.linear` says; all contiguous."""
    C, O = x.shape[-1], out.shape[-1]
    rows = x.numel() // C
    product = Linear(rows, C, O, gated)
    tiling, _ = plan(product, *gpu_of(x.device))
    of_rows, of_outputs = product.sizes(tiling)
    multiply[(product.tiles(tiling),)](
        TensorDescriptor(x, [rows, C], [C, 1], [of_rows, product.block]),
        TensorDescriptor(weight, [*weight.shape], [C, 1], [of_outputs, product.block]),
        *(out if t is None else t for t in (bias, residual)),
        out,
        C,
        O,
        rows,
        GATED=gated,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_R=of_rows,
        BLOCK_O=of_outputs,
        BLOCK_C=product.block,
        GROUP=GROUP,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
