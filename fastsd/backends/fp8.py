"""A GPU's UNet and decoder in fp8, where the kernel before a layer rounds its input for nothing.

What a norm, a gate or the attention to a text's few keys writes does: the products of
self-attention's queries, keys and values, all of cross-attention's, the feed-forward layers', and,
on GPUs whose convolutions read fp8, those of resnets. Others would need a pass of their own, which
takes as long as their products win.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from fastsd.backends.cuda_graph import gpu_name
from fastsd.errors import UsageError
from fastsd.kernels import attention, conv3x3, dispatch, geglu, group_norm, layer_norm
from fastsd.models.layers import (
    GEGLU,
    Attention,
    Conv3x3,
    GroupNorm,
    LayerNorm,
    Resnet,
    Transformer,
    TransformerBlock,
)
from fastsd.models.unet import UNet
from fastsd.quant.linear import Fp8Conv3x3, Fp8Linear, has_fp8
from fastsd.quant.spec import Rounding

SINCE = (8, 9)  # compute capability
Rounder = Attention | GEGLU | GroupNorm | LayerNorm
_OPS = {Attention: "attention", GEGLU: "geglu", GroupNorm: "group_norm", LayerNorm: "layer_norm"}


def require_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UsageError unless `device` has fp8 products, and what is around them is in half."""
    if device.type != "cuda":
        raise UsageError(
            f"weights='fp8' needs a GPU, not {device.type}; leave it out, or export an int8 engine"
        )
    if torch.cuda.get_device_capability(device) < SINCE:
        raise UsageError(
            f"this GPU, {gpu_name(device)}, has no fp8 products, which come with compute "
            f"capability {'.'.join(map(str, SINCE))}; leave weights='fp8' out"
        )
    if dtype == torch.float32:
        raise UsageError("weights='fp8' needs precision='fp16' or 'bf16'; pass one of them")


@torch.no_grad()
def put_in_fp8_(
    unet: UNet, decoder: nn.Module | None, draw: Callable[[], object]
) -> dict[str, int]:
    """Put in fp8 what is worth it.

    Returns how many "linear layers" and "convolutions" that is, and of each op ("group_norm", …)
    how many kernels round for them.

    unet: one whose products of one input are joined (`JoinedUNet`). decoder: a VAE's, None to leave
    it as it is. draw: runs both on inputs like those to come, by which the ranges of the layers'
    inputs are found: what is four times as large fits as well.
    """
    found = [*_spots(unet), *([] if decoder is None else _convolutions(decoder))]
    largest: dict[nn.Module, Tensor] = {}

    def watch(layer: nn.Module, args: tuple[Any, ...]) -> None:
        here = args[0].detach().abs().amax().float()
        largest[layer] = torch.maximum(largest[layer], here) if layer in largest else here

    named = {
        layer: name
        for module in (unet, decoder)
        if module is not None
        for name, layer in module.named_modules()
    }
    layers = [owner.get_submodule(name) for _, owner, name in found]
    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        draw()
    finally:
        for hook in hooks:
            hook.remove()
    for (source, owner, name), layer in zip(found, layers, strict=True):
        high = float(largest[layer])
        if not high < float("inf"):
            raise UsageError(
                "the model's activations are not finite before "
                f"{type(layer).__name__} {named.get(layer, name)}; load it as bf16, or where it "
                "was, check its weights"
            )
        rounding = Rounding.of(-high, high)
        rounded: Fp8Linear | Fp8Conv3x3
        if isinstance(layer, Conv3x3):
            rounded = Fp8Conv3x3(layer, rounding)
        else:
            rounded = Fp8Linear(layer.weight, layer.bias, rounding)  # type: ignore[arg-type]
        owner.set_submodule(name, rounded)
        source.multiplier = rounded.multiplier
        # Others round in passes of their own.
        ours = source.implementation.startswith("triton")
        if not ours and _runs(_OPS[type(source)], rounded.weight.device):
            source.implementation = "triton"
    for block in _blocks(unet):
        for letter in "qkv":  # they have views of the joined weights, which are used no more
            setattr(block.attn1, f"to_{letter}", None)
    convolutions = sum(isinstance(layer, Conv3x3) for layer in layers)
    count = Counter(_OPS[type(source)] for source, _, _ in found)
    return {"linear layers": len(found) - convolutions, "convolutions": convolutions, **count}


def _blocks(unet: UNet) -> Iterator[TransformerBlock]:
    return (module for module in unet.modules() if isinstance(module, TransformerBlock))


def _spots(unet: UNet) -> Iterator[tuple[Rounder, nn.Module, str]]:
    """Yield what rounds an input, and the layer that reads it, by its owner and name there."""
    for block in _blocks(unet):
        gate = block.ff.net[0]
        assert isinstance(gate, GEGLU)
        for source, owner, name in (
            (block.norm1, block.attn1, "to_qkv"),
            (block.norm2, block.attn2, "to_q"),
            (block.attn2, block.attn2.to_out, "0"),
            (block.norm3, gate, "proj"),
            (gate, block.ff.net, "2"),
        ):
            if has_fp8(owner.get_submodule(name)):
                yield source, owner, name
    for transformer in unet.modules():
        # The first product of a transformer over channels-last pixels reads what its norm writes.
        if isinstance(transformer, Transformer) and transformer.linear:
            if has_fp8(transformer.proj_in):
                yield transformer.norm, transformer, "proj_in"
    # The last level's stay: no later one evens out what they round, and guidance multiplies it.
    # They cost the built-in model's pictures 7 dB, and win SDXL's steps 2 %.
    yield from _convolutions(unet, but=unet.up_blocks[-1])


def _convolutions(
    model: nn.Module, *, but: nn.Module | None = None
) -> Iterator[tuple[Rounder, nn.Module, str]]:
    """Yield the norms and convolutions of resnets, but for those within `but`."""
    kept = set() if but is None else set(but.modules())
    for resnet in model.modules():
        if isinstance(resnet, Resnet) and resnet not in kept:
            if _has_kernel(resnet.conv1.weight):
                yield resnet.norm1, resnet, "conv1"
            if _has_kernel(resnet.conv2.weight):
                yield resnet.norm2, resnet, "conv2"


def _has_kernel(weight: Tensor) -> bool:
    """Whether a convolution of such weights has a kernel for fp8; a CPU's is the formula."""
    fits = conv3x3.fits(weight, torch.float8_e4m3fn)
    return fits and (not weight.is_cuda or _runs("conv3x3", weight.device))


@cache
def _runs(op: str, device: torch.device) -> bool:
    """Whether our kernel of `op`, as it reads or writes fp8, runs on this device and is right."""
    library, *others = dispatch.able(op, device)
    if "triton" not in others:
        return False

    def numbers(*shape: int) -> Tensor:
        counted = torch.arange(math.prod(shape), dtype=torch.float32, device=device)
        return (0.7 * counted).sin().half().view(shape)

    row, multiplier = numbers(64), torch.full((), 8.0, device=device)

    def compute(name: str) -> Tensor:
        how: dict[str, Any] = {"multiplier": multiplier, "implementation": name}
        if op == "attention":
            return attention.attention(*numbers(3, 1, 2, 16, 64), **how)
        if op == "geglu":
            return geglu.geglu(numbers(1, 16, 128), **how)
        if op == "group_norm":
            return group_norm.group_norm(numbers(1, 64, 8, 8), row, row, 32, 1e-5, **how)
        if op == "layer_norm":
            return layer_norm.layer_norm(numbers(1, 16, 64), row, row, 1e-5, **how)[1]
        x, weight = (
            numbers(*shape).to(torch.float8_e4m3fn) for shape in ((1, 64, 8, 8), (64, 64, 3, 3))
        )
        scale = torch.ones(64, device=device)
        return conv3x3.conv3x3(x, weight, scale=scale, dtype=torch.float16, implementation=name)

    with torch.cuda.device_of(row):  # type: ignore[no-untyped-call]
        both = {name: partial(compute, name) for name in (library, "triton")}
        return "triton" in dispatch.agreeing(f"{op} in fp8", both)
