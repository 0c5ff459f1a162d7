"""Products joined for a GPU: the same numbers, from weights that stay the model's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastsd.backends.joined import JoinedUNet
from fastsd.models.unet import UNet
from tests.models.oracles import relative_l2
from tests.models.test_unet import FAMILIES

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
    joined = JoinedUNet(copy.deepcopy(unet))
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
    joined = JoinedUNet(unet)
    assert [name for name, _ in unet.named_parameters()] == names and held() == before
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
