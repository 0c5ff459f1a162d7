"""int8 and fp8 against the formulas and torch's own rounding, and on small models end to end."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.backends.for_gpu import JoinedUNet
from fastsd.config import UNetConfig
from fastsd.errors import UsageError
from fastsd.models.layers import Attention
from fastsd.models.unet import UNet
from fastsd.quant.apply import layers, products, quantised, swapped
from fastsd.quant.calibrate import (
    INT8,
    METHODS,
    Chosen,
    Form,
    Recorder,
    Values,
    calibrate,
    fp8,
    relative_error,
    sensitivity,
    spec_of,
)
from fastsd.quant.linear import (
    Bf16Layer,
    Fp8Linear,
    Int8Conv2d,
    Int8Linear,
    int8_layer,
    powers,
    quantise_weight,
)
from fastsd.quant.spec import (
    FORMAT,
    ROLES,
    ROUNDED_ROLES,
    QuantSpec,
    Rounding,
    chosen_to_round,
    role,
    shares_input,
)

UNET = UNetConfig(
    widths=(32, 64),
    depths=(1, 0),
    heads=(2, 2),
    layers_per_level=1,
    context_width=16,
    norm_groups=8,
)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def small_unet() -> UNet:
    torch.manual_seed(0)
    return UNet(UNET).eval().requires_grad_(False)


def a_call(unet: UNet, seed: int) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    kv = unet.context(torch.randn(2, 5, 16, generator=generator))
    row = unet.time_rows(torch.tensor([100.0 * (seed + 1)]))[0]
    return torch.randn(2, 4, 8, 8, generator=generator), row, kv


def recorded(unet: UNet, form: Form = INT8) -> Recorder:
    recorder = Recorder("unet", unet, form)
    with torch.no_grad(), recorder.watching():
        for seed in range(3):
            unet(*a_call(unet, seed))
    return recorder


@pytest.mark.parametrize("family", ("sd1", "sd2"))
def test_every_layer_has_one_role(family: str) -> None:
    config = UNetConfig(
        widths=(32, 64), depths=(1, 1), heads=(2, 2), norm_groups=8, context_width=16,
        linear_projection=family == "sd2",
    )  # fmt: skip
    with torch.device("meta"):
        unet = UNet(config)
    roles = {name: role(f"unet.{name}") for name in layers(unet)}
    assert None not in roles.values()
    assert set(ROLES) - set(roles.values()) == {"pixel attention"}, "all roles but the VAE's"
    assert roles["conv_in"] == "edge" and roles["mid_block.resnets.0.conv1"] == "resnet"
    assert roles["mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"] == "attention out"
    assert ROUNDED_ROLES < set(ROLES)
    names = [f"unet.{name}" for name in roles]
    left = {n for n in names if role(n) in ROUNDED_ROLES} - set(chosen_to_round(names))
    assert left == {f"unet.up_blocks.1.resnets.{i}.conv1" for i in range(3)}, "the last level's"


@pytest.mark.parametrize(("low", "high"), [(-0.28, 6.0), (0.0, 1.0), (-3.0, 0.0), (-5.0, 5.0)])
def test_a_roundingholds_zero_exactly_and_rounds_within_half_a_step(
    low: float, high: float
) -> None:
    scale, zero = Rounding(low, high).affine()
    x = torch.linspace(low, high, 1001)
    q = (x / scale).round().add(zero).clamp(0, 255)
    assert ((q - zero) * scale - x).abs().max() <= scale * 1.01  # the zero point is rounded too
    assert 0 <= zero <= 255 and isinstance(zero, int)
    assert Rounding(low, high).symmetric() * 127 == pytest.approx(max(-low, high))


@pytest.mark.parametrize("bad", [(1.0, 2.0), (0.0, 0.0), (float("nan"), 1.0), (-1.0, float("inf"))])
def test_a_roundingthat_is_none_is_refused(bad: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="range must"):
        Rounding(*bad)


def test_weights_round_to_127_steps_a_channel() -> None:
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[3] *= 1000
    weight[5] = 0
    q, scale = quantise_weight(weight)
    assert q.dtype == torch.int8 and int(q.min()) >= -127
    error = (q * scale.view(-1, 1, 1, 1) - weight).abs().flatten(1).amax(1)
    assert (error <= scale * 0.5001).all()


def test_an_int8_linear_is_the_integer_product() -> None:
    torch.manual_seed(0)
    layer, rounding = nn.Linear(24, 10), Rounding(-2.0, 3.0)
    x = torch.randn(7, 24) * 2  # beyond the range too
    scale, zero = rounding.affine()
    q = (x / scale).round().add(zero).clamp(0, 255).to(torch.int64) - zero
    w, w_scale = quantise_weight(layer.weight)
    expected = (q @ w.to(torch.int64).T).double() * scale * w_scale.double() + layer.bias.double()
    got = Int8Linear(layer, rounding)(x)
    assert relative_error([got], [expected.float()]) < 1e-6


def test_an_int8_convolution_pads_with_exact_zeros() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 5, 3, stride=2, padding=1)
    rounding = Rounding(-0.28, 2.0)
    x = torch.rand(2, 6, 9, 7)
    scale, zero = rounding.affine()
    rounded = ((x / scale).round().add(zero).clamp(0, 255) - zero) * scale
    w, w_scale = quantise_weight(layer.weight)
    full = w * w_scale.view(-1, 1, 1, 1)
    expected = F.conv2d(rounded, full, layer.bias, stride=2, padding=1)
    assert relative_error([Int8Conv2d(layer, rounding)(x)], [expected]) < 1e-6


def test_exponents_move_a_spread_into_the_weights_exactly() -> None:
    """With channels 2^e apart, rounding after division is that of the even input."""
    torch.manual_seed(0)
    exponents = (0, -3, -6, -1)
    grow = torch.tensor([2.0**e for e in exponents])
    even = torch.rand(50, 4) * 4 - 2
    layer = nn.Linear(4, 9)
    same = nn.Linear(4, 9)
    same.weight = nn.Parameter(layer.weight * grow)
    same.bias = layer.bias
    spread = Int8Linear(layer, Rounding(-2, 2, exponents))(even * grow)
    assert torch.equal(spread, Int8Linear(same, Rounding(-2, 2))(even))
    conv = nn.Conv2d(4, 3, 1)
    x = torch.randn(2, 4, 5, 5)
    error = relative_error([Int8Conv2d(conv, Rounding(-5, 5, (0, 0, 0, 0)))(x)], [conv(x)])
    assert error < 0.02
    with pytest.raises(UsageError, match="4 exponents for a layer of 6"):
        Int8Linear(nn.Linear(6, 2), Rounding(-2, 2, exponents))


def test_a_bf16_layer_is_near_its_own_and_takes_and_gives_fp32() -> None:
    torch.manual_seed(0)
    for layer, x in (
        (nn.Conv2d(24, 10, 3, stride=2, padding=1), torch.randn(2, 24, 9, 7)),
        (nn.Linear(24, 5, bias=False), torch.randn(3, 24)),
    ):
        weight = layer.weight.clone()
        out = Bf16Layer(layer)(x)
        assert out.dtype == torch.float32 and torch.equal(layer.weight, weight)
        assert 1e-4 < relative_error([out], [layer(x)]) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_an_fp8_linear_is_the_product_of_what_is_rounded(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 48, bias=bias).to(dtype)
    x = torch.randn(2, 5, 32, dtype=dtype)
    x[0, 0, 0], x[0, 0, 1] = 11.0, 1000.0  # more than was watched, and more than there is room for
    exponents = tuple(i % 4 - 3 for i in range(32))
    for rounding in (Rounding(-3.0, 2.0), Rounding(-3.0, 2.0, exponents)):
        grow = powers(rounding.exponents) if rounding.exponents else torch.ones(32)
        scale = rounding.fp8()
        assert 448 * scale == pytest.approx(4 * 3.0)
        q = (x.float() / grow / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        weight = layer.weight.float() * grow
        w_scale = weight.abs().max() / 448
        w = (weight / w_scale).to(torch.float8_e4m3fn).float() * w_scale
        expected = F.linear(q, w, layer.bias.float() if bias else None)
        got = Fp8Linear(layer.weight, layer.bias, rounding)(x)
        assert got.dtype == dtype and got.shape == (2, 5, 48)
        tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
        assert relative_error([got.float()], [expected]) < tolerance
        exact = copy.deepcopy(layer).float()(x.float().clamp(-12, 12))
        assert rounding.exponents or 0.01 < relative_error([got.float()], [exact]) < 0.06


def test_calibrating_fp8_cuts_and_evens_nothing() -> None:
    unet = small_unet()
    form = fp8(
        lambda layer, rounding: Fp8Linear(layer.weight, layer.bias, rounding),
        lambda name, layer: isinstance(layer, nn.Linear),
    )
    recorder = recorded(unet, form)
    found = calibrate(recorder, calls=2)
    linear = {name for name in recorder.values if isinstance(layers(unet)[name], nn.Linear)}
    assert set(found) == linear == set(recorder.values) and len(linear) > 10
    for name, layer in found.items():
        assert layer.rounding == recorder.values[name].rounding("minmax")
        assert 0.01 < layer.error < 0.06, "three bits"
    table = sensitivity(recorder, {name: layer.rounding for name, layer in found.items()})
    assert all(0 < error < 0.05 for error in table.values())


def test_what_calls_a_model_in_its_place_is_watched_alike() -> None:
    """As on GPUs, where keys and values are one tensor."""
    plain = recorded(small_unet())
    unet = small_unet()
    joined = JoinedUNet(unet, torch.device("cpu"))
    for layer in unet.modules():
        if isinstance(layer, Attention):
            layer.to_qkv = None
    recorder = Recorder("unet", unet, called=joined)
    with recorder.watching():
        for seed in range(3):
            x, row, kv = a_call(unet, seed)
            together = torch.cat([t.transpose(1, 2).flatten(2) for pair in kv for t in pair], -1)
            joined(x, row, together)
    assert recorder.values.keys() == plain.values.keys() and len(recorder.calls) == 3
    for name, values in recorder.values.items():
        assert values.rounding("minmax") == plain.values[name].rounding("minmax")
    assert relative_error(recorder.outputs(), plain.outputs()) < 1e-6


def test_a_grouped_convolution_is_refused() -> None:
    with pytest.raises(UsageError, match="grouped"):
        int8_layer(nn.Conv2d(4, 4, 3, groups=2), Rounding(-1, 1))


def test_a_quantised_copy_leaves_the_module_alone_and_shares_the_rest() -> None:
    unet = small_unet()
    before = copy.deepcopy(unet.state_dict())
    ranges = {"conv_out": Rounding(-4, 4), "mid_block.resnets.0.conv1": Rounding(-4, 4)}
    clone = quantised(unet, ranges)
    assert isinstance(clone.conv_out, Int8Conv2d) and isinstance(unet.conv_out, nn.Conv2d)
    assert clone.conv_in.weight is unet.conv_in.weight
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    call = a_call(unet, 0)
    expected = unet(*call)
    error = relative_error([clone(*call)], [expected])
    assert 1e-5 < error < 0.1
    with swapped(unet, ranges):
        assert torch.equal(unet(*call), clone(*call))
    assert torch.equal(unet(*call), expected)
    with pytest.raises(UsageError, match="such as 'nowhere'"):
        quantised(unet, {"nowhere": Rounding(-1, 1)})


def test_products_are_counted() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    counts = products(module, lambda: module(torch.zeros(2, 3, 4, 4)))
    assert counts == {"0": 2 * 8 * 16 * 27, "2": 2 * 5 * 128}


def test_calibration_takes_for_each_layer_the_least_error_at_its_output() -> None:
    unet = small_unet()
    recorder = recorded(unet)
    found = calibrate(recorder, calls=2)
    assert all(1e-4 < layer.error < 0.05 for layer in found.values())
    chosen = {name: layer.rounding for name, layer in found.items()}
    assert set(chosen) == set(recorder.values)
    assert {role(f"unet.{name}") for name in chosen} <= ROUNDED_ROLES
    expected = recorder.outputs()
    with swapped(unet, chosen):
        measured = relative_error(recorder.outputs(), expected)
    plain = {name: values.rounding("minmax") for name, values in recorder.values.items()}
    with swapped(unet, plain):
        assert measured < relative_error(recorder.outputs(), expected)
    assert 1e-4 < measured < 0.03
    alike = [chosen[name] for name in chosen if shares_input(name).endswith("0.attn1")]
    assert len(set(alike)) * 3 == len(alike), "q, k and v of one attention round one tensor"


def test_what_is_kept_of_an_input_is_little_and_of_all_calls() -> None:
    values, generator = Values(), torch.Generator().manual_seed(0)
    for i in range(400):
        values.add(torch.full((2, 50, 3), float(i)), generator)
    kept = torch.cat(values._rows)
    assert kept.shape == (16 * 64, 3)
    calls = kept[:, 0].unique()
    assert len(calls) == 16 and 100 < float(calls.mean()) < 300
    assert values.rounding("minmax").high == 399
    recorder = recorded(small_unet())
    attention = [n for n in recorder.values if re.search(r"attn1\.to_[qkv]$", n)][:3]
    assert len({id(recorder.values[name]) for name in attention}) == 1, attention


def test_what_was_seen_bounds_the_ranges() -> None:
    recorder = recorded(small_unet())
    seen = recorder.values["mid_block.resnets.0.conv1"]
    wide = seen.rounding("minmax")
    inputs: list[torch.Tensor] = []
    layer = recorder.module.get_submodule("mid_block.resnets.0.conv1")
    with layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        recorder.outputs()
    assert len(inputs) > 1
    assert wide.low == float(torch.stack(inputs).min())
    assert wide.high == float(torch.stack(inputs).max())
    for method in METHODS:
        cut = seen.rounding(method)
        assert wide.low <= cut.low and cut.high <= wide.high


def test_an_outlier_is_cut_where_that_lowers_the_error() -> None:
    module, layer = nn.Sequential(), nn.Linear(64, 64)
    module.add_module("conv1", layer)
    recorder = Recorder("unet", module)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    with torch.no_grad(), recorder.watching():
        module(x)
        x[0, 0] = 200.0
        module(x[:1].expand(64, 64))  # every position sampled holds it
    values = recorder.values["conv1"]
    assert values.rounding("minmax").high == 200.0
    assert values.rounding("percentile").high > 190
    exponents = values.exponents([layer.weight], 0.5)
    assert exponents[0] == 0 and max(exponents[1:]) <= -2, "the others are divided by less"
    assert values.rounding("minmax", exponents).high == 200.0


def test_sensitivity_finds_the_layer_that_costs_most() -> None:
    unet = small_unet()
    recorder = recorded(unet)
    ranges = {name: Rounding(-8.0, 8.0) for name in recorder.values}
    worst = "up_blocks.1.resnets.1.conv2"
    ranges[worst] = Rounding(-0.05, 0.05)  # nearly everything is cut off
    table = sensitivity(recorder, ranges)
    assert set(table) == set(ranges)
    assert max(table, key=lambda name: table[name]) == worst


def test_calibrating_on_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="did not run"):
        calibrate(Recorder("unet", small_unet()))


def test_a_spec_survives_json_and_keeps_layers_back() -> None:
    unet = {"a": Rounding(-1.0, 2.0, (0, -2)), "b": Rounding(0.0, 1.0)}
    spec = spec_of(
        {
            "unet": {name: Chosen(rounding, 0.01) for name, rounding in unet.items()},
            "vae": {"c": Chosen(Rounding(-1.0, 0.0), 0.01)},
        }
    )
    kept = spec.keep({"unet.b": "costs 0.1"})
    again = QuantSpec.from_json(json.loads(json.dumps(kept.to_json())))
    assert again == kept
    assert again.only("unet") == {"a": unet["a"]}
    with pytest.raises(UsageError, match="not in this spec"):
        kept.keep({"unet.b": "again"})
    with pytest.raises(UsageError, match="both"):
        QuantSpec({"a": Rounding(-1, 1)}, {"a": "why"})


@pytest.mark.parametrize(
    "data", [{}, {"format": FORMAT}, {"format": FORMAT, "layers": {"a": 1}, "kept": {}}]
)
def test_a_broken_spec_is_refused(data: dict) -> None:
    with pytest.raises(UsageError, match="no quantisation spec"):
        QuantSpec.from_json(data)


def test_a_spec_of_another_format_is_refused() -> None:
    with pytest.raises(UsageError, match=f"reads format {FORMAT}"):
        QuantSpec.from_json({"format": 1})
