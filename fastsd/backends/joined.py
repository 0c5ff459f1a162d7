"""A UNet that is told of a text and of a schedule by one product each, instead of one a layer.

On a GPU a launch takes Python longer than such a product takes the GPU, and SDXL has 157 of them:
without this they are a tenth of a picture in four steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.models.layers import KV
from fastsd.models.unet import UNet


@final
class Joined(nn.Module):
    """Linear layers of one input, all with a bias or none, side by side.

    Their weights become views of its own: they take no memory twice, and what is written to them in
    place is seen.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.widths = [layer.out_features for layer in layers]
        self.weight = self._share(layers, "weight")
        self.bias = None if layers[0].bias is None else self._share(layers, "bias")

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, sum of the widths), in the layers' order."""
        return F.linear(x, self.weight, self.bias)

    def _share(self, layers: Sequence[nn.Linear], name: str) -> nn.Parameter:
        whole = torch.cat([getattr(layer, name).detach() for layer in layers])
        for layer, rows in zip(layers, torch.split(whole, self.widths), strict=True):
            setattr(layer, name, nn.Parameter(rows, requires_grad=False))
        return nn.Parameter(whole, requires_grad=False)


@final
class JoinedUNet(nn.Module):
    """The UNet that is given, with `UNet`'s own methods, but that kv is one tensor (B, N, E)."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        self._attentions = (unet.cross_attentions(),)  # hidden: they are the UNet's
        self.time = Joined(unet.time_projections())
        layers = [layer for each in unet.cross_attentions() for layer in (each.to_k, each.to_v)]
        self.text = Joined(layers)

    def time_rows(self, *given: Any, **named: Any) -> Tensor:
        """Embed a whole schedule, as `UNet.time_rows` does."""
        rows: Tensor = self.time(self.unet.embedded_time(*given, **named))
        return rows

    def context(self, encoder_hidden_states: Tensor) -> Tensor:
        """Project a text (B, N, C) to the keys and values of all layers side by side, (B, N, E)."""
        kv: Tensor = self.text(encoder_hidden_states)
        return kv

    def forward(self, x: Tensor, row: Tensor, kv: Tensor) -> Tensor:
        """Predict, as `UNet.forward` does."""
        return self.forward_deep(x, row, kv)[0]

    def forward_deep(self, x: Tensor, row: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Predict, as `UNet.forward_deep` does."""
        return self.unet.forward_deep(x, row, self._pairs(kv))

    def forward_shallow(self, x: Tensor, row: Tensor, kv: Tensor, deep: Tensor) -> Tensor:
        """Predict, as `UNet.forward_shallow` does."""
        return self.unet.forward_shallow(x, row, self._pairs(kv), deep)

    def _pairs(self, kv: Tensor) -> list[KV]:
        """Split into every layer's keys and values; all are views."""
        each = iter(torch.split(kv, self.text.widths, dim=-1))
        (attentions,) = self._attentions
        return [(a.by_heads(next(each)), a.by_heads(next(each))) for a in attentions]
