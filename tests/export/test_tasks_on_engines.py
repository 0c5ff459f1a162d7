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
from fastsd.export.parts import Request, load_part, source_digest
from fastsd.supported import ROWS
from tests import fixtures
from tests.export.conftest import SIZE, Engine, layout_of, write
from tests.pictures import assert_same_pictures, mask, picture, quiet

slow = pytest.mark.slow
GIVEN: dict[str, Any] = dict(image=picture(SIZE), strength=0.8)
MASKED: dict[str, Any] = dict(**GIVEN, mask_image=mask(SIZE), mask_feather=4)
WEIGHTED = ["a (red:1.3) apple", "a [cat]"]
# What each row of `fastsd models` asks of an engine that is fixed to SIZE, and to one picture.
TASKS: dict[str, dict[str, Any]] = {
    "text to image": dict(negative_prompt="fog"),
    "image to image": GIVEN,
    "inpainting with any model": MASKED,
    "outpainting": dict(image=picture((SIZE[0] - 8, SIZE[1] - 24)), outpaint=(8, 0, 16, 8)),
    "variations": dict(prompt="", num_images_per_prompt=2, **GIVEN),
    "guidance rescale": dict(guidance_rescale=0.5),
    "prompt weights": dict(prompt=WEIGHTED, prompt_syntax="weighted"),
}
# The engines that all of them run on: target, family, the row of the family.
ENGINES = [
    ("onnx", "sd1", "Stable Diffusion 1.x"),
    ("openvino", "sd1", "Stable Diffusion 1.x"),
    ("onnx", "sdxl", "SDXL"),
    pytest.param("aoti", "sd1", "Stable Diffusion 1.x", marks=slow),
    pytest.param("onnx", "sd2", "Stable Diffusion 2.x", marks=slow),
    pytest.param("openvino", "sd2", "Stable Diffusion 2.x", marks=slow),
    pytest.param("aoti", "sd2", "Stable Diffusion 2.x", marks=slow),
    pytest.param("openvino", "sdxl", "SDXL", marks=slow),
    pytest.param("aoti", "sdxl", "SDXL", marks=slow),
]
TARGETS = ["onnx", pytest.param("openvino", marks=slow), pytest.param("aoti", marks=slow)]
ANY_SIZE = ["onnx", pytest.param("openvino", marks=slow)]
LAYERS = [("onnx", "sdxl"), *(pytest.param(t, "sd1", marks=slow) for t in ("openvino", "aoti"))]
LORAS = "LoRAs inside an engine or a folder"
SETTINGS: dict[str, Any] = dict(num_inference_steps=4, output_type="np", seed=1)
SIDES: dict[str, Any] = dict(height=SIZE[0], width=SIZE[1])


def test_the_list_of_what_is_supported_says_what_is_run_here() -> None:
    def values(parameters: list[Any]) -> list[tuple[str, ...]]:
        found = [getattr(parameter, "values", parameter) for parameter in parameters]
        return [(value,) if isinstance(value, str) else value for value in found]

    def targets(parameters: list[Any]) -> set[str]:
        return {target for target, *_ in values(parameters)}

    run = {
        **{row: {t for t, _, r in values(ENGINES) if r == row} for *_, row in values(ENGINES)},
        **{task: targets(ENGINES) for task in (*TASKS, "two stages")},
        **{row: targets(TARGETS) for row in ("inpainting models", LORAS)},
        "long prompts": targets(ANY_SIZE),
        "clip skip": targets(LAYERS),
    }
    assert {row.name: set(row.engines) for row in ROWS if row.engines} == run


@pytest.mark.parametrize(("target", "family", "row"), ENGINES)
def test_tasks_equal_eager(
    target: str, family: str, row: str, engine: Engine, request: pytest.FixtureRequest
) -> None:
    """Static graphs for one picture: two pictures at once, and a second call, go through them."""
    ours = quiet(engine(family, target), device="cpu")
    eager = quiet(request.getfixturevalue(f"{family}_folder"), device="cpu")
    for task in TASKS.values():
        sides = {} if "outpaint" in task else SIDES
        given = {"prompt": ["a red apple", "a cat"], **SETTINGS, **sides, **task}
        assert_same_pictures(ours(**given).images, eager(**given).images)
    first: dict[str, Any] = dict(denoising_end=0.6, **SETTINGS | {"output_type": "latent"})
    second: dict[str, Any] = dict(denoising_start=0.6, **SETTINGS)
    drawn, expected = (
        pipe("fog", image=pipe("a cat", **SIDES, **first).images, **second).images
        for pipe in (ours, eager)
    )
    assert_same_pictures(drawn, expected)


@pytest.mark.usefixtures("only_unets_are_traced")
@pytest.mark.parametrize("target", TARGETS)
def test_a_model_that_inpaints(target: str, sd1_folder: Path, tmp_path: Path) -> None:
    """Nine channels go in, and four come out."""
    folder = fixtures.write_inpainting(tmp_path / "inpainting", sd1_folder)
    ours, eager = quiet(write(folder, tmp_path / "engine", target=target)), quiet(folder)
    for strength in (0.6, 1.0):
        given = {"prompt": ["a red apple", "a cat"], **SETTINGS, **MASKED, "strength": strength}
        assert_same_pictures(ours(**given).images, eager(**given).images)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=slow)])
def test_a_model_of_few_steps_is_asked_once_a_step(
    target: str, family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """It is drawn without guidance: its UNet takes one row a picture, and two calls where asked."""
    source = request.getfixturevalue(f"{family}_folder")
    checkpoint = open_checkpoint(source, preset="lcm")
    asked = Request(target=target, size=SIZE, layout="fast")
    artifact = export(checkpoint, "few", asked, tmp_path / "engine")
    batch = {spec.name: spec.shape[0] for spec in artifact.manifest.parts["unet"].inputs}
    assert set(batch.values()) == {1}
    usual = load_part(open_checkpoint(source), "unet", asked, torch.float32)
    assert {spec.shape[0] for spec in usual.inputs} >= {2}
    ours, eager = quiet(artifact.path), quiet(source, preset="lcm")
    for guidance in (1.0, 4.0):
        given = {"prompt": ["a red apple", "a cat"], **SETTINGS, **SIDES}
        given["guidance_scale"] = guidance
        assert_same_pictures(ours(**given).images, eager(**given).images)


@pytest.mark.parametrize("target", ANY_SIZE)
def test_graphs_of_any_size_read_prompts_of_any_length(
    target: str, sd1_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if target == "onnx":
        engine = request.getfixturevalue("sd1_onnx_any_size")
    else:
        engine = write(sd1_folder, tmp_path / "engine", target=target, dynamic=True)
    ours = quiet(engine)
    eager = quiet(sd1_folder)
    prompts = ["dog " * 90 + "BREAK a (red:1.3) apple", "a cat"]
    given: dict[str, Any] = dict(prompt_syntax="weighted", height=72, width=64, **SETTINGS)
    assert_same_pictures(ours(prompts, **given).images, eager(prompts, **given).images)


@pytest.mark.parametrize(("target", "family"), LAYERS)
def test_clip_skip_where_the_encoder_gives_its_layers(
    target: str, family: str, engine: Engine, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Of the fast layout; SDXL's encoders in any, since it always reads an earlier layer."""
    source = request.getfixturevalue(f"{family}_folder")
    if target == "aoti" or family == "sdxl":
        folder = engine(family, target)
    else:
        folder = write(source, tmp_path / "engine", target=target, layout="fast")
    given: dict[str, Any] = dict(clip_skip=1, negative_prompt="fog", **SIDES, **SETTINGS)
    assert_same_pictures(
        quiet(folder)("a cat", **given).images, quiet(source)("a cat", **given).images
    )


@pytest.mark.usefixtures("only_unets_are_traced")
@pytest.mark.parametrize("target", TARGETS)
def test_a_lora_and_a_preset_go_in_when_an_engine_is_built(
    target: str, sd1_folder: Path, tmp_path: Path
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
    request = Request(target=target, size=SIZE, layout=layout_of(target))
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
    with pytest.raises(UsageError, match="reads texts of 77 tokens, not 154; .*--dynamic"):
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
