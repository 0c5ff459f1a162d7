"""Choose what is rounded, to int8 or fp8, on real denoising trajectories.

The exact pipeline draws pictures of a prompt set while the UNet and the VAE's decoder are watched
(fastsd.quant.calibrate). A floor for the pictures' quality is held by keeping the layers that cost
most in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fastsd import Pipeline
from fastsd.backends import RUNS_ON
from fastsd.backends.cuda_graph import exact_convolutions
from fastsd.backends.eager import EagerBackend
from fastsd.backends.heap import give_back_freed_memory
from fastsd.checkpoints import Checkpoint, parameters
from fastsd.checkpoints.layout import BUILTIN
from fastsd.errors import UsageError
from fastsd.kernels.dispatch import IMPLEMENTATIONS
from fastsd.models.layers import Attention
from fastsd.quality import builtin_atlas, first_by_digest, psnr, tasks
from fastsd.quant.apply import layers, products
from fastsd.quant.calibrate import (
    INT8,
    Chosen,
    Form,
    Recorder,
    calibrate,
    relative_error,
    sensitivity,
    spec_of,
)
from fastsd.quant.draws import PROMPTS, draw_settings
from fastsd.quant.spec import QuantSpec, Rounding, shares_input

_FIRST_SEED = 10_000  # far from those that pictures are judged by
_PICTURES = 16
JUDGED_STEPS = 20  # of pictures that say how near an engine is
# Relative L2 at a part's output that is asked of any model, over the pictures watched, of rounding
# its layers. A decoder's leaves room for what an engine rounds besides, and for other pictures,
# whose values may be cut where none as large was watched: 0.03 is to hold. fp8 has three bits a
# value, which errs more, but cuts nothing: the built-in UNet by 0.04 with all that the rule rounds,
# SDXL's with random weights by 0.11 with its linear layers.
BOUNDS = {
    "int8": {"unet": 0.06, "vae.decoder": 0.02},
    "fp8": {"unet": 0.25, "vae.decoder": 0.02},
}
SMALL = 256
# Of a UNet's work in layers that its form takes; with less of it rounded an engine is not worth
# its name.
SMALLEST_SHARE = 0.5


@dataclass(frozen=True)
class Calibration:
    """What was chosen and what it costs.

    errors: relative L2 at each part's output with the whole spec. table: for each layer its share
    of its part's products, and the relative L2 if it alone is rounded. share: of each part's
    products that are.
    """

    spec: QuantSpec
    errors: dict[str, float]
    share: dict[str, float]
    table: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "spec": self.spec.to_json(),
            "errors": self.errors,
            "share": self.share,
            "layers": self.table,
        }


def default_prompts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the prompts that a model is calibrated on; the built-in one is judged by others."""
    if checkpoint.path != BUILTIN:
        return PROMPTS
    atlas = builtin_atlas()
    judged = {name for task in tasks(atlas).values() for name in task.names}
    return tuple(first_by_digest([n for n in atlas.english if n not in judged], _PICTURES))


def exact_device(checkpoint: Checkpoint, target: str) -> str:
    """Return where the exact model draws for an engine of `target`: "cuda" or "cpu".

    On a GPU if the engine is for one, where the model fits twice: it needs about as much for what
    it computes. On a CPU the pictures of a large one would take hours.
    """
    if RUNS_ON.get(target) != "cuda" or not torch.cuda.is_available():
        return "cpu"
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return "cuda" if free >= 2 * 4 * parameters(checkpoint) else "cpu"


def exact_pipeline(
    checkpoint: Checkpoint, device: str, *, name: str, sampler: str | None = None
) -> Pipeline:
    """Open a model in fp32, in the library's kernels and uncaptured, on a GPU too.

    There its convolutions are exact within `exact_convolutions` only.
    """
    pipeline = Pipeline(checkpoint, name=name, device=device, sampler=sampler, graph="none")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.use(**{op: known[0] for op, known in IMPLEMENTATIONS.items()})


class Calibrator:
    """Watches a model draw, and quantises it.

    form: what its layers are rounded to. device: what draws, in fp32. steps: of each trajectory,
    unless the model is made for few. calls: how many of the model's own calls the choices are
    measured on.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompts: Sequence[str],
        *,
        size: tuple[int, int],
        form: Form = INT8,
        device: str = "cpu",
        steps: int = 20,
        calls: int = 4,
        batch: int = 4,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.pipeline = exact_pipeline(checkpoint, device, name="calibration")
        backend = self.pipeline._backend
        assert isinstance(backend, EagerBackend)
        unet, decoder = backend.modules["unet"], backend.modules["vae"].decoder
        assert isinstance(decoder, nn.Module)
        for layer in unet.modules():
            if isinstance(layer, Attention):
                layer.to_qkv = None  # a GPU's, in which the three would not be seen
        watched = (
            Recorder("unet", unet, form, called=backend.part("unet"), kept_calls=calls),  # type: ignore[arg-type]
            Recorder("vae.decoder", decoder, form, kept_calls=max(1, calls // 2)),
        )
        self._form = form
        # A tiny decoder's layers play no role that the rule knows: it stays as it is.
        self._recorders = [recorder for recorder in watched if recorder.chosen]
        self._settings = draw_settings(checkpoint.config, size, steps)
        self._judged = draw_settings(checkpoint.config, size, JUDGED_STEPS)
        self._batch, self._calls, self._tell = batch, calls, tell
        self._alone: dict[str, dict[str, float]] = {}
        self._exact: dict[tuple[str, ...], list[Any]] = {}  # pictures by what they were drawn from
        self._errors: dict[tuple[str, frozenset[tuple[str, Rounding]]], float] = {}
        with ExitStack() as watching:
            for recorder in self._recorders:
                watching.enter_context(recorder.watching())
            self.draw(prompts, _FIRST_SEED, self._settings)

    def draw(self, prompts: Sequence[str], seed: int, settings: Mapping[str, Any]) -> list[Any]:
        """Draw one picture a prompt."""
        pictures: list[Any] = []
        for start in range(0, len(prompts), self._batch):
            texts = list(prompts[start : start + self._batch])
            pictures += self.pipeline(texts, seed=seed + start, **settings).images
            self._tell(f"pictures drawn: {len(pictures)} of {len(prompts)}")
        return pictures

    def choose(self) -> QuantSpec:
        """Return a spec of the most layers that hold every part within its bound of BOUNDS.

        What is left out first are the layers whose own outputs suffer most. Raises UsageError where
        half of a part's layers are out and it is still beyond its bound.
        """
        chosen = {}
        for recorder in self._recorders:
            give_back_freed_memory()  # the pictures' activations; of SDXL 2 GB, and again
            chosen[recorder.part] = calibrate(recorder, calls=self._calls, tell=self._tell)
        give_back_freed_memory()
        spec = spec_of(chosen)
        for recorder in self._recorders:
            spec = self._bounded(spec, recorder, chosen[recorder.part])
        return spec

    def _bounded(
        self, spec: QuantSpec, recorder: Recorder, chosen: Mapping[str, Chosen]
    ) -> QuantSpec:
        part, bound = recorder.part, BOUNDS[self._form.name][recorder.part]
        worst = sorted(chosen, key=lambda name: -chosen[name].error)
        for kept in _growing(worst):
            held = spec.keep(
                {f"{part}.{n}": f"its own error is {chosen[n].error:.4f}" for n in kept}
            )
            error = self._error(recorder, held)
            self._tell(
                f"{part}: {len(kept)} layers kept in full precision: relative error {error:.4f}"
            )
            if error <= bound:
                return held
            if 2 * len(kept) > len(worst):
                break
        raise UsageError(
            f"rounding leaves {part} at a relative error of {error:.3f} with {len(kept)} of its "
            f"{len(worst)} layers in full precision, and {bound} is asked; the costliest: "
            f"{', '.join(worst[:5])}. Export in fp16 or fp32"
        )

    def errors(self, spec: QuantSpec) -> dict[str, float]:
        """Return the relative L2 at each part's output over the calls kept."""
        return {recorder.part: self._error(recorder, spec) for recorder in self._recorders}

    def _error(self, recorder: Recorder, spec: QuantSpec) -> float:
        """Measure once what a large model takes minutes for."""
        key = (recorder.part, frozenset(spec.only(recorder.part).items()))
        if key not in self._errors:
            exact = recorder.exact
            with recorder.rounded(spec.only(recorder.part)):
                self._errors[key] = relative_error(recorder.outputs(), exact)
        return self._errors[key]

    @cached_property
    def work(self) -> dict[str, dict[str, float]]:
        """Each layer's share of its part's products, by part and name."""
        shares = {}
        for recorder in self._recorders:
            counts = products(recorder.module, lambda r=recorder: r.run(r.calls[0]))  # type: ignore[misc]
            total = sum(counts.values())
            shares[recorder.part] = {name: count / total for name, count in counts.items()}
        return shares

    def share(self, spec: QuantSpec) -> dict[str, float]:
        """Return the share of each part's products that are rounded."""
        return {
            part: sum(work[name] for name in spec.only(part)) for part, work in self.work.items()
        }

    def table(self, spec: QuantSpec) -> dict[str, dict[str, float]]:
        """Quantise one layer at a time: what each costs, worst first. Measured once a layer."""
        rows = {}
        for recorder in self._recorders:
            alone = self._alone.setdefault(recorder.part, {})
            asked = spec.only(recorder.part)
            if new := {name: rounding for name, rounding in asked.items() if name not in alone}:
                self._tell(f"{recorder.part}: measuring what {len(new)} layers cost, one at a time")
                alone |= sensitivity(recorder, new, calls=1)
            for name in asked:
                share = self.work[recorder.part][name]
                rows[f"{recorder.part}.{name}"] = {"error": alone[name], "share": share}
        return dict(sorted(rows.items(), key=lambda row: -row[1]["error"]))

    def judge(self, spec: QuantSpec, prompts: Sequence[str]) -> list[float]:
        """Return the PSNR in dB of each prompt's picture, rounded against exact, same seeds.

        Drawn in JUDGED_STEPS, as the engine's own will be.
        """
        texts = tuple(prompts)
        if texts not in self._exact:
            self._exact[texts] = self.draw(texts, 0, self._judged)
        with ExitStack() as stack:
            for recorder in self._recorders:
                stack.enter_context(recorder.rounded(spec.only(recorder.part)))
            rounded = self.draw(texts, 0, self._judged)
        return [psnr(a, b) for a, b in zip(rounded, self._exact[texts], strict=True)]

    def hold(self, spec: QuantSpec, floor: float, prompts: Sequence[str]) -> QuantSpec:
        """Keep the layers that cost most until the worst picture reaches `floor` dB.

        Raises UsageError, naming the costliest layers, if less than half of the products that its
        form takes would be left in it.
        """
        reached = self._worst(spec, prompts, 0)
        if reached >= floor:
            return spec
        unet = layers(self._recorders[0].module)
        least = SMALLEST_SHARE * sum(
            share
            for name, share in self.work["unet"].items()
            if self._form.takes(f"unet.{name}", unet[name])
        )
        table = self.table(spec)
        # What a layer costs (errors add up in squares) for what it saves.
        order = sorted(
            table, key=lambda n: -(table[n]["error"] ** 2) / max(table[n]["share"], 1e-6)
        )
        tried = 0
        for kept in _growing(order):
            held = spec.keep({n: f"costs {table[n]['error']:.4f}" for n in kept})
            if self.share(held)["unet"] < least:
                break
            if not kept:
                continue
            tried, reached = len(kept), self._worst(held, prompts, len(kept))
            if reached >= floor:
                return held
        worst = ", ".join(f"{n} ({table[n]['error']:.4f})" for n in list(table)[:5])
        raise UsageError(
            f"{self._form.name} reaches {reached:.1f} dB, not {floor:g}, with {tried} layers kept "
            f"in full precision; the costliest: {worst}. Ask for a lower --floor, or fp16 or fp32"
        )

    def _worst(self, spec: QuantSpec, prompts: Sequence[str], kept: int) -> float:
        worst = min(self.judge(spec, prompts))
        self._tell(f"{kept} layers kept in full precision: worst picture {worst:.1f} dB")
        return worst


def _growing(order: Sequence[str]) -> Iterator[list[str]]:
    """Yield none of the layers, then the first 2, 4, 8 … of them.

    With each go those that read the same tensor: one product takes all of them, or none.
    """
    count = 0
    while count < len(order):
        inputs = {shares_input(name) for name in order[:count]}
        yield [name for name in order if shares_input(name) in inputs]
        count = 2 * count or 2


@torch.no_grad()
@exact_convolutions()
def calibrate_checkpoint(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    form: Form = INT8,
    device: str = "cpu",
    floor: float | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Choose a checkpoint's layers to round, and how.

    size: height, width in pixels. form: what they are rounded to. device: what draws, in fp32.
    floor: in dB, held on the prompts' pictures. A picture beyond
    SMALL pixels a side takes a minute on a CPU and more: such models are watched at few steps, one
    picture at a time, a floor is held on two pictures, and the table of single layers, a forward
    pass each, is measured for a floor only. Steps are what can be spared: on the built-in model 8
    pictures of 4 steps end up 34.4 dB from fp32 at the median and 28 at worst, 16 of 20 steps 34.9
    and 30, one of 8 steps 26.6 and 20.
    """
    small = max(size) <= SMALL
    settings = {} if small else {"steps": 4, "batch": 1}
    with_table = small or floor is not None
    calibrator = Calibrator(
        checkpoint, prompts, size=size, form=form, device=device, tell=tell, **settings
    )
    spec = calibrator.choose()
    if floor is not None:
        spec = calibrator.hold(spec, floor, prompts if small else prompts[:2])
    errors, share = calibrator.errors(spec), calibrator.share(spec)
    for part in errors:
        tell(
            f"{part}: {share[part]:.1%} of its products in {form.name}, relative error "
            f"{errors[part]:.4f}"
        )
    return Calibration(spec, errors, share, calibrator.table(spec) if with_table else {})
