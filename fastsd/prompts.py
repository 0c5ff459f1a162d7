"""The prompt syntax of AUTOMATIC1111's web UI: weights, and texts longer than an encoder reads.

    (word)       1.1 times as strong; ((word)) 1.1 times that; (word:1.3) 1.3 times
    [word]       1 / 1.1 times as strong
    \\( \\) \\[ \\] \\\\   the character itself
    BREAK        go on in a new chunk

A bracket that is never closed counts to the end, one that was never opened is a character. Owns the
text side alone: knows no tokenizer (it is given one as a function), no model and no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fastsd.errors import UsageError

SYNTAXES = ("plain", "weighted")
ROOM = 75  # tokens of a chunk, without its begin and end, of CLIP's 77
BACKTRACK = 20  # how far back a comma may stand at which a full chunk breaks
STRENGTHEN = 1.1
MAX_WEIGHT = 100.0

_TOKEN = re.compile(
    r"\\[()\[\]\\]"  # escaped
    r"|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)"  # a weight and the bracket that it ends
    r"|[()\[\]:\\]"
    r"|[^()\[\]:\\]+"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass(frozen=True)
class Fragment:
    """A stretch of text and its weight; after_break: it begins a new chunk."""

    text: str
    weight: float = 1.0
    after_break: bool = False


@dataclass(frozen=True)
class Chunk:
    """As many token ids as an encoder has room for, or fewer, and the weight of each."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def parse(prompt: str) -> list[Fragment]:
    """Split a prompt into fragments of one weight each; at least one, which may be empty.

    Raises UsageError for a weight beyond MAX_WEIGHT.
    """
    texts: list[str] = []
    weights: list[float] = []
    breaks: set[int] = set()  # indices of the texts that begin a chunk
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        for i in range(start, len(weights)):
            weights[i] *= factor

    for token in _TOKEN.findall(prompt):
        if token in opened:
            opened[token].append(len(texts))
        elif token == ")" and opened["("]:
            multiply(opened["("].pop(), STRENGTHEN)
        elif token == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / STRENGTHEN)
        elif len(token) > 1 and token[0] == ":" and opened["("]:
            multiply(opened["("].pop(), float(token[1:-1]))
        else:
            literal = token[1] if len(token) == 2 and token[0] == "\\" else token
            for i, text in enumerate(_BREAK.split(literal)):
                if i:
                    breaks.add(len(texts))
                texts.append(text)
                weights.append(1.0)
    for start in opened["("]:
        multiply(start, STRENGTHEN)
    for start in opened["["]:
        multiply(start, 1 / STRENGTHEN)
    for weight in weights:
        if not abs(weight) <= MAX_WEIGHT:
            raise UsageError(
                f"the prompt gives a word the weight {weight:g}; weights up to {MAX_WEIGHT:g} are "
                "taken, and from 0.5 to 1.5 is usual"
            )
    return _merged(texts, weights, breaks)


def _merged(texts: list[str], weights: list[float], breaks: set[int]) -> list[Fragment]:
    """Join neighbours of one weight: a word cut by a bracket's edge is still one word."""
    fragments = [Fragment("")]
    for i, (text, weight) in enumerate(zip(texts, weights, strict=True)):
        last = fragments[-1]
        if i in breaks:
            fragments.append(Fragment(text, weight, after_break=True))
        elif weight == last.weight or not last.text:
            fragments[-1] = Fragment(last.text + text, weight, last.after_break)
        elif text:
            fragments.append(Fragment(text, weight))
    return fragments


def split(
    fragments: Iterable[Fragment],
    words: Callable[[str], Sequence[tuple[int, ...]]],
    *,
    comma: int | None = None,
    room: int = ROOM,
) -> list[Chunk]:
    """Tokenize fragments and fill chunks of up to `room` tokens; at least one, which may be empty.

    words: text -> tokens, each a tuple of ids that stay in one chunk (of a learned word, several).
    comma: the id of a comma; what follows one close to a chunk's end moves to the next as a whole.
    """
    rows: list[list[tuple[int, float]]] = [[]]
    for fragment in fragments:
        if fragment.after_break and rows[-1]:
            rows.append([])
        for word in words(fragment.text):
            if len(rows[-1]) + len(word) > room:
                rows.append(_after_comma(rows[-1], comma) if word != (comma,) else [])
                if len(rows[-1]) + len(word) > room:
                    rows.append([])
            rows[-1] += [(index, fragment.weight) for index in word]
    if not rows[-1] and len(rows) > 1:
        rows.pop()
    return [
        Chunk(tuple(index for index, _ in row), tuple(weight for _, weight in row)) for row in rows
    ]


def _after_comma(row: list[tuple[int, float]], comma: int | None) -> list[tuple[int, float]]:
    """Take off a full row what follows its last comma, if that is close to the end."""
    for at in range(len(row) - 1, max(len(row) - BACKTRACK - 1, -1), -1):
        if row[at][0] == comma:
            moved = row[at + 1 :]
            del row[at + 1 :]
            return moved
    return []
