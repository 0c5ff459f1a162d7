"""Linear layers and convolutions in int8 and fp8, written as the graphs that compilers recognise.

    y = dq(W 2^e) * dq(q(x 2^-e)) + b

int8: q(x) = clamp(round(x / scale) + zero point, 0, 255). Eager torch runs this anywhere, in
floating point, exactly as rounded; oneDNN (through Inductor) and the ONNX runtimes fold quantise,
product and dequantise into one int8 product. Weights are int8 around zero, one scale an output
channel (Jacob et al. 2018).
fp8: q(x) = clamp(x / scale, -448, 448) in e4m3 (Micikevicius et al. 2022). A linear layer has one
scale for all weights and is one product of torch's own, which GPUs have from Ada and Hopper on; a
convolution has one a channel and is a kernel of ours, for Hopper and later.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers quantized_decomposed)

from fastsd.errors import UsageError
from fastsd.kernels import dispatch
from fastsd.kernels.conv3x3 import conv3x3
from fastsd.kernels.fp8 import in_fp8
from fastsd.quant.spec import E4M3, Rounding

_ops = torch.ops.quantized_decomposed
FP8_WIDTHS = 16  # that fp8 products are made for: multiples of it


def has_fp8(layer: nn.Module) -> bool:
    """Whether a linear layer's widths, or those of several joined, are what fp8 products take."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return not any(width % FP8_WIDTHS for width in weight.shape)


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round (C_out, …) to (int8 of -127..127, scales (C_out,) fp32), the largest value at 127."""
    scale = weight.detach().float().flatten(1).abs().amax(1).clamp_min(1e-12) / 127
    shape = (-1, *[1] * (weight.ndim - 1))
    rounded = (weight.detach().float() / scale.view(shape)).round().clamp(-127, 127)
    return rounded.to(torch.int8), scale


def powers(exponents: tuple[int, ...]) -> Tensor:
    """Return 2^e for each channel, (C,) fp32."""
    return torch.ldexp(torch.ones(len(exponents)), torch.tensor(exponents))


def grown(weight: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor | None]:
    """Return a layer's weights W 2^e, and 2^-e shaped as they are; None without exponents."""
    if not rounding.exponents:
        return weight, None
    if len(rounding.exponents) != weight.shape[1]:
        raise UsageError(
            f"a rounding has {len(rounding.exponents)} exponents for a layer of "
            f"{weight.shape[1]} channels; calibrate on this model"
        )
    grow = powers(rounding.exponents).to(weight.device).view(-1, *(1,) * (weight.ndim - 2))
    return weight * grow, 1 / grow


class _Int8(nn.Module, ABC):
    """What the two layers share: int8 weights, the input's rounding.

    out_dtype: fp32, or bf16 for a reader to whom that is fine enough.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    shrink: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, rounding: Rounding) -> None:
        super().__init__()
        weight, shrink = grown(layer.weight, rounding)
        rounded, scale = quantise_weight(weight)
        self.register_buffer("weight", rounded)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", torch.zeros_like(scale, dtype=torch.int64))
        self.register_buffer("shrink", shrink)
        self.bias = layer.bias
        self.out_dtype = torch.float32
        self.scale, self.zero_point = rounding.affine()

    @abstractmethod
    def product(self, q: Tensor) -> Tensor:
        """Multiply an input that is uint8 already by the weights."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C_in) -> (…, C_out), or (B, C_in, H, W) -> (B, C_out, H', W')."""
        if self.shrink is not None:
            x = x * self.shrink
        return self.product(_ops.quantize_per_tensor.default(x, *self._rounding))

    @property
    def multiplier(self) -> Tensor:
        """What each of the input's channels is multiplied by before it is rounded, (C_in,)."""
        width = self.weight.shape[1]
        even = torch.ones(width) if self.shrink is None else self.shrink.flatten()
        return even / self.scale

    @property
    def _rounding(self) -> tuple[float, int, int, int, torch.dtype]:
        return self.scale, self.zero_point, 0, 255, torch.uint8

    def operands(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the dequantised input and weights, and the bias, all as `out_dtype`."""
        x = _ops.dequantize_per_tensor.default(q, *self._rounding)
        weight = _ops.dequantize_per_channel.default(
            self.weight, self.weight_scale, self.weight_zero, 0, -127, 127, torch.int8
        )
        bias = None if self.bias is None else self.bias.to(self.out_dtype)
        return x.to(self.out_dtype), weight.to(self.out_dtype), bias


@final
class Int8Linear(_Int8):
    """nn.Linear in int8."""

    def product(self, q: Tensor) -> Tensor:
        """(…, C_in) uint8 -> (…, C_out)."""
        return F.linear(*self.operands(q))


@final
class Int8Conv2d(_Int8):
    """nn.Conv2d in int8, ungrouped, with zero padding."""

    def __init__(self, layer: nn.Conv2d, rounding: Rounding) -> None:
        super().__init__(layer, rounding)
        self.stride, self.padding = layer.stride, layer.padding

    def product(self, q: Tensor) -> Tensor:
        """(B, C_in, H, W) uint8 -> (B, C_out, H', W')."""
        return F.conv2d(*self.operands(q), self.stride, self.padding)


def int8_layer(layer: nn.Linear | nn.Conv2d, rounding: Rounding) -> Int8Linear | Int8Conv2d:
    """Return the int8 form of `layer`, sharing its bias. Raises UsageError for a grouped, dilated
    or circular convolution."""
    if isinstance(layer, nn.Linear):
        return Int8Linear(layer, rounding)
    if layer.groups != 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
        raise UsageError(
            "a grouped, dilated or circular convolution has no int8 form; keep it as it is"
        )
    return Int8Conv2d(layer, rounding)


@final
class Fp8Linear(nn.Module):
    """A linear layer in fp8.

    weight: (C_out, C_in), both multiples of FP8_WIDTHS. bias: (C_out,), or None. multiplier: ()
    or (C_in,), fp32: what inputs are multiplied by when they are rounded.
    """

    weight: Tensor
    weight_scale: Tensor
    scale: Tensor
    multiplier: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, rounding: Rounding) -> None:
        super().__init__()
        self.dtype = weight.dtype
        weight, shrink = grown(weight.detach().float(), rounding)
        scale = torch.tensor(rounding.fp8(), dtype=torch.float32, device=weight.device)
        # One for all channels, as torch's products take it: fp8 is as fine where it is small.
        weight_scale = weight.abs().amax().clamp_min(1e-12) / E4M3
        self.register_buffer("weight", (weight / weight_scale).to(torch.float8_e4m3fn))
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("scale", scale)
        self.register_buffer("multiplier", scale.reciprocal() * (1 if shrink is None else shrink))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, C_in) -> (…, C_out), in x's dtype; x already rounded to fp8 -> in the weights'."""
        dtype = self.dtype if x.dtype == torch.float8_e4m3fn else x.dtype
        fused = dtype != torch.float32  # or GPUs add no bias
        q = x.flatten(0, -2)
        out: Tensor = torch._scaled_mm(
            q if q.dtype == torch.float8_e4m3fn else in_fp8(q, self.multiplier),
            self.weight.t(),
            self.scale,
            self.weight_scale,
            bias=self.bias if fused else None,
            out_dtype=dtype,
            use_fast_accum=True,  # Hopper's sums of 14 bits, which err less than the rounding
        )
        out = out.view(*x.shape[:-1], -1)
        return out if fused or self.bias is None else out + self.bias


@final
class Fp8Conv3x3(nn.Module):
    """A 3x3 convolution in fp8, with zero padding, and the sum after it.

    weight: (C_out, C_in, 3, 3), channels-last. scale: (C_out,), fp32, of the products; bias:
    (C_out,), or None; multiplier: (), fp32: what inputs are multiplied by when they are rounded.
    """

    adds = True  # a sum costs no pass of its own
    weight: Tensor
    scale: Tensor
    multiplier: Tensor

    def __init__(self, layer: nn.Conv2d, rounding: Rounding) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        self.dtype = layer.weight.dtype
        scale = torch.tensor(rounding.fp8(), dtype=torch.float32, device=weight.device)
        by_channel = weight.abs().amax((1, 2, 3)).clamp_min(1e-12) / E4M3
        rounded = (weight / by_channel.view(-1, 1, 1, 1)).to(torch.float8_e4m3fn)
        last = torch.channels_last
        self.register_buffer("weight", rounded.contiguous(memory_format=last))
        self.register_buffer("scale", by_channel * scale)
        self.register_buffer("multiplier", scale.reciprocal())
        self.bias = layer.bias
        able = dispatch.able("conv3x3", weight.device)
        self.implementation = "triton" if "triton" in able else "library"

    def forward(
        self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """As `Conv3x3`, from numbers that are in fp8 already, in the weights' own dtype."""
        bias = self.bias if bias is None else bias
        return conv3x3(
            x,
            self.weight,
            bias,
            scale=self.scale,
            residual=residual,
            dtype=self.dtype,
            implementation=self.implementation,
        )


@final
class Bf16Layer(nn.Module):
    """A linear layer or convolution in bf16: half the bytes, and twice the speed where the CPU
    multiplies bf16; sums stay in fp32 inside. out_dtype: fp32, or bf16 as it is rounded to anyway.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer).to(torch.bfloat16)
        self.out_dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's own, from fp32 or bf16."""
        out: Tensor = self.layer(x.bfloat16())
        return out.to(self.out_dtype)
