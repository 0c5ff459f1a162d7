"""What can run a model's parts: one contract (base.py), one file a backend."""

from __future__ import annotations

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import torch

from fastsd.backends.base import ArtifactBackend, Backend
from fastsd.errors import UntrustedArtifact, UsageError

if TYPE_CHECKING:
    from fastsd.artifact import Artifact
    from fastsd.checkpoints import Checkpoint
    from fastsd.config import ModelConfig

__all__ = [
    "BACKENDS",
    "ENGINES",
    "RUNS_ON",
    "ArtifactBackend",
    "Backend",
    "engine_class",
    "open_artifact",
    "open_backend",
]

# name -> the class, imported only when asked for: a backend may need a vendor's package.
BACKENDS = {
    "aoti": "fastsd.backends.aoti:AotiBackend",
    "aoti-cuda": "fastsd.backends.aoti:AotiCudaBackend",
    "eager": "fastsd.backends.eager:EagerBackend",
    "inductor": "fastsd.backends.inductor:InductorBackend",
    "ort": "fastsd.backends.ort:OrtBackend",
    "ov": "fastsd.backends.ov:OvBackend",
    "trt": "fastsd.backends.trt:TrtBackend",
}
# What an artifact was exported to -> the backend that runs it.
ENGINES = {
    "onnx": "ort",
    "openvino": "ov",
    "tensorrt": "trt",
    "aoti": "aoti",
    "aoti-cuda": "aoti-cuda",
}
# The only kind of device that engines of a target run on; those of others run on any.
RUNS_ON = {"aoti": "cpu", "aoti-cuda": "cuda", "tensorrt": "cuda"}


def open_backend(
    name: str,
    checkpoint: Checkpoint,
    *,
    precision: str,
    device: torch.device,
    on_host: Sequence[str] = (),
    weights: str | None = None,
) -> Backend:
    """Load `checkpoint` into the backend called `name`.

    on_host: parts of the checkpoint that move to the device only while they run. weights: what the
    UNet's are kept in, "int8", or "fp8", to multiply in, the decoder's too; None: the precision.
    """
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is unknown; it is one of {', '.join(BACKENDS)}")
    if name in ENGINES.values():
        target = next(target for target, backend in ENGINES.items() if backend == name)
        raise UsageError(
            f"backend {name!r} runs exported engines: make one with "
            f"`fastsd export MODEL -o DIR --to {target}`, then give DIR as the model"
        )
    backend: Backend = resolve_name(BACKENDS[name])(
        checkpoint, precision=precision, device=device, on_host=on_host, weights=weights
    )
    return backend


def engine_class(target: str) -> type[ArtifactBackend]:
    """Return the class that runs artifacts of `target`. Raises MissingDependency, UsageError."""
    name = ENGINES.get(target, target)
    if name not in BACKENDS:
        raise UsageError(f"this fastsd cannot run engines of {target!r}, only {', '.join(ENGINES)}")
    found: type[ArtifactBackend] = resolve_name(BACKENDS[name])
    return found


def open_artifact(
    artifact: Artifact, config: ModelConfig, *, device: torch.device
) -> ArtifactBackend:
    """Load an exported engine into its backend.

    Raises StaleArtifact for another machine's, UntrustedArtifact for one that hides its code,
    UsageError for a device that it does not run on.
    """
    kind = engine_class(artifact.manifest.target)
    if kind.native and not artifact.manifest.native:
        raise UntrustedArtifact(
            f"{artifact.path} says that it holds no native code, and engines of "
            f"{artifact.manifest.target} are nothing else: its manifest was not written by fastsd"
        )
    wanted = RUNS_ON.get(artifact.manifest.target, device.type)
    if wanted != device.type:
        where = {"cpu": "CPUs", "cuda": "NVIDIA GPUs"}[wanted]
        raise UsageError(
            f"{artifact.path} is an engine for {where}, not for {device.type}; pass "
            f"device={wanted!r} (--device {wanted})"
        )
    artifact.check_machine(kind.machine(device))
    return kind(artifact, config, device=device)
