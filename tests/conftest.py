"""Fixtures that every room's tests share: small random models and engines, made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from fastsd.kernels import native
from tests import fixtures

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:  # two teams of threads on the same cores hinder each other
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Give a function that writes to a path, by name, once for all workers of this session."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if WORKER else base) / "shared"
    shared.mkdir(exist_ok=True)

    def get(name: str, write: Callable[[Path], object]) -> Path:
        path, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                write(path)
                done.touch()
        return path

    return get


@pytest.fixture(scope="session")
def cpu_kernels(once: Once) -> bool:
    """Build and load our kernels for CPUs; whether this one runs them."""
    if native.obstacle() is not None:
        return False
    native.load(once("kernels.so", native.build))
    return True


@pytest.fixture(scope="session")
def sd1_folder(once: Once) -> Path:
    """A small random SD1.x checkpoint in a folder. Copy it before changing it."""
    return once("sd1", fixtures.write_sd1)


@pytest.fixture(scope="session")
def sd2_folder(once: Once) -> Path:
    """A small random SD2.x checkpoint (v prediction) in a folder. Copy it before changing it."""
    return once("sd2", fixtures.write_sd2)


@pytest.fixture(scope="session")
def sdxl_folder(once: Once) -> Path:
    """A small random SDXL checkpoint in a folder. Copy it before changing it."""
    return once("sdxl", fixtures.write_sdxl)


@pytest.fixture(scope="session")
def sd1_onnx(sd1_folder: Path, once: Once) -> Path:
    """SD1.x, standard layout, fp32, one picture of SIZE. Copy it before changing it."""
    return once("sd1-onnx", lambda path: write_engine(sd1_folder, path))


@pytest.fixture(scope="session")
def sd1_openvino(sd1_folder: Path, once: Once) -> Path:
    """SD1.x, standard layout, fp32, one picture of SIZE, for OpenVINO."""
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    return once("sd1-openvino", lambda path: write_engine(sd1_folder, path, "openvino"))


@pytest.fixture(scope="session")
def sdxl_onnx_fast(sdxl_folder: Path, once: Once) -> Path:
    """SDXL, fast layout, fp32, one picture of SIZE."""
    return once("sdxl-onnx", lambda path: write_engine(sdxl_folder, path, layout="fast"))


def write_engine(source: Path, path: Path, target: str = "onnx", **options: Any) -> Path:
    from tests.export.conftest import write  # what it imports takes a second

    return write(source, path, target, **options)
