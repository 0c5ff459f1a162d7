"""GroupNorm (+ SiLU) of a channels-last map in Triton, in three launches or in one.

A group's channels lie side by side in every pixel, 10 to 80 of them. `launch` has a program read
whole runs of channels and keep sums for each, the pixels split among as many programs as fill the
GPU. `launch_by_group` has one program a group: a single launch, for maps of few pixels.
The sums are of x - x[pixel 0], which loses no digits where a channel's mean is far from 0; what is
added to a whole channel first changes neither them nor the passes over memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty, float32
from triton import cdiv, next_power_of_2

PROGRAMS = 528  # four for each of an H100's or H200's 132 multiprocessors
TILE = 4096  # elements that a program holds at once
GROUP_TILE = 2048  # where they are a group's: their addresses take registers too
GROUP_WARPS = 8  # groups are too few to fill a GPU, and four spill registers on sm_80

# Not specialised are sizes that no address is aligned by: to compile a kernel anew for those that
# are 1, or multiples of 16, wins nothing.


@triton.jit
def shifted_sums(
    picture,
    shift,
    c,
    inside,
    C,
    begin,
    end,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum x - shift and its square over pixels begin..end of a picture, for each channel c."""
    first = tl.zeros([BLOCK_C], dtype=tl.float32)
    second = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & inside[None, :]
        v = tl.load(picture + p[:, None].to(tl.int64) * C + c[None, :], mask=mask, other=0.0)
        v = tl.where(mask, v.to(tl.float32) - shift[None, :], 0.0)
        first += tl.sum(v, axis=0)
        second += tl.sum(v * v, axis=0)
    return first, second


@triton.jit
def group_affine(
    shift,
    first,
    second,
    weight,
    bias,
    added,
    c,
    inside,
    pixels,
    eps,
    WIDTH: tl.constexpr,
    ADDED: tl.constexpr,
):
    """Turn a group's sums into the scale and offset of each channel: y = x * scale + offset.

    shift: x[pixel 0] of each channel; first, second: sums of x - shift and its square. added:
    what is added to each channel of x before; c: which channels.
    """
    # Chan et al. 1983: the channels' own means and squared distances, then the group's.
    distances = second - first * first / pixels
    means = shift + first / pixels
    if ADDED:
        more = tl.load(added + c, mask=inside, other=0.0).to(tl.float32)
        means += more
    mean = tl.sum(tl.where(inside, means, 0.0), axis=0) / WIDTH
    apart = tl.where(inside, means - mean, 0.0)
    total = tl.sum(tl.where(inside, distances, 0.0), axis=0) + pixels * tl.sum(
        apart * apart, axis=0
    )
    scale = 1.0 / tl.sqrt(total / (pixels * WIDTH) + eps)
    scale = scale * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32) - mean * scale
    if ADDED:
        offset += more * scale
    return scale, offset


@triton.jit
def activated(y, SILU: tl.constexpr):
    """silu(y), or y."""
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit(do_not_specialize=["pixels", "pixels_per_split", "splits"])
def partial_sums(
    x,
    partial,
    C,
    pixels,
    pixels_per_split,
    splits,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum x - x[0] and its square over one split of the pixels: partial (B, splits, 2, C)."""
    b = tl.program_id(0)
    split = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    base = x + b.to(tl.int64) * pixels * C
    shift = tl.load(base + c, mask=inside, other=0.0).to(tl.float32)
    begin = split * pixels_per_split
    end = tl.minimum(begin + pixels_per_split, pixels)
    first, second = shifted_sums(base, shift, c, inside, C, begin, end, BLOCK_P, BLOCK_C)
    row = partial + (b * splits + split).to(tl.int64) * 2 * C
    tl.store(row + c, first, mask=inside)
    tl.store(row + C + c, second, mask=inside)


@triton.jit(do_not_specialize=["pixels", "splits", "groups", "added_stride"])
def group_statistics(
    x,
    partial,
    weight,
    bias,
    added,
    affine,
    C,
    pixels,
    splits,
    groups,
    added_stride,
    eps,
    WIDTH: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add up one group's sums and write its channels' scale and offset: affine (B, 2, C)."""
    b = tl.program_id(0) // groups
    lane = tl.arange(0, BLOCK_G)
    inside = lane < WIDTH
    c = (tl.program_id(0) % groups) * WIDTH + lane
    first = tl.zeros([BLOCK_G], dtype=tl.float32)
    second = tl.zeros([BLOCK_G], dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < splits)[:, None] & inside[None, :]
        row = partial + (b * splits + s[:, None]).to(tl.int64) * 2 * C + c[None, :]
        first += tl.sum(tl.load(row, mask=mask, other=0.0), axis=0)
        second += tl.sum(tl.load(row + C, mask=mask, other=0.0), axis=0)
    shift = tl.load(x + b.to(tl.int64) * pixels * C + c, mask=inside, other=0.0).to(tl.float32)
    more = added + b * added_stride
    scale, offset = group_affine(
        shift, first, second, weight, bias, more, c, inside, pixels, eps, WIDTH, ADDED
    )
    tl.store(affine + b * 2 * C + c, scale, mask=inside)
    tl.store(affine + b * 2 * C + C + c, offset, mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def apply(
    x,
    affine,
    out,
    C,
    pixels,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = x * affine[0] + affine[1], or its SiLU, over one tile of pixels and channels."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # a grid's other axes end at 65535
    b = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    mask = (p < pixels)[:, None] & inside[None, :]
    scale = tl.load(affine + b * 2 * C + c, mask=inside, other=0.0)
    offset = tl.load(affine + b * 2 * C + C + c, mask=inside, other=0.0)
    at = b.to(tl.int64) * pixels * C + p[:, None].to(tl.int64) * C + c[None, :]
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
    tl.store(out + at, activated(y, SILU).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "groups", "added_stride"])
def one_group(
    x,
    weight,
    bias,
    added,
    out,
    C,
    pixels,
    groups,
    added_stride,
    eps,
    WIDTH: tl.constexpr,
    ADDED: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Normalise one group of one picture, reading it twice."""
    b = tl.program_id(0) // groups
    lane = tl.arange(0, BLOCK_G)
    inside = lane < WIDTH
    c = (tl.program_id(0) % groups) * WIDTH + lane
    start_of = b.to(tl.int64) * pixels * C
    shift = tl.load(x + start_of + c, mask=inside, other=0.0).to(tl.float32)
    first, second = shifted_sums(x + start_of, shift, c, inside, C, 0, pixels, BLOCK_P, BLOCK_G)
    more = added + b * added_stride
    scale, offset = group_affine(
        shift, first, second, weight, bias, more, c, inside, pixels, eps, WIDTH, ADDED
    )
    for start in range(0, pixels, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < pixels)[:, None] & inside[None, :]
        at = start_of + p[:, None].to(tl.int64) * C + c[None, :]
        y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        y = activated(y * scale[None, :] + offset[None, :], SILU)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


def blocks(channels: int) -> tuple[int, int]:
    """Return (pixels, channels) of a tile: runs of up to 512 channels, TILE elements in all."""
    block_c = min(512, next_power_of_2(channels))
    return max(1, TILE // block_c), block_c


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    added: Tensor | None,
    silu: bool,
    out: Tensor,
) -> None:
    """Normalise channels-last x (B, C, H, W) into out, which is like it, in three launches."""
    B, C, H, W = x.shape
    pixels, width = H * W, C // groups
    block_p, block_c = blocks(C)
    across = cdiv(C, block_c)
    splits = max(1, min(cdiv(PROGRAMS, B * across), cdiv(pixels, block_p)))
    pixels_per_split = cdiv(cdiv(pixels, splits), block_p) * block_p
    splits = cdiv(pixels, pixels_per_split)
    partial = empty((B, splits, 2, C), dtype=float32, device=x.device)
    affine = empty((B, 2, C), dtype=float32, device=x.device)
    partial_sums[(B, splits, across)](
        x, partial, C, pixels, pixels_per_split, splits, BLOCK_P=block_p, BLOCK_C=block_c
    )
    group_statistics[(B * groups,)](
        x,
        partial,
        weight,
        bias,
        bias if added is None else added,
        affine,
        C,
        pixels,
        splits,
        groups,
        _stride(added),
        eps,
        WIDTH=width,
        ADDED=added is not None,
        BLOCK_G=next_power_of_2(width),
        BLOCK_S=16,
    )
    apply[(cdiv(pixels, block_p), B, across)](
        x, affine, out, C, pixels, SILU=silu, BLOCK_P=block_p, BLOCK_C=block_c
    )


def launch_by_group(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    added: Tensor | None,
    silu: bool,
    out: Tensor,
) -> None:
    """Normalise as `launch` does, in one launch of a program a group."""
    B, C, H, W = x.shape
    block_g = next_power_of_2(C // groups)
    one_group[(B * groups,)](
        x,
        weight,
        bias,
        bias if added is None else added,
        out,
        C,
        H * W,
        groups,
        _stride(added),
        eps,
        WIDTH=C // groups,
        ADDED=added is not None,
        SILU=silu,
        BLOCK_P=min(GROUP_TILE // block_g, next_power_of_2(H * W)),
        BLOCK_G=block_g,
        num_warps=GROUP_WARPS,
    )


def _stride(added: Tensor | None) -> int:
    """How far apart the pictures' rows of `added` (B or 1, C) are: one row is every picture's."""
    return 0 if added is None or len(added) == 1 else added.stride(0)
