"""Rewrite a checkpoint folder: into the forms that older tools wrote, or into broken ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
Tensors = dict[str, Tensor]


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object] | dict[str, Any]) -> None:
    """Update a JSON file with a dict, or by a function that changes the data in place."""
    data = json.loads(path.read_text())
    if callable(change):
        change(data)
    else:
        data |= change
    path.write_text(json.dumps(data))


def edit_weights(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change({key: tensor.clone() for key, tensor in load_file(path).items()})
    save_file(tensors, path, metadata={"format": "pt"})


def shard(path: Path, variant: str = "", count: int = 3) -> list[Path]:
    """Split a weights file into shards with an index, as the hub's large models are."""
    tensors = load_file(path)
    stem, infix = path.name.removesuffix(".safetensors"), f".{variant}" if variant else ""
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    files = []
    for i in range(count):
        file = path.with_name(f"{stem}{infix}-{i + 1:05}-of-{count:05}.safetensors")
        share = {name: tensors[name] for name in names[i::count]}
        weight_map |= dict.fromkeys(share, file.name)
        save_file(share, file, metadata={"format": "pt"})
        files.append(file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    path.with_name(f"{stem}.safetensors.index{infix}.json").write_text(json.dumps(index))
    path.unlink()
    return files
