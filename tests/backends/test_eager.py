"""The eager backend: what its layers use, weights that visit the device, what is remembered."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from fastsd import Pipeline
from fastsd.backends.eager import EagerBackend, Visiting, locked_
from fastsd.errors import UsageError
from fastsd.kernels import dispatch, reference
from fastsd.kernels.attention import attention
from fastsd.models.layers import Attention, Conv3x3, Upsample, split_heads, use_kernel
from fastsd.models.vae import PixelAttention
from fastsd.tasks import Decode


def test_weights_visit_the_device_and_come_back() -> None:
    layer = torch.nn.Linear(4, 3)
    host = [p.data for p in layer.parameters()]
    seen: list[torch.device] = []

    def part(x: torch.Tensor) -> torch.Tensor:
        seen.append(layer.weight.device)
        return layer(x)  # type: ignore[no-any-return]

    call = Visiting(layer, part, torch.device("meta"), threading.RLock())
    assert call(torch.empty(2, 4, device="meta")).shape == (2, 3)
    assert seen == [torch.device("meta")]
    with pytest.raises(RuntimeError):
        call(torch.empty(2, 5, device="meta"))
    for parameter, data in zip(layer.parameters(), host, strict=True):
        assert parameter.data_ptr() == data.data_ptr(), "the host's weights are back, uncopied"


def test_weights_stay_for_all_tiles_of_a_picture() -> None:
    """They came anew for each, nine times for 1024 pixels."""
    layer, addresses = torch.nn.Conv2d(4, 3, 1), []

    def part(z: torch.Tensor) -> torch.Tensor:
        addresses.append(layer.weight)
        return layer(z).repeat_interleave(8, -1).repeat_interleave(8, -2)  # type: ignore[no-any-return]

    visiting = Visiting(layer, part, torch.device("meta"), threading.RLock())
    decode = Decode(visiting, 1.0, 0.0, tile=8)
    picture = decode(torch.empty(2, 4, 16, 16, device="meta"))
    assert picture.shape == (2, 3, 128, 128) and len(addresses) == 2 * 9
    assert len({id(weight) for weight in addresses}) == 1
    decode(torch.empty(1, 4, 16, 16, device="meta"))
    assert len({id(weight) for weight in addresses}) == 2, "and are brought anew for the next"
    assert layer.weight.device == torch.device("cpu")


def test_parts_of_one_module_visit_one_after_the_other() -> None:
    """The VAE's encoder and decoder: the first to end would take the other's weights away."""
    layer = torch.nn.Linear(4, 3)
    inside, ended = threading.Event(), threading.Event()

    def waits(x: torch.Tensor) -> torch.Tensor:
        inside.set()
        ended.wait(0.5)
        return layer(x)  # type: ignore[no-any-return]

    lock, meta = threading.RLock(), torch.device("meta")
    slow, quick = (Visiting(layer, part, meta, lock) for part in (waits, layer))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow, torch.empty(2, 4, device="meta"))
        assert inside.wait(30)
        second = pool.submit(quick, torch.empty(2, 4, device="meta"))
        second.add_done_callback(lambda _: ended.set())
        assert first.result(30).device == second.result(30).device == meta
    assert layer.weight.device == layer.bias.device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has such memory")
def test_memory_that_cannot_be_locked_serves_as_it_is() -> None:
    layer = torch.nn.Linear(4, 3)
    x = torch.ones(2, 4)
    before = layer(x)
    assert not locked_(layer)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("precision", "gain", "warned"), [("bf16", 0.1, True), ("bf16", 1.9, False), ("fp32", 0, False)]
)
def test_a_precision_that_a_cpu_is_slow_in_is_warned_of(
    sd1_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    gain: float,
    warned: bool,
) -> None:
    monkeypatch.setattr(dispatch, "cpu_gain", lambda dtype: gain)
    Pipeline.from_pretrained(sd1_folder, device="cpu", precision=precision)
    told = [r.message for r in caplog.records if "precision='fp32' is faster" in r.message]
    assert len(told) == warned


def test_a_cpu_is_as_fast_as_itself() -> None:
    assert 0.2 < dispatch.cpu_gain(torch.float32) < 5 and dispatch.cpu_gain(torch.bfloat16) > 0


def test_an_attention_asked_for_is_the_decoders_too(sd1_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(sd1_folder, device="cpu")
    backend = pipe._backend
    assert isinstance(backend, EagerBackend)
    found = [m for m in backend.modules["vae"].modules() if isinstance(m, PixelAttention)]
    for layer in found:
        layer.implementation = "products"  # as a GPU chooses
    pipe.use(attention="sdpa")
    assert found and {layer.implementation for layer in found} == {"sdpa"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_scores_beyond_half_precision_are_no_reason_to_attend_in_fp32(
    sd2_folder: Path, precision: str
) -> None:
    """SD2.1 asks for fp32 attention, as fp16 cannot hold its scores; no kernel here makes it."""
    pipeline = Pipeline.from_pretrained(sd2_folder, precision=precision)
    assert pipeline.config.unet.upcast_attention
    backend = pipeline._backend
    assert isinstance(backend, EagerBackend)
    layers = [m for m in backend.modules["unet"].modules() if isinstance(m, Attention)]
    x = torch.randn(1, 50, layers[0].to_q.in_features, generator=torch.Generator().manual_seed(0))
    q, k, _ = (
        split_heads(400 * layer(x.to(pipeline.dtype)), layers[0].heads)
        for layer in (layers[0].to_q, layers[0].to_k, layers[0].to_v)
    )
    scores = q.float() @ k.float().transpose(-1, -2)
    assert scores.abs().max() > torch.finfo(torch.float16).max
    truth = reference.attention(q.float(), k.float(), q.float())
    assert dispatch.relative_l2(attention(q, k, q), truth) < 0.02
    assert not any(layer.upcast for layer in layers)
    assert layers[0](x.to(pipeline.dtype)).dtype == pipeline.dtype


# --- decoding in tiles ----------------------------------------------------------------------------


def test_tiles_of_a_local_decoder_are_its_picture_without_seams() -> None:
    """Where a decoder looks no farther than the overlap, blending must be exact."""

    def local(z: torch.Tensor) -> torch.Tensor:
        picture = torch.nn.functional.interpolate(z[:, :3], scale_factor=8, mode="nearest")
        return torch.tanh(picture) + 0.1 * picture

    z = torch.randn(2, 4, 33, 50, generator=torch.Generator().manual_seed(0))
    whole = Decode(local, 0.5, 0.1)(z)
    for tile in (8, 16, 32, 33, 64):
        tiled = Decode(local, 0.5, 0.1, tile=tile)(z)
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)


def test_tiles_of_the_builtin_model_are_near_its_picture() -> None:
    from fastsd.tasks import bind_decoder

    pipeline = Pipeline.from_pretrained("builtin")
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline("a red apple", num_inference_steps=4, seed=0, output_type="latent").images
    z = torch.cat([torch.cat([latents, latents.flip(-1)], -1)] * 2, -2)  # four pictures in one
    tile = z.shape[-1] * 5 // 8
    with torch.no_grad():
        whole = bind_decoder(pipeline._backend, pipeline.config)(z)
        tiled = bind_decoder(pipeline._backend, pipeline.config, tile=tile)(z)
    error = float(((tiled - whole) / 2).square().mean())
    psnr_db = -10 * torch.log10(torch.tensor(error)).item()
    assert 25 <= psnr_db < 100, psnr_db


def test_a_convolution_that_cannot_run_is_refused_at_once(
    sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton's kernels may be asked for then
    pytest.importorskip("triton", reason="there is no Triton but for Linux")
    pipe = Pipeline.from_pretrained(sd1_folder)
    with pytest.raises(
        UsageError, match="takes fp16 and bf16 .* this model is in fp32 on cpu; use"
    ):
        pipe.use(conv3x3="triton")
    kinds = [m for m in pipe._backend.modules["unet"].modules() if isinstance(m, Conv3x3)]  # type: ignore[attr-defined]
    assert {layer.implementation for layer in kinds} == {"library"}
    pipe.use(conv3x3="library")


def test_what_is_made_of_weights_follows_them(sd1_folder: Path) -> None:
    backend = Pipeline.from_pretrained(sd1_folder)._backend
    assert isinstance(backend, EagerBackend)
    unet = backend.modules["unet"]
    samplers = {n: m for n, m in unet.named_modules() if isinstance(m, Upsample)}
    use_kernel(unet, "conv3x3", "triton")
    before = {name: cast(Tensor, module.phases) for name, module in samplers.items()}
    weights = backend.weights("unet")
    assert not any("phases" in name for name in weights), "adapters do not see them"
    for name in samplers:
        weights[f"{name}.conv.weight"].mul_(2)
    assert all(torch.equal(cast(Tensor, m.phases), before[n]) for n, m in samplers.items())
    doubled = {name: 2 * phases for name, phases in before.items()}
    backend.changed("unet")
    for name, module in samplers.items():
        assert module.phases is before[name], "where a captured graph reads them"
        assert torch.equal(module.phases, doubled[name])
