"""What this machine could do at best, measured; and how much work a picture is, counted.

FLOP = 2 x multiply-add, attention's products included, element-wise work and norms left out, of the
plain architecture (nothing hoisted out of a step, both guidance rows whole): the same numerator for
every contender. Counted on the meta device by torch's own counter, so nothing is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastsd.checkpoints import open_checkpoint
from fastsd.checkpoints.weights import empty_module
from fastsd.config import ModelConfig
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE

LONG_ENOUGH_S = 0.05  # for a product to have reached its full rate: waking threads can take 10 ms
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}


# --- the work -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one call of a part takes. flop; weights: how many numbers it reads at least."""

    flop: int
    weights: int

    def __mul__(self, calls: int) -> Work:
        return Work(calls * self.flop, calls * self.weights)


def unet_work(config: ModelConfig, size: int, rows: int = 1) -> Work:
    """Count a UNet call for pictures of `size`, `rows` of a batch."""
    unet = cast(UNet, empty_module(lambda: UNet(config.unet)))
    side = size // config.vae.downscale
    tokens = config.text_encoders[0].max_tokens

    def call() -> None:
        extra: tuple[Tensor, ...] = ()
        if config.unet.pooled_width:
            extra = (_empty(rows, config.unet.pooled_width), _empty(rows, config.unet.size_ids))
        unet.standard(
            _empty(rows, config.unet.in_channels, side, side),
            _empty(1),
            _empty(rows, tokens, config.unet.context_width),
            *extra,
        )

    return _count(unet, call)


def vae_work(config: ModelConfig, size: int, rows: int = 1) -> Work:
    """Count a VAE decoder's call for pictures of `size`."""
    vae = cast(VAE, empty_module(lambda: VAE(config.vae)))
    side = size // config.vae.downscale
    work = _count(vae, lambda: vae.decode(_empty(rows, config.vae.latent_channels, side, side)))
    return Work(work.flop, sum(p.numel() for p in vae.decoder.parameters()))


def text_work(config: ModelConfig, rows: int = 1) -> Work:
    """Count all text encoders' calls."""
    flop = weights = 0
    for encoder in config.text_encoders:
        text = empty_module(lambda encoder=encoder: CLIPText(encoder))  # type: ignore[misc]
        ids = torch.empty((rows, encoder.max_tokens), dtype=torch.int64, device="meta")
        work = _count(text, lambda text=text, ids=ids: text(ids))  # type: ignore[misc]
        flop, weights = flop + work.flop, weights + work.weights
    return Work(flop, weights)


def picture_work(
    model: str, size: int, *, batch: int, evaluations: int, guided: bool
) -> dict[str, Work]:
    """Count a whole draw of `batch` pictures, by part."""
    config = open_checkpoint(model).config
    rows = batch * (2 if guided else 1)
    return {
        "text_encoder": text_work(config, rows),
        "unet": unet_work(config, size, rows) * evaluations,
        "vae": vae_work(config, size, batch),
    }


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _count(module: nn.Module, call: Callable[[], object]) -> Work:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call()
    return Work(counter.get_total_flops(), sum(p.numel() for p in module.parameters()))


# --- the ceilings ---------------------------------------------------------------------------------


def measure_ceilings(device: str) -> dict[str, float]:
    """Measure matrix products a precision (FLOP/s; int8: OP/s) and a copy (bytes/s, read + write).

    Of each product the best rate counts up to a size that takes some fifty milliseconds, 4096 on a
    CPU and 16384 on a GPU at most: some CPUs multiply half precision a hundred times slower.
    """
    products = {
        name: partial(_product, dtype, device)
        for name, dtype in (
            ("fp32", torch.float32),
            ("bf16", torch.bfloat16),
            ("fp16", torch.float16),
            ("int8", torch.int8),
        )
    }
    ceilings = {}
    for name, make in products.items():
        try:
            ceilings[name] = _product_rate(make, device)
        except RuntimeError:
            if name != "int8":  # some GPUs' libraries refuse it; `limit` copes without
                raise
    source = torch.ones((1 << 30 if device.startswith("cuda") else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    seconds = quickest(lambda: target.copy_(source), device)
    return {**ceilings, "copy": 2 * source.nbytes / seconds}


def _product(dtype: torch.dtype, device: str, n: int) -> Callable[[], Tensor]:
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (n, n), dtype=dtype, device=device) for _ in range(2))
        if device.startswith("cuda"):
            b = b.t()  # cuBLAS wants the second one by columns
        return lambda: torch._int_mm(a, b)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b)


def _product_rate(make: Callable[[int], Callable[[], Tensor]], device: str) -> float:
    """Return the best rate of all sizes up to one that takes long enough, FLOP/s."""
    n, largest, rate = 256, 16384 if device.startswith("cuda") else 4096, 0.0
    while True:
        seconds = quickest(make(n), device, budget_s=0.1)
        rate = max(rate, 2 * n**3 / seconds)
        if n >= largest or seconds > LONG_ENOUGH_S:
            return rate
        n *= 2


def quickest(call: Callable[[], object], device: str, budget_s: float = 0.4) -> float:
    """Return the least time of repeated calls, seconds, after one to warm up."""
    gpu = device.startswith("cuda")

    def once() -> float:
        start = time.perf_counter()
        call()
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget_s:
        times.append(once())
    return min(times)


@dataclass(frozen=True)
class Limit:
    """The least time that a draw can take here; bound: by what, "compute" or "memory"."""

    seconds: float
    bound: str


def limit(work: dict[str, Work], ceilings: dict[str, float], precision: str) -> Limit | None:
    """Bound a draw by this machine's ceilings: each part by compute or by reading its weights.

    None where the precision's ceiling is not known.
    """
    if precision not in ceilings:
        return None
    compute = [part.flop / ceilings[precision] for part in work.values()]
    memory = [ITEM_BYTES[precision] * part.weights / ceilings["copy"] for part in work.values()]
    seconds = sum(max(pair) for pair in zip(compute, memory, strict=True))
    return Limit(seconds, "compute" if sum(compute) >= sum(memory) else "memory")
