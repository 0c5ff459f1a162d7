"""Contenders whose truth is known, opened in real worker processes by the tests."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsd.benchmarks.contenders import Scene
from fastsd.benchmarks.drawing import Drawer, Watch, open_fastsd
from fastsd.errors import MissingDependency


class Painter(Drawer):
    """Paints random pixels from the seed, in a known time, with planted noise."""

    def __init__(self, scene: Scene, seconds: float, noise: float) -> None:
        self._scene, self._seconds, self._noise = scene, seconds, noise
        self._unet = lambda: time.sleep(seconds)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        print("what a library prints must not disturb")
        self._unet()
        return [Image.fromarray(self._pixels(seed)) for seed in seeds]

    def latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return torch.stack([torch.full((4, 8, 8), seed + 1.0) + self._noise for seed in seeds])

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        unet = self._unet
        self._unet = watch.wrap("step", watch.wrap("unet", unet))
        try:
            yield
        finally:
            self._unet = unet

    def explain(self) -> Sequence[str]:
        return (f"paints in {self._seconds} s",)

    def _pixels(self, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        shape = (self._scene.size, self._scene.size, 3)
        clean = generator.uniform(64, 192, shape)
        return (clean + 255 * self._noise * generator.standard_normal(shape)).astype(np.uint8)


def open_painter(scene: Scene, seconds: float = 0.01, noise: float = 0.0) -> Drawer:
    """A painter that works."""
    return Painter(scene, seconds, noise)


def open_nothing(scene: Scene) -> Drawer:
    """One whose package is not there."""
    raise MissingDependency("paint is not installed; run pip install paint")


def open_importing(scene: Scene, module: str) -> Drawer:
    """One that imports a library when it loads, as those that are only then needed are."""
    importlib.import_module(module)
    return Painter(scene, 0.0, 0.0)


class Dying(Painter):
    """One whose process ends in its third draw."""

    count = 0

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        self.count += 1
        if self.count == 3:
            raise SystemExit("error: the brush broke")
        return super().draw(prompts, seeds)


def open_dying(scene: Scene) -> Drawer:
    """A painter that dies."""
    return Dying(scene, 0.01, 0.0)


class Planted(Drawer):
    """fastsd's exact path with a planted fault: it draws slower, or with noise in its pictures."""

    def __init__(self, scene: Scene, slowdown: float, noise: float) -> None:
        self._drawer = open_fastsd(scene, backend="eager", precision="fp32")
        self._slowdown, self._noise = slowdown, noise

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        start = time.perf_counter()
        pictures = [
            np.asarray(picture, np.float64) for picture in self._drawer.draw(prompts, seeds)
        ]
        end = time.perf_counter() + self._slowdown * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        noise = np.random.default_rng(0).normal(0, 255 * self._noise, pictures[0].shape)
        noisy = [np.clip((picture + noise).round(), 0, 255) for picture in pictures]
        return [Image.fromarray(picture.astype(np.uint8)) for picture in noisy]

    def latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return self._drawer.latents(prompts, seeds)

    def watched(self, watch: Watch) -> AbstractContextManager[None]:
        return self._drawer.watched(watch)


def open_planted(scene: Scene, slowdown: float = 0.0, noise: float = 0.0) -> Drawer:
    """The exact path, with what is planted."""
    return Planted(scene, slowdown, noise)
