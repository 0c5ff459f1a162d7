"""From a checkpoint to an engine on disk (an artifact), for us and for other people's tools.

    parts.py     what is exported: every part as a module with named inputs and outputs
    build.py     the order of an export: parts, receipt, manifest, publication; resumable
    to_X.py      one target each, an `Exporter`

Stands above the pipeline, since receipts are measured by drawing pictures. The runtime never builds
an engine.
"""

from __future__ import annotations

# target -> its exporter, imported only when asked for: most need a vendor's package.
EXPORTERS = {
    "aoti": "fastsd.export.to_aoti:AotiExporter",
    "aoti-cuda": "fastsd.export.to_aoti_cuda:AotiCudaExporter",
    "onnx": "fastsd.export.to_onnx:OnnxExporter",
    "openvino": "fastsd.export.to_openvino:OpenvinoExporter",
    "tensorrt": "fastsd.export.to_tensorrt:TensorrtExporter",
}
