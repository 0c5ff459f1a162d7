"""OpenVINO engines: equal to eager fp32; names, types, tokenizers that openvino-genai wants."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsd.artifact import Artifact
from fastsd.checkpoints import open_checkpoint
from fastsd.errors import UsageError
from fastsd.export.build import open_exporter
from fastsd.export.parts import Request
from fastsd.tokenizers import CLIPTokenizer
from tests.export.conftest import SIZE, write
from tests.export.test_to_onnx import draw
from tests.pictures import assert_same_pictures

openvino = pytest.importorskip("openvino", reason="the extra `openvino` is not installed")


def test_parts_and_pictures_equal_eager(sd1_openvino: Path, sd1_folder: Path) -> None:
    receipt = Artifact.open(sd1_openvino).manifest.receipt
    assert receipt is not None and receipt["backend"] == "ov"
    assert max(receipt["parts"].values()) <= 1e-4
    options: dict[str, Any] = {"sampler": "ddim"}
    for texts in ("a red apple", ["a cat", "a dog", "fog"]):
        assert_same_pictures(
            draw(sd1_openvino, texts, **options), draw(sd1_folder, texts, **options)
        )


def test_whole_timesteps_lose_nothing_silently(sd1_openvino: Path) -> None:
    with pytest.raises(UsageError, match=r"takes whole timesteps.*--layout fast"):
        draw(sd1_openvino, sampler="Euler Karras")


@pytest.mark.parametrize(
    ("sampler", "spacing", "named"),
    [
        ("euler", "linspace", "ddim"),
        ("euler", "trailing", "euler"),
        ("dpmpp_2m", "default", "ddim"),
    ],
)
def test_the_folder_names_a_sampler_of_whole_timesteps(
    sampler: str, spacing: str, named: str, sd1_folder: Path
) -> None:
    checkpoint = open_checkpoint(sd1_folder)
    schedule = replace(checkpoint.config.schedule, sampler=sampler, spacing=spacing)
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, schedule=schedule))
    exporter = open_exporter(checkpoint, Request(target="openvino", size=SIZE))
    assert exporter.described().schedule.sampler == named


def test_names_and_types_are_those_that_genai_expects(sd1_openvino: Path) -> None:
    core = openvino.Core()
    unet = core.read_model(sd1_openvino / "unet/openvino_model.xml")
    inputs = {
        value.any_name: (value.element_type.to_string(), value.shape) for value in unet.inputs
    }
    assert inputs["timestep"] == ("i64", [1])
    assert set(inputs) == {"sample", "timestep", "encoder_hidden_states"}
    assert [value.any_name for value in unet.outputs] == ["out_sample"]
    index = json.loads((sd1_openvino / "model_index.json").read_text())
    assert {"text_encoder", "unet", "vae", "scheduler", "tokenizer"} <= set(index)
    for part in ("vae_decoder", "vae_encoder", "text_encoder"):
        assert (sd1_openvino / part / "openvino_model.bin").is_file()
        assert (sd1_openvino / part / "config.json").is_file()


def test_the_tokenizer_graph_gives_our_ids(sd1_openvino: Path) -> None:
    import openvino_tokenizers  # noqa: F401  (registers its operations)

    graph = openvino.compile_model(sd1_openvino / "tokenizer/openvino_tokenizer.xml", "CPU")
    for text in ("a small red house by the sea", "it's the fox, 1998"):
        (ids,) = graph([text])["input_ids"]
        ours = CLIPTokenizer.from_folder(sd1_openvino / "tokenizer")([text]).ids[0]
        assert np.array_equal(ids, ours[: len(ids)])
        assert len(ids) >= 8


def test_no_local_path_is_inside(sd1_openvino: Path, sd1_folder: Path) -> None:
    for file in sd1_openvino.rglob("*"):
        if file.is_file():
            raw = file.read_bytes()
            assert (
                str(sd1_folder).encode() not in raw and str(sd1_openvino.parent).encode() not in raw
            )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["standard", "fast"])
def test_half_weights_dynamic_sizes_and_sdxl(
    layout: str, sdxl_folder: Path, tmp_path: Path
) -> None:
    options = {"precision": "fp16", "dynamic": True, "layout": layout}
    folder = write(sdxl_folder, tmp_path / "engine", target="openvino", **options)
    receipt = Artifact.open(folder).manifest.receipt
    assert receipt is not None and max(receipt["parts"].values()) <= 5e-3
    for size in (SIZE, (136, 72)):
        exact = draw(sdxl_folder, size=size, sampler="ddim")
        assert_same_pictures(draw(folder, size=size, sampler="ddim"), exact, bar_db=40)
    weights = sum(file.stat().st_size for file in (folder / "unet").glob("*.bin"))
    assert weights < 0.6 * (sdxl_folder / "unet/diffusion_pytorch_model.safetensors").stat().st_size
