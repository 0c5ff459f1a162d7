"""The baselines draw what fastsd draws: random models handed over in memory, samplers, exports."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastsd.backends.eager import EagerBackend
from fastsd.benchmarks import baselines
from fastsd.benchmarks.contenders import Scene
from fastsd.benchmarks.drawing import Drawer, Watch, measure_parts, open_fastsd
from fastsd.config import PRESETS
from fastsd.errors import MissingDependency
from fastsd.quality import psnr
from tests import replay
from tests.checkpoints.test_random_weights import in_small

PROMPTS = ("a red apple", "a house by the sea")


def scene(model: str, **changes: Any) -> Scene:
    settings: dict[str, Any] = {"size": 64, "steps": 3, "guidance": 5.0, "prompts": PROMPTS}
    return Scene(model=model, **settings | changes)


def worst_psnr(ours: Drawer, theirs: Drawer, drawn: Scene) -> float:
    pictures = zip(
        ours.draw(drawn.texts(0), drawn.seeds(0)),
        theirs.draw(drawn.texts(0), drawn.seeds(0)),
        strict=True,
    )
    return min(psnr(a, b) for a, b in pictures)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_diffusers_draws_random_models_as_fastsd_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, name, in_small(PRESETS[name]))
    drawn = scene(f"random:{name}", batch=2)
    ours = open_fastsd(drawn, backend="eager", precision="fp32")
    theirs = baselines.open_diffusers(drawn)
    assert worst_psnr(ours, theirs, drawn) > 55
    a, b = (d.latents(drawn.texts(0), drawn.seeds(0)) for d in (ours, theirs))
    assert torch.linalg.norm(a - b) / torch.linalg.norm(b) < 1e-4


def test_weights_stored_in_half_are_drawn_in_full() -> None:
    """The built-in model's are, and transformers would compute in what it finds."""
    drawn = scene("builtin", steps=2)
    ours = open_fastsd(drawn, backend="eager", precision="fp32")
    assert worst_psnr(ours, baselines.open_diffusers(drawn), drawn) > 55


@pytest.mark.parametrize("sampler", ["DPM++ 2M Karras", "unipc", "euler_a"])
def test_a_sampler_is_the_same_on_both_sides(sampler: str, sd1_folder: Path) -> None:
    drawn = scene(str(sd1_folder), sampler=sampler, steps=4)
    ours = open_fastsd(drawn, backend="eager", precision="fp32")
    assert worst_psnr(ours, baselines.open_diffusers(drawn), drawn) > 55


@pytest.mark.parametrize("who", ["fastsd", "diffusers"])
def test_parts_add_up(who: str, sd1_folder: Path) -> None:
    drawn = scene(str(sd1_folder), steps=5)
    drawer = (
        open_fastsd(drawn, backend="eager", precision="fp32")
        if who == "fastsd"
        else baselines.open_diffusers(drawn)
    )
    before = np.asarray(drawer.draw(drawn.texts(0), drawn.seeds(0))[0])
    parts = measure_parts(drawer, drawn, repeats=1)
    assert {"text_encoder", "unet", "step", "step_rest", "vae", "png", "total"} <= set(parts)
    assert all(value >= 0 for value in parts.values()), parts
    assert parts["unet"] + parts["step_rest"] == pytest.approx(parts["step"])
    inside = parts["text_encoder"] + parts.get("context", 0) + parts["vae"] + parts["other"]
    steps = (parts["total"] - inside) / parts["step"]
    assert steps == pytest.approx(round(steps), abs=1e-6) and steps >= 5
    after = np.asarray(drawer.draw(drawn.texts(0), drawn.seeds(0))[0])
    assert np.array_equal(before, after), "watching left something behind"


def test_a_watch_adds_up_what_it_saw() -> None:
    watch = Watch("cpu")
    step = watch.wrap("step", watch.wrap("unet", lambda: None))
    for _ in range(4):
        step()
    parts = watch.parts_ms(total_ms=1000.0)
    assert parts["other"] == pytest.approx(1000 - 4 * parts["step"])
    assert "vae" not in parts and parts["unet"] <= parts["step"]
    assert Watch("cpu").parts_ms(5.0) == {"other": 5.0, "total": 5.0}


def test_captured_steps_are_watched_captured(
    sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in's replays run no Python: what the UNet's mark counts is the capture alone."""
    monkeypatch.setattr(EagerBackend, "captures", True)
    monkeypatch.setattr(EagerBackend, "capture", lambda self, step: replay.capture(step))
    drawn = scene(str(sd1_folder), steps=5)
    drawer = open_fastsd(drawn, backend="eager", precision="fp32")
    watch = Watch("cpu")
    with drawer.watched(watch):
        drawer.draw(drawn.texts(0), drawn.seeds(0))
        assert {"unet", "step"} <= set(watch.parts_ms(1.0))
        watch.forget()
        drawer.draw(drawn.texts(1), drawn.seeds(1))
    assert "step" in watch.parts_ms(1.0) and "unet" not in watch.parts_ms(1.0)
    assert len(watch._marks["text_encoder"]) == 2, "the prompt's, and the negative one's"
    assert len(watch._marks["step"]) == 6, "PNDM's five steps are six rows"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the others' exporters have to say of torch and numpy
@pytest.mark.parametrize(
    ("packages", "prepare", "opener", "options", "floor_db"),
    [
        (("onnx", "onnxscript", "onnxruntime"), "prepare_onnx", "open_onnxruntime", {}, 55),
        (("openvino",), "prepare_openvino", "open_openvino", {}, 55),
        (("openvino", "nncf"), "prepare_openvino", "open_openvino", {"int8": True}, 15),
        (("torchao",), "prepare_inductor", "open_inductor", {}, 15),
    ],
    ids=["onnxruntime", "openvino", "openvino-int8", "inductor-int8"],
)
def test_an_export_draws_what_diffusers_draws(
    packages: tuple[str, ...],
    prepare: str,
    opener: str,
    options: dict[str, Any],
    floor_db: float,
    sdxl_folder: Path,
    sd1_folder: Path,
    tmp_path: Path,
) -> None:
    for package in packages:
        pytest.importorskip(package, reason="an optional engine that is not installed here")
    for model in (sd1_folder, sdxl_folder):
        drawn = scene(str(model))
        folder = tmp_path / model.name
        getattr(baselines, prepare)(drawn, str(folder), **options)
        assert folder.is_dir()
        engine = getattr(baselines, opener)(drawn, str(folder), **options)
        assert engine.fixed_batch
        assert worst_psnr(engine, baselines.open_diffusers(drawn), drawn) > floor_db


def test_onnxruntime_on_a_gpu_is_no_cpu_in_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ordinary wheel warns, and runs on the CPU."""

    class Session:
        def __init__(self, *_: object, providers: list[str]) -> None:
            assert providers == ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

        def get_inputs(self) -> list[Any]:
            return []

    plain = SimpleNamespace(InferenceSession=Session, SessionOptions=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "onnxruntime", plain)
    with pytest.raises(MissingDependency, match="pip install onnxruntime-gpu"):
        baselines.open_onnxruntime(scene("builtin", device="cuda"), "folder")


def test_contenders_name_functions_that_exist() -> None:
    from fastsd.benchmarks.contenders import contenders

    for device in ("cpu", "cuda"):
        for contender in contenders(device).values():
            for path in filter(None, (contender.opens, contender.prepares)):
                module, name = path.split(":")
                assert callable(getattr(importlib.import_module(module), name))
