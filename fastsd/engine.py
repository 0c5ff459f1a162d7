"""The sampling loop: one step over static buffers, replayed once a row of a StepTable.

Owns the state (latents and the sampler's slots), the row counter and the guidance sum. A step reads
everything that changes (row, noise, guidance weight) from buffers, so that one captured step serves
every sampler, seed, strength and step count. Knows no prompt, no file and no vendor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsd.errors import NumericsError, OutOfMemory
from fastsd.samplers import StepTable

# (x (B, C, H, W), row (1,) int64) -> the prediction, (B, C, H, W); under guidance (2 B, C, H, W),
# the unconditional half first.
Denoiser = Callable[[Tensor, Tensor], Tensor]
Capture = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass(frozen=True)
class Known:
    """A picture that is known where it is not to be drawn: masked latents.

    latents, noise: (B, C, H, W), the clean picture and the noise that is added to it at each level.
    mask: (B, 1, H, W) from 0 (keep) to 1 (draw).
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor


class SamplingLoop:
    """One run of a table over a batch of latents. Not shared: every call makes its own.

    latents: (B, C, H, W) at the level of the table's first row; kept in fp32 whatever the model's
    dtype.
    guidance: weight w of (1 - w) * unconditional + w * conditional; None where the model answers
    once.
    rescale: from 0 to 1, how far the guided prediction's spread is brought back to that of the
    conditional one (Lin et al. 2023, arXiv:2305.08891, section 3.4).
    known: laid over x after every row, at the level where the next row finds it.
    """

    def __init__(
        self,
        table: StepTable,
        denoise: Denoiser,
        latents: Tensor,
        *,
        guidance: float | None,
        rescale: float = 0.0,
        known: Known | None = None,
        capture: Capture = lambda step: step,
    ) -> None:
        device = latents.device
        self.table = table
        self.denoise = denoise
        self.guided = guidance is not None
        self._state = torch.zeros((1 + table.slots, *latents.shape), device=device)
        self._state[0] = latents
        self._next = torch.zeros_like(self._state)
        self._noise = torch.zeros_like(self._state[0])
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._guidance = torch.tensor(1.0 if guidance is None else guidance, device=device)
        self._rescale = torch.tensor(rescale, device=device) if rescale else None
        self._known = known
        # One row of coefficients, rounded once: c_in, clean (2), A, b, c row by row, known (2).
        self._coefficients = torch.from_numpy(_pack(table).astype(np.float32)).to(device)
        self._terms = _Terms.of(table)
        self._capture = capture

    @property
    def latents(self) -> Tensor:
        """The latents as they stand, (B, C, H, W) fp32; write to them only between rows."""
        return self._state[0]

    def set_guidance(self, guidance: float | None) -> None:
        """Change the guidance weight from the next row on."""
        self.guided = guidance is not None
        if guidance is not None:
            self._guidance.fill_(guidance)

    def run(self, noise: Callable[[], Tensor], on_row: Callable[[int], bool]) -> Tensor:
        """Run every row and return the final latents, (B, C, H, W) fp32.

        noise: draws (B, C, H, W) standard normal numbers; called only at the table's drawing rows.
        on_row: called after each row with its index; answering False ends the run there.
        Raises NumericsError if the result is not finite.
        """
        step = self._capture(self._step)
        for row in range(self.table.rows):
            if self.table.draws[row]:
                self._noise.copy_(noise())
            step()
            if not on_row(row):
                break
        check_finite(self.latents, "the latents")
        return self.latents

    def _step(self) -> None:
        """[x, s1..s4]' = A . [x, s1..s4] + b * D + c * noise, with D the clean picture predicted at
        x.

        Products and sums are separate operations, each rounded alone: an element's value then
        cannot depend on where it stands in the batch.
        """
        coefficient = self._coefficients.index_select(0, self._row)[0]
        x = self._state[0]
        prediction = self.denoise(x * coefficient[0], self._row).to(x.dtype)
        if self.guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + self._guidance * (conditional - unconditional)
            if self._rescale is not None:
                prediction = _rescaled(prediction, conditional, self._rescale)
        clean = coefficient[1] * x + coefficient[2] * prediction
        sources = (*self._state, clean, self._noise)
        for slot, terms in enumerate(self._terms.by_slot):
            total = torch.zeros_like(x) if not terms else None
            for source, column in terms:
                product = coefficient[column] * sources[source]
                total = product if total is None else total + product
            assert total is not None
            self._next[slot].copy_(total)
        if self._known is not None:
            mask, x = self._known.mask, self._next[0]
            kept = coefficient[-2] * self._known.latents + coefficient[-1] * self._known.noise
            x.copy_((1 - mask) * kept + mask * x)
        self._state.copy_(self._next)
        self._row.add_(1)


class _Terms:
    """Which entries of A, b and c any row uses, so that a step skips the ones that are always
    zero."""

    def __init__(self, by_slot: list[list[tuple[int, int]]]) -> None:
        self.by_slot = by_slot  # for each slot: (index of the source, column of the coefficient)

    @classmethod
    def of(cls, table: StepTable) -> _Terms:
        width = 1 + table.slots  # the state; after it come D and the noise
        used = (_mixing(table) != 0).any(axis=0)
        return cls(
            [
                [
                    (source, 3 + slot * (width + 2) + source)
                    for source in range(width + 2)
                    if used[slot, source]
                ]
                for slot in range(width)
            ]
        )


def _mixing(table: StepTable) -> np.ndarray:
    """Stack A | b | c: (R, 1 + S, 1 + S + 2)."""
    return np.concatenate([table.A, table.b[:, :, None], table.c[:, :, None]], axis=2)


def _pack(table: StepTable) -> np.ndarray:
    """Lay a table's columns side by side: (R, 3 + (1 + S) * (1 + S + 2) + 2)."""
    rows = table.rows
    return np.concatenate(
        [table.c_in[:, None], table.clean, _mixing(table).reshape(rows, -1), table.known], axis=1
    )


def _rescaled(guided: Tensor, conditional: Tensor, weight: Tensor) -> Tensor:
    """Bring each picture's spread in `guided` towards its spread in `conditional`.

    One picture at a time: torch sums a batch in another order, and its bits would depend on it.
    """
    ratios = [c.std() / g.std() for g, c in zip(guided, conditional, strict=True)]
    ratio = torch.stack(ratios).reshape(-1, 1, 1, 1)
    return weight * (ratio * guided) + (1 - weight) * guided


def check_finite(x: Tensor, what: str) -> None:
    """Raise NumericsError if `x` holds NaN or infinity: never return a black picture."""
    if not bool(torch.isfinite(x).all()):
        raise NumericsError(
            f"{what} became NaN or infinite; try precision='fp32', a lower guidance_scale, "
            "or check the weights with `fastsd inspect`"
        )


@contextmanager
def explained_memory_errors(what: str) -> Iterator[None]:
    """Turn torch's several ways of running out of memory into OutOfMemory, with advice."""
    try:
        yield
    except (
        RuntimeError
    ) as error:  # torch.OutOfMemoryError is one; the CPU allocator raises a bare one
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        reason = str(error).splitlines()[0]
    else:
        return
    raise OutOfMemory(
        f"not enough memory for {what}; use a smaller size, fewer pictures at once, "
        f"or a lower precision ({reason})"
    )
