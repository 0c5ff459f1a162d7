"""Hub ids: what is said where neither the cache nor the hub has one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fastsd.checkpoints import open_checkpoint
from fastsd.errors import CheckpointError
from tests.checkpoints.rewrite import WEIGHTS


@pytest.mark.parametrize("local_files_only", [None, True])
def test_a_model_that_is_not_in_the_cache(
    local_files_only: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice is for the command line too, which has no options of the hub's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not in the cache; give a folder, or open") as raised:
        open_checkpoint("owner/name", local_files_only=local_files_only, cache_dir=tmp_path)
    assert "local_files_only" not in str(raised.value)


@pytest.fixture
def cached(sd1_folder: Path, tmp_path: Path) -> Path:
    """A hub's cache that holds sd1_folder as owner/name; returns the folder of its commit."""
    commit = "0" * 40
    home = tmp_path / "models--owner--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(sd1_folder, home / "snapshots" / commit)
    return home / "snapshots" / commit


def files_of(checkpoint: Any) -> list[str]:
    return [file.name for part in checkpoint.parts.values() for file in part.weights]


def test_a_variant_that_the_cache_lacks_is_fetched(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain files in the cache do not pass for it, unless nobody can be asked."""
    parts = [name for name in WEIGHTS.values() if (cached / name).exists()]
    halves = [
        name.replace(".safetensors", ".fp16.safetensors") for name in parts if "vae" not in name
    ]
    asked: list[str] = []

    def download(repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.extend(name for name in allow_patterns if "*" not in name and "/" in name)
        for name in set(halves) & {*allow_patterns}:
            shutil.copy(cached / name.replace(".fp16", ""), cached / name)
        return str(cached)

    options: dict[str, Any] = {"variant": "fp16", "cache_dir": tmp_path}
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert not any("fp16" in n for n in files_of(open_checkpoint("owner/name", **options)))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: [*parts, *halves])
    fetched = files_of(open_checkpoint("owner/name", **options))
    assert sum("fp16" in name for name in fetched) == len(halves) == len(fetched) - 1
    vae = next(name for name in parts if "vae" in name)
    assert sorted(asked) == sorted([*halves, vae]), "one part has no such files"
    assert files_of(open_checkpoint("owner/name", cache_dir=tmp_path)) != fetched
