"""LoRAs over a backend's live weights: put on in place, mixed, and taken off to the last bit.

The weights that an adapter touches are kept once as they were, and every change is computed from
those: W = W0 + sum of weight_i * scale_i * up_i @ down_i, in fp32, rounded once. So the result does
not depend on what was on before, and none on is W0 itself. Buffers stay where they are: whatever
holds them, a captured graph too, sees the new numbers. Of weights that are kept in int8, W0 in that
sum is the checkpoint's. Knows no file and no foreign layout's names.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsd.backends import Backend
from fastsd.checkpoints.lora import LoRA, Target, merge_
from fastsd.errors import UsageError


class SharedLock:
    """Many may use the weights at once, or one may change them.

    Who waits to change goes before new users; a thread that uses them already may use them again.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._users: Counter[int] = Counter()  # by thread
        self._changers = 0
        self._changing = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Use the weights: they stay as they are until the end of the block."""
        thread = threading.get_ident()
        with self._condition:
            self._condition.wait_for(lambda: self._users[thread] or not self._changers)
            self._users[thread] += 1
        try:
            yield
        finally:
            with self._condition:
                self._users[thread] -= 1
                self._condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Change the weights, once all who use them are done. UsageError for who uses them."""
        with self._condition:
            if self._users[threading.get_ident()]:
                raise UsageError(
                    "adapters cannot be changed from inside a call, e.g. by its callback; change "
                    "them between calls"
                )
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


class Adapters:
    """The LoRAs of one pipeline, by name: which are loaded, which are on and how strongly.

    on_host: keep the weights as they were in the host's memory, not on their device.
    """

    def __init__(self, *, on_host: bool = False) -> None:
        self.lock = SharedLock()
        self.loaded: dict[str, LoRA] = {}
        self.active: dict[str, float] = {}
        self._originals: dict[Target, Tensor] = {}
        self._unrounded: dict[Target, Tensor] = {}  # of originals that are kept coarser than W0
        self._on_host = on_host

    @contextmanager
    def in_use(self) -> Iterator[dict[str, float]]:
        """Hold the weights as they are; yields title -> weight of the adapters that are on."""
        with self.lock.shared():
            yield {self.loaded[name].title: weight for name, weight in self.active.items()}

    def load(self, name: str, lora: LoRA, backend: Backend) -> None:
        """Add an adapter and turn it alone on, at weight 1, as diffusers does."""
        with self.lock.exclusive():
            if name in self.loaded:
                raise UsageError(f"an adapter {name!r} is loaded already; choose another name")
            self._apply({name: 1.0}, self.loaded | {name: lora}, backend)

    def set(self, active: Mapping[str, float], backend: Backend) -> None:
        """Turn exactly these on. Raises UsageError for a name that is not loaded."""
        with self.lock.exclusive():
            self._known(active)
            self._apply(dict(active), self.loaded, backend)

    def drop(self, names: list[str] | None, backend: Backend) -> None:
        """Forget adapters, None for all; the others keep their weights."""
        with self.lock.exclusive():
            names = list(self.loaded) if names is None else names
            self._known(names)
            kept = {name: lora for name, lora in self.loaded.items() if name not in names}
            active = {name: weight for name, weight in self.active.items() if name in kept}
            self._apply(active, kept, backend)
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
    def rebound(self) -> Iterator[list[Backend]]:
        """Let the caller replace the backend: it puts the new one in the list, all else waits."""
        with self.lock.exclusive():
            new: list[Backend] = []
            yield new
            if new:
                self._forget()
                active, self.active = self.active, {}  # none is on there before all are
                self._apply(active, self.loaded, new[0])

    def _known(self, names: Mapping[str, float] | list[str]) -> None:
        for name in names:
            if name not in self.loaded:
                raise UsageError(
                    f"no adapter {name!r} is loaded; there are {', '.join(self.loaded) or 'none'}"
                )

    def _forget(self) -> None:
        self._originals.clear()
        self._unrounded.clear()

    def _apply(self, active: dict[str, float], loaded: dict[str, LoRA], backend: Backend) -> None:
        """Give every touched weight its new value; if that fails, all get their old ones back."""
        before = [self.loaded[name] for name in self.active]
        after = [loaded[name] for name in active]
        targets = dict.fromkeys(t for lora in (*before, *after) for t in lora.deltas)
        live = {part: backend.weights(part) for part in {part for part, _ in targets}}
        new = [target for target in targets if target not in self._originals]
        unrounded = {part: backend.unrounded(part) for part in {part for part, _ in new}}
        for part, name in new:
            copy = live[part][name].clone()
            self._originals[part, name] = copy.to("cpu") if self._on_host else copy
            if name in unrounded[part]:
                self._unrounded[part, name] = unrounded[part][name]
        done = False
        try:
            for target in targets:
                self._write(target, live[target[0]][target[1]], active, loaded)
            done = True
        finally:
            if not done:
                for target in targets:
                    self._write(target, live[target[0]][target[1]], self.active, self.loaded)
            for part in live:
                backend.changed(part)
        self.active, self.loaded = active, loaded

    @torch.no_grad()
    def _write(
        self, target: Target, weight: Tensor, active: dict[str, float], loaded: dict[str, LoRA]
    ) -> None:
        original = self._originals[target]
        deltas = [
            (loaded[name].deltas[target], strength)
            for name, strength in active.items()
            if strength and target in loaded[name].deltas
        ]
        if deltas:
            merge_(weight, self._unrounded.get(target, original), deltas)
        else:
            weight.copy_(original)
