"""The 3x3 convolution in Triton: an implicit product of output channels by pixels.

A column of the product is an output pixel, a row an output channel, and the sum runs over the taps,
of C channels each. A tile's pixels are a rectangle of the map, and each tap's are that rectangle
moved by a pixel: a tensor descriptor reads it whole, zeros where it lies outside, so that nothing
is unfolded or padded (Chetlur et al. 2014, arXiv:1410.0759). Where a map is doubled first, a pixel
of each 2x2 block sees 2x2 pixels of the small map, through sums of the kernel's taps: four kernels
of four taps stand for one of nine over four times the pixels. Where there are too few tiles to fill
the GPU, the sum is split among programs, and a second launch adds the parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastsd.kernels.sizes import cdiv
from fastsd.kernels.tilings import SPLITS, Convolution, Tiling, gpu_of, plan

GROUP = 8  # rectangles whose channels are computed near each other in time: they share weights
SUM_TILE = 256  # elements of the sum of parts that a program has


# Not specialised are sizes that no address is aligned by.
@triton.jit(do_not_specialize=["B", "H", "W", "across", "down", "patches", "elements", "splits"])
def convolve(
    x,
    weight,
    bias,
    scale,
    residual,
    out,
    C,
    O,
    B,
    H,
    W,
    across,
    down,
    patches,
    elements,
    splits,
    UP: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PICTURES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of pixels by channels, or one split of its sum.

    x: describes (B, H, W, C). weight: describes (O, 9 C), or (4 O, 4 C) if UP. out: (B, H', W', O),
    or with PARTS the splits' sums, fp32, one after the other, of `elements` each.
    """
    PIXELS: tl.constexpr = PICTURES * BLOCK_H * BLOCK_W
    SIDE: tl.constexpr = 2 if UP else 3
    # Rectangles in groups, and in a group those of the same channels first: weights stay in L2.
    in_group = GROUP * tl.cdiv(O, BLOCK_O)
    first = tl.program_id(0) // in_group * GROUP
    lines = min(patches - first, GROUP)
    patch = first + tl.program_id(0) % in_group % lines
    o = tl.program_id(0) % in_group // lines * BLOCK_O
    left = patch % across * BLOCK_W
    top = patch // across % down * BLOCK_H
    picture = patch // (across * down) * PICTURES
    phase = tl.program_id(1)
    row, column = top - 1, left - 1
    if UP:  # a block's lower and right pixels see a pixel further
        row += phase // 2
        column += phase % 2
    blocks = tl.cdiv(C, BLOCK_C)
    per_split = tl.cdiv(SIDE * SIDE * blocks, splits)
    begin = tl.program_id(2) * per_split
    end = min(begin + per_split, SIDE * SIDE * blocks)
    total = tl.zeros([BLOCK_O, PIXELS], dtype=tl.float32)
    for k in range(begin, end):
        tap = k // blocks
        c = (k - tap * blocks) * BLOCK_C
        a = x.load([picture, row + tap // SIDE, column + tap % SIDE, c])
        w = weight.load([phase * O + o, tap * C + c])
        # Pixels as the second factor: Triton takes it from shared memory in any shape, and the
        # first through registers unless it is used as it was loaded.
        total = tl.dot(w, a.reshape([PIXELS, BLOCK_C]).T, total)
    y = total.T
    p = tl.arange(0, PIXELS)
    n = o + tl.arange(0, BLOCK_O)
    b = picture + p // (BLOCK_H * BLOCK_W)
    i = top + p // BLOCK_W % BLOCK_H
    j = left + p % BLOCK_W
    mask = ((b < B) & (i < H) & (j < W))[:, None] & (n < O)[None, :]
    if UP:
        pixel = (b * 2 * H + 2 * i + phase // 2) * 2 * W + 2 * j + phase % 2
    else:
        pixel = (b * H + i) * W + j
    at = pixel[:, None].to(tl.int64) * O + n[None, :]
    if PARTS:
        tl.store(out + tl.program_id(2).to(tl.int64) * elements + at, y, mask=mask)
    else:
        if HAS_SCALE:
            y *= tl.load(scale + n, mask=n < O, other=0.0)[None, :]
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < O, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["elements", "splits"])
def sum_parts(
    parts,
    bias,
    scale,
    residual,
    out,
    O,
    elements,
    splits,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the splits' sums, read all at once, and to them what `convolve` adds."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # 32 bits: maps are small where it pays
    mask = at < elements
    split = tl.arange(0, SPLITS)
    from_ = parts + split[:, None].to(tl.int64) * elements + at[None, :]
    read = (split < splits)[:, None] & mask[None, :]
    y = tl.sum(tl.load(from_, mask=read, other=0.0), axis=0)
    n = at % O
    if HAS_SCALE:
        y *= tl.load(scale + n)
    if HAS_BIAS:
        y += tl.load(bias + n).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    up: bool,
    out: Tensor,
    cut: tuple[Tiling, int] | None = None,
) -> None:
    """Convolve as `kernels.conv3x3.conv3x3` says; every map channels-last.

    weight: (O, 9 C), or (4 O, 4 C) if up, contiguous. cut: a tiling and its splits, else `plan`'s.
    """
    B, C, H, W = x.shape
    O = out.shape[1]
    product = Convolution(B, C, H, W, O, up, x.element_size())
    tiling, splits = cut or plan(product, *gpu_of(x.device))
    pictures, height, width = tiling.patch(W)
    block = product.block
    across, down = cdiv(W, width), cdiv(H, height)
    patches = across * down * cdiv(B, pictures)
    flags = dict(
        HAS_BIAS=bias is not None, HAS_SCALE=scale is not None, HAS_RESIDUAL=residual is not None
    )
    added = [out if t is None else t for t in (bias, scale, residual)]
    result, parts = out, None
    if splits > 1:
        result = parts = torch.empty(splits, out.numel(), dtype=torch.float32, device=x.device)
    convolve[(patches * cdiv(O, tiling.channels), 4 if up else 1, splits)](
        TensorDescriptor(
            x, [B, H, W, C], [H * W * C, W * C, C, 1], [pictures, height, width, block]
        ),
        TensorDescriptor(weight, [*weight.shape], [weight.shape[1], 1], [tiling.channels, block]),
        *added,
        result,
        C,
        O,
        B,
        H,
        W,
        across,
        down,
        patches,
        out.numel(),
        splits,
        UP=up,
        PARTS=splits > 1,
        **flags,
        PICTURES=pictures,
        BLOCK_H=height,
        BLOCK_W=width,
        BLOCK_O=tiling.channels,
        BLOCK_C=block,
        GROUP=GROUP,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if parts is not None:
        sum_parts[(cdiv(out.numel(), SUM_TILE),)](
            parts, *added, out, O, out.numel(), splits, **flags, SPLITS=SPLITS, BLOCK=SUM_TILE
        )
