"""Write small checkpoints with random weights: the three families, by diffusers itself.

Every picture of them takes a fraction of a second. The tokenizer is a real byte-level BPE in CLIP's
conventions, trained on a few lines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

BOS, EOS = "<|startoftext|>", "<|endoftext|>"

LINES = [
    "a small red house by the sea, oil painting",
    "a photo of an astronaut riding a horse on mars, highly detailed",
    "the quick brown fox jumps over the lazy dog and the lazy dog does not mind",
    "low quality, blurry, fog, watermark, text, bad anatomy",
    "a cat and a dog and a red apple on a wooden table in the morning light",
    "portrait of the old man with the hat, dramatic lighting, sharp focus",
    "it's the artist's best work: they're sure we've seen nothing like it; i'd say she'll win",
    "一个红苹果在桌子上 一只猫",
    "un château près de la mer, été 1998",
]


def train_bpe(lines: list[str] = LINES, merges: int = 400) -> tuple[dict[str, int], list[str]]:
    """Return (vocab, merges) in CLIP's order: bytes, bytes that end words, merges, two specials."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"),
                behavior="removed",
                invert=True,
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) > 255, ord(c)))
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    joined = [" ".join(pair) for pair in pairs]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in pairs)]
    tokens = [*dict.fromkeys(tokens), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, joined


def clip_tokenizer(folder: Path, pad: str = EOS) -> Any:
    """Return transformers' CLIPTokenizer over a vocab.json and a merges.txt written to `folder`."""
    from transformers import CLIPTokenizer

    vocab, merges = train_bpe()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=pad)


def randomise_(module: nn.Module) -> nn.Module:
    """Move every parameter off its initial value, so that gains, biases and swapped keys show."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return module.eval().requires_grad_(False)


def text_encoder(
    tokenizer: Any,
    *,
    width: int,
    activation: str,
    projection: int | None = None,
    layers: int = 2,
) -> nn.Module:
    """Return a random CLIP text encoder of transformers, with a projection where one is asked."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        hidden_act=activation,
        projection_dim=projection or 512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return randomise_((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def unet(**changes: Any) -> nn.Module:
    """Return a random UNet2DConditionModel of two levels, SD1.x's in kind but for `changes`."""
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = dict(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=16,
    )
    return randomise_(UNet2DConditionModel(**config | changes))


def vae(**changes: Any) -> nn.Module:
    """Return a random AutoencoderKL of four levels, so that a latent stands for 8x8 pixels."""
    from diffusers import AutoencoderKL

    config: dict[str, Any] = dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=128,
        force_upcast=False,
    )
    return randomise_(AutoencoderKL(**config | changes))


def tiny_vae() -> nn.Module:
    """Return a random AutoencoderTiny, narrower than the true one."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(3)
    widths = (16,) * 4
    return randomise_(
        AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    )


STABLE_BETAS: dict[str, Any] = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
)


def write_sd1(folder: Path) -> Path:
    """Write SD1.x in small: quick_gelu text, convolutional projections, eps prediction, PNDM."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    StableDiffusionPipeline(
        text_encoder=text_encoder(tokenizer, width=32, activation="quick_gelu"),
        tokenizer=tokenizer,
        unet=unet(),
        vae=vae(),
        scheduler=PNDMScheduler(**STABLE_BETAS, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_sd2(folder: Path) -> Path:
    """Write SD2.x in small: gelu text padded with "!", linear projections, v prediction, DDIM."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(1)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"), pad="!")
    StableDiffusionPipeline(
        text_encoder=text_encoder(tokenizer, width=48, activation="gelu", layers=3),
        tokenizer=tokenizer,
        unet=unet(
            cross_attention_dim=48,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            upcast_attention=True,
        ),
        vae=vae(),
        scheduler=DDIMScheduler(
            **STABLE_BETAS,
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type="v_prediction",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_sdxl(folder: Path) -> Path:
    """Write SDXL in small: two text encoders, pooled text and sizes beside the time, Euler."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(2)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    tokenizer_2 = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer-2"), pad="!")
    pooled = 40
    StableDiffusionXLPipeline(
        text_encoder=text_encoder(tokenizer, width=32, activation="quick_gelu"),
        text_encoder_2=text_encoder(
            tokenizer_2, width=48, activation="gelu", projection=pooled, layers=3
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=80,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + pooled,
        ),
        vae=vae(scaling_factor=0.13025, force_upcast=True),
        scheduler=EulerDiscreteScheduler(**STABLE_BETAS, timestep_spacing="leading"),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def write_refiner(folder: Path) -> Path:
    """Write SDXL's refiner in small: the second text encoder alone, a score in place of a size."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline

    torch.manual_seed(4)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"), pad="!")
    pooled = 40
    StableDiffusionXLImg2ImgPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=text_encoder(
            tokenizer, width=48, activation="gelu", projection=pooled, layers=3
        ),
        tokenizer_2=tokenizer,
        unet=unet(
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=48,
            attention_head_dim=(2, 4, 4),
            transformer_layers_per_block=2,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=5 * 8 + pooled,
        ),
        vae=vae(scaling_factor=0.13025, force_upcast=True),
        scheduler=EulerDiscreteScheduler(**STABLE_BETAS, timestep_spacing="leading"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def write_inpainting(folder: Path, base: Path) -> Path:
    """Write `base` with a random UNet that inpaints: nine channels in."""
    from diffusers import (
        DiffusionPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionXLInpaintPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(3)
    parts = DiffusionPipeline.from_pretrained(base, local_files_only=True).components
    wider = UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 9})
    parts["unet"] = randomise_(wider)
    if "tokenizer_2" in parts:
        pipeline = StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
    else:
        pipeline = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return folder
