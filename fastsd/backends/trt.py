"""TensorRT engines on torch's stream, a step a CUDA graph. Unmeasured: no row has run it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from fastsd.artifact import Artifact
from fastsd.backends.base import ArtifactBackend
from fastsd.backends.cuda_graph import Graphed, gpu_name
from fastsd.config import ModelConfig
from fastsd.errors import ArtifactError, MissingDependency, OutOfMemory

try:
    import tensorrt as trt
except ImportError as error:
    raise MissingDependency(
        f"running TensorRT engines needs TensorRT ({error}); run pip install tensorrt"
    ) from error


@final
class TrtBackend(Graphed, ArtifactBackend):
    """Run every part as an engine; a call has a context of its own, engines are shared."""

    name = "trt"
    native = True

    def __init__(self, artifact: Artifact, config: ModelConfig, *, device: torch.device) -> None:
        super().__init__(artifact, config, device=device)
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engines = {}
        for part, entry in self.entries.items():
            engine = runtime.deserialize_cuda_engine((artifact.path / entry.file).read_bytes())
            if engine is None:
                raise ArtifactError(
                    f"TensorRT {trt.__version__} cannot load {part} of {artifact.path}; export it "
                    "again on this machine"
                )
            self._engines[part] = engine
        self._contexts: dict[str, list[Any]] = {part: [] for part in self.entries}
        self._capturing = threading.local()  # .contexts: those of the graph being made

    @classmethod
    def machine(cls, device: torch.device) -> dict[str, str]:
        """TensorRT's version and the GPU."""
        return {"tensorrt": str(trt.__version__), "gpu": gpu_name(device)}

    def run(self, part: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Enqueue one engine on torch's current stream; nothing waits for it."""
        idle: list[Any] = getattr(self._capturing, "contexts", self._contexts)[part]
        context = idle.pop() if idle else self._engines[part].create_execution_context()
        if context is None:
            raise OutOfMemory(f"not enough GPU memory for {part}; use a smaller size or batch")
        for name, tensor in inputs.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for spec in self.entries[part].outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            outputs[spec.name] = torch.empty(
                shape, dtype=getattr(torch, spec.dtype), device=self.device
            )
            context.set_tensor_address(spec.name, outputs[spec.name].data_ptr())
        stream = torch.cuda.current_stream(self.device)
        if not context.execute_async_v3(stream.cuda_stream):
            raise ArtifactError(f"TensorRT could not run {part} of {self.artifact.path}")
        idle.append(context)
        return outputs

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Capture with contexts of the graph's own: it works in their memory, so no other may."""
        contexts = self._capturing.contexts = {part: [] for part in self.entries}
        try:
            replay = super().capture(step)
        finally:
            del self._capturing.contexts
        return partial(_replay, replay, contexts)

    def close(self) -> None:
        """Let go of the engines and their contexts."""
        self._contexts.clear()
        self._engines.clear()


def _replay(replay: Callable[[], None], contexts: dict[str, list[Any]]) -> None:
    """Replay; the contexts live as long as what can."""
    replay()
