"""Weights kept in int8 and widened whenever they are used: memory for a pass over them.

Products stay in the model's own precision, so nothing is calibrated and inputs are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from fastsd.quant.apply import layers
from fastsd.quant.linear import quantise_weight
from fastsd.quant.spec import role


@final
class Int8Weight(nn.Module):
    """A layer's weights W (C_out, …) as int8 around zero, and one fp32 scale an output channel.

    It stands where the layer had W: torch's functions take it for a tensor of `dtype`, by torch's
    protocol for what is like one, and it is widened for each anew, in one pass. It is written by
    `copy_` alone, and cast never: the scale would be rounded.
    """

    q: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """q: int8 (C_out, …). scale: fp32 (C_out, 1, …), of as many dimensions."""
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.dtype = dtype

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """Round a float tensor (C_out, …)."""
        q, scale = quantise_weight(weight)
        return cls(q, scale.view(-1, *[1] * (weight.ndim - 1)), weight.dtype)

    @classmethod
    def cat(cls, weights: Sequence[Int8Weight]) -> Int8Weight:
        """Put weights of one dtype one below the other, as copies."""
        q, scale = (torch.cat(each) for each in zip(*map(_stored, weights), strict=True))
        return cls(q, scale, weights[0].dtype)

    @property
    def shape(self) -> torch.Size:
        """(C_out, …)."""
        return self.q.shape

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.q.device

    @property
    def ndim(self) -> int:
        """How many dimensions there are."""
        return self.q.ndim

    def forward(self) -> Tensor:
        """Return W, (C_out, …), in a new tensor."""
        out = torch.empty_like(self.q, dtype=self.dtype)
        return torch.mul(self.q, self.scale, out=out)  # rounded once, from fp32

    def split(self, rows: int | list[int]) -> list[Int8Weight]:
        """Cut into so many output channels each: views, so that writing to one writes here."""
        q, scale = (torch.split(stored, rows) for stored in _stored(self))
        return [Int8Weight(v, s, self.dtype) for v, s in zip(q, scale, strict=True)]

    def clone(self) -> Int8Weight:
        """Return a copy."""
        return Int8Weight(self.q.clone(), self.scale.clone(), self.dtype)

    def copy_(self, weight: Tensor | Int8Weight) -> Int8Weight:
        """Take other weights of this shape, in place: rounded, or as they are kept already."""
        given = weight if isinstance(weight, Int8Weight) else Int8Weight.of(weight)
        for ours, theirs in zip(_stored(self), _stored(given), strict=True):
            ours.copy_(theirs)
        return self

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Not by torch's pytree, which takes longer than a small product.
        given = [each() if isinstance(each, cls) else each for each in args]
        named = {n: each() if isinstance(each, cls) else each for n, each in (kwargs or {}).items()}
        return function(*given, **named)


def _stored(weight: Int8Weight) -> tuple[Tensor, Tensor]:
    return weight.q, weight.scale


@torch.no_grad()
def keep_in_int8_(model: nn.Module, device: torch.device) -> None:
    """Keep the weights of all linear layers and convolutions in int8, but of the first and last.

    They stay where they are; device: what rounds them, one layer at a time.
    """
    for name, layer in layers(model).items():
        if role(name) != "edge":
            kept = Int8Weight.of(layer.weight.to(device)).to(layer.weight.device)
            del layer.weight
            layer.register_module("weight", kept)
