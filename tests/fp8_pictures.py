"""What fp8 may cost the built-in model's pictures, whatever computes it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastsd import Pipeline
from fastsd.quality import Task, builtin_atlas, psnr, task_score, tasks


def judge_fp8(rounded: Pipeline, exact: Pipeline) -> None:
    """Draw 64 names with both: 28 dB at the median, 20 at worst, 2 points of the score at most."""
    atlas = builtin_atlas()
    english = tasks(atlas)["english"]
    judged = Task(english.names[:64], english.expected[:64])
    drawn: list[list[Any]] = [[], []]
    for pictures, pipe in zip(drawn, (rounded, exact), strict=True):
        pipe.set_progress_bar_config(disable=True)
        for seed in range(0, 64, 4):
            names = list(judged.names[seed : seed + 4])
            pictures += pipe(names, seed=seed, num_inference_steps=20, guidance_scale=7.5).images
    distances = [psnr(ours, theirs) for ours, theirs in zip(*drawn, strict=True)]
    found = f"median {np.median(distances):.2f} dB, worst {min(distances):.2f} dB"
    assert np.median(distances) >= 28 and min(distances) >= 20, found
    scores = [task_score(atlas, judged, pictures).top1 for pictures in drawn]
    assert abs(scores[0] - scores[1]) <= 0.02, scores
    print(f"fp8: {found}; {scores[0]:.1%} named right, exact {scores[1]:.1%}")
