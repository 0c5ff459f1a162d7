"""A stand-in for a CUDA graph on the CPU: record the work of a step, replay it on the same memory.

What a graph holds is kernels and addresses, and so does this: every ATen operation with the very
tensors it read and wrote. A replay repeats them; no Python of the step runs again. A step that
depends on anything but the contents of its buffers therefore goes wrong here as it would there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM_UPS = 3  # as torch advises before a capture
# What waits for the device, or reads the host's memory at an address that will be gone.
REFUSED = ("_local_scalar_dense", "nonzero", "equal", "item", "lift_fresh", "unique2")


class Recorder(TorchDispatchMode):
    """Record every operation; refuse those that a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in name:
            raise RuntimeError(f"random numbers would repeat in every replay: {name}")
        out = func(*args, **(kwargs or {}))
        if not func.is_view:  # a view of a buffer stays one
            self.calls.append((func, args, kwargs or {}, out))
        return out


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Run `step` as a capture would, and return what replays it."""
    with torch.no_grad():
        for _ in range(WARM_UPS):
            step()
        with Recorder() as recorder:
            step()

    @torch.no_grad()
    def replay() -> None:
        for func, args, kwargs, out in recorder.calls:
            again = func(*args, **kwargs)
            for written, computed in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(written, torch.Tensor) and written is not computed:
                    written.copy_(computed)

    return replay
