"""What a UNet is told of a text and of a schedule, each as one product instead of one a layer.

On a GPU a launch takes Python longer than such a product takes the GPU, and SDXL has 157 of them:
without this they are a tenth of a picture in four steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.backends.base import Part
from fastsd.models.layers import KV
from fastsd.models.unet import UNet


@final
class Joined:
    """Linear layers of one input, all with a bias or none, side by side: (…, C) -> (…, sum of E).

    Their weights become views of its own: they take no memory twice, and what is written to them in
    place is seen.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.widths = [layer.out_features for layer in layers]
        self.weight = self._share(layers, "weight")
        self.bias = None if layers[0].bias is None else self._share(layers, "bias")

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the layers make of x, in their order along the last axis."""
        return F.linear(x, self.weight, self.bias)

    def _share(self, layers: Sequence[nn.Linear], name: str) -> Tensor:
        whole = torch.cat([getattr(layer, name).detach() for layer in layers])
        for layer, rows in zip(layers, torch.split(whole, self.widths), strict=True):
            setattr(layer, name, nn.Parameter(rows, requires_grad=False))
        return whole


def joined_parts(unet: UNet) -> dict[str, Part]:
    """Return the parts of a UNet (backends/base.py) that are other than its own: kv is one tensor,
    (B, N, E), which the UNet's parts split by views. Its weights are moved.
    """
    time = Joined(unet.time_projections())
    attentions = unet.cross_attentions()
    context = Joined([layer for a in attentions for layer in (a.to_k, a.to_v)])

    def pairs(kv: Tensor) -> list[KV]:
        each = iter(torch.split(kv, context.widths, dim=-1))
        return [(a.by_heads(next(each)), a.by_heads(next(each))) for a in attentions]

    def predict(x: Tensor, row: Tensor, kv: Tensor) -> Tensor:
        out: Tensor = unet(x, row, pairs(kv))
        return out

    def deep(x: Tensor, row: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        return unet.forward_deep(x, row, pairs(kv))

    def shallow(x: Tensor, row: Tensor, kv: Tensor, deep: Tensor) -> Tensor:
        return unet.forward_shallow(x, row, pairs(kv), deep)

    def rows(*given: Any) -> Tensor:
        return time(unet.embedded_time(*given))

    return {
        "unet": predict,
        "unet_deep": deep,
        "unet_shallow": shallow,
        "unet_time": rows,
        "unet_context": context,
    }
