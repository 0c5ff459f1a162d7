"""Random models: reproducible, finite, of the true shapes, usable wherever a model is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsd import Pipeline
from fastsd.checkpoints import describe, open_checkpoint
from fastsd.checkpoints.random_weights import random_module
from fastsd.config import PRESETS, SD15, SDXL, ModelConfig, VAEConfig
from fastsd.errors import UsageError
from fastsd.models.unet import UNet


def in_small(config: ModelConfig) -> ModelConfig:
    """The same architecture with narrow layers; its text encoders are the true ones but for depth
    and width."""
    encoders = tuple(
        replace(e, width=32, mlp_width=64, layers=2, heads=2, projection=e.projection and 40)
        for e in config.text_encoders
    )
    unet = replace(
        config.unet,
        widths=tuple(32 * (i + 1) for i in range(len(config.unet.widths))),
        heads=tuple(2 for _ in config.unet.heads),
        depths=tuple(min(depth, 1) for depth in config.unet.depths),
        mid_depth=1,
        context_width=32 * len(encoders),
        pooled_width=config.unet.pooled_width and 40,
        size_width=config.unet.size_width and 8,
        norm_groups=16,
    )
    vae = replace(config.vae, widths=(16, 16, 32, 32), norm_groups=8)
    return replace(config, text_encoders=encoders, unet=unet, vae=vae)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_a_random_model_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole picture, twice the same bits, neither flat nor saturated."""
    monkeypatch.setitem(PRESETS, name, in_small(PRESETS[name]))

    def draw() -> Any:
        pipe = Pipeline.from_pretrained(f"random:{name}")
        call: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64, "seed": 0}
        output = pipe("a red apple", output_type="np", **call)
        assert output.metadata[0]["model"] == f"random:{name}"
        return output.images[0]

    first, again = draw(), draw()
    assert np.array_equal(first, again)
    assert first.std() > 0.05 and 0.01 < first.mean() < 0.99


@pytest.mark.parametrize("config", [SD15.unet, SDXL.unet], ids=["sd15", "sdxl"])
def test_activations_keep_their_size(config: Any) -> None:
    """At full depth and a quarter of the width, the prediction is of the size of its input."""
    narrow = replace(
        config,
        widths=tuple(width // 4 for width in config.widths),
        context_width=64,
        norm_groups=16,
        pooled_width=config.pooled_width and 64,
    )
    unet = random_module("unet", lambda: UNet(narrow))
    assert isinstance(unet, UNet)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    extra = (torch.zeros(1, 64), torch.zeros(1, 6)) if config.pooled_width else (None, None)
    out = unet.standard(x, 500, torch.ones(1, 7, 64), *extra)
    assert 0.1 < out.std() < 10
    again = random_module("unet", lambda: UNet(narrow), seed=1)
    assert not torch.equal(unet.conv_in.weight, again.get_parameter("conv_in.weight"))


def test_weights_have_the_variance_of_their_fan_in() -> None:
    config = replace(SD15.unet, widths=(64, 64), depths=(0, 1), heads=(2, 2))
    weights = random_module("unet", lambda: UNet(config)).state_dict()
    for name, weight in weights.items():
        if weight.dim() > 1 and weight.numel() > 10_000:
            fan_in = weight[0].numel()
            assert weight.std() * fan_in**0.5 == pytest.approx(1, rel=0.05), name
            assert abs(weight.mean()) * fan_in**0.5 < 0.05, name
        elif weight.dim() == 1 and name.endswith("weight"):
            assert weight.mean() == pytest.approx(1, abs=0.02), name


@pytest.mark.parametrize(("name", "millions"), [("sd15", (123, 860, 84)), ("sd21", (340, 866, 84))])
def test_a_random_model_is_described(name: str, millions: tuple[int, ...]) -> None:
    """Of the published parameter counts, without making a single number."""
    facts = describe(open_checkpoint(f"random:{name}"))
    parts = facts["parts"].values()
    assert tuple(round(part["parameters"] / 1e6) for part in parts) == millions


def test_ids_that_end_a_text_are_where_the_encoder_pools() -> None:
    checkpoint = open_checkpoint("random:sdxl")
    for tokenizer, encoder in zip(
        checkpoint.tokenizers, checkpoint.config.text_encoders, strict=True
    ):
        ids = tokenizer(["a red apple", ""]).ids
        assert ids.shape == (2, 77) and ids.max() == encoder.eos_token_id < encoder.vocab_size
        assert (ids[:, 0] == encoder.eos_token_id - 1).all()


def test_an_unknown_random_model_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="random:sd15, random:sd21, random:sdxl"):
        open_checkpoint("random:sd3")


def test_a_folder_of_that_name_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("random:sd15").config == SD15
    assert open_checkpoint("random:sd15").config.vae == VAEConfig()


@pytest.mark.slow
def test_true_size_draws_finite_pictures() -> None:
    pipe = Pipeline.from_pretrained("random:sd15")
    image = pipe("x", num_inference_steps=2, height=64, width=64, seed=0, output_type="np").images
    assert image.std() > 0.05
