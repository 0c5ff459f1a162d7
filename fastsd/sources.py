"""Source: the picture that a call starts from, and where to draw on it.

Owns the checks of image, mask_image, outpaint and mask_feather. Knows no prompt, part or sampler.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastsd.config import ModelConfig
from fastsd.errors import UsageError
from fastsd.images import digest, feathered, to_tensor, widen

log = logging.getLogger("fastsd")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The picture that a call starts from, and where to draw.

    pictures: (P, 3, H, W) in [0, 1], or latents (P, C, h, w); P is 1, or one for each prompt.
    mask: (1 or P, 1, H, W) of 0 (keep) and 1 (draw); None draws everywhere.
    feather: lay the pictures back over what was drawn, outside the mask; None leaves it as drawn.
    """

    pictures: Tensor
    latent: bool = False
    mask: Tensor | None = None
    feather: int | None = None

    @classmethod
    def given(
        cls,
        config: ModelConfig,
        image: Any,
        mask_image: Any = None,
        *,
        outpaint: Sequence[int] | None = None,
        size: tuple[int | None, int | None] = (None, None),
        feather: int | None = None,
    ) -> Source | None:
        """Check what a user gave, as `fastsd.images.to_tensor` takes it, or latents as image.

        size: (H, W) to resize to; None keeps that side, but for what a latent leaves over.
        outpaint: pixels to add on the left, top, right and bottom, in place of a mask.
        feather: pixels, see `keep`; with it nothing is resized unasked.
        Returns None where no image was given. Raises UsageError.
        """
        if image is None:
            needless = {"mask_image": mask_image, "outpaint": outpaint, "mask_feather": feather}
            for name, value in needless.items():
                if value is not None:
                    raise UsageError(f"{name} is for drawing on a picture; give it as image")
            if config.inpaints:
                raise UsageError(
                    "this model inpaints; give image and mask_image, or image and outpaint"
                )
            return None
        source = cls._read(config, image, mask_image, outpaint, size, exact=feather is not None)
        if config.inpaints and (source.mask is None or source.latent):
            raise UsageError(
                "this model inpaints; give mask_image too, or outpaint, and image as a picture, "
                "not latents"
            )
        return source if feather is None else source._feathered(feather, config)

    @classmethod
    def _read(
        cls,
        config: ModelConfig,
        image: Any,
        mask_image: Any,
        outpaint: Sequence[int] | None,
        size: tuple[int | None, int | None],
        *,
        exact: bool,
    ) -> Source:
        """exact: refuse to resize unasked."""
        factor = config.vae.downscale
        if _is_latent(image, config):
            if outpaint is not None:
                raise UsageError("outpaint adds to pictures, and image holds latents; decode them")
            if not bool(torch.isfinite(image).all()):
                raise UsageError("image holds latents with NaN or infinity; draw them again")
            own = (image.shape[-2] * factor, image.shape[-1] * factor)
            if any(asked not in (None, side) for asked, side in zip(size, own, strict=True)):
                raise UsageError(
                    f"image holds latents of {own[1]}x{own[0]} pixels; drop height and width"
                )
            mask = None if mask_image is None else _read_mask(mask_image, own, own, factor)
            return cls(pictures=image.float(), latent=True, mask=mask)

        pictures = to_tensor(image)
        own = (pictures.shape[-2], pictures.shape[-1])
        if outpaint is not None:
            if mask_image is not None or size != (None, None):
                raise UsageError(
                    "outpaint makes the mask and the size from the picture; drop mask_image, "
                    "height and width"
                )
            canvas, mask = widen(pictures, outpaint)
            if canvas.shape[-2] % factor or canvas.shape[-1] % factor:
                raise UsageError(
                    f"image and outpaint make {canvas.shape[-1]}x{canvas.shape[-2]} pixels, and "
                    f"{factor} must divide both sides; add more or fewer"
                )
            return cls(pictures=canvas, mask=mask)
        wanted = _fitting(own, size, factor, exact=exact)
        mask = None if mask_image is None else _read_mask(mask_image, own, wanted, factor)
        if mask is not None and len(mask) not in (1, len(pictures)):
            raise UsageError(
                f"{len(mask)} masks were given for {len(pictures)} pictures; give one, or one each"
            )
        if wanted != own:
            pictures = to_tensor(image, size=wanted)
        return cls(pictures=pictures, mask=mask)

    def _feathered(self, feather: int, config: ModelConfig) -> Source:
        if isinstance(feather, bool) or not isinstance(feather, Integral) or feather < 0:
            raise UsageError(
                f"mask_feather must be a whole number of pixels, 0 or more, not {feather!r}"
            )
        if feather > max(self.size(config)):
            raise UsageError(
                f"mask_feather {feather} is wider than the picture, {max(self.size(config))} "
                "pixels; give fewer"
            )
        if self.mask is None or self.latent:
            raise UsageError(
                "mask_feather keeps a picture's own pixels outside a mask; give mask_image or "
                "outpaint, and image as a picture, not latents"
            )
        return replace(self, feather=int(feather))

    def size(self, config: ModelConfig) -> tuple[int, int]:
        """Height and width in pixels."""
        factor = config.vae.downscale if self.latent else 1
        return self.pictures.shape[-2] * factor, self.pictures.shape[-1] * factor

    def digests(self, row: int, batch: int) -> dict[str, str]:
        """Name the pictures that row `row` of `batch` starts from, as metadata records them."""
        given = {"image_sha256": self.pictures, "mask_sha256": self.mask}
        return {
            name: digest(tensor[row * len(tensor) // batch])
            for name, tensor in given.items()
            if tensor is not None and not self.latent
        }

    def keep(self, drawn: Tensor) -> Tensor:
        """Lay the given pictures over drawn ones (B, 3, H, W) in [0, 1], outside the mask.

        Farther than `feather` pixels from the mask the result is the given picture, bit for bit.
        """
        assert self.mask is not None and self.feather is not None, "nothing is to be kept"
        given, mask = self.pictures.to(drawn), feathered(self.mask, self.feather).to(drawn)
        repeats = len(drawn) // len(given)
        given = given.repeat_interleave(repeats, dim=0)
        mask = mask.repeat_interleave(len(drawn) // len(mask), dim=0)
        return mask * drawn + (1 - mask) * given


def _is_latent(image: Any, config: ModelConfig) -> bool:
    channels = config.vae.latent_channels
    return (
        isinstance(image, Tensor)
        and image.ndim == 4
        and image.shape[1] == channels != config.vae.in_channels
    )


def _fitting(
    own: tuple[int, int], asked: tuple[int | None, int | None], factor: int, *, exact: bool
) -> tuple[int, int]:
    """Return the size to work at: what was asked, or whole latents of what there is."""
    height, width = (a or side // factor * factor for a, side in zip(asked, own, strict=True))
    if min(height, width) < factor:
        raise UsageError(
            f"image has {own[1]}x{own[0]} pixels; it needs {factor} or more on each side"
        )
    if exact and asked == (None, None) and (height, width) != own:
        raise UsageError(
            f"image has {own[1]}x{own[0]} pixels, and {factor} must divide both sides for pixels "
            f"to be kept as they are; crop it, or resize it with width={width}, height={height}"
        )
    if asked == (None, None) and (height, width) != own:
        log.warning(
            "image has %dx%d pixels, and is resized to %dx%d, which %d divides",
            *reversed(own),
            width,
            height,
            factor,
        )
    return height, width


def _read_mask(
    mask_image: Any, own: tuple[int, int], wanted: tuple[int, int], factor: int
) -> Tensor:
    mask = to_tensor(mask_image, what="mask_image", channels=1)
    if tuple(mask.shape[-2:]) != own:
        raise UsageError(
            f"mask_image has {mask.shape[-1]}x{mask.shape[-2]} pixels, image {own[1]}x{own[0]}; "
            "they must be alike"
        )
    if wanted != own:
        mask = to_tensor(mask_image, what="mask_image", channels=1, size=wanted)
    mask = (mask >= 0.5).float()
    if not bool(to_latent_size(mask, factor).any()):
        raise UsageError(
            f"mask_image is black, or its white is smaller than {factor} pixels; white is where "
            "to draw"
        )
    return mask


def to_latent_size(mask: Tensor, factor: int) -> Tensor:
    """Take one pixel of each latent's, as diffusers does: (B, 1, H, W) -> (B, 1, h, w)."""
    return mask[..., ::factor, ::factor]
