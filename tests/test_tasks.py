"""Image to image, inpainting, outpainting: the picture is diffusers'; what is kept is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd import Pipeline
from fastsd.benchmarks.baselines import diffusers_pipeline
from fastsd.errors import UsageError
from fastsd.images import to_tensor
from tests import fixtures
from tests.checkpoints.rewrite import WEIGHTS, copied, edit_json, edit_weights
from tests.pictures import SIZE, assert_same_pictures, generator, mask, picture, quiet, silenced

FAMILIES = ["sd1_folder", "sd2_folder", "sdxl_folder"]
PROMPT = "a small red house by the sea"


@pytest.fixture(scope="module")
def inpainting_folders(
    sd1_folder: Path,
    sd2_folder: Path,
    sdxl_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Checkpoints whose UNet takes the mask and the rest of the picture."""
    where = tmp_path_factory.mktemp("inpainting")
    return {
        "sd1": fixtures.write_inpainting(where / "sd1", sd1_folder),
        "sd2": fixtures.write_inpainting(where / "sd2", sd2_folder),
        "sdxl": fixtures.write_inpainting(where / "sdxl", sdxl_folder),
    }


def their_pipeline(folder: Path, task: str) -> Any:
    """Return diffusers' pipeline for the task, over the same parts."""
    import diffusers

    text = diffusers_pipeline(folder)
    xl = "XL" if hasattr(text, "text_encoder_2") else ""
    kind = getattr(diffusers, f"StableDiffusion{xl}{task}Pipeline")
    if isinstance(text, kind):
        return text
    own = {"add_watermarker": False} if xl else {"requires_safety_checker": False}
    parts = {k: v for k, v in text.components.items() if k != "image_encoder"}
    return silenced(kind(**parts, **own))


def set_sampler(pipeline: Any, name: str) -> None:
    import diffusers

    from fastsd.samplers import SAMPLERS

    kind = getattr(diffusers, SAMPLERS[name].scheduler)
    own = {"clip_sample": False}  # as diffusers' text-to-image pipeline has it
    pipeline.scheduler = kind.from_config({**pipeline.scheduler.config, **own})


# --- image to image
# --------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.35, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_image_to_image(family: str, strength: float, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    settings: dict[str, Any] = dict(
        image=picture(),
        strength=strength,
        negative_prompt="fog",
        num_inference_steps=8,
        output_type="np",
    )
    ours = quiet(folder)(PROMPT, seed=3, **settings)
    theirs = their_pipeline(folder, "Img2Img")(PROMPT, generator=generator(3), **settings)
    assert_same_pictures(ours.images, theirs.images)
    assert ours.images.shape == (1, *SIZE, 3)
    assert ours.metadata[0]["steps"] == 8 and ours.metadata[0]["strength"] == strength


@pytest.mark.parametrize("sampler", ["euler_a", "heun", "dpmpp_2m", "dpmpp_2s", "unipc", "ddim"])
def test_image_to_image_with_each_kind_of_sampler(sampler: str, sd1_folder: Path) -> None:
    """Multistep solvers start with an empty history; stochastic ones draw after the encoder."""
    theirs = their_pipeline(sd1_folder, "Img2Img")
    set_sampler(theirs, sampler)
    settings: dict[str, Any] = dict(
        image=picture(), strength=0.6, num_inference_steps=9, output_type="np"
    )
    ours = quiet(sd1_folder)(PROMPT, seed=1, sampler=sampler, **settings).images
    assert_same_pictures(ours, theirs(PROMPT, generator=generator(1), **settings).images)


@pytest.mark.parametrize("family", ["sd1_folder", "sdxl_folder"])
def test_image_to_image_defaults_and_sizes(family: str, request: pytest.FixtureRequest) -> None:
    """Nothing but a picture of an odd size is given: diffusers shrinks it to whole latents."""
    folder = request.getfixturevalue(family)
    theirs = their_pipeline(folder, "Img2Img")
    odd = picture((75, 61))
    ours = quiet(folder)(PROMPT, image=odd, generator=generator(0), output_type="np").images
    assert ours.shape[1:3] == (72, 56)
    reference = theirs(PROMPT, image=odd, generator=generator(0), output_type="np").images
    assert_same_pictures(ours, reference)


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_image_to_image_of_a_latent_consistency_model(
    strength: float, sd1_folder: Path, tmp_path: Path
) -> None:
    """All steps are walked, from lower down, where other models leave out the first."""
    import diffusers

    path = copied(sd1_folder, tmp_path)
    edit_json(path / "unet" / "config.json", {"time_cond_proj_dim": 24})
    torch.manual_seed(0)
    key = "time_embedding.cond_proj.weight"
    edit_weights(path / WEIGHTS["unet"], lambda t: t | {key: torch.randn(32, 24)})
    parts = diffusers_pipeline(path).components
    scheduler = diffusers.LCMScheduler()
    kind = diffusers.LatentConsistencyModelImg2ImgPipeline
    own = {"scheduler": scheduler, "requires_safety_checker": False}
    theirs = silenced(kind(**{k: v for k, v in parts.items() if k != "image_encoder"} | own))
    scheduler.save_pretrained(path / "scheduler")
    index = {"_class_name": "LatentConsistencyModelPipeline"}
    edit_json(path / "model_index.json", index | {"scheduler": ["diffusers", "LCMScheduler"]})
    settings: dict[str, Any] = dict(
        image=picture(),
        strength=strength,
        num_inference_steps=4,
        guidance_scale=6.0,
        output_type="np",
    )
    ours = quiet(path)(PROMPT, seed=3, **settings)
    assert_same_pictures(ours.images, theirs(PROMPT, generator=generator(3), **settings).images)
    assert ours.metadata[0]["steps"] == 4 and ours.metadata[0]["timesteps"] is None


def test_pictures_in_every_form(sd1_folder: Path) -> None:
    pipe = quiet(sd1_folder)
    given = picture()
    tensor = to_tensor(given)
    latents = torch.randn((1, 4, SIZE[0] // 8, SIZE[1] // 8), generator=generator(5))
    settings: dict[str, Any] = dict(num_inference_steps=3, strength=0.7, output_type="np")

    def draw(image: Any) -> Any:
        return pipe(PROMPT, image=image, seed=2, **settings).images

    expected = draw(given)
    array = np.asarray(given)
    forms = [tensor, tensor[0], [tensor], array, array[None], array.astype(np.float64) / 255]
    for form in [*forms, [given], given.convert("RGBA")]:
        assert_same_pictures(draw(form), expected, 100)
    theirs = their_pipeline(sd1_folder, "Img2Img")
    reference = theirs(PROMPT, image=latents, generator=generator(2), **settings).images
    assert_same_pictures(draw(latents), reference)


def test_image_to_image_in_batches(sd1_folder: Path) -> None:
    """One generator draws jointly; several draw each their own, alone or together."""
    pipe, theirs = quiet(sd1_folder), their_pipeline(sd1_folder, "Img2Img")
    settings: dict[str, Any] = dict(num_inference_steps=4, strength=0.8, output_type="np")
    prompts, pictures = [PROMPT, "a cat"], [picture(seed=1), picture(seed=2)]
    for make in (lambda: generator(5), lambda: [generator(7), generator(8)]):
        ours = pipe(prompts, image=pictures, generator=make(), **settings)
        reference = theirs(prompts, image=pictures, generator=make(), **settings)
        assert_same_pictures(ours.images, reference.images)
    digests = [m["image_sha256"] for m in ours.metadata]
    assert digests[0] != digests[1]
    together = pipe(prompts, image=pictures, seed=[3, 4], batch_invariant=True, **settings).images
    alone = pipe("a cat", image=pictures[1], seed=4, batch_invariant=True, **settings).images
    np.testing.assert_array_equal(together[1], alone[0])


def test_variations_are_image_to_image_under_several_seeds(sd1_folder: Path) -> None:
    pipe = quiet(sd1_folder)
    settings: dict[str, Any] = dict(
        image=picture(), strength=0.5, num_inference_steps=4, output_type="np"
    )
    several = pipe("", seed=10, num_images_per_prompt=3, **settings)
    assert np.abs(several.images[0] - several.images[1]).max() > 0.01
    for i, drawn in enumerate(several.images):
        assert_same_pictures(pipe("", seed=10 + i, **settings).images, drawn[None], 60)


# --- inpainting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_inpainting_with_any_checkpoint(
    family: str, strength: float, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    settings: dict[str, Any] = dict(
        image=picture(),
        mask_image=mask(),
        strength=strength,
        negative_prompt="fog",
        num_inference_steps=8,
        output_type="np",
    )
    ours = quiet(folder)(PROMPT, seed=3, **settings).images
    theirs = their_pipeline(folder, "Inpaint")
    size = dict(height=SIZE[0], width=SIZE[1])
    reference = theirs(PROMPT, generator=generator(3), **size, **settings).images
    assert_same_pictures(ours, reference)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_inpainting_with_its_own_checkpoint(
    family: str, guidance: float, strength: float, inpainting_folders: dict[str, Path]
) -> None:
    folder = inpainting_folders[family]
    settings: dict[str, Any] = dict(
        image=picture(),
        mask_image=mask(),
        strength=strength,
        guidance_scale=guidance,
        num_inference_steps=6,
        output_type="np",
    )
    ours = quiet(folder)(PROMPT, seed=3, **settings).images
    theirs = their_pipeline(folder, "Inpaint")
    size = dict(height=SIZE[0], width=SIZE[1])
    reference = theirs(PROMPT, generator=generator(3), **size, **settings).images
    assert_same_pictures(ours, reference)


@pytest.mark.parametrize("sampler", ["euler_a", "heun", "dpmpp_2m", "dpmpp_2m_sde", "lcm"])
def test_inpainting_with_each_kind_of_sampler(sampler: str, sd1_folder: Path) -> None:
    """The known picture is at the level of the next row; generators advance as in diffusers."""
    theirs = their_pipeline(sd1_folder, "Inpaint")
    set_sampler(theirs, sampler)
    if sampler == "dpmpp_2m_sde":
        theirs.scheduler.register_to_config(algorithm_type="sde-dpmsolver++")
    settings: dict[str, Any] = dict(
        image=picture(), mask_image=mask(), strength=0.7, num_inference_steps=9, output_type="np"
    )
    size = dict(height=SIZE[0], width=SIZE[1])
    ours = quiet(sd1_folder)(PROMPT, seed=1, sampler=sampler, **settings).images
    reference = theirs(PROMPT, generator=generator(1), **size, **settings).images
    assert_same_pictures(ours, reference)


@pytest.mark.parametrize("family", ["sd1_folder", "sdxl_folder"])
def test_inpainting_defaults_and_resized_pictures(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    size = (75, 61)
    settings: dict[str, Any] = dict(
        image=picture(size), mask_image=mask(size).convert("RGB"), height=96, width=80
    )
    ours = quiet(folder)(PROMPT, generator=generator(0), output_type="np", **settings).images
    theirs = their_pipeline(folder, "Inpaint")
    reference = theirs(PROMPT, generator=generator(0), output_type="np", **settings).images
    assert_same_pictures(ours, reference)


def test_inpainting_in_batches(sd1_folder: Path, inpainting_folders: dict[str, Path]) -> None:
    pictures, masks = [picture(seed=1), picture(seed=2)], [mask(), mask(box=(0, 0, 40, 24))]
    settings: dict[str, Any] = dict(
        image=pictures, mask_image=masks, num_inference_steps=4, strength=0.9, output_type="np"
    )
    size = dict(height=SIZE[0], width=SIZE[1])
    for folder in (sd1_folder, inpainting_folders["sd1"]):
        theirs, pipe = their_pipeline(folder, "Inpaint"), quiet(folder)
        for make in (lambda: generator(5), lambda: [generator(7), generator(8)]):
            ours = pipe([PROMPT, "a cat"], generator=make(), **settings).images
            reference = theirs([PROMPT, "a cat"], generator=make(), **size, **settings).images
            assert_same_pictures(ours, reference)
        invariant = {**settings, "batch_invariant": True}
        together = pipe([PROMPT, "a cat"], seed=[3, 4], **invariant).images
        invariant |= {"image": pictures[1], "mask_image": masks[1]}
        np.testing.assert_array_equal(together[1], pipe("a cat", seed=4, **invariant).images[0])


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("feather", [0, 1, 6, 9])
def test_pixels_outside_the_mask_are_kept_bit_for_bit(feather: int, sd1_folder: Path) -> None:
    pipe, given = quiet(sd1_folder), picture()
    settings: dict[str, Any] = dict(
        image=given, mask_image=mask(), num_inference_steps=3, seed=0, strength=1.0
    )
    plain = np.asarray(pipe(PROMPT, **settings).images[0])
    kept = np.asarray(pipe(PROMPT, mask_feather=feather, **settings).images[0])
    inside = np.asarray(mask()) > 0
    far = np.ones(SIZE, bool)
    far[12 - feather : 50 + feather, 20 - feather : 44 + feather] = False
    np.testing.assert_array_equal(kept[far], np.asarray(given)[far])
    np.testing.assert_array_equal(kept[inside], plain[inside])
    assert (plain[far] != np.asarray(given)[far]).mean() > 0.5, "without it they are only near"


def test_outpainting_keeps_the_picture_and_draws_the_rest(sd1_folder: Path) -> None:
    pipe, given = quiet(sd1_folder), picture((60, 50))
    settings: dict[str, Any] = dict(num_inference_steps=4, seed=0)
    wide = pipe(PROMPT, image=given, outpaint=(6, 4, 24, 0), mask_feather=0, **settings).images[0]
    assert wide.size == (80, 64)
    np.testing.assert_array_equal(np.asarray(wide)[4:64, 6:56], np.asarray(given))

    canvas = Image.fromarray(np.pad(np.asarray(given), ((4, 0), (6, 24), (0, 0)), "edge"))
    new = np.full((64, 80), 255, np.uint8)
    new[4:64, 6:56] = 0
    settings = dict(num_inference_steps=4, height=64, width=80, output_type="np")
    theirs = their_pipeline(sd1_folder, "Inpaint")
    reference = theirs(
        PROMPT,
        image=canvas,
        mask_image=Image.fromarray(new),
        generator=generator(0),
        strength=1.0,
        **settings,
    ).images
    ours = pipe(
        PROMPT,
        image=given,
        outpaint=(6, 4, 24, 0),
        seed=0,
        num_inference_steps=4,
        output_type="np",
    ).images
    assert_same_pictures(ours, reference)


# --- guidance rescale, two stages ----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_rescale(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    settings: dict[str, Any] = dict(
        num_inference_steps=5, guidance_scale=9.0, guidance_rescale=0.7, output_type="np"
    )
    ours = quiet(folder)(PROMPT, seed=0, **settings).images
    theirs = diffusers_pipeline(folder)(PROMPT, generator=generator(0), **settings).images
    assert_same_pictures(ours, theirs)
    settings["guidance_rescale"] = 0.0
    assert np.abs(ours - quiet(folder)(PROMPT, seed=0, **settings).images).max() > 0.01


def test_two_stages(sdxl_folder: Path) -> None:
    """One model stops early and hands its latents on."""
    first: dict[str, Any] = dict(num_inference_steps=10, denoising_end=0.6, output_type="latent")
    second: dict[str, Any] = dict(num_inference_steps=10, denoising_start=0.6, output_type="np")
    pipe = quiet(sdxl_folder)
    latents = pipe(PROMPT, seed=0, **first).images
    ours = pipe(PROMPT, image=latents, seed=1, **second).images
    reference = diffusers_pipeline(sdxl_folder)(PROMPT, generator=generator(0), **first).images
    torch.testing.assert_close(latents, reference, rtol=1e-4, atol=1e-4)
    theirs = their_pipeline(sdxl_folder, "Img2Img")
    reference = theirs(PROMPT, image=reference, generator=generator(1), **second).images
    assert_same_pictures(ours, reference)
    whole = pipe(PROMPT, seed=0, num_inference_steps=10, output_type="np").images
    assert_same_pictures(ours, whole, 80)


def test_the_refiner_as_second_stage(sdxl_folder: Path, tmp_path: Path) -> None:
    """One text encoder, and a score in place of the target size: another for the negative half."""
    folder = fixtures.write_refiner(tmp_path / "refiner")
    base: dict[str, Any] = dict(num_inference_steps=8, denoising_end=0.7, output_type="latent")
    latents = quiet(sdxl_folder)(PROMPT, seed=0, **base).images
    settings: dict[str, Any] = dict(
        num_inference_steps=8,
        denoising_start=0.7,
        negative_prompt="fog",
        prompt_2="never read",
        original_size=(100, 120),
        crops_coords_top_left=(8, 0),
        output_type="np",
    )
    pipe, theirs = quiet(folder), diffusers_pipeline(folder)
    assert pipe.config.family == "sdxl-refiner" and pipe.config.unet.size_ids == 5
    told: dict[str, Any] = dict(aesthetic_score=8.0, negative_aesthetic_score=1.0)
    for scores in ({}, told):
        ours = pipe(PROMPT, image=latents, seed=1, **settings, **scores)
        reference = theirs(
            PROMPT, image=latents, generator=generator(1), **settings, **scores
        ).images
        assert_same_pictures(ours.images, reference, 90)
    assert ours.metadata[0]["aesthetic_score"] == 8.0
    settings = dict(image=picture(), num_inference_steps=5, output_type="np")
    ours = pipe(PROMPT, seed=1, **settings)  # a picture, and the defaults
    assert_same_pictures(ours.images, theirs(PROMPT, generator=generator(1), **settings).images)


# --- mistakes ------------------------------------------------------------------------------------

NAN = np.full((*SIZE, 3), np.nan, np.float32)
LATENTS = torch.zeros(1, 4, 9, 7)
GLASS = Image.new("RGBA", (56, 72), (0, 0, 0, 100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mask_image=mask()), "mask_image is for drawing on a picture"),
        (dict(strength=0.5), "strength says how much.*give image"),
        (dict(mask_feather=3), "mask_feather is for"),
        (dict(outpaint=(8, 8, 8, 8)), "outpaint is for"),
        (dict(image=picture(), strength=1.5), "strength must be from 0 to 1, not 1.5"),
        (dict(image=picture(), strength=-0.1), "strength must be from 0 to 1"),
        (dict(image=picture(), strength=float("nan")), "strength must be a finite number"),
        (dict(image=picture(), strength="1"), "strength must be a finite number"),
        (dict(image=picture(), strength=0.05), "strength 0.05 of 4 steps is less than one"),
        (dict(image=NAN), "image holds values from nan to nan"),
        (dict(image=2 * torch.rand(1, 3, 8, 8) - 1.5), "image holds values from -"),
        (dict(image=torch.zeros(1, 2, 8, 8)), r"image has shape \(1, 2, 8, 8\), expected"),
        (dict(image=np.zeros((8, 8, 4))), r"expected \(H, W, 3\) or \(B, H, W, 3\)"),
        (dict(image=np.zeros((0, 8, 3))), r"shape \(0, 8, 3\)"),
        (dict(image=np.zeros((8, 8, 3), np.int64)), "holds int64"),
        (dict(image="a.png"), "not str; read files with"),
        (dict(image=[]), "image is an empty list"),
        (dict(image=[picture(), picture((64, 64))]), "several sizes"),
        (dict(image=[picture()] * 2), "2 pictures were given for 1 prompts"),
        (dict(image=GLASS), "transparent pixels"),
        (dict(image=Image.new("CMYK", (56, 72))), "mode 'CMYK'"),
        (dict(image=Image.new("F", (56, 72))), "mode 'F'"),
        (dict(image=picture((7, 72))), "72x7 pixels; it needs 8 or more"),
        (dict(image=picture(), height=100), "multiple of 8"),
        (dict(image=np.zeros((12, 16, 3))), "16x12 pixels, expected 16x8"),
        (dict(image=LATENTS * float("nan")), "latents with NaN"),
        (dict(image=LATENTS, height=80), "latents of 56x72 pixels"),
        (dict(image=picture(), mask_image=mask((72, 64))), "64x72 pixels, image 56x72"),
        (dict(image=picture(), mask_image=Image.new("L", (56, 72))), "mask_image is black"),
        (dict(image=picture(), mask_image=mask(box=(1, 1, 7, 7))), "smaller than 8 pixels"),
        (dict(image=picture(), mask_image=GLASS), "mask_image has transparent"),
        (dict(image=picture(), mask_image=NAN[..., 0]), "mask_image holds values from nan"),
        (dict(image=picture(), mask_image=[mask()] * 2), "2 masks were given for 1 pictures"),
        (dict(image=picture(), mask_image=mask(), mask_feather=-1), "mask_feather must be"),
        (dict(image=picture(), mask_image=mask(), mask_feather=0.5), "mask_feather must be"),
        (dict(image=picture(), mask_image=mask(), mask_feather=10**9), "wider than the picture"),
        (dict(image=picture(), mask_feather=4), "give mask_image or outpaint"),
        (dict(image=LATENTS, mask_image=mask(), mask_feather=4), "not latents"),
        (
            dict(image=picture((75, 61)), mask_image=mask((75, 61)), mask_feather=0),
            "crop it, or resize it with width=56, height=72",
        ),
        (dict(image=picture(), outpaint=(8, 8, 8)), "outpaint takes the pixels"),
        (dict(image=picture(), outpaint=(0, 0, 0, 0)), "not all 0"),
        (dict(image=picture(), outpaint=(8, 0, -8, 0)), "whole numbers of 0 or more"),
        (dict(image=picture(), outpaint=(5, 0, 0, 0)), "make 61x72 pixels"),
        (dict(image=picture(), outpaint=(8, 0, 0, 0), mask_image=mask()), "drop mask_image"),
        (dict(image=picture(), outpaint=(8, 0, 0, 0), height=72), "drop mask_image, height"),
        (dict(image=LATENTS, outpaint=(8, 0, 0, 0)), "image holds latents"),
        (dict(denoising_start=0.5), "goes on from latents"),
        (dict(image=picture(), denoising_start=0.5), "goes on from latents"),
        (dict(image=LATENTS, mask_image=mask(), denoising_start=0.5), "without a mask"),
        (dict(image=LATENTS, strength=0.5, denoising_start=0.5), "drop it"),
        (dict(denoising_end=1.5), "denoising_end must lie between 0 and 1"),
        (dict(padding_mask_crop=8), "crop the picture and the mask"),
        (dict(ip_adapter_image=picture()), "not supported yet"),
        (dict(guidance_rescale=2), "guidance_rescale must be from 0 to 1"),
    ],
)
def test_bad_arguments(sd1_pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sd1_pipe(PROMPT, num_inference_steps=4, **arguments)


@pytest.fixture(scope="module")
def sd1_pipe(sd1_folder: Path) -> Pipeline:
    return quiet(sd1_folder)


def test_a_model_that_inpaints_wants_a_mask(inpainting_folders: dict[str, Path]) -> None:
    pipe = quiet(inpainting_folders["sd1"])
    for arguments in ({}, {"image": picture()}, {"image": LATENTS, "mask_image": mask()}):
        with pytest.raises(UsageError, match="this model inpaints; give"):
            pipe(PROMPT, num_inference_steps=1, **arguments)
