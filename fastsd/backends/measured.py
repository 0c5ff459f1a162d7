"""What was measured once on this kind of GPU, remembered for the next time.

A JSON file in the user's cache. It holds names and times, so losing it costs a minute's measuring.
Another comes with fastsd, of the GPUs and models that its makers measured (`measured.json`, written
by `python -m fastsd.benchmarks.shipped`); FASTSD_MEASURE=1 in the environment passes it over.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fastsd.artifact import cache_folder
from fastsd.errors import CheckpointError
from fastsd.files import read_json, write_json

log = logging.getLogger("fastsd")

AS_SHIPPED = ", as shipped"  # after a key whose times were not measured, but seen to hold
Timed = Callable[[], Mapping[str, float]]


def measured(
    key: str,
    measure: Timed,
    *,
    shipped: str | None = None,
    runs: Callable[[str], bool] = lambda name: True,
) -> dict[str, float]:
    """Return what `measure` times (name -> ms), the fastest first, measured once a key.

    key: all that the times depend on: the op, its shape and dtype, the GPU model, versions.
    shipped: the key in the table that comes with fastsd, which knows nothing of our kernels' state;
    None: it is not in there. runs: whether what is fastest there does here; else all are measured.
    """
    file = cache_folder() / "measured.json"
    afresh, seen = os.environ.get("FASTSD_MEASURE") == "1", f"{key}{AS_SHIPPED}"
    known = _read(file)
    times = _times(known.get(key)) or ({} if afresh else _times(known.get(seen)))
    if not times:
        times = {} if afresh else _times(_shipped().get(shipped))
        if times and runs(min(times, key=times.__getitem__)):
            key = seen
        else:
            times = dict(measure())
        _keep(file, key, times)
    return dict(sorted(times.items(), key=lambda row: row[1]))


def _keep(file: Path, key: str, times: Mapping[str, float]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**_read(file), key: times})  # read anew: others may have measured too
    except OSError as error:
        log.warning("what was measured is not remembered: %s", error)


@cache
def _shipped() -> dict[str | None, Any]:
    """Read the times that come with fastsd, by key."""
    times: dict[str | None, Any] = read_json(Path(__file__).with_name("measured.json"))["times"]
    return times


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except CheckpointError:  # not there yet, or broken: measure again
        return {}


def _times(given: object) -> dict[str, float]:
    """Return what is name -> ms in `given`, which a file said; a commit is not."""
    if not isinstance(given, dict):
        return {}
    return {str(name): float(ms) for name, ms in given.items() if isinstance(ms, int | float)}
