"""Fixtures that every room's tests share: small random checkpoints, written once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastsd.kernels import native
from tests import fixtures

if "PYTEST_XDIST_WORKER" in os.environ:  # two teams of threads on the same cores hinder each other
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cpu_kernels(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Build and load our kernels for CPUs; whether this one runs them."""
    if native.obstacle() is not None:
        return False
    library = tmp_path_factory.mktemp("native") / "kernels.so"
    native.build(library)
    native.load(library)
    return True


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random SD1.x checkpoint in a folder. Copy it before changing it."""
    return fixtures.write_sd1(tmp_path_factory.mktemp("sd1") / "sd1")


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random SD2.x checkpoint (v prediction) in a folder. Copy it before changing it."""
    return fixtures.write_sd2(tmp_path_factory.mktemp("sd2") / "sd2")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random SDXL checkpoint in a folder. Copy it before changing it."""
    return fixtures.write_sdxl(tmp_path_factory.mktemp("sdxl") / "sdxl")
