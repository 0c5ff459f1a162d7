"""Quantise and dequantise nodes (Q/DQ) in exported graphs, from the runtime's own QuantSpec.

    y = W' * dq(q(x 2^-e)) + b,   W' = dq(q(W 2^e))

The rounded weights are stored as they are (int8 or fp8), one scale an output channel; a runtime
that has kernels for them folds the nodes around a product into one, any other computes what is
written.
How the input is rounded is a `Format`: ONNX Runtime and OpenVINO take uint8 with a zero point,
TensorRT int8 around zero, and both fp8 (e4m3, largest 448; Micikevicius et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21
from torch import Tensor, nn

from fastsd.models.vae import VAE, overflows_fp16
from fastsd.quant.apply import quantised
from fastsd.quant.calibrate import fp8
from fastsd.quant.linear import grown
from fastsd.quant.spec import E4M3, QuantSpec, Rounding


@dataclass(frozen=True)
class Format:
    """A number format: what inputs and weights are rounded to. largest: the weights' end."""

    input: torch.dtype
    weight: torch.dtype
    largest: float


UINT8 = Format(torch.uint8, torch.int8, 127)
INT8 = Format(torch.int8, torch.int8, 127)
FP8 = Format(torch.float8_e4m3fn, torch.float8_e4m3fn, E4M3)
_ENDS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def with_qdq(
    module: nn.Module, roundings: Mapping[str, Rounding], format_: Format, dtype: torch.dtype
) -> nn.Module:
    """Return a copy of `module` whose layers named in `roundings` round their inputs and weights.

    dtype: of the graph around them, and of the scales. The rest is shared, not copied.
    """
    return quantised(
        module, roundings, lambda layer, rounding: _Rounded(layer, rounding, format_, dtype)
    )


def prepare(
    spec: QuantSpec | None, format_: Format | None, dtype: torch.dtype
) -> Callable[[str, nn.Module], nn.Module]:
    """Return what `load_part` does to a freshly loaded model: nothing without a spec."""

    def prepared(part: str, module: nn.Module) -> nn.Module:
        if spec is None or format_ is None or part not in ("unet", "vae_decoder"):
            return module
        if isinstance(module, VAE) and overflows_fp16(module):
            return module  # its activations are scaled into fp16's range, away from their roundings
        return with_qdq(module, spec.only(part.partition("_")[0]), format_, dtype)

    return prepared


@final
class _Rounded(nn.Module):
    """A linear layer or convolution between Q/DQ nodes."""

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        rounding: Rounding,
        format_: Format,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        weight, shrink = grown(layer.weight.detach().float(), rounding)
        self.shrink: Tensor | None
        self.register_buffer("shrink", None if shrink is None else shrink.to(dtype))
        # Scales are rounded to the graph's dtype first, and never to 0: what is stored is exact.
        scale = weight.flatten(1).abs().amax(1) / format_.largest
        scale = scale.to(dtype).clamp_min(torch.finfo(dtype).smallest_normal)
        rounded = weight / scale.float().view(-1, *[1] * (weight.ndim - 1))
        rounded = rounded.clamp(-format_.largest, format_.largest)
        if not format_.weight.is_floating_point:
            rounded = rounded.round()
        self.convolution = layer if isinstance(layer, nn.Conv2d) else None
        if self.convolution is None:  # transposed here: a runtime wants nothing before the product
            rounded = rounded.t().contiguous()
        self.register_buffer("weight", rounded.to(format_.weight))
        self.register_buffer("weight_scale", scale)
        self.bias = layer.bias
        if format_.input == torch.uint8:
            self.scale, self.zero_point = rounding.affine()
        else:
            floats = format_.input.is_floating_point
            self.scale = rounding.fp8() if floats else rounding.symmetric(format_.largest)
            self.zero_point = 0
        self.input = str(format_.input).removeprefix("torch.")

    def forward(self, x: Tensor) -> Tensor:
        """(…, C_in) -> (…, C_out), or (B, C_in, H, W) -> (B, C_out, H', W')."""
        if self.shrink is not None:
            x = x * self.shrink
        x = torch.ops.fastsd.round_input(x, self.scale, self.zero_point, self.input)
        conv = self.convolution
        weight = torch.ops.fastsd.full_weight(
            self.weight, self.weight_scale, 1 if conv is None else 0
        )
        if conv is None:
            out = x @ weight
            biased: Tensor = out if self.bias is None else out + self.bias
            return biased
        return nn.functional.conv2d(x, weight, self.bias, conv.stride, conv.padding)


FP8_FORM = fp8(lambda layer, rounding: _Rounded(layer, rounding, FP8, torch.float32))

op: Any = opset21  # its types are those of scripted functions, not of values traced here


# --- the two nodes, as operations that torch traces and runs --------------------------------------


@torch.library.custom_op("fastsd::round_input", mutates_args=())
def round_input(x: Tensor, scale: float, zero_point: int, format_: str) -> Tensor:
    """Round x to a format and back."""
    kind: torch.dtype = getattr(torch, format_)
    # The graph holds the scale in x's dtype.
    step = float(torch.tensor(scale, dtype=x.dtype))
    if kind.is_floating_point:
        end = torch.finfo(kind).max
        return (x.float() / step).clamp(-end, end).to(kind).to(x.dtype) * step
    low, high = _ENDS[kind]
    rounded = (x.float() / step).round().add(zero_point).clamp(low, high)
    return ((rounded - zero_point) * step).to(x.dtype)


@round_input.register_fake
def _(x: Tensor, scale: float, zero_point: int, format_: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fastsd::full_weight", mutates_args=())
def full_weight(weight: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Dequantise a weight whose channels lie along `axis`."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    return (weight.float() * scale.float().view(shape)).to(scale.dtype)


@full_weight.register_fake
def _(weight: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(weight, dtype=scale.dtype)


def _round_input_nodes(x: Any, scale: float, zero_point: int, format_: str) -> Any:
    kind = ir.DataType[{"uint8": "UINT8", "int8": "INT8"}.get(format_, "FLOAT8E4M3FN")]
    step = op.Constant(value=ir.tensor(np.array(scale, x.dtype.numpy())))
    zero = op.Constant(value=ir.tensor(np.array(zero_point).astype(kind.numpy()), dtype=kind))
    return op.DequantizeLinear(op.QuantizeLinear(x, step, zero), step, zero)


def _full_weight_nodes(weight: Any, scale: Any, axis: int) -> Any:
    return op.DequantizeLinear(weight, scale, axis=axis)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what torch.onnx must know of the two operations."""
    return {
        torch.ops.fastsd.round_input.default: _round_input_nodes,
        torch.ops.fastsd.full_weight.default: _full_weight_nodes,
    }
