"""Every task that an exported engine can carry draws what eager draws; the others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastsd.checkpoints import open_checkpoint
from fastsd.errors import UsageError
from fastsd.export.build import export
from fastsd.export.parts import Request, source_digest
from tests.export.conftest import SIZE
from tests.export.test_to_onnx import assert_same_pictures
from tests.test_tasks import mask, picture, quiet

ENGINES = [
    ("sd1_onnx", "sd1_folder"),
    ("sdxl_onnx_fast", "sdxl_folder"),
    ("sd1_openvino", "sd1_folder"),
]
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


def test_a_lora_and_a_preset_go_in_when_an_engine_is_built(
    sd1_folder: Path, tmp_path: Path
) -> None:
    """It draws, unasked, what eager draws with both; the manifest says what is inside."""
    eager = quiet(sd1_folder, device="cpu", preset="hyper-2")
    layers = ("down_blocks.0.attentions.0.proj_in", "mid_block.attentions.0.proj_in")
    weights, lora = eager._backend.weights("unet"), {}
    generator = torch.Generator().manual_seed(3)
    for layer in layers:
        rows, columns = weights[f"{layer}.weight"].flatten(1).shape
        lora[f"unet.{layer}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / 4
        lora[f"unet.{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 4
    file = tmp_path / "style.safetensors"
    save_file(lora, file)
    checkpoint = open_checkpoint(sd1_folder, preset="hyper-2").with_loras([(file, 0.7)])
    request = Request(target="onnx", size=SIZE)
    artifact = export(checkpoint, "sd1", request, tmp_path / "engine")
    plain = open_checkpoint(sd1_folder, preset="hyper-2")
    assert artifact.manifest.model == "sd1 + style.safetensors:0.7"
    assert artifact.manifest.source == source_digest(checkpoint) != source_digest(plain)
    settings: dict[str, Any] = dict(height=SIZE[0], width=SIZE[1], output_type="np", seed=1)
    ours = quiet(artifact.path, device="cpu")
    without = eager("a cat", **settings).images
    eager.load_lora_weights(file, adapter_name="style")
    eager.set_adapters("style", 0.7)
    output = ours("a cat", **settings)
    assert (output.metadata[0]["steps"], output.metadata[0]["guidance_scale"]) == (2, 0.0)
    drawn = output.images
    assert_same_pictures(drawn, eager("a cat", **settings).images)
    assert np.abs(drawn - without).max() > 0.05
    with pytest.raises(UsageError, match="fixed when it is built.*fastsd export MODEL --lora"):
        ours.load_lora_weights(file)


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
