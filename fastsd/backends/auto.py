"""backend="auto": which of this user's engines draws a model fastest, as `fastsd tune` measured.

The runtime measures and builds nothing: it looks up. What was tuned is kept under the user's cache,
a file a model, and holds for the weights, machine, torch and fastsd it was measured with.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fastsd
from fastsd.artifact import cache_folder, is_artifact
from fastsd.backends.aoti import machine
from fastsd.checkpoints import Checkpoint
from fastsd.errors import CheckpointError, UsageError
from fastsd.files import read_json, write_json


@dataclass(frozen=True)
class Measured:
    """One way of drawing a model, as measured here.

    engine: the folder of the exported engine; None for the exact path, eager. seconds: a picture.
    worst_db: PSNR of the worst of its receipt's pictures to the exact path; None: exact, or not
    measured as `exact` says. size: the only pictures that an engine draws, "WIDTHxHEIGHT".
    """

    backend: str
    precision: str
    seconds: float
    exact: bool
    worst_db: float | None = None
    engine: str | None = None
    size: str | None = None

    def holds(self, floor: float | None) -> bool:
        """Whether its pictures are as near to the exact ones as `floor` dB asks."""
        if self.exact:
            return True
        return self.worst_db is not None and (floor is None or self.worst_db >= floor)

    def __str__(self) -> str:
        quality = "exact" if self.exact else f"worst picture {self.worst_db} dB"
        way = " ".join(filter(None, (self.backend, self.precision, self.size)))
        return f"{way}: {self.seconds:.2f} s a picture, {quality}"


@dataclass(frozen=True)
class Way:
    """What runs, and the reason in one line."""

    measured: Measured | None
    reason: str

    @property
    def engine(self) -> Path | None:
        """The engine to open; None for eager."""
        found = self.measured.engine if self.measured else None
        return Path(found) if found else None


def remember(checkpoint: Checkpoint, rows: list[Measured]) -> Path:
    """Keep what was measured of a model in place of what was known before; return the file."""
    file = _file(checkpoint)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"measured_with": _here(), "rows": [asdict(row) for row in rows]})
    return file


def recall(checkpoint: Checkpoint) -> list[Measured]:
    """Return what was measured of a model on this machine, with this torch; [] if nothing was."""
    file = _file(checkpoint)
    try:
        if not file.is_file():
            return []
        data: dict[str, Any] = read_json(file)
        rows = [Measured(**row) for row in data["rows"]]
    except (CheckpointError, KeyError, PermissionError, TypeError):
        return []  # cut, of another version, not ours to read: as if nothing had been tuned
    return rows if data.get("measured_with") == _here() else []


def choose(
    checkpoint: Checkpoint,
    floor: float | None = None,
    *,
    precision: str | None = None,
    device: str = "cpu",
) -> Way:
    """Return the fastest way that holds `floor` (dB, worst picture) and whose engine is there.

    precision: take only ways of this one. device: its type; what is tuned runs on the CPU.
    """
    if device != "cpu":
        return Way(None, f"auto: eager {precision or 'fp32'} on {device}; tuned are CPUs only")
    rows = recall(checkpoint)
    if not rows:
        return Way(
            None,
            f"auto: eager {precision or 'fp32'}; no faster way was measured here with "
            f"{torch.get_num_threads()} threads, see `fastsd tune`",
        )
    there = [row for row in rows if row.engine is None or is_artifact(row.engine)]
    fit = [row for row in there if row.holds(floor) and precision in (None, row.precision)]
    if not fit:
        asked = " and ".join(
            [*([precision] if precision else []), *([f"{floor:g} dB"] if floor is not None else [])]
        )
        raise UsageError(
            f"nothing that was tuned and is still there holds {asked}; run `fastsd tune` again"
        )
    best = min(fit, key=lambda row: row.seconds)
    others = len(there) - 1
    asked = "" if floor is None else f" of those that hold {floor:g} dB"
    return Way(best, f"auto: {best} (the fastest of {others + 1} measured{asked})")


def _here() -> dict[str, str]:
    return {**machine(), "fastsd": fastsd.__version__}


def _file(checkpoint: Checkpoint) -> Path:
    name = f"{checkpoint.fingerprint()[:24]}-{torch.get_num_threads()}.json"
    return cache_folder() / "tuned" / name
