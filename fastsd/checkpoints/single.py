"""One file that holds a whole model, in the original layout: what it is, and whose each key is.

Recognition is data: FAMILIES has a row a family, saying which text encoders its files hold and what
their tensors' shapes cannot tell; everything else is read off the shapes. Reads headers only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fastsd.checkpoints.keys import canonical, guess
from fastsd.checkpoints.layout import check_channels
from fastsd.checkpoints.ldm import (
    OPEN_CLIP_TENSORS,
    STACKED,
    NameMap,
    clip_map,
    open_clip_map,
    unet_map,
    vae_map,
)
from fastsd.checkpoints.weights import TensorInfo, Use, read_header, read_metadata
from fastsd.config import (
    SD15,
    SD21,
    SDXL,
    SDXL_REFINER,
    CLIPConfig,
    ModelConfig,
    UNetConfig,
    VAEConfig,
)
from fastsd.errors import CheckpointError
from fastsd.files import explained_values

log = logging.getLogger("fastsd")

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP_HEAD_WIDTH = 64  # of every CLIP text encoder that a Stable Diffusion has

Shapes = Mapping[str, tuple[int, ...]]
Uses = dict[str, tuple[Use, ...]]


@dataclass(frozen=True)
class TextKeys:
    """A text encoder of a file: the prefix of its keys, and whose layout it is."""

    prefix: str
    open_clip: bool = False


@dataclass(frozen=True)
class Family:
    """A row of the table. preset: what shapes do not tell; head_width: None where heads are 8."""

    title: str
    preset: ModelConfig
    texts: tuple[TextKeys, ...]
    head_width: int | None = 64


_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_FIRST, _SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_REFINER = "conditioner.embedders.0.model."
FAMILIES = (
    Family("Stable Diffusion 1.x", SD15, (TextKeys(_CLIP),), head_width=None),
    Family("Stable Diffusion 2.x", SD21, (TextKeys(_OPEN_CLIP, open_clip=True),)),
    Family("SDXL", SDXL, (TextKeys(_FIRST), TextKeys(_SECOND, open_clip=True))),
    Family("SDXL refiner", SDXL_REFINER, (TextKeys(_REFINER, open_clip=True),)),
)

# Keys of a whole file that no part uses: the training schedule, averaged copies, what says nothing.
PASSED_OVER = re.compile(
    r"model_ema\..*|(alphas|sqrt|log_one|posterior)_\w+|betas|logvar|lvlb_weights|scale_factor"
    r"|denoiser\.sigmas|first_stage_model\.loss\..*|(first_stage_model|vae)\.model_ema\..*"
    r"|.*\.position_ids|.*\.model\.(logit_scale|attn_mask)|v_pred|ztsnr|global_step"
    # a CLIP's that only pictures need, as some programs save it, and a training's
    r"|(cond_stage_model|conditioner\.embedders\.0)(\.transformer)?"
    r"\.(logit_scale|text_projection(\.weight)?)|embedding_manager\..*"
)
# Keys that name a model of a kind that the table lacks -> what it is.
FOREIGN = {
    "scaled_fp8": "a model whose weights are scaled into fp8: take the one in fp16",
    "model.diffusion_model.scaled_fp8": "a UNet scaled into fp8: take the one in fp16",
    "edm_mean": "Playground v2.5, whose noise schedule (EDM) is not supported",
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "FLUX",
    "control_model.time_embed.0.weight": "a ControlNet with its model",
    "model.diffusion_model.label_emb.weight": "the x4 upscaler, which is not supported",
}
_SHOWN = 5
_MOST = 256  # blocks of a kind that a name may number; SDXL has 10


@dataclass(frozen=True)
class Single:
    """A recognised file: the model, and what each part makes of which keys."""

    config: ModelConfig
    uses: Mapping[str, Uses]
    passed_over: tuple[str, ...]


def read_single(path: Path, *, prediction: str | None = None, without_vae: bool = False) -> Single:
    """Recognise a file by its header alone.

    prediction: "eps", "v" or "x0"; None reads the file's own mark (modelspec.prediction_type, the
    keys v_pred and ztsnr), and in want of one takes the family's usual one, logging it where the
    family has two. without_vae: the file need not hold one; its config is then the family's usual.
    Raises CheckpointError naming what is unknown, and the nearest family.
    """
    header = read_header(path)
    with explained_values(path):
        return _read(path, header, prediction, without_vae)


def _read(
    path: Path, header: Mapping[str, TensorInfo], prediction: str | None, without_vae: bool
) -> Single:
    family = _family(path, header, without_vae)
    mapped, unknown, unused = _sort_keys(family, header)
    if unknown:
        raise CheckpointError(
            f"{path} has {_listed(unknown)} that no part of a {family.title} knows, its nearest "
            f"family by the rest of its keys; it may be {guess(unknown)} or hold one"
        )
    shapes = {
        part: {use.name: use.shape(header[key].shape) for key, uses in own.items() for use in uses}
        for part, own in mapped.items()
    }
    try:
        config = _config(family, shapes)
        check_channels(config.unet, config.vae)
    except KeyError as error:
        raise CheckpointError(
            f"{path} is a {family.title} by its keys and lacks some: {error}"
        ) from None
    config = _predicting(path, config, header, prediction)
    return Single(config, mapped, tuple(unused))


def _family(path: Path, header: Mapping[str, TensorInfo], without_vae: bool) -> Family:
    for key, kind in FOREIGN.items():
        if key in header:
            raise CheckpointError(f"{path} is {kind}; fastsd reads {_titles()}")
    prefixes = {text.prefix for family in FAMILIES for text in family.texts}
    present = {prefix for prefix in prefixes if any(key.startswith(prefix) for key in header)}
    for family in FAMILIES:
        if {text.prefix for text in family.texts} == present:
            break
    else:
        raise CheckpointError(
            f"{path} is no whole model: it has {'no text encoder' if not present else present} "
            f"in the original layout, and by its keys it is {guess(header)}; fastsd reads one file "
            f"that holds all of {_titles()}"
        )
    for prefix, part, remedy in (
        (UNET, "UNet", "a file must hold the whole model"),
        (VAE, "VAE", "give its VAE, a folder or a file, with vae="),
    ):
        if not any(key.startswith(prefix) for key in header) and not (
            part == "VAE" and without_vae
        ):
            raise CheckpointError(
                f"{path} is a {family.title} without a {part} (no key begins {prefix}); {remedy}"
            )
    return family


def _titles() -> str:
    return ", ".join(family.title for family in FAMILIES)


def _sort_keys(
    family: Family, header: Mapping[str, TensorInfo]
) -> tuple[dict[str, Uses], list[str], list[str]]:
    """Say of every key which part uses it how, or that none does, or that it is unknown."""
    owners = [(UNET, "unet", unet_names(_below(header, UNET)))]
    owners.append((VAE, "vae", vae_names(_below(header, VAE))))
    skipped = []
    preset = family.preset
    for part, text, known in zip(
        preset.text_parts, family.texts, preset.text_encoders, strict=True
    ):
        layers = min(_count(_below(header, text.prefix), _LAYERS), known.layers)
        if known.projection is None:  # Stable Diffusion 2 leaves out what follows its layer 22
            skipped += [
                f"{text.prefix}transformer.resblocks.{layers}.",
                f"{text.prefix}text_projection",
            ]
        owners.append((text.prefix, part, (open_clip_map if text.open_clip else clip_map)(layers)))
    mapped: dict[str, Uses] = {part: {} for prefix, part, _ in owners if _below(header, prefix)}
    unknown, unused = [], []
    for key in header:
        prefix, part, names = next((o for o in owners if key.startswith(o[0])), ("", "", None))
        if PASSED_OVER.fullmatch(key) or key.startswith(tuple(skipped)):
            unused.append(key)
        elif names is not None and (uses := _uses(names, key[len(prefix) :])):
            mapped[part][key] = uses
        else:
            unknown.append(key)
    return mapped, unknown, unused


def _below(keys: Iterable[str], prefix: str) -> list[str]:
    return [key[len(prefix) :] for key in keys if key.startswith(prefix)]


def _uses(names: NameMap, key: str) -> tuple[Use, ...]:
    if key in OPEN_CLIP_TENSORS:
        return (Use(OPEN_CLIP_TENSORS[key], transposed=key == "text_projection"),)
    if key == "text_projection.weight":  # a linear layer's, as some programs save it
        return (Use(key),)
    if stacked := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", key):
        layer = names.ours(f"{stacked[1]}.")
        return tuple(
            Use(f"{layer}self_attn.{name}.{stacked[2]}", third=i)
            for i, name in enumerate(STACKED if layer else ())
        )
    name = names.ours(key)
    return (Use(name),) if name else ()


_LAYERS = re.compile(r"(?:(?:text_model\.)?encoder\.layers|transformer\.resblocks)\.(\d+)\.")


def _count(keys: Iterable[str], pattern: re.Pattern[str]) -> int:
    """One more than the largest number that `pattern` finds at the start of a key."""
    numbers = [int(found[1]) for key in keys if (found := pattern.match(key))]
    count = max(numbers, default=-1) + 1
    if count > _MOST:  # else a name alone would make us build as many
        raise CheckpointError(f"its keys number {count:,} blocks of a kind, more than any model's")
    return count


def unet_names(keys: Iterable[str]) -> NameMap:
    """Map the names of a UNet whose blocks `keys` (without prefix) show."""
    keys = set(keys)
    blocks = _count(keys, re.compile(r"input_blocks\.(\d+)\."))
    ends = [n for n in range(blocks) if f"input_blocks.{n}.0.op.weight" in keys]
    layers = (ends[0] if ends else blocks) - 1
    starts = [1, *(end + 1 for end in ends)]  # the block that begins each level
    return unet_map([f"input_blocks.{n}.1.norm.weight" in keys for n in starts], max(layers, 0))


def vae_names(keys: Iterable[str]) -> NameMap:
    """Map the names of a VAE whose levels `keys` (without prefix) show."""
    keys = list(keys)
    levels = _count(keys, re.compile(r"(?:encoder\.down|decoder\.up)\.(\d+)\."))
    layers = _count(keys, re.compile(r"encoder\.down\.0\.block\.(\d+)\."))
    if not layers:  # a decoder alone
        layers = _count(keys, re.compile(r"decoder\.up\.0\.block\.(\d+)\.")) - 1
    return vae_map(levels, max(layers, 0))


def read_vae_file(path: Path, base: VAEConfig) -> tuple[VAEConfig, Uses]:
    """Read a file that holds a VAE alone: the original layout, diffusers', or a tiny autoencoder.

    base: the model's own, for what shapes do not tell: the scale. Raises CheckpointError.
    """
    header = read_header(path)
    with explained_values(path):
        return _read_vae(path, header, base)


def _read_vae(
    path: Path, header: Mapping[str, TensorInfo], base: VAEConfig
) -> tuple[VAEConfig, Uses]:
    keys = {key: key.removeprefix(VAE).removeprefix("vae.") for key in header}
    original = vae_names(keys.values())
    uses: Uses = {}
    for key, name in keys.items():
        if PASSED_OVER.fullmatch(key) or name.startswith(("loss.", "model_ema.")):
            continue
        ours = original.ours(name)
        uses[key] = (Use(ours or canonical("vae", name)),)
    shapes = {use.name: header[key].shape for key, (use,) in uses.items()}
    try:
        if "decoder.layers.0.weight" in shapes:
            return tiny_vae_config(base, shapes), uses
        return vae_config(base, shapes), uses
    except KeyError as error:
        raise CheckpointError(
            f"{path} is no VAE, nor a tiny autoencoder with encoder and decoder: it has no {error}"
            f"; by its keys it is {guess(header)}"
        ) from None


# --- configs from shapes --------------------------------------------------------------------------


def _config(family: Family, shapes: Mapping[str, Shapes]) -> ModelConfig:
    preset = family.preset
    texts = tuple(
        clip_config(base, shapes[part])
        for base, part in zip(preset.text_encoders, preset.text_parts, strict=True)
    )
    unet = unet_config(
        preset.unet, shapes["unet"], head_width=family.head_width, pooled=texts[-1].projection
    )
    vae = vae_config(preset.vae, shapes["vae"]) if "vae" in shapes else preset.vae
    return replace(preset, text_encoders=texts, unet=unet, vae=vae)


def clip_config(base: CLIPConfig, shapes: Shapes) -> CLIPConfig:
    """Read a text encoder's sizes off its tensors' shapes; the rest is `base`'s."""
    vocab_size, width = shapes["embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight")
    return replace(
        base,
        vocab_size=vocab_size,
        width=width,
        max_tokens=shapes["embeddings.position_embedding.weight"][0],
        mlp_width=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        layers=_count(shapes, re.compile(r"encoder\.layers\.(\d+)\.")),
        heads=max(width // CLIP_HEAD_WIDTH, 1),
        eos_token_id=vocab_size - 1,
        projection=projection[0] if projection else None,
    )


def unet_config(
    base: UNetConfig, shapes: Shapes, *, head_width: int | None, pooled: int | None
) -> UNetConfig:
    """Read a UNet's sizes off its tensors' shapes; the rest is `base`'s.

    head_width: None where the number of heads is the base's. pooled: width of the pooled text.
    """
    levels = range(_count(shapes, re.compile(r"down_blocks\.(\d+)\.")))
    widths = tuple(shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels)
    blocks = r"attentions\.0\.transformer_blocks\.(\d+)\."
    depths = tuple(_count(shapes, re.compile(rf"down_blocks\.{i}\.{blocks}")) for i in levels)
    first = next((i for i in levels if depths[i]), None)
    if first is None:
        raise CheckpointError("its UNet attends nowhere")
    attention = f"down_blocks.{first}.attentions.0"
    heads = [
        base.heads[0] if head_width is None else max(width // head_width, 1) for width in widths
    ]
    config = replace(
        base,
        in_channels=shapes["conv_in.weight"][1],
        out_channels=shapes["conv_out.weight"][0],
        widths=widths,
        depths=depths,
        mid_depth=_count(shapes, re.compile(rf"mid_block\.{blocks}")),
        heads=tuple(heads),
        layers_per_level=_count(shapes, re.compile(r"down_blocks\.0\.resnets\.(\d+)\.")),
        context_width=shapes[f"{attention}.transformer_blocks.0.attn2.to_k.weight"][1],
        linear_projection=len(shapes[f"{attention}.proj_in.weight"]) == 2,
    )
    if base.pooled_width:
        inner = shapes["add_embedding.linear_1.weight"][1]
        size_width, rest = divmod(inner - (pooled or 0), base.size_ids)
        if not pooled or rest or size_width <= 0:
            raise CheckpointError(
                f"its UNet takes {inner} numbers beside the time: not a pooled text of {pooled} "
                f"and {base.size_ids} sizes"
            )
        config = replace(config, pooled_width=pooled, size_width=size_width)
    return config


def vae_config(base: VAEConfig, shapes: Shapes) -> VAEConfig:
    """Read a VAE's sizes off its tensors' shapes; the rest, its scale too, is `base`'s."""
    levels = range(_count(shapes, re.compile(r"encoder\.down_blocks\.(\d+)\.")))
    return replace(
        base,
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        widths=tuple(shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels),
        layers_per_level=_count(shapes, re.compile(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")),
        mid_attention="decoder.mid_block.attentions.0.to_q.weight" in shapes,
        quant_conv="quant_conv.weight" in shapes,
        post_quant_conv="post_quant_conv.weight" in shapes,
    )


def tiny_vae_config(base: VAEConfig, shapes: Shapes) -> VAEConfig:
    """Read a tiny autoencoder's sizes off its shapes; its latents are the UNet's own: scale 1."""
    width, in_channels = shapes["encoder.layers.0.weight"][:2]
    count = _count(shapes, re.compile(r"encoder\.layers\.(\d+)\."))
    blocks = [0]
    for i in range(1, count - 1):
        if f"encoder.layers.{i}.conv.0.weight" in shapes:
            blocks[-1] += 1
        else:
            blocks.append(0)
    last = _count(shapes, re.compile(r"decoder\.layers\.(\d+)\.")) - 1
    return replace(
        base,
        in_channels=in_channels,
        out_channels=shapes[f"decoder.layers.{last}.weight"][0],
        latent_channels=shapes["decoder.layers.0.weight"][1],
        widths=(width,) * len(blocks),
        blocks=tuple(blocks),
        norm_groups=1,
        scale=1.0,
        shift=0.0,
        mid_attention=False,
        quant_conv=False,
        post_quant_conv=False,
        force_upcast=False,
    )


# --- what the model predicts ----------------------------------------------------------------------

_SPEC_PREDICTIONS = {"epsilon": "eps", "v": "v"}  # of modelspec.prediction_type


def _predicting(
    path: Path,
    config: ModelConfig,
    header: Mapping[str, TensorInfo],
    prediction: str | None,
) -> ModelConfig:
    """Settle what the UNet predicts, and with it SD 2's picture size: 768 for v, 512 for eps."""
    marked = _SPEC_PREDICTIONS.get(read_metadata(path).get("modelspec.prediction_type", ""))
    if "v_pred" in header:
        marked = "v"
    two = config.family == "sd2"
    usual = "eps" if two and config.inpaints else config.schedule.prediction
    settled = prediction or marked or usual
    if two and not config.inpaints and not prediction and not marked:
        log.warning(
            "%s does not say what it predicts; taking %s, as Stable Diffusion 2.0-v and 2.1 do. "
            "If pictures are noise it is a base model: say prediction='eps' (--prediction eps)",
            path.name,
            settled,
        )
    schedule = replace(config.schedule, prediction=settled, zero_terminal_snr="ztsnr" in header)
    if "ztsnr" in header:
        schedule = replace(schedule, spacing="trailing")
    if two and settled == "eps":
        config = replace(config, unet=replace(config.unet, sample_size=64))
        config = replace(config, vae=replace(config.vae, sample_size=512))
    return replace(config, schedule=schedule)


def _listed(keys: list[str]) -> str:
    shown = ", ".join(keys[:_SHOWN])
    return f"{len(keys)} keys ({shown}{', …' if len(keys) > _SHOWN else ''})"
