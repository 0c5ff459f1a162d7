"""The sheet of tasks is drawn whole, and stops at a pixel that should have been kept."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsd.benchmarks import tasks_sheet
from fastsd.sources import Source


def draw(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--model", str(model), "--out", str(out), "--steps", "4"]
    monkeypatch.setattr(sys, "argv", ["tasks_sheet", *arguments])
    tasks_sheet.main()


@pytest.mark.slow
def test_every_task_has_its_row(
    sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(sd1_folder, tmp_path, monkeypatch)
    with Image.open(tmp_path / "tasks-sheet.png") as sheet:
        assert sheet.width > tasks_sheet.COLUMNS * 256 and sheet.height > 5 * 256
        assert np.asarray(sheet).std() > 20


def test_changed_pixels_are_noticed(
    sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Source, "keep", lambda self, drawn: drawn)
    with pytest.raises(SystemExit, match="pixels outside the mask were changed"):
        draw(sd1_folder, tmp_path, monkeypatch)
