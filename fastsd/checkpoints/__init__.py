"""Checkpoints in, checkpoints out: the only room that knows foreign names and files."""

from fastsd.checkpoints.checkpoint import (
    Checkpoint,
    PartFiles,
    describe,
    open_checkpoint,
    open_description,
)
from fastsd.checkpoints.save import save_description, save_folder

__all__ = [
    "Checkpoint",
    "PartFiles",
    "describe",
    "open_checkpoint",
    "open_description",
    "save_description",
    "save_folder",
]
