"""Samplers: a schedule and a step count become a StepTable, which one loop can run.

Owns the list of samplers and their names. numpy float64 only; knows no model and no device.
"""

from __future__ import annotations

import difflib
import numbers
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from fastsd.config import ScheduleConfig
from fastsd.errors import UsageError
from fastsd.samplers import schedule as plans
from fastsd.samplers import solvers
from fastsd.samplers.table import Plan, Row, StepTable, assemble

__all__ = ["SAMPLERS", "Sampler", "StepTable", "build_table", "resolve"]

ANY_LEVELS = frozenset({"timesteps", "sigmas", "sigma_spacing"})


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What is known of a sampler.

    title: the name that people's tools show; aliases: its other names; scheduler: diffusers' class.
    spacing: the timestep spacing that is its own where a schedule leaves it open ("default").
    order: of convergence; evaluations: of the model a step.
    choices: the multistep orders that a schedule may ask for; orders: the order of each step.
    accepts: the arguments that make sense to it, of timesteps, sigmas and sigma_spacing.
    """

    title: str
    solve: Callable[[Plan], Iterator[Row]]
    plan: Callable[..., Plan]
    scheduler: str
    spacing: str = "linspace"
    aliases: tuple[str, ...] = ()
    order: int = 1
    evaluations: int = 1
    stochastic: bool = False
    choices: tuple[int, ...] = ()
    orders: Callable[[ScheduleConfig, int, int], Sequence[int]] | None = None
    accepts: frozenset[str] = ANY_LEVELS


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddim": Sampler(
            title="DDIM",
            solve=solvers.ddim,
            plan=plans.plan_strided,
            scheduler="DDIMScheduler",
            spacing="leading",
            accepts=frozenset(),
        ),
        "ddpm": Sampler(
            title="DDPM",
            solve=solvers.ddpm,
            plan=plans.plan_ddpm,
            scheduler="DDPMScheduler",
            spacing="leading",
            stochastic=True,
            accepts=frozenset({"timesteps"}),
        ),
        "pndm": Sampler(
            title="PLMS",
            solve=solvers.pndm,
            plan=plans.plan_pndm,
            scheduler="PNDMScheduler",
            spacing="leading",
            aliases=("PNDM",),
            order=4,
            accepts=frozenset(),
        ),
        "euler": Sampler(
            title="Euler",
            solve=solvers.euler,
            plan=plans.plan_exploding,
            scheduler="EulerDiscreteScheduler",
            aliases=("k_euler",),
        ),
        "euler_a": Sampler(
            title="Euler a",
            solve=solvers.euler_a,
            plan=plans.plan_exploding,
            scheduler="EulerAncestralDiscreteScheduler",
            aliases=("Euler ancestral", "k_euler_a", "k_euler_ancestral"),
            stochastic=True,
        ),
        "heun": Sampler(
            title="Heun",
            solve=solvers.heun,
            plan=plans.plan_exploding,
            scheduler="HeunDiscreteScheduler",
            aliases=("k_heun",),
            order=2,
            evaluations=2,
        ),
        "lms": Sampler(
            title="LMS",
            solve=solvers.lms,
            plan=plans.plan_exploding,
            scheduler="LMSDiscreteScheduler",
            aliases=("k_lms",),
            order=4,
            orders=solvers.lms_orders,
        ),
        "dpmpp_2m": Sampler(
            title="DPM++ 2M",
            solve=solvers.dpmpp_2m,
            plan=plans.plan_preserving,
            scheduler="DPMSolverMultistepScheduler",
            aliases=("DPM-Solver++", "k_dpmpp_2m"),
            order=2,
            choices=(1, 2),
            orders=solvers.dpmpp_orders,
        ),
        "dpmpp_2m_sde": Sampler(
            title="DPM++ 2M SDE",
            solve=solvers.dpmpp_2m_sde,
            plan=plans.plan_preserving,
            scheduler="DPMSolverMultistepScheduler",
            aliases=("SDE-DPM-Solver++", "k_dpmpp_2m_sde"),
            order=2,
            stochastic=True,
            choices=(1, 2),
            orders=solvers.dpmpp_orders,
        ),
        "dpmpp_2s": Sampler(
            title="DPM++ 2S",
            solve=solvers.dpmpp_2s,
            plan=plans.plan_singlestep,
            scheduler="DPMSolverSinglestepScheduler",
            order=2,
            choices=(1, 2),
            orders=solvers.singlestep_orders,
        ),
        "unipc": Sampler(
            title="UniPC",
            solve=solvers.unipc,
            plan=plans.plan_preserving,
            scheduler="UniPCMultistepScheduler",
            order=2,
            choices=(1, 2, 3),
            orders=solvers.unipc_orders,
        ),
        "lcm": Sampler(
            title="LCM",
            solve=solvers.lcm,
            plan=plans.plan_lcm,
            scheduler="LCMScheduler",
            spacing="leading",
            stochastic=True,
            accepts=frozenset({"timesteps"}),
        ),
    }
)


def _plain(name: str) -> str:
    """Fold case, spaces and punctuation, so that "Euler a" and "euler_a" are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


# Reversed, so that a class that two samplers share means the first of them.
_NAMES = {
    _plain(alias): name
    for name, sampler in reversed(list(SAMPLERS.items()))
    for alias in (name, sampler.title, *sampler.aliases, sampler.scheduler)
}


def resolve(name: str) -> tuple[str, str | None]:
    """Return the key in SAMPLERS and the sigma spacing, if the name holds one ("DPM++ 2M Karras").

    Case, spaces and punctuation do not matter. UsageError, with the nearest names, for an unknown
    one.
    """
    if not isinstance(name, str):
        raise UsageError(f"sampler must be a name such as 'Euler a', not {name!r}")
    plain = _plain(name)
    for suffix, spacing in (("karras", "karras"), ("exponential", "exponential"), ("", None)):
        sampler = _NAMES.get(plain.removesuffix(suffix)) if plain.endswith(suffix) else None
        if sampler is None:
            continue
        if spacing and "sigma_spacing" not in SAMPLERS[sampler].accepts:
            raise UsageError(
                f"sampler {name!r}: {SAMPLERS[sampler].title} walks the training timesteps and has "
                f"no {spacing} spacing; ask for {sampler!r}"
            )
        return sampler, spacing
    near = [_NAMES[n] for n in difflib.get_close_matches(plain, _NAMES, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}? the" if near else "the"
    raise UsageError(f"sampler {name!r} is unknown; {hint} samplers are {', '.join(SAMPLERS)}")


def _whole(what: str, value: Any, low: int, high: int) -> int:
    """Return value as an int from low to high, or refuse it."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise UsageError(f"{what} must be a whole number from {low} to {high}, not {value!r}")
    return number


def build_table(
    schedule: ScheduleConfig,
    steps: int | None,
    *,
    sampler: str | None = None,
    eta: float = 0.0,
    start: int = 0,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> StepTable:
    """Tabulate a run of a sampler, equal to diffusers' scheduler of the same settings.

    sampler: a name or alias; None takes the schedule's. A sigma spacing in the name wins.
    eta: DDIM's noise, 0 to 1; the others do not read it.
    start: steps left out at the noisy end (img2img: ``steps - int(steps * strength)``).
    denoising_start, denoising_end: between 0 and 1, where another model hands over to this one and
    this one to another (SDXL's base and refiner); with the former, start is not read.
    timesteps, sigmas: the levels to walk in place of the schedule's, for samplers that accept them;
    sigmas list the end too. steps is then their number, or None.
    UsageError for anything out of range.
    """
    name, sigma_spacing = resolve(schedule.sampler if sampler is None else sampler)
    kind = SAMPLERS[name]
    n, given = _levels(name, steps, timesteps, sigmas, schedule.train_steps)
    if not (isinstance(eta, numbers.Real) and 0 <= eta <= 1):
        raise UsageError(f"eta must be from 0 to 1, not {eta!r}")
    schedule = replace(
        schedule,
        spacing=kind.spacing if schedule.spacing == "default" else schedule.spacing,
        sigma_spacing=sigma_spacing or schedule.sigma_spacing,
    )
    respaced = "sigma_spacing" in kind.accepts and schedule.sigma_spacing != "schedule"
    if timesteps is not None and respaced:
        raise UsageError(
            f"timesteps and {schedule.sigma_spacing} sigma spacing both choose the noise levels; "
            "give only one"
        )
    plan = kind.plan(schedule, n, **given)
    start = _whole("start", start, 0, n - 1)
    if denoising_start is not None:
        start = _start_below(plan, _cutoff("denoising_start", denoising_start, schedule))
    orders = _orders(name, schedule, plan, start)
    plan = replace(
        plan.take(range(start, plan.n)),
        orders=orders,
        prediction=schedule.prediction,
        eta=float(eta),
    )
    table = assemble(plan, kind.solve(plan))
    if denoising_end is None:
        return table
    # Whole steps: a row belongs to the timestep at which its step began.
    began = table.timesteps[np.searchsorted(table.steps, table.steps)]
    rows = int((began >= _cutoff("denoising_end", denoising_end, schedule)).sum())
    if not rows:
        raise UsageError(
            f"nothing is left to do between denoising_start={denoising_start} and "
            f"denoising_end={denoising_end} in {n} steps; move them apart or ask for more steps"
        )
    return table.first(rows)


def _cutoff(what: str, value: float, schedule: ScheduleConfig) -> int:
    """Return the training timestep at which one model hands over to the next, as in diffusers."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < 1:
        raise UsageError(f"{what} must lie between 0 and 1, not {value!r}; None walks all of it")
    return round(schedule.train_steps - float(value) * schedule.train_steps)


def _start_below(plan: Plan, cutoff: int) -> int:
    """Return the first step that begins below `cutoff`."""
    start = int((plan.t[: plan.n] >= cutoff).sum())
    if start == plan.n:
        raise UsageError(
            f"no step is left below timestep {cutoff}; lower denoising_start or ask for more steps"
        )
    return start


def _levels(
    name: str,
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    train_steps: int,
) -> tuple[int, dict[str, Sequence[float]]]:
    """Return the number of steps and the levels that the user gave."""
    if timesteps is not None and sigmas is not None:
        raise UsageError("timesteps and sigmas both choose the noise levels; give only one")
    if timesteps is None and sigmas is None:
        return _whole("steps", steps, 1, train_steps), {}
    what, levels, n = (
        ("sigmas", sigmas, len(sigmas) - 1)
        if sigmas is not None
        else ("timesteps", timesteps, len(timesteps or ()))
    )
    if what not in SAMPLERS[name].accepts:
        able = [key for key, sampler in SAMPLERS.items() if what in sampler.accepts]
        raise UsageError(f"{name} takes no {what} of your own; {', '.join(able)} do")
    if steps is not None and steps != n:
        raise UsageError(f"steps is {steps!r}, but {what} make {n} steps; leave steps out")
    assert levels is not None
    return n, {what: levels}


def _orders(name: str, schedule: ScheduleConfig, plan: Plan, start: int) -> tuple[int, ...]:
    """Return the order of each kept step: a history begins empty, and sigma = 0 allows only 1."""
    kind = SAMPLERS[name]
    if kind.orders is None:
        return ()
    order = kind.order if schedule.order is None or not kind.choices else schedule.order
    if kind.choices and order not in kind.choices:
        raise UsageError(
            f"{name} has order {' or '.join(map(str, kind.choices))}; the schedule asks for {order}"
        )
    planned = list(kind.orders(schedule, plan.n, order))
    if plan.sigma[-1] == 0 and kind.choices:
        planned[-1] = 1
    return tuple(min(p, i + 1) for i, p in enumerate(planned[start:]))
