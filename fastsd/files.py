"""Files that cross the border: JSON that others wrote, and what is published whole or not at all.

Knows nothing of what the files mean.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastsd.errors import CheckpointError, FastsdError, UsageError

# What code meets where values are not of the kind that it was written for.
_WRONG_KINDS = (
    *(AttributeError, LookupError, TypeError, ValueError, ArithmeticError),
    *(RecursionError, StopIteration),
)
_LARGEST_JSON = 64 << 20  # bytes; the largest tokenizer.json in the wild is some 20 MB


def read_json(path: Path, error_type: type[FastsdError] = CheckpointError) -> dict[str, Any]:
    """Read a JSON object. Raises error_type if it is missing, too large or not one."""
    try:
        if path.is_fifo():  # to open one waits for a writer
            raise error_type(f"{path} is a pipe, not a file")
        if path.stat().st_size > _LARGEST_JSON:
            raise error_type(f"{path} is {path.stat().st_size} bytes: no JSON is that large")
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise error_type(f"{path} is missing") from None
    except OSError as error:
        raise error_type(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, nested too deep
        raise error_type(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise error_type(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


@contextmanager
def explained_denials() -> Iterator[None]:
    """Raise CheckpointError for a file or folder that this user may not read."""
    try:
        yield
    except PermissionError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from None


@contextmanager
def explained_values(source: Path | str) -> Iterator[None]:
    """Turn what goes wrong with the values of a file into a CheckpointError that names `source`."""
    try:
        yield
    except (CheckpointError, UsageError) as error:
        named = str(source) in str(error)
        raise CheckpointError(str(error) if named else f"{source}: {error}") from None
    except _WRONG_KINDS as error:
        raise CheckpointError(f"{source} holds values of the wrong kind: {error!r}") from None


def write_json(path: Path, data: object) -> None:
    """Write JSON for people: indented, keys as given, UTF-8; as `replaced` does, at once."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with replaced(path) as draft:
        draft.write_text(text, "utf-8")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a name to write to; on success that file becomes `path`, on failure it is gone.

    A reader of `path` sees the old file or the new one, which keeps its mode, and writers do not
    meet: the name is hidden beside it, and random. A link, pipe or device is written to as it is.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path
        return
    draft = path.with_name(f".{secrets.token_hex(8)}")
    try:
        yield draft
        if path.exists():
            shutil.copymode(path, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def published_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; on success make it `path`, on failure leave no trace.

    Files are synced before the rename, so that `path` is complete whenever it exists. Raises
    UsageError if `path` exists already, unless it is an empty folder.
    """
    check_free(path, "choose another name or move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield draft
        sync(draft)
        draft.chmod(0o755)  # mkdtemp gives 0700
        if path.exists():
            path.rmdir()  # empty; rename replaces folders on POSIX only
        draft.rename(path)
    finally:
        if draft.exists():
            shutil.rmtree(draft)


@contextmanager
def published_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; on success that file becomes `path`.

    Raises UsageError if `path` exists already.
    """
    check_free(path, "choose another name or move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield folder / path.name
        sync(folder)
        (folder / path.name).rename(path)
    finally:
        shutil.rmtree(folder)


def check_free(path: Path, advice: str) -> None:
    """Raise UsageError, with what to do, if `path` exists and is not an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path} exists already; {advice}")


def sync(folder: Path) -> None:
    """Wait until every file below `folder` is on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
