"""What the UNet is told of a picture: texts, read by the text encoders, and SDXL's sizes.

Owns the families' conventions for prompts: which layer is read, what an absent negative prompt is,
chunks, weights and learned words. Knows the parts' contract (backends/base.py); knows no picture,
file or vendor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastsd.arguments import described
from fastsd.backends import Backend
from fastsd.checkpoints import Checkpoint, Embedding
from fastsd.config import ModelConfig
from fastsd.engine import Function
from fastsd.errors import UsageError
from fastsd.prompts import Chunk, parse, split
from fastsd.tokenizers import CLIPTokenizer

log = logging.getLogger("fastsd")

MAX_PROMPT_CHARACTERS = 32_000
Texts = str | Sequence[str]


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told of a batch of pictures; all that does not depend on x or the row.

    context: (B, N, C), what cross-attention reads. pooled: (B, P) and size_ids: (B, 6 or 5), or
    None outside SDXL. Under guidance the batch is doubled, the unconditional half first.
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
    """SDXL's size conditioning, pixels, height first; None takes the picture's own size.

    scores: of beauty, for what is wanted and what is not; a refiner is told them, and no target.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    scores: tuple[float, float] = (6.0, 2.5)

    def ids(
        self, config: ModelConfig, size: tuple[int, int], batch: int, *, guided: bool
    ) -> Tensor:
        """The (B, 6) numbers, (B, 5) for a refiner, for pictures of `size`; unconditional first."""
        original = self.original or size
        if config.unet.size_ids == 6:
            row = (*original, *self.crop, *(self.target or size))
            return torch.tensor([row] * batch, dtype=torch.float32)
        wanted = (*original, *self.crop, self.scores[0])
        unwanted = (*original, 0, 0, self.scores[1])  # of a refiner alone, diffusers crops one half
        rows = [unwanted] * (batch // 2) + [wanted] * (batch // 2) if guided else [wanted] * batch
        return torch.tensor(rows, dtype=torch.float32)


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

    def check(self, config: ModelConfig) -> None:
        """Raise UsageError for texts or embeddings that the model does not read."""
        # A refiner is given what its base was, and passes over what it has no encoder for.
        sdxl = config.family.startswith("sdxl")
        for name in ("prompt_2", "negative_prompt_2"):
            if getattr(self, name) is not None and not sdxl:
                raise UsageError(
                    f"{name} is for a second text encoder, and this model has one; drop it, or "
                    f"give it as {name.removesuffix('_2')}"
                )
        context, pooled = ("N", config.unet.context_width), (config.unet.pooled_width,)
        for name, form in {
            "prompt_embeds": context,
            "negative_prompt_embeds": context,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": pooled,
        }.items():
            given, width = getattr(self, name), form[-1]
            if given is None:
                beside = name.replace("pooled_", "")
                if width and getattr(self, beside) is not None:
                    raise UsageError(f"this model reads {name} beside {beside}; give both")
                continue
            if not width:
                raise UsageError(f"this model reads no {name}; drop it")
            if (
                not isinstance(given, Tensor)
                or not given.is_floating_point()
                or given.ndim != 1 + len(form)
                or not given.numel()
                or given.shape[-1] != width
            ):
                raise UsageError(
                    f"{name} must be a torch tensor of floats ({', '.join(map(str, ('B', *form)))})"
                    f", not {described(given)}"
                )
            if len(given) != self.batch:
                raise UsageError(f"{name} has {len(given)} rows for {self.batch} prompts")

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

    def conditioning(self, encoder: TextEncoder, *, guided: bool, zero_empty: bool) -> Conditioning:
        """Encode the texts: (B, …), or under guidance (2 B, …) with the unconditional half first.

        Both halves get as many chunks. zero_empty: an absent negative prompt is zeros, not an
        encoded "".
        """

        def here(embeds: Tensor) -> Tensor:
            return embeds.to(encoder.backend.device)

        encoders = len(encoder.tokenizers)
        texts = [self.texts, self._second()][:encoders]
        negatives = self._negatives()[:encoders]
        zeros = self.negative_prompt is None and zero_empty
        chunks = encoder.held(self.prompt_embeds, self.negative_prompt_embeds)
        if self.prompt_embeds is None:
            chunks = max(chunks, encoder.chunks(texts))
        if guided and self.negative_prompt_embeds is None and not zeros:
            chunks = max(chunks, encoder.chunks(negatives))

        if self.prompt_embeds is not None:
            positive = Conditioning(self.prompt_embeds, self.pooled_prompt_embeds).map(here)
        else:
            positive = encoder(texts, chunks)
        if not guided:
            return positive
        if self.negative_prompt_embeds is not None:
            negative = Conditioning(
                self.negative_prompt_embeds, self.negative_pooled_prompt_embeds
            ).map(here)
        elif zeros:
            negative = positive.map(torch.zeros_like)
        else:
            # diffusers reads a negative prompt from the usual layer, whatever clip_skip says
            negative = replace(encoder, clip_skip=0)(negatives, chunks)
        if negative.context.shape != positive.context.shape:
            raise UsageError(
                f"the negative embedding has shape {tuple(negative.context.shape)}, the positive "
                f"one {tuple(positive.context.shape)}; they must be alike"
            )
        return negative.join(positive)

    def _second(self) -> list[str]:
        """What a second encoder reads of the prompts, one a row."""
        texts = _listed(self.prompt_2) or self.texts
        return _spread(texts, self.batch, "prompt_2") if texts else []

    def _negatives(self) -> list[list[str]]:
        """The negative texts of each encoder, one a row."""
        texts = _spread(_listed(self.negative_prompt) or [""], self.batch, "negative_prompt")
        second = _listed(self.negative_prompt_2) or texts
        return [texts, _spread(second, self.batch, "negative_prompt_2")]


def condition(
    prompts: Prompts,
    sizes: Sizes,
    encoder: TextEncoder,
    *,
    size: tuple[int, int],
    count: int,
    guided: bool,
) -> Conditioning:
    """Encode all that `count` pictures a prompt are told, of `size` pixels, height first.

    (B, …), or where guided (2 B, …) with the unconditional half first.
    """
    config = encoder.config
    conditioning = prompts.conditioning(
        encoder, guided=guided, zero_empty=config.zero_empty_negative
    ).map(lambda t: t.repeat_interleave(count, dim=0))
    if config.unet.size_ids:
        ids = sizes.ids(config, size, len(conditioning), guided=guided)
        conditioning = replace(conditioning, size_ids=ids.to(encoder.backend.device))
    return conditioning


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


@dataclass(frozen=True)
class Vocabulary:
    """What texts are read with: a tokenizer and learned vectors (V, D) for each text encoder.

    Never changed in place: a call keeps the one that it began with.
    """

    tokenizers: tuple[CLIPTokenizer, ...]
    learned: tuple[Tensor, ...] = ()
    embeddings: tuple[Embedding, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint, embeddings: Sequence[Embedding] = ()) -> Vocabulary:
        """Add `embeddings` to the words that a checkpoint knows."""
        if not embeddings:
            return cls(checkpoint.tokenizers)
        counts = {embedding.token: embedding.count for embedding in embeddings}
        return cls(
            tuple(
                tokenizer.with_learned(counts, first=encoder.vocab_size)
                for tokenizer, encoder in zip(
                    checkpoint.tokenizers, checkpoint.config.text_encoders, strict=True
                )
            ),
            tuple(map(torch.cat, zip(*(e.vectors for e in embeddings), strict=True))),
            tuple(embeddings),
        )

    def named_in(self, texts: Sequence[str | None]) -> dict[str, str]:
        """Return token -> SHA-256 of the learned words that `texts` hold."""
        joined = "\n".join(text for text in texts if text).lower()
        return {e.token: e.sha256 for e in self.embeddings if e.token.lower() in joined}


def _at_once(name: Hashable, function: Function) -> Function:
    return function


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """Reads the texts of a call with every text encoder of a model.

    learned: for each encoder, the vectors (V, D) of its tokenizer's learned words, or None.
    syntax: "plain" reads a text as it stands and cuts it at the encoder's length, as diffusers
    does; "weighted" reads `fastsd.prompts`: weights, and chunks of 75 tokens side by side.
    clip_skip: layers to leave out at the end, beyond those that the family leaves out.
    one_at_a_time: encode each text by itself, so that its bits do not depend on the others.
    once: makes an encoder, given with a name, ready to run, as `fastsd.engine.Loops.once` does.
    """

    backend: Backend
    config: ModelConfig
    tokenizers: Sequence[CLIPTokenizer]
    learned: Sequence[Tensor | None] = ()
    syntax: str = "plain"
    clip_skip: int = 0
    one_at_a_time: bool = False
    once: Callable[[Hashable, Function], Function] = _at_once

    def __post_init__(self) -> None:
        layers = min(encoder.layers for encoder in self.config.text_encoders)
        most = layers + 1 + self.config.text_layer
        whole = isinstance(self.clip_skip, Integral) and not isinstance(self.clip_skip, bool)
        if not (whole and 0 <= self.clip_skip <= most):
            raise UsageError(
                f"clip_skip must be a whole number from 0 to {most} for this model's text encoder, "
                f"not {self.clip_skip!r}"
            )

    def held(self, *embeds: Tensor | None) -> int:
        """Return how many chunks the longest of the given contexts (B, N, C) holds."""
        length = self.config.text_encoders[0].max_tokens
        plain = self.syntax == "plain"
        return max(1 if plain or e is None else e.shape[1] // length for e in embeds)

    def chunks(self, texts: Sequence[Sequence[str]]) -> int:
        """Return how many chunks the longest of the texts needs; a list for each encoder."""
        if self.syntax == "plain":
            return 1
        return max(
            len(self._split(index, tokenizer, text))
            for index, (tokenizer, column) in enumerate(zip(self.tokenizers, texts, strict=True))
            for text in column
        )

    def __call__(self, texts: Sequence[Sequence[str]], chunks: int = 1) -> Conditioning:
        """Encode one list of B texts for each encoder, to (B, chunks * N, C).

        The encoders' contexts stand side by side in width. The pooled text is the first chunk's.
        """
        if self.one_at_a_time:
            singles = [
                self._encode([[text] for text in row], chunks) for row in zip(*texts, strict=True)
            ]
            return reduce(Conditioning.join, singles)
        return self._encode(texts, chunks)

    def _encode(self, texts: Sequence[Sequence[str]], chunks: int) -> Conditioning:
        contexts, pooled = [], None
        for index, (tokenizer, column) in enumerate(zip(self.tokenizers, texts, strict=True)):
            ids, weights = self._read(index, tokenizer, column, chunks)
            part = self.config.text_parts[index]
            vectors = self.learned[index] if self.learned else None
            extra = () if vectors is None else (vectors.to(self.backend.device),)
            # What is kept of it holds on to no loops.
            states_of = partial(replace(self, once=_at_once)._states, part)
            encode = self.once((part, self.clip_skip), states_of)
            states, embeds = encode(ids.to(self.backend.device), *extra)
            context = _weigh(states, weights)
            contexts.append(context.reshape(len(column), -1, context.shape[-1]))
            pooled = None if embeds is None else embeds[::chunks]
        context = torch.cat(contexts, dim=-1)
        return Conditioning(context, pooled if self.config.unet.pooled_width else None)

    def _states(self, part: str, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode ids (B, N), with vectors of learned words if any, to what the UNet reads of them:
        the hidden states (B, N, D) of the layer that it wants, and the pooled text (B, P) if any.
        """
        output = self.backend.part(part)(*inputs)
        return self._layer(part, output), output.embeds

    def _layer(self, part: str, output: Any) -> Tensor:
        layer = self.config.text_layer
        if layer == -1 and not self.clip_skip:
            last: Tensor = output.last
            return last
        if not output.hidden:
            raise UsageError(
                "clip_skip needs hidden states of the text encoder that this exported engine does "
                "not give; drop it, export with --layout fast, or use the checkpoint itself"
            )
        hidden: Tensor = output.hidden[layer - self.clip_skip]
        if layer != -1:
            return hidden
        normed: Tensor = self.backend.part(f"{part}_norm")(hidden)
        return normed

    def _read(
        self, index: int, tokenizer: CLIPTokenizer, texts: Sequence[str], chunks: int
    ) -> tuple[Tensor, list[Sequence[float]]]:
        """Return ids (B * chunks, N) and the weights of each row's words, empty where all are 1."""
        length = self.config.text_encoders[index].max_tokens
        if self.syntax == "plain":
            tokens = tokenizer(texts, length)
            for overflow in tokens.overflow:
                if overflow:
                    log.warning(
                        "the prompt is longer than %d tokens; this was cut off: %.80r "
                        "(prompt_syntax='weighted' reads all of it)",
                        length - 2,
                        overflow,
                    )
            return torch.from_numpy(tokens.ids), [()] * len(texts)
        rows: list[Chunk] = []
        for text in texts:
            found = self._split(index, tokenizer, text)
            rows += [*found, *[Chunk()] * (chunks - len(found))]
        ids = torch.from_numpy(tokenizer.frame([row.ids for row in rows], length))
        return ids, [row.weights if set(row.weights) - {1.0} else () for row in rows]

    def _split(self, index: int, tokenizer: CLIPTokenizer, text: str) -> list[Chunk]:
        room = self.config.text_encoders[index].max_tokens - 2  # without the begin and the end
        return split(parse(text), tokenizer.words, comma=tokenizer.comma, room=room)


def _weigh(context: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """Weigh the words of each row of (B, N, D), and scale the row so that its mean stays.

    Each row by itself: the web UI takes the mean over a batch, where a text's bits would depend on
    the other texts.
    """
    rows = list(context)
    for i, row in enumerate(weights):
        if row:
            factors = torch.ones(context.shape[1], 1, device=context.device)
            factors[1 : 1 + len(row), 0] = torch.tensor(row, device=context.device)
            weighed = rows[i].float() * factors
            scale = rows[i].float().mean() / weighed.mean()
            rows[i] = (weighed * scale).to(context.dtype)
    return torch.stack(rows) if any(weights) else context
