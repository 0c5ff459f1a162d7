"""Our C++ kernels, compiled here and held to the formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastsd.errors import ArtifactError, MissingDependency, UsageError
from fastsd.kernels import native, reference
from fastsd.kernels.attention import attention
from tests.distances import relative_l2
from tests.kernels.test_attention import draw

pytestmark = pytest.mark.skipif(
    native.obstacle() is not None, reason=f"our CPU kernels cannot run here: {native.obstacle()}"
)

# (B, M, Nq, N, K): whole and broken tiles of 64 queries, blocks of 96 keys, groups of 4 and 6
SHAPES = (
    (2, 8, 256, 256, 160),
    (1, 2, 1024, 1024, 40),
    (2, 4, 256, 77, 80),
    (1, 2, 257, 1021, 64),
    (2, 3, 65, 97, 8),
    (1, 1, 1, 1, 40),
)


@pytest.fixture(scope="module", autouse=True)
def _kernels(cpu_kernels: bool) -> None:
    """All need them."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_equals_the_formula(shape: tuple[int, ...]) -> None:
    q, k, v = draw(shape)
    out = attention(q, k, v, implementation="avx512")
    assert relative_l2(out, reference.attention(q, k, v)) <= 2e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_stays_near_the_formula(shape: tuple[int, ...]) -> None:
    """Values around 1, for a norm that is not all noise; keys around 3, which must not matter."""
    q, k, v = draw(shape)
    k, v = k + 3, v + 1
    out = attention(q, k, v, implementation="vnni")
    assert relative_l2(out, reference.attention(q, k, v)) <= 0.012


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_takes_bf16_and_returns_it(shape: tuple[int, ...]) -> None:
    halves = [x.bfloat16() for x in draw(shape)]
    out = attention(*halves, implementation="vnni")
    assert out.dtype == torch.bfloat16
    exact = attention(*(x.float() for x in halves), implementation="vnni")
    assert torch.equal(out, exact.bfloat16())


def test_int8_keeps_what_many_weak_keys_sum_to() -> None:
    """One key 400 times as strong as 1023 others, which hold 72 % of the weight together."""
    q = torch.ones(1, 1, 64, 8)
    k = torch.zeros(1, 1, 1024, 8)
    k[0, 0, 500] = 6 / 8**0.5  # exp(6) = 403
    v = torch.ones(1, 1, 1024, 8)
    v[0, 0, 500] = -1
    truth = reference.attention(q, k, v)
    assert relative_l2(attention(q, k, v, implementation="vnni"), truth) <= 0.05


def test_large_scores_do_not_overflow() -> None:
    q, k, v = draw((1, 2, 64, 300, 40))
    out = attention(q * 100, k * 100, v, implementation="avx512")
    assert relative_l2(out, reference.attention(q * 100, k * 100, v)) <= 1e-4
    out = attention(q * 100, k * 100, v, implementation="vnni")
    assert torch.isfinite(out).all() and out.abs().max() <= 1.01 * v.abs().max()


def test_many_threads_give_the_same_bits() -> None:
    q, k, v = draw((2, 4, 300, 300, 40))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = attention(q, k, v, implementation="vnni")
        torch.set_num_threads(3)
        assert torch.equal(attention(q, k, v, implementation="vnni"), once)
    finally:
        torch.set_num_threads(threads)


def test_it_is_traced_with_its_true_strides() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(q, k, v, implementation="vnni").transpose(1, 2).flatten(2)

    q, k, v = draw((2, 4, 64, 33, 40))
    traced = torch.export.export(Attend(), (q, k, v)).module()
    assert torch.equal(traced(q, k, v), Attend()(q, k, v))


# (B, C, H, W): one and more pixels, fewer pixels than threads, widths of whole and broken eights
MAPS = ((1, 32, 1, 1), (2, 48, 9, 7), (1, 320, 16, 16), (3, 128, 65, 3))


@pytest.mark.parametrize("silu", (False, True))
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_group_norm_equals_the_formula(shape: tuple[int, ...], silu: bool) -> None:
    """A mean far from zero must cost no digits."""
    torch.manual_seed(0)
    x = torch.randn(shape) * 2 + 1000
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    truth = F.group_norm(x.double(), 16, weight.double(), bias.double(), 1e-6)
    truth = F.silu(truth) if silu else truth
    out = native.group_norm(x, weight, bias, 16, 1e-6, silu=silu)
    assert out.is_contiguous(memory_format=torch.channels_last)
    # x * scale + offset, both some 500 times the result, in fp32
    assert relative_l2(out, truth) <= 5e-4
    near = x - 1000
    truth = F.group_norm(near.double(), 16, weight.double(), bias.double(), 1e-6)
    truth = F.silu(truth) if silu else truth
    assert relative_l2(native.group_norm(near, weight, bias, 16, 1e-6, silu=silu), truth) <= 1e-6


def test_group_norm_rounds_as_its_reader_would() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 10, 9).to(memory_format=torch.channels_last) * 3
    weight, bias = torch.rand(64) + 0.5, torch.randn(64)
    multiplier = torch.rand(64) * 30 + 30
    exact = native.group_norm(x, weight, bias, 8, 1e-5, silu=True)
    half = native.group_norm(x, weight, bias, 8, 1e-5, silu=True, dtype=torch.bfloat16)
    assert torch.equal(half, exact.bfloat16())
    rounded = native.group_norm(
        x, weight, bias, 8, 1e-5, silu=True, dtype=torch.uint8, multiplier=multiplier, zero=5
    )
    truth = ((exact * multiplier.view(-1, 1, 1)).round() + 5).clamp(0, 255)
    assert (rounded.float() - truth).abs().max() <= 1
    assert (rounded != truth).double().mean() < 2e-3, "only at ties, for a coarser exponential"
    assert {0, 255} <= set(rounded.unique().tolist()), "both ends must be reached"


@pytest.mark.parametrize("rows", (0, 1, 2))
@pytest.mark.parametrize("half", (False, True))
def test_group_norm_adds_what_a_resnet_does_and_reads_bf16(rows: int, half: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 48, 9, 7) + 20
    x = x.bfloat16() if half else x
    weight, bias, added = torch.rand(48) + 0.5, torch.randn(48), 3 * torch.randn(rows, 48)
    whole = x.double() + (added.double()[:, :, None, None] if rows else 0)
    truth = F.silu(F.group_norm(whole, 16, weight.double(), bias.double(), 1e-5))
    out = native.group_norm(x, weight, bias, 16, 1e-5, silu=True, added=added if rows else None)
    assert out.dtype == torch.float32
    assert relative_l2(out, truth) <= 1e-5


def test_group_norm_keeps_what_is_not_finite_in_sight() -> None:
    x = torch.randn(1, 16, 4, 4)
    x[0, 3, 1, 1] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        out = native.group_norm(x, torch.ones(16), torch.ones(16), 1, 1e-5, silu=True, dtype=dtype)
        assert out.isnan().all()


def test_what_group_norm_cannot_take_is_refused() -> None:
    ones = torch.ones(24)
    with pytest.raises(RuntimeError, match="multiple of 16"):
        native.group_norm(torch.ones(1, 24, 2, 2), ones, ones, 4, 1e-5, silu=False)
    with pytest.raises(RuntimeError, match="uint8 needs one"):
        native.group_norm(
            torch.ones(1, 16, 2, 2), ones[:16], ones[:16], 4, 1e-5, silu=False, dtype=torch.uint8
        )


def test_what_is_added_must_fit() -> None:
    x, ones = torch.ones(2, 16, 2, 2), torch.ones(16)
    for added in (torch.ones(3, 16), torch.ones(16), torch.ones(2, 16).double()):
        with pytest.raises(RuntimeError, match="B or 1, C"):
            native.group_norm(x, ones, ones, 4, 1e-5, silu=False, added=added)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = draw((1, 2, 64, 64, 40))
    with pytest.raises(UsageError, match="no causal form"):
        attention(q, k, v, causal=True, implementation="avx512")
    with pytest.raises(RuntimeError, match="multiple of 4"):
        attention(q[..., :6], k[..., :6], v[..., :6], implementation="avx512")
    with pytest.raises(RuntimeError, match="fp32"):
        attention(q.double(), k.double(), v.double(), implementation="avx512")
    with pytest.raises(RuntimeError, match="fp32"):
        attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), implementation="avx512")
    with pytest.raises(RuntimeError, match="fp32"):
        attention(q.bfloat16(), k, v, implementation="vnni")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingDependency, match="apt install g\\+\\+"):
        native.build(tmp_path / "kernels.so")
    monkeypatch.setenv("CXX", "ccache g++")
    with pytest.raises(MissingDependency, match="'ccache g\\+\\+', names no program"):
        native.build(tmp_path / "kernels.so")


def test_a_process_runs_one_library(cpu_kernels: bool, tmp_path: Path) -> None:
    if not cpu_kernels:
        pytest.skip(f"this CPU runs none: {native.obstacle()}")
    library = tmp_path / "kernels.so"
    native.build(library)
    native.load(library)  # the same bytes: nothing is defined again
    library.write_bytes(library.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="other kernels"):
        native.load(library)
