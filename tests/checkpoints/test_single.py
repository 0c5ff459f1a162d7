"""A single file in the original layout is the model that diffusers' own converter makes of it."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastsd.checkpoints import Checkpoint, describe, open_checkpoint
from fastsd.checkpoints.keys import canonical
from fastsd.config import PRESETS, SD15, SD21, SDXL, SDXL_REFINER
from fastsd.errors import CheckpointError, UsageError
from fastsd.pipeline import Pipeline
from tests.checkpoints.singles import WRITERS, SingleFile, Singles
from tests.checkpoints.sparse import ldm_shapes, write_sparse

PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Singles:
    return Singles(tmp_path_factory.mktemp("singles"))


@pytest.fixture(params=list(WRITERS))
def single(request: pytest.FixtureRequest, singles: Singles) -> SingleFile:
    return singles[request.param]


def opened(single: SingleFile, **options: Any) -> Checkpoint:
    return open_checkpoint(single.file, tokenizer=single.tokenizer, **options)


def rewritten(single: SingleFile, to: Path, change: Any, metadata: Any = None) -> Path:
    tensors = change(load_file(single.file))
    save_file(tensors, to / single.file.name, metadata=metadata)
    return to / single.file.name


def test_every_tensor_is_what_diffusers_converts(single: SingleFile) -> None:
    """Bit for bit, part by part, and no parameter that theirs has and ours lacks."""
    import diffusers

    kind = getattr(diffusers, single.pipeline)
    # what a file lacks their loader must be told: which components its config has none of
    lacking = {} if (single.folder / "text_encoder").is_dir() else {"text_encoder": None}
    theirs = kind.from_single_file(
        str(single.file), config=str(single.folder), local_files_only=True, **lacking
    )
    checkpoint = opened(single)
    found = [name for name in PARTS if getattr(theirs, name, None) is not None]
    assert len(found) == len(checkpoint.parts)
    for name in found:
        own = "text_encoder" if name == "text_encoder_2" and len(found) == 3 else name
        state = checkpoint.load(own).state_dict()
        expected = {canonical(own, k): v for k, v in getattr(theirs, name).state_dict().items()}
        assert state.keys() == expected.keys()
        for key, tensor in state.items():
            assert torch.equal(tensor, expected[key].reshape(tensor.shape)), key


def test_every_key_has_one_owner(single: SingleFile) -> None:
    checkpoint = opened(single)
    with safe_open(single.file, "pt") as file:
        keys = sorted(file.keys())
    used = [key for files in checkpoint.parts.values() for key in files.uses or ()]
    assert sorted([*used, *checkpoint.passed_over]) == keys
    for part, files in checkpoint.parts.items():
        names = [use.name for uses in (files.uses or {}).values() for use in uses]
        assert sorted(names) == sorted(checkpoint.load(part).state_dict())


def test_the_config_is_the_folders(single: SingleFile) -> None:
    """All that a folder's JSON says of the networks is read off the shapes, or the family's."""
    file, folder = opened(single).config, open_checkpoint(single.folder).config
    assert replace(file.unet, sample_size=1) == replace(folder.unet, sample_size=1)
    assert replace(file.vae, sample_size=1) == replace(folder.vae, sample_size=1)
    assert file.text_encoders == folder.text_encoders
    assert (file.family, file.text_layer) == (folder.family, folder.text_layer)
    assert file.schedule.prediction == folder.schedule.prediction
    assert file.zero_empty_negative == folder.zero_empty_negative
    assert file.inpaints == folder.inpaints == ("inpaint" in single.file.name)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_true_sizes_are_recognised(preset: str, tmp_path: Path) -> None:
    """A header of the true architecture, its data a hole in the file, gives the preset itself."""
    config = PRESETS[preset]
    file = write_sparse(tmp_path / "model.safetensors", ldm_shapes(config))
    assert open_checkpoint(file).config == config


def test_the_table_has_a_row_for_each_preset() -> None:
    assert list(PRESETS.values()) == [SD15, SD21, SDXL, SDXL_REFINER]


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_it_draws_what_the_folder_draws(name: str, singles: Singles) -> None:
    single = singles[name]
    options: dict[str, Any] = dict(
        num_inference_steps=2, seed=3, height=64, width=64, output_type="pt", sampler="euler"
    )
    file = Pipeline.from_single_file(single.file, tokenizer=single.tokenizer)
    folder = Pipeline.from_pretrained(single.folder)
    prompt = "a red apple on the table"
    pictures = [pipe(prompt, **options).images for pipe in (file, folder)]
    # where weights lie in memory decides how products round: the last bits may differ
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)
    assert file.name == single.file.name


# --- what a file says of itself, and what it cannot -----------------------------------------------


@pytest.mark.parametrize(
    ("keys", "metadata", "given", "expected"),
    [
        ((), {}, None, "v"),
        ((), {}, "eps", "eps"),
        ((), {"modelspec.prediction_type": "epsilon"}, None, "eps"),
        ((), {"modelspec.prediction_type": "v"}, None, "v"),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, None, "v"),
        (("v_pred",), {}, "eps", "eps"),
    ],
)
def test_what_a_stable_diffusion_2_predicts(
    keys: tuple[str, ...],
    metadata: dict[str, str],
    given: str | None,
    expected: str,
    singles: Singles,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    marks = {key: torch.zeros(0) for key in keys}
    file = rewritten(singles["sd2"], tmp_path, lambda t: t | marks, metadata or None)
    with caplog.at_level(logging.WARNING):
        config = open_checkpoint(file, prediction=given).config
    assert config.schedule.prediction == expected
    assert config.unet.sample_size == (96 if expected == "v" else 64)
    said = "does not say what it predicts; taking v" in caplog.text
    assert said == (not keys and not metadata and given is None)


def test_an_sdxl_of_v_prediction_says_so(singles: Singles, tmp_path: Path) -> None:
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = rewritten(singles["sdxl"], tmp_path, lambda t: t | marks)
    schedule = open_checkpoint(file).config.schedule
    assert (schedule.prediction, schedule.zero_terminal_snr) == ("v", True)
    assert schedule.spacing == "trailing"


def test_old_text_encoders_lack_a_prefix(singles: Singles, tmp_path: Path) -> None:
    file = rewritten(
        singles["sd1"],
        tmp_path,
        lambda t: {k.replace(".text_model.", "."): v for k, v in t.items()},
    )
    a, b = open_checkpoint(file).load("text_encoder"), opened(singles["sd1"]).load("text_encoder")
    assert all(torch.equal(b.state_dict()[k], v) for k, v in a.state_dict().items())


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sd1", ["cond_stage_model.logit_scale", "cond_stage_model.text_projection"]),
        ("sd1", ["cond_stage_model.transformer.text_projection.weight", "embedding_manager.x.y"]),
        ("sdxl", [f"conditioner.embedders.0.{x}" for x in ("logit_scale", "text_projection")]),
    ],
)
def test_what_programs_leave_in_files(
    name: str, keys: list[str], singles: Singles, tmp_path: Path
) -> None:
    file = rewritten(singles[name], tmp_path, lambda t: t | {key: torch.zeros(1) for key in keys})
    checkpoint, plain = open_checkpoint(file), opened(singles[name])
    assert {*checkpoint.passed_over} == {*plain.passed_over, *keys}
    assert checkpoint.config == plain.config


def test_a_projection_may_be_a_linear_layers(singles: Singles, tmp_path: Path) -> None:
    key = "conditioner.embedders.1.model.text_projection"
    file = rewritten(
        singles["sdxl"], tmp_path, lambda t: t | {f"{key}.weight": t.pop(key).t().contiguous()}
    )
    states = [
        open_checkpoint(path, tokenizer=singles["sdxl"].tokenizer).load("text_encoder_2")
        for path in (file, singles["sdxl"].file)
    ]
    assert torch.equal(*(state.get_parameter("text_projection.weight") for state in states))


def test_a_vae_may_come_from_elsewhere(singles: Singles, tmp_path: Path) -> None:
    single = singles["sd1"]
    file = rewritten(
        single, tmp_path, lambda t: {k: v for k, v in t.items() if "first_stage" not in k}
    )
    with pytest.raises(CheckpointError, match="without a VAE.* give its VAE.* with vae="):
        open_checkpoint(file)
    theirs = open_checkpoint(file, vae=single.folder / "vae").load("vae").state_dict()
    ours = opened(single).load("vae").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_fp8_are_widened(dtype: torch.dtype, singles: Singles, tmp_path: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}

    narrowed = open_checkpoint(rewritten(singles["sd1"], tmp_path, narrow)).load("unet")
    for name, tensor in opened(singles["sd1"]).load("unet").state_dict().items():
        assert torch.equal(narrowed.state_dict()[name], tensor.to(dtype).float())


def test_a_preset_may_settle_what_a_file_predicts(
    singles: Singles, caplog: pytest.LogCaptureFixture
) -> None:
    config = opened(singles["sd2"], preset="sd-turbo").config
    assert (config.schedule.prediction, config.unet.sample_size) == ("eps", 64)
    assert "does not say what it predicts" not in caplog.text
    with pytest.raises(UsageError, match="predict eps, not v; drop one"):
        opened(singles["sd2"], preset="sd-turbo", prediction="v")


def test_describe_counts_each_part(single: SingleFile) -> None:
    checkpoint = opened(single)
    facts = describe(checkpoint)["parts"]
    for part in checkpoint.parts:
        parameters = sum(p.numel() for p in checkpoint.load(part).parameters())
        assert facts[part]["parameters"] == parameters
        assert facts[part]["size_bytes"] == 4 * parameters


# --- refusals -------------------------------------------------------------------------------------


def test_unknown_keys_name_the_nearest_family(singles: Singles, tmp_path: Path) -> None:
    extra = {f"model.diffusion_model.motion.{i}.weight": (1,) for i in range(100_000)}
    file = write_sparse(tmp_path / "many.safetensors", ldm_shapes(PRESETS["sd15"]) | extra)
    start = time.process_time()
    with pytest.raises(CheckpointError, match="100000 keys .*, .*Stable Diffusion 1.x") as caught:
        open_checkpoint(file)
    assert len(str(caught.value)) < 700
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("model.diffusion_model.", "without a UNet"),
        ("first_stage_model.", "without a VAE"),
        ("cond_stage_model.", "no text encoder"),
    ],
)
def test_a_part_is_missing(prefix: str, message: str, singles: Singles, tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v for k, v in tensors.items() if not k.startswith(prefix)}

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(rewritten(singles["sd1"], tmp_path, drop))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("edm_mean", "Playground"),
        ("model.diffusion_model.scaled_fp8", "take the one in fp16"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "FLUX"),
    ],
)
def test_other_kinds_are_named(key: str, kind: str, singles: Singles, tmp_path: Path) -> None:
    file = rewritten(singles["sd1"], tmp_path, lambda t: t | {key: torch.zeros(1)})
    with pytest.raises(CheckpointError, match=kind):
        open_checkpoint(file)


@pytest.mark.parametrize("missing", ["input_blocks.0.0.weight", "out.2.bias", "time_embed.0.bias"])
def test_a_missing_key_is_named(missing: str, singles: Singles, tmp_path: Path) -> None:
    key = f"model.diffusion_model.{missing}"
    file = rewritten(singles["sd1"], tmp_path, lambda t: {k: v for k, v in t.items() if k != key})
    with pytest.raises(CheckpointError, match=r"lacks|missing: "):
        open_checkpoint(file).load("unet")


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.1000000000.0.op.weight",
        "first_stage_model.encoder.down.1000000000.block.0.norm1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1000000000.x.weight",
    ],
)
def test_a_name_does_not_make_us_build_a_billion(
    key: str, singles: Singles, tmp_path: Path
) -> None:
    file = rewritten(singles["sd1"], tmp_path, lambda t: t | {key: torch.zeros(1)})
    start = time.process_time()
    with pytest.raises(CheckpointError, match="sd1.safetensors: its keys number 1,000,000,001"):
        open_checkpoint(file)
    if key.startswith("first_stage_model."):
        with pytest.raises(CheckpointError, match="its keys number 1,000,000,001"):
            opened(singles["sd1"], vae=file)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", ()),
        ("model.diffusion_model.label_emb.0.0.weight", (1,)),
        ("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight", ()),
        ("conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight", (1,)),
        ("first_stage_model.decoder.conv_in.weight", (3,)),
    ],
)
def test_shapes_that_no_layer_has(
    key: str, shape: tuple[int, ...], singles: Singles, tmp_path: Path
) -> None:
    file = rewritten(singles["sdxl"], tmp_path, lambda t: t | {key: torch.zeros(shape)})
    with pytest.raises(CheckpointError, match="sdxl.safetensors"):
        opened_ = open_checkpoint(file, tokenizer=singles["sdxl"].tokenizer)
        for part in opened_.parts:
            opened_.load(part)


def test_a_unet_without_attention(singles: Singles, tmp_path: Path) -> None:
    file = rewritten(
        singles["sd1"],
        tmp_path,
        lambda t: {k: v for k, v in t.items() if ".transformer_blocks." not in k},
    )
    with pytest.raises(CheckpointError, match="sd1.safetensors: its UNet attends nowhere"):
        open_checkpoint(file)


def test_truncated_and_poisoned_files(singles: Singles, tmp_path: Path) -> None:
    whole = singles["sd1"].file.read_bytes()
    file = tmp_path / "half.safetensors"
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(file)

    key = "model.diffusion_model.out.2.weight"

    def poison(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[key][0, 0, 0, 0] = float("nan")
        return tensors

    file = rewritten(singles["sd1"], tmp_path, poison)
    with pytest.raises(CheckpointError, match=f"{key} holds NaN"):
        Pipeline.from_pretrained(file, tokenizer=singles["sd1"].tokenizer)


def test_a_vocabulary_of_its_own_needs_a_tokenizer(singles: Singles) -> None:
    with pytest.raises(CheckpointError, match="49408: give the folder of its tokenizer"):
        Pipeline.from_pretrained(singles["sd1"].file)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        open_checkpoint(singles["sd1"].file, tokenizer=singles["sd1"].folder / "unet")
