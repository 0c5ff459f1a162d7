"""What is supported, and what proves it: the rows that `fastsd models` prints.

One row a family, file form, adapter or task. `test` names the test that holds it, which the suite
checks to exist; `held_to` says against what and how closely. Knows nothing of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("family", "few steps", "file", "VAE", "adapter", "task")


@dataclass(frozen=True)
class Row:
    """kind: one of KINDS. note: how to ask for it, or its limits. test: path::function.

    engines: the targets of `fastsd export` whose engines were run on it, > 60 dB to eager
    (tests/export/test_tasks_on_engines.py).
    """

    kind: str
    name: str
    note: str
    held_to: str
    test: str
    engines: tuple[str, ...] = ()


_PICTURES = "diffusers' pictures, > 50 dB"
_PIPELINE = "tests/test_pipeline.py::test_equals_diffusers"
_SINGLE = "tests/checkpoints/test_single.py::test_every_tensor_is_what_diffusers_converts"
_FEW = "tests/test_families.py::test_presets_draw_as_their_makers_say"
_LORA = "tests/test_adapters.py::test_pictures_equal_diffusers"
_CONVERTED = "diffusers' converter: identical tensors"
_CLOSE = "diffusers' pictures, > 80 dB"
_TASKS = "tests/test_tasks.py::"
_ENGINES = "tests/export/test_tasks_on_engines.py::"
_ALL = ("onnx", "openvino", "aoti")  # TensorRT's and aoti-cuda's need a GPU to run

ROWS = (
    Row("family", "Stable Diffusion 1.x", "eps; PNDM and others", _PICTURES, _PIPELINE, _ALL),
    Row("family", "Stable Diffusion 2.x", "v or eps (--prediction)", _PICTURES, _PIPELINE, _ALL),
    Row("family", "SDXL", "sizes and crops as arguments", _PICTURES, _PIPELINE, _ALL),
    Row(
        "family",
        "SDXL refiner",
        "second stage: denoising_end, denoising_start",
        _CLOSE,
        "tests/test_families.py::test_the_refiner_goes_on_where_the_base_stopped",
    ),
    Row(
        "family",
        "inpainting models",
        "UNets of 9 channels: 1.x, 2.x, SDXL",
        _PICTURES,
        _TASKS + "test_inpainting_with_its_own_checkpoint",
        _ALL,
    ),
    Row("few steps", "LCM", "by its scheduler, or --preset lcm", _CLOSE, _FEW),
    Row(
        "few steps",
        "Turbo",
        "by its schedule, or --preset sd-turbo, sdxl-turbo",
        _CLOSE,
        "tests/test_families.py::test_folders_say_what_they_are",
    ),
    Row("few steps", "Lightning", "--preset lightning-1, -2, -4, -8", _CLOSE, _FEW),
    Row("few steps", "Hyper-SD", "--preset hyper-1, -2, -4, -8", _CLOSE, _FEW),
    Row(
        "few steps",
        "folders that keep a preset",
        "fastsd convert FILE FOLDER --preset lightning-4",
        _CLOSE,
        "tests/test_families.py::test_a_converted_folder_keeps_its_preset",
    ),
    Row(
        "file",
        "diffusers folders",
        "safetensors, shards, variants, old forms",
        "the files' own tensors",
        "tests/checkpoints/test_load.py::test_every_tensor_is_the_files",
    ),
    Row("file", "single file: SD 1.x, 2.x", "original layout, inpainting too", _CONVERTED, _SINGLE),
    Row(
        "file", "single file: SDXL, refiner", "original layout, inpainting too", _CONVERTED, _SINGLE
    ),
    Row(
        "file",
        "pickles (.ckpt, .pt, .bin)",
        "fastsd convert, weights only, in a process of its own",
        "the pickle's own tensors",
        "tests/checkpoints/test_convert.py::test_a_pickled_checkpoint",
    ),
    Row(
        "file",
        "file <-> folder",
        "fastsd convert",
        "diffusers' folders, bit for bit",
        "tests/checkpoints/test_convert.py::test_file_to_folder_to_file",
    ),
    Row(
        "VAE",
        "another AutoencoderKL",
        "--vae: a folder, or a file of either layout",
        _CLOSE,
        "tests/test_families.py::test_another_vae",
    ),
    Row(
        "VAE",
        "tiny autoencoder (TAESD)",
        "--vae: a folder or a file in diffusers' layout",
        _CLOSE,
        "tests/test_families.py::test_a_tiny_autoencoder_decodes_as_diffusers_does",
    ),
    Row(
        "VAE",
        "previews while drawing",
        "preview=, --preview PNG, --preview-vae",
        "the last is the picture",
        "tests/test_families.py::test_previews_are_what_the_model_is_on_its_way_to",
    ),
    Row("adapter", "LoRA of kohya's", "--lora FILE:WEIGHT; convolutions, text", _CLOSE, _LORA),
    Row("adapter", "LoRA of PEFT and diffusers", "--lora FILE:WEIGHT", _CLOSE, _LORA),
    Row(
        "adapter",
        "SDXL's LoRAs in the original names",
        "--lora FILE:WEIGHT",
        _CLOSE,
        "tests/test_adapters.py::test_sdxl_pictures_equal_diffusers",
    ),
    Row(
        "adapter",
        "several LoRAs",
        "set_adapters; on the eager backend, in place",
        f"{_CLOSE}; taken off to the last bit",
        "tests/test_adapters.py::test_several_are_mixed_as_diffusers_mixes_them",
    ),
    Row(
        "adapter",
        "LoRAs inside an engine or a folder",
        "fastsd export, fastsd convert: --lora FILE:WEIGHT",
        "eager with the LoRAs on, > 60 dB",
        _ENGINES + "test_a_lora_and_a_preset_go_in_when_an_engine_is_built",
        _ALL,
    ),
    Row("task", "text to image", "", _PICTURES, _PIPELINE, _ALL),
    Row(
        "task",
        "image to image",
        "--image, --strength",
        _PICTURES,
        _TASKS + "test_image_to_image",
        _ALL,
    ),
    Row(
        "task",
        "inpainting with any model",
        "--image, --mask",
        _PICTURES,
        _TASKS + "test_inpainting_with_any_checkpoint",
        _ALL,
    ),
    Row(
        "task",
        "outpainting",
        "--outpaint",
        "the picture's own pixels, kept",
        _TASKS + "test_outpainting_keeps_the_picture_and_draws_the_rest",
        _ALL,
    ),
    Row(
        "task",
        "variations",
        "--image, several seeds",
        _PICTURES,
        _TASKS + "test_variations_are_image_to_image_under_several_seeds",
        _ALL,
    ),
    Row(
        "task",
        "guidance rescale",
        "guidance_rescale=",
        _PICTURES,
        _TASKS + "test_guidance_rescale",
        _ALL,
    ),
    Row(
        "task",
        "two stages",
        "denoising_end, denoising_start",
        _PICTURES,
        _TASKS + "test_two_stages",
        _ALL,
    ),
    Row(
        "task",
        "prompt weights",
        "(word:1.3), [word]",
        "transformers' encoder, the web UI's rules",
        "tests/test_prompting.py::test_weights",
        _ALL,
    ),
    Row(
        "task",
        "long prompts",
        "chunks of 75 tokens, BREAK; engines: --dynamic",
        "transformers' encoder, the web UI's rules",
        "tests/test_prompting.py::test_long_prompts",
        ("onnx", "openvino"),
    ),
    Row(
        "task",
        "clip skip",
        "--clip-skip; engines: --layout fast, or SDXL",
        _PICTURES,
        "tests/test_prompting.py::test_clip_skip",
        _ALL,
    ),
    Row(
        "task",
        "textual inversion",
        "--embedding; several vectors, SDXL's pairs",
        _PICTURES,
        "tests/test_prompting.py::test_learned_words",
    ),
    Row(
        "task",
        "what engines refuse",
        "other sizes than exported for, embeddings; what is said above",
        "one clear error each",
        _ENGINES + "test_what_an_engine_cannot_carry",
    ),
)
