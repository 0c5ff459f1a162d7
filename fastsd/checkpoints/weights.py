"""Safetensors files: their headers, read by ourselves, and their tensors, mapped into a module.

A file is judged by its content, never by its name, and a pickle is never opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastsd.checkpoints.keys import LEFTOVERS, canonical, guess
from fastsd.errors import CheckpointError

_ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    "F4": 4,
}
# What a model can be computed or kept in, by the names that users give.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_SHOWN = 5  # keys in a message

CONVERT = "fastsd convert FILE NEW reads its weights, and nothing else, in a process of its own"
# How pickles begin: those in torch's zip, and bare ones of each protocol.
ZIP, PICKLES = b"PK\x03\x04", (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# How files begin that are often found where weights should be -> what they are, and what to do.
_BEGINNINGS: tuple[tuple[bytes | tuple[bytes, ...], str], ...] = (
    (ZIP, f"a PyTorch pickle in a zip: loading it could run any code; {CONVERT}"),
    (PICKLES, f"a Python pickle: loading it could run any code; {CONVERT}"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; fetch them: git lfs pull"),
    (b"GGUF", "a GGUF file, which fastsd does not read; use the safetensors form of the model"),
    (b"<", "a web page or XML, perhaps saved in place of a failed download; download it again"),
)


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """How many bytes they take."""
        return self.count * _ITEM_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Use:
    """How a module takes a file's tensor: as its `name`, whole, transposed or a third of its rows.

    third: which of three matrices that are stacked in their rows (OpenCLIP's q, k, v).
    """

    name: str
    third: int | None = None
    transposed: bool = False

    def shape(self, given: tuple[int, ...]) -> tuple[int, ...]:
        """Return what a tensor of shape `given` becomes."""
        if self.third is not None:
            return (given[0] // 3, *given[1:])
        return given[::-1] if self.transposed else given

    def of(self, tensor: Tensor) -> Tensor:
        """Return the tensor as the module takes it, a view where that is contiguous."""
        if self.third is not None:
            return tensor.chunk(3)[self.third]
        return tensor.t().contiguous() if self.transposed else tensor


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read what a safetensors file holds: name -> dtype and shape, from its first bytes alone.

    Raises CheckpointError, saying what the file is instead, or how many bytes it lacks.
    """
    try:
        if path.is_fifo():  # to open one waits for a writer
            raise CheckpointError(f"{path} is a pipe, not a file")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            if size == 0:
                raise CheckpointError(f"{path} is empty; download it again")
            # Before any test for pickles: a header's length may look like their first bytes.
            if start[8:9] != b"{" or length > _LARGEST_HEADER:
                raise CheckpointError(_other_kind(path, start))
            if 8 + length > size:
                raise CheckpointError(_truncated(path, size, 8 + length, "its header alone needs"))
            file.seek(8)
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header is garbage: {error}") from None
    header.pop("__metadata__", None)
    return _checked_header(path, header, size, data_start=8 + length)


def read_metadata(path: Path) -> dict[str, str]:
    """Read the free text that a safetensors file may carry; call `read_header` first."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length)).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _checked_header(
    path: Path, header: dict[str, Any], size: int, *, data_start: int
) -> dict[str, TensorInfo]:
    tensors, ends = {}, [0]
    for name, entry in header.items():
        try:
            info = TensorInfo(entry["dtype"], tuple(entry["shape"]))
            begin, end = entry["data_offsets"]
            fits = begin >= 0 and all(n >= 0 for n in info.shape) and end - begin == info.size_bytes
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise CheckpointError(
                f"{path}: the header's entry for {name!r} makes no sense: {entry}"
            )
        tensors[name] = info
        ends.append(end)
    expected = data_start + max(ends)
    if size < expected:
        raise CheckpointError(_truncated(path, size, expected, "its header describes"))
    return tensors


def _truncated(path: Path, size: int, expected: int, what: str) -> str:
    return f"{path} is truncated: it has {size} bytes, {what} {expected}; download or copy it again"


def _other_kind(path: Path, start: bytes) -> str:
    for beginning, kind in _BEGINNINGS:
        if start.startswith(beginning):
            return f"{path} is {kind}"
    return f"{path} is not a safetensors file (it begins {start[:12]!r}); download it again"


class _Uninitialised(TorchFunctionMode):
    """Leave out modules' initial values, which the weights replace anyway.

    On the meta device they are not free: normal_ imports torch's compiler, 1.6 s.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def empty_module(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module on the meta device: shapes without numbers, quickly."""
    with torch.device("meta"), _Uninitialised():
        return build()


def load_module(
    part: str,
    build: Callable[[], nn.Module],
    files: Sequence[Path],
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    uses: Mapping[str, tuple[Use, ...]] | None = None,
) -> nn.Module:
    """Build a module without weights and give it the tensors of `files`, for inference.

    uses: what the part makes of each key, of a file that holds other parts too; None: all keys are
    the part's, by their names in the diffusers layout.

    Tensors that are already of `dtype` on the CPU stay mapped from the file: nothing is copied.
    Every key is used exactly once; a 1x1 convolution and a linear layer pass for each other.
    Raises CheckpointError naming the keys that do not fit.
    """
    module = empty_module(build)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    plan = match(part, expected, {file: read_header(file) for file in files}, uses)
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name, (key, use) in plan[file].items():
                    tensor = use.of(opened.get_tensor(key)).reshape(expected[name])
                    if tensor.data_ptr() % tensor.element_size():
                        tensor = tensor.clone()  # headers of odd length misalign the data
                    weights[name] = _finite(tensor.to(device=device, dtype=dtype), file, key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def _finite(tensor: Tensor, file: Path, key: str) -> Tensor:
    """Return the tensor, or refuse it for NaN or infinity: its sum, in fp32 or more, shows both."""
    total = tensor.sum(dtype=None if tensor.dtype == torch.float64 else torch.float32)
    if not torch.isfinite(total):
        raise CheckpointError(
            f"{file}: {key} holds NaN or infinity as {str(tensor.dtype).removeprefix('torch.')}: "
            "the file is damaged, or its numbers do not fit this precision; get it again, or take "
            "a higher precision"
        )
    return tensor


def match(
    part: str,
    expected: Mapping[str, tuple[int, ...]],
    headers: Mapping[Path, Mapping[str, TensorInfo]],
    uses: Mapping[str, tuple[Use, ...]] | None = None,
) -> dict[Path, dict[str, tuple[str, Use]]]:
    """Pair the names that a module expects with the keys that files hold.

    Returns file -> name -> the key, and how it is used.

    Raises CheckpointError unless each name has one key of its shape and no key is left over.
    """
    plan: dict[Path, dict[str, tuple[str, Use]]] = {file: {} for file in headers}
    unexpected, repeated, misshapen = [], [], []
    found: set[str] = set()
    for file, header in headers.items():
        for key, info in header.items():
            for use in _own(part, key) if uses is None else uses.get(key, ()):
                name = use.name
                if name not in expected:
                    unexpected.append(key)
                elif name in found:
                    repeated.append(key)
                elif _matrix(use.shape(info.shape)) != _matrix(expected[name]):
                    misshapen.append(f"{key} is {info.shape}, expected {expected[name]}")
                elif info.dtype not in WEIGHT_DTYPES:
                    misshapen.append(f"{key} is {info.dtype}, not {' or '.join(WEIGHT_DTYPES)}")
                found.add(name)
                plan[file][name] = key, use
    missing = [name for name in expected if name not in found]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("repeated", repeated),
            ("of a wrong shape or type", misshapen),
        )
        if names
    ]
    if problems:
        where = ", ".join(map(str, headers))
        keys = [key for header in headers.values() for key in header]
        raise CheckpointError(
            f"the weights in {where} do not fit the {part} that its config describes. "
            f"Keys {'; '.join(problems)}. By its keys it is {guess(keys)}"
        )
    return plan


def _own(part: str, key: str) -> tuple[Use, ...]:
    """How a part takes a key of its own file."""
    name = canonical(part, key)
    return () if name in LEFTOVERS else (Use(name),)


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape with a 1x1 convolution's taken for that of the matrix it is."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
