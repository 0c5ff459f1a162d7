"""Put rounded layers in the place of a module's own, and count what share of the work they do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastsd.errors import UsageError
from fastsd.quant.linear import int8_layer
from fastsd.quant.spec import Rounding

M = TypeVar("M", bound=nn.Module)


def layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return every linear layer and convolution of `module`, by name, in the order defined."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def quantised(
    module: M,
    roundings: Mapping[str, Rounding],
    make: Callable[[nn.Linear | nn.Conv2d, Rounding], nn.Module] = int8_layer,
) -> M:
    """Return a copy of `module` whose layers named in `roundings` are rounded. The rest is shared.

    make: returns the layer to put in one's place, if it is to be another than our int8 one.
    Raises UsageError for a name that is no linear layer or plain convolution of the module.
    """
    found = layers(module)
    unknown = sorted(set(roundings) - set(found))
    if unknown:
        raise UsageError(
            f"the spec names {len(unknown)} layers that this model does not have, "
            f"such as {unknown[0]!r}; calibrate on this model"
        )
    # Sharing by memo: parameters and buffers are never written, so no copy needs its own.
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    clone = copy.deepcopy(module, shared)
    for name, rounding in roundings.items():
        clone.set_submodule(name, make(found[name], rounding))
    return clone


@contextmanager
def swapped(
    module: nn.Module,
    roundings: Mapping[str, Rounding],
    make: Callable[[nn.Linear | nn.Conv2d, Rounding], nn.Module] = int8_layer,
) -> Iterator[None]:
    """Run `module` itself with the layers named in `roundings` rounded; its own come back after.

    make: as `quantised` has it.
    """
    own = layers(module)
    try:
        for name, rounding in roundings.items():
            module.set_submodule(name, make(own[name], rounding))
        yield
    finally:
        for name in roundings:
            module.set_submodule(name, own[name])


def products(module: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Count the multiply-adds of every linear layer and convolution while `run` runs, by name."""
    counts: dict[str, int] = {}

    def counter(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def count(layer: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            if weight.ndim == 2:
                work = out.numel() * weight.shape[1]
            else:  # (C_out, C_in, h, w): each output is a sum over the rest
                work = out.numel() * weight[0].numel()
            counts[name] = counts.get(name, 0) + work

        return count

    hooks = [layer.register_forward_hook(counter(name)) for name, layer in layers(module).items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return counts
