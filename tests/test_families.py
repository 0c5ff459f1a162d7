"""Models distilled to few steps, refiners and other VAEs draw diffusers' pictures by default."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastsd.checkpoints import convert, open_checkpoint, save_folder
from fastsd.config import FEW_STEPS
from fastsd.errors import CheckpointError, UsageError
from fastsd.pipeline import Pipeline
from fastsd.quality import psnr
from tests import fixtures
from tests.checkpoints.rewrite import copied, edit_json
from tests.checkpoints.singles import SingleFile, ldm_vae, write_refiner, write_sdxl
from tests.pictures import generator, quiet, silenced

PROMPT = "a red apple on the table"
SIZE: dict[str, Any] = dict(height=64, width=64)


@pytest.fixture(scope="module")
def theirs(sd1_folder: Path) -> Any:
    return silenced(diffusers.StableDiffusionPipeline.from_pretrained(sd1_folder))


# --- few steps ------------------------------------------------------------------------------------

# preset -> diffusers' scheduler, what differs from the folder's, and the call, as makers document
DOCUMENTED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lcm": ("LCMScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 1.0}),
    "sd-turbo": (
        "EulerDiscreteScheduler",
        {"timestep_spacing": "trailing"},
        {"num_inference_steps": 1, "guidance_scale": 0.0},
    ),
    "sdxl-turbo": (
        "EulerAncestralDiscreteScheduler",
        {"timestep_spacing": "trailing"},
        {"num_inference_steps": 1, "guidance_scale": 0.0},
    ),
    "lightning-1": (
        "EulerDiscreteScheduler",
        {"timestep_spacing": "trailing", "prediction_type": "sample"},
        {"num_inference_steps": 1, "guidance_scale": 0.0},
    ),
    **{
        f"lightning-{n}": (
            "EulerDiscreteScheduler",
            {"timestep_spacing": "trailing"},
            {"num_inference_steps": n, "guidance_scale": 0.0},
        )
        for n in (2, 4, 8)
    },
    "hyper-1": ("LCMScheduler", {}, {"timesteps": [800], "guidance_scale": 0.0}),
    **{
        f"hyper-{n}": (
            "DDIMScheduler",
            {"timestep_spacing": "trailing", "clip_sample": False},
            {"num_inference_steps": n, "guidance_scale": 0.0},
        )
        for n in (2, 4, 8)
    },
}


@pytest.mark.parametrize("preset", list(FEW_STEPS))
def test_presets_draw_as_their_makers_say(preset: str, sd1_folder: Path, theirs: Any) -> None:
    name, changes, call = DOCUMENTED[preset]
    own = theirs.scheduler
    try:
        theirs.scheduler = getattr(diffusers, name).from_config(own.config, **changes)
        expected = theirs(PROMPT, generator=generator(4), output_type="np", **SIZE, **call).images
    finally:
        theirs.scheduler = own
    pipe = Pipeline.from_pretrained(sd1_folder, preset=preset)
    output = pipe(PROMPT, generator=generator(4), output_type="np", **SIZE)
    assert psnr(output.images, expected) > 80
    assert output.metadata[0]["steps"] == call.get("num_inference_steps", 1)
    assert output.metadata[0]["guidance_scale"] == call["guidance_scale"]


@pytest.mark.parametrize("preset", list(FEW_STEPS))
def test_a_converted_folder_keeps_its_preset(preset: str, sd1_folder: Path, tmp_path: Path) -> None:
    """Our settings and diffusers', with nothing said when it is opened."""
    convert(sd1_folder, kept := tmp_path / "kept", dtype="fp32", preset=preset)
    told = open_checkpoint(sd1_folder, preset=preset).config
    assert open_checkpoint(kept).config.schedule == told.schedule
    name, changes, _ = DOCUMENTED[preset]
    scheduler = json.loads((kept / "scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == name and changes.items() <= scheduler.items()


def test_another_preset_leaves_nothing_of_the_first(sd1_folder: Path, tmp_path: Path) -> None:
    convert(sd1_folder, tmp_path / "one", dtype="fp32", preset="hyper-1")
    again, plain = (
        open_checkpoint(p, preset="lightning-4").config.schedule
        for p in (tmp_path / "one", sd1_folder)
    )
    assert (again.timesteps, again.steps, again.sampler) == (None, 4, plain.sampler)
    convert(sd1_folder, tmp_path / "x0", dtype="fp32", preset="lightning-1")
    with pytest.raises(UsageError, match="predicts x0, as lightning-1 does"):
        open_checkpoint(tmp_path / "x0", preset="lightning-4")


# of those that differ in the prediction, the timesteps or the sampler, and not in steps alone
@pytest.mark.parametrize("preset", ["lcm", "lightning-1", "hyper-1", "hyper-4"])
def test_a_converted_folder_draws_by_its_preset(
    preset: str, sd1_folder: Path, tmp_path: Path
) -> None:
    """Nothing need be said to draw with it, and diffusers needs no more than steps and guidance."""
    convert(sd1_folder, tmp_path / "kept", dtype="fp32", preset=preset)
    ours = quiet(tmp_path / "kept")
    output = ours(PROMPT, generator=generator(4), output_type="np", **SIZE)
    told = quiet(sd1_folder, preset=preset)
    again = told(PROMPT, generator=generator(4), output_type="np", **SIZE)
    np.testing.assert_array_equal(output.images, again.images)
    for setting in ("steps", "guidance_scale", "timesteps", "sampler"):
        assert output.metadata[0][setting] == again.metadata[0][setting]
    assert json.loads(json.dumps(output.metadata)) == output.metadata
    theirs = silenced(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "kept"))
    assert type(theirs.scheduler).__name__ == DOCUMENTED[preset][0]
    call = DOCUMENTED[preset][2]
    expected = theirs(PROMPT, generator=generator(4), output_type="np", **SIZE, **call).images
    assert psnr(output.images, expected) > 80


def test_an_unknown_preset_names_those_there_are(sd1_folder: Path) -> None:
    with pytest.raises(UsageError, match="preset 'lightning-3' is unknown; .*lightning-4"):
        open_checkpoint(sd1_folder, preset="lightning-3")


def test_folders_say_what_they_are(sdxl_folder: Path, sd1_folder: Path, tmp_path: Path) -> None:
    """LCM by its scheduler, Turbo by trailing noise prediction at 512 pixels; others are not."""
    assert open_checkpoint(sdxl_folder).config.schedule.steps is None
    turbo = copied(sdxl_folder, tmp_path / "turbo")
    edit_json(turbo / "unet/config.json", {"sample_size": 64})
    scheduler = turbo / "scheduler/scheduler_config.json"
    edit_json(scheduler, {"timestep_spacing": "trailing"})
    schedule = open_checkpoint(turbo).config.schedule
    assert (schedule.steps, schedule.guidance, schedule.sampler) == (1, 0.0, "euler")
    edit_json(scheduler, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    assert open_checkpoint(turbo).config.schedule.steps is None

    lcm = copied(sd1_folder, tmp_path / "lcm")
    edit_json(lcm / "model_index.json", {"scheduler": ["diffusers", "LCMScheduler"]})
    edit_json(lcm / "scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"})
    schedule = open_checkpoint(lcm).config.schedule
    assert (schedule.steps, schedule.guidance, schedule.sampler) == (4, 1.0, "lcm")


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("sdxl_lightning_4step", "one of lightning-4$"),
        ("Hyper-SDXL-8steps", "one of hyper-8$"),
        ("dreamshaperTurbo", "one of sd-turbo, sdxl-turbo$"),
        ("my-lcm", "one of lcm$"),
        ("plain", None),
    ],
)
def test_a_name_gives_a_hint_only(
    name: str,
    named: str | None,
    sd1_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / name
    path.symlink_to(sd1_folder)
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(path).config == open_checkpoint(sd1_folder).config
    hints = [record.getMessage() for record in caplog.records]
    assert len(hints) == (named is not None)
    if named:
        import re

        assert re.search(named, hints[0])
        with caplog.at_level(logging.WARNING):
            open_checkpoint(path, preset="lcm")
        assert len(caplog.records) == 1


# --- the refiner ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[SingleFile, SingleFile]:
    folder = tmp_path_factory.mktemp("stages")
    return write_sdxl(folder / "base"), write_refiner(folder / "refiner")


@pytest.mark.parametrize("form", ["folder", "file"])
def test_the_refiner_goes_on_where_the_base_stopped(
    form: str, stages: tuple[SingleFile, SingleFile]
) -> None:
    call: dict[str, Any] = dict(num_inference_steps=5, guidance_scale=4.0)

    def both(base: Any, refiner: Any) -> np.ndarray:
        first = base(
            PROMPT, generator=generator(4), denoising_end=0.6, output_type="latent", **SIZE, **call
        ).images
        picture: np.ndarray = refiner(
            PROMPT,
            image=first,
            denoising_start=0.6,
            generator=generator(4),
            output_type="np",
            aesthetic_score=7.0,
            **call,
        ).images
        return picture

    options: dict[str, Any] = {"add_watermarker": False}
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(stages[0].folder, **options)
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    refiner = kind.from_pretrained(stages[1].folder, **options)
    expected = both(silenced(base), silenced(refiner))
    if form == "folder":
        ours = [Pipeline.from_pretrained(stage.folder) for stage in stages]
    else:
        ours = [Pipeline.from_pretrained(s.file, tokenizer=s.tokenizer) for s in stages]
    assert psnr(both(*ours), expected) > 80


# --- other VAEs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Any:
    return fixtures.tiny_vae()


@pytest.fixture
def with_tiny(theirs: Any, tiny: Any) -> Any:
    yield diffusers.StableDiffusionPipeline(**{**theirs.components, "vae": tiny})


def write_folder(vae: Any, to: Path) -> Path:
    vae.save_pretrained(to)
    return to


def write_file(vae: Any, to: Path) -> Path:
    save_file(vae.state_dict(), to)
    return to


@pytest.mark.parametrize("write", [write_folder, write_file])
def test_a_tiny_autoencoder_decodes_as_diffusers_does(
    write: Callable[[Any, Path], Path], with_tiny: Any, tiny: Any, sd1_folder: Path, tmp_path: Path
) -> None:
    call: dict[str, Any] = dict(num_inference_steps=2, output_type="np", **SIZE)
    expected = silenced(with_tiny)(PROMPT, generator=generator(4), **call).images
    pipe = Pipeline.from_pretrained(sd1_folder, vae=write(tiny, tmp_path / "tiny"))
    assert psnr(pipe(PROMPT, generator=generator(4), **call).images, expected) > 80


def test_a_tiny_autoencoder_encodes_as_diffusers_does(
    with_tiny: Any, tiny: Any, sd1_folder: Path, tmp_path: Path
) -> None:
    picture = torch.rand(1, 3, 64, 64, generator=generator(4))
    call: dict[str, Any] = dict(num_inference_steps=4, strength=0.5, output_type="np")
    changing = diffusers.StableDiffusionImg2ImgPipeline(
        **with_tiny.components, requires_safety_checker=False
    )
    expected = silenced(changing)(PROMPT, image=picture, generator=generator(4), **call).images
    pipe = Pipeline.from_pretrained(sd1_folder, vae=write_folder(tiny, tmp_path / "tiny"))
    ours = pipe(PROMPT, image=picture, generator=generator(4), **call).images
    assert psnr(ours, expected) > 80


@pytest.mark.parametrize("form", ["folder", "original", "original-prefixed", "diffusers"])
def test_another_vae(form: str, theirs: Any, sd1_folder: Path, tmp_path: Path) -> None:
    """Of a file the scale is the model's own; every form gives the same picture."""
    torch.manual_seed(7)
    other = fixtures.vae(norm_num_groups=8)
    if form == "folder":
        path = write_folder(other, tmp_path / "vae")
    else:
        tensors = dict(other.state_dict()) if form == "diffusers" else ldm_vae(other.state_dict())
        if form == "original":
            tensors = {k.removeprefix("first_stage_model."): v for k, v in tensors.items()}
        save_file(tensors, path := tmp_path / "vae.safetensors")
    call: dict[str, Any] = dict(num_inference_steps=2, output_type="np", **SIZE)
    pipe = diffusers.StableDiffusionPipeline(**{**theirs.components, "vae": other})
    expected = silenced(pipe)(PROMPT, generator=generator(4), **call).images
    ours = Pipeline.from_pretrained(sd1_folder, vae=path)
    assert psnr(ours(PROMPT, generator=generator(4), **call).images, expected) > 80


def test_what_is_no_vae_for_it(sd1_folder: Path, tiny: Any, tmp_path: Path) -> None:
    wide = fixtures.vae(latent_channels=16)
    decoder = {f"decoder.{k}": v for k, v in tiny.decoder.state_dict().items()}
    save_file(decoder, half := tmp_path / "half.safetensors")
    for vae, message in (
        (write_folder(wide, tmp_path / "wide"), "16 channels, .*another family"),
        (half, "encoder"),
        (sd1_folder / "unet", "its class is 'UNet2DConditionModel'"),
        (sd1_folder / "unet/diffusion_pytorch_model.safetensors", "by its keys it is a UNet"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(sd1_folder, vae=vae)


def test_a_tiny_autoencoder_is_saved_and_read_again(
    sd1_folder: Path, tiny: Any, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(sd1_folder, vae=write_folder(tiny, tmp_path / "tiny"))
    modules = {part: checkpoint.load(part) for part in checkpoint.parts}
    folder = tmp_path / "saved"
    save_folder(folder, checkpoint.config, modules, checkpoint.tokenizers, dtype=torch.float32)
    assert json.loads((folder / "model_index.json").read_text())["vae"][1] == "AutoencoderTiny"
    assert open_checkpoint(folder).config.vae == checkpoint.config.vae
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert type(pipe.vae).__name__ == "AutoencoderTiny"


# --- previews -------------------------------------------------------------------------------------


def test_previews_are_what_the_model_is_on_its_way_to(
    sd1_folder: Path, tiny: Any, tmp_path: Path
) -> None:
    """One a step; the last is the picture itself. A tiny autoencoder decodes them if loaded."""
    pipe = Pipeline.from_pretrained(sd1_folder)
    seen: list[Any] = []
    call: dict[str, Any] = dict(num_inference_steps=4, sampler="euler", seed=1, **SIZE)
    both = [PROMPT, "a cat"]

    def show(step: int, pictures: list[Any]) -> None:
        assert step == len(seen) and len(pictures) == 2
        seen.append(pictures)

    images = pipe(both, preview=show, **call).images
    assert len(seen) == 4
    assert [image.tobytes() for image in seen[-1]] == [image.tobytes() for image in images]
    assert seen[0][0].tobytes() != images[0].tobytes()
    plain = pipe(both, **call).images
    assert plain[1].tobytes() == images[1].tobytes()

    pipe.load_preview_vae(write_folder(tiny, tmp_path / "tiny"))
    seen.clear()
    latents = pipe(both, preview=show, output_type="latent", **call).images
    expected = (tiny.decode(latents).sample / 2 + 0.5).clamp(0, 1)[1]
    shown = torch.tensor(list(seen[-1][1].tobytes())).view(64, 64, 3).permute(2, 0, 1) / 255
    assert float((shown - expected).abs().max()) < 1 / 254
