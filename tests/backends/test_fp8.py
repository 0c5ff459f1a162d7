"""A UNet's layers in fp8, on the CPU, whose fp8 products are the formula's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fastsd import Pipeline
from fastsd.backends import fp8
from fastsd.backends.eager import EagerBackend
from fastsd.backends.for_gpu import JoinedUNet
from fastsd.backends.fp8 import put_in_fp8_
from fastsd.errors import UsageError
from fastsd.kernels import dispatch, geglu
from fastsd.models.layers import Resnet, TransformerBlock
from fastsd.models.unet import UNet
from fastsd.quant.linear import Fp8Conv3x3, Fp8Linear
from tests.backends.test_for_gpu import conditions
from tests.distances import relative_l2
from tests.fp8_pictures import judge_fp8
from tests.models.test_unet import FAMILIES

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_unet_in_fp8_is_near_itself(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    unet = UNet(FAMILIES["sd1"]).to(dtype)
    text, _ = conditions(unet)
    joined = JoinedUNet(copy.deepcopy(unet), CPU)
    times, x = torch.tensor([900.0, 3.5]), torch.randn(2, unet.config.in_channels, 16, 8).to(dtype)
    row, kv = joined.time_rows(times)[1], joined.context(text.to(dtype))
    expected = joined(x, row, kv)
    count = put_in_fp8_(joined.unet, None, lambda: joined(x, row, kv))
    blocks = [m for m in joined.modules() if isinstance(m, TransformerBlock)]
    all_, last = (
        sum(isinstance(m, Resnet) for m in of.modules())
        for of in (joined, joined.unet.up_blocks[-1])
    )
    convolutions = 2 * (all_ - last)  # the last level's stay
    products = 5 * len(blocks)
    assert products == sum(isinstance(m, Fp8Linear) for m in joined.modules())
    assert convolutions == sum(isinstance(m, Fp8Conv3x3) for m in joined.modules())
    assert (count["linear layers"], count["convolutions"]) == (products, convolutions)
    assert count["group_norm"] >= convolutions and count["attention"] == len(blocks)
    got = joined(x, row, kv)
    assert got.dtype == dtype
    assert 1e-4 < relative_l2(got.float(), expected.float()) < 0.1
    # what is larger than was seen fits too
    assert relative_l2(joined(3 * x, row, kv).float(), unet_of(unet, 3 * x, times, text)) < 0.1


def unet_of(unet: UNet, x: torch.Tensor, times: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = unet(x, unet.time_rows(times)[1], unet.context(text.to(x.dtype)))
    return out.float()


@pytest.mark.parametrize("fault", [None, "Failed to find C compiler"])
def test_a_kernel_rounds_only_where_it_runs(
    fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = geglu.geglu

    def stand_in(x: torch.Tensor, *, implementation: str, **how: Any) -> torch.Tensor:
        if implementation == "triton" and fault:
            raise RuntimeError(fault)
        return real(x, **how)

    monkeypatch.setattr(dispatch, "able", lambda op, device: ["library", "triton"])
    monkeypatch.setattr(geglu, "geglu", stand_in)
    fp8._runs.cache_clear()
    assert fp8._runs("geglu", CPU) is (fault is None)
    fp8._runs.cache_clear()


@pytest.mark.slow
def test_the_builtin_model_keeps_its_pictures() -> None:
    """What rounding costs, a CPU shows, with the rest in fp32: `weights="fp8"` as a GPU has it."""
    exact, rounded = (Pipeline.from_pretrained("builtin", device="cpu") for _ in range(2))
    backend = rounded._backend
    assert isinstance(backend, EagerBackend)
    joined = JoinedUNet(cast(UNet, backend.modules["unet"]), CPU)
    backend._parts |= {
        "unet": joined,
        "unet_time": joined.time_rows,
        "unet_context": joined.context,
    }
    rounded._put_in_fp8()
    said = [line for line in rounded.explain() if "fp8" in line]
    assert any("of unet and decoder multiply in it" in line for line in said), said
    judge_fp8(rounded, exact)


def test_what_has_no_fp8_says_so(sd1_folder: Path) -> None:
    with pytest.raises(UsageError, match="weights='fp8' needs a GPU, not cpu"):
        Pipeline.from_pretrained(sd1_folder, weights="fp8", device="cpu")
