"""backend="auto": what was tuned is recalled, chosen by floor and speed, dropped when stale."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fastsd import Pipeline
from fastsd.artifact import MANIFEST
from fastsd.backends import auto
from fastsd.backends.auto import Measured, choose, recall, remember
from fastsd.checkpoints import Checkpoint, open_checkpoint
from fastsd.errors import UsageError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint() -> Checkpoint:
    return open_checkpoint("builtin")


def rows(tmp_path: Path) -> list[Measured]:
    """An exact engine, a fast one, a faster and worse one; none but eager need be loaded."""
    for name in ("exact", "fast", "worse"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / MANIFEST).touch()
    return [
        Measured("eager", "fp32", 4.0, exact=True),
        Measured("aoti", "fp32", 3.0, exact=True, worst_db=90.0, engine=str(tmp_path / "exact")),
        Measured("aoti", "int8", 2.0, exact=False, worst_db=25.0, engine=str(tmp_path / "fast")),
        Measured("aoti", "int8", 1.0, exact=False, worst_db=15.0, engine=str(tmp_path / "worse")),
    ]


def test_nothing_tuned_is_the_exact_path_and_says_how_to_tune(checkpoint: Checkpoint) -> None:
    choice = choose(checkpoint)
    assert choice.engine is None and "fastsd tune" in choice.reason


@pytest.mark.parametrize(
    ("floor", "engine"), [(None, "worse"), (20, "fast"), (30, "exact"), (200, "exact")]
)
def test_the_fastest_that_holds_the_floor(
    floor: float | None, engine: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    remember(checkpoint, rows(tmp_path))
    choice = choose(checkpoint, floor)
    assert choice.engine == tmp_path / engine
    assert "the fastest of 4 measured" in choice.reason
    (tmp_path / engine / MANIFEST).unlink()  # the engine was removed since
    assert choose(checkpoint, floor).engine != tmp_path / engine


def test_what_other_machines_or_threads_measured_is_not_taken(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = remember(checkpoint, rows(tmp_path))
    assert recall(checkpoint) == rows(tmp_path)
    monkeypatch.setattr(auto, "machine", lambda: {"torch": "1.0"})
    assert recall(checkpoint) == []
    monkeypatch.undo()
    monkeypatch.setenv("FASTSD_CACHE", str(file.parents[1]))
    file.write_text(json.dumps({"rows": 1}))
    assert recall(checkpoint) == []


def test_the_pipeline_says_what_it_takes(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    remember(checkpoint, [Measured("eager", "fp32", 4.0, exact=True)])
    with caplog.at_level(logging.INFO, logger="fastsd"):
        pipe = Pipeline.from_pretrained("builtin", backend="auto", device="cpu")
    assert "auto: eager fp32: 4.00 s a picture, exact" in caplog.text
    assert pipe.artifact is None
    with pytest.raises(UsageError, match="pass backend='auto'"):
        Pipeline.from_pretrained("builtin", floor=30.0)
