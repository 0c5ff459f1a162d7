"""OpenVINO graphs, run by OpenVINO on the CPU, in fp32 whatever the weights are stored in."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from fastsd.artifact import Artifact
from fastsd.backends.base import ArtifactBackend
from fastsd.config import ModelConfig
from fastsd.errors import ArtifactError, MissingDependency, UsageError

try:
    import openvino
except ImportError as error:
    raise MissingDependency(
        "running OpenVINO engines needs openvino; run pip install 'fastsd[openvino]'"
    ) from error


@final
class OvBackend(ArtifactBackend):
    """Run every part as a compiled model of OpenVINO."""

    name = "ov"

    def __init__(self, artifact: Artifact, config: ModelConfig, *, device: torch.device) -> None:
        if device.type != "cpu":
            raise UsageError(f"the ov backend runs on the CPU, not on {device}; pass device='cpu'")
        super().__init__(artifact, config, device=device)
        core = openvino.Core()
        options = {
            "INFERENCE_PRECISION_HINT": "f32",  # else it takes bf16 where the CPU has it
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._models = {}
        for part, entry in self.entries.items():
            try:
                self._models[part] = core.compile_model(artifact.path / entry.file, "CPU", options)
            except RuntimeError as error:
                raise ArtifactError(
                    f"OpenVINO {openvino.__version__} cannot load {part} of {artifact.path}: "
                    f"{str(error).splitlines()[0]}"
                ) from None
        self._threads = threading.local()  # a request runs one call at a time

    def run(self, part: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one model over tensors shared in place; the outputs are copied out."""
        request = self._request(part)
        request.infer(
            {name: openvino.Tensor(t.numpy(), shared_memory=True) for name, t in inputs.items()},
            share_outputs=True,
        )
        return {
            spec.name: torch.from_numpy(request.get_tensor(spec.name).data.copy())
            for spec in self.entries[part].outputs
        }

    def _request(self, part: str) -> Any:
        requests = self._threads.__dict__.setdefault("requests", {})
        if part not in requests:
            requests[part] = self._models[part].create_infer_request()
        return requests[part]
