"""The contract between the engine and whatever runs a model's parts.

A part is a callable over torch tensors on the backend's device:

    text_encoder, text_encoder_2   (input_ids (B, N) int64) -> CLIPOutput
    unet_time      (timesteps (S,), pooled, size_ids, guidance) -> rows (S, B or 1, E)
                   once a schedule
    unet_context   (encoder_hidden_states (B, N, C)) -> [(K, V)], one a cross-attention
                   once a prompt
    unet           (x (B, C, H, W), row (B or 1, E), kv) -> prediction (B, C, H, W)
                   every step; under guidance x has half the batch of kv and of the prediction:
                   the part repeats it where the two rows first differ
    vae_decoder    (z (B, C, h, w)) -> picture (B, 3, H, W) in [-1, 1]
    vae_encoder    (picture (B, 3, H, W)) -> moments (B, 2 C, h, w)

Knows nothing of prompts, samplers or the loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastsd.errors import UsageError

Part = Callable[..., Any]
Shapes = Mapping[str, tuple[int, ...]]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Backend(ABC):
    """Runs the parts of one checkpoint at one precision on one device.

    Weights never change after construction, so every part may be called from many threads at once.
    """

    name: str
    precision: str
    device: torch.device
    dtype: torch.dtype  # of the UNet's and the text encoders' inputs

    @abstractmethod
    def part(self, name: str, shapes: Shapes | None = None) -> Part:
        """Return the part called `name`, ready for inputs of `shapes` (None: of any shape).

        Raises UsageError if the checkpoint has no such part.
        """

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return a callable that repeats `step` on the same buffers; by default `step` itself."""
        return step

    def close(self) -> None:  # noqa: B027  (not abstract: most backends hold nothing to release)
        """Release what garbage collection would not."""


def dtype_of(precision: str, supported: tuple[str, ...], backend: str) -> torch.dtype:
    """Translate a precision's name, refusing what `backend` cannot do."""
    if precision not in supported:
        raise UsageError(
            f"precision {precision!r} is not one that the {backend} backend has; "
            f"it has {', '.join(supported)}"
        )
    return PRECISIONS[precision]
