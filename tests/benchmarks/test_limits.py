"""The work of a picture, counted; the ceilings of this machine, and what they say of a draw."""

from __future__ import annotations

import pytest

from fastsd.benchmarks.limits import (
    Work,
    limit,
    measure_ceilings,
    picture_work,
    unet_work,
    vae_work,
)
from fastsd.config import PRESETS


@pytest.mark.parametrize(
    ("name", "size", "tera"), [("sd15", 512, 0.803), ("sd21", 768, 2.149), ("sdxl", 1024, 6.761)]
)
def test_a_unet_call_is_the_published_work(name: str, size: int, tera: float) -> None:
    assert unet_work(PRESETS[name], size).flop / 1e12 == pytest.approx(tera, abs=5e-4)


@pytest.mark.parametrize(("name", "size", "tera"), [("sd15", 512, 2.515), ("sdxl", 1024, 10.47)])
def test_a_decoder_call_is_the_published_work(name: str, size: int, tera: float) -> None:
    work = vae_work(PRESETS[name], size)
    assert work.flop / 1e12 == pytest.approx(tera, abs=5e-3)
    assert work.weights == pytest.approx(49.5e6, rel=0.01)  # the decoder's alone


def test_a_draw_is_the_sum_of_its_calls() -> None:
    guided = picture_work("builtin", 128, batch=1, evaluations=20, guided=True)
    plain = picture_work("builtin", 128, batch=2, evaluations=10, guided=False)
    assert guided["unet"].flop == 2 * plain["unet"].flop
    assert guided["unet"].weights == 2 * plain["unet"].weights
    assert 2 * guided["vae"].flop == plain["vae"].flop
    assert guided["text_encoder"] == plain["text_encoder"]


def test_the_limit_is_the_larger_of_compute_and_memory() -> None:
    ceilings = {"fp32": 1e12, "int8": 4e12, "copy": 1e10}
    computed, read = Work(flop=int(1e12), weights=1), Work(flop=1, weights=int(5e9))
    bound = limit({"a": computed, "b": read}, ceilings, "fp32")
    assert bound is not None and bound.seconds == pytest.approx(1 + 2) and bound.bound == "memory"
    quick = limit({"a": computed}, ceilings, "int8")
    assert quick is not None and (quick.seconds, quick.bound) == (0.25, "compute")
    assert limit({"a": computed}, ceilings, "fp8") is None


def test_ceilings_are_those_of_some_machine() -> None:
    ceilings = measure_ceilings("cpu")
    assert set(ceilings) == {"fp32", "bf16", "fp16", "int8", "copy"}
    assert all(1e8 < ceiling < 1e16 for ceiling in ceilings.values())
