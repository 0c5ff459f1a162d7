"""The 3x3 convolution of the UNet and the decoder, with all that stands around it.

y = conv3x3(up([x | skip])) + bias + shift + residual: the skip's concatenation, the doubling of an
up-sampler before it, the time embedding and the residual sum after it. As library calls each is a
pass over memory of its own; a kernel of ours reads and writes each map once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd.kernels import dispatch


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    upsample: bool = False,
    implementation: str = "library",
) -> Tensor:
    """Convolve x (B, C, H, W) with weight (O, C + S, 3, 3), zeros one pixel around it.

    bias: (O,). skip: (B, S, H, W), more channels. shift: (B, O), added to every pixel. residual: of
    the result's shape. stride: 1 or 2. upsample: repeat each pixel 2x2 first.
    implementation: "library" (torch, any layout) or "triton", which computes channels-last.
    Returns (B, O, H', W') in x's dtype; sums are fp32. Raises UsageError for an unknown name.
    """
    if implementation == "library":
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        if upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        y = F.conv2d(x, weight, bias, stride=stride, padding=1)
        if shift is not None:
            y = y + shift[:, :, None, None]
        return y if residual is None else y + residual
    dispatch.require("conv3x3", implementation, x.device)
    height, width = (side * (2 if upsample else 1) for side in x.shape[-2:])
    shape = (len(x), len(weight), (height - 1) // stride + 1, (width - 1) // stride + 1)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    maps = [None if t is None else _channels_last(t) for t in (x, weight, skip, residual)]
    torch.ops.fastsd.conv3x3(maps[0], maps[1], bias, maps[2], shift, maps[3], stride, upsample, out)
    return out


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("fastsd::conv3x3", mutates_args=("out",))
def _conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: int,
    upsample: bool,
    out: Tensor,
) -> None:
    from fastsd.kernels import triton_convolution  # triton may be absent, and is slow to import

    # Triton launches on the current device.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_convolution.launch(x, weight, bias, skip, shift, residual, stride, upsample, out)


_conv3x3.register_fake(lambda *_: None)  # it writes into `out`, and makes nothing
