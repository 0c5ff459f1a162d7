"""scheduler_config.json <-> ScheduleConfig: diffusers' class names, options and defaults.

Knows what each class reads, what of it a table expresses, and what is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastsd.checkpoints.options import Fixed, Options
from fastsd.config import ScheduleConfig
from fastsd.errors import CheckpointError

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_BETA_SIGMAS = "use_beta_sigmas"  # a spacing that we have none of
BETA_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "squaredcos",
}


@dataclass(frozen=True)
class Scheduler:
    """What a diffusers scheduler class reads: options beyond the common ones, with its defaults.

    sampler: ours, None where we have none; the class's name then stands in its place, as it does
    where noise levels are spaced as ours are not, so that the checkpoint loads and a sampler has to
    be chosen.
    spacing: the one timestep spacing of a class that has no choice.
    """

    sampler: str | None
    reads: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Fixed] = field(default_factory=dict)
    betas: tuple[float, float] = (0.0001, 0.02)
    beta_schedule: str = "linear"
    spacing: str | None = None

    @property
    def options(self) -> Options:
        """Every option that the class reads."""
        common = {
            "num_train_timesteps": 1000,
            "beta_start": self.betas[0],
            "beta_end": self.betas[1],
            "beta_schedule": self.beta_schedule,
            "trained_betas": None,
            "prediction_type": "epsilon",
        }
        if self.spacing is None:
            common |= {"timestep_spacing": "default", "steps_offset": 0}
        return Options(common | self.reads, self.fixed)


def _off(advice: str = "") -> Fixed:
    return Fixed(False, advice=advice)


_UNCLIPPED = Fixed(
    True, allowed=(False,), advice="latents are not clipped; set clip_sample to false"
)
_THRESHOLDING = {"thresholding": _off("it is for models of pixels; set thresholding to false")}
_SIGMAS: dict[str, Any] = {
    name: False for name in ("use_karras_sigmas", "use_exponential_sigmas", _BETA_SIGMAS)
}
_SOLVER: dict[str, Any] = {
    **_SIGMAS,
    "solver_order": 2,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
}
_SOLVER_FIXED = {
    **_THRESHOLDING,
    "use_flow_sigmas": _off("it is for flow-matching models"),
    "use_dynamic_shifting": _off("it is for flow-matching models"),
}
# Names of other solvers' types, which diffusers reads as the default.
_MIDPOINT = Fixed("midpoint", allowed=("midpoint", "logrho", "bh1", "bh2"))
_DPM_FIXED = {
    **_SOLVER_FIXED,
    "solver_type": _MIDPOINT,
    "lambda_min_clipped": Fixed(-float("inf")),
    "variance_type": Fixed(None),
}
_ZERO_SNR = {"rescale_betas_zero_snr": False}


def _multistep(sampler: str, *algorithms: str) -> Scheduler:
    return Scheduler(
        sampler,
        _SOLVER | _ZERO_SNR,
        {
            **_DPM_FIXED,
            "algorithm_type": Fixed("dpmsolver++", allowed=algorithms),
            "euler_at_final": _off(),
            "use_lu_lambdas": _off(),
        },
    )


# In order of preference where several classes give one sampler.
SCHEDULERS: dict[str, Scheduler] = {
    "PNDMScheduler": Scheduler(
        "pndm",
        {"set_alpha_to_one": False},
        {
            "skip_prk_steps": Fixed(
                False, allowed=(True,), advice="set it to true, as Stable Diffusion does"
            )
        },
    ),
    "DDIMScheduler": Scheduler(
        "ddim",
        {"set_alpha_to_one": True, **_ZERO_SNR},
        {"clip_sample": _UNCLIPPED, **_THRESHOLDING},
    ),
    "DDPMScheduler": Scheduler(
        "ddpm",
        _ZERO_SNR,
        {
            "clip_sample": _UNCLIPPED,
            **_THRESHOLDING,
            "variance_type": Fixed("fixed_small"),
        },
    ),
    "EulerDiscreteScheduler": Scheduler(
        "euler",
        {**_SIGMAS, **_ZERO_SNR, "final_sigmas_type": "zero"},
        {
            "interpolation_type": Fixed("linear"),
            "timestep_type": Fixed("discrete"),
            "sigma_min": Fixed(None),
            "sigma_max": Fixed(None),
        },
    ),
    "EulerAncestralDiscreteScheduler": Scheduler("euler_a", _ZERO_SNR),
    "HeunDiscreteScheduler": Scheduler(
        "heun",
        _SIGMAS,
        {"clip_sample": _off("latents are not clipped; set clip_sample to false")},
        betas=(0.00085, 0.012),
    ),
    "LMSDiscreteScheduler": Scheduler("lms", _SIGMAS),
    "DPMSolverMultistepScheduler": _multistep("dpmpp_2m", "dpmsolver++", "deis"),
    "DPMSolverSinglestepScheduler": Scheduler(
        "dpmpp_2s",
        _SOLVER | {"lower_order_final": False},
        {
            **_DPM_FIXED,
            "algorithm_type": Fixed("dpmsolver++", allowed=("dpmsolver++", "deis")),
        },
        spacing="linspace",
    ),
    "UniPCMultistepScheduler": Scheduler(
        "unipc",
        _SOLVER | _ZERO_SNR,
        {
            **_SOLVER_FIXED,
            "predict_x0": Fixed(True),
            "solver_type": Fixed("bh2", allowed=("bh2", "midpoint", "heun", "logrho")),
            "disable_corrector": Fixed([]),
            "solver_p": Fixed(None),
            "sigma_min": Fixed(None),
            "sigma_max": Fixed(None),
            "shift_terminal": Fixed(None),
        },
    ),
    "LCMScheduler": Scheduler(
        "lcm",
        {"set_alpha_to_one": True, "original_inference_steps": 50, **_ZERO_SNR},
        {
            "clip_sample": _off("latents are not clipped; set clip_sample to false"),
            **_THRESHOLDING,
            "timestep_scaling": Fixed(10.0),
        },
        betas=(0.00085, 0.012),
        beta_schedule="scaled_linear",
    ),
    "DPMSolverSDEScheduler": Scheduler(None, _SIGMAS, betas=(0.00085, 0.012)),
    "DEISMultistepScheduler": Scheduler(None, _SIGMAS),
    "KDPM2DiscreteScheduler": Scheduler(None, _SIGMAS, betas=(0.00085, 0.012)),
    "KDPM2AncestralDiscreteScheduler": Scheduler(None, _SIGMAS, betas=(0.00085, 0.012)),
    "SASolverScheduler": Scheduler(None, _SIGMAS),
    "TCDScheduler": Scheduler(None, betas=(0.00085, 0.012), beta_schedule="scaled_linear"),
}
_STOCHASTIC_MULTISTEP = _multistep("dpmpp_2m_sde", "sde-dpmsolver++")


def read_schedule(name: str, config: dict[str, Any], *, lenient: bool) -> ScheduleConfig:
    """Return the schedule that class `name` makes of `config`.

    lenient: as StableDiffusionPipeline does, take steps_offset for 1 and clip_sample for false,
    whatever a config says. Raises CheckpointError naming the option that no table expresses.
    """
    if name not in SCHEDULERS:
        raise CheckpointError(
            f"scheduler {name!r} is not known; fastsd reads {', '.join(SCHEDULERS)}"
        )
    kind = SCHEDULERS[name]
    if config.get("algorithm_type") == "sde-dpmsolver++" and kind.sampler == "dpmpp_2m":
        kind = _STOCHASTIC_MULTISTEP
    if lenient:
        config = config | {"steps_offset": 1, "clip_sample": False}
    option = kind.options.read(config)
    unknown = f"{name} with {_BETA_SIGMAS}" if option.get(_BETA_SIGMAS) else None
    betas = option["trained_betas"]
    spacing = "schedule"
    if option.get("use_karras_sigmas"):
        spacing = "karras"
    elif option.get("use_exponential_sigmas"):
        spacing = "exponential"
    final_sigma = option.get("final_sigmas_type", "zero")
    return ScheduleConfig(
        train_steps=option["num_train_timesteps"],
        beta_start=option["beta_start"],
        beta_end=option["beta_end"],
        beta_schedule=BETA_SCHEDULES.get(option["beta_schedule"], option["beta_schedule"]),
        trained_betas=None if betas is None else tuple(float(beta) for beta in betas),
        prediction=PREDICTIONS.get(option["prediction_type"], option["prediction_type"]),
        spacing=kind.spacing or option["timestep_spacing"],
        sigma_spacing=spacing,
        steps_offset=option.get("steps_offset", 0),
        final_alpha_one=option.get("set_alpha_to_one", False),
        zero_terminal_snr=option.get("rescale_betas_zero_snr", False),
        final_sigma=final_sigma,
        sampler=unknown or kind.sampler or name,
        order=option.get("solver_order"),
        # DPM-Solver single step turns it on by itself where it ends on 0
        lower_order_final=option.get("lower_order_final", True)
        or (kind.spacing is not None and final_sigma == "zero"),
        original_steps=option.get("original_inference_steps", 50),
    )


def write_schedule(schedule: ScheduleConfig) -> dict[str, Any]:
    """Return the scheduler_config.json with which diffusers samples as `schedule` says."""
    if schedule.sampler == "dpmpp_2m_sde":
        name, kind = "DPMSolverMultistepScheduler", _STOCHASTIC_MULTISTEP
    else:
        known = {kind.sampler or name: (name, kind) for name, kind in SCHEDULERS.items()}
        if schedule.sampler not in known:
            raise CheckpointError(f"no scheduler of diffusers is sampler {schedule.sampler!r}")
        name, kind = known[schedule.sampler]
    values = {
        "num_train_timesteps": schedule.train_steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": _foreign(BETA_SCHEDULES, schedule.beta_schedule),
        "trained_betas": None if schedule.trained_betas is None else list(schedule.trained_betas),
        "prediction_type": _foreign(PREDICTIONS, schedule.prediction),
        "timestep_spacing": schedule.spacing,
        "steps_offset": schedule.steps_offset,
        "set_alpha_to_one": schedule.final_alpha_one,
        "use_karras_sigmas": schedule.sigma_spacing == "karras",
        "use_exponential_sigmas": schedule.sigma_spacing == "exponential",
        _BETA_SIGMAS: False,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "final_sigmas_type": schedule.final_sigma,
        "solver_order": 2 if schedule.order is None else schedule.order,
        "lower_order_final": schedule.lower_order_final,
        "original_inference_steps": schedule.original_steps,
    }
    if schedule.spacing == "default":
        del values["timestep_spacing"]
    return {"_class_name": name} | kind.options.write(values)


def _foreign(names: dict[str, str], ours: str) -> str:
    return next(theirs for theirs, own in names.items() if own == ours)
