"""Checkpoints in, checkpoints out: the only room that knows foreign names and files."""

from fastsd.checkpoints.checkpoint import (
    Checkpoint,
    PartFiles,
    describe,
    model_name,
    open_checkpoint,
    open_description,
    parameters,
)
from fastsd.checkpoints.convert import convert
from fastsd.checkpoints.embeddings import Embedding, read_embedding
from fastsd.checkpoints.lora import GIVEN_TENSORS, open_lora
from fastsd.checkpoints.save import save_description, save_folder

__all__ = [
    "GIVEN_TENSORS",
    "Checkpoint",
    "Embedding",
    "PartFiles",
    "convert",
    "describe",
    "model_name",
    "open_checkpoint",
    "open_description",
    "open_lora",
    "parameters",
    "read_embedding",
    "save_description",
    "save_folder",
]
