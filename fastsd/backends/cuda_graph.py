"""A step as a CUDA graph: its kernels are launched as one, by address, without Python.

At batch 1 the launches of a UNet's some thousand kernels take as long as the kernels themselves.
Knows nothing of what a step does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from fastsd.backends.base import Backend

WARM_UPS = 3  # libraries choose algorithms and take workspace in the first runs
_capturing = threading.Lock()  # torch captures one graph at a time
# A device's streams for warm-ups and for captures, and the one that last used the latter's cuBLAS
# workspace: there is one a thread and stream, and all graphs that were captured there share it.
_streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}
_latest: dict[torch.device, torch.cuda.Stream] = {}
_launching = threading.Lock()  # guards _latest


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Run `step` a few times, record it, and return what replays the record.

    The record keeps its intermediate results in memory of its own; it is freed with what is
    returned. Replays run one after the other, on whatever streams.
    Raises RuntimeError (torch's) for a step that waits for the device or reads the host.
    """
    with _capturing, torch.no_grad(), torch.cuda.device(device):
        current = torch.cuda.current_stream()
        if current.device not in _streams:
            _streams[current.device] = (torch.cuda.Stream(), torch.cuda.Stream())  # type: ignore[no-untyped-call]
        warm, aside = _streams[current.device]
        warm.wait_stream(current)
        with torch.cuda.stream(warm):
            for _ in range(WARM_UPS):
                step()
        current.wait_stream(warm)
        with _launching:
            with torch.cuda.stream(aside):
                _come_after(aside)
                _take_workspace()
            _come_after(current)  # aside captures from here on: nobody may wait for it
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        # thread_local: what other threads do meanwhile, such as allocating, is none of this one's.
        # A capture that fails leaves the thread on its stream: go back in any case.
        refused = None
        try:
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, pool, aside, "thread_local"),
            ):
                try:
                    step()
                except RuntimeError as error:  # to end the capture raises another over it
                    refused = error
                    raise
        except RuntimeError as error:
            _end(current.device, pool)
            try:
                raise refused or error from None
            finally:
                refused = None  # it holds this frame

    def replay() -> None:
        with _launching:
            _come_after(torch.cuda.current_stream(device))
            graph.replay()  # on that stream

    return replay


def _end(device: torch.device, pool: tuple[int, int]) -> None:
    """Take the allocator out of a capture that failed: torch 2.11 leaves it there for good."""
    for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with suppress(RuntimeError):  # later ones have done it
            end(device.index, pool)


def _come_after(stream: torch.cuda.Stream) -> None:
    """Have `stream` wait for the one that used graphs' shared workspace before it."""
    latest = _latest.get(stream.device)
    if latest is not None and latest != stream:
        stream.wait_stream(latest)
    _latest[stream.device] = stream


def _take_workspace() -> None:
    """Have cuBLAS take its workspace for this thread and stream, which all graphs there use.

    Taken in a capture, it would keep that graph's memory for as long as the process lives.
    """
    one = torch.ones(8, 8, dtype=torch.float16, device="cuda")
    torch.addmm(one[0], torch.mm(one, one), one)


def convolves_in_tf32() -> bool:
    """Whether fp32 convolutions are in TF32, as torch has them by default."""
    found: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return found == "tf32"


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Compute fp32 convolutions in fp32 on GPUs too, in all threads.

    Meanwhile torch refuses to be asked for `torch.backends.cudnn.allow_tf32`, its older name.
    """
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


def gpu_name(device: torch.device) -> str:
    """Name a GPU and its compute capability, as code that is bound to it does; "none" for none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "none"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.major}.{properties.minor})"


class Graphed(Backend):
    """A backend that only launches kernels, so that on a GPU a step of it can be a CUDA graph."""

    @property
    def captures(self) -> bool:
        """On a GPU, steps are CUDA graphs."""
        return self.device.type == "cuda"

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return a CUDA graph's replay, or on the CPU `step` itself."""
        return capture(step, self.device) if self.captures else step

    def memory_bytes(self) -> int:
        """What torch holds of the GPU and needs, graphs' own memory included."""
        if not self.captures:
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)
