"""backend="auto": what was tuned is recalled, chosen by floor and speed, dropped when stale."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsd import Pipeline
from fastsd.artifact import MANIFEST
from fastsd.backends import auto
from fastsd.backends.auto import Measured, choose, recall, remember
from fastsd.checkpoints import Checkpoint, open_checkpoint
from fastsd.errors import UsageError
from tests.export.conftest import SIZE


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
    way = choose(checkpoint)
    assert way.engine is None and "fastsd tune" in way.reason


@pytest.mark.parametrize(
    ("floor", "engine"), [(None, "worse"), (20, "fast"), (30, "exact"), (200, "exact")]
)
def test_the_fastest_that_holds_the_floor(
    floor: float | None, engine: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    remember(checkpoint, rows(tmp_path))
    way = choose(checkpoint, floor)
    assert way.engine == tmp_path / engine
    assert "the fastest of 4 measured" in way.reason
    (tmp_path / engine / MANIFEST).unlink()  # the engine was removed since
    assert choose(checkpoint, floor).engine != tmp_path / engine


def test_what_else_is_asked_narrows_the_choice(checkpoint: Checkpoint, tmp_path: Path) -> None:
    remember(checkpoint, rows(tmp_path))
    assert choose(checkpoint, precision="fp32").engine == tmp_path / "exact"
    with pytest.raises(UsageError, match="still there holds fp16"):
        choose(checkpoint, precision="fp16")
    with pytest.raises(UsageError, match="still there holds int8 and 30 dB"):
        choose(checkpoint, 30.0, precision="int8")
    on_gpu = choose(checkpoint, precision="fp16", device="cuda")
    assert on_gpu.engine is None and "eager fp16 on cuda" in on_gpu.reason


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


def test_another_model_of_the_same_shape_is_not_taken_for_it(
    sd1_folder: Path, tmp_path: Path
) -> None:
    """Copies keep names, sizes and times; an upgrade of fastsd is measured anew."""
    first, second = (shutil.copytree(sd1_folder, tmp_path / name) for name in ("a", "b"))
    remember(open_checkpoint(first), rows(tmp_path))
    assert recall(open_checkpoint(first)) and not recall(open_checkpoint(second))
    with pytest.MonkeyPatch.context() as newer:
        newer.setattr("fastsd.__version__", "99")
        assert not recall(open_checkpoint(first))


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


def test_programs_and_the_command_line_say_it_on_stderr_once(tmp_path: Path) -> None:
    """Without any logging set up; and a picture drawn so can be drawn again."""
    script = "from fastsd import Pipeline; Pipeline.from_pretrained('builtin', backend='auto')"
    drawn = str(tmp_path / "a.png")
    generate = ["-m", "fastsd", "generate", "a", "--steps", "1", "--backend", "auto", "-o", drawn]
    for arguments in (["-c", script], generate, ["-m", "fastsd", "generate", "--again", drawn]):
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        expected = 0 if "--again" in arguments else 1  # eager itself is recorded, not the choice
        assert done.stderr.count("auto: eager fp32; no faster way was measured here") == expected


def test_pictures_of_a_chosen_engine_record_the_choice(sd1_folder: Path, sd1_onnx: Path) -> None:
    """The engine's folder is nobody else's: whoever draws the picture again chooses again."""
    checkpoint = open_checkpoint(sd1_folder)
    remember(checkpoint, [Measured("ort", "fp32", 1.0, exact=True, engine=str(sd1_onnx))])
    pipe = Pipeline.from_pretrained(sd1_folder, backend="auto", device="cpu", floor=30.0)
    assert pipe.artifact is not None and pipe.artifact.path == sd1_onnx
    height, width = SIZE
    settings: dict[str, Any] = dict(num_inference_steps=1, height=height, width=width, seed=0)
    (metadata,) = pipe("a", **settings).metadata
    assert (metadata["backend"], metadata["precision"]) == ("auto", "fp32")
    again = Pipeline.from_pretrained(
        sd1_folder, backend=metadata["backend"], precision=metadata["precision"], device="cpu"
    )
    assert again("a", **settings).images[0].tobytes() == pipe("a", **settings).images[0].tobytes()
