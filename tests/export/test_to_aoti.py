"""AOTInductor: compiled layers against eager ones, and whole engines against the exact pictures.

Compiling a model's parts takes minutes, so that the default tests compile a few layers only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd import Pipeline
from fastsd.artifact import Artifact, PartEntry, TensorSpec
from fastsd.backends.aoti import PACKAGE, AotiBackend
from fastsd.checkpoints import open_checkpoint
from fastsd.errors import (
    MissingDependency,
    UsageError,
)
from fastsd.export import to_aoti
from fastsd.export.build import export, open_exporter
from fastsd.export.for_cpu import bf16_pays, for_cpu
from fastsd.export.parts import GraphPart, Request
from fastsd.export.to_aoti import compile_part
from fastsd.kernels import native
from fastsd.models.layers import Resnet
from fastsd.quality import psnr
from fastsd.quant.apply import quantised
from fastsd.quant.spec import Rounding
from tests.distances import relative_l2
from tests.fixtures import write_sd1

SIZE = (64, 64)
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler here"
)


class Layers(nn.Module):
    """A resnet, then a linear layer over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = Resnet(16, 32, groups=8, eps=1e-5)
        self.linear = nn.Linear(32, 64)

    def forward(self, *inputs: Tensor) -> Tensor:  # as every exported part has it
        (x,) = inputs
        out: Tensor = self.linear(self.resnet(x).flatten(2).transpose(1, 2))
        return out


@needs_compiler
def test_int8_layers_become_integer_products_of_onednn(tmp_path: Path, cpu_kernels: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 16, 16)
    exact = Layers().eval().requires_grad_(False)
    exponents = tuple(-(i % 3) for i in range(32))
    roundings = {
        "resnet.conv1": Rounding(-0.3, 5.0),
        "resnet.conv2": Rounding(-1.2, 20.0, exponents),
        "linear": Rounding(-5.0, 5.0),
    }
    expected, rounded = exact(x), quantised(exact, roundings)(x)
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # oneDNN, on this CPU
    prepared = for_cpu(exact, roundings, bf16=has_bf16, own_kernels=cpu_kernels)
    spec = TensorSpec("x", "float32", tuple(x.shape))
    part = GraphPart("layers", prepared, (spec,), ("y",), (x,))
    (output,), files = compile_part(part, tmp_path / "layers" / PACKAGE)
    assert output == TensorSpec("y", "float32", (2, 256, 64))
    library = files[0].read_bytes()
    # Every call of torch's stands in the message that says it failed.
    assert library.count(b"aoti_torch_cpu__qconv_pointwise_tensor(") == 2
    assert library.count(b"aoti_torch_cpu__qlinear_pointwise_tensor(") == 1
    shortcuts = library.count(b"aoti_torch_cpu_mkldnn__convolution_pointwise(")
    assert shortcuts == has_bf16, "a small one in fp32 is torch's own"
    written = [file for file in (tmp_path / "layers").rglob("*") if file.is_file()]
    assert sorted(written) == sorted(files) and len({file.suffix for file in files}) == 3
    here = (
        tempfile.gettempdir(),
        str(tmp_path),
        str(Path.home()),
        str(Path(torch.__file__).parent),
    )
    for file in files:
        assert not [path for path in here if path.encode() in file.read_bytes()], file
    for moved in ("layers", "published"):  # loaded once where it is made, and again where it stands
        if moved != "layers":
            (tmp_path / "layers").rename(tmp_path / moved)
        backend = AotiBackend.__new__(AotiBackend)
        backend.artifact = Artifact(tmp_path, None, "")  # type: ignore[arg-type]
        got = backend._open(moved)(x)
        # A rounding may fall the other way, and without VNNI oneDNN cuts sums of two products to
        # 16 bits.
        far = 0.02 if torch.cpu._is_vnni_supported() else 0.1
        assert relative_l2(got, rounded) < far
        assert 1e-4 < relative_l2(got, expected) < max(far, 0.05)


class Chain(nn.Module):
    """Each linear layer adds to what the last one made: two of three are fused with a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        for layer in self.layers:
            x = x * 1.0 + layer(F.silu(x))
        return x


@needs_compiler
def test_a_call_keeps_none_of_its_activations(tmp_path: Path) -> None:
    """torch 2.13 writes int8 products that add to another's result so that its memory is lost."""
    x = torch.randn(2, 4096, 128)  # 4 MB
    module = quantised(
        Chain().requires_grad_(False), {f"layers.{i}": Rounding(-4.0, 4.0) for i in range(3)}
    )
    spec = TensorSpec("x", "float32", tuple(x.shape))
    part = GraphPart("chain", module, (spec,), ("y",), (x,))
    compile_part(part, tmp_path / "chain" / PACKAGE)
    backend = AotiBackend.__new__(AotiBackend)
    backend.artifact = Artifact(tmp_path, None, "")  # type: ignore[arg-type]
    run = backend._open("chain")
    run(x)
    before = resident_bytes()
    for _ in range(25):
        run(x)
    assert resident_bytes() - before < 20e6, "it grows by 4 MB a call"


def resident_bytes() -> int:
    """How much memory this process holds, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class _Counted:
    """Stands for a compiled UNet: answers x + 100 kv, `answers` times, and counts its calls."""

    def __init__(self, answers: int) -> None:
        self.answers, self.calls = answers, 0

    def __call__(self, x: Tensor, row: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert x.shape[0] * self.answers == k.shape[0] == v.shape[0]
        assert row.shape[0] in (1, k.shape[0])
        self.calls += 1
        return (
            torch.cat([x] * self.answers)
            + row.sum(1).view(-1, 1, 1, 1)
            + 100 * k.sum(1, keepdim=True)
        )


@pytest.mark.parametrize("batch", (1, 2, 3, 4))
@pytest.mark.parametrize("guided", (True, False))
@pytest.mark.parametrize("pictures", (1, 2))
@pytest.mark.parametrize("pooled", (True, False))
@pytest.mark.parametrize("answers", (1, 2))
def test_a_unet_of_few_pictures_draws_any_number(
    batch: int, guided: bool, pictures: int, pooled: bool, answers: int
) -> None:
    """Every answer comes from its own picture, text and row, whatever the padding."""
    inputs = (
        TensorSpec("sample", "float32", (pictures, 1, 2, 2)),
        TensorSpec("row", "float32", (answers * pictures if pooled else 1, 3)),
        TensorSpec("k.0", "float32", (answers * pictures, 1, 1, 1)),
        TensorSpec("v.0", "float32", (answers * pictures, 1, 1, 1)),
    )
    outputs = (TensorSpec("out_sample", "float32", (answers * pictures, 1, 2, 2)),)
    backend = AotiBackend.__new__(AotiBackend)
    backend.entries = {"unet": PartEntry("unet/code.so", inputs, outputs)}
    unet = _Counted(answers)
    backend._opened = {"unet": unet}
    backend._opening = threading.Lock()
    x = torch.arange(batch, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    rows = batch * (2 if guided else 1)
    k = torch.arange(1.0, rows + 1).view(-1, 1, 1, 1)
    for row in [torch.ones(1, 3), *([torch.rand(rows, 3)] if pooled else [])]:
        unet.calls = 0
        out = backend._unet_fast(x, row, {"k.0": k, "v.0": k})
        expected = torch.cat([x, x])[:rows] + row.sum(1).view(-1, 1, 1, 1) + 100 * k
        assert torch.equal(out, expected)
        given = rows if guided and answers == 1 else batch
        assert unet.calls == -(-given // pictures)


def test_what_cannot_be_compiled_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint = open_checkpoint("builtin")
    request = Request(target="aoti", layout="fast", size=(128, 128))
    assert open_exporter(checkpoint, request).parts[0] == "text_encoder"
    for change, told in (
        ({"dynamic": True}, "drop --dynamic"),
        ({"precision": "fp8"}, "it has fp32, bf16, int8"),
        ({"layout": "standard"}, "it has fast"),
    ):
        changed: dict[str, Any] = {"target": "aoti", "layout": "fast", "size": (128, 128), **change}
        with pytest.raises(UsageError, match=told):
            open_exporter(checkpoint, Request(**changed))
    without = {**torch.cpu.get_capabilities(), "avx512_vnni": False, "avx_vnni": False}
    with monkeypatch.context() as older:
        older.setattr("platform.machine", lambda: "x86_64")
        older.setattr(torch.cpu, "get_capabilities", lambda: without)
        with pytest.raises(UsageError, match="no VNNI"):
            open_exporter(checkpoint, replace(request, precision="int8"))
        choices = open_exporter(checkpoint, request).choices()
        assert "without fastsd's: they" in choices["kernels"]
    with monkeypatch.context() as older:
        older.setattr(to_aoti, "NEWEST", "a setting of a later torch")
        with pytest.raises(MissingDependency, match="needs torch 2.13 or newer"):
            open_exporter(checkpoint, request)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingDependency, match="C\\+\\+ compiler"):
        open_exporter(checkpoint, request)


@pytest.mark.slow
@needs_compiler
def test_an_engine_draws_the_exact_pictures_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_sd1(tmp_path / "sd1")
    request = Request(target="aoti", layout="fast", size=SIZE, prompts=("a cat", "a dog"))
    engine = export(open_checkpoint(source), "sd1", request, Path("engine"))  # relative, as typed
    receipt = engine.manifest.receipt
    assert receipt is not None and max(receipt["parts"].values()) <= 1e-4
    exact = Pipeline.from_pretrained(source)
    compiled = Pipeline.from_pretrained(engine.path)
    assert [line for line in compiled.explain() if line.startswith("kernels: ")]
    settings: dict[str, Any] = dict(num_inference_steps=4, seed=0, height=SIZE[0], width=SIZE[1])
    for prompts, guidance, interval in (
        (["a cat"], 7.5, 1),
        (["a", "b", "c"], 7.5, 1),
        (["a cat"], 1.0, 1),
        (["a", "b"], 7.5, 2),
        (["a cat"], 1.0, 2),
    ):
        asked = dict(guidance_scale=guidance, cache_interval=interval, **settings)
        pairs = zip(compiled(prompts, **asked).images, exact(prompts, **asked).images, strict=True)
        assert min(psnr(a, b) for a, b in pairs) >= 60
    with pytest.raises(UsageError, match="64x64"):
        compiled("a cat", height=128, width=128, num_inference_steps=1)

    script = (
        "import sys; from fastsd import Pipeline; "
        "pipe = Pipeline.from_pretrained(sys.argv[1], trust_native=len(sys.argv) > 2); "
        "pipe('a', num_inference_steps=1, height=64, width=64)"
    )
    stranger = {"PATH": str(tmp_path), "FASTSD_CACHE": str(tmp_path / "cache")}  # nor a compiler
    refused, drawn = (
        subprocess.run(
            [sys.executable, "-c", script, str(engine.path), *trust],
            env=stranger,
            text=True,
            capture_output=True,
        )
        for trust in ((), ("trust",))
    )
    assert refused.returncode == 1 and "UntrustedArtifact" in refused.stderr
    assert drawn.returncode == 0, drawn.stderr


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(native.overflows(), reason="aoti refuses int8 on CPUs without VNNI")
def test_an_int8_engine_carries_its_spec_and_its_receipt(tmp_path: Path) -> None:
    source = write_sd1(tmp_path / "sd1")
    request = Request(
        target="aoti", precision="int8", layout="fast", size=SIZE, prompts=("a cat", "a dog")
    )
    engine = export(open_checkpoint(source), "sd1", request, tmp_path / "engine")
    assert (engine.path / "quantisation.json").is_file()
    assert engine.manifest.choices["layers out of int8"].startswith("bf16") == bf16_pays()
    receipt = engine.manifest.receipt
    assert receipt is not None
    parts = receipt["parts"]
    assert 1e-3 < parts["unet"] < 0.1
    assert parts["text_encoder"] < (1e-2 if bf16_pays() else 1e-5)  # never int8
    assert receipt["pictures"]["psnr_db"]["worst"] > 15
