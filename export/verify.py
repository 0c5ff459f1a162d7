"""The receipt of an engine: how far its parts and its pictures are from the exact path.

Runs the engine in its own backend beside eager fp32, on the same inputs, prompts and seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsd.artifact import Artifact
from fastsd.backends import RUNS_ON, ArtifactBackend, open_artifact
from fastsd.backends.cuda_graph import exact_convolutions
from fastsd.checkpoints import Checkpoint, open_description
from fastsd.checkpoints.layout import BUILTIN
from fastsd.errors import ArtifactError, NumericsError
from fastsd.export.calibration import JUDGED_STEPS, exact_device, exact_pipeline
from fastsd.export.parts import QUANTISED, Request, load_part
from fastsd.pipeline import Pipeline
from fastsd.quality import builtin_atlas, psnr, ssim, tasks
from fastsd.quant.draws import PROMPTS, draw_settings

BUILTIN_PROMPTS, OTHER_PROMPTS = 16, 4


def receipt_prompts(checkpoint: Checkpoint, request: Request) -> tuple[str, ...]:
    """Return the prompts to draw.

    The user's; else for the built-in model the first of its score, and for others a few if the
    engine is quantised or a floor is asked, none if not. Random weights draw noise, whose pictures
    tell nothing.
    """
    if request.prompts:
        return request.prompts
    if not checkpoint.parts["unet"].weights:
        return ()
    if checkpoint.path == BUILTIN:
        return tasks(builtin_atlas())["english"].names[:BUILTIN_PROMPTS]
    judged = request.precision in QUANTISED or request.floor is not None
    return PROMPTS[:OTHER_PROMPTS] if judged else ()


def measure(
    artifact: Artifact,
    checkpoint: Checkpoint,
    request: Request,
    prompts: Sequence[str],
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure an engine and return its receipt, plain JSON data.

    parts: the relative L2 error of each part's first output on one random input. pictures: PSNR
    (dB) and SSIM against eager fp32 over the prompts, median and worst; None without prompts.
    Models are drawn with GUIDANCE, whatever their own, so that receipts compare: the more guidance,
    the more is seen of what rounding changed. Those made for few steps are drawn as they were made.
    Raises NumericsError if a part or a picture is not finite, and what opening the backend raises.
    """
    device = RUNS_ON.get(artifact.manifest.target, "cpu")
    where = exact_device(checkpoint, artifact.manifest.target)
    backend = open_artifact(artifact, checkpoint.config, device=torch.device(device))
    errors = {}
    for part in artifact.manifest.parts:
        errors[part] = part_error(backend, checkpoint, part, request, where)
        tell(f"{part}: relative error {errors[part]:.1e}")
        if not math.isfinite(errors[part]):
            raise NumericsError(
                f"the engine's {part} gives NaN or infinity in {request.precision}; nothing was "
                "written: export with --precision fp32"
            )
    name = backend.name
    backend.close()
    del backend  # before the pictures' engine takes as much again
    pictures = None
    if prompts:
        engine = Pipeline(
            open_description(artifact.path), name="engine", device=device, artifact=artifact
        )
        # The engine's sampler: its folder may name another than the checkpoint's (to_openvino.py).
        exact = exact_pipeline(checkpoint, where, name="exact", sampler=engine.sampler)
        pictures = _compare(engine, exact, request, prompts, tell)
    if pictures:
        found = pictures["psnr_db"]
        tell(f"{len(prompts)} pictures: PSNR {found['median']} dB, worst {found['worst']} dB")
    return {"backend": name, "device": device, "parts": errors, "pictures": pictures}


def part_error(
    backend: ArtifactBackend, checkpoint: Checkpoint, part: str, request: Request, where: str
) -> float:
    """Return |engine - eager| / |eager| of a part's first output, eager in fp32 on `where`."""
    exact = load_part(checkpoint, part, request, torch.float32, lambda _, module: module.to(where))
    with exact_convolutions():
        expected = exact.module(*(tensor.to(where) for tensor in exact.example))
    first: Tensor = (expected if isinstance(expected, Tensor) else expected[0]).cpu()
    inputs = {
        spec.name: tensor.to(backend.device, getattr(torch, spec.dtype))
        for spec, tensor in zip(backend.entries[part].inputs, exact.example, strict=True)
    }
    given = backend.run(part, inputs)[exact.outputs[0]].float().cpu()
    error = float((given - first).norm() / first.norm())
    return float(f"{error:.3g}")


def _compare(
    engine: Pipeline,
    exact: Pipeline,
    request: Request,
    prompts: Sequence[str],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    height, width = request.size
    settings = draw_settings(exact.config, request.size, JUDGED_STEPS)
    distances, likeness, drawn = [], [], {}
    for start in range(0, len(prompts), request.batch):
        texts = list(prompts[start : start + request.batch])
        seeds = list(range(start, start + len(texts)))
        output = engine(texts, seed=seeds, **settings)
        drawn = output.metadata[0]
        with exact_convolutions():
            expected = exact(texts, seed=seeds, **settings).images
        for a, b in zip(output.images, expected, strict=True):
            distances.append(min(psnr(a, b), 100.0))  # equal pictures: JSON has no infinity
            likeness.append(ssim(a, b))
            tell(f"picture {len(distances)} of {len(prompts)}: {distances[-1]:.1f} dB")
    worst = int(np.argmin(distances))
    return {
        "prompts": len(prompts),
        "steps": drawn["steps"],
        "guidance_scale": drawn["guidance_scale"],
        "sampler": engine.sampler,
        "size": [width, height],
        "psnr_db": {
            "median": round(float(np.median(distances)), 2),
            "worst": round(distances[worst], 2),
        },
        "ssim": {
            "median": round(float(np.median(likeness)), 4),
            "worst": round(min(likeness), 4),
        },
        "worst_prompt": prompts[worst],
    }


def check_floor(receipt: dict[str, Any], floor: float) -> None:
    """Raise ArtifactError if the worst picture lies below `floor` dB, naming the worst parts."""
    worst = receipt["pictures"]["psnr_db"]["worst"]
    if worst >= floor:
        return
    parts = sorted(receipt["parts"].items(), key=lambda item: -item[1])
    costs = ", ".join(f"{part} {error:.1e}" for part, error in parts)
    raise ArtifactError(
        f"not published: the worst picture ({receipt['pictures']['worst_prompt']!r}) is {worst} dB "
        f"from fp32, the floor is {floor:g} dB; relative errors by part: {costs}; "
        "lower --floor or raise --precision"
    )
