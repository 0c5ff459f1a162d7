"""From a schedule to the noise levels that a solver walks.

Owns the betas, the timestep spacings and the sigma spacings. A level is (alpha, sigma) of
x = alpha * x0 + sigma * eps, in the scale that the sampler keeps x in: variance exploding
(alpha = 1) for the solvers written in sigma, variance preserving (alpha^2 + sigma^2 = 1) for the
others.
Knows no solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastsd.config import ScheduleConfig
from fastsd.errors import UsageError
from fastsd.samplers.table import Array, Plan

# The signal left at the last step of a zero-terminal-SNR schedule, for solvers that divide by alpha
# (diffusers' value, the smallest that float16 holds).
TINY_ALPHA_BAR = 2.0**-24


def alpha_bars(schedule: ScheduleConfig) -> Array:
    """Return alpha_bar_t = prod (1 - beta), (train_steps,): the squared signal at each timestep."""
    T = schedule.train_steps
    if schedule.trained_betas is not None:
        betas = np.array(schedule.trained_betas, dtype=np.float64)
        if betas.shape != (T,):
            raise UsageError(f"trained_betas has {betas.size} entries; train_steps is {T}")
    elif schedule.beta_schedule == "linear":
        betas = np.linspace(schedule.beta_start, schedule.beta_end, T)
    elif schedule.beta_schedule == "scaled_linear":
        betas = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, T) ** 2
    else:  # squaredcos: Nichol & Dhariwal 2021, arXiv:2102.09672
        bar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    bars = np.cumprod(1 - betas)
    if schedule.zero_terminal_snr:  # Lin et al. 2023, arXiv:2305.08891, algorithm 1
        root = np.sqrt(bars)
        bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return np.asarray(bars)


def train_sigmas(schedule: ScheduleConfig) -> Array:
    """Return sigma_t / alpha_t, (train_steps,), rising and finite."""
    bars = alpha_bars(schedule)
    if schedule.zero_terminal_snr:
        bars[-1] = TINY_ALPHA_BAR
    return np.sqrt((1 - bars) / bars)


def spread(schedule: ScheduleConfig, n: int, *, spare: int = 0) -> Array:
    """Return n falling timesteps over the training range.

    "leading" and "linspace" spread n + spare of them and leave the last, lowest ones out.
    Names after Lin et al. 2023, table 2.
    """
    T, offset = schedule.train_steps, schedule.steps_offset
    t: Array
    if schedule.spacing == "linspace":
        t = np.linspace(0, T - 1, n + spare)[::-1][:n]
    elif schedule.spacing == "leading":
        t = np.arange(n + spare, dtype=np.float64)[::-1][:n] * (T // (n + spare)) + offset
    else:
        t = (T - np.arange(n, dtype=np.float64) * (T / n)).round() - 1
    if t[0] > T - 1 or (np.diff(t.round()) >= 0).any():
        raise UsageError(
            f"{n} steps do not fit {schedule.spacing} spacing over {T} training timesteps with "
            f"offset {offset}; ask for fewer steps"
        )
    return t


def timestep_of(sigma: Array, table: Array) -> Array:
    """Return the fractional timestep of each sigma, interpolating the logarithms."""
    return np.interp(np.log(sigma), np.log(table), np.arange(len(table)))


def respace(schedule: ScheduleConfig, first: float, last: float, n: int) -> Array:
    """Return n falling sigmas from first to last.

    "karras" is even in sigma^(1/7) (Karras et al. 2022, arXiv:2206.00364, eq. 5), "exponential" in
    log sigma.
    """
    ramp = np.linspace(0, 1, n)
    if schedule.sigma_spacing == "karras":
        sigma = (first ** (1 / 7) + ramp * (last ** (1 / 7) - first ** (1 / 7))) ** 7
    else:
        sigma = np.exp(np.log(first) + ramp * (np.log(last) - np.log(first)))
    return np.asarray(sigma)


def given_timesteps(schedule: ScheduleConfig, timesteps: Sequence[float]) -> Array:
    """Check the user's own timesteps."""
    t = np.asarray(timesteps, dtype=np.float64)
    T = schedule.train_steps
    if not (t.ndim == 1 and t.size and (np.diff(t) < 0).all() and 0 <= t[-1] and t[0] <= T - 1):
        raise UsageError(f"timesteps must fall strictly within 0..{T - 1}; they are {timesteps}")
    return t


def given_sigmas(sigmas: Sequence[float]) -> Array:
    """Check the user's own noise levels, the end included."""
    sigma = np.asarray(sigmas, dtype=np.float64)
    falls = sigma.ndim == 1 and len(sigma) > 1 and (np.diff(sigma) < 0).all()
    if not (falls and sigma[-1] >= 0 and np.isfinite(sigma[0])):
        raise UsageError(
            f"sigmas must fall strictly to their end, 0 or above, listed too; they are {sigmas}"
        )
    return sigma


def with_end(schedule: ScheduleConfig, sigma: Array, table: Array) -> Array:
    """Append the level that the run ends on."""
    return np.append(sigma, table[0] if schedule.final_sigma == "sigma_min" else 0.0)


def exploding(sigma: Array) -> Array:
    """Return levels (alpha, sigma) = (1, sigma)."""
    return np.stack([np.ones_like(sigma), sigma], axis=1)


def preserving(sigma: Array) -> Array:
    """Return levels (alpha, sigma) / sqrt(alpha^2 + sigma^2) of sigma-over-alpha."""
    alpha = 1 / np.sqrt(sigma**2 + 1)
    return np.stack([alpha, sigma * alpha], axis=1)


def plan_exploding(
    schedule: ScheduleConfig,
    n: int,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Plan:
    """Plan for Euler, Heun and LMS: fractional timesteps, x = x0 + sigma * eps."""
    table = train_sigmas(schedule)
    if sigmas is not None:
        sigma = given_sigmas(sigmas)
        t = timestep_of(np.maximum(sigma, 1e-10), table)
    else:
        if timesteps is not None:
            t = given_timesteps(schedule, timesteps)
        else:
            t = spread(schedule, n)
        sigma = np.interp(t, np.arange(len(table)), table)
        if schedule.sigma_spacing != "schedule":
            sigma = respace(schedule, sigma[0], sigma[-1], n)
            t = timestep_of(sigma, table)
        t, sigma = np.append(t, 0.0), with_end(schedule, sigma, table)
    # As in diffusers: leading spacing starts below the last timestep, yet from unit-variance noise.
    init_scale = sigma[0] if schedule.spacing != "leading" else np.hypot(sigma[0], 1)
    return Plan.through(t, exploding(sigma), init_scale=float(init_scale))


def plan_preserving(
    schedule: ScheduleConfig,
    n: int,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Plan:
    """Plan for the DPM-Solvers and UniPC: whole timesteps, x = alpha * x0 + sigma * eps."""
    table = train_sigmas(schedule)
    if sigmas is not None:
        sigma = given_sigmas(sigmas)
        return Plan.through(timestep_of(np.maximum(sigma, 1e-10), table), preserving(sigma))
    if timesteps is not None:
        t = given_timesteps(schedule, timesteps)
    elif schedule.sigma_spacing == "schedule":
        t = spread(schedule, n, spare=1).round()
    if timesteps is not None or schedule.sigma_spacing == "schedule":
        sigma = np.interp(t, np.arange(len(table)), table)
    else:
        sigma = respace(schedule, table[-1], table[0], n)
        t = timestep_of(sigma, table)
        # As in diffusers, which truncates the latter, the first from just below train_steps - 1.
        t = t.round() if schedule.sigma_spacing == "karras" else np.floor(np.maximum(t - 1e-4, 0))
    return Plan.through(np.append(t, 0.0), preserving(with_end(schedule, sigma, table)))


def plan_singlestep(
    schedule: ScheduleConfig,
    n: int,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Plan:
    """Plan for DPM-Solver++(2S), whose timesteps are always evenly spread."""
    return plan_preserving(replace(schedule, spacing="linspace"), n, timesteps, sigmas)


def plan_strided(schedule: ScheduleConfig, n: int, *, floor: bool = False) -> Plan:
    """Plan for DDIM and PNDM: a step strides train_steps // n timesteps, wherever the next is.

    DDIM's formula has no alpha below a fraction: zero signal is allowed. floor: PNDM's has.
    """
    stride = schedule.train_steps // n
    t = spread(schedule, n).round()
    bars = alpha_bars(schedule)
    if floor and schedule.zero_terminal_snr:
        bars[-1] = TINY_ALPHA_BAR
    final = 1.0 if schedule.final_alpha_one else bars[0]

    def level(t: Array) -> Array:
        bar = bars[np.clip(t, 0, len(bars) - 1).astype(np.int64)]
        bar = np.where(t < 0, final, bar)
        return np.sqrt(np.stack([bar, 1 - bar], axis=1))

    to = level(t - stride)
    return Plan(
        t=np.append(t, 0.0),
        at=np.concatenate([level(t), to[-1:]]),
        to=to,
        back=level(t + stride),
    )


def plan_pndm(schedule: ScheduleConfig, n: int) -> Plan:
    """Plan for PNDM without Runge-Kutta steps: the second evaluation is made twice."""
    return plan_strided(schedule, n, floor=True).take(sorted([*range(n), *range(1, min(n, 2))]))


def plan_whole(schedule: ScheduleConfig, t: Array) -> Plan:
    """Plan a walk over whole timesteps that ends on the clean picture."""
    bar = np.append(alpha_bars(schedule)[t.astype(np.int64)], 1.0)
    return Plan.through(np.append(t, 0.0), np.sqrt(np.stack([bar, 1 - bar], axis=1)))


def plan_ddpm(schedule: ScheduleConfig, n: int, timesteps: Sequence[float] | None = None) -> Plan:
    """Plan for DDPM."""
    if timesteps is not None:
        return plan_whole(schedule, given_timesteps(schedule, timesteps))
    return plan_whole(schedule, spread(schedule, n).round())


def plan_lcm(schedule: ScheduleConfig, n: int, timesteps: Sequence[float] | None = None) -> Plan:
    """Plan for LCM: skip through the timesteps of the teacher's solver."""
    if timesteps is not None:
        return plan_whole(schedule, given_timesteps(schedule, timesteps))
    return plan_whole(schedule, lcm_timesteps(schedule, n))


def lcm_timesteps(schedule: ScheduleConfig, n: int, strength: float = 1.0) -> Array:
    """Return the n timesteps of LCM that skip through the last `strength` of the teacher's."""
    teacher = int(schedule.original_steps * strength)
    if n > teacher:
        raise UsageError(
            f"LCM was distilled from {schedule.original_steps} steps and here takes at most "
            f"{teacher}, not {n}; 4 to 8 suffice"
        )
    t = np.arange(teacher, 0, -1) * (schedule.train_steps // schedule.original_steps) - 1.0
    skipped: Array = t[np.floor(np.linspace(0, teacher, n, endpoint=False)).astype(int)]
    return skipped
