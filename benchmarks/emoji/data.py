"""The built-in model's data: emoji pictures, their captions, and what is kept for judging.

Pictures are the 136x128 bitmaps of Debian's fonts-noto-color-emoji (images Apache-2.0, font
OFL-1.1), drawn on white. captions.json holds the names, keywords and skin-tone variants in English
and Chinese of the npm package emojibase-data (MIT); `collect` made it from that package's folder:

    npm pack emojibase-data && tar xzf emojibase-data-*.tgz
    python -m fastsd.benchmarks.emoji.data collect package
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastsd.errors import FastsdError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
GLYPH_SIZE = 109  # the one size the font's bitmaps come in
PICTURE_SIZE = 128
CAPTIONS = Path(__file__).with_name("captions.json")
TONES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}
HELD_OUT_SHARE = 0.1  # of the name x tone pairs
COMPONENT_GROUP = 2  # hair and tones by themselves


@dataclass(frozen=True)
class Emoji:
    """One picture to learn: its character(s), names, keywords, and its skin tone (0: none)."""

    character: str
    english: str
    chinese: str
    keywords: tuple[str, ...]
    chinese_keywords: tuple[str, ...]
    tone: int = 0

    @property
    def held_out(self) -> bool:
        """Whether this name x tone pair is kept out of training, by its name's SHA-256."""
        return self.tone > 0 and _digest(self.english) % 1000 < 1000 * HELD_OUT_SHARE


def _digest(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def collect(package: Path) -> None:
    """Write captions.json from the folder of emojibase-data."""

    def entries(language: str) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = json.loads(
            (package / language / "data.json").read_text("utf-8")
        )
        return data

    chinese = {entry["hexcode"]: entry for entry in entries("zh")}
    chinese |= {skin["hexcode"]: skin for entry in entries("zh") for skin in entry.get("skins", ())}
    rows = []
    for entry in entries("en"):
        if entry.get("group", COMPONENT_GROUP) == COMPONENT_GROUP:
            continue
        for variant in (entry, *entry.get("skins", ())):
            tone = variant.get("tone", 0)
            if isinstance(tone, list):  # two people of two tones
                continue
            rows.append(
                {
                    "character": variant["emoji"],
                    "english": variant["label"].lower(),
                    "chinese": chinese[variant["hexcode"]]["label"],
                    "keywords": entry.get("tags", []),
                    "chinese_keywords": chinese[entry["hexcode"]].get("tags", []),
                    "tone": tone,
                }
            )
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    CAPTIONS.write_text(f"[\n{lines}\n]\n", "utf-8")


@cache
def emojis() -> tuple[Emoji, ...]:
    """All captioned emoji, base ones and skin tones."""
    return tuple(
        Emoji(**row | {key: tuple(row[key]) for key in ("keywords", "chinese_keywords")})
        for row in json.loads(CAPTIONS.read_text("utf-8"))
    )


def draw(character: str) -> Image.Image | None:
    """Draw one emoji on white, PICTURE_SIZE square; None where the font has no picture of it."""
    font = _font()
    left, top, right, bottom = font.getbbox(character)
    if right - left > 140:  # the font knows only the parts of this sequence
        return None
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), "white")
    canvas = Image.new("RGB", (136, 128), "white")
    ImageDraw.Draw(canvas).text((-left, -top), character, font=font, embedded_color=True)
    if canvas.getextrema() == ((255, 255),) * 3:
        return None
    picture.paste(canvas, ((PICTURE_SIZE - 136) // 2, 0))
    return picture


@cache
def _font() -> ImageFont.FreeTypeFont:
    if not FONT.is_file():
        raise FastsdError(
            f"the emoji font is not at {FONT}; run apt-get install fonts-noto-color-emoji"
        )
    return ImageFont.truetype(str(FONT), size=GLYPH_SIZE)


def drawable(first: int | None = None) -> tuple[list[Emoji], np.ndarray]:
    """Draw every emoji the font has: (those emoji, pictures (N, 128, 128, 3) uint8).

    first: only so many of the captioned emoji.
    """
    known, pictures = [], []
    for emoji in emojis()[:first]:
        picture = draw(emoji.character)
        if picture is not None:
            known.append(emoji)
            pictures.append(np.asarray(picture))
    return known, np.stack(pictures)


def captions(emoji: Emoji) -> list[tuple[str, float]]:
    """What people may call it, each with its share of the training captions (they sum to 1).

    A keyword that is another emoji's name means that one: whoever writes "sun" wants the sun.
    """
    name, chinese = emoji.english, emoji.chinese
    words = [word for word in emoji.keywords if word not in _names()]
    chinese_words = [word for word in emoji.chinese_keywords if word not in _names()]
    article = "an" if name[0] in "aeiou" else "a"
    texts = [(name, 0.32), (f"{article} {name}", 0.1), (f"{name} emoji", 0.05), (chinese, 0.3)]
    texts += _shared([f"{name}, {word}" for word in emoji.keywords], name, 0.06)
    texts += _shared(words, name, 0.06)
    texts += _shared([f"{chinese}，{word}" for word in emoji.chinese_keywords], chinese, 0.05)
    texts += _shared(chinese_words, chinese, 0.06)
    return texts


@cache
def _names() -> frozenset[str]:
    return frozenset(name for emoji in emojis() for name in (emoji.english, emoji.chinese))


def _shared(texts: list[str], instead: str, share: float) -> list[tuple[str, float]]:
    texts = texts or [instead]
    return [(text, share / len(texts)) for text in texts]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=collect.__doc__)
    parser.add_argument("verb", choices=["collect"])
    parser.add_argument("package", type=Path, help="the unpacked folder of emojibase-data")
    collect(parser.parse_args().package)
