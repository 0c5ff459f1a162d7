"""The solvers: each walks a Plan and yields one Row an evaluation, in the letters of its paper.

x, the slots, D (the model's estimate of x0) and noise are forms (see table.symbols), so these
functions compute coefficients, not pictures. (a, s) is the level a step leaves, (a_, s_) the one it
reaches, h the step in lambda = log(a / s). Branches here are decided once, on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from fastsd.config import ScheduleConfig
from fastsd.samplers.table import Array, Plan, Row, clean, symbols

Level = Array | tuple[float, float]


def ddim(plan: Plan) -> Iterator[Row]:
    """DDIM: Song et al. 2020, arXiv:2010.02502, eq. 12. Order 1, one evaluation a step.

    eta from 0 (deterministic) to 1 (as noisy as DDPM).
    """
    x, D, noise = symbols(0)
    for i, ((a, s), (a_, s_)) in enumerate(zip(plan.at[:-1], plan.to, strict=True)):
        std = plan.eta * s_ / s * np.sqrt(1 - (a / a_) ** 2)
        eps = (x - a * D) / s
        yield Row(i, a_ * D + np.sqrt(s_**2 - std**2) * eps + std * noise, draws=plan.eta > 0)


def ddpm(plan: Plan) -> Iterator[Row]:
    """DDPM, the posterior with "fixed small" variance: Ho et al. 2020, arXiv:2006.11239, eq. 7.

    Order 1, one evaluation a step, stochastic.
    """
    x, D, noise = symbols(0)
    for i, ((a, s), (a_, s_)) in enumerate(pairwise(plan.at)):
        alpha = (a / a_) ** 2
        beta = 1 - alpha
        mean = a_ * beta / s**2 * D + np.sqrt(alpha) * (s_ / s) ** 2 * x
        yield Row(i, mean + s_ / s * np.sqrt(beta) * noise, draws=bool(plan.t[i] > 0))


def pndm(plan: Plan) -> Iterator[Row]:
    """PLMS, PNDM without Runge-Kutta steps: Liu et al. 2022, arXiv:2202.09778, eq. 9 and 12.

    Order up to 4, one evaluation a step, and one more: the first step is made again with the mean
    of its slopes at both ends. The history holds the model's own outputs m, be they eps or v.
    """
    x, m1, m2, m3, D, _ = symbols(3)
    anchor = m3  # the first x, kept for one row where the history is still empty
    for r, ((a, s), to) in enumerate(zip(plan.at[:-1], plan.to, strict=True)):
        p, q = clean(a, s, plan.prediction)
        m = (D - p * x) / q
        if r == 0:
            yield Row(0, _transfer(plan, x, m, (a, s), to), (m, 0 * m, x), step=0)
        elif r == 1:
            mean = (m + m1) / 2
            again = _transfer(plan, anchor, mean, plan.back[1], (a, s))
            yield Row(1, again, (m1, 0 * m, 0 * m), step=0)
        else:
            mean = (
                (3 * m - m1) / 2,
                (23 * m - 16 * m1 + 5 * m2) / 12,
                (55 * m - 59 * m1 + 37 * m2 - 9 * m3) / 24,
            )[min(r - 2, 2)]
            yield Row(r, _transfer(plan, x, mean, (a, s), to), (m, m1, m2), step=r - 1)


def _transfer(plan: Plan, x: Array, m: Array, level: Level, to: Level) -> Array:
    """Carry x from one level to another along the slope m: eq. 11, which is DDIM's step."""
    (a, s), (a_, s_) = level, to
    p, q = clean(a, s, plan.prediction)
    D = p * x + q * m
    return np.asarray(a_ * D + s_ * (x - a * D) / s)


def euler(plan: Plan) -> Iterator[Row]:
    """Euler: Karras et al. 2022, arXiv:2206.00364, algorithm 1 without its correction.

    Order 1, one evaluation a step.
    """
    x, D, _ = symbols(0)
    for i, (s, s_) in enumerate(pairwise(plan.sigma)):
        d = (x - D) / s
        yield Row(i, x + (s_ - s) * d)


def dpmpp_2m(plan: Plan) -> Iterator[Row]:
    """DPM-Solver++(2M): Lu et al. 2022, arXiv:2211.01095, algorithm 2.

    Order 2, one evaluation a step.
    """
    x, old, D, _ = symbols(1)
    h = np.diff(plan.lam)
    for i, ((_, s), (a_, s_)) in enumerate(pairwise(plan.at)):
        mean = D if plan.orders[i] == 1 else D + h[i] / h[i - 1] / 2 * (D - old)
        yield Row(i, s_ / s * x - a_ * np.expm1(-h[i]) * mean, (D,))


def dpmpp_orders(schedule: ScheduleConfig, n: int, order: int) -> list[int]:
    """Return the order of each step of DPM-Solver++(2M): a short run ends on order 1."""
    return [1 if i == n - 1 and schedule.lower_order_final and n < 15 else order for i in range(n)]
