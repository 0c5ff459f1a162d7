"""Names and bad input: one clear UsageError each, which says what to do."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastsd.config import ScheduleConfig
from fastsd.errors import UsageError
from fastsd.samplers import SAMPLERS, build_table, resolve

SCHEDULE = ScheduleConfig()


@pytest.mark.parametrize(
    ("given", "name", "spacing"),
    [
        ("Euler a", "euler_a", None),
        ("Euler", "euler", None),
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("dpm++ 2m sde karras", "dpmpp_2m_sde", "karras"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("UniPC", "unipc", None),
        ("LMS", "lms", None),
        ("LMS Karras", "lms", "karras"),
        ("Heun", "heun", None),
        ("DDIM", "ddim", None),
        ("PLMS", "pndm", None),
        ("PNDM", "pndm", None),
        ("LCM", "lcm", None),
        ("k_euler_ancestral", "euler_a", None),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", None),
        *((name, name, None) for name in SAMPLERS),
        *((sampler.title, name, None) for name, sampler in SAMPLERS.items()),
    ],
)
def test_names_that_people_use(given: str, name: str, spacing: str | None) -> None:
    assert resolve(given) == (name, spacing)


def test_a_spacing_in_the_name_wins() -> None:
    named = build_table(SCHEDULE, 10, sampler="DPM++ 2M Karras")
    asked = build_table(replace(SCHEDULE, sigma_spacing="karras"), 10, sampler="dpmpp_2m")
    np.testing.assert_array_equal(named.levels, asked.levels)


def test_default_spacing_is_the_samplers_own() -> None:
    for name, sampler in SAMPLERS.items():
        default = build_table(replace(SCHEDULE, spacing="default"), 10, sampler=name)
        own = build_table(replace(SCHEDULE, spacing=sampler.spacing), 10, sampler=name)
        np.testing.assert_array_equal(default.timesteps, own.timesteps)


def test_the_schedules_sampler_is_used() -> None:
    assert build_table(SCHEDULE, 10).rows == 11
    assert build_table(replace(SCHEDULE, sampler="Heun"), 10).rows == 19


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, not 0"),
        ({"steps": -3}, "from 1 to 1000, not -3"),
        ({"steps": 1001}, "from 1 to 1000, not 1001"),
        ({"steps": 20.0}, "from 1 to 1000, not 20.0"),
        ({"steps": True}, "from 1 to 1000, not True"),
        ({"steps": "20"}, "from 1 to 1000, not '20'"),
        ({"steps": None}, "from 1 to 1000, not None"),
        ({"steps": 1000}, "1000 steps do not fit leading spacing"),
        ({"sampler": "dpmpp_2m", "steps": 999}, "999 steps do not fit leading spacing"),
        ({"sampler": "lcm", "steps": 51}, "from 50 steps and here takes at most 50, not 51"),
        ({"start": 20}, "start must be a whole number from 0 to 19, not 20"),
        ({"start": -1}, "from 0 to 19, not -1"),
        ({"start": 0.5}, "from 0 to 19, not 0.5"),
        ({"denoising_end": 0}, "denoising_end must lie between 0 and 1, not 0"),
        ({"denoising_start": 1}, "denoising_start must lie between 0 and 1, not 1"),
        ({"denoising_start": "x"}, "denoising_start must lie between"),
        ({"denoising_start": 0.999}, "no step is left below timestep 1"),
        ({"denoising_start": 0.6, "denoising_end": 0.4}, "nothing is left to do"),
        ({"eta": 1.5}, "eta must be from 0 to 1, not 1.5"),
        ({"eta": float("nan")}, "eta must be from 0 to 1, not nan"),
        ({"eta": "0"}, "eta must be from 0 to 1, not '0'"),
        ({"sampler": 5}, "sampler must be a name such as 'Euler a', not 5"),
        ({"sampler": "Eular"}, "'Eular' is unknown; did you mean euler"),
        ({"sampler": "zzz"}, "'zzz' is unknown; the samplers are ddim, ddpm"),
        ({"sampler": ""}, "'' is unknown"),
        ({"sampler": "karras"}, "'karras' is unknown"),
        ({"sampler": "DDIM Karras"}, "DDIM walks the training timesteps and has no karras"),
        ({"steps": None, "timesteps": [999, 500]}, "pndm takes no timesteps of your own; ddpm,"),
        ({"steps": None, "sigmas": [9, 0], "sampler": "ddpm"}, "ddpm takes no sigmas"),
        ({"steps": None, "sigmas": [9, 0], "timesteps": [3]}, "both choose the noise levels"),
        ({"steps": None, "timesteps": [], "sampler": "euler"}, "timesteps must fall strictly"),
        ({"steps": None, "timesteps": [1, 2], "sampler": "euler"}, "timesteps must fall strictly"),
        ({"steps": None, "timesteps": [1000], "sampler": "ddpm"}, "within 0..999"),
        ({"steps": None, "sigmas": [1.0], "sampler": "euler"}, "sigmas must fall strictly"),
        ({"steps": None, "sigmas": [2, np.nan, 0], "sampler": "euler"}, "sigmas must fall"),
        ({"steps": None, "sigmas": [np.inf, 1, 0], "sampler": "euler"}, "sigmas must fall"),
        ({"steps": 5, "timesteps": [900, 3], "sampler": "euler"}, "timesteps make 2 steps"),
        ({"steps": None, "timesteps": [9], "sampler": "Euler Karras"}, "karras sigma spacing both"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        build_table(SCHEDULE, **{"steps": 20, **arguments})


@pytest.mark.parametrize("handover", [0.2, 0.5, 0.83])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "pndm"])
def test_two_stages_share_the_steps(sampler: str, handover: float) -> None:
    """The second table walks on from where the first stops; no step is cut in two or left out.

    (PLMS makes the first step of either stage twice.)
    """
    whole = build_table(SCHEDULE, 20, sampler=sampler)
    first = build_table(SCHEDULE, 20, sampler=sampler, denoising_end=handover)
    second = build_table(SCHEDULE, 20, sampler=sampler, denoising_start=handover)
    assert first.rows + second.rows == whole.rows
    np.testing.assert_array_equal(first.levels[-1], second.levels[0])
    np.testing.assert_array_equal(second.levels, whole.levels[first.rows :])
    np.testing.assert_array_equal(first.A, whole.A[: first.rows])
    assert second.timesteps[0] < round(1000 * (1 - handover)) <= first.timesteps[0]
    if SAMPLERS[sampler].order == 1 or sampler == "heun":  # no history to lose
        np.testing.assert_array_equal(second.b, whole.b[first.rows :])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "lcm"])
def test_eps_at_zero_signal_is_refused_with_advice(sampler: str) -> None:
    schedule = replace(SCHEDULE, zero_terminal_snr=True, spacing="trailing")
    with pytest.raises(UsageError, match="zero signal .* set prediction='v'"):
        build_table(schedule, 20, sampler=sampler)
    build_table(replace(schedule, prediction="v"), 20, sampler=sampler)


def test_orders_that_a_solver_does_not_have() -> None:
    with pytest.raises(UsageError, match="dpmpp_2m has order 1 or 2; the schedule asks for 3"):
        build_table(replace(SCHEDULE, order=3), 20, sampler="dpmpp_2m")
    build_table(replace(SCHEDULE, order=3), 20, sampler="unipc")
    build_table(replace(SCHEDULE, order=3), 20, sampler="euler")


def test_betas_of_the_wrong_length() -> None:
    with pytest.raises(UsageError, match="trained_betas has 3 entries; train_steps is 1000"):
        build_table(replace(SCHEDULE, trained_betas=(0.1, 0.2, 0.3)), 20)


def test_tables_check_themselves() -> None:
    table = build_table(SCHEDULE, 5)
    with pytest.raises(UsageError, match=r"StepTable.c_in has shape \(5,\); 6 rows"):
        replace(table, c_in=table.c_in[1:])
    with pytest.raises(UsageError, match="StepTable.b holds NaN or infinity"):
        replace(table, b=np.full_like(table.b, np.nan))
    with pytest.raises(ValueError, match="read-only"):
        table.A[0] = 0
