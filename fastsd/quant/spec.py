"""What is quantised, as plain frozen values: the layers, by role, and how each one's input rounds.

A rounding serves every number format: uint8 with a zero point (oneDNN, ONNX Runtime), int8 around
zero (TensorRT), fp8. Weights need no entry: how they are rounded follows from themselves and the
exponents alone. Knows no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from fastsd.errors import UsageError

# role -> the layers that play it, by name in the diffusers layout. The first match counts.
ROLES: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        role: re.compile(rf"(^|\.)({pattern})$")
        for role, pattern in {
            "edge": r"conv_in|conv_out|quant_conv|post_quant_conv",
            "time": r"time_emb_proj|(time|add)_embedding\.(linear_[12]|cond_proj)",
            "text": r"attn2\.to_[kv]",
            "pixel attention": r"attentions\.\d+\.(to_[qkv]|to_out\.0)",
            "resnet": r"conv[12]",
            "shortcut": r"conv_shortcut",
            "sampler": r"(down|up)samplers\.\d+\.(conv|phases)",
            "projection": r"proj_in|proj_out",
            "self-attention in": r"attn1\.to_[qkv]",
            "cross-attention in": r"attn2\.to_q",
            "attention out": r"to_out\.0",
            "feed-forward in": r"ff\.net\.0\.proj",
            "feed-forward out": r"ff\.net\.2",
        }.items()
    }
)
# The one rule, for every model. Edges see the latents and the picture themselves; time and text are
# computed once a schedule and once a prompt, so that nothing is won there. Shortcuts and samplers
# read the sum that runs through the whole network, with no norm before them: a few channels are far
# larger than the rest, and eight bits over all of them lose the rest. On the built-in model they
# alone cost more than all other layers together.
ROUNDED_ROLES = frozenset(ROLES) - {"edge", "time", "text", "shortcut", "sampler"}
# Nor do the convolutions through which the UNet's last level takes in what was saved on the way
# down: no later level evens out what they round, and guidance multiplies it. They cost the built-in
# model's pictures 4 dB, for 7 % of its products.
_UP_LEVEL = re.compile(r"unet\.up_blocks\.(\d+)\.resnets\.\d+\.conv1")

FORMAT = 3
E4M3 = 448.0  # fp8's largest number
_HEADROOM = 4  # of fp8's ranges: it has 15 binades, and none of them is finer than another


def role(name: str) -> str | None:
    """Return the role of the layer called `name`, e.g. "unet.mid_block.resnets.0.conv1"."""
    return next((key for key, pattern in ROLES.items() if pattern.search(name)), None)


def chosen_to_round(names: Iterable[str]) -> list[str]:
    """Return those of a model's layers, by full name, that the rule rounds."""
    chosen = [name for name in names if role(name) in ROUNDED_ROLES]
    level = {name: int(found[1]) for name in chosen if (found := _UP_LEVEL.fullmatch(name))}
    last = max(level.values(), default=None)
    return [name for name in chosen if level.get(name, -1) != last]


def shares_input(name: str) -> str:
    """Return one word for the layers that one product may take: they round their input alike."""
    return re.sub(r"attn1\.to_[qkv]$", "attn1", name)


@dataclass(frozen=True)
class Rounding:
    """How a layer's input is rounded: channel c over 2**exponents[c], cut to low..high.

    low <= 0 <= high: zero must be exact, as padding is zero. exponents: () for none. Dividing the
    channels by powers of two, and multiplying the weights by them, is exact, and lets channels of
    different sizes share one scale (Xiao et al. 2023, SmoothQuant).
    """

    low: float
    high: float
    exponents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise UsageError(f"a range must be finite, not {self.low} to {self.high}")
        if not self.low <= 0 <= self.high or self.low == self.high:
            raise UsageError(f"a range must hold zero and more, not {self.low} to {self.high}")
        if any(not isinstance(e, int) or abs(e) > 30 for e in self.exponents):
            raise UsageError("the exponents of a rounding must be whole numbers within ±30")

    @classmethod
    def of(cls, low: float, high: float, exponents: tuple[int, ...] = ()) -> Rounding:
        """Widen low..high to hold zero, and to more than a point."""
        return cls(min(low, 0.0), max(high, 0.0, min(low, 0.0) + 1e-6), exponents)

    def affine(self) -> tuple[float, int]:
        """Return (scale, zero point) of uint8: x = scale * (q - zero point), q in 0..255."""
        scale = (self.high - self.low) / 255
        return scale, min(255, max(0, round(-self.low / scale)))

    def symmetric(self, largest: float = 127) -> float:
        """Return the scale of a format around zero: x = scale * q, |q| <= largest."""
        return max(-self.low, self.high) / largest

    def fp8(self) -> float:
        """Return the scale of e4m3, x = scale * q: what is larger than was watched fits as well."""
        return self.symmetric(E4M3 / _HEADROOM)


@dataclass(frozen=True)
class QuantSpec:
    """The layers that are rounded, with their inputs' roundings, and why others are not.

    layers, kept: by full name, e.g. "unet.mid_block.resnets.0.conv1".
    """

    layers: Mapping[str, Rounding]
    kept: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        both = sorted(set(self.layers) & set(self.kept))
        if both:
            raise UsageError(f"layers cannot both be quantised and be kept: {', '.join(both)}")
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(self, "kept", MappingProxyType(dict(self.kept)))

    def keep(self, names: Mapping[str, str]) -> QuantSpec:
        """Return a spec that leaves `names` (layer -> why) in full precision."""
        unknown = sorted(set(names) - set(self.layers))
        if unknown:
            raise UsageError(f"layers are not in this spec: {', '.join(unknown)}")
        layers = {name: rounding for name, rounding in self.layers.items() if name not in names}
        return QuantSpec(layers, {**self.kept, **names})

    def only(self, part: str) -> dict[str, Rounding]:
        """Return the roundings of one part's layers, by their names inside the part."""
        prefix = f"{part}."
        return {
            name.removeprefix(prefix): rounding
            for name, rounding in self.layers.items()
            if name.startswith(prefix)
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "format": FORMAT,
            "layers": {
                name: {**asdict(r), "exponents": list(r.exponents)}
                for name, r in self.layers.items()
            },
            "kept": dict(self.kept),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantSpec:
        """Read what `to_json` wrote. Raises UsageError for anything else."""
        try:
            if data["format"] != FORMAT:
                raise UsageError(
                    f"a quantisation spec of format {data['format']!r} was given, and this version "
                    f"reads format {FORMAT}; calibrate again"
                )
            layers = {
                str(name): Rounding(float(r["low"]), float(r["high"]), tuple(r["exponents"]))
                for name, r in data["layers"].items()
            }
            kept = {str(name): str(why) for name, why in data["kept"].items()}
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UsageError(f"this is no quantisation spec ({error!r}); calibrate again") from None
        return cls(layers, kept)
