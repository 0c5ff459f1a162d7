"""Models rewritten for a GPU: the same numbers, from weights that stay the model's own."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastsd.backends.for_gpu import JoinedUNet, join_text_, spare_passes_
from fastsd.config import SD15, VAEConfig
from fastsd.models.clip import CausalAttention, CLIPText
from fastsd.models.layers import (
    Conv1x1,
    LayerNorm,
    Resnet,
    Transformer,
    TransformerBlock,
    Upsample,
)
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from tests.distances import relative_l2
from tests.models.test_unet import FAMILIES

CPU = torch.device("cpu")
ALIKE = 1e-5  # relative L2: a wider product may sum in another order


def conditions(unet: UNet) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a text, and what a schedule's embedding takes beside timesteps, for two rows."""
    config, given = unet.config, {}
    if config.pooled_width:
        given = {
            "pooled": torch.randn(2, config.pooled_width),
            "size_ids": 64 * torch.rand(2, config.size_ids),
        }
    if config.guidance_width:
        given["guidance"] = torch.rand(2)
    return torch.randn(2, 7, config.context_width), given


@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_a_joined_unet_computes_what_the_unet_does(family: str) -> None:
    torch.manual_seed(0)
    unet = UNet(FAMILIES[family])
    joined = JoinedUNet(copy.deepcopy(unet), CPU)
    text, given = conditions(unet)
    told = [given.get(name) for name in ("pooled", "size_ids", "guidance")]
    times = torch.tensor([900.0, 500.0, 3.5])
    rows, kv = unet.time_rows(times, *told), unet.context(text)
    joined_rows, joined_kv = joined.time_rows(times, *told), joined.context(text)
    assert joined_rows.shape == rows.shape and relative_l2(joined_rows, rows) < ALIKE
    assert joined_kv.shape == (2, 7, sum(k.shape[1] * k.shape[3] * 2 for k, _ in kv))

    x = torch.randn(2, unet.config.in_channels, 16, 24)
    expected, deep = unet.forward_deep(x, rows[1], kv)
    assert relative_l2(joined(x, rows[1], joined_kv), expected) < ALIKE
    for ours, theirs in zip(
        joined.forward_deep(x, rows[1], joined_kv), (expected, deep), strict=True
    ):
        assert relative_l2(ours, theirs) < ALIKE
    again = joined.forward_shallow(x, rows[2], joined_kv, deep)
    assert relative_l2(again, unet.forward_shallow(x, rows[2], kv, deep)) < ALIKE


@torch.no_grad()
def test_weights_are_the_models_own_and_take_no_memory_twice() -> None:
    unet = UNet(FAMILIES["sdxl"])
    text, given = conditions(unet)
    names = [name for name, _ in unet.named_parameters()]

    def held() -> int:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in unet.parameters()}
        return sum(storage.nbytes() for storage in storages.values())

    before = held()
    joined = JoinedUNet(unet, CPU)
    assert held() == before
    now = [name for name, _ in unet.named_parameters()]
    assert sorted(name for name in now if not re.search("to_qkv|to_rows", name)) == sorted(names)
    first = joined.context(text)
    for layer in unet.cross_attentions():  # as a LoRA changes them
        layer.to_v.weight.copy_(2 * layer.to_v.weight)
    widths = [w for k, v in unet.context(text) for w in (k.shape[1] * k.shape[3],) * 2]
    for i, (old, new) in enumerate(
        zip(
            torch.split(first, widths, dim=-1),
            torch.split(joined.context(text), widths, dim=-1),
            strict=True,
        )
    ):
        assert relative_l2(new, (1, 2)[i % 2] * old) < ALIKE
    (projection, *_) = unet.time_projections()
    assert projection.bias is not None
    projection.bias.add_(3)
    times = torch.tensor([10.0])
    ours: Any = joined.time_rows(times, given["pooled"], given["size_ids"])
    assert relative_l2(ours, unet.time_rows(times, given["pooled"], given["size_ids"])) < ALIKE
    assert all(t.is_contiguous() for t in tree_leaves(ours))


@torch.no_grad()
def test_a_joined_text_encoder_computes_what_it_did() -> None:
    torch.manual_seed(0)
    text = CLIPText(replace(SD15.text_encoders[0], layers=2, width=32, mlp_width=64, heads=2))
    ids = torch.randint(0, 1000, (2, 9))
    expected = text(ids)
    names = {name for name, _ in text.named_parameters()}
    join_text_(text, CPU)
    assert names <= {name for name, _ in text.named_parameters()}
    assert relative_l2(text(ids).last, expected.last) < ALIKE
    for layer in text.modules():
        if isinstance(layer, CausalAttention):
            layer.v_proj.weight.zero_()  # as a LoRA changes them
            layer.v_proj.bias.zero_()
    assert relative_l2(text(ids).last, expected.last) > 0.01


@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_a_unet_of_fewer_passes_computes_the_same(family: str) -> None:
    torch.manual_seed(0)
    unet = UNet(FAMILIES[family])
    text, given = conditions(unet)
    told = [given.get(name) for name in ("pooled", "size_ids", "guidance")]
    times, x = torch.tensor([900.0, 3.5]), torch.randn(2, unet.config.in_channels, 17, 8)
    expected = unet(x, unet.time_rows(times, *told)[1], unet.context(text))
    changed = copy.deepcopy(unet).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    joined = JoinedUNet(changed, CPU)
    spare_passes_(changed, norms_add=True)
    row, kv = joined.time_rows(times, *told)[1], joined.context(text)
    assert relative_l2(joined(x, row, kv), expected) < ALIKE
    assert relative_l2(changed(x, row, changed.context(text)), expected) < ALIKE, "a UNet still"
    norms = [m for m in changed.modules() if isinstance(m, LayerNorm)]
    blocks = [m for m in changed.modules() if isinstance(m, TransformerBlock)]
    assert all(block.attn2.to_out[0].bias is None for block in blocks)
    transformers = sum(
        isinstance(m, Transformer) and bool(len(m.transformer_blocks)) for m in changed.modules()
    )
    assert sum(norm.added_bias is not None for norm in norms) == 3 * len(blocks) - transformers
    resnets = [module for module in changed.modules() if isinstance(module, Resnet)]
    assert all(resnet.conv1.bias is None for resnet in resnets)
    assert all(resnet.conv2.bias is None for resnet in resnets)
    assert {resnet.bias is None for resnet in resnets} == {True, False}


@pytest.mark.parametrize("norms_add", [True, False])
@torch.no_grad()
def test_a_vae_of_fewer_passes_computes_the_same(norms_add: bool) -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(widths=(32, 64, 64), norm_groups=8))
    z, picture = torch.randn(2, 4, 9, 8), torch.randn(2, 3, 36, 32)
    changed = copy.deepcopy(vae).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    spare_passes_(changed, norms_add=norms_add)
    assert relative_l2(changed.decode(z), vae.decode(z)) < ALIKE
    assert relative_l2(changed.encode(picture), vae.encode(picture)) < ALIKE
    resnets = [module for module in changed.modules() if isinstance(module, Resnet)]
    assert all(
        (r.norm2_added is not None, r.conv1.bias is None) == (norms_add,) * 2 for r in resnets
    )
    assert sum(resnet.norm1_added is not None for resnet in resnets) == (2 if norms_add else 0)
    kinds = {r.conv_shortcut is None for r in resnets if r.norm1_added is not None}
    assert kinds == ({True, False} if norms_add else set())


@pytest.mark.parametrize("shape", [(1, 64, 1, 1), (2, 8, 3, 5), (3, 6, 2, 2)])
@pytest.mark.parametrize("last", [True, False])
def test_pixels_are_doubled_by_a_copy(shape: tuple[int, ...], last: bool) -> None:
    x = torch.randn(shape)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    upsample = Upsample(shape[1])
    plain = upsample(x)
    upsample.as_copy = True
    torch.testing.assert_close(upsample(x), plain)
    odd = (2 * shape[2] - 1, 2 * shape[3])
    torch.testing.assert_close(upsample(x, odd).shape[2:], torch.Size(odd))


@torch.no_grad()
def test_a_convolution_of_single_pixels_is_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Conv1x1(16, 24)
    x = torch.randn(2, 16, 5, 3)
    expected = layer(x)
    layer.as_product = True
    monkeypatch.setattr(torch.nn.Conv2d, "forward", None)
    for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
        out = layer(laid_out)
        assert relative_l2(out, expected) < ALIKE
        assert out.is_contiguous(memory_format=torch.channels_last)
