"""What only a GPU can show: CUDA graphs, half precision. tests/test_graphs.py holds the logic."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from fastsd import Pipeline
from fastsd.backends.eager import EagerBackend
from fastsd.backends.fp8 import SINCE as FP8_SINCE
from fastsd.checkpoints import open_checkpoint
from fastsd.errors import UsageError
from fastsd.export.build import export
from fastsd.export.calibration import calibrate_checkpoint
from fastsd.export.parts import Request
from fastsd.export.to_aoti_cuda import FORM
from fastsd.kernels.conv3x3 import SINCE as CONVOLUTIONS_SINCE
from fastsd.quality import psnr
from fastsd.quant.calibrate import relative_error
from fastsd.quant.linear import Fp8Linear
from fastsd.quant.spec import Rounding

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def open_on_gpu(folder: Path | str, **options: Any) -> Pipeline:
    pipeline = Pipeline.from_pretrained(folder, device="cuda", **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Pipeline, prompt: str = "a red apple", **settings: Any) -> Any:
    return pipeline(prompt, **dict(num_inference_steps=6, seed=0) | settings).images[0]


@pytest.mark.parametrize("graph", ["step", "loop"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_graph_draws_what_uncaptured_steps_draw(
    sd1_folder: Path, graph: str, precision: str
) -> None:
    captured = open_on_gpu(sd1_folder, graph=graph, precision=precision)
    plain = open_on_gpu(sd1_folder, graph="none", precision=precision)
    captured.prepare(num_inference_steps=6)
    captures = captured._loops.captures
    requests: list[dict[str, Any]] = [
        dict(),
        dict(prompt="a dog", seed=3),
        dict(sampler="ddim", guidance_scale=2.0),
    ]
    for request in requests:
        ours, expected = (
            np.asarray(draw(pipe, **request)).astype(int) for pipe in (captured, plain)
        )
        # In fp32 cuDNN sums in another order where it is captured: seen on an H200, by one level.
        assert np.abs(ours - expected).max() <= (1 if precision == "fp32" else 0)
    # the checkpoint's PNDM has a row more than DDIM, which matters to a whole loop only
    assert captured._loops.captures - captures == (1 if graph == "loop" else 0)


@pytest.mark.parametrize("family", ["sd1_folder", "sd2_folder", "sdxl_folder"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_near_fp32(
    family: str, precision: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    exact = draw(open_on_gpu(folder, precision="fp32"))
    assert psnr(draw(open_on_gpu(folder, precision=precision)), exact) >= 25


def test_previews_are_of_what_our_kernels_step_makes(sd1_folder: Path) -> None:
    shown: dict[str, list[np.ndarray[Any, Any]]] = {"triton": [], "library": []}
    for implementation, pictures in shown.items():

        def preview(step: int, so_far: list[Any], kept: list[Any] = pictures) -> None:
            kept.append(np.asarray(so_far[0]))

        draw(open_on_gpu(sd1_folder).use(sampler_step=implementation), preview=preview)
    for ours, expected in zip(*shown.values(), strict=True):
        assert np.abs(ours.astype(int) - expected).max() <= 1
        assert expected.std() > 0


def test_low_memory_draws_the_same_picture(sd1_folder: Path) -> None:
    """64 latents and fewer are one tile: nothing but the place of the weights differs."""
    low, plain = (  # a VAE in the host's memory keeps the library's convolutions
        open_on_gpu(sd1_folder, low_memory=low).use(conv3x3="library") for low in (True, False)
    )
    assert "vae: in the host's locked memory, on the GPU while it runs" in low.explain()
    for seed in (0, 1):
        ours, expected = draw(low, seed=seed), draw(plain, seed=seed)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_what_loras_replace_waits_in_the_hosts_memory(weights: str | None) -> None:
    options: dict[str, Any] = {"precision": "fp16", "weights": weights}
    low, plain = (
        open_on_gpu("builtin", low_memory=low, **options).use(conv3x3="library")
        for low in (True, False)
    )
    before = draw(low)
    for pipe in (low, plain):
        pipe.load_lora_weights("builtin-lcm")
    places = {each.device.type for each in low._adapters._originals.values()}
    assert places == {"cpu"}
    np.testing.assert_array_equal(np.asarray(draw(low)), np.asarray(draw(plain)))
    low.unload_lora_weights()
    np.testing.assert_array_equal(np.asarray(draw(low)), np.asarray(before))


def test_weights_in_int8_take_less_memory_for_a_near_picture(sdxl_folder: Path) -> None:
    def held(pipe: Pipeline) -> int:
        unet = cast(EagerBackend, pipe._backend).modules["unet"]
        return sum(each.numel() * each.element_size() for each in unet.state_dict().values())

    small = open_on_gpu(sdxl_folder, precision="fp16", weights="int8", low_memory=True).prepare()
    plain, captures = open_on_gpu(sdxl_folder, precision="fp16"), small._loops.captures
    assert held(small) < 0.6 * held(plain)
    for seed in (0, 1):
        assert psnr(draw(small, seed=seed), draw(plain, seed=seed)) >= 25
    assert small._loops.captures == captures


def test_our_attention_to_few_keys_leaves_longer_texts_to_torch() -> None:
    ours = open_on_gpu("builtin", precision="fp16").use(attention="triton")
    plain = open_on_gpu("builtin", precision="fp16").use(attention="sdpa")
    for prompt in ("a red apple", "a red apple, " * 40):
        settings = {"prompt": prompt, "prompt_syntax": "weighted"}
        assert psnr(draw(ours, **settings), draw(plain, **settings)) >= 35


def test_a_model_in_fp8_draws_a_near_picture() -> None:
    if torch.cuda.get_device_capability() < FP8_SINCE:
        pytest.skip("this GPU has no fp8 products")
    rounded = open_on_gpu("builtin", precision="fp16", weights="fp8")
    plain = open_on_gpu("builtin", precision="fp16")
    said = [line for line in rounded.explain() if line.startswith("fp8: ")]
    assert "fp8: 20 linear layers and " in said[0], said
    if torch.cuda.get_device_capability() >= CONVOLUTIONS_SINCE:
        assert "38 convolutions of unet and decoder" in said[0], said
    for seed in (0, 1):
        assert 25 <= psnr(draw(rounded, seed=seed), draw(plain, seed=seed)) < 100
    with pytest.raises(UsageError, match="rounded to fp8, and take no adapters"):
        rounded.load_lora_weights("builtin-lcm")
    with pytest.raises(UsageError, match="stays where it was loaded"):
        rounded.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("op", "kernel"),
    [("group_norm", "triton"), ("group_norm", "triton-group"), ("sampler_step", "triton")]
    + [("layer_norm", "triton"), ("geglu", "triton"), ("residual", "triton")]
    + [("conv3x3", "triton"), ("linear", "triton")],
)
def test_our_kernels_draw_the_same_picture(sd1_folder: Path, op: str, kernel: str) -> None:
    if op in ("conv3x3", "linear") and torch.cuda.get_device_capability() < CONVOLUTIONS_SINCE:
        pytest.skip("this GPU does not load rectangles")
    others = {"linear": "library"}  # or it would gate
    ours = draw(open_on_gpu(sd1_folder, precision="fp16").use(**{**others, op: kernel}))
    librarys = draw(open_on_gpu(sd1_folder, precision="fp16").use(**{**others, op: "library"}))
    assert psnr(ours, librarys) >= 35


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_an_fp8_linear_is_the_formula(dtype: torch.dtype, bias: bool) -> None:
    if torch.cuda.get_device_capability() < FP8_SINCE:
        pytest.skip("this GPU has no fp8 products")
    torch.manual_seed(0)
    for rows, width, out in ((1, 320, 960), (17, 640, 640), (4225, 5120, 1280)):
        layer = torch.nn.Linear(width, out, bias=bias).to("cuda", dtype).requires_grad_(False)
        rounded = Fp8Linear(layer.weight, layer.bias, Rounding(-4.0, 5.0))
        x = torch.randn(rows, width, device="cuda", dtype=dtype)
        q = (x.float() * rounded.multiplier).to(torch.float8_e4m3fn).float() * rounded.scale
        weight = rounded.weight.float() * rounded.weight_scale
        expected = torch.nn.functional.linear(
            q.cpu(), weight.cpu(), None if layer.bias is None else layer.bias.float().cpu()
        )
        got = rounded(x)
        assert got.dtype == dtype
        assert relative_error([got.float().cpu()], [expected]) < 1e-2
        graph, given = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            replayed = rounded(given)
        graph.replay()
        assert torch.equal(replayed, got)


@torch.no_grad()
def test_calibrating_on_a_gpu_finds_the_same_ranges(sd1_folder: Path) -> None:
    checkpoint = open_checkpoint(sd1_folder)
    found = [
        calibrate_checkpoint(checkpoint, ("a cat",), size=(64, 64), form=FORM, device=device)
        for device in ("cpu", "cuda")
    ]
    theirs, ours = (each.spec.layers for each in found)
    assert ours.keys() == theirs.keys()
    for name, rounding in ours.items():
        assert rounding.high == pytest.approx(theirs[name].high, rel=0.05), name


@pytest.mark.slow  # torch tries out kernels for every product
@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.02), ("fp8", 0.1)])
def test_an_engine_compiled_for_this_gpu_draws_the_same_picture(
    precision: str, error: float, sd1_folder: Path, tmp_path: Path
) -> None:
    request = Request(target="aoti-cuda", precision=precision, size=(128, 128), layout="fast")
    artifact = export(open_checkpoint(sd1_folder), "sd1", request, tmp_path / "engine")
    assert artifact.manifest.receipt is not None
    assert max(artifact.manifest.receipt["parts"].values()) < error
    here = [str(folder).encode() for folder in (tmp_path, Path.home(), tempfile.gettempdir())]
    for file in (path for path in artifact.path.rglob("*") if path.is_file()):
        assert not any(folder in file.read_bytes() for folder in here), file
    engine = open_on_gpu(artifact.path).prepare()
    captures, eager = engine._loops.captures, open_on_gpu(sd1_folder, precision="fp16")
    for prompt, seed in (("a red apple", 0), ("a dog", 3)):
        least = 30 if precision == "fp16" else 25
        assert psnr(draw(engine, prompt, seed=seed), draw(eager, prompt, seed=seed)) >= least
    assert engine._loops.captures == captures > 0 and not engine._loops._failures
