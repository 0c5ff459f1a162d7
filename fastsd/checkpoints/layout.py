"""The diffusers folder layout: which components a folder has, which of their files count.

Reads JSON and file names only. Nothing in a folder is ever executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastsd.checkpoints.configs import read_clip, read_unet, read_vae
from fastsd.checkpoints.schedulers import SCHEDULERS, read_schedule
from fastsd.checkpoints.weights import CONVERT
from fastsd.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from fastsd.errors import CheckpointError
from fastsd.files import explained_values, read_json

BUILTIN = Path(__file__).resolve().parent.parent / "builtin"
INDEX = "model_index.json"
# In it, our own marks of how to draw where nothing else is asked -> the value of ScheduleConfig.
# diffusers passes over names with an underscore.
MARKS = {"_guidance_scale": "guidance", "_num_inference_steps": "steps", "_timesteps": "timesteps"}


@dataclass(frozen=True)
class PipelineKind:
    """sdxl: two text encoders. lenient: old schedules are put right, as that class does."""

    sdxl: bool = False
    lenient: bool = False


PIPELINES = {
    "StableDiffusionPipeline": PipelineKind(lenient=True),
    "StableDiffusionImg2ImgPipeline": PipelineKind(lenient=True),
    "StableDiffusionInpaintPipeline": PipelineKind(lenient=True),
    "LatentConsistencyModelPipeline": PipelineKind(),
    "StableDiffusionXLPipeline": PipelineKind(sdxl=True),
    "StableDiffusionXLImg2ImgPipeline": PipelineKind(sdxl=True),
    "StableDiffusionXLInpaintPipeline": PipelineKind(sdxl=True),
}

# Every component that a folder may name -> its classes that are loaded; None: passed over.
_TEXT = ("CLIPTextModel", "CLIPTextModelWithProjection")
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
COMPONENTS: dict[str, tuple[str, ...] | None] = {
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
    "tokenizer": _TOKENIZERS,
    "tokenizer_2": _TOKENIZERS,
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "scheduler": tuple(SCHEDULERS),
    "safety_checker": None,
    "feature_extractor": None,
    "image_encoder": None,
}
PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")
STEMS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class Layout:
    """What a folder's JSON says: the model, its parts, its tokenizers' folders, what is unused."""

    config: ModelConfig
    parts: tuple[str, ...]
    tokenizers: tuple[str, ...]
    passed_over: tuple[str, ...]


def read_layout(folder: Path) -> Layout:
    """Read and check every JSON file of a diffusers folder. Raises CheckpointError."""
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_index(folder))
    index = read_json(folder / INDEX)
    with explained_values(folder / INDEX):
        kind = _pipeline_kind(index)
        classes = _classes(index)
        refines = kind.sdxl and "text_encoder" not in classes
        encoders = ["text_encoder_2" if refines else "text_encoder"]
        if kind.sdxl and not refines:
            encoders.append("text_encoder_2")
        tokenizers = tuple(name.replace("text_encoder", "tokenizer") for name in encoders)
        for name in (*encoders, *tokenizers, "unet", "vae", "scheduler"):
            if name not in classes:
                raise CheckpointError(f"it has no {name}, which a {index['_class_name']} needs")
    texts = [_read_text(folder / name / "config.json", classes[name]) for name in encoders]
    with explained_values(path := folder / "unet" / "config.json"):
        unet = read_unet(_config(path), pooled_width=texts[-1].projection)
    with explained_values(path := folder / "vae" / "config.json"):
        vae = read_vae(_config(path), tiny=classes["vae"] == "AutoencoderTiny")
        if not kind.sdxl:  # whose pipeline alone heeds it; the class's default is True
            vae = replace(vae, force_upcast=False)
    with explained_values(path := folder / "scheduler" / "scheduler_config.json"):
        schedule = read_schedule(classes["scheduler"], _config(path), lenient=kind.lenient)
    with explained_values(folder):
        check_channels(unet, vae)
        config = ModelConfig(
            family="sdxl-refiner" if refines else _family(kind, texts[0]),
            text_encoders=tuple(texts),
            unet=unet,
            vae=vae,
            schedule=schedule,
            text_layer=-2 if kind.sdxl else -1,
            zero_empty_negative=kind.sdxl and index.get("force_zeros_for_empty_prompt", True),
        )
    return Layout(
        _as_marked(_few_steps(config), index, folder / INDEX),
        parts=(*encoders, "unet", "vae"),
        tokenizers=tokenizers,
        passed_over=tuple(name for name in classes if COMPONENTS[name] is None),
    )


def _few_steps(config: ModelConfig) -> ModelConfig:
    """Recognise a distilled model by its schedule, and give it the steps and guidance it is for.

    LCM has its own scheduler; one whose UNet is told the guidance weight is told 8.5 by default.
    Turbo is trained at 512 pixels, predicts noise and spaces its steps from the trailing end.
    """
    schedule = config.schedule
    if schedule.sampler == "lcm":
        guidance = 8.5 if config.unet.guidance_width else 1.0
        return replace(config, schedule=replace(schedule, steps=4, guidance=guidance))
    small = config.unet.sample_size == 64 and config.family in ("sd2", "sdxl")
    trailing = schedule.spacing == "trailing" and not schedule.zero_terminal_snr
    eps = schedule.prediction == "eps"
    if small and trailing and eps and schedule.sampler in ("euler", "euler_a"):
        return replace(config, schedule=replace(schedule, steps=1, guidance=0.0))
    return config


def _as_marked(config: ModelConfig, index: dict[str, Any], path: Path) -> ModelConfig:
    """Take over what the folder's makers recorded of how to draw with it."""

    def number(mark: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1000:
            raise CheckpointError(f"{path}: {mark} must be a number from 0 to 1000, not {value!r}")
        return value

    marked: dict[str, Any] = {}
    for mark, name in MARKS.items():
        value = index.get(mark)
        if value is None:
            continue
        if name == "timesteps":
            values = value if isinstance(value, list) and value else [value]
            marked[name] = tuple(float(number(mark, each)) for each in values)
        elif name == "guidance":
            marked[name] = float(number(mark, value))
        elif isinstance(value, int) and number(mark, value) >= 1:
            marked[name] = value
        else:
            raise CheckpointError(f"{path}: {mark} must be a whole number, not {value!r}")
    return replace(config, schedule=replace(config.schedule, **marked)) if marked else config


def check_channels(unet: UNetConfig, vae: VAEConfig) -> None:
    """Refuse a UNet that takes neither latents nor latents, mask and masked picture."""
    latents, given = vae.latent_channels, unet.in_channels
    if given == 2 * latents:
        raise CheckpointError(
            f"its UNet takes {given} channels, twice its VAE's: InstructPix2Pix, which edits a "
            "picture by instruction, is not supported"
        )
    if given not in (latents, 2 * latents + 1):
        raise CheckpointError(
            f"its UNet takes {given} channels and its VAE gives {latents}: neither a model that "
            f"draws ({latents}) nor one that inpaints ({2 * latents + 1})"
        )


def read_vae_folder(folder: Path, variant: str | None) -> tuple[VAEConfig, tuple[Path, ...]]:
    """Read a folder that holds a VAE alone, or a model's folder vae: its config and its weights."""
    if not (folder / "config.json").is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"
    path = folder / "config.json"
    with explained_values(path):
        config = read_json(path)
        kind = config.get("_class_name")
        if kind not in (COMPONENTS["vae"] or ()):
            raise CheckpointError(f"its class is {kind!r}, not {COMPONENTS['vae']}")
        vae = read_vae(config, tiny=kind == "AutoencoderTiny")
    infix = f".{variant}" if variant else ""
    file = folder / f"{STEMS['vae']}{infix}.safetensors"
    return vae, (file if file.is_file() else folder / f"{STEMS['vae']}.safetensors",)


def weight_files(
    folder: Path,
    part: str,
    variant: str | None,
    *,
    exact: bool = False,
    exists: Callable[[Path], bool] = Path.is_file,
) -> tuple[Path, ...]:
    """Return where a part's weights should be: one file, or the shards that its index lists.

    variant: "fp16" picks the files that carry it in their names, of a part that has such; exact: of
    every part. exists: whether there is a file. Raises CheckpointError for an index that makes no
    sense.
    """
    stem, where = STEMS[part], folder / part
    choices = [
        (where / f"{stem}.safetensors.index{infix}.json", where / f"{stem}{infix}.safetensors")
        for infix in ([f".{variant}"] if variant else []) + ([] if exact and variant else [""])
    ]
    index, file = next((pair for pair in choices if any(map(exists, pair))), choices[0])
    if not exists(index):
        return (file,)
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index} has no weight_map")
    return tuple(_shard(index, name) for name in sorted(set(map(str, shards.values()))))


def check_present(files: tuple[Path, ...]) -> None:
    """Raise CheckpointError, naming what there is, if a weights file is missing."""
    for file in files:
        if not file.is_file():
            raise CheckpointError(_no_weights(file))


def _pipeline_kind(index: dict[str, Any]) -> PipelineKind:
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(f"_class_name {name!r} names code of the checkpoint's own; not run")
    if name not in PIPELINES:
        raise CheckpointError(f"pipeline {name!r} is not supported, only {', '.join(PIPELINES)}")
    return PIPELINES[name]


def _classes(index: dict[str, Any]) -> dict[str, str]:
    """Return component -> class, of those present; refuse what the allow-list lacks."""
    classes = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or name.startswith("_"):
            continue  # a setting of the pipeline, not a component
        if len(entry) != 2:
            raise CheckpointError(f"component {name} = {entry!r} must be a library and a class")
        library, kind = entry
        if kind is None:
            continue
        if name not in COMPONENTS:
            raise CheckpointError(
                f"component {name!r} ({kind}) is not supported, only {', '.join(COMPONENTS)}"
            )
        allowed = COMPONENTS[name]
        if allowed is not None and (
            library not in ("diffusers", "transformers") or kind not in allowed
        ):
            raise CheckpointError(
                f"component {name} is a {kind} of {library}: not supported, only "
                f"{', '.join(allowed)}; code that comes with a checkpoint is never run"
            )
        classes[name] = str(kind)
    return classes


def _config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    allowed = COMPONENTS[path.parent.name]
    kind = config.get("_class_name")
    if kind is not None and kind not in (allowed or ()):
        raise CheckpointError(
            f"its class {kind!r} is not supported, only {', '.join(allowed or ())}"
        )
    if "auto_map" in config:
        raise CheckpointError("it asks to run code of its own (auto_map); it is never run")
    if config.get("quantization_config"):
        raise CheckpointError("its weights are quantised: not supported; use the plain model")
    return config


def _read_text(path: Path, kind: str) -> CLIPConfig:
    with explained_values(path):
        return read_clip(_config(path), projected=kind == "CLIPTextModelWithProjection")


def _family(kind: PipelineKind, text: CLIPConfig) -> str:
    """SD2's text encoder is OpenCLIP's, whose activation is the exact GELU."""
    if kind.sdxl:
        return "sdxl"
    return "sd2" if text.activation == "gelu" else "sd1"


def _shard(index: Path, name: str) -> Path:
    """Return the shard beside its index; a name that leads elsewhere is refused."""
    if not re.fullmatch(r"[\w.-]+\.safetensors", name):
        raise CheckpointError(f"{index} names {name!r}, which is not a safetensors file beside it")
    return index.parent / name


def _no_index(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    message = f"{folder} has no {INDEX}: it is not a model in the diffusers layout"
    single = [name for name in names if name.endswith((".safetensors", *_PICKLES))]
    if single:
        message += f"; if {single[0]} holds a whole model, give that file"
    return message


def _no_weights(file: Path) -> str:
    where = file.parent
    names = sorted(path.name for path in where.iterdir()) if where.is_dir() else []
    present = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(_PICKLES)]
    message = f"{file} is missing"
    if present:
        infixes = {name.split(".")[1].split("-")[0] for name in present} - {"safetensors"}
        known = [None, *sorted(infixes)] if any(n.count(".") == 1 for n in present) else infixes
        options = ", ".join(f"variant={name!r}" for name in known)
        return f"{message}; there are {', '.join(present)}; ask for {options}"
    if pickles:
        return (
            f"{message}; there are only pickles ({', '.join(pickles)}), and loading one could run "
            f"any code; {CONVERT}"
        )
    return f"{message}; the folder is not complete"
