"""A contender at work: opened for a scene, it draws, and lets its parts be watched.

fastsd's pipelines and diffusers' are called in the same words, so that one class serves both.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor

from fastsd import Pipeline
from fastsd.backends import Backend
from fastsd.benchmarks.contenders import Scene
from fastsd.checkpoints import open_checkpoint
from fastsd.engine import SamplingLoop

Function = Callable[..., Any]


class Watch:
    """Times calls in place: on a CPU by the wall clock, on a GPU by events, waiting for nothing.

    Calls that a graph captures are not timed: they do not run then.
    """

    def __init__(self, device: str) -> None:
        self._gpu = device.startswith("cuda")
        self._marks: dict[str, list[tuple[Any, Any]]] = {}

    def wrap(self, name: str, function: Function) -> Function:
        """Return `function`, timed under `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._gpu and torch.cuda.is_current_stream_capturing():
                return function(*args, **kwargs)
            start = self._mark()
            result = function(*args, **kwargs)
            self._marks.setdefault(name, []).append((start, self._mark()))
            return result

        return timed

    def forget(self) -> None:
        """Drop what was timed so far."""
        self._marks.clear()

    def parts_ms(self, total_ms: float) -> dict[str, float]:
        """Say where `total_ms` of one draw went; what a draw does not have is left out.

        unet and step_rest (guidance, scheduler) are means of one step; the others sums over a draw.
        step: a whole step, where a graph holds all of it.
        """
        if self._gpu:
            torch.cuda.synchronize()
        sums = {name: sum(self._ms(a, b) for a, b in marks) for name, marks in self._marks.items()}
        parts: dict[str, float] = {
            name: sums[name] for name in ("text_encoder", "context", "vae") if name in sums
        }
        loop_ms = 0.0
        whole, ends = self._marks.get("step"), self._marks.get("scheduler")
        steps = whole or ends
        if steps:
            # fastsd's steps are marked whole; diffusers' from the UNet to the scheduler's end
            start = whole[0][0] if whole else self._marks["unet"][0][0]
            loop_ms = self._ms(start, steps[-1][1])
            parts["step"] = loop_ms / len(steps)
            if "unet" in sums:
                parts["unet"] = sums["unet"] / len(steps)
                parts["step_rest"] = (loop_ms - sums["unet"]) / len(steps)
        inside = sum(sums.get(name, 0.0) for name in ("text_encoder", "context", "vae"))
        parts["other"] = total_ms - inside - loop_ms
        parts["total"] = total_ms
        return parts

    def first_step(self) -> float | None:
        """When the UNet first answered, as time.perf_counter has it; a GPU's events do not tell."""
        marks = self._marks.get("unet")
        return None if self._gpu or not marks else float(marks[0][1])

    def _mark(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _ms(self, start: Any, end: Any) -> float:
        if self._gpu:
            return float(start.elapsed_time(end))
        return float(1000 * (end - start))


class Drawer(ABC):
    """An opened contender. fixed_batch: it can draw scene.batch pictures at once, and only so."""

    fixed_batch = False

    @abstractmethod
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Draw a picture for each prompt and seed."""

    @abstractmethod
    def latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Draw as far as the latents, (B, C, h, w)."""

    @abstractmethod
    def watched(self, watch: Watch) -> AbstractContextManager[None]:
        """Have the parts timed by `watch` meanwhile."""

    def explain(self) -> Sequence[str]:
        """Say what runs, a line a fact, where the contender can."""
        return ()


@final
class PipelineDrawer(Drawer):
    """Draws with a pipeline that is called as diffusers' are."""

    def __init__(
        self,
        pipeline: Any,
        scene: Scene,
        watched: Callable[[Any, Watch], AbstractContextManager[None]],
        *,
        fixed_batch: bool = False,
        noise: Callable[[torch.Generator], Tensor] | None = None,
        **settings: Any,
    ) -> None:
        """noise: draws a picture's first latents, (1, C, h, w), where the pipeline would draw
        others. settings: what each call is given beside the scene's.
        """
        self.fixed_batch = fixed_batch
        self._noise = noise
        self._pipeline = pipeline
        self._watched = watched
        self._settings: dict[str, Any] = {
            "num_inference_steps": scene.steps,
            "guidance_scale": scene.guidance,
            "height": scene.size,
            "width": scene.size,
            **settings,
        }
        pipeline.set_progress_bar_config(disable=True)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Call the pipeline."""
        return list(self._call(prompts, seeds, "pil"))

    def latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Call the pipeline for its latents."""
        latents: Tensor = self._call(prompts, seeds, "latent")
        return latents.float().cpu()

    def watched(self, watch: Watch) -> AbstractContextManager[None]:
        """Put `watch` around the pipeline's parts."""
        return self._watched(self._pipeline, watch)

    def explain(self) -> Sequence[str]:
        """Ask fastsd's pipelines."""
        return self._pipeline.explain() if isinstance(self._pipeline, Pipeline) else ()

    def _call(self, prompts: Sequence[str], seeds: Sequence[int], output_type: str) -> Any:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        noise = self._noise
        given = {} if noise is None else {"latents": torch.cat([noise(g) for g in generators])}
        return self._pipeline(
            list(prompts), generator=generators, output_type=output_type, **given, **self._settings
        ).images


def open_fastsd(
    scene: Scene,
    *,
    backend: str,
    precision: str,
    use: Mapping[str, str] = MappingProxyType({}),
    cache_interval: int = 1,
    **options: Any,
) -> Drawer:
    """Open the scene's model with one of fastsd's backends.

    use: op -> kernel, as Pipeline.use has them. cache_interval: of its calls. options: what else
    from_pretrained takes.
    """
    pipeline = Pipeline.from_pretrained(
        scene.model,
        sampler=scene.sampler,
        backend=backend,
        precision=precision,
        device=scene.device,
        **options,
    )
    return PipelineDrawer(pipeline.use(**use), scene, _watch_fastsd, cache_interval=cache_interval)


def prepare_engine(
    scene: Scene, folder: str, *, target: str, precision: str, cache_interval: int = 1
) -> None:
    """Export the scene's model as `fastsd export` does, for the scene's size and batch."""
    from fastsd.export.build import export
    from fastsd.export.parts import Request

    request = Request(
        target=target,
        precision=precision,
        size=(scene.size, scene.size),
        batch=scene.batch,
        layout="fast",
    )
    export(open_checkpoint(scene.model), scene.model, request, Path(folder))


def open_engine(scene: Scene, folder: str, *, cache_interval: int = 1, **_: str) -> Drawer:
    """Open an engine; a native one only if it was exported by this user on this machine."""
    pipeline = Pipeline.from_pretrained(folder, sampler=scene.sampler, device=scene.device)
    return PipelineDrawer(
        pipeline, scene, _watch_fastsd, fixed_batch=True, cache_interval=cache_interval
    )


@contextmanager
def _watch_fastsd(pipeline: Any, watch: Watch) -> Iterator[None]:
    with pipeline.running_on(_Watched(pipeline._backend, watch)):
        yield


_PARTS = {
    **dict.fromkeys(("text_encoder", "text_encoder_2"), "text_encoder"),
    **dict.fromkeys(("unet_time", "unet_context"), "context"),
    **dict.fromkeys(("unet", "unet_deep", "unet_shallow"), "unet"),
    "vae_decoder": "vae",
}


@final
class _Watched:
    """A backend's stand-in, whose parts and steps are timed; all else is the backend's."""

    def __init__(self, backend: Backend, watch: Watch) -> None:
        self._inner = backend
        self._watch = watch
        self._wrapped: dict[Function, Function] = {}  # another wrapper would be another capture

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def part(self, name: str) -> Function:
        part = self._inner.part(name)
        if name not in _PARTS:
            return part
        return self._wrapped.setdefault(part, self._watch.wrap(_PARTS[name], part))

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        # Of what is captured, the text encoders alone are no steps of a loop.
        loop = isinstance(getattr(step, "__self__", None), SamplingLoop)
        return self._watch.wrap("step" if loop else "text_encoder", self._inner.capture(step))


def measure_parts(drawer: Drawer, scene: Scene, repeats: int = 3) -> dict[str, float]:
    """Return where a picture's time goes, milliseconds, each the median of `repeats` draws."""
    import io

    runs = []
    for draw in range(repeats):
        watch = Watch(scene.device)
        with drawer.watched(watch):
            if scene.device.startswith("cuda"):  # the watched steps are captured anew
                drawer.draw(scene.texts(draw), scene.seeds(draw))
                watch.forget()
            start = time.perf_counter()
            pictures = drawer.draw(scene.texts(draw), scene.seeds(draw))
            total = time.perf_counter() - start
        parts = watch.parts_ms(1000 * total)
        start = time.perf_counter()
        for picture in pictures:
            picture.save(io.BytesIO(), "PNG")
        parts["png"] = 1000 * (time.perf_counter() - start)
        runs.append(parts)
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}
