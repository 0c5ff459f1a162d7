"""Solvers without an oracle: straight lines, orders of convergence, the variance noise adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.config import PREDICTIONS, ScheduleConfig
from fastsd.samplers import SAMPLERS, build_table, solvers
from fastsd.samplers.schedule import exploding, preserving
from fastsd.samplers.table import Array, Plan, Row, StepTable, assemble
from tests.samplers.oracle import foreign_run, foreign_scheduler, run

DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
SPACINGS = ("leading", "trailing", "linspace")
APART_STEPS = 30  # does not divide the training steps


def apart(sampler: str, spacing: str, prediction: str, steps: int, start: int = 0) -> bool:
    """Say whether rows do not meet.

    The stride of DDIM and PNDM is fixed at train_steps // steps; linspace timesteps are further
    apart, and so are trailing ones unless steps divides train_steps. PNDM averages v, which is not
    constant on a line; and a later start cuts its timesteps without regard to the repeated one.
    """
    if sampler == "pndm" and (prediction == "v" or start > 0):
        return True
    strided = sampler in ("ddim", "pndm")
    return strided and (spacing == "linspace" or (spacing == "trailing" and 1000 % steps > 0))


def line_gaps(table: StepTable, prediction: str) -> Array:
    """Return how far x is from alpha * x0 + sigma * eps before each row and at the end.

    The model always answers the exact eps, or the v or x0 that say the same at this level;
    distances are in the model's own scale, where x has unit variance.
    """
    x0, eps = np.array(0.7), np.array(-1.3)
    scale = 1 / np.hypot(*table.levels.T)
    alpha, sigma = table.levels.T * scale
    state = np.zeros(1 + table.slots)
    state[0] = table.levels[0] @ [x0, eps]
    gaps = []
    for r in range(table.rows):
        gaps.append(abs(scale[r] * state[0] - (alpha[r] * x0 + sigma[r] * eps)))
        m = {"eps": eps, "v": alpha[r] * eps - sigma[r] * x0, "x0": x0}[prediction]
        D = table.clean[r] @ [state[0], m]
        state = table.A[r] @ state + table.b[r] * D
    gaps.append(abs(scale[-1] * state[0] - (alpha[-1] * x0 + sigma[-1] * eps)))
    return np.array(gaps)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 30, 50])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_a_straight_line_stays_straight(
    sampler: str, spacing: str, prediction: str, steps: int
) -> None:
    spaced = "sigma_spacing" in SAMPLERS[sampler].accepts
    for sigma_spacing in ("schedule", "karras", "exponential")[: 3 if spaced else 1]:
        for start in {0, min(1, steps - 1), steps // 3}:
            if apart(sampler, spacing, prediction, steps, start):
                continue
            schedule = ScheduleConfig(
                spacing=spacing, sigma_spacing=sigma_spacing, prediction=prediction
            )
            table = build_table(schedule, steps, sampler=sampler, start=start)
            assert line_gaps(table, prediction).max() <= 1e-12


@pytest.mark.parametrize(
    ("sampler", "start", "spacing", "prediction"),
    [
        (sampler, start, spacing, prediction)
        for sampler, start in (("ddim", 0), ("pndm", 0), ("pndm", 7))
        for spacing in SPACINGS
        for prediction in ("eps", "v")
        if apart(sampler, spacing, prediction, APART_STEPS, start)
    ],
)
def test_where_rows_do_not_meet_diffusers_has_the_same_gap(
    sampler: str, start: int, spacing: str, prediction: str
) -> None:
    schedule = ScheduleConfig(spacing=spacing, prediction=prediction)
    table = build_table(schedule, APART_STEPS, sampler=sampler, start=start)
    levels = {float(t): level for t, level in zip(table.timesteps, table.levels, strict=False)}
    x0, eps = 0.7, -1.3

    def model(x: Array, t: float) -> Array:
        alpha, sigma = levels[t]
        return np.full_like(x, eps if prediction == "eps" else alpha * eps - sigma * x0)

    scheduler = foreign_scheduler(schedule, sampler)
    scheduler.set_timesteps(APART_STEPS)
    x = np.full((1, 1, 1, 1), table.levels[0] @ [x0, eps])
    theirs, _ = foreign_run(scheduler, model, x, torch.Generator(), start=start)
    end = table.levels[-1] @ [x0, eps]
    gap = abs(run(table, model, x) - end).item()
    assert gap == pytest.approx(abs(theirs - end).item(), abs=1e-5)
    assert gap == pytest.approx(line_gaps(table, prediction)[-1], abs=1e-12)
    assert gap > 1e-3


# Gaussian data has a closed denoiser and a closed solution of the probability-flow ODE.
MEAN, WIDTH = 0.3, 0.5


def exact(x: float, sigma: float, sigma_: float) -> float:
    """Carry x = x0 + sigma * eps along the ODE from sigma to sigma_."""
    return float(MEAN + (x - MEAN) * np.sqrt((WIDTH**2 + sigma_**2) / (WIDTH**2 + sigma**2)))


def gaussian(x: Array, sigma: float) -> Array:
    """Return eps; the timestep of the plans below is sigma itself."""
    x = x * np.hypot(1, sigma)
    x0 = MEAN + WIDTH**2 / (WIDTH**2 + sigma**2) * (x - MEAN)
    return np.asarray((x - x0) / sigma)


def error(solve: Callable[[Plan], Iterator[Row]], at: Array, sigma: Array, order: int) -> float:
    """Return how far the solver ends from the exact solution on these levels."""
    n = len(sigma) - 1
    plan = Plan.through(sigma, at)
    if solve is solvers.pndm:
        plan = plan.take([0, 1, *range(1, n)])
    orders = [min(order, i + 1) for i in range(n)]
    if solve is solvers.dpmpp_2s:
        orders = [1, 2] * (n // 2)
    table = assemble(
        replace(plan, orders=tuple(orders)), solve(replace(plan, orders=tuple(orders)))
    )
    x = float(2 * sigma[0])
    end = run(table, gaussian, np.array([x * at[0, 0]])).item() / at[-1, 0]
    return abs(float(end) - exact(x, sigma[0], sigma[-1]))


def geometric(n: int) -> Array:
    return np.geomspace(5, 0.4, n + 1)


def even(n: int) -> Array:
    """Even in sigma, as PLMS, whose weights are those of even steps, wants it."""
    return np.linspace(5, 0.4, n + 1)


@pytest.mark.parametrize(
    ("sampler", "grid", "order", "expected"),
    [
        ("ddim", geometric, 1, (1.0, 1.0)),
        ("euler", geometric, 1, (1.0, 1.0)),
        ("heun", geometric, 2, (2.0, 2.0)),
        ("lms", geometric, 4, (2.0, 4.0)),
        ("pndm", even, 4, (3.0, 4.0)),
        ("dpmpp_2m", geometric, 2, (2.0, 2.0)),
        ("dpmpp_2s", geometric, 2, (2.0, 2.0)),
        ("unipc", geometric, 1, (2.0, 2.0)),
        ("unipc", geometric, 2, (3.0, 3.0)),
        ("unipc", geometric, 3, (3.0, 4.0)),
    ],
)
def test_order_of_convergence(
    sampler: str, grid: Callable[[int], Array], order: int, expected: tuple[float, float]
) -> None:
    levels = exploding if sampler in ("euler", "heun", "lms") else preserving
    steps = np.array([32, 48, 64, 96, 128, 192, 256])
    errors = [error(SAMPLERS[sampler].solve, levels(grid(n)), grid(n), order) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert expected[0] - 0.2 <= slope <= expected[1] + 0.2, slope


@settings(max_examples=60, deadline=None)
@given(
    sampler=st.sampled_from(sorted(SAMPLERS)),
    spacing=st.sampled_from(SPACINGS),
    sigma_spacing=st.sampled_from(["schedule", "karras", "exponential"]),
    steps=st.integers(1, 50),
    skipped=st.floats(0, 1, exclude_max=True),
    zero_snr=st.booleans(),
)
def test_every_table_is_sound(
    sampler: str, spacing: str, sigma_spacing: str, steps: int, skipped: float, zero_snr: bool
) -> None:
    schedule = ScheduleConfig(
        spacing=spacing, sigma_spacing=sigma_spacing, prediction="v", zero_terminal_snr=zero_snr
    )
    start = int(skipped * steps)
    table = build_table(schedule, steps, sampler=sampler, start=start)
    assert table.steps[0] == 0 and table.steps[-1] == steps - start - 1
    assert set(np.diff(table.steps)) <= {0, 1}
    assert (np.diff(table.timesteps) <= 0).all()
    noise = np.arctan2(*table.levels.T[::-1])
    assert (np.diff(noise) <= 1e-12).all()
    np.testing.assert_allclose(1 / table.c_in, np.hypot(*table.levels[:-1].T), rtol=1e-12)
    assert SAMPLERS[sampler].stochastic or not table.draws.any()
    assert not table.c[~table.draws].any()
    assert not any(getattr(table, name).flags.writeable for name in ("A", "b", "c", "levels"))


@settings(max_examples=40, deadline=None)
@given(
    sampler=st.sampled_from(["ddim", *(name for name in SAMPLERS if SAMPLERS[name].stochastic)]),
    eta=st.floats(0, 1),
    steps=st.integers(1, 50),
    zero_snr=st.booleans(),
)
def test_noise_restores_the_variance_of_the_next_level(
    sampler: str, eta: float, steps: int, zero_snr: bool
) -> None:
    """With the right x0, a row turns (alpha, sigma) into the next level's, fresh noise included."""
    schedule = ScheduleConfig(prediction="v", zero_terminal_snr=zero_snr)
    table = build_table(schedule, steps, sampler=sampler, eta=eta)
    keep, fresh = table.A[:, 0, 0], table.c[:, 0]
    clean = table.b[:, 0] + table.A[:, 0, 1:].sum(axis=1)  # the slots of 2M SDE hold D
    alpha, sigma = table.levels[:-1].T
    alpha_, sigma_ = table.levels[1:].T
    skip = 1e-5  # LCM keeps this much of x
    np.testing.assert_allclose(keep * alpha + clean, alpha_, rtol=1e-9, atol=skip)
    np.testing.assert_allclose(np.hypot(keep * sigma, fresh), sigma_, rtol=1e-9, atol=skip)
