"""The UNet against diffusers' UNet2DConditionModel: every family in small, then at true size."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from torch import Tensor

from fastsd.config import SD15, SDXL, UNetConfig
from fastsd.errors import UsageError
from fastsd.models.layers import Attention, GroupNorm, Resnet, use_kernel
from fastsd.models.unet import UNet
from tests.distances import relative_l2
from tests.models import oracles
from tests.models.oracles import BAR

SD1 = UNetConfig(
    widths=(32, 64, 96), depths=(1, 1, 0), heads=(4, 4, 4), context_width=24, norm_groups=8
)
XL = replace(
    SD1,
    depths=(0, 2, 3),
    mid_depth=3,
    heads=(2, 4, 6),
    linear_projection=True,
    pooled_width=20,
    size_ids=6,
    size_width=8,
)
FAMILIES = {
    "sd1": SD1,
    "sd2": replace(SD1, heads=(2, 4, 6), linear_projection=True, upcast_attention=True),
    "sdxl": XL,
    "refiner": replace(
        XL,
        widths=(32, 64, 96, 96),
        depths=(0, 2, 2, 0),
        mid_depth=2,
        heads=(2, 4, 6, 6),
        size_ids=5,
    ),
    "inpaint": replace(SD1, in_channels=9),
    "lcm": replace(SD1, guidance_width=16),
    "lcm-sdxl": replace(XL, guidance_width=16),
    "one resnet a level": replace(SD1, layers_per_level=1),
    "no attention in the middle": replace(SD1, mid_depth=0),
    "old sinusoid": replace(SD1, flip_sin_to_cos=False, frequency_shift=1.0),
}
SIZES = ((16, 16), (9, 17), (1, 5))  # even; odd on every level; a level of one row


@cache
def pair(family: str) -> tuple[UNet, Any]:
    """Return our UNet and diffusers', sharing their weights."""
    torch.manual_seed(0)
    oracle = oracles.unet(FAMILIES[family])
    ours = UNet(FAMILIES[family]).eval().requires_grad_(False)
    ours.load_state_dict(oracle.state_dict(), strict=True, assign=True)
    return ours, oracle


def inputs(config: UNetConfig, size: tuple[int, int], batch: int = 2) -> dict[str, Tensor]:
    """Draw what `standard` takes beside the timestep."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    drawn = dict(
        sample=draw(batch, config.in_channels, *size),
        encoder_hidden_states=draw(batch, 7, config.context_width),
    )
    if config.pooled_width:
        drawn["text_embeds"] = draw(batch, config.pooled_width)
        drawn["time_ids"] = 500 * draw(batch, config.size_ids).abs()
    if config.guidance_width:
        drawn["timestep_cond"] = draw(batch, config.guidance_width)
    return drawn


def truth(oracle: Any, timestep: Any, drawn: dict[str, Tensor]) -> Tensor:
    """Call diffusers with the same."""
    out: Tensor = oracle(
        drawn["sample"],
        timestep,
        drawn["encoder_hidden_states"],
        timestep_cond=drawn.get("timestep_cond"),
        added_cond_kwargs={k: drawn[k] for k in ("text_embeds", "time_ids") if k in drawn},
    ).sample
    return out


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_standard_equals_diffusers(family: str, size: tuple[int, int]) -> None:
    ours, oracle = pair(family)
    drawn = inputs(ours.config, size, batch=3)
    a_timestep_each = torch.tensor([999, 500, 3])
    expected = truth(oracle, a_timestep_each, drawn)
    assert relative_l2(ours.standard(timestep=a_timestep_each, **drawn), expected) <= BAR


@pytest.mark.parametrize(
    "timestep", (761, 123.75, torch.tensor(17), torch.tensor([250.5]), torch.tensor(3.0)), ids=str
)
@pytest.mark.parametrize("family", ("sd1", "lcm-sdxl"))
def test_every_form_of_timestep_equals_diffusers(family: str, timestep: Tensor | float) -> None:
    ours, oracle = pair(family)
    drawn = inputs(ours.config, (8, 8))
    expected = truth(oracle, timestep, drawn)
    assert relative_l2(ours.standard(timestep=timestep, **drawn), expected) <= BAR


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_path_equals_standard(family: str) -> None:
    ours, _ = pair(family)
    drawn = inputs(ours.config, (9, 17))
    guidance, timesteps = None, torch.tensor([999.0, 413.25, 1.0])
    if ours.config.guidance_width:
        guidance = torch.tensor([6.5, 0.5])
        drawn["timestep_cond"] = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, guidance, ours.config.guidance_width
        )
    rows = ours.time_rows(timesteps, drawn.get("text_embeds"), drawn.get("time_ids"), guidance)
    kv = ours.context(drawn["encoder_hidden_states"])
    for row, timestep in zip(rows, timesteps, strict=True):
        assert row.shape[0] == (
            1 if ours.config.pooled_width + ours.config.guidance_width == 0 else 2
        )
        fast = ours(drawn["sample"], row, kv)
        assert relative_l2(fast, ours.standard(timestep=timestep, **drawn)) <= 1e-6


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("family", ("sd1", "sdxl", "lcm", "no attention in the middle"))
def test_guidance_asks_twice_of_one_x(family: str, channels_last: bool) -> None:
    """x of batch B against kv of 2 B equals x repeated, and conv_in sees each picture once."""
    ours, _ = pair(family)
    drawn = inputs(ours.config, (9, 17), batch=6)
    x = drawn["sample"][:3]
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    guidance = torch.rand(6) if ours.config.guidance_width else None
    row = ours.time_rows(
        torch.tensor([413.0]), drawn.get("text_embeds"), drawn.get("time_ids"), guidance
    )[0]
    kv = ours.context(drawn["encoder_hidden_states"])
    twice = ours(torch.cat([x, x]), row, kv)
    seen: list[int] = []
    hook = ours.conv_in.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    once = ours(x, row, kv)
    hook.remove()
    assert relative_l2(once, twice) <= 1e-6
    assert not torch.allclose(once[:3], once[3:], rtol=0.01), "the two rows must differ"
    assert seen == [3 if row.shape[0] == 1 else 6]


@pytest.mark.parametrize("family", ("sd1", "sdxl"))
def test_channels_last_equals_contiguous(family: str) -> None:
    ours, oracle = pair(family)
    drawn = inputs(ours.config, (9, 17))
    last = UNet(ours.config).requires_grad_(False)
    last.load_state_dict(oracle.state_dict())
    last = last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    expected = ours.standard(timestep=5, **drawn)
    drawn["sample"] = drawn["sample"].contiguous(memory_format=torch.channels_last)
    out = last.standard(timestep=5, **drawn)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert relative_l2(out, expected) <= BAR


@pytest.mark.parametrize("family", ("sd1", "lcm-sdxl"))
def test_gradients_equal_those_of_diffusers(family: str) -> None:
    torch.manual_seed(2)
    oracle = oracles.unet(FAMILIES[family]).requires_grad_(True)
    ours = UNet(FAMILIES[family])
    ours.load_state_dict(oracle.state_dict())
    drawn = inputs(ours.config, (8, 8))
    drawn["sample"].requires_grad_(True)
    t = torch.tensor([7, 700])
    ours.standard(timestep=t, **drawn).square().mean().backward()
    sample_gradient, drawn["sample"].grad = drawn["sample"].grad, None
    truth(oracle, t, drawn).square().mean().backward()

    assert sample_gradient is not None and drawn["sample"].grad is not None
    assert relative_l2(sample_gradient, drawn["sample"].grad) <= 1e-4
    expected = {name: p.grad for name, p in oracle.named_parameters()}
    largest = max(float(g.norm()) for g in expected.values())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        distance = float((parameter.grad - expected[name]).norm())
        assert distance <= 1e-4 * float(expected[name].norm()) + 1e-6 * largest, name


def test_a_meta_device_module_owns_nothing_but_its_weights() -> None:
    ours, oracle = pair("sdxl")
    with torch.device("meta"):
        loaded = UNet(ours.config)
    assert not list(loaded.buffers())
    loaded.load_state_dict(oracle.state_dict(), strict=True, assign=True)
    drawn = inputs(ours.config, (8, 8))
    assert torch.equal(loaded.standard(timestep=9, **drawn), ours.standard(timestep=9, **drawn))


def test_upcast_attends_in_fp32_whatever_the_weights() -> None:
    ours, oracle = pair("sd2")
    half = UNet(ours.config).requires_grad_(False)
    half.load_state_dict(oracle.state_dict())
    half = half.to(torch.bfloat16)
    drawn = inputs(ours.config, (8, 8))
    expected = ours.standard(timestep=9, **drawn)
    drawn = {name: tensor.to(torch.bfloat16) for name, tensor in drawn.items()}
    assert all(
        t.dtype == torch.float32 for kv in half.context(drawn["encoder_hidden_states"]) for t in kv
    )
    out = half.standard(timestep=9, **drawn)
    assert out.dtype == torch.bfloat16
    assert relative_l2(out.float(), expected) <= 0.03


def test_it_exports_whole_and_for_any_size() -> None:
    ours = UNet(replace(SD1, widths=(32, 64), depths=(1, 0), heads=(4, 4), layers_per_level=1))
    ours.requires_grad_(False)
    drawn = inputs(ours.config, (16, 16))
    auto = torch.export.Dim.AUTO

    def arguments(drawn: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        kv = ours.context(drawn["encoder_hidden_states"])
        return drawn["sample"], ours.time_rows(torch.tensor([3.0]))[0], kv

    x, row, kv = arguments(drawn)
    program = torch.export.export(
        ours,
        (x, row, kv),
        dynamic_shapes=({0: auto, 2: auto, 3: auto}, None, [({0: auto}, {0: auto})] * len(kv)),
    )
    other = arguments(inputs(ours.config, (8, 24), batch=3))
    assert relative_l2(program.module()(*other), ours(*other)) <= 1e-6


@pytest.mark.parametrize(
    ("family", "extra", "message"),
    [
        ("sdxl", {}, "needs pooled text and size ids"),
        ("sdxl", {"pooled": torch.zeros(1, 20)}, "not both were given"),
        ("sd1", {"pooled": torch.zeros(1, 20), "size_ids": torch.zeros(1, 6)}, "takes none"),
        ("sd1", {"pooled": torch.zeros(1, 20)}, "takes none"),
        ("sd1", {"guidance": torch.zeros(1)}, "takes none"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(
    family: str, extra: dict[str, Tensor], message: str
) -> None:
    ours, _ = pair(family)
    with pytest.raises(UsageError, match=message):
        ours.time_rows(torch.tensor([1.0]), **extra)


def test_an_unknown_attention_is_refused_when_asked_for() -> None:
    ours, _ = pair("sd1")
    with pytest.raises(UsageError, match="'flash9' is unknown; it is one of sdpa, .*xformers"):
        use_kernel(ours, "attention", "flash9")
    with pytest.raises(UsageError, match="op 'atention' is unknown"):
        use_kernel(ours, "atention", "sdpa")
    with pytest.raises(UsageError, match="no layer leaves the choice of sampler_step"):
        use_kernel(ours, "sampler_step", "triton")


def test_a_kernel_is_used_where_its_op_is() -> None:
    ours = UNet(SD1)
    use_kernel(ours, "attention", "cudnn")
    use_kernel(ours, "group_norm", "triton")
    attentions = [m for m in ours.modules() if isinstance(m, Attention)]
    norms = [m for m in ours.modules() if isinstance(m, GroupNorm)]
    resnets = [m for m in ours.modules() if isinstance(m, Resnet)]
    assert attentions and {m.implementation for m in attentions} == {"cudnn"}
    assert sum(norm.silu for norm in norms) == 2 * len(resnets) + 1
    assert {m.implementation for m in norms} == {"triton"}
    assert {m.implementation for m in UNet(SD1).modules() if isinstance(m, Attention)} == {"sdpa"}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (SD15.unet, dict(cross_attention_dim=768)),
        (
            SDXL.unet,
            dict(
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(320, 640, 1280),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
        ),
    ],
    ids=("sd15", "sdxl"),
)
def test_true_size_names_and_shapes(config: UNetConfig, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        ours, oracle = UNet(config), UNet2DConditionModel(**options)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in oracle.state_dict().items()
    }


@pytest.mark.slow
def test_true_size_sd15() -> None:
    torch.manual_seed(0)
    oracle = oracles.unet(SD15.unet)
    with torch.device("meta"):
        ours = UNet(SD15.unet)
    ours.load_state_dict(oracle.state_dict(), strict=True, assign=True)
    drawn = dict(sample=torch.randn(2, 4, 64, 64), encoder_hidden_states=torch.randn(2, 77, 768))
    with torch.no_grad():
        error = relative_l2(ours.standard(timestep=501, **drawn), truth(oracle, 501, drawn))
    assert error <= BAR


@pytest.mark.parametrize("family", ["sd1", "sdxl", "inpaint", "lcm", "one resnet a level"])
def test_the_last_resnet_alone_goes_on_from_its_own_deep_features(family: str) -> None:
    """From the same step it is that step, to the bit, guided or not; a later row changes it."""
    ours, _ = pair(family)
    conditions = inputs(FAMILIES[family], (9, 17))
    x = conditions.pop("sample")[:1]
    kv = ours.context(conditions.pop("encoder_hidden_states"))
    guidance = None if "timestep_cond" not in conditions else torch.tensor([6.5, 6.5])
    rows = ours.time_rows(
        torch.tensor([500.0, 480.0]),
        conditions.get("text_embeds"),
        conditions.get("time_ids"),
        guidance,
    )
    expected = ours(x, rows[0], kv)
    whole, deep = ours.forward_deep(x, rows[0], kv)
    assert torch.equal(whole, expected) and len(whole) == 2
    assert torch.equal(ours.forward_shallow(x, rows[0], kv, deep), expected)
    later = ours.forward_shallow(x, rows[1], kv, deep)
    assert not torch.equal(later, expected)
    assert relative_l2(later, ours(x, rows[1], kv)) < 0.1
    assert relative_l2(ours.forward_shallow(x + 1, rows[0], kv, deep), expected) > 1e-3
