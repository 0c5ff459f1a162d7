"""A process of its own for one contender: `python -m fastsd.benchmarks.worker`, driven by run.py.

It reads a JSON object a line on stdin and answers with one; what libraries print goes to stderr.
A contender that fails ends the process: its traceback on stderr is the answer.
"""

from __future__ import annotations

import time

STARTED = time.time()  # before the imports that a cold start pays for

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pkgutil import resolve_name  # noqa: E402
from typing import TYPE_CHECKING, Any, TextIO  # noqa: E402

if TYPE_CHECKING:
    from fastsd.benchmarks.contenders import Scene
    from fastsd.benchmarks.drawing import Drawer


class Worker:
    """Answers one message after the other; the first opens the contender."""

    def __init__(self) -> None:
        self.drawer: Drawer
        self.scene: Scene

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Do what `message` says."""
        handlers: dict[str, Callable[..., dict[str, Any]]] = {
            "open": self.open,
            "prepare": self.prepare,
            "draw": self.draw,
            "latents": self.latents,
            "explain": self.explain,
            "parts": self.parts,
            "batch": self.batch,
            "limits": self.limits,
        }
        fields = {name: value for name, value in message.items() if name != "do"}
        return handlers[message["do"]](**fields)

    def open(
        self,
        scene: Mapping[str, Any],
        opens: str,
        options: Mapping[str, Any],
        imports: Sequence[str],
        spawned: float,
    ) -> dict[str, Any]:
        """Import, load, draw once: a cold start, in seconds since the process was asked for.

        first_step_s: until the UNet has answered once; not on a GPU.
        """
        import torch

        from fastsd.benchmarks.drawing import Watch

        self.scene = _scene(scene)
        torch.set_num_threads(self.scene.threads)
        # fp32 rows are what all others are held to; what draws in half precision may have parts in
        # fp32, and has them as its users do.
        if str(options.get("precision", "fp32")) == "fp32":
            torch.backends.cudnn.allow_tf32 = False
        function = resolve_name(opens)
        for name in imports:
            resolve_name(name)
        imported = time.time()
        self.drawer = function(self.scene, **options)
        loaded, loaded_mark = time.time(), time.perf_counter()
        watch = Watch(self.scene.device)
        with self.drawer.watched(watch):
            self.drawer.draw(self.scene.texts(0), self.scene.seeds(0))
        drawn = time.time()
        step = watch.first_step()
        steps = {} if step is None else {"first_step_s": loaded - spawned + step - loaded_mark}
        return {
            "process_s": STARTED - spawned,
            "import_s": imported - STARTED,
            "load_s": loaded - imported,
            "first_call_s": drawn - loaded,
            "total_s": drawn - spawned,
            **steps,
        }

    def prepare(
        self, scene: Mapping[str, Any], prepares: str, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Make what the contender needs, once."""
        start = time.perf_counter()
        resolve_name(prepares)(_scene(scene), **options)
        return {"seconds": time.perf_counter() - start}

    def draw(self, draw: int, keep: str | None = None) -> dict[str, Any]:
        """Draw and time it; with `keep`, save the pictures there, (B, H, W, 3) uint8, as .npy."""
        import numpy as np

        prompts, seeds = self.scene.texts(draw), self.scene.seeds(draw)
        start = time.perf_counter()
        pictures = self.drawer.draw(prompts, seeds)
        seconds = time.perf_counter() - start
        if keep:
            np.save(keep, np.stack([np.asarray(picture) for picture in pictures]))
        return {"seconds": seconds, "memory_bytes": _peak_memory()}

    def latents(self, draw: int, keep: str) -> dict[str, Any]:
        """Save a draw's latents, (B, C, h, w) fp32, as .npy."""
        import numpy as np

        latents = self.drawer.latents(self.scene.texts(draw), self.scene.seeds(draw))
        np.save(keep, latents.numpy())
        return {}

    def explain(self) -> dict[str, Any]:
        """Say what ran: kernels, captures and what failed to be one, as far as it is told."""
        return {"lines": list(self.drawer.explain())}

    def parts(self, repeats: int) -> dict[str, Any]:
        """Say where the time goes."""
        from fastsd.benchmarks.drawing import measure_parts

        return {"parts_ms": measure_parts(self.drawer, self.scene, repeats)}

    def batch(self, size: int, repeats: int) -> dict[str, Any]:
        """Time draws of `size` pictures after one to warm up; no times where it cannot."""
        if self.drawer.fixed_batch and size != self.scene.batch:
            return {"seconds": []}
        texts = [self.scene.prompts[i % len(self.scene.prompts)] for i in range(size)]
        seconds = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            self.drawer.draw(texts, range(size))
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds[1:]}

    def limits(self, device: str, threads: int, **picture: Any) -> dict[str, Any]:
        """Measure the machine's ceilings, and count what a picture takes."""
        import torch

        from fastsd.benchmarks.limits import measure_ceilings, picture_work

        torch.set_num_threads(threads)
        work = {name: asdict(part) for name, part in picture_work(**picture).items()}
        return {"ceilings": measure_ceilings(device), "work": work}


def _scene(fields: Mapping[str, Any]) -> Scene:
    from fastsd.benchmarks.contenders import Scene

    return Scene(**{**fields, "prompts": tuple(fields["prompts"])})


def _peak_memory() -> int | None:
    """The most memory that this process has held, bytes: the GPU's where one is used."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():
        return int(torch.cuda.max_memory_reserved())
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    """Answer until stdin ends."""
    answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    worker = Worker()
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
