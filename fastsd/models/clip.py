"""The CLIP text encoder: token ids in, hidden states and the pooled text out.

Parameter names are transformers', without the prefix `text_model.` of its older checkpoints.
Causal: padding after the end of text changes nothing before it. Knows no tokenizer and no file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.config import CLIPConfig
from fastsd.errors import UsageError
from fastsd.kernels.attention import attention
from fastsd.models.layers import join_heads, split_heads

OLD_EOS_TOKEN_ID = 2  # configs written before transformers 4.31 say 2 and mean the largest id


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), OpenAI's approximation of gelu."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CLIPOutput(NamedTuple):
    """What the UNet may want of a text.

    last: (B, N, D), after the final norm. hidden: layers + 1 of (B, N, D), before any final norm;
    the first is the embedded tokens. pooled: (B, D), `last` at the end of text. embeds: (B, P),
    pooled and projected, where there is a projection.
    """

    last: Tensor
    hidden: tuple[Tensor, ...]
    pooled: Tensor
    embeds: Tensor | None


@final
class Embeddings(nn.Module):
    """token + position."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_tokens, config.width)

    def forward(self, input_ids: Tensor, learned: Tensor | None = None) -> Tensor:
        """(B, N) and vectors (V, D) of the ids beyond the vocabulary -> (B, N, D)."""
        if learned is None:
            embedded: Tensor = self.token_embedding(input_ids)
        else:
            rows = self.token_embedding.num_embeddings
            known = input_ids < rows
            embedded = self.token_embedding(torch.where(known, input_ids, 0))
            vectors = F.embedding(torch.where(known, 0, input_ids - rows), learned.to(embedded))
            embedded = torch.where(known[..., None], embedded, vectors)
        return embedded + self.position_embedding.weight[: input_ids.shape[1]]


@final
class CausalAttention(nn.Module):
    """Self-attention in which a token sees itself and those before it.

    to_qkv: makes queries, keys and values of x side by side, where those are one product.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.to_qkv: nn.Module | None
        self.register_module("to_qkv", None)
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if self.to_qkv is None:
            parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            parts = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        out: Tensor = self.out_proj(join_heads(attention(q, k, v, causal=True)))
        return out


@final
class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


@final
class EncoderLayer(nn.Module):
    """Attention and MLP, each after a norm, each added to x."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.self_attn = CausalAttention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


@final
class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, N, D) -> x and every layer's output, each (B, N, D)."""
        hidden = [x]
        for layer in self.layers:
            hidden.append(layer(hidden[-1]))
        return tuple(hidden)


@final
class CLIPText(nn.Module):
    """A CLIP text encoder (Radford et al. 2021), OpenAI's or OpenCLIP's by config."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.text_projection = (
            None
            if config.projection is None
            else nn.Linear(config.width, config.projection, bias=False)
        )

    def forward(self, input_ids: Tensor, learned: Tensor | None = None) -> CLIPOutput:
        """Encode ids (B, N) int64, N at most `config.max_tokens`; UsageError beyond.

        learned: (V, D), the vectors of the ids from `config.vocab_size` on (textual inversion; Gal
        et al. 2022, arXiv:2208.01618).
        """
        if input_ids.shape[1] > self.config.max_tokens:
            raise UsageError(
                f"{input_ids.shape[1]} tokens were given to a text encoder that knows "
                f"{self.config.max_tokens}; shorten the text"
            )
        hidden = self.encoder(self.embeddings(input_ids, learned))
        last = self.final_layer_norm(hidden[-1])
        rows = torch.arange(
            last.shape[0], device=last.device
        )  # len() would fix it in exported graphs
        pooled = last[rows, self._end_of_text(input_ids)]
        embeds = None if self.text_projection is None else self.text_projection(pooled)
        return CLIPOutput(last, hidden, pooled, embeds)

    def _end_of_text(self, input_ids: Tensor) -> Tensor:
        """Return the position (B,) of the first end-of-text token."""
        eos = self.config.eos_token_id
        known = torch.where(input_ids < self.config.vocab_size, input_ids, 0)
        marks = known if eos == OLD_EOS_TOKEN_ID else known == eos
        return marks.int().argmax(dim=-1)
