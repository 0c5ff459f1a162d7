"""Every task that an exported engine can carry draws what eager draws; the others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsd.errors import UsageError
from tests.export.conftest import SIZE
from tests.export.test_to_onnx import assert_same_pictures
from tests.test_tasks import mask, picture, quiet

ENGINES = [("sd1_onnx", "sd1_folder"), ("sdxl_onnx_fast", "sdxl_folder")]
GIVEN: dict[str, Any] = dict(image=picture(SIZE), strength=0.8)
MASKED: dict[str, Any] = dict(**GIVEN, mask_image=mask(SIZE), mask_feather=4)


@pytest.mark.parametrize(("engine", "source"), ENGINES)
def test_tasks_equal_eager(engine: str, source: str, request: pytest.FixtureRequest) -> None:
    """Static graphs for one picture: two pictures at once, and a second call, go through them."""
    ours = quiet(request.getfixturevalue(engine), device="cpu")
    eager = quiet(request.getfixturevalue(source), device="cpu")
    settings: dict[str, Any] = dict(
        num_inference_steps=4, height=SIZE[0], width=SIZE[1], output_type="np", seed=1
    )
    weighted: dict[str, Any] = dict(prompt_syntax="weighted", guidance_rescale=0.5)
    for task in (GIVEN, MASKED, {**MASKED, "strength": 1.0}, weighted):
        prompts = ["a (red:1.3) apple", "a cat"]
        given = {**settings, **task}
        assert_same_pictures(ours(prompts, **given).images, eager(prompts, **given).images)


def test_what_an_engine_cannot_carry(sd1_onnx: Path) -> None:
    pipe = quiet(sd1_onnx, device="cpu")
    size: dict[str, Any] = dict(num_inference_steps=1, height=SIZE[0], width=SIZE[1])
    with pytest.raises(UsageError, match="reads texts of 77 tokens, not 154"):
        pipe("a cat BREAK a dog", prompt_syntax="weighted", **size)
    with pytest.raises(UsageError, match="clip_skip needs hidden states"):
        pipe("a cat", clip_skip=1, **size)
    with pytest.raises(UsageError, match="exported for pictures of 96x64"):
        pipe("a cat", image=picture((64, 64)), num_inference_steps=2)
    pipe.load_textual_inversion({"<thing>": torch.zeros(2, 32)})
    with pytest.raises(UsageError, match="textual inversion"):
        pipe("a <thing>", **size)
    pipe.unload_textual_inversion()
    drawn = pipe("a cat", **size).images[0]
    assert np.asarray(drawn).std() > 1
