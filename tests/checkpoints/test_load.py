"""Every layout and old form of a folder loads to the same tensors."""

from __future__ import annotations

import json
import platform
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from fastsd.checkpoints import Checkpoint, describe, open_checkpoint
from fastsd.checkpoints.checkpoint import open_description
from fastsd.checkpoints.keys import canonical
from fastsd.checkpoints.save import save_description
from fastsd.config import CLIPConfig
from fastsd.errors import CheckpointError, UsageError
from fastsd.pipeline import Pipeline
from tests.checkpoints.rewrite import WEIGHTS, Tensors, copied, edit_json, edit_weights, shard

FAMILIES = ["sd1", "sd2", "sdxl"]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    path = request.getfixturevalue(f"{request.param}_folder")
    assert isinstance(path, Path)
    return path


def parts_of(folder: Path) -> dict[str, str]:
    return {part: name for part, name in WEIGHTS.items() if (folder / name).is_file()}


def states(checkpoint: Checkpoint, **options: Any) -> dict[str, Tensors]:
    return {name: checkpoint.load(name, **options).state_dict() for name in checkpoint.parts}


def assert_same_states(a: dict[str, Tensors], b: dict[str, Tensors]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys()
        for key in a[name]:
            assert torch.equal(a[name][key], b[name][key]), (name, key)


def test_every_tensor_is_the_files(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.parts) == set(parts_of(folder))
    for part, name in parts_of(folder).items():
        module = checkpoint.load(part)
        expected = {canonical(part, k): v for k, v in load_file(folder / name).items()}
        assert_same_states({part: dict(module.state_dict())}, {part: expected})
        assert not module.training
        assert not any(p.requires_grad or p.is_meta for p in module.parameters())
        assert not any(buffer.is_meta for buffer in module.buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_converted(sd1_folder: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(str(sd1_folder))
    full, cast = checkpoint.load("vae"), checkpoint.load("vae", dtype)
    for key, tensor in cast.state_dict().items():
        assert torch.equal(tensor, full.state_dict()[key].to(dtype))


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/self/maps")
def test_weights_stay_mapped_from_the_file(sd1_folder: Path) -> None:
    """No second copy: every parameter lies in the pages of the file."""
    module = open_checkpoint(sd1_folder).load("unet")
    maps = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(sd1_folder / WEIGHTS["unet"])):
            start, end = line.split()[0].split("-")
            maps.append(range(int(start, 16), int(end, 16)))
    assert maps
    for parameter in module.parameters():
        assert any(parameter.data_ptr() in pages for pages in maps)


def test_shards(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path)
    for name in parts_of(folder).values():
        shard(path / name)
    checkpoint = open_checkpoint(path)
    assert all(len(files.weights) == 3 for files in checkpoint.parts.values())
    assert_same_states(states(checkpoint), states(open_checkpoint(folder)))


@pytest.mark.parametrize("sharded", [False, True])
def test_variants(folder: Path, tmp_path: Path, sharded: bool) -> None:
    """fp16 files beside fp32 ones: the variant says which; the other is not touched."""
    path = copied(folder, tmp_path)
    for name in parts_of(folder).values():
        file = path / name
        half = file.with_name(file.name.replace(".safetensors", ".fp16.safetensors"))
        half.write_bytes(file.read_bytes())
        edit_weights(half, lambda tensors: {k: v.half() for k, v in tensors.items()})
        if sharded:
            kept = file.read_bytes()
            half.rename(file)
            shard(file, variant="fp16")
            file.write_bytes(kept)
    plain, half_ = open_checkpoint(path), open_checkpoint(path, variant="fp16")
    assert all("fp16" in f.name for files in half_.parts.values() for f in files.weights)
    assert set(describe(half_)["parts"]["unet"]["dtypes"]) == {"F16"}
    assert_same_states(states(plain), states(open_checkpoint(folder)))
    rounded = {
        name: {key: tensor.half().float() for key, tensor in state.items()}
        for name, state in states(plain).items()
    }
    assert_same_states(states(half_), rounded)


def test_a_variant_of_some_parts(sd1_folder: Path, tmp_path: Path) -> None:
    """Parts without files of the variant are read as they are, as in diffusers."""
    path = copied(sd1_folder, tmp_path)
    file = path / parts_of(sd1_folder)["unet"]
    file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    checkpoint = open_checkpoint(path, variant="fp16")
    assert_same_states(states(checkpoint), states(open_checkpoint(sd1_folder)))
    with pytest.raises(CheckpointError, match="ask for variant='fp16'"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [{"_class_name": "TCDScheduler"}, {"_class_name": "SASolverScheduler"}, "use_beta_sigmas"],
)
def test_a_sampler_that_we_lack_has_to_be_chosen(
    change: Any, sd1_folder: Path, tmp_path: Path
) -> None:
    path = copied(sd1_folder, tmp_path)
    if isinstance(change, str):
        change = {"_class_name": "EulerDiscreteScheduler", change: True}
    edit_json(path / "scheduler" / "scheduler_config.json", change)
    index = {"scheduler": ["diffusers", change["_class_name"]]}
    edit_json(path / "model_index.json", index)
    with pytest.raises(UsageError, match=change["_class_name"]):
        Pipeline.from_pretrained(path)
    assert Pipeline.from_pretrained(path, sampler="euler").sampler == "euler"


def old_clip(tensors: Tensors) -> Tensors:
    prefixed = {
        k if k.startswith(("text_model.", "text_projection.")) else f"text_model.{k}": v
        for k, v in tensors.items()
    }
    return prefixed | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def bare_clip(tensors: Tensors) -> Tensors:
    return {k.removeprefix("text_model."): v for k, v in tensors.items()}


def old_vae(tensors: Tensors) -> Tensors:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        tensors = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor
            for key, tensor in tensors.items()
        }
    assert sum(".query." in key for key in tensors) == 4
    return tensors


def conv_vae(tensors: Tensors) -> Tensors:
    """The same layers as 1x1 convolutions, as in files converted from the original code."""
    return {
        k: v[:, :, None, None] if k.endswith(("query.weight", "proj_attn.weight")) else v
        for k, v in old_vae(tensors).items()
    }


def conv_unet(tensors: Tensors) -> Tensors:
    """Projections in the other form: matrices for 1x1 convolutions and the reverse."""
    return {
        k: (v[:, :, 0, 0] if v.ndim == 4 else v[:, :, None, None])
        if k.endswith(("proj_in.weight", "proj_out.weight"))
        else v
        for k, v in tensors.items()
    }


@pytest.mark.parametrize(
    ("part", "form"),
    [
        ("text_encoder", old_clip),
        ("text_encoder", bare_clip),
        ("vae", old_vae),
        ("vae", conv_vae),
        ("unet", conv_unet),
    ],
)
def test_old_weights(folder: Path, tmp_path: Path, part: str, form: Any) -> None:
    path = copied(folder, tmp_path)
    for name in {"text_encoder": ("text_encoder", "text_encoder_2")}.get(part, (part,)):
        if (path / WEIGHTS[name]).is_file():
            edit_weights(path / WEIGHTS[name], form)
    assert_same_states(states(open_checkpoint(path)), states(open_checkpoint(folder)))


NEWER_KEYS = {
    "unet/config.json": """addition_embed_type addition_embed_type_num_heads
        addition_time_embed_dim attention_type class_embed_type class_embeddings_concat
        conv_in_kernel conv_out_kernel cross_attention_norm dropout dual_cross_attention
        encoder_hid_dim encoder_hid_dim_type mid_block_only_cross_attention mid_block_type
        num_attention_heads num_class_embeds only_cross_attention
        projection_class_embeddings_input_dim resnet_out_scale_factor resnet_skip_time_act
        resnet_time_scale_shift reverse_transformer_layers_per_block time_cond_proj_dim
        time_embedding_act_fn time_embedding_dim time_embedding_type timestep_post_act
        transformer_layers_per_block upcast_attention use_linear_projection""",
    "vae/config.json": """force_upcast latents_mean latents_std mid_block_add_attention
        scaling_factor shift_factor use_post_quant_conv use_quant_conv""",
    "text_encoder/config.json": """attention_dropout dtype initializer_factor initializer_range
        max_position_embeddings layer_norm_eps projection_dim hidden_act""",
    "scheduler/scheduler_config.json": "timestep_spacing trained_betas prediction_type",
}


def test_configs_without_the_newer_keys(sd1_folder: Path, tmp_path: Path) -> None:
    """As the first SD1 folders were; diffusers' defaults stand for what they lack."""
    path = copied(sd1_folder, tmp_path)
    for name, keys in NEWER_KEYS.items():

        def drop(data: dict[str, object], keys: str = keys) -> None:
            for key in keys.split():
                data.pop(key, None)

        edit_json(path / name, drop)
        edit_json(path / name, {"_diffusers_version": "0.6.0"})
    old, new = open_checkpoint(path), open_checkpoint(sd1_folder)
    assert old.config.text_encoders == new.config.text_encoders
    assert old.config.vae == new.config.vae
    assert old.config.schedule.spacing == "default"
    # diffusers reads a sample_size below 64 of that age as 64
    assert (old.config.unet.sample_size, new.config.unet.sample_size) == (64, 16)
    assert_same_states(states(old), states(new))


@pytest.mark.parametrize(
    "junk",
    [
        {"decay": 0.9999, "inv_gamma": 1.0, "optimization_step": 80000, "update_after_step": 0},
        {"_name_or_path": "./somewhere", "_diffusers_version": "0.3.0.dev0", "sample_size": 64},
    ],
)
def test_what_training_scripts_leave_in_configs(
    sd1_folder: Path, tmp_path: Path, junk: dict[str, Any]
) -> None:
    path = copied(sd1_folder, tmp_path)
    edit_json(path / "unet" / "config.json", junk)
    assert open_checkpoint(path).load("unet")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}),
        ("scheduler/scheduler_config.json", {"beta_end": 5}),
        ("scheduler/scheduler_config.json", {"beta_start": 0}),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 1.5]}),
        ("unet/config.json", {"block_out_channels": [10**9, 10**9]}),
        ("unet/config.json", {"layers_per_block": 10**7}),
        ("unet/config.json", {"layers_per_block": 0}),
        ("unet/config.json", {"transformer_layers_per_block": 10**7}),
        ("unet/config.json", {"norm_eps": float("inf")}),
        ("unet/config.json", {"norm_eps": float("nan")}),
        ("unet/config.json", {"in_channels": 4.5}),
        ("unet/config.json", {"sample_size": 10**9}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**7}),
        ("text_encoder/config.json", {"vocab_size": 10**12}),
        ("vae/config.json", {"layers_per_block": 10**7}),
        ("vae/config.json", {"scaling_factor": float("nan")}),
    ],
)
def test_sizes_beyond_any_model_are_refused(
    sd1_folder: Path, tmp_path: Path, file: str, change: dict[str, Any]
) -> None:
    path = copied(sd1_folder, tmp_path)
    edit_json(path / file, change)
    with pytest.raises(CheckpointError, match=r"config.json: .* must (be|lie)"):
        open_checkpoint(path)


def test_old_end_of_text_and_whole_clip_configs(sd1_folder: Path, tmp_path: Path) -> None:
    path = copied(sd1_folder, tmp_path)
    config = path / "text_encoder" / "config.json"
    edit_json(config, {"eos_token_id": 2, "bos_token_id": 0, "model_type": "clip_text_model"})
    read = open_checkpoint(path).config.text_encoders[0]
    assert read.eos_token_id == 2
    config.write_text(
        json.dumps({"model_type": "clip", "text_config": json.loads(config.read_text())})
    )
    assert open_checkpoint(path).config.text_encoders[0] == read


def test_safety_checker_and_friends_are_passed_over(sd1_folder: Path, tmp_path: Path) -> None:
    path = copied(sd1_folder, tmp_path)
    edit_json(
        path / "model_index.json",
        {
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "requires_safety_checker": True,
        },
    )
    (path / "safety_checker").mkdir()
    (path / "safety_checker" / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.passed_over) == {"safety_checker", "feature_extractor"}
    assert_same_states(states(checkpoint), states(open_checkpoint(sd1_folder)))


def test_sdxl_settings(sdxl_folder: Path, tmp_path: Path) -> None:
    config = open_checkpoint(sdxl_folder).config
    assert (config.family, config.text_layer, config.vae.force_upcast) == ("sdxl", -2, True)
    assert config.zero_empty_negative
    assert (config.unet.pooled_width, config.unet.size_ids, config.unet.size_width) == (40, 6, 8)
    assert [encoder.projection for encoder in config.text_encoders] == [None, 40]
    path = copied(sdxl_folder, tmp_path)
    edit_json(path / "model_index.json", {"force_zeros_for_empty_prompt": False})
    assert not open_checkpoint(path).config.zero_empty_negative


def test_families(sd1_folder: Path, sd2_folder: Path) -> None:
    sd1, sd2 = open_checkpoint(sd1_folder).config, open_checkpoint(sd2_folder).config
    assert (sd1.family, sd1.schedule.prediction, sd1.schedule.sampler) == ("sd1", "eps", "pndm")
    assert (sd2.family, sd2.schedule.prediction, sd2.schedule.sampler) == ("sd2", "v", "ddim")
    assert sd2.unet.upcast_attention and sd2.unet.linear_projection and sd2.text_layer == -1
    # the class's default is True, but only SDXL's pipeline heeds it
    assert not sd1.vae.force_upcast and not sd2.vae.force_upcast
    assert isinstance(sd1.text_encoders[0], CLIPConfig)


def test_inpainting_unets(sd1_folder: Path, tmp_path: Path) -> None:
    """Latents, mask and masked picture side by side; other widths are refused by what they are."""
    path = copied(sd1_folder, tmp_path)
    edit_json(path / "model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"})
    for channels in (9, 8, 7):
        edit_json(path / "unet" / "config.json", {"in_channels": channels})
        edit_weights(
            path / WEIGHTS["unet"],
            lambda t, n=channels: t | {"conv_in.weight": torch.randn(32, n, 3, 3)},  # type: ignore[misc]
        )
        if channels == 9:
            checkpoint = open_checkpoint(path)
            assert checkpoint.config.inpaints and checkpoint.load("unet")
        else:
            with pytest.raises(CheckpointError, match="InstructPix2Pix" if channels == 8 else "7"):
                open_checkpoint(path)
    assert not open_checkpoint(sd1_folder).config.inpaints


def test_distilled_guidance(sd1_folder: Path, tmp_path: Path) -> None:
    """An LCM's UNet takes the guidance weight beside the time."""
    path = copied(sd1_folder, tmp_path)
    edit_json(path / "unet" / "config.json", {"time_cond_proj_dim": 24})
    edit_json(
        path / "model_index.json",
        {
            "_class_name": "LatentConsistencyModelPipeline",
            "scheduler": ["diffusers", "LCMScheduler"],
        },
    )
    key = "time_embedding.cond_proj.weight"
    edit_weights(path / WEIGHTS["unet"], lambda t: t | {key: torch.randn(32, 24)})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.unet.guidance_width == 24
    assert checkpoint.load("unet").state_dict()[key].shape == (32, 24)


def test_misaligned_data(sd1_folder: Path, tmp_path: Path) -> None:
    """Early safetensors files did not pad their headers."""
    path = copied(sd1_folder, tmp_path)
    file = path / WEIGHTS["unet"]
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    module = open_checkpoint(path).load("unet")
    assert all(p.data_ptr() % 4 == 0 for p in module.parameters())
    assert_same_states(
        {"unet": dict(module.state_dict())},
        {"unet": dict(open_checkpoint(sd1_folder).load("unet").state_dict())},
    )


def test_header_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    from fastsd.checkpoints.weights import read_header

    entry = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for length in (0x0280, 0x0480, 0x3C3C):
        file = tmp_path / f"{length}.safetensors"
        file.write_bytes(struct.pack("<Q", length) + entry.ljust(length) + b"\0" * 4)
        assert read_header(file)["w"].shape == (1,)


def test_describe_reads_headers_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(folder)
    expected = {
        part: sum(tensor.numel() for tensor in load_file(folder / name).values())
        for part, name in parts_of(folder).items()
    }
    monkeypatch.delattr("fastsd.checkpoints.weights.safe_open")
    data = json.loads(json.dumps(describe(checkpoint)))
    assert {name: part["parameters"] for name, part in data["parts"].items()} == expected
    assert all(part["dtypes"] == {"F32": part["parameters"]} for part in data["parts"].values())
    for part, name in parts_of(folder).items():
        assert data["parts"][part]["size_bytes"] == (folder / name).stat().st_size
    assert data["family"] == checkpoint.config.family
    assert data["sampler"] == checkpoint.config.schedule.sampler


def test_an_unknown_part_is_refused(sd1_folder: Path) -> None:
    with pytest.raises(UsageError, match="text_encoder_2.*it has text_encoder, unet, vae"):
        open_checkpoint(sd1_folder).load("text_encoder_2")


def test_loads_do_not_share_state(sd1_folder: Path) -> None:
    """A module that is changed does not change the file or another load."""
    checkpoint = open_checkpoint(sd1_folder)
    before = (sd1_folder / WEIGHTS["vae"]).read_bytes()
    first, second = checkpoint.load("vae"), checkpoint.load("vae")
    nn.init.zeros_(next(first.parameters()))
    assert next(second.parameters()).abs().sum() > 0
    assert (sd1_folder / WEIGHTS["vae"]).read_bytes() == before


def test_a_folder_may_record_its_guidance_weight(sd1_folder: Path, tmp_path: Path) -> None:
    """Ours writes and reads the mark; diffusers passes over it; nonsense is refused."""
    folder = tmp_path / "model"
    shutil.copytree(sd1_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())

    def record(weight: object) -> None:
        (folder / "model_index.json").write_text(json.dumps({**index, "_guidance_scale": weight}))

    record(2)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.schedule.guidance == 2.0
    assert StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).unet is not None
    again = tmp_path / "again"
    again.mkdir()
    save_description(again, checkpoint.config, checkpoint.tokenizers)
    assert open_description(again).config.schedule.guidance == 2.0
    for nonsense in ("high", True, -1, float("nan")):
        record(nonsense)
        with pytest.raises(CheckpointError, match="_guidance_scale must be a number"):
            open_checkpoint(folder)
    for mark, value, message in (
        ("_num_inference_steps", 2.5, "a whole number"),
        ("_num_inference_steps", 0, "a whole number"),
        ("_num_inference_steps", "4", "a whole number"),
        ("_timesteps", [800, "x"], "a number from 0 to 1000"),
        ("_timesteps", {"a": 1}, "a number from 0 to 1000"),
    ):
        (folder / "model_index.json").write_text(json.dumps({**index, mark: value}))
        with pytest.raises(CheckpointError, match=f"{mark} must be {message}"):
            open_checkpoint(folder)
