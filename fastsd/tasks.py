"""What a task prepares for the one loop: latents, mask, noise and denoiser; and the decoding.

A task is what is given: nothing (text to image), a picture (image to image), a picture and a mask
(inpainting; outpainting masks what it adds). A variation is image to image under another seed.
Knows the parts' contract (backends/base.py); knows no text, file, vendor or sampler's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastsd.backends import Backend
from fastsd.backends.base import Part
from fastsd.conditioning import Conditioning
from fastsd.config import ModelConfig
from fastsd.engine import Denoiser, Known
from fastsd.images import to_uint8
from fastsd.samplers import StepTable
from fastsd.sources import Source, to_latent_size


@dataclass(frozen=True)
class UNetPredict:
    """The UNet as the loop calls it. fixed: the tensors of what `unet_context` made, then `extra`.

    form: how they make up kv.
    extra: channels that an inpainting UNet reads beside x are the last of `fixed`, (B, E, h, w).
    one_at_a_time: run each picture by itself (one guidance pair), so that its bits do not depend on
    the batch.
    """

    unet: Part
    dtype: torch.dtype
    form: TreeSpec = field(hash=False)
    extra: bool = False
    one_at_a_time: bool = False

    def __call__(self, x: Tensor, row: Tensor, fixed: Sequence[Tensor]) -> Tensor:
        """x: (B, C, h, w), row: (R, E), R of 1, B or 2 B. Returns (B, C, h, w), or kv's 2 B."""
        if self.one_at_a_time and len(x) > 1:
            single, batch = replace(self, one_at_a_time=False), len(x)
            return _regroup(
                single(x[i : i + 1], row[i::batch], tuple(t[i::batch] for t in fixed))
                for i in range(batch)
            )
        x, kv = self.inputs(x, fixed)
        prediction: Tensor = self.unet(x, row, kv)
        return prediction

    def inputs(self, x: Tensor, fixed: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Return x and kv as the UNet takes them."""
        if self.extra:
            *fixed, extra = fixed
            x = torch.cat([x, extra.to(x.dtype)], dim=1)
        return x.to(self.dtype), tree_unflatten(fixed, self.form)


def reused(steps: int, interval: int) -> tuple[bool, ...]:
    """Say which of a run's steps use again what the UNet's deeper layers made at the step before.

    The first fifth, which decides what is drawn, and from there on every interval-th compute all.
    """
    first = -(-steps // 5)
    return tuple(i > first and (i - first) % interval != 0 for i in range(steps))


class Deep:
    """What the UNet's deeper layers made at the last step that ran them, for one run or one graph.

    in_place: keep it at one address, as what is captured reads it there.
    """

    def __init__(self, *, in_place: bool) -> None:
        self._in_place = in_place
        self.features: Tensor | None = None

    def keep(self, features: Tensor) -> None:
        """Forget what was kept before."""
        if self._in_place and self.features is not None:
            self.features.copy_(features)
        else:
            self.features = features.clone() if self._in_place else features


@dataclass(frozen=True)
class CachedPredict:
    """Predict as `plain` does, whose UNet is `unet_deep`, and keep what the deeper layers made.

    shallow: its UNet is `unet_shallow`, the outer layers, which take what was kept (Ma et al. 2023,
    arXiv:2312.00858), and the prediction is a near one.
    """

    plain: UNetPredict
    deep: Deep = field(compare=False)
    shallow: bool = False

    def __call__(self, x: Tensor, row: Tensor, fixed: Sequence[Tensor]) -> Tensor:
        """Take and return what `UNetPredict` does."""
        x, kv = self.plain.inputs(x, fixed)
        prediction: Tensor
        if self.shallow:
            prediction = self.plain.unet(x, row, kv, self.deep.features)
        else:
            prediction, features = self.plain.unet(x, row, kv)
            self.deep.keep(features)
        return prediction


def bind_denoiser(
    backend: Backend,
    config: ModelConfig,
    timesteps: Tensor,
    conditioning: Conditioning,
    *,
    guided: bool,
    guidance: float,
    extra: Tensor | None = None,
    one_at_a_time: bool = False,
    cache_interval: int = 1,
) -> Denoiser:
    """Bind the UNet to a prompt and a schedule: all that does not depend on x is computed here,
    once.

    timesteps: (S,), one a row of the table. guidance: what distilled UNets are told; others ignore
    it. extra, one_at_a_time: as `UNetPredict` has them. cache_interval: as `reused` has it.
    """
    batch = len(conditioning) // (2 if guided else 1)
    if one_at_a_time and batch > 1:
        singles = [
            bind_denoiser(
                backend,
                config,
                timesteps,
                conditioning.map(lambda t, i=i: t[i::batch]),  # type: ignore[misc]
                guided=guided,
                guidance=guidance,
            )
            for i in range(batch)
        ]
        rows = torch.stack([single.rows for single in singles], dim=2).flatten(1, 2)
        fixed = tuple(
            torch.stack(tensors, dim=1).flatten(0, 1)
            for tensors in zip(*(single.fixed for single in singles), strict=True)
        )
        first = singles[0].predict
        assert isinstance(first, UNetPredict)
        predict = replace(first, extra=extra is not None, one_at_a_time=True)
        return Denoiser(predict, rows, fixed if extra is None else (*fixed, extra))

    guidance_input = None
    if config.unet.guidance_width:  # as LCM (Luo et al. 2023) embeds it: w - 1
        guidance_input = torch.full((len(conditioning),), guidance - 1.0, device=backend.device)
    conditioning = conditioning.map(lambda t: t.to(backend.device))
    rows = backend.part("unet_time")(
        timesteps.to(backend.device, torch.float32),
        conditioning.pooled,
        conditioning.size_ids,
        guidance_input,
    )
    kv = backend.part("unet_context")(conditioning.context.to(backend.dtype))
    leaves, form = tree_flatten(kv)
    fixed = (*leaves, *([] if extra is None else [extra]))
    plain = UNetPredict(backend.part("unet"), backend.dtype, form, extra is not None)
    if cache_interval == 1:
        return Denoiser(plain, rows, fixed)
    deep = Deep(in_place=backend.captures)
    return Denoiser(
        CachedPredict(replace(plain, unet=backend.part("unet_deep")), deep),
        rows,
        fixed,
        shallow=CachedPredict(
            replace(plain, unet=backend.part("unet_shallow")), deep, shallow=True
        ),
        reuse=reused(len(timesteps), cache_interval),
    )


def _regroup(predictions: Iterable[Tensor]) -> Tensor:
    """Stack single predictions into a batch: first all unconditional rows, then the others."""
    halves = zip(*(torch.split(prediction, 1) for prediction in predictions), strict=True)
    return torch.cat([row for half in halves for row in half])


@dataclass(frozen=True)
class Noise:
    """Standard normal numbers, drawn from the users' generators in the order in which diffusers
    draws.

    generators: one a picture, each drawing its own (1, C, H, W), so that a picture's noise does not
    depend on its neighbours (a batched draw equals single draws only for multiples of 16 numbers);
    or a single one that draws the batch jointly. shape: (B, C, H, W).
    """

    generators: Sequence[torch.Generator] | torch.Generator
    shape: tuple[int, int, int, int]
    device: torch.device

    def __call__(self, joint: int | None = None) -> Tensor:
        """Draw the next (B, C, H, W), fp32; joint: how many to draw, of a single generator."""
        if isinstance(self.generators, torch.Generator):
            return self._draw(self.generators, (joint or self.shape[0], *self.shape[1:]))
        single = (1, *self.shape[1:])
        return torch.cat([self._draw(generator, single) for generator in self.generators])

    def _draw(self, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        draw = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
        return draw.to(self.device)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the loop starts.

    latents: (B, C, h, w) at the level of the table's first row. known: what is not to be drawn.
    extra: (B, 1 + C, h, w), the mask and the rest of the picture, for a UNet that inpaints.
    """

    latents: Tensor
    known: Known | None = None
    extra: Tensor | None = None


def prepare(
    backend: Backend,
    config: ModelConfig,
    table: StepTable,
    noise: Noise,
    source: Source | None,
    *,
    latents: Tensor | None = None,
    from_noise: bool = True,
    noised: bool = False,
    one_at_a_time: bool = False,
) -> Start:
    """Prepare what a run starts from; random numbers are drawn in diffusers' order.

    latents: (B, C, h, w), standard normal numbers in place of the first drawn.
    from_noise: forget the picture where it is to be drawn; else noise is added to it.
    noised: the picture is latents that another model left at this table's first level.
    """

    def eps() -> Tensor:
        return noise() if latents is None else latents

    if source is None:
        return Start(latents=eps() * table.init_scale)

    batch = noise.shape[0]
    pictures = source.pictures.to(backend.device)
    if source.latent:
        clean = pictures.repeat_interleave(batch // len(pictures), dim=0)
    elif config.inpaints and from_noise:
        clean = None  # the picture comes with `extra`, and only so
    else:
        clean = sample(backend, config, 2 * pictures - 1, noise, one_at_a_time=one_at_a_time)
    if noised:
        assert clean is not None, "the pipeline has checked"
        return Start(latents=clean)
    first = eps()
    if from_noise or clean is None:
        x = first * table.init_scale
    else:
        alpha, sigma = table.levels[0]
        x = alpha * clean + sigma * first
    if source.mask is None:
        return Start(latents=x)
    mask = to_latent_size(source.mask, config.vae.downscale).to(backend.device)
    mask = mask.repeat_interleave(batch // len(mask), dim=0)
    if not config.inpaints:
        if not source.latent and config.vae.blocks is None:
            noise(len(pictures))  # diffusers encodes the rest of the picture here, and drops it
        assert clean is not None
        return Start(latents=x, known=Known(clean, first, mask))
    rest = (2 * pictures - 1) * (source.mask < 0.5).to(pictures)
    rest = sample(backend, config, rest, noise, one_at_a_time=one_at_a_time)
    return Start(latents=x, extra=torch.cat([mask, rest], dim=1))


def sample(
    backend: Backend,
    config: ModelConfig,
    pictures: Tensor,
    noise: Noise,
    *,
    one_at_a_time: bool = False,
) -> Tensor:
    """Encode pictures (P, 3, H, W) in [-1, 1]; sample latents (B, C, h, w), fp32, of what it gives.

    Each of the B pictures draws its own sample, unless a single generator draws them all.
    """
    part: Callable[[Tensor], Tensor] = backend.part("vae_encoder")
    moments = (
        torch.cat([part(single) for single in torch.split(pictures, 1)])
        if one_at_a_time
        else part(pictures)
    )
    mean, log_variance = moments.float().chunk(2, dim=1)
    if config.vae.blocks is None:
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))  # diffusers' limits
        eps = noise(len(pictures))
        repeats = len(eps) // len(mean)
        z = mean.repeat_interleave(repeats, dim=0) + std.repeat_interleave(repeats, dim=0) * eps
    else:  # a tiny autoencoder gives no distribution, and nothing is drawn
        z = mean
    z = z.repeat_interleave(noise.shape[0] // len(z), dim=0)
    return (z - config.vae.shift) * config.vae.scale


@dataclass(frozen=True)
class Decode:
    """Latents to pictures, as the end of a run; equal ones compute the same.

    one_at_a_time: each picture by itself, so that its bits do not depend on the batch.
    tile: decode squares of so many latents, for less memory, and blend them where they overlap.
    Norms and attention then see a tile where they saw the picture, so it is near the same only.
    """

    part: Part
    scale: float
    shift: float
    one_at_a_time: bool = False
    tile: int | None = None

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> pictures (B, 3, H, W), fp32, about [-1, 1]."""
        z = latents / self.scale + self.shift
        with getattr(self.part, "staying", nullcontext)():  # weights that visit, until all is done
            return self._decoded(z)

    def _decoded(self, z: Tensor) -> Tensor:
        if self.tile is not None and max(z.shape[-2:]) > self.tile:
            return torch.cat([self._tiled(single, self.tile) for single in torch.split(z, 1)])
        if self.one_at_a_time:
            z_each = torch.split(z, 1)
            return torch.cat([self.part(single) for single in z_each]).float()
        return self._whole(z)

    def _whole(self, z: Tensor) -> Tensor:
        pictures: Tensor = self.part(z)
        return pictures.float()

    def _tiled(self, z: Tensor, tile: int) -> Tensor:
        """Add up tiles, each weighted by the distance to its border, and divide by the weights."""
        sides = [min(tile, side) for side in z.shape[-2:]]
        total = weights = None
        for top in _tile_starts(z.shape[-2], sides[0]):
            for left in _tile_starts(z.shape[-1], sides[1]):
                picture = self._whole(z[..., top : top + sides[0], left : left + sides[1]])
                factor = picture.shape[-1] // sides[1]
                ramps = [_ramp(n * factor, tile * factor // 4, z.device) for n in sides]
                weight = ramps[0][:, None] * ramps[1]
                if total is None or weights is None:
                    shape = [side * factor for side in z.shape[-2:]]
                    total = picture.new_zeros((1, picture.shape[1], *shape))
                    weights = picture.new_zeros(shape)
                rows = slice(top * factor, top * factor + weight.shape[0])
                columns = slice(left * factor, left * factor + weight.shape[1])
                total[..., rows, columns] += weight * picture
                weights[rows, columns] += weight
        assert total is not None and weights is not None
        return total / weights


@dataclass(frozen=True)
class Finish:
    """The end of a run: latents to pictures in [0, 1], or rounded to uint8 for files.

    Equal ones compute the same, and nothing in it waits for the device: a graph may hold it.
    """

    decode: Decode
    rounded: bool

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) -> pictures (B, 3, H, W) fp32 or (B, H, W, 3) uint8, and a sum () that is
        finite if every value of the decoder's is, which rounding hides."""
        pictures = self.decode(latents)
        total = pictures.sum()
        pictures = (pictures / 2 + 0.5).clamp(0, 1)
        return to_uint8(pictures) if self.rounded else pictures, total


def _tile_starts(side: int, tile: int) -> list[int]:
    """Where tiles begin that cover `side`, evenly, each over a quarter of the next or more."""
    count = 1 + -(-(side - tile) // (tile - tile // 4))
    return [round(i * (side - tile) / max(1, count - 1)) for i in range(count)]


def _ramp(length: int, ramp: int, device: torch.device) -> Tensor:
    """Weights (length,) that rise from a border over `ramp` pixels, and fall to the other."""
    i = torch.arange(length, device=device) + 0.5
    return (torch.minimum(i, length - i) / ramp).clamp(max=1.0)


def bind_decoder(
    backend: Backend, config: ModelConfig, *, one_at_a_time: bool = False, tile: int | None = None
) -> Decode:
    """Bind the VAE's decoder and the latents' scale."""
    part, vae = backend.part("vae_decoder"), config.vae
    return Decode(part, vae.scale, vae.shift, one_at_a_time, tile)
