"""Attention against the formula, at the shapes that Stable Diffusion has."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsd.errors import MissingDependency, UsageError
from fastsd.kernels import dispatch, reference
from fastsd.kernels.attention import attention, candidates
from tests.distances import relative_l2

# (B, M, Nq, N, K): self-attention of SD1.5 at 64x64 latents (one head of eight: the scores take
# 64 MB) and at 16x16, SDXL's at 32x32, the cross-attentions of both, 9x17 latents, the VAE's single
# wide head.
SHAPES = (
    (1, 1, 4096, 4096, 40),
    (2, 8, 256, 256, 160),
    (2, 20, 1024, 1024, 64),
    (2, 8, 4096, 77, 40),
    (2, 10, 1024, 154, 64),
    (3, 2, 153, 153, 40),
    (1, 1, 1024, 1024, 512),
)
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative L2


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return q, k, v as the models give them: (B, N, M, K) in memory, seen as (B, M, N, K)."""
    generator = torch.Generator().manual_seed(0)
    b, m, nq, n, k = shape
    return [
        torch.randn(b, tokens, m, k, generator=generator).to(dtype).transpose(1, 2)
        for tokens in (nq, n, n)
    ]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = draw(shape, dtype)
    out = attention(q, k, v)
    assert out.dtype == dtype
    assert (
        relative_l2(out, reference.attention(q.float(), k.float(), v.float())) <= TOLERANCES[dtype]
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_causal_equals_the_formula_and_sees_no_future(dtype: torch.dtype) -> None:
    q, k, v = draw((2, 12, 77, 77, 64), dtype)
    out = attention(q, k, v, causal=True)
    truth = reference.attention(q.float(), k.float(), v.float(), causal=True)
    assert relative_l2(out, truth) <= TOLERANCES[dtype]
    k[:, :, 40:], v[:, :, 40:] = 9.0, -9.0
    assert torch.equal(attention(q, k, v, causal=True)[:, :, :40], out[:, :, :40])


def test_the_reference_equals_a_loop_over_queries() -> None:
    q, k, v = draw((1, 2, 5, 5, 3))
    for causal in (False, True):
        out = reference.attention(q, k, v, causal=causal)
        for head in range(2):
            for i in range(5):
                seen = i + 1 if causal else 5
                weights = torch.exp(k[0, head, :seen] @ q[0, head, i] / 3**0.5)
                expected = (weights / weights.sum()) @ v[0, head, :seen]
                torch.testing.assert_close(out[0, head, i], expected)


def test_weights_sum_to_one_and_the_order_of_keys_is_moot() -> None:
    q, k, v = draw((2, 8, 256, 77, 40))
    torch.testing.assert_close(attention(30 * q, k, torch.ones_like(v)), torch.ones_like(q))
    order = torch.randperm(77, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(attention(q, k[:, :, order], v[:, :, order]), attention(q, k, v))


def test_gradients_equal_those_of_the_formula() -> None:
    leaves = [t.requires_grad_(True) for t in draw((2, 4, 64, 77, 40))]
    ours = torch.autograd.grad(attention(*leaves).square().sum(), leaves)
    truth = torch.autograd.grad(reference.attention(*leaves).square().sum(), leaves)
    for a, b in zip(ours, truth, strict=True):
        assert relative_l2(a, b) <= 1e-5


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(UsageError, match="'flash9' is unknown; it is one of sdpa, .*xformers"):
        attention(*draw((1, 1, 4, 4, 8)), implementation="flash9")


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("name", ("flash", "efficient", "cudnn"))
def test_torchs_gpu_kernels_are_called_as_they_are_declared(name: str, causal: bool) -> None:
    """They need a GPU; their declarations (meta tensors) are there without one."""
    q, k, v = (t.to("meta", torch.float16) for t in draw((2, 8, 256, 77, 40)))
    out = attention(q, k, v, causal=causal, implementation=name)
    assert out.shape == q.shape and out.dtype == torch.float16


def test_only_a_gpu_has_candidates() -> None:
    assert candidates(*draw((1, 2, 16, 16, 8))) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", (1, 200), ids=("plain", "scores beyond fp16"))
def test_every_candidate_equals_the_formula(shape: tuple[int, ...], scale: int) -> None:
    q, k, v = (t.to("cuda", torch.float16) for t in draw(shape))
    q, k = scale * q, scale * k
    truth = reference.attention(q.float(), k.float(), v.float())
    for name, attend in candidates(q, k, v).items():
        assert relative_l2(attend(), truth) <= TOLERANCES[torch.float16], name


@pytest.mark.parametrize(
    ("name", "package", "remedy"),
    [
        ("xformers", "xformers", r"fastsd\[xformers\]"),
        ("flash3", "flash_attn_interface", "install FlashAttention 3"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=remedy):
        attention(*draw((1, 1, 4, 4, 8)), implementation=name)
    with pytest.raises(MissingDependency, match=remedy):
        dispatch.require("attention", name, torch.device("cuda"))


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("more", (False, True))
def test_flash_attention_3_gets_its_own_layout(
    monkeypatch: pytest.MonkeyPatch, causal: bool, more: bool
) -> None:
    """It takes (B, N, M, K), and some versions return what backward needs as well."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Any:
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        out = reference.attention(*heads_first, causal=causal).transpose(1, 2)
        return (out, out.sum(-1)) if more else out

    package = ModuleType("flash_attn_interface")
    vars(package).update(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    q, k, v = draw((2, 3, 16, 16, 8))
    out = attention(q, k, v, causal=causal, implementation="flash3")
    torch.testing.assert_close(out, attention(q, k, v, causal=causal))


@pytest.mark.parametrize("causal", (False, True))
def test_xformers_gets_its_own_layout(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """xformers takes (B, N, M, K); it needs a GPU, so a stand-in of its interface runs here."""

    class LowerTriangularMask:
        pass

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
        assert (attn_bias is None) or isinstance(attn_bias, LowerTriangularMask)
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        return reference.attention(*heads_first, causal=attn_bias is not None).transpose(1, 2)

    ops = ModuleType("xformers.ops")
    vars(ops).update(
        LowerTriangularMask=LowerTriangularMask,
        memory_efficient_attention=memory_efficient_attention,
    )
    package = ModuleType("xformers")
    vars(package).update(ops=ops)
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v = draw((2, 3, 16, 16, 8))
    out = attention(q, k, v, causal=causal, implementation="xformers")
    torch.testing.assert_close(out, attention(q, k, v, causal=causal))
