"""The eager backend: what its layers use, weights that visit the device, what is remembered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd import Pipeline
from fastsd.artifact import cache_folder
from fastsd.backends.eager import _runs, attention_shapes, visiting
from fastsd.backends.measured import fastest
from fastsd.config import SD15, SDXL
from fastsd.kernels.attention import attention
from fastsd.models.unet import UNet


def test_weights_visit_the_device_and_come_back() -> None:
    layer = torch.nn.Linear(4, 3)
    host = [p.data for p in layer.parameters()]
    seen: list[torch.device] = []

    def part(x: torch.Tensor) -> torch.Tensor:
        seen.append(layer.weight.device)
        return layer(x)  # type: ignore[no-any-return]

    call = visiting(layer, part, torch.device("meta"))
    assert call(torch.empty(2, 4, device="meta")).shape == (2, 3)
    assert seen == [torch.device("meta")]
    with pytest.raises(RuntimeError):
        call(torch.empty(2, 5, device="meta"))
    for parameter, data in zip(layer.parameters(), host, strict=True):
        assert parameter.data_ptr() == data.data_ptr(), "the host's weights are back, uncopied"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # (queries, keys, heads, head width, upcast) -> how many layers
        (
            SD15.unet,
            {
                (4096, 4096, 8, 40, False): 5,
                (4096, 77, 8, 40, False): 5,
                (1024, 1024, 8, 80, False): 5,
                (1024, 77, 8, 80, False): 5,
                (256, 256, 8, 160, False): 5,
                (256, 77, 8, 160, False): 5,
                (64, 64, 8, 160, False): 1,
                (64, 77, 8, 160, False): 1,
            },
        ),
        (
            SDXL.unet,
            {
                (4096, 4096, 10, 64, False): 10,
                (4096, 77, 10, 64, False): 10,
                (1024, 1024, 20, 64, False): 60,
                (1024, 77, 20, 64, False): 60,
            },
        ),
    ],
    ids=("sd15", "sdxl"),
)
def test_every_attention_is_measured_at_its_shape(config: Any, expected: Any) -> None:
    with torch.device("meta"):
        shapes = attention_shapes(UNet(config))
    assert {shape: len(modules) for shape, modules in shapes.items()} == expected


def test_only_what_runs_is_measured() -> None:
    q = torch.zeros(1, 1, 4, 8)
    assert _runs(lambda: attention(q, q, q))
    assert not _runs(lambda: attention(q, q, q, implementation="cudnn")), "there is no such on CPUs"


def test_what_was_measured_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "cache"))
    calls: list[str] = []

    def measure(**times: float) -> Any:
        def run() -> dict[str, float]:
            calls.append("measured")
            return times

        return run

    assert fastest("a", measure(flash=0.2, cudnn=0.1)) == ("cudnn", 0.1)
    assert fastest("b", measure(flash=0.2, sdpa=0.3)) == ("flash", 0.2)
    assert fastest("a", measure(flash=0.0)) == ("cudnn", 0.1) and len(calls) == 2
    file = cache_folder() / "measured.json"
    assert set(json.loads(file.read_text())) == {"a", "b"}
    assert [path.name for path in file.parent.iterdir()] == ["measured.json"], "no draft is left"
    for broken in ("{", '{"a": 3}', '{"a": {"flash": "fast"}}'):
        file.write_text(broken)
        assert fastest("a", measure(efficient=0.4)) == ("efficient", 0.4)


# --- decoding in tiles ----------------------------------------------------------------------------


def test_tiles_of_a_local_decoder_are_its_picture_without_seams() -> None:
    """Where a decoder looks no farther than the overlap, blending must be exact."""
    from fastsd.tasks import Decode

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
