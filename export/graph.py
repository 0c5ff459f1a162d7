"""A part as an ONNX graph: traced by torch.onnx, freed of all that names this machine, written.

The same weights and request give the same bytes, wherever the checkpoint and fastsd lie.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import onnxscript  # noqa: F401  (torch.onnx needs it, and would say so in its own way)
import torch

from fastsd.artifact import PartEntry, TensorSpec
from fastsd.export import qdq
from fastsd.export.parts import GraphPart, quiet, traced

OPSET = 21  # the first whose Q/DQ nodes take blocks; every runtime here reads it
INLINE_LIMIT = 1 << 30  # bytes of weights inside model.onnx; a protobuf cannot hold 2 GiB
DATA = "model.onnx.data"


def trace(part: GraphPart) -> ir.Model:
    """Trace a part into a graph whose inputs and outputs have its names."""
    with _silent(), quiet():
        program = torch.onnx.export(
            traced(part),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in part.inputs],
            output_names=list(part.outputs),
            verbose=False,
            custom_translation_table=qdq.translations(),
        )
    assert program is not None  # it is None only for the other exporter
    model: ir.Model = program.model
    _strip(model)
    return model


def write(model: ir.Model, part: GraphPart, folder: Path) -> PartEntry:
    """Write `<part>/model.onnx`, with its weights beside it where they are large."""
    home = folder / part.name
    home.mkdir(exist_ok=True)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    external = size > INLINE_LIMIT
    ir.save(model, home / "model.onnx", external_data=DATA if external else None)
    return PartEntry(
        f"{part.name}/model.onnx",
        part.inputs,
        tuple(_spec(value) for value in model.graph.outputs),
        (f"{part.name}/{DATA}",) if external else (),
    )


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name and value.dtype and value.shape is not None, "an output is typed"
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, shape)


def _strip(model: ir.Model) -> None:
    """Remove stack traces, class names and remarks: they hold paths, and nobody reads them."""
    model.doc_string = None
    model.metadata_props.clear()
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in [*graph.inputs, *graph.outputs]:
            _strip_value(value)
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                _strip_value(value)
    for value in model.graph.initializers.values():
        _strip_value(value)
        if value.const_value is not None:
            value.const_value.doc_string = None
            value.const_value.metadata_props.clear()


def _strip_value(value: ir.Value) -> None:
    value.metadata_props.clear()
    value.doc_string = None


@contextmanager
def _silent() -> Iterator[None]:
    """Hold back what the exporter logs of itself: other packages missing, deprecations inside."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
