"""Engines for a GPU, as far as a machine without one shows them: their graphs, and what is refused.

Only the compiler and the loader are torch's for GPUs; tests/backends/test_cuda.py runs both.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn

from fastsd import Pipeline
from fastsd.artifact import Artifact, PartEntry
from fastsd.backends import open_artifact
from fastsd.backends.aoti import AotiCudaBackend, CompiledBackend
from fastsd.backends.for_gpu import JoinedUNet
from fastsd.checkpoints import Checkpoint, open_checkpoint
from fastsd.errors import MissingDependency, StaleArtifact, UsageError
from fastsd.export.build import open_exporter
from fastsd.export.calibration import calibrate_checkpoint, default_prompts
from fastsd.export.parts import Request, load_part, part_names
from fastsd.export.to_aoti import trace
from fastsd.export.to_aoti_cuda import FORM, HEADERS, cuda_home, round_joined_
from fastsd.models.unet import UNet
from fastsd.quality import psnr
from fastsd.quant.apply import layers
from fastsd.quant.spec import QuantSpec, role
from tests.fp8_pictures import judge_fp8

CPU = torch.device("cpu")
SIZE = (128, 128)


@final
class Uncompiled(CompiledBackend):
    """Runs on a CPU the very graphs that a GPU's engine is compiled from, but in fp32.

    spec: of what is in fp8.
    """

    name = "uncompiled"

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, spec: QuantSpec | None = None, **request: Any
    ) -> None:
        given = Request(**{"target": "aoti-cuda", "size": SIZE, "layout": "fast", **request})
        self._traced, entries = {}, {}

        def prepared(part: str, module: nn.Module) -> nn.Module:
            if part != "unet" or spec is None:
                return module
            assert isinstance(module, UNet)
            joined = JoinedUNet(module, CPU)
            round_joined_(module, spec.only("unet"))
            return joined

        for part in part_names(checkpoint, given):
            loaded = load_part(checkpoint, part, given, torch.float32, prepared)
            self._traced[part], outputs = trace(loaded)
            entries[part] = PartEntry(f"{part}/package/code.so", loaded.inputs, outputs)
        manifest: Any = SimpleNamespace(
            parts=entries, precision="fp32", layout="fast", files={}, choices={}
        )
        super().__init__(Artifact(folder, manifest, ""), checkpoint.config, device=CPU)

    def _size(self, part: str) -> int:
        return 0

    def _load(self, part: str) -> Any:
        return self._traced[part].module()

    def _call(self, part: str, opened: Any, inputs: list[Tensor]) -> list[Tensor]:
        out = opened(*inputs)
        return [out] if isinstance(out, Tensor) else list(out)


@pytest.mark.parametrize("family", ["sd1_folder", "sd2_folder", "sdxl_folder"])
@torch.no_grad()
def test_its_graphs_draw_the_exact_pictures(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(family))
    exact, engine = (Pipeline(checkpoint, name="test") for _ in range(2))
    backend = Uncompiled(checkpoint, tmp_path)
    engine._backend = backend
    assert [spec.name for spec in backend.entries["unet"].inputs] == ["sample", "row", "kv"]
    assert [spec.name for spec in backend.entries["unet"].outputs] == ["out_sample"]
    settings: dict[str, Any] = dict(height=SIZE[0], width=SIZE[1], num_inference_steps=3, seed=0)
    for changed in (
        dict(),
        dict(guidance_scale=1.0, sampler="ddim"),
        dict(num_images_per_prompt=3, num_inference_steps=2),
    ):
        pictures = [pipe("a red apple", **settings | changed).images for pipe in (engine, exact)]
        for ours, theirs in zip(*pictures, strict=True):
            assert psnr(ours, theirs) > 60


@torch.no_grad()
def test_its_linear_layers_run_in_fp8(sd1_folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sd1_folder)
    told: list[str] = []
    found = calibrate_checkpoint(
        checkpoint, ("a cat", "a dog"), size=SIZE, form=FORM, tell=told.append
    )
    assert set(found.errors) == {"unet"} and 1e-4 < found.errors["unet"] < 0.06
    unet = checkpoint.load("unet")
    linear = {f"unet.{n}" for n, layer in layers(unet).items() if isinstance(layer, nn.Linear)}
    assert found.spec.layers.keys() < linear
    assert {role(name) for name in linear - found.spec.layers.keys()} == {"time", "text"}
    assert any("of its products in fp8" in line for line in told)
    exact, engine = (Pipeline(checkpoint, name="test") for _ in range(2))
    backend = Uncompiled(checkpoint, tmp_path, found.spec)
    graph = backend._traced["unet"].graph
    products = [node for node in graph.nodes if node.target == torch.ops.aten._scaled_mm.default]
    thirds = sum("attn1.to_" in n and "to_out" not in n for n in found.spec.layers)
    assert len(products) == len(found.spec.layers) - thirds * 2 // 3, "q, k and v are one product"
    engine._backend = backend
    settings: dict[str, Any] = dict(height=SIZE[0], width=SIZE[1], num_inference_steps=3, seed=0)
    ours, theirs = (pipe("a red apple", **settings).images[0] for pipe in (engine, exact))
    assert 25 < psnr(ours, theirs) < 60


@pytest.mark.slow
@torch.no_grad()
def test_the_builtin_model_keeps_its_pictures_in_fp8(tmp_path: Path) -> None:
    """What rounding costs, a CPU shows; a GPU's sums are coarser, but finer than the rounding."""
    checkpoint = open_checkpoint("builtin")
    side = checkpoint.config.default_size
    spec = calibrate_checkpoint(
        checkpoint, default_prompts(checkpoint), size=(side, side), form=FORM
    ).spec
    exact, engine = (Pipeline(checkpoint, name="test") for _ in range(2))
    engine._backend = Uncompiled(checkpoint, tmp_path, spec, size=(side, side), batch=4)
    judge_fp8(engine, exact)


def test_what_cannot_be_compiled_is_refused(
    sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(sd1_folder)
    request = Request(target="aoti-cuda", precision="fp16", size=SIZE, layout="fast")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="sees none here.*--to aoti for this CPU"):
        open_exporter(checkpoint, request)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for change, told in (
        ({"dynamic": True}, "drop --dynamic"),
        ({"precision": "int8"}, "it has fp16, bf16, fp32, fp8"),
        ({"layout": "standard"}, "it has fast"),
    ):
        changed: dict[str, Any] = {"target": "aoti-cuda", "layout": "fast", "size": SIZE, **change}
        with pytest.raises(UsageError, match=told):
            open_exporter(checkpoint, Request(**changed))
    for target, device in (("aoti-cuda", "cpu"), ("aoti", "cuda")):
        manifest: Any = SimpleNamespace(target=target, native=True, machine={})
        artifact = Artifact(tmp_path, manifest, "")
        with pytest.raises(UsageError, match=f"not for {device}; pass device="):
            open_artifact(artifact, checkpoint.config, device=torch.device(device))


def test_the_gpu_is_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code for one GPU is not offered to another, nor to none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    h100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    facts = AotiCudaBackend.machine(torch.device("cuda"))
    assert facts["gpu"] == "NVIDIA H100 80GB HBM3 (9.0)" and "instruction sets" in facts
    manifest: Any = SimpleNamespace(machine=facts)
    Artifact(Path("engine"), manifest, "").check_machine(facts)
    with pytest.raises(StaleArtifact, match=r"gpu NVIDIA H100 80GB HBM3 \(9.0\) \(here: none\)"):
        Artifact(Path("engine"), manifest, "").check_machine(AotiCudaBackend.machine(CPU))


def test_cudas_headers_are_found_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    real = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: tmp_path in self.parents and real(self))
    for name in (*HEADERS, "cccl/nv/target"):
        with pytest.raises(MissingDependency, match="pip install nvidia-cuda-runtime"):
            cuda_home()
        (tmp_path / "include" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "include" / name).touch()
    assert cuda_home() == tmp_path
