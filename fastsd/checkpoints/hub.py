"""Hub ids, through huggingface_hub: the cache first, then the few files that are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fastsd.checkpoints.layout import INDEX, PARTS, read_layout, weight_files
from fastsd.errors import CheckpointError

_SMALL = [INDEX, "*/*.json", "*/*.txt"]
Opened = TypeVar("Opened")


def fetch(
    repo_id: str,
    opener: Callable[[Path, bool], Opened],
    *,
    revision: str | None,
    variant: str | None,
    local_files_only: bool | None,
    token: str | None,
    cache_dir: str | Path | None,
) -> Opened:
    """Open a repository's copy in the cache, after downloading what it lacks.

    opener: opens a folder; whether with the variant's files for every part, as where others lie in
    the cache the hub may have these.
    local_files_only: None takes the cache as it is if it has every file, False asks the hub for the
    newest, True never asks. Code and pickles are never downloaded. Raises CheckpointError.
    """
    from huggingface_hub import list_repo_files, snapshot_download

    cached_error: CheckpointError | None = None
    if local_files_only is not False:
        try:
            return opener(_cached(repo_id, revision, cache_dir), not local_files_only)
        except CheckpointError as error:
            if local_files_only:
                raise
            cached_error = error

    def snapshot(patterns: list[str], commit: str | None) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=commit,
                cache_dir=cache_dir,
                token=token,
                allow_patterns=patterns,
            )
        )

    try:
        with _explained(repo_id, revision):
            # JSON first: what is not supported is refused before gigabytes are fetched
            folder = snapshot(_SMALL, revision)
            names = list_repo_files(repo_id, revision=folder.name, token=token)

            def exists(file: Path) -> bool:
                return file.relative_to(folder).as_posix() in names

            weights = [
                file.relative_to(folder).as_posix()
                for part in read_layout(folder).parts
                for file in weight_files(folder, part, variant, exists=exists)
            ]
            missing = [name for name in weights if name not in names]
            if not missing:
                folder = snapshot(_SMALL + weights, folder.name)  # of the same commit
    except Unreachable as error:
        if cached_error is None:
            raise
        with suppress(CheckpointError):
            return opener(_cached(repo_id, revision, cache_dir), False)
        raise CheckpointError(f"{error}; {cached_error}") from None
    if missing:
        there = [name for name in names if name.startswith(PARTS) and not name.endswith(".json")]
        raise CheckpointError(
            f"{repo_id} has no {', '.join(missing)}; it has {', '.join(there)}. fastsd reads "
            "safetensors only; variant='fp16' asks for files with fp16 in their names"
        )
    return opener(folder, False)


def fetch_file(
    repo_id: str,
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
) -> Path:
    """Return one file of a repository, from the cache if it is there. Raises CheckpointError."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if local_files_only is not False:
        cached = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        if local_files_only:
            raise CheckpointError(f"the cache has no {name} of {repo_id!r}")
    with _explained(repo_id, revision):
        return Path(
            hf_hub_download(repo_id, name, revision=revision, token=token, cache_dir=cache_dir)
        )


def _cached(repo_id: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    """Return the folder of the commit that the cache has for a revision, complete or not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(repo_id, INDEX, cache_dir=cache_dir, revision=revision)
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is no folder here and no hub id: {error}") from None
    if not isinstance(index, str):
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{repo_id!r}{at} is no folder here and not in the cache; give a folder, or open it "
            "once with a network: its files stay in the cache"
        )
    return Path(index).parent


class Unreachable(CheckpointError):
    """The hub did not answer."""


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn huggingface_hub's errors into ours, with advice."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # whichever HTTP library this release of huggingface_hub is built on, and OSError
    http_errors: tuple[type[Any], ...] = (HFValidationError, *HfHubHTTPError.__bases__)
    at = f"{repo_id!r} at revision {revision!r}" if revision else repr(repo_id)
    try:
        yield
    except GatedRepoError:
        raise CheckpointError(
            f"{repo_id!r} is gated: accept its terms on its page, then log in with `hf auth login` "
            "or pass token="
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{repo_id!r} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo_id!r} is no folder here, and the hub has no such model, or not for you: check "
            "the name, or log in with `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise Unreachable(
            f"the hub cannot be reached for {at}: no network, or HF_HUB_OFFLINE is set"
        ) from None
    except http_errors as error:
        raise Unreachable(f"{at} could not be fetched: {error}") from None
