"""Find how a model's layers are best rounded, on real inputs, and what each costs when it is.

`Recorder` watches while the caller draws pictures. `calibrate` then runs the model over some of its
own calls, and takes for every layer the rounding whose output is nearest to the exact one;
`sensitivity` quantises one layer at a time. Knows no pipeline: whoever calls draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastsd.errors import UsageError
from fastsd.quant.apply import layers, swapped
from fastsd.quant.linear import int8_layer, powers
from fastsd.quant.spec import QuantSpec, Rounding, chosen_to_round, shares_input

_POSITIONS = 64  # of an input whose channels are kept, a call
_BLOCKS = 16  # calls whose positions are kept: all of SDXL's, of forty, would be 8 GB
_CUTS = [0.2 + 0.02 * i for i in range(41)]  # shares of the full range that "mse" tries
METHODS = ("minmax", "percentile", "mse")
MIGRATIONS = (0.0, 0.5, 0.75)  # how much of the channels' spread moves into the weights


@dataclass(frozen=True)
class Form:
    """What layers are rounded to, as calibration has to know it.

    name: the precision's. layer: returns a layer as it computes then, from fp32 to fp32.
    methods, migrations: the ways of METHODS and MIGRATIONS that are tried. takes: whether a layer,
    by its full name, can have this form; that it plays a role that may is asked besides.
    """

    name: str
    layer: Callable[[nn.Linear | nn.Conv2d, Rounding], nn.Module]
    methods: Sequence[str] = METHODS
    migrations: Sequence[float] = MIGRATIONS
    takes: Callable[[str, nn.Module], bool] = lambda name, layer: True


INT8 = Form("int8", int8_layer)


def fp8(
    layer: Callable[[nn.Linear | nn.Conv2d, Rounding], nn.Module],
    takes: Callable[[str, nn.Module], bool] = lambda name, layer: True,
) -> Form:
    """Return the form of layers that `layer` puts in fp8. Its numbers are as fine at any size: a
    range that is cut, or evened between channels, wins nothing.
    """
    return Form("fp8", layer, ("minmax",), (0.0,), takes)


class Values:
    """What was seen at one layer's input: each channel's extremes, and a sample of positions."""

    def __init__(self) -> None:
        self.low: Tensor = torch.tensor(0.0)
        self.high: Tensor = torch.tensor(0.0)
        self._rows: list[Tensor] = []
        self._calls = 0

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        """Take in one call's input, (…, C) or (B, C, H, W)."""
        flat = (x.movedim(1, -1) if x.ndim == 4 else x).reshape(-1, _channels(x))
        low, high = torch.aminmax(flat, dim=0)
        self.low = torch.minimum(self.low.to(low), low)  # from 0: a range holds zero anyway
        self.high = torch.maximum(self.high.to(high), high)
        place = _place(self._calls, _BLOCKS, generator)
        self._calls += 1
        if place is not None:
            chosen = torch.randint(len(flat), (_POSITIONS,), generator=generator)
            self._rows[place : place + 1] = [flat[chosen.to(x.device)].float().cpu()]

    @property
    def seen(self) -> bool:
        """Whether anything was."""
        return bool(self._rows)

    def exponents(self, weights: Sequence[Tensor], migration: float) -> tuple[int, ...]:
        """Return log2 of size(x)^a / size(w)^(1 - a) a channel, whole, the largest at 0.

        size: the largest magnitude. a: `migration`; 0 returns (). weights: of all layers that read
        this input.
        """
        if not migration:
            return ()
        x = torch.maximum(-self.low, self.high).float().cpu().clamp_min(1e-5)
        w = torch.stack(
            [w.detach().float().transpose(0, 1).flatten(1).abs().amax(1) for w in weights]
        )
        e = migration * x.log2() - (1 - migration) * w.amax(0).cpu().clamp_min(1e-5).log2()
        whole = (e - e.max()).round().clamp_min(-12)
        return tuple(int(value) for value in whole)

    def rounding(self, method: str, exponents: tuple[int, ...] = ()) -> Rounding:
        """Cut the range by `method`: not at all; at 1 in 10,000 values; at the least error."""
        low, high, rows = self.low.float().cpu(), self.high.float().cpu(), torch.cat(self._rows)
        if exponents:
            grow = powers(exponents)
            low, high, rows = low / grow, high / grow, rows / grow
        full = Rounding.of(float(low.min()), float(high.max()), exponents)
        if method == "minmax":
            return full
        x = rows.flatten()
        if method == "percentile":
            rank = max(1, round(len(x) * 1e-4))
            top, bottom = x.topk(rank).values[-1], -(-x).topk(rank).values[-1]
            return Rounding.of(float(bottom), float(top), exponents)
        cuts = [Rounding.of(full.low * cut, full.high * cut, exponents) for cut in _CUTS]
        return min(cuts, key=lambda cut: _rounding_error(x, cut))


def _place(seen: int, room: int, generator: torch.Generator) -> int | None:
    """Say where of `room` places the next of a row of things goes, so that in the end each of all
    is kept with the same chance; None: nowhere. seen: how many came before it.
    """
    if seen < room:
        return seen
    place = int(torch.randint(seen + 1, (1,), generator=generator))
    return place if place < room else None


def _channels(x: Tensor) -> int:
    return x.shape[1] if x.ndim == 4 else x.shape[-1]


def _rounding_error(x: Tensor, rounding: Rounding) -> float:
    """Mean squared error of rounding x to uint8."""
    scale, zero = rounding.affine()
    q = (x / scale).round_().add_(zero).clamp_(0, 255)
    return float(q.sub_(zero).mul_(scale).sub_(x).square_().mean())


class Recorder:
    """Watches one module: the inputs of its layers, and a few of its own calls, whole.

    form: what its layers are to be rounded to. called: what is called in the module's place, and
    runs its layers; by default itself. kept_calls: how many calls are kept, spread over all that
    come (reservoir sampling).
    """

    def __init__(
        self,
        part: str,
        module: nn.Module,
        form: Form = INT8,
        *,
        called: nn.Module | None = None,
        kept_calls: int = 16,
    ) -> None:
        self.part = part
        self.module = module
        self.form = form
        self.values: dict[str, Values] = {}
        self.calls: list[tuple[Any, ...]] = []
        self._called = called or module
        found = layers(module)
        full = {f"{part}.{name}": name for name in found}
        self.chosen = [  # the rule's, of the module's
            full[name] for name in chosen_to_round(full) if form.takes(name, found[full[name]])
        ]
        self._kept, self._seen = kept_calls, 0
        self._generator = torch.Generator().manual_seed(0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record while the body runs."""

        def on_layer(values: Values) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _, args: values.add(args[0], self._generator)

        hooks = [self._called.register_forward_pre_hook(self._on_call)]
        inputs: dict[str, Values] = {}
        for name in self.chosen:
            read = shares_input(name)
            if read not in inputs:
                inputs[read] = Values()
                layer = self.module.get_submodule(name)
                hooks.append(layer.register_forward_pre_hook(on_layer(inputs[read])))
            self.values[name] = inputs[read]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.values = {name: values for name, values in self.values.items() if values.seen}

    def _on_call(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        place = _place(self._seen, self._kept, self._generator)
        self._seen += 1
        if place is not None:
            self.calls[place : place + 1] = [args]

    @cached_property
    def exact(self) -> list[Tensor]:
        """What `outputs` gives before any layer is swapped: ask for it before that."""
        return self.outputs()

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Run the module, as it stands, over the recorded calls."""
        return [self.run(call) for call in self.calls]

    def run(self, call: tuple[Any, ...]) -> Tensor:
        """Run the module over one of them."""
        out: Tensor = self._called(*call)
        return out

    def rounded(self, roundings: Mapping[str, Rounding]) -> AbstractContextManager[None]:
        """Run the module meanwhile with the layers named in `roundings` in its form."""
        return swapped(self.module, roundings, self.form.layer)


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return |got - expected| / |expected| over all tensors together."""
    error = sum(float((a - b).double().square().sum()) for a, b in zip(got, expected, strict=True))
    size = sum(float(b.double().square().sum()) for b in expected)
    return float((error / size) ** 0.5)


@dataclass(frozen=True)
class Chosen:
    """A layer's rounding, and the relative L2 that it leaves at the layer's own output."""

    rounding: Rounding
    error: float


@torch.no_grad()
def calibrate(
    recorder: Recorder, *, calls: int = 4, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Chosen]:
    """Choose the rounding of every layer that was recorded, by its name inside the module.

    Tried are its form's ways of cutting the range and of moving the channels' spread; taken is the
    one with the least squared error at the layer's own output over `calls` of the recorded calls.
    tell: called after each. Raises UsageError if nothing was recorded.
    """
    if not recorder.calls or not recorder.values:
        raise UsageError(f"{recorder.part} did not run while it was watched; give prompts to draw")
    found = layers(recorder.module)
    groups: dict[str, list[str]] = {}
    for name in recorder.values:
        groups.setdefault(shares_input(name), []).append(name)
    candidates = {
        group: _candidates(
            recorder.form, recorder.values[names[0]], [found[name].weight for name in names]
        )
        for group, names in groups.items()
    }
    errors = {group: [0.0] * len(tried) for group, tried in candidates.items()}
    sizes = dict.fromkeys(groups, 0.0)

    def measure(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        group = shares_input(name)

        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            sizes[group] += float(out.square().sum())
            for i, rounding in enumerate(candidates[group]):
                layer = recorder.form.layer(found[name], rounding)  # anew: all would fill memory
                errors[group][i] += float((layer(args[0]) - out).square().sum())

        return hook

    hooks = [found[name].register_forward_hook(measure(name)) for name in recorder.values]
    try:
        judged = recorder.calls[:calls]
        for i, call in enumerate(judged):
            recorder.run(call)
            tell(f"{recorder.part}: roundings tried on {i + 1} of {len(judged)} calls")
    finally:
        for handle in hooks:
            handle.remove()
    chosen = {}
    for name in recorder.values:
        group = shares_input(name)
        least = min(range(len(errors[group])), key=lambda i, g=group: errors[g][i])  # type: ignore[misc]
        error = (errors[group][least] / max(sizes[group], 1e-30)) ** 0.5
        chosen[name] = Chosen(candidates[group][least], error)
    return chosen


def _candidates(form: Form, values: Values, weights: Sequence[Tensor]) -> list[Rounding]:
    """Every way tried, without repeating equal ones."""
    tried = [
        values.rounding(method, exponents)
        for exponents in (values.exponents(weights, migration) for migration in form.migrations)
        for method in form.methods
    ]
    return list(dict.fromkeys(tried))


@torch.no_grad()
def sensitivity(
    recorder: Recorder, roundings: Mapping[str, Rounding], *, calls: int = 4
) -> dict[str, float]:
    """Return, for each layer, the relative L2 at the module's output if it alone is rounded."""
    few = recorder.calls[:calls]
    expected = [recorder.run(call) for call in few]
    table = {}
    for name, rounding in roundings.items():
        with recorder.rounded({name: rounding}):
            table[name] = relative_error([recorder.run(call) for call in few], expected)
    return table


def spec_of(chosen: Mapping[str, Mapping[str, Chosen]]) -> QuantSpec:
    """Join what `calibrate` returned for each part into one spec."""
    return QuantSpec(
        {
            f"{part}.{name}": layer.rounding
            for part, layers_ in chosen.items()
            for name, layer in layers_.items()
        }
    )
