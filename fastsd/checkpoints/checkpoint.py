"""An opened checkpoint: what the model is, and its parts on demand."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from fastsd.checkpoints import hub
from fastsd.checkpoints.layout import Layout, check_present, read_layout, weight_files
from fastsd.checkpoints.random_weights import PREFIX, preset, random_module, random_tokenizers
from fastsd.checkpoints.weights import empty_module, load_module, read_header
from fastsd.config import ModelConfig
from fastsd.errors import CheckpointError, UsageError
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from fastsd.tokenizers import CLIPTokenizer

BUILTIN = Path(__file__).resolve().parent.parent / "builtin"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class PartFiles:
    """Where a part's weights are: one safetensors file, its shards, or none for random weights."""

    weights: tuple[Path, ...]


@final
@dataclass(frozen=True)
class Checkpoint:
    """A folder in the diffusers layout, read but for its weights.

    parts: text_encoder, text_encoder_2 (SDXL), unet, vae; passed_over: components not used.
    """

    path: Path
    config: ModelConfig
    parts: dict[str, PartFiles]
    tokenizer_folders: tuple[Path, ...]
    passed_over: tuple[str, ...]

    @cached_property
    def tokenizers(self) -> tuple[CLIPTokenizer, ...]:
        """One for each text encoder. Raises CheckpointError."""
        if not self.tokenizer_folders:
            return random_tokenizers(self.config, BUILTIN / "tokenizer")
        return tuple(CLIPTokenizer.from_folder(folder) for folder in self.tokenizer_folders)

    def load(
        self, part: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> nn.Module:
        """Load a part for inference. Weights that need no conversion stay mapped from the file.

        Raises UsageError for an unknown part, CheckpointError for weights that do not fit it.
        """
        if part not in self.parts:
            raise UsageError(f"the checkpoint has no part {part!r}; it has {', '.join(self.parts)}")
        build, files = self.builders[part], self.parts[part]
        if not files.weights:
            return random_module(part, build, dtype=dtype, device=device)
        return load_module(part, build, files.weights, dtype=dtype, device=device)

    @property
    def builders(self) -> dict[str, Callable[[], nn.Module]]:
        """What builds each part's module, with initial weights."""
        config = self.config
        return {
            "text_encoder": lambda: CLIPText(config.text_encoders[0]),
            "text_encoder_2": lambda: CLIPText(config.text_encoders[1]),
            "unet": lambda: UNet(config.unet),
            "vae": lambda: VAE(config.vae),
        }


def open_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Open "builtin", a folder in the diffusers layout, or a hub id such as "owner/name".

    "random:sd15", "random:sd21" and "random:sdxl" are true architectures with random weights.

    variant: "fp16" reads the files that carry it in their names. The rest is for hub ids: revision
    is a branch, tag or commit; local_files_only=None uses the cache where it has all files, and
    downloads otherwise. Raises CheckpointError or UsageError.
    """
    if not isinstance(model, (str, Path)) or not str(model):
        raise UsageError(f"a model is a folder or a hub id, not {model!r}")
    if variant is not None and not re.fullmatch(r"\w+", variant):
        raise UsageError(f"variant {variant!r} must be a word such as 'fp16'")
    if isinstance(model, str) and model.startswith(PREFIX):
        return _random(model)
    folder = BUILTIN if model == "builtin" else Path(model)
    if _exists(folder) and folder.is_dir():
        return _open(folder, variant)
    if _exists(folder):
        raise CheckpointError(
            f"{folder} is a single file; reading those comes later. Give a folder in the diffusers "
            "layout: StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        )
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{str(model)!r} is no folder here, and not a hub id either (owner/name)"
        )

    return hub.fetch(
        model,
        lambda folder: _open(folder, variant),
        revision=revision,
        variant=variant,
        local_files_only=local_files_only,
        token=token,
        cache_dir=cache_dir,
    )


def _random(model: str) -> Checkpoint:
    config = preset(model)
    encoders = ("text_encoder", "text_encoder_2")[: len(config.text_encoders)]
    parts = {part: PartFiles(()) for part in (*encoders, "unet", "vae")}
    return Checkpoint(Path(model), config, parts, tokenizer_folders=(), passed_over=())


def open_description(folder: Path) -> Checkpoint:
    """Open a folder that holds all of a checkpoint but its weights, such as an exported engine's.

    The result has no parts to load. Raises CheckpointError.
    """
    return _described(folder, read_layout(folder), {})


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or with a NUL in it: no file, anyway
        return False


def _open(folder: Path, variant: str | None) -> Checkpoint:
    layout = read_layout(folder)
    parts = {part: PartFiles(weight_files(folder, part, variant)) for part in layout.parts}
    for files in parts.values():
        check_present(files.weights)
    return _described(folder, layout, parts)


def _described(folder: Path, layout: Layout, parts: dict[str, PartFiles]) -> Checkpoint:
    tokenizers = tuple(folder / name for name in layout.tokenizers)
    for tokenizer in tokenizers:
        if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise CheckpointError(f"{tokenizer} holds no tokenizer; the folder is not complete")
    return Checkpoint(folder, layout.config, parts, tokenizers, layout.passed_over)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint is as plain data, from its JSON and its weights' headers alone."""
    builders = checkpoint.builders
    return {
        "path": str(checkpoint.path),
        "family": checkpoint.config.family,
        "default_size": checkpoint.config.default_size,
        "sampler": checkpoint.config.schedule.sampler,
        "schedule": asdict(checkpoint.config.schedule),
        "parts": {
            name: _describe_part(files) if files.weights else _describe_random(builders[name])
            for name, files in checkpoint.parts.items()
        },
        "passed_over": list(checkpoint.passed_over),
    }


def _describe_part(files: PartFiles) -> dict[str, Any]:
    tensors = [info for file in files.weights for info in read_header(file).values()]
    dtypes: Counter[str] = Counter()
    for info in tensors:
        dtypes[info.dtype] += info.count
    return {
        "files": [file.name for file in files.weights],
        "tensors": len(tensors),
        "parameters": sum(info.count for info in tensors),
        "size_bytes": sum(file.stat().st_size for file in files.weights),
        "dtypes": dict(dtypes),
    }


def _describe_random(build: Callable[[], nn.Module]) -> dict[str, Any]:
    tensors = empty_module(build).state_dict().values()
    count = sum(tensor.numel() for tensor in tensors)
    return {
        "files": [],
        "tensors": len(tensors),
        "parameters": count,
        "size_bytes": 4 * count,
        "dtypes": {"F32": count},
    }
