"""Our C++ kernels: compiled where an engine is exported, loaded beside it where it runs.

The library runs on any x86-64 CPU with AVX-512 and VNNI, and needs torch's version it was built
with. Loading needs no compiler. Knows torch and a C++ compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import threading
from pathlib import Path

import torch
from torch import Tensor

from fastsd.errors import ArtifactError, MissingDependency

SOURCES = tuple(Path(__file__).with_name(f"{name}_cpu.cpp") for name in ("attention", "group_norm"))
NAMESPACE = "fastsd_cpu"
_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
# No reordering of sums and no contraction beyond what the sources write: they say what they round.
_FLAGS = ("-std=c++20", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-DNDEBUG")
_loading = threading.Lock()
_loaded: list[str] = []  # the digest of the library in this process, once there is one


def obstacle() -> str | None:
    """Say why this machine cannot run the kernels, or return None if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"they are written for Linux on x86-64, not {platform.system()} {platform.machine()}"
    has = torch.cpu.get_capabilities()
    if not all(has.get(feature, False) for feature in ("avx512_f", "avx512_vl", "avx512_vnni")):
        return "they need a CPU with AVX-512 and VNNI"
    return None


def overflows() -> bool:
    """Whether oneDNN's products of uint8 and int8 may overflow here: on x86-64 without VNNI.

    Source: oneDNN's developer guide, "Nuances of int8 Computations".
    """
    has = torch.cpu.get_capabilities()
    return platform.machine() in ("x86_64", "AMD64") and not any(
        has.get(feature, False) for feature in ("avx512_vnni", "avx_vnni")
    )


def compiler() -> str:
    """Return the C++ compiler: $CXX, or without it g++ or clang++. Raises MissingDependency."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise MissingDependency(
        f"compiling an engine needs a C++ compiler, and $CXX, {asked!r}, names no program; "
        "set it to one, or unset it"
        if asked
        else "compiling an engine needs a C++ compiler, and there is neither g++ nor clang++; "
        "install one (on Debian or Ubuntu: apt install g++), or name it in $CXX"
    )


def nameless(*folders: Path) -> tuple[str, ...]:
    """Return flags that keep `folders`, torch's own and symbols' names out of a library."""
    known = (*folders, Path(torch.__file__).parent)
    known = tuple(path for folder in known for path in (folder, folder.resolve()))  # GCC says both
    return ("-s", *(f"-ffile-prefix-map={folder}=." for folder in known))


def build(library: Path) -> None:
    """Compile the kernels into `library` (a .so). Raises MissingDependency if that fails."""
    from torch.utils.cpp_extension import include_paths, library_paths

    command = [
        compiler(),
        *nameless(*(source.parent for source in SOURCES)),
        *_FLAGS,
        *(f"-m{feature}" for feature in _FEATURES),
        *(flag for path in include_paths() for flag in ("-isystem", path)),
        *(str(source) for source in SOURCES),
        *(f"-L{path}" for path in library_paths()),
        *("-ltorch", "-ltorch_cpu", "-lc10"),
        *("-o", str(library)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MissingDependency(
            f"{command[0]} could not compile fastsd's kernels; a compiler with C++20 is needed "
            f"(g++ 11 or newer). It said:\n{done.stderr[-2000:]}"
        )


def loaded() -> bool:
    """Whether the kernels can be called in this process."""
    return hasattr(torch.ops, NAMESPACE) and hasattr(torch.ops.fastsd_cpu, "group_norm")


def load(library: Path) -> None:
    """Load what `build` made. It is native code: whoever calls vouches for it.

    A process has room for one library: a second defines the same names. Raises ArtifactError for
    one that is not the first's equal.
    """
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    with _loading:
        if not loaded():
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
            torch.library.register_fake(f"{NAMESPACE}::attention")(_attention_shape)
            torch.library.register_fake(f"{NAMESPACE}::group_norm")(_group_norm_shape)
            _loaded.append(digest)
        elif digest not in _loaded:
            raise ArtifactError(
                f"{library} holds other kernels than an engine that this process opened before; "
                "export the older of the two again, or open them in two processes"
            )


def attention(q: Tensor, k: Tensor, v: Tensor, *, int8: bool) -> Tensor:
    """Attend as `kernels.attention.attention` does, in fp32, or with both products in int8.

    q: (B, M, Nq, K), k, v: (B, M, N, K), on the CPU, K a multiple of 4 and dense. All are fp32, or
    all bf16 where the products are int8, and so is the result, which is made in fp32.
    """
    _require()
    out: Tensor = torch.ops.fastsd_cpu.attention(q, k, v, int8)
    return out


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool,
    dtype: torch.dtype = torch.float32,
    multiplier: Tensor | None = None,
    zero: int = 0,
    added: Tensor | None = None,
) -> Tensor:
    """Normalise x (B, C, H, W), fp32 or bf16 on the CPU, group by group; with `silu` then SiLU.

    weight, bias: (C,) fp32, C a multiple of 16. dtype: fp32, bf16 or uint8, which is
    clamp(round(y * multiplier) + zero, 0, 255), with a multiplier (C,) fp32. added: (B or 1, C)
    fp32, what is added to every pixel first. Returns (B, C, H, W), channels-last.
    Source: Wu & He 2018, arXiv:1803.08494.
    """
    _require()
    out: Tensor = torch.ops.fastsd_cpu.group_norm(
        x, weight, bias, groups, eps, silu, dtype, multiplier, zero, added
    )
    return out


def _require() -> None:
    if not loaded():
        raise MissingDependency(
            "fastsd's CPU kernels are not loaded; they come with an engine: "
            "`fastsd export MODEL --to aoti`"
        )


def _attention_shape(q: Tensor, k: Tensor, v: Tensor, int8: bool) -> Tensor:
    batch, heads, queries, width = q.shape
    return q.new_empty((batch, queries, heads, width)).transpose(1, 2)


def _group_norm_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    dtype: torch.dtype,
    multiplier: Tensor | None,
    zero: int,
    added: Tensor | None,
) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
