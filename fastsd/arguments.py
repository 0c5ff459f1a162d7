"""What a call is given, read and checked: each error says what was given and what would do.

Knows no model. For names that diffusers scripts use and fastsd lacks it says what stands in their
place.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fastsd.checkpoints.weights import PRECISIONS
from fastsd.errors import UsageError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LARGEST = 1e300  # no argument is near it, NaN is no less, and integers have no end
LARGEST_BATCH = 4096  # pictures; more are a mistake, and would take long to find out
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
_MEMORY_EFFICIENT = "attention never holds the whole score matrix; drop the call"
# Parts of diffusers' pipelines, which ours has not as attributes.
PARTS = ("components", "text_encoder", "tokenizer", "unet", "vae")
_NO_MODULES = (
    "its parts are not modules to change; give another vae or tokenizer to from_pretrained, and "
    "backend='inductor' for torch.compile"
)
# Names that diffusers scripts use and fastsd does not have -> what stands in their place.
INSTEAD = {
    "callback": "use callback_on_step_end",
    "callback_steps": "use callback_on_step_end, which is called after every step",
    "cross_attention_kwargs": "pass adapters={name: weight}, how strongly loaded LoRAs act",
    "custom_pipeline": "code from a checkpoint is never run; drop it",
    "device_map": "choose the device with device=",
    "enable_attention_slicing": _MEMORY_EFFICIENT,
    "enable_xformers_memory_efficient_attention": _MEMORY_EFFICIENT,
    "enable_model_cpu_offload": "load with low_memory=True and precision='fp16'",
    "enable_sequential_cpu_offload": "load with low_memory=True, precision='fp16', weights='int8'",
    "enable_vae_slicing": "pass batch_invariant=True, which decodes one picture at a time",
    "enable_vae_tiling": "load with low_memory=True",
    "fuse_lora": "LoRAs are always merged into the weights; drop the call",
    "unfuse_lora": "unload_lora_weights takes LoRAs out of the weights, to the last bit",
    "ip_adapter_image": "pictures as prompts are not supported yet; drop it",
    "ip_adapter_image_embeds": "pictures as prompts are not supported yet; drop it",
    **dict.fromkeys(PARTS, _NO_MODULES),
    "low_cpu_mem_usage": "weights are always memory-mapped; drop it",
    "masked_image_latents": "it is made from image and mask_image; drop it",
    "negative_original_size": "both halves are told original_size; drop it",
    "negative_target_size": "both halves are told target_size; drop it",
    "original_config": "a single file's family is recognised from its tensors; drop it",
    "padding_mask_crop": "crop the picture and the mask yourself, and paste the result back",
    "scheduler": "choose it by name with sampler=, as listed by `fastsd samplers`",
    "save_pretrained": "`fastsd convert MODEL FOLDER` writes a folder that diffusers loads",
    "trust_remote_code": "code from a checkpoint is never run; drop it",
    "_guidance_scale": "set it on the object that callback_on_step_end is given",
    "_interrupt": "set it on the object that callback_on_step_end is given",
}


def described(given: Any) -> str:
    """Say what a user gave in a tensor's place: its dtype and shape, or its type."""
    if isinstance(given, Tensor):
        return f"{given.dtype} of shape {tuple(given.shape)}"
    return type(given).__name__


def chosen_device(device: str | torch.device | None) -> torch.device:
    """Return the device of that name, a GPU by its number; None: the GPU if there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is unknown; give 'cpu', 'cuda' or 'cuda:0'") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device {str(chosen)!r} draws nothing; give 'cpu', 'cuda' or 'cuda:0'")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' was asked for, and this torch has none; give 'cpu'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device 'cuda' was asked for, but torch sees no GPU; `fastsd env` says why"
        )
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def chosen_precision(precision: str | None, dtype: str | torch.dtype | None) -> str | None:
    """Return the precision asked for by name or, as in diffusers, by dtype (torch.float16, or
    "float16"); None: by neither."""
    if dtype is None:
        return precision
    for name, known in PRECISIONS.items():
        if dtype in (known, str(known).removeprefix("torch.")):
            if precision in (None, name):
                return name
            raise UsageError(f"dtype={dtype} and precision={precision!r} do not fit; drop one")
    raise UsageError(
        f"dtype={dtype} is none that fastsd computes in; give precision= one of "
        f"{', '.join(PRECISIONS)}"
    )


def generators_of(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    batch: int,
) -> tuple[list[int] | None, torch.Generator | Sequence[torch.Generator]]:
    """Resolve the two ways of asking for noise: (each picture's seed if it has one, generators)."""
    if generator is not None:
        if seed is not None:
            raise UsageError("give either seed or generator, not both")
        if isinstance(generator, torch.Generator):
            return None, generator
        given = list(generator) if isinstance(generator, Iterable) else [generator]
        for each in given:
            if not isinstance(each, torch.Generator):
                raise UsageError(
                    "generator must be a torch.Generator, or a list of one for each picture, not "
                    f"{each!r}; for a number give seed"
                )
        if len(given) != batch:
            raise UsageError(f"{len(given)} generators were given for {batch} pictures")
        return None, given
    plain = int(torch.randint(2**31, (1,))) if seed is None else _plain(seed)
    if not isinstance(plain, (list, tuple, range)):
        first = _check_seed(plain)
        plain = range(first, first + batch)
    seeds = [_check_seed(_plain(value)) for value in plain]
    if len(seeds) != batch:
        raise UsageError(f"{len(seeds)} seeds were given for {batch} pictures")
    return seeds, [torch.Generator("cpu").manual_seed(value) for value in seeds]


def _check_seed(given: Any) -> int:
    whole = isinstance(given, Integral) and not isinstance(given, bool)
    if not whole or not 0 <= given < 2**63:
        raise UsageError(
            "seed must be a whole number from 0 to 2**63 - 1, or a list of one for each picture, "
            f"not {given!r}"
        )
    return int(given)


def _plain(given: Any) -> Any:
    """Return numpy's and torch's numbers as Python's, and anything else as it is."""
    return given.tolist() if hasattr(given, "tolist") else given


def levels(what: str, given: Any) -> list[float] | None:
    """Read timesteps or sigmas, a list or an array of numbers; None: nothing was given."""
    plain = _plain(given)
    if plain is None:
        return None
    if not isinstance(plain, (list, tuple, range)):
        raise UsageError(f"{what} must be a list of numbers, not {given!r}")
    numbers = [_plain(number) for number in plain]
    for number in numbers:
        check_number(f"an entry of {what}", number)
    return [float(number) for number in numbers]


def listed_numbers(given: float | Sequence[float], count: int) -> list[float]:
    """Return a finite number for each of `count` adapters, from one or as many."""
    numbers = list(given) if isinstance(given, Sequence) else [given] * count
    for number in numbers:
        check_number("an adapter's weight", number)
    return [float(number) for number in numbers]


def plain_numbers(given: Sequence[float] | None) -> list[float] | None:
    """Return numbers as JSON has them, of whatever kind they are; None: none were given."""
    return None if given is None else [float(number) for number in given]


def refuse(unknown: dict[str, object], function: Callable[..., object]) -> None:
    """Raise for arguments that `function` does not have, naming what stands in their place."""
    for name, value in unknown.items():
        # diffusers' default for most of these; of a part, that it is left out
        if value is None and name in INSTEAD and name not in PARTS:
            continue
        known = list(inspect.signature(function).parameters)
        raise UsageError(f"argument {name!r} is unknown; {instead(name, known)}")


def instead(name: str, known: Sequence[str]) -> str:
    """Say what stands in the place of a name that is not one of `known`."""
    if name in INSTEAD:
        return INSTEAD[name]
    near = [each for each in known if name in each.split("_")]  # steps: num_inference_steps
    near += difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"did you mean {near[0]!r}?" if near else "see help(fastsd.Pipeline)"


def check_choice(what: str, given: str, known: Sequence[str]) -> None:
    """Raise unless `given` is one of `known`."""
    if given not in known:
        raise UsageError(f"{what} {given!r} is unknown; it is one of {', '.join(known)}")


def check_pair(what: str, given: Any) -> tuple[int, int] | None:
    """Return two whole numbers of pixels, the vertical one first; None: nothing was given."""
    pair = _plain(given)
    if pair is None:
        return None
    plain = [_plain(number) for number in pair] if isinstance(pair, (list, tuple)) else []
    for number in plain:
        check_number(f"an entry of {what}", number)
    if len(plain) != 2 or any(abs(n) >= 2**31 or n != int(n) for n in plain):
        raise UsageError(
            f"{what} must be two whole numbers of pixels, the vertical one first, not {given!r}"
        )
    first, second = plain
    return int(first), int(second)


def check_names(what: str, given: Any) -> list[str]:
    """Return a list of names from one or several."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{what} must be a name or a list of names, not {given!r}")
    return list(names)


def check_path(what: str, given: Any) -> None:
    """Raise unless it may name a file, a folder or a hub id."""
    if not isinstance(given, (str, os.PathLike)):
        raise UsageError(f"{what} must be a path or a name, such as 'builtin', not {given!r}")


def check_callable(what: str, given: Any) -> None:
    """Raise unless it can be called, or is None."""
    if given is not None and not callable(given):
        raise UsageError(f"{what} must be a function, not {given!r}")
    if inspect.iscoroutinefunction(given):
        raise UsageError(f"{what} must be a plain function, not an async one, which nobody awaits")


def check_adapters(given: Any) -> dict[str, float] | None:
    """Return name -> weight; None: nothing was given."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UsageError(
            f"adapters must map the names of loaded LoRAs to weights, not {given!r}; "
            "e.g. adapters={'style': 0.8}"
        )
    return dict(zip(given, listed_numbers(list(given.values()), len(given)), strict=True))


def check_latents(given: Any, shape: Sequence[int]) -> Tensor:
    """Return latents; raise unless they are a tensor of that shape, (B, C, h, w)."""
    if not isinstance(given, Tensor):
        raise UsageError(f"latents must be a torch tensor, not {type(given).__name__}")
    if given.shape != torch.Size(shape):
        raise UsageError(
            f"latents have shape {tuple(given.shape)}, expected {tuple(shape)} "
            "(pictures, channels, height / 8, width / 8)"
        )
    return given


def check_count(what: str, given: int) -> int:
    """Return a whole number, numpy's too; raise unless it is 1 or more."""
    if isinstance(given, bool) or not isinstance(given, Integral) or given < 1:
        raise UsageError(f"{what} must be a whole number of 1 or more, not {given!r}")
    return int(given)


def count_steps(
    steps: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
) -> int:
    """Return how many steps a whole run would have, before any are left out."""
    if timesteps is not None:
        return len(timesteps)
    return check_count("num_inference_steps", steps) if sigmas is None else len(sigmas) - 1


def skipped_steps(steps: int, strength: float | None) -> int:
    """Return how many of the first steps image to image leaves out, as diffusers counts them."""
    if strength is None:
        return 0
    kept = int(steps * strength)
    if kept < 1:
        raise UsageError(
            f"strength {strength} of {steps} steps is less than one; raise either of them"
        )
    return steps - kept


def check_fraction(what: str, given: float) -> None:
    """Raise unless it is a number from 0 to 1."""
    check_number(what, given)
    if not 0 <= given <= 1:
        raise UsageError(f"{what} must be from 0 to 1, not {given!r}")


def check_number(what: str, given: float) -> None:
    """Raise unless it is a finite number, and no truth value."""
    if isinstance(given, bool) or not isinstance(given, Real) or not abs(given) < LARGEST:
        raise UsageError(f"{what} must be a finite number, not {given!r}")
