"""Turn a checkpoint into another form: a single file, a diffusers folder, safetensors for a pickle.

A pickle is opened only here, and only in a process of its own (unpickle.py).
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fastsd.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fastsd.checkpoints.ldm import (
    OPEN_CLIP_TENSORS,
    STACKED,
    clip_map,
    open_clip_map,
    unet_map,
    vae_map,
)
from fastsd.checkpoints.save import save_folder
from fastsd.checkpoints.single import FAMILIES, UNET, VAE, read_single
from fastsd.checkpoints.weights import PICKLES, PRECISIONS, ZIP, read_header
from fastsd.config import CLIPConfig, ModelConfig
from fastsd.errors import CheckpointError, UsageError
from fastsd.files import check_free, published_file
from fastsd.samplers import SAMPLERS

log = logging.getLogger("fastsd")

_PICKLE_ENDINGS = (".ckpt", ".pt", ".pth", ".bin")
# Others are written as fp32; fp16 holds all of fp8's numbers.
_OWN_DTYPES = {"BF16": "bf16", "F16": "fp16", "F8_E4M3": "fp16", "F8_E5M2": "fp16"}
_SECONDS = 1800
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota's


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    prediction: str | None = None,
    preset: str | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    variant: str | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
) -> None:
    """Write the checkpoint `source` as `target`, which appears whole or not at all.

    source: whatever opens, or a pickle (.ckpt, .pt, .bin). target: a folder in the diffusers
    layout; or, by the ending .safetensors, a single file in the original layout. A pickle becomes
    safetensors of the same names, whatever it holds. dtype: fp32, fp16 or bf16; None keeps the
    UNet's. preset: a folder keeps it, so that it is drawn with as such unasked; a single file has
    no place for it. loras: merged into the weights, each at its weight. The rest is as in
    open_checkpoint. Raises CheckpointError or UsageError.
    """
    target = Path(target)
    ending = target.suffix.lower()
    if ending in _PICKLE_ENDINGS:
        raise UsageError(
            f"{target} is named as a pickle, which fastsd does not write; end it in .safetensors "
            "for a single file, or give a folder's name"
        )
    check_free(target, "choose another name or move it away")
    if dtype is not None and dtype not in PRECISIONS:
        raise UsageError(f"dtype {dtype!r} is unknown; it is one of {', '.join(PRECISIONS)}")
    single = ending == ".safetensors"
    if single and preset is not None:
        raise UsageError(
            f"a single file cannot keep preset {preset!r}; convert to a folder, or give the preset "
            "when you draw"
        )
    pickled = isinstance(source, (str, Path)) and _is_pickle(Path(source))
    if pickled and single and loras:
        raise UsageError("a pickle is rewritten as it is; convert it first, then merge LoRAs")
    if pickled and single:
        with (
            unpickled(Path(source)) as tensors,
            _explained(target),
            published_file(target) as draft,
        ):
            shutil.move(tensors, draft)
        return
    with ExitStack() as stack:
        if pickled:
            source = stack.enter_context(unpickled(Path(source)))
        checkpoint = open_checkpoint(
            source,
            prediction=prediction,
            preset=preset,
            vae=vae,
            tokenizer=tokenizer,
            variant=variant,
        )
        if loras:
            checkpoint = checkpoint.with_loras(loras)
        chosen = PRECISIONS[dtype or _own_dtype(checkpoint)]
        modules = {part: checkpoint.load(part, chosen) for part in checkpoint.parts}
        if single:
            tensors_of = _original(checkpoint, modules)
            written = {key: t.to(chosen).contiguous() for key, t in tensors_of.items()}
            marks = {"v": "v", "eps": "epsilon"}
            spec = marks.get(checkpoint.config.schedule.prediction)
            metadata = {"format": "pt"} | ({"modelspec.prediction_type": spec} if spec else {})
            with _explained(target), published_file(target) as draft:
                save_file(written, draft, metadata=metadata)
                _check_kept(draft, checkpoint)
        else:
            tokenizers = checkpoint.tokenizers
            with _explained(target):
                save_folder(target, checkpoint.config, modules, tokenizers, dtype=chosen)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn a full or failing disk into CheckpointError; the draft is gone by then.

    Of the folders above `target`, those that were made for it go too, if it fails.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        full = not isinstance(error, OSError) or error.errno in _FULL
        remedy = "free some space, or choose another place" if full else "choose another place"
        raise CheckpointError(
            f"{target} could not be written: {said or error}; nothing was left there: {remedy}"
        ) from error
    finally:
        for folder in made:
            with suppress(OSError):  # it holds the target
                folder.rmdir()


def _own_dtype(checkpoint: Checkpoint) -> str:
    files = checkpoint.parts["unet"]
    counts: Counter[str] = Counter()
    for file in files.weights:
        for key, info in read_header(file).items():
            if files.uses is None or key in files.uses:
                counts[_OWN_DTYPES.get(info.dtype, "fp32")] += info.count
    return max(counts, key=lambda dtype: counts[dtype], default="fp32")


# --- pickles --------------------------------------------------------------------------------------


def _is_pickle(path: Path) -> bool:
    """Judge by the first bytes: a zip of torch's, or a bare pickle."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(16)
    return start.startswith(ZIP) or (start.startswith(PICKLES) and start[8:9] != b"{")


@contextmanager
def unpickled(path: Path) -> Iterator[Path]:
    """Yield a safetensors file of a pickle's tensors, gone afterwards.

    They are read by another process, which may not run what the pickle holds, has bounds on memory,
    time and files, and knows nothing of this one's environment. Raises CheckpointError.
    """
    with tempfile.TemporaryDirectory(prefix="fastsd-") as folder:
        target = Path(folder) / f"{path.stem}.safetensors"
        script = Path(__file__).with_name("unpickle.py")
        command = [
            sys.executable,
            "-I",
            "-W",
            "ignore",
            str(script),
            str(path.absolute()),
            str(target),
        ]
        kept = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "TMPDIR", "TEMP", "TMP")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        try:
            result = subprocess.run(
                command,
                cwd=folder,
                env=environment | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise CheckpointError(f"{path} took longer than {_SECONDS} s to read") from None
        if result.returncode or not target.is_file():
            said = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
            raise CheckpointError(f"{path} was not converted: {said[-1]}")
        try:
            yield target
        except CheckpointError as error:  # of a file whose name the user never gave
            raise CheckpointError(str(error).replace(str(target), str(path))) from None


# --- the original layout --------------------------------------------------------------------------


def _original(checkpoint: Checkpoint, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return every tensor under its original name."""
    config = checkpoint.config
    family = next((f for f in FAMILIES if f.preset.family == config.family), None)
    if family is None or config.vae.blocks is not None or config.unet.guidance_width:
        raise _no_form(checkpoint, "its parts are of other kinds")
    unet, vae = config.unet, config.vae
    names = unet_map([depth > 0 for depth in unet.depths], unet.layers_per_level)
    tensors = {
        f"{UNET}{names.original(name)}": tensor
        for name, tensor in modules["unet"].state_dict().items()
    }
    names = vae_map(len(vae.widths), vae.layers_per_level)
    for name, tensor in modules["vae"].state_dict().items():
        convolution = ".attentions." in name and tensor.ndim == 2  # 1x1 there
        tensors[f"{VAE}{names.original(name)}"] = (
            tensor[:, :, None, None] if convolution else tensor
        )
    for keys, text, part in zip(family.texts, config.text_encoders, config.text_parts, strict=True):
        state = modules[part].state_dict()
        write = _open_clip if keys.open_clip else _clip
        tensors |= {f"{keys.prefix}{key}": t for key, t in write(state, text).items()}
    schedule = config.schedule
    if schedule.prediction == "v" and family.preset.schedule.prediction != "v":
        tensors["v_pred"] = torch.zeros(0)  # a mark, which others read: the key says it
    if schedule.zero_terminal_snr:
        tensors["ztsnr"] = torch.zeros(0)
    return tensors


def _no_form(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path} has no form in the original layout: {why}; give a folder's name"
    )


# What no file says, and what no picture shows.
_UNSEEN = ("unet.upcast_attention", "vae.force_upcast", "vae.sample_size")
# What of a schedule is the model's own; the rest is chosen in drawing.
_LASTING = (
    *("train_steps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction", "zero_terminal_snr"),
)


def _check_kept(file: Path, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless `file`, which holds no config, is read as what was written.

    Logs what has to be chosen in drawing instead.
    """
    try:
        read = _facts(read_single(file).config)
    except CheckpointError as error:
        why = str(error).removeprefix(f"{file}: ").replace(str(file), "the file")
        raise _no_form(checkpoint, why) from None
    facts = _facts(checkpoint.config)
    lost = {name: value for name, value in facts.items() if read.get(name) != value}
    chosen = {name: lost.pop(name) for name in list(lost) if _is_chosen(name)}
    if lost:
        name, value = next(iter(lost.items()))
        raise _no_form(
            checkpoint, f"its {name} is {value}, a file would be read as {read.get(name)}"
        )
    if chosen:
        log.warning(
            "%s does not keep %s: choose it in drawing",
            file.name,
            ", ".join(f"{name} {value}" for name, value in chosen.items()),
        )


def _is_chosen(name: str) -> bool:
    part, _, field = name.rpartition(".")
    return (
        name in ("unet.sample_size", "zero_empty_negative")
        or part == "schedule"
        and field not in _LASTING
    )


def _facts(config: ModelConfig) -> dict[str, Any]:
    """Return what a config says of pictures, flat: "unet.heads" and so on."""
    whole = asdict(config)
    for part, text in zip(config.text_parts, whole.pop("text_encoders"), strict=True):
        if text["eos_token_id"] == 2:  # the old way to say: the largest id
            text["eos_token_id"] = text["vocab_size"] - 1
        whole[part] = text
    schedule = whole["schedule"]
    if schedule["spacing"] == "default" and schedule["sampler"] in SAMPLERS:
        schedule["spacing"] = SAMPLERS[schedule["sampler"]].spacing
    facts: dict[str, Any] = {}
    for name, value in whole.items():
        inner = value.items() if isinstance(value, dict) else ()
        facts |= {f"{name}.{field}": v for field, v in inner} if inner else {name: value}
    return {name: value for name, value in facts.items() if name not in _UNSEEN}


def _clip(state: Mapping[str, Tensor], text: CLIPConfig) -> dict[str, Tensor]:
    names = clip_map(text.layers)
    return {f"{names.original(name)}": tensor for name, tensor in state.items()}


def _open_clip(state: Mapping[str, Tensor], text: CLIPConfig) -> dict[str, Tensor]:
    names = open_clip_map(text.layers)
    ours = {name: key for key, name in OPEN_CLIP_TENSORS.items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in ours:
            tensors[ours[name]] = tensor.t() if ours[name] == "text_projection" else tensor
        elif not any(f".{third}." in name for third in STACKED):
            tensors[f"{names.original(name)}"] = tensor
    for i in range(text.layers):
        for leaf in ("weight", "bias"):
            thirds = [state[f"encoder.layers.{i}.self_attn.{name}.{leaf}"] for name in STACKED]
            tensors[f"transformer.resblocks.{i}.attn.in_proj_{leaf}"] = torch.cat(thirds)
    if text.projection is None:
        # Stable Diffusion 2 leaves OpenCLIP's last layer out; programs that read the original
        # layout build it all the same, and want something there.
        last = f"transformer.resblocks.{text.layers - 1}."
        for key in [key for key in tensors if key.startswith(last)]:
            tensors[key.replace(last, f"transformer.resblocks.{text.layers}.")] = tensors[
                key
            ].clone()
        tensors["text_projection"] = torch.eye(text.width)
    return tensors
