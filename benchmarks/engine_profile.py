"""Where a call of a compiled engine's part goes: python -m fastsd.benchmarks.engine_profile ENGINE.

oneDNN tells of each product it computed and for how long, torch of our own kernels; what is left is
what the compiler wrote (element-wise work, norms over tokens) and torch's own.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastsd.artifact import Artifact
from fastsd.backends import open_artifact
from fastsd.benchmarks.limits import measure_ceilings
from fastsd.checkpoints import open_description
from fastsd.errors import UsageError

_RUN = "run"  # what the watched process prints after each call
_OPEN = 20
_PRECISIONS = {"u8": "int8", "s8": "int8", "bf16": "bf16", "f32": "fp32"}
OWN = "fastsd_cpu::"


@dataclass(frozen=True)
class Product:
    """One kind of product. shape: as oneDNN writes it. operations: 2 x multiply-adds of a call."""

    precision: str
    shape: str
    operations: int


def read_product(line: str) -> tuple[Product, float] | None:
    """Read a line of ONEDNN_VERBOSE=profile_exec: what was computed, and its seconds."""
    fields = line.strip().split(",")
    if "exec" not in fields or len(fields) < 3:
        return None
    source = re.search(r"\bsrc:(\w+)", line)
    shape, milliseconds = fields[-2], float(fields[-1])
    if source is None or source[1] not in _PRECISIONS or not (count := operations(shape)):
        return None
    return Product(_PRECISIONS[source[1]], shape, count), milliseconds / 1000


def operations(shape: str) -> int:
    """Count 2 x multiply-adds of a matrix product or convolution; 0 for what is neither."""
    if matrix := re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+):(?:\1x)?\3x(\d+)", shape):
        return 2 * math.prod(int(size) for size in matrix.groups("1"))
    sizes = {name: int(size) for name, size in re.findall(r"([a-z]+)(\d+)", shape)}
    if {"mb", "ic", "oc"} <= set(sizes):
        pixels = sizes.get("oh", 1) * sizes.get("ow", 1)
        taps = sizes.get("kh", 1) * sizes.get("kw", 1)
        return 2 * sizes["mb"] * sizes["ic"] * sizes["oc"] * pixels * taps // sizes.get("g", 1)
    return 0


def read_last_call(lines: Iterable[str]) -> tuple[dict[Product, list[float]], float]:
    """Return the products of the last call, each with its times, and the call's own seconds."""
    found: dict[Product, list[float]] = {}
    calls: list[tuple[dict[Product, list[float]], float]] = []
    for line in lines:
        if line.startswith(f"{_RUN} "):
            calls.append((found, float(line.split()[1])))
            found = {}
        elif read := read_product(line):
            found.setdefault(read[0], []).append(read[1])
    return calls[-1]


def call_part(folder: Path, part: str, calls: int) -> dict[str, float]:
    """Call a part on random inputs, saying after each how long it took; return our kernels' times.

    Those are of one more call, under torch's profiler. Sizes that a part leaves open are _OPEN.
    Raises UsageError for a part that the engine does not have.
    """
    artifact = Artifact.open(folder)
    config = open_description(folder).config
    backend = open_artifact(artifact, config, device=torch.device("cpu"))
    if part not in backend.entries:
        raise UsageError(f"{folder} has no part {part!r}; it has {', '.join(backend.entries)}")
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for spec in backend.entries[part].inputs:
        shape = [size if isinstance(size, int) else _OPEN for size in spec.shape]
        dtype = getattr(torch, spec.dtype)
        values = torch.randn(shape, generator=generator)
        inputs[spec.name] = values if dtype.is_floating_point else values.abs().to(dtype)
    for _ in range(calls):
        start = time.perf_counter()
        backend.run(part, inputs)
        print(_RUN, time.perf_counter() - start, flush=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        backend.run(part, inputs)
    return {
        event.key.removeprefix(OWN): event.cpu_time_total / 1e6
        for event in profile.key_averages()
        if event.key.startswith(OWN)
    }


def report(
    part: str,
    products: dict[Product, list[float]],
    seconds: float,
    own: dict[str, float],
    ceilings: dict[str, float],
) -> list[str]:
    """Return the tables, in Markdown: what takes the time, and the ten longest products."""
    time_of: dict[str, float] = {}
    work: dict[str, int] = {}
    for product, times in products.items():
        kind = product.precision
        time_of[kind] = time_of.get(kind, 0.0) + sum(times)
        work[kind] = work.get(kind, 0) + len(times) * product.operations
    rest = seconds - sum(time_of.values()) - sum(own.values())
    lines = [
        f"{part}: {seconds:.3f} s a call",
        "",
        "| what | ms | share | GOP/s | of the limit |",
        "|---|---|---|---|---|",
    ]
    for precision, taken in sorted(time_of.items(), key=lambda item: -item[1]):
        rate = work[precision] / taken
        lines.append(
            f"| {precision} products | {1000 * taken:.1f} | {taken / seconds:.0%} | "
            f"{rate / 1e9:.0f} | {rate / ceilings[precision]:.0%} |"
        )
    for name, taken in (*own.items(), ("element-wise, and the rest", rest)):
        lines.append(f"| {name} | {1000 * taken:.1f} | {taken / seconds:.0%} | | |")
    lines += ["", "| product | calls | ms | GOP/s | of the limit |", "|---|---|---|---|---|"]
    longest = sorted(products.items(), key=lambda item: -sum(item[1]))[:10]
    for product, times in longest:
        rate = len(times) * product.operations / sum(times)
        lines.append(
            f"| {product.precision} {product.shape} | {len(times)} | {1000 * sum(times):.1f} | "
            f"{rate / 1e9:.0f} | {rate / ceilings[product.precision]:.0%} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile parts of an engine and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsd.benchmarks.engine_profile", description=__doc__
    )
    parser.add_argument("engine", type=Path, help="an artifact of `fastsd export --to aoti`")
    parser.add_argument("--part", nargs="+", default=["unet", "vae_decoder"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--calls", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.calls:  # the watched process
        for name, seconds in call_part(given.engine, given.part[0], given.calls).items():
            print("own", name, seconds, flush=True)
        return
    ceilings = measure_ceilings("cpu")
    for part in given.part:
        watched = [sys.executable, "-m", __spec__.name, str(given.engine), "--part", part]
        watched += ["--threads", str(given.threads), "--calls", "3"]
        environment = {**os.environ, "ONEDNN_VERBOSE": "profile_exec"}
        done = subprocess.run(watched, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.returncode)
        lines = done.stdout.splitlines()
        own = {words[1]: float(words[2]) for words in map(str.split, lines) if words[:1] == ["own"]}
        products, seconds = read_last_call(lines)
        print("\n".join(report(part, products, seconds, own, ceilings)), "\n")


if __name__ == "__main__":
    main()
