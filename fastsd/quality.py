"""How near a picture is to what it should be: PSNR, SSIM, and the built-in model's task score.

The task score needs no reference run: the built-in model draws named emoji, and a picture is a hit
where its nearest neighbour among all base emoji (mean squared distance at 32x32 RGB) is the one
that was named. The base emoji ship beside the weights as an atlas. Knows no model and no backend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastsd.errors import MissingDependency, UsageError

ATLAS_SIDE = 32
ATLAS_COLUMNS = 48
ENGLISH_NAMES, CHINESE_NAMES = 256, 64

Picture = Image.Image | NDArray[Any]


def psnr(a: Picture, b: Picture) -> float:
    """Return the peak signal-to-noise ratio in dB, infinite for equal pictures.

    a, b: PIL pictures, uint8 arrays, or float arrays in [0, 1], of one shape.
    """
    x, y = _same_shape(a, b)
    error = float(np.mean((x - y) ** 2))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def ssim(a: Picture, b: Picture) -> float:
    """Return the structural similarity, at most 1, of Wang et al. 2004, by scikit-image.

    It is the mean over uniform windows of 7x7 pixels, not over the paper's Gaussian ones. a, b: as
    for psnr, (H, W, 3).
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise MissingDependency(
            "SSIM needs scikit-image; run pip install 'fastsd[export]'"
        ) from error
    x, y = _same_shape(a, b)
    return float(structural_similarity(x, y, channel_axis=-1, data_range=1.0))


def _same_shape(a: Picture, b: Picture) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = (_unit(picture) for picture in (a, b))
    if x.shape != y.shape:
        raise UsageError(f"pictures of shapes {x.shape} and {y.shape} cannot be compared")
    return x, y


def _unit(picture: Picture) -> NDArray[np.float64]:
    array = np.asarray(picture)
    return array / 255.0 if array.dtype == np.uint8 else array.astype(np.float64)


@dataclass(frozen=True, eq=False)
class Atlas:
    """Every base emoji: what it is called, and how it looks at 32x32.

    pictures: (N, 32, 32, 3) uint8.
    """

    characters: tuple[str, ...]
    english: tuple[str, ...]
    chinese: tuple[str, ...]
    pictures: NDArray[np.uint8]

    def ranks(self, pictures: Sequence[Image.Image], expected: Sequence[int]) -> list[int]:
        """For each picture, how many emoji are nearer to it than the expected one: 0 is a hit."""
        references = self.pictures.reshape(len(self.pictures), -1).astype(np.float32)
        ranks = []
        for picture, index in zip(pictures, expected, strict=True):
            distances = ((references - small(picture).reshape(-1)) ** 2).mean(axis=1)
            ranks.append(int((distances < distances[index]).sum()))
        return ranks


def small(picture: Image.Image) -> NDArray[np.float32]:
    """Shrink a picture to (32, 32, 3), by area, 0 to 255."""
    shrunk = picture.convert("RGB").resize((ATLAS_SIDE, ATLAS_SIDE), Image.Resampling.BOX)
    return np.asarray(shrunk, dtype=np.float32)


@cache
def builtin_atlas() -> Atlas:
    """Read the atlas that ships beside the built-in weights: one PNG, and the names in JSON."""
    folder = files("fastsd.builtin")
    names = json.loads((folder / "atlas.json").read_text("utf-8"))
    with (folder / "atlas.png").open("rb") as file:
        sheet = np.asarray(Image.open(file, formats=("PNG",)).convert("RGB"))
    tiles = sheet.reshape(-1, ATLAS_SIDE, ATLAS_COLUMNS, ATLAS_SIDE, 3).swapaxes(1, 2)
    pictures = tiles.reshape(-1, ATLAS_SIDE, ATLAS_SIDE, 3)[: len(names)]
    characters, english, chinese = zip(*names, strict=True)
    return Atlas(characters, english, chinese, pictures)


def first_by_digest(names: Sequence[str], count: int) -> list[str]:
    """Choose `count` names once and for all: the first by the SHA-256 of the name."""
    return sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:count]


@dataclass(frozen=True)
class Task:
    """Names to draw, and where each stands in the atlas."""

    names: tuple[str, ...]
    expected: tuple[int, ...]


def tasks(atlas: Atlas) -> dict[str, Task]:
    """The names of the task score: 256 English and 64 Chinese ones, always the same."""

    def task(names: tuple[str, ...], count: int) -> Task:
        chosen = first_by_digest(names, count)
        return Task(tuple(chosen), tuple(names.index(name) for name in chosen))

    return {
        "english": task(atlas.english, ENGLISH_NAMES),
        "chinese": task(atlas.chinese, CHINESE_NAMES),
    }


@dataclass(frozen=True)
class TaskScore:
    """Shares of pictures, 0 to 1, whose nearest (or five nearest) emoji hold the one named."""

    top1: float
    top5: float
    pictures: int


def task_score(atlas: Atlas, task: Task, pictures: Sequence[Image.Image]) -> TaskScore:
    """Score one picture for each of the task's names, in order."""
    if len(pictures) != len(task.names):
        raise UsageError(f"{len(pictures)} pictures were given for {len(task.names)} names")
    ranks = np.array(atlas.ranks(pictures, task.expected))
    return TaskScore(float((ranks == 0).mean()), float((ranks < 5).mean()), len(ranks))
