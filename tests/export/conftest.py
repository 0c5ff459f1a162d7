"""Engines of small random checkpoints: tests/conftest.py's, and others that a test asks for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastsd.checkpoints import Checkpoint, open_checkpoint
from fastsd.export.build import export
from fastsd.export.parts import Request
from fastsd.quant.apply import layers
from fastsd.quant.spec import QuantSpec, Rounding, chosen_to_round

SIZE = (64, 96)  # height, width: unlike each other, and not what the checkpoints were made for


Engine = Callable[[str, str], Path]


def layout_of(target: str) -> str:
    """Return the layout that a target is exported in by default."""
    return "fast" if target == "aoti" else "standard"


def write(source: Path, path: Path, target: str = "onnx", **options: Any) -> Path:
    """Export `source` to `path`; a static graph of SIZE unless told otherwise."""
    request = Request(**{"target": target, "size": SIZE, "layout": layout_of(target), **options})
    return export(open_checkpoint(source), source.name, request, path).path


def flat_spec(checkpoint: Checkpoint) -> QuantSpec:
    """A spec of every layer that may be int8, all inputs within the same range: no calibration."""
    parts = {"unet": checkpoint.load("unet"), "vae.decoder": checkpoint.load("vae").decoder}
    names = [f"{part}.{name}" for part, module in parts.items() for name in layers(module)]  # type: ignore[arg-type]
    return QuantSpec({name: Rounding.of(-5, 6) for name in chosen_to_round(names)})


@pytest.fixture(scope="session")
def sd1_onnx_any_size(sd1_folder: Path, once: Callable[..., Path]) -> Path:
    """SD1.x, standard layout, fp32, for pictures of any size."""
    return once("sd1-onnx-any-size", lambda path: write(sd1_folder, path, dynamic=True))


@pytest.fixture
def only_unets_are_traced(sd1_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exports to ONNX take all parts but the UNet, which are the same, from `sd1_onnx`."""
    from fastsd.export.to_onnx import OnnxExporter
    from tests.export.test_build import CopyExporter

    trace = OnnxExporter.write

    def write(exporter: Any, part: str, folder: Path) -> Any:
        return (trace if part == "unet" else CopyExporter.write)(exporter, part, folder)

    monkeypatch.setenv("FINISHED", str(sd1_onnx))
    monkeypatch.setattr(OnnxExporter, "write", write)


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Give the engine of a family and target, fp32, one picture of SIZE; each is exported once."""
    shared = {
        ("sd1", "onnx"): "sd1_onnx",
        ("sdxl", "onnx"): "sdxl_onnx_fast",
        ("sd1", "openvino"): "sd1_openvino",
    }
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, target: str) -> Path:
        if target == "openvino":
            pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
        if target == "aoti" and not (shutil.which("g++") or shutil.which("clang++")):
            pytest.skip("there is no C++ compiler here")
        key = (family, target)
        if key not in made:
            source = request.getfixturevalue(f"{family}_folder")
            made[key] = (
                request.getfixturevalue(shared[key])
                if key in shared
                else write(source, tmp_path_factory.mktemp(target) / family, target)
            )
        return made[key]

    return get
