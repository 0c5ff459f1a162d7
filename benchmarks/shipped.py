"""Ship what a GPU measured: `python -m fastsd.benchmarks.shipped CACHE/measured.json …`.

Adds the times of a cache, which loading random:sd15 and random:sdxl there with FASTSD_MEASURE=1
fills, and `fastsd bench gpu`, to the table that comes with fastsd, so that others with that GPU and
torch need not try anything first.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import fastsd
from fastsd.backends.measured import AS_SHIPPED
from fastsd.files import read_json, write_json

TABLE = Path(fastsd.__file__).parent / "backends" / "measured.json"
_KEY = re.compile(r"(?P<ran>.+ torch \S+) fastsd \S+ \w+ (?P<tried>of .+)")


def shipped(
    table: dict[str, dict[str, float | str]], found: dict[str, dict[str, float]], commit: str
) -> None:
    """Add to `table` what a cache has (key -> name -> ms), without the state of our kernels.

    Each entry says of which commit they were.
    """
    for key, times in found.items():
        if (parts := _KEY.fullmatch(key)) and not key.endswith(AS_SHIPPED):
            rounded = {name: round(ms, 4) for name, ms in times.items()}
            table[f"{parts['ran']} {parts['tried']}"] = {"commit": commit, **rounded}


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge caches into the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("caches", type=Path, nargs="+", help="measured.json of a user's cache")
    parser.add_argument("--commit", required=True, help="whose kernels were measured")
    parser.add_argument("--table", type=Path, default=TABLE)
    given = parser.parse_args(arguments)
    times = read_json(given.table)["times"] if given.table.exists() else {}
    for cache in given.caches:
        shipped(times, read_json(cache), given.commit)
    write_json(given.table, {"times": dict(sorted(times.items()))})
    print(f"{given.table}: {len(times)} shapes")


if __name__ == "__main__":
    main()
