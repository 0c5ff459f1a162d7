"""Draw every task with one model and lay the pictures on a contact sheet, to be looked at.

python -m fastsd.benchmarks.tasks_sheet --out out

A row a task: image to image at rising strength, variations, inpainting, outpainting, weights. The
pictures outside a mask are checked to be the given ones, bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from fastsd import Pipeline
from fastsd.images import contact_sheet, save_png

COLUMNS = 5
STRENGTHS = (0.3, 0.5, 0.7, 0.9)
WEIGHTS = (0.4, 0.8, 1.0, 1.2, 1.6)

Captioned = tuple[str, Image.Image]


def main() -> None:
    """Draw, check, save, and print where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="builtin", help="builtin, a folder or a hub id")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the sheet")
    parser.add_argument("--prompt", default="a red apple", help="what the first picture shows")
    parser.add_argument("--other", default="a green apple", help="what it is changed to")
    parser.add_argument("--weighted", default="a (red:{}) apple", help="{} stands for the weight")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    pipe = Pipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    shared: dict[str, Any] = dict(num_inference_steps=arguments.steps, seed=arguments.seed)
    source = pipe(arguments.prompt, **shared).images[0]
    rows = [
        *_strengths(pipe, source, arguments.prompt, arguments.other, shared),
        *_variations(pipe, source, arguments.prompt, shared),
        *_inpainting(pipe, source, arguments.prompt, arguments.other, shared),
        *_outpainting(pipe, source, arguments.prompt, shared),
        *_weights(pipe, arguments.weighted, shared),
    ]
    captions, pictures = zip(*rows, strict=True)
    sheet = arguments.out / "tasks-sheet.png"
    side = max(256, *source.size)  # enlarged by a whole factor, so that masks' edges can be judged
    save_png(contact_sheet(pictures, captions, columns=COLUMNS, side=side), sheet)
    print(sheet)


def _strengths(
    pipe: Pipeline, source: Image.Image, prompt: str, other: str, shared: dict[str, Any]
) -> Iterator[Captioned]:
    yield prompt, source
    for strength in STRENGTHS:
        drawn = pipe(other, image=source, strength=strength, **shared).images[0]
        yield f"{other}, strength {strength}", drawn


def _variations(
    pipe: Pipeline, source: Image.Image, prompt: str, shared: dict[str, Any]
) -> Iterator[Captioned]:
    """Image to image with the picture's own prompt, under several seeds."""
    yield prompt, source
    count = COLUMNS - 1
    several = {**shared, "seed": shared["seed"] + 1, "num_images_per_prompt": count}
    for i, drawn in enumerate(pipe(prompt, image=source, strength=0.6, **several).images):
        yield f"variation {i + 1}, strength 0.6", drawn


def _inpainting(
    pipe: Pipeline, source: Image.Image, prompt: str, other: str, shared: dict[str, Any]
) -> Iterator[Captioned]:
    """The right half drawn anew: with the same prompt, with another, with two feathers."""
    mask = Image.new("L", source.size)
    ImageDraw.Draw(mask).rectangle((source.width // 2, 0, *source.size), fill=255)
    feather = source.width // 32
    yield "mask: white is drawn", mask.convert("RGB")
    for text, pixels in ((prompt, 0), (prompt, feather), (other, 0), (other, feather)):
        drawn = pipe(text, image=source, mask_image=mask, mask_feather=pixels, **shared).images[0]
        _check_kept(source, drawn, (0, 0, source.width // 2 - pixels, source.height), (0, 0))
        yield f"right half: {text}, feather {pixels}", drawn


def _outpainting(
    pipe: Pipeline, source: Image.Image, prompt: str, shared: dict[str, Any]
) -> Iterator[Captioned]:
    """Parts of the picture, and what is drawn around them, to the size of the whole."""
    width, height = source.size
    feather = width // 32
    middle = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
    yield "the middle", source.crop(middle)
    for name, box in (
        ("the middle", middle),
        ("the left", (0, 0, width * 5 // 8, height)),
        ("the top", (0, 0, width, height * 5 // 8)),
    ):
        part = source.crop(box)
        sides = (box[0], box[1], width - box[2], height - box[3])
        drawn = pipe(prompt, image=part, outpaint=sides, mask_feather=feather, **shared).images[0]
        right, below = part.width - feather, part.height - feather
        _check_kept(part, drawn, (feather, feather, right, below), sides[:2])
        yield f"outpainted from {name}", drawn
    yield "what was there", source


def _weights(pipe: Pipeline, template: str, shared: dict[str, Any]) -> Iterator[Captioned]:
    for weight in WEIGHTS:
        prompt = template.format(weight)
        yield prompt, pipe(prompt, prompt_syntax="weighted", **shared).images[0]


def _check_kept(
    given: Image.Image,
    drawn: Image.Image,
    box: tuple[int, int, int, int],
    at: tuple[int, int],
) -> None:
    left, top, right, bottom = box
    moved = (left + at[0], top + at[1], right + at[0], bottom + at[1])
    if not np.array_equal(np.asarray(given.crop(box)), np.asarray(drawn.crop(moved))):
        raise SystemExit("error: pixels outside the mask were changed")


if __name__ == "__main__":
    main()
