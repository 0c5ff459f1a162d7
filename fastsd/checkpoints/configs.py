"""The config.json of each part <-> our configs.

Foreign names stop here. `attention_head_dim` of a UNet is its number of heads: diffusers named it
so by mistake and kept the name.
"""

from __future__ import annotations

from typing import Any

from fastsd.checkpoints.options import Fixed, Options
from fastsd.config import CLIPConfig, UNetConfig, VAEConfig
from fastsd.errors import CheckpointError

_CLIP = Options(
    {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 49407,
    },
    {},
)

_UNET = Options(
    {
        "sample_size": None,
        "in_channels": 4,
        "out_channels": 4,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 8,
        "use_linear_projection": False,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
        "upcast_attention": False,
        "time_cond_proj_dim": None,
    },
    {
        "center_input_sample": Fixed(False),
        "only_cross_attention": Fixed(False),
        "downsample_padding": Fixed(1),
        "mid_block_scale_factor": Fixed(1),
        "act_fn": Fixed("silu", allowed=("silu", "swish")),
        "reverse_transformer_layers_per_block": Fixed(None),
        "encoder_hid_dim": Fixed(None),
        "encoder_hid_dim_type": Fixed(None),
        "num_attention_heads": Fixed(None),
        "dual_cross_attention": Fixed(False),
        "class_embed_type": Fixed(None),
        "num_class_embeds": Fixed(None),
        "resnet_time_scale_shift": Fixed("default"),
        "resnet_skip_time_act": Fixed(False),
        "resnet_out_scale_factor": Fixed(1.0),
        "time_embedding_type": Fixed("positional"),
        "time_embedding_dim": Fixed(None),
        "time_embedding_act_fn": Fixed(None),
        "timestep_post_act": Fixed(None),
        "conv_in_kernel": Fixed(3),
        "conv_out_kernel": Fixed(3),
        "attention_type": Fixed("default"),
        "class_embeddings_concat": Fixed(False),
        "mid_block_only_cross_attention": Fixed(None, allowed=(None, False)),
        "cross_attention_norm": Fixed(None),
    },
)
_MIDDLES = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False}  # name -> has attention

_VAE = Options(
    {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [64],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 32,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "force_upcast": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    {
        "down_block_types": Fixed("DownEncoderBlock2D"),
        "up_block_types": Fixed("UpDecoderBlock2D"),
        "act_fn": Fixed("silu", allowed=("silu", "swish")),
        "latents_mean": Fixed(None),
        "latents_std": Fixed(None),
    },
)


_SIDES = ("encoder", "decoder")
_TINY_VAE = Options(
    {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "encoder_block_out_channels": [64, 64, 64, 64],
        "decoder_block_out_channels": [64, 64, 64, 64],
        "num_encoder_blocks": [1, 3, 3, 3],
        "num_decoder_blocks": [3, 3, 3, 1],
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    },
    {
        "act_fn": Fixed("relu"),
        "upsample_fn": Fixed("nearest"),
        "upsampling_scaling_factor": Fixed(2),
    },
)


def read_clip(config: dict[str, Any], *, projected: bool) -> CLIPConfig:
    """Read a text encoder's config; projected: whether its class has a projection."""
    if config.get("model_type") == "clip" and "text_config" in config:
        config = config[
            "text_config"
        ]  # a whole CLIP's config; the text side is what the class reads
    option = _CLIP.read(config)
    return CLIPConfig(
        vocab_size=option["vocab_size"],
        width=option["hidden_size"],
        mlp_width=option["intermediate_size"],
        layers=option["num_hidden_layers"],
        heads=option["num_attention_heads"],
        max_tokens=option["max_position_embeddings"],
        activation=option["hidden_act"],
        eps=option["layer_norm_eps"],
        eos_token_id=option["eos_token_id"],
        projection=option["projection_dim"] if projected else None,
    )


def write_clip(config: CLIPConfig, *, bos: int, pad: int) -> dict[str, Any]:
    """Return the config.json of a text encoder; bos and pad: the tokenizer's ids."""
    projected = config.projection is not None
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": bos,
        "pad_token_id": pad,
    } | _CLIP.write(
        {
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "intermediate_size": config.mlp_width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "max_position_embeddings": config.max_tokens,
            "hidden_act": config.activation,
            "layer_norm_eps": config.eps,
            "eos_token_id": config.eos_token_id,
            "projection_dim": config.projection if projected else config.width,
        }
    )


def read_unet(config: dict[str, Any], *, pooled_width: int | None) -> UNetConfig:
    """Read a UNet's config; pooled_width: of the text that SDXL adds to the time, if any."""
    option = _UNET.read(config)
    widths = tuple(option["block_out_channels"])
    levels = len(widths)
    down = option["down_block_types"]
    if len(down) != levels:
        raise CheckpointError(f"{len(down)} down_block_types do not fit {levels} widths")
    attends = [_attends(name, "DownBlock2D") for name in down]
    if [_attends(name, "UpBlock2D") for name in option["up_block_types"]] != attends[::-1]:
        raise CheckpointError(
            f"up_block_types {option['up_block_types']} do not mirror down_block_types {down}"
        )
    middle = option["mid_block_type"]
    if middle not in _MIDDLES:
        raise CheckpointError(f"mid_block_type = {middle!r} is not supported, only {[*_MIDDLES]}")
    depths = _per_level(option, "transformer_layers_per_block", levels)
    return UNetConfig(
        in_channels=option["in_channels"],
        out_channels=option["out_channels"],
        sample_size=_sample_size(config),
        widths=widths,
        depths=tuple(d if a else 0 for d, a in zip(depths, attends, strict=True)),
        mid_depth=depths[-1] if _MIDDLES[middle] else 0,
        heads=_per_level(option, "attention_head_dim", levels),
        layers_per_level=_one(option, "layers_per_block", levels),
        context_width=_one(option, "cross_attention_dim", levels),
        linear_projection=option["use_linear_projection"],
        norm_groups=option["norm_num_groups"],
        eps=option["norm_eps"],
        flip_sin_to_cos=option["flip_sin_to_cos"],
        frequency_shift=float(option["freq_shift"]),
        upcast_attention=option["upcast_attention"] or False,
        guidance_width=option["time_cond_proj_dim"] or 0,
        **_pooled(option, pooled_width),
    )


def write_unet(config: UNetConfig) -> dict[str, Any]:
    """Return the config.json of a UNet."""
    attends = ["CrossAttn" if depth else "" for depth in config.depths]
    middle = "UNetMidBlock2DCrossAttn" if config.mid_depth else "UNetMidBlock2D"
    deepest = config.mid_depth or config.depths[-1]
    size_conditioned = bool(config.pooled_width)
    return {"_class_name": "UNet2DConditionModel"} | _UNET.write(
        {
            "sample_size": config.sample_size,
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "flip_sin_to_cos": config.flip_sin_to_cos,
            "freq_shift": config.frequency_shift,
            "down_block_types": [f"{prefix}DownBlock2D" for prefix in attends],
            "mid_block_type": middle,
            "up_block_types": [f"{prefix}UpBlock2D" for prefix in reversed(attends)],
            "block_out_channels": list(config.widths),
            "layers_per_block": config.layers_per_level,
            "norm_num_groups": config.norm_groups,
            "norm_eps": config.eps,
            "cross_attention_dim": config.context_width,
            # the middle takes the last level's, and levels without attention any
            "transformer_layers_per_block": [d or 1 for d in config.depths[:-1]] + [deepest or 1],
            "attention_head_dim": list(config.heads),
            "use_linear_projection": config.linear_projection,
            "addition_embed_type": "text_time" if size_conditioned else None,
            "addition_time_embed_dim": config.size_width or None,
            "projection_class_embeddings_input_dim": (
                config.pooled_width + config.size_ids * config.size_width
                if size_conditioned
                else None
            ),
            "upcast_attention": config.upcast_attention,
            "time_cond_proj_dim": config.guidance_width or None,
        }
    )


def read_vae(config: dict[str, Any], *, tiny: bool = False) -> VAEConfig:
    """Read an AutoencoderKL's config; tiny: an AutoencoderTiny's."""
    if tiny:
        return _read_tiny_vae(config)
    option = _VAE.read(config)
    return VAEConfig(
        in_channels=option["in_channels"],
        out_channels=option["out_channels"],
        latent_channels=option["latent_channels"],
        widths=tuple(option["block_out_channels"]),
        layers_per_level=option["layers_per_block"],
        norm_groups=option["norm_num_groups"],
        scale=option["scaling_factor"],
        shift=option["shift_factor"] or 0.0,
        sample_size=_side(option["sample_size"]),
        mid_attention=option["mid_block_add_attention"],
        quant_conv=option["use_quant_conv"],
        post_quant_conv=option["use_post_quant_conv"],
        force_upcast=option["force_upcast"],
    )


def _read_tiny_vae(config: dict[str, Any]) -> VAEConfig:
    option = _TINY_VAE.read(config)
    encoder, decoder = (tuple(option[f"{side}_block_out_channels"]) for side in _SIDES)
    blocks = tuple(option["num_encoder_blocks"])
    if len(blocks) != len(encoder) or {*encoder, *decoder} != {encoder[0]}:
        raise CheckpointError(f"widths {encoder}, {decoder} must all be one, one for each level")
    if decoder != encoder or tuple(option["num_decoder_blocks"]) != blocks[::-1]:
        raise CheckpointError("its decoder must mirror its encoder")
    return VAEConfig(
        in_channels=option["in_channels"],
        out_channels=option["out_channels"],
        latent_channels=option["latent_channels"],
        widths=encoder,
        blocks=blocks,
        norm_groups=1,
        scale=option["scaling_factor"],
        shift=option["shift_factor"] or 0.0,
        mid_attention=False,
        quant_conv=False,
        post_quant_conv=False,
    )


def write_vae(config: VAEConfig) -> dict[str, Any]:
    """Return the config.json of an AutoencoderKL, or of an AutoencoderTiny."""
    if config.blocks is not None:
        widths = list(config.widths)
        return {"_class_name": "AutoencoderTiny"} | _TINY_VAE.write(
            {
                "in_channels": config.in_channels,
                "out_channels": config.out_channels,
                "latent_channels": config.latent_channels,
                **{f"{side}_block_out_channels": widths for side in _SIDES},
                "num_encoder_blocks": list(config.blocks),
                "num_decoder_blocks": list(config.blocks[::-1]),
                "scaling_factor": config.scale,
                "shift_factor": config.shift,
            }
        )
    levels = len(config.widths)
    return (
        {"_class_name": "AutoencoderKL"}
        | _VAE.write(
            {
                "in_channels": config.in_channels,
                "out_channels": config.out_channels,
                "block_out_channels": list(config.widths),
                "layers_per_block": config.layers_per_level,
                "latent_channels": config.latent_channels,
                "norm_num_groups": config.norm_groups,
                "sample_size": config.sample_size,
                "scaling_factor": config.scale,
                "shift_factor": config.shift or None,
                "force_upcast": config.force_upcast,
                "use_quant_conv": config.quant_conv,
                "use_post_quant_conv": config.post_quant_conv,
                "mid_block_add_attention": config.mid_attention,
            }
        )
        | {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
    )


def _attends(name: str, plain: str) -> bool:
    """Return whether a block has cross-attention, by its class; refuse other classes."""
    if name not in (plain, f"CrossAttn{plain}"):
        raise CheckpointError(f"block {name!r} is not supported, only {plain} and CrossAttn{plain}")
    return name != plain


def _per_level(option: dict[str, Any], name: str, levels: int) -> tuple[int, ...]:
    value = option[name]
    values = tuple(value) if isinstance(value, list) else (value,) * levels
    if len(values) != levels or not all(type(entry) is int for entry in values):
        raise CheckpointError(f"{name} = {value!r} must be a number, or one for each level")
    return values


def _one(option: dict[str, Any], name: str, levels: int) -> int:
    first, *others = _per_level(option, name, levels)
    if any(other != first for other in others):
        raise CheckpointError(f"{name} = {option[name]!r} differs between levels: not supported")
    return first


def _pooled(option: dict[str, Any], pooled_width: int | None) -> dict[str, int]:
    kind = option["addition_embed_type"]
    if kind is None:
        return {}
    if kind != "text_time":
        raise CheckpointError(f"addition_embed_type = {kind!r} is not supported, only 'text_time'")
    size_width = option["addition_time_embed_dim"]
    inner = option["projection_class_embeddings_input_dim"]
    if pooled_width is None or not size_width or not inner:
        raise CheckpointError(
            "addition_embed_type = 'text_time' needs addition_time_embed_dim, "
            "projection_class_embeddings_input_dim and a text encoder with a projection"
        )
    size_ids, rest = divmod(inner - pooled_width, size_width)
    if rest or size_ids not in (5, 6):
        raise CheckpointError(
            f"projection_class_embeddings_input_dim = {inner} does not hold a pooled text of width "
            f"{pooled_width} and six sizes (a refiner: five) of {size_width}"
        )
    return {"pooled_width": pooled_width, "size_ids": size_ids, "size_width": size_width}


def _sample_size(config: dict[str, Any]) -> int:
    """Return the latent side. Before 0.9.0 diffusers wrote 32 for 64, and now reads it so."""
    side = _side(config.get("sample_size") or 64)
    version = str(config.get("_diffusers_version", "1")).split(".")
    return 64 if side < 64 and version[0] == "0" and int(version[1]) < 9 else side


def _side(size: Any) -> int:
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1 or not all(type(side) is int for side in sides):
        raise CheckpointError(f"sample_size = {size!r} must be one whole number")
    return int(sides.pop())
