"""The tiny autoencoder (TAESD, Bohan 2023): convolutions alone, a twentieth of a VAE's work.

It works on latents as the UNet has them, without a scale. Parameter names are the diffusers
layout's AutoencoderTiny. Knows no file.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.config import VAEConfig
from fastsd.errors import UsageError

NO_VARIANCE = -30.0  # log-variance of what is certain, the least that matters


@final
class Block(nn.Module):
    """relu(x + three convolutions of x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return F.relu(self.conv(x) + x)


@final
class Side(nn.Module):
    """The encoder or the decoder: layers in a row, numbered through."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        out: Tensor = self.layers(x)
        return out


def _encoder(config: VAEConfig, blocks: tuple[int, ...]) -> Side:
    width = config.widths[0]
    layers: list[nn.Module] = [nn.Conv2d(config.in_channels, width, 3, padding=1)]
    for level, count in enumerate(blocks):
        if level:
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
        layers += [Block(width) for _ in range(count)]
    return Side([*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1)])


def _decoder(config: VAEConfig, blocks: tuple[int, ...]) -> Side:
    width = config.widths[0]
    layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
    for level, count in reversed([*enumerate(blocks)]):
        layers += [Block(width) for _ in range(count)]
        if level:
            layers.append(nn.Upsample(scale_factor=2))
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
    return Side([*layers, nn.Conv2d(width, config.out_channels, 3, padding=1)])


@final
class TinyVAE(nn.Module):
    """Encoder and decoder under the interface of models.vae.VAE."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        if config.blocks is None:
            raise UsageError("this config is an AutoencoderKL's; build models.vae.VAE from it")
        self.config = config
        self.encoder = _encoder(config, config.blocks)
        self.decoder = _decoder(config, config.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.decoder.layers[0].weight.dtype  # type: ignore[return-value]

    def encode(self, x: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W) in [-1, 1] to latents, then no variance: (B, 2 C, h, w)."""
        z = self.encoder((x + 1) / 2)
        return torch.cat([z, torch.full_like(z, NO_VARIANCE)], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to pictures (B, 3, H, W), about [-1, 1]."""
        picture: Tensor = self.decoder(3 * torch.tanh(z / 3))
        return 2 * picture - 1
