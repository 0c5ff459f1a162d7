"""What a task prepares for the one loop: conditioning, noise, a denoiser; and the decoding after
it.

Knows the parts' contract (backends/base.py) and the families' conventions for prompts; knows no
file, no vendor and no sampler's name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastsd.backends import Backend
from fastsd.backends.base import Part
from fastsd.config import ModelConfig
from fastsd.engine import Denoiser
from fastsd.errors import UsageError
from fastsd.tokenizers import CLIPTokenizer

log = logging.getLogger("fastsd")

MAX_PROMPT_CHARACTERS = 32_000
Texts = str | Sequence[str]


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told of a batch of pictures; all that does not depend on x or the row.

    context: (B, N, C), what cross-attention reads. pooled: (B, P) and size_ids: (B, 6), or None
    outside SDXL. Under guidance the batch is doubled, the unconditional half first.
    """

    context: Tensor
    pooled: Tensor | None = None
    size_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context)

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply `change` to every tensor present."""
        return Conditioning(
            change(self.context),
            None if self.pooled is None else change(self.pooled),
            None if self.size_ids is None else change(self.size_ids),
        )

    def join(self, other: Conditioning) -> Conditioning:
        """Stack the rows of `other` below these."""

        def stack(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b])

        return Conditioning(
            torch.cat([self.context, other.context]),
            stack(self.pooled, other.pooled),
            stack(self.size_ids, other.size_ids),
        )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """SDXL's size conditioning, pixels, height first; None takes the picture's own size."""

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None

    def ids(self, size: tuple[int, int], batch: int, device: torch.device) -> Tensor:
        """The (B, 6) numbers for pictures of `size`."""
        row = (*(self.original or size), *self.crop, *(self.target or size))
        return torch.tensor(row, dtype=torch.float32, device=device).repeat(batch, 1)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The texts of one call, or the embeddings given in their place, as users give them."""

    prompt: Texts | None = None
    prompt_2: Texts | None = None
    negative_prompt: Texts | None = None
    negative_prompt_2: Texts | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise UsageError("give either prompt or prompt_embeds, and not both")
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise UsageError("give either negative_prompt or negative_prompt_embeds, not both")
        if self.prompt is not None and not self.texts:
            raise UsageError("the list of prompts is empty; give at least one prompt")
        for texts in (self.prompt, self.prompt_2, self.negative_prompt, self.negative_prompt_2):
            _check_texts(_listed(texts))

    @property
    def texts(self) -> list[str]:
        """The prompts, one a row; empty where embeddings were given."""
        return _listed(self.prompt)

    @property
    def batch(self) -> int:
        """How many rows were asked for."""
        return len(self.texts) if self.prompt_embeds is None else len(self.prompt_embeds)

    def row(self, row: int) -> dict[str, str | None]:
        """The texts of one row by their argument's name, None where none was given."""
        given = {
            "prompt": _listed(self.prompt),
            "prompt_2": _listed(self.prompt_2),
            "negative_prompt": _listed(self.negative_prompt),
            "negative_prompt_2": _listed(self.negative_prompt_2),
        }
        return {name: texts[row % len(texts)] if texts else None for name, texts in given.items()}

    def conditioning(
        self, encode: Callable[[Sequence[Texts]], Conditioning], *, guided: bool, zero_empty: bool
    ) -> Conditioning:
        """Encode the texts: (B, …), or under guidance (2 B, …) with the unconditional half first.

        zero_empty: an absent negative prompt is zeros, not an encoded "".
        """
        if self.prompt_embeds is None:
            positive = encode([self.texts, _listed(self.prompt_2) or self.texts])
        else:
            positive = Conditioning(self.prompt_embeds, self.pooled_prompt_embeds)
        if not guided:
            return positive
        return self._negative(encode, positive, zero_empty).join(positive)

    def _negative(
        self,
        encode: Callable[[Sequence[Texts]], Conditioning],
        positive: Conditioning,
        zero_empty: bool,
    ) -> Conditioning:
        if self.negative_prompt_embeds is not None:
            negative = Conditioning(self.negative_prompt_embeds, self.negative_pooled_prompt_embeds)
        elif self.negative_prompt is None and zero_empty:
            return positive.map(torch.zeros_like)
        else:
            texts = _spread(_listed(self.negative_prompt) or [""], self.batch, "negative_prompt")
            texts_2 = _spread(
                _listed(self.negative_prompt_2) or texts, self.batch, "negative_prompt_2"
            )
            negative = encode([texts, texts_2])
        if negative.context.shape != positive.context.shape:
            raise UsageError(
                f"the negative embedding has shape {tuple(negative.context.shape)}, the positive "
                f"one {tuple(positive.context.shape)}; they must be alike"
            )
        return negative


def _listed(texts: Texts | None) -> list[str]:
    if texts is None:
        return []
    if not isinstance(texts, Sequence):
        raise UsageError(
            f"a prompt must be a string or a list of strings, not {type(texts).__name__}"
        )
    return [texts] if isinstance(texts, str) else list(texts)


def _spread(texts: list[str], batch: int, what: str) -> list[str]:
    if len(texts) not in (1, batch):
        raise UsageError(
            f"{what} has {len(texts)} texts for {batch} prompts; give one, or one each"
        )
    return texts * (batch // len(texts))


def _check_texts(texts: Sequence[str]) -> None:
    """Refuse what no tokenizer should see; lone surrogates are the tokenizer's to refuse."""
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(
                f"a prompt must be a string, not {type(text).__name__}; "
                "give a string or a list of strings"
            )
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise UsageError(
                f"the prompt has {len(text)} characters, at most {MAX_PROMPT_CHARACTERS} "
                "are taken; "
                "shorten it (a text encoder reads 77 tokens)"
            )


def encode(
    backend: Backend,
    config: ModelConfig,
    tokenizers: Sequence[CLIPTokenizer],
    texts: Sequence[Texts],
    *,
    one_at_a_time: bool = False,
) -> Conditioning:
    """Encode one list of texts for each text encoder; their contexts stand side by side in width.

    A text beyond the encoder's tokens is cut, and what was cut off is logged.
    """
    if one_at_a_time:
        singles = [
            encode(backend, config, tokenizers, [[text] for text in row])
            for row in zip(*texts, strict=True)
        ]
        joined = singles[0]
        for single in singles[1:]:
            joined = joined.join(single)
        return joined

    contexts, pooled = [], None
    for index, text_config in enumerate(config.text_encoders):
        tokens = tokenizers[index](list(texts[index]), text_config.max_tokens)
        for overflow in tokens.overflow:
            if overflow:
                log.warning(
                    "the prompt is longer than %d tokens; this was cut off: %s",
                    text_config.max_tokens - 2,
                    overflow,
                )
        part = "text_encoder" if index == 0 else f"text_encoder_{index + 1}"
        output = backend.part(part)(torch.from_numpy(tokens.ids).to(backend.device))
        contexts.append(
            output.last if config.text_layer == -1 else output.hidden[config.text_layer]
        )
        pooled = output.embeds
    return Conditioning(torch.cat(contexts, dim=-1), pooled if config.unet.pooled_width else None)


@dataclass(frozen=True)
class Predict:
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
        """x: (B, C, h, w), row: (B, 2 B or 1, E). Returns (B, C, h, w), or kv's 2 B."""
        if self.one_at_a_time and len(x) > 1:
            single, batch = replace(self, one_at_a_time=False), len(x)
            return _regroup(
                single(x[i : i + 1], row[i::batch], tuple(t[i::batch] for t in fixed))
                for i in range(batch)
            )
        if self.extra:
            *fixed, extra = fixed
            x = torch.cat([x, extra.to(x.dtype)], dim=1)
        kv = tree_unflatten(fixed, self.form)
        prediction: Tensor = self.unet(x.to(self.dtype), row, kv)
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
) -> Denoiser:
    """Bind the UNet to a prompt and a schedule: all that does not depend on x is computed here,
    once.

    timesteps: (S,), one a row of the table. guidance: what distilled UNets are told; others ignore
    it. extra, one_at_a_time: as `Predict` has them.
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
        assert isinstance(first, Predict)
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
    predict = Predict(backend.part("unet"), backend.dtype, form, extra is not None)
    return Denoiser(predict, rows, (*leaves, *([] if extra is None else [extra])))


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

    def __call__(self) -> Tensor:
        """Draw the next (B, C, H, W), fp32."""
        if isinstance(self.generators, torch.Generator):
            return self._draw(self.generators, self.shape)
        single = (1, *self.shape[1:])
        return torch.cat([self._draw(generator, single) for generator in self.generators])

    def _draw(self, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        draw = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
        return draw.to(self.device)


def decode(
    backend: Backend, config: ModelConfig, latents: Tensor, *, one_at_a_time: bool = False
) -> Tensor:
    """Decode latents (B, C, h, w) to pictures (B, 3, H, W), fp32, about [-1, 1]."""
    z = latents / config.vae.scale + config.vae.shift
    part: Callable[[Tensor], Tensor] = backend.part("vae_decoder")
    pictures = (
        torch.cat([part(single) for single in torch.split(z, 1)]) if one_at_a_time else part(z)
    )
    return pictures.float()
