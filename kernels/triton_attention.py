"""Attention to few keys in Triton: a text's 77, which a program holds all at once."""

from __future__ import annotations

from math import log

import triton
import triton.language as tl
from torch import Tensor

from fastsd.kernels.sizes import cdiv, next_power_of_2
from fastsd.kernels.triton_fp8 import factor_of, rounded

BLOCK_Q = 64


@triton.jit(do_not_specialize=["queries", "keys"])
def attend(
    q,
    k,
    v,
    multiplier,
    out,
    q_b,
    q_n,
    k_b,
    k_n,
    v_b,
    v_n,
    heads,
    queries,
    keys,
    scale,
    Q_H: tl.constexpr,
    K_H: tl.constexpr,
    V_H: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """out (B, queries, heads, WIDTH) = softmax(ln 2 scale q k^T) v, BLOCK_Q queries of one head.

    REST: how many keys there are at most beyond BLOCK_N, which are then all given. x_b, X_H, x_n:
    strides of pictures, heads and tokens; a head's numbers lie side by side. Heads of 40 are no
    multiple of the 16 that Triton looks for: of a stride that it does not know while compiling it
    reads two bytes at a time, not sixteen.
    """
    factor = factor_of(multiplier, FP8)
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    i = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = tl.arange(0, BLOCK_N)
    w = tl.arange(0, BLOCK_W)
    own = (i < queries)[:, None] & (w < WIDTH)[None, :]
    q += b.to(tl.int64) * q_b + h * Q_H
    k += b.to(tl.int64) * k_b + h * K_H
    v += b.to(tl.int64) * v_b + h * V_H
    given = (n < keys)[:, None] & (w < WIDTH)[None, :]
    query = tl.load(q + i[:, None] * q_n + w[None, :], mask=own, other=0.0)
    key = tl.load(k + n[:, None] * k_n + w[None, :], mask=given, other=0.0)
    scores = tl.dot(query, tl.trans(key))
    if REST > 0:
        value = tl.load(v + n[:, None] * v_n + w[None, :], mask=given, other=0.0)
        m = BLOCK_N + tl.arange(0, REST)
        given = (m < keys)[:, None] & (w < WIDTH)[None, :]
        last_key = tl.load(k + m[:, None] * k_n + w[None, :], mask=given, other=0.0)
        last_value = tl.load(v + m[:, None] * v_n + w[None, :], mask=given, other=0.0)
        last = tl.dot(query, tl.trans(last_key))
        last = tl.where((m < keys)[None, :], last, float("-inf"))
        most = tl.maximum(tl.max(scores, axis=1), tl.max(last, axis=1))
        parts = tl.exp2(scale * (scores - most[:, None]))
        last = tl.exp2(scale * (last - most[:, None]))
        total = tl.sum(parts, axis=1) + tl.sum(last, axis=1)
        attended = tl.dot(last.to(value.dtype), last_value)
        attended = tl.dot(parts.to(value.dtype), value, attended)
    else:
        scores = tl.where((n < keys)[None, :], scores, float("-inf"))
        parts = tl.exp2(scale * (scores - tl.max(scores, axis=1)[:, None]))
        total = tl.sum(parts, axis=1)
        value = tl.load(v + n[:, None] * v_n + w[None, :], mask=given, other=0.0)
        attended = tl.dot(parts.to(value.dtype), value)
    attended /= total[:, None]
    at = ((b.to(tl.int64) * queries + i[:, None]) * heads + h) * WIDTH + w[None, :]
    tl.store(out + at, rounded(attended, factor, out.dtype.element_ty, FP8), mask=own)


def launch(q: Tensor, k: Tensor, v: Tensor, multiplier: Tensor | None, out: Tensor) -> None:
    """Attend from q (B, M, Nq, K) to k, v (B, M, N, K), N <= 128, into out (B, Nq, M, K)."""
    B, heads, queries, width = q.shape
    keys, block_w = k.shape[2], max(16, next_power_of_2(width))
    # Of the widest heads two lots of keys spill registers, on GPUs other than Hopper.
    block_n, rest = _blocks(keys) if block_w <= 128 else (max(16, next_power_of_2(keys)), 0)
    attend[(cdiv(queries, BLOCK_Q), B * heads)](
        q,
        k,
        v,
        q if multiplier is None else multiplier,
        out,
        *q.stride()[:3:2],
        *k.stride()[:3:2],
        *v.stride()[:3:2],
        heads,
        queries,
        keys,
        width**-0.5 / log(2),
        Q_H=q.stride(1),
        K_H=k.stride(1),
        V_H=v.stride(1),
        WIDTH=width,
        FP8=multiplier is not None,
        BLOCK_Q=BLOCK_Q,
        BLOCK_N=block_n,
        REST=rest,
        BLOCK_W=block_w,
        num_warps=4 if block_w <= 64 else 8,  # with four, wider heads spill registers
    )


def _blocks(keys: int) -> tuple[int, int]:
    """Cut keys in a power of two of them and a smaller one, if that is less than one: 77 in 64 and
    16, not in 128."""
    whole: int = max(16, next_power_of_2(keys))
    rest: int = max(16, next_power_of_2(keys - whole // 2))
    return (whole // 2, rest) if 16 < keys and rest < whole // 2 else (whole, 0)
