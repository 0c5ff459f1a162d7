"""Write a training run as an ordinary checkpoint folder, with the atlas of the task score.

    python -m fastsd.benchmarks.emoji.export --run runs/emoji --to fastsd/builtin

A run that still trains gives its moving average so far.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastsd.benchmarks.emoji.data import PICTURE_SIZE, drawable
from fastsd.benchmarks.emoji.train import CONFIG
from fastsd.checkpoints import save_folder
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from fastsd.quality import ATLAS_COLUMNS, ATLAS_SIDE, small
from fastsd.tokenizers import CLIPTokenizer


def load_drawing(run: Path) -> tuple[CLIPText, UNet]:
    """Load the text encoder and the UNet of a run: the finished ones, or their averages so far."""
    finished = run / "drawing.pt"
    if finished.is_file():
        weights = torch.load(finished, weights_only=True)
    else:
        weights = torch.load(run / "drawing-state.pt", weights_only=True)["average"]
    text_encoder, unet = CLIPText(CONFIG.text_encoders[0]), UNet(CONFIG.unet)
    nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}).load_state_dict(weights)
    return text_encoder.eval(), unet.eval()


def load_vae(run: Path) -> VAE:
    """Load the VAE of a run: with the refined decoder, or as it was before."""
    vae = VAE(CONFIG.vae)
    finished = run / "vae.pt"
    if finished.is_file():
        vae.load_state_dict(torch.load(finished, weights_only=True))
    else:
        vae.load_state_dict(torch.load(run / "latents.pt", weights_only=True)["vae"])
    return vae.eval()


def write_atlas(folder: Path) -> None:
    """Write atlas.png and atlas.json: every base emoji at 32x32, and its names."""
    emojis, pictures = drawable()
    base = [i for i, emoji in enumerate(emojis) if emoji.tone == 0]
    rows = -(-len(base) // ATLAS_COLUMNS)
    tiles = np.full((rows * ATLAS_COLUMNS, ATLAS_SIDE, ATLAS_SIDE, 3), 255, np.uint8)
    for tile, i in zip(tiles, base, strict=False):
        tile[:] = small(Image.fromarray(pictures[i])).round().astype(np.uint8)
    grid = tiles.reshape(rows, ATLAS_COLUMNS, ATLAS_SIDE, ATLAS_SIDE, 3).swapaxes(1, 2)
    sheet = grid.reshape(rows * ATLAS_SIDE, ATLAS_COLUMNS * ATLAS_SIDE, 3)
    Image.fromarray(sheet).save(folder / "atlas.png", optimize=True)
    names = [[emojis[i].character, emojis[i].english, emojis[i].chinese] for i in base]
    lines = ",\n".join(json.dumps(name, ensure_ascii=False) for name in names)
    (folder / "atlas.json").write_text(f"[\n{lines}\n]\n", "utf-8")


def main() -> None:
    """Replace the checkpoint's files in the target folder; leave everything else there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--to", type=Path, default=Path("fastsd/builtin"))
    arguments = parser.parse_args()

    text_encoder, unet = load_drawing(arguments.run)
    modules = {"text_encoder": text_encoder, "unet": unet, "vae": load_vae(arguments.run)}
    tokenizer = CLIPTokenizer.from_folder(arguments.run / "tokenizer")
    tokenizer.max_tokens = CONFIG.text_encoders[0].max_tokens
    assert CONFIG.default_size == PICTURE_SIZE
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "builtin"
        save_folder(folder, CONFIG, modules, [tokenizer], dtype=torch.float16)
        write_atlas(folder)
        shutil.copytree(folder, arguments.to, dirs_exist_ok=True)
    size_bytes = sum(file.stat().st_size for file in arguments.to.rglob("*") if file.is_file())
    print(f"{arguments.to}: {size_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
