"""The quality beside a speed: a contender's pictures against the reference's, drawn from the same
seeds. Knows no process and no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastsd.errors import MissingDependency
from fastsd.quality import builtin_atlas, psnr, ssim, tasks

EQUAL_DB = 100.0  # stands for infinity, which JSON does not have
NEAREST_DB = 99.9  # of pictures that differ
SAME_DB, CLOSE_DB = 50.0, 30.0

Pictures = Mapping[int, NDArray[np.uint8]]  # draw -> (B, H, W, 3)


def verdict(worst_psnr_db: float) -> str:
    """Put a number into a word: the same picture, a close one, or a different one."""
    if worst_psnr_db >= SAME_DB:
        return "same"
    return "close" if worst_psnr_db >= CLOSE_DB else "different"


def judge(
    pictures: Pictures,
    reference: Pictures,
    latents: NDArray[np.float32],
    reference_latents: NDArray[np.float32],
) -> dict[str, Any]:
    """Compare what two contenders drew from the same seeds.

    Gives the median and worst PSNR (dB, 100 for equal pictures), the worst of each draw, the median
    and worst SSIM (None without scikit-image), and of the latents the largest error and the
    error's share of their norm.
    """
    drawn = {
        draw: list(zip(pictures[draw], reference[draw], strict=True))
        for draw in pictures
        if draw in reference
    }
    draws = {draw: [_distance(a, b) for a, b in pairs] for draw, pairs in drawn.items()}
    pairs = [pair for each in drawn.values() for pair in each]
    distances = [distance for each in draws.values() for distance in each]
    error = latents.astype(np.float64) - reference_latents
    return {
        "pictures": len(pairs),
        "psnr_db": {
            "median": float(np.median(distances)),
            "worst": min(distances),
            "draws": {str(draw): min(each) for draw, each in draws.items()},  # as JSON has it
        },
        "ssim": _ssim(pairs),
        "latents": {
            "largest_error": float(np.abs(error).max()),
            "relative_error": float(np.linalg.norm(error) / np.linalg.norm(reference_latents)),
        },
        "verdict": verdict(min(distances)),
    }


def _distance(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return EQUAL_DB if np.array_equal(a, b) else min(NEAREST_DB, psnr(a, b))


def _ssim(pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> dict[str, float] | None:
    try:
        with ThreadPoolExecutor() as pool:  # half a second each of a picture of 1024 pixels
            values = list(pool.map(lambda pair: ssim(*pair), pairs))
    except MissingDependency:
        return None
    return {"median": float(np.median(values)), "worst": min(values)}


def builtin_prompts() -> tuple[str, ...]:
    """The names that the built-in model's task score draws, in their order."""
    return tasks(builtin_atlas())["english"].names


def score(pictures: Pictures) -> dict[str, Any]:
    """Score the built-in model's pictures of the first names of its task, with how many there are.

    top1, top5: the shares whose nearest, or five nearest, emoji hold the one named.
    """
    atlas = builtin_atlas()
    expected = tasks(atlas)["english"].expected
    batch = len(next(iter(pictures.values())))
    numbered = [
        (Image.fromarray(picture), expected[(draw * batch + i) % len(expected)])
        for draw, drawn in pictures.items()
        for i, picture in enumerate(drawn)
    ]
    ranks = np.array(atlas.ranks([p for p, _ in numbered], [index for _, index in numbered]))
    return {
        "top1": float((ranks == 0).mean()),
        "top5": float((ranks < 5).mean()),
        "pictures": len(ranks),
        "standard_error": math.sqrt(float((ranks == 0).mean() * (ranks > 0).mean()) / len(ranks)),
    }
