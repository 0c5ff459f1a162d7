"""GroupNorm (+ SiLU) of a channels-last map in Triton, in two launches or in one.

A group's channels lie side by side in every pixel, 4 to 80 of them. `launch` splits the pixels
among as many programs as fill the GPU. Each finds its split's means and squared distances, in tiles
of (pixels, channels) that are read 16 bytes at once, of whole groups. In the second launch each
puts all splits' together anew, which takes less than a launch between the two, and has tiles of
other channels, as many as are a power of two. `one_group` has one program a group, which holds it
in its registers.
Nothing is lost where a mean is far from 0: distances are from a mean, or from the first pixel.
"""

from __future__ import annotations

from math import gcd, lcm

import triton
import triton.language as tl
from torch import Tensor, empty, float32

from fastsd.kernels.sizes import cdiv, next_power_of_2
from fastsd.kernels.triton_fp8 import factor_of, rounded

LANES = 128  # channels of a tile: what is read of a pixel is 128 bytes or more
# Elements that a program holds at once, and about how many programs there are: four or eight for
# each of an H100's or H200's 132 multiprocessors. Of maps of FEW pixels first.
FEW = 1024
TILES = ((1024, 1056), (4096, 528))
WARPS = 4
MEMBERS = 32  # groups that a program finds the moments of, at most
SPLITS = 64  # that are put together at once
GROUP_TILE = 32768  # the most elements of a group that a program holds; 64 a thread

# Not specialised are sizes that no address is aligned by: to compile a kernel anew for those that
# are 1, or multiples of 16, wins nothing.


@triton.jit
def activated(y, SILU: tl.constexpr):
    """silu(y), or y."""
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit(do_not_specialize=["pixels", "per_split", "splits", "added_stride"])
def moments(
    x,
    added,
    partial,
    C,
    pixels,
    per_split,
    splits,
    added_stride,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADDED: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Find each group's mean and squared distances from it in one split: partial (B, S, 2, G).

    OWN: channels of BLOCK_C that are the program's, those of whole groups, at most BLOCK_G.
    """
    split = tl.program_id(0)
    b = tl.program_id(1)
    own = tl.arange(0, BLOCK_C)
    c = tl.program_id(2) * OWN + own
    inside = own < OWN
    if (GROUPS * WIDTH) % OWN:
        inside &= c < C
    picture = x + b.to(tl.int64) * pixels * C
    begin = split * per_split
    end = tl.minimum(begin + per_split, pixels)
    shift = tl.load(picture + begin.to(tl.int64) * C + c, mask=inside, other=0.0).to(tl.float32)
    first = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    second = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & inside[None, :]
        v = tl.load(picture + p[:, None].to(tl.int64) * C + c[None, :], mask=mask, other=0.0)
        v = tl.where(mask, v.to(tl.float32) - shift[None, :], 0.0)
        first += v
        second += v * v
    # Chan et al. 1983: the channels' own means and squared distances, then the group's.
    n = (end - begin).to(tl.float32)
    sums = tl.sum(first, axis=0)
    distances = tl.sum(second, axis=0) - sums * sums / n
    means = shift + sums / n
    if ADDED:
        means += tl.load(added + b * added_stride + c, mask=inside, other=0.0).to(tl.float32)
    g = tl.arange(0, BLOCK_G)
    members = inside[:, None] & (own[:, None] // WIDTH == g[None, :])
    mean = tl.sum(tl.where(members, means[:, None], 0.0), axis=0) / WIDTH
    apart = means[:, None] - mean[None, :]
    distance = tl.sum(tl.where(members, distances[:, None] + n * apart * apart, 0.0), axis=0)
    group = tl.program_id(2) * (OWN // WIDTH) + g
    mask = (g < OWN // WIDTH) & (group < GROUPS)
    row = partial + (b * splits + split) * 2 * GROUPS + group
    tl.store(row, mean, mask=mask)
    tl.store(row + GROUPS, distance, mask=mask)


@triton.jit(do_not_specialize=["pixels", "per_split", "splits", "added_stride"])
def normalise(
    x,
    added,
    partial,
    weight,
    bias,
    multiplier,
    out,
    C,
    pixels,
    per_split,
    splits,
    added_stride,
    eps,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADDED: tl.constexpr,
    SILU: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Normalise one split of the pixels by all splits' moments, BLOCK_C channels of each.

    BLOCK_G: of how many groups those can be.
    """
    split = tl.program_id(0)
    b = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    g = tl.program_id(2) * BLOCK_C // WIDTH + tl.arange(0, BLOCK_G)
    factor = factor_of(multiplier, FP8)

    # As many splits as fit at a time, each lot joined to those before by Chan et al.
    mean = tl.zeros([BLOCK_G], dtype=tl.float32)
    distance = tl.zeros([BLOCK_G], dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < splits)[:, None] & (g < GROUPS)[None, :]
        row = partial + (b * splits + s[:, None]) * 2 * GROUPS + g[None, :]
        means = tl.load(row, mask=mask, other=0.0)
        distances = tl.load(row + GROUPS, mask=mask, other=0.0)
        count = tl.minimum(pixels - s * per_split, per_split).to(tl.float32)
        count = tl.where(s < splits, count, 0.0)
        before = tl.minimum(start * per_split, pixels).to(tl.float32)
        here = tl.sum(count, axis=0)
        lot = tl.sum(count[:, None] * means, axis=0) / here
        apart = tl.where(mask, means - lot[None, :], 0.0)
        within = tl.sum(distances + count[:, None] * WIDTH * apart * apart, axis=0)
        step = lot - mean
        mean += step * here / (before + here)
        distance += within + step * step * WIDTH * before * here / (before + here)
    scale = 1.0 / tl.sqrt(distance / (pixels.to(tl.float32) * WIDTH) + eps)

    inside = c < C
    own = c // WIDTH - tl.program_id(2) * BLOCK_C // WIDTH
    own = tl.where(inside, own, 0)
    scale = tl.gather(scale, own, 0)
    scale = scale * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    offset -= tl.gather(mean, own, 0) * scale
    if ADDED:
        more = tl.load(added + b * added_stride + c, mask=inside, other=0.0).to(tl.float32)
        offset += more * scale
    begin = split * per_split
    end = tl.minimum(begin + per_split, pixels)
    picture = b.to(tl.int64) * pixels * C
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & inside[None, :]
        at = picture + p[:, None].to(tl.int64) * C + c[None, :]
        y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        y = activated(y * scale[None, :] + offset[None, :], SILU)
        tl.store(out + at, rounded(y, factor, out.dtype.element_ty, FP8), mask=mask)


@triton.jit(do_not_specialize=["pixels", "groups", "added_stride"])
def one_group(
    x,
    weight,
    bias,
    added,
    multiplier,
    out,
    C,
    pixels,
    groups,
    added_stride,
    eps,
    WIDTH: tl.constexpr,
    ADDED: tl.constexpr,
    SILU: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Normalise one group of one picture, held whole."""
    b = tl.program_id(0) // groups
    w = tl.arange(0, BLOCK_W)
    c = (tl.program_id(0) % groups) * WIDTH + w
    p = tl.arange(0, BLOCK_P)
    mask = (p < pixels)[:, None] & (w < WIDTH)[None, :]
    picture = b.to(tl.int64) * pixels * C
    at = p[:, None] * C + c[None, :]
    factor = factor_of(multiplier, FP8)
    v = tl.load(x + picture + at, mask=mask, other=0.0).to(tl.float32)
    if ADDED:
        more = tl.load(added + b * added_stride + c, mask=w < WIDTH, other=0.0).to(tl.float32)
        v = tl.where(mask, v + more[None, :], 0.0)
    elements = pixels.to(tl.float32) * WIDTH
    v = tl.where(mask, v - tl.sum(tl.sum(v, axis=1), axis=0) / elements, 0.0)
    variance = tl.sum(tl.sum(v * v, axis=1), axis=0) / elements
    scale = tl.load(weight + c, mask=w < WIDTH, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    offset = tl.load(bias + c, mask=w < WIDTH, other=0.0).to(tl.float32)
    y = activated(v * scale[None, :] + offset[None, :], SILU)
    y = rounded(y, factor, out.dtype.element_ty, FP8)
    tl.store(out + picture + at, y, mask=mask)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    added: Tensor | None,
    silu: bool,
    multiplier: Tensor | None,
    by_group: bool,
    out: Tensor,
) -> None:
    """Normalise channels-last x (B, C, H, W) into out, like it or fp8, in two launches.

    by_group: in one launch of a program a group, if it `fits`.
    """
    if by_group:
        _by_group(x, weight, bias, groups, eps, added, silu, multiplier, out)
        return
    B, C, H, W = x.shape
    pixels, width = H * W, C // groups
    own = _whole_groups(C, width)
    block_c = min(LANES, next_power_of_2(gcd(C, LANES)) if C > LANES else next_power_of_2(C))
    tile, programs = TILES[pixels > FEW]
    splits, per_split = _splits(programs, B * cdiv(C, own), pixels, tile // LANES)
    partial = empty((B, splits, 2, groups), dtype=float32, device=x.device)
    given = bias if added is None else added
    sizes = (C, pixels, per_split, splits, _stride(added))
    group = dict(GROUPS=groups, WIDTH=width, ADDED=added is not None, num_warps=WARPS)
    lanes = next_power_of_2(own)
    moments[(splits, B, cdiv(C, own))](
        x,
        given,
        partial,
        *sizes,
        **group,
        OWN=own,
        BLOCK_P=max(1, tile // lanes),
        BLOCK_C=lanes,
        BLOCK_G=next_power_of_2(own // width),
    )
    touched = block_c // width if block_c % width == 0 else (block_c - 2) // width + 2
    normalise[(splits, B, cdiv(C, block_c))](
        x,
        given,
        partial,
        weight,
        bias,
        bias if multiplier is None else multiplier,
        out,
        *sizes,
        eps,
        **group,
        SILU=silu,
        FP8=multiplier is not None,
        BLOCK_P=tile // block_c,
        BLOCK_C=block_c,
        BLOCK_G=next_power_of_2(touched),
        BLOCK_S=SPLITS,
    )


def _whole_groups(channels: int, width: int) -> int:
    """Return how many channels a program of `moments` has: those of whole groups, at most MEMBERS,
    about LANES, and so many that each program's are read 16 bytes at once."""
    unit = lcm(width, 8)
    if unit > 2 * LANES:
        unit = width
    lots = max(1, LANES // unit)
    if lots * unit < 0.75 * LANES:  # little of LANES: of twice as many, more
        lots = max(1, 2 * LANES // unit)
    return min(lots * unit, MEMBERS * width, channels)


def _splits(programs: int, alike: int, pixels: int, tile: int) -> tuple[int, int]:
    """Return into how many parts pixels are split, and the pixels of each, whole tiles.

    programs: that there are to be, of which each part has `alike`.
    """
    splits = max(1, min(cdiv(programs, alike), cdiv(pixels, tile)))
    per_split = cdiv(cdiv(pixels, splits), tile) * tile
    return cdiv(pixels, per_split), per_split


def fits(channels: int, groups: int, pixels: int) -> bool:
    """Whether a program can hold a group."""
    elements: int = next_power_of_2(channels // groups) * next_power_of_2(pixels)
    return elements <= GROUP_TILE


def _by_group(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    added: Tensor | None,
    silu: bool,
    multiplier: Tensor | None,
    out: Tensor,
) -> None:
    B, C, H, W = x.shape
    block_w, block_p = next_power_of_2(C // groups), next_power_of_2(H * W)
    one_group[(B * groups,)](
        x,
        weight,
        bias,
        bias if added is None else added,
        bias if multiplier is None else multiplier,
        out,
        C,
        H * W,
        groups,
        _stride(added),
        eps,
        WIDTH=C // groups,
        ADDED=added is not None,
        SILU=silu,
        FP8=multiplier is not None,
        BLOCK_P=block_p,
        BLOCK_W=block_w,
        num_warps=max(4, min(16, block_p * block_w // 2048)),
    )


def _stride(added: Tensor | None) -> int:
    """How far apart the pictures' rows of `added` (B or 1, C) are: one row is every picture's."""
    return 0 if added is None or len(added) == 1 else added.stride(0)
