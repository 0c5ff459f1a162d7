"""`fastsd tune` end to end, on an engine that is only copied: built, measured, remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsd.artifact import MANIFEST
from fastsd.backends.auto import choose, recall
from fastsd.benchmarks import tune as tuning
from fastsd.benchmarks.tune import tune
from fastsd.checkpoints import open_checkpoint
from fastsd.export import EXPORTERS
from tests.export.conftest import SIZE


def test_engines_are_built_once_and_anew_when_damaged(
    sdxl_folder: Path, sdxl_onnx_fast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPORTERS, "onnx", "tests.export.test_build:CopyExporter")
    monkeypatch.setenv("FINISHED", str(sdxl_onnx_fast))
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "CANDIDATES", (("onnx", "fp32"), ("onnx", "int3")))
    checkpoint = open_checkpoint(sdxl_folder)
    lines: list[str] = []

    def run() -> Path:
        lines.clear()
        rows = tune(
            checkpoint, "owner/sdxl", floor=None, size=SIZE, steps=2, rounds=1, tell=lines.append
        )
        assert rows == recall(checkpoint) == sorted(rows, key=lambda row: row.seconds)
        engines = [Path(row.engine) for row in rows if row.engine]
        assert len(rows) == 2 and all(row.exact for row in rows)
        assert [row.size for row in rows if row.engine] == ["96x64"]
        assert choose(checkpoint).measured == rows[0]
        assert any("int3: left out: onnx has no precision" in line for line in lines)
        (engine,) = engines
        assert engine.parent == tmp_path / "engines"
        return engine

    engine = run()
    run()
    assert any("is there already" in line for line in lines)
    (engine / MANIFEST).write_text(" " + (engine / MANIFEST).read_text())
    run()
    assert any("made anew" in line for line in lines)
