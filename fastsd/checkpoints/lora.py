"""LoRA files: low-rank changes to weights, in kohya's names, PEFT's and diffusers' older ones.

    W' = W + weight * (alpha / rank) * up @ down          Hu et al. 2021; alpha absent: rank

Knows names and shapes; who keeps the weights and changes them is fastsd.adapters.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastsd.checkpoints import hub
from fastsd.checkpoints.keys import canonical, guess
from fastsd.checkpoints.layout import BUILTIN
from fastsd.checkpoints.ldm import unet_map
from fastsd.checkpoints.weights import WEIGHT_DTYPES, TensorInfo, read_header, read_metadata
from fastsd.config import PRESETS, ModelConfig
from fastsd.errors import CheckpointError, UsageError
from fastsd.files import explained_denials, explained_values, read_json

Target = tuple[str, str]  # a part and the name of one of its weights
Weights = Mapping[str, Mapping[str, Tensor]]  # part -> name -> weight

# How a key ends -> what it holds. After the first group that fits comes the module's name.
_ENDINGS = (
    (re.compile(r"\.lora_down\.weight$|\.lora_A(\.default)?\.weight$"), "down"),
    (re.compile(r"\.lora_up\.weight$|\.lora_B(\.default)?\.weight$"), "up"),
    (re.compile(r"(\.lora|_lora|\.lora_linear_layer)\.down\.weight$"), "down"),
    (re.compile(r"(\.lora|_lora|\.lora_linear_layer)\.up\.weight$"), "up"),
    (re.compile(r"\.alpha$"), "alpha"),
)
# What a key holds -> the kind of adapter it belongs to, which is not a LoRA or not only one.
OTHER_KINDS = {
    r"\.hada_w": "a LoHa of LyCORIS",
    r"\.lokr_w": "a LoKr of LyCORIS",
    r"\.oft_": "an OFT of LyCORIS",
    r"\.on_input$": "an IA3 of LyCORIS",
    r"\.lora_mid\.": "a Tucker LoCon of LyCORIS",
    r"\.a1\.weight$": "a GLoRA of LyCORIS",
    r"\.diff(_b)?$": "a difference of whole weights, of LyCORIS",
    r"\.[wb]_norm$": "norms of LyCORIS",
    r"\.dora_scale$|\.lora_magnitude_vector": "a DoRA",
    r"\.lora_B\.bias$": "a LoRA with biases",
    r"\.lora_embedding_": "a LoRA of embeddings",
}
_KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_DOTTED = ("unet", "text_encoder_2", "text_encoder")
_OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# a cross-attention's keys or values, whose input is the text
_TEXT_READER = re.compile(r"attn2[._](processor\.)?to_[kv](_lora|\.lora)?[._](lora_)?(down|A)\b")
_USUAL_NAME = "pytorch_lora_weights.safetensors"
_PEFT_NAME = "adapter_model.safetensors"  # whose settings are in a file beside it
_SHOWN = 5
GIVEN_TENSORS = "the given tensors"  # the title of what no file holds


@dataclass(frozen=True)
class Delta:
    """scale * up @ down, a change to a weight taken as a matrix (out, rest).

    up: (out, rank); down: (rank, rest), both fp32.
    """

    up: Tensor
    down: Tensor
    scale: float


@dataclass(frozen=True)
class LoRA:
    """title: what to call it, e.g. the file's name. deltas: a change for each weight it touches."""

    title: str
    deltas: Mapping[Target, Delta]

    def digest(self) -> str:
        """Return the SHA-256 of every change that it makes."""
        total = hashlib.sha256()
        for target, delta in sorted(self.deltas.items()):
            total.update(f"{target} {tuple(delta.down.shape)} {delta.scale}".encode())
            for tensor in (delta.up, delta.down):
                total.update(tensor.contiguous().numpy().tobytes())
        return total.hexdigest()


@torch.no_grad()
def merge_(weight: Tensor, original: Tensor, deltas: Sequence[tuple[Delta, float]]) -> None:
    """Write original + sum of strength * delta into `weight`, added in fp32 and rounded once.

    The sum has a buffer of its own, which stays in the processor's cache: adding in place took 120
    ms where this takes 80, for rank 16 over the 94 million weights of SD1.5's attention on one
    core. Copying the originals back takes 33.
    """
    flat = torch.flatten(original, 1)  # by torch, as weights may only stand for a tensor
    total = flat.to(weight.device, torch.float32, copy=True)
    for delta, strength in deltas:
        up, down = delta.up.to(total.device), delta.down.to(total.device)
        total.addmm_(up, down, alpha=delta.scale * strength)
    weight.copy_(total.view(weight.shape))


def read_lora(
    source: Path | Mapping[str, Tensor], config: ModelConfig, weights: Weights, *, title: str
) -> LoRA:
    """Read a LoRA for a model of `config` whose `weights` it is to change.

    source: a safetensors file, or a dict of tensors as such a file would hold. Every key is used;
    every pair fits its weight. Raises CheckpointError naming what does not, and what it may be for.
    """
    with explained_values(title):
        if isinstance(source, Path):
            tensors, settings = _read_file(source)
        else:
            tensors, settings = dict(source), {}
        return _read(tensors, settings, config, weights, title)


def _read(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    config: ModelConfig,
    weights: Weights,
    title: str,
) -> LoRA:
    for mark, kind in OTHER_KINDS.items():
        found = next((key for key in tensors if re.search(mark, key)), None)
        if found is not None:
            raise CheckpointError(f"{title} is {kind} ({found}), which is not supported, only LoRA")
    pairs, unknown = _pair(tensors, _Names(config, weights))
    if unknown:
        shown = ", ".join(unknown[:_SHOWN]) + (", …" if len(unknown) > _SHOWN else "")
        raise CheckpointError(
            f"{title} does not fit this {config.family} model: {len(unknown)} of its "
            f"{len(tensors)} keys name nothing in it ({shown}); {_made_for(tensors)}"
        )
    if not pairs:
        raise CheckpointError(f"{title} holds nothing")
    deltas = {
        target: _delta(title, target, pair, weights[target[0]][target[1]], settings, tensors)
        for target, pair in pairs.items()
    }
    return LoRA(title, deltas)


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a file's tensors, and what its metadata or adapter_config.json say of ranks."""
    header = read_header(file)
    marks = [*(end for end, _ in _ENDINGS), *map(re.compile, OTHER_KINDS)]
    if header and not any(mark.search(key) for mark in marks for key in header):
        raise CheckpointError(f"{file} is no LoRA: {_made_for(header)}")
    for key, info in header.items():
        if info.dtype not in WEIGHT_DTYPES and not key.endswith(".alpha"):
            raise CheckpointError(f"{file}: {key} is {info.dtype}, not {', '.join(WEIGHT_DTYPES)}")
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    text = read_metadata(file).get("lora_adapter_metadata")
    beside = file.with_name("adapter_config.json")
    if text is None and file.name == _PEFT_NAME and beside.is_file():
        return tensors, read_json(beside)
    try:
        settings = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: its lora_adapter_metadata is not a JSON object")
    return tensors, settings


class _Names:
    """Which weight a module's name means, whoever wrote it."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.modules = {
            part: {name.removesuffix(".weight") for name, weight in own.items() if weight.ndim > 1}
            for part, own in weights.items()
        }
        # kohya joins a module's name with underscores: in ours, or (SDXL) in the original layout's
        self._flat = {
            part: {module.replace(".", "_"): module for module in modules}
            for part, modules in self.modules.items()
        }
        unet = config.unet
        names = unet_map([depth > 0 for depth in unet.depths], unet.layers_per_level)
        for module in self.modules.get("unet", ()):
            original = names.original(f"{module}.weight")
            if original:
                flat = original.removesuffix(".weight").replace(".", "_")
                self._flat["unet"][flat] = module

    def target(self, module: str) -> Target | None:
        """Return the part and the weight's name, or None."""
        found = self._kohya(module) if module.startswith("lora_") else self._dotted(module)
        return (found[0], f"{found[1]}.weight") if found else None

    def _kohya(self, module: str) -> tuple[str, str] | None:
        for prefix, part in _KOHYA.items():
            if module.startswith(prefix):
                flat = module.removeprefix(prefix).removeprefix("text_model_")
                ours = self._flat.get(part, {}).get(flat)
                return (part, ours) if ours else None
        return None

    def _dotted(self, module: str) -> tuple[str, str] | None:
        module = module.removeprefix("base_model.model.")
        for part in _DOTTED:
            if module.startswith(f"{part}."):
                return self._in_part(part, module.removeprefix(f"{part}."))
        # a part saved alone does not say which it is
        return next((found for p in _DOTTED if (found := self._in_part(p, module))), None)

    def _in_part(self, part: str, module: str) -> tuple[str, str] | None:
        name = canonical(part, module).replace(".processor.", ".")
        stem, _, leaf = name.rpartition(".")
        forms = [name, f"{name}.0"]  # to_out, a list of one
        if leaf in _OLD_NAMES:
            forms.append(f"{stem}.{_OLD_NAMES[leaf]}")
        known = self.modules.get(part, set())
        return next(((part, form) for form in forms if form in known), None)


def _pair(
    tensors: Mapping[str, Tensor], names: _Names
) -> tuple[dict[Target, dict[str, str]], list[str]]:
    """Gather target -> {down, up, alpha: key}; and the keys that name no weight of the model."""
    pairs: dict[Target, dict[str, str]] = {}
    unknown = []
    for key in tensors:
        found = next(
            ((key[: match.start()], kind) for end, kind in _ENDINGS if (match := end.search(key))),
            None,
        )
        target = names.target(found[0]) if found else None
        if found is None or target is None or found[1] in pairs.get(target, {}):
            unknown.append(key)
        else:
            pairs.setdefault(target, {})[found[1]] = key
    return pairs, unknown


def _delta(
    title: str,
    target: Target,
    pair: Mapping[str, str],
    weight: Tensor,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Delta:
    name = ".".join(target)
    if not {"up", "down"} <= pair.keys():
        raise CheckpointError(f"{title} has only {', '.join(pair.values())} for {name}")
    up, down = (tensors[pair[side]].float().flatten(1) for side in ("up", "down"))
    rank, wanted = down.shape[0], (weight.shape[0], math.prod(weight.shape[1:]))
    if up.shape[1] != rank or (up.shape[0], down.shape[1]) != wanted:
        raise CheckpointError(
            f"{title} does not fit: it changes {name} by {tuple(up.shape)} @ {tuple(down.shape)}, "
            f"which is not {wanted}; {_made_for(tensors)}"
        )
    if "alpha" in pair:
        alpha = tensors[pair["alpha"]]
        if alpha.numel() != 1:
            raise CheckpointError(
                f"{title} has {alpha.numel()} numbers as {pair['alpha']}, not one"
            )
        scale = float(alpha) / rank
    else:
        scale = _scale(settings, *target, rank)
    total = up.sum() + down.sum()
    if not torch.isfinite(total) or not math.isfinite(scale):
        raise CheckpointError(f"{title} holds NaN or infinity for {name}: the file is damaged")
    return Delta(up, down, scale)


def _scale(settings: Mapping[str, Any], part: str, name: str, rank: int) -> float:
    """Return alpha / rank as PEFT's settings have it, of all parts ("unet.lora_alpha") or one."""
    prefix = f"{part}." if any(key.startswith(f"{part}.") for key in settings) else ""
    alpha = settings.get(f"{prefix}lora_alpha")
    module = name.removesuffix(".weight")
    for pattern, value in (settings.get(f"{prefix}alpha_pattern") or {}).items():
        # PEFT knows a text encoder's modules by transformers' names.
        if any(_fits(pattern, one) for one in (module, f"text_model.{module}")):
            alpha = value
            break
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"the LoRA's lora_alpha is {alpha!r}, not a number")
    return alpha / (math.sqrt(rank) if settings.get(f"{prefix}use_rslora") else rank)


def _fits(pattern: str, module: str) -> bool:
    """Whether a module's name ends as a pattern of PEFT's says, which is a regular expression.

    One that could take for ever is refused: more than a few repetitions, or one of a group.
    """
    if len(re.findall(r"[*+?{]", pattern)) > 3 or re.search(r"\)[*+?{]", pattern):
        raise CheckpointError(f"the LoRA's pattern {pattern!r} is none that names modules")
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise CheckpointError(f"the LoRA's pattern {pattern!r} is wrong: {error}") from None


def _made_for(tensors: Mapping[str, Tensor | TensorInfo]) -> str:
    """Say which family a LoRA's cross-attention reads the text of."""
    widths = {
        tensor.shape[1]
        for key, tensor in tensors.items()
        if len(tensor.shape) > 1 and _TEXT_READER.search(key)
    }
    families = [name for name, p in PRESETS.items() if p.unet.context_width in widths]
    if any(key.startswith(("lora_te2_", "text_encoder_2.")) for key in tensors):
        families = ["sdxl"]
    if families:
        return f"it was made for {' or '.join(families)}"
    kind = guess(tensors)
    advice = "; give one that was made for this model" if kind == "a LoRA" else ""
    return f"by its keys it is {kind}{advice}"


@explained_denials()
def open_lora(
    source: str | Path | Mapping[str, Tensor],
    config: ModelConfig,
    weights: Weights,
    *,
    weight_name: str | None = None,
    subfolder: str = "",
    **hub_options: Any,
) -> LoRA:
    """Open a LoRA: a file, a folder or hub id with one, or a dict of tensors. See `read_lora`.

    "builtin-lcm" is the built-in model's own, for 1 to 4 steps. hub_options: as `fetch_file` has
    them.
    """
    if isinstance(source, Mapping):
        return read_lora(source, config, weights, title=GIVEN_TENSORS)
    if source == "builtin-lcm":
        file = _only_file(BUILTIN / "lcm_lora", None)
        return read_lora(file, config, weights, title=source)
    file = Path(source)
    if file.is_dir():
        file = _only_file(file / subfolder, weight_name)
    elif not file.exists() and isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        inside = f"{subfolder}/{weight_name or _USUAL_NAME}".lstrip("/")
        file = hub.fetch_file(source, inside, **hub_options)
    elif not file.exists():
        raise CheckpointError(f"{str(source)!r} is no LoRA file or folder here, and no hub id")
    return read_lora(file, config, weights, title=file.name)


def _only_file(folder: Path, name: str | None) -> Path:
    """Return the LoRA file in `folder`: `name`, or the only safetensors file there."""
    if name is not None:
        return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise UsageError(
            f"{folder} holds {len(files)} safetensors files; say which with weight_name="
        )
    return files[0]
