"""OpenVINO: the parts' ONNX graphs as its IR, in a folder that openvino-genai opens too.

`<part>/openvino_model.xml` and `.bin`; beside the tokenizers' files, the tokenizers as OpenVINO
graphs; DDIM for a scheduler where that tool lacks the model's own. In fp16 the weights are stored
in half precision; what a device computes in is its own choice (our backend asks for fp32).
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch

from fastsd.artifact import PartEntry
from fastsd.checkpoints import Checkpoint
from fastsd.config import ModelConfig
from fastsd.errors import MissingDependency
from fastsd.export.build import Exporter
from fastsd.export.parts import Request, load_part
from fastsd.samplers import build_table

STEPS = 20
SAMPLERS = ("ddim", "pndm", "euler", "euler_a", "lcm")  # of openvino-genai 2026.4

try:
    import openvino
    import openvino_tokenizers
    from transformers import CLIPTokenizer

    from fastsd.export import graph, qdq
except ImportError as error:
    raise MissingDependency(
        f"exporting to OpenVINO needs {error.name}; run pip install 'fastsd[export,openvino]'"
    ) from error


@final
class OpenvinoExporter(Exporter):
    """OpenVINO IR with weights in fp32 or fp16, or with int8 products."""

    target = "openvino"
    precisions = ("fp32", "fp16", "int8")
    packages = ("torch", "onnx", "onnxscript", "openvino", "openvino-tokenizers")

    def __init__(self, checkpoint: Checkpoint, request: Request) -> None:
        super().__init__(checkpoint, request)
        self._half = request.precision == "fp16"

    def write(self, part: str, folder: Path) -> PartEntry:
        """Trace one part, convert its ONNX graph and write the IR."""
        prepared = qdq.prepare(self.spec, qdq.UINT8, torch.float32)
        traced = load_part(self.checkpoint, part, self.request, torch.float32, prepared)
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch:
            entry = graph.write(graph.trace(traced), traced, Path(scratch))
            model = openvino.convert_model(Path(scratch) / entry.file)
            (folder / part).mkdir(exist_ok=True)
            _save(model, folder / part / "openvino_model.xml", half=self._half)
        return PartEntry(
            f"{part}/openvino_model.xml",
            entry.inputs,
            entry.outputs,
            (f"{part}/openvino_model.bin",),
        )

    def described(self) -> ModelConfig:
        """Name a sampler that openvino-genai has, as it does not open the folder otherwise, and
        that walks through whole timesteps, if the UNet takes no others."""
        config = super().described()
        timesteps = build_table(config.schedule, config.schedule.steps or STEPS).timesteps
        whole = self.request.layout != "standard" or bool((timesteps == timesteps.round()).all())
        if config.schedule.sampler in SAMPLERS and whole:
            return config
        schedule = replace(config.schedule, sampler="ddim", sigma_spacing="schedule", order=None)
        return replace(config, schedule=schedule)

    def write_extras(self, folder: Path) -> None:
        """Write every tokenizer as a graph, for openvino-genai."""
        for tokenizer in folder.glob("tokenizer*"):
            models = openvino_tokenizers.convert_tokenizer(
                CLIPTokenizer.from_pretrained(tokenizer), with_detokenizer=True
            )
            for model, name in zip(models, ("tokenizer", "detokenizer"), strict=True):
                _save(model, tokenizer / f"openvino_{name}.xml", half=False)


def _save(model: Any, path: Path, *, half: bool) -> None:
    openvino.save_model(model, path, compress_to_fp16=half)
