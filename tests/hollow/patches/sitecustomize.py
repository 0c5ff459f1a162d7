"""Let programs go on with what hollow kernels leave in memory: read by Python at its start.

Values that kernels would have written are whatever was there. fastsd refuses NaN; diffusers'
schedulers look up timesteps that they computed on the GPU.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def _fastsd(module: Any) -> None:
    module.check_finite = lambda *given: None


def _weights(module: Any) -> None:
    module._finite = lambda tensor, *given: tensor


def _scheduler(module: Any) -> None:
    import torch

    found = torch.Tensor.nonzero

    def nonzero(x: Any, *given: Any, **named: Any) -> Any:
        known = torch.zeros(1, x.ndim, dtype=torch.int64)
        return known if x.is_cuda else found(x, *given, **named)

    torch.Tensor.nonzero = nonzero  # type: ignore[assignment]
    for kind in list(vars(module).values()):
        if isinstance(kind, type) and kind.__module__ == module.__name__ and hasattr(kind, "step"):
            kind.step = _at_a_known_time(kind.step)


def _at_a_known_time(step: Callable[..., Any]) -> Callable[..., Any]:
    def stepped(self: Any, output: Any, timestep: Any, sample: Any, **named: Any) -> Any:
        return step(self, output, self.timesteps[0].cpu() * 0 + 500, sample, **named)

    return stepped


class _Patches(importlib.abc.MetaPathFinder):
    """Changes a module right after it ran."""

    def __init__(self) -> None:
        self._looking = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        change = {"fastsd.engine": _fastsd, "fastsd.checkpoints.weights": _weights}.get(name)
        if name.startswith("diffusers.schedulers.scheduling_"):
            change = _scheduler
        if change is None or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def changed(module: Any) -> None:
            run(module)
            change(module)

        spec.loader.exec_module = changed  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Patches())
