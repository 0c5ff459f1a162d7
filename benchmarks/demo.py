"""`make demo`: four pictures by the built-in model, timed and compared with diffusers in the same
run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from fastsd import Pipeline
from fastsd.benchmarks.baselines import diffusers_pipeline
from fastsd.images import contact_sheet, save_png
from fastsd.quality import psnr

# prompt -> its caption; the last is a pair of words that training left out
PROMPTS = {
    "a rainbow": "a rainbow",
    "a red heart": "a red heart",
    "红苹果": "红苹果 (a red apple)",
    "woman firefighter: dark skin tone": "woman firefighter: dark",
}
STEPS = 20


def main() -> None:
    """Draw, compare, save, and print a small table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin", help="builtin or a diffusers folder")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    arguments = parser.parse_args()

    ours = Pipeline.from_pretrained(arguments.model)
    ours.set_progress_bar_config(disable=True)
    theirs = diffusers_pipeline(ours.checkpoint.path).to(ours.device)

    guidance = ours.config.schedule.guidance or 7.5

    def draw_ours(prompt: str, seed: int) -> Any:
        return ours(prompt, num_inference_steps=STEPS, guidance_scale=guidance, seed=seed)

    def draw_theirs(prompt: str, seed: int) -> Any:
        generator = torch.Generator("cpu").manual_seed(seed)
        return theirs(
            prompt, num_inference_steps=STEPS, guidance_scale=guidance, generator=generator
        )

    for draw in (draw_ours, draw_theirs):  # warm both up
        draw(next(iter(PROMPTS)), 0)

    arguments.out.mkdir(parents=True, exist_ok=True)
    pictures: list[Image.Image] = []
    seconds: dict[str, list[float]] = {"fastsd": [], "diffusers": []}
    distances = []
    print(f"{STEPS} steps, guidance {guidance}, fp32, on {ours.device}, one after the other")
    for seed, prompt in enumerate(PROMPTS):
        our_output, our_seconds = _timed(draw_ours, prompt, seed)
        their_output, their_seconds = _timed(draw_theirs, prompt, seed)
        picture, reference = our_output.images[0], their_output.images[0]
        seconds["fastsd"].append(our_seconds)
        seconds["diffusers"].append(their_seconds)
        distances.append(psnr(picture, reference))
        path = arguments.out / f"{seed}.png"
        save_png(picture, path, our_output.metadata[0])
        pictures += [picture, reference]
        print(
            f"  {path}  {prompt}: fastsd {our_seconds:.2f} s, diffusers {their_seconds:.2f} s, "
            f"PSNR {distances[-1]:.1f} dB"
        )
    sheet = arguments.out / "contact-sheet.png"
    captions = [f"{name}: {text}" for text in PROMPTS.values() for name in ("fastsd", "diffusers")]
    save_png(contact_sheet(pictures, captions, columns=4, side=256), sheet)
    ratio = median(seconds["diffusers"]) / median(seconds["fastsd"])
    print(
        f"median seconds a picture: fastsd {median(seconds['fastsd']):.2f}, "
        f"diffusers {median(seconds['diffusers']):.2f} ({ratio:.2f} x); "
        f"worst PSNR {min(distances):.1f} dB; contact sheet {sheet}"
    )


def _timed(draw: Callable[[str, int], Any], prompt: str, seed: int) -> tuple[Any, float]:
    start = time.perf_counter()
    output = draw(prompt, seed)
    return output, time.perf_counter() - start


if __name__ == "__main__":
    main()
