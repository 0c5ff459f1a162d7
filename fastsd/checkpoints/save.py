"""Write a model as an ordinary diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fastsd.checkpoints.configs import write_clip, write_unet, write_vae
from fastsd.checkpoints.keys import foreign
from fastsd.checkpoints.layout import INDEX, MARKS, STEMS
from fastsd.checkpoints.schedulers import write_schedule
from fastsd.config import ModelConfig
from fastsd.errors import UsageError
from fastsd.files import published_folder, write_json
from fastsd.tokenizers import CLIPTokenizer

# The diffusers release whose layout this is; readers put right what older ones got wrong.
_LAYOUT_VERSION = "0.38.0"


def save_folder(
    path: str | Path,
    config: ModelConfig,
    modules: Mapping[str, nn.Module],
    tokenizers: Sequence[CLIPTokenizer],
    *,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write `path` so that diffusers loads it unchanged; all of it appears at once, or nothing.

    modules: text_encoder, text_encoder_2 (SDXL), unet, vae, in any dtype and on any device.
    tokenizers: one for each text encoder. Raises UsageError if `path` exists, or a part lacks.
    """
    encoders = _encoders(config)
    parts = (*config.text_parts, "unet", "vae")
    if set(modules) != set(parts) or len(tokenizers) != len(encoders):
        raise UsageError(
            f"a {config.family} folder needs {', '.join(parts)} and {len(encoders)} tokenizers; "
            f"given {', '.join(modules)} and {len(tokenizers)}"
        )
    with published_folder(Path(path)) as folder:
        save_description(folder, config, tokenizers)
        for part, name in zip(parts, (*encoders, "unet", "vae"), strict=True):
            _save_weights(folder / name / f"{STEMS[name]}.safetensors", part, modules[part], dtype)


def save_description(
    folder: Path, config: ModelConfig, tokenizers: Sequence[CLIPTokenizer]
) -> None:
    """Write all of a diffusers folder but its weights: index, configs, tokenizers, scheduler."""
    sdxl = config.family.startswith("sdxl")
    encoders = _encoders(config)
    schedule = write_schedule(config.schedule)
    configs: dict[str, dict[str, Any]] = {
        name: write_clip(encoder, bos=tokenizer.bos, pad=tokenizer.pad)
        for name, encoder, tokenizer in zip(encoders, config.text_encoders, tokenizers, strict=True)
    }
    configs |= {"unet": write_unet(config.unet), "vae": write_vae(config.vae)}
    index: dict[str, Any] = {
        "_class_name": _pipeline_class(config),
        "_diffusers_version": _LAYOUT_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    for mark, name in MARKS.items():
        value = getattr(config.schedule, name)
        if value is not None:
            index[mark] = list(value) if isinstance(value, tuple) else value
    if sdxl:
        index["force_zeros_for_empty_prompt"] = config.zero_empty_negative
        if config.family == "sdxl-refiner":
            index |= {"requires_aesthetics_score": True}
            index |= dict.fromkeys(("text_encoder", "tokenizer"), [None, None])
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    for name, part in configs.items():
        index[name] = (
            ["transformers", part["architectures"][0]]
            if name in encoders
            else ["diffusers", part["_class_name"]]
        )
        (folder / name).mkdir(exist_ok=True)
        if name not in encoders:
            part["_diffusers_version"] = _LAYOUT_VERSION
        write_json(folder / name / "config.json", part)
    for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
        name = encoder.replace("text_encoder", "tokenizer")
        index[name] = ["transformers", "CLIPTokenizer"]
        tokenizer.save(folder / name)
    index["scheduler"] = ["diffusers", schedule["_class_name"]]
    (folder / "scheduler").mkdir(exist_ok=True)
    schedule["_diffusers_version"] = _LAYOUT_VERSION
    write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    write_json(folder / INDEX, dict(sorted(index.items())))


def _encoders(config: ModelConfig) -> tuple[str, ...]:
    """Name the folders of the text encoders: a refiner's only one is SDXL's second."""
    return ("text_encoder_2",) if config.family == "sdxl-refiner" else config.text_parts


def _pipeline_class(config: ModelConfig) -> str:
    sdxl = "XL" if config.family.startswith("sdxl") else ""
    task = "Inpaint" if config.inpaints else ""
    if config.family == "sdxl-refiner":
        task = "Img2Img"
    return f"StableDiffusion{sdxl}{task}Pipeline"


def _save_weights(path: Path, part: str, module: nn.Module, dtype: torch.dtype) -> None:
    tensors = {
        foreign(part, key): tensor.detach().to("cpu", dtype).contiguous()
        for key, tensor in module.state_dict().items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
