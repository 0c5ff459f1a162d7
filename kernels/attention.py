"""Scaled dot-product attention: one function for every model, the implementation a value.

softmax(q k^T / sqrt(K)) v, the scores in fp32 whatever the dtype. Knows no model. xformers and
FlashAttention 3 are imported only when asked for; avx512 (fp32) and vnni (both products in int8)
are our own kernels for CPUs, see native.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd.errors import UsageError
from fastsd.kernels import dispatch, native
from fastsd.kernels.fp8 import in_fp8

MOST_KEYS = 128  # of our kernel for few
SCORES = 2**26  # that "products" holds at once, in fp32


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    multiplier: Tensor | None = None,
    implementation: str = "sdpa",
) -> Tensor:
    """Attend: out = softmax(q k^T / sqrt(K)) v, over the N keys of each head.

    q: (B, M, Nq, K); k, v: (B, M, N, K); any strides, one dtype. Returns (B, M, Nq, K).
    causal: query i sees keys 0..i only. multiplier: (), fp32: return fp8 (e4m3), times this, which
    "triton" does in the same pass. implementation: "sdpa" (torch's choice); on GPUs also "flash",
    "efficient" or "cudnn" (torch's kernels by name), "flash3", "xformers", or "triton" (in half
    precision, to at most MOST_KEYS keys; to more, or causal, it is sdpa), or "products" (in half
    precision, two products and a softmax, SCORES at a time; not causal); on CPUs, once
    `native.load` was called, "avx512" or "vnni" (not causal).
    Raises MissingDependency if what is asked for is absent, UsageError for an unknown name.
    Source: Vaswani et al. 2017.
    """
    dispatch.require("attention", implementation)
    if implementation == "triton" and not causal and k.shape[2] <= MOST_KEYS:
        return _triton(q, k, v, multiplier)
    if implementation in ("sdpa", "triton"):  # a longer text's chunks, or a map's own pixels
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    else:
        out = _BY_NAME[implementation](q, k, v, causal)
    return out if multiplier is None else in_fp8(out, multiplier)


def candidates(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return what can attend from these inputs on their GPU, by name, ready to be timed."""
    if q.device.type != "cuda":
        return {}
    given = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    refused = {
        "flash": not torch.backends.cuda.can_use_flash_attention(given),
        "efficient": not torch.backends.cuda.can_use_efficient_attention(given),
        "cudnn": not torch.backends.cuda.can_use_cudnn_attention(given),
        "triton": q.dtype == torch.float32 or k.shape[2] > MOST_KEYS,
        # Fused kernels hold narrower heads in a multiprocessor, and are faster then.
        "products": q.dtype == torch.float32 or q.shape[3] <= 256,
    }
    without = [name for name, holds in refused.items() if holds]
    return dispatch.candidates("attention", q.device, partial(attention, q, k, v), without=without)


# torch.nn.attention.sdpa_kernel chooses too, but by flags of the whole process: two threads in it
# leave each other's choice behind. The operators below are what it chooses among.


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]
    return out


def _efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, False, 0.0, causal
    )[0]
    return out


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, False, 0.0, causal
    )[0]
    return out


def _flash3(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError as error:
        raise dispatch.missing("attention", "flash3") from error
    out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal)
    result: Tensor = out[0] if isinstance(out, tuple) else out  # older ones add what backward needs
    return result.transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    try:
        from xformers import ops
    except ImportError as error:
        raise dispatch.missing("attention", "xformers") from error
    out: Tensor = ops.memory_efficient_attention(  # (B, N, M, K) there
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_bias=ops.LowerTriangularMask() if causal else None,
    )
    return out.transpose(1, 2)


def _avx512(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return _own(q, k, v, causal, int8=False)


def _vnni(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return _own(q, k, v, causal, int8=True)


def _own(q: Tensor, k: Tensor, v: Tensor, causal: bool, *, int8: bool) -> Tensor:
    if causal:
        raise UsageError("our CPU kernels have no causal form; use 'sdpa'")
    return native.attention(q, k, v, int8=int8)


def _products(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    if causal or q.dtype == torch.float32:
        raise UsageError(
            "attention implementation 'products' is for fp16 and bf16, and not causal; use 'sdpa'"
        )
    rows = max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for part in (q * q.shape[3] ** -0.5).flatten(0, 1).split(rows, dim=1):
        scores = torch.bmm(part, k.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        parts.append(torch.bmm(scores.softmax(dim=-1).to(v.dtype), v.flatten(0, 1)))
    return torch.cat(parts, dim=1).view(q.shape)


def _triton(q: Tensor, k: Tensor, v: Tensor, multiplier: Tensor | None) -> Tensor:
    if q.dtype == torch.float32:
        raise UsageError("attention implementation 'triton' is for fp16 and bf16; use 'sdpa'")
    dispatch.require("attention", "triton", q.device)
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    B, heads, queries, width = q.shape
    dtype = q.dtype if multiplier is None else torch.float8_e4m3fn
    out = torch.empty((B, queries, heads, width), dtype=dtype, device=q.device)
    torch.ops.fastsd.attention(q, k, v, multiplier, out)
    return out.transpose(1, 2)


dispatch.launched(
    "attention", "(Tensor q, Tensor k, Tensor v, Tensor? multiplier, Tensor(a!) out) -> ()"
)


_BY_NAME = {
    "products": _products,
    "flash": _flash,
    "flash3": _flash3,
    "efficient": _efficient,
    "cudnn": _cudnn,
    "xformers": _xformers,
    "avx512": _avx512,
    "vnni": _vnni,
}
