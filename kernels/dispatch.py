"""Which implementation of an op runs, and why: asked for, measured as fastest, or the library's.

A kernel of ours runs only where somebody asks for it or a committed row shows that it is faster on
that GPU model and no worse. Nothing falls back in silence: what cannot run as asked is an error,
and `explain` says what runs. Knows no model.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType

import torch

from fastsd.errors import MissingDependency, UsageError

# op -> what can compute it; the first is the library's, and the default
IMPLEMENTATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention": ("sdpa", "flash", "efficient", "cudnn", "xformers", "avx512", "vnni"),
        "conv3x3": ("library", "triton"),
        "group_norm_silu": ("library", "triton"),
        "sampler_step": ("library", "triton"),
    }
)
# (op, GPU model) -> the implementation that a row under benchmarks/results/ shows to be fastest.
# Empty, because no kernel here has been timed yet.
MEASURED: Mapping[tuple[str, str], str] = MappingProxyType({})
ON_GPUS = ("flash", "efficient", "cudnn", "xformers", "triton")


@dataclass(frozen=True)
class Choice:
    """What computes an op, and the reason."""

    op: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.implementation} ({self.reason})"


def choose(op: str, device: torch.device, asked: str | None = None) -> Choice:
    """Return what computes `op` on `device`: what is asked for, else what is known to be fastest.

    Raises UsageError for an unknown op or implementation or one that this device cannot run,
    MissingDependency where its package is absent.
    """
    known = _known(op)
    if asked is not None:
        require(op, asked, device)
        return Choice(op, asked, "asked for")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if gpu is None:
        return Choice(op, known[0], "the library's, as there is no GPU")
    if (op, gpu) in MEASURED:
        return Choice(op, MEASURED[op, gpu], f"measured as the fastest on {gpu}")
    return Choice(op, known[0], f"the library's: no row has measured another on {gpu}")


def explain(op: str, device: torch.device, asked: str | None = None) -> str:
    """Say which implementation of `op` runs on `device`, and why."""
    return str(choose(op, device, asked))


def require(op: str, implementation: str, device: torch.device | None = None) -> None:
    """Raise unless `implementation` is one of `op` and, if a device is given, can run there."""
    known = _known(op)
    if implementation not in known:
        raise UsageError(
            f"{op} implementation {implementation!r} is unknown; it is one of {', '.join(known)}"
        )
    if device is None or implementation not in ON_GPUS:
        return
    if device.type != "cuda" and not (implementation == "triton" and interprets()):
        raise UsageError(
            f"{op} implementation {implementation!r} runs on GPUs, not on {device.type}; "
            f"use {known[0]!r}"
        )
    if implementation == "triton" and importlib.util.find_spec("triton") is None:
        raise MissingDependency(
            f"{op} implementation 'triton' needs the package triton, which is not installed; run "
            f"pip install triton or use {known[0]!r}"
        )


def interprets() -> bool:
    """Whether Triton was told to run kernels in Python, on the CPU: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _known(op: str) -> tuple[str, ...]:
    if op not in IMPLEMENTATIONS:
        raise UsageError(f"op {op!r} is unknown; it is one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[op]


def time_ms(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 20, warm_ups: int = 3
) -> dict[str, float]:
    """Time candidates on the current GPU in turns, A B C A B C: the median of each, in ms."""
    for candidate in candidates.values():
        for _ in range(warm_ups):
            candidate()
    marks: dict[str, list[tuple[torch.Event, torch.Event]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        # Half a millisecond of waiting, behind which launches queue up: what they take in Python,
        # and a graph would not, is not in the time between events then.
        torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
        for name, candidate in candidates.items():
            start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
            start.record()
            candidate()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    times: dict[str, float] = {}
    for name, pairs in marks.items():
        times[name] = median(start.elapsed_time(end) for start, end in pairs)
    return times
