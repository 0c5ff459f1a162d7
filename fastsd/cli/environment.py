"""What this machine is: what `fastsd env` prints, and every bench keeps with its results."""

import os
import subprocess
from pathlib import Path
from typing import Any

import fastsd

# Everything whose version can explain a difference between two machines.
PACKAGES = (
    *("torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "pillow", "typer"),
    *("triton", "xformers", "torchao", "diffusers", "transformers"),
    *("onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "tensorrt"),
)


def environment() -> dict[str, Any]:
    """Collect versions, hardware and what is usable. Holds no path, user or host name."""
    import platform

    import torch

    from fastsd.benchmarks.contenders import version

    return {
        "fastsd": fastsd.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {package: version(package) for package in PACKAGES} | _cuda(),
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "memory_gib": _memory_gib(),
        },
        "devices": _devices(),
        "backends": _backends(),
    }


def _cuda() -> dict[str, str]:
    """The versions of what torch runs on a GPU with."""
    import torch

    found = {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "nvidia driver": _driver() if torch.cuda.is_available() else None,
    }
    return {name: str(version or "not installed") for name, version in found.items()}


def _driver() -> str | None:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None  # AMD's, or a container without the tool
    return told.stdout.partition("\n")[0].strip()


def _cpu_name() -> str:
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _devices() -> dict[str, str]:
    """Describe each device that a Pipeline can be given, or say why there is no GPU."""
    import torch

    devices = {"cpu": "usable"}
    if torch.backends.mps.is_available():
        devices["mps"] = "usable"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "torch sees no GPU; look at its driver" if built else "torch is built for the CPU"
        devices["cuda"] = f"not usable: {reason}"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"{gpu.major}.{gpu.minor}"
        devices[f"cuda:{index}"] = (
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {capability}"
        )
    return devices


def _backends() -> dict[str, str]:
    """Say of each backend that it is usable, or why not."""
    from importlib import import_module

    import torch

    from fastsd.backends import BACKENDS, RUNS_ON

    def state(name: str, home: str) -> str:
        try:
            import_module(home.partition(":")[0])
        except ImportError as error:  # MissingDependency is one and names the extra to install
            return f"not usable: {error}"
        if RUNS_ON.get(name) == "cuda" and not torch.cuda.is_available():
            return "not usable: torch sees no GPU"
        return "usable"

    return {name: state(name, home) for name, home in BACKENDS.items()}
