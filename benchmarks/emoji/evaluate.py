"""Judge the built-in model: task scores, held-out compositions, diversity, and a contact sheet.

python -m fastsd.benchmarks.emoji.evaluate --model builtin --out runs/evaluation
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastsd import Pipeline
from fastsd.benchmarks.emoji.data import Emoji, drawable
from fastsd.images import contact_sheet, save_png
from fastsd.quality import builtin_atlas, first_by_digest, psnr, small, task_score, tasks

BATCH = 16
COMPOSITIONS = 64
SHEET = (
    "red apple", "grinning face", "cat face", "dog face", "red heart", "sun", "rocket", "pizza",
    "tree", "red car", "blue book", "rainbow", "snowman", "flag: japan", "crab", "hot beverage",
    "红苹果", "笑脸", "狗", "火", "月亮", "蛋糕", "花", "鱼",
    "waving hand: dark skin tone", "woman cook: light skin tone", "man: medium skin tone",
    "thumbs up: medium-dark skin tone", "green apple", "yellow heart", "purple circle", "whale",
)  # fmt: skip
GLOSSES = {  # a sheet's font may have no Chinese characters
    "红苹果": "red apple", "笑脸": "smiling face", "狗": "dog", "火": "fire",
    "月亮": "moon", "蛋糕": "cake", "花": "flower", "鱼": "fish",
}  # fmt: skip


class Judge:
    """Draws names, one picture each, picture i from seed i."""

    def __init__(self, model: str, steps: int, guidance: float | None) -> None:
        self._pipeline = Pipeline.from_pretrained(model)
        self._pipeline.set_progress_bar_config(disable=True)
        self.guidance = guidance or self._pipeline.config.schedule.guidance or 7.5
        self._settings: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": self.guidance,
        }

    def draw(self, names: tuple[str, ...] | list[str], seed: int = 0) -> list[Image.Image]:
        """Draw every name; the seed of picture i is seed + i."""
        pictures: list[Image.Image] = []
        for start in tqdm(range(0, len(names), BATCH), disable=None):
            part = list(names[start : start + BATCH])
            pictures += self._pipeline(part, seed=seed + start, **self._settings).images
        return pictures

    def compositions(self) -> dict[str, float]:
        """Share of held-out name x tone pairs drawn nearest to the right emoji in the right tone.

        Nearest among all base emoji and all their tones, so this needs the font.
        """
        emojis, raw = drawable()
        references = np.stack([small(Image.fromarray(picture)) for picture in raw])
        held_out: dict[str, Emoji] = {e.english: e for e in emojis if e.held_out}
        chosen = [held_out[name] for name in first_by_digest(list(held_out), COMPOSITIONS)]
        hits = base_hits = 0
        for emoji, picture in zip(chosen, self.draw([e.english for e in chosen]), strict=True):
            distances = ((references - small(picture)) ** 2).mean(axis=(1, 2, 3))
            nearest = emojis[int(distances.argmin())]
            hits += nearest == emoji
            base_hits += nearest.english.split(":")[0] == emoji.english.split(":")[0]
        return {"right": hits / len(chosen), "right_base": base_hits / len(chosen)}

    def diversity(self, names: list[str]) -> float:
        """Median PSNR in dB between two seeds of one name; lower is more diverse."""
        pairs = zip(self.draw(names), self.draw(names, seed=1000), strict=True)
        return float(np.median([psnr(a, b) for a, b in pairs]))


def main() -> None:
    """Print one JSON object, and write it with the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="by default the model's own")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--only-sheet", action="store_true", help="draw the contact sheet only")
    arguments = parser.parse_args()

    judge = Judge(arguments.model, arguments.steps, arguments.guidance)
    captions = [f"zh: {GLOSSES[n]}" if n in GLOSSES else n for n in SHEET]
    sheet = contact_sheet(judge.draw(SHEET), captions, columns=8)
    save_png(sheet, arguments.out / "contact-sheet.png")
    if arguments.only_sheet:
        return
    atlas = builtin_atlas()
    result: dict[str, Any] = {"steps": arguments.steps, "guidance": judge.guidance}
    for language, task in tasks(atlas).items():
        result[language] = asdict(task_score(atlas, task, judge.draw(task.names)))
    result["compositions"] = judge.compositions()
    result["diversity_db"] = judge.diversity(list(tasks(atlas)["english"].names[:32]))
    text = json.dumps(result, indent=2)
    (arguments.out / "scores.json").write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
