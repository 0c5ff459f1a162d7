"""The exact path: the model definitions run by torch as they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast, final

import torch

from fastsd.backends import cuda_graph
from fastsd.backends.base import Backend, Part, Shapes, dtype_of
from fastsd.errors import UsageError
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE, scale_activations_

if TYPE_CHECKING:
    from fastsd.checkpoints import Checkpoint


FP16_VAE_SCALE = 2.0**-5  # activations of up to 2 million fit in fp16


@final
class EagerBackend(Backend):
    """Run every part with torch, kernel by kernel."""

    name = "eager"
    precisions = ("fp32", "fp16", "bf16")

    def __init__(self, checkpoint: Checkpoint, *, precision: str, device: torch.device) -> None:
        self.precision = precision
        self.device = device
        self.dtype = dtype_of(precision, self.precisions, self.name)
        modules = {name: checkpoint.load(name, self.dtype, device) for name in checkpoint.parts}
        if device.type == "cuda":  # the CPU's own convolutions measured slower channels-last
            for name in ("unet", "vae"):
                modules[name].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.modules = modules  # what calibration watches and adapters change
        unet, vae = cast(UNet, modules["unet"]), cast(VAE, modules["vae"])
        if precision == "fp16" and checkpoint.config.vae.force_upcast:
            # fp16 overflows in such a VAE. diffusers upcasts it to fp32, which takes twice the time
            # and memory; bf16 has the range and an eighth of the precision. This has both.
            scale_activations_(vae.decoder, FP16_VAE_SCALE)
            scale_activations_(vae.encoder, FP16_VAE_SCALE)
        texts = {
            name: cast(CLIPText, module)
            for name, module in modules.items()
            if name.startswith("text_")
        }
        self._parts: dict[str, Part] = {
            **texts,
            **{f"{name}_norm": text.final_layer_norm for name, text in texts.items()},
            "unet": unet,
            "unet_time": unet.time_rows,
            "unet_context": unet.context,
            "vae_decoder": lambda z: vae.decode(z.to(vae.dtype)),
            "vae_encoder": lambda picture: vae.encode(picture.to(vae.dtype)),
        }

    @property
    def captures(self) -> bool:
        """On a GPU, steps are CUDA graphs."""
        return self.device.type == "cuda"

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return a CUDA graph's replay, or on the CPU `step` itself."""
        return cuda_graph.capture(step, self.device) if self.captures else step

    def memory_bytes(self) -> int:
        """What torch holds of the GPU, graphs' own memory included."""
        return torch.cuda.memory_reserved(self.device) if self.captures else 0

    def part(self, name: str, shapes: Shapes | None = None) -> Part:
        """Return the part; torch takes any shape."""
        try:
            return self._parts[name]
        except KeyError:
            raise UsageError(
                f"this checkpoint has no part {name!r}; it has {', '.join(self._parts)}"
            ) from None

    def weights(self, part: str) -> Mapping[str, torch.Tensor]:
        """Return the modules' own parameters: what is written to them is used at once."""
        if part not in self.modules:
            raise UsageError(f"the model has no {part}; it has {', '.join(self.modules)}")
        return dict(self.modules[part].named_parameters())
