"""A small byte-level BPE vocabulary in CLIP's conventions, learned from the captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from fastsd.errors import FastsdError

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # as CLIP splits them
SUFFIX = "</w>"


def learn(lines: Iterable[str], size: int, folder: Path) -> None:
    """Write vocab.json and merges.txt of `size` tokens to `folder`, in CLIP's order.

    The order: bytes, bytes that end words, merges, the two specials.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) > 255, ord(c)))
    trainer = trainers.BpeTrainer(
        vocab_size=size + len(alphabet),  # more than enough; the first merges are the ones kept
        initial_alphabet=alphabet,
        end_of_word_suffix=SUFFIX,
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"][: size - 2 * len(alphabet) - 2]
    tokens = [*alphabet, *(c + SUFFIX for c in alphabet), *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, START, END])}
    if len(vocab) != size:
        raise FastsdError(f"the captions give {len(vocab)} tokens, not {size}; ask for fewer")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    lines_ = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines_), "utf-8")
