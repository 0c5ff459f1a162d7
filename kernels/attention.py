"""Scaled dot-product attention: one function for every model, the implementation a value.

softmax(q k^T / sqrt(K)) v. Knows no model. xformers is imported only when asked for.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastsd.errors import MissingDependency, UsageError

IMPLEMENTATIONS = ("sdpa", "xformers")


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, implementation: str = "sdpa"
) -> Tensor:
    """Attend: out = softmax(q k^T / sqrt(K)) v, over the N keys of each head.

    q: (B, M, Nq, K); k, v: (B, M, N, K); any strides, one dtype. Returns (B, M, Nq, K).
    causal: query i sees keys 0..i only. implementation: "sdpa" (torch's choice) or "xformers".
    Raises MissingDependency if xformers is asked for and absent, UsageError for an unknown name.
    Source: Vaswani et al. 2017.
    """
    require_implementation(implementation)
    if implementation == "xformers":
        return _xformers(q, k, v, causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def require_implementation(name: str) -> None:
    """Raise UsageError unless `name` is one of IMPLEMENTATIONS."""
    if name not in IMPLEMENTATIONS:
        raise UsageError(
            f"attention implementation {name!r} is unknown; "
            f"it is one of {', '.join(IMPLEMENTATIONS)}"
        )


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    try:
        from xformers import ops
    except ImportError as error:
        raise MissingDependency(
            "attention implementation 'xformers' needs the package xformers, which is not "
            "installed; run pip install 'fastsd[xformers]' or use 'sdpa'"
        ) from error
    out: Tensor = ops.memory_efficient_attention(  # (B, N, M, K) there
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_bias=ops.LowerTriangularMask() if causal else None,
    )
    return out.transpose(1, 2)
