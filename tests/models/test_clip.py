"""The text encoder against transformers' CLIPTextModel, with and without a projection."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsd.config import SD15, CLIPConfig
from fastsd.errors import UsageError
from fastsd.models.clip import CLIPText
from tests.distances import relative_l2
from tests.models import oracles
from tests.models.oracles import BAR

EOS = 99
SMALL = CLIPConfig(vocab_size=100, width=32, mlp_width=48, layers=3, heads=4, eos_token_id=EOS)
VARIANTS = {
    "sd1": SMALL,
    "sd2": replace(SMALL, activation="gelu", layers=4, heads=2),
    "sdxl second": replace(SMALL, activation="gelu", projection=24),
    "old eos": replace(SMALL, eos_token_id=2),
    "old eos, projected": replace(SMALL, eos_token_id=2, projection=24),
    "short": replace(SMALL, max_tokens=16, eps=1e-3),
}


@cache
def pair(variant: str) -> tuple[CLIPText, Any]:
    """Return our encoder and transformers', sharing their weights."""
    torch.manual_seed(0)
    oracle = oracles.clip(VARIANTS[variant])
    ours = CLIPText(VARIANTS[variant]).eval().requires_grad_(False)
    ours.load_state_dict(oracles.clip_weights(oracle), strict=True, assign=True)
    return ours, oracle


def texts(tokens: int) -> Tensor:
    """Return ids (4, tokens): padded with EOS, padded with "!" (0), full to the brim, empty."""
    ids = torch.randint(3, EOS - 1, (4, tokens), generator=torch.Generator().manual_seed(1))
    ids[0, 5:] = EOS
    ids[1, 7], ids[1, 8:] = EOS, 0
    ids[2, -1] = EOS
    ids[3, 1:] = EOS
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_output_equals_transformers(variant: str) -> None:
    ours, oracle = pair(variant)
    for tokens in (ours.config.max_tokens, 9):
        ids = texts(tokens)
        out, expected = ours(ids), oracle(ids, output_hidden_states=True)
        assert relative_l2(out.last, expected.last_hidden_state) <= BAR
        assert len(out.hidden) == ours.config.layers + 1
        for hidden, truth in zip(out.hidden, expected.hidden_states, strict=True):
            assert relative_l2(hidden, truth) <= BAR
        if ours.config.projection is None:
            assert out.embeds is None
            assert relative_l2(out.pooled, expected.pooler_output) <= BAR
        else:
            pooled = oracle.text_model(ids).pooler_output
            assert relative_l2(out.pooled, pooled) <= BAR
            assert relative_l2(out.embeds, expected.text_embeds) <= BAR


def test_what_follows_the_end_of_text_changes_nothing_before_it() -> None:
    ours, _ = pair("sd1")
    ids = texts(20)[:1]
    other = ids.clone()
    other[0, 6:] = 0
    assert torch.equal(ours(ids).pooled, ours(other).pooled)
    assert torch.equal(ours(ids).last[:, :6], ours(other).last[:, :6])


def test_gradients_reach_every_weight() -> None:
    ours = CLIPText(VARIANTS["sdxl second"])
    out = ours(texts(20))
    assert out.embeds is not None
    (out.last.square().mean() + out.embeds.square().mean()).backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # k_proj's bias shifts all scores of a query alike: softmax does not see it.
        assert name.endswith("k_proj.bias") or parameter.grad.abs().max() > 0, name


def test_a_meta_device_module_owns_nothing_but_its_weights() -> None:
    ours, oracle = pair("sdxl second")
    with torch.device("meta"):
        loaded = CLIPText(ours.config)
    assert not list(loaded.buffers())
    loaded.load_state_dict(oracles.clip_weights(oracle), strict=True, assign=True)
    assert torch.equal(loaded(texts(20)).last, ours(texts(20)).last)


def test_more_tokens_than_positions_are_refused() -> None:
    ours, _ = pair("short")
    with pytest.raises(UsageError, match="17 tokens were given to a text encoder that knows 16"):
        ours(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.slow
def test_true_size_sd15() -> None:
    torch.manual_seed(0)
    config = SD15.text_encoders[0]
    oracle = oracles.clip(config)
    with torch.device("meta"):
        ours = CLIPText(config)
    ours.load_state_dict(oracles.clip_weights(oracle), strict=True, assign=True)
    ids = torch.randint(1000, 40000, (2, 77))
    ids[:, 40:] = config.eos_token_id
    with torch.no_grad():
        out, expected = ours(ids), oracle(ids)
        assert relative_l2(out.last, expected.last_hidden_state) <= BAR
        assert relative_l2(out.pooled, expected.pooler_output) <= BAR
