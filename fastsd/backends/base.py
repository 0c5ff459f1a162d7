"""The contract between the engine and whatever runs a model's parts.

A part is a callable over torch tensors on the backend's device:

    text_encoder, text_encoder_2   (input_ids (B, N) int64[, learned (V, D)]) -> CLIPOutput
                   learned: vectors of ids beyond the vocabulary, where a prompt has any
    text_encoder_norm, text_encoder_2_norm   (hidden (B, N, D)) -> (B, N, D), the final norm alone
                   where a prompt is read from an earlier layer (clip_skip)
    unet_time      (timesteps (S,), pooled, size_ids, guidance) -> rows (S, B or 1, E)
                   once a schedule
    unet_context   (encoder_hidden_states (B, N, C)) -> kv, passed on as it is; once a prompt
    unet           (x (B, C, H, W), row (B or 1, E), kv) -> prediction (B, C, H, W)
                   every step; under guidance x has half the batch of kv and of the prediction:
                   the part repeats it where the two rows first differ
    unet_deep, unet_shallow   (x, row, kv) -> (prediction, deep); (x, row, kv, deep) -> prediction
                   where steps may reuse what the deeper layers made at an earlier one
    vae_decoder    (z (B, C, h, w)) -> picture (B, 3, H, W) in [-1, 1]
    vae_encoder    (picture (B, 3, H, W)) -> moments (B, 2 C, h, w)

A backend that runs a checkpoint is a `Backend`; one that runs an exported engine is an
`ArtifactBackend`, which maps the contract to the two layouts of graphs, so that a vendor's file
only runs a graph. Knows nothing of prompts, samplers or the loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsd.artifact import AGAIN, Artifact, PartEntry
from fastsd.checkpoints.weights import PRECISIONS
from fastsd.config import ModelConfig
from fastsd.errors import DamagedArtifact, UsageError
from fastsd.models.clip import CLIPOutput
from fastsd.models.layers import sinusoid, widen

# Where its weights visit the device it has `staying`, a context that keeps them there for calls.
Part = Callable[..., Any]


class Backend(ABC):
    """Runs the parts of one checkpoint at one precision on one device.

    No part changes its weights, so every part may be called from many threads at once. Who changes
    them through `weights` sees to it that no part runs meanwhile (fastsd.adapters).
    """

    name: str
    precision: str
    device: torch.device
    dtype: torch.dtype  # of the UNet's and the text encoders' inputs

    _parts: dict[str, Part]

    def part(self, name: str) -> Part:
        """Return the part called `name`. Sizes that an engine fixed are checked when it runs.

        Raises UsageError if the model has no such part.
        """
        try:
            return self._parts[name]
        except KeyError:
            raise UsageError(
                f"this model has no part {name!r}; it has {', '.join(self._parts)}"
            ) from None

    @property
    def captures(self) -> bool:
        """Whether `capture` returns a recording, a CUDA graph, that later calls can replay."""
        return False

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return a callable that repeats `step` on the same buffers; by default `step` itself.

        Where `captures`, it replays what `step` did when it was captured: the same work on the
        same addresses, whatever Python would do by now. Raises RuntimeError if it cannot.
        """
        return step

    def memory_bytes(self) -> int:
        """How much of the device's memory is taken; 0 where that is not known."""
        return 0

    def weights(self, part: str) -> Mapping[str, torch.Tensor]:
        """Return the live weights of a checkpoint's part by name, to be changed in place.

        Raises UsageError where they cannot be, as in engines that were compiled with them.
        """
        raise UsageError(
            f"the {self.name} backend's weights are fixed when it is built, the {part}'s too: use "
            "backend='eager', or build an engine that has the LoRA inside with `fastsd export "
            "MODEL --lora FILE:WEIGHT`"
        )

    def unrounded(self, part: str) -> Mapping[str, torch.Tensor]:
        """Return as the checkpoint has them those of `weights` that are kept coarser, on the host.

        What changes such a weight starts from these: steps of a coarse one swallow small changes.
        """
        return {}

    def changed(self, part: str) -> None:  # noqa: B027  (not abstract: most make nothing of them)
        """Make anew, in place, what was made of a part's `weights`, which were written to."""

    def use(self, op: str, implementation: str) -> None:
        """Compute an op of fastsd.kernels otherwise from now on. Not while a call runs."""
        raise UsageError(
            f"the {self.name} backend's kernels were chosen when it was built; use 'eager' for "
            f"{op}={implementation!r}"
        )

    def put_in_fp8(self, draw: Callable[[], None]) -> None:
        """Round the layers that are worth it to fp8, by their inputs' ranges while `draw` runs."""
        raise UsageError(f"the {self.name} backend has no weights='fp8'; use backend='eager'")

    def explain(self) -> list[str]:
        """Say what runs, a line a fact."""
        return [f"backend: {self.name}, {self.precision}, on {self.device}"]

    def close(self) -> None:  # noqa: B027  (not abstract: most backends hold nothing to release)
        """Release what garbage collection would not."""


def dtype_of(precision: str, supported: tuple[str, ...], backend: str) -> torch.dtype:
    """Translate a precision's name, refusing what `backend` cannot do."""
    if precision not in supported:
        raise UsageError(
            f"precision {precision!r} is not one that the {backend} backend has; "
            f"give one of {', '.join(supported)}"
        )
    return PRECISIONS[precision]


class ArtifactBackend(Backend):
    """Runs the graphs of an exported engine.

    Of the `fast` layout the graphs are the contract's own parts. Of the `standard` layout (the
    names other tools expect) the UNet takes everything every step: its row is then
    [timestep | pooled | size ids | embedded guidance], its kv the text itself.
    Graphs of a fixed batch take any number of pictures, so many at a time, the last ones padded.
    native: its files are machine code, which only trusted artifacts may bring.
    """

    native = False

    def __init__(self, artifact: Artifact, config: ModelConfig, *, device: torch.device) -> None:
        self.artifact = artifact
        self.config = config
        self.device = device
        self.precision = artifact.manifest.precision
        self.entries = artifact.manifest.parts
        _check_engine(artifact, config)
        self.dtype = _dtype_of(self.entries["unet"], "sample")
        standard = artifact.manifest.layout == "standard"
        parts: dict[str, Part] = {
            **{
                name: partial(self._encode, name)
                for name in self.entries
                if name.startswith("text_encoder")
            },
            **{
                f"{name}_norm": lambda hidden: hidden  # of the graph itself
                for name in self.entries
                if name.startswith("text_encoder")
            },
            "unet_time": self._pack_rows if standard else self._time,
            "unet_context": (lambda context: context) if standard else self._context,
            "unet": self._unet_standard if standard else self._unet_fast,
        }
        if "vae_decoder" in self.entries:
            parts["vae_decoder"] = partial(self._only, "vae_decoder", "latent_sample")
        if "vae_encoder" in self.entries:
            parts["vae_encoder"] = partial(self._only, "vae_encoder", "sample")
        self._parts = parts

    @classmethod
    def machine(cls, device: torch.device) -> dict[str, str]:
        """Return what native code depends on: versions and processor; {} for portable graphs."""
        return {}

    @abstractmethod
    def run(self, part: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph once.

        inputs: every input of the part, of the dtypes and fixed sizes in its entry, contiguous, on
        the backend's device. Returns its outputs by name; they belong to the caller.
        """

    def explain(self) -> list[str]:
        """Say what runs, and what its exporter chose."""
        choices = self.artifact.manifest.choices
        return [*super().explain(), *(f"{what}: {choice}" for what, choice in choices.items())]

    # --- the contract's parts -------------------------------------------------------------------

    def _encode(self, part: str, input_ids: Tensor, vectors: Tensor | None = None) -> CLIPOutput:
        if vectors is not None:
            raise UsageError(
                f"{self.artifact.path} cannot be taught words (textual inversion): its graphs are "
                "fixed; use the checkpoint itself"
            )
        out = self._run(part, {"input_ids": input_ids})
        # Through the norm already. Where the UNet reads the last layer, a graph of the standard
        # layout gives no other: clip_skip finds none.
        hidden = [out[name] for name in out if name.startswith("hidden_states.")]
        last = out["last_hidden_state"]
        embeds = out.get("text_embeds")
        pooled = out["pooler_output"] if embeds is None else embeds
        return CLIPOutput(last, tuple(hidden), pooled, embeds)

    def _pack_rows(
        self,
        timesteps: Tensor,
        pooled: Tensor | None,
        size_ids: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """Lay side by side what the standard UNet is told at every step: (S, B or 1, E), fp32."""
        conditions = [
            *(part for part in (pooled, size_ids) if part is not None),
            *(
                [sinusoid(1000 * guidance, self.config.unet.guidance_width, shift=1.0)]
                if guidance is not None
                else []
            ),
        ]
        batch = max((len(part) for part in conditions), default=1)
        steps = len(timesteps)
        return torch.cat(
            [
                timesteps.float()[:, None, None].expand(steps, batch, 1),
                *(part.float().expand(steps, *part.shape) for part in conditions),
            ],
            dim=-1,
        )

    def _unet_standard(self, x: Tensor, row: Tensor, context: Tensor) -> Tensor:
        unet = self.config.unet
        x = widen(x, len(context))
        row = row.expand(len(x), -1)
        t, *conditions = torch.split(
            row, [1, unet.pooled_width, unet.size_ids, unet.guidance_width], dim=-1
        )
        names = ("text_embeds", "time_ids", "timestep_cond")
        inputs = {
            "sample": x,
            "timestep": self._timestep(t[0]),
            "encoder_hidden_states": context,
            **{n: c for n, c in zip(names, conditions, strict=True) if c.shape[-1]},
        }
        return self._run("unet", inputs)["out_sample"]

    def _timestep(self, t: Tensor) -> Tensor:
        """Give the timestep (1,) the shape the graph wants; whole numbers must lose nothing."""
        (spec,) = (s for s in self.entries["unet"].inputs if s.name == "timestep")
        if spec.dtype == "int64" and bool((t != t.round()).any()):
            raise UsageError(
                f"{self.artifact.path} takes whole timesteps, and this sampler walks through "
                f"{float(t):g}; choose one that does not (ddim, euler without Karras), or export "
                "again with --layout fast"
            )
        return t.reshape(spec.shape)  # type: ignore[arg-type]  # () or (1,)

    def _time(
        self,
        timesteps: Tensor,
        pooled: Tensor | None,
        size_ids: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        given = {"pooled": pooled, "size_ids": size_ids, "guidance": guidance}
        conditions = {name: t for name, t in given.items() if t is not None}
        rows = self._run("unet_time", {"timesteps": timesteps, **conditions}, batch_axis=1)["rows"]
        return rows

    def _context(self, encoder_hidden_states: Tensor) -> dict[str, Tensor]:
        return self._run("unet_context", {"encoder_hidden_states": encoder_hidden_states})

    def _unet_fast(self, x: Tensor, row: Tensor, kv: dict[str, Tensor]) -> Tensor:
        x = widen(x, len(next(iter(kv.values()))))
        inputs = {"sample": x, "row": row.expand(len(x), -1), **kv}
        return self._run("unet", inputs)["out_sample"]

    def _only(self, part: str, name: str, x: Tensor) -> Tensor:
        (out,) = self._run(part, {name: x}).values()
        return out

    # --- dtypes, sizes, fixed batches -----------------------------------------------------------

    def _run(self, part: str, inputs: dict[str, Tensor], batch_axis: int = 0) -> dict[str, Tensor]:
        """Run a part on any number of rows. batch_axis: where the outputs have them."""
        entry = self.entries[part]
        if lacking := {spec.name for spec in entry.inputs} - set(inputs):
            raise DamagedArtifact(
                f"{part} of {self.artifact.path} takes {', '.join(sorted(lacking))}, which is no "
                f"input of such a model's; {AGAIN}"
            )
        inputs = {
            spec.name: inputs[spec.name].to(self.device, getattr(torch, spec.dtype))
            for spec in entry.inputs
        }
        fixed = _fixed_rows(entry)
        rows = max((len(t) for n, t in inputs.items() if n not in SHARED), default=1)
        self._check_sizes(part, entry, inputs)
        if fixed is None or rows == fixed:
            return self.run(part, {name: t.contiguous() for name, t in inputs.items()})
        outputs: list[dict[str, Tensor]] = []
        for start in range(0, rows, fixed):
            index = torch.arange(start, start + fixed, device=self.device).clamp(max=rows - 1)
            chunk = {
                name: (t if name in SHARED else t.index_select(0, index)).contiguous()
                for name, t in inputs.items()
            }
            outputs.append(self.run(part, chunk))
        return {
            name: torch.cat([out[name] for out in outputs], batch_axis).narrow(batch_axis, 0, rows)
            for name in outputs[0]
        }

    def _check_sizes(self, part: str, entry: PartEntry, inputs: Mapping[str, Tensor]) -> None:
        """Raise UsageError for a size that the graph fixed to another."""
        for spec in entry.inputs:
            given = tuple(inputs[spec.name].shape)
            first = 0 if spec.name in SHARED else 1  # rows are cut to fit
            wrong = len(given) != len(spec.shape) or any(
                isinstance(fixed, int) and fixed != size
                for fixed, size in zip(spec.shape[first:], given[first:], strict=True)
            )
            if wrong and spec.name == "encoder_hidden_states":
                raise UsageError(
                    f"{self.artifact.path} reads texts of {spec.shape[1]} tokens, not "
                    f"{given[1]}; shorten the prompt, pass prompt_syntax='plain' to cut it, "
                    "export to ONNX or OpenVINO with --dynamic, which read any length, or draw "
                    "with the model itself (backend='eager')"
                )
            if wrong:
                raise UsageError(
                    f"{part} of {self.artifact.path} takes {spec.name} of shape {spec.shape}, not "
                    f"{given}; it was exported for pictures of {_size(self.artifact)} and prompts "
                    "of one chunk: ask for those, export again with --size (or --dynamic, which "
                    "ONNX and OpenVINO have), or draw with the model itself (backend='eager')"
                )


def _check_engine(artifact: Artifact, config: ModelConfig) -> None:
    """Raise DamagedArtifact for a manifest without what its layout is made of."""
    manifest = artifact.manifest
    fixed = {"standard": ("timestep",), "fast": ("row",)}
    if manifest.precision not in (*PRECISIONS, "int8", "fp8") or manifest.layout not in fixed:
        raise DamagedArtifact(
            f"{artifact.path} has precision {manifest.precision!r} and layout "
            f"{manifest.layout!r}, which no exporter writes; {AGAIN}"
        )
    parts: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        **{part: (("input_ids",), ("last_hidden_state",)) for part in config.text_parts},
        "unet": (("sample", *fixed[manifest.layout]), ("out_sample",)),
    }
    if manifest.layout == "fast":
        parts["unet_time"] = (("timesteps",), ("rows",))
        parts["unet_context"] = (("encoder_hidden_states",), ())
    for part, (inputs, outputs) in parts.items():
        entry = manifest.parts.get(part)
        takes, makes = _names(entry) if entry else (set(), set())
        if entry is None or not ({*inputs} <= takes and {*outputs} <= makes):
            raise DamagedArtifact(
                f"{artifact.path} must have a part {part} that makes "
                f"{' and '.join(outputs) or 'something'} of {' and '.join(inputs)}, and has none; "
                f"{AGAIN}"
            )
    if manifest.layout == "fast":  # what a text becomes is layer by layer, or all as one
        (_, made), (read, _) = (_names(manifest.parts[part]) for part in ("unet_context", "unet"))
        if not made or not made <= read:
            raise DamagedArtifact(
                f"{artifact.path} makes {' and '.join(sorted(made)) or 'nothing'} of a text, which "
                f"its unet does not read; {AGAIN}"
            )
    for part, entry in manifest.parts.items():
        for spec in (*entry.inputs, *entry.outputs):
            if not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
                raise DamagedArtifact(
                    f"{part} of {artifact.path} has {spec.name} of dtype {spec.dtype!r}, which "
                    f"torch does not know; {AGAIN}"
                )


def _names(entry: PartEntry) -> tuple[set[str], set[str]]:
    return {spec.name for spec in entry.inputs}, {spec.name for spec in entry.outputs}


# Inputs that have no rows: the same for every picture.
SHARED = ("timestep", "timesteps")


def _fixed_rows(entry: PartEntry) -> int | None:
    """Return how many rows the part takes at once; None if any."""
    rows = [spec.shape[0] for spec in entry.inputs if spec.name not in SHARED]
    return rows[0] if rows and isinstance(rows[0], int) else None


def _size(artifact: Artifact) -> str:
    height, width = artifact.manifest.size
    return f"{width}x{height} pixels"


def _dtype_of(entry: PartEntry, name: str) -> torch.dtype:
    (spec,) = (spec for spec in entry.inputs if spec.name == name)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype
