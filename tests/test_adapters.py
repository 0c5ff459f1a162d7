"""LoRAs: the pictures of diffusers with PEFT, exact removal, one set of weights a call."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsd.adapters import Adapters, SharedLock
from fastsd.backends import Backend
from fastsd.checkpoints import convert, open_checkpoint
from fastsd.errors import CheckpointError, FastsdError, UsageError
from fastsd.kernels.conv3x3 import summed_taps
from fastsd.models.layers import Upsample
from fastsd.pipeline import Pipeline
from fastsd.quality import psnr
from tests.checkpoints.loras import ATTENTION, EVERYTHING, kohya, old_diffusers, peft, write_lora
from tests.pictures import generator, silenced

CALL: dict[str, Any] = dict(num_inference_steps=3, height=64, width=64, guidance_scale=4.0)
PROMPT = "a cat and a dog on a wooden table"


@pytest.fixture(scope="module")
def theirs(sd1_folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return silenced(StableDiffusionPipeline.from_pretrained(sd1_folder))


@pytest.fixture(scope="module")
def theirs_xl(sdxl_folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return silenced(StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False))


@pytest.fixture
def pipe(sd1_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(sd1_folder)


@pytest.fixture(autouse=True)
def restored(request: pytest.FixtureRequest) -> Iterator[None]:
    """Take every adapter off diffusers' pipelines, which tests share."""
    yield
    for name in ("theirs", "theirs_xl"):
        if name in request.fixturenames:
            request.getfixturevalue(name).unload_lora_weights()


def draw(pipe: Any) -> np.ndarray:
    pictures: np.ndarray = pipe(PROMPT, generator=generator(5), output_type="np", **CALL).images
    return pictures


def digest(pipe: Pipeline) -> str:
    """One hash of every weight of the model."""
    total = hashlib.sha256()
    for part in pipe.checkpoint.parts:
        for name, weight in pipe._backend.weights(part).items():
            total.update(name.encode() + weight.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


# --- against diffusers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "options"),
    [
        (kohya, {}),
        (peft, {"rank": 3}),
        (peft, {}),
        (old_diffusers, {"kinds": ATTENTION, "rank": 2}),
    ],
    ids=["kohya", "peft", "peft-ranks", "old"],
)
def test_pictures_equal_diffusers(
    form: Any, options: Any, pipe: Pipeline, theirs: Any, tmp_path: Path
) -> None:
    file = write_lora(tmp_path / "lora.safetensors", theirs, form, **options)
    plain = draw(pipe)
    pipe.load_lora_weights(file)
    theirs.load_lora_weights(file)
    ours = draw(pipe)
    assert psnr(ours, draw(theirs)) > 80
    assert psnr(ours, plain) < 35  # it did something


def test_what_is_made_of_weights_follows_a_lora(
    pipe: Pipeline, theirs: Any, tmp_path: Path
) -> None:
    unet = pipe._backend.modules["unet"]  # type: ignore[attr-defined]
    samplers = [m for m in unet.modules() if isinstance(m, Upsample)]
    for sampler in samplers:
        sampler.phase_()  # as for a GPU's kernel
    before = [cast(Tensor, sampler.phases).clone() for sampler in samplers]
    file = write_lora(tmp_path / "lora.safetensors", theirs, kohya)
    pipe.load_lora_weights(file)
    for sampler, old in zip(samplers, before, strict=True):
        assert sampler.phases is not None and not torch.equal(sampler.phases, old)
        assert torch.equal(sampler.phases, summed_taps(sampler.conv.weight))
    pipe.unload_lora_weights()
    for sampler, old in zip(samplers, before, strict=True):
        assert torch.equal(cast(Tensor, sampler.phases), old)


@pytest.mark.parametrize("sgm", [False, True])
def test_sdxl_pictures_equal_diffusers(
    sgm: bool, sdxl_folder: Path, theirs_xl: Any, tmp_path: Path
) -> None:
    parts = ("unet", "text_encoder", "text_encoder_2")
    originals = dict(theirs_xl.unet.state_dict()) if sgm else None

    def form(part: str, made: Any) -> Any:
        return kohya(part, made, originals=originals)

    kinds = ATTENTION if sgm else EVERYTHING
    lora = tmp_path / "lora.safetensors"
    # one rank: diffusers reads the text projection's as the others'
    file = write_lora(lora, theirs_xl, form, parts=parts, kinds=kinds, rank=2)
    assert any("input_blocks" in key for key in load_file(file)) == sgm
    pipe = Pipeline.from_pretrained(sdxl_folder)
    plain = draw(pipe)
    pipe.load_lora_weights(file)
    theirs_xl.load_lora_weights(file)
    ours = draw(pipe)
    assert psnr(ours, draw(theirs_xl)) > 80
    assert psnr(ours, plain) < 40


def test_each_layer_has_its_own_alpha(pipe: Pipeline, theirs: Any, tmp_path: Path) -> None:
    """W + alpha / rank up @ down; diffusers forgets attention's alphas where they differ."""

    def form(part: str, made: Any) -> Any:
        return kohya(part, made, alpha=lambda i: 0.5 + i)

    before = {name: w.clone() for name, w in pipe._backend.weights("unet").items()}
    file = write_lora(tmp_path / "lora.safetensors", theirs, form, parts=["unet"])
    tensors, changed = load_file(file), 0
    pipe.load_lora_weights(file)
    for name, weight in pipe._backend.weights("unet").items():
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{flat}.alpha" not in tensors:
            assert torch.equal(weight, before[name])
            continue
        up, down = (tensors[f"{flat}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
        scale = tensors[f"{flat}.alpha"] / len(down)
        expected = before[name] + scale * (up @ down).view_as(weight)
        torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-5)
        changed += 1
    assert 3 * changed == len(tensors)


def test_ranks_and_alphas_of_pefts_own_settings(
    pipe: Pipeline, theirs: Any, tmp_path: Path
) -> None:
    """alpha / rank from the metadata that diffusers writes, with a pattern for one layer."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    settings = {
        "unet.r": 4,
        "unet.lora_alpha": 10,
        "unet.alpha_pattern": {layer: 2.0},
        "unet.rank_pattern": {},
        "unet.target_modules": ["to_q", "to_k"],
    }
    file = write_lora(
        tmp_path / "lora.safetensors",
        theirs,
        peft,
        parts=["unet"],
        kinds=["to_q", "to_k"],
        rank=4,
        metadata={"format": "pt", "lora_adapter_metadata": json.dumps(settings)},
    )
    pipe.load_lora_weights(file)
    theirs.load_lora_weights(file)
    assert psnr(draw(pipe), draw(theirs)) > 80


def test_a_pattern_of_pefts_is_a_regular_expression(
    pipe: Pipeline, theirs: Any, tmp_path: Path
) -> None:
    """And what lies beside a file of another name says nothing of it."""
    settings = {
        "unet.r": 4,
        "unet.lora_alpha": 8,
        "unet.alpha_pattern": {r"down_blocks.*attn1\.to_q": 64.0},
        "unet.target_modules": ["to_q"],
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    of_unet: dict[str, Any] = {"parts": ["unet"], "kinds": ["to_q"], "rank": 4}
    file = write_lora(tmp_path / "lora.safetensors", theirs, peft, metadata=metadata, **of_unet)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 4000}')
    pipe.load_lora_weights(file)
    theirs.load_lora_weights(file)
    assert psnr(draw(pipe), draw(theirs)) > 80
    pipe.unload_lora_weights()
    theirs.unload_lora_weights()
    plain = write_lora(tmp_path / "plain.safetensors", theirs, peft, **of_unet)
    pipe.load_lora_weights(plain)
    theirs.load_lora_weights(plain)
    assert psnr(draw(pipe), draw(theirs)) > 80


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(a+)+$", "none that names modules"), ("(", "is wrong"), (3, "wrong kind")],
)
def test_patterns_that_name_nothing(
    pattern: Any, message: str, pipe: Pipeline, theirs: Any, tmp_path: Path
) -> None:
    patterns = {pattern: 2.0} if isinstance(pattern, str) else pattern
    settings = json.dumps({"unet.lora_alpha": 8, "unet.alpha_pattern": patterns})
    file = write_lora(
        tmp_path / "lora.safetensors",
        theirs,
        peft,
        parts=["unet"],
        metadata={"lora_adapter_metadata": settings},
    )
    with pytest.raises(CheckpointError, match=f"lora.safetensors.*{message}"):
        pipe.load_lora_weights(file)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_several_are_mixed_as_diffusers_mixes_them(
    pipe: Pipeline, theirs: Any, tmp_path: Path
) -> None:
    files = [
        write_lora(tmp_path / "a.safetensors", theirs, kohya, seed=1),
        write_lora(tmp_path / "b.safetensors", theirs, peft, parts=["unet"], seed=2, rank=4),
    ]
    for either in (pipe, theirs):
        for name, file in zip("ab", files, strict=True):
            either.load_lora_weights(file, adapter_name=name)
    assert pipe.get_active_adapters() == ["b"]
    assert pipe.get_list_adapters() == theirs.get_list_adapters()
    for names, weights in (("ab", [0.7, -0.4]), ("b", [1.5]), ("a", 0.5)):
        for either in (pipe, theirs):
            either.set_adapters(list(names), adapter_weights=weights)
        assert pipe.get_active_adapters() == theirs.get_active_adapters() == list(names)
        assert psnr(draw(pipe), draw(theirs)) > 80
    metadata = pipe(PROMPT, seed=0, **CALL).metadata[0]
    assert metadata["lora"] == ["a.safetensors:0.5"]


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_then_b_then_none_is_none(
    precision: str, sd1_folder: Path, theirs: Any, tmp_path: Path
) -> None:
    """Bit for bit, in the same memory, whatever was on before."""
    pipe = Pipeline.from_pretrained(sd1_folder, precision=precision)
    live = {part: dict(pipe._backend.weights(part)) for part in pipe.checkpoint.parts}
    where = {(p, n): w.data_ptr() for p, own in live.items() for n, w in own.items()}

    def digest_live() -> str:
        total = hashlib.sha256()
        for own in live.values():
            for weight in own.values():
                total.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    none = digest_live()
    a = write_lora(tmp_path / "a.safetensors", theirs, kohya, seed=1)
    b = write_lora(tmp_path / "b.safetensors", theirs, peft, parts=["unet"], seed=2)
    pipe.load_lora_weights(a, adapter_name="a")
    only_a = digest_live()
    assert only_a != none
    pipe.load_lora_weights(b, adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.3, 2.0])
    pipe.set_adapters("a")
    assert digest_live() == only_a
    pipe.disable_lora()
    assert digest_live() == none
    pipe.enable_lora()
    pipe.delete_adapters("b")
    assert digest_live() == only_a and pipe.get_active_adapters() == ["a"]
    pipe.unload_lora_weights()
    assert digest_live() == none
    assert pipe.get_list_adapters() == {} and not pipe._adapters._originals
    assert where == {(p, n): w.data_ptr() for p, own in live.items() for n, w in own.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merged_for_good_is_what_is_put_on(
    precision: str, sd1_folder: Path, theirs: Any, tmp_path: Path
) -> None:
    """For engines, and for converted folders: the very weights that load_lora_weights makes."""
    a = write_lora(tmp_path / "a.safetensors", theirs, kohya, seed=1)
    b = write_lora(tmp_path / "b.safetensors", theirs, peft, parts=["unet"], seed=2)
    pipe = Pipeline.from_pretrained(sd1_folder, precision=precision)
    pipe.load_lora_weights(a, adapter_name="a")
    pipe.load_lora_weights(b, adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.3, 2.0])
    loras = [(a, 0.3), (b, 2.0)]
    merged = open_checkpoint(sd1_folder).with_loras(loras)
    assert digest(Pipeline(merged, name="merged", precision=precision)) == digest(pipe)
    if precision == "fp32":
        convert(sd1_folder, tmp_path / "folder", loras=loras)
        assert digest(Pipeline.from_pretrained(tmp_path / "folder")) == digest(pipe)
    with pytest.raises(UsageError, match="finite"):
        merged.with_loras([(a, float("nan"))])
    with pytest.raises(CheckpointError, match="no LoRA file"):
        merged.with_loras([(tmp_path / "none.safetensors", 1.0)])


def test_it_moves_with_the_pipeline(pipe: Pipeline, theirs: Any, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "a.safetensors", theirs, kohya)
    pipe.load_lora_weights(file)
    changed = digest(pipe)
    pipe.to(torch.bfloat16).to(torch.float32)
    assert digest(pipe) == changed


# --- refusals, with nothing changed ---------------------------------------------------------------

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
FIRST = "lora_unet_down_blocks_0_attentions_0_proj_in"


def add(key: str) -> Change:
    return lambda tensors: tensors | {key: torch.zeros(2, 2)}


def poison(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors[f"{FIRST}.lora_up.weight"][0, 0] = float("nan")
    return tensors


def narrow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(k for k in tensors if "attn2_to_k.lora_down" in k)
    return tensors | {key: torch.zeros(tensors[key].shape[0], 768)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add(f"{FIRST}.hada_w1_a"), "LoHa"),
        (add(f"{FIRST}.lokr_w1"), "LoKr"),
        (add(f"{FIRST}.oft_blocks"), "OFT"),
        (add(f"{FIRST}.diff"), "whole weights"),
        (add(f"{FIRST}.lora_mid.weight"), "Tucker"),
        (add(f"{FIRST}.dora_scale"), "DoRA"),
        (add("lora_unet_nowhere.lora_down.weight"), "1 of its .* keys name nothing in it"),
        (add("lora_te2_text_model_x.lora_up.weight"), "it was made for sdxl"),
        pytest.param(
            *(
                lambda t: t | {f"lora_unet_{i}.alpha": torch.ones(()) for i in range(10**5)},
                "100000 of",
            ),
            marks=pytest.mark.slow,
        ),
        (lambda t: {k: v for k, v in t.items() if k != f"{FIRST}.lora_up.weight"}, "has only"),
        (poison, "NaN"),
        (lambda t: t | {f"{FIRST}.alpha": torch.ones(2)}, "has 2 numbers"),
        (lambda t: t | {f"{FIRST}.lora_up.weight": torch.ones(())}, "wrong kind"),
        (narrow, "does not fit.*made for sd15"),
        (lambda t: {}, "holds nothing"),
    ],
)
def test_what_is_not_a_lora_for_it(
    change: Change, message: str, pipe: Pipeline, theirs: Any, tmp_path: Path
) -> None:
    good = write_lora(tmp_path / "good.safetensors", theirs, kohya)
    bad = tmp_path / "bad.safetensors"
    save_file(change(load_file(good)), bad)
    before = digest(pipe)
    with pytest.raises(CheckpointError, match=message) as caught:
        pipe.load_lora_weights(bad)
    assert "bad.safetensors" in str(caught.value) and len(str(caught.value)) < 900
    assert digest(pipe) == before and pipe.get_list_adapters() == {}


def test_truncated_missing_and_ambiguous_files(pipe: Pipeline, theirs: Any, tmp_path: Path) -> None:
    good = write_lora(tmp_path / "good.safetensors", theirs, kohya)
    half = tmp_path / "half.safetensors"
    half.write_bytes(good.read_bytes()[:-100])
    for source, message in (
        (half, "truncated"),
        (tmp_path / "none.safetensors", "is no LoRA file"),
        (tmp_path, "2 safetensors files; say which with weight_name="),
    ):
        with pytest.raises(FastsdError, match=message):
            pipe.load_lora_weights(source)
    pipe.load_lora_weights(tmp_path, weight_name="good.safetensors")
    with pytest.raises(UsageError, match="loaded already"):
        pipe.load_lora_weights(good, adapter_name="default_0")
    with pytest.raises(UsageError, match="no adapter 'x' is loaded; there are default_0"):
        pipe.set_adapters("x")
    with pytest.raises(UsageError, match="1 adapters .* were given 2 weights"):
        pipe.set_adapters("default_0", [1, 2])
    with pytest.raises(UsageError, match="finite"):
        pipe.set_adapters("default_0", float("nan"))


def test_a_failure_half_way_restores_all(
    pipe: Pipeline, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = write_lora(tmp_path / "a.safetensors", theirs, kohya, seed=1)
    b = write_lora(tmp_path / "b.safetensors", theirs, kohya, seed=2)
    pipe.load_lora_weights(a, adapter_name="a")
    before = digest(pipe)
    plain, calls = Tensor.addmm_, [0]

    def failing(self: Tensor, *args: Any, **options: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 20:
            raise MemoryError
        return plain(self, *args, **options)

    monkeypatch.setattr(Tensor, "addmm_", failing)
    with pytest.raises(MemoryError):
        pipe.load_lora_weights(b, adapter_name="b")
    assert digest(pipe) == before and pipe.get_active_adapters() == ["a"]


def test_a_backend_of_fixed_weights_says_so() -> None:
    class Engine(Backend):
        name = "engine"

        def part(self, name: str, shapes: Any = None) -> Any:
            raise NotImplementedError

    with pytest.raises(UsageError, match="engine backend's weights are fixed.*export MODEL --lora"):
        Engine().weights("unet")


# --- threads --------------------------------------------------------------------------------------


def test_a_call_sees_one_set_of_weights(pipe: Pipeline, theirs: Any, tmp_path: Path) -> None:
    """Pictures drawn while adapters change are each of one state or the other, never between."""
    file = write_lora(tmp_path / "a.safetensors", theirs, kohya)
    off = draw(pipe)
    pipe.load_lora_weights(file, adapter_name="a")
    on = draw(pipe)
    done = threading.Event()
    drawn: list[np.ndarray] = []

    def keep_drawing() -> None:
        while not done.is_set() or len(drawn) < 2:
            drawn.append(draw(pipe))

    threads = [threading.Thread(target=keep_drawing) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(6):
        (pipe.disable_lora if i % 2 == 0 else pipe.enable_lora)()
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert all(min(float(np.abs(p - q).max()) for q in (on, off)) < 1e-5 for p in drawn)


def test_each_call_may_have_loras_of_its_own(pipe: Pipeline, theirs: Any, tmp_path: Path) -> None:
    """Four threads ask for two LoRAs in turns: each gets its own, and what is on stays on."""
    sets: list[dict[str, float] | None] = [{"a": 1.0}, {"b": 0.123456789}, {}, None]
    for seed, name in enumerate("ab"):
        file = write_lora(tmp_path / f"{name}.safetensors", theirs, kohya, seed=seed)
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, 0.5])

    def ask(i: int) -> Any:
        return pipe(PROMPT, seed=0, output_type="np", adapters=sets[i % 4], **CALL)

    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(ask, range(16)))
    for given in (0, 1, 2):
        pipe.set_adapters(list(sets[given] or {}), list((sets[given] or {}).values()))
        alone = pipe(PROMPT, seed=0, output_type="np", **CALL).images
        for output in drawn[given::4]:
            np.testing.assert_allclose(output.images, alone, atol=1e-5)
    pipe.set_adapters(["a", "b"], [0.5, 0.5])
    for output in drawn[3::4]:
        np.testing.assert_allclose(output.images, ask(3).images, atol=1e-5)
    recorded = [output.metadata[0]["lora"] for output in drawn[:4]]
    assert recorded == [
        ["a.safetensors:1"],
        ["b.safetensors:0.123456789"],
        None,
        ["a.safetensors:0.5", "b.safetensors:0.5"],
    ]
    assert pipe.get_active_adapters() == ["a", "b"]
    ask(1)  # leaves its own in the weights
    pipe.delete_adapters("b")
    assert pipe.get_active_adapters() == ["a"] and ask(3).metadata[0]["lora"] == recorded[3][:1]
    wrong: Any
    for wrong, message in (
        ({"c": 1.0}, "no adapter 'c' is loaded; there are a"),
        ("a", "adapters must map the names"),
        ({"a": float("nan")}, "an adapter's weight must be a finite number"),
    ):
        with pytest.raises(UsageError, match=message):
            pipe(PROMPT, adapters=wrong, **CALL)
    pipe.unload_lora_weights()


def test_a_call_inside_another_has_its_loras(
    pipe: Pipeline, theirs: Any, tmp_path: Path, sd1_folder: Path
) -> None:
    """It can ask for no others, nor another pipeline for some: they could wait for each other."""
    file = write_lora(tmp_path / "a.safetensors", theirs, kohya)
    pipe.load_lora_weights(file, adapter_name="a")
    pipe.disable_lora()
    other = Pipeline.from_pretrained(sd1_folder)
    other.load_lora_weights(file, adapter_name="a")
    recorded = []

    def inside(call: Any, step: int, *_: Any) -> None:
        if step == 0:
            recorded.append(pipe(PROMPT, **CALL).metadata[0]["lora"])
            recorded.append(other(PROMPT, **CALL).metadata[0]["lora"])
            for each in (pipe, other):
                with pytest.raises(UsageError, match="cannot be changed from inside a call"):
                    each(PROMPT, adapters={}, **CALL)

    pipe(PROMPT, adapters={"a": 1.0}, callback_on_step_end=inside, **CALL)
    assert recorded == [["a.safetensors:1"]] * 2
    pipe.unload_lora_weights()


def test_moving_to_where_it_is_waits_for_nobody(pipe: Pipeline) -> None:
    def move(call: Any, *_: Any) -> None:
        assert pipe.to("cpu") is pipe and pipe.to(pipe.dtype) is pipe

    pipe(PROMPT, callback_on_step_end=move, **CALL)


def test_a_lora_that_does_not_fit_the_memory_leaves_nothing(
    pipe: Pipeline, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_lora(tmp_path / "lora.safetensors", theirs, kohya)
    before, written = digest(pipe), 0

    def full(*_: Any) -> None:
        nonlocal written
        written += 1
        if written == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as short:
        short.setattr("fastsd.adapters.merge_", full)
        with pytest.raises(torch.OutOfMemoryError):
            pipe.load_lora_weights(file)
    assert not pipe.get_list_adapters() and not pipe._adapters._originals
    assert digest(pipe) == before


def test_loras_of_one_name_are_recorded_each(pipe: Pipeline, theirs: Any, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        file = write_lora(tmp_path / name / "pytorch_lora_weights.safetensors", theirs, kohya)
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.load_lora_weights(load_file(file))
    assert pipe.get_active_adapters() == ["default_0"]
    given = pipe(PROMPT, **CALL).metadata[0]
    assert given["not_recorded"] == ["lora"], "what no file holds cannot be loaded again"
    both = pipe(PROMPT, adapters={"a": 0.5, "b": 0.25}, **CALL).metadata[0]
    stem = "pytorch_lora_weights.safetensors"
    assert both["lora"] == [f"{stem}:0.5", f"{stem}:0.25"] and both["not_recorded"] == []


def test_a_lora_that_waited_for_another_precision_is_on_there(
    pipe: Pipeline, theirs: Any, tmp_path: Path
) -> None:
    """It was put in the weights that .to() let go of, and said to be on."""
    file = write_lora(tmp_path / "a.safetensors", theirs, kohya)
    drawing, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> dict[str, Tensor]:
        drawing.set()
        go_on.wait()
        return {}

    with ThreadPoolExecutor(3) as pool:
        call = pool.submit(lambda: pipe(PROMPT, callback_on_step_end=wait, **CALL))
        drawing.wait()
        changes: list[Future[Any]] = [
            pool.submit(lambda: pipe.to(torch.bfloat16)),
            pool.submit(lambda: pipe.load_lora_weights(file)),
        ]
        while pipe._adapters._lock._changers < 2:
            time.sleep(0.001)
        go_on.set()
        for each in (call, *changes):
            each.result()
    on = draw(pipe)
    pipe.disable_lora()
    assert pipe.dtype == torch.bfloat16 and not np.array_equal(on, draw(pipe))


def test_unnamed_loras_loaded_at_once_have_names(
    pipe: Pipeline, theirs: Any, tmp_path: Path
) -> None:
    file = write_lora(tmp_path / "a.safetensors", theirs, kohya, parts=["unet"])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: pipe.load_lora_weights(file), range(4)))
    loaded = pipe.get_list_adapters()["unet"]
    assert sorted(loaded) == [f"default_{i}" for i in range(4)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_pipeline_does_not_survive_a_fork(pipe: Pipeline) -> None:
    """In the child it would wait for torch's threads, which are not there, for ever."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            pipe(PROMPT, **CALL)
        except UsageError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"load it in each process with from_pretrained" in os.read(reader, 1000)
    draw(pipe)


def test_not_from_inside_a_call(pipe: Pipeline, theirs: Any, tmp_path: Path) -> None:
    pipe.load_lora_weights(write_lora(tmp_path / "a.safetensors", theirs, kohya))

    def change(call: Any, *_: Any) -> dict[str, Tensor]:
        pipe.disable_lora()
        return {}

    with pytest.raises(UsageError, match="inside a call"):
        pipe(PROMPT, seed=0, callback_on_step_end=change, **CALL)
    pipe.disable_lora()  # the lock was given back


def test_the_lock_lets_changers_in_and_users_back() -> None:
    lock = SharedLock()
    order: list[str] = []
    with lock.shared(), lock.shared():
        changer = threading.Thread(target=lambda: _note(lock.exclusive(), order, "change"))
        changer.start()
        while not lock._changers:
            time.sleep(0.001)
        with lock.shared():  # a user may use again though a changer waits
            order.append("use")
        user = threading.Thread(target=lambda: _note(lock.shared(), order, "late use"))
        user.start()
        time.sleep(0.02)
        assert order == ["use"]
    changer.join()
    user.join()
    assert order == ["use", "change", "late use"]


def test_an_interrupted_changer_leaves_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = SharedLock()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as waiting:
        waiting.setattr(lock._condition, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), lock.exclusive():
            pass
    with lock.exclusive():
        pass
    with lock.shared():
        pass


def _note(held: Any, order: list[str], what: str) -> None:
    with held:
        order.append(what)


def test_a_lora_in_a_subfolder(pipe: Pipeline, theirs: Any, tmp_path: Path) -> None:
    """As diffusers' scripts say it; and what neither knows is an error."""
    (tmp_path / "styles").mkdir()
    write_lora(tmp_path / "styles" / "ink.safetensors", theirs, kohya)
    pipe.load_lora_weights(tmp_path, subfolder="styles", weight_name="ink.safetensors")
    assert pipe.get_active_adapters() == ["default_0"]
    with pytest.raises(UsageError, match="did you mean 'adapter_name'"):
        pipe.load_lora_weights(tmp_path, adapter_nme="ink")


def test_a_lora_that_does_not_come_along_is_off(
    pipe: Pipeline, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where .to() finds no memory for it: what is said to be on is what draws."""
    pipe.load_lora_weights(write_lora(tmp_path / "lora.safetensors", theirs, kohya))
    write = Adapters._write

    def full(self: Adapters, target: Any, weight: Any, active: Any, loaded: Any) -> None:
        if active:
            raise torch.OutOfMemoryError("CUDA out of memory")
        write(self, target, weight, active, loaded)

    monkeypatch.setattr(Adapters, "_write", full)
    with pytest.raises(torch.OutOfMemoryError):
        pipe.to(torch.bfloat16)
    monkeypatch.undo()
    assert pipe.dtype == torch.bfloat16 and not pipe.get_active_adapters()

    def draw() -> Any:
        return pipe(PROMPT, seed=0, output_type="np", **CALL).images

    without = draw()
    pipe.enable_lora()
    assert not np.array_equal(draw(), without)
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(draw(), without)
