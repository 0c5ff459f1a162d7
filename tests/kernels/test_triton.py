"""Our Triton kernels: right in the interpreter, and compiled ahead of time for each kind of GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.errors import MissingDependency, UsageError
from fastsd.kernels import dispatch
from fastsd.kernels.group_norm import candidates, group_norm
from fastsd.kernels.sampler_step import sampler_step_
from tests.kernels.triton_cases import CASES

triton = pytest.importorskip("triton", reason="there is no Triton but for Linux")


@pytest.fixture(scope="module")
def errors() -> Mapping[str, float]:
    """Run every case, in the interpreter or on a GPU where there is one."""
    gpu = torch.cuda.is_available()
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_cases"],
        cwd=Path(__file__).parents[2],
        env=os.environ | ({} if gpu else {"TRITON_INTERPRET": "1"}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, float] = json.loads(done.stdout)
    print(done.stderr)  # why a case is infinitely wrong
    return answers


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_equals_its_reference(name: str, errors: Mapping[str, float]) -> None:
    assert errors[name] <= CASES[name][1]


# --- compiled ahead of time ---------------------------------------------------------------------

# As `launch` would compile them for SD1.5's first level in fp16, and for any sampler, guided.
_NORM = dict(x="*fp16", weight="*fp16", bias="*fp16", added="*fp16", out="*fp16", eps="fp32")
_ROUNDED = dict(multiplier="*fp32")
_MAP = dict(C="i32", pixels="i32", added_stride="i32")
_SPLIT = dict(partial="*fp32", per_split="i32", splits="i32")
_GROUP = dict(GROUPS=32, WIDTH=10, ADDED=True)
_ROWS = dict(C="i32", rows="i32", **_ROUNDED)
_ATTENTION = {
    **dict.fromkeys(("q", "k", "v", "out"), "*fp16"),
    **{f"{x}_{axis}": "i32" for x in "qkv" for axis in "bn"},
    **dict(heads="i32", queries="i32", keys="i32", scale="fp32", **_ROUNDED),
}
KERNELS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "moments": (
        "triton_group_norm",
        dict(x="*fp16", added="*fp16", **_MAP, **_SPLIT),
        dict(OWN=120, BLOCK_P=32, BLOCK_C=128, BLOCK_G=16, **_GROUP),
    ),
    "normalise": (
        "triton_group_norm",
        {**_NORM, **_MAP, **_SPLIT, **_ROUNDED},
        dict(SILU=True, FP8=False, BLOCK_P=64, BLOCK_C=64, BLOCK_G=8, BLOCK_S=64, **_GROUP),
    ),
    "one_group": (
        "triton_group_norm",
        {**_NORM, **_MAP, **_ROUNDED, "groups": "i32"},
        dict(WIDTH=20, ADDED=True, SILU=True, FP8=False, BLOCK_P=1024, BLOCK_W=32),
    ),
    "add_layer_norm": (
        "triton_layer_norm",
        {**_NORM, **_ROWS, "total": "*fp16", "added_bias": "*fp16"},
        dict(ADDED=True, BIASED=True, FP8=False, BLOCK_R=8, BLOCK_C=512),
    ),
    "gated": (
        "triton_geglu",
        dict(x="*fp16", out="*fp16", **_ROWS),
        dict(FP8=False, BLOCK_R=2, BLOCK_C=512),
    ),
    **{
        f"attend {width}": (
            "triton_attention",
            _ATTENTION,
            dict(Q_H=width, K_H=width, V_H=width, WIDTH=width, FP8=False)
            | dict(BLOCK_Q=64, BLOCK_N=keys, REST=rest, BLOCK_W=block),
        )
        for width, block, keys, rest in (
            (40, 64, 64, 16),
            (64, 64, 64, 16),
            (80, 128, 64, 16),
            (160, 256, 128, 0),
        )
    },
    **{
        f"multiply{what}": (
            "triton_linear",
            dict(x=f"tensordesc<fp16[{rows},64]>", weight=f"tensordesc<fp16[{outputs},64]>")
            | dict.fromkeys(("bias", "residual", "out"), "*fp16")
            | dict.fromkeys(("C", "O", "rows"), "i32"),
            dict(GATED="gate" in what, HAS_BIAS=True, HAS_RESIDUAL="gate" not in what)
            | dict(BLOCK_R=rows, BLOCK_O=outputs, BLOCK_C=64, GROUP=8),
        )
        for what, rows, outputs in (
            ("", 256, 128),
            (" 128", 128, 128),
            (" 64", 64, 128),
            (" gate", 128, 128),
            (" gate 128", 128, 64),
            (" gate 64", 64, 64),
        )
    },
    "residual_sum": (
        "triton_residual",
        dict(x="*fp16", h="*fp16", bias="*fp16", out="*fp16", C="i32", pixels="i32"),
        dict(BLOCK_P=16, BLOCK_C=128),
    ),
    "step": (
        "triton_sampler_step",
        dict(sources="*fp32", prediction="*fp16", coefficients="*fp32", row="*i64")
        | dict(guidance="*fp32", elements="i32", picture="i32", pixels="i32", columns="i32")
        | dict(stride_b="i32", stride_c="i32", stride_p="i32"),
        dict(STATE=5, SOURCES=8, GUIDED=True, BLOCK=512),
    ),
    **{
        f"{name}{' of fp8' if kind == 'fp8e4nv' else ''}": (
            "triton_conv3x3",
            dict(x=f"tensordesc<{kind}[1,{pixels // 16},16,{block}]>")
            | dict(weight=f"tensordesc<{kind}[128,{block}]>")
            | dict(bias="*fp16", scale="*fp32", residual="*fp16", out="*fp16", C="i32", O="i32")
            | dict.fromkeys(
                ("B", "H", "W", "across", "down", "patches", "elements", "splits"), "i32"
            ),
            dict(UP=up, PARTS=pixels == 64, HAS_BIAS=True, HAS_RESIDUAL=True)
            | dict(HAS_SCALE=kind != "fp16", PICTURES=1, BLOCK_H=pixels // 16, BLOCK_W=16)
            | dict(BLOCK_O=128, BLOCK_C=block, GROUP=8),
        )
        for name, pixels, up in (
            ("convolve", 256, False),
            ("convolve 128", 128, False),
            ("convolve 64 in parts", 64, False),
            ("convolve up", 256, True),
        )
        for kind, block in (("fp16", 64), ("fp8e4nv", 128))
    },
    "sum_parts": (
        "triton_conv3x3",
        dict(parts="*fp32", bias="*fp16", scale="*fp32", residual="*fp16", out="*fp16")
        | dict.fromkeys(("O", "elements", "splits"), "i32"),
        dict(HAS_BIAS=True, HAS_SCALE=True, HAS_RESIDUAL=True, SPLITS=16, BLOCK=256),
    ),
}
# name -> (warps, stages, registers, shared memory), where not (4, 3, 128, 48 KiB): what a product
# may take of a multiprocessor; and a group's program
LARGE = {
    **{f"attend {width}": (4, 3, 255, 99 << 10) for width in (40, 64)},
    **{f"attend {width}": (8, 3, 255, 99 << 10) for width in (80, 160)},
    **{
        name: limits
        for size, limits in (
            ("", (8, 4, 255, 227 << 10)),
            (" 128", (4, 3, 255, 113 << 10)),
            (" 64", (4, 4, 128, 113 << 10)),
        )
        for kind in ("convolve", "multiply", "multiply gate")
        for name in KERNELS
        if name.startswith(kind + size)
    },
    "one_group": (16, 3, 128, 48 << 10),
}
# What a launch finds to be multiples of 16: every map's address, and channels, which all families
# have so but for the first and last convolution.
ALIGNED = {
    "attend": ("q", "k", "v", "out", *(f"{x}_{axis}" for x in "qkv" for axis in "bn")),
    "normalise": ("x", "out", "weight", "bias", "added", "C"),
    "moments": ("x", "C"),
    "add_layer_norm": ("x", "added", "total", "out", "weight", "bias", "C"),
    "gated": ("x", "out", "C"),
    "residual_sum": ("x", "h", "bias", "out", "C"),
    "one_group": ("x", "out", "weight", "bias", "added", "C"),
    "sum_parts": ("parts", "bias", "scale", "residual", "out", "O"),
    "convolve": ("bias", "scale", "residual", "out", "C", "O"),
    "multiply": ("bias", "residual", "out", "C", "O"),
}
ARCHITECTURES = (80, 89, 90, 100)


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=[] if a == 90 else pytest.mark.slow) for a in ARCHITECTURES]
)
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "fp16") for name in KERNELS),
        *((name, "fp8") for name, (_, _, constants) in KERNELS.items() if "FP8" in constants),
        *(pytest.param(name, "bf16", marks=pytest.mark.slow) for name in KERNELS),
    ],
)
def test_a_kernel_compiles_without_spills(name: str, form: str, arch: int, tmp_path: Path) -> None:
    """Registers for two programs of four warps a multiprocessor and more, and nothing spilled.

    form: fp16, its numbers as bf16, or what it writes as fp8.
    """
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, signature, constants = KERNELS[name]
    if form == "bf16":
        signature = {n: dtype.replace("fp16", "bf16") for n, dtype in signature.items()}
    if form == "fp8":
        if arch < 89:
            pytest.skip("GPUs have fp8 since Ada")
        signature, constants = signature | {"out": "*fp8e4nv"}, constants | {"FP8": True}
    kernel_name = name.split()[0]
    kernel = getattr(importlib.import_module(f"fastsd.kernels.{module}"), kernel_name)
    if arch < 90 and kernel_name in ("convolve", "multiply"):
        pytest.skip("it needs loads of rectangles, which GPUs have since Hopper")
    if not hasattr(kernel, "cache_key"):
        pytest.skip("TRITON_INTERPRET is set, so there is nothing to compile")
    names = [parameter.name for parameter in kernel.params]
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in ALIGNED.get(kernel_name, ())}
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, types, constants, attrs=aligned)
    warps, stages, registers, shared = LARGE.get(name, (4, 3, 128, 48 << 10))
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert f".target sm_{arch}" in compiled.asm["ptx"]
    if kernel_name == "attend":  # whatever the heads' width
        assert not re.search(r"ld\.global[.\w]*\.b16", compiled.asm["ptx"]), (
            "it reads number by number"
        )
    if form == "fp8":  # the interpreter's fp8 has no NaN to test
        assert "min.NaN" in compiled.asm["ptx"], (
            "what is no number would become the least or largest"
        )
    assert compiled.metadata.shared <= shared
    used = resources(compiled.asm["cubin"], tmp_path / "kernel.cubin")
    print(f"{name} {form} sm_{arch}: {used}, {compiled.metadata.shared} bytes of shared memory")
    assert used["REG"] <= registers and used["STACK"] == used["LOCAL"] == 0, used


def resources(cubin: bytes, path: Path) -> dict[str, int]:
    """Ask cuobjdump what a kernel uses: {"REG": …, "STACK": …, "SHARED": …, "LOCAL": …}."""
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    program = bundled if bundled.exists() else shutil.which("cuobjdump")
    assert program, "cuobjdump comes with triton"
    path.write_bytes(cubin)
    told = subprocess.run(
        [program, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", told)}


@pytest.mark.parametrize("width", [1, 2, 4, 7, 10, 20, 30, 31, 33, 40, 60, 80, 256, 300])
def test_a_program_finds_the_moments_of_whole_groups(width: int) -> None:
    from fastsd.kernels.triton_group_norm import _whole_groups

    for groups in (1, 2, 32):
        own = _whole_groups(groups * width, width)
        assert own % width == 0 and own <= min(groups * width, max(256, width))


# --- which one runs, and why ----------------------------------------------------------------------

CPU = torch.device("cpu")


def test_the_librarys_is_the_default_and_says_why() -> None:
    for op, known in dispatch.IMPLEMENTATIONS.items():
        assert dispatch.choose(op, CPU).implementation == known[0]
        assert str(dispatch.choose(op, CPU)).startswith(f"{op}: {known[0]} (the library's")
        assert str(dispatch.choose(op, CPU, known[0])) == f"{op}: {known[0]} (asked for)"


def test_what_can_run_is_what_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    installed = {"triton"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in installed or None)
    gpu = torch.device("cuda", 0)
    assert dispatch.able("group_norm", gpu) == ["library", "triton", "triton-group"]
    assert dispatch.able("attention", gpu) == [
        *("sdpa", "flash", "efficient", "cudnn", "triton", "products")
    ]
    assert dispatch.able("attention", CPU) == ["sdpa", "avx512", "vnni"]
    for op, known in dispatch.IMPLEMENTATIONS.items():
        assert dispatch.able(op, CPU)[0] == dispatch.able(op, gpu)[0] == known[0]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.randn(1, 32, 3, 3)
    assert list(candidates(x, x[0, :, 0, 0], x[0, :, 0, 0], 32, 1e-5)) == [
        *("library", "triton", "triton-group")
    ]


def test_only_what_runs_and_agrees_is_timed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "time_ms", lambda calls: {name: 1.0 for name in calls})
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).half()

    def refuse() -> torch.Tensor:
        raise ValueError("shared memory: 300 KiB are wanted")  # as compilers do, of no one kind

    calls = {"library": lambda: x, "near": lambda: x * 1.001, "off": lambda: x * 1.02}
    calls |= {"refuses": refuse, "nan": lambda: x / 0 * 0}
    assert list(dispatch.try_out("norm 8x8", calls)) == ["library", "near"]
    assert "norm 8x8: off is not used: it is 2.0e-02 from the first" in caplog.text
    assert "nan is not used" in caplog.text
    assert "refuses is not used: it does not run here (shared memory: 300 KiB" in caplog.text
    with pytest.raises(ValueError, match="300 KiB"):
        dispatch.try_out("norm", {"refuses": refuse})
    # torch's attention chooses cuDNN's on Hopper, which refuses shapes that the others take
    calls = {"sdpa": refuse, "flash": lambda: x, "off": lambda: x * 1.02}
    assert list(dispatch.try_out("attention", calls)) == ["flash"]

    def no_memory() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # of this moment, not of the kernel
        dispatch.try_out("norm", {"library": lambda: x, "large": no_memory})


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.ones(1, 32, 2, 2)
    with pytest.raises(UsageError, match="runs on GPUs, not on cpu; use 'library'"):
        group_norm(x, x[0, :, 0, 0], x[0, :, 0, 0], 32, 1e-5, implementation="triton")
    with pytest.raises(UsageError, match="'vnni' runs on CPUs, not on cuda; use 'sdpa'"):
        dispatch.require("attention", "vnni", torch.device("cuda"))
    with pytest.raises(UsageError, match="'tryton' is unknown; it is one of library, triton"):
        sampler_step_(x, x, x, x, implementation="tryton")
    with pytest.raises(UsageError, match="op 'norm' is unknown"):
        dispatch.choose("norm", CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install triton"):
        dispatch.require("sampler_step", "triton", torch.device("cuda"))


def test_the_kernels_trace() -> None:
    """A fake tensor goes through, so that a compiled or exported model may hold our kernels."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weight = torch.empty(2, 320, 8, 8), torch.empty(320)
        out = torch.empty_like(x)
        torch.ops.fastsd.group_norm(x, weight, weight, 32, 1e-5, None, True, None, False, out)
        taps = torch.empty(320, 9 * 320)
        torch.ops.fastsd.conv3x3(x, taps, weight, None, x, False, out)
        rows = torch.empty(2, 9, 320)
        torch.ops.fastsd.linear(rows, taps[:, :320], weight, rows, False, torch.empty_like(rows))
        sources = torch.empty(5, 2, 4, 8, 8)
        row = torch.empty(1, dtype=torch.int64)
        torch.ops.fastsd.sampler_step(sources, sources[0], torch.empty(9, 9), row, None)
