"""Which implementations an op has, which of them can run here, and how fast each is.

Nothing falls back in silence: what cannot run as asked is an error. A kernel of ours is in use
where somebody asked for it, or where it was tried on this model of GPU, gave what the library gives
and took less time (fastsd.backends.fastest). Knows no model.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastsd.errors import MissingDependency, UsageError

log = logging.getLogger("fastsd")

# op -> what can compute it; the first is the library's, and the default
IMPLEMENTATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention": (
            *("sdpa", "flash", "flash3", "efficient", "cudnn", "xformers", "triton", "products"),
            *("avx512", "vnni"),
        ),
        "conv3x3": ("library", "triton"),
        "geglu": ("library", "triton"),
        "group_norm": ("library", "triton", "triton-group"),
        "layer_norm": ("library", "triton"),
        "linear": ("library", "triton"),
        "residual": ("library", "triton"),
        "sampler_step": ("library", "triton"),
    }
)
ON_GPUS = (
    *("flash", "flash3", "efficient", "cudnn", "xformers", "products"),
    *("triton", "triton-group"),
)
_TRITON = ("triton", "run pip install triton")
# implementation -> the module that it needs, and how to get it
NEEDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "flash3": ("flash_attn_interface", "install FlashAttention 3, for Hopper GPUs"),
        "triton": _TRITON,
        "triton-group": _TRITON,
        "xformers": ("xformers", "run pip install 'fastsd[xformers]'"),
    }
)
# Relative L2 between two right implementations is below these; a wrong one is far beyond.
AGREEMENT: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float8_e4m3fn: 6e-2}
)


@dataclass(frozen=True)
class Choice:
    """What computes an op, and the reason."""

    op: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.implementation} ({self.reason})"


def choose(op: str, device: torch.device, asked: str | None = None) -> Choice:
    """Return what is asked for, else the library's.

    Raises UsageError for an unknown op or implementation or one that this device cannot run,
    MissingDependency where its package is absent.
    """
    known = _known(op)
    if asked is None:
        where = "" if device.type == "cuda" else f", on {device.type}"
        return Choice(op, known[0], f"the library's{where}")
    require(op, asked, device)
    return Choice(op, asked, "asked for")


def require(op: str, implementation: str, device: torch.device | None = None) -> None:
    """Raise unless `implementation` is one of `op` and, if a device is given, can run there."""
    known = _known(op)
    if implementation not in known:
        raise UsageError(
            f"{op} implementation {implementation!r} is unknown; it is one of {', '.join(known)}"
        )
    if device is None:
        return
    if not _runs_on(implementation, device):
        where = "GPUs" if implementation in ON_GPUS else "CPUs"
        raise UsageError(
            f"{op} implementation {implementation!r} runs on {where}, not on {device.type}; "
            f"use {known[0]!r}"
        )
    if not _installed(implementation):
        raise missing(op, implementation)


def missing(op: str, implementation: str) -> MissingDependency:
    """Return the error for an implementation whose package is not installed."""
    package, remedy = NEEDS[implementation]
    return MissingDependency(
        f"{op} implementation {implementation!r} needs the package {package}, which is not "
        f"installed; {remedy} or use {_known(op)[0]!r}"
    )


def able(op: str, device: torch.device) -> list[str]:
    """Name the implementations of `op` that `require` lets run on `device`, the library's first."""
    return [name for name in _known(op) if _runs_on(name, device) and _installed(name)]


def candidates(
    op: str, device: torch.device, compute: Callable[..., Tensor], *, without: Container[str] = ()
) -> dict[str, Callable[[], Tensor]]:
    """Return what can compute `op` on `device`, by name, ready to be tried, the library's first.

    compute: takes implementation=. without: those that do not fit its inputs.
    """
    return {
        name: partial(compute, implementation=name)
        for name in able(op, device)
        if name not in without
    }


def _runs_on(implementation: str, device: torch.device) -> bool:
    if implementation in ("avx512", "vnni"):
        return device.type == "cpu"
    triton_on_cpu = implementation.startswith("triton") and interprets()
    return device.type == "cuda" or implementation not in ON_GPUS or triton_on_cpu


def _installed(implementation: str) -> bool:
    needed = NEEDS.get(implementation)
    return needed is None or importlib.util.find_spec(needed[0]) is not None


def interprets() -> bool:
    """Whether Triton was told to run kernels in Python, on the CPU: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _known(op: str) -> tuple[str, ...]:
    if op not in IMPLEMENTATIONS:
        raise UsageError(f"op {op!r} is unknown; it is one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[op]


def launched(op: str, signature: str, *, writes: Sequence[str] = ("out",)) -> None:
    """Make `torch.ops.fastsd.<op>`, one node to compilers and exporters, of our Triton kernel.

    It is `fastsd.kernels.triton_<op>.launch`. signature: both's, as torch has schemas; writes: its
    arguments that are written to.
    """

    def call(*given: Any) -> None:
        # Triton may be absent, and is slow to import.
        module = importlib.import_module(f"fastsd.kernels.triton_{op}")
        # It launches on the current device.
        with torch.cuda.device_of(given[0]):  # type: ignore[no-untyped-call]
            module.launch(*given)

    made = torch.library.custom_op(f"fastsd::{op}", call, mutates_args=writes, schema=signature)
    made.register_fake(lambda *_: None)


def try_out(what: str, candidates: Mapping[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Time those candidates that are `agreeing`, in ms (`time_ms`)."""
    return time_ms(agreeing(what, candidates))


def agreeing(
    what: str, candidates: Mapping[str, Callable[[], Tensor]]
) -> dict[str, Callable[[], Tensor]]:
    """Return the candidates that run and agree with the first that does.

    what: the op and its shape. candidates: the library's comes first. One that fails, or disagrees,
    is named in a warning and left out. Where none runs the first one's error is raised, and at once
    what leaves a GPU unusable.
    """
    truth: Tensor | None = None
    failure: Exception | None = None
    found: dict[str, Callable[[], Tensor]] = {}
    for name, candidate in candidates.items():
        try:
            out = candidate()
            if out.is_cuda:
                torch.cuda.current_stream(out.device).synchronize()  # errors come up late there
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # noqa: BLE001  (every compiler and library has its own)
            failure = failure or error
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("%s: %s is not used: it does not run here (%s)", what, name, reason)
            continue
        if truth is None:
            truth = out.clone()
        elif not (error_ := relative_l2(out, truth)) <= AGREEMENT[truth.dtype]:  # NaN is not
            log.warning("%s: %s is not used: it is %.1e from the first", what, name, error_)
            continue
        found[name] = candidate
    if failure is not None and not found:
        raise failure
    return found


def relative_l2(ours: Tensor, truth: Tensor) -> float:
    """Return |ours - truth| / |truth|; NaN where either has one. No copy is in a wider dtype, but
    for fp8's, which torch does not subtract."""
    if truth.dtype.itemsize == 1:
        ours, truth = ours.half(), truth.half()
    norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
    return float(norm(ours - truth) / norm(truth))


@cache
def cpu_gain(dtype: torch.dtype) -> float:
    """Measure how many times as fast as fp32 this CPU multiplies `dtype`: below 1 without
    instructions for it. Takes milliseconds, or half a second there."""
    seconds = []
    for each in (torch.float32, dtype):
        a, b = (torch.ones(768, 768, dtype=each) for _ in range(2))
        times = []
        for _ in range(6):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return seconds[0] / seconds[1]


def time_ms(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 20, warm_ups: int = 3
) -> dict[str, float]:
    """Time candidates on the current GPU in turns, A B C A B C: the median of each, in ms."""
    for candidate in candidates.values():
        for _ in range(warm_ups):
            candidate()
    marks: dict[str, list[tuple[torch.Event, torch.Event]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        # Milliseconds of waiting, behind which launches queue up: what they take in Python, and a
        # graph would not, is not in the time between events then.
        torch.cuda._sleep(4_000_000)  # type: ignore[no-untyped-call]
        for name, candidate in candidates.items():
            start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
            start.record()
            candidate()
            end.record()
            marks[name].append((start, end))
        end.synchronize()
    times: dict[str, float] = {}
    for name, pairs in marks.items():
        times[name] = median(start.elapsed_time(end) for start, end in pairs)
    return times
