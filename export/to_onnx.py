"""ONNX, by torch's own exporter: the parts as graphs that other tools load too.

Standard layout: `<part>/model.onnx` and a config.json in every part's folder, as diffusers, Optimum
and their exports name them. Weights over a size go into `<part>/model.onnx.data`.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch

from fastsd.artifact import PartEntry
from fastsd.checkpoints import Checkpoint
from fastsd.checkpoints.weights import PRECISIONS
from fastsd.errors import MissingDependency
from fastsd.export.build import Exporter
from fastsd.export.parts import Request, load_part


@final
class OnnxExporter(Exporter):
    """ONNX graphs in fp32, true fp16, or fp32 with int8 or fp8 products."""

    target = "onnx"
    precisions = ("fp32", "fp16", "int8", "fp8")
    packages = ("torch", "onnx", "onnxscript")

    def __init__(self, checkpoint: Checkpoint, request: Request) -> None:
        try:
            from fastsd.export import qdq
        except ImportError as error:
            raise MissingDependency(
                f"exporting to ONNX needs {error.name}; run pip install 'fastsd[export]'"
            ) from error
        super().__init__(checkpoint, request)
        if request.precision == "fp8":
            self.form = qdq.FP8_FORM

    def write(self, part: str, folder: Path) -> PartEntry:
        """Trace one part and write its graph."""
        from fastsd.export import graph, qdq

        formats = {"int8": qdq.UINT8, "fp8": qdq.FP8}
        # int8 and fp8 stand in fp32 graphs
        dtype = PRECISIONS.get(self.request.precision, torch.float32)
        prepared = qdq.prepare(self.spec, formats.get(self.request.precision), dtype)
        traced = load_part(self.checkpoint, part, self.request, dtype, prepared)
        return graph.write(graph.trace(traced), traced, folder)
