"""`fastsd tune`: build this machine's engines of a model, measure them, remember the fastest.

Candidates are the exact path and what AOTInductor compiles of it, in fp32 and in int8 with the
floor held. Each draws the same picture in turns; distances are those of the engines' own receipts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from fastsd import Pipeline
from fastsd.artifact import is_artifact
from fastsd.backends.auto import Measured, remember
from fastsd.checkpoints import Checkpoint
from fastsd.errors import ArtifactError, MissingDependency, UsageError
from fastsd.export.build import export, own_engine
from fastsd.export.parts import Request

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
    pipes = {("eager", "fp32"): Pipeline(checkpoint, name=name, device="cpu")}
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
            engine = _built(checkpoint, name, request, tell)
        except (ArtifactError, MissingDependency, UsageError) as error:
            tell(f"{target} {precision}: left out: {error}")
            continue
        pipes[target, precision] = Pipeline.from_pretrained(engine, device="cpu")
    seconds = _time(list(pipes.values()), size, steps, rounds, tell)
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
    """Find it among the user's own engines, or export it there."""
    path = own_engine(checkpoint, name, request)
    if is_artifact(path):
        tell(f"{request.target} {request.precision}: {path.name} is there already")
        return path
    return export(checkpoint, name, request, tell=tell).path


def _time(
    pipes: Sequence[Pipeline],
    size: tuple[int, int],
    steps: int,
    rounds: int,
    tell: Callable[[str], None],
) -> list[float]:
    """Draw with each in turns, after a warm-up; return each one's median seconds a picture."""
    taken: list[list[float]] = [[] for _ in pipes]
    for turn in range(rounds + 1):
        for pipe, times in zip(pipes, taken, strict=True):
            pipe.set_progress_bar_config(disable=True)
            start = time.perf_counter()
            pipe(
                PROMPT,
                height=size[0],
                width=size[1],
                num_inference_steps=steps if turn else 1,
                seed=0,
            )
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
    return Measured(
        backend, precision, seconds, exact=exact, worst_db=worst, engine=str(pipe.artifact.path)
    )
