"""Weights kept in int8: the formula, the layers that have them, a model's pictures, its LoRAs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsd.backends import for_gpu
from fastsd.backends.eager import EagerBackend
from fastsd.backends.for_gpu import Joined, JoinedUNet, spare_passes_
from fastsd.checkpoints import open_checkpoint
from fastsd.errors import UsageError
from fastsd.models.layers import Conv1x1
from fastsd.models.unet import UNet
from fastsd.pipeline import Pipeline
from fastsd.quality import psnr
from fastsd.quant.weights import Int8Weight, keep_in_int8_
from tests.distances import relative_l2
from tests.models.test_unet import FAMILIES

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A layer, an input, and the dimensions of W: every kind that a UNet has.
LAYERS = {
    "linear": (lambda: nn.Linear(48, 32), (3, 5, 48)),
    "without-bias": (lambda: nn.Linear(48, 32, bias=False), (5, 48)),
    "conv": (lambda: nn.Conv2d(16, 32, 3, padding=1), (2, 16, 9, 7)),
    "strided": (lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1), (2, 16, 9, 7)),
    "pixels": (lambda: Conv1x1(16, 32), (2, 16, 9, 7)),
}


def kept(layer: nn.Module, device: torch.device = CPU) -> nn.Module:
    """The layer with its weights in int8, as part of a model."""
    model = nn.ModuleDict({"layer": layer})
    keep_in_int8_(model, device)
    return model["layer"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(320, 768), (640, 320, 3, 3), (8, 4, 1, 1)])
def test_each_weight_is_within_half_a_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """|W - q s| <= s / 2, s the largest of an output channel over 127, then rounded to dtype."""
    torch.manual_seed(0)
    spread = torch.logspace(-6, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    weight = (torch.randn(shape) * spread).to(dtype)
    own = Int8Weight.of(weight)
    assert own.q.dtype == torch.int8 and own.shape == weight.shape and own.ndim == weight.ndim
    widened = own()
    assert widened.dtype == dtype
    step = weight.float().flatten(1).abs().amax(1) / 127
    rounding = torch.finfo(dtype).eps * weight.float().abs() + torch.finfo(dtype).smallest_normal
    error = (widened.float() - weight.float()).abs()
    assert bool((error <= 0.5001 * step.view_as(own.scale) + rounding).all())
    exact = own.q.double() * own.scale.double()
    assert bool(
        (
            (widened.double() - exact).abs()
            <= torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
        ).all()
    ), "rounded once"


def test_zero_weights_stay_zero() -> None:
    weight = torch.randn(4, 8)
    weight[2] = 0
    assert bool((Int8Weight.of(weight)()[2] == 0).all())


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("as_product", [False, True])
@torch.no_grad()
def test_a_layer_computes_with_the_widened_weights(name: str, as_product: bool) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    if isinstance(layer, Conv1x1):
        layer.as_product = as_product
    if isinstance(layer, nn.Conv2d):
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(shape)
    exact = layer(x)
    twin: Any = copy.deepcopy(layer)
    ours = kept(layer)
    weight = ours.weight
    assert isinstance(weight, Int8Weight)
    if isinstance(layer, nn.Conv2d):
        assert weight.q.is_contiguous(memory_format=torch.channels_last)
        assert weight().is_contiguous(memory_format=torch.channels_last)
    twin.weight.copy_(weight())
    torch.testing.assert_close(ours(x), twin(x))
    assert 1e-4 < relative_l2(ours(x), exact) < 0.01


def test_edges_norms_and_biases_keep_their_precision() -> None:
    unet = UNet(FAMILIES["sd1"])
    before = {name: weight.clone() for name, weight in unet.named_parameters()}
    keep_in_int8_(unet, CPU)
    left = dict(unet.named_parameters())
    assert {"conv_in.weight", "conv_out.weight", "conv_norm_out.weight"} <= left.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in left.items())
    inside = {n: m for n, m in unet.named_modules() if isinstance(m, Int8Weight)}
    assert left.keys() | inside.keys() == before.keys() and not left.keys() & inside.keys()
    assert {before[name].ndim for name in inside} == {2, 4}
    assert {n for n, w in left.items() if w.ndim > 1} == {"conv_in.weight", "conv_out.weight"}


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_large_products_are_widened_in_turns(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.ModuleList(nn.Linear(16, width, bias=bias) for width in (24, 8, 40))
    keep_in_int8_(layers, CPU)
    x, joined = torch.randn(3, 16), Joined([*layers], CPU)
    widened: list[torch.Size] = []

    def forward(self: Int8Weight) -> Tensor:
        widened.append(self.shape)
        return own(self)

    own = Int8Weight.forward
    monkeypatch.setattr(Int8Weight, "forward", forward)
    expected = joined(x)
    assert widened == [(72, 16)], "one product, where it is small"
    monkeypatch.setattr(for_gpu, "AT_ONCE", 16 * 20)
    torch.testing.assert_close(joined(x), expected)
    assert widened[1:] == [(20, 16)] * 3 + [(12, 16)]


@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_a_gpus_model_computes_the_same_from_weights_in_int8(family: str) -> None:
    """Joined products and spared passes take them as they are, and nothing is kept twice."""
    torch.manual_seed(0)
    unet = UNet(FAMILIES[family])
    keep_in_int8_(unet, CPU)
    config = unet.config
    text, x = torch.randn(2, 7, config.context_width), torch.randn(2, config.in_channels, 16, 8)
    told: list[Tensor | None] = [None, None, None]
    if config.pooled_width:
        told[:2] = torch.randn(2, config.pooled_width), 64 * torch.rand(2, config.size_ids)
    if config.guidance_width:
        told[2] = torch.rand(2)
    times = torch.tensor([900.0, 3.5])
    expected = unet(x, unet.time_rows(times, *told)[1], unet.context(text))

    changed = copy.deepcopy(unet).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = held(changed)
    joined = JoinedUNet(changed, CPU)
    spare_passes_(changed, norms_add=False)
    row, kv = joined.time_rows(times, *told)[1], joined.context(text)
    assert relative_l2(joined(x, row, kv), expected) < 1e-5
    assert held(joined) == size
    width = changed.cross_attentions()[0].to_k.out_features
    for layer in changed.cross_attentions():  # as a LoRA changes them: in place
        layer.to_k.weight.copy_(torch.mul(layer.to_k.weight, 2))
    doubled = joined.context(text)
    assert relative_l2(doubled[..., :width], 2 * kv[..., :width]) < 1e-5
    assert torch.equal(doubled[..., width : 2 * width], kv[..., width : 2 * width])


def held(model: nn.Module) -> int:
    """How many bytes a model's int8 weights take, each memory once."""
    own = [m.q for m in model.modules() if isinstance(m, Int8Weight)]
    owners = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in own}
    return sum(storage.nbytes() for storage in owners.values())


# --- pictures -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact() -> Pipeline:
    return Pipeline.from_pretrained("builtin", device="cpu")


@pytest.fixture(scope="module")
def small() -> Pipeline:
    return Pipeline.from_pretrained("builtin", device="cpu", weights="int8")


def draw(pipe: Pipeline, prompt: str = "a red apple", **options: Any) -> Any:
    return pipe(prompt, num_inference_steps=8, guidance_scale=7.5, seed=1, **options).images[0]


def test_pictures_are_near_the_exact_ones(exact: Pipeline, small: Pipeline) -> None:
    for prompt in ("a red apple", "a rocket", "a cat face"):
        assert 35 < psnr(draw(small, prompt), draw(exact, prompt)) < 70


def test_the_unet_takes_a_quarter_of_fp32s_memory(exact: Pipeline, small: Pipeline) -> None:
    def size(pipe: Pipeline) -> int:
        assert isinstance(pipe._backend, EagerBackend)
        unet = pipe._backend.modules["unet"]
        return sum(t.numel() * t.element_size() for t in (*unet.parameters(), *unet.buffers()))

    assert size(small) < 0.27 * size(exact)
    assert any("int8" in line for line in small.explain())


def test_a_lora_is_put_on_and_comes_off_to_the_last_bit(exact: Pipeline, small: Pipeline) -> None:
    weights: dict[str, Any] = {**small._backend.weights("unet")}
    assert weights.keys() == exact._backend.weights("unet").keys()
    before = {name: copy.deepcopy(weight) for name, weight in weights.items()}
    where = {n: w.q.data_ptr() for n, w in weights.items() if isinstance(w, Int8Weight)}
    options: dict[str, Any] = {"num_inference_steps": 4, "seed": 1}
    pictures = []
    for pipe in (exact, small):
        pipe.load_lora_weights("builtin-lcm")
        pictures.append(pipe("a red apple", guidance_scale=1.0, **options).images[0])
    changed = [
        n for n, w in weights.items() if isinstance(w, Int8Weight) and not same(w, before[n])
    ]
    assert len(changed) > 20
    assert psnr(*pictures) > 30
    for strength in (1.0, 0.2):
        small.set_adapters("default_0", strength)
        assert 0.9 < lora_kept(small, weights) < 1.1, "steps of int8 must not swallow it"
    for pipe in (exact, small):
        pipe.unload_lora_weights()
    assert all(same(weight, before[name]) for name, weight in weights.items())
    assert where == {n: w.q.data_ptr() for n, w in weights.items() if isinstance(w, Int8Weight)}


def lora_kept(pipe: Pipeline, weights: dict[str, Any]) -> float:
    """Project what a LoRA changed in the weights on what it was to change: 1 if all of it."""
    ((name, strength),) = pipe._adapters.active.items()
    exact = {n: w.float() for n, w in pipe.checkpoint.load("unet").named_parameters()}
    along = size = 0.0
    for (part, target), delta in pipe._adapters.loaded[name].deltas.items():
        if part == "unet" and isinstance(weights[target], Int8Weight):
            asked = delta.scale * strength * (delta.up @ delta.down).double()
            got = (weights[target]() - exact[target]).flatten(1).double()
            along, size = along + float((asked * got).sum()), size + float(asked.square().sum())
    return along / size


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Int8Weight):
        return torch.equal(a.q, b.q) and torch.equal(a.scale, b.scale)
    return torch.equal(a, b)


def test_other_names_and_other_backends_are_refused(sd1_folder: Path) -> None:
    with pytest.raises(UsageError, match="weights='int4' is unknown; pass 'int8'"):
        Pipeline.from_pretrained(sd1_folder, weights="int4")
    with pytest.raises(UsageError, match="eager backend's"):
        Pipeline.from_pretrained(sd1_folder, weights="int8", backend="inductor", device="cpu")
    with pytest.raises(UsageError, match="backend='auto' chooses among what was tuned"):
        Pipeline.from_pretrained(sd1_folder, weights="int8", backend="auto", device="cpu")


def test_another_precision_keeps_them_in_int8(sd1_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(sd1_folder, weights="int8", device="cpu").to(torch.bfloat16)
    weight = pipe._backend.weights("unet")["mid_block.resnets.0.conv1.weight"]
    assert isinstance(weight, Int8Weight) and weight.dtype == torch.bfloat16
    assert open_checkpoint(sd1_folder).parts.keys() == pipe.checkpoint.parts.keys()
