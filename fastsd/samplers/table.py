"""A sampler as a table of numbers, and how a solver's formulas become one.

Owns StepTable and the algebra that fills it: a solver writes each update as a *form*, a vector of
coefficients over (x, slots, D, noise), so it reads like its paper and comes out as a matrix row.
Knows nothing of schedules, models or devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsd.errors import UsageError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class StepTable:
    """A whole run of a sampler: R rows (one model evaluation each) over x and S slots.

    A row does, in this order::

        m = model(c_in * x, timestep)
        D = clean[0] * x + clean[1] * m              the estimate of x0
        [x, s1..sS] = A @ [x, s1..sS] + b * D + c * noise

    timesteps (R,), c_in (R,), clean (R, 2), A (R, 1+S, 1+S), b (R, 1+S), c (R, 1+S): float64,
    finite, read-only.
    levels (R+1, 2): (alpha, sigma) of x = alpha * x0 + sigma * eps before each row, and at the end.
    init_scale: a run from pure noise starts at x = init_scale * noise; slots start at 0.
    draws (R,): rows that draw fresh noise, even where c is 0: a generator advances as in diffusers.
    steps (R,): the user's step that a row belongs to, from 0.
    """

    timesteps: Array
    c_in: Array
    clean: Array
    A: Array
    b: Array
    c: Array
    levels: Array
    init_scale: float
    draws: NDArray[np.bool_]
    steps: NDArray[np.int64]

    def __post_init__(self) -> None:
        R, K = self.b.shape
        shapes = {
            "timesteps": (R,),
            "c_in": (R,),
            "clean": (R, 2),
            "A": (R, K, K),
            "b": (R, K),
            "c": (R, K),
            "levels": (R + 1, 2),
            "init_scale": (),
            "draws": (R,),
            "steps": (R,),
        }
        for f in fields(self):
            value = np.array(getattr(self, f.name))
            if value.shape != shapes[f.name]:
                raise UsageError(
                    f"StepTable.{f.name} has shape {value.shape}; {R} rows and {K - 1} slots need "
                    f"{shapes[f.name]}"
                )
            if not np.isfinite(value).all():
                raise UsageError(f"StepTable.{f.name} holds NaN or infinity")
            value.setflags(write=False)
            if value.ndim:
                object.__setattr__(self, f.name, value)

    @property
    def rows(self) -> int:
        """Number of model evaluations."""
        return len(self.b)

    @property
    def slots(self) -> int:
        """Number of tensors that the state holds beside x."""
        return int(self.b.shape[1]) - 1

    def first(self, rows: int) -> StepTable:
        """Return the same run broken off after `rows` rows."""
        cut = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in cut.items():
            if name != "init_scale":
                cut[name] = value[: rows + 1] if name == "levels" else value[:rows]
        return StepTable(**cut)

    @property
    def known(self) -> Array:
        """(R, 2): the level (alpha, sigma) at which a known picture replaces x after each row.

        It is where the next row finds x; after the last row it is the picture itself.
        """
        return np.concatenate([self.levels[1:-1], [[1.0, 0.0]]])


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """The walk of n steps that a solver makes a table of.

    t (n+1,): the timestep that the model is told at each level.
    at (n+1, 2): the noise levels (alpha, sigma), falling; the last is the result's.
    to (n, 2): where step i lands: at[i + 1], except for DDIM and PNDM, whose stride is fixed.
    back (n, 2): one stride above at[i], which only PNDM looks at.
    orders (n,): the order to use for each step, for solvers that have a choice.
    """

    t: Array
    at: Array
    to: Array
    back: Array
    orders: tuple[int, ...] = ()
    prediction: str = "eps"
    eta: float = 0.0
    init_scale: float = 1.0

    @classmethod
    def through(cls, t: Array, at: Array, *, init_scale: float = 1.0) -> Plan:
        """Walk from each level to the next."""
        return cls(t=t, at=at, to=at[1:], back=at[[0, *range(len(at) - 2)]], init_scale=init_scale)

    def take(self, steps: Iterable[int]) -> Plan:
        """Keep these steps, in this order, and the end."""
        i = list(steps)
        end = [*i, len(self.t) - 1]
        return replace(self, t=self.t[end], at=self.at[end], to=self.to[i], back=self.back[i])

    @property
    def n(self) -> int:
        return len(self.t) - 1

    @property
    def alpha(self) -> Array:
        return self.at[:, 0]

    @property
    def sigma(self) -> Array:
        return self.at[:, 1]

    @property
    def lam(self) -> Array:
        """lambda = log(alpha / sigma), half the log of the SNR; infinite where sigma is 0."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.alpha) - np.log(self.sigma))


class Row(NamedTuple):
    """One evaluation: the model is asked at level `at`; then x and the slots become these forms."""

    at: int
    x: Array
    slots: tuple[Array, ...] = ()
    draws: bool = False
    step: int | None = None  # the user's step; None where it is `at`


def symbols(slots: int) -> Array:
    """Return the unit forms: unpack them as ``x, s1, .., sS, D, noise``."""
    return np.eye(slots + 3)


def clean(alpha: float, sigma: float, prediction: str) -> tuple[float, float]:
    """Return (p, q) such that D = p * x + q * m, for x = alpha * x0 + sigma * eps.

    The model sees c_in * x, of unit variance. "v" is Salimans & Ho 2022, arXiv:2202.00512.
    """
    c_in = 1 / math.hypot(alpha, sigma)
    a, s = c_in * alpha, c_in * sigma
    if prediction == "x0":
        return 0.0, 1.0
    if prediction == "v":
        return a * c_in, -s
    if a == 0:
        raise UsageError(
            "an eps model says nothing about the picture at zero signal (alpha = 0), where this "
            "schedule begins; zero-terminal-SNR checkpoints predict v: set prediction='v', or use "
            "leading spacing"
        )
    return c_in / a, -s / a


def assemble(plan: Plan, rows: Iterable[Row]) -> StepTable:
    """Stack a solver's rows into a table."""
    rows = list(rows)
    at = [row.at for row in rows]
    M = np.stack([np.stack([row.x, *row.slots]) for row in rows])  # (R, 1+S, 1+S+2)
    levels = plan.at[at]
    return StepTable(
        timesteps=plan.t[at],
        c_in=1 / np.hypot(levels[:, 0], levels[:, 1]),
        clean=np.array([clean(alpha, sigma, plan.prediction) for alpha, sigma in levels]),
        A=M[:, :, :-2],
        b=M[:, :, -2],
        c=M[:, :, -1],
        levels=np.concatenate([levels, plan.at[-1:]]),
        init_scale=plan.init_scale,
        draws=np.array([row.draws for row in rows]),
        steps=np.array([row.at if row.step is None else row.step for row in rows]),
    )
