"""The web UI's prompt syntax: its documented cases, its chunks, and properties of both."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsd.errors import UsageError
from fastsd.prompts import BACKTRACK, ROOM, Chunk, Fragment, parse, split

COMMA = 7


def weights(prompt: str) -> list[tuple[str, float]]:
    return [(fragment.text, round(fragment.weight, 4)) for fragment in parse(prompt)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [("", 1)]),
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(word:1.3)", [("word", 1.3)]),
        ("(word: 1.3 )", [("word", 1.3)]),
        ("(word:.5) (b:-1) (c:+2.)", [("word", 0.5), (" ", 1), ("b", -1), (" ", 1), ("c", 2)]),
        ("((word))", [("word", 1.21)]),
        ("[word]", [("word", 0.9091)]),
        ("([a])", [("a", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a [b", [("a ", 1), ("b", 0.9091)]),
        ("a) b]", [("a) b]", 1)]),
        (r"\(literal\] \\", [(r"(literal] " + "\\", 1)]),
        (r"(a\):1.5)", [("a)", 1.5)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("ratio 16:9, a:b", [("ratio 16:9, a:b", 1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("[a:1.5]", [("a:1.5", 0.9091)]),
        ("x:1.3)", [("x:1.3)", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("（一只猫） (红苹果:1.4)", [("（一只猫） ", 1), ("红苹果", 1.4)]),
    ],
)
def test_weights(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert weights(prompt) == expected


def test_break_begins_a_chunk() -> None:
    fragments = parse("a cat BREAK (a dog BREAK fog:1.2) BREAKFAST")
    told = [(f.text, f.weight, f.after_break) for f in fragments]
    assert told == [
        ("a cat", 1, False),
        ("a dog", 1.2, True),
        ("fog", 1.2, True),
        (" BREAKFAST", 1, False),
    ]


@pytest.mark.parametrize("prompt", ["(a:1000)", "(" * 60 + "a" + ")" * 60, "(a:" + "9" * 400 + ")"])
def test_absurd_weights_are_refused(prompt: str) -> None:
    with pytest.raises(UsageError, match="weights up to 100 are taken"):
        parse(prompt)


@given(st.text(alphabet="ab ()[]:\\1.,é猫"))
def test_any_text_parses(prompt: str) -> None:
    """Nothing is lost but syntax, and neighbours differ in weight."""
    try:
        fragments = parse(prompt)
    except UsageError:
        return
    for a, b in zip(fragments, fragments[1:], strict=False):
        assert a.weight != b.weight
    kept = "".join(f.text for f in fragments)
    assert [c for c in kept if c in "abé猫"] == [c for c in prompt if c in "abé猫"]
    assert all(math.isfinite(f.weight) for f in fragments)


@given(st.text(alphabet="ab é猫,.!'"))
def test_plain_text_is_one_fragment(prompt: str) -> None:
    assert parse(prompt) == [Fragment(prompt)]


@given(st.text(alphabet="ab()[]\\"))
def test_escaped_text_is_itself(text: str) -> None:
    escaped = "".join("\\" + c if c in "()[]\\" else c for c in text)
    assert parse(escaped) == [Fragment(text)]


# --- chunks --------------------------------------------------------------------------------------


def words(text: str) -> list[tuple[int, ...]]:
    """Each character is a token; "<" is a learned word of five."""
    return [
        (100, 101, 102, 103, 104) if c == "<" else (COMMA if c == "," else ord(c),) for c in text
    ]


def lengths(prompt: str) -> list[int]:
    return [len(chunk.ids) for chunk in split(parse(prompt), words, comma=COMMA)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [0]),
        ("a" * 75, [75]),
        ("a" * 76, [75, 1]),
        ("a" * 151, [75, 75, 1]),
        ("a" * 60 + "," + "b" * 20, [61, 20]),  # the comma at 60 is close enough to the end
        ("a" * 55 + "," + "b" * 20, [56, 20]),
        ("a" * 54 + "," + "b" * 21, [75, 1]),  # here it is one too far away
        ("a" * 75 + ",b", [75, 2]),
        ("a" * 74 + ",b", [75, 1]),
        ("a" * 72 + "<", [72, 5]),  # a learned word is not cut
        ("a" * 70 + "<", [75]),
        ("a" * 60 + "," + "b" * 12 + "<", [61, 17]),
        ("a BREAK b", [1, 1]),
        ("BREAK b", [1]),
        ("a BREAK", [1]),
        ("a BREAK BREAK b", [1, 1]),
    ],
)
def test_chunks(prompt: str, expected: list[int]) -> None:
    assert lengths(prompt) == expected


def test_weights_go_with_their_tokens() -> None:
    (chunk,) = split(parse("a(b<:1.5)"), words)
    assert chunk == Chunk((97, 98, 100, 101, 102, 103, 104), (1.0, *[1.5] * 6))


@given(st.lists(st.sampled_from([*"ab,<"]), max_size=300))
def test_no_token_is_lost_or_moved(letters: list[str]) -> None:
    text = "".join(letters)
    chunks = split([Fragment(text)], words, comma=COMMA)
    assert [i for chunk in chunks for i in chunk.ids] == [i for word in words(text) for i in word]
    assert all(len(chunk.ids) <= ROOM for chunk in chunks)
    assert all(len(chunk.ids) >= ROOM - BACKTRACK - 4 for chunk in chunks[:-1])
