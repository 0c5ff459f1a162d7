"""What a model is, as plain frozen values.

Owns the true names of every architectural choice; foreign names (`attention_head_dim` meaning the
number of heads, and so on) stop at `fastsd.checkpoints`. Presets differ only where they differ.
Knows no torch, no file and no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from fastsd.errors import UsageError

ACTIVATIONS = ("quick_gelu", "gelu")
PREDICTIONS = ("eps", "v", "x0")
SPACINGS = ("default", "leading", "trailing", "linspace")  # default: the sampler's own
SIGMA_SPACINGS = ("schedule", "karras", "exponential")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos")


# The smallest and largest of each size: wide around every known model, yet built in no time.
_SIZES = {
    **dict.fromkeys(("width", "widths", "mlp_width", "projection", "norm_groups"), (1, 2**16)),
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels"), (1, 2**10)),
    **dict.fromkeys(("pooled_width", "size_width", "guidance_width"), (0, 2**16)),
    **dict.fromkeys(("depths", "mid_depth", "blocks"), (0, 2**5)),
    **dict.fromkeys(("sample_size", "context_width", "max_tokens"), (1, 2**16)),
    **dict.fromkeys(("train_steps", "original_steps"), (1, 100_000)),
    "heads": (1, 2**10),
    "layers": (1, 2**8),
    "layers_per_level": (1, 2**4),
    "vocab_size": (1, 2**24),
}
_MOST_LEVELS = 8


def _check_sizes(part: str, config: object) -> None:
    """Refuse sizes out of their bounds; a tuple has one a level."""
    for name, (low, high) in _SIZES.items():
        given = getattr(config, name, None)
        for size in given if isinstance(given, tuple) else () if given is None else (given,):
            _require(
                type(size) is int and low <= size <= high,
                f"{part} {name} must be whole numbers from {low} to {high}, not {given!r}",
            )
        _require(
            not isinstance(given, tuple) or 1 <= len(given) <= _MOST_LEVELS,
            f"{part} {name} must have one entry a level, and 1 to {_MOST_LEVELS} of them",
        )


def _check_between(what: str, given: float) -> None:
    """Refuse a number that is not between 0 and 1, ends excluded; NaN too."""
    _require(0 < given < 1, f"{what} must lie between 0 and 1, not {given!r}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _require_one_of(what: str, given: str, known: tuple[str, ...]) -> None:
    _require(given in known, f"{what} {given!r} is unknown; it is one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """A CLIP text encoder (Radford et al. 2021), causal, pre-norm.

    eos_token_id 2 is the old convention: pool at the largest id, wherever it stands.
    projection: width of the pooled, projected embedding; None where the checkpoint has none.
    """

    vocab_size: int = 49408
    width: int = 768
    mlp_width: int = 3072
    layers: int = 12
    heads: int = 12
    max_tokens: int = 77
    activation: str = "quick_gelu"
    eps: float = 1e-5
    eos_token_id: int = 49407
    projection: int | None = None

    def __post_init__(self) -> None:
        _check_sizes("CLIP", self)
        _check_between("CLIP eps", self.eps)
        _require_one_of("CLIP activation", self.activation, ACTIVATIONS)
        _require(
            self.width % self.heads == 0,
            f"CLIP width {self.width} is not a multiple of its {self.heads} heads",
        )


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A latent-diffusion UNet with cross-attention (Rombach et al. 2022).

    One entry a level, from the finest: `widths`, `depths` (transformer blocks after each resnet; 0
    means no attention) and `heads`. The up path mirrors the down path with one more resnet a level.
    pooled_width: width of the pooled text that SDXL adds to the time embedding, together with
    `size_ids` numbers each embedded in `size_width`; 0 where the family has none.
    guidance_width: width of the embedded guidance weight of distilled (LCM) checkpoints; 0 for
    none.
    """

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    depths: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    layers_per_level: int = 2
    context_width: int = 768
    linear_projection: bool = False
    norm_groups: int = 32
    eps: float = 1e-5
    flip_sin_to_cos: bool = True
    frequency_shift: float = 0.0
    upcast_attention: bool = False
    pooled_width: int = 0
    size_ids: int = 0
    size_width: int = 0
    guidance_width: int = 0

    def __post_init__(self) -> None:
        _check_sizes("UNet", self)
        _check_between("UNet eps", self.eps)
        _require(math.isfinite(self.frequency_shift), "UNet frequency_shift must be finite")
        levels = len(self.widths)
        _require(
            len(self.depths) == levels and len(self.heads) == levels,
            f"UNet widths, depths and heads must have one entry a level; they have "
            f"{levels}, {len(self.depths)} and {len(self.heads)}",
        )
        for width, heads in zip(self.widths, self.heads, strict=True):
            _require(
                width % self.norm_groups == 0,
                f"UNet width {width} is not a multiple of {self.norm_groups} norm groups",
            )
            _require(width % heads == 0, f"UNet width {width} is not a multiple of {heads} heads")
        _require(
            bool(self.pooled_width) == bool(self.size_ids and self.size_width),
            "UNet pooled_width, size_ids and size_width come together or not at all",
        )

    @property
    def time_width(self) -> int:
        """Width of the time embedding: four times the finest level."""
        return 4 * self.widths[0]


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """An AutoencoderKL (Rombach et al. 2022); latents are (z - shift) * scale of what it gives.

    blocks: residual blocks a level, from the finest, of a tiny autoencoder (TAESD), which has no
    norms, attention or distribution; None: an AutoencoderKL.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_level: int = 2
    norm_groups: int = 32
    eps: float = 1e-6
    scale: float = 0.18215
    shift: float = 0.0
    sample_size: int = 512
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    force_upcast: bool = False
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_sizes("VAE", self)
        _check_between("VAE eps", self.eps)
        for width in self.widths:
            _require(
                width % self.norm_groups == 0,
                f"VAE width {width} is not a multiple of {self.norm_groups} norm groups",
            )
        _require(
            math.isfinite(self.scale) and self.scale != 0 and math.isfinite(self.shift),
            f"VAE scale and shift must be finite and scale not 0; they are {self.scale!r} and "
            f"{self.shift!r}",
        )

    @property
    def downscale(self) -> int:
        """Pixels a latent stands for along one side."""
        return int(2 ** (len(self.widths) - 1))


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The noise schedule a model was trained on, and how its makers would sample it.

    spacing picks the timesteps; sigma_spacing re-spaces the noise levels between the ends that
    spacing gave ("schedule" leaves them). final_alpha_one ends DDIM/PNDM at alpha = 1 instead of
    the schedule's first value. final_sigma: "zero" or "sigma_min", the level the DPM++ and UniPC
    solvers end on.
    order: the multistep order where the sampler has a choice; None takes the sampler's own.
    original_steps: the teacher's step count that LCM skips through.
    steps, guidance, timesteps: what the model was made for where that is not the custom, few steps
    above all, and so is drawn with where nothing else is asked; None for others.
    """

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    prediction: str = "eps"
    spacing: str = "leading"
    sigma_spacing: str = "schedule"
    steps_offset: int = 1
    final_alpha_one: bool = False
    zero_terminal_snr: bool = False
    final_sigma: str = "zero"
    sampler: str = "pndm"
    order: int | None = None
    lower_order_final: bool = True
    original_steps: int = 50
    steps: int | None = None
    guidance: float | None = None
    timesteps: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _require_one_of("prediction type", self.prediction, PREDICTIONS)
        _require_one_of("timestep spacing", self.spacing, SPACINGS)
        _require_one_of("sigma spacing", self.sigma_spacing, SIGMA_SPACINGS)
        _require_one_of("beta schedule", self.beta_schedule, BETA_SCHEDULES)
        _require_one_of("final sigma", self.final_sigma, ("zero", "sigma_min"))
        _check_sizes("schedule", self)
        if self.trained_betas:  # the last is 1 where the last latents are all noise
            fit = all(0 <= beta <= 1 for beta in self.trained_betas)
            _require(fit, "trained_betas must lie from 0 to 1")
        else:
            _check_between("beta_start", self.beta_start)
            _check_between("beta_end", self.beta_end)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole checkpoint: its parts and how the prompt reaches the UNet.

    text_layer: which hidden state conditions the UNet: -1 the last, after the final norm; -2 the
    one before the last layer, without the norm (SDXL). Two text encoders are concatenated in width.
    zero_empty_negative: an absent negative prompt becomes zeros (SDXL base), not an encoded "".
    """

    family: str = "sd1"
    text_encoders: tuple[CLIPConfig, ...] = (CLIPConfig(),)
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    text_layer: int = -1
    zero_empty_negative: bool = False

    def __post_init__(self) -> None:
        width = sum(encoder.width for encoder in self.text_encoders)
        _require(
            width == self.unet.context_width,
            f"the UNet expects a context of width {self.unet.context_width}, "
            f"the text encoders give {width}",
        )

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The names of the text encoders' parts, in the order of `text_encoders`."""
        return ("text_encoder", "text_encoder_2")[: len(self.text_encoders)]

    @property
    def inpaints(self) -> bool:
        """Whether the UNet takes (latents, mask, masked picture) side by side: 2 C + 1 channels."""
        return self.unet.in_channels == 2 * self.vae.latent_channels + 1

    @property
    def usual_guidance(self) -> float:
        """The weight of guidance where neither a user nor the checkpoint names one."""
        return 5.0 if self.family.startswith("sdxl") else 7.5

    def guided(self, weight: float) -> bool:
        """Whether the UNet answers twice a step, with the prompt and without, at this guidance.

        UNets with guidance_width are told the weight instead.
        """
        return weight > 1 and not self.unet.guidance_width

    @property
    def default_size(self) -> int:
        """Side in pixels of the pictures the model was trained on."""
        return self.unet.sample_size * self.vae.downscale


SD15 = ModelConfig()

SD21 = ModelConfig(
    family="sd2",
    text_encoders=(CLIPConfig(width=1024, mlp_width=4096, layers=23, heads=16, activation="gelu"),),
    unet=replace(
        SD15.unet,
        sample_size=96,
        heads=(5, 10, 20, 20),
        context_width=1024,
        linear_projection=True,
        upcast_attention=True,
    ),
    vae=replace(SD15.vae, sample_size=768),
    schedule=replace(SD15.schedule, prediction="v", sampler="ddim"),
)

SDXL = ModelConfig(
    family="sdxl",
    text_encoders=(
        CLIPConfig(),
        CLIPConfig(
            width=1280, mlp_width=5120, layers=32, heads=20, activation="gelu", projection=1280
        ),
    ),
    unet=replace(
        SD15.unet,
        sample_size=128,
        widths=(320, 640, 1280),
        depths=(0, 2, 10),
        mid_depth=10,
        heads=(5, 10, 20),
        context_width=2048,
        linear_projection=True,
        pooled_width=1280,
        size_ids=6,
        size_width=256,
    ),
    vae=replace(SD15.vae, sample_size=1024, scale=0.13025, force_upcast=True),
    schedule=replace(SD15.schedule, sampler="euler"),
    text_layer=-2,
    zero_empty_negative=True,
)

# The second stage: SDXL's larger text encoder alone, and a score of beauty for the target size.
SDXL_REFINER = ModelConfig(
    family="sdxl-refiner",
    text_encoders=SDXL.text_encoders[1:],
    unet=replace(
        SDXL.unet,
        widths=(384, 768, 1536, 1536),
        depths=(0, 4, 4, 0),
        mid_depth=4,
        heads=(6, 12, 24, 24),
        context_width=1280,
        size_ids=5,
    ),
    vae=SDXL.vae,
    schedule=SDXL.schedule,
    text_layer=-2,
)


def _few(sampler: str, steps: int, spacing: str = "trailing", **rest: Any) -> dict[str, Any]:
    options = {"sampler": sampler, "steps": steps, "spacing": spacing, "guidance": 0.0}
    return options | {"sigma_spacing": "schedule", "timesteps": None} | rest


# How models distilled to few steps are sampled, as their makers say (the values of ScheduleConfig
# that differ): Luo et al. 2023 (LCM), Sauer et al. 2023 (Turbo), Lin et al. 2024 (Lightning), Ren
# et al. 2024 (Hyper). Folders are told by their configs; single files and LoRAs carry no mark.
FEW_STEPS: dict[str, dict[str, Any]] = {
    "lcm": _few("lcm", 4, "leading", guidance=1.0),
    "sd-turbo": _few("euler", 1, prediction="eps"),
    "sdxl-turbo": _few("euler_a", 1),
    "lightning-1": _few("euler", 1, prediction="x0"),
    **{f"lightning-{n}": _few("euler", n) for n in (2, 4, 8)},
    "hyper-1": _few("lcm", 1, "leading", timesteps=(800.0,)),
    **{f"hyper-{n}": _few("ddim", n) for n in (2, 4, 8)},
}


def sampled_as(config: ModelConfig, preset: str) -> ModelConfig:
    """Return `config` sampled as a row of FEW_STEPS says.

    Raises UsageError for an unknown one, or one that a model which predicts x0 is not for.
    """
    _require_one_of("preset", preset, tuple(FEW_STEPS))
    row = FEW_STEPS[preset]
    if config.schedule.prediction == "x0" and "prediction" not in row:
        raise UsageError(
            f"the model predicts x0, as lightning-1 does, and is none of preset {preset!r}; give "
            "the model that it was made from, or prediction='eps' if it says so wrongly"
        )
    return replace(config, schedule=replace(config.schedule, **row))


PRESETS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "sdxl-refiner": SDXL_REFINER}
