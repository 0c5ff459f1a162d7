"""`fastsd export` and `fastsd tune`: make engines, and measure which is fastest here."""

import json
from pathlib import Path
from typing import Annotated

import typer

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
    variant: Variant = None,
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

    from fastsd.checkpoints import model_name, open_checkpoint
    from fastsd.export.build import export as run
    from fastsd.export.parts import Request

    checkpoint = open_checkpoint(
        model,
        prediction=prediction,
        preset=preset,
        vae=vae,
        tokenizer=tokenizer,
        variant=variant,
    )
    if lora:
        checkpoint = checkpoint.with_loras(weighted_files(lora))
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
    try:
        artifact = run(checkpoint, model_name(model), request, output, force=force, tell=say)
    except KeyboardInterrupt:
        say("parts that were finished are kept: the same command goes on from there")
        raise
    path = output or artifact.path
    if as_json:
        print(json.dumps({"path": str(path), **asdict(artifact.manifest)}, indent=2))
    else:
        print(path)


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
    variant: Variant = None,
    as_json: Json = False,
) -> None:
    """Measure which way of drawing a model is fastest here; --backend auto then takes it."""
    from dataclasses import asdict

    from fastsd.benchmarks.tune import tune as run
    from fastsd.checkpoints import model_name, open_checkpoint

    checkpoint = open_checkpoint(
        model,
        prediction=prediction,
        preset=preset,
        vae=vae,
        tokenizer=tokenizer,
        variant=variant,
    )
    side = checkpoint.config.default_size
    rows = run(
        checkpoint,
        model_name(model),
        floor=floor,
        size=_pixels(size) if size else (side, side),
        steps=steps,
        prompts=_read_prompts(prompts) if prompts else (),
        tell=say,
    )
    print(json.dumps([asdict(r) for r in rows], indent=2) if as_json else "\n".join(map(str, rows)))
