"""A model rewritten for a CPU: the same function but for rounding, in fewer products and passes.

Every rewrite puts a module in the place of one or more of the model's own, before it is traced.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from typing import final

import torch
from torch import Tensor, nn

from fastsd.kernels import native
from fastsd.kernels.attention import attention
from fastsd.models.layers import (
    Attention,
    NormSiLU,
    PhasedUpsample,
    Transformer,
    TransformerBlock,
    Upsample,
    join_heads,
    split_heads,
)
from fastsd.quant.apply import layers, quantised
from fastsd.quant.linear import Bf16Layer, Int8Conv2d
from fastsd.quant.spec import Rounding, role

# A norm and the layer that alone reads it, by their names in the module that holds both.
_PAIRS = (
    ("norm1", "conv1"),
    ("norm2", "conv2"),
    ("conv_norm_out", "conv_out"),
    ("norm", "proj_in"),
)


def for_cpu(
    module: nn.Module, roundings: Mapping[str, Rounding] | None, *, bf16: bool, own_kernels: bool
) -> nn.Module:
    """Return a UNet or VAE (`module`, which is taken over) as it runs fastest.

    roundings: of the layers that are to be int8, by name; None where none is, nor attention's
    products. bf16: as `in_bf16` has it for the others. own_kernels: whether kernels.native runs.
    """
    given = _join_self_attention(module, roundings or {})
    if given:
        module = quantised(module, given)
    _phase_upsamplers(module)
    if bf16:
        in_bf16(module)
    if own_kernels:
        _fuse_norms(module)
        for block in module.modules():
            if isinstance(block, TransformerBlock):
                block.attn1.implementation = "avx512" if roundings is None else "vnni"
                block.attn2.implementation = "avx512"
    return module


def in_bf16(module: nn.Module) -> nn.Module:
    """Multiply in bf16 wherever `module` (which is taken over) does in fp32, but at its edges:
    those see the latents and the picture. Halves its weights as well."""
    for name, layer in layers(module).items():
        if role(name) != "edge":
            module.set_submodule(name, Bf16Layer(layer))
    return module


def _join_self_attention(
    module: nn.Module, roundings: Mapping[str, Rounding]
) -> dict[str, Rounding]:
    """Make one product of every self-attention's three; return the roundings by the new names."""
    joined = dict(roundings)
    for name, block in list(module.named_modules()):
        if isinstance(block, TransformerBlock):
            three = [f"{name}.attn1.to_{letter}" for letter in "qkv"]
            alike, *others = {roundings.get(layer) for layer in three}
            if others:  # one of them is to stay in floating point
                continue
            block.register_module("attn1", SelfAttention(block.attn1))
            for layer in three:
                joined.pop(layer, None)
            if alike is not None:
                joined[f"{name}.attn1.to_qkv"] = alike
    return joined


def _phase_upsamplers(module: nn.Module) -> None:
    found = {name: m for name, m in module.named_modules() if isinstance(m, Upsample)}
    for name, upsample in found.items():
        module.set_submodule(name, PhasedUpsample(upsample))


def _fuse_norms(module: nn.Module) -> None:
    for holder in list(module.modules()):
        for norm_name, layer_name in _PAIRS:
            norm, layer = getattr(holder, norm_name, None), getattr(holder, layer_name, None)
            if not (isinstance(norm, nn.GroupNorm) and _runs(norm)):
                continue
            assert isinstance(layer, nn.Module)
            if isinstance(holder, Transformer) and holder.linear:  # tokens are made between them
                setattr(holder, norm_name, Norm(norm))
            else:
                setattr(holder, norm_name, nn.Identity())
                setattr(holder, layer_name, NormThen(norm, layer))
        norm = getattr(holder, "group_norm", None)
        if isinstance(norm, nn.GroupNorm) and _runs(norm):
            holder.group_norm = Norm(norm)


def _runs(norm: nn.GroupNorm) -> bool:
    """Whether our kernel takes it."""
    return norm.num_channels % 16 == 0


@final
class SelfAttention(nn.Module):
    """Self-attention whose queries, keys and values, all of one input, are one product."""

    def __init__(self, whole: Attention) -> None:
        super().__init__()
        self.heads, self.implementation = whole.heads, whole.implementation
        three = (whole.to_q, whole.to_k, whole.to_v)
        self.to_qkv = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, whole.to_q.in_features, sum(one.out_features for one in three), bias=False
        ).requires_grad_(False)
        self.to_qkv.weight.copy_(torch.cat([one.weight.detach() for one in three]))
        self.to_out = whole.to_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), fp32."""
        q, k, v = (split_heads(each, self.heads) for each in self.to_qkv(x).chunk(3, dim=-1))
        out: Tensor = self.to_out[0](
            join_heads(attention(q, k, v, implementation=self.implementation))
        )
        return out


class Norm(nn.Module):
    """GroupNorm, and SiLU where it was NormSiLU, by our own kernel."""

    multiplier: Tensor | None

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.register_buffer("multiplier", None)
        self.weight, self.bias = norm.weight, norm.bias
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, isinstance(norm, NormSiLU)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), fp32."""
        return self.normalised(x, torch.float32)

    def normalised(self, x: Tensor, dtype: torch.dtype, zero: int = 0) -> Tensor:
        """Return it as `kernels.native.group_norm` does in `dtype`."""
        return native.group_norm(
            x,
            self.weight,
            self.bias,
            self.groups,
            self.eps,
            silu=self.silu,
            dtype=dtype,
            multiplier=self.multiplier,
            zero=zero,
        )


@final
class NormThen(Norm):
    """A norm and the layer after it; what lies between is written once, as the layer reads it."""

    def __init__(self, norm: nn.GroupNorm, layer: nn.Module) -> None:
        super().__init__(norm)
        self.layer = layer
        if isinstance(layer, Int8Conv2d):
            self.multiplier = layer.multiplier

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W'), fp32."""
        if isinstance(self.layer, Int8Conv2d):
            return self.layer.product(self.normalised(x, torch.uint8, self.layer.zero_point))
        dtype = torch.bfloat16 if isinstance(self.layer, Bf16Layer) else torch.float32
        out: Tensor = self.layer(self.normalised(x, dtype))
        return out


@cache
def bf16_pays() -> bool:
    """Measure whether this CPU multiplies bf16 clearly faster than fp32: some do not."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(768, 768, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.float32] > 1.4 * seconds[torch.bfloat16]
