"""Token ids against transformers' CLIPTokenizer, in every form that a folder takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.errors import CheckpointError, UsageError
from fastsd.tokenizers import CLIPTokenizer
from tests.fixtures import BOS, EOS, clip_tokenizer, train_bpe

NASTY = [
    "",
    " ",
    "\t\n  \r\n",
    "a photo of an astronaut riding a horse on mars",
    "A PHOTO of An Astronaut",
    "wow!!! really?! (((masterpiece:1.3))), [low], {x|y}, a/b\\c -- it's 'quoted' \"text\"",
    "it's they're we've i'm she'll i'd don't IT'S",
    "一个红苹果,在桌子上。猫と犬 고양이",
    "🍎🐈‍⬛ 👩🏽‍🚀 flags 🇫🇷",
    "naïve café e\u0301 ﬁ Ǆ İstanbul ß Ω \u212b",
    "zero\u200bwidth no\u00a0break em\u2003space line\u2028sep nel\u0085x",
    "nul\x00byte \x01\x7f \ufeff bom \ufffd \uffff",
    "1234567890 3.14 ²³ ½ Ⅷ ٣",
    "word " * 200,
    "x" * 3000,
    "!" * 300,
    "! hello ! world!",
    "<|startoftext|> hello <|endoftext|> world <|ENDOFTEXT|>x<|endoftext|>",
    "</w> a</w>b # #version: 0.2",
    "مرحبا بالعالم नमस्ते ไทย",
    "\U0001f468\u200d\U0001f469 \U00020000 \U0010ffff",
]


@pytest.fixture(scope="module", params=[EOS, "!"], ids=["pad-eos", "pad-exclamation"])
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return clip_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t", pad=request.param)


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab.json"])
def folder(
    theirs: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tokenizer folder as transformers 5 writes it, and as older ones on the hub are."""
    path = tmp_path_factory.mktemp("form")
    theirs.save_pretrained(path)
    if request.param == "vocab.json":
        (path / "tokenizer.json").unlink()
        write_old_form(path, theirs.pad_token)
    return path


def write_old_form(path: Path, pad: str) -> None:
    """Write vocab.json, merges.txt and the old maps, in which bos and eos are `normalized`."""
    vocab, merges = train_bpe()
    (path / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    old = {
        "bos_token": {"content": BOS, **flags},
        "eos_token": {"content": EOS, **flags},
        "pad_token": pad,
        "unk_token": {"content": EOS, **flags},
    }
    (path / "special_tokens_map.json").write_text(json.dumps(old))
    config = {
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken", "content": BOS, **flags},
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": pad,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def reference(path: Path) -> Any:
    from transformers import CLIPTokenizer as Reference

    return Reference.from_pretrained(path, model_max_length=77)


def encode(tokenizer: Any, texts: list[str], length: int = 77) -> Any:
    return tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="np"
    ).input_ids


@pytest.mark.parametrize("length", [77, 2, 3, 16])
def test_ids_equal_transformers(folder: Path, length: int) -> None:
    ours = CLIPTokenizer.from_folder(folder)
    batch = ours(NASTY, length)
    assert batch.ids.dtype == np.int64
    np.testing.assert_array_equal(batch.ids, encode(reference(folder), NASTY, length))


def test_overflow_is_the_end_of_the_users_own_text(folder: Path) -> None:
    ours = CLIPTokenizer.from_folder(folder)
    long = "Red Apple, " * 30 + "ÉTÉ 红!"
    short, cut = ours(["A cat", long]).overflow
    assert short == "" and cut and long.endswith(cut)
    kept = long[: len(long) - len(cut)]
    np.testing.assert_array_equal(ours([kept]).ids, ours([long]).ids)


def test_saved_folders_read_alike_everywhere(folder: Path, tmp_path: Path) -> None:
    ours = CLIPTokenizer.from_folder(folder)
    ours.save(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "old")
    (tmp_path / "old" / "tokenizer.json").unlink()
    shutil.copytree(tmp_path / "whole", tmp_path / "new")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "new" / name).unlink()
    expected = encode(reference(folder), NASTY)
    for form in ("whole", "old", "new"):
        again = CLIPTokenizer.from_folder(tmp_path / form)
        np.testing.assert_array_equal(again(NASTY).ids, expected)
        np.testing.assert_array_equal(encode(reference(tmp_path / form), NASTY), expected)
        assert (again.size, again.specials, again.max_tokens) == (ours.size, ours.specials, 77)


def test_added_tokens_are_kept(theirs: Any, tmp_path: Path) -> None:
    """A token from textual inversion is matched whole and has its own id, in every form."""
    theirs.save_pretrained(tmp_path / "base")
    extended = reference(tmp_path / "base")
    extended.add_tokens(["<my-cat>", "sks"])
    extended.save_pretrained(tmp_path / "new")
    texts = [*NASTY, "a photo of <my-cat>, SKS sks tasks", "<my-cat><my-cat>"]
    ours = CLIPTokenizer.from_folder(tmp_path / "new")
    expected = encode(extended, texts)
    assert expected.max() == ours.size - 1
    np.testing.assert_array_equal(ours(texts).ids, expected)
    ours.save(tmp_path / "saved")
    np.testing.assert_array_equal(encode(reference(tmp_path / "saved"), texts), expected)
    (tmp_path / "saved" / "tokenizer.json").unlink()
    np.testing.assert_array_equal(
        CLIPTokenizer.from_folder(tmp_path / "saved")(texts).ids, expected
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPTokenizer, Any]:
    path = tmp_path_factory.mktemp("pair")
    write_old_form(path, EOS)
    return CLIPTokenizer.from_folder(path), reference(path)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_equals_transformers(pair: tuple[CLIPTokenizer, Any], text: str) -> None:
    ours, theirs = pair
    np.testing.assert_array_equal(ours([text]).ids, encode(theirs, [text]))


@pytest.mark.parametrize("text", ["a \ud83d b", "\udfff", b"bytes", None, 3])
def test_what_is_not_text_is_refused(pair: tuple[CLIPTokenizer, Any], text: Any) -> None:
    with pytest.raises(UsageError, match="surrogate|must be text"):
        pair[0](["fine", text])


def test_many_threads_agree(pair: tuple[CLIPTokenizer, Any]) -> None:
    ours, _ = pair
    alone = [ours([text], 5 + i).ids.tobytes() for i, text in enumerate(NASTY)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            together = pool.map(lambda i: ours([NASTY[i]], 5 + i).ids.tobytes(), range(len(NASTY)))
            assert list(together) == alone


def spoil(path: Path, name: str, text: str | None) -> None:
    if text is None:
        (path / name).unlink()
    else:
        (path / name).write_text(text, "utf-8")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vocab.json", None, "no tokenizer"),
        ("merges.txt", None, "merges.txt is missing"),
        ("vocab.json", "{", "not JSON"),
        ("vocab.json", "[]", "JSON object"),
        ("vocab.json", '{"a": "b"}', "whole numbers"),
        ("merges.txt", "#version: 0.2\nqq zz\n", "does not fit"),
        ("merges.txt", "#version: 0.2\na b c\n", "does not fit"),
        ("tokenizer.json", '{"model": {}}', "whole numbers"),
        ("tokenizer.json", "{}", "whole numbers"),
        ("tokenizer.json", '{"model": [3]}', "wrong kind"),
        ("tokenizer_config.json", '{"auto_map": {}}', "run code"),
        ("special_tokens_map.json", '{"pad_token": 3}', "not a token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "ids"),
    ],
)
def test_spoilt_folders_are_explained(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    write_old_form(tmp_path, EOS)
    spoil(tmp_path, name, text)
    with pytest.raises(CheckpointError, match=message):
        CLIPTokenizer.from_folder(tmp_path)


def test_tokenizers_is_imported_on_first_use_only() -> None:
    code = "import sys, fastsd.tokenizers; sys.exit('tokenizers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_the_standard_vocabulary_is_clips(pad: str, tmp_path: Path) -> None:
    """Published ids of CLIP's own tokenizer; and transformers, given the files, agrees."""
    tokenizer = CLIPTokenizer.standard({"pad_token": pad})
    assert (tokenizer.size, tokenizer.bos, tokenizer.eos) == (49408, 49406, 49407)
    assert tokenizer.pad == (0 if pad == "!" else 49407)
    known = {
        "a photo of a cat": [320, 1125, 539, 320, 2368],
        "hello world": [3306, 1002],
        "a diagram": [320, 22697],
    }
    for text, ids in known.items():
        assert [*tokenizer([text]).ids[0][: len(ids) + 2]] == [49406, *ids, 49407]
    tokenizer.save(tmp_path)
    assert encode(reference(tmp_path), NASTY).tolist() == tokenizer(NASTY).ids.tolist()
