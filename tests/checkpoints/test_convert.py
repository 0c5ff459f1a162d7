"""Conversion between files, folders and pickles: the same tensors, and nothing run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastsd.checkpoints import convert, open_checkpoint
from fastsd.checkpoints.convert import unpickled
from fastsd.checkpoints.embeddings import read_embedding
from fastsd.errors import CheckpointError, UsageError
from tests.checkpoints.singles import TRAINING, WRITERS, SingleFile, Singles

# inpainting differs from its family in one tensor: the slow suite has it
FORMS = [
    pytest.param(name, marks=[pytest.mark.slow] if "inpaint" in name else []) for name in WRITERS
]


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Singles:
    return Singles(tmp_path_factory.mktemp("singles"))


def used(file: Path, single: SingleFile) -> dict[str, torch.Tensor]:
    """The tensors of a file that some part uses."""
    checkpoint = open_checkpoint(file, tokenizer=single.tokenizer)
    keys = {key for files in checkpoint.parts.values() for key in files.uses or ()}
    return {key: tensor for key, tensor in load_file(file).items() if key in keys}


@pytest.mark.parametrize("name", FORMS)
def test_file_to_folder_to_file(name: str, singles: Singles, tmp_path: Path) -> None:
    """The folder is what diffusers wrote; the file again what the tests' own key map writes."""
    single = singles[name]
    folder, file = tmp_path / "folder", tmp_path / "again.safetensors"
    convert(single.file, folder, tokenizer=single.tokenizer)
    ours, theirs = open_checkpoint(folder), open_checkpoint(single.folder)
    for part in ours.parts:
        a, b = ours.load(part).state_dict(), theirs.load(part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    convert(folder, file)
    expected, written = used(single.file, single), used(file, single)
    assert written.keys() == expected.keys()
    for key, tensor in expected.items():
        assert written[key].shape == tensor.shape and torch.equal(written[key], tensor), key
    again = open_checkpoint(file, tokenizer=single.tokenizer).config
    assert again == open_checkpoint(single.file, tokenizer=single.tokenizer).config


def test_diffusers_loads_what_was_written(singles: Singles, tmp_path: Path) -> None:
    import diffusers

    for name in ("sd2", "sdxl-refiner", "sd1-inpaint"):
        single = singles[name]
        convert(single.file, tmp_path / name, tokenizer=single.tokenizer)
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name)
        assert type(pipe).__name__ == single.pipeline


def test_dtypes(singles: Singles, tmp_path: Path) -> None:
    single = singles["sd1"]
    half = tmp_path / "half.safetensors"
    convert(single.folder, half, dtype="fp16")
    assert {t.dtype for t in load_file(half).values()} == {torch.float16}
    convert(half, tmp_path / "half", tokenizer=single.tokenizer)
    weights = load_file(tmp_path / "half/unet/diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float16}
    with pytest.raises(UsageError, match="'int8' is unknown; it is one of fp32"):
        convert(single.file, tmp_path / "x", dtype="int8")


def test_the_unet_decides_the_dtype(singles: Singles, tmp_path: Path) -> None:
    single = singles["sd1"]
    tensors = load_file(single.file)
    mixed = {k: v.half() if k.startswith("first_stage_model.") else v for k, v in tensors.items()}
    save_file(mixed, tmp_path / "mixed.safetensors")
    convert(tmp_path / "mixed.safetensors", tmp_path / "mixed", tokenizer=single.tokenizer)
    written = open_checkpoint(tmp_path / "mixed").load("unet").state_dict()
    exact = open_checkpoint(single.folder).load("unet").state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in exact.items())


def test_an_sdxl_of_v_prediction_keeps_the_mark_that_others_read(
    singles: Singles, tmp_path: Path
) -> None:
    single, marks = singles["sdxl"], {"v_pred", "ztsnr"}
    marked = load_file(single.file) | {mark: torch.zeros(0) for mark in marks}
    save_file(marked, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tokenizer=single.tokenizer)
    assert marks <= load_file(tmp_path / "b.safetensors").keys()


def test_what_a_single_file_cannot_keep(singles: Singles, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot keep preset 'lcm'; convert to a folder"):
        convert(singles["sd1"].folder, tmp_path / "x.safetensors", preset="lcm")
    assert not list(tmp_path.iterdir())


def changed(folder: Path, copy: Path, name: str, **values: Any) -> Path:
    """Copy a folder with other values in one of its JSON files."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / name).read_text("utf-8")) | values
    (copy / name).write_text(json.dumps(config), "utf-8")
    return copy


def test_what_a_single_file_cannot_say(
    singles: Singles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that would be read as another is refused; what is chosen in drawing is named."""
    folder, file = singles["sd1"].folder, tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="no form .*layout: VAE width .*; give a folder's"):
        convert("builtin", file)
    scaled = changed(folder, tmp_path / "scaled", "vae/config.json", scaling_factor=0.5)
    with pytest.raises(CheckpointError, match=r"its vae.scale is 0.5, a file .* read as 0.18215"):
        convert(scaled, file)
    assert [path.name for path in tmp_path.iterdir()] == ["scaled"]
    scheduler = "scheduler/scheduler_config.json"
    spaced = changed(folder, tmp_path / "spaced", scheduler, timestep_spacing="trailing")
    unsaid = changed(folder, tmp_path / "unsaid", scheduler, timestep_spacing="default")
    convert(unsaid, tmp_path / "same.safetensors")
    assert "spacing" not in caplog.text  # it is the sampler's own
    convert(spaced, file)
    assert "x.safetensors does not keep" in caplog.text
    assert "schedule.spacing trailing" in caplog.text and "prediction" not in caplog.text


def test_a_zero_terminal_snr_is_kept(singles: Singles, tmp_path: Path) -> None:
    scheduler = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    folder = changed(
        singles["sd2"].folder, tmp_path / "v", "scheduler/scheduler_config.json", **scheduler
    )
    convert(folder, tmp_path / "v.safetensors")
    ours, theirs = (
        open_checkpoint(p).config.schedule for p in (tmp_path / "v.safetensors", folder)
    )
    assert ours == theirs and ours.zero_terminal_snr and ours.prediction == "v"


@pytest.mark.parametrize("name", ["a.ckpt", "a.PT", "a.pth", "a.bin"])
def test_a_pickle_is_never_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{name} is named as a pickle.*end it in .safetensors"):
        convert("builtin", tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [SafetensorError("I/O error: No space left on device"), OSError(28, "No space left on device")],
)
@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_a_full_disk(
    name: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, file: Path, **options: Any) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(sys.modules[unpickled.__module__], "save_file", full)
    monkeypatch.setattr("fastsd.checkpoints.save.save_file", full)
    expected = rf"{name} could not be written: .*No space left on device; .* free some space"
    with pytest.raises(CheckpointError, match=expected):
        convert("builtin", tmp_path / "new" / "folders" / name)
    assert not list(tmp_path.iterdir())


# --- pickles --------------------------------------------------------------------------------------


def test_a_pickled_checkpoint(singles: Singles, tmp_path: Path) -> None:
    single = singles["sd1"]
    tensors = load_file(single.file)
    pickled = tmp_path / "old.ckpt"
    torch.save({"state_dict": tensors, "epoch": 3, "global_step": 7}, pickled)
    convert(pickled, tmp_path / "new.safetensors")
    written = load_file(tmp_path / "new.safetensors")
    assert written.keys() == tensors.keys() >= TRAINING.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    convert(pickled, tmp_path / "new", tokenizer=single.tokenizer)
    a, b = (
        open_checkpoint(tmp_path / "new").load("unet"),
        open_checkpoint(single.folder).load("unet"),
    )
    assert all(torch.equal(a.state_dict()[k], v) for k, v in b.state_dict().items())
    with pytest.raises(CheckpointError, match="fastsd convert"):
        open_checkpoint(pickled)


def test_what_trainings_leave_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first Stable Diffusions name a callback's class; others hold numbers of numpy's."""
    callback = type("ModelCheckpoint", (), {})
    callback.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", callback.__module__):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(
        sys.modules[callback.__module__], "ModelCheckpoint", callback, raising=False
    )
    weights = {"a": torch.arange(3.0)}
    data = {"state_dict": weights, "callbacks": {callback: {"best": np.float64(0.5)}}}
    torch.save(data, tmp_path / "old.ckpt")
    convert(tmp_path / "old.ckpt", tmp_path / "new.safetensors")
    written = load_file(tmp_path / "new.safetensors")
    assert written.keys() == {"a"} and torch.equal(written["a"], weights["a"])


@pytest.mark.parametrize("kind", [dict, torch.nn.ParameterDict])
def test_a_learned_word_of_the_web_ui(kind: Any, tmp_path: Path) -> None:
    vectors = torch.randn(2, 64)
    word = {"string_to_token": {"*": 265}, "string_to_param": kind({"*": vectors}), "name": "x"}
    torch.save(word, tmp_path / "style.pt")
    convert(tmp_path / "style.pt", tmp_path / "style.safetensors")
    read = read_embedding(tmp_path / "style.safetensors", [64])
    assert read.token == "style" and torch.equal(read.vectors[0], vectors)


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_a_hostile_pickle_runs_nothing(protocol: int | None, tmp_path: Path) -> None:
    proof, file = tmp_path / "proof", tmp_path / "evil.ckpt"
    data = {"state_dict": {"w": torch.zeros(2)}, "x": Hostile(f"touch {proof}")}
    if protocol is None:
        torch.save(data, file)
    else:
        file.write_bytes(pickle.dumps(data, protocol=protocol))
    with pytest.raises(
        CheckpointError, match="evil.ckpt was not converted: it holds .*nothing of it was run"
    ) as raised:
        convert(file, tmp_path / "out.safetensors")
    assert "weights_only" not in str(raised.value)  # torch advises to load it without
    assert not proof.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["evil.ckpt"]


def test_a_pickle_by_a_name_of_safetensors(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3.0)}, file := tmp_path / "misnamed.safetensors")
    convert(file, tmp_path / "new" / "out.safetensors")
    assert load_file(tmp_path / "new" / "out.safetensors")["w"].tolist() == [0, 1, 2]
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(file))} is no whole model"):
        convert(file, tmp_path / "folder")


@pytest.mark.parametrize("kind", ["compressed", "repeated"])
def test_a_small_pickle_of_much(kind: str, tmp_path: Path) -> None:
    """Neither a zip's entries nor the tensors' numbers may be far more than what the file holds."""
    file = tmp_path / "bomb.pt"
    if kind == "repeated":
        torch.save({"w": torch.zeros(1).expand(1 << 36)}, file)
    else:
        torch.save({"w": torch.zeros(1 << 16)}, stored := io.BytesIO())
        with ZipFile(stored) as whole, ZipFile(file, "w", ZIP_DEFLATED) as small:
            for name in whole.namelist():
                small.writestr(name, whole.read(name))
    expected = f"bomb.pt was not converted: it has {file.stat().st_size} bytes,? and .*would"
    with pytest.raises(CheckpointError, match=expected):
        convert(file, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.pt"]


def test_tensors_that_safetensors_lacks(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2, dtype=torch.complex128)}, file := tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="odd.pt was not converted: its tensors have no form"):
        convert(file, tmp_path / "out.safetensors")


def test_a_pickle_sees_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    seen: list[dict[str, str]] = []

    def run(*arguments: Any, env: dict[str, str], **options: Any) -> Any:
        seen.append(env)
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.run", run)
    torch.save({"w": torch.zeros(1)}, file := tmp_path / "a.pt")
    with pytest.raises(KeyboardInterrupt), unpickled(file):
        pass
    assert "SECRET_TOKEN" not in seen[0] and "HOME" not in seen[0]


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "empty",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("garbage", "number")),
    ],
)
def test_damaged_pickles(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.pt"
    torch.save({"w": torch.zeros(1000)} if kind != "number" else 5, file)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-900])
    elif kind == "garbage":
        file.write_bytes(b"PK\x03\x04" + bytes(1000))
    elif kind == "empty":
        torch.save({}, file)
    with pytest.raises(CheckpointError, match="bad.pt was not converted: it (is|holds)"):
        convert(file, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_there_stays(singles: Singles, tmp_path: Path) -> None:
    (tmp_path / "kept.safetensors").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        convert(singles["sd1"].file, tmp_path / "kept.safetensors")
    assert (tmp_path / "kept.safetensors").read_text() == "mine"
