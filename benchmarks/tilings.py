"""What the 3x3 convolution's tilings take on a GPU, by which each launch chooses its own.

There, `python -m fastsd.benchmarks.tilings measure FILE` times every tiling at the shapes of SD1.5,
SDXL and their decoder. Anywhere, `python -m fastsd.benchmarks.tilings fit FILE` prints what
`kernels.tilings.TILINGS` should say of them, and what is lost where they choose wrongly.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastsd.backends.fastest import DECODED, convolutions
from fastsd.checkpoints.weights import empty_module
from fastsd.config import SD15, SDXL
from fastsd.files import read_json, write_json
from fastsd.kernels.dispatch import time_ms
from fastsd.kernels.tilings import BLOCK_C, SPLITS, TILINGS, Convolution, Tiling
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE

FP8, FP16 = 1, 2  # sizes of an element, in bytes


@dataclass(frozen=True)
class Timed:
    """What a product took, cut so. tiling: its place in TILINGS."""

    product: Convolution
    tiling: int
    splits: int
    us: float


def measure(device: torch.device) -> list[Timed]:
    """Time all tilings, in fp16 and in fp8: whole, and split so that one or two rounds are full."""
    gpu: Any = torch.cuda.get_device_properties(device)
    found = []
    for product in products():
        cuts = [
            (i, splits)
            for i, tiling in enumerate(TILINGS)
            if product.shared(tiling) <= gpu.shared_memory_per_block_optin
            for splits in _splits(gpu.multi_processor_count / product.tiles(tiling))
        ]
        convolve = _convolution(product, device)
        calls = {f"{i} {n}": partial(convolve, (TILINGS[i], n)) for i, n in cuts}
        for (i, splits), ms in zip(cuts, time_ms(calls).values(), strict=True):
            found.append(Timed(product, i, splits, round(1000 * ms, 1)))
    return found


def products() -> Iterator[Convolution]:
    """Yield the products of SD1.5 and SDXL, each once, in fp16 and in fp8."""
    seen = set()
    for config in (SD15, SDXL):
        unet = empty_module(partial(UNet, config.unet))
        vae = empty_module(partial(VAE, config.vae))
        assert isinstance(unet, UNet) and isinstance(vae, VAE)
        for shape in convolutions(unet, vae.decoder):
            # A decoder's, one picture's, are grouped by sizes of their own.
            side = shape.side * (config.unet.sample_size // DECODED if shape.rows == 1 else 1)
            for size in (FP16, FP8):
                sizes = (shape.rows, shape.channels, side, side, shape.out)
                product = Convolution(*sizes, up=shape.role == "up", size=size)
                if product not in seen:
                    seen.add(product)
                    yield product


def _splits(rounds: float) -> list[int]:
    """Return numbers of splits for tiles that fill a GPU 1 / rounds times over."""
    return sorted({1, *(min(max(1, int(n * rounds)), SPLITS) for n in (1, 2))})


def _convolution(product: Convolution, device: torch.device) -> Any:
    """Return what computes a product, cut as it is told."""
    from fastsd.kernels.triton_conv3x3 import launch  # Triton may be absent

    B, C, H, W, O = product.B, product.C, product.H, product.W, product.O
    dtype = torch.float16 if product.size == FP16 else torch.float8_e4m3fn
    taps, factor = (4, 2) if product.up else (9, 1)
    x = torch.randn(B, C, H, W, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(factor**2 * O, taps * C, device=device).to(dtype)
    bias = torch.ones(O, dtype=torch.float16, device=device)
    scale = torch.ones(O, device=device) if product.size == FP8 else None
    out = torch.empty(B, O, factor * H, factor * W, dtype=torch.float16, device=device)
    out = out.contiguous(memory_format=torch.channels_last)
    residual = None if product.up else torch.randn_like(out)

    def convolve(cut: tuple[Tiling, int]) -> None:
        launch(x, weight, bias, scale, residual, product.up, out, cut)

    return convolve


def fit(times: Sequence[Timed], multiprocessors: int) -> tuple[Tiling, ...]:
    """Return TILINGS with the times of a block of channels, and besides, that are least wrong."""
    return tuple(
        _fitted(tiling, [t for t in times if t.tiling == i], multiprocessors)
        for i, tiling in enumerate(TILINGS)
    )


def _fitted(tiling: Tiling, times: Sequence[Timed], multiprocessors: int) -> Tiling:
    from scipy.optimize import minimize  # not where only measuring is done

    def of(logarithms: Sequence[float]) -> Tiling:
        block_us, fixed_us = (math.exp(each) for each in logarithms)
        return replace(tiling, block_us=block_us, fixed_us=fixed_us)

    def wrong(logarithms: Sequence[float]) -> float:
        tried = of(logarithms)
        return sum(
            abs(math.log(t.product.us(tried, t.splits, multiprocessors) / t.us)) for t in times
        )

    starts = [(math.log(a), math.log(b)) for a in (0.2, 0.6) for b in (1, 4)]
    return of(min((minimize(wrong, s, method="Nelder-Mead") for s in starts), key=_residue).x)


def _residue(result: Any) -> float:
    return float(result.fun)


def losses(
    times: Sequence[Timed], tilings: Sequence[Tiling], multiprocessors: int
) -> dict[Convolution, float]:
    """By how much each product takes longer than its fastest, if `tilings` choose: 0.02 is 2 %."""
    by_product: dict[Convolution, list[Timed]] = {}
    for timed in times:
        by_product.setdefault(timed.product, []).append(timed)
    lost = {}
    for product, cuts in by_product.items():
        chosen = min(cuts, key=lambda t: t.product.us(tilings[t.tiling], t.splits, multiprocessors))
        lost[product] = chosen.us / min(t.us for t in cuts) - 1
    return lost


def read(file: Path) -> tuple[list[Timed], int]:
    """Return the times in a file that `measure` wrote, and the GPU's multiprocessors."""
    data: Mapping[str, Any] = read_json(file)
    rows = [Timed(**{**row, "product": Convolution(**row["product"])}) for row in data["times"]]
    return rows, data["multiprocessors"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("measure", "fit"))
    parser.add_argument("file", type=Path, help="the times, JSON")
    given = parser.parse_args(arguments)
    if given.what == "measure":
        device = torch.device("cuda")
        gpu = torch.cuda.get_device_properties(device)
        rows = [asdict(timed) for timed in measure(device)]
        table = {"gpu": gpu.name, "multiprocessors": gpu.multi_processor_count, "times": rows}
        write_json(given.file, {**table, "torch": torch.__version__})
        return
    times, multiprocessors = read(given.file)
    for tilings, whose in ((TILINGS, "as they are"), (fit(times, multiprocessors), "fitted")):
        lost = losses(times, tilings, multiprocessors).values()
        print(
            f"{whose}: {100 * sum(lost) / len(lost):.1f} % lost in the mean of {len(lost)} "
            f"products, {100 * max(lost):.0f} % at most"
        )
        for tiling in tilings:
            print(
                f"  {tiling.pixels}x{tiling.channels}: block_us={tiling.block_us:.2f} (for "
                f"{BLOCK_C} channels in fp16), fixed_us={tiling.fixed_us:.1f}"
            )


if __name__ == "__main__":
    main()
