"""ONNX engines: every part and family equals eager; names, bytes, sizes that others expect."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from fastsd import Pipeline
from fastsd.artifact import Artifact
from fastsd.backends import open_artifact
from fastsd.checkpoints import open_checkpoint
from fastsd.checkpoints.layout import BUILTIN
from fastsd.errors import UsageError
from fastsd.export import graph
from fastsd.export.build import export, open_exporter
from fastsd.export.parts import Request, load_part
from tests.distances import relative_l2
from tests.export.conftest import SIZE, write
from tests.pictures import assert_same_pictures, quiet

BAR = 1e-4  # relative L2 error of a part in fp32


def draw(
    folder: Path, texts: Any = "a red apple", size: tuple[int, int] = SIZE, **more: Any
) -> Any:
    pipe = quiet(folder, device="cpu")
    height, width = size
    settings = {"num_inference_steps": 3, "seed": 1, "output_type": "np", **more}
    return pipe(texts, height=height, width=width, **settings).images


@pytest.mark.parametrize(("engine", "source"), [("sd1_onnx", "sd1"), ("sdxl_onnx_fast", "sdxl")])
def test_parts_and_pictures_equal_eager(
    engine: str, source: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(engine)
    receipt = Artifact.open(folder).manifest.receipt
    assert receipt is not None
    assert len(receipt["parts"]) == (4 if source == "sd1" else 7)
    assert max(receipt["parts"].values()) <= BAR
    checkpoint = request.getfixturevalue(f"{source}_folder")
    # one picture, three (more than the graph's batch), and no guidance (fewer rows than it)
    for texts, guidance in (("a red apple", 7.5), (["a cat", "fog", "a dog"], 7.5), ("a cat", 1.0)):
        ours = draw(folder, texts, guidance_scale=guidance)
        assert_same_pictures(ours, draw(checkpoint, texts, guidance_scale=guidance))


def test_every_output_equals_eager(sd1_onnx: Path, sd1_folder: Path) -> None:
    """The receipt looks at first outputs only; here are all, on other inputs."""
    artifact, checkpoint = Artifact.open(sd1_onnx), open_checkpoint(sd1_folder)
    backend = open_artifact(artifact, checkpoint.config, device=torch.device("cpu"))
    request = Request(target="onnx", size=SIZE)
    for part in artifact.manifest.parts:
        exact = load_part(checkpoint, part, request, torch.float32)
        given = [t.flip(-1) if t.ndim else t + 0.5 for t in exact.example]
        expected = exact.module(*given)
        expected = expected if isinstance(expected, tuple) else (expected,)
        entry = artifact.manifest.parts[part]
        names = [spec.name for spec in entry.inputs]
        out = backend.run(part, dict(zip(names, (t.contiguous() for t in given), strict=True)))
        assert list(out) == [spec.name for spec in entry.outputs]
        for tensor, spec, other in zip(out.values(), entry.outputs, expected, strict=True):
            assert tuple(tensor.shape) == spec.shape == tuple(other.shape)
            assert relative_l2(tensor, other) <= BAR


def test_names_types_and_folders_are_those_that_others_expect(sd1_onnx: Path) -> None:
    def signature(part: str) -> tuple[dict[str, int], list[str]]:
        loaded = onnx.load(sd1_onnx / part / "model.onnx")
        onnx.checker.check_model(loaded)
        assert json.loads((sd1_onnx / part / "config.json").read_text())
        inputs = {value.name: value.type.tensor_type.elem_type for value in loaded.graph.input}
        return inputs, [value.name for value in loaded.graph.output]

    fp32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    unet = {"sample": fp32, "timestep": fp32, "encoder_hidden_states": fp32}
    assert signature("unet") == (unet, ["out_sample"])
    text = ["last_hidden_state", "pooler_output"]
    assert signature("text_encoder") == ({"input_ids": int64}, text)
    assert signature("vae_decoder") == ({"latent_sample": fp32}, ["sample"])
    assert signature("vae_encoder") == ({"sample": fp32}, ["latent_parameters"])
    index = json.loads((sd1_onnx / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert (sd1_onnx / "tokenizer/vocab.json").is_file()
    assert (sd1_onnx / "scheduler/scheduler_config.json").is_file()


def test_two_exports_are_the_same_bytes_and_hold_no_path(
    sd1_onnx: Path, sd1_folder: Path, tmp_path: Path
) -> None:
    """From another folder, into another folder: every file alike, the manifest too."""
    clone = shutil.copytree(sd1_folder, tmp_path / "another" / "clone" / "sd1")
    checkpoint = open_checkpoint(clone)
    request = Request(target="onnx", size=SIZE)
    part = load_part(checkpoint, "vae_decoder", request, torch.float32)
    graph.write(graph.trace(part), part, tmp_path)
    theirs = (sd1_onnx / "vae_decoder/model.onnx").read_bytes()
    assert (tmp_path / "vae_decoder/model.onnx").read_bytes() == theirs
    paths = (str(sd1_folder), str(sd1_onnx), str(Path(graph.__file__).parent), "site-packages")
    for file in sd1_onnx.rglob("*"):
        if file.is_file():
            assert not [path for path in paths if path.encode() in file.read_bytes()], file


def test_weights_beyond_the_limit_lie_beside_the_graph(
    sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "INLINE_LIMIT", 1000)
    checkpoint = open_checkpoint(sd1_folder)
    request = Request(target="onnx", size=SIZE)
    entry = open_exporter(checkpoint, request).write("vae_decoder", tmp_path)
    assert entry.weights == ("vae_decoder/model.onnx.data",)
    weights = sum(t.numel() for t in checkpoint.load("vae").decoder.parameters())  # type: ignore
    assert (tmp_path / entry.weights[0]).stat().st_size > 0.95 * 4 * weights  # vectors stay inside
    assert (tmp_path / entry.file).stat().st_size < 1_000_000
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / entry.file)
    z = np.random.default_rng(0).standard_normal((1, 4, 8, 12), np.float32)
    (picture,) = session.run(None, {"latent_sample": z})
    expected = checkpoint.load("vae").decode(torch.from_numpy(z))  # type: ignore[operator]
    assert relative_l2(torch.from_numpy(picture), expected) <= BAR


def test_a_static_engine_refuses_another_size(sd1_onnx: Path) -> None:
    with pytest.raises(UsageError, match=r"exported for pictures of 96x64 pixels and prompts of"):
        draw(sd1_onnx, size=(64, 64))
    with pytest.raises(UsageError, match="has 'fp32'; leave precision out"):
        Pipeline.from_pretrained(sd1_onnx, precision="fp16")
    with pytest.raises(UsageError, match="has 'ort'; leave backend out"):
        Pipeline.from_pretrained(sd1_onnx, backend="eager")
    with pytest.raises(UsageError, match="was built with its own; leave weights out"):
        Pipeline.from_pretrained(sd1_onnx, weights="int8")


def test_fractional_timesteps_are_kept(sd1_onnx: Path, sd1_folder: Path) -> None:
    options: dict[str, Any] = {"sampler": "Euler Karras"}
    assert_same_pictures(draw(sd1_onnx, **options), draw(sd1_folder, **options))


def test_a_dynamic_graph_takes_any_size_and_number(
    sd1_folder: Path, sd1_onnx_any_size: Path
) -> None:
    """Down to one pixel at the lowest level, one row, and texts of several chunks."""
    checkpoint = open_checkpoint(sd1_folder)
    request = Request(target="onnx", size=SIZE, dynamic=True)
    entry = Artifact.open(sd1_onnx_any_size).manifest.parts["unet"]
    assert entry.inputs[0].shape == ("rows", 4, "latent_height", "latent_width")
    import onnxruntime

    session = onnxruntime.InferenceSession(sd1_onnx_any_size / entry.file)
    exact = load_part(checkpoint, "unet", request, torch.float32).module
    generator = torch.Generator().manual_seed(0)
    for rows, height, width, tokens in ((1, 9, 17, 77), (2, 1, 2, 154), (5, 8, 3, 77)):
        given = (
            torch.randn(rows, 4, height, width, generator=generator),
            torch.tensor(41.5),
            torch.randn(rows, tokens, 32, generator=generator),
        )
        feed = {spec.name: t.numpy() for spec, t in zip(entry.inputs, given, strict=True)}
        out, expected = torch.from_numpy(session.run(None, feed)[0]), exact(*given)
        assert relative_l2(out, expected) <= BAR


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int3"}, "onnx has no precision 'int3'; it has fp32"),
        ({"layout": "quick"}, "layout 'quick' is unknown"),
        ({"size": (60, 64)}, "size must be multiples of 8 pixels, not 64x60"),
        ({"target": "coreml"}, "target 'coreml' is unknown; it is one of aoti, aoti-cuda, onnx"),
    ],
)
def test_what_cannot_be_asked(
    options: dict[str, Any], message: str, sd1_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        write(sd1_folder, tmp_path / "engine", **options)
    assert not list(tmp_path.iterdir())


def test_a_floor_needs_pictures(tmp_path: Path) -> None:
    """Random weights draw noise: there is no prompt to judge them by but the user's."""
    request = Request(target="onnx", size=SIZE, floor=30.0)
    with pytest.raises(UsageError, match="--floor needs pictures"):
        export(open_checkpoint("random:sd15"), "random:sd15", request, tmp_path / "engine")
    assert not list(tmp_path.iterdir())


# --- minutes: the other families, layouts, precisions and sizes -----------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", ["standard", "fast"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_family_layout_and_size(
    family: str, layout: str, dynamic: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(f"{family}_folder")
    folder = write(source, tmp_path / "engine", layout=layout, dynamic=dynamic)
    receipt = Artifact.open(folder).manifest.receipt
    assert receipt is not None and max(receipt["parts"].values()) <= BAR
    sizes = [SIZE, (136, 72), (64, 64)] if dynamic else [SIZE]
    for size in sizes:
        for texts in ("a red apple", ["a cat", "a dog", "fog"]):
            assert_same_pictures(draw(folder, texts, size), draw(source, texts, size))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "builtin"])
def test_true_half_precision(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """fp16 inside and at the border, SDXL's VAE too, whose activations are scaled into range."""
    source = BUILTIN if family == "builtin" else request.getfixturevalue(f"{family}_folder")
    folder = write(source, tmp_path / "engine", precision="fp16")
    manifest = Artifact.open(folder).manifest
    assert manifest.receipt is not None and max(manifest.receipt["parts"].values()) <= 2e-2
    kinds = {part: {spec.dtype for spec in entry.outputs} for part, entry in manifest.parts.items()}
    assert all(kind == {"float16"} for kind in kinds.values())
    weights = onnx.load(folder / "unet/model.onnx").graph.initializer
    large = {t.data_type for t in weights if np.prod(t.dims) > 100}
    assert large == {onnx.TensorProto.FLOAT16}
    assert_same_pictures(draw(folder), draw(source), bar_db=30)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_true_size(part: str, tmp_path: Path) -> None:
    """SD1.5 at 512x512; the UNet's weights lie beside its graph, which could not hold them."""
    checkpoint = open_checkpoint("random:sd15")
    request = Request(target="onnx", size=(512, 512))
    entry = open_exporter(checkpoint, request).write(part, tmp_path)
    assert bool(entry.weights) == (part == "unet")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / entry.file)
    exact = load_part(checkpoint, part, request, torch.float32)
    feed = {spec.name: t.numpy() for spec, t in zip(exact.inputs, exact.example, strict=True)}
    out = torch.from_numpy(session.run([exact.outputs[0]], feed)[0])
    del session
    with torch.no_grad():
        expected = exact.module(*exact.example)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert relative_l2(out, expected) <= BAR


def test_hashes_of_equal_models_are_equal(sd1_folder: Path, tmp_path: Path) -> None:
    from fastsd.export.parts import source_digest

    clone = shutil.copytree(sd1_folder, tmp_path / "clone")
    digest = source_digest(open_checkpoint(sd1_folder))
    assert digest == source_digest(open_checkpoint(clone))
    weights = clone / "unet/diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert digest != source_digest(open_checkpoint(clone))
    assert hashlib.sha256(b"").hexdigest() != digest
