"""The built-in model's data: emoji pictures, their captions, and what is kept for judging.

Pictures are the 136x128 bitmaps of Debian's fonts-noto-color-emoji (images Apache-2.0, font
OFL-1.1), drawn on white. captions.json holds the names, keywords and skin-tone variants in English
and Chinese of the npm package emojibase-data (MIT), and the colour that most of the picture has;
`collect` made it from that package's folder:

    npm pack emojibase-data && tar xzf emojibase-data-*.tgz
    python -m fastsd.benchmarks.emoji.data collect package
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from itertools import chain
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
HUES = (  # up to so many degrees
    *((12, "red"), (40, "orange"), (64, "yellow"), (165, "green"), (255, "blue")),
    *((318, "purple"), (340, "pink"), (360, "red")),
)
CHINESE_COLOURS = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色",
    "purple": "紫色", "pink": "粉色", "brown": "棕色", "black": "黑色",
}  # fmt: skip


@dataclass(frozen=True)
class Emoji:
    """One picture to learn: its character(s), names, keywords, skin tone (0: none), and colour.

    colour: that of most of the picture; "" where none is.
    """

    character: str
    english: str
    chinese: str
    keywords: tuple[str, ...]
    chinese_keywords: tuple[str, ...]
    tone: int = 0
    colour: str = ""

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
                    "colour": "" if tone else colour(draw(variant["emoji"])),
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


def colour(picture: Image.Image | None) -> str:
    """Name the colour of at least half of what is drawn; "" where none is, grey and white too."""
    if picture is None:
        return ""
    hsv = np.asarray(picture.convert("HSV")).reshape(-1, 3) / 255
    hsv = hsv[np.asarray(picture).reshape(-1, 3).min(axis=1) < 230]  # not the paper
    if len(hsv) < 500:
        return ""
    hue, saturation, value = 360 * hsv[:, 0], hsv[:, 1], hsv[:, 2]
    names = np.select(
        [value < 0.3, saturation < 0.2, (hue >= 10) & (hue < 45) & (value < 0.7)]
        + [hue <= limit for limit, _ in HUES],
        ["black", "", "brown"] + [name for _, name in HUES],
        "",
    )
    found, counts = np.unique(names, return_counts=True)
    most = counts.argmax()
    return str(found[most]) if counts[most] >= 0.5 * len(hsv) else ""


def captions(emoji: Emoji) -> list[tuple[str, float]]:
    """What people may call it, each with its share of the training captions (they sum to 1).

    A keyword stands alone, or with the colour before it, for one emoji only (`_meant`): whoever
    writes "tree" wants one tree, and a model that learnt all six draws a mixture.
    """
    name, chinese = emoji.english, emoji.chinese
    article = "an" if name[0] in "aeiou" else "a"
    texts = [(name, 0.22), (f"{article} {name}", 0.08), (f"{name} emoji", 0.03), (chinese, 0.22)]
    texts += _shared([f"{name}, {word}" for word in emoji.keywords], name, 0.05)
    texts += _shared([f"{chinese}，{word}" for word in emoji.chinese_keywords], chinese, 0.04)
    short = zip(
        _short(emoji), (name, chinese, name, chinese), (0.14, 0.12, 0.06, 0.04), strict=True
    )
    for options, instead, share in short:
        texts += _shared([text for text in options if _meant()[text] is emoji], instead, share)
    return texts


def _short(emoji: Emoji) -> tuple[list[str], ...]:
    """Keywords by themselves in English and in Chinese, then keywords and name after the colour."""
    if emoji.tone:
        return [], [], [], []
    english, chinese = list(emoji.keywords), list(emoji.chinese_keywords)
    if not emoji.colour:
        return english, chinese, [], []
    word, mark = emoji.colour, CHINESE_COLOURS[emoji.colour]
    return (
        english,
        chinese,
        [f"{word} {thing}" for thing in (emoji.english, *english) if word not in thing],
        [f"{mark}{thing}" for thing in (emoji.chinese, *chinese) if mark[0] not in thing],
    )


@cache
def _meant() -> dict[str, Emoji]:
    """Which emoji each short text (`_short`, and names) means.

    The emoji of that name ("sun" is a keyword of eleven others); else the one of which least else
    is said, by words of its name and by keywords ("car": the automobile, not the police car).
    """
    meant: dict[str, Emoji] = {}
    for emoji in emojis():
        for text in chain(*_short(emoji)):
            if text not in meant or _else(emoji, text) < _else(meant[text], text):
                meant[text] = emoji
    names = {name: emoji for emoji in reversed(emojis()) for name in (emoji.english, emoji.chinese)}
    return meant | names


def _else(emoji: Emoji, text: str) -> int:
    """How much is said of it besides the text: words, Chinese characters."""
    if text.isascii():
        words = emoji.english.replace(":", "").split()
        return len(set(words) - set(text.split())) + len(emoji.keywords)
    return len(set(emoji.chinese) - set(text)) + len(emoji.chinese_keywords)


def _shared(texts: list[str], instead: str, share: float) -> list[tuple[str, float]]:
    texts = texts or [instead]
    return [(text, share / len(texts)) for text in texts]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=collect.__doc__)
    parser.add_argument("verb", choices=["collect"])
    parser.add_argument("package", type=Path, help="the unpacked folder of emojibase-data")
    collect(parser.parse_args().package)
