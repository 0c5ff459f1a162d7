"""The built-in model's recipe: its data, its stages, and a trial run from font to picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fastsd import Pipeline
from fastsd.benchmarks.emoji import data, distil, export, train, vocabulary
from fastsd.benchmarks.emoji.data import captions, draw, drawable, emojis
from fastsd.checkpoints.lora import read_lora
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from fastsd.quality import psnr
from fastsd.tokenizers import CLIPTokenizer

needs_font = pytest.mark.skipif(
    not data.FONT.is_file(), reason="draws emoji: apt-get install fonts-noto-color-emoji"
)


def test_captions_hold_every_name_and_share_out_one() -> None:
    for emoji in emojis()[::50]:
        texts = captions(emoji)
        assert sum(share for _, share in texts) == pytest.approx(1)
        assert {emoji.english, emoji.chinese} <= {text for text, _ in texts}


def test_a_short_caption_means_one_emoji() -> None:
    """Whoever writes "tree" wants one tree, not a mixture of six."""
    owners: dict[str, set[str]] = {}
    for emoji in emojis():
        for text, _ in captions(emoji):
            owners.setdefault(text, set()).add(emoji.english)
    keywords = {word for e in emojis() for word in (*e.keywords, *e.chinese_keywords)}
    names = {name for emoji in emojis() for name in (emoji.english, emoji.chinese)}
    assert all(len(owners[word]) == 1 for word in keywords - names)
    assert owners["sun"] == {"sun"}  # and a keyword of eleven others
    assert owners["car"] == owners["red car"] == owners["红色汽车"] == {"automobile"}
    assert owners["火"] == {"fire"}


def test_a_colour_is_named_where_it_is_most_of_the_drawing() -> None:
    paper = Image.new("RGB", (128, 128), "white")
    assert data.colour(None) == data.colour(paper) == ""
    for name in ("red", "orange", "yellow", "green", "blue", "purple", "saddlebrown", "black"):
        picture = paper.copy()
        picture.paste(Image.new("RGB", (64, 64), name), (10, 10))
        assert data.colour(picture) == name.removeprefix("saddle")
    picture.paste(Image.new("RGB", (64, 64), "grey"), (10, 10))
    assert data.colour(picture) == ""


def test_held_out_pairs_are_tones_and_never_drawn_for_training() -> None:
    held_out = [emoji for emoji in emojis() if emoji.held_out]
    tones = [emoji for emoji in emojis() if emoji.tone]
    assert all(emoji.tone for emoji in held_out)
    assert 0.05 < len(held_out) / len(tones) < 0.15
    seen: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return np.zeros((len(texts), 4), np.int64)

    train.Examples(list(emojis()), encode, torch.Generator())
    assert not {emoji.english for emoji in held_out} & set(seen)
    assert seen[-1] == ""


def test_examples_follow_weights_and_dropout() -> None:
    chosen = [emoji for emoji in emojis() if not emoji.held_out][:40]
    ids = torch.arange(100_000)
    examples = train.Examples(chosen, lambda texts: ids[: len(texts), None].numpy(), _seeded(0))
    which, rows = examples.draw(20_000, dropout=0.25)
    empty = len(examples.ids) - 1
    assert float((rows == empty).float().mean()) == pytest.approx(0.25, abs=0.02)
    counts = torch.bincount(which, minlength=len(chosen)).double()
    weights = torch.tensor([train.TONE_WEIGHT if e.tone else 1.0 for e in chosen]).double()
    assert torch.allclose(counts / counts.sum(), weights / weights.sum(), atol=0.01)


def test_vocabulary_reads_as_transformers_does(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer as Theirs

    lines = [text for emoji in emojis()[:400] for text, _ in captions(emoji)]
    vocabulary.learn(lines, 1500, tmp_path)
    ours = CLIPTokenizer.from_folder(tmp_path)
    theirs = Theirs.from_pretrained(str(tmp_path))
    texts = ["a red apple", "红苹果", "Grinning  FACE!", "naïve 123 🍎", lines[7]]
    expected = theirs(texts, padding="max_length", max_length=32, truncation=True)["input_ids"]
    assert ours(texts, 32).ids.tolist() == expected


def test_patches_are_rows_of_the_picture() -> None:
    latents = torch.arange(2 * 8 * 16 * 16).reshape(2, 8, 16, 16).float()
    patches = train.in_patches(latents)
    assert patches.shape == (2, 16, 128)
    assert torch.equal(patches[1, 6].reshape(8, 4, 4), latents[1, :, 4:8, 8:12])


def test_opponent_colours_see_green_against_red() -> None:
    """Equal lightness: plain RGB puts the two no farther apart than two of the axes do alone."""
    red, green = torch.eye(3)[0], torch.eye(3)[1]
    apart = train.opponent((red - green)[None, :, None, None]).flatten()
    assert apart[0] == 0
    assert apart[2] == -3


def test_normalising_changes_latents_and_no_picture() -> None:
    torch.manual_seed(0)
    vae = VAE(train.CONFIG.vae).requires_grad_(False)
    assert vae.post_quant_conv is not None
    pictures = torch.rand(4, 3, 128, 128) * 2 - 1
    before = vae.decode(vae.encode(pictures).chunk(2, dim=1)[0])
    latents = train.normalise_(vae, pictures)
    mean, log_variance = vae.encode(pictures).chunk(2, dim=1)
    assert torch.allclose(mean, latents, atol=1e-4)
    assert torch.allclose(latents.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-3)
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-3)
    assert torch.allclose(vae.decode(latents), before, atol=1e-4)
    assert torch.isfinite(log_variance).all()


@pytest.mark.parametrize("muon", (False, True))
def test_a_stage_goes_on_where_it_stopped(muon: bool, tmp_path: Path) -> None:
    """Stopped after its last save, it ends with the same weights as one that never stopped."""

    def run(path: Path, *, stop_at: int | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
        stage = train.Stage(module, path, minutes=1e9, peak=1e-2, decay=0.0, muon=muon)

        def losses() -> Tensor:
            if stage.step == stop_at:
                stage._save()
                raise InterruptedError
            if stage.step == 20:
                raise StopIteration
            x = torch.randn(8, 3, generator=_seeded(stage.step))
            error: Tensor = module(x) - x.sum(dim=1, keepdim=True)
            return error.square().mean()

        with pytest.raises(InterruptedError if stop_at else StopIteration):
            stage.run(losses)
        return {**module.state_dict(), **{f"average {k}": v for k, v in stage.average.items()}}

    whole = run(tmp_path / "whole.pt", stop_at=None)
    run(tmp_path / "halves.pt", stop_at=7)
    halves = run(tmp_path / "halves.pt", stop_at=None)
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


@needs_font
def test_pictures_are_the_fonts() -> None:
    apple = draw("🍎")
    assert apple is not None and apple.size == (128, 128)
    pixels = np.asarray(apple).astype(int)
    assert (pixels[0] == 255).all()  # white around it
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 90)
    assert red.mean() > 0.2
    assert draw("\U000e0041") is None  # nothing to see


@needs_font
def test_a_trial_run_ends_in_a_checkpoint_that_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage for a second on twelve emoji; a second run finds all of them done."""
    stages = ("--vae", "--text", "--decoder")
    timed = [part for stage in stages for part in (f"{stage}-minutes", "0.02")]
    timed += ["--minutes", "0.02"]
    run = tmp_path / "run"
    arguments = ["train", "--out", str(run), "--first", "12", "--batch", "4", *timed]
    monkeypatch.setattr("sys.argv", arguments)
    train.main()
    done = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert {"latents.pt", "reader.pt", "drawing.pt", "vae.pt"} <= set(done)
    train.main()
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == done

    monkeypatch.setattr("sys.argv", ["export", "--run", str(run), "--to", str(tmp_path / "model")])
    export.main()
    picture = Pipeline.from_pretrained(tmp_path / "model")(
        "grinning face", num_inference_steps=2, seed=0
    ).images[0]
    assert picture.size == (128, 128)
    on = ["train", "--out", str(tmp_path / "on"), "--start", str(tmp_path / "model")]
    monkeypatch.setattr("sys.argv", [*on, *arguments[3:]])
    train.main()
    made = {path.name for path in (tmp_path / "on").iterdir()}
    assert {"latents.pt", "reader.pt", "drawing.pt", "vae.pt"} <= made

    known, pictures = drawable(12)
    assert len(known) == len(pictures) == 12

    folder = tmp_path / "lora"
    arguments = ["distil", "--run", str(run), "--to", str(folder), "--first", "12"]
    monkeypatch.setattr("sys.argv", [*arguments, "--batch", "4", "--minutes", "0.02"])
    distil.main()
    pipeline = Pipeline.from_pretrained(tmp_path / "model")
    pipeline.load_lora_weights(folder)
    changed = pipeline("grinning face", num_inference_steps=2, seed=0).images[0]
    assert psnr(changed, picture) < 80


def test_an_adapter_file_holds_the_changes_that_were_trained(tmp_path: Path) -> None:
    """Read as any LoRA is, every layer's weight is the distilled one."""
    torch.manual_seed(0)
    unet = UNet(train.CONFIG.unet).requires_grad_(False)
    layers = distil.LoRALayers(unet, rank=2)
    for up in layers.up:
        nn.init.normal_(up, std=0.05)
    values = {name: value.detach().half().float() for name, value in layers.named_parameters()}
    save_file(layers.file(values), tmp_path / "lora.safetensors")
    own = dict(unet.named_parameters())
    lora = read_lora(tmp_path / "lora.safetensors", train.CONFIG, {"unet": own}, title="lora")
    changed = layers.weights(values)
    assert len(changed) == len(lora.deltas) > 50
    for (_, name), delta in lora.deltas.items():
        weight = own[name] + (delta.scale * delta.up @ delta.down).view_as(own[name])
        assert torch.allclose(weight, changed[name], atol=1e-6)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
