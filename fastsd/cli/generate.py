"""`fastsd generate`: draw pictures, or one again from what is recorded in it."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fastsd
from fastsd.cli.app import (
    Json,
    Lora,
    Prediction,
    Preset,
    Tokenizer,
    Vae,
    Variant,
    app,
    say,
    weighted_files,
)
from fastsd.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_NAME = "fastsd-{seed}.png"
DEFAULT_FEATHER = 8
# The digest of a picture that another was drawn from -> the setting and the option that give it.
DIGESTS = {"image_sha256": ("image", "--image"), "mask_sha256": ("mask_image", "--mask")}
# What a picture records of its drawing: the type it must have, and what a Pipeline calls it.
_NUMBER = (int, float)
RECORDED: dict[str, tuple[type | tuple[type, ...], str | None]] = {
    "prompt": (str, None),
    "seed": (int, None),
    "model": (str, None),
    "backend": (str, None),
    "precision": (str, None),
    "weights": (str, None),
    "low_memory": (bool, None),
    **{name: (str, None) for name in ("prediction", "preset", "vae", "tokenizer", "variant")},
    "steps": (int, "num_inference_steps"),
    "guidance_scale": (_NUMBER, "guidance_scale"),
    "eta": (_NUMBER, "eta"),
    "height": (int, "height"),
    "width": (int, "width"),
    "batch_invariant": (bool, "batch_invariant"),
    **{
        name: (str, name)
        for name in ("prompt_2", "negative_prompt", "negative_prompt_2", "sampler")
    },
    "lora": (list, None),
    **{name: (list, name) for name in ("timesteps", "sigmas", "original_size", "target_size")},
    "crops_coords_top_left": (list, "crops_coords_top_left"),
    **{name: (_NUMBER, name) for name in ("strength", "guidance_rescale", "denoising_end")},
    **{name: (int, name) for name in ("mask_feather", "clip_skip", "cache_interval")},
    **{name: (_NUMBER, name) for name in ("aesthetic_score", "negative_aesthetic_score")},
    "outpaint": (list, "outpaint"),
    "prompt_syntax": (str, "prompt_syntax"),
    # Not in the picture, but known again: the SHA-256 of what has to be given with --again.
    **{name: (str, None) for name in DIGESTS},
    "embeddings": (dict, None),
}
# What is given to from_pretrained.
LOADING = (
    *("backend", "floor", "precision", "weights", "low_memory", "device"),
    *("prediction", "preset", "vae", "tokenizer", "variant"),
)
# What it says besides, for people and other tools.
REMARKS = {"versions", "sampler_title", "schedule_type", "not_recorded", "interrupted_after"}

Settings = Mapping[str, Any]


@app.command(
    epilog="""Examples:

\b
  fastsd generate "a red apple" -o apple.png
  fastsd generate "a cat" "a dog" --count 4 --seed 7 -o out/
  fastsd generate "a castle" --model ./sd15 --steps 25 --sampler "DPM++ 2M Karras"
  fastsd generate --again apple.png -o same-apple.png
  fastsd generate --again apple.png --steps 50 -o finer-apple.png
  fastsd generate "a (green:1.3) apple" --image apple.png --strength 0.6
  fastsd generate "a worm" --image apple.png --mask mask.png -o worm.png
  fastsd generate "an orchard" --image apple.png --outpaint 64,0,64,0
  fastsd generate "an apple" --image apple.png --strength 0.4 --count 4 -o variations/

A picture alone is changed as a whole, and another seed gives another variation of it; with --mask
its white part is drawn anew; with --outpaint it is drawn on around its sides.

Each PNG holds its prompt and settings, in the line that other tools read and as JSON for --again.
"""
)
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help="What to draw.", show_default=False),
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="A PNG file, which is replaced, or a folder: one that is there or, to be made, a "
            "name with / at its end. {seed} stands for the seed; without it several pictures "
            "become out-1.png, out-2.png, ...",
        ),
    ] = DEFAULT_NAME,
    model: Annotated[
        str | None,
        typer.Option(
            help="builtin, a folder in the diffusers layout or of an exported engine, a single "
            ".safetensors file, a hub id, or random:sd15, random:sd21, random:sdxl: random "
            "weights, to time. [default: builtin]"
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep out.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Sampling steps. [default: 20, or what a distilled model is made for]"),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="How closely to follow the prompt; 1: not at all. "
            "[default: the model's own, else 7.5, SDXL 5]"
        ),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="See `fastsd samplers`. [default: the model's own]")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Picture i is drawn from seed + i, alone or in a batch. [default: random]"
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="In pixels, a multiple of 8. [default: --image's, the model's]"),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(help="In pixels, a multiple of 8. [default: --image's, the model's]"),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Start from this picture (PNG, JPEG or WEBP)."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of --image to change, from 0 to 1. [default: 0.8, SDXL 0.3; with a "
            "mask 1, SDXL 0.9999]"
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw where this is white; of the size of --image."),
    ] = None,
    feather: Annotated[
        int | None,
        typer.Option(
            help="Fade into --image over so many pixels around the mask; those farther off stay "
            f"as they are, to the bit. [default: {DEFAULT_FEATHER}]"
        ),
    ] = None,
    outpaint: Annotated[
        str | None,
        typer.Option(
            metavar="LEFT,TOP,RIGHT,BOTTOM", help="Draw on around --image: pixels on each side."
        ),
    ] = None,
    prompt_syntax: Annotated[
        str | None,
        typer.Option(
            help="weighted: (word:1.3), [word], BREAK, any length, \\( for a bracket. plain: to "
            "the letter, cut at 77 tokens. [default: weighted]"
        ),
    ] = None,
    embedding: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A textual-inversion embedding (.safetensors); the prompt calls it by the name "
            "in the file, or the file's own. May be given several times.",
        ),
    ] = None,
    clip_skip: Annotated[
        int | None, typer.Option(help="Layers of the text encoder to leave out. [default: 0]")
    ] = None,
    guidance_rescale: Annotated[
        float | None,
        typer.Option(
            help="From 0 to 1: tame the contrast that strong guidance makes. [default: 0]"
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures for each prompt.")] = 1,
    batch: Annotated[
        int, typer.Option(min=1, help="Pictures drawn at once: faster on a GPU, takes memory.")
    ] = 1,
    again: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Take what is not given here from a picture's own data."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="What runs the model, see `fastsd env`; auto: what `fastsd tune` found fastest. "
            "[default: eager, or the exported engine's]"
        ),
    ] = None,
    floor: Annotated[
        float | None,
        typer.Option(
            metavar="PSNR",
            help="With --backend auto: how near to exact the worst picture must be, in dB.",
        ),
    ] = None,
    cache_interval: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="After the first fifth of the steps, run the UNet's deeper layers at every so "
            "many only. 2: about 1.5 times as fast, a near picture. [default: 1, all]",
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 (exact), fp16 or bf16. [default: fp32]")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="int8: keep the UNet's weights so, half of fp16's memory, for a near picture and "
            "some of the speed; fp8: multiply in it, on GPUs since Ada, for a near picture; "
            "full: in the precision. [default: full]"
        ),
    ] = None,
    low_memory: Annotated[
        bool | None,
        typer.Option(
            "--low-memory/--no-low-memory",
            help="Decode in tiles (a near picture); on a GPU, text encoders, VAE and what LoRAs "
            "replace wait in the host's memory. [default: no]",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: a GPU if there is one]")
    ] = None,
    trust_native: Annotated[
        bool,
        typer.Option(
            "--trust-native", help="Run an engine's machine code although you did not export it."
        ),
    ] = False,
    prediction: Prediction = None,
    preset: Preset = None,
    vae: Vae = None,
    preview: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Write the picture so far there after every step."),
    ] = None,
    preview_vae: Annotated[
        Path | None,
        typer.Option(help="What decodes previews, best a tiny VAE. [default: the model's VAE]"),
    ] = None,
    lora: Lora = None,
    tokenizer: Tokenizer = None,
    variant: Variant = None,
    as_json: Json = False,
) -> None:
    """Draw pictures; print the path of each, or with --json all that was told to draw it."""
    from fastsd.images import make_folder, save_png
    from fastsd.samplers import resolve

    given = {
        "prompts": prompts,
        "model": model,
        "negative_prompt": negative_prompt,
        "steps": steps,
        "guidance_scale": guidance,
        "guidance_rescale": guidance_rescale,
        "image": image,
        "strength": strength,
        "mask_image": mask,
        "mask_feather": feather,
        "outpaint": None if outpaint is None else _borders(outpaint),
        "prompt_syntax": prompt_syntax,
        "embedding": embedding,
        "clip_skip": clip_skip,
        "sampler": sampler,
        "seed": seed,
        "width": width,
        "height": height,
        "cache_interval": cache_interval,
        "backend": backend,
        "floor": floor,
        "precision": precision,
        "weights": weights,
        "low_memory": low_memory,
        "device": device,
        "prediction": prediction,
        "tokenizer": tokenizer,
        "variant": variant,
        "preset": preset,
        "vae": vae,
        "lora": lora or None,
        "preview": preview,
        "preview_vae": preview_vae,
    }
    settings: dict[str, Any] = {"model": "builtin", "seed": int.from_bytes(os.urandom(4), "big")}
    if again:
        settings |= _recorded(again)
    else:
        settings["prompt_syntax"] = "weighted"
        settings["mask_feather"] = DEFAULT_FEATHER if mask or outpaint else None
    settings |= {name: value for name, value in given.items() if value is not None}
    if settings.get("weights") == "full":  # what None is to Python
        del settings["weights"]
    if not settings.get("prompts"):
        raise UsageError('a prompt is missing; give one, e.g. fastsd generate "a red apple"')
    if settings.get("sampler") is not None:
        resolve(settings["sampler"])  # here too, so that a wrong name does not wait for torch
    if mask:
        settings.pop("outpaint", None)
    missing = [
        option
        for digest, (name, option) in DIGESTS.items()
        if digest in settings
        and name not in settings
        and not (name == "mask_image" and "outpaint" in settings)
    ]
    if missing:
        raise UsageError(
            f"{again} was drawn from another picture; give what it was with {' and '.join(missing)}"
        )
    recorded = [] if lora else weighted_files(settings.get("lora", ()))
    if any(file != "builtin-lcm" and not Path(file).exists() for file, _ in recorded):
        raise UsageError(
            f"{again} was drawn with the LoRAs {', '.join(settings['lora'])}; give each with "
            "--lora FILE:WEIGHT"
        )
    for name, option in (("vae", vae), ("tokenizer", tokenizer)):
        if name in settings and option is None:  # its name alone is no proof
            raise UsageError(
                f"{again} was drawn with the {name} {settings[name]!r}; say where that is with "
                f"--{name}"
            )
    if preview is not None and preview.suffix.lower() != ".png":
        raise UsageError(f"--preview {preview} must end in .png")
    if preview_vae is not None and preview is None:
        raise UsageError("--preview-vae decodes previews; say where they go with --preview")
    texts = [text for text in settings["prompts"] for _ in range(count)]
    seeds = [settings["seed"] + i for i in range(len(texts))]
    paths = _paths(output, seeds)
    make_folder(paths[0].parent)

    done: list[dict[str, Any]] = []
    pictures = _draw(texts, seeds, settings, batch, trust_native=trust_native)
    for path, (picture, metadata) in zip(paths, pictures, strict=True):
        save_png(picture, path, metadata)
        for name in (*DIGESTS, "embeddings"):
            if not done and settings.get(name) not in (None, metadata.get(name)):
                what = name.removesuffix("_sha256").removesuffix("s")
                say(f"note: {again} was drawn with another {what}")
        done.append({"path": str(path), **metadata})
        if not as_json:
            print(path, flush=True)
            say(f"  seed {metadata['seed']}: {metadata['prompt']}")
    if as_json:
        print(json.dumps(done, indent=2))


def _recorded(picture: Path) -> dict[str, Any]:
    """Read back the settings that `picture` was drawn with, trusting nothing in it."""
    from fastsd.images import read_metadata

    metadata = read_metadata(picture)
    if "versions" not in metadata:
        raise UsageError(
            f"{picture} was drawn by another program, with its own kind of noise; "
            f"it cannot be drawn again, but its settings can be given as options: {metadata}"
        )
    if metadata.get("not_recorded"):
        raise UsageError(
            f"{picture} was drawn by a Python program with {metadata['not_recorded']} of its own, "
            "which are not in the picture; run that program again"
        )
    settings = {k: v for k, v in metadata.items() if k not in REMARKS and v is not None}
    for name, value in settings.items():
        if name not in RECORDED:
            raise UsageError(
                f"{picture} was drawn with {name!r}, which fastsd {fastsd.__version__} does not "
                "know; draw it with a newer one"
            )
        kind = RECORDED[name][0]
        parts: Sequence[Any] = value if isinstance(value, list) else ()
        words: Mapping[str, Any] = value if isinstance(value, dict) else {}
        entry = str if name == "lora" else _NUMBER
        if (
            not isinstance(value, kind)
            or not all(isinstance(part, entry) for part in parts)
            or not all(isinstance(word, str) for word in words.values())
        ):
            raise UsageError(f"{picture} says that its {name} is {value!r}: its data was changed")
    if "prompt" in settings:
        settings["prompts"] = [settings.pop("prompt")]
    if "outpaint" in settings:  # from which the size follows
        settings = {k: v for k, v in settings.items() if k not in ("height", "width")}
        settings["outpaint"] = [int(side) for side in settings["outpaint"]]
    return settings


def _borders(text: str) -> list[int]:
    """Read LEFT,TOP,RIGHT,BOTTOM."""
    try:
        return [int(side) for side in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--outpaint {text!r} must be the pixels to add on the left, top, right and bottom, "
            "e.g. --outpaint 64,0,64,0"
        ) from None


def _paths(output: str, seeds: Sequence[int]) -> list[Path]:
    """Name a file for each seed."""
    pattern = Path(output)
    if output.endswith(("/", os.sep)) or pattern.is_dir():
        pattern /= DEFAULT_NAME
    if pattern.suffix.lower() != ".png":
        raise UsageError(
            f"--output {output!r} must be a folder (that exists or ends in /) or a name ending in "
            ".png: pictures are saved as PNG, which holds how they were drawn"
        )
    if other := re.search(r"\{(?!seed\})\w*\}", pattern.name):
        raise UsageError(f"--output {output!r}: {other[0]} stands for nothing; {{seed}} does")
    if "{seed}" in pattern.name:
        names = [pattern.name.replace("{seed}", str(seed)) for seed in seeds]
    elif len(seeds) == 1:
        names = [pattern.name]
    else:
        names = [f"{pattern.stem}-{i}{pattern.suffix}" for i in range(1, len(seeds) + 1)]
    return [pattern.with_name(name) for name in names]


def _draw(
    texts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    batch: int,
    *,
    trust_native: bool,
) -> Iterator[tuple["Image", dict[str, Any]]]:
    """Load the model and draw a picture for each text and seed, `batch` at once."""
    from fastsd import Pipeline
    from fastsd.images import read_image

    load = {name: settings[name] for name in LOADING if name in settings}
    call = {name: settings[k] for k, (_, name) in RECORDED.items() if name and k in settings}
    for name, _ in DIGESTS.values():  # before the model: a wrong name must not wait for it
        if settings.get(name) is not None:
            call[name] = read_image(settings[name])
    pipe = Pipeline.from_pretrained(
        settings["model"], sampler=settings.get("sampler"), trust_native=trust_native, **load
    )
    if pipe.config.schedule.steps is None:
        call.setdefault("num_inference_steps", 20)
    _watch(pipe, call, settings)
    _load_loras(pipe, settings.get("lora") or [])
    for path in settings.get("embedding", ()):
        pipe.load_textual_inversion(path)
    told = "\n".join([*texts, settings.get("negative_prompt", "")]).lower()
    for word in settings.get("embeddings", {}):
        if word not in pipe.embeddings and word.lower() in told:
            raise UsageError(f"the prompt has the learned word {word!r}; give its --embedding")
    for start in range(0, len(texts), batch):
        part = slice(start, start + batch)
        output = pipe(list(texts[part]), seed=list(seeds[part]), **call)
        yield from zip(output.images, output.metadata, strict=True)


def _watch(pipe: Any, call: dict[str, Any], settings: Settings) -> None:
    """Write the picture so far to the preview's file after every step."""
    from fastsd.images import save_png

    file, vae = settings.get("preview"), settings.get("preview_vae")
    if vae is not None:
        pipe.load_preview_vae(vae)
    if file is not None:
        call["preview"] = lambda step, pictures: save_png(pictures[0], file)


def _load_loras(pipe: Any, given: Sequence[str]) -> None:
    """Load FILE:WEIGHT after FILE:WEIGHT and turn all on together."""
    strengths = {}
    for i, (file, strength) in enumerate(weighted_files(given)):
        pipe.load_lora_weights(file, adapter_name=f"lora_{i}")
        strengths[f"lora_{i}"] = strength
    if strengths:
        pipe.set_adapters(list(strengths), list(strengths.values()))
