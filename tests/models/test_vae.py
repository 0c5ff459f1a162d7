"""The VAE against diffusers' AutoencoderKL."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsd.config import SD15, VAEConfig
from fastsd.models.vae import VAE, scale_activations_
from tests.distances import relative_l2
from tests.models import oracles
from tests.models.oracles import BAR

SMALL = VAEConfig(widths=(16, 32, 48), norm_groups=8)
VARIANTS = {
    "sd": SMALL,
    "16 channels, no 1x1 convolutions": replace(
        SMALL, latent_channels=16, quant_conv=False, post_quant_conv=False
    ),
    "no attention": replace(SMALL, mid_attention=False),
    "one level, one resnet": replace(SMALL, widths=(32,), layers_per_level=1),
}


@cache
def pair(variant: str) -> tuple[VAE, Any]:
    """Return our VAE and diffusers', sharing their weights."""
    torch.manual_seed(0)
    oracle = oracles.vae(VARIANTS[variant])
    ours = VAE(VARIANTS[variant]).eval().requires_grad_(False)
    ours.load_state_dict(oracle.state_dict(), strict=True, assign=True)
    return ours, oracle


def draw(channels: int, size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(8, 8), (9, 17), (1, 3)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_decode_equals_diffusers(variant: str, size: tuple[int, int]) -> None:
    ours, oracle = pair(variant)
    z = draw(ours.config.latent_channels, size)
    assert relative_l2(ours.decode(z), oracle.decode(z).sample) <= BAR


@pytest.mark.parametrize("size", [(32, 32), (36, 68), (37, 43)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_equals_diffusers(variant: str, size: tuple[int, int]) -> None:
    ours, oracle = pair(variant)
    x = draw(3, size)
    assert relative_l2(ours.encode(x), oracle.encode(x).latent_dist.parameters) <= BAR


def test_channels_last_equals_contiguous() -> None:
    ours, oracle = pair("sd")
    last = VAE(ours.config).requires_grad_(False)
    last.load_state_dict(oracle.state_dict())
    last = last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    z, x = draw(4, (9, 17)), draw(3, (36, 68))
    picture = last.decode(z.contiguous(memory_format=torch.channels_last))
    moments = last.encode(x.contiguous(memory_format=torch.channels_last))
    assert picture.is_contiguous(memory_format=torch.channels_last)
    assert relative_l2(picture, ours.decode(z)) <= BAR
    assert relative_l2(moments, ours.encode(x)) <= BAR


def test_gradients_equal_those_of_diffusers() -> None:
    torch.manual_seed(2)
    oracle = oracles.vae(SMALL).requires_grad_(True)
    ours = VAE(SMALL)
    ours.load_state_dict(oracle.state_dict())
    x = draw(3, (16, 16))
    mean, _ = ours.encode(x).chunk(2, dim=1)
    (ours.decode(mean) - x).square().mean().backward()
    (oracle.decode(oracle.encode(x).latent_dist.mean).sample - x).square().mean().backward()
    expected = {name: p.grad for name, p in oracle.named_parameters()}
    largest = max(float(g.norm()) for g in expected.values())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        distance = float((parameter.grad - expected[name]).norm())
        assert distance <= 1e-4 * float(expected[name].norm()) + 1e-6 * largest, name


def test_a_meta_device_module_owns_nothing_but_its_weights() -> None:
    ours, oracle = pair("sd")
    with torch.device("meta"):
        loaded = VAE(ours.config)
    assert not list(loaded.buffers())
    loaded.load_state_dict(oracle.state_dict(), strict=True, assign=True)
    z = draw(4, (8, 8))
    assert torch.equal(loaded.decode(z), ours.decode(z))


@pytest.mark.parametrize("variant", VARIANTS)
def test_scaled_activations_change_no_bit(variant: str) -> None:
    ours, oracle = pair(variant)
    scaled = VAE(ours.config).eval().requires_grad_(False)
    scaled.load_state_dict(oracle.state_dict())
    before = scaled.decoder.conv_in.weight
    scale_activations_(scaled.decoder, 2.0**-5)
    scale_activations_(scaled.encoder, 2.0**-5)
    assert scaled.decoder.conv_in.weight is not before, "tensors may be shared: replace them"
    z, x = draw(ours.config.latent_channels, (9, 17)), draw(3, (36, 68))
    assert torch.equal(scaled.decode(z), ours.decode(z))
    assert torch.equal(scaled.encode(x), ours.encode(x))


def test_scaled_activations_stay_within_fp16() -> None:
    """A decoder whose residuals go beyond 65504, as SDXL's do: fp16 fails, scaled fp16 is exact."""
    _, oracle = pair("sd")
    large = VAE(SMALL).eval().requires_grad_(False)
    large.load_state_dict(oracle.state_dict())
    scale_activations_(large.decoder, 2.0**18)
    z = draw(4, (8, 8))
    expected = large.decode(z)
    half = VAE(SMALL).eval().requires_grad_(False)
    half.load_state_dict(large.state_dict())
    for ours, theirs in zip(half.modules(), large.modules(), strict=True):
        if isinstance(ours, torch.nn.GroupNorm) and isinstance(theirs, torch.nn.GroupNorm):
            ours.eps = theirs.eps
    half = half.to(torch.float16)
    assert not torch.isfinite(half.decode(z.half())).all()
    scale_activations_(half.decoder, 2.0**-5)
    out = half.decode(z.half())
    assert torch.isfinite(out).all()
    assert relative_l2(out.float(), expected) <= 0.01


@pytest.mark.slow
def test_true_size_sd15() -> None:
    torch.manual_seed(0)
    oracle = oracles.vae(SD15.vae)
    with torch.device("meta"):
        ours = VAE(SD15.vae)
    ours.load_state_dict(oracle.state_dict(), strict=True, assign=True)
    z, x = draw(4, (32, 32), batch=1), draw(3, (256, 256), batch=1)
    with torch.no_grad():
        assert relative_l2(ours.decode(z), oracle.decode(z).sample) <= BAR
        assert relative_l2(ours.encode(x), oracle.encode(x).latent_dist.parameters) <= BAR
