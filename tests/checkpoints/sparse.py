"""Single files of true size whose data is a hole: a header, and gigabytes that take no disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from fastsd.checkpoints.weights import _Uninitialised
from fastsd.config import ModelConfig
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from tests.checkpoints.singles import ldm_clip, ldm_unet, ldm_vae, open_clip


def ldm_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of a whole file of `config`, by the tests' own key map."""
    with torch.device("meta"), _Uninitialised():
        texts = [dict(CLIPText(text).state_dict()) for text in config.text_encoders]
        tensors = ldm_unet(dict(UNet(config.unet).state_dict()), config.unet.layers_per_level)
        tensors |= ldm_vae(dict(VAE(config.vae).state_dict()))
        if config.family == "sd1":
            tensors |= ldm_clip(texts[0], "cond_stage_model.transformer.")
        elif config.family == "sd2":
            tensors |= open_clip(texts[0], "cond_stage_model.model.", spare_layer=True)
        else:
            if config.family == "sdxl":
                tensors |= ldm_clip(texts[0], "conditioner.embedders.0.transformer.")
            prefix = f"conditioner.embedders.{len(texts) - 1}.model."
            tensors |= open_clip(texts[-1], prefix, spare_layer=False)
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Write a file of fp16 zeros that takes no data blocks."""
    header: dict[str, object] = {}
    end = 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path
