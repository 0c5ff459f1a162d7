"""Engines of small random checkpoints, exported once a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastsd.checkpoints import Checkpoint, open_checkpoint
from fastsd.export.build import export
from fastsd.export.parts import Request
from fastsd.quant.apply import layers
from fastsd.quant.spec import INT8_ROLES, QuantSpec, Rounding, role

SIZE = (64, 96)  # height, width: unlike each other, and not what the checkpoints were made for


def write(source: Path, path: Path, **options: Any) -> Path:
    """Export `source` to `path`; a static ONNX graph of SIZE unless told otherwise."""
    request = Request(**{"target": "onnx", "size": SIZE, **options})
    return export(open_checkpoint(source), source.name, request, path).path


def flat_spec(checkpoint: Checkpoint) -> QuantSpec:
    """A spec of every layer that may be int8, all inputs within the same range: no calibration."""
    parts = {"unet": checkpoint.load("unet"), "vae.decoder": checkpoint.load("vae").decoder}
    return QuantSpec(
        {
            f"{part}.{name}": Rounding.of(-5, 6)
            for part, module in parts.items()
            for name in layers(module)  # type: ignore[arg-type]
            if role(f"{part}.{name}") in INT8_ROLES
        }
    )


@pytest.fixture(scope="session")
def sd1_onnx(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD1.x, standard layout, fp32, one picture of SIZE. Copy it before changing it."""
    return write(sd1_folder, tmp_path_factory.mktemp("onnx") / "sd1")


@pytest.fixture(scope="session")
def sd1_openvino(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD1.x, standard layout, fp32, one picture of SIZE, for OpenVINO."""
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    return write(sd1_folder, tmp_path_factory.mktemp("openvino") / "sd1", target="openvino")


@pytest.fixture(scope="session")
def sdxl_onnx_fast(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL, fast layout, fp32, one picture of SIZE."""
    return write(sdxl_folder, tmp_path_factory.mktemp("onnx") / "sdxl", layout="fast")
