"""Hub ids, through huggingface_hub: the cache first, then the few files that are needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastsd.checkpoints.layout import INDEX, read_layout, weight_patterns
from fastsd.errors import CheckpointError

_SMALL = [INDEX, "*/*.json", "*/*.txt"]
Opened = TypeVar("Opened")


def fetch(
    repo_id: str,
    opener: Callable[[Path], Opened],
    *,
    revision: str | None,
    variant: str | None,
    local: bool,
    token: str | None,
    cache_dir: str | Path | None,
) -> Opened:
    """Find a repository's files in the cache, or download what is missing, and open the folder.

    The JSON comes first: a model that is not supported is refused before gigabytes are fetched.
    Code and pickles are never downloaded. Raises CheckpointError with advice.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def snapshot(patterns: list[str], commit: str | None) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=commit,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local,
                allow_patterns=patterns,
            )
        )

    at = f" at revision {revision!r}" if revision else ""
    try:
        folder = snapshot(_SMALL, revision)
        if not local:
            wanted = [
                pattern
                for part in read_layout(folder).parts
                for pattern in weight_patterns(part, variant)
            ]
            folder = snapshot(_SMALL + wanted, folder.name)  # the same commit
    except GatedRepoError:
        raise CheckpointError(
            f"{repo_id} is gated: accept its terms on its page, then log in with `hf auth login` "
            "or pass token="
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{repo_id} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo_id!r} is no folder here, and the hub has no such model, or not for you: check "
            "the name, or log in with `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise CheckpointError(
            f"{repo_id}{at} is no folder here and not in the cache, and the hub "
            + (
                "was not asked (local_files_only)"
                if local
                else "cannot be reached (no network, or HF_HUB_OFFLINE is set)"
            )
            + "; download it once with a network, or give a folder"
        ) from None
    except (EntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{repo_id}{at} could not be fetched: {error}") from None
    return opener(folder)
