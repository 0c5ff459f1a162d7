"""Captured steps: replays draw the pictures that uncaptured steps draw, and nothing captures anew.

The capture is tests/replay.py's, on the CPU; backends/cuda_graph.py does the same on a GPU.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsd import SAMPLERS, Pipeline, engine
from fastsd.backends.eager import EagerBackend
from fastsd.engine import Loops
from fastsd.errors import NumericsError, UsageError
from tests import fixtures, replay
from tests.pictures import mask, picture, quiet

Draw = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def plain(sd1_folder: Path) -> Pipeline:
    """One that captures nothing, whatever backends are made to do."""
    pipeline = quiet(sd1_folder)
    pipeline._loops = uncaptured(pipeline)
    return pipeline


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EagerBackend, "captures", True)
    monkeypatch.setattr(EagerBackend, "capture", lambda self, step: replay.capture(step))


@pytest.fixture
def captured(sd1_folder: Path, capturing: None) -> Pipeline:
    return quiet(sd1_folder)


def draw(pipeline: Pipeline, prompt: Any = "a red apple", **settings: Any) -> np.ndarray:
    given: dict[str, Any] = dict(num_inference_steps=3, seed=0, output_type="np") | settings
    pictures: np.ndarray = pipeline(prompt, **given).images
    return pictures


# --- the stand-in itself: what it lets through would be wrong on a GPU ----------------------------


def test_a_replay_repeats_the_work_on_the_same_memory() -> None:
    x, y = torch.zeros(3), torch.zeros(3)

    def step() -> None:
        y.copy_(x.view(3, 1).expand(3, 2).sum(1) * 2)
        x.add_(1)

    again = replay.capture(step)
    x.fill_(5)
    again()
    again()
    assert y.tolist() == [24] * 3 and x.tolist() == [7] * 3


def test_a_replay_runs_no_python() -> None:
    x, number, given = torch.zeros(1), [1.0], [torch.ones(1)]

    def step() -> None:
        x.copy_(given[0] * number[0])

    again = replay.capture(step)
    number[0], given[0] = 5.0, torch.full((1,), 7.0)
    again()
    assert x.item() == 1.0, "neither the new number nor the new tensor may be seen"


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.add_(x[0].item()),
        lambda x: x.add_(torch.tensor([1.0, 2.0, 3.0])),
        lambda x: x.copy_(torch.randn(3)),
    ],
    ids=("waits for the device", "reads the host", "draws"),
)
def test_what_a_graph_cannot_hold_is_refused(step: Callable[[Tensor], None]) -> None:
    x = torch.zeros(3)
    with pytest.raises(RuntimeError, match="permitted|repeat"):
        replay.capture(lambda: step(x))


# --- the pictures are the same, and one capture serves them all -----------------------------------


def test_nothing_that_a_request_changes_captures_anew(plain: Pipeline, captured: Pipeline) -> None:
    requests: list[dict[str, Any]] = [
        dict(),
        dict(prompt="a blue house"),
        dict(seed=7),
        dict(guidance_scale=2.5),
        dict(negative_prompt="fog"),
        dict(num_inference_steps=9),
        dict(num_inference_steps=1),
        dict(sampler="euler", sigmas=[9.0, 3.0, 0.5, 0.0]),
        *(dict(sampler=name, num_inference_steps=5) for name in SAMPLERS),
    ]
    for request in requests:
        np.testing.assert_array_equal(draw(captured, **request), draw(plain, **request))
    assert captured._loops.captures == 1
    np.testing.assert_array_equal(
        draw(captured, guidance_scale=1.0), draw(plain, guidance_scale=1.0)
    )
    assert captured._loops.captures == 2, "guidance on and off are two graphs"
    draw(captured)
    assert captured._loops.captures == 2


@pytest.mark.parametrize("family", ["sd2_folder", "sdxl_folder"])
def test_every_family(family: str, capturing: None, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    captured, plain = quiet(folder), quiet(folder)
    plain._loops = uncaptured(plain)
    for prompt, seed in (("a red apple", 0), ("a house by the sea", 4)):
        ours = draw(captured, prompt, seed=seed)
        np.testing.assert_array_equal(ours, draw(plain, prompt, seed=seed))
    assert captured._loops.captures == 1


def test_every_task(
    plain: Pipeline, captured: Pipeline, sd1_folder: Path, capturing: None, tmp_path: Path
) -> None:
    """A picture to start from needs no graph of its own; a mask needs one, and rescaling one."""
    size = (128, 128)
    tasks: list[tuple[int, dict[str, Any]]] = [
        (1, dict()),
        (1, dict(image=picture(size), strength=0.7)),
        (1, dict(image=picture(size, seed=1), strength=0.4, sampler="dpmpp_2m")),
        (2, dict(image=picture(size), mask_image=mask(size), strength=0.7)),
        (2, dict(image=picture(size, seed=1), mask_image=mask(size, (64, 0, 128, 128)))),
        (3, dict(guidance_rescale=0.7)),
        (3, dict(guidance_rescale=0.2)),
    ]
    for captures, task in tasks:
        np.testing.assert_array_equal(draw(captured, **task), draw(plain, **task))
        assert captured._loops.captures == captures

    folder = fixtures.write_inpainting(tmp_path / "inpainting", sd1_folder)
    ours, theirs = quiet(folder), quiet(folder)
    theirs._loops = uncaptured(theirs)
    for seed in (0, 1):
        task = dict(image=picture(size, seed=seed), mask_image=mask(size), seed=seed)
        np.testing.assert_array_equal(draw(ours, **task), draw(theirs, **task))
    assert ours._loops.captures == 1


def uncaptured(pipeline: Pipeline) -> Loops:
    return Loops(pipeline._backend, graph="none")


@pytest.mark.parametrize("invariant", [False, True])
def test_batches(plain: Pipeline, captured: Pipeline, invariant: bool) -> None:
    for prompts in (["a cat", "a dog", "an apple"], ["a dog", "a house", "a cat"]):
        settings: dict[str, Any] = dict(seed=[3, 1, 2], batch_invariant=invariant)
        np.testing.assert_array_equal(
            draw(captured, prompts, **settings), draw(plain, prompts, **settings)
        )
    assert captured._loops.captures == 1


def test_prepared_is_captured(captured: Pipeline) -> None:
    captured.prepare(batch=2, height=72, width=136)
    captured.prepare(batch=2, height=72, width=136, guidance=False)
    assert captured._loops.captures == 2
    draw(captured, ["a cat", "a dog"], height=72, width=136, num_inference_steps=7)
    draw(captured, ["a cat", "a dog"], height=72, width=136, guidance_scale=1.0)
    assert captured._loops.captures == 2
    said = captured.explain()
    assert said[0] == "backend: eager, fp32, on cpu"
    assert sum("guided, one step" in line for line in said) == 2


def test_a_model_of_few_steps_is_prepared_as_it_draws(capturing: None, sd1_folder: Path) -> None:
    few = Pipeline.from_pretrained(sd1_folder, preset="lcm")
    few.set_progress_bar_config(disable=True)
    few.prepare()
    few("a cat", seed=0)
    assert few._loops.captures == 1, "without guidance"
    few.prepare(guidance=True)
    few("a cat", seed=0, guidance_scale=3.0)
    assert few._loops.captures == 2


def test_a_model_that_inpaints_can_be_prepared(
    sd1_folder: Path, capturing: None, tmp_path: Path
) -> None:
    pipeline = quiet(fixtures.write_inpainting(tmp_path / "inpaints", sd1_folder))
    pipeline.prepare(height=64, width=72)
    assert pipeline._loops.captures == 1
    size = (64, 72)
    draw(pipeline, image=picture(size), mask_image=mask(size))
    assert pipeline._loops.captures == 1


def test_a_lora_needs_no_new_capture(plain: Pipeline, captured: Pipeline) -> None:
    """On and off again: the pictures of uncaptured steps, and the first one to the bit."""
    lora = {
        f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{side}.weight": tensor
        for side, tensor in (("A", torch.randn(4, 64)), ("B", torch.randn(64, 4)))
    }
    first = draw(captured)
    graphs = captured.explain()
    try:
        for pipeline in (captured, plain):
            pipeline.load_lora_weights(lora)
        changed = draw(captured)
        np.testing.assert_array_equal(changed, draw(plain))
        assert not np.array_equal(changed, first)
    finally:
        plain.unload_lora_weights()
    captured.unload_lora_weights()
    np.testing.assert_array_equal(draw(captured), first)
    assert captured._loops.captures == 1 and captured.explain() == graphs


def test_what_was_captured_elsewhere_is_not_replayed(captured: Pipeline) -> None:
    before = draw(captured)
    captured.to(torch.bfloat16)
    half = draw(captured)
    assert captured._loops.captures == 1, "of the new backend's loops"
    np.testing.assert_allclose(half, before, atol=0.1)
    assert not np.array_equal(half, before)


def test_weights_are_replaced_in_place(sd1_folder: Path, captured: Pipeline) -> None:
    """As a LoRA does it: the buffers stay, so a captured step sees the new weights."""
    draw(captured)
    changed = quiet(sd1_folder)
    for pipeline in (captured, changed):
        backend = pipeline._backend
        assert isinstance(backend, EagerBackend)
        generator = torch.Generator().manual_seed(0)
        for weight in backend.part("unet").parameters():  # type: ignore[attr-defined]
            weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
    changed._loops = uncaptured(changed)
    np.testing.assert_array_equal(draw(captured), draw(changed))
    assert captured._loops.captures == 1


# --- what runs once a call -----------------------------------------------------------------------


def test_text_encoders_are_graphs_too(
    sd1_folder: Path, capturing: None, plain: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for every layout of what they read, and for every layer that is read of them."""
    captured = quiet(sd1_folder)
    backend = captured._backend
    assert isinstance(backend, EagerBackend)
    ran: list[tuple[int, ...]] = []
    encode = backend.part("text_encoder")

    def counted(*inputs: Tensor) -> Any:
        ran.append(tuple(inputs[0].shape))
        return encode(*inputs)

    backend._parts["text_encoder"] = counted
    requests: list[tuple[dict[str, Any], int]] = [
        (dict(), 1),
        (dict(prompt="a blue house", negative_prompt="fog", seed=3), 1),
        (dict(prompt="a (red:1.4) apple", prompt_syntax="weighted"), 1),
        (dict(clip_skip=1), 2),
        (dict(guidance_scale=1.0), 2),
        (dict(prompt=" ".join(["a red apple"] * 40), prompt_syntax="weighted"), 3),
        (dict(prompt="a dog", seed=5), 3),
    ]
    for request, graphs in requests:
        np.testing.assert_array_equal(draw(captured, **request), draw(plain, **request))
        assert len(captured._loops._functions) == graphs
        assert f"what runs once a call: {graphs} graphs" in captured.explain()
    assert len(ran) == 3 * (replay.WARM_UPS + 1), "a replay runs no Python"
    captured.use(attention="sdpa")  # other kernels: what is captured is forgotten
    assert not captured._loops._functions
    monkeypatch.setattr(engine, "KEPT_FUNCTIONS", 2)
    for prompts in (["a cat"] * n for n in (1, 2, 3, 1)):
        draw(captured, prompts, seed=0)
        assert len(captured._loops._functions) <= 2


def test_learned_words_reach_a_captured_text_encoder(
    sd1_folder: Path, capturing: None, plain: Pipeline
) -> None:
    captured, uncaptured_ = quiet(sd1_folder), quiet(sd1_folder)
    uncaptured_._loops = uncaptured(uncaptured_)
    width = captured.config.text_encoders[0].width
    before = draw(captured, "a <thing>")
    for pipeline in (captured, uncaptured_):
        vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
        pipeline.load_textual_inversion({"<thing>": vectors})
    ours, theirs = draw(captured, "a <thing>"), draw(uncaptured_, "a <thing>")
    np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(ours, before)


def test_nothing_is_kept_of_text_encoders_where_memory_is_low(captured: Pipeline) -> None:
    captured._loops = Loops(captured._backend, limit_bytes=0)
    draw(captured)
    assert not captured._loops._functions and captured._loops.captures == 1


def test_a_text_encoder_that_cannot_be_captured_runs_as_it_is(
    captured: Pipeline,
    plain: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried = 0

    def refuse(self: EagerBackend, step: Callable[[], None]) -> Callable[[], None]:
        nonlocal tried
        tried += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(EagerBackend, "capture", refuse)
    with caplog.at_level(logging.WARNING, "fastsd"):
        np.testing.assert_array_equal(draw(captured), draw(plain))
        draw(captured)
    assert "uncaptured, which is slower: what runs once a call; capture" in caplog.messages[0]
    assert tried == 2, "a text encoder's once, and a step's"
    (line,) = [line for line in captured.explain() if "what runs once a call" in line]
    assert line.startswith("uncaptured: ")


@pytest.mark.parametrize("graph", ["step", "loop", "none"])
def test_nothing_keeps_a_pipeline_that_is_dropped(
    sd1_folder: Path, capturing: None, graph: str
) -> None:
    """Graphs hold gigabytes: they go with the last reference, not when Python next looks for
    cycles."""
    pipeline = Pipeline.from_pretrained(sd1_folder, graph=graph)
    pipeline.set_progress_bar_config(disable=True)
    draw(pipeline)
    loops, backend = weakref.ref(pipeline._loops), weakref.ref(pipeline._backend)
    gc.collect()
    gc.disable()
    try:
        pipeline.use(attention="sdpa")
        assert loops() is None
        draw(pipeline)
        del pipeline
        assert backend() is None
    finally:
        gc.enable()


# --- the whole loop and the picture as one --------------------------------------------------------


def test_a_whole_loop_draws_the_same_pictures(
    plain: Pipeline, sd1_folder: Path, capturing: None
) -> None:
    """One capture a row count; a callback or latents as output take the steps one by one."""
    whole = Pipeline.from_pretrained(sd1_folder, graph="loop")
    whole.set_progress_bar_config(disable=True)
    requests: list[dict[str, Any]] = [
        dict(),
        dict(prompt="a blue house", seed=5, guidance_scale=3.0),
        dict(sampler="euler_a", num_inference_steps=4),
        dict(sampler="dpmpp_2m", num_inference_steps=4),
    ]
    for request in requests:
        np.testing.assert_array_equal(draw(whole, **request), draw(plain, **request))
    assert whole._loops.captures == 1, "PNDM's three steps are four rows, as the others have"
    ours = draw(whole, num_inference_steps=5)
    np.testing.assert_array_equal(ours, draw(plain, num_inference_steps=5))
    assert whole._loops.captures == 2
    assert "rows and the finish" in whole.explain()[-1]
    seen: list[int] = []

    def see(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {}

    np.testing.assert_array_equal(draw(whole, callback_on_step_end=see), draw(plain))
    assert seen == [0, 1, 2, 3]
    for _ in range(2):
        (ours,) = whole("a red apple", num_inference_steps=3, seed=0).images
        (expected,) = plain("a red apple", num_inference_steps=3, seed=0).images
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))
    assert whole._loops.captures == 4, "rounding to uint8 is in the graph of a picture for files"
    latents = whole("a red apple", num_inference_steps=3, seed=0, output_type="latent").images
    expected = plain("a red apple", num_inference_steps=3, seed=0, output_type="latent").images
    assert torch.equal(latents, expected) and whole._loops.captures == 4


# --- steps that reuse what the deeper layers made ------------------------------------------------


@pytest.mark.parametrize("graph", ["step", "loop"])
@pytest.mark.parametrize("family", ["sd1_folder", "sdxl_folder"])
def test_cached_steps_are_two_graphs(
    family: str, graph: str, capturing: None, request: pytest.FixtureRequest
) -> None:
    """One capture for whatever interval, steps and prompt; a whole loop is of one pattern."""
    folder = request.getfixturevalue(family)
    cached = Pipeline.from_pretrained(folder, graph=graph)
    plain = quiet(folder)
    plain._loops = uncaptured(plain)
    cached.set_progress_bar_config(disable=True)
    requests: list[dict[str, Any]] = [
        dict(num_inference_steps=8, cache_interval=2),
        dict(num_inference_steps=8, cache_interval=2, prompt="a blue house", seed=3),
        dict(num_inference_steps=8, cache_interval=3, guidance_scale=3.0),
        dict(num_inference_steps=6, cache_interval=2, sampler="dpmpp_2m"),
        dict(num_inference_steps=8, cache_interval=2),
    ]
    if graph == "step":
        cached.prepare(cache_interval=2)
    for settings in requests:
        np.testing.assert_array_equal(draw(cached, **settings), draw(plain, **settings))
    assert cached._loops.captures == (1 if graph == "step" else 3)
    assert not np.array_equal(draw(cached, **requests[0]), draw(cached, num_inference_steps=8))
    if graph == "step":
        assert "guided, a step and a shallow one" in "".join(cached.explain())
        assert cached._loops.captures == 2, "plain steps are captured apart"


def test_a_new_prompt_in_a_cached_run_is_not_mixed_with_the_old(
    captured: Pipeline, plain: Pipeline
) -> None:
    """The step after it runs all layers; another weight of guidance leaves the pattern."""

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 5.0
        return {"prompt_embeds": 2 * tensors["prompt_embeds"]} if step == 2 else {}

    settings: dict[str, Any] = dict(
        num_inference_steps=8,
        cache_interval=2,
        sampler="ddim",
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    ours = draw(captured, **settings)
    np.testing.assert_array_equal(ours, draw(plain, **settings))
    unet = plain._backend.modules["unet"]  # type: ignore[attr-defined]
    whole: list[int] = []
    hook = unet.mid_block.register_forward_hook(lambda *_: whole.append(1))
    draw(plain, **settings)
    hook.remove()
    assert len(whole) == 6, "0 1 2 4 6 as ever, and 3, the first of the new prompt"
    assert captured._loops.captures == 1


@pytest.mark.parametrize("graph", ["step", "loop"])
def test_a_picture_of_nothing_is_refused_before_it_is_rounded(
    sd1_folder: Path, capturing: None, graph: str
) -> None:
    pipeline = Pipeline.from_pretrained(sd1_folder, graph=graph)
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a red apple", num_inference_steps=3, seed=0)
    backend = pipeline._backend
    assert isinstance(backend, EagerBackend)
    weights = dict(backend.modules["vae"].named_parameters())
    weights["decoder.conv_out.bias"].data[1] = float("nan")
    with pytest.raises(NumericsError, match="the picture became NaN"):
        pipeline("a red apple", num_inference_steps=3, seed=0)


def test_graph_none_captures_nothing(plain: Pipeline, sd1_folder: Path, capturing: None) -> None:
    never = Pipeline.from_pretrained(sd1_folder, graph="none")
    never.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(never), draw(plain))
    assert never._loops.captures == 0 and "uncaptured: as asked" in never.explain()[-1]
    with pytest.raises(UsageError, match="step, loop, none"):
        Pipeline.from_pretrained(sd1_folder, graph="lop")
    with pytest.raises(UsageError, match="use graph='step'"):
        Pipeline.from_pretrained(sd1_folder, graph="loop", low_memory=True)


def test_kernels_can_be_chosen_and_say_so(captured: Pipeline) -> None:
    draw(captured)
    captured.use(group_norm="library", sampler_step="library")
    assert "group_norm: library (asked for)" in captured.explain()
    assert "sampler_step: library (asked for)" in captured.explain()
    draw(captured)
    assert captured._loops.captures == 1, "what was captured before ran other kernels"
    captured.to(torch.bfloat16)
    assert "group_norm: library (asked for)" in captured.explain()
    assert "sampler_step: library (asked for)" in captured.explain()
    with pytest.raises(UsageError, match="runs on GPUs, not on cpu"):
        captured.use(attention="cudnn")
    with pytest.raises(UsageError, match="op 'convolution' is unknown"):
        captured.use(convolution="triton")


# --- room and memory ------------------------------------------------------------------------------


def test_more_rows_than_there_is_room_for_capture_once(
    plain: Pipeline, captured: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CAPTURED_ROWS", 4)
    for steps, captures in ((2, 1), (10, 2), (14, 2), (3, 2), (20, 3)):
        request: dict[str, Any] = dict(num_inference_steps=steps, sampler="euler")
        np.testing.assert_array_equal(draw(captured, **request), draw(plain, **request))
        assert captured._loops.captures == captures


def test_the_least_recently_used_goes_first(captured: Pipeline) -> None:
    sizes = (64, 72, 80)
    for side in sizes:  # once, to see how much they take
        draw(captured, height=side, width=side)
    held = sum(kept.size_bytes for kept in captured._loops._kept.values())
    assert held > 0
    captured._loops = Loops(captured._backend, limit_bytes=int(held * 0.9))
    for side in (64, 72, 64, 80):  # 72 is the oldest when 80 needs its place
        draw(captured, height=side, width=side)
    assert captured._loops.captures == 3
    draw(captured, height=64, width=64)
    assert captured._loops.captures == 3
    draw(captured, height=72, width=72)
    assert captured._loops.captures == 4


def test_where_memory_runs_out_the_other_graphs_make_room(
    plain: Pipeline, captured: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_two_fit(self: EagerBackend, step: Callable[[], None]) -> Callable[[], None]:
        loops = captured._loops
        if sum(kept.loop is not None for kept in loops._kept.values()) >= 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return replay.capture(step)

    monkeypatch.setattr(EagerBackend, "capture", only_two_fit)
    for side in (64, 72, 80, 64):
        ours = draw(captured, height=side, width=side)
        np.testing.assert_array_equal(ours, draw(plain, height=side, width=side))
    assert captured._loops.captures == 4 and not captured._loops._failures
    assert [kept.loop is not None for kept in captured._loops._kept.values()] == [True, True]


def test_a_failed_capture_is_said_once_and_draws_all_the_same(
    plain: Pipeline,
    captured: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(self: EagerBackend, step: Callable[[], None]) -> Callable[[], None]:
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(EagerBackend, "capture", refuse)
    with caplog.at_level(logging.WARNING, "fastsd"):
        for prompt in ("a cat", "a dog"):
            for guidance in (1.0, 7.5):
                ours = draw(captured, prompt, guidance_scale=guidance)
                np.testing.assert_array_equal(ours, draw(plain, prompt, guidance_scale=guidance))
    told = [record.getMessage() for record in caplog.records]
    assert all("capture failed (operation not permitted" in line for line in told)
    assert [line.split("; ")[0].split(": ")[1] for line in told] == [
        "what runs once a call",
        "steps",
    ]
    assert "not permitted" in captured.explain()[-1]


# --- callbacks and threads ------------------------------------------------------------------------


def stop_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 1:
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        pipe._guidance_scale = 0.0
    return tensors


def change_all(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 1:
        pipe._guidance_scale = 3.0
        return {"latents": tensors["latents"] * 0.97, "prompt_embeds": tensors["prompt_embeds"] * 2}
    return {}


@pytest.mark.parametrize("callback", [stop_guidance, change_all])
def test_callbacks(callback: Any, plain: Pipeline, captured: Pipeline) -> None:
    settings: dict[str, Any] = dict(
        num_inference_steps=5,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    for _ in range(2):
        np.testing.assert_array_equal(draw(captured, **settings), draw(plain, **settings))
        np.testing.assert_array_equal(draw(captured), draw(plain))
    assert captured._loops.captures == 1


def test_a_callback_may_draw_with_the_same_pipeline(plain: Pipeline, captured: Pipeline) -> None:
    inner: list[np.ndarray] = []

    def preview(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        inner.append(draw(captured, "a dog", seed=9))
        return {}

    ours = draw(captured, callback_on_step_end=preview)
    np.testing.assert_array_equal(ours, draw(plain))
    for drawn in inner:
        np.testing.assert_array_equal(drawn, draw(plain, "a dog", seed=9))


def test_callbacks_that_draw_other_sizes_do_not_wait_for_each_other(captured: Pipeline) -> None:
    """Each thread holds the loop that the other's callback would wait for."""
    for side in (64, 72):
        captured.prepare(height=side, width=side)
    both = threading.Barrier(2)

    def request(side: int, other: int) -> np.ndarray:
        def preview(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                both.wait(30)
                draw(captured, height=other, width=other)
            return {}

        return draw(captured, height=side, width=side, callback_on_step_end=preview)

    pool = ThreadPoolExecutor(2)
    drawn = [pool.submit(request, *sides) for sides in ((64, 72), (72, 64))]
    pool.shutdown(wait=False)
    for side, future in zip((64, 72), drawn, strict=True):
        assert future.result(60).shape[1] == side


def test_eight_threads_share_the_captured_steps(plain: Pipeline, captured: Pipeline) -> None:
    def request(i: int) -> dict[str, Any]:
        return dict(
            prompt=f"picture {i}",
            seed=i,
            height=64 + 8 * (i % 2),
            width=64,
            num_inference_steps=2 + i % 3,
            sampler=["pndm", "euler_a", "unipc", "ddim"][i % 4],
        )

    alone = [draw(plain, **request(i)) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            together = pool.map(lambda i: draw(captured, **request(i)), range(8))
            for ours, expected in zip(together, alone, strict=True):
                np.testing.assert_array_equal(ours, expected)
    assert captured._loops.captures == 2


def test_an_error_leaves_the_loop_usable(plain: Pipeline, captured: Pipeline) -> None:
    class Cancelled(Exception):
        pass

    def cancel(*_: Any) -> Iterator[None]:
        raise Cancelled

    with pytest.raises(Cancelled):
        draw(captured, callback_on_step_end=cancel)
    np.testing.assert_array_equal(draw(captured), draw(plain))
