"""The pictures that all others are held to, kept: what draws them in fp32 takes the longest.

A folder has one of its own for each scene. A run that finds its scene's there need not draw them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsd.benchmarks.contenders import Scene, version
from fastsd.benchmarks.judge import Pictures
from fastsd.checkpoints import open_checkpoint
from fastsd.files import published_folder, read_json, write_json

MOST = 4  # draws that are kept: of SDXL's each takes 3 MB


@dataclass(frozen=True)
class Truth:
    """What a contender drew, in fp32. name: the contender's. latents: (B, C, h, w), of draw 0."""

    name: str
    pictures: Pictures
    latents: NDArray[np.float32]

    def keep(self, folder: Path, scene: Scene) -> None:
        """Write it into its scene's folder below `folder`, in the place of what is there."""
        home = folder / _digest(scene)
        shutil.rmtree(home, ignore_errors=True)
        with published_folder(home) as draft:
            for draw in sorted(self.pictures)[:MOST]:
                np.save(draft / f"{draw}.npy", self.pictures[draw])
            np.save(draft / "latents.npy", self.latents)
            write_json(draft / "truth.json", {"name": self.name, **_facts(scene)})

    @classmethod
    def kept(cls, folder: Path, scene: Scene, repeats: int) -> Truth | None:
        """Read a scene's from below `folder`; None where it is not there.

        Or where it has less of the first `repeats` draws than is kept of as many.
        """
        home = folder / _digest(scene)
        if not home.exists():
            return None
        pictures = {
            int(file.stem): np.load(file) for file in home.glob("*.npy") if file.stem.isdigit()
        }
        if sum(draw < repeats for draw in pictures) < min(repeats, MOST):
            return None
        name = str(read_json(home / "truth.json")["name"])
        return cls(name, pictures, np.load(home / "latents.npy"))


def _facts(scene: Scene) -> dict[str, Any]:
    """All that the pictures depend on."""
    checkpoint = open_checkpoint(scene.model)
    files = [file for part in checkpoint.parts.values() for file in part.weights]
    return {
        "scene": {name: value for name, value in asdict(scene).items() if name != "threads"},
        "config": asdict(checkpoint.config),
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "versions": {name: version(name) for name in ("torch", "diffusers", "fastsd")},
    }


def _digest(scene: Scene) -> str:
    return hashlib.sha256(json.dumps(_facts(scene)).encode()).hexdigest()[:16]
