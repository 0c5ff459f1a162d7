"""Build diffusers' and transformers' models from our configs, with weights that hide nothing."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fastsd.config import CLIPConfig, UNetConfig, VAEConfig

BAR = 1e-5  # relative L2, fp32


def shake_(module: nn.Module) -> nn.Module:
    """Give norms gains and biases that are not 1 and 0, so that a wrong one shows; freeze."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.GroupNorm | nn.LayerNorm):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(std=0.3)
    return module.eval().requires_grad_(False)


def unet_options(config: UNetConfig) -> dict[str, Any]:
    """Say our config in diffusers' words (where attention_head_dim means the number of heads)."""
    options: dict[str, Any] = dict(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.widths,
        down_block_types=tuple(
            "CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths
        ),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in config.depths[::-1]
        ),
        mid_block_type="UNetMidBlock2DCrossAttn" if config.mid_depth else "UNetMidBlock2D",
        transformer_layers_per_block=tuple(
            depth or config.mid_depth or 1 for depth in config.depths
        ),
        attention_head_dim=config.heads,
        layers_per_block=config.layers_per_level,
        cross_attention_dim=config.context_width,
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.norm_groups,
        norm_eps=config.eps,
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.frequency_shift,
        upcast_attention=config.upcast_attention,
        time_cond_proj_dim=config.guidance_width or None,
    )
    if config.pooled_width:
        options |= dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=config.size_width,
            projection_class_embeddings_input_dim=config.pooled_width
            + config.size_ids * config.size_width,
        )
    return options


def unet(config: UNetConfig) -> Any:
    """Return a random UNet2DConditionModel."""
    return shake_(UNet2DConditionModel(**unet_options(config)))


def vae(config: VAEConfig) -> Any:
    """Return a random AutoencoderKL."""
    levels = len(config.widths)
    return shake_(
        AutoencoderKL(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            latent_channels=config.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.widths,
            layers_per_block=config.layers_per_level,
            norm_num_groups=config.norm_groups,
            mid_block_add_attention=config.mid_attention,
            use_quant_conv=config.quant_conv,
            use_post_quant_conv=config.post_quant_conv,
        )
    )


def clip(config: CLIPConfig) -> Any:
    """Return a random CLIPTextModel, or the one with a projection."""
    options = CLIPTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.max_tokens,
        hidden_act=config.activation,
        layer_norm_eps=config.eps,
        eos_token_id=config.eos_token_id,
        bos_token_id=0,
        pad_token_id=1,
        projection_dim=config.projection or 512,
    )
    return shake_((CLIPTextModelWithProjection if config.projection else CLIPTextModel)(options))


def clip_weights(oracle: Any) -> dict[str, Tensor]:
    """Return transformers' weights under the names that CLIPTextModel gives them."""
    return {k.removeprefix("text_model."): v for k, v in oracle.state_dict().items()}
