"""Hub ids: what is said where neither the cache nor the hub has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsd.checkpoints import open_checkpoint
from fastsd.errors import CheckpointError


@pytest.mark.parametrize("local_files_only", [None, True])
def test_a_model_that_is_not_in_the_cache(
    local_files_only: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice is for the command line too, which has no options of the hub's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not in the cache; give a folder, or open") as raised:
        open_checkpoint("owner/name", local_files_only=local_files_only, cache_dir=tmp_path)
    assert "local_files_only" not in str(raised.value)
