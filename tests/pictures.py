"""What tests draw with, what they draw from, and how near two pictures have to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastsd import Pipeline
from fastsd.quality import psnr

SIZE = (72, 56)  # height, width: neither alike nor multiples of 16


def silenced(pipeline: Any) -> Any:
    """Turn off the progress bars of a pipeline, ours or diffusers'."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def quiet(source: Path | str, **options: Any) -> Pipeline:
    """Open a pipeline of ours that shows no progress."""
    pipeline: Pipeline = silenced(Pipeline.from_pretrained(source, **options))
    return pipeline


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def picture(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """A smooth picture with some noise on it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]] / 16.0
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.normal(size=(3, 3))]
    values = 128 + 80 * np.stack(waves, -1) + rng.normal(scale=12, size=(*size, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def mask(size: tuple[int, int] = SIZE, box: tuple[int, int, int, int] = (12, 20, 50, 44)) -> Any:
    """Black, with a white box at (top, left, bottom, right), off the latents' grid."""
    array = np.zeros(size, np.uint8)
    top, left, bottom, right = box
    array[top:bottom, left:right] = 255
    return Image.fromarray(array)


def assert_same_pictures(ours: Any, theirs: Any, bar_db: float = 60.0) -> None:
    """Compare float pictures (B, H, W, 3) in [0, 1], one by one."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01, "a flat picture compares equal to anything flat"
    assert all(psnr(a, b) >= bar_db for a, b in zip(ours, theirs, strict=True))
