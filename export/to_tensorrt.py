"""TensorRT: the parts' ONNX graphs built into engines, `<part>/model.plan`.

Networks are strongly typed: the precision is the graph's. Building chooses kernels for the GPU that
is present, so an engine is bound to it and to TensorRT's version. Graphs have been parsed and
engines built without a GPU (TensorRT-RTX needs none); running them on one is unmeasured.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from tqdm.auto import tqdm

from fastsd.artifact import PartEntry, TensorSpec, cache_folder
from fastsd.backends.cuda_graph import gpu_name
from fastsd.checkpoints import Checkpoint
from fastsd.checkpoints.weights import PRECISIONS
from fastsd.errors import ArtifactError, MissingDependency, OutOfMemory
from fastsd.export.build import Exporter
from fastsd.export.parts import Request, load_part
from fastsd.files import replaced

try:
    try:
        import tensorrt as trt
    except ModuleNotFoundError:
        import tensorrt_bindings as trt  # what `tensorrt` re-exports; its libraries come apart

    from fastsd.export import graph, qdq
except ImportError as error:
    raise MissingDependency(
        f"building TensorRT engines needs TensorRT ({error}); run pip install tensorrt "
        "'fastsd[export]'"
    ) from error

FORMATS = {"int8": qdq.INT8, "fp8": qdq.FP8}  # in fp16 graphs
# Where sizes may vary: smallest, best and largest, as multiples of what was asked for.
RANGE = (0.5, 1.0, 2.0)
STEPS = (1, 20, 1000)  # of a schedule
TOKENS = (1, 77, 4 * 77)  # of a prompt
# The builder holds the parsed weights, its own copy and the engine: 3.0 x the weights were seen at
# SD1.5's UNet (3.4 GB). The rest is the library itself.
_COPIES, _BASE_BYTES = 3.0, 1 << 30


@final
class TensorrtExporter(Exporter):
    """TensorRT engines, for a static size or a range of sizes."""

    target = "tensorrt"
    precisions = ("fp32", "fp16", "bf16", "int8", "fp8")
    native = True
    refits = True
    packages = ("torch", "onnx", "onnxscript")

    def __init__(self, checkpoint: Checkpoint, request: Request) -> None:
        super().__init__(checkpoint, request)
        if request.precision == "fp8":
            self.form = qdq.FP8_FORM
        self._log = trt.Logger(trt.Logger.ERROR)
        # Timings of kernels that earlier builds took: of this machine, so not in the artifact.
        self._timings = cache_folder() / f"tensorrt-{trt.__version__}-timings"

    def machine(self) -> dict[str, str]:
        """TensorRT's version and the GPU it chose kernels for, as the trt backend says them."""
        return {"tensorrt": str(trt.__version__), "gpu": gpu_name(torch.device("cuda"))}

    def versions(self) -> dict[str, str]:
        """TensorRT's too, whose package has several names."""
        return {**super().versions(), "tensorrt": trt.__version__}

    def write(self, part: str, folder: Path) -> PartEntry:
        """Trace one part, parse its ONNX graph, build and write the engine."""
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch:
            entry = self._write_graph(part, Path(scratch))  # the model itself is let go of again
            size = sum(
                (Path(scratch) / file).stat().st_size for file in (entry.file, *entry.weights)
            )
            check_memory(part, size)
            engine = self.build(part, entry.inputs, Path(scratch) / entry.file)
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "model.plan").write_bytes(engine)
        return PartEntry(f"{part}/model.plan", entry.inputs, entry.outputs)

    def _write_graph(self, part: str, folder: Path) -> PartEntry:
        dtype = PRECISIONS.get(self.request.precision, torch.float16)
        prepared = qdq.prepare(self.spec, FORMATS.get(self.request.precision), dtype)
        traced = load_part(self.checkpoint, part, self.request, dtype, prepared)
        return graph.write(graph.trace(traced), traced, folder)

    def build(self, part: str, inputs: Sequence[TensorSpec], file: Path) -> Any:
        """Build the engine of a graph on disk; a buffer. Raises ArtifactError with the reason."""
        builder = trt.Builder(self._log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(file)):
            problems = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise ArtifactError(
                f"TensorRT {trt.__version__} cannot read the graph of {part}: {problems}"
            )
        config = builder.create_builder_config()
        if self.request.refit:
            config.set_flag(trt.BuilderFlag.REFIT)
        if any(isinstance(size, str) for spec in inputs for size in spec.shape):
            profile = builder.create_optimization_profile()
            for spec in inputs:
                profile.set_shape(spec.name, *profile_shapes(spec, self.request))
            config.add_optimization_profile(profile)
        cache = config.create_timing_cache(
            self._timings.read_bytes() if self._timings.is_file() else b""
        )
        config.set_timing_cache(cache, ignore_mismatch=True)
        config.progress_monitor = _Bars()
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise ArtifactError(
                f"TensorRT {trt.__version__} could not build {part}; its own message stands above"
            )
        self._timings.parent.mkdir(parents=True, exist_ok=True)
        with replaced(self._timings) as draft:
            draft.write_bytes(config.get_timing_cache().serialize())
        return engine


def profile_shapes(spec: TensorSpec, request: Request) -> tuple[tuple[int, ...], ...]:
    """Return an input's smallest, best and largest shape.

    Rows go from one to twice what was asked for (at least eight), sides from half to twice.
    """
    height, width = request.size

    def side(factor: float, pixels: int) -> int:
        return max(1, round(factor * pixels / 8))

    def size(word: int | str, which: int) -> int:
        if isinstance(word, int):
            return word
        factor, _, name = word.rpartition("*")
        known = {
            "rows": (1, 2 * request.batch, max(8, 4 * request.batch)),
            "pictures": (1, request.batch, max(4, 2 * request.batch)),
            "steps": STEPS,
            "tokens": TOKENS,
            "latent_height": tuple(side(f, height) for f in RANGE),
            "latent_width": tuple(side(f, width) for f in RANGE),
        }
        return int(factor or 1) * known[name][which]

    return tuple(tuple(size(word, which) for word in spec.shape) for which in range(3))


def check_memory(part: str, weights_bytes: int) -> None:
    """Raise OutOfMemory, before the work, if a build plainly cannot fit the machine's memory."""
    needed = int(_COPIES * weights_bytes) + _BASE_BYTES
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return
    if needed > total:
        raise OutOfMemory(
            f"building {part} needs about {needed / 2**30:.0f} GiB of memory, this machine has "
            f"{total / 2**30:.0f}; use a larger one, or a lower --precision"
        )


class _Bars(trt.IProgressMonitor):  # type: ignore[misc]  # untyped
    """One bar a phase of the build, on a terminal only."""

    def __init__(self) -> None:
        super().__init__()
        self._bars: dict[str, Any] = {}

    def phase_start(self, name: str, parent: str | None, steps: int) -> None:
        self._bars[name] = tqdm(total=steps, desc=name, leave=False, disable=None)

    def step_complete(self, name: str, step: int) -> bool:
        if name in self._bars:
            self._bars[name].update()
        return True  # go on

    def phase_finish(self, name: str) -> None:
        if name in self._bars:
            self._bars.pop(name).close()
