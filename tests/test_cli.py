"""The command line: what it draws and prints, and one clear line for each mistake."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

import fastsd
from fastsd import cli
from fastsd.errors import OutOfMemory
from fastsd.images import read_image, read_metadata, save_png
from fastsd.pipeline import Pipeline
from fastsd.samplers import SAMPLERS

QUICK = ("--steps", "2", "--height", "64", "--width", "64")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "\x1b" not in out + err
        code = exit_.value.code
        assert isinstance(code, int)
        return Result(code, out, err)

    return call


# --- generate ------------------------------------------------------------------------------------


def test_generate_draws_and_says_how(run: Run, sd1_folder: Path) -> None:
    result = run(
        *("generate", "a red apple", "-o", "new/apple.png", "--model", sd1_folder, "--seed", 7),
        *("--sampler", "euler_a", "--negative-prompt", "fog", "--guidance", 3, *QUICK),
    )
    assert (result.code, result.out) == (0, f"{Path('new/apple.png')}\n")
    metadata = read_metadata("new/apple.png")
    assert metadata["prompt"] == "a red apple" and metadata["negative_prompt"] == "fog"
    assert (metadata["seed"], metadata["steps"], metadata["guidance_scale"]) == (7, 2, 3)
    with Image.open("new/apple.png") as image:
        assert image.size == (64, 64)
        assert image.info["parameters"] == (
            "a red apple\nNegative prompt: fog\n"
            "Steps: 2, Sampler: Euler a, CFG scale: 3, Seed: 7, Size: 64x64, Model: sd1, RNG: CPU, "
            f"Version: fastsd {fastsd.__version__}"
        )
    expected = Pipeline.from_pretrained(sd1_folder)(
        "a red apple",
        negative_prompt="fog",
        seed=7,
        sampler="euler_a",
        guidance_scale=3,
        num_inference_steps=2,
        height=64,
        width=64,
    )
    assert pixels("new/apple.png") == expected.images[0].tobytes()


def pixels(path: str | Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_settings_that_save_memory_are_recorded(run: Run, sd1_folder: Path) -> None:
    options = ("--model", sd1_folder, "--device", "cpu", "--seed", 3, *QUICK)
    assert run("generate", "a cat", "-o", "plain.png", *options).code == 0
    saving = ("--weights", "int8", "--low-memory")
    assert run("generate", "a cat", "-o", "a.png", *options, *saving).code == 0
    recorded = read_metadata("a.png")
    assert recorded["weights"] == "int8" and recorded["low_memory"] is True
    again = ("generate", "--again", "a.png", "-o", "b.png", "--model", sd1_folder)
    assert run(*again, "--device", "cpu").code == 0
    assert pixels("a.png") == pixels("b.png") != pixels("plain.png")
    assert run(*again, "--device", "cpu", "--weights", "full", "--no-low-memory").code == 0
    assert pixels("b.png") == pixels("plain.png"), "what was recorded can be undone"
    result = run("generate", "a cat", *options, "--weights", "int4")
    assert result.code == 2 and "--weights int4 is unknown; pass 'int8'" in result.err


@pytest.mark.parametrize("family", ["sd1_folder", "sd2_folder", "sdxl_folder"])
def test_again_draws_the_same_bits(family: str, run: Run, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)
    options = ("--model", model, "--sampler", "DPM++ 2M Karras", *QUICK)
    assert run("generate", "a cat", "-o", "a.png", *options).code == 0
    assert run("generate", "--again", "a.png", "-o", "b.png", "--model", model).code == 0
    assert pixels("a.png") == pixels("b.png")
    assert read_metadata("a.png") == read_metadata("b.png")
    with Image.open("b.png") as image:
        assert "Sampler: DPM++ 2M, Schedule type: Karras, " in image.info["parameters"]
    changed = ("--seed", 1, "--steps", 3, "a dog")
    assert run("generate", "--again", "a.png", "-o", "c.png", "--model", model, *changed).code == 0
    now = {"prompt": "a dog", "seed": 1, "steps": 3}
    assert read_metadata("c.png") == {**read_metadata("a.png"), **now}
    assert pixels("a.png") != pixels("c.png")


def test_several_pictures_have_their_own_seeds_and_names(run: Run, sd1_folder: Path) -> None:
    options = ("--model", sd1_folder, *QUICK)
    result = run("generate", "a cat", "a dog", "--count", 2, "--seed", 5, "-o", "x.png", *options)
    assert result.out.split() == ["x-1.png", "x-2.png", "x-3.png", "x-4.png"]
    drawn = [read_metadata(name) for name in result.out.split()]
    told = [(d["prompt"], d["seed"]) for d in drawn]
    assert told == [("a cat", 5), ("a cat", 6), ("a dog", 7), ("a dog", 8)]
    assert [f"seed {seed}: {prompt}" in result.err for prompt, seed in told] == [True] * 4
    assert run("generate", "a dog", "--seed", 7, "-o", "lone.png", *options).code == 0
    assert pixels("lone.png") == pixels("x-3.png")

    together = ("--count", 3, "--batch", 2, "--seed", 5, "-o", "out/")
    result = run("generate", "a cat", *together, *options)
    assert result.out.split() == [str(Path("out", f"fastsd-{seed}.png")) for seed in (5, 6, 7)]
    result = run("generate", "a cat", "--count", 2, "--seed", 5, "-o", "out/s{seed}.PNG", *options)
    assert [Path(name).name for name in result.out.split()] == ["s5.PNG", "s6.PNG"]
    assert pixels("out/s6.PNG") == pixels("x-2.png")


def test_a_random_seed_is_printed_and_stored(run: Run, sd1_folder: Path) -> None:
    results = [run("generate", "a cat", "--model", sd1_folder, *QUICK) for _ in range(2)]
    seeds = [re.findall(r"seed (\d+): a cat", result.err) for result in results]
    assert seeds[0] != seeds[1]
    for result, (seed,) in zip(results, seeds, strict=True):
        assert result.out == f"fastsd-{seed}.png\n"
        assert read_metadata(result.out.strip())["seed"] == int(seed)


def test_json_is_all_of_stdout(run: Run, sd1_folder: Path) -> None:
    options = ("--json", "--count", 2, "-o", "a.png", "--model", sd1_folder, *QUICK)
    result = run("generate", "一只猫", *options)
    drawn = json.loads(result.out)
    assert [picture.pop("path") for picture in drawn] == ["a-1.png", "a-2.png"]
    assert drawn == [read_metadata("a-1.png"), read_metadata("a-2.png")]
    assert "%|" not in result.err  # no bar where nobody watches


def test_an_existing_file_is_replaced(run: Run, sd1_folder: Path) -> None:
    for seed in (1, 2):
        run("generate", "x", "-o", "a.png", "--seed", seed, "--model", sd1_folder, *QUICK)
    assert read_metadata("a.png")["seed"] == 2
    assert os.listdir() == ["a.png"]


def test_empty_and_long_prompts(
    run: Run, sd1_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run("generate", "", "-o", "a.png", "--model", sd1_folder, *QUICK).code == 0
    with caplog.at_level(logging.WARNING):
        long = ("generate", "a red apple on a table " * 50, "--model", sd1_folder, *QUICK)
        assert run(*long, "-o", "b.png").code == 0
        assert "this was cut off" not in caplog.text, "longer prompts are read in chunks"
        assert run(*long, "-o", "c.png", "--prompt-syntax", "plain").code == 0
    assert "this was cut off" in caplog.text
    result = run("generate", "a" * 100_000, "-o", "c.png", "--model", sd1_folder, *QUICK)
    assert result.code == 2 and "100000 characters" in result.err


# --- pictures to start from, learned words -------------------------------------------------------


def write_picture(name: str, size: tuple[int, int] = (64, 64)) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(name)


def write_mask(name: str, size: tuple[int, int] = (64, 64)) -> None:
    picture = Image.new("L", size)
    picture.paste(255, (16, 16, 40, 40))
    picture.save(name)


SHORT = ("--steps", "4", "--seed", "3")


def test_image_to_image_and_again(run: Run, sd1_folder: Path) -> None:
    """What a picture was drawn from is not in it; it is asked for, and known again."""
    write_picture("a.png")
    options = ("--model", sd1_folder, *SHORT, "--image", "a.png", "--guidance-rescale", "0.5")
    syntax = ("--clip-skip", 1, "--prompt-syntax", "weighted")
    result = run("generate", "a (cat:1.3)", "-o", "b.png", "--strength", "0.6", *options, *syntax)
    assert (result.code, result.out) == (0, "b.png\n"), result.err
    expected = Pipeline.from_pretrained(sd1_folder)(
        "a (cat:1.3)",
        image=read_image("a.png"),
        strength=0.6,
        seed=3,
        num_inference_steps=4,
        guidance_rescale=0.5,
        clip_skip=1,
        prompt_syntax="weighted",
    )
    assert pixels("b.png") == expected.images[0].tobytes()

    again = ("generate", "--again", "b.png", "-o", "c.png", "--model", sd1_folder)
    result = run(*again)
    assert result.code == 2 and "b.png was drawn from another picture" in result.err
    assert "--image" in result.err
    result = run(*again, "--image", "a.png")
    assert result.code == 0 and "note" not in result.err
    assert pixels("c.png") == pixels("b.png")
    assert read_metadata("c.png") == read_metadata("b.png")
    write_picture("other.png", (72, 56))
    result = run(*again, "--image", "other.png")
    assert result.code == 0 and "note: b.png was drawn with another image" in result.err


def test_inpainting_and_again(run: Run, sd1_folder: Path) -> None:
    """Far from the mask the picture is the given one, bit for bit."""
    write_picture("a.png")
    write_mask("m.png")
    options = ("--model", sd1_folder, "--image", "a.png", "--mask", "m.png")
    result = run("generate", "a cat", "-o", "b.png", "--feather", 3, *SHORT, *options)
    assert result.code == 0, result.err
    with Image.open("a.png") as given, Image.open("b.png") as drawn:
        difference = (np.asarray(given) != np.asarray(drawn)).any(axis=-1)
    assert difference[16:40, 16:40].mean() > 0.9
    difference[13:43, 13:43] = False
    assert not difference.any()
    again = ("generate", "--again", "b.png", "-o", "c.png", "--model", sd1_folder)
    result = run(*again, "--image", "a.png")
    assert result.code == 2 and "--mask" in result.err
    assert run(*again, "--image", "a.png", "--mask", "m.png").code == 0
    assert pixels("c.png") == pixels("b.png")


def test_outpainting_and_again(run: Run, sd1_folder: Path) -> None:
    write_picture("a.png")
    options = ("--model", sd1_folder, "--image", "a.png")
    result = run("generate", "a cat", "-o", "b.png", "--outpaint", "16,8,0,0", *SHORT, *options)
    assert result.code == 0, result.err
    with Image.open("a.png") as given, Image.open("b.png") as drawn:
        assert drawn.size == (80, 72)
        kept = np.asarray(drawn)[8 + 8 :, 16 + 8 :]  # but for the feather
        np.testing.assert_array_equal(kept, np.asarray(given)[8:, 8:])
    again = ("generate", "--again", "b.png", "-o", "c.png", *options)
    assert run(*again).code == 0
    assert pixels("c.png") == pixels("b.png")


def test_variations_are_several_seeds(run: Run, sd1_folder: Path) -> None:
    write_picture("a.png")
    options = ("--model", sd1_folder, "--image", "a.png", "--strength", "0.5", *SHORT)
    result = run("generate", "", "--count", 2, "-o", "v.png", *options)
    assert result.out.split() == ["v-1.png", "v-2.png"]
    assert pixels("v-1.png") != pixels("v-2.png")


def test_learned_words_and_again(run: Run, sd1_folder: Path) -> None:
    for name, seed in (("thing.safetensors", 0), ("other.safetensors", 1)):
        vectors = torch.randn((2, 32), generator=torch.Generator().manual_seed(seed))
        save_file({"<thing>": vectors}, name)
    options = ("--model", sd1_folder, *QUICK)
    drawn = ("generate", "a <thing>", "-o", "a.png", "--embedding", "thing.safetensors", *options)
    assert run(*drawn).code == 0
    assert list(read_metadata("a.png")["embeddings"]) == ["<thing>"]
    again = ("generate", "--again", "a.png", "-o", "b.png", "--model", sd1_folder)
    result = run(*again)
    assert result.code == 2 and "learned word '<thing>'; give its --embedding" in result.err
    result = run(*again, "--embedding", "thing.safetensors")
    assert result.code == 0 and "note" not in result.err
    assert pixels("b.png") == pixels("a.png")
    result = run(*again, "--embedding", "other.safetensors")
    assert "note: a.png was drawn with another embedding" in result.err
    assert run(*again, "a cat").code == 0, "a prompt without the word does not need it"
    result = run("generate", "a cat", "--embedding", "missing.pt", *options)
    assert (result.code, result.err) == (1, "error: missing.pt is missing\n")


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "eulr"], "did you mean euler"),
        (["--steps", "0"], "error: --steps must be"),
        (["--steps", "x"], "--steps"),
        (["--width", "65"], "multiple of 8"),
        (["--height", "-8"], "height must be"),
        (["--height", "0"], "height must be"),
        (["--guidance", "nan"], "error: --guidance must be a finite number"),
        (["--guidance", "inf"], "error: --guidance must be a finite number"),
        (["--seed", "-1"], "seed must be"),
        (["--seed", str(2**64)], "seed must be"),
        (["--count", "0"], "--count"),
        (["--batch", "0"], "--batch"),
        (["--precision", "fp8"], "precision 'fp8'"),
        (["--backend", "magic"], "backend 'magic' is unknown; it is one of auto, "),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--output", "a.jpg"], "ending in .png"),
        (["--output", "a"], "ending in .png"),
        (["--output", "{prompt}.png"], "{prompt} stands for nothing"),
        (["--stepz", "2"], "--stepz"),
        (["--image", "missing.png"], "cannot read missing.png"),
        (["--mask", "missing.png"], "cannot read missing.png"),
        (["--strength", "0.5"], "give --image"),
        (["--feather", "4"], "error: --feather is for drawing on a picture; give it as --image"),
        (["--outpaint", "1,2,3"], "give it as --image"),
        (["--weights", "fp8"], "error: --weights fp8 needs a GPU"),
        (["--floor", "20"], "pass --backend auto with it"),
        (["--outpaint", "a,b"], "--outpaint 'a,b' must be the pixels"),
        (["--clip-skip", "-1"], "clip_skip must be"),
        (["--guidance-rescale", "2"], "guidance_rescale must be from 0 to 1"),
        (["--prompt-syntax", "compel"], "prompt_syntax 'compel' is unknown"),
        (["--again", "missing.png"], "cannot read missing.png"),
        (["\udcff"], "is not text"),
        (["--negative-prompt", "a\ud800"], "is not text"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, run: Run, sd1_folder: Path) -> None:
    result = run("generate", "a cat", "-o", "a.png", "--model", sd1_folder, *QUICK, *arguments)
    assert result.code == 2 and result.out == ""
    assert message in result.err and result.err.lower().count("error") == 1
    assert not os.listdir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Usage: fastsd"),
        (("generate",), "a prompt is missing"),
        (("inspect",), "Missing argument"),
        (("draw",), "draw"),
    ],
)
def test_missing_and_unknown_commands(arguments: tuple[str, ...], message: str, run: Run) -> None:
    result = run(*arguments)
    assert result.code == 2 and message in result.out + result.err


@pytest.mark.parametrize("command", [("inspect",), ("generate", "a cat", "--model")])
@pytest.mark.parametrize("model", ["missing", "./missing", "empty", "file.safetensors"])
def test_a_model_that_is_not_one(model: str, command: tuple[str, ...], run: Run) -> None:
    Path("empty").mkdir()
    Path("file.safetensors").write_bytes(b"")
    result = run(*command, model)
    assert result.code == 1 and result.out == ""
    assert result.err.startswith("error: ") and Path(model).name in result.err


def test_an_unwritable_place_is_refused_before_drawing(
    run: Run, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    Path("file").write_text("")
    result = run("generate", "a cat", "-o", "file/a.png", "--model", sd1_folder)
    assert result.code == 1 and result.err.startswith("error: cannot make the folder file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "1"}, "its seed is '1'"),
        ({"steps": [1]}, "its steps is"),
        ({"timesteps": ["x"]}, "its timesteps is"),
        ({"controlnet": "x"}, "does not know"),
        ({"sigmas": [1.0, None]}, "its sigmas is"),
        ({"not_recorded": ["latents"]}, "['latents'] of its own"),
        ({"prompt": None}, "a prompt is missing"),
        ({"strength": "1"}, "its strength is"),
        ({"embeddings": {"<a>": 1}}, "its embeddings is"),
        ({"lora": ["lost.safetensors:0.7"]}, "with the LoRAs lost.safetensors:0.7; give each with"),
        ({"image_sha256": "0", "mask_sha256": "0"}, "with --image and --mask"),
        (
            {"image_sha256": "0" * 64},
            "was drawn from another picture; give what it was with --image",
        ),
    ],
)
def test_again_trusts_nothing(change: dict[str, Any], message: str, run: Run) -> None:
    metadata = {"prompt": "a cat", "seed": 1, "model": "m", "versions": {}, **change}
    save_png(Image.new("RGB", (8, 8)), "a.png", metadata)
    result = run("generate", "--again", "a.png")
    assert result.code == 2 and message in result.err


def test_again_with_the_built_in_lora(run: Run) -> None:
    options = ("--lora", "builtin-lcm", "--preset", "lcm", "--steps", 1, "--seed", 3)
    assert run("generate", "a red apple", "-o", "a.png", *options).code == 0
    assert run("generate", "--again", "a.png", "-o", "b.png").code == 0
    assert pixels("a.png") == pixels("b.png")


def test_again_knows_how_the_model_was_loaded(run: Run, sd1_folder: Path) -> None:
    options = ("--model", sd1_folder, "--seed", 3, *QUICK)
    assert run("generate", "a cat", "-o", "plain.png", *options).code == 0
    assert run("generate", "a cat", "-o", "a.png", "--prediction", "v", *options).code == 0
    assert read_metadata("a.png")["prediction"] == "v"
    again = ("generate", "--model", sd1_folder, "-o", "b.png", "--again")
    assert run(*again, "a.png").code == 0
    assert pixels("a.png") == pixels("b.png") != pixels("plain.png")
    vae = Path("other") / "vae"
    vae.parent.mkdir()
    shutil.copytree(sd1_folder / "vae", vae)
    assert run("generate", "a cat", "-o", "a.png", "--vae", vae, *options).code == 0
    result = run(*again, "a.png")
    assert result.code == 2 and "drawn with the vae 'vae'; say where that is" in result.err
    assert run(*again, "a.png", "--vae", vae).code == 0
    assert pixels("a.png") == pixels("b.png")


def test_a_loras_weight_is_a_number(run: Run) -> None:
    Path("a.safetensors").write_bytes(b"")
    result = run("generate", "a cat", "--lora", "a.safetensors:strong")
    assert result.code == 2 and "the weight 'strong' of a.safetensors is not" in result.err


def test_again_of_another_programs_picture(run: Run) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler, Seed: 1, Size: 8x8")
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=chunks)
    result = run("generate", "--again", "a.png")
    assert result.code == 2 and "another program" in result.err and "'steps': 20" in result.err


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (OutOfMemory("not enough memory"), 1, "error: not enough memory\n"),
        (OSError(28, "No space left on device", "x"), 1, "error: x: No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_failures_while_drawing(
    failure: BaseException,
    code: int,
    message: str,
    run: Run,
    sd1_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(Pipeline, "__call__", fail)
    result = run("generate", "a cat", "-o", "a.png", "--model", sd1_folder)
    assert (result.code, result.out, result.err) == (code, "", message)
    assert not os.listdir()


def test_a_bug_shows_its_traceback(sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not the user's mistake must not look like one."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Pipeline, "__call__", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate", "a cat", "--model", str(sd1_folder)])


@pytest.mark.skipif(os.name != "posix", reason="terminals and signals as POSIX has them")
def test_a_terminal_sees_a_bar_and_ctrl_c_stops(sd1_folder: Path, tmp_path: Path) -> None:
    """A real process on a real terminal, interrupted between pictures: 130, whole files only."""
    import pty
    import termios

    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = [sys.executable, "-m", "fastsd", "generate", "a cat", "--count", "100000"]
    # A suite started in the background ignores ctrl-C, which processes of its own would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*command, "--model", str(sd1_folder), "--seed", "0", *QUICK],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    os.close(terminal)
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    shown = b""
    try:
        while block := os.read(reader, 1 << 16):
            shown += block
    except OSError:
        pass  # how Linux says that the terminal's last writer is gone
    process.stdout.read()
    process.stdout.close()
    assert process.wait(timeout=60) == 130
    os.close(reader)
    assert first == "fastsd-0.png\n" and read_metadata(tmp_path / "fastsd-0.png")["seed"] == 0
    assert b"%|" in shown and b"Traceback" not in shown
    assert all(path.suffix == ".png" for path in tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="only POSIX passes bytes as arguments")
def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    command = [sys.executable.encode(), b"-m", b"fastsd", b"generate", b"caf\xe9"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    assert result.returncode == 2 and result.stdout == b""
    assert result.stderr.startswith(b"error: the argument 'caf\\udce9' is not text")
    assert result.stderr.count(b"\n") == 1


# --- bench ---------------------------------------------------------------------------------------


def test_bench_measures_draws_and_reports(run: Run, sd1_folder: Path) -> None:
    """The whole command on a small model: table, JSON in the last line, the report's files."""
    options = ("--model", sd1_folder, "--size", 64, "--steps", 1, "--repeats", 1)
    who = ("--contenders", "fastsd/eager/fp32", "--scenario", "SingleStream")
    result = run("bench", *options, *who, "--report", "new")
    assert result.code == 0, result.err
    *table, last = result.out.splitlines()
    rows = {row["name"]: row for row in json.loads(last)["rows"]}
    assert set(rows) == {"diffusers/fp32", "fastsd/eager/fp32"}
    assert rows["fastsd/eager/fp32"]["psnr_db"] > 50 and rows["fastsd/eager/fp32"]["p50"] > 0
    assert any(line.startswith("fastsd/eager/fp32 ") and "SSIM" in line for line in table)
    assert "new/report.md" in result.err.replace(os.sep, "/")
    assert run("bench", *options, *who, "--report", "new").code == 2
    for told in (last, *(file.read_text("utf-8") for file in Path("new").glob("re*.*"))):
        assert sd1_folder.name in told and str(sd1_folder.parent) not in told

    result = run("bench", "compare", "new", "new/results.json")
    assert result.code == 0 and "too few samples" in result.out
    Path("README.md").write_text("<!-- bench: rows -->\n<!-- bench: end -->\n")
    Path("committed").mkdir()
    Path("new").rename("committed/one")
    assert "updated" in run("bench", "readme", "README.md", "--results", "committed").out
    assert "| fastsd/eager/fp32 |" in Path("README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--contenders", "tensorflow"), "names no contender"),
        (("--scenario", "Server"), "SingleStream, ColdStart"),
        (("--size", "65"), "multiple of 8"),
        (("--sampler", "eulr"), "did you mean euler"),
        (("--repeats", "0"), "--repeats"),
        (("compare", "missing", "missing"), "missing"),
        (("--device", "abacus"), "--device must be cpu or cuda, not 'abacus'"),
        (("--device", "cuda:1"), "--device must be cpu or cuda, not 'cuda:1'"),
        (("ops", "--device", "mps"), "--device must be cpu or cuda, not 'mps'"),
        (("ops", "nothing"), "attention"),
        (("gpu", "--stage", "nothing"), "sd15"),
    ],
)
def test_wrong_usage_of_bench(arguments: tuple[str, ...], message: str, run: Run) -> None:
    result = run("bench", *arguments)
    assert result.code in (1, 2) and message in result.err


@pytest.mark.parametrize("command", [("bench",), ("bench", "ops")])
def test_a_bench_on_a_gpu_that_is_not_there(
    command: tuple[str, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run(*command, "--device", "cuda")
    assert result.code == 2 and "torch sees no GPU" in result.err


# --- samplers, inspect, env, version -------------------------------------------------------------


def test_samplers(run: Run) -> None:
    rows = json.loads(run("samplers", "--json").out)
    assert [row["name"] for row in rows] == list(SAMPLERS)
    for row in rows:
        sampler = SAMPLERS[row["name"]]
        assert (row["title"], row["order"]) == (sampler.title, sampler.order)
        assert row["stochastic"] == sampler.stochastic
    table = run("samplers").out.splitlines()
    assert len(table) == len(SAMPLERS) + 2
    for line, (name, sampler) in zip(table[1:], SAMPLERS.items(), strict=False):
        assert line.split()[0] == name and sampler.title in line


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_inspect(family: str, run: Run, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    facts = json.loads(run("inspect", folder, "--json").out)
    assert facts["family"] == family
    text = run("inspect", folder).out
    assert f"family {family}" in text and f"sampler {facts['sampler']}" in text
    for name, part in facts["parts"].items():
        assert part["parameters"] > 0 and set(part["dtypes"]) == {"F32"}
        assert re.search(rf"^{name} +{part['parameters']:,} ", text, re.MULTILINE)


def test_env_can_be_pasted(run: Run) -> None:
    """It names what matters and nobody: no path, no user, no host."""
    result = run("env", "--json")
    facts = json.loads(result.out)
    assert facts["fastsd"] == fastsd.__version__
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["backends"]["eager"] == "usable" and facts["devices"]["cpu"] == "usable"
    assert facts["cpu"]["threads"] >= 1
    text = run("env").out
    assert "eager: usable" in text
    for private in (str(Path.home()), str(Path.cwd()), platform.node(), sys.prefix):
        assert private not in result.out + text


def test_env_names_what_runs_on_a_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package in ("onnxruntime-gpu", "nncf"):
            return "1.2"
        raise metadata.PackageNotFoundError(package)

    def nvidia_smi(command: tuple[str, ...], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, "570.86.15\n570.86.15\n")

    assert json.loads(run("env", "--json").out)["packages"]["nvidia driver"] == "not installed"
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91002)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", nvidia_smi)
    packages = json.loads(run("env", "--json").out)["packages"]
    assert {name: v for name, v in packages.items() if v != "not installed"} == {
        "onnxruntime": "1.2",
        "nncf": "1.2",
        "cuda": "12.8",
        "cudnn": "91002",
        "nvidia driver": "570.86.15",
    }


def test_env_says_why_a_backend_is_not_usable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fastsd.backends.BACKENDS, "other", "fastsd.backends.no_such:Backend")
    assert "no_such" in json.loads(run("env", "--json").out)["backends"]["other"]


def test_version(run: Run) -> None:
    assert run("--version") == Result(0, f"fastsd {fastsd.__version__}\n", "")


@pytest.mark.parametrize("command", ["bench", "generate", "samplers", "inspect", "env"])
def test_help_teaches(command: str, run: Run) -> None:
    page = run(command, "--help").out
    assert f"Usage: fastsd {command}" in page and "--json" in page
    if command == "bench":  # whose contenders draw alike, not each as its makers would
        assert "[default: 7.5, SDXL 5, whatever the model's own is]" in " ".join(page.split())
    if command == "generate":
        assert 'fastsd generate "a red apple" -o apple.png' in page
        for option in (
            "model negative-prompt steps guidance sampler seed width height count backend"
            " precision device output again batch"
        ).split():
            assert f"--{option} " in page


def test_models_are_listed_with_their_proof(run: Run) -> None:
    text, data = run("models"), json.loads(run("models", "--json").out)
    assert text.code == 0 and len(data) > 20
    for row in data:
        assert row["name"] in text.out and row["test"].startswith("tests/")


def test_a_preview_is_written_while_drawing(run: Run, tmp_path: Path) -> None:
    result = run("generate", "a cat", "-o", "a.png", "--preview", "so-far.png", *QUICK)
    assert result.code == 0, result.err
    with Image.open(tmp_path / "so-far.png") as preview, Image.open(tmp_path / "a.png") as final:
        assert preview.size == final.size == (64, 64)
    assert run("generate", "a cat", "--preview", "x.jpg").code == 2
    assert run("generate", "a cat", "--preview-vae", "x").code == 2


def test_a_single_file_is_inspected_and_drawn(run: Run, tmp_path: Path) -> None:
    from tests.checkpoints.singles import write_sd1

    single = write_sd1(tmp_path / "one")
    inspected = run("inspect", single.file)
    assert inspected.code == 0 and "family sd1" in inspected.out and "and 3 more" in inspected.out
    options = ("--model", single.file, "--tokenizer", single.tokenizer, "--seed", "1", *QUICK)
    drawn = run("generate", "a cat", "-o", "a.png", *options)
    assert drawn.code == 0, drawn.err
    assert read_metadata(tmp_path / "a.png")["model"] == "one.safetensors"
    assert run("convert", single.file, "folder", "--tokenizer", single.tokenizer).out == "folder\n"
    assert run("generate", "a cat", "--model", "folder", "-o", "b.png", *QUICK).code == 0


def test_loras_are_given_by_file_and_weight(run: Run, sd1_folder: Path, tmp_path: Path) -> None:
    import diffusers

    from tests.checkpoints.loras import kohya, write_lora

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(sd1_folder)
    write_lora(tmp_path / "style.safetensors", theirs, kohya)
    options = ("--model", sd1_folder, "--seed", "1", *QUICK)
    for name, lora in (("plain", ()), ("half", ("--lora", "style.safetensors:0.5"))):
        assert run("generate", "a cat", "-o", f"{name}.png", *options, *lora).code == 0
    assert read_metadata(tmp_path / "half.png")["lora"] == ["style.safetensors:0.5"]
    pixels = {name: Image.open(tmp_path / f"{name}.png").tobytes() for name in ("plain", "half")}
    assert pixels["plain"] != pixels["half"]
    again = ("generate", "--again", "half.png", "--model", sd1_folder, "-o", "again.png")
    assert run(*again).code == 0
    assert Image.open(tmp_path / "again.png").tobytes() == pixels["half"]
    missing = run("generate", "a cat", "--lora", "none.safetensors:1", *options)
    assert missing.code == 1 and "is no LoRA file" in missing.err
