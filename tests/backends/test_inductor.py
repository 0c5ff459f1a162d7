"""torch.compile's code draws the eager backend's pictures, and says what compiling took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsd import Pipeline
from fastsd.backends.inductor import CompiledPart
from fastsd.quality import psnr


def test_a_part_is_compiled_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """By dynamo alone ("eager" runs what it traced), which is what decides on compiling anew."""
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda part, options, **given: compile_(part, backend=keep, **given)
    )
    torch._dynamo.reset()
    layer = torch.nn.Linear(4, 4)
    part = CompiledPart(lambda x, kv: layer(x) + kv[0], tune=False)
    with torch.no_grad():
        for rows in (1, 2, 1, 3, 2, *range(1, 12)):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(part(x, [torch.ones(4)]), layer(x) + 1)
        assert len(graphs) == len(part.seconds) == 11, "a shape is never compiled for any shape"
        layer.weight.data.mul_(2)
        torch.testing.assert_close(part(x, [torch.ones(4)]), layer(x) + 1)
        assert len(graphs) == 11, "weights change in place"
        part(torch.randn(1, 4), [torch.ones(1, 4)])
    assert len(graphs) == len(part.seconds) == 12, "a text of another shape is one too"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_pictures_are_the_eager_ones(sd1_folder: Path) -> None:
    pictures = []
    for backend in ("inductor", "eager"):
        pipeline = Pipeline.from_pretrained(sd1_folder, backend=backend, device="cpu")
        pipeline.set_progress_bar_config(disable=True)
        pictures.append(pipeline("a cat", num_inference_steps=3, seed=0).images[0])
        said = " ".join(pipeline.explain())
    assert np.asarray(pictures[0]).std() > 1 and psnr(*pictures) >= 60
    assert "backend: eager" in said
