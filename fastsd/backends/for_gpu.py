"""A model rewritten for a GPU: the same function but for rounding, in fewer launches and passes.

A launch takes Python longer than a small product takes the GPU, and each pass over a map costs as
much as its bytes. Weights stay the model's own, so that adapters change them in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.models.clip import CausalAttention, CLIPText
from fastsd.models.layers import (
    KV,
    Conv1x1,
    Level,
    Resnet,
    Transformer,
    TransformerBlock,
    Upsample,
)
from fastsd.models.unet import UNet
from fastsd.models.vae import Decoder
from fastsd.quant.weights import Int8Weight

AT_ONCE = 2**25  # weights that are widened from int8 for one product


@final
class Joined(nn.Module):
    """Linear layers of one input, all with a bias or none, side by side.

    Their weights become views of its own, on `device`: they take no memory twice, and what is
    written to them in place is seen.
    """

    weight: Tensor  # or an Int8Weight, which stands for one
    bias: Tensor | None

    def __init__(self, layers: Sequence[nn.Linear], device: torch.device) -> None:
        super().__init__()
        self.widths = [layer.out_features for layer in layers]
        self.weight = self._share(layers, "weight", device)
        self.bias = None if layers[0].bias is None else self._share(layers, "bias", device)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, sum of the widths), in the layers' order."""
        weight, rows = self.weight, max(1, AT_ONCE // self.weight.shape[1])
        if not isinstance(weight, Int8Weight) or weight.shape[0] <= rows:
            return F.linear(x, weight, self.bias)
        # SDXL's keys and values, widened at once, would take 0.6 GiB.
        parts = [F.linear(x, cast(Tensor, part)) for part in weight.split(rows)]
        out = torch.cat(parts, dim=-1)
        return out if self.bias is None else out + self.bias

    def _share(self, layers: Sequence[nn.Linear], name: str, device: torch.device) -> Any:
        own = [getattr(layer, name) for layer in layers]
        whole: Tensor | Int8Weight
        parts: Sequence[nn.Module | Tensor]
        if isinstance(own[0], Int8Weight):
            whole = Int8Weight.cat(own).to(device)
            parts = whole.split(self.widths)
        else:
            whole = torch.cat([each.detach() for each in own]).to(device)
            parts = [_fixed(part) for part in torch.split(whole, self.widths)]
            whole = _fixed(whole)
        for layer, part in zip(layers, parts, strict=True):
            setattr(layer, name, part)
        return whole


def _fixed(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


@final
class JoinedUNet(nn.Module):
    """The UNet that is given, with `UNet`'s own methods, but that kv is one tensor (B, N, E).

    What a text, a schedule or a self-attention's input is projected to is one product each, not one
    a layer or one each for queries, keys and values. It is moved to `device`, best from the host:
    joined where they are, the weights would leave holes in the GPU's memory.
    """

    def __init__(self, unet: UNet, device: torch.device) -> None:
        super().__init__()
        for block in unet.modules():
            if isinstance(block, TransformerBlock):
                own = block.attn1
                own.to_qkv = Joined([own.to_q, own.to_k, own.to_v], device)
        self._attentions = (unet.cross_attentions(),)  # hidden: they are the UNet's
        unet.to_rows = Joined(unet.time_projections(), device)
        layers = [layer for each in unet.cross_attentions() for layer in (each.to_k, each.to_v)]
        self.context = Joined(layers, device)  # a text (B, N, C) -> kv
        self.unet = unet.to(device)

    def time_rows(self, *given: Any, **named: Any) -> Tensor:
        """Embed a whole schedule, as `UNet.time_rows` does."""
        return self.unet.time_rows(*given, **named)

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
        each = iter(torch.split(kv, self.context.widths, dim=-1))
        (attentions,) = self._attentions
        return [(a.by_heads(next(each)), a.by_heads(next(each))) for a in attentions]


def join_text_(text: CLIPText, device: torch.device) -> None:
    """Make one product of each attention's three in a text encoder on `device`."""
    for layer in text.modules():
        if isinstance(layer, CausalAttention):
            layer.to_qkv = Joined([layer.q_proj, layer.k_proj, layer.v_proj], device)


def spare_passes_(model: nn.Module, *, norms_add: bool) -> None:
    """Rewrite a channels-last UNet, or a half of a VAE, so that fewer kernels pass over its maps.

    torch adds a convolution's bias in a kernel of its own, which reads and writes the whole map,
    and NVIDIA's library some products'. Convolutions of single pixels become products, and what
    else can add a bias on its way does:

        bias of                         is added by                             where
        a resnet's conv1                its time_emb_proj's bias                UNet
                                        its norm2 (norm2_added)                 VAE, norms_add
        a resnet's conv2                its conv_shortcut's bias, or the sum    everywhere
        an up-sampler                   all in the next resnet that read it     decoder, norms_add
        an attention or feed-forward    the next layer norm (added_bias)        norms_add
        of a transformer, but the last

    norms_add: its norms add a row for nothing; the library's do not.
    """
    for module in model.modules():
        if isinstance(module, Conv1x1):
            module.as_product = True
        elif isinstance(module, Upsample):
            module.as_copy = True
        elif isinstance(module, Resnet):
            _spare_biases_(module, norms_add=norms_add)
        elif isinstance(module, Transformer) and norms_add:
            _give_biases_to_norms_(module)
    for decoder in [m for m in model.modules() if isinstance(m, Decoder) and norms_add]:
        for level, after in pairwise(decoder.up_blocks):
            assert isinstance(level, Level) and isinstance(after, Level)
            for upsampler in level.upsamplers:
                _give_on_bias_(cast(Upsample, upsampler).conv, cast(Resnet, after.resnets[0]))


def _spare_biases_(resnet: Resnet, *, norms_add: bool) -> None:
    conv1, conv2, shortcut = resnet.conv1, resnet.conv2, resnet.conv_shortcut
    time = resnet.time_emb_proj
    assert conv1.bias is not None and conv2.bias is not None
    if time is not None:
        time.bias.add_(conv1.bias)
        conv1.bias = None
    elif norms_add:
        resnet.norm2_added = _fixed(conv1.bias[None])
        conv1.bias = None
    if shortcut is not None:
        assert shortcut.bias is not None
        shortcut.bias.add_(conv2.bias)
    else:
        resnet.bias = cast(nn.Parameter, conv2.bias)
    conv2.bias = None


def _give_biases_to_norms_(transformer: Transformer) -> None:
    """Move biases from attentions and feed-forward layers to the norms that read their sums."""
    before: nn.Linear | None = None
    for block in transformer.transformer_blocks:
        assert isinstance(block, TransformerBlock)
        products = (before, block.attn1.to_out[0], block.attn2.to_out[0])
        norms = (block.norm1, block.norm2, block.norm3)
        for layer, norm in zip(products, norms, strict=True):
            if layer is not None:
                norm.added_bias = cast(nn.Parameter, layer.bias)
                layer.bias = None  # type: ignore[assignment]
        before = cast(nn.Linear, block.ff.net[2])


def _give_on_bias_(conv: nn.Conv2d, resnet: Resnet) -> None:
    """Take the bias from a convolution that one resnet reads, and nobody else."""
    bias = conv.bias
    assert bias is not None
    conv.bias = None
    resnet.norm1_added = _fixed(bias[None])
    if resnet.conv_shortcut is None:
        assert resnet.bias is not None
        resnet.bias = _fixed(resnet.bias + bias)
    else:
        weight, own = resnet.conv_shortcut.weight, resnet.conv_shortcut.bias
        assert own is not None
        own.add_(torch.mv(weight.flatten(1).float(), bias.float()).to(own.dtype))
