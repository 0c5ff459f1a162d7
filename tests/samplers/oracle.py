"""One model function, two loops: ours over a StepTable in numpy, diffusers' over its scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch

from fastsd.config import ScheduleConfig
from fastsd.samplers import SAMPLERS, StepTable, resolve
from fastsd.samplers.schedule import train_sigmas
from fastsd.samplers.table import Array

Model = Callable[[Array, float], Array]
SHAPE = (1, 4, 4, 4)

FOREIGN_PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def mixture_model(schedule: ScheduleConfig) -> Model:
    """Return the exact denoiser of pixels drawn from two Gaussians, as eps, v or x0."""
    log_sigmas = np.log(train_sigmas(schedule))
    centres, width = np.array([-0.9, 0.7]), 0.35

    def model(x: Array, t: float) -> Array:
        sigma = np.exp(np.interp(t, np.arange(len(log_sigmas)), log_sigmas))
        a, s = 1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma)
        variance = (a * width) ** 2 + s**2
        logits = -((x[..., None] - a * centres) ** 2) / (2 * variance)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        each = centres + a * width**2 / variance * (x[..., None] - a * centres)
        x0 = (weights * each).sum(axis=-1)
        eps = (x - a * x0) / s
        return np.asarray({"eps": eps, "v": a * eps - s * x0, "x0": x0}[schedule.prediction])

    return model


def run(table: StepTable, model: Model, x: Array, draw: Callable[[], Array] | None = None) -> Array:
    """Walk a table in numpy."""
    state = np.concatenate([x[None], np.zeros((table.slots, *x.shape))])
    for r in range(table.rows):
        m = model(table.c_in[r] * state[0], float(table.timesteps[r]))
        D = table.clean[r, 0] * state[0] + table.clean[r, 1] * m
        state = np.tensordot(table.A[r], state, 1) + np.multiply.outer(table.b[r], D)
        if table.draws[r]:
            assert draw is not None
            state += np.multiply.outer(table.c[r], draw())
    return np.asarray(state[0])


def foreign_scheduler(schedule: ScheduleConfig, sampler: str, **extra: Any) -> Any:
    """Return diffusers' scheduler for these settings, less those that it does not know."""
    name, sigma_spacing = resolve(sampler)
    sigma_spacing = sigma_spacing or schedule.sigma_spacing
    settings: dict[str, Any] = {
        "num_train_timesteps": schedule.train_steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule.replace("squaredcos", "squaredcos_cap_v2"),
        "prediction_type": FOREIGN_PREDICTION[schedule.prediction],
        "timestep_spacing": schedule.spacing,
        "steps_offset": schedule.steps_offset,
        "set_alpha_to_one": schedule.final_alpha_one,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "use_karras_sigmas": sigma_spacing == "karras",
        "use_exponential_sigmas": sigma_spacing == "exponential",
        "final_sigmas_type": schedule.final_sigma,
        "solver_order": schedule.order or 2,
        "lower_order_final": schedule.lower_order_final,
        "original_inference_steps": schedule.original_steps,
        "skip_prk_steps": True,
        "clip_sample": False,
        "algorithm_type": "sde-dpmsolver++" if name == "dpmpp_2m_sde" else "dpmsolver++",
        **extra,
    }
    if schedule.trained_betas is not None:
        settings["trained_betas"] = list(schedule.trained_betas)
    cls = getattr(diffusers, SAMPLERS[name].scheduler)
    known = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in settings.items() if key in known})


def foreign_run(
    scheduler: Any,
    model: Model,
    x: Array,
    generator: torch.Generator,
    *,
    start: int = 0,
    eta: float = 0.0,
) -> tuple[Array, Array]:
    """Walk diffusers' scheduler as its img2img pipeline does; return latents and timesteps."""
    timesteps = scheduler.timesteps[start * scheduler.order :]
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    known = inspect.signature(scheduler.step).parameters
    extra = {
        key: value for key, value in {"eta": eta, "generator": generator}.items() if key in known
    }
    sample = torch.from_numpy(x)
    for t in timesteps:
        scaled = scheduler.scale_model_input(sample, t).double().numpy()
        output = torch.from_numpy(model(scaled, float(t)))
        sample = scheduler.step(output, t, sample, **extra).prev_sample.double()
    return sample.numpy(), timesteps.numpy()


def noise_source(generator: torch.Generator, sampler: str) -> Callable[[], Array]:
    """Draw as diffusers does for a float64 model; its SDE solver draws float32 always."""
    dtype = torch.float32 if resolve(sampler)[0] == "dpmpp_2m_sde" else torch.float64
    return lambda: torch.randn(SHAPE, generator=generator, dtype=dtype).double().numpy()


def compare(
    table: StepTable,
    scheduler: Any,
    model: Model,
    sampler: str,
    *,
    start: int = 0,
    eta: float = 0.0,
) -> float:
    """Run both from one noise; check timesteps and draws; return the relative L2 distance."""
    generator, theirs = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64).numpy()
    theirs.set_state(generator.get_state())
    alpha, sigma = table.levels[0]
    picture = np.sign(noise[:, :, ::-1]) / 2
    x = alpha * picture + sigma * noise if start else table.init_scale * noise

    foreign, timesteps = foreign_run(scheduler, model, x, theirs, start=start, eta=eta)
    ours = run(table, model, x, noise_source(generator, sampler))
    assert timesteps.shape == table.timesteps.shape
    if timesteps.dtype.kind == "i":
        np.testing.assert_array_equal(table.timesteps, timesteps)
    else:  # fractional ones come from float32 logarithms there
        np.testing.assert_allclose(table.timesteps, timesteps, rtol=1e-6, atol=2e-3)
    assert torch.equal(generator.get_state(), theirs.get_state()), "drew another amount of noise"
    return float(np.linalg.norm(ours - foreign) / np.linalg.norm(foreign))
