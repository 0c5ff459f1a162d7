"""A step as a CUDA graph: its kernels are launched as one, by address, without Python.

At batch 1 the launches of a UNet's some thousand kernels take as long as the kernels themselves.
Knows nothing of what a step does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from fastsd.backends.base import Backend

WARM_UPS = 3  # libraries choose algorithms and take workspace in the first runs
_capturing = threading.Lock()  # torch captures one graph at a time
_asides: dict[torch.device, torch.cuda.Stream] = {}  # a stream takes workspace that it keeps


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Run `step` a few times, record it, and return what replays the record.

    The record keeps its intermediate results in memory of its own; it is freed with what is
    returned. Raises RuntimeError (torch's) for a step that waits for the device or reads the host.
    """
    with _capturing, torch.no_grad(), torch.cuda.device(device):
        current = torch.cuda.current_stream()
        aside = _asides.get(current.device)
        if aside is None:
            aside = _asides[current.device] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                step()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do meanwhile, such as allocating, is none of this one's.
        # A capture that fails leaves the thread on its stream: go back in any case.
        refused = None
        try:
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"),
            ):
                try:
                    step()
                except RuntimeError as error:  # to end the capture raises another over it
                    refused = error
                    raise
        except RuntimeError as error:
            raise refused or error from None
    return graph.replay


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
