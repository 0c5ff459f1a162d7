"""An opened checkpoint: what the model is, and its parts on demand."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from fastsd.artifact import is_artifact
from fastsd.checkpoints import hub
from fastsd.checkpoints.layout import (
    BUILTIN,
    Layout,
    check_present,
    read_layout,
    read_vae_folder,
    weight_files,
)
from fastsd.checkpoints.lora import LoRA, merge_, open_lora
from fastsd.checkpoints.random_weights import PREFIX, preset, random_module
from fastsd.checkpoints.single import read_single, read_vae_file
from fastsd.checkpoints.weights import Use, empty_module, load_module, read_header
from fastsd.config import FEW_STEPS, CLIPConfig, ModelConfig, sampled_as
from fastsd.errors import CheckpointError, UsageError
from fastsd.files import explained_denials
from fastsd.models.clip import CLIPText
from fastsd.models.tiny_vae import TinyVAE
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from fastsd.tokenizers import CLIPTokenizer

log = logging.getLogger("fastsd")

_TOKENIZERS = ("tokenizer", "tokenizer_2")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class PartFiles:
    """Where a part's weights are: one safetensors file, its shards, or none for random weights.

    uses: what the part makes of each key of a file that holds other parts too; None: all are its.
    """

    weights: tuple[Path, ...]
    uses: Mapping[str, tuple[Use, ...]] | None = None


@final
@dataclass(frozen=True)
class Checkpoint:
    """A folder in the diffusers layout or a single file, read but for its weights.

    parts: text_encoder, text_encoder_2 (SDXL), unet, vae; passed_over: components or keys not used.
    tokenizer_folders: one for each text encoder; none: CLIP's own vocabulary.
    merged: LoRAs that are part of the weights whenever a part is loaded, and how strongly.
    """

    path: Path
    config: ModelConfig
    parts: dict[str, PartFiles]
    tokenizer_folders: tuple[Path, ...]
    passed_over: tuple[str, ...]
    merged: tuple[tuple[LoRA, float], ...] = ()

    @cached_property
    def tokenizers(self) -> tuple[CLIPTokenizer, ...]:
        """One for each text encoder. Raises CheckpointError."""
        if self.tokenizer_folders:
            return tuple(CLIPTokenizer.from_folder(folder) for folder in self.tokenizer_folders)
        return tuple(self._standard_tokenizer(text) for text in self.config.text_encoders)

    def _standard_tokenizer(self, text: CLIPConfig) -> CLIPTokenizer:
        # OpenCLIP, known by its exact GELU, pads with the first token: "!"
        pad = {"pad_token": "!"} if text.activation == "gelu" else {}
        tokenizer = CLIPTokenizer.standard(pad)
        if tokenizer.size != text.vocab_size:
            raise CheckpointError(
                f"{self.path} has a text encoder of {text.vocab_size} tokens, CLIP's own "
                f"vocabulary has {tokenizer.size}: give the folder of its tokenizer with tokenizer="
            )
        return tokenizer

    @explained_denials()
    def with_vae(self, path: str | Path, *, variant: str | None = None) -> Checkpoint:
        """Return this checkpoint with another VAE, or a tiny autoencoder, of a folder or a file.

        Of a file, whose shapes do not tell, the scale stays the model's. Raises CheckpointError.
        """
        path = Path(path)
        if path.is_dir():
            vae, weights = read_vae_folder(path, variant)
            check_present(weights)
            files = PartFiles(weights)
        else:
            vae, uses = read_vae_file(path, self.config.vae)
            files = PartFiles((path,), uses)
        if vae.latent_channels != self.config.vae.latent_channels:
            raise CheckpointError(
                f"{path} has latents of {vae.latent_channels} channels, the model's have "
                f"{self.config.vae.latent_channels}: it belongs to another family"
            )
        config = replace(self.config, vae=vae)
        return replace(self, config=config, parts={**self.parts, "vae": files})

    def with_loras(self, loras: Sequence[tuple[str | Path, float]]) -> Checkpoint:
        """Return this checkpoint with LoRAs merged into its weights, each at its weight.

        Each is a file, a folder or a hub id. Raises CheckpointError for one that does not fit.
        """
        shapes = {
            part: dict(empty_module(build).named_parameters())
            for part, build in self.builders.items()
            if part in self.parts
        }
        for source, weight in loras:
            if not math.isfinite(weight):
                raise UsageError(f"the weight of {source} must be a finite number, not {weight}")
        opened = [(open_lora(source, self.config, shapes), weight) for source, weight in loras]
        return replace(self, merged=(*self.merged, *opened))

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
            module = random_module(part, build, dtype=dtype, device=device)
        else:
            module = load_module(
                part, build, files.weights, dtype=dtype, device=device, uses=files.uses
            )
        for name, weight in module.named_parameters():
            deltas = [
                (lora.deltas[part, name], strength)
                for lora, strength in self.merged
                if strength and (part, name) in lora.deltas
            ]
            if deltas:
                merge_(weight, weight, deltas)
        return module

    def fingerprint(self) -> str:
        """Tell this model from others by a digest of its config, its tokenizers, and its weights'
        files as the disk lists them: reading them all takes seconds."""
        weights = [
            [part, str(file.resolve()), stat.st_size, stat.st_mtime_ns]
            for part, files in sorted(self.parts.items())
            for file in files.weights
            for stat in [file.stat()]
        ]
        facts = {
            "config": asdict(self.config),
            "weights": weights,
            "tokenizers": [tokenizer.digest for tokenizer in self.tokenizers],
            "merged": [(lora.digest(), strength) for lora, strength in self.merged],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def builders(self) -> dict[str, Callable[[], nn.Module]]:
        """What builds each part's module, with initial weights."""
        config = self.config
        return {
            "text_encoder": lambda: CLIPText(config.text_encoders[0]),
            "text_encoder_2": lambda: CLIPText(config.text_encoders[1]),
            "unet": lambda: UNet(config.unet),
            "vae": lambda: VAE(config.vae) if config.vae.blocks is None else TinyVAE(config.vae),
        }


@explained_denials()
def open_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction: str | None = None,
    preset: str | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    local_files_only: bool | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Open "builtin", a folder in the diffusers layout, a single file, or a hub id: "owner/name".

    "random:sd15", "random:sd21" and "random:sdxl" are true architectures with random weights.

    variant: "fp16" reads the files that carry it in their names. prediction: "eps", "v" or "x0",
    where the checkpoint does not say or is wrong. preset: a name of config.FEW_STEPS, such as
    "lightning-4", for a model distilled to few steps that does not say so. vae: another VAE, or a
    tiny autoencoder, in the VAE's place: a folder with its config.json or a file. tokenizer: a
    folder with one, or with the folders tokenizer and tokenizer_2; a single file holds none, and
    CLIP's own vocabulary fits all but few.
    The rest is for hub ids: revision is a branch, tag or commit; local_files_only=None uses the
    cache where it has all files, and downloads otherwise. Raises CheckpointError or UsageError.
    """
    decided = FEW_STEPS.get(preset, {}).get("prediction") if preset is not None else None
    if decided is not None and prediction not in (None, decided):
        raise UsageError(
            f"preset {preset!r} is of models that predict {decided}, not {prediction}; drop one"
        )
    prediction = prediction or decided
    checkpoint = _opened(
        model,
        revision=revision,
        variant=variant,
        prediction=prediction,
        without_vae=vae is not None,
        local_files_only=local_files_only,
        token=token,
        cache_dir=cache_dir,
    )
    config = checkpoint.config
    if prediction is not None and prediction != config.schedule.prediction:
        config = replace(config, schedule=replace(config.schedule, prediction=prediction))
    if preset is not None:
        config = sampled_as(config, preset)
    elif config.schedule.steps is None and isinstance(model, (str, Path)):
        _hint(Path(model).name)
    checkpoint = replace(checkpoint, config=config)
    if vae is not None:
        checkpoint = checkpoint.with_vae(vae, variant=variant)
        config = checkpoint.config
    if tokenizer is None:
        return checkpoint
    folders = _tokenizer_folders(Path(tokenizer), len(config.text_encoders))
    return replace(checkpoint, config=config, tokenizer_folders=folders)


def _opened(
    model: str | Path,
    *,
    variant: str | None,
    prediction: str | None,
    without_vae: bool,
    **hub_options: Any,
) -> Checkpoint:
    if not isinstance(model, (str, Path)) or not str(model):
        raise UsageError(f"a model is a folder or a hub id, not {model!r}")
    if variant is not None and not re.fullmatch(r"\w+", variant):
        raise UsageError(f"variant {variant!r} must be a word such as 'fp16'")
    if isinstance(model, str) and model.startswith(PREFIX):
        return _random(model)
    folder = BUILTIN if model == "builtin" else Path(model)
    if _exists(folder) and folder.is_dir():
        return _open(folder, variant, exact=False)
    if _exists(folder):
        return _open_file(folder, prediction, without_vae)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{str(model)!r} is no folder or file here, and not a hub id either (owner/name)"
        )

    return hub.fetch(
        model,
        lambda folder, exact: _open(folder, variant, exact=exact),
        variant=variant,
        **hub_options,
    )


def _random(model: str) -> Checkpoint:
    config = preset(model)
    parts = {part: PartFiles(()) for part in (*config.text_parts, "unet", "vae")}
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


def model_name(model: str | Path) -> str:
    """Return what to call a model: the name of its folder or file, not where that lies; or as it
    was given."""
    return Path(model).name if _exists(Path(model)) else str(model)


def _open(folder: Path, variant: str | None, *, exact: bool) -> Checkpoint:
    if is_artifact(folder):
        raise CheckpointError(
            f"{folder} is an exported engine, which holds graphs for weights; give the model that "
            "it is of"
        )
    layout = read_layout(folder)
    names = iter(layout.config.text_parts)  # a refiner's only one is the folder's second
    parts = {
        next(names) if part.startswith("text_encoder") else part: PartFiles(
            weight_files(folder, part, variant, exact=exact)
        )
        for part in layout.parts
    }
    for files in parts.values():
        check_present(files.weights)
    return _described(folder, layout, parts)


def _described(folder: Path, layout: Layout, parts: dict[str, PartFiles]) -> Checkpoint:
    tokenizers = tuple(folder / name for name in layout.tokenizers)
    for tokenizer in tokenizers:
        if not _holds_tokenizer(tokenizer):
            raise CheckpointError(f"{tokenizer} holds no tokenizer; the folder is not complete")
    return Checkpoint(folder, layout.config, parts, tokenizers, layout.passed_over)


def _open_file(file: Path, prediction: str | None, without_vae: bool) -> Checkpoint:
    single = read_single(file, prediction=prediction, without_vae=without_vae)
    parts = {part: PartFiles((file,), uses) for part, uses in single.uses.items()}
    return Checkpoint(file, single.config, parts, (), single.passed_over)


_FEW_STEPS_NAME = re.compile(r"(lightning|hyper|turbo|lcm)(?:.*?(\d+)[-_ ]?steps?)?", re.I)


def _hint(name: str) -> None:
    """Say how to draw with what, by its name, may be distilled to few steps; a name proves none."""
    found = _FEW_STEPS_NAME.search(name)
    if found:
        kind, steps = found[1].lower(), found[2]
        near = [p for p in FEW_STEPS if kind in p and (not steps or p.endswith(f"-{steps}"))]
        log.warning(
            "by its name %s may be a %s model, and its file does not say so; if it is, give "
            "preset= (--preset), one of %s",
            name,
            kind,
            ", ".join(near or [p for p in FEW_STEPS if kind in p]),
        )


def _tokenizer_folders(folder: Path, count: int) -> tuple[Path, ...]:
    """Find a tokenizer for each text encoder: each its own, or one for all."""
    own = [path for name in _TOKENIZERS if _holds_tokenizer(path := folder / name)]
    if len(own) >= count:
        return tuple(own[:count])
    if not _holds_tokenizer(folder):
        raise CheckpointError(
            f"{folder} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt, "
            "there or in its folders tokenizer and tokenizer_2"
        )
    return (folder,) * count


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


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


def parameters(checkpoint: Checkpoint) -> int:
    """Count the weights of all parts, from their files' headers."""
    return sum(part["parameters"] for part in describe(checkpoint)["parts"].values())


def _describe_part(files: PartFiles) -> dict[str, Any]:
    tensors = [
        info
        for file in files.weights
        for key, info in read_header(file).items()
        if files.uses is None or key in files.uses
    ]
    dtypes: Counter[str] = Counter()
    for info in tensors:
        dtypes[info.dtype] += info.count
    return {
        "files": [file.name for file in files.weights],
        "tensors": len(tensors),
        "parameters": sum(info.count for info in tensors),
        "size_bytes": sum(file.stat().st_size for file in files.weights)
        if files.uses is None
        else sum(info.size_bytes for info in tensors),
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
