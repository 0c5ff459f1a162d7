"""Kernels chosen by trying: every layer at its own shape, remembered for the next time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastsd import Pipeline
from fastsd.artifact import cache_folder
from fastsd.backends import fastest
from fastsd.backends import measured as measured_
from fastsd.backends.eager import EagerBackend
from fastsd.backends.fastest import LinearShape, use_fastest_
from fastsd.backends.for_gpu import spare_passes_
from fastsd.backends.measured import measured
from fastsd.benchmarks.shipped import TABLE
from fastsd.benchmarks.shipped import main as shipped_main
from fastsd.checkpoints.weights import empty_module
from fastsd.config import SD15, SDXL
from fastsd.files import read_json
from fastsd.kernels import attention, conv3x3, dispatch, group_norm, sampler_step
from fastsd.models.layers import Attention, Conv3x3, GroupNorm, Upsample
from fastsd.models.unet import UNet
from fastsd.models.vae import VAE

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # (queries, keys, heads, head width) -> how many layers
        (
            SD15.unet,
            {
                (4096, 4096, 8, 40): 5,
                (4096, 77, 8, 40): 5,
                (1024, 1024, 8, 80): 5,
                (1024, 77, 8, 80): 5,
                (256, 256, 8, 160): 5,
                (256, 77, 8, 160): 5,
                (64, 64, 8, 160): 1,
                (64, 77, 8, 160): 1,
            },
        ),
        (
            SDXL.unet,
            {
                (4096, 4096, 10, 64): 10,
                (4096, 77, 10, 64): 10,
                (1024, 1024, 20, 64): 60,
                (1024, 77, 20, 64): 60,
            },
        ),
    ],
    ids=("sd15", "sdxl"),
)
def test_every_attention_is_measured_at_its_shape(config: Any, expected: Any) -> None:
    with torch.device("meta"):
        shapes = fastest.attentions(UNet(config))
    assert {shape[:4]: len(modules) for shape, modules in shapes.items()} == expected


def test_what_was_measured_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "cache"))
    calls: list[str] = []

    def measure(**times: float) -> Any:
        def run() -> dict[str, float]:
            calls.append("measured")
            return times

        return run

    assert [*measured("a", measure(flash=0.2, cudnn=0.1)).items()] == [
        ("cudnn", 0.1),
        ("flash", 0.2),
    ]
    assert [*measured("b", measure(flash=0.2, sdpa=0.3))] == ["flash", "sdpa"]
    assert [*measured("a", measure(flash=0.0))] == ["cudnn", "flash"] and len(calls) == 2
    file = cache_folder() / "measured.json"
    assert set(json.loads(file.read_text())) == {"a", "b"}
    assert [path.name for path in file.parent.iterdir()] == ["measured.json"], "no draft is left"
    for broken in ("{", '{"a": 3}', '{"a": {"flash": "fast"}}'):
        file.write_text(broken)
        assert measured("a", measure(efficient=0.4)) == {"efficient": 0.4}


def test_what_ships_is_used_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slim image has no compiler for Triton: what was fastest elsewhere does not run there."""
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTSD_MEASURE", raising=False)
    shipped = {"commit": "abc", "library": 0.2, "triton": 0.1}
    monkeypatch.setattr(measured_, "_shipped", lambda: {"a": shipped})
    here = {"library": 0.3}
    runs = {"triton": True}
    for key, expected in (("1", "triton"), ("2", "library")):
        assert (
            next(iter(measured(key, lambda: here, shipped="a", runs=runs.__getitem__))) == expected
        )
        runs["triton"] = False
    assert next(iter(measured("1", lambda: here, shipped="a"))) == "triton", "it was remembered"
    monkeypatch.setenv("FASTSD_MEASURE", "1")
    for _ in range(2):
        assert measured("1", lambda: here, shipped="a", runs=lambda name: True) == here
    monkeypatch.delenv("FASTSD_MEASURE")
    assert measured("1", lambda: {}, shipped="a", runs=lambda name: True) == here


def test_a_cache_that_cannot_be_written_costs_only_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "file" / "cache"))
    assert measured("a", lambda: {"library": 0.1}) == {"library": 0.1}
    assert "what was measured is not remembered" in caplog.text


def test_a_candidate_that_fails_or_disagrees_does_not_run() -> None:
    def fail() -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler")

    right = {"library": lambda: torch.ones(3), "triton": lambda: torch.ones(3)}
    assert fastest._runs("triton", "an op", right) and fastest._runs("library", "an op", right)
    assert not fastest._runs("flash", "an op", right), "it is not there"
    assert not fastest._runs("triton", "an op", right | {"triton": fail})
    assert not fastest._runs("triton", "an op", right | {"triton": lambda: torch.zeros(3)})


def predict_and_decode(unet: UNet, vae: VAE) -> None:
    """Pass a guidance pair of the model's own size through it, and a picture, without numbers."""
    side = unet.config.sample_size
    wide = {"text_embeds": unet.config.pooled_width, "time_ids": unet.config.size_ids}
    with torch.device("meta"):
        unet.standard(
            torch.empty(2, 4, side, side),
            torch.empty(1),
            torch.empty(2, 77, unet.config.context_width),
            **{name: torch.empty(2, width) for name, width in wide.items() if width},
        )
        vae.decoder(torch.empty(1, 4, fastest.DECODED, fastest.DECODED))


def calls_of(
    config: Any,
    group: Callable[[UNet, torch.nn.Module], Mapping[Any, Sequence[torch.nn.Module]]],
    *kinds: type[torch.nn.Module],
) -> Iterator[tuple[Any, Any, tuple[Any, ...], torch.Tensor]]:
    """Yield (layer, its shape by `group`, what it was given, what it made) of a forward pass over a
    guidance pair, and a decode: every layer of `kinds` is run, and grouped."""
    unet, vae = empty_module(lambda: UNet(config.unet)), empty_module(lambda: VAE(config.vae))
    assert isinstance(unet, UNet) and isinstance(vae, VAE)
    found = group(unet, vae.decoder)
    by_layer = {id(layer): shape for shape, layers in found.items() for layer in layers}
    seen: dict[int, tuple[Any, Any, tuple[Any, ...], torch.Tensor]] = {}

    def see(layer: Any, args: tuple[Any, ...], out: torch.Tensor) -> None:
        seen[id(layer)] = (layer, by_layer[id(layer)], args, out)

    for model in (unet, vae.decoder):
        for module in model.modules():
            if isinstance(module, kinds):
                module.register_forward_hook(see)
    predict_and_decode(unet, vae)
    assert seen.keys() == by_layer.keys() and seen
    yield from seen.values()


@pytest.mark.parametrize("config", [SD15, SDXL], ids=("sd15", "sdxl"))
def test_every_norm_is_tried_at_the_shape_it_has(config: Any) -> None:
    for norm, shape, (x, *rest), _ in calls_of(config, fastest.group_norms, GroupNorm):
        added = bool(rest) and rest[0] is not None
        assert shape == (*x.shape[:3], norm.num_groups, norm.silu, added)
        assert x.shape[2] == x.shape[3]


@pytest.mark.parametrize("config", [SD15, SDXL], ids=("sd15", "sdxl"))
def test_every_convolution_is_tried_at_the_shape_it_has(config: Any) -> None:
    for _, shape, args, out in calls_of(config, fastest.convolutions, Conv3x3, Upsample):
        assert shape[:4] == (*args[0].shape[:3], out.shape[1])


class Clock:
    """Stands for the GPU's: what a kernel takes is `ms`, by name; `tried` says what was timed."""

    def __init__(self, ms: Mapping[str, float]) -> None:
        self.ms, self.tried = ms, list[set[str]]()

    def __call__(self, calls: Mapping[str, Any]) -> dict[str, float]:
        self.tried.append(set(calls))
        return {name: self.ms.get(name, 9.0) for name in calls}


@pytest.fixture
def a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU pass for a GPU on which Triton's kernels run: as copies of the library's."""
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(dispatch, "able", lambda op, device: list(dispatch.IMPLEMENTATIONS[op][:3]))

    def stand_in(module: Any) -> None:
        real = module.candidates

        def candidates(*args: Any, **options: Any) -> dict[str, Any]:
            with monkeypatch.context() as patch:
                patch.setattr(dispatch, "able", lambda op, device: ["library"])
                library = real(*args, **options)["library"]
            return {"library": library, "triton": lambda: 1.0005 * library()}

        monkeypatch.setattr(module, "candidates", candidates)

    stand_in(conv3x3)
    stand_in(group_norm)
    stand_in(sampler_step)
    fastest.fastest_step.cache_clear()


def loaded(folder: Path) -> tuple[UNet, VAE]:
    backend = Pipeline.from_pretrained(folder)._backend
    assert isinstance(backend, EagerBackend)
    unet, vae = backend.modules["unet"], backend.modules["vae"]
    assert isinstance(unet, UNet) and isinstance(vae, VAE)
    return unet, vae


def test_the_fastest_that_agrees_is_used_and_remembered(
    sd1_folder: Path, a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, vae = loaded(sd1_folder)
    norms = [m for part in (unet, vae.decoder) for m in part.modules() if isinstance(m, GroupNorm)]
    shapes = fastest.group_norms(unet, vae.decoder)
    clock = Clock({"library": 2.0, "triton": 1.0})
    monkeypatch.setattr(dispatch, "time_ms", clock)
    said = use_fastest_("group_norm", shapes, torch.float32, CPU)
    assert {norm.implementation for norm in norms} == {"triton"}
    assert all(line.startswith("group_norm ") for line in said)
    assert all(line.endswith(": triton 1000 us, library 2000 us") for line in said)
    assert {frozenset(names) for names in clock.tried} == {frozenset({"library", "triton"})}
    tried = len(clock.tried)
    assert tried == len(shapes)
    clock.ms = {"library": 0.5}
    assert use_fastest_("group_norm", shapes, torch.float32, CPU) == said
    assert len(clock.tried) == tried, "what is known is not tried again"
    step = fastest.fastest_step(CPU)
    assert str(step) == "sampler_step: library (measured: library 500 us, triton 9000 us)"


def test_convolutions_are_tried_with_what_they_save(
    sd1_folder: Path, a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, vae = loaded(sd1_folder)
    spare_passes_(unet, norms_add=False)
    monkeypatch.setattr(dispatch, "time_ms", Clock({"library": 2.0, "triton": 1.0}))
    shapes = fastest.convolutions(unet, vae.decoder)
    said = use_fastest_("conv3x3", shapes, torch.float32, CPU)
    assert all(line.endswith(": triton 1000 us, library 2000 us") for line in said)
    layers = [m for part in (unet, vae.decoder) for m in part.modules()]
    assert {m.implementation for m in layers if isinstance(m, (Conv3x3, Upsample))} == {"triton"}
    assert {m.phases is None for m in layers if isinstance(m, Upsample)} == {False}
    roles = {line.split(" to ")[1].split(":")[0].split(" ", 1)[1] for line in said}
    assert roles == {"first", "last", "last, bias", "up, bias", "first, bias"}
    monkeypatch.setattr(dispatch, "time_ms", Clock({"library": 0.5}))
    other = use_fastest_("conv3x3", shapes, torch.bfloat16, CPU)
    assert all(": library 500 us" in line for line in other)
    assert {m.implementation for m in layers if isinstance(m, Upsample)} == {"library"}


@pytest.mark.parametrize("config", [SD15, SDXL], ids=("sd15", "sdxl"))
def test_what_an_h200_measured_comes_along(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shape of SD1.5 and SDXL in fp16 is in the table, so that nothing is tried there; but
    those of linear layers, which none has measured yet."""
    keys = [key.split(" of ") for key in read_json(TABLE)["times"]]
    able = {ran.split()[0]: tried.split(", ") for ran, tried in keys}
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTSD_MEASURE", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(dispatch, "able", lambda op, device: able[op])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(dispatch, "try_out", lambda what, _: pytest.fail(f"{what} is tried"))
    monkeypatch.setattr(fastest, "_runs", lambda name, what, candidates: True)
    fastest.fastest_step.cache_clear()
    unet, vae = empty_module(lambda: UNet(config.unet)), empty_module(lambda: VAE(config.vae))
    assert isinstance(unet, UNet) and isinstance(vae, VAE)
    for model in (unet, vae.decoder):
        spare_passes_(model.requires_grad_(False), norms_add=True)
    use = partial(use_fastest_, dtype=torch.float16, device=torch.device("meta"))
    said = [
        str(fastest.fastest_step(CPU)),
        *use("attention", fastest.attentions(unet, vae.decoder)),
        *use("group_norm", fastest.group_norms(unet, vae.decoder)),
        *use("layer_norm", fastest.layer_norms(unet)),
        *use("geglu", fastest.gates(unet)),
        *use("residual", fastest.sums(unet, vae.decoder)),
        *use("conv3x3", fastest.convolutions(unet, vae.decoder)),
    ]
    assert any("up, bias: triton" in line for line in said)
    assert all(" us" in line for line in said)
    fastest.fastest_step.cache_clear()


@pytest.mark.parametrize(
    ("config", "blocks", "transformers"), [(SD15, 16, 16), (SDXL, 70, 11)], ids=("sd15", "sdxl")
)
def test_linear_layers_are_tried_with_what_follows(
    config: Any, blocks: int, transformers: int
) -> None:
    unet = empty_module(lambda: UNet(config.unet))
    assert isinstance(unet, UNet)
    found = fastest.linears(unet)
    counted = {True: 0, False: 0}
    for shape, layers in found.items():
        counted[bool(shape.gate_by)] += len(layers)
    assert counted == {True: blocks, False: 2 * transformers}
    alone = fastest.linears(unet, feed_forward=False)
    assert sum(map(len, alone.values())) == transformers
    said = set(map(str, found))
    assert config is SDXL or said >= {
        "2x4096x320 to 1280, gated",
        "2x4096x1280 to 320, sum",
        "2x64x1280 to 1280, sum",
    }


def test_a_linear_layers_candidates_are_one_function() -> None:
    for shape in (LinearShape(9, 16, 24, gate_by="library"), LinearShape(9, 16, 24)):
        generator = torch.Generator().manual_seed(0)
        calls = shape.candidates(partial(torch.randn, generator=generator))
        generator.manual_seed(0)
        out = 48 if shape.gate_by else 24
        sizes = ((2, 9, 16), (out, 16), (out,), (2, 9, 24))
        x, weight, bias, summed = (torch.randn(size, generator=generator) for size in sizes)
        y = F.linear(x, weight / 4, bias)
        value, gate = y.chunk(2, dim=-1)
        expected = value * F.gelu(gate) if shape.gate_by else summed + y
        assert list(calls) == ["library"]
        torch.testing.assert_close(calls["library"](), expected)


def test_a_caches_times_are_shipped(tmp_path: Path) -> None:
    ran, tried = "geglu 2x4096x640 torch.float16 NVIDIA L4 torch 2.12.0+cu130", "of library, triton"
    caches = [tmp_path / name for name in ("a.json", "b.json")]
    caches[0].write_text(json.dumps({f"{ran} fastsd 0.1.0 0123abcd {tried}": {"library": 0.12345}}))
    seen = f"{ran.replace('L4', 'L5')} fastsd 0.1.0 0123abcd {tried}{measured_.AS_SHIPPED}"
    caches[1].write_text(json.dumps({"of no known kind": {"a": 1.0}, seen: {"library": 1.0}}))
    table = tmp_path / "table.json"
    first = {f"{ran} {tried}": {"commit": "abc", "library": 0.1235}}
    for _ in range(2):
        shipped_main([*map(str, caches), "--commit", "abc", "--table", str(table)])
        assert read_json(table) == {"times": first}
    later = ran.replace("L4", "L6")
    caches[0].write_text(json.dumps({f"{later} fastsd 0.1.0 0123abcd {tried}": {"library": 1.0}}))
    shipped_main([str(caches[0]), "--commit", "def", "--table", str(table)])
    second = {f"{later} {tried}": {"commit": "def", "library": 1.0}}
    assert read_json(table) == {"times": first | second}, "one new shape relabels no other"
    assert all(entry["commit"] for entry in read_json(TABLE)["times"].values())


def test_attention_too(sd1_folder: Path, a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = Pipeline.from_pretrained(sd1_folder)._backend.modules["unet"]  # type: ignore[attr-defined]
    monkeypatch.setattr(dispatch, "time_ms", Clock({"sdpa": 3.0}))
    monkeypatch.setattr(
        attention,
        "candidates",
        lambda q, k, v: {"sdpa": lambda: q @ k[:, :, :1].mT * v[:, :, :1], "flash": lambda: q * 0},
    )
    said = use_fastest_("attention", fastest.attentions(unet), torch.float32, CPU)
    assert all(": sdpa 3000 us" in line for line in said)
    layers = [m for m in unet.modules() if isinstance(m, Attention)]
    assert {layer.implementation for layer in layers} == {"sdpa"}, "a wrong kernel is not used"
