"""The sampling loop: one step over static buffers, replayed once a row of a StepTable.

Owns the state (latents and the sampler's slots), the row counter and the guidance sum. A step reads
everything that changes from buffers: row, noise, guidance weight, the embedded schedule, keys and
values. So one captured step serves every prompt, sampler, seed, strength and step count of one
shape. `Loops` keeps captured ones, and captures what runs once a call beside them. Knows no prompt,
no file and no vendor.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastsd.backends import Backend
from fastsd.errors import ArtifactError, NumericsError, OutOfMemory
from fastsd.kernels import sampler_step
from fastsd.samplers import StepTable

log = logging.getLogger("fastsd")

Step = Callable[[], None]
Function = Callable[..., Any]  # of tensors, to a tree of tensors
# (x (B, C, H, W), the row's entry, the fixed tensors) -> the prediction, (B, C, H, W); under
# guidance (2 B, C, H, W), the unconditional half first. Equal ones must compute the same.
Predict = Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor]

GRAPHS = ("step", "loop", "none")
# A captured step has room for any sampler and for this many rows; more rows capture it anew.
CAPTURED_SLOTS = 4
CAPTURED_ROWS = 128
KEPT_FUNCTIONS = 16  # graphs of what runs once a call: some 20 MB each for a picture's texts
# What a capture may end in: torch's for all that CUDA refuses, and what engines raise.
REFUSALS = (RuntimeError, ArtifactError, OutOfMemory)


@dataclass(frozen=True)
class Denoiser:
    """A model bound to a prompt and a schedule: all that does not depend on x, computed once.

    predict: must read nothing that changes but its arguments. rows: (R, …), what it is told at each
    row; x is given to it in their dtype. fixed: what it is told at every row: keys, values, ….
    shallow: predicts, at the rows where `reuse` says so, with less work from what `predict` left at
    the last row that it was asked at; None: `predict` is asked at all.
    """

    predict: Predict
    rows: Tensor
    fixed: tuple[Tensor, ...] = ()
    shallow: Predict | None = None
    reuse: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Known:
    """A picture that is known where it is not to be drawn: masked latents.

    latents, noise: (B, C, H, W), the clean picture and the noise that is added to it at each level.
    mask: (B, 1, H, W) from 0 (keep) to 1 (draw).
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.latents, self.noise, self.mask


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run of a table is given.

    latents: (B, C, H, W) at the level of the table's first row.
    guidance: weight w of (1 - w) * unconditional + w * conditional; None where the model answers
    once.
    rescale: from 0 to 1, how far the guided prediction's spread is brought back to that of the
    conditional one (Lin et al. 2023, arXiv:2305.08891, section 3.4).
    known: laid over x after every row, at the level where the next row finds it.
    finish: makes what is wanted of the final latents, such as a picture, as some tensors; a part of
    the graph where the whole loop is one.
    kernel: what computes the sampler's step, as `fastsd.kernels.dispatch` has it.
    """

    table: StepTable
    denoiser: Denoiser
    latents: Tensor
    guidance: float | None
    rescale: float = 0.0
    known: Known | None = None
    finish: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    kernel: str = "library"

    @property
    def guided(self) -> bool:
        return self.guidance is not None

    @property
    def structure(self) -> Hashable:
        """All that a captured step cannot change: runs that agree in it may share one."""
        return (
            self.denoiser.predict,
            self.denoiser.shallow,
            self.finish,
            self.kernel,
            self.guided,
            self.rescale > 0,
            _layout(self.latents),
            _layout(self.denoiser.rows[0]),
            tuple(map(_layout, self.denoiser.fixed)),
            self.known is not None,
        )


class SamplingLoop:
    """Buffers for the runs of one structure, and the step over them.

    slots, rows: how many of each there is room for. Not for two threads at once.
    """

    def __init__(self, run: Run, *, slots: int, rows: int) -> None:
        latents, entries = run.latents, run.denoiser.rows
        self.rows = rows
        self._structure = run.structure
        # x, the slots, D, the noise: fp32 whatever the model's dtype
        self._sources = latents.new_zeros((1 + slots + 2, *latents.shape), dtype=torch.float32)
        self._row = torch.zeros(1, dtype=torch.int64, device=latents.device)
        self._guidance = latents.new_ones((), dtype=torch.float32)
        self._rescale = latents.new_zeros((), dtype=torch.float32)
        self._coefficients = latents.new_zeros((rows, _columns(slots)), dtype=torch.float32)
        # What the model is told in place of a run's own tensors, which come and go.
        self._denoiser = replace(
            run.denoiser,
            rows=entries.new_zeros((rows, *entries.shape[1:])),
            fixed=tuple(map(torch.zeros_like, run.denoiser.fixed)),
        )
        self._known = run.known and Known(*map(torch.zeros_like, run.known.tensors))
        self._finish, self._kernel = run.finish, run.kernel
        self._finished: tuple[Tensor, ...] = ()
        self._replay: Step | None = None
        self._replay_shallow: Step | None = None
        self._replay_all: Step | None = None
        self._noises: Tensor | None = None  # of every row, where the whole loop is one graph

    @property
    def latents(self) -> Tensor:
        """The latents as they stand, (B, C, H, W) fp32; write to them only between rows."""
        return self._sources[0]

    @property
    def clean(self) -> Tensor:
        """The clean latents that the model saw in the last row, (B, C, H, W) fp32."""
        return self._sources[-2]

    @property
    def size_bytes(self) -> int:
        """What the buffers take."""
        known = self._known.tensors if self._known else ()
        buffers = (self._sources, self._coefficients, self._denoiser.rows, *known)
        noises = () if self._noises is None else (self._noises,)
        return sum(t.nbytes for t in (*buffers, *noises, *self._denoiser.fixed))

    def load(self, run: Run) -> None:
        """Take over a run of the same structure; what the last one left is forgotten."""
        assert run.structure == self._structure and run.table.rows <= self.rows
        self._table = run.table
        self._guided, self._rescaled = run.guided, run.rescale > 0
        self._now, self._as_captured = self._denoiser, True
        self._reuse, self._left = run.denoiser.reuse, False
        self._sources.zero_()
        self._sources[0] = run.latents
        self._row.zero_()
        self._rescale.fill_(run.rescale)
        # Rounded once: c_in, clean (2), A | b | c row by row, known (2).
        packed = torch.from_numpy(_pack(run.table, len(self._sources) - 3).astype(np.float32))
        self._coefficients[: len(packed)] = packed.to(self._coefficients.device)
        if self._known is not None and run.known is not None:
            _copy(self._known.tensors, run.known.tensors)
        self._take(run.denoiser, run.guidance)

    def rebind(self, denoiser: Denoiser | None, guidance: float | None) -> None:
        """Go on with another prompt, None: the same, and guidance weight from the next row on.

        Where they do not fit the buffers, the rest of the run is stepped as it is, uncaptured.
        """
        if denoiser is None:
            assert (guidance is not None) == self._guided
            self._guidance.fill_(1.0 if guidance is None else guidance)
            return
        self._reuse, self._left = denoiser.reuse, False  # what was left is another's
        fits = (guidance is not None) == self._guided and _alike(denoiser, self._denoiser)
        if self._as_captured and fits:
            self._take(denoiser, guidance)
            return
        self._now, self._as_captured = denoiser, False
        self._guided = guidance is not None
        self._guidance.fill_(1.0 if guidance is None else guidance)

    def capture(self, capture: Callable[[Step], Step], *, whole: bool = False) -> None:
        """Replay what `capture` makes of a step, or of all rows and the finish as a whole.

        Capturing may run the step several times: load a run before it and after it.
        """
        if not whole:
            # Where nothing is captured it is the method itself, and to keep that would be a cycle.
            replay = capture(self._step)
            self._replay = None if replay == self._step else replay
            if self._denoiser.shallow is not None:
                replay = capture(self._shallow_step)
                self._replay_shallow = None if replay == self._shallow_step else replay
            return
        self._noises = self._sources.new_zeros((self._table.rows, *self.latents.shape))
        self._replay_all = capture(self._walk)

    def run(self, noise: Callable[[], Tensor], on_row: Callable[[int], bool]) -> tuple[Tensor, ...]:
        """Run every row and return what the run's finish makes, or the latents: (B, C, H, W) fp32.

        noise: draws (B, C, H, W) standard normal numbers; called only at the table's drawing rows.
        on_row: called after each row with its index; answering False ends the run there.
        The results are the loop's own buffers: copy what is to outlive the next run. Nothing has
        waited for the device yet: `check_finite` says whether they are numbers.
        """
        if self._replay_all is not None and self._noises is not None:
            for row in np.flatnonzero(self._table.draws).tolist():
                self._noises[row] = noise()
            self._replay_all()
            on_row(self._table.rows - 1)
        else:
            for row in range(self._table.rows):
                if self._table.draws[row]:
                    self._sources[-1] = noise()
                self._one(row, replays=self._as_captured)
                if not on_row(row):
                    break
            self._end()
        return self._finished

    def _walk(self) -> None:
        """Run all rows over noise that is drawn already, and finish."""
        assert self._noises is not None
        self._row.zero_()
        self._left = False
        for row, noise in enumerate(self._noises):
            self._sources[-1].copy_(noise)
            self._one(row, replays=False)
        self._end()

    def _one(self, row: int, *, replays: bool) -> None:
        """Step, by what was captured if `replays`."""
        reuse = self._left and row < len(self._reuse) and self._reuse[row]
        replay = self._replay_shallow if reuse else self._replay
        if replay is None or not replays:
            replay = self._shallow_step if reuse else self._step
        replay()
        self._left = True

    def _end(self) -> None:
        self._finished = (self.latents,) if self._finish is None else self._finish(self.latents)

    def _step(self) -> None:
        self._evaluate(self._now.predict)

    def _shallow_step(self) -> None:
        assert self._now.shallow is not None, "reuse is of denoisers that have it"
        self._evaluate(self._now.shallow)

    def _evaluate(self, predict: Predict) -> None:
        """One model evaluation and one row of the table; then the counter stands on the next."""
        model = self._now
        coefficient = self._coefficients.index_select(0, self._row)[0]
        x = (self._sources[0] * coefficient[0]).to(model.rows.dtype)
        prediction = predict(x, model.rows.index_select(0, self._row)[0], model.fixed)
        guidance = self._guidance if self._guided else None
        if guidance is not None and self._rescaled:
            unconditional, conditional = prediction.to(self._sources.dtype).chunk(2)
            prediction = unconditional + guidance * (conditional - unconditional)
            prediction = _rescaled(prediction, conditional, self._rescale)
            guidance = None
        sampler_step.sampler_step_(
            self._sources,
            prediction,
            self._coefficients,
            self._row,
            guidance,
            implementation=self._kernel,
        )
        if self._known is not None:
            mask, x = self._known.mask, self._sources[0]
            kept = coefficient[-2] * self._known.latents + coefficient[-1] * self._known.noise
            x.copy_((1 - mask) * kept + mask * x)
        self._row.add_(1)

    def _take(self, denoiser: Denoiser, guidance: float | None) -> None:
        self._guidance.fill_(1.0 if guidance is None else guidance)
        self._denoiser.rows[: len(denoiser.rows)] = denoiser.rows
        _copy(self._denoiser.fixed, denoiser.fixed)


class _Lent(threading.local):
    """to_this_thread: whether it has a kept loop, of whatever pipeline, at the moment."""

    to_this_thread = False

    @contextmanager
    def lending(self) -> Iterator[None]:
        self.to_this_thread = True
        try:
            yield
        finally:
            self.to_this_thread = False


_lent = _Lent()


class Loops:
    """The loops of one backend: a fresh one a run, or where steps are captured, kept ones.

    graph: what is captured: "step"; "loop", all rows and the finish as one, for every row count
    anew, where a run has a finish; or "none". Kept loops are replaced by loops for the same
    structure only when a table has more rows than there is room for; beyond `limit_bytes` the least
    recently used are dropped. With a limit of 0 none but the newest is kept, nor what runs once.
    """

    def __init__(
        self, backend: Backend, *, graph: str = "step", limit_bytes: int = 8 << 30
    ) -> None:
        self.captures = 0  # how many times a step was captured
        self.backend = backend
        self.graph = graph
        self._limit_bytes = limit_bytes
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._functions: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._lock = threading.Lock()
        self._building = threading.Lock()  # one at a time, or each counts the others' memory
        self._failures: dict[str, str] = {}  # what is uncaptured -> why

    def once(self, name: Hashable, function: Function) -> Function:
        """Return `function`, which runs once a call: where steps are captured, so is it.

        It takes tensors on the device and returns a tree of them, reads nothing else that changes,
        and is captured for every layout of its inputs. name: equal ones compute the same.
        """
        if not self._keeps or self._limit_bytes == 0:
            return function

        def call(*inputs: Tensor) -> Any:
            key = (name, *map(_layout, inputs))
            with self._lock:
                kept = self._functions.setdefault(key, _Captured(function))
                self._functions.move_to_end(key)
                while len(self._functions) > KEPT_FUNCTIONS:
                    _, oldest = self._functions.popitem(last=False)
                    oldest.turn.settle()
            return kept(inputs, self._capture_once)

        return call

    def _capture_once(self, step: Step) -> Step | None:
        try:
            return self.backend.capture(step)
        except REFUSALS as error:
            self._fail("what runs once a call", error)
            return None

    @contextmanager
    def take(self, run: Run) -> Iterator[SamplingLoop]:
        """Lend a loop that is loaded with `run`; where one is kept, other threads wait for it.

        From inside a callback a fresh, uncaptured one is lent: two threads that each held a loop
        and waited for the other's would wait for ever.
        """
        if not self._keeps or _lent.to_this_thread:
            loop = SamplingLoop(run, slots=run.table.slots, rows=run.table.rows)
            if not self.backend.captures:
                loop.capture(self.backend.capture)
            loop.load(run)
            yield loop
            return
        kept = self._find(run)
        with kept.turn(run.latents.device), _lent.lending():
            if kept.loop is None or kept.loop.rows < run.table.rows:
                kept.turn.settle()
                kept.loop, kept.size_bytes = None, 0  # its memory goes before the next one's comes
                if self._limit_bytes == 0:
                    self._evict(kept, 0)
                with self._building:
                    kept.loop, kept.size_bytes = self._build(run, kept)
                self._evict(kept, self._limit_bytes)
            kept.loop.load(run)
            yield kept.loop

    def explain(self) -> list[str]:
        """Say what is captured, how large it is, and why what is not is not."""
        if not self._keeps:
            why = (
                "as asked" if self.backend.captures else f"{self.backend.device.type} has no graphs"
            )
            return [f"steps run uncaptured: {why}"]
        with self._lock:
            lines = [
                f"{kept.what}: {kept.size_bytes / 2**20:.0f} MiB" for kept in self._kept.values()
            ]
            graphs = sum(function.captured for function in self._functions.values())
            if graphs:
                lines.insert(0, f"what runs once a call: {graphs} graphs")
        failed = self._failures.items()
        return [*lines, *(f"uncaptured: {what}; capture failed: {why}" for what, why in failed)]

    @property
    def _keeps(self) -> bool:
        return self.backend.captures and self.graph != "none"

    def _find(self, run: Run) -> _Kept:
        whole = self._is_whole(run)
        key = (run.structure, (run.table.rows, run.denoiser.reuse) if whole else None)
        with self._lock:
            if key not in self._kept:
                shape = "x".join(map(str, run.latents.shape))
                guided = "guided" if run.guided else "unguided"
                step = "one step" if run.denoiser.shallow is None else "a step and a shallow one"
                span = f"{run.table.rows} rows and the finish" if whole else step
                self._kept[key] = _Kept(f"latents {shape}, {guided}, {span}")
            self._kept.move_to_end(key)
            return self._kept[key]

    def _is_whole(self, run: Run) -> bool:
        return self.graph == "loop" and run.finish is not None

    def _build(self, run: Run, place: _Kept) -> tuple[SamplingLoop, int]:
        """Make a loop and capture its step; where that fails, say so and leave it uncaptured.

        Where memory runs out, once more without the other loops that nobody uses.
        """
        slots = max(CAPTURED_SLOTS, run.table.slots)
        rows = CAPTURED_ROWS
        while rows < run.table.rows:
            rows *= 2

        def captured() -> SamplingLoop:
            loop = SamplingLoop(run, slots=slots, rows=rows)
            loop.load(run)
            loop.capture(self.backend.capture, whole=self._is_whole(run))
            return loop

        before, loop = self.backend.memory_bytes(), None
        try:
            with suppress(torch.OutOfMemoryError):
                loop = captured()
            if loop is None:  # out of the handler: the error held what there was
                self._make_room(place)
                before = self.backend.memory_bytes()
                loop = captured()
            self.captures += 1
        except REFUSALS as error:
            self._fail("steps", error)
        if loop is None:
            loop = SamplingLoop(run, slots=slots, rows=rows)
        return loop, max(loop.size_bytes, self.backend.memory_bytes() - before)

    def _fail(self, what: str, error: Exception) -> None:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if what not in self._failures:
            log.warning("uncaptured, which is slower: %s; capture failed (%s)", what, reason)
        self._failures[what] = reason

    def _make_room(self, newest: _Kept) -> None:
        """Drop all that nobody uses."""
        self._evict(newest, 0)
        with self._lock:
            for function in self._functions.values():
                function.turn.settle()
            self._functions.clear()

    def _evict(self, newest: _Kept, limit_bytes: int) -> None:
        """Drop loops that nobody uses until all that are left take `limit_bytes` at most."""
        with self._lock:
            for key, kept in list(self._kept.items()):  # the least recently used first
                if sum(k.size_bytes for k in self._kept.values()) <= limit_bytes:
                    break
                if kept is not newest and kept.turn.owner is None:
                    kept.turn.settle()
                    del self._kept[key]


@final
class _Turn:
    """Lets one thread at a time use some buffers, its stream after that of the thread before."""

    def __init__(self) -> None:
        self.owner: int | None = None  # the thread whose turn it is
        self._lock = threading.Lock()
        self._done: torch.Event | None = None

    @contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        with self._lock:
            stream = None if device.type == "cpu" else torch.accelerator.current_stream(device)
            if stream is not None and self._done is not None:
                stream.wait_event(self._done)
            self.owner = threading.get_ident()
            try:
                yield
            finally:
                if stream is not None:
                    self._done = stream.record_event()
                self.owner = None

    def settle(self) -> None:
        """Wait until the device is done with the buffers: other streams may get their memory."""
        if self._done is not None:
            self._done.synchronize()


class _Kept:
    """A place for one structure's loop."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.turn = _Turn()
        self.loop: SamplingLoop | None = None
        self.size_bytes = 0


@final
class _Captured:
    """A function of tensors over buffers of its own, captured when it is first called; where that
    fails, the function as it is."""

    def __init__(self, function: Function) -> None:
        self.turn = _Turn()
        self._function = function
        self._tried = False
        self._replay: Step | None = None

    @property
    def captured(self) -> bool:
        return self._replay is not None

    def __call__(self, inputs: tuple[Tensor, ...], capture: Callable[[Step], Step | None]) -> Any:
        """Return what the function makes of the inputs. capture: answers None if it cannot."""
        if self._tried and self._replay is None:
            return self._function(*inputs)
        with self.turn(inputs[0].device):
            if not self._tried:
                self._inputs = tuple(each.clone() for each in inputs)
                self._replay = capture(self._run)
                self._tried = True
            if self._replay is None:
                return self._function(*inputs)
            _copy(self._inputs, inputs)
            self._replay()
            return tree_map_only(Tensor, torch.clone, self._outputs)

    def _run(self) -> None:
        self._outputs = self._function(*self._inputs)


def _layout(x: Tensor) -> Hashable:
    return tuple(x.shape), x.dtype, x.device


def _alike(a: Denoiser, b: Denoiser) -> bool:
    return (
        (a.predict, a.shallow) == (b.predict, b.shallow)
        and _layout(a.rows[0]) == _layout(b.rows[0])
        and [*map(_layout, a.fixed)] == [*map(_layout, b.fixed)]
    )


def _copy(ours: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, given, strict=True):
        a.copy_(b)


def _columns(slots: int) -> int:
    """How many numbers a row has: the sampler's step's, and known (2)."""
    return sampler_step.columns(slots) + 2


def _pack(table: StepTable, slots: int) -> np.ndarray:
    """Lay a table's columns side by side, for a state of `slots` slots: (R, columns)."""
    R, used, K = table.rows, 1 + table.slots, 1 + slots
    mixing = np.zeros((R, K, K + 2))
    mixing[:, :used, :used] = table.A
    mixing[:, :used, K] = table.b
    mixing[:, :used, K + 1] = table.c
    return np.concatenate(
        [table.c_in[:, None], table.clean, mixing.reshape(R, -1), table.known], axis=1
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


# What torch's plain RuntimeErrors say: the CPU's allocator, and sizes that no address reaches.
_OUT_OF_MEMORY = ("allocate memory", "Storage size calculation overflowed")


@contextmanager
def explained_memory_errors(what: str) -> Iterator[None]:
    """Turn the several ways of running out of memory into OutOfMemory, with advice."""
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, RuntimeError) as error:  # numpy's and Pillow's; torch's
        told = str(error) or type(error).__name__
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(words in told for words in _OUT_OF_MEMORY):
            raise
        reason = told.splitlines()[0]
    else:
        return
    raise OutOfMemory(
        f"not enough memory for {what}; use a smaller size, fewer pictures at once, "
        f"or a lower precision ({reason})"
    )
