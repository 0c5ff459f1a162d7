"""The command line: `fastsd generate`, `export`, `cache`, `samplers`, `inspect`, `env`.

Results go to stdout (paths, tables, JSON), everything else to stderr. Exit codes: 0 done, 1 could
not, 2 wrong usage, 130 interrupted. Heavy imports stand inside the commands: `--help` is quick.
Annotations are evaluated where they stand: typer would compile each as text, twice.
"""

import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import fastsd
from fastsd.errors import ArtifactError, FastsdError, UsageError

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
    *("prediction", "preset", "vae", "tokenizer"),
)
# What it says besides, for people and other tools.
REMARKS = {"versions", "sampler_title", "schedule_type", "not_recorded"}

app = typer.Typer(
    help="Stable Diffusion as fast as the hardware allows.",
    epilog="Start with: fastsd generate 'a red apple' -o apple.png",
    rich_markup_mode=None,  # rich would double the time that --help takes
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
# What says how to read a model, in every command that reads one.
Prediction = Annotated[
    str | None, typer.Option(help="eps or v, for a file that does not say: SD 2.x.")
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="How a model distilled to few steps is sampled, where it does not say: "
        "lightning-4, hyper-8, sdxl-turbo, lcm, ..."
    ),
]
Vae = Annotated[
    str | None, typer.Option(help="Another VAE, or a tiny one (TAESD): a folder or a file.")
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:WEIGHT]",
        help="A LoRA to draw with, builtin-lcm for the built-in model's own; may be given again.",
    ),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Its folder, for a file whose vocabulary is not CLIP's.")
]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; a user's mistake is one line on stderr, never a traceback."""
    _listen()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a legacy code page must not break on a prompt
            stream.reconfigure(errors="backslashreplace")
    try:
        app(_checked(sys.argv[1:] if arguments is None else arguments), prog_name="fastsd")
    except UsageError as error:
        _fail(error, 2)
    except FastsdError as error:
        _fail(error, 1)
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


class _Line(logging.Formatter):
    """A line as it is, and a warning as such."""

    def format(self, record: logging.LogRecord) -> str:
        return ("warning: " if record.levelno >= logging.WARNING else "") + super().format(record)


def _listen() -> None:
    """Show warnings, whoever gives them, and what fastsd says of its choices, on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("fastsd").setLevel(logging.INFO)


def _checked(arguments: Sequence[str]) -> list[str]:
    """Refuse text that no file or tokenizer could hold."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the argument {argument!r} is not text: {argument[error.start]!r} is not a "
                "character; check the terminal's encoding"
            ) from None
    return list(arguments)


def _fail(error: object, code: int) -> NoReturn:
    _say(f"error: {error}")
    sys.exit(code)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fastsd {fastsd.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


# --- generate -------------------------------------------------------------------------------------

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
            help="A PNG file or a folder, made if missing; a file of that name is replaced. {seed} "
            "stands for the seed; without it several pictures become out-1.png, out-2.png, ...",
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
    for digest, (name, option) in DIGESTS.items():
        made = name == "mask_image" and "outpaint" in settings
        if digest in settings and name not in settings and not made:
            raise UsageError(f"{again} was drawn from another picture; give it with {option}")
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
                _say(f"note: {again} was drawn with another {what}")
        done.append({"path": str(path), **metadata})
        if not as_json:
            print(path, flush=True)
            _say(f"  seed {metadata['seed']}: {metadata['prompt']}")
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
    for i, (file, strength) in enumerate(_weighted_files(given)):
        pipe.load_lora_weights(file, adapter_name=f"lora_{i}")
        strengths[f"lora_{i}"] = strength
    if strengths:
        pipe.set_adapters(list(strengths), list(strengths.values()))


def _weighted_files(given: Sequence[str]) -> list[tuple[str, float]]:
    """Read FILE:WEIGHT, or FILE alone, each."""
    read = []
    for text in given:
        file, _, weight = text.rpartition(":")
        try:
            read.append((file, float(weight)) if file else (text, 1.0))
        except ValueError:  # a colon of the path's own
            read.append((text, 1.0))
    return read


# --- export --------------------------------------------------------------------------------------


@app.command(
    epilog="""Examples:

\b
  fastsd export builtin -o emoji-onnx
  fastsd export ./sd15 -o sd15-fp16 --precision fp16 --size 768x512
  fastsd export ./sdxl -o sdxl-any --dynamic --layout fast
  fastsd export ./sd15 -o styled --lora style.safetensors:0.8
  fastsd generate "a red apple" --model emoji-onnx -o apple.png

The folder appears whole or not at all. An interrupted export goes on where it stopped.
"""
)
def export(
    model: Annotated[str, typer.Argument(help="builtin, a folder, a hub id, or random:sd15.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="The folder to make. [default: one among your own engines, see fastsd cache]",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help="onnx, openvino, tensorrt, aoti (for this CPU) or aoti-cuda (for this GPU).",
        ),
    ] = "onnx",
    precision: Annotated[
        str,
        typer.Option(help="fp32, fp16, bf16, int8 or fp8; not every target has every one."),
    ] = "fp32",
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Pixels, multiples of 8. [default: the model's own]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Let size and batch vary when it runs.")
    ] = False,
    layout: Annotated[
        str | None,
        typer.Option(
            help="standard: loads in other tools too. fast: computes once a prompt and once a "
            "schedule what does not depend on the latents. [default: standard; aoti*: fast]",
            show_default=False,
        ),
    ] = None,
    floor: Annotated[
        float | None,
        typer.Option(metavar="PSNR", help="Refuse an engine whose worst picture is below, in dB."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to calibrate and measure with, one a line: more are nearer to the "
            "exact pictures, fewer take less time. [default: some of our own]",
        ),
    ] = None,
    prediction: Prediction = None,
    preset: Preset = None,
    vae: Vae = None,
    lora: Lora = None,
    tokenizer: Tokenizer = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="TensorRT: let other weights be put in later.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an artifact that stands there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn a model into an engine for another runtime; print the folder."""
    from dataclasses import asdict

    from fastsd.checkpoints import open_checkpoint
    from fastsd.export.build import export as run
    from fastsd.export.parts import Request

    checkpoint = open_checkpoint(
        model, prediction=prediction, preset=preset, vae=vae, tokenizer=tokenizer
    )
    if lora:
        checkpoint = checkpoint.with_loras(_weighted_files(lora))
    side = checkpoint.config.default_size
    request = Request(
        target=to,
        precision=precision,
        size=_pixels(size) if size else (side, side),
        batch=batch,
        dynamic=dynamic,
        layout=layout or ("fast" if to.startswith("aoti") else "standard"),
        floor=floor,
        prompts=_read_prompts(prompts) if prompts else (),
        refit=refit,
    )
    name = Path(model).name if Path(model).exists() else model
    artifact = run(checkpoint, name, request, output, force=force, tell=_say)
    if as_json:
        print(json.dumps({"path": str(artifact.path), **asdict(artifact.manifest)}, indent=2))
    else:
        print(artifact.path)


def _pixels(size: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT as (height, width)."""
    width, by, height = size.lower().partition("x")
    if not (by and width.isascii() and height.isascii() and width.isdigit() and height.isdigit()):
        raise UsageError(f"--size must be WIDTHxHEIGHT in pixels, such as 512x768, not {size!r}")
    return int(height), int(width)


def _read_prompts(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"--prompts {path} is not UTF-8 text; give one prompt a line") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UsageError(f"--prompts {path} holds no prompt; give one a line")
    return prompts


# --- tune ----------------------------------------------------------------------------------------


@app.command(
    epilog="""Examples:

\b
  fastsd tune builtin --floor 20
  fastsd generate "a red apple" --backend auto -o apple.png

It compiles engines for this CPU (once; minutes for the built-in model, an hour for SD1.5 on two
cores) and draws with each in turns. What it finds is kept for this machine and this torch.
"""
)
def tune(
    model: Annotated[str, typer.Argument(help="builtin, a folder, a hub id, or random:sd15.")],
    floor: Annotated[
        float | None,
        typer.Option(
            metavar="PSNR",
            help="Keep layers out of int8 until the worst picture is this near to exact, in dB.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Pixels, multiples of 8. [default: the model's own]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the picture that is timed.")] = 20,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts to calibrate and judge with, one a line."),
    ] = None,
    prediction: Prediction = None,
    preset: Preset = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    as_json: Json = False,
) -> None:
    """Measure which way of drawing a model is fastest here; --backend auto then takes it."""
    from dataclasses import asdict

    from fastsd.benchmarks.tune import tune as run
    from fastsd.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(
        model, prediction=prediction, preset=preset, vae=vae, tokenizer=tokenizer
    )
    side = checkpoint.config.default_size
    rows = run(
        checkpoint,
        Path(model).name if Path(model).exists() else model,
        floor=floor,
        size=_pixels(size) if size else (side, side),
        steps=steps,
        prompts=_read_prompts(prompts) if prompts else (),
        tell=_say,
    )
    print(json.dumps([asdict(r) for r in rows], indent=2) if as_json else "\n".join(map(str, rows)))


# --- cache ---------------------------------------------------------------------------------------

cache = typer.Typer(
    help="Look after your own engines: what `fastsd export` made without --output.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cache, name="cache")


@cache.command("ls")
def list_engines(as_json: Json = False) -> None:
    """List them: path, model, target, precision, size, megabytes, worst picture's PSNR."""
    rows = [_engine(path) for path in _kept()]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        _print_table([list(rows[0]), *([str(v) for v in row.values()] for row in rows)])
    else:
        _say("no engines are kept; `fastsd export MODEL` without --output makes one")


def _kept() -> list[Path]:
    from fastsd.artifact import kept_engines

    return kept_engines()


def _engine(path: Path) -> dict[str, Any]:
    from fastsd.artifact import read_manifest

    try:
        manifest = read_manifest(path)
    except ArtifactError as error:
        return {"path": str(path), "model": f"unusable: {error}"}
    height, width = manifest.size
    pictures = (manifest.receipt or {}).get("pictures") or {}
    return {
        "path": str(path),
        "model": manifest.model,
        "target": manifest.target,
        "precision": manifest.precision,
        "size": "any" if manifest.dynamic else f"{width}x{height}",
        "MB": round(sum(file.size_bytes for file in manifest.files.values()) / 1e6, 1),
        "PSNR_dB": pictures.get("psnr_db", {}).get("worst", "-"),
    }


@cache.command("verify")
def verify_engines(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Engines anywhere. [default: all your own]"),
    ] = None,
) -> None:
    """Check every file of every engine against its digest; exit code 1 if one is damaged."""
    from fastsd.artifact import Artifact, sweep_engines

    for swept in sweep_engines() if not paths else ():
        _say(f"{swept}: left by an export that was killed; removed")
    good = True
    for path in paths or _kept():
        try:
            Artifact.open(path, trust_native=True)  # only read: nothing in it is run
        except ArtifactError as error:
            good = False
            print(f"{path}: {error}")
        else:
            print(f"{path}: good")
    if not good:
        raise typer.Exit(1)


@cache.command("rm")
def remove_engines(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="As `fastsd cache ls` has them.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every one.")] = False,
) -> None:
    """Remove engines; print each one's path."""
    from fastsd.artifact import engines_folder, remove_engine

    if bool(paths) == everything:
        raise UsageError("say which engines to remove, as `fastsd cache ls` has them, or --all")
    for path in _kept() if everything else [engines_folder() / path for path in paths or ()]:
        remove_engine(path)
        print(path)


# --- bench ----------------------------------------------------------------------------------------

bench_app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")


@bench_app.callback(
    invoke_without_command=True,
    epilog="""Examples:

\b
  fastsd bench
  fastsd bench --contenders "fastsd/*" --contenders diffusers/fp32 --report run-1
  fastsd bench --model random:sd15 --size 512 --steps 2 --contenders "*"
  fastsd bench compare run-1 run-2

A contender is named as in the table; * matches any part of a name, and again=NAME enters one twice.
""",
)
def bench(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(help="builtin, a folder, a hub id, random:sd15, random:sd21, random:sdxl."),
    ] = "builtin",
    size: Annotated[
        int | None, typer.Option(help="Pixels a side. [default: the model's own]")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    guidance: Annotated[
        float | None,
        typer.Option(help="As for generate. [default: 7.5, SDXL 5, whatever the model's own is]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 1,
    sampler: Annotated[
        str | None, typer.Option(help="See `fastsd samplers`. [default: the model's own]")
    ] = None,
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            help="Who takes part; may be given often. [default: all that need not compile first]"
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draws of each, in turns; of more than 40, those of other makers draw 12. "
            "[default: what 40 s hold, 6 or more]",
        ),
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            help="SingleStream, ColdStart, Parts or Offline; may be given often. "
            "[default: the first three]"
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. [default: a GPU if there is one]")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="That each may use. [default: as torch would]")
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the fp32 pictures that others are held to, and take them from there when "
            "--contenders draw the scene again: speeds are then those over the first one's.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write tables, plots and pictures to a new folder."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print nothing but the results, one line of JSON.")
    ] = False,
) -> None:
    """Time fastsd and others drawing the same pictures in turns, and compare the pictures.

    The last line on stdout is one JSON object.
    """
    if context.invoked_subcommand:
        return
    from fastsd.benchmarks import report as reports
    from fastsd.benchmarks import run

    if report is not None and report.exists():
        raise UsageError(f"{report} exists already; choose another name or move it away")
    scene = run.scene_of(
        model,
        size=size,
        steps=steps,
        guidance=guidance,
        batch=batch,
        sampler=sampler,
        device=device,
        threads=threads,
    )
    results, first_pictures = run.bench(
        scene,
        contenders or (),
        repeats=repeats,
        scenarios=scenario or run.DEFAULT_SCENARIOS,
        environment=_environment(),
        say=_say,
        truth=truth,
    )
    with run.undisturbed():
        if report is not None:
            reports.write_report(report, results, first_pictures)
            _say(f"report: {report / 'report.md'}")
        if not as_json:
            print("\n".join([*reports.terminal(results), ""]))
        print(reports.to_json_line(results if as_json else reports.summary(results)))


@bench_app.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(help="results.json or the folder of a report.")],
    after: Annotated[Path, typer.Argument(help="The same of a later run.")],
) -> None:
    """Say what changed between two runs beyond the noise."""
    from fastsd.benchmarks import report as reports

    earlier, later = (reports.read_results(path) for path in (before, after))
    print("\n".join(reports.aligned(reports.compare(earlier, later))))
    for difference in reports.different_scenes(earlier, later):
        print(f"differs: {difference}")


@bench_app.command("ops")
def bench_ops(
    ops: Annotated[
        list[str] | None, typer.Argument(help="Which. [default: all]", show_default=False)
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. [default: a GPU if there is one]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the results as JSON, too.")
    ] = None,
) -> None:
    """Time each op's implementations in turns, against the reference and this machine's limits."""
    import torch

    from fastsd.benchmarks.ops import measure_ops, ops_table
    from fastsd.benchmarks.report import aligned
    from fastsd.files import write_json

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def keep(results: dict[str, Any]) -> None:
        if output:
            write_json(output, results)

    results = measure_ops(ops or (), precision=precision, device=device, say=_say, keep=keep)
    print("\n".join(aligned(ops_table(results))))


@bench_app.command(
    "gpu", context_settings={"ignore_unknown_options": True, "help_option_names": []}
)
def bench_gpu(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[OPTIONS]")] = None,
) -> None:
    """Run whatever still waits for a GPU, in stages that end and go on (see: gpu --help)."""
    from fastsd.benchmarks.gpu import main

    main(arguments or [])


@bench_app.command("readme")
def bench_readme(
    readme: Annotated[Path, typer.Argument(help="The file to update.")] = Path("README.md"),
    results: Annotated[Path, typer.Option(help="The folder of committed runs.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Write the rows of committed runs into the README, between its two marks."""
    from fastsd.benchmarks import report as reports

    changed = reports.update_readme(readme, results)
    print(f"{readme}: {'updated' if changed else 'up to date'}")


# --- convert --------------------------------------------------------------------------------------


@app.command(
    epilog="""Examples:

\b
  fastsd convert model.safetensors model/            # a folder that diffusers loads
  fastsd convert model/ model.safetensors --dtype fp16
  fastsd convert old.ckpt model.safetensors          # the pickle's tensors, and nothing else
  fastsd convert lora.pt lora.safetensors
  fastsd convert xl.safetensors xl-fast/ --lora light4.safetensors --preset lightning-4

A folder keeps a preset, and is drawn with as such unasked; LoRAs become part of the weights.
A pickle is read by torch's weights-only loader in a process of its own, with bounds on its memory,
time and files; one that asks for more than weights is refused.
"""
)
def convert(
    source: Annotated[str, typer.Argument(help="A file, a folder, a hub id, or a pickle.")],
    target: Annotated[
        Path, typer.Argument(help="A new folder, or a new file that ends in .safetensors.")
    ],
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16. [default: the source's own]")
    ] = None,
    prediction: Prediction = None,
    preset: Preset = None,
    vae: Vae = None,
    lora: Lora = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Write a model in another form: safetensors only, whole or not at all; print its path."""
    from fastsd.checkpoints import convert as run

    run(
        source,
        target,
        dtype=dtype,
        prediction=prediction,
        preset=preset,
        vae=vae,
        tokenizer=tokenizer,
        loras=_weighted_files(lora or ()),
    )
    print(target)


# --- samplers, inspect, env ----------------------------------------------------------------------


@app.command("samplers")
def list_samplers(as_json: Json = False) -> None:
    """List the samplers and their other names."""
    from fastsd.config import SIGMA_SPACINGS
    from fastsd.samplers import SAMPLERS

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "title": sampler.title,
            "order": sampler.order,
            "evaluations": sampler.evaluations,
            "stochastic": sampler.stochastic,
            "sigma_spacings": [*SIGMA_SPACINGS] if "sigma_spacing" in sampler.accepts else [],
            "aliases": [*sampler.aliases],
            "diffusers": sampler.scheduler,
        }
        for name, sampler in SAMPLERS.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = [["name", "title", "order", "calls a step", "draws noise", "diffusers", "other names"]]
    for row in rows:
        title = row["title"] + "*" * bool(row["sigma_spacings"])
        facts = [str(row["order"]), str(row["evaluations"]), "yes" if row["stochastic"] else "no"]
        table.append([row["name"], title, *facts, row["diffusers"], ", ".join(row["aliases"])])
    _print_table(table)
    print('* takes Karras or Exponential after its name, as in --sampler "DPM++ 2M Karras"')


@app.command("models")
def list_models(as_json: Json = False) -> None:
    """List which models, files, adapters and tasks are supported, and how each was verified."""
    from dataclasses import asdict

    from fastsd.supported import ROWS

    if as_json:
        print(json.dumps([asdict(row) for row in ROWS], indent=2))
        return
    rows = [[r.kind, r.name, r.note, r.held_to, " ".join(r.engines)] for r in ROWS]
    _print_table([["kind", "name", "how", "held to", "engines run on it"], *rows])
    print("each row is held by a test of the suite; --json names it")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="builtin, a folder, a hub id, or random:sd15.")],
    as_json: Json = False,
) -> None:
    """Say what a model holds: family, parts, parameter counts, sizes, dtypes, sampler.

    Of an exported engine: how it was made, what goes in and out, and its receipt.
    """
    from fastsd.artifact import is_artifact
    from fastsd.checkpoints import describe, open_checkpoint

    if is_artifact(model):
        _inspect_engine(Path(model), as_json)
        return
    facts = describe(open_checkpoint(model))
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    schedule = facts["schedule"]
    print(f"{facts['path']}: family {facts['family']}, {facts['default_size']} pixels a side,")
    print(f"sampler {facts['sampler']}, predicts {schedule['prediction']}")
    print()
    table = [["part", "parameters", "MB", "dtypes", "files"]]
    for name, part in facts["parts"].items():
        size = f"{part['size_bytes'] / 1e6:.1f}"
        dtypes, files = ", ".join(part["dtypes"]), ", ".join(part["files"])
        table.append([name, f"{part['parameters']:,}", size, dtypes, files])
    _print_table(table)
    if facts["passed_over"]:
        names = facts["passed_over"]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        print(f"passed over: {', '.join(names[:5])}{more}")


def _inspect_engine(path: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from fastsd.artifact import read_manifest

    facts = asdict(read_manifest(path))
    if as_json:
        print(json.dumps({"path": str(path), **facts}, indent=2))
        return
    parts = facts.pop("parts")
    files = facts.pop("files")
    print("\n".join(_lines({"path": path, **facts})))
    print()
    table = [["part", "MB", "takes", "gives"]]
    for name, part in parts.items():
        held = sum(files[file]["size_bytes"] for file in (part["file"], *part["weights"]))
        takes, gives = (
            ", ".join(f"{t['name']} {t['dtype']} {list(t['shape'])}" for t in part[side][:4])
            + ", ..." * (len(part[side]) > 4)
            for side in ("inputs", "outputs")
        )
        table.append([name, f"{held / 1e6:.1f}", takes, gives])
    _print_table(table)


@app.command()
def env(as_json: Json = False) -> None:
    """Describe this machine and which backends it can use: paste it into a bug report."""
    facts = _environment()
    print(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))


def _lines(data: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Write nested data as indented `name: value` lines."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {value}"


# Everything whose version can explain a difference between two machines.
PACKAGES = (
    *("torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "pillow", "typer"),
    *("triton", "xformers", "torchao", "diffusers", "transformers"),
    *("onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt"),
)


def _environment() -> dict[str, Any]:
    """Collect versions, hardware and what is usable. Holds no path, user or host name."""
    import platform
    from importlib import metadata

    import torch

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    return {
        "fastsd": fastsd.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {package: version(package) for package in PACKAGES},
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "memory_gib": _memory_gib(),
        },
        "devices": _devices(),
        "backends": _backends(),
    }


def _cpu_name() -> str:
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _devices() -> dict[str, str]:
    """Describe each device that a Pipeline can be given, or say why there is no GPU."""
    import torch

    devices = {"cpu": "usable"}
    if torch.backends.mps.is_available():
        devices["mps"] = "usable"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "torch sees no GPU; look at its driver" if built else "torch is built for the CPU"
        devices["cuda"] = f"not usable: {reason}"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"{gpu.major}.{gpu.minor}"
        devices[f"cuda:{index}"] = (
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {capability}"
        )
    return devices


def _backends() -> dict[str, str]:
    """Say of each backend that it is usable, or why not."""
    from importlib import import_module

    from fastsd.backends import BACKENDS

    def state(home: str) -> str:
        try:
            import_module(home.partition(":")[0])
        except ImportError as error:  # MissingDependency is one and names the extra to install
            return f"not usable: {error}"
        return "usable"

    return {name: state(home) for name, home in BACKENDS.items()}
