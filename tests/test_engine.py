"""The loop: a table run over static buffers equals the formula; captures replay the same
buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsd.config import ScheduleConfig
from fastsd.engine import (
    Denoiser,
    Known,
    Predict,
    Run,
    SamplingLoop,
    check_finite,
    explained_memory_errors,
)
from fastsd.errors import NumericsError, OutOfMemory
from fastsd.samplers import SAMPLERS, StepTable, build_table

SCHEDULE = ScheduleConfig()
SHAPE = (3, 4, 5, 7)


def answer(x: Tensor, row: Tensor, _: tuple[Tensor, ...] = ()) -> Tensor:
    """A smooth, elementwise stand-in for the UNet; a row's entry is its index."""
    return torch.tanh(0.7 * x + 0.1) + 0.05 * row.to(x.dtype)


def numpy_loop(
    table: StepTable, x: np.ndarray, noises: list[np.ndarray], known: Known | None = None
) -> np.ndarray:
    """The contract's formula, word for word, in float64."""
    state = np.zeros((1 + table.slots, *x.shape))
    state[0] = x
    draws = iter(noises)
    for r in range(table.rows):
        noise = next(draws) if table.draws[r] else np.zeros_like(x)
        output = np.tanh(0.7 * table.c_in[r] * state[0] + 0.1) + 0.05 * r
        D = table.clean[r, 0] * state[0] + table.clean[r, 1] * output
        state = (
            np.einsum("ij,j...->i...", table.A[r], state)
            + np.einsum("i,...->i...", table.b[r], D)
            + np.einsum("i,...->i...", table.c[r], noise)
        )
        if known is not None:
            alpha, sigma = table.levels[r + 1] if r + 1 < table.rows else (1, 0)
            kept = (alpha * known.latents + sigma * known.noise).double().numpy()
            mask = known.mask.double().numpy()
            state[0] = (1 - mask) * kept + mask * state[0]
    result: np.ndarray = state[0]
    return result


def draw(generator: torch.Generator) -> Callable[[], Tensor]:
    return lambda: torch.randn(SHAPE, generator=generator)


def loop_of(
    table: StepTable,
    x: Tensor,
    predict: Predict = answer,
    *,
    slots: int | None = None,
    rows: int | None = None,
    capture: Callable[[Callable[[], None]], Callable[[], None]] = lambda step: step,
    **given: Any,
) -> SamplingLoop:
    """Load a loop with a run from x; slots, rows: the room it has, the table's own by default."""
    denoiser = Denoiser(predict, torch.arange(table.rows, dtype=torch.float32))
    given = dict(guidance=None) | given
    run = Run(table=table, denoiser=denoiser, latents=x, **given)
    loop = SamplingLoop(run, slots=slots or table.slots, rows=rows or table.rows)
    loop.load(run)
    loop.capture(capture)
    loop.load(run)
    return loop


def run(table: StepTable, x: Tensor, **options: Any) -> Tensor:
    loop = loop_of(table, x, **options)
    return loop.run(draw(torch.Generator().manual_seed(1)), lambda row: True)[0]


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_loop_is_the_formula(sampler: str) -> None:
    table = build_table(SCHEDULE, 7, sampler=sampler)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * table.init_scale
    generator = torch.Generator().manual_seed(1)
    noises = [draw(generator)().double().numpy() for _ in range(int(table.draws.sum()))]
    expected = numpy_loop(table, x.double().numpy(), noises)
    result = run(table, x).double().numpy()
    assert np.linalg.norm(result - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_known_picture_is_laid_over_every_row(sampler: str) -> None:
    table = build_table(SCHEDULE, 9, sampler=sampler, start=3)
    x, picture, noise = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(SHAPE[0], 1, *SHAPE[2:])
    mask[0, :, 1:3, 2:6], mask[1, :, :, :3], mask[2] = 1, 0.5, 1
    known = Known(picture, noise, mask)
    generator = torch.Generator().manual_seed(1)
    noises = [draw(generator)().double().numpy() for _ in range(int(table.draws.sum()))]
    expected = numpy_loop(table, x.double().numpy(), noises, known)
    result = run(table, x, known=known)
    assert np.linalg.norm(result.double().numpy() - expected) <= 1e-5 * np.linalg.norm(expected)
    kept = (mask == 0).expand(SHAPE)
    assert torch.equal(result[kept], picture[kept]), "what is known comes out as it went in"
    torch.testing.assert_close(result[2], run(table, x)[2], rtol=0, atol=0)


def test_capture_replays_the_same_buffers() -> None:
    """As a CUDA graph would: one captured step, replayed a row at a time, nothing reallocated."""
    captured: list[Callable[[], None]] = []
    replays = 0

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        captured.append(step)

        def replay() -> None:
            nonlocal replays
            replays += 1
            step()

        return replay

    table = build_table(SCHEDULE, 9, sampler="dpmpp_2m")
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    loop = loop_of(table, x, capture=capture)
    before = loop.latents.data_ptr()
    (result,) = loop.run(draw(torch.Generator()), lambda row: True)
    assert len(captured) == 1 and replays == table.rows
    assert result.data_ptr() == before
    assert torch.equal(result, run(table, x))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_room_to_spare_changes_no_bit(sampler: str) -> None:
    """A loop with room for every sampler, used before by another one, runs as one made to fit."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    loop = loop_of(build_table(SCHEDULE, 11, sampler="pndm"), 5 * x, slots=4, rows=32)
    loop.run(lambda: 3 * x, lambda row: True)
    table = build_table(SCHEDULE, 7, sampler=sampler)
    denoiser = Denoiser(answer, torch.arange(table.rows, dtype=torch.float32))
    loop.load(Run(table=table, denoiser=denoiser, latents=x, guidance=None))
    (result,) = loop.run(draw(torch.Generator().manual_seed(1)), lambda row: True)
    assert torch.equal(result, run(table, x))


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m", "pndm"])
def test_an_element_does_not_depend_on_its_batch(sampler: str) -> None:
    table = build_table(SCHEDULE, 6, sampler=sampler)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

    def sample(rows: slice) -> Tensor:
        return loop_of(table, x[rows]).run(lambda: noise[rows], lambda row: True)[0]

    together = sample(slice(0, 3))
    for i in range(3):
        assert torch.equal(sample(slice(i, i + 1))[0], together[i])


def test_guidance_is_the_weighted_difference() -> None:
    table = build_table(SCHEDULE, 4, sampler="euler")
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

    def twice(x: Tensor, row: Tensor, _: Any) -> Tensor:
        return torch.cat([0.5 * answer(x, row), answer(x, row)])

    def once(x: Tensor, row: Tensor, _: Any) -> Tensor:
        return 0.5 * answer(x, row) + 3.0 * (answer(x, row) - 0.5 * answer(x, row))

    guided = loop_of(table, x, twice, guidance=3.0).run(lambda: x, lambda row: True)
    plain = loop_of(table, x, once).run(lambda: x, lambda row: True)
    torch.testing.assert_close(guided, plain, rtol=1e-6, atol=1e-6)


def test_rescaled_guidance_has_the_conditional_spread() -> None:
    """At 1 the spread is the conditional one's, at 0.7 the mean of both pictures in that ratio."""
    table = build_table(SCHEDULE, 1, sampler="euler")
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

    def twice(x: Tensor, row: Tensor, _: Any) -> Tensor:
        return torch.cat([torch.cos(3 * x), answer(x, row)])

    def drawn(batch: slice, rescale: float) -> Tensor:
        """Return the prediction: one step of Euler is x - sigma * prediction."""
        loop = loop_of(table, x[batch], twice, guidance=9.0, rescale=rescale)
        return (x[batch] - loop.run(lambda: x, lambda row: True)[0]) / float(table.levels[0, 1])

    batch = slice(0, len(x))
    plain, full, most = drawn(batch, 0.0), drawn(batch, 1.0), drawn(batch, 0.7)
    conditional = answer(table.c_in[0] * x, torch.zeros(1))
    spread = conditional.std(dim=(1, 2, 3))
    assert (plain.std(dim=(1, 2, 3)) > 2 * spread).all()
    torch.testing.assert_close(full.std(dim=(1, 2, 3)), spread, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(most, 0.7 * full + 0.3 * plain, rtol=1e-4, atol=1e-4)
    for i in range(len(x)):
        assert torch.equal(drawn(slice(i, i + 1), 0.7)[0], most[i])


def test_a_run_ends_where_it_is_told_to() -> None:
    table = build_table(SCHEDULE, 8, sampler="euler")
    rows: list[int] = []

    def on_row(row: int) -> bool:
        rows.append(row)
        return row < 2

    loop_of(table, torch.zeros(SHAPE)).run(lambda: torch.zeros(1), on_row)
    assert rows == [0, 1, 2]


def test_nan_is_an_error_not_a_picture() -> None:
    table = build_table(SCHEDULE, 3, sampler="euler")
    loop = loop_of(table, torch.ones(SHAPE), lambda x, row, _: x * float("nan"))
    (latents,) = loop.run(lambda: torch.zeros(1), lambda row: True)
    with pytest.raises(NumericsError, match="latents.*fp32"):
        check_finite(latents, "the latents")


def test_memory_errors_are_explained() -> None:
    with pytest.raises(OutOfMemory, match="smaller size"), explained_memory_errors("a picture"):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="mat1"), explained_memory_errors("a picture"):
        torch.ones(2, 3) @ torch.ones(2, 3)
