"""The exact path: the model definitions run by torch as they stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, final

import torch

from fastsd.backends.base import Backend, Part, Shapes, dtype_of
from fastsd.errors import UsageError
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE

if TYPE_CHECKING:
    from fastsd.checkpoints import Checkpoint


@final
class EagerBackend(Backend):
    """Run every part with torch, kernel by kernel."""

    name = "eager"
    precisions = ("fp32", "fp16", "bf16")

    def __init__(self, checkpoint: Checkpoint, *, precision: str, device: torch.device) -> None:
        self.precision = precision
        self.device = device
        self.dtype = dtype_of(precision, self.precisions, self.name)
        # fp16 overflows in VAEs whose config says so; they stay in fp32, as in diffusers.
        upcast_vae = precision == "fp16" and checkpoint.config.vae.force_upcast
        modules = {
            name: checkpoint.load(
                name, torch.float32 if upcast_vae and name == "vae" else self.dtype, device
            )
            for name in checkpoint.parts
        }
        if device.type == "cuda":  # the CPU's own convolutions measured slower channels-last
            for name in ("unet", "vae"):
                modules[name].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        unet, vae = cast(UNet, modules["unet"]), cast(VAE, modules["vae"])
        self._parts: dict[str, Part] = {
            **{name: module for name, module in modules.items() if name.startswith("text_")},
            "unet": unet,
            "unet_time": unet.time_rows,
            "unet_context": unet.context,
            "vae_decoder": lambda z: vae.decode(z.to(vae.dtype)),
            "vae_encoder": lambda picture: vae.encode(picture.to(vae.dtype)),
        }

    def part(self, name: str, shapes: Shapes | None = None) -> Part:
        """Return the part; torch takes any shape."""
        try:
            return self._parts[name]
        except KeyError:
            raise UsageError(
                f"this checkpoint has no part {name!r}; it has {', '.join(self._parts)}"
            ) from None
