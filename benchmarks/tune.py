"""`fastsd tune`: build this machine's engines of a model, measure them, remember the fastest.

Candidates are the exact path and what AOTInductor compiles of it, in fp32 and in int8 with the
floor held. Each draws the same picture in turns; distances are those of the engines' own receipts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from fastsd import Pipeline
from fastsd.artifact import Artifact, is_artifact
from fastsd.backends.auto import Measured, remember
from fastsd.checkpoints import Checkpoint
from fastsd.errors import ArtifactError, FastsdError
from fastsd.export.build import export, own_engine
from fastsd.export.parts import Request
from fastsd.export.verify import receipt_prompts
from fastsd.quant.draws import draw_settings

CANDIDATES = (("aoti", "fp32"), ("aoti", "bf16"), ("aoti", "int8"))
EXACT_ERROR = 1e-4  # relative L2 of every part below which an engine counts as exact
PROMPT = "a red apple"


def tune(
    checkpoint: Checkpoint,
    name: str,
    *,
    floor: float | None,
    size: tuple[int, int],
    steps: int = 20,
    rounds: int = 3,
    prompts: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Measure every candidate and remember them; return the rows, fastest first.

    floor: dB that the worst picture of an inexact engine must reach; None takes any measured one.
    size: height, width in pixels. prompts: to calibrate and judge with; () takes the model's own.
    """
    engines: dict[tuple[str, str], Path] = {}
    for target, precision in CANDIDATES:
        try:
            request = Request(
                target=target,
                precision=precision,
                size=size,
                layout="fast",
                floor=floor if precision != "fp32" else None,
                prompts=tuple(prompts),
            )
            if precision == "bf16" and not prompts:  # judged as int8 is
                judged = receipt_prompts(checkpoint, replace(request, precision="int8"))
                request = replace(request, prompts=judged)
            engines[target, precision] = _built(checkpoint, name, request, tell)
        except FastsdError as error:
            tell(f"{target} {precision}: left out: {error}")
    # Opened when all are there: to build the next takes the memory that these would hold.
    pipes = {("eager", "fp32"): Pipeline(checkpoint, name=name, device="cpu")}
    pipes |= {way: Pipeline.from_pretrained(path, device="cpu") for way, path in engines.items()}
    drawn = draw_settings(checkpoint.config, size, steps)
    seconds = _time(list(pipes.values()), drawn, rounds, tell)
    rows = [
        _row(pipe, backend, precision, taken)
        for ((backend, precision), pipe), taken in zip(pipes.items(), seconds, strict=True)
    ]
    rows.sort(key=lambda row: row.seconds)
    remember(checkpoint, rows)
    return rows


def _built(
    checkpoint: Checkpoint, name: str, request: Request, tell: Callable[[str], None]
) -> Path:
    """Find it among the user's own engines, whole; export it there first if need be."""
    path = own_engine(checkpoint, name, request)
    if is_artifact(path):
        try:
            Artifact.open(path)
        except ArtifactError as error:
            tell(f"{request.target} {request.precision}: made anew: {error}")
        else:
            tell(f"{request.target} {request.precision}: {path.name} is there already")
            return path
    return export(checkpoint, name, request, force=True, tell=tell).path


def _time(
    pipes: Sequence[Pipeline],
    drawn: Mapping[str, Any],
    rounds: int,
    tell: Callable[[str], None],
) -> list[float]:
    """Draw with each in turns, after a warm-up; return each one's median seconds a picture."""
    taken: list[list[float]] = [[] for _ in pipes]
    for turn in range(rounds + 1):
        for pipe, times in zip(pipes, taken, strict=True):
            pipe.set_progress_bar_config(disable=True)
            given = dict(drawn)
            if not turn and "num_inference_steps" in given:
                given["num_inference_steps"] = 2  # of one, inpainting leaves none
            start = time.perf_counter()
            pipe(PROMPT, seed=0, **given)
            if turn:
                times.append(time.perf_counter() - start)
        tell(f"round {turn} of {rounds}")
    return [median(times) for times in taken]


def _row(pipe: Pipeline, backend: str, precision: str, seconds: float) -> Measured:
    if pipe.artifact is None:
        return Measured(backend, precision, seconds, exact=True)
    receipt = pipe.artifact.manifest.receipt or {}
    pictures = receipt.get("pictures") or {}
    worst = pictures.get("psnr_db", {}).get("worst")
    exact = max(receipt.get("parts", {"": 1.0}).values()) <= EXACT_ERROR
    height, width = pipe.artifact.manifest.size
    return Measured(
        backend,
        precision,
        seconds,
        exact=exact,
        worst_db=worst,
        engine=str(pipe.artifact.path),
        size=f"{width}x{height}",
    )
