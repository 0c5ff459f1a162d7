"""ONNX graphs, run by ONNX Runtime: on the CPU, or through its CUDA or TensorRT provider.

The TensorRT provider takes int8 and fp8 graphs where it is there; it builds its engines on first
use and keeps them in the user's cache.
Tensors are handed over in place, both ways. What the CUDA and TensorRT providers do is unmeasured
here: no committed row has run them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastsd.artifact import AGAIN, Artifact, PartEntry, cache_folder
from fastsd.backends.base import ArtifactBackend
from fastsd.config import ModelConfig
from fastsd.errors import ArtifactError, DamagedArtifact, MissingDependency, OutOfMemory

try:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_state
except ImportError as error:
    raise MissingDependency(
        "running ONNX needs onnxruntime; run pip install 'fastsd[ort]' (or onnxruntime-gpu)"
    ) from error


@final
class OrtBackend(ArtifactBackend):
    """Run every part in a session of ONNX Runtime."""

    name = "ort"

    def __init__(self, artifact: Artifact, config: ModelConfig, *, device: torch.device) -> None:
        super().__init__(artifact, config, device=device)
        self._sessions = {part: self._open(part, entry) for part, entry in self.entries.items()}

    def _open(self, part: str, entry: PartEntry) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # warnings name nodes of ours that it places on the CPU
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads must not spin on the cores that torch's need between two calls.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = ort.InferenceSession(
                self.artifact.path / entry.file, options, providers=self._providers()
            )
        except _LOAD_ERRORS as error:
            raise ArtifactError(
                f"ONNX Runtime {ort.__version__} cannot load {part} of {self.artifact.path}: "
                f"{error}; {AGAIN}"
            ) from None
        for what, graph, listed in (
            ("inputs", session.get_inputs(), entry.inputs),
            ("outputs", session.get_outputs(), entry.outputs),
        ):
            own, told = ({x.name for x in tensors} for tensors in (graph, listed))
            if own != told:
                raise DamagedArtifact(
                    f"the graph of {part} in {self.artifact.path} has other {what} than its "
                    f"manifest: {', '.join(sorted(own ^ told))}; {AGAIN}"
                )
        return session

    def _providers(self) -> list[Any]:
        if self.device.type == "cpu":
            return ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise MissingDependency(
                f"this onnxruntime cannot use {self.device}; run pip install onnxruntime-gpu in "
                "place of onnxruntime, or pass device='cpu'"
            )
        index = self.device.index or 0
        providers: list[Any] = [("CUDAExecutionProvider", {"device_id": index})]
        quantised = self.precision in ("int8", "fp8")  # kernels that only TensorRT's provider has
        if quantised and "TensorrtExecutionProvider" in ort.get_available_providers():
            kept = {
                "device_id": index,
                "trt_engine_cache_enable": True,
                "trt_engine_cache_path": str(cache_folder() / "onnxruntime-tensorrt"),
            }
            providers.insert(0, ("TensorrtExecutionProvider", kept))
        return providers

    def run(self, part: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one session over tensors bound in place."""
        session = self._sessions[part]
        binding = session.io_binding()
        index = self.device.index or 0
        for name, tensor in inputs.items():
            binding.bind_input(
                name,
                self.device.type,
                index,
                _ELEMENTS[tensor.dtype],
                tuple(tensor.shape),
                tensor.data_ptr(),
            )
        names = [spec.name for spec in self.entries[part].outputs]
        for name in names:
            binding.bind_output(name, self.device.type, index)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # its stream is another
        try:
            session.run_with_iobinding(binding)
        except _ORT_ERRORS as error:
            kind = OutOfMemory if "allocate memory" in str(error) else ArtifactError
            raise kind(
                f"ONNX Runtime {ort.__version__} cannot run {part} of {self.artifact.path}: {error}"
            ) from None
        values = binding.get_outputs()
        return {
            name: from_dlpack(value._ortvalue.to_dlpack())
            for name, value in zip(names, values, strict=True)
        }


_ELEMENTS = {
    torch.float32: 1,  # onnx.TensorProto.FLOAT, and so on
    torch.int64: 7,
    torch.float16: 10,
    torch.bfloat16: 16,
}
# Its own, which share no class but Exception.
_ORT_ERRORS: tuple[type[Exception], ...] = tuple(
    kind
    for kind in vars(ort_state).values()
    if isinstance(kind, type) and issubclass(kind, Exception)
)
_LOAD_ERRORS: tuple[type[Exception], ...] = (
    *_ORT_ERRORS,
    RuntimeError,
    ValueError,
    NotImplementedError,
)
