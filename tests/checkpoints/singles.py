"""Single files in the original layout: small models of diffusers', written under the old names.

The names come from a walk over the original code's numbering, the inverse of what fastsd reads.
Sizes follow the original's rules (heads of 64, groups of 32), which a file cannot say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.fixtures import STABLE_BETAS, clip_tokenizer, text_encoder, unet, vae

Tensors = dict[str, Tensor]


def ldm_unet(state: Tensors, layers: int) -> Tensors:
    """Rename a UNet2DConditionModel's tensors; layers: resnets a level."""
    inside = {
        "norm1.": "in_layers.0.",
        "conv1.": "in_layers.2.",
        "time_emb_proj.": "emb_layers.1.",
        "norm2.": "out_layers.0.",
        "conv2.": "out_layers.3.",
        "conv_shortcut.": "skip_connection.",
    }
    outside = {
        "conv_in.": "input_blocks.0.0.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
        "mid_block.attentions.0.": "middle_block.1.",
    }
    renamed = {}
    for name, tensor in state.items():
        new = name
        for ours, theirs in outside.items():
            if name.startswith(ours):
                new = theirs + name[len(ours) :]
        side, *path = name.split(".")
        if side in ("down_blocks", "up_blocks"):
            level, kind, index = int(path[0]), path[1], int(path[2])
            rest = ".".join(path[3:])
            width = layers + 1
            block = level * width + index + (1 if side == "down_blocks" else 0)
            if kind == "resnets":
                rest = next(b + rest[len(a) :] for a, b in inside.items() if rest.startswith(a))
                new = f"{block}.0.{rest}"
            elif kind == "attentions":
                new = f"{block}.1.{rest}"
            elif kind == "downsamplers":
                new = f"{(level + 1) * width}.0.{rest.replace('conv', 'op')}"
            else:
                attends = any(k.startswith(f"up_blocks.{level}.attentions") for k in state)
                new = f"{level * width + layers}.{2 if attends else 1}.{rest}"
            new = f"{'input' if side == 'down_blocks' else 'output'}_blocks.{new}"
        elif name.startswith("mid_block.resnets."):
            index, rest = int(path[1]), ".".join(path[2:])
            rest = next(b + rest[len(a) :] for a, b in inside.items() if rest.startswith(a))
            new = f"middle_block.{2 * index}.{rest}"
        assert new not in renamed and (new != name), name
        renamed[new] = tensor
    return {f"model.diffusion_model.{key}": tensor for key, tensor in renamed.items()}


def ldm_vae(state: Tensors) -> Tensors:
    """Rename an AutoencoderKL's tensors; its attention's layers become 1x1 convolutions again."""
    levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("decoder.up_blocks."))
    attention = {
        "group_norm.": "norm.",
        "to_q.": "q.",
        "to_k.": "k.",
        "to_v.": "v.",
        "to_out.0.": "proj_out.",
    }
    renamed = {}
    for name, tensor in state.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = new.replace("mid_block.resnets.0", "mid.block_1")
        new = new.replace("mid_block.resnets.1", "mid.block_2")
        for level in range(levels):
            for ours, theirs, place in (
                ("down_blocks", "down", level),
                ("up_blocks", "up", levels - 1 - level),
            ):
                new = new.replace(f"{ours}.{level}.resnets.", f"{theirs}.{place}.block.")
                new = new.replace(f"{ours}.{level}.{ours[:-7]}samplers.0.", f"{theirs}.{place}.")
        for side in ("down", "up"):
            new = new.replace(f"{side}.0.conv", f"{side}.0.{side}sample.conv")
            for level in range(1, levels):
                new = new.replace(f"{side}.{level}.conv.", f"{side}.{level}.{side}sample.conv.")
        if "mid_block.attentions.0." in new:
            new = new.replace("mid_block.attentions.0.", "mid.attn_1.")
            for ours, theirs in attention.items():
                new = new.replace(f"attn_1.{ours}", f"attn_1.{theirs}")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        renamed[f"first_stage_model.{new}"] = tensor
    assert len(renamed) == len(state)
    return renamed


def ldm_clip(state: Tensors, prefix: str) -> Tensors:
    """Rename a CLIPTextModel's tensors, as the transformers of that time named them."""
    renamed = {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": t for name, t in state.items()
    }
    return renamed | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip(state: Tensors, prefix: str, *, spare_layer: bool) -> Tensors:
    """Rename a CLIPTextModel's tensors as OpenCLIP's. spare_layer: add one that nobody uses."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    layers = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.layers."))
    renamed = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    for i in range(layers):
        ours, theirs = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for leaf in ("weight", "bias"):
            for a, b in names.items():
                renamed[f"{theirs}{b}.{leaf}"] = state[f"{ours}{a}.{leaf}"]
            stacked = [state[f"{ours}self_attn.{n}_proj.{leaf}"] for n in "qkv"]
            renamed[f"{theirs}attn.in_proj_{leaf}"] = torch.cat(stacked)
    width = state["final_layer_norm.weight"].shape[0]
    projection = state.get("text_projection.weight")
    if spare_layer:
        last = f"transformer.resblocks.{layers - 1}."
        for key in [k for k in renamed if k.startswith(last)]:
            spare = key.replace(last, f"transformer.resblocks.{layers}.")
            renamed[spare] = torch.randn_like(renamed[key])
        projection = torch.randn(width, width)
    assert projection is not None
    renamed["text_projection"] = projection.t().contiguous()
    return {prefix + key: tensor for key, tensor in renamed.items()}


TRAINING = {  # what training left in whole files
    "betas": torch.zeros(1000),
    "alphas_cumprod": torch.zeros(1000),
    "sqrt_one_minus_alphas_cumprod": torch.zeros(1000),
    "posterior_mean_coef1": torch.zeros(1000),
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
    "first_stage_model.loss.logvar": torch.zeros(()),
}


@dataclass(frozen=True)
class SingleFile:
    """file: the original layout. folder: the same model, written by diffusers itself."""

    file: Path
    folder: Path
    pipeline: str

    @property
    def tokenizer(self) -> Path:
        """Where the file's tokenizers are, which it cannot hold."""
        return self.folder


def small_unet(**changes: Any) -> Any:
    return unet(
        **dict(block_out_channels=(64, 128), norm_num_groups=32, cross_attention_dim=64) | changes
    )


def small_vae(**changes: Any) -> Any:
    return vae(**dict(block_out_channels=(32, 32, 64, 64), norm_num_groups=32) | changes)


def small_text(tokenizer: Any, *, width: int = 64, **options: Any) -> Any:
    """A text encoder whose heads are 64 wide, as all real ones' are."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    model: Any = text_encoder(tokenizer, width=width, **options)
    config = CLIPTextConfig(**{**model.config.to_dict(), "num_attention_heads": width // 64})
    kind = CLIPTextModelWithProjection if options.get("projection") else CLIPTextModel
    rebuilt = kind(config)
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt.eval().requires_grad_(False)


def _finish(pipe: Any, folder: Path, tensors: Tensors, metadata: dict[str, str]) -> SingleFile:
    pipe.save_pretrained(folder)
    file = folder.with_suffix(".safetensors")
    contiguous = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt"} | metadata)
    return SingleFile(file, folder, type(pipe).__name__)


def write_sd1(folder: Path, *, in_channels: int = 4) -> SingleFile:
    from diffusers import PNDMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline

    torch.manual_seed(10)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    kind = StableDiffusionPipeline if in_channels == 4 else StableDiffusionInpaintPipeline
    pipe = kind(
        text_encoder=small_text(tokenizer, activation="quick_gelu"),
        tokenizer=tokenizer,
        unet=small_unet(in_channels=in_channels, attention_head_dim=8, layers_per_block=2),
        vae=small_vae(),
        scheduler=PNDMScheduler(**STABLE_BETAS, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    tensors = ldm_unet(pipe.unet.state_dict(), 2) | ldm_vae(pipe.vae.state_dict())
    tensors |= ldm_clip(pipe.text_encoder.state_dict(), "cond_stage_model.transformer.")
    return _finish(pipe, folder, tensors | TRAINING, {})


def write_sd2(folder: Path, *, metadata: dict[str, str] | None = None) -> SingleFile:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(11)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"), pad="!")
    pipe = StableDiffusionPipeline(
        # 23 layers: diffusers' converter leaves out number 23 by its name
        text_encoder=small_text(tokenizer, activation="gelu", layers=23),
        tokenizer=tokenizer,
        unet=small_unet(
            attention_head_dim=(1, 2), use_linear_projection=True, upcast_attention=True
        ),
        vae=small_vae(),
        scheduler=DDIMScheduler(
            **STABLE_BETAS,
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type="v_prediction",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    tensors = ldm_unet(pipe.unet.state_dict(), 1) | ldm_vae(pipe.vae.state_dict())
    text = pipe.text_encoder.state_dict()
    tensors |= open_clip(text, "cond_stage_model.model.", spare_layer=True)
    return _finish(pipe, folder, tensors | TRAINING, metadata or {})


_XL: dict[str, Any] = dict(
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8
)


def write_sdxl(folder: Path, *, in_channels: int = 4) -> SingleFile:
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionXLInpaintPipeline,
        StableDiffusionXLPipeline,
    )

    torch.manual_seed(12)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    tokenizer_2 = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer-2"), pad="!")
    kind = StableDiffusionXLPipeline if in_channels == 4 else StableDiffusionXLInpaintPipeline
    pipe = kind(
        text_encoder=small_text(tokenizer, activation="quick_gelu"),
        text_encoder_2=small_text(
            tokenizer_2, width=128, activation="gelu", projection=128, layers=3
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=small_unet(
            in_channels=in_channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            cross_attention_dim=192,
            attention_head_dim=(1, 2),
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + 128,
            **_XL,
        ),
        vae=small_vae(scaling_factor=0.13025, force_upcast=True),
        scheduler=EulerDiscreteScheduler(**STABLE_BETAS, timestep_spacing="leading"),
        add_watermarker=False,
    )
    tensors = ldm_unet(pipe.unet.state_dict(), 2) | ldm_vae(pipe.vae.state_dict())
    first, second = pipe.text_encoder.state_dict(), pipe.text_encoder_2.state_dict()
    tensors |= ldm_clip(first, "conditioner.embedders.0.transformer.")
    tensors |= open_clip(second, "conditioner.embedders.1.model.", spare_layer=False)
    return _finish(pipe, folder, tensors | {"denoiser.sigmas": torch.zeros(1000)}, {})


def write_refiner(folder: Path) -> SingleFile:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline

    torch.manual_seed(13)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"), pad="!")
    pipe = StableDiffusionXLImg2ImgPipeline(
        text_encoder=None,
        text_encoder_2=small_text(
            tokenizer, width=128, activation="gelu", projection=128, layers=3
        ),
        tokenizer=None,
        tokenizer_2=tokenizer,
        unet=small_unet(
            block_out_channels=(64, 128, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            cross_attention_dim=128,
            attention_head_dim=(1, 2, 2),
            transformer_layers_per_block=2,
            projection_class_embeddings_input_dim=5 * 8 + 128,
            **_XL,
        ),
        vae=small_vae(scaling_factor=0.13025, force_upcast=True),
        scheduler=EulerDiscreteScheduler(**STABLE_BETAS, timestep_spacing="leading"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    tensors = ldm_unet(pipe.unet.state_dict(), 2) | ldm_vae(pipe.vae.state_dict())
    text = pipe.text_encoder_2.state_dict()
    tensors |= open_clip(text, "conditioner.embedders.0.model.", spare_layer=False)
    return _finish(pipe, folder, tensors, {})


WRITERS: dict[str, Callable[[Path], SingleFile]] = {
    "sd1": write_sd1,
    "sd1-inpaint": lambda folder: write_sd1(folder, in_channels=9),
    "sd2": write_sd2,
    "sdxl": write_sdxl,
    "sdxl-inpaint": lambda folder: write_sdxl(folder, in_channels=9),
    "sdxl-refiner": write_refiner,
}


class Singles(dict[str, SingleFile]):
    """Every file of WRITERS, each written when first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> SingleFile:
        self[name] = WRITERS[name](self.folder / name)
        return self[name]
