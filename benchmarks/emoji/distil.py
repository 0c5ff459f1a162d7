"""Distil the built-in model into a LoRA that draws in 1 to 4 steps.

    python -m fastsd.benchmarks.emoji.distil --run runs/emoji --to fastsd/builtin/lcm_lora

Latent consistency distillation (Luo et al. 2023, LCM-LoRA): from wherever it stands on the way from
noise to a picture, the student is to name the same picture as from one step further down, where
the teacher, guided, takes it. Runs after `train.py`, against the clock and resumable like it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastsd.benchmarks.emoji.data import drawable
from fastsd.benchmarks.emoji.export import load_drawing
from fastsd.benchmarks.emoji.train import (
    CONFIG,
    MAX_TOKENS,
    Examples,
    Stage,
    noise_levels,
    quick,
    read,
)
from fastsd.models.unet import UNet
from fastsd.tokenizers import CLIPTokenizer

RANK = 8
# What LCM-LoRA changes: every product of the transformers and the resnets.
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
)  # fmt: skip
STRIDE = 50  # timesteps of a teacher's step: 20 make a picture


class LoRALayers(nn.Module):
    """W + up @ down for every target of a UNet whose weights stay as they are."""

    def __init__(self, unet: UNet, rank: int) -> None:
        super().__init__()
        self._weights = {
            name: weight.flatten(1)
            for name, weight in unet.named_parameters()
            if name.removesuffix(".weight").endswith(TARGETS) and weight.dim() > 1
        }
        self._shapes = {name: weight.shape for name, weight in unet.named_parameters()}
        self.down = nn.ParameterList(
            [
                nn.init.kaiming_uniform_(w.new_empty(rank, w.shape[1]))
                for w in self._weights.values()
            ]
        )
        self.up = nn.ParameterList([w.new_zeros(w.shape[0], rank) for w in self._weights.values()])

    def weights(self, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Target's name -> its changed weight; `values` instead of the own parameters, by name."""
        own = dict(self.named_parameters()) if values is None else values
        return {
            name: (weight + own[f"up.{i}"] @ own[f"down.{i}"]).view(self._shapes[name])
            for i, (name, weight) in enumerate(self._weights.items())
        }

    def file(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter as PEFT and diffusers name it, fp16; convolutions' parts are convolutions."""
        tensors = {}
        for i, name in enumerate(self._weights):
            up, down, shape = values[f"up.{i}"], values[f"down.{i}"], self._shapes[name]
            key = f"unet.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = down.view(-1, *shape[1:]).half().contiguous()
            ones = (1,) * (len(shape) - 2)
            tensors[f"{key}.lora_B.weight"] = up.view(*up.shape, *ones).half().contiguous()
        return tensors


class Standard(nn.Module):
    """A UNet under the standard interface, for torch.func.functional_call."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """As UNet.standard."""
        return self.unet.standard(x, t, states)


def distil(
    unet: UNet,
    examples: Examples,
    latents: Tensor,
    states: Tensor,
    path: Path,
    *,
    minutes: float,
    batch: int,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the adapter's tensors. states: (captions, N, D), what the text encoder says of each.

    With v-prediction x0 = alpha x - sigma v; the teacher steps by DDIM from t to t - STRIDE, at the
    guidance weight that the model is drawn at; the moving average names the picture from there.
    """
    torch.manual_seed(0)
    unet = unet.to(device).requires_grad_(False)
    model = Standard(unet)
    layers = LoRALayers(unet, RANK).to(device)
    stage = Stage(layers, path, minutes=minutes, peak=1e-3, decay=0.0, keep=0.98)
    generator.manual_seed(1 + stage.step)
    last = CONFIG.schedule.train_steps - 1
    empty = states[-1:].float()
    guidance = CONFIG.schedule.guidance or 1.0

    def clean(x: Tensor, t: Tensor, text: Tensor, weights: dict[str, Tensor]) -> Tensor:
        named = {f"unet.{name}": weight for name, weight in weights.items()}
        with quick(device):
            v: Tensor = torch.func.functional_call(
                model, named, (x.to(device), t.to(device), text.to(device))
            )
        alpha, sigma = noise_levels(t)
        return alpha * x - sigma * v.float().cpu()

    def losses() -> Tensor:
        which, rows = examples.draw(batch, dropout=0.0)
        x0 = latents[which]
        text = states[rows].float()
        t = torch.randint(1, last + 1, (batch,), generator=generator)
        t[: batch // 4] = last  # where every picture starts, and one step ends
        alpha, sigma = noise_levels(t)
        x = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
        below = (t - STRIDE).clamp(min=0)
        with torch.no_grad():
            both = clean(
                torch.cat([x, x]),
                torch.cat([t, t]),
                torch.cat([empty.expand_as(text), text]),
                {},
            )
            plain, asked = both.chunk(2)
            target = plain + guidance * (asked - plain)
            noise = (x - alpha * target) / sigma
            alpha_below, sigma_below = noise_levels(below)
            x_below = alpha_below * target + sigma_below * noise
            named = clean(x_below, below, text, layers.weights(stage.average))
            target = torch.where((below == 0)[:, None, None, None], x_below, named)
        own = clean(x, t, text, layers.weights())
        return F.huber_loss(own, target, delta=0.1)

    stage.run(losses)
    return layers.file(stage.average)


def main() -> None:
    """Train, and write the adapter as diffusers' `load_lora_weights` finds it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="train.py's folder")
    parser.add_argument("--to", type=Path, default=Path("fastsd/builtin/lcm_lora"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--first", type=int, help="as train.py was given")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    run: Path = arguments.run
    emojis, _ = drawable(arguments.first)
    tokenizer = CLIPTokenizer.from_folder(run / "tokenizer")
    generator = torch.Generator()
    examples = Examples(emojis, lambda texts: tokenizer(texts, MAX_TOKENS).ids, generator)
    text_encoder, unet = load_drawing(run)
    tensors = distil(
        unet,
        examples,
        torch.load(run / "latents.pt", weights_only=True)["latents"],
        read(text_encoder.to(device), examples.ids, device),
        run / "lora-state.pt",
        minutes=arguments.minutes,
        batch=arguments.batch,
        device=device,
        generator=generator,
    )
    arguments.to.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.to / "pytorch_lora_weights.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
