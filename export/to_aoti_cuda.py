"""AOTInductor for a GPU: every part a library with its kernels and weights.

While it compiles the UNet and the decoder torch tries out kernels for every product and convolution
(its max-autotune): what the inductor backend does at every first use of a shape is done once.
Always the fast layout, with products of one input joined (backends/for_gpu.py), channels-last, and
each attention by the kernel of torch's that is fastest here. With precision fp8 the UNet's linear
layers are, whose inputs are rounded in the kernels before them, all but attention's outputs; the
rest is fp16. Compiled and loaded against a CUDA runtime without a GPU; on one it is unmeasured.
"""

from __future__ import annotations

import io
import os
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import final

import torch
from torch import nn
from torch._inductor.async_compile import shutdown_compile_workers
from torch.utils import cpp_extension

from fastsd.artifact import PartEntry
from fastsd.backends.aoti import PACKAGE, gpu_machine
from fastsd.backends.cuda_graph import convolves_in_tf32, gpu_name
from fastsd.backends.fastest import attentions, use_fastest_
from fastsd.backends.for_gpu import Joined, JoinedUNet
from fastsd.backends.fp8 import SINCE as FP8_SINCE
from fastsd.backends.inductor import COMPILED, TUNED
from fastsd.checkpoints import Checkpoint
from fastsd.checkpoints.weights import PRECISIONS
from fastsd.errors import MissingDependency, UsageError
from fastsd.export.build import Exporter
from fastsd.export.parts import Request, load_part, quiet
from fastsd.export.to_aoti import COMMON, compile_program, moved, trace
from fastsd.kernels import native
from fastsd.models.layers import Attention
from fastsd.models.unet import UNet
from fastsd.quant.calibrate import fp8
from fastsd.quant.linear import Fp8Linear, has_fp8
from fastsd.quant.spec import Rounding, shares_input

LINES = "TRITON_DISABLE_LINE_INFO"
HEADERS = ("cuda.h", "cuda_runtime.h", "crt/host_config.h")


@final
class AotiCudaExporter(Exporter):
    """Libraries for this GPU, in fp8, half precision or fp32."""

    target = "aoti-cuda"
    precisions = ("fp16", "bf16", "fp32", "fp8")
    layouts = ("fast",)
    native = True
    packages = ("torch", "triton")

    def __init__(self, checkpoint: Checkpoint, request: Request) -> None:
        if not torch.cuda.is_available():
            raise UsageError(
                "aoti-cuda engines are compiled for the GPU that is present, and torch "
                f"{torch.__version__} sees none here; export on the machine that will draw, or "
                "--to aoti for this CPU"
            )
        super().__init__(checkpoint, request)
        if request.dynamic:
            raise UsageError(
                "aoti-cuda engines are compiled for one size and batch; drop --dynamic"
            )
        native.compiler()  # missing, it is refused now rather than after the tracing
        self._cuda = cuda_home()
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._dtype = PRECISIONS.get(request.precision, torch.float16)
        if request.precision == "fp8":
            self.form = FORM
            if torch.cuda.get_device_capability(self._device) < FP8_SINCE:
                raise UsageError(
                    f"this GPU, {gpu_name(self._device)}, has no fp8 products, which come with "
                    f"{'.'.join(map(str, FP8_SINCE))}; export with --precision fp16"
                )

    def machine(self) -> dict[str, str]:
        """What the code is bound to."""
        return gpu_machine(self._device)

    def choices(self) -> dict[str, str]:
        """Where the kernels come from, and the time goes."""
        kernels = f"torch's, those of {' and '.join(COMPILED)} tried out on this GPU"
        if self.request.precision == "fp8":
            return {"kernels": kernels, "fp8": "linear layers of the UNet; the rest in fp16"}
        if self.request.precision == "fp32" and convolves_in_tf32():
            return {"kernels": kernels, "convolutions": "in TF32, as torch does by default"}
        return {"kernels": kernels}

    def write(self, part: str, folder: Path) -> PartEntry:
        """Compile one part into `<part>/package/`."""
        loaded = load_part(self.checkpoint, part, self.request, self._dtype, self._prepared)
        loaded = replace(loaded, example=tuple(t.to(self._device) for t in loaded.example))
        program, outputs = trace(loaded)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as name:
            scratch = Path(name)
            (scratch / "libcuda.so").symlink_to(_driver())
            config = {**COMMON, **(TUNED if part in COMPILED else {})}
            include = self._cuda / "include"
            flags = (f"-isystem{include}", f"-isystem{include / 'cccl'}", f"-L{scratch}")
            with (
                quiet(),
                without_lines(),
                headers_of(self._cuda),
                redirect_stderr(io.StringIO()),  # a line for every product that was tuned
                torch.no_grad(),
            ):
                files = compile_program(program, scratch, config, flags)
            code, *beside = moved(files, folder / part / PACKAGE)
        return PartEntry(
            code.relative_to(folder).as_posix(),
            loaded.inputs,
            outputs,
            tuple(file.relative_to(folder).as_posix() for file in beside),
        )

    def _prepared(self, part: str, module: nn.Module) -> nn.Module:
        """Put a model on the GPU as it runs fastest there."""
        if isinstance(module, UNet):
            for layer in module.modules():
                if isinstance(layer, Attention):
                    layer.upcast = False  # every kernel on a GPU has its scores in fp32 already
            shapes = attentions(module, torch_only=True)
            use_fastest_("attention", shapes, self._dtype, self._device)
            joined = JoinedUNet(module, self._device)
            if part == "unet" and self.spec is not None:
                round_joined_(module, self.spec.only("unet"))
            module = joined
        module = module.to(self._device)
        if part.startswith(("unet", "vae")):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module


def round_joined_(unet: UNet, roundings: Mapping[str, Rounding]) -> None:
    """Put the linear layers named in `roundings` in fp8, those that are joined as one."""
    for name, rounding in roundings.items():
        read = shares_input(name)
        if read == name:
            unet.set_submodule(name, _in_fp8(unet.get_submodule(name), rounding))
            continue
        assert {roundings.get(f"{read}.to_{letter}") for letter in "qkv"} == {rounding}
        if name.endswith("to_q"):
            joined = f"{read}.to_qkv"
            unet.set_submodule(joined, _in_fp8(unet.get_submodule(joined), rounding))


def _in_fp8(layer: nn.Module, rounding: Rounding) -> nn.Module:
    assert isinstance(layer, (nn.Linear, Joined))
    return Fp8Linear(layer.weight, layer.bias, rounding)


def _takes_fp8(name: str, layer: nn.Module) -> bool:
    """Whether a layer of a model has an fp8 product in torch."""
    return isinstance(layer, nn.Linear) and has_fp8(layer) and name.startswith("unet.")


FORM = fp8(_in_fp8, _takes_fp8)


@contextmanager
def without_lines() -> Iterator[None]:
    """Keep the folders of torch's temporary files out of kernels, which have them for debuggers."""
    before = os.environ.get(LINES)
    os.environ[LINES] = "1"
    shutdown_compile_workers()  # which have the environment they were begun in
    try:
        yield
    finally:
        shutdown_compile_workers()
        if before is None:
            del os.environ[LINES]
        else:
            os.environ[LINES] = before


@contextmanager
def headers_of(home: Path) -> Iterator[None]:
    """Have torch look for CUDA below `home`: without a toolkit of its own finding, it refuses."""
    before = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = before or str(home)
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = before


def cuda_home() -> Path:
    """Return the folder with CUDA's headers: $CUDA_HOME, one of pip's packages, or the system's.

    Raises MissingDependency where there is none.
    """
    packages = Path(sysconfig.get_paths()["purelib"])
    torchs = Path(torch.__file__).parents[1]  # where pip put what torch needs
    asked = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    version = (torch.version.cuda or "").partition(".")[0]
    pips = [
        home / "nvidia" / name
        for home in (torchs, packages)
        for name in (f"cu{version}", "cuda_runtime")
    ]
    for home in (*map(Path, asked), *pips, Path("/usr/local/cuda")):
        include = home / "include"
        target = any((include / inside / "nv" / "target").is_file() for inside in ("", "cccl"))
        if target and all((include / name).is_file() for name in HEADERS):
            return home
    raise MissingDependency(
        f"compiling for a GPU needs CUDA's headers ({', '.join(HEADERS)}, nv/target), and they are "
        "not together below $CUDA_HOME, in pip's packages or in /usr/local/cuda; run pip install "
        "nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl in the versions of torch's CUDA, or "
        "set CUDA_HOME to a toolkit"
    )


def _driver() -> Path:
    """Return the driver's library as this process has loaded it: links are not everywhere."""
    torch.cuda.current_stream()  # loads it
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        path = line.partition("/")[2]
        if Path(path).name.startswith("libcuda.so"):
            return Path("/" + path)
    raise MissingDependency("the GPU driver's library libcuda.so is not loaded; is there a driver?")
