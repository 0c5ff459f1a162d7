"""Checkpoints in, checkpoints out: the only room that knows foreign names and files."""

from fastsd.checkpoints.checkpoint import Checkpoint, PartFiles, describe, open_checkpoint
from fastsd.checkpoints.save import save_folder

__all__ = ["Checkpoint", "PartFiles", "describe", "open_checkpoint", "save_folder"]
