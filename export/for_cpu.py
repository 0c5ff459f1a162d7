"""A model rewritten for a CPU: the same function but for rounding, in fewer products and passes.

Every rewrite puts a module in the place of one or more of the model's own, before it is traced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor, nn

from fastsd.kernels import dispatch, native
from fastsd.models.layers import (
    Attention,
    GroupNorm,
    PhasedUpsample,
    Transformer,
    TransformerBlock,
    Upsample,
)
from fastsd.models.vae import Decoder, PixelAttention
from fastsd.quant.apply import layers, quantised
from fastsd.quant.linear import Bf16Layer, Int8Conv2d, Int8Linear
from fastsd.quant.spec import Rounding, role

# A norm and the layer that alone reads it, by their names in the module that holds both.
_PAIRS = (
    ("norm1", "conv1"),
    ("norm2", "conv2"),
    ("conv_norm_out", "conv_out"),
    ("norm", "proj_in"),
)
# Layers of a UNet whose output all readers round to eight bits, or have in bf16 anyway.
_READ_COARSELY = re.compile(r"(^|\.)(norm1\.layer|attn1\.to_qkv|ff\.net\.0\.proj)$")


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
        if bf16:
            _keep_bf16(module, int8=roundings is not None)
        for block in module.modules():
            if isinstance(block, TransformerBlock):
                block.attn1.implementation = "avx512" if roundings is None else "vnni"
                block.attn2.implementation = "avx512"
            elif isinstance(block, PixelAttention) and roundings is not None:
                block.implementation = "vnni"
    return module


def in_bf16(module: nn.Module) -> nn.Module:
    """Multiply in bf16 wherever `module` (which is taken over) does in fp32, but at its edges, by
    role: those see the latents and the picture. Halves its weights as well."""
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
            _join(block.attn1)
            for layer in three:
                joined.pop(layer, None)
            if alike is not None:
                joined[f"{name}.attn1.to_qkv"] = alike
    return joined


def _join(own: Attention) -> None:
    """Make one product, `to_qkv`, of the three that read one input."""
    weight = torch.cat([one.weight.detach() for one in (own.to_q, own.to_k, own.to_v)])
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    own.to_qkv, own.upcast = whole, False  # scores are in fp32 on a CPU
    for name in ("to_q", "to_k", "to_v"):
        own.register_module(name, None)


def _phase_upsamplers(module: nn.Module) -> None:
    found = {name: m for name, m in module.named_modules() if isinstance(m, Upsample)}
    for name, upsample in found.items():
        module.set_submodule(name, PhasedUpsample(upsample))


def _fuse_norms(module: nn.Module) -> None:
    for holder in list(module.modules()):
        for norm_name, layer_name in _PAIRS:
            norm, layer = getattr(holder, norm_name, None), getattr(holder, layer_name, None)
            if not (isinstance(norm, GroupNorm) and _runs(norm)):
                continue
            assert isinstance(layer, nn.Module)
            if isinstance(holder, Transformer) and holder.linear:  # tokens are made between them
                setattr(holder, norm_name, Norm(norm))
            else:
                setattr(holder, norm_name, NormThen(norm, layer))
                setattr(holder, layer_name, nn.Identity())
        norm = getattr(holder, "group_norm", None)
        if isinstance(norm, GroupNorm) and _runs(norm):
            holder.group_norm = Norm(norm)


def _keep_bf16(module: nn.Module, *, int8: bool) -> None:
    """Leave in bf16 what lies between layers: in a decoder all, as its picture has eight bits; in a
    UNet what is read as coarsely, but not the sum that runs through it."""
    for name, layer in _products(module):
        # The products of attention are in fp32 where they are not in int8.
        if _READ_COARSELY.search(name) and (int8 or not name.endswith("to_qkv")):
            layer.out_dtype = torch.bfloat16
    for decoder in [m for m in module.modules() if isinstance(m, Decoder)]:
        if any(isinstance(m, GroupNorm) for m in decoder.modules()):
            continue
        decoder.register_module("conv_in", AndBf16(decoder.conv_in))
        for _, layer in _products(decoder):
            layer.out_dtype = torch.bfloat16


def _products(module: nn.Module) -> Iterator[tuple[str, Bf16Layer | Int8Conv2d | Int8Linear]]:
    """Yield the layers that can write bf16, by name."""
    for name, layer in module.named_modules():
        if isinstance(layer, (Bf16Layer, Int8Conv2d, Int8Linear)):
            yield name, layer


def _runs(norm: GroupNorm) -> bool:
    """Whether our kernel takes it."""
    return norm.num_channels % 16 == 0


class Norm(nn.Module):
    """GroupNorm, and SiLU where it has that, by our own kernel."""

    multiplier: Tensor | None

    def __init__(self, norm: GroupNorm) -> None:
        super().__init__()
        self.register_buffer("multiplier", None)
        self.weight, self.bias = norm.weight, norm.bias
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, norm.silu

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), of the same dtype."""
        return self.normalised(x, x.dtype)

    def normalised(
        self, x: Tensor, dtype: torch.dtype, zero: int = 0, added: Tensor | None = None
    ) -> Tensor:
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
            added=added,
        )


@final
class NormThen(Norm):
    """A norm and the layer after it; what lies between is written once, as the layer reads it, and
    what a resnet adds before the norm not at all."""

    def __init__(self, norm: GroupNorm, layer: nn.Module) -> None:
        super().__init__(norm)
        self.layer = layer
        if isinstance(layer, Int8Conv2d):
            self.multiplier = layer.multiplier

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """(B, C_in, H, W), and as GroupNorm added (B or 1, C_in) -> (B, C_out, H', W')."""
        layer = self.layer
        if isinstance(layer, Int8Conv2d):
            return layer.product(self.normalised(x, torch.uint8, layer.zero_point, added))
        dtype = torch.bfloat16 if isinstance(layer, Bf16Layer) else torch.float32
        out: Tensor = layer(self.normalised(x, dtype, added=added))
        return out


@final
class AndBf16(nn.Module):
    """A layer in fp32, its output rounded to bf16."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's own, from fp32 to bf16."""
        out: Tensor = self.layer(x)
        return out.bfloat16()


def bf16_pays() -> bool:
    """Say whether this CPU multiplies bf16 clearly faster than fp32: some do not."""
    return dispatch.cpu_gain(torch.bfloat16) > 1.4
