"""Install torch for GPUs and hollow CUDA libraries beside it, on a machine without a GPU.

    python -m tests.hollow.build ~/hollow      # 1.5 GB; needs gcc, nm and a package index
    . ~/hollow/env.sh
    python -m fastsd.benchmarks.gpu --output runs/hollow --stage sd15 --stage sd15-graphs

torch then sees an H100. Its memory is the host's; every kernel, cuBLAS's, cuDNN's and Triton's too,
is launched and does nothing. What that shows: that the GPU path runs at all, what its Python takes,
how many kernels it launches, what torch holds of the GPU's memory, and what a capture refuses (said
on stderr). What it cannot: numbers and times. Pictures are noise, and `sitecustomize` lets fastsd
and diffusers go on with values that they would refuse. Triton compiles for real, for sm_90.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
TORCH = "torch==2.11.0"
HEADERS = tuple(f"nvidia-cuda-{name}>=13.0,<13.1" for name in ("runtime", "crt", "cccl"))
PACKAGES = (TORCH, "triton==3.6.0", *HEADERS)
SOURCES = {
    "libcudart.so.13": "cudart.c",
    "libcuda.so.1": "cuda.c",
    "libcublas.so.13": "cublas.c",
    "libcublasLt.so.13": "cublas.c",
    "libcudnn.so.9": "cudnn.c",
}
# Symbols without a version -> the library that has them; the rest of theirs are the driver's.
UNVERSIONED = {
    "nccl": "libnccl.so.2",
    "nvshmem": "libnvshmem_host.so.3",
    "cuFile": "libcufile.so.0",
    "cusparseLt": "libcusparseLt.so.0",
    "curand": "libcurand.so.10",
    "cusolver": "libcusolver.so.12",
}
# Asked for by name while the program runs, so that nothing lists them.
DRIVER = """
    cuInit cuDeviceGet cuDeviceGetCount cuDriverGetVersion cuCtxSetCurrent cuCtxSetLimit
    cuFuncSetAttribute cuFuncSetCacheConfig cuModuleUnload cuTensorMapEncodeTiled cuGetErrorName
""".split()


def wanted(libraries: list[Path]) -> dict[str, set[str]]:
    """Return library -> the symbols that torch's own libraries want of it."""
    symbols: dict[str, set[str]] = defaultdict(set)
    for library in libraries:
        listed = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
        for name, home in re.findall(r"^\s+[Uw] (\w+)(?:@+(\S+))?$", listed, re.MULTILINE):
            if home == "NVSHMEM":
                home = UNVERSIONED["nvshmem"]
            if not home and re.match(r"(nccl|nvshmem|curand|cusolver|cusparse|cu[A-Z])", name):
                home = next((to for start, to in UNVERSIONED.items() if name.startswith(start)), "")
                home = home or "libcuda.so.1"
            if home.startswith(("libcu", "libnv", "libnccl")):
                symbols[home].add(name)
    for home in (*UNVERSIONED.values(), *SOURCES):
        symbols.setdefault(home, set())
    symbols["libcuda.so.1"].update(DRIVER)
    return symbols


def compile_library(name: str, symbols: set[str], headers: Path, out: Path) -> None:
    """Write `out`/`name`: our source where there is one, for the rest functions that return 0."""
    source = (HERE / SOURCES[name]).read_text("utf-8") if name in SOURCES else ""
    ours = set(re.findall(r"\b(\w+)\s*\([^;{}()]*\)\s*\{", source))
    nothing = "\n".join(f"int {symbol}() {{ return 0; }}" for symbol in sorted(symbols - ours))
    files = {"source.c": source, "nothing.c": nothing}
    version = {"libnvshmem_host.so.3": "NVSHMEM"}.get(name, name)
    files["map"] = f"{version} {{ global: *; }};\n"
    scratch = out / f".{name}"
    scratch.mkdir()
    for file, text in files.items():
        (scratch / file).write_text(text + "\n", "utf-8")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-I{headers}", "-o", str(out / name)]
    command += [str(scratch / file) for file in ("source.c", "nothing.c")]
    command += [f"-Wl,-soname,{name}", f"-Wl,--version-script={scratch / 'map'}"]
    if name == "libcuda.so.1":
        command.append(str(out / "libcudart.so.13"))
    subprocess.check_call(command)
    shutil.rmtree(scratch)


def main() -> None:
    """Install, build, and write env.sh."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder.resolve()
    site = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", site]
    subprocess.check_call([*map(str, install), *PACKAGES])
    cuda = site / "nvidia" / "cu13"
    (cuda / "lib" / "libcudart.so.13").unlink()
    torchs = [*(site / "torch" / "lib").glob("*.so"), *(site / "torch").glob("_C*.so")]
    symbols = wanted(torchs)
    for name in sorted(symbols, key=lambda name: name != "libcudart.so.13"):  # the driver links it
        compile_library(name, symbols[name], cuda / "include", cuda / "lib")
        print(f"{name}: {len(symbols[name])} symbols")
    (cuda / "lib" / "libcuda.so").symlink_to("libcuda.so.1")
    (folder / "env.sh").write_text(
        f"export PYTHONPATH={HERE / 'patches'}:{site}:{HERE.parents[1]}\n"
        f"export LD_LIBRARY_PATH={cuda / 'lib'} TRITON_LIBCUDA_PATH={cuda / 'lib'}\n"
        f"export CUDA_HOME={cuda}\n",
        "utf-8",
    )
    print(f". {folder / 'env.sh'}")


if __name__ == "__main__":
    main()
