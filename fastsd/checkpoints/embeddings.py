"""Textual-inversion files: learned words and the vectors that stand for them.

Reads safetensors alone, in the three forms that people share: one tensor under the word itself
(diffusers), under `emb_params` (the web UI), or `clip_l` and `clip_g` (SDXL).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastsd.checkpoints.weights import WEIGHT_DTYPES, read_header
from fastsd.errors import CheckpointError, UsageError
from fastsd.files import explained_denials

NAMELESS = "emb_params"
XL = ("clip_l", "clip_g")  # in the order of SDXL's text encoders
MAX_VECTORS = 75  # what a text encoder reads at once


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learned word. vectors: (V, D) for each text encoder, V alike; sha256: of their values."""

    token: str
    vectors: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        """How many tokens the word takes."""
        return len(self.vectors[0])

    @property
    def sha256(self) -> str:
        """Name the vectors by their values."""
        data = b"".join(vector.numpy().tobytes() for vector in self.vectors)
        return hashlib.sha256(data).hexdigest()


@explained_denials()
def read_embedding(
    source: str | Path | Mapping[str, Tensor], widths: Sequence[int], token: str | None = None
) -> Embedding:
    """Read a learned word for text encoders of these widths.

    token: how prompts call it; None takes the file's key, or its name where the key says nothing.
    Raises CheckpointError for a file that is not one or is for another model; UsageError.
    """
    if isinstance(source, Mapping):
        where, name, tensors = "the embedding", None, dict(source)
    else:
        path = Path(source)
        where, name, tensors = str(path), path.stem, _read(path)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UsageError(f"{where} must map names to tensors; it holds {list(tensors)[:3]}")
    found = _by_encoder(where, tensors, widths)
    (key, *more) = tensors
    token = token or (name if more or key in (NAMELESS, *XL) else key)
    if not isinstance(token, str) or not token.strip():
        raise UsageError(f"{where} does not say what its word is; give token")
    return Embedding(token.strip(), tuple(found))


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the embedding's .safetensors file")
    header = read_header(path)
    wrong = {name: info.dtype for name, info in header.items() if info.dtype not in WEIGHT_DTYPES}
    if not header or len(header) > len(XL) or wrong:
        held = wrong or f"{len(header)} tensors, such as {list(header)[:3]}"
        raise CheckpointError(f"{path} is not a textual-inversion embedding: it holds {held}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _by_encoder(where: str, tensors: Mapping[str, Tensor], widths: Sequence[int]) -> list[Tensor]:
    """Return (V, D) float32 for each text encoder."""
    if set(tensors) == set(XL) and len(widths) == len(XL):
        given = [tensors[name] for name in XL]
    else:
        given = list(tensors.values())
    shapes = [tuple(tensor.shape) for tensor in given]
    if [shape[-1:] for shape in shapes] != [(width,) for width in widths] or any(
        len(shape) > 2 for shape in shapes
    ):
        raise CheckpointError(
            f"{where} holds vectors of shapes {shapes} ({', '.join(tensors)}), and this model's "
            f"text encoders read widths {list(widths)}: it was made for another family"
        )
    vectors = [tensor.detach().float().cpu().reshape(-1, tensor.shape[-1]) for tensor in given]
    count = len(vectors[0])
    if not 1 <= count <= MAX_VECTORS or any(len(vector) != count for vector in vectors):
        raise CheckpointError(
            f"{where} holds vectors of shapes {shapes}; expected 1 to {MAX_VECTORS} vectors, as "
            "many for each text encoder"
        )
    if not all(bool(torch.isfinite(vector).all()) for vector in vectors):
        raise CheckpointError(f"{where} holds NaN or infinity; download it again")
    return vectors
