"""Train the built-in model: one command, resumable, on a GPU where there is one and on the CPU
otherwise.

    python -m fastsd.benchmarks.emoji.train --out runs/emoji

Six stages, each kept in the folder and skipped when it is there: the vocabulary, the VAE, the
latents of all pictures, the text encoder by itself, the UNet with the text encoder, and the VAE's
decoder once more. `--start builtin` goes on from a model that is there instead: its vocabulary and
VAE are kept, and its text encoder learns to read every caption as it reads the names. Each training
stage lasts a given number of minutes and its learning rate falls to nothing over them, so that it
always ends well; it saves its state every minute and goes on from there. `export.py` writes the
result as an ordinary checkpoint.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from fastsd import Pipeline
from fastsd.benchmarks.emoji import vocabulary
from fastsd.benchmarks.emoji.data import Emoji, captions, drawable
from fastsd.checkpoints import open_checkpoint, save_folder
from fastsd.config import CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from fastsd.models.clip import CLIPText
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE
from fastsd.samplers.schedule import alpha_bars
from fastsd.tokenizers import CLIPTokenizer

VOCABULARY = 4096
MAX_TOKENS = 32
WIDTH = 192  # of the text encoder
LATENT_CHANNELS = 8  # with 4, ten minutes of training lose one axis of colour: red becomes orange
CONFIG = ModelConfig(
    text_encoders=(
        CLIPConfig(
            vocab_size=VOCABULARY,
            width=WIDTH,
            mlp_width=8 * WIDTH,  # the names are kept there
            layers=3,
            heads=4,
            max_tokens=MAX_TOKENS,
            eos_token_id=VOCABULARY - 1,
        ),
    ),
    unet=UNetConfig(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        sample_size=16,
        widths=(32, 128, 192),  # attention at 4x4 only: twice the samples a second of 8x8 as well
        depths=(0, 0, 1),
        heads=(4, 4, 4),
        layers_per_level=1,
        context_width=WIDTH,
    ),
    vae=VAEConfig(
        latent_channels=LATENT_CHANNELS,
        widths=(16, 32, 64, 96),
        layers_per_level=1,
        norm_groups=16,
        scale=1.0,
        sample_size=128,
    ),
    schedule=ScheduleConfig(
        prediction="v",
        spacing="trailing",
        steps_offset=0,
        sampler="dpmpp_2m",
        order=2,
        guidance=2.0,  # the weight it looks best at; at 7.5 colours and edges are overdrawn
    ),
)
TONE_WEIGHT = 0.15  # how often a skin-tone variant is seen for each time a base emoji is
CAPTION_DROPOUT = 0.1
NOISES = 2  # that every caption of a batch is drawn from
PATCHES = 4  # along each side: of a picture's latents, one for each of the last tokens
SAVE_EVERY_S = 60.0


class Stage:
    """One training run against the clock: optimiser, learning rate, moving average, checkpoints.

    muon: weights that are matrices inside the network, a convolution's too, are optimised by Muon
    (Jordan et al. 2024) in place of AdamW, at the same learning rate. Three minutes from trained
    weights, to which both did harm at first, left what a name tells with an error of 0.090 against
    AdamW's 0.107.
    """

    def __init__(
        self,
        module: nn.Module,
        path: Path,
        *,
        minutes: float,
        peak: float,
        decay: float,
        keep: float = 0.999,
        muon: bool = False,
    ) -> None:
        self.module = module
        self.path = path
        self.minutes = minutes
        self.peak = peak
        self._keep = keep  # of the moving average, a step
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}
        matrices = _matrices(module) if muon else []
        others = set(module.parameters()) - set(matrices)
        self._flat = [(p, nn.Parameter(p.detach().view(len(p), -1))) for p in matrices]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [p for p in module.parameters() if p in others],
                lr=peak,
                betas=(0.9, 0.98),
                weight_decay=decay,
                fused=True,
            )
        ]
        if muon:
            self._optimizers.append(
                torch.optim.Muon(
                    [flat for _, flat in self._flat],
                    lr=peak,
                    weight_decay=decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        self.step = 0
        self.elapsed_s = 0.0
        if path.is_file():
            state = torch.load(path, weights_only=True)
            module.load_state_dict(state["module"])
            for optimizer, held in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(held)
            self.average = state["average"]
            self.step, self.elapsed_s = state["step"], state["elapsed_s"]

    @property
    def share(self) -> float:
        """Share of the stage's time that is spent, 0 to 1."""
        return min(self.elapsed_s / (60 * self.minutes), 1.0)

    def run(self, losses: Callable[[], Tensor]) -> None:
        """Minimise what `losses` draws until the time is up; print a line a save."""
        saved, recent = time.monotonic(), []
        while self.share < 1:
            start = time.monotonic()
            loss = losses()
            self.module.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            for weight, flat in self._flat:
                flat.grad = None if weight.grad is None else weight.grad.reshape(flat.shape)
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self._rate()
                optimizer.step()
            self._follow()
            self.step += 1
            self.elapsed_s += time.monotonic() - start
            recent.append(loss.item())
            if time.monotonic() - saved > SAVE_EVERY_S or self.share == 1:
                self._save()
                print(
                    f"{self.path.stem}: {self.elapsed_s / 60:.1f} of {self.minutes:.0f} minutes, "
                    f"step {self.step}, loss {sum(recent) / len(recent):.4f}",
                    flush=True,
                )
                saved, recent = time.monotonic(), []

    def _rate(self) -> float:
        warm = min((self.step + 1) / 200, 1.0)
        return self.peak * warm * (0.5 + 0.5 * math.cos(math.pi * self.share))

    @torch.no_grad()
    def _follow(self) -> None:
        keep = min(self._keep, (1 + self.step) / (10 + self.step))
        parameters = dict(self.module.named_parameters())
        averages = [self.average[name] for name in parameters]
        torch._foreach_lerp_(averages, list(parameters.values()), 1 - keep)

    def _save(self) -> None:
        state = {
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "average": self.average,
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        save(state, self.path)


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """Weights of linear and convolution layers, the first and the last of a UNet apart."""
    layers = {
        f"{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.endswith(("conv_in", "conv_out"))
    }
    return [weight for name, weight in module.named_parameters() if name in layers]


def save(state: Any, path: Path) -> None:
    """Write a training state so that a crash leaves the old one or the new one."""
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    os.replace(beside, path)


class Reader(nn.Module):
    """A text encoder with two heads that only its training needs: which emoji, and how it looks.

    As CLIP's text encoder learns from its pictures before any UNet does (Radford et al. 2021). The
    causal encoder's last PATCHES² tokens, padding nearly always, have read the whole caption; each
    learns to tell one patch of the latents, so that the UNet finds there what belongs where.
    """

    def __init__(self, config: ModelConfig, emojis: int) -> None:
        super().__init__()
        self.text_encoder = CLIPText(config.text_encoders[0])
        side = config.unet.sample_size // PATCHES
        self.which = nn.Linear(WIDTH, emojis)
        self.looks = nn.Linear(WIDTH, config.unet.in_channels * side * side)
        for module in self.modules():  # small, so that a rare word's first few updates count
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.03)
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N) -> a score for every emoji (B, emojis), and the latents' patches (B, P², ·)."""
        last = self.text_encoder(ids).last
        return self.which(last[:, -1]), self.looks(last[:, -(PATCHES**2) :])


def in_patches(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, P², C H/P W/P), row by row."""
    b, c, h, w = latents.shape
    grid = latents.reshape(b, c, PATCHES, h // PATCHES, PATCHES, w // PATCHES)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def train_vae(
    pictures: Tensor, weights: Tensor, path: Path, *, minutes: float, device: torch.device
) -> VAE:
    """Learn to rebuild pictures from latents: 64x64 crops, then whole pictures for the last tenth.

    The colour channels of every crop change places at random: most emoji are yellow, and without
    this the latents lose green and purple. In fp32: on a CPU bf16 is slower here.

    pictures: (N, 3, H, W) in [-1, 1]; weights: (N,), how often each is drawn.
    """
    torch.manual_seed(0)
    vae = VAE(CONFIG.vae).to(device)
    colours = nn.Conv2d(LATENT_CHANNELS, 3, 1).to(device)  # a reader that only training needs
    both = nn.ModuleDict({"vae": vae, "colours": colours})
    stage = Stage(both, path, minutes=minutes, peak=2e-3, decay=0.0)
    generator = torch.Generator().manual_seed(stage.step)
    cell = pictures.shape[-1] // CONFIG.unet.sample_size

    def losses() -> Tensor:
        side = 64 if stage.share < 0.9 else pictures.shape[-1]
        rows = torch.multinomial(
            weights, 16 if side == 64 else 4, replacement=True, generator=generator
        )
        x = _crops(pictures[rows], side, generator).to(device)
        mean, log_variance = vae.encode(x).chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        noise = torch.randn(mean.shape, device=device)
        y = vae.decode(mean + noise * (0.5 * log_variance).exp())
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        told = F.mse_loss(colours(mean), F.avg_pool2d(opponent(x), cell))
        return _picture_distance(y, x) + told + 1e-5 * kl

    stage.run(losses)
    both.load_state_dict(stage.average)
    return vae.eval().requires_grad_(False)


def refine_decoder(
    vae: VAE,
    pictures: Tensor,
    latents: Tensor,
    drawn: Tensor,
    weights: Tensor,
    path: Path,
    *,
    minutes: float,
    device: torch.device,
) -> None:
    """Go on with the decoder alone, in place: the latents, which the UNet has learnt, stay as are.

    Whole pictures, every other one from what the UNet drew of it (`draw_all`), so that the decoder
    learns what the UNet leaves rough. drawn: as latents; NaN where there is no drawing.
    """
    torch.manual_seed(0)
    assert vae.post_quant_conv is not None
    decoder = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
    decoder.to(device).train().requires_grad_(True)
    stage = Stage(decoder, path, minutes=minutes, peak=1e-3, decay=0.0)
    generator = torch.Generator().manual_seed(stage.step)
    has_drawing = drawn.isfinite().flatten(1).all(dim=1)

    def losses() -> Tensor:
        rows = torch.multinomial(weights, 4, replacement=True, generator=generator)
        x = pictures[rows].to(device)
        from_drawing = has_drawing[rows] & (torch.arange(len(rows)) % 2 == 0)
        z = torch.where(from_drawing[:, None, None, None], drawn[rows], latents[rows])
        return _picture_distance(vae.decode(z.to(device)), x)

    stage.run(losses)
    decoder.load_state_dict(stage.average)
    decoder.eval().requires_grad_(False)


def draw_all(
    modules: Mapping[str, nn.Module],
    tokenizer: CLIPTokenizer,
    names: list[str],
    device: torch.device,
) -> Tensor:
    """Draw each name once as the model is drawn with, in bf16: its latents (N, C, h, w), fp32."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_folder(folder, CONFIG, modules, [tokenizer])
        pipeline = Pipeline.from_pretrained(folder, device=device, precision="bf16")
        pipeline.set_progress_bar_config(disable=True)
        drawn = [
            pipeline(
                names[start : start + 64], seed=start, num_inference_steps=20, output_type="latent"
            ).images
            for start in tqdm(range(0, len(names), 64), desc="drawing", disable=None)
        ]
    return torch.cat(drawn).float().cpu()


def _crops(pictures: Tensor, side: int, generator: torch.Generator) -> Tensor:
    room = pictures.shape[-1] - side + 1
    tops, lefts = (torch.randint(room, (len(pictures),), generator=generator) for _ in range(2))
    return torch.stack(
        [
            picture[:, top : top + side, left : left + side]
            for picture, top, left in zip(pictures, tops, lefts, strict=True)
        ]
    )


def opponent(x: Tensor) -> Tensor:
    """RGB (B, 3, H, W) to lightness, red against blue and green against both, each weighed.

    Most emoji are yellow or red: in plain RGB green against red is 3 % of the variance, and a
    VAE trained for minutes leaves it out.
    """
    weights = x.new_tensor([[0.33, 0.33, 0.33], [0.8, 0.0, -0.8], [-1.0, 2.0, -1.0]])
    return torch.einsum("oc,bchw->bohw", weights, x)


def _picture_distance(y: Tensor, x: Tensor) -> Tensor:
    """Absolute difference of pixels, their gradients and areas, in opponent colours."""
    y, x = opponent(y), opponent(x)
    distance = F.l1_loss(y, x)
    distance = distance + 0.5 * F.l1_loss(y.diff(dim=-1), x.diff(dim=-1))
    distance = distance + 0.5 * F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    for side in (2, 4, 8):  # colours of areas
        distance = distance + 0.5 * F.l1_loss(F.avg_pool2d(y, side), F.avg_pool2d(x, side))
    return distance


@torch.no_grad()
def encode(vae: VAE, pictures: Tensor) -> Tensor:
    """Return the latents of all pictures, (N, C, h, w), on the CPU: what the VAE takes for mean."""
    device = next(vae.parameters()).device
    parts = torch.split(pictures, 64)
    return torch.cat([vae.encode(part.to(device)).chunk(2, dim=1)[0].cpu() for part in parts])


@torch.no_grad()
def normalise_(vae: VAE, pictures: Tensor) -> Tensor:
    """Give every latent channel mean 0 and variance 1 by folding both into the 1x1 convolutions.

    Returns the latents of all pictures, (N, C, h, w).
    """
    means = encode(vae, pictures)
    mean, deviation = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    assert before is not None and before.bias is not None
    assert after is not None and after.bias is not None
    scale = torch.cat([1 / deviation, torch.ones_like(deviation)]).to(before.weight)
    shift = torch.cat([-mean / deviation, -2 * deviation.log()]).to(before.weight)
    before.weight.mul_(scale[:, None, None, None])
    before.bias.mul_(scale).add_(shift)
    after.bias.add_(torch.einsum("oixy,i->o", after.weight, mean.to(after.weight)))
    after.weight.mul_(deviation[None, :, None, None].to(after.weight))
    return (means - mean[:, None, None]) / deviation[:, None, None]


class Examples:
    """Draws (which emoji, which caption): a picture by its weight, a caption by its share.

    ids: (captions, N), every caption's tokens; the last row is the empty caption's. owners: which
    emoji each of the others is of.
    """

    def __init__(
        self,
        emojis: list[Emoji],
        encode: Callable[[list[str]], np.ndarray],
        generator: torch.Generator,
    ) -> None:
        texts, owners, shares = [], [], []
        for i, emoji in enumerate(emojis):
            if emoji.held_out:
                continue
            weight = TONE_WEIGHT if emoji.tone else 1.0
            for text, share in captions(emoji):
                texts.append(text)
                owners.append(i)
                shares.append(weight * share)
        self.ids = torch.from_numpy(encode([*texts, ""]))
        self.owners = torch.tensor(owners)
        self._shares = torch.tensor(shares)
        self._generator = generator

    def draw(self, count: int, *, dropout: float) -> tuple[Tensor, Tensor]:
        """(count,) each; a share `dropout` of the captions is empty, for guidance."""
        rows = torch.multinomial(self._shares, count, replacement=True, generator=self._generator)
        dropped = torch.rand(count, generator=self._generator) < dropout
        return self.owners[rows], torch.where(dropped, len(self.ids) - 1, rows)


def train_reader(
    examples: Examples,
    latents: Tensor,
    path: Path,
    *,
    minutes: float,
    device: torch.device,
    generator: torch.Generator,
) -> CLIPText:
    """Learn to tell from a caption which emoji it names, and how that one looks.

    Returns the text encoder; the heads are left behind.
    """
    torch.manual_seed(0)
    reader = Reader(CONFIG, len(latents)).to(device)
    stage = Stage(reader, path, minutes=minutes, peak=2.5e-3, decay=0.01)
    generator.manual_seed(1 + stage.step)
    patches = in_patches(latents)

    def losses() -> Tensor:
        which, rows = examples.draw(256, dropout=CAPTION_DROPOUT)
        with quick(device):
            scores, looks = reader(examples.ids[rows].to(device))
        distance = F.mse_loss(looks.float(), patches[which].to(device))
        return distance + 0.05 * F.cross_entropy(scores.float(), which.to(device))

    stage.run(losses)
    reader.load_state_dict(stage.average)
    return reader.text_encoder.eval().requires_grad_(False)


@torch.no_grad()
def read(text_encoder: CLIPText, ids: Tensor, device: torch.device) -> Tensor:
    """What the text encoder says of every caption, (captions, N, D) in fp16, on the CPU."""
    parts = [text_encoder(part.to(device)).last.half().cpu() for part in torch.split(ids, 512)]
    return torch.cat(parts)


@contextmanager
def quick(device: torch.device) -> Iterator[None]:
    """Compute in bf16; on a CPU without the fused attention, whose backward pass is slow there."""
    fused = [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.EFFICIENT_ATTENTION]
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel([*fused, SDPBackend.MATH]):
        yield


def noise_levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma of timesteps t (B,): x = alpha x0 + sigma noise. Each (B, 1, 1, 1)."""
    a = torch.from_numpy(alpha_bars(CONFIG.schedule)).float()[t][:, None, None, None]
    return a.sqrt(), (1 - a).sqrt()


def train_drawing(
    text_encoder: CLIPText,
    unet: UNet,
    examples: Examples,
    latents: Tensor,
    path: Path,
    *,
    minutes: float,
    peak: float,
    batch: int,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Learn v = alpha * noise - sigma * x0 (Salimans and Ho 2022), the text encoder with the UNet.

    Returns the parameters of both, by `text_encoder.` and `unet.`. Every caption of a batch is read
    once and drawn NOISES times, since reading costs a quarter of drawing. All timesteps weigh the
    same, and those of a batch are spread evenly. (Min-SNR weights, made for large data, leave next
    to nothing to the noisiest steps, where a small model learns what a caption looks like.)
    """
    torch.manual_seed(0)
    both = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}).to(device)
    both.train().requires_grad_(True)
    stage = Stage(both, path, minutes=minutes, peak=peak, decay=0.01, muon=True)
    generator.manual_seed(1 + stage.step)
    steps = CONFIG.schedule.train_steps
    count = batch // NOISES

    def losses() -> Tensor:
        which, rows = examples.draw(count, dropout=CAPTION_DROPOUT)
        x0 = latents[which].repeat(NOISES, 1, 1, 1)
        spread = torch.arange(count * NOISES) + torch.rand(count * NOISES, generator=generator)
        t = (spread / (count * NOISES) * steps).long()
        noise = torch.randn(x0.shape, generator=generator)
        alpha, sigma = noise_levels(t)
        x = alpha * x0 + sigma * noise
        v = alpha * noise - sigma * x0
        with quick(device):
            states = text_encoder(examples.ids[rows].to(device)).last.repeat(NOISES, 1, 1)
            prediction = unet.standard(x.to(device), t.to(device), states)
        return F.mse_loss(prediction.float(), v.to(device))

    stage.run(losses)
    return stage.average


def refine_reading(
    text_encoder: CLIPText,
    examples: Examples,
    names: Tensor,
    path: Path,
    *,
    minutes: float,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    """Go on with a text encoder, in place: read each caption as its emoji's name is read.

    Drawing shows a keyword a few times only, each time in noise; what the UNet has learnt to draw
    the name from says all of it at once. A caption comes the oftener, the worse it was read last.
    The last PATCHES² tokens, which have read all words (see Reader), are to be near those of the
    name, and nearer than to any other name; the first, of different words, count a tenth.

    names: (emojis, N), each name's tokens.
    """
    torch.manual_seed(0)
    text_encoder.to(device)
    wanted = read(text_encoder, names, device).float()
    known = torch.zeros(len(names), dtype=torch.bool)
    known[examples.owners] = True  # not the names held out
    right = (known.cumsum(0) - 1)[examples.owners]
    others = wanted[known, -(PATCHES**2) :].flatten(1).to(device)
    errors = torch.ones(len(right))
    stage = Stage(
        text_encoder.train().requires_grad_(True),
        path,
        minutes=minutes,
        peak=2e-3,
        decay=0.0,
        muon=True,
    )
    generator.manual_seed(1 + stage.step)

    def losses() -> Tensor:
        rows = torch.multinomial(errors, 256, replacement=True, generator=generator)
        with quick(device):
            states: Tensor = text_encoder(examples.ids[rows].to(device)).last
            all_read = states[:, -(PATCHES**2) :].flatten(1)
            alike = (all_read @ others.T).float()
        squares = all_read.float().square().sum(1, keepdim=True) + others.square().sum(1)
        away = (squares - 2 * alike) / others.shape[1]
        distance = (states - wanted[examples.owners[rows]].to(device)).square().mean(dim=2)
        first, last = distance[:, : -(PATCHES**2)], distance[:, -(PATCHES**2) :].mean(dim=1)
        confused = F.cross_entropy(-20 * away, right[rows].to(device), reduction="none")
        each = last + 0.05 * confused
        errors[rows] = each.detach().cpu() + 0.01
        return each.mean() + 0.1 * first.mean()

    stage.run(losses)
    text_encoder.load_state_dict(stage.average)
    text_encoder.eval().requires_grad_(False)


def _pictures(raw: np.ndarray) -> Tensor:
    return torch.from_numpy(raw).permute(0, 3, 1, 2).float() / 127.5 - 1


def _caption_lines(emojis: list[Emoji]) -> Iterator[str]:
    for emoji in emojis:
        yield from (text for text, _ in captions(emoji))


def main() -> None:
    """Run the stages that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="folder of the run")
    parser.add_argument("--start", help="go on from this model of the same sizes, e.g. builtin")
    parser.add_argument("--vae-minutes", type=float, default=15)
    parser.add_argument("--text-minutes", type=float, default=20, help="for the text encoder")
    parser.add_argument("--minutes", type=float, default=70, help="for the UNet, with it")
    parser.add_argument("--decoder-minutes", type=float, default=10, help="at the end")
    parser.add_argument("--peak", type=float, default=1e-3, help="the UNet's learning rate")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--first", type=int, help="learn only so many emoji: a trial run")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    emojis, raw = drawable(arguments.first)
    pictures = _pictures(raw)
    start = open_checkpoint(arguments.start) if arguments.start else None
    if (out / "tokenizer" / "vocab.json").is_file():
        pass
    elif start is not None:
        start.tokenizers[0].save(out / "tokenizer")
    else:
        vocabulary.learn(_caption_lines(drawable()[0]), VOCABULARY, out / "tokenizer")
    tokenizer = CLIPTokenizer.from_folder(out / "tokenizer")
    tokenizer.max_tokens = MAX_TOKENS

    weights = torch.tensor([TONE_WEIGHT if emoji.tone else 1.0 for emoji in emojis])
    if not (out / "latents.pt").is_file():
        vae = VAE(CONFIG.vae).to(device)
        if start is not None:
            vae.load_state_dict(start.load("vae").state_dict())
            latents = encode(vae, pictures)
        else:
            vae = train_vae(
                pictures,
                weights,
                out / "vae-state.pt",
                minutes=arguments.vae_minutes,
                device=device,
            )
            latents = normalise_(vae, pictures)
        save({"vae": vae.state_dict(), "latents": latents}, out / "latents.pt")
    latents = torch.load(out / "latents.pt", weights_only=True)["latents"]

    generator = torch.Generator()
    examples = Examples(emojis, lambda texts: tokenizer(texts, MAX_TOKENS).ids, generator)
    text_encoder, unet = CLIPText(CONFIG.text_encoders[0]), UNet(CONFIG.unet)
    if start is not None:
        text_encoder.load_state_dict(start.load("text_encoder").state_dict())
        unet.load_state_dict(start.load("unet").state_dict())
    if not (out / "reader.pt").is_file():
        settings: dict[str, Any] = {
            "minutes": arguments.text_minutes,
            "device": device,
            "generator": generator,
        }
        if start is None:
            text_encoder = train_reader(examples, latents, out / "reader-state.pt", **settings)
        else:
            names = torch.from_numpy(tokenizer([e.english for e in emojis], MAX_TOKENS).ids)
            refine_reading(text_encoder, examples, names, out / "reader-state.pt", **settings)
        save(text_encoder.state_dict(), out / "reader.pt")
    text_encoder.load_state_dict(torch.load(out / "reader.pt", weights_only=True))
    if not (out / "drawing.pt").is_file():
        drawing = train_drawing(
            text_encoder,
            unet,
            examples,
            latents,
            out / "drawing-state.pt",
            minutes=arguments.minutes,
            peak=arguments.peak,
            batch=arguments.batch,
            device=device,
            generator=generator,
        )
        save(drawing, out / "drawing.pt")

    if (out / "vae.pt").is_file():
        return
    vae = VAE(CONFIG.vae)
    vae.load_state_dict(torch.load(out / "latents.pt", weights_only=True)["vae"])
    nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}).load_state_dict(
        torch.load(out / "drawing.pt", weights_only=True)
    )
    modules = {"text_encoder": text_encoder.cpu(), "unet": unet.cpu(), "vae": vae}
    known = [i for i, emoji in enumerate(emojis) if not emoji.held_out]
    drawn = torch.full_like(latents, math.nan)
    drawn[known] = draw_all(modules, tokenizer, [emojis[i].english for i in known], device)
    refine_decoder(
        vae,
        pictures,
        latents,
        drawn,
        weights,
        out / "decoder-state.pt",
        minutes=arguments.decoder_minutes,
        device=device,
    )
    save(vae.state_dict(), out / "vae.pt")


if __name__ == "__main__":
    main()
