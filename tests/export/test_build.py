"""The order of an export, seen from outside: kills, a full disk, the command line, the cache.

Graphs are not traced anew for each: `CopyExporter` takes them from a finished export, in small
pieces, so that a kill finds every state that a real one passes through.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import pytest

from fastsd import cli
from fastsd.artifact import Artifact, PartEntry
from fastsd.checkpoints import Checkpoint, open_checkpoint
from fastsd.errors import (
    ArtifactError,
    MissingDependency,
    NumericsError,
    StaleArtifact,
    UntrustedArtifact,
)
from fastsd.export import EXPORTERS, verify
from fastsd.export.build import Exporter, export
from fastsd.export.calibration import JUDGED_STEPS, Calibration
from fastsd.export.parts import Request, source_digest
from fastsd.images import read_metadata
from fastsd.kernels import native
from fastsd.quality import psnr
from fastsd.quant.draws import GUIDANCE
from fastsd.quant.spec import QuantSpec
from tests.export.conftest import SIZE
from tests.export.test_to_onnx import draw

PIECE = 50_000  # bytes


@final
class CopyExporter(Exporter):
    """Writes the graphs that a finished export left in $FINISHED."""

    target = "onnx"
    precisions = ("fp32",)

    def write(self, part: str, folder: Path) -> PartEntry:
        finished = Artifact.open(os.environ["FINISHED"])
        entry = finished.manifest.parts[part]
        (folder / part).mkdir(exist_ok=True)
        raw = (finished.path / entry.file).read_bytes()
        with (folder / entry.file).open("wb") as file:
            for start in range(0, len(raw), PIECE):
                file.write(raw[start : start + PIECE])
                file.flush()
        return entry


@final
class StoppedExporter(Exporter):
    """The user stops it as soon as it writes."""

    target = "onnx"
    precisions = ("int8",)

    def write(self, part: str, folder: Path) -> PartEntry:
        raise KeyboardInterrupt


def test_what_lacks_is_said_before_a_calibration(
    sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any, **__: Any) -> Calibration:
        raise AssertionError("hours were spent first")

    monkeypatch.setattr("fastsd.export.calibration.calibrate_checkpoint", late)
    request = Request(target="onnx", precision="int8", size=SIZE, prompts=("a cat",), floor=20.0)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxruntime", None)
        without.delitem(sys.modules, "fastsd.backends.ort", raising=False)
        with pytest.raises(ArtifactError, match="floor cannot be checked.*onnxruntime"):
            export(open_checkpoint(sd1_folder), "sd1", request, tmp_path / "engine")
    if native.obstacle():
        return
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'unrecognized option -std=c++20' >&2; exit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    request = replace(request, target="aoti", layout="fast", floor=None)
    with pytest.raises(MissingDependency, match="C\\+\\+20 is needed"):
        export(open_checkpoint(sd1_folder), "sd1", request, tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_what_was_calibrated_outlives_an_interruption(
    sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPORTERS, "onnx", "tests.export.test_build:StoppedExporter")
    calibrated: list[str] = []

    def calibrate(*_: Any, **__: Any) -> Calibration:
        calibrated.append("once")
        return Calibration(QuantSpec({}), {}, {}, {})

    monkeypatch.setattr("fastsd.export.calibration.calibrate_checkpoint", calibrate)
    for prompts in (("a cat",), ("a cat",), ("a dog",)):
        request = Request(target="onnx", precision="int8", size=SIZE, prompts=prompts)
        with pytest.raises(KeyboardInterrupt):
            export(open_checkpoint(sd1_folder), "sd1", request, tmp_path / "engine")
    assert len(calibrated) == 2, "with other prompts it is another calibration"


def test_another_tokenizer_is_another_model(sd1_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd1_folder / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    whole = json.loads(file.read_text("utf-8"))
    vocab = whole["model"]["vocab"]
    first, second, *_ = [word for word in vocab if word.endswith("</w>")]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(whole), "utf-8")
    own, same, other = (
        open_checkpoint(sd1_folder, tokenizer=tokenizer)
        for tokenizer in (None, sd1_folder / "tokenizer", tmp_path / "tokenizer")
    )
    for digest in (source_digest, Checkpoint.fingerprint):
        assert digest(own) == digest(same) != digest(other)


def test_an_engine_of_nan_is_not_published(
    quick: Path, sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "part_error", lambda *_: float("nan"))
    with pytest.raises(NumericsError, match="gives NaN or infinity in fp32; nothing was written"):
        export_copy(open_checkpoint(sd1_folder), tmp_path / "engine")
    assert not list(tmp_path.glob("*engine*")) and not list(tmp_path.glob(".engine*"))


@pytest.fixture
def quick(sd1_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make exports copy `sd1_onnx`, in a cache of their own. Returns sd1_onnx."""
    monkeypatch.setitem(EXPORTERS, "onnx", "tests.export.test_build:CopyExporter")
    monkeypatch.setenv("FINISHED", str(sd1_onnx))
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "cache"))
    return sd1_onnx


def export_copy(checkpoint: Checkpoint, path: Path, **options: Any) -> Artifact:
    return export(checkpoint, "sd1", Request(target="onnx", size=SIZE), path, **options)


# --- kills ---------------------------------------------------------------------------------------


def child(source: Path, path: Path, force: bool) -> None:
    """One whole export, in a process to be killed; not measured, since that writes nothing."""
    EXPORTERS["onnx"] = "tests.export.test_build:CopyExporter"
    verify.measure = lambda *_: {"parts": {}, "pictures": None}
    export_copy(open_checkpoint(source), path, force=force)


def kill_exports(kills: int, source: Path, finished: Path, folder: Path, seed: int) -> None:
    """Kill exports at random moments, new ones and replacing ones; check what is seen after each.

    At the end one runs undisturbed: it publishes the same files, and nothing else is left.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastsd.export.build", "tests.export.test_build"])
    path = folder / "engine"
    good = Artifact.open(finished).manifest.files

    def start(force: bool) -> Any:
        process = context.Process(target=child, args=(source, path, force))
        process.start()
        return process

    def run() -> float:
        begun = time.perf_counter()
        process = start(force=True)
        process.join(120)
        assert process.exitcode == 0
        return time.perf_counter() - begun

    run()  # the first pays for the fork server
    whole = run()
    draw_ = random.Random(seed)
    for kill in range(kills):
        replacing = kill % 2 == 1
        shutil.rmtree(path, ignore_errors=True)
        if replacing:
            shutil.copytree(finished, path)
        process = start(replacing)
        process.join(draw_.uniform(0.1 * whole, whole))
        process.kill()
        process.join()
        if path.exists():
            assert Artifact.open(path).manifest.files == good
        elif replacing:  # killed between the two renames: the old one stands beside it, whole
            assert Artifact.open(folder / ".engine.old").manifest.files == good
    run()
    assert Artifact.open(path).manifest.files == good
    assert [entry.name for entry in folder.iterdir()] == ["engine"], "what kills left is swept"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither SIGKILL nor forkserver")
def test_ten_kills_leave_no_torn_artifact(quick: Path, sd1_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    kill_exports(10, sd1_folder, quick, tmp_path / "out", seed=0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither SIGKILL nor forkserver")
def test_a_hundred_kills(quick: Path, sd1_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    kill_exports(100, sd1_folder, quick, tmp_path / "out", seed=1)


# --- a full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1_000, 150_000, 500_000])
def test_a_full_disk_is_said_and_leaves_nothing(
    limit: int, quick: Path, sd1_folder: Path, tmp_path: Path
) -> None:
    """No file may grow beyond `limit`: what the kernel answers when a disk is full, nearly."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    out = tmp_path / "out"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(ArtifactError, match=r"out/engine could not be written: .*nothing"):
            export_copy(open_checkpoint(sd1_folder), out / "engine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(out.iterdir()) == []
    export_copy(open_checkpoint(sd1_folder), out / "engine")


# --- receipt and floor ---------------------------------------------------------------------------


def test_a_floor_that_does_not_hold_publishes_nothing(
    quick: Path, sd1_folder: Path, tmp_path: Path
) -> None:
    prompts = ("a cat", "a red apple")
    checkpoint = open_checkpoint(sd1_folder)

    def request(floor: float) -> Request:
        return Request(target="onnx", size=SIZE, floor=floor, prompts=prompts)

    path = tmp_path / "engine"
    with pytest.raises(ArtifactError, match=r"not published: the worst picture .* floor is 300 dB"):
        export(checkpoint, "sd1", request(300.0), path)
    assert not path.exists()
    receipt = export(checkpoint, "sd1", request(50.0), path).manifest.receipt
    assert receipt is not None
    pictures = receipt["pictures"]
    assert pictures["prompts"] == 2 and pictures["size"] == [SIZE[1], SIZE[0]]
    assert 50 <= pictures["psnr_db"]["worst"] <= pictures["psnr_db"]["median"]
    assert pictures["worst_prompt"] in prompts and pictures["ssim"]["worst"] > 0.99


def test_receipts_are_drawn_with_one_guidance_whatever_the_models_own(
    quick: Path, sd1_folder: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(sd1_folder)
    request = Request(target="onnx", size=SIZE, prompts=("a cat",))

    def pictures(name: str, **schedule: Any) -> dict[str, Any]:
        config = replace(
            checkpoint.config, schedule=replace(checkpoint.config.schedule, **schedule)
        )
        changed = replace(checkpoint, config=config)
        receipt = export(changed, "sd1", request, tmp_path / name).manifest.receipt
        assert receipt is not None
        found: dict[str, Any] = receipt["pictures"]
        return found

    usual = pictures("usual")
    assert (usual["steps"], usual["guidance_scale"]) == (JUDGED_STEPS, GUIDANCE)
    assert pictures("mild", guidance=2.0) == usual
    few = pictures("few", guidance=0.0, steps=2)  # such a model draws nothing good otherwise
    assert (few["steps"], few["guidance_scale"]) == (2, 0.0)


# --- the command line ----------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err and isinstance(exit_.value.code, int)
    return exit_.value.code, out, err


def test_export_then_generate(
    quick: Path,
    sd1_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n", "utf-8")
    size = ("--size", f"{SIZE[1]}x{SIZE[0]}")
    code, out, err = run(capsys, "export", sd1_folder, "-o", "engine", *size)
    assert (code, out) == (0, "engine\n")
    assert "unet: relative error" in err and "vae_encoder: 0." in err
    code, out, err = run(capsys, "export", sd1_folder, "-o", "engine", *size)
    assert code == 2 and "exists already; choose another folder, or replace it with --force" in err
    assert "receipt:" in run(capsys, "inspect", "engine")[1]
    assert json.loads(run(capsys, "inspect", "engine", "--json")[1])["precision"] == "fp32"
    again = ("--force", "--json", "--prompts", "prompts.txt")
    code, out, _ = run(capsys, "export", sd1_folder, "-o", "engine", *size, *again)
    assert code == 0 and json.loads(out)["receipt"]["pictures"]["prompts"] == 2

    picture = ("--steps", "2", "--width", str(SIZE[1]), "--height", str(SIZE[0]), "--seed", "3")
    code, _, err = run(capsys, "export", "engine", "-o", "another")
    assert code == 1 and "engine is an exported engine, which holds graphs" in err
    own = ("generate", "a cat", "--model", "engine", "-o", "own.png", "--steps", "1")
    assert run(capsys, *own)[0] == 0  # of its own size, which is not the model's
    assert (read_metadata("own.png")["height"], read_metadata("own.png")["width"]) == SIZE

    generate = ("generate", "a cat", "--model", "engine", "-o", "cat.png", *picture)
    assert run(capsys, *generate)[0] == 0
    metadata = read_metadata("cat.png")
    assert (metadata["backend"], metadata["precision"]) == ("ort", "fp32")
    exact = draw(sd1_folder, "a cat", seed=3, num_inference_steps=2)[0]
    from PIL import Image

    with Image.open("cat.png") as image:
        assert psnr(image, (exact * 255).round().astype("uint8")) > 50
    assert (
        run(capsys, "generate", "--again", "cat.png", "-o", "same.png", "--model", "engine")[0] == 0
    )
    assert (tmp_path / "same.png").read_bytes() == (tmp_path / "cat.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "512"), "--size must be WIDTHxHEIGHT"),
        (("--to", "tflite"), "target 'tflite' is unknown"),
        (("--prompts", "nowhere.txt"), "nowhere.txt"),
        (("--precision", "bf16"), "onnx has no precision 'bf16'"),
        (("--refit",), "onnx engines take no other weights later; drop --refit"),
    ],
)
def test_one_line_for_each_mistake(
    arguments: tuple[str, ...],
    message: str,
    quick: Path,
    sd1_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run(capsys, "export", sd1_folder, "-o", tmp_path / "engine", *arguments)
    assert code in (1, 2) and out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and message in err
    assert not (tmp_path / "engine").exists()


def test_engines_kept_for_the_user(
    quick: Path, sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("--size", f"{SIZE[1]}x{SIZE[0]}")
    assert "no engines are kept" in run(capsys, "cache", "ls")[2]
    code, out, _ = run(capsys, "export", sd1_folder, *size)
    path = Path(out.strip())
    assert code == 0 and path.is_relative_to(tmp_path / "cache" / "engines")
    (row,) = json.loads(run(capsys, "cache", "ls", "--json")[1])
    assert row["path"] == str(path) and row["target"] == "onnx" and row["size"] == "96x64"
    assert run(capsys, "cache", "verify")[:2] == (0, f"{path}: good\n")
    left = path.parent / ".sd1.0123456789abcdef.draft"
    left.mkdir()
    code, _, err = run(capsys, "cache", "verify")
    assert code == 0 and "left by an export that was killed: the same export goes on" in err
    assert left.exists()
    assert run(capsys, "cache", "rm", "--unfinished") == (0, f"{left}\n", "")
    assert not left.exists() and path.exists()
    unet = path / "unet/model.onnx"
    unet.write_bytes(unet.read_bytes()[:-1])
    code, out, _ = run(capsys, "cache", "verify")
    assert code == 1 and "unet/model.onnx has" in out
    assert run(capsys, "cache", "rm")[0] == 2
    assert run(capsys, "cache", "rm", "--all") == (0, f"{path}\n", "")
    assert list(path.parent.iterdir()) == []
    elsewhere = tmp_path / "photos"
    elsewhere.mkdir()
    assert run(capsys, "cache", "rm", elsewhere)[0] == 2 and elsewhere.exists()


# --- native engines ------------------------------------------------------------------------------


def test_native_engines_from_elsewhere_need_trust(
    quick: Path,
    sd1_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CopyExporter, "native", True)
    monkeypatch.setattr(CopyExporter, "machine", lambda self: {"gpu": "H200"})
    monkeypatch.setattr(verify, "measure", lambda *_: None)
    path = export_copy(open_checkpoint(sd1_folder), tmp_path / "engine").path
    with pytest.raises(StaleArtifact, match=r"compiled for gpu H200 \(here: none\)"):
        draw(path)
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "another user's"))
    with pytest.raises(UntrustedArtifact, match="trust_native=True"):
        draw(path)
