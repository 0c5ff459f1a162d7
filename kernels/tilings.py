"""How a product, a convolution or a linear layer, is cut into tiles and splits, by what they take.

Times are an H200's of convolutions, fitted by `fastsd.benchmarks.tilings`; another GPU's order is
taken to be the same. Needs no Triton.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fastsd.kernels.sizes import cdiv

BLOCK_C = 64  # channels of a tap that are multiplied at once; twice as many in fp8


@dataclass(frozen=True)
class Tiling:
    """How a product is cut: pixels by channels, by so many warps, loads so many stages ahead.

    at_once: how many a multiprocessor of an H200 holds; block_us, fixed_us: what one then takes
    there, for each BLOCK_C channels in half precision, and besides. `fastsd.benchmarks.tilings`
    fits them, and says what is lost where they choose wrongly.
    """

    pixels: int
    channels: int
    warps: int
    stages: int
    at_once: int
    block_us: float
    fixed_us: float

    def patch(self, width: int) -> tuple[int, int, int]:
        """Return a rectangle's pictures, height and width, in maps of this width."""
        return (self.pixels // 64, 8, 8) if width <= 8 else (1, self.pixels // 16, 16)


TILINGS = (
    Tiling(256, 128, 8, 4, 1, 0.68, 6.0),
    Tiling(128, 128, 4, 3, 2, 0.80, 4.0),
    Tiling(64, 128, 4, 4, 2, 0.54, 1.2),
)
PARTS_US, PARTS_PER_US = 2.5, 3.5e6  # a second launch, and bytes of parts written and read
SPLITS = 16  # at most
FEWEST = 4  # blocks of channels for which a split is worth its start


class Product(ABC):
    """What is cut. size: of a number that is multiplied, in bytes; elements: of the result."""

    size: int

    @property
    @abstractmethod
    def block(self) -> int:
        """How many channels are multiplied at once."""

    @property
    @abstractmethod
    def blocks(self) -> int:
        """How many times that is done for an output."""

    @property
    @abstractmethod
    def elements(self) -> int:
        """How many outputs there are."""

    @property
    @abstractmethod
    def most_splits(self) -> int:
        """Into how many its sum may be split."""

    @abstractmethod
    def tiles(self, tiling: Tiling) -> int:
        """How many tiles there are."""

    def shared(self, tiling: Tiling) -> int:
        """How many bytes of shared memory its loads ahead take."""
        return tiling.stages * (tiling.pixels + tiling.channels) * self.block * self.size

    def us(self, tiling: Tiling, splits: int, multiprocessors: int) -> float:
        """What it takes so, on an H200 of as many multiprocessors."""
        # fp8 takes half as long; and channels at once count.
        block_us = tiling.block_us * self.size / 2 * self.block / BLOCK_C
        work = cdiv(self.blocks, splits) * block_us
        full, rest = divmod(self.tiles(tiling) * splits, multiprocessors * tiling.at_once)
        us = full * (work + tiling.fixed_us)
        if rest:  # those of the last round have a multiprocessor more to themselves
            alone = cdiv(rest, multiprocessors) / tiling.at_once
            us += work * max(0.6, alone) + tiling.fixed_us
        if splits > 1:
            us += PARTS_US + 8 * splits * self.elements / PARTS_PER_US
        return us


@dataclass(frozen=True)
class Convolution(Product):
    """One of maps (B, C, H, W) to O channels, doubled first if `up`."""

    B: int
    C: int
    H: int
    W: int
    O: int
    up: bool
    size: int

    @property
    def block(self) -> int:
        """128 bytes of channels, the most that is fast."""
        return 2 * BLOCK_C if self.size == 1 and self.C % (2 * BLOCK_C) == 0 else BLOCK_C

    @property
    def blocks(self) -> int:
        """A tap's, for every tap."""
        return (4 if self.up else 9) * cdiv(self.C, self.block)

    @property
    def elements(self) -> int:
        """Those of the map that results."""
        return self.B * self.H * self.W * self.O * (4 if self.up else 1)

    @property
    def most_splits(self) -> int:
        """As many as are worth their start."""
        return max(1, min(SPLITS, self.blocks // FEWEST))

    def tiles(self, tiling: Tiling) -> int:
        """Patches of pixels by channels; of a doubled map for each pixel of four."""
        pictures, height, width = tiling.patch(self.W)
        patches = cdiv(self.B, pictures) * cdiv(self.H, height) * cdiv(self.W, width)
        return patches * cdiv(self.O, tiling.channels) * (4 if self.up else 1)


@dataclass(frozen=True)
class Linear(Product):
    """One of `rows` of C numbers to O, in half precision; if `gated` to O twice, at once."""

    rows: int
    C: int
    O: int
    gated: bool
    size: int = 2
    block: int = BLOCK_C
    most_splits: int = 1

    @property
    def blocks(self) -> int:
        """Those of a row."""
        return cdiv(self.C, self.block)

    @property
    def elements(self) -> int:
        """Those of the result."""
        return self.rows * self.O

    def sizes(self, tiling: Tiling) -> tuple[int, int]:
        """Return a tile's rows and outputs: a gated one has half of each output's two."""
        if self.gated:
            rows = min(tiling.pixels, tiling.channels)
            return rows, tiling.pixels * tiling.channels // (2 * rows)
        return tiling.pixels, tiling.channels

    def tiles(self, tiling: Tiling) -> int:
        """Lots of rows by lots of outputs."""
        rows, outputs = self.sizes(tiling)
        return cdiv(self.rows, rows) * cdiv(self.O, outputs)


@cache
def plan(product: Product, multiprocessors: int, shared: int) -> tuple[Tiling, int]:
    """Choose a tiling and how many splits, by what they would take on an H200.

    shared: bytes that a program may have.
    """
    fits = [tiling for tiling in TILINGS if product.shared(tiling) <= shared]
    cuts = [(tiling, splits) for tiling in fits for splits in range(1, product.most_splits + 1)]
    if not cuts:
        raise RuntimeError(f"no tiling fits in {shared} bytes of shared memory")
    return min(cuts, key=lambda cut: product.us(cut[0], cut[1], multiprocessors))


@cache
def gpu_of(device: torch.device) -> tuple[int, int]:
    """Return its multiprocessors, and the bytes of shared memory that a program may have."""
    if device.type != "cuda":  # the interpreter
        return 4, 1 << 20
    found: Any = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin
