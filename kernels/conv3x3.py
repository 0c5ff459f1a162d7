"""The 3x3 convolution of the UNet and the decoder, with what stands around it.

y = conv3x3(up(x)) + bias + residual: the doubling of an up-sampler before it and the sum that ends
a resnet after it. As library calls each is a pass over memory of its own; a kernel of ours reads
and writes each map once. It reads fp8 too, as a norm before it may round for nothing. A resnet's
time embedding and a skip's concatenation have no place here: a norm stands between.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd.errors import UsageError
from fastsd.kernels import dispatch

SINCE = (9, 0)  # compute capability: Hopper's, whose tensor memory accelerator reads rectangles


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    phases: Tensor | None = None,
    upsample: bool = False,
    dtype: torch.dtype | None = None,
    implementation: str = "library",
) -> Tensor:
    """Convolve x (B, C, H, W) with weight (O, C, 3, 3), zeros one pixel around it.

    x, weight: of one dtype, floating point or fp8 (e4m3). bias: (O,). scale: (O,), fp32, what the
    products of fp8 numbers are multiplied by. residual: of the result's shape. upsample: repeat
    each pixel 2x2 first; phases: `summed_taps` of the weight, if they are at hand. dtype: the
    result's, None for x's; it has to be given for fp8. implementation: "library" (torch, any
    layout, fp8 in fp32) or "triton", which computes half precision and fp8, channels-last.
    Returns (B, O, H', W'); sums are fp32, of fp8 on Hopper of 14 bits. Raises UsageError for an
    unknown name, or for what triton does not compute.
    """
    if dtype is None and not x.dtype.itemsize > 1:
        raise UsageError(f"conv3x3 of {x.dtype} needs the result's dtype; pass dtype")
    dtype = dtype or x.dtype
    if implementation == "library":
        if upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if scale is None:
            y = F.conv2d(x, weight, bias, padding=1)
        else:
            y = F.conv2d(x.float(), weight.float() * scale[:, None, None, None], padding=1)
            y = y if bias is None else y + bias.float()[:, None, None]
        return (y if residual is None else y + residual).to(dtype)
    dispatch.require("conv3x3", implementation, x.device)
    if not fits(weight, x.dtype):
        raise UsageError(
            "conv3x3 by triton computes fp16, bf16 and fp8 of channels that are whole 16 bytes, on "
            f"GPUs since Hopper, not {x.dtype} of {x.shape[1]} channels here; use 'library'"
        )
    if upsample:
        weight = summed_taps(weight) if phases is None else phases
    factor = 2 if upsample else 1
    shape = (len(x), len(weight) // factor**2, factor * x.shape[2], factor * x.shape[3])
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    by_tap = _channels_last(weight).permute(0, 2, 3, 1).flatten(1)
    residual = None if residual is None else _channels_last(residual)
    torch.ops.fastsd.conv3x3(_channels_last(x), by_tap, bias, scale, residual, upsample, out)
    return out


def candidates(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    upsample: bool = False,
) -> dict[str, Callable[[], Tensor]]:
    """Return what can compute this on its device, by name, ready to be tried."""
    phases = summed_taps(weight) if upsample else None
    return dispatch.candidates(
        "conv3x3",
        x.device,
        partial(conv3x3, x, weight, bias, residual=residual, phases=phases, upsample=upsample),
        without=() if fits(weight, x.dtype) else ("triton",),
    )


def fits(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel convolves maps in `dtype` by a weight (O, C, 3, 3) where that is."""
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < SINCE:
        return False
    kinds = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    return dtype in kinds and weight.shape[1] * dtype.itemsize % 16 == 0


def summed_taps(weight: Tensor) -> Tensor:
    """Return what taps (O, C, 3, 3) are over the small map where pixels repeat: (4 O, C, 2, 2).

    Of a 2x2 block, whose pixels' kernels come one after the other, a pixel sees 2x2 pixels of the
    small map: two of each three taps in a row see the same.
    """
    wide = weight.detach().float()
    kernels = [of_columns for rows in _pairs(wide, 2) for of_columns in _pairs(rows, 3)]
    last = torch.channels_last
    return torch.cat(kernels).to(weight.dtype).contiguous(memory_format=last)


def _pairs(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return what two neighbours of one pixel make of three taps: (a, b + c) and (a + b, c)."""
    a, b, c = weight.unbind(dim)
    return torch.stack((a, b + c), dim), torch.stack((a + b, c), dim)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


dispatch.launched(
    "conv3x3",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual, bool upsample, "
    "Tensor(a!) out) -> ()",
)
