"""Read a PyTorch pickle's tensors in a process of its own, and write them as safetensors.

Run by path, isolated (`python -I`), never imported: torch's weights-only unpickler refuses whatever
could run code, and limits on memory, time and files bound what a hostile file could do to it.
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from contextlib import suppress
from typing import Any

# bytes beyond the file's own size: torch's libraries, and the tensors' copies
_ADDRESS_SPACE, _ROOM = 24 << 30, 64 << 20
_SECONDS, _FILES = 900, 256
# what zipfile and torch.load raise for files cut short or made up
_DAMAGED = (RuntimeError, OSError, EOFError, LookupError, ValueError, AttributeError, TypeError)
_INSTEAD = "nothing of it was run; get the model as safetensors"
# What trainings leave beside the weights: the callbacks of the first Stable Diffusions, numbers of
# numpy's, the dict of the web UI's learned words. None of it is made, `_Inert` stands in its place.
_BESIDE = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
    "torch.nn.modules.container.ParameterDict",
)


class _Inert:
    """Stands for an object that is not made. state: what it would have been given."""

    state: object = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


def limit(size: int) -> None:
    """Bound this process, as far as the system can: memory, files, time, dumps, the network."""
    with suppress(ImportError):  # not on Windows
        import resource

        for what, most in (
            (resource.RLIMIT_AS, 4 * size + _ADDRESS_SPACE),
            (resource.RLIMIT_FSIZE, _largest(size) + _ROOM),  # and the header
            (resource.RLIMIT_CPU, _SECONDS),
            (resource.RLIMIT_NOFILE, _FILES),
            (resource.RLIMIT_CORE, 0),
        ):
            hard = resource.getrlimit(what)[1]
            allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(what, (allowed, allowed))
    if sys.platform == "linux" and sys.version_info >= (3, 12):
        with suppress(OSError):  # a namespace without a network, where users may have one
            os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)


def main(source: str, target: str) -> str | None:
    """Write the tensors of `source` to `target`; return what is wrong, or None."""
    size = os.path.getsize(source)
    limit(size)
    if wrong := _wrong_zip(source, size):
        return wrong
    from pickle import UnpicklingError

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with (
            open(source, "rb") as file,  # of a name torch would go by the ending
            torch.serialization.safe_globals([(_Inert, name) for name in _BESIDE]),
        ):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        return "it needs more memory than this process may have"
    except (UnpicklingError, *_DAMAGED) as error:
        said = str(error)
        if wanted := re.search(r"GLOBAL ([\w.]+)", said):
            return f"it holds more than weights (it asks for {wanted[1]}); {_INSTEAD}"
        if isinstance(error, UnpicklingError) or "weights_only" in said:
            # not in torch's words, which advise to read it unsafely
            return (
                "it holds what torch's reader of weights alone does not take: more than weights, "
                f"or damage; {_INSTEAD}"
            )
        return f"it is damaged or no checkpoint: {_first_line(error)}"
    if isinstance(loaded, dict):
        loaded = _learned_word(loaded) or loaded
        for wrapper in ("state_dict", "model", "params_ema"):
            if isinstance(loaded.get(wrapper), dict):
                loaded = loaded[wrapper]
                break
    found = {
        key: value
        for key, value in (loaded.items() if isinstance(loaded, dict) else ())
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }
    del loaded
    if not found:
        return "it holds no named tensors"
    total = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
    if total > _largest(size):  # views repeat what is stored once
        return f"it has {size} bytes, and its tensors would take {total}: it is no checkpoint"
    tensors: dict[str, Any] = {}
    try:
        for key in list(found):
            tensors[key] = found.pop(key).detach().clone().contiguous()  # storages may be shared
        save_file(tensors, target, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        folder = os.path.dirname(target)
        return f"its tensors do not go into {folder}: {error}; free some space, or set TMPDIR"
    except (RuntimeError, ValueError, LookupError) as error:  # sparse, quantised, without numbers
        return f"its tensors have no form in safetensors: {_first_line(error)}"
    return None


def _learned_word(loaded: dict[Any, Any]) -> dict[Any, Any] | None:
    """Return the vectors of one of the web UI's learned words, as its safetensors files have them;
    None if `loaded` is something else."""
    found = loaded.get("string_to_param")
    if isinstance(found, _Inert):
        found = found.state.get("_parameters") if isinstance(found.state, dict) else None
    if not isinstance(found, dict) or len(found) != 1:
        return None
    return {"emb_params": next(iter(found.values()))}


def _largest(size: int) -> int:
    """Return how many bytes the tensors of a file may take: weights under two names take twice."""
    return 2 * size + _ROOM


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _wrong_zip(source: str, size: int) -> str | None:
    """Refuse a zip whose entries are larger than it; torch never compresses what it writes."""
    with open(source, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return None
        try:
            with zipfile.ZipFile(file) as archive:
                total = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, *_DAMAGED) as error:
            return f"it is damaged or no checkpoint: {_first_line(error)}"
    if total <= size:
        return None
    return (
        f"it has {size} bytes and would unpack to {total}, though torch compresses nothing; "
        f"{_INSTEAD}"
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
