"""LoRA files with random numbers, in the names that each trainer writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.checkpoints.singles import ldm_unet

Tensors = dict[str, Tensor]
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
EVERYTHING = ("to_", "proj", "ff.net", "conv1", "conv2", "conv_shortcut", "fc1", "fc2", "samplers")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def modules(pipe: Any, part: str, kinds: Sequence[str]) -> dict[str, nn.Module]:
    """A part's linear and convolution layers whose names hold one of `kinds`."""
    found: dict[str, nn.Module] = {}
    for name, module in getattr(pipe, part).named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and any(kind in name for kind in kinds):
            text = part.startswith("text") and not name.startswith(("text_model.", "text_proj"))
            found[f"text_model.{name}" if text else name] = module  # as trainers name them
    return found


def pairs(
    layers: dict[str, nn.Module], seed: int, rank: int | None = None, size: float = 0.25
) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) for each layer, ranks from 1 to 5 unless given; a change of relative `size`."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for i, (name, layer) in enumerate(layers.items()):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        r = rank or 1 + i % 5
        down = torch.randn(r, *weight.shape[1:], generator=generator)
        ones = (1, 1) if weight.ndim == 4 else ()
        up = torch.randn(weight.shape[0], r, *ones, generator=generator)
        change = (up.flatten(1) @ down.flatten(1)).norm()
        made[name] = (down * (size * weight.norm() / change), up)
    return made


def kohya(
    part: str,
    made: dict[str, tuple[Tensor, Tensor]],
    *,
    alpha: Callable[[int], float] = lambda i: 2.0,
    originals: Mapping[str, Tensor] | None = None,
) -> Tensors:
    """Underscores for dots, an alpha each.

    originals: a UNet's state, to name SDXL's layers as the original layout does.
    """
    sgm = originals is not None
    tensors: Tensors = {}
    prefix = KOHYA[part]
    if part == "text_encoder" and sgm:
        prefix = "lora_te1"
    for i, (name, (down, up)) in enumerate(made.items()):
        if originals is not None and part == "unet":
            names = dict(zip(originals, ldm_unet(dict(originals), 1), strict=True))
            key = names[f"{name}.weight"]
            name = key.removeprefix("model.diffusion_model.").removesuffix(".weight")
        flat = f"{prefix}_{name.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"] = down
        tensors[f"{flat}.lora_up.weight"] = up
        tensors[f"{flat}.alpha"] = torch.tensor(alpha(i))
    return tensors


def peft(part: str, made: dict[str, tuple[Tensor, Tensor]]) -> Tensors:
    """What diffusers' save_lora_weights writes."""
    tensors = {}
    for name, (down, up) in made.items():
        tensors[f"{part}.{name}.lora_A.weight"] = down
        tensors[f"{part}.{name}.lora_B.weight"] = up
    return tensors


def old_diffusers(part: str, made: dict[str, tuple[Tensor, Tensor]]) -> Tensors:
    """What diffusers wrote before PEFT: attention only."""
    tensors = {}
    for name, (down, up) in made.items():
        name = name.replace(".to_out.0", ".to_out")
        if part == "unet":
            stem, leaf = name.rsplit(".", 1)
            name = f"{stem}.processor.{leaf}_lora"
        else:
            for new, old in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "out")):
                name = name.replace(f"{new}_proj", f"to_{old}_lora")
        tensors[f"{part}.{name}.down.weight"] = down
        tensors[f"{part}.{name}.up.weight"] = up
    return tensors


Form = Callable[[str, dict[str, tuple[Tensor, Tensor]]], Tensors]


def write_lora(
    path: Path,
    pipe: Any,
    form: Form,
    *,
    parts: Sequence[str] = ("unet", "text_encoder"),
    kinds: Sequence[str] = EVERYTHING,
    seed: int = 0,
    rank: int | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a LoRA for the layers of diffusers' `pipe`."""
    tensors: Tensors = {}
    for part in parts:
        tensors |= form(part, pairs(modules(pipe, part, kinds), seed, rank))
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)
    return path
