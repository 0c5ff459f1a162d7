"""Stable Diffusion as fast as the hardware allows.

    from fastsd import Pipeline

    pipe = Pipeline.from_pretrained("builtin")
    pipe("a red apple", num_inference_steps=20, guidance_scale=7.5, seed=0).images[0]

The names below load when first used, so that `import fastsd` costs little and imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastsd.errors import (
        ArtifactError,
        CheckpointError,
        DamagedArtifact,
        FastsdError,
        MissingDependency,
        NumericsError,
        OutOfMemory,
        StaleArtifact,
        UnknownName,
        UntrustedArtifact,
        UsageError,
    )
    from fastsd.pipeline import Output, Pipeline
    from fastsd.samplers import SAMPLERS

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CheckpointError",
    "DamagedArtifact",
    "FastsdError",
    "MissingDependency",
    "NumericsError",
    "OutOfMemory",
    "Output",
    "Pipeline",
    "SAMPLERS",
    "StaleArtifact",
    "UnknownName",
    "UntrustedArtifact",
    "UsageError",
    "__version__",
]

if not TYPE_CHECKING:  # hidden from type checkers, which would take every misspelt name for known
    _HOMES = {"Output": "pipeline", "Pipeline": "pipeline", "SAMPLERS": "samplers"}

    def __getattr__(name: str) -> object:
        """Load a public name from its module, once (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"fastsd.{_HOMES.get(name, 'errors')}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """List the public names whether loaded or not."""
        return sorted({*globals(), *__all__})
