"""LoRAs over a backend's live weights: put on in place, mixed, and taken off to the last bit.

The weights that an adapter touches are kept once as they were, and every change is computed from
those: W = W0 + sum of weight_i * scale_i * up_i @ down_i, in fp32, rounded once. So the result does
not depend on what was on before, and none on is W0 itself. Buffers stay where they are: whatever
holds them, a captured graph too, sees the new numbers. Of weights that are kept in int8, W0 in that
sum is the checkpoint's. Knows no file and no foreign layout's names.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsd.backends import Backend
from fastsd.checkpoints.lora import LoRA, Target, merge_
from fastsd.errors import UsageError


class _Held(threading.local):
    """count: how many locks, of whatever pipelines, this thread has for using weights."""

    count = 0


_held = _Held()


class SharedLock:
    """Many may use the weights at once, or one may change them.

    Who waits to change goes before new users; a thread that uses them already may use them again.
    Only in the process that made it: after a fork, torch's threads and the locks that others held
    are gone, and who waited for them would wait for ever.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._condition = threading.Condition()
        self._users: Counter[int] = Counter()  # by thread
        self._changers = 0
        self._changing = False

    @contextmanager
    def shared(
        self, fit: Callable[[], bool] = lambda: True, change: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Use the weights: they stay as they are until the end of the block.

        change: called before, as by `exclusive`, where they do not `fit`.
        """
        self._check_process()
        thread = threading.get_ident()
        with self._condition:
            self._condition.wait_for(lambda: self._users[thread] or not self._changers)
            used = fit()
            self._users[thread] += used
        if not used:
            with self.exclusive():
                change()
                with self._condition:  # before the next who waits to change
                    self._users[thread] += 1
        _held.count += 1
        try:
            yield
        finally:
            _held.count -= 1
            with self._condition:
                self._users[thread] -= 1
                self._condition.notify_all()

    @property
    def used_here(self) -> bool:
        """Whether this thread uses the weights, as a callback does."""
        return self._users[threading.get_ident()] > 0

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Change the weights, once all who use them are done.

        Raises UsageError in a thread that uses some, of another pipeline too: two such threads
        could wait for each other.
        """
        self._check_process()
        if _held.count:
            raise UsageError(
                "adapters cannot be changed from inside a call, e.g. by its callback, neither a "
                "call's own nor all; change them between calls"
            )
        with self._condition:
            self._changers += 1
            try:
                self._condition.wait_for(lambda: not self._changing and not self._users.total())
            except BaseException:  # interrupted by the user: others need not wait for it
                self._changers -= 1
                self._condition.notify_all()
                raise
            self._changing = True
        try:
            yield
        finally:
            with self._condition:
                self._changers -= 1
                self._changing = False
                self._condition.notify_all()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise UsageError(
                "a Pipeline does not survive a fork; load it in each process with from_pretrained, "
                "or start processes with multiprocessing's 'spawn'"
            )


class Adapters:
    """The LoRAs of one pipeline, by name: which are loaded, which are on and how strongly.

    active: name -> weight of those that are on, for calls that ask for no others.
    backend: whose weights they change; replaced in `rebound` only. on_host: keep the weights as
    they were in the host's memory, not on their device.
    """

    def __init__(self, backend: Backend, *, on_host: bool = False) -> None:
        self._lock = SharedLock()
        self.backend = backend
        self.loaded: dict[str, LoRA] = {}
        self.active: dict[str, float] = {}
        self._merged: dict[str, float] = {}  # what is in the weights, of the last call or change
        self._merged_at: torch.Event | None = None
        self._originals: dict[Target, Tensor] = {}
        self._unrounded: dict[Target, Tensor] = {}  # of originals that are kept coarser than W0
        self._on_host = on_host

    @contextmanager
    def in_use(self, asked: Mapping[str, float] | None) -> Iterator[list[tuple[str, float]]]:
        """Hold the weights as they are with the adapters that are `asked` for.

        None: with `active`, or inside another call with that one's. Yields the title and the weight
        of each. Raises UsageError for a name that is not loaded.
        """

        def wanted() -> Mapping[str, float]:
            self._known({} if asked is None else asked)
            if asked is not None:
                return asked
            return self._merged if self._lock.used_here else self.active

        with self._lock.shared(
            lambda: [*self._merged.items()] == [*wanted().items()],  # their order rounds the sum
            lambda: self._merge(dict(wanted()), self.loaded),
        ):
            if self._merged_at is not None:  # on another thread's stream, maybe
                torch.accelerator.current_stream(self.backend.device).wait_event(self._merged_at)
            yield [(self.loaded[name].title, weight) for name, weight in self._merged.items()]

    def load(self, name: str | None, lora: LoRA) -> None:
        """Add an adapter and turn it alone on, at weight 1, as diffusers does.

        name: None takes the first free of diffusers' default_0, default_1, …
        """
        with self._lock.exclusive():
            if name in self.loaded:
                raise UsageError(f"an adapter {name!r} is loaded already; choose another name")
            name = name or next(
                free for i in itertools.count() if (free := f"default_{i}") not in self.loaded
            )
            self._turn_on({name: 1.0}, self.loaded | {name: lora})

    def set(self, active: Mapping[str, float]) -> None:
        """Turn exactly these on. Raises UsageError for a name that is not loaded."""
        with self._lock.exclusive():
            self._known(active)
            self._turn_on(dict(active), self.loaded)

    def set_all(self, weight: float) -> None:
        """Turn every loaded adapter on."""
        with self._lock.exclusive():
            self._turn_on(dict.fromkeys(self.loaded, weight), self.loaded)

    def drop(self, names: list[str] | None) -> None:
        """Forget adapters, None for all; the others keep their weights."""
        with self._lock.exclusive():
            names = list(self.loaded) if names is None else names
            self._known(names)
            kept = {name: lora for name, lora in self.loaded.items() if name not in names}
            active = {name: weight for name, weight in self.active.items() if name in kept}
            self._turn_on(active, kept)
            if not kept:
                self._forget()

    def by_part(self) -> dict[str, list[str]]:
        """Return part -> the loaded adapters that change it."""
        parts: dict[str, list[str]] = {}
        for name, lora in self.loaded.items():
            for part in dict.fromkeys(part for part, _ in lora.deltas):
                parts.setdefault(part, []).append(name)
        return parts

    @contextmanager
    def rebound(self) -> Iterator[None]:
        """Let the caller replace the backend, while all else waits."""
        with self._lock.exclusive():
            before = self.backend
            yield
            if self.backend is not before:
                self._forget()
                self._merged, active, self.active = {}, self.active, {}  # until they are on there
                self._turn_on(active, self.loaded)

    def _known(self, names: Mapping[str, float] | list[str]) -> None:
        for name in names:
            if name not in self.loaded:
                raise UsageError(
                    f"no adapter {name!r} is loaded; there are {', '.join(self.loaded) or 'none'}"
                )

    def _forget(self) -> None:
        self._originals.clear()
        self._unrounded.clear()

    def _turn_on(self, active: dict[str, float], loaded: dict[str, LoRA]) -> None:
        self._merge(active, loaded)
        self.active = active

    def _merge(self, merged: dict[str, float], loaded: dict[str, LoRA]) -> None:
        """Give every touched weight its new value; if that fails, all get their old ones back."""
        backend = self.backend
        before = [self.loaded[name] for name in self._merged]
        after = [loaded[name] for name in merged]
        targets = dict.fromkeys(t for lora in (*before, *after) for t in lora.deltas)
        live = {part: backend.weights(part) for part in {part for part, _ in targets}}
        new = [target for target in targets if target not in self._originals]
        unrounded = {part: backend.unrounded(part) for part in {part for part, _ in new}}
        done = False
        try:
            for part, name in new:
                copy = live[part][name].clone()
                self._originals[part, name] = copy.to("cpu") if self._on_host else copy
                if name in unrounded[part]:
                    self._unrounded[part, name] = unrounded[part][name]
            for target in targets:
                self._write(target, live[target[0]][target[1]], merged, loaded)
            done = True
        finally:
            for target in targets if not done else ():
                if target in self._originals:
                    self._write(target, live[target[0]][target[1]], self._merged, self.loaded)
            for target in new if not done else ():
                self._originals.pop(target, None)
                self._unrounded.pop(target, None)
            for part in live:
                backend.changed(part)
            if backend.device.type != "cpu":
                stream = torch.accelerator.current_stream(backend.device)
                self._merged_at = stream.record_event()
        self._merged, self.loaded = merged, loaded

    @torch.no_grad()
    def _write(
        self, target: Target, weight: Tensor, merged: dict[str, float], loaded: dict[str, LoRA]
    ) -> None:
        original = self._originals[target]
        deltas = [
            (loaded[name].deltas[target], strength)
            for name, strength in merged.items()
            if strength and target in loaded[name].deltas
        ]
        if deltas:
            merge_(weight, self._unrounded.get(target, original), deltas)
        else:
            weight.copy_(original)
