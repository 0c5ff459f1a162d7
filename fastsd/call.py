"""Call: one call of a pipeline, from conditioning to pictures.

Owns all that changes while it runs, and what callbacks see of it. Knows no checkpoint and none of
the checks of arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastsd import tasks
from fastsd.arguments import check_latents, check_number, described
from fastsd.backends import Backend
from fastsd.conditioning import Conditioning
from fastsd.config import ModelConfig
from fastsd.engine import Denoiser, Loops, Run, check_finite
from fastsd.errors import UsageError
from fastsd.images import to_pil
from fastsd.samplers import StepTable
from fastsd.sources import Source
from fastsd.tasks import Decode, Noise, Start

Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(kw_only=True, eq=False, repr=False)
class Call:
    """One call of a Pipeline: all that changes while it runs. Callbacks get it as `pipe`.

    _interrupt and _guidance_scale are diffusers' names for what a callback may set; every attribute
    that is not here is the pipeline's.

    conditioning: (B, …), or where guided (2 B, …). batch: B. size: height and width in pixels.
    kernel: how the sampler's step is computed. tile: as Decode has it. progress: tqdm's arguments.
    from_noise, noised: as tasks.prepare has them. preview(row, clean latents, decoder).
    """

    pipeline: Any
    backend: Backend
    loops: Loops
    kernel: str
    tile: int | None
    progress: Mapping[str, Any]
    table: StepTable
    conditioning: Conditioning
    batch: int
    size: tuple[int, int]
    guidance: InitVar[float]
    rescale: float
    source: Source | None
    from_noise: bool
    noised: bool
    callback: Callback | None
    callback_tensors: tuple[str, ...]
    preview: Callable[[int, Tensor, Decode], None] | None
    one_at_a_time: bool
    cache_interval: int

    def __post_init__(self, guidance: float) -> None:
        self.config: ModelConfig = self.pipeline.config
        self._interrupt = False
        self._guidance_scale = guidance
        self.altered = False  # whether the callback has changed anything
        self.interrupted_after: int | None = None  # rows, where the callback ended the run

    @property
    def guidance_scale(self) -> float:
        """The guidance weight in force."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the model answers twice a step; distilled models are told the weight instead."""
        return self.config.guided(self._guidance_scale)

    @property
    def interrupt(self) -> bool:
        """Whether the run ends after this row; to end it, set _interrupt."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """How many times the model is evaluated."""
        return self.table.rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def draw(
        self,
        generators: torch.Generator | Sequence[torch.Generator],
        latents: Tensor | None,
        output_type: str,
    ) -> Any:
        """Sample and decode; return the pictures in the form of `output_type`."""
        noise = Noise(generators, self._latent_shape, self.backend.device)
        self._start = self._prepare(noise, latents)
        self._decoder = tasks.bind_decoder(
            self.backend,
            self.config,
            one_at_a_time=self.one_at_a_time,
            tile=self.tile,
        )
        watched = self.callback is not None or self.preview is not None
        whole = self.loops.graph == "loop" and not watched and output_type != "latent"
        kept = self.source if self.source and self.source.feather is not None else None
        finish = tasks.Finish(self._decoder, rounded=output_type == "pil" and kept is None)
        run = Run(
            table=self.table,
            latents=self._start.latents,
            denoiser=self._denoiser(),
            guidance=self._guidance,
            rescale=self.rescale,
            known=self._start.known,
            finish=finish if whole else None,
            kernel=self.kernel,
        )
        with (
            self.loops.take(run) as self._loop,
            _progress_bar(self.table.rows, self.progress) as bar,
        ):
            results = self._loop.run(noise, lambda row: self._end_row(row, bar))
            *finished, latents = (each.clone() for each in (*results, self._loop.latents))
        del self._loop, run, results  # and their buffers, before the decoder's come
        # check_finite waits for the device. Where steps are graphs, decoding is queued before that.
        if output_type == "latent" or not self.backend.captures:
            check_finite(latents, "the latents")
        if output_type == "latent":
            return latents
        pictures, total = finished if whole else finish(latents)
        if self.backend.captures:
            check_finite(latents, "the latents")
        check_finite(total, "the picture")
        if kept is not None:
            pictures = kept.keep(pictures)
        if output_type == "pt":
            return pictures
        if output_type == "np":
            return pictures.permute(0, 2, 3, 1).cpu().numpy()
        return to_pil(_to_host(pictures).numpy() if finish.rounded else pictures)

    @property
    def _guidance(self) -> float | None:
        return self._guidance_scale if self.do_classifier_free_guidance else None

    @property
    def _latent_shape(self) -> tuple[int, int, int, int]:
        factor = self.config.vae.downscale
        height, width = (side // factor for side in self.size)
        return self.batch, self.config.vae.latent_channels, height, width

    def _denoiser(self) -> Denoiser:
        return tasks.bind_denoiser(
            self.backend,
            self.config,
            torch.tensor(self.table.timesteps),
            self.conditioning,
            guided=self.do_classifier_free_guidance,
            guidance=self._guidance_scale,
            extra=self._start.extra,
            one_at_a_time=self.one_at_a_time,
            cache_interval=self.cache_interval,
        )

    def _prepare(self, noise: Noise, latents: Tensor | None) -> Start:
        if latents is not None:
            check_latents(latents, self._latent_shape)
            latents = latents.to(self.backend.device, torch.float32)
        return tasks.prepare(
            self.backend,
            self.config,
            self.table,
            noise,
            self.source,
            latents=latents,
            from_noise=self.from_noise,
            noised=self.noised,
            one_at_a_time=self.one_at_a_time,
        )

    def _end_row(self, row: int, bar: Any) -> bool:
        """Advance the bar, ask the callback, take over what it changed; False ends the run."""
        if bar is not None:
            bar.update(row + 1 - bar.n)
        if self.preview is not None:
            self.preview(row, self._loop.clean, self._decoder)
        if self.callback is None:
            return True
        # Copies, as the loop's are the next row's too: a callback may keep them, or write to them.
        ours = self._loop.latents
        tensors = {
            "latents": ours,
            "prompt_embeds": self.conditioning.context,
            "negative_prompt_embeds": self.conditioning.context[: -self.batch],
        }
        given = {name: tensors[name].clone() for name in self.callback_tensors}
        before = self._guidance_scale
        timestep = torch.tensor(self.table.timesteps[row], dtype=torch.float32)
        changed = self.callback(self, row, timestep, dict(given)) or {}
        if not isinstance(changed, dict):
            raise UsageError(
                "callback_on_step_end must return a dict of what it changed, or None, not "
                f"{described(changed)}"
            )
        check_number("_guidance_scale", self._guidance_scale)
        answers = {**tensors, **given, **changed}
        latents = check_latents(answers["latents"], ours.shape)
        if _differ(latents, ours):
            ours.copy_(latents)
            self.altered = True
        context = answers["prompt_embeds"]
        if _differ(context, self.conditioning.context) or before != self._guidance_scale:
            self._rebind(context)
            self.altered = True
        if self._interrupt:
            self.interrupted_after, self.altered = row + 1, True
        return not self._interrupt

    def _rebind(self, context: Tensor) -> None:
        """Go on with another context or guidance weight, as diffusers' loop does."""
        width, batch = self.config.unet.context_width, self.batch
        if not isinstance(context, Tensor) or context.ndim != 3 or context.shape[-1] != width:
            raise UsageError(
                "prompt_embeds that the callback returns must be a torch tensor (rows, tokens, "
                f"{width}), not {described(context)}"
            )
        kept = 2 * batch if self.do_classifier_free_guidance else batch
        if len(context) < kept:
            raise UsageError(
                f"guidance of {batch} pictures takes {kept} rows of text, negative ones first, and "
                f"the callback left {len(context)}; begin the call with guidance, and turn it off "
                "for good or not at all"
            )
        same = not _differ(context, self.conditioning.context) and len(context) == kept
        if same and not self.config.unet.guidance_width:  # the weight alone is another
            self._loop.rebind(None, self._guidance)
            return
        self.conditioning = replace(
            self.conditioning.map(lambda t: t[-kept:]), context=context[-kept:]
        )
        self._loop.rebind(self._denoiser(), self._guidance)


def _differ(given: Any, ours: Tensor) -> bool:
    """Whether a callback gave something else: tensors do not count all that is written to them."""
    if given is ours:
        return False
    alike = isinstance(given, Tensor) and given.shape == ours.shape
    return not alike or not torch.equal(given.to(ours), ours)


@contextmanager
def _progress_bar(rows: int, config: Mapping[str, Any]) -> Iterator[Any]:
    """Show a bar of tqdm's, on a terminal alone unless `config` says more; yields None for none.

    tqdm itself writes to whatever stands for stderr, even where there is nothing.
    """
    config = dict(config)
    if config.get("disable") is None:
        stream = config.get("file") or sys.stderr
        terminal = stream is not None and not getattr(stream, "closed", False)
        config["disable"] = not (terminal and hasattr(stream, "isatty") and stream.isatty())
    if config["disable"]:
        yield None
        return
    with tqdm(total=rows, **config) as bar:
        yield bar


def _to_host(pictures: Tensor) -> Tensor:
    """Copy pictures to the host, from a GPU through locked memory: ten times as fast."""
    copy = pictures.to("cpu", non_blocking=pictures.is_cuda)
    if pictures.is_cuda:
        torch.cuda.current_stream(pictures.device).synchronize()
    return copy
