"""What runs in int8 is chosen on the pictures that a model is made for, or not chosen at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.checkpoints import Checkpoint, open_checkpoint
from fastsd.errors import UsageError
from fastsd.export import calibration
from fastsd.export.calibration import Calibrator, calibrate_checkpoint, exact_pipeline
from fastsd.kernels.dispatch import IMPLEMENTATIONS
from fastsd.quant.draws import GUIDANCE, draw_settings
from fastsd.quant.spec import QuantSpec, shares_input
from tests.export.conftest import SIZE
from tests.fixtures import tiny_vae, write_inpainting

PROMPTS = ("a cat", "a dog")


def watched(checkpoint: Checkpoint) -> Calibrator:
    return Calibrator(checkpoint, PROMPTS, size=SIZE, steps=2, calls=1)


@torch.no_grad()
def test_what_cannot_hold_its_bound_or_its_floor_is_refused(
    sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrator = watched(open_checkpoint(sd1_folder))
    spec = calibrator.choose()
    assert calibrator.errors(spec)["unet"] <= calibration.BOUNDS["int8"]["unet"]
    with pytest.raises(
        UsageError, match=r"not 200, with \d+ layers kept.*--floor, or fp16 or fp32"
    ):
        calibrator.hold(spec, 200.0, PROMPTS)
    assert 20 < (worst := min(calibrator.judge(spec, PROMPTS))) < 100
    alone = dict(calibrator._alone)
    monkeypatch.setattr(calibration, "sensitivity", None)  # measured once, and not without need
    assert calibrator.hold(spec, worst - 0.1, PROMPTS) == spec
    calibrator.table(spec)
    assert calibrator._alone == alone

    def a_decibel_for_each_layer_kept(held: QuantSpec, prompts: Any) -> list[float]:
        return [50.0, 30.0 + len(spec.layers) - len(held.layers)]

    monkeypatch.setattr(calibrator, "judge", a_decibel_for_each_layer_kept)
    held = calibrator.hold(spec, 33.0, PROMPTS)
    assert 4 <= len(spec.layers) - len(held.layers) <= 8
    left, right = spec.layers.keys(), held.layers.keys()
    assert right < left
    inputs = {shares_input(name) for name in left - right}
    assert not [name for name in right if shares_input(name) in inputs], "one product, two types"
    monkeypatch.setitem(calibration.BOUNDS["int8"], "unet", 1e-9)
    with pytest.raises(
        UsageError, match="leaves unet at .* and 1e-09 is asked; .*Export in fp16 or fp32"
    ):
        calibrator.choose()


def test_a_model_is_watched_as_it_is_made_to_draw(sd1_folder: Path, tmp_path: Path) -> None:
    usual = draw_settings(open_checkpoint(sd1_folder).config, (64, 96), 20)
    size = {"height": 64, "width": 96}
    assert usual == {**size, "num_inference_steps": 20, "guidance_scale": GUIDANCE}
    few = open_checkpoint(sd1_folder, preset="lcm")
    assert draw_settings(few.config, (64, 96), 20) == size
    inpainting = open_checkpoint(write_inpainting(tmp_path / "inpainting", sd1_folder))
    found = draw_settings(inpainting.config, (64, 96), 20)
    assert found["image"].size == found["mask_image"].size == (96, 64)
    assert found["mask_image"].getextrema() == (0, 255)


@torch.no_grad()
def test_a_large_model_is_watched_over_every_prompt_in_few_steps(
    sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SMALL", max(SIZE) - 1)
    made: list[Calibrator] = []
    choose = Calibrator.choose

    def chosen(self: Calibrator) -> QuantSpec:
        made.append(self)
        return choose(self)

    monkeypatch.setattr(Calibrator, "choose", chosen)
    told: list[str] = []
    found = calibrate_checkpoint(
        open_checkpoint(sd1_folder), ("a cat", "a dog", "a hen"), size=SIZE, tell=told.append
    )
    assert [line for line in told if "drawn" in line][-1] == "pictures drawn: 3 of 3"
    assert found.table == {} and found.spec.layers
    (calibrator,) = made
    unet, decoder = calibrator._recorders
    assert unet._seen == 3 * 5, "a call each of PNDM's rows, one picture at a time"
    assert len(unet.calls) == 4 and len(decoder.calls) == 2 and len(decoder.calls[0][0]) == 1


@pytest.mark.parametrize("kind", ("inpainting", "tiny vae", "few steps"))
@torch.no_grad()
def test_models_of_every_kind_are_calibrated(kind: str, sd1_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    source = sd1_folder
    if kind == "inpainting":
        source = write_inpainting(tmp_path / "inpainting", sd1_folder)
    elif kind == "tiny vae":
        vae: Any = tiny_vae()
        vae.save_pretrained(tmp_path / "taesd")
        options["vae"] = tmp_path / "taesd"
    else:
        options["preset"] = "lcm"
    checkpoint = open_checkpoint(source, **options)
    found = calibrate_checkpoint(checkpoint, PROMPTS, size=SIZE)
    parts = {"unet"} if kind == "tiny vae" else {"unet", "vae.decoder"}
    assert set(found.errors) == set(found.share) == parts
    assert all(
        1e-4 < error <= calibration.BOUNDS["int8"][part] for part, error in found.errors.items()
    )


def test_what_is_exact_computes_every_op_by_the_library(sd1_folder: Path) -> None:
    """On a GPU each layer would have the fastest kernel, of ours too."""
    said = exact_pipeline(open_checkpoint(sd1_folder), "cpu", name="exact").explain()
    for op in ("attention", "group_norm", "layer_norm", "geglu", "residual", "sampler_step"):
        assert any(line.startswith(f"{op}: {IMPLEMENTATIONS[op][0]} (asked for)") for line in said)
