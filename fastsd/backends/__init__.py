"""What can run a model's parts: one contract (base.py), one file a backend."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from fastsd.backends.base import PRECISIONS, Backend
from fastsd.errors import UsageError

if TYPE_CHECKING:
    from fastsd.checkpoints import Checkpoint

__all__ = ["BACKENDS", "PRECISIONS", "Backend", "open_backend"]

# name -> the class, imported only when asked for: a backend may need a vendor's package.
BACKENDS = {"eager": "fastsd.backends.eager:EagerBackend"}


def open_backend(
    name: str, checkpoint: Checkpoint, *, precision: str, device: torch.device
) -> Backend:
    """Load `checkpoint` into the backend called `name`."""
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is unknown; it is one of {', '.join(BACKENDS)}")
    module, attribute = BACKENDS[name].split(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)(
        checkpoint, precision=precision, device=device
    )
    return backend
