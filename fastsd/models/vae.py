"""The autoencoder between pictures and latents (AutoencoderKL; Rombach et al. 2022).

Parameter names are the diffusers layout's. Scaling the latents is the caller's work. Knows no file.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from fastsd.config import VAEConfig
from fastsd.kernels.attention import attention
from fastsd.models.layers import (
    Downsample,
    GroupNorm,
    Level,
    Resnet,
    Upsample,
    to_pixels,
    to_tokens,
)

FP16_VAE_SCALE = 2.0**-5  # activations of up to 2 million fit in fp16


@final
class PixelAttention(nn.Module):
    """Self-attention of one head over all pixels, after a norm, added to x.

    implementation: which kernel attends, as `fastsd.kernels.dispatch` has them.
    """

    def __init__(self, width: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.implementation = "sdpa"
        self.group_norm = GroupNorm(groups, width, eps=eps)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, _: Any = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); there is no text to attend to."""
        h = to_tokens(self.group_norm(x)).unsqueeze(1)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        h = attention(q, k, v, implementation=self.implementation).squeeze(1)
        return x + to_pixels(self.to_out[0](h), x.shape[-2:])  # x first: the sum takes its format


def _resnets(config: VAEConfig, in_width: int, width: int, count: int) -> list[Resnet]:
    widths = [in_width] + [width] * count
    return [
        Resnet(a, b, groups=config.norm_groups, eps=config.eps)
        for a, b in zip(widths[:-1], widths[1:], strict=True)
    ]


def _middle(config: VAEConfig) -> Level:
    width = config.widths[-1]
    attentions = (
        [PixelAttention(width, groups=config.norm_groups, eps=config.eps)]
        if config.mid_attention
        else []
    )
    return Level(_resnets(config, width, width, 2), attentions)


@final
class Encoder(nn.Module):
    """A picture to the mean and log-variance of its latents, before `quant_conv`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, deepest = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                _resnets(config, widths[max(i - 1, 0)], width, config.layers_per_level),
                sampler=Downsample(width, one_sided=True) if i < deepest else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = _middle(config)
        self.conv_norm_out = GroupNorm(config.norm_groups, widths[-1], eps=config.eps, silu=True)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2 C, h, w)."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(self.conv_norm_out(x))
        return out


@final
class Decoder(nn.Module):
    """Latents to a picture, after `post_quant_conv`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]  # from the coarsest
        finest = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _middle(config)
        self.up_blocks = nn.ModuleList(
            Level(
                _resnets(config, widths[max(i - 1, 0)], width, config.layers_per_level + 1),
                sampler=Upsample(width) if i < finest else None,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(config.norm_groups, widths[-1], eps=config.eps, silu=True)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W)."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        out: Tensor = self.conv_out(self.conv_norm_out(x))
        return out


def overflows_fp16(vae: VAE) -> bool:
    """Whether it is in fp16, and goes beyond that between its norms."""
    return vae.config.force_upcast and vae.dtype == torch.float16


def fit_fp16_(vae: VAE) -> None:
    """Bring what overflows fp16 into its range.

    diffusers upcasts such a VAE to fp32, which takes twice the time and memory; bf16 has the range
    and an eighth of the precision. This has both.
    """
    if overflows_fp16(vae):
        scale_activations_(vae.decoder, FP16_VAE_SCALE)
        scale_activations_(vae.encoder, FP16_VAE_SCALE)


def scale_activations_(model: Encoder | Decoder, factor: float) -> None:
    """Make all that lies between norms `factor` times as large, and leave the result as it is.

    SDXL's decoder goes beyond fp16's 65504 between its norms. Each of them divides by the spread of
    what it is given, so that may have any size, if eps (a variance) goes with it. What comes from a
    norm is scaled by weight and bias of the layer that it goes through; what has been scaled before
    needs the bias only. With a power of two no bit of an fp32 result changes.
    """
    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.eps *= factor * factor
        elif isinstance(module, Resnet):
            _scale_(module.conv1, factor)
            _scale_(module.conv2, factor)
            if module.conv_shortcut is not None:
                _scale_(module.conv_shortcut, factor, weight=False)
        elif isinstance(module, PixelAttention):
            _scale_(module.to_out[0], factor)
        elif isinstance(module, (Downsample, Upsample)):
            _scale_(module.conv, factor, weight=False)
    _scale_(model.conv_in, factor)


def _scale_(layer: nn.Module, factor: float, *, weight: bool = True) -> None:
    """Replace the layer's parameters: others may hold the same tensors."""
    for name in ("weight", "bias") if weight else ("bias",):
        scaled = getattr(layer, name).detach() * factor
        setattr(layer, name, nn.Parameter(scaled, requires_grad=False))


@final
class VAE(nn.Module):
    """Encoder and decoder, with the 1x1 convolutions between them where the checkpoint has them."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.post_quant_conv else None

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.decoder.conv_in.weight.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W) in [-1, 1] to means, then log-variances (B, 2 C, h, w)."""
        moments: Tensor = self.encoder(x)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, C, h, w), unscaled, to pictures (B, 3, H, W), about [-1, 1]."""
        picture: Tensor = self.decoder(
            z if self.post_quant_conv is None else self.post_quant_conv(z)
        )
        return picture
