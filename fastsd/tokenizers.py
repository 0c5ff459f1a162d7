"""CLIP's tokenizer: lower-cased text to ids, byte-level BPE, over the `tokenizers` library.

Gives the ids of transformers' CLIPTokenizer. Reads and writes a tokenizer's folder; knows no model.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from fastsd.errors import CheckpointError, UsageError
from fastsd.files import explained_values, read_json, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# One word at a time (Radford et al. 2021): specials, English clitics, letters, one digit, the rest.
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_DEFAULTS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
# Pairs to merge, best first (clip_merges.LICENSE says where they come from).
_MERGES = Path(__file__).with_name("clip_merges.txt.gz")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenBatch:
    """ids: (B, N) int64, begun, ended, padded. overflow: of each text, the end that did not fit."""

    ids: NDArray[np.int64]
    overflow: tuple[str, ...]


@final
class CLIPTokenizer:
    """Text to ids. Holds no state of a call, so it may be used from many threads.

    vocab: token -> id; merges: pairs, best first; specials: the texts of the bos, eos, unk and pad
    token. added: tokens that are matched before the text is split into words, each the fields of an
    AddedToken; those that the vocabulary lacks get the next ids. Specials are always among them.
    learned: words of textual inversion -> how many ids each stands for; they get the ids from
    `first_learned` on, in order.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        specials: Mapping[str, str] = _DEFAULTS,
        added: Sequence[Mapping[str, Any]] = (),
        learned: Mapping[str, int] = MappingProxyType({}),
        first_learned: int | None = None,
        max_tokens: int = 77,
    ) -> None:
        self.specials = {**_DEFAULTS, **specials}
        self.max_tokens = max_tokens
        self._vocab = dict(vocab)
        self._merges = list(merges)
        self._added = list(added)
        self._tokenizer = _build(self._vocab, self._merges, self.specials, added)
        self._learned = self._learn(learned, first_learned)
        self.bos = _id(self._tokenizer, self.specials["bos_token"])
        self.eos = _id(self._tokenizer, self.specials["eos_token"])
        self.pad = _id(self._tokenizer, self.specials["pad_token"])

    @classmethod
    def from_folder(cls, path: str | Path) -> CLIPTokenizer:
        """Read tokenizer.json, or vocab.json with merges.txt. Raises CheckpointError."""
        folder = Path(path)
        with explained_values(folder):
            return cls._read(folder)

    @classmethod
    def _read(cls, folder: Path) -> CLIPTokenizer:
        source = folder / "tokenizer.json"
        whole = _read_optional(source)
        if source.exists():
            model = whole.get("model") or {}
            vocab, merges = model.get("vocab"), model.get("merges")
        elif (folder / "vocab.json").is_file():
            source = folder / "merges.txt"
            vocab, merges = read_json(folder / "vocab.json"), _read_merges(source)
        else:
            raise CheckpointError(
                f"{folder} holds no tokenizer: expected tokenizer.json, or vocab.json + merges.txt"
            )
        config = _read_optional(folder / "tokenizer_config.json")
        if "auto_map" in config:
            raise CheckpointError(f"{folder} asks to run code of its own (auto_map); it is not run")
        specials = _read_specials(folder, config)
        texts = {name: token["content"] for name, token in specials.items()}
        added = _read_added(folder, config, whole, texts.values())
        max_tokens = config.get("model_max_length")
        return cls(
            *_checked(source, vocab, merges),
            specials=texts,
            added=[*added, *specials.values()],
            max_tokens=max_tokens if isinstance(max_tokens, int) and max_tokens < 1 << 20 else 77,
        )

    @classmethod
    def standard(cls, specials: Mapping[str, str] = _DEFAULTS) -> CLIPTokenizer:
        """Build OpenAI CLIP's own tokenizer, 49,408 tokens, which every Stable Diffusion shares.

        specials: where they differ from CLIP's. OpenCLIP's pad_token is "!".
        """
        return cls(*_standard_vocabulary(), specials=specials)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all that decides its ids."""
        facts = (self._vocab, self._merges, self.specials, self._added, self.max_tokens)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def with_learned(self, learned: Mapping[str, int], *, first: int) -> CLIPTokenizer:
        """Return a tokenizer that knows these learned words and no others.

        first: their first id. Raises UsageError for a word that has an id already.
        """
        return CLIPTokenizer(
            self._vocab,
            self._merges,
            specials=self.specials,
            added=self._added,
            learned=learned,
            first_learned=first,
            max_tokens=self.max_tokens,
        )

    def _learn(self, learned: Mapping[str, int], first: int | None) -> dict[int, tuple[int, ...]]:
        """Add the learned words; return the id that each is found by -> the ids it stands for."""
        from tokenizers import AddedToken

        found: dict[int, tuple[int, ...]] = {}
        start = self.size if first is None else first
        for word, count in learned.items():
            if self._tokenizer.token_to_id(word) is not None:
                raise UsageError(
                    f"{word!r} is a token of this model already; give the embedding another token"
                )
            self._tokenizer.add_tokens([AddedToken(word, normalized=True)])
            found[_id(self._tokenizer, word)] = tuple(range(start, start + count))
            start += count
        return found

    @property
    def size(self) -> int:
        """How many ids there are, added ones included; learned words count for one each."""
        return self._tokenizer.get_vocab_size()

    @property
    def comma(self) -> int | None:
        """The id of a comma that ends a word."""
        return self._tokenizer.token_to_id(",</w>")

    def words(self, text: str) -> list[tuple[int, ...]]:
        """Return the tokens of a text of any length: one id each, of a learned word several.

        Raises UsageError for what is not text: other types, lone surrogates.
        """
        encoding = self._tokenizer.encode(_checked_text(text), add_special_tokens=False)
        return [self._learned.get(index, (index,)) for index in encoding.ids]

    def frame(self, rows: Sequence[Sequence[int]], max_tokens: int = 77) -> NDArray[np.int64]:
        """Return rows of ids as (B, max_tokens): begun, ended, padded."""
        framed = np.full((len(rows), max_tokens), self.pad, np.int64)
        for out, row in zip(framed, rows, strict=True):
            out[: len(row) + 2] = [self.bos, *row, self.eos]
        return framed

    def __call__(self, texts: Sequence[str], max_tokens: int = 77) -> TokenBatch:
        """Encode texts to (B, max_tokens) ids: begin, words, end, padding.

        Raises UsageError for what is not text: other types, lone surrogates.
        """
        room = max_tokens - 2
        if room < 0:
            raise UsageError(f"max_tokens must be at least 2, not {max_tokens}")
        rows, overflow = [], []
        for text in texts:
            # one at a time: encode_batch starts a thread pool, which does not survive a fork
            encoding = self._tokenizer.encode(_checked_text(text), add_special_tokens=False)
            tokens = [
                (index, at)
                for found, (at, _) in zip(encoding.ids, encoding.offsets, strict=True)
                for index in self._learned.get(found, (found,))
            ]
            rows.append([index for index, _ in tokens[:room]])
            overflow.append(text[tokens[room][1] :] if len(tokens) > room else "")
        return TokenBatch(self.frame(rows, max_tokens), tuple(overflow))

    def save(self, path: str | Path) -> None:
        """Write every file that diffusers, transformers (old and new) or Optimum looks for."""
        if self._learned:
            raise UsageError("learned words have no files of a tokenizer; save it without them")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = json.dumps(self._vocab, ensure_ascii=False)
        (folder / "vocab.json").write_text(vocab, "utf-8", newline="\n")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self._merges), ""]
        (folder / "merges.txt").write_text("\n".join(lines), "utf-8", newline="\n")
        self._tokenizer.save(str(folder / "tokenizer.json"))
        added = {
            str(index): {"content": token.content}
            | {flag: bool(getattr(token, flag)) for flag in _FLAGS}
            for index, token in sorted(self._tokenizer.get_added_tokens_decoder().items())
        }
        new = {token["content"]: int(i) for i, token in added.items()}
        new = {token: i for token, i in new.items() if token not in self._vocab}
        if new:
            write_json(folder / "added_tokens.json", new)
        write_json(folder / "special_tokens_map.json", self.specials)
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": self.max_tokens,
                **self.specials,
                "added_tokens_decoder": added,
                "add_prefix_space": False,
                "do_lower_case": True,
                "errors": "replace",
            },
        )


@cache
def _standard_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Unpack CLIP's vocabulary and merges."""
    merges = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").splitlines()
    pairs = [(a, b) for a, b in (merge.split(" ") for merge in merges)]
    # bytes by their printable stand-ins, in the order of the bytes that need none, then others
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [*map(chr, plain), *(chr(256 + i) for i in range(256 - len(plain)))]
    words = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in pairs)]
    tokens = [*words, _DEFAULTS["bos_token"], _DEFAULTS["eos_token"]]
    return {token: i for i, token in enumerate(tokens)}, pairs


def _build(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    specials: Mapping[str, str],
    added: Sequence[Mapping[str, Any]],
) -> Tokenizer:
    """Assemble the tokenizer as transformers' CLIPTokenizer does."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=specials["unk_token"],
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokens: dict[str, dict[str, Any]] = {}
    for token in [*added, *({"content": text} for text in specials.values())]:
        special = token.get("special", False) or token["content"] in specials.values()
        tokens.setdefault(token["content"], {**token, "special": special})
    tokenizer.add_tokens([AddedToken(**token) for token in tokens.values()])
    eos, bos = specials["eos_token"], specials["bos_token"]
    tokenizer.post_processor = processors.RobertaProcessing(
        (eos, _id(tokenizer, eos)),
        (bos, _id(tokenizer, bos)),
        trim_offsets=False,
        add_prefix_space=False,
    )
    return tokenizer


def _id(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    assert index is not None, f"{token!r} was added, so it has an id"
    return index


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _read_merges(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8").split("\n")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if lines[0].startswith("#version"):
        del lines[0]
    return [line.rstrip("\r") for line in lines if line.strip()]


def _checked(
    source: Path, vocab: object, merges: object
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocab and merges if they fit each other; the library's own complaint names no file."""
    if not isinstance(vocab, dict) or not all(type(index) is int for index in vocab.values()):
        raise CheckpointError(f"{source.parent}: the vocabulary must map tokens to whole numbers")
    if not isinstance(merges, list):
        raise CheckpointError(f"{source}: the merges must be a list")
    pairs = []
    for merge in merges:
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        if len(pair) != 2 or not all(token in vocab for token in (*pair, "".join(pair))):
            raise CheckpointError(f"{source}: the merge {merge!r} does not fit the vocabulary")
        pairs.append((pair[0], pair[1]))
    return vocab, pairs


def _read_specials(folder: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return name -> token. The config comes first; where it lists no flags, the older map does."""
    found = {name: config[name] for name in _DEFAULTS if config.get(name)}
    if "added_tokens_decoder" not in config:
        old = _read_optional(folder / "special_tokens_map.json")
        found |= {name: old[name] for name in _DEFAULTS if old.get(name)}
    return {name: _token(folder, token) | {"special": True} for name, token in found.items()}


def _read_added(
    folder: Path, config: dict[str, Any], whole: dict[str, Any], specials: Collection[str]
) -> list[dict[str, Any]]:
    """Return the tokens matched before the split, by id, from the first place that has them."""
    if "added_tokens_decoder" in config:
        listed = dict(config["added_tokens_decoder"])
    else:
        listed = {
            index: {"content": text, "normalized": text not in specials}
            for text, index in _read_optional(folder / "added_tokens.json").items()
        }
        listed |= {token.get("id"): token for token in whole.get("added_tokens") or []}
    try:
        order = sorted(listed, key=int)
    except (TypeError, ValueError):
        raise CheckpointError(f"{folder}: the ids of added tokens must be whole numbers") from None
    return [_token(folder, listed[index]) for index in order]


def _token(folder: Path, token: object) -> dict[str, Any]:
    """Return {content, flags} of a token given as text or as the fields of an AddedToken."""
    fields = {"content": token} if isinstance(token, str) else token
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
        raise CheckpointError(f"{folder}: {token!r} is not a token")
    return {"content": fields["content"]} | {
        flag: bool(fields[flag]) for flag in _FLAGS if flag in fields
    }


def _checked_text(text: object) -> str:
    if not isinstance(text, str):
        raise UsageError(f"a prompt must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt holds a lone surrogate, {text[error.start]!a} at position {error.start}: "
            "it is not valid Unicode; decode the prompt properly or drop the character"
        ) from None
    return text
