"""Each op of kernels/ at the shapes that Stable Diffusion has: every implementation against the
reference, in turns, with its share of the machine's ceiling.

`fastsd bench ops`. An op is a row of OPS; an implementation that this machine cannot run is a line
that says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastsd.backends import cuda_graph
from fastsd.benchmarks.limits import measure_ceilings
from fastsd.benchmarks.timing import Latency, paired_ratio
from fastsd.checkpoints.weights import PRECISIONS
from fastsd.errors import UsageError
from fastsd.kernels import reference
from fastsd.kernels.attention import attention
from fastsd.kernels.conv3x3 import conv3x3, summed_taps
from fastsd.kernels.dispatch import IMPLEMENTATIONS
from fastsd.kernels.geglu import geglu
from fastsd.kernels.group_norm import group_norm
from fastsd.kernels.layer_norm import layer_norm
from fastsd.kernels.linear import linear
from fastsd.kernels.residual import residual
from fastsd.kernels.sampler_step import columns, sampler_step_

TURNS = 20
TURN_S = 0.005  # calls are repeated until a turn takes this long
GRAPHED = 20  # on a GPU, in one CUDA graph: Python takes longer to launch most than they run


# op -> what computes it, and its formula
COMPUTED: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]] = MappingProxyType(
    {
        "attention": (attention, reference.attention),
        "conv3x3": (conv3x3, reference.conv3x3),
        "geglu": (geglu, reference.geglu),
        "group_norm": (group_norm, reference.group_norm),
        "layer_norm": (layer_norm, reference.layer_norm),
        "linear": (linear, reference.linear),
        "residual": (residual, reference.residual),
        "sampler_step": (sampler_step_, reference.sampler_step_),
    }
)


@dataclass(frozen=True)
class Case:
    """One op at one shape. flop, bytes: what it computes, and must read and write at least.

    implementations: name -> a call without arguments; the first is torch's own, the base of ratios.
    """

    op: str
    shape: str
    reference: Callable[[], Tensor]
    implementations: Mapping[str, Callable[[], Tensor]]
    flop: int
    bytes: int

    @classmethod
    def of(
        cls, op: str, shape: str, run: Callable[[Callable[..., Any]], Tensor], flop: int, bytes: int
    ) -> Case:
        """Make one of `run`, which calls what it is given with the op's inputs."""
        ours, formula = COMPUTED[op]
        implementations = {
            name: partial(run, partial(ours, implementation=name)) for name in IMPLEMENTATIONS[op]
        }
        return cls(op, shape, partial(run, formula), implementations, flop, bytes)


class _Numbers:
    """Draws tensors of the shapes it is given, always the same ones in this order."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator, device=self._device)
        return drawn.to(self._dtype)

    def map(self, *shape: int) -> Tensor:
        """Draw it channels-last."""
        return self(*shape).contiguous(memory_format=torch.channels_last)


def attention_case(
    title: str, batch: int, heads: int, queries: int, keys: int, width: int, dtype: torch.dtype,
    device: str,
) -> Case:  # fmt: skip
    """softmax(q k^T / sqrt(K)) v, of tokens as the models' projections give them."""
    numbers = _Numbers(dtype, device)
    q, k, v = (numbers(batch, n, heads, width).transpose(1, 2) for n in (queries, keys, keys))
    return Case.of(
        "attention",
        f"{title}: {batch}x{heads}x{queries}x{keys}x{width}",
        lambda attend: attend(q, k, v),
        flop=4 * batch * heads * queries * keys * width,
        bytes=(2 * q.numel() + 2 * k.numel()) * q.element_size(),
    )


def group_norm_case(
    title: str, batch: int, channels: int, side: int, dtype: torch.dtype, device: str
) -> Case:
    """silu(group_norm(x + added)) from a channels-last map to one, 32 groups."""
    numbers = _Numbers(dtype, device)
    x = numbers.map(batch, channels, side, side)
    given = (x, numbers(channels), numbers(channels), 32, 1e-5)
    added = numbers(batch, channels)

    def run(normalise: Callable[..., Tensor]) -> Tensor:
        # the library's is not channels-last on a GPU, and a convolution would make it so
        y = normalise(*given, added=added, silu=True)
        return y.contiguous(memory_format=torch.channels_last)

    return Case.of(
        "group_norm",
        f"{title}: {batch}x{channels}x{side}x{side}",
        run,
        flop=10 * x.numel(),
        bytes=2 * x.numel() * x.element_size(),
    )


def conv3x3_case(
    title: str, batch: int, channels: int, out: int, side: int, upsample: bool, dtype: torch.dtype,
    device: str,
) -> Case:  # fmt: skip
    """A resnet's last convolution, channels-last, with its bias and sum; or an up-sampler's."""
    numbers = _Numbers(dtype, device)
    x, weight = numbers.map(batch, channels, side, side), numbers.map(out, channels, 3, 3) / 64
    bias = numbers(out)
    summed = None if upsample else numbers.map(batch, out, side, side)
    phases = summed_taps(weight) if upsample else None

    def run(convolve: Callable[..., Tensor]) -> Tensor:
        return convolve(x, weight, bias, residual=summed, phases=phases, upsample=upsample)

    result = batch * out * side * side * (4 if upsample else 1)
    elements = x.numel() + weight.numel() + result * (1 if upsample else 2)
    return Case.of(
        "conv3x3",
        f"{title}: {batch}x{channels}x{side}x{side} to {out}{' doubled' * upsample}",
        run,
        # 4 taps of 9 are enough where each pixel is there four times
        flop=2 * (4 if upsample else 9) * channels * result,
        bytes=elements * x.element_size(),
    )


def layer_norm_case(title: str, tokens: int, width: int, dtype: torch.dtype, device: str) -> Case:
    """The norm of a residual sum, of a guidance pair's tokens."""
    numbers = _Numbers(dtype, device)
    x, added = numbers(2, tokens, width), numbers(2, tokens, width)
    given = (x, numbers(width), numbers(width), 1e-5)

    def run(normalise: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        return normalise(*given, added=added)[1]

    return Case.of(
        "layer_norm",
        f"{title}: 2x{tokens}x{width}",
        run,
        flop=8 * x.numel(),
        bytes=4 * x.numel() * x.element_size(),
    )


def geglu_case(title: str, tokens: int, width: int, dtype: torch.dtype, device: str) -> Case:
    """The gate of a feed-forward layer, of a guidance pair's tokens."""
    x = _Numbers(dtype, device)(2, tokens, 8 * width)
    return Case.of(
        "geglu",
        f"{title}: 2x{tokens}x{8 * width}",
        lambda gate: gate(x),
        flop=5 * x.numel(),
        bytes=3 * x.numel() * x.element_size() // 2,
    )


def linear_case(
    title: str, tokens: int, width: int, gated: bool, dtype: torch.dtype, device: str
) -> Case:
    """One of a feed-forward layer's: the first with its gate, or the last with its sum."""
    numbers = _Numbers(dtype, device)
    channels, out = (width, 4 * width) if gated else (4 * width, width)
    weights = out * (2 if gated else 1)
    x, weight = numbers(2, tokens, channels), numbers(weights, channels) / channels**0.5
    bias, summed = numbers(weights), None if gated else numbers(2, tokens, out)
    elements = x.numel() + weight.numel() + 2 * tokens * out * (1 if gated else 2)
    return Case.of(
        "linear",
        f"{title}: 2x{tokens}x{channels} to {out}, {'gated' if gated else 'sum'}",
        lambda multiply: multiply(x, weight, bias, residual=summed, gated=gated),
        flop=2 * 2 * tokens * channels * weights,
        bytes=elements * x.element_size(),
    )


def residual_case(
    title: str, batch: int, channels: int, side: int, dtype: torch.dtype, device: str
) -> Case:
    """The sum that ends a resnet, with its last convolution's bias."""
    numbers = _Numbers(dtype, device)
    x, h = (numbers.map(batch, channels, side, side) for _ in range(2))
    bias = numbers(channels)
    return Case.of(
        "residual",
        f"{title}: {batch}x{channels}x{side}x{side}",
        lambda add: add(x, h, bias),
        flop=2 * x.numel(),
        bytes=3 * x.numel() * x.element_size(),
    )


def sampler_step_case(
    title: str, batch: int, side: int, slots: int, dtype: torch.dtype, device: str
) -> Case:
    """A guided row of a table, over latents of four channels; the state grows no larger by it.

    torch's own is the formula itself, whose error is none.
    """
    numbers = _Numbers(torch.float32, device)
    sources = numbers(slots + 3, batch, 4, side, side)
    prediction = numbers.map(2 * batch, 4, side, side).to(dtype)
    coefficients = 0.1 * numbers(1, columns(slots))
    row = torch.zeros(1, dtype=torch.int64, device=device)
    guidance = torch.tensor(7.5, device=device)
    states: dict[Callable[..., None], Tensor] = {}

    def run(step: Callable[..., None]) -> Tensor:
        if step not in states:
            states[step] = sources.clone()
        state = states[step]
        step(state, prediction, coefficients, row, guidance)
        return state[:-1]

    state_bytes = sources[0].numel() * sources.element_size()
    return Case.of(
        "sampler_step",
        f"{title}: {batch}x4x{side}x{side}, {slots} slots",
        run,
        flop=2 * (1 + slots) * (3 + slots) * sources[0].numel(),
        bytes=(2 * slots + 4) * state_bytes + prediction.numel() * prediction.element_size(),
    )


# every width of SD1.5's and SDXL's UNets, and the decoder's: (title, batch, channels, side)
GROUP_NORM = (
    ("SD1.5 512, level 1", 2, 320, 64),
    ("SD1.5 512, level 1 with its skip", 2, 960, 64),
    ("SD1.5 512, level 2", 2, 640, 32),
    ("SD1.5 512, level 3 with its skip", 2, 2560, 16),
    ("SD1.5 512, level 4", 2, 1280, 8),
    ("SDXL 1024, level 1", 2, 320, 128),
    ("SDXL 1024, level 2 with its skip", 2, 1920, 64),
    ("SDXL 1024, level 3", 2, 1280, 32),
    ("decoder 512, first", 1, 512, 64),
    ("decoder 512, last", 1, 128, 512),
    ("decoder 1024, last with both halves", 1, 256, 1024),
)
# (title, batch, channels, channels out, side, doubled first)
CONV3X3 = (
    ("SD1.5 512, level 1", 2, 320, 320, 64, False),
    ("SD1.5 512, level 1 from a skip", 2, 960, 320, 64, False),
    ("SD1.5 512, level 2", 2, 640, 640, 32, False),
    ("SD1.5 512, level 3", 2, 1280, 1280, 16, False),
    ("SD1.5 512, middle", 2, 1280, 1280, 8, False),
    ("SD1.5 512, up to level 3", 2, 1280, 1280, 8, True),
    ("SDXL 1024, level 1", 2, 320, 320, 128, False),
    ("SDXL 1024, level 2", 2, 640, 640, 64, False),
    ("SDXL 1024, level 3", 2, 1280, 1280, 32, False),
    ("SDXL 1024, up to level 2", 2, 1280, 1280, 32, True),
    ("decoder 512, last", 1, 128, 128, 512, False),
    ("decoder 512, up to the last but one", 1, 512, 512, 128, True),
)
SAMPLER_STEP = (
    ("SD1.5 512, as captured", 1, 64, 4),
    ("SDXL 1024, as captured", 1, 128, 4),
    ("SD1.5 512, a batch of 8", 8, 64, 4),
)
# (title, tokens, width)
TOKENS = (
    ("SD1.5 512, level 1", 4096, 320),
    ("SD1.5 512, level 2", 1024, 640),
    ("SD1.5 512, level 3", 256, 1280),
    ("SDXL 1024, level 2", 4096, 640),
    ("SDXL 1024, level 3", 1024, 1280),
)
# (title, batch, channels, side)
RESIDUAL = (
    ("SD1.5 512, level 1", 2, 320, 64),
    ("SDXL 1024, level 3", 2, 1280, 32),
    ("decoder 512, last", 1, 128, 512),
)
# what is asked, per guidance pair: (title, batch, heads, queries, keys, head width)
ATTENTION = (
    ("SD1.5 512 self, level 1", 2, 8, 4096, 4096, 40),
    ("SD1.5 512 self, level 2", 2, 8, 1024, 1024, 80),
    ("SD1.5 512 self, level 3", 2, 8, 256, 256, 160),
    ("SD1.5 512 cross, level 1", 2, 8, 4096, 77, 40),
    ("SDXL 1024 self, level 2", 2, 10, 4096, 4096, 64),
    ("SDXL 1024 self, level 3", 2, 20, 1024, 1024, 64),
    ("SDXL 1024 cross, level 2", 2, 10, 4096, 77, 64),
)
# op -> its cases for a dtype and a device, made one at a time: the largest take gigabytes
OPS: dict[str, Sequence[Callable[[torch.dtype, str], Case]]] = {
    "attention": [partial(attention_case, *shape) for shape in ATTENTION],
    "conv3x3": [partial(conv3x3_case, *shape) for shape in CONV3X3],
    "geglu": [partial(geglu_case, *shape) for shape in TOKENS],
    "group_norm": [partial(group_norm_case, *shape) for shape in GROUP_NORM],
    "layer_norm": [partial(layer_norm_case, *shape) for shape in TOKENS],
    "linear": [partial(linear_case, *shape, gated) for shape in TOKENS for gated in (True, False)],
    "residual": [partial(residual_case, *shape) for shape in RESIDUAL],
    "sampler_step": [partial(sampler_step_case, *shape) for shape in SAMPLER_STEP],
}


def measure_ops(
    names: Sequence[str],
    *,
    precision: str,
    device: str,
    turns: int = TURNS,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Time every implementation of the ops called `names` (none: of all), in turns.

    keep: given all that is known so far after each case; a faulty kernel may end the process.
    Returns ceilings and rows, plain data. Raises UsageError for an unknown op or precision.
    """
    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise UsageError(f"op {unknown[0]!r} is unknown; they are {', '.join(OPS)}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown; {', '.join(PRECISIONS)} are known")
    ceilings = measure_ceilings(device)
    rows: list[dict[str, Any]] = []
    results = {"precision": precision, "device": device, "ceilings": ceilings, "rows": rows}
    for op in names or OPS:
        for make in OPS[op]:
            case = make(PRECISIONS[precision], device)
            say(f"{case.op} {case.shape}")
            rows += measure_case(case, ceilings, precision=precision, device=device, turns=turns)
            keep(results)
    return results


def measure_case(
    case: Case, ceilings: Mapping[str, float], *, precision: str, device: str, turns: int
) -> list[dict[str, Any]]:
    """Time one case's implementations in turns, and hold each to the reference.

    Inputs that a GPU's L2 cache holds stay there, so that shares above 100 % can be.
    """
    truth = case.reference()
    scale = float(truth.float().abs().max())
    rows: dict[str, dict[str, Any]] = {}
    usable: dict[str, Callable[[], object]] = {}
    gpu = device.startswith("cuda")
    for name, call in case.implementations.items():
        rows[name] = {"op": case.op, "shape": case.shape, "implementation": name}
        try:
            out = call().clone()  # what is timed may write to it
            usable[name] = _graphed(call, device) if gpu else call
        except Exception as error:  # noqa: BLE001  (compilers have their own; all are its row)
            rows[name]["reason"] = (str(error) or type(error).__name__).splitlines()[0]
        else:
            error_ = float((out.float() - truth.float()).abs().max())
            rows[name]["largest_error"] = error_ / scale
    del truth
    counts = {name: _calls_in(timed, TURN_S, device) for name, timed in usable.items()}
    times: dict[str, list[float]] = {name: [] for name in usable}
    for _ in range(turns):
        for name, timed in usable.items():
            times[name].append(_seconds(timed, counts[name], device))
    base = next(iter(usable), None)
    least = max(case.flop / ceilings[precision], case.bytes / ceilings["copy"])
    for name, seconds in times.items():
        assert base is not None
        latency = Latency.of([s / GRAPHED for s in seconds] if gpu else seconds)
        ratio = paired_ratio(seconds, times[base])
        rows[name] |= {
            "p50_s": latency.p50,
            "p20_s": latency.p20,
            "p80_s": latency.p80,
            "tflops": case.flop / latency.p50 / 1e12,
            "gbytes_per_s": case.bytes / latency.p50 / 1e9,
            "share": least / latency.p50,
            "ratio": {**asdict(ratio), "verdict": ratio.verdict},
        }
    return list(rows.values())


def _graphed(call: Callable[[], Tensor], device: str) -> Callable[[], object]:
    """Return GRAPHED calls as one CUDA graph."""

    def calls() -> None:
        for _ in range(GRAPHED):
            call()

    return cuda_graph.capture(calls, torch.device(device))


def _calls_in(call: Callable[[], object], budget_s: float, device: str) -> int:
    """How many calls take about `budget_s`."""
    return max(1, int(budget_s / max(1e-9, _seconds(call, 1, device))))


def _seconds(call: Callable[[], object], count: int, device: str) -> float:
    """The time of one call, from `count` in a row: on a GPU by events around them."""
    if device.startswith("cuda"):
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / count
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def ops_table(results: Mapping[str, Any]) -> list[list[str]]:
    """A row an implementation of a case."""
    table = [["op", "shape", "implementation", "ms", "TFLOP/s", "GB/s", "of ceiling", "vs first"]]
    table[0] += ["error"]
    for row in results["rows"]:
        start = [row["op"], row["shape"], row["implementation"]]
        if "reason" in row:
            table.append([*start, f"not run: {row['reason']}", *[""] * 5])
            continue
        table.append(
            [
                *start,
                f"{1000 * row['p50_s']:.3g}",
                f"{row['tflops']:.3g}",
                f"{row['gbytes_per_s']:.3g}",
                f"{100 * row['share']:.0f}%",
                f"{1 / row['ratio']['median']:.2f}x, {row['ratio']['verdict']}",
                f"{row['largest_error']:.1e}",
            ]
        )
    return table
