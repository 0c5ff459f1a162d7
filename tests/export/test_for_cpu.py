"""The rewrites for CPUs, each against the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastsd.config import VAEConfig
from fastsd.export.for_cpu import Norm, NormThen, for_cpu
from fastsd.kernels import native
from fastsd.models.layers import Attention, GroupNorm, PhasedUpsample, Resnet, Upsample
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE, Decoder, PixelAttention
from fastsd.quant.apply import layers, quantised
from fastsd.quant.linear import Bf16Layer
from fastsd.quant.spec import ROUNDED_ROLES, Rounding, role
from tests.distances import relative_l2
from tests.models.oracles import shake_
from tests.quant.test_quant import UNET

OWN = native.obstacle() is None
needs_kernels = pytest.mark.skipif(
    not OWN, reason=f"our CPU kernels cannot run here: {native.obstacle()}"
)


@pytest.fixture(autouse=True)
def _without_gradients(cpu_kernels: bool) -> Iterator[None]:
    with torch.no_grad():
        yield


def unet(linear: bool = False) -> tuple[UNet, tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]]:
    torch.manual_seed(0)
    module = UNet(replace(UNET, linear_projection=linear))
    shake_(module)
    call = (
        torch.randn(2, 4, 8, 16),
        module.time_rows(torch.tensor([500.0]))[0],
        module.context(torch.randn(2, 5, 16)),
    )
    return module, call


@pytest.mark.parametrize("size", ((5, 7), (1, 1), (8, 2)), ids=str)
def test_an_upsampler_by_phases_is_the_upsampler(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    whole = Upsample(16).requires_grad_(False)
    phased, x = PhasedUpsample(whole), torch.randn(2, 16, *size)
    assert relative_l2(phased(x), whole(x)) <= 1e-6
    height, width = 2 * size[0] - 1, 2 * size[1]
    assert torch.equal(phased(x, (height, width)), whole(x, (height, width)))


@needs_kernels
@pytest.mark.parametrize("linear", (False, True), ids=("convolved", "linear"))
def test_the_exact_unet_stays_exact(linear: bool) -> None:
    module, call = unet(linear)
    exact = module(*call)
    rewritten = for_cpu(copy.deepcopy(module), None, bf16=False, own_kernels=True)
    assert relative_l2(rewritten(*call), exact) <= 2e-6
    kinds = [type(m) for m in rewritten.modules()]
    assert kinds.count(NormThen) and (Norm in kinds) == linear
    assert GroupNorm not in kinds and Upsample in kinds


@needs_kernels
def test_the_exact_decoder_stays_exact() -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(widths=(32, 64), norm_groups=8, layers_per_level=1))
    shake_(vae)
    z = torch.randn(1, 4, 6, 5)
    exact = vae.decode(z)
    rewritten = for_cpu(copy.deepcopy(vae), None, bf16=False, own_kernels=True)
    assert isinstance(rewritten, VAE)
    assert relative_l2(rewritten.decode(z), exact) <= 2e-6


@needs_kernels
def test_what_is_int8_and_what_is_bf16() -> None:
    """All that the spec leaves out is bf16, but for the edges; norms round at once."""
    module, call = unet()
    names = [n for n in layers(module) if role(n) == "resnet"]
    roundings = {name: Rounding(-8.0, 8.0, tuple([-1] * 8 + [0] * 24)) for name in names[:1]}
    roundings |= {name: Rounding(-8.0, 8.0) for name in names[1:3]}
    rounded = quantised(module, roundings)(*call)
    rewritten = for_cpu(copy.deepcopy(module), roundings, bf16=True, own_kernels=False)
    own = for_cpu(copy.deepcopy(module), roundings, bf16=True, own_kernels=True)
    halves = {
        n.removesuffix(".layer") for n, m in rewritten.named_modules() if n.endswith(".layer")
    }
    expected = {n for n in layers(module) if role(n) != "edge"} - set(roundings)
    samplers = {n for n in expected if "upsamplers" in n}
    phases = {n.replace(".conv", ".phases") for n in samplers}
    wholes = {n.replace(".conv", ".upsample.conv") for n in samplers}  # for other sizes
    three = {n for n in expected if "attn1.to_" in n and "to_out" not in n}
    joined = {n[:-1] + "qkv" for n in three}
    assert halves == expected - samplers - three | phases | wholes | joined and samplers and three
    assert all(isinstance(rewritten.get_submodule(name), Bf16Layer) for name in halves)
    for result in (rewritten(*call), own(*call)):
        assert relative_l2(result, rounded) < 0.02


@needs_kernels
def test_a_decoder_in_bf16_keeps_its_maps_in_bf16() -> None:
    """Maps are half as large, and what int8 costs stays what it was."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(widths=(32, 64), norm_groups=8, layers_per_level=1))
    shake_(vae)
    z = torch.randn(1, 4, 6, 5)
    exact = vae.decode(z)
    names = [n for n in layers(vae) if n.startswith("decoder") and role(n) in ROUNDED_ROLES]
    roundings = {name: Rounding(-6.0, 6.0) for name in names}
    rounded = quantised(vae, roundings).decode(z)
    rewritten = for_cpu(copy.deepcopy(vae), roundings, bf16=True, own_kernels=True)
    seen: dict[str, torch.dtype] = {}
    for name, block in rewritten.named_modules():
        if isinstance(block, (Resnet, PixelAttention, PhasedUpsample, Decoder)):
            block.register_forward_hook(
                lambda _, __, out, name=name: seen.update({name: out.dtype})
            )
    assert isinstance(rewritten, VAE)
    out = rewritten.decode(z)
    assert seen.pop("decoder") == torch.float32
    assert len(seen) == 8 and set(seen.values()) == {torch.bfloat16}
    assert relative_l2(out, exact) < 1.2 * relative_l2(rounded, exact)


@pytest.mark.parametrize("kept", ("none", "one", "all"))
def test_self_attention_is_one_product_where_its_three_round_alike(kept: str) -> None:
    module, call = unet()
    names = [n for n in layers(module) if role(n) == "self-attention in"]
    roundings = {name: Rounding(-8.0, 8.0) for name in names} if kept != "all" else {}
    if kept == "one":
        del roundings[names[0]]
    rounded = quantised(module, roundings)(*call)
    rewritten = for_cpu(copy.deepcopy(module), roundings or None, bf16=False, own_kernels=False)
    joined = [m.to_qkv for m in rewritten.modules() if isinstance(m, Attention) and m.to_qkv]
    assert len(joined) == len(names) // 3 - (kept == "one")
    assert all(isinstance(whole, nn.Linear) == (kept == "all") for whole in joined)
    assert relative_l2(rewritten(*call), rounded) < (2e-6 if kept == "all" else 1e-3)


def test_widths_that_the_kernel_does_not_take_keep_their_norm() -> None:
    vae = VAE(VAEConfig(widths=(24, 24), norm_groups=8, layers_per_level=1))
    rewritten = for_cpu(vae, None, bf16=False, own_kernels=True)
    assert not any(isinstance(m, Norm) for m in rewritten.modules())
