"""Read a PyTorch pickle's tensors in a process of its own, and write them as safetensors.

Run by path, isolated (`python -I`), never imported: torch's weights-only unpickler refuses whatever
could run code, and limits on memory, time and files bound what a hostile file could do to it.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress

# bytes beyond the file's own size: torch's libraries, and the tensors' copies
_ADDRESS_SPACE, _ROOM = 24 << 30, 64 << 20
_SECONDS, _FILES = 900, 256
# what torch.load raises for files cut short or made up
_DAMAGED = (RuntimeError, OSError, EOFError, LookupError, ValueError, AttributeError, TypeError)


def limit(size: int) -> None:
    """Bound this process, as far as the system can: memory, files, time, dumps, the network."""
    with suppress(ImportError):  # not on Windows
        import resource

        for what, most in (
            (resource.RLIMIT_AS, 4 * size + _ADDRESS_SPACE),
            (resource.RLIMIT_FSIZE, 2 * size + _ROOM),
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
    limit(os.path.getsize(source))
    from pickle import UnpicklingError

    import torch
    from safetensors.torch import save_file

    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        named = f"it asks for {wanted[1]}" if wanted else str(error).splitlines()[0]
        return f"it holds more than weights ({named}); nothing of it was run"
    except _DAMAGED as error:
        return f"it is damaged or no checkpoint: {(str(error) or repr(error)).splitlines()[0]}"
    if isinstance(loaded, dict):
        for wrapper in ("state_dict", "model", "params_ema"):
            if isinstance(loaded.get(wrapper), dict):
                loaded = loaded[wrapper]
                break
    tensors = {}
    for key in list(loaded) if isinstance(loaded, dict) else ():
        value = loaded.pop(key)
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[key] = value.detach().clone().contiguous()  # storages may be shared
    if not tensors:
        return "it holds no named tensors"
    save_file(tensors, target, metadata={"format": "pt"})
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
