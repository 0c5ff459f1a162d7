"""torch.compile's code for the UNet and the VAE's decoder, made at the first use of each shape.

That takes from half a minute to several; `explain` counts it. Weights stay the modules' own, so
adapters change them in place. `fastsd export --to aoti` compiles ahead of time instead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastsd.backends.base import Part
from fastsd.backends.cuda_graph import Graphed
from fastsd.backends.eager import EagerBackend
from fastsd.errors import UsageError

if TYPE_CHECKING:
    from fastsd.checkpoints import Checkpoint

COMPILED = ("unet", "vae_decoder")  # the parts that take the time
# torch's mode "max-autotune-no-cudagraphs", without its tables of what it tried.
TUNED = {
    "max_autotune": True,
    "coordinate_descent_tuning": True,
    "autotune_num_choices_displayed": 0,
}


@final
class InductorBackend(Graphed):
    """Run the parts that take the time compiled, the others as the eager backend does."""

    name = "inductor"
    precisions = EagerBackend.precisions

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        precision: str,
        device: torch.device,
        on_host: Sequence[str] = (),
        weights: str | None = None,
    ) -> None:
        if weights is not None:
            raise UsageError(
                f"weights={weights!r} is the eager backend's: compiled code has its own; leave "
                "weights out, or pass backend='eager'"
            )
        # The compiled decoder keeps its weights where they are.
        texts = [name for name in on_host if name != "vae"]
        self._eager = EagerBackend(
            checkpoint,
            precision=precision,
            device=device,
            on_host=texts,
            to_compile=True,
        )
        self.precision, self.device, self.dtype = precision, device, self._eager.dtype
        self._compiled = {
            name: CompiledPart(self._eager.part(name), tune=device.type == "cuda")
            for name in COMPILED
        }

    def part(self, name: str) -> Part:
        """Return the part, compiled or as it is."""
        return self._compiled.get(name) or self._eager.part(name)

    def weights(self, part: str) -> Mapping[str, Tensor]:
        """Return the modules' own parameters: what is written to them is used at once."""
        return self._eager.weights(part)

    def explain(self) -> list[str]:
        """Say what runs, and what compiling took."""
        lines = [*super().explain(), *self._eager.explain()[1:]]
        for name, part in self._compiled.items():
            for shape, seconds in part.seconds.items():
                lines.append(f"{name}: compiled for {shape} in {seconds:.1f} s")
        return lines


@final
class CompiledPart:
    """A part that is compiled anew for every shape, never for any shape: that is slower.

    tune: try out kernels for each product and convolution (torch's max-autotune; the CUDA graph is
    the engine's, around the whole step).
    """

    def __init__(self, part: Part, *, tune: bool) -> None:
        self.seconds: dict[str, float] = {}  # the inputs' shapes -> what the first call took
        options: dict[str, Any] | None = dict(TUNED) if tune else None
        self._call = torch.compile(part, fullgraph=True, dynamic=False, options=options)
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        shapes = ["x".join(map(str, tensor.shape)) for tensor in tree_leaves(args)]
        shape = ", ".join(dict.fromkeys(shapes))
        if shape in self.seconds:
            return self._call(*args)
        with self._lock:  # one compilation at a time
            start = time.perf_counter()
            # As many shapes as a server sees; beyond its limit torch would go on uncompiled.
            with torch._dynamo.config.patch(recompile_limit=1024):
                out = self._call(*args)
            self.seconds.setdefault(shape, time.perf_counter() - start)
            return out
