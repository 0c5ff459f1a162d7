"""The contenders that fastsd is measured against. The only shipped file that imports diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastsd.errors import MissingDependency


def diffusers_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load `folder` with diffusers as its users do, quietly, without its safety checker."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise MissingDependency(
            f"diffusers is needed for the baseline ({error}); run pip install 'fastsd[bench]'"
        ) from None
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if dtype != torch.float32:  # as loaded; the argument for it changed its name between releases
        pipeline.to(dtype)
    return pipeline
