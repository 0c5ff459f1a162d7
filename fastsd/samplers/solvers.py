"""The solvers: each walks a Plan and yields one Row an evaluation, in the letters of its paper.

x, the slots, D (the model's estimate of x0) and noise are forms (see table.symbols), so these
functions compute coefficients, not pictures. (a, s) is the level a step leaves, (a_, s_) the one it
reaches, h the step in lambda = log(a / s). Branches here are decided once, on the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from fastsd.config import ScheduleConfig
from fastsd.samplers.table import Array, Plan, Row, clean, symbols

# Gauss-Legendre nodes, of weight 1, that integrate cubics over -1..1 exactly.
GAUSS = np.array([-1, 1]) / math.sqrt(3)

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


def euler_a(plan: Plan) -> Iterator[Row]:
    """Euler ancestral: step further down than asked, then add noise back (k-diffusion).

    Order 1, one evaluation a step, stochastic.
    """
    x, D, noise = symbols(0)
    for i, (s, s_) in enumerate(pairwise(plan.sigma)):
        up = s_ / s * np.sqrt(s**2 - s_**2)
        down = s_**2 / s
        yield Row(i, x + (down - s) * (x - D) / s + up * noise, draws=True)


def heun(plan: Plan) -> Iterator[Row]:
    """Heun: Karras et al. 2022, arXiv:2206.00364, algorithm 1.

    Order 2, two evaluations a step; one for a step to sigma = 0. The slot holds what the first
    evaluation settles of the corrected step.
    """
    x, half, D, _ = symbols(1)
    for i, (s, s_) in enumerate(pairwise(plan.sigma)):
        d = (x - D) / s
        yield Row(i, x + (s_ - s) * d, (x + (s_ - s) / 2 * d,))
        if s_ > 0:
            d_ = (x - D) / s_
            yield Row(i + 1, half + (s_ - s) / 2 * d_, (0 * x,), step=i)


def lms(plan: Plan) -> Iterator[Row]:
    """LMS: Adams-Bashforth over uneven steps in sigma (k-diffusion).

    Order up to 4, one evaluation a step: the polynomial through the last slopes, integrated.
    """
    x, d1, d2, d3, D, _ = symbols(3)
    for i, (s, s_) in enumerate(pairwise(plan.sigma)):
        d = (x - D) / s
        weights = _adams_bashforth(plan.sigma[i::-1][: plan.orders[i]], s_)
        move = sum(w * slope for w, slope in zip(weights, (d, d1, d2, d3), strict=False))
        yield Row(i, x + move, (d, d1, d2))


def _adams_bashforth(known: Array, to: float) -> list[float]:
    """Integrate from known[0] to `to` each polynomial that is 1 at one of known, 0 at the rest."""
    half = (to - known[0]) / 2
    tau = known[0] + half * (1 + GAUSS)
    others = [np.delete(known, k) for k in range(len(known))]
    return [
        float(half * np.prod((tau[:, None] - rest) / (here - rest), axis=1).sum())
        for here, rest in zip(known, others, strict=True)
    ]


def lms_orders(schedule: ScheduleConfig, n: int, order: int) -> list[int]:
    """Return the order of each step: as many slopes as there are."""
    return [order] * n


def dpmpp_2m(plan: Plan) -> Iterator[Row]:
    """DPM-Solver++(2M): Lu et al. 2022, arXiv:2211.01095, algorithm 2.

    Order 2, one evaluation a step.
    """
    x, old, D, _ = symbols(1)
    h = np.diff(plan.lam)
    for i, ((_, s), (a_, s_)) in enumerate(pairwise(plan.at)):
        mean = D if plan.orders[i] == 1 else D + h[i] / h[i - 1] / 2 * (D - old)
        yield Row(i, s_ / s * x - a_ * np.expm1(-h[i]) * mean, (D,))


def dpmpp_2m_sde(plan: Plan) -> Iterator[Row]:
    """SDE-DPM-Solver++(2M): Lu et al. 2022, arXiv:2211.01095, eq. 19.

    Order 2, one evaluation a step, stochastic: the diffusion SDE where dpmpp_2m solves its ODE.
    """
    x, old, D, noise = symbols(1)
    h = np.diff(plan.lam)
    for i, ((_, s), (a_, s_)) in enumerate(pairwise(plan.at)):
        mean = D if plan.orders[i] == 1 else D + h[i] / h[i - 1] / 2 * (D - old)
        gain = -np.expm1(-2 * h[i])
        x_ = s_ / s * np.exp(-h[i]) * x + a_ * gain * mean + s_ * np.sqrt(gain) * noise
        yield Row(i, x_, (D,), draws=True)


def dpmpp_orders(schedule: ScheduleConfig, n: int, order: int) -> list[int]:
    """Return the order of each step of DPM-Solver++(2M): a short run ends on order 1."""
    short = schedule.lower_order_final and n < 15
    return [order] * (n - 1) + [1 if short else order]


def dpmpp_2s(plan: Plan) -> Iterator[Row]:
    """DPM-Solver++(2S): Lu et al. 2022, arXiv:2211.01095, algorithm 1.

    Order 2, one evaluation a step. Steps come in pairs: the first is of order 1, the second starts
    again where the first did. The slot holds what the first evaluation settles of the second step.
    """
    x, half, D, _ = symbols(1)
    lam = plan.lam
    for i, ((_, s), (a_, s_)) in enumerate(pairwise(plan.at)):
        if plan.orders[i] == 2:
            continue  # its row came with the step before
        first = s_ / s * x - a_ * np.expm1(lam[i] - lam[i + 1]) * D
        if plan.orders[i + 1 : i + 2] != (2,):
            yield Row(i, first, (0 * x,))
            continue
        a2, s2 = plan.at[i + 2]
        h = lam[i + 2] - lam[i]
        r = (lam[i + 1] - lam[i]) / h
        gain = -a2 * np.expm1(-h)
        yield Row(i, first, (s2 / s * x + gain * (1 - 1 / (2 * r)) * D,))
        yield Row(i + 1, half + gain / (2 * r) * D, (0 * x,))


def singlestep_orders(schedule: ScheduleConfig, n: int, order: int) -> list[int]:
    """Return the order of each step of DPM-Solver++(2S): 1, 2, 1, 2, .., and 1 at the end."""
    orders = ([1, order] * n)[:n]
    return orders[:-1] + [1] if schedule.lower_order_final else orders


def unipc(plan: Plan) -> Iterator[Row]:
    """UniPC, data prediction, B2(h): Zhao et al. 2023, arXiv:2302.04867, algorithms 5 and 6.

    Order p + 1 with its corrector (p is 2 or 3), one evaluation a step: it first corrects the step
    that led to it (UniC), then predicts the next (UniP). The slots hold the last p estimates D.
    """
    S = max(plan.orders)
    x, *old, D, _ = symbols(S)
    lam = plan.lam
    for i, ((a, s), (a_, s_)) in enumerate(pairwise(plan.at)):
        corrected = x
        if i > 0:
            p = plan.orders[i - 1]
            weights = _unipc_weights(lam[i - p : i][::-1], lam[i], corrector=True)
            weights[:-1] -= _unipc_weights(lam[i - p : i][::-1], lam[i])
            corrected = x - a * weights @ (np.stack([*old[1:p], D]) - old[0])
        p = plan.orders[i]
        x_ = s_ / s * corrected - a_ * np.expm1(lam[i] - lam[i + 1]) * D
        if p > 1:
            weights = _unipc_weights(lam[i - p + 1 : i + 1][::-1], lam[i + 1])
            x_ = x_ - a_ * weights @ (np.stack(old[: p - 1]) - D)
        yield Row(i, x_, (D, *old[:-1]))


def _unipc_weights(known: Array, to: float, *, corrector: bool = False) -> Array:
    """Return the weights of D(lambda) - D(known[0]), over known[1:] and, to correct, `to`: eq. 9.

    known: lambdas from the latest backwards. A single weight is 1/2 (appendix F).
    """
    h = to - known[0]
    r = np.append(known[1:] - known[0], h if corrector else []) / h
    B = phi = np.expm1(-h)
    b = []
    for k in range(1, len(r) + 1):
        phi = phi / -h - 1 / math.factorial(k)
        b.append(phi * math.factorial(k) / B)
    rho = np.linalg.solve(np.vander(r, increasing=True).T, b) if len(r) > 1 else 0.5
    return np.asarray(B * rho / r)


def unipc_orders(schedule: ScheduleConfig, n: int, order: int) -> list[int]:
    """Return the order of each step of UniPC: it falls to 1 towards the end."""
    return [min(order, n - i) if schedule.lower_order_final else order for i in range(n)]


def lcm(plan: Plan) -> Iterator[Row]:
    """LCM: Luo et al. 2023, arXiv:2310.04378, algorithm 3. One evaluation a step, stochastic.

    The consistency function c_skip * x + c_out * D jumps to the picture; noise leads back down.
    """
    x, D, noise = symbols(0)
    for i, (a_, s_) in enumerate(plan.to):
        t = plan.t[i] * 10  # timestep_scaling; sigma_data is 1/2
        c_skip, c_out = 0.25 / (t**2 + 0.25), t / np.sqrt(t**2 + 0.25)
        yield Row(i, a_ * (c_out * D + c_skip * x) + s_ * noise, draws=i < plan.n - 1)
