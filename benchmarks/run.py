"""One run: contenders in processes of their own draw the same scene in turns, A B C A B C.

A turn's times are compared with each other, so that a machine which slows down or speeds up does so
for all. Contenders that do not fit in memory together draw in rounds, and the results say which. A
speed is only reported with the quality of its pictures beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import fastsd
from fastsd.benchmarks import judge
from fastsd.benchmarks.contenders import (
    ASK,
    Contender,
    Scene,
    by_default,
    choose,
    contenders,
    measured_device,
    reference_among,
)
from fastsd.benchmarks.limits import Work, limit
from fastsd.benchmarks.timing import FEWEST_PAIRS, Latency, Ratio, paired_ratio, unpaired_ratio
from fastsd.benchmarks.truth import Truth
from fastsd.checkpoints import model_name, open_checkpoint, parameters
from fastsd.errors import FastsdError, UsageError
from fastsd.samplers import build_table

SCHEMA = 1
_FOLDERS = ("fastsd", "kernels", "export", "benchmarks")  # the folders that our code is in
SCENARIOS = ("SingleStream", "ColdStart", "Parts", "Offline")
DEFAULT_SCENARIOS = SCENARIOS[:3]
AUTO_SECONDS = 40.0  # what the turns of a run may take where nobody says how many there are
MOST_REPEATS = 40
OURS = "fastsd.benchmarks.drawing:"  # what opens contenders of our own, under whatever name
OTHERS_TURNS = 12  # of all but our own, where more than MOST_REPEATS are asked for
SLOWEST = 8  # times the reference's time, above which a contender has to be asked for
KEPT_BYTES = 1 << 30  # of pictures, for each contender
SETTLE_S = 0.02  # between turns, so that one contender's idling threads go to sleep
ANSWER_S = 3600.0  # after which a contender that does not answer is given up
PREPARE_S = 6 * ANSWER_S  # quantising and compiling a true-size model takes an hour on two cores
BATCHES = (1, 2, 4, 8, 16)
BYTES_A_PIXEL = 4096  # of activations while the decoder runs, and libraries' own needs:
LIBRARIES_BYTES = 600 << 20
MEMORY_SHARE = 0.9  # of what is free, and of a GPU's memory, where caches keep more:
GPU_MEMORY_SHARE = 0.8

# For models whose pictures have no score: short and long, as people write them.
PROMPTS = (
    "a red apple",
    "a photo of an astronaut riding a horse on mars, highly detailed, 8k",
    "a castle on a hill at dawn, oil painting, soft light",
    "portrait of a fox in a suit",
)

Say = Callable[[str], None]


class ContenderFailed(FastsdError):
    """Say why a contender could not be measured, in its own last words."""


class Stopped(Exception):  # noqa: N818  (no error: what was drawn counts)
    """The run is to end now, with what it has."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped where the body is when the process is told to end, by Ctrl-C or SIGTERM.

    Signals reach a program's main thread only: in another one nothing is changed.
    """

    def stop(*_: object) -> None:
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Take no notice of SIGTERM in the body: what it does is all that is left to do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- one contender --------------------------------------------------------------------------------


@final
class Seat:
    """A contender in its own process, which stays alive between turns."""

    def __init__(self, contender: Contender, scene: Scene) -> None:
        self.contender = contender
        self.scene = scene
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        threads = str(scene.threads)
        self._spawned = time.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastsd.benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )

    def ask(self, do: str, *, limit_s: float = ANSWER_S, **fields: Any) -> dict[str, Any]:
        """Send a message and wait for the answer. Raises ContenderFailed."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        given_up = threading.Event()

        def give_up() -> None:
            given_up.set()
            process.kill()

        watchdog = threading.Timer(limit_s, give_up)
        watchdog.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # its last words say more
                process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            late = f"it was given up: no answer within {limit_s:g} s"
            raise ContenderFailed(late if given_up.is_set() else self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def open(self) -> dict[str, Any]:
        """Open the contender: its cold start, seconds."""
        contender = self.contender
        return self.ask(
            "open",
            scene=asdict(self.scene),
            opens=contender.opens,
            options=_options(contender, self.scene),
            imports=contender.imports,
            spawned=self._spawned,
        )

    def draw(self, draw: int, keep: Path | None) -> dict[str, Any]:
        """Draw in turn: {"seconds", "memory_bytes"}."""
        return self.ask("draw", draw=draw, keep=None if keep is None else str(keep))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        if code < 0:
            return f"its process was ended by signal {-code}: memory may have run out"
        last = next((line for line in reversed(lines) if ": " in line), "no message")
        kind, _, message = last.partition(": ")
        return message if kind.startswith("fastsd.") else last


def _options(contender: Contender, scene: Scene) -> dict[str, Any]:
    folder = contender.folder(scene)
    return dict(contender.options) | ({} if folder is None else {"folder": str(folder)})


# --- turns ----------------------------------------------------------------------------------------


class Draws(Protocol):
    """What takes turns."""

    def draw(self, draw: int, keep: Path | None) -> dict[str, Any]:
        """Draw once; "seconds" says how long it took."""
        ...


@dataclass
class Record:
    """What is known of one contender so far. turns: turn -> seconds."""

    contender: Contender
    turns: dict[int, float] = field(default_factory=dict)
    cold_starts: list[dict[str, float]] = field(default_factory=list)
    memory_bytes: int | None = None
    explained: list[str] = field(default_factory=list)
    parts_ms: dict[str, float] | None = None
    offline: dict[str, Any] | None = None
    failure: str | None = None


def take_turns(
    seats: Mapping[str, Draws],
    turns: Sequence[int],
    records: Mapping[str, Record],
    keep: Callable[[str, int], Path | None],
    settle_s: float = SETTLE_S,
    draws: int | None = None,
) -> None:
    """Let every seat draw turn t before any draws turn t + 1; a seat that fails leaves the run.

    draws: how many different ones there are, by default one a turn. keep: given a name and a draw,
    says where its pictures go.
    """
    for turn in turns:
        for name, seat in seats.items():
            record = records[name]
            if record.failure:
                continue
            time.sleep(settle_s)
            draw = turn % draws if draws else turn
            try:
                answer = seat.draw(draw, keep(name, draw))
            except ContenderFailed as error:
                record.failure = str(error)
                continue
            record.turns[turn] = answer["seconds"]
            record.memory_bytes = answer.get("memory_bytes")


# --- rounds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Groups of contenders that are alive together.

    alone: each contender is loaded anew, twice: A B B A, so that a steady drift slows all alike.
    """

    groups: tuple[tuple[str, ...], ...]
    alone: bool

    def rounds(self, repeats: int) -> list[tuple[tuple[str, ...], range]]:
        """Who draws which turns, one round after the other; each contender draws `repeats`."""
        if not self.alone:
            return [
                (group, range(i * repeats, (i + 1) * repeats))
                for i, group in enumerate(self.groups)
            ]
        half = -(-repeats // 2)
        rounds = [(group, range(half)) for group in self.groups]
        return rounds + [
            (group, range(half, repeats)) for group in self.groups[::-1] if repeats > 1
        ]


def plan_rounds(needs: Mapping[str, int], reference: str, available: int) -> Plan:
    """Pack contenders into groups that fit in `available` bytes, the reference in each of them.

    Where the reference and some contender do not fit together, every one draws alone.
    """
    room = available - needs[reference]
    others = [name for name in needs if name != reference]
    if any(needs[name] > room for name in others):
        return Plan(tuple((name,) for name in (reference, *others)), alone=True)
    groups: list[list[str]] = [[reference]]
    left = [room]
    for name in others:
        fitting = [i for i, free in enumerate(left) if needs[name] <= free]
        if not fitting:
            groups.append([reference])
            left.append(room)
        i = fitting[0] if fitting else -1
        groups[i].append(name)
        left[i] -= needs[name]
    return Plan(tuple(map(tuple, groups)), alone=False)


def memory_need(contender: Contender, scene: Scene) -> int:
    """Estimate what a contender holds while it draws, bytes."""
    weights = 4 * parameters(open_checkpoint(scene.model))
    activations = BYTES_A_PIXEL * scene.size**2 * scene.batch
    return int(contender.copies * weights) + activations + LIBRARIES_BYTES


def free_memory(device: str) -> int:
    """How many bytes contenders may take: of the GPU where they run there, else of the machine."""
    if device.startswith("cuda"):
        import torch

        return int(GPU_MEMORY_SHARE * torch.cuda.mem_get_info()[0])
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(MEMORY_SHARE * 1024 * int(line.split()[1]))
    except OSError:
        pass  # not Linux
    try:
        return int(0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows: assume a small machine
        return 4 << 30


# --- the run --------------------------------------------------------------------------------------


@final
class Run:
    """A run in progress: opens seats, lets them draw, judges, and writes it all down."""

    def __init__(
        self,
        scene: Scene,
        chosen: Sequence[Contender],
        *,
        reference: str,
        repeats: int | None = None,
        scenarios: Sequence[str] = DEFAULT_SCENARIOS,
        left_out: Mapping[str, str] = MappingProxyType({}),
        only_quick: bool = False,
        truth: Truth | None = None,
        say: Say = lambda line: None,
        available: int | None = None,
    ) -> None:
        unknown = set(scenarios) - set(SCENARIOS)
        if unknown:
            raise UsageError(
                f"scenario {unknown.pop()!r} is unknown; they are {', '.join(SCENARIOS)}"
            )
        if reference not in {contender.name for contender in chosen}:
            raise UsageError(f"the reference {reference!r} must take part")
        self.scene = scene
        self.reference = reference
        self.truth = truth
        self._spared = reference if truth is None else None  # the slow one, that others are held to
        self.records = {contender.name: Record(contender) for contender in chosen}
        self.repeats = repeats
        self.left_out = dict(left_out)
        self._only_quick = only_quick
        self.scenarios = tuple(scenarios)
        self.rounds: list[tuple[tuple[str, ...], range]] = []
        self._alone = False
        self._say = say
        self._available = free_memory(scene.device) if available is None else available
        self._seats: dict[str, Seat] = {}
        self._finished = False

    def measure(self, environment: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run, and return the results as plain data, and each contender's first picture."""
        facts = {  # of the start: files may change while this runs
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "environment": dict(environment),
        }
        with tempfile.TemporaryDirectory(prefix="fastsd-bench-") as folder:
            try:
                work, ceilings = self._limits()
                self._leave_out_missing()
                self._prepare()
                with contextlib.suppress(Stopped), stoppable():
                    self._draw_all(Path(folder))
                    self._finished = True
            finally:
                self._close_all()
            if not self._finished:
                self._end_early()
            with undisturbed():
                return self._results(Path(folder), work, ceilings, facts)

    def _results(
        self,
        folder: Path,
        work: dict[str, Work],
        ceilings: dict[str, float],
        facts: Mapping[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Judge what was drawn, and put all that is known together."""
        draws = self.repeats or 1
        kept = {
            name: _pictures(folder, name, {turn % draws for turn in record.turns})
            for name, record in self.records.items()
        }
        truth = self.truth = self.truth or Truth(
            self.reference, kept[self.reference], np.load(_latents_file(folder, self.reference))
        )
        rows = [self._row(name, kept[name], truth, folder, work, ceilings) for name in self.records]
        rows += [
            {"name": name, "status": "not measured", "reason": reason}
            for name, reason in self.left_out.items()
        ]
        results = {
            "schema": SCHEMA,
            "fastsd": fastsd.__version__,
            **facts,
            "scene": {
                **asdict(self.scene),
                "model": model_name(self.scene.model),
                "prompts": list(self.scene.prompts[:8]),
            },
            "repeats": self.repeats,
            "stopped": not self._finished,
            "reference": self.reference,
            "truth": truth.name,
            "rounds": [list(names) for names, _ in self.rounds],
            "alone": self._alone,
            "ceilings": ceilings,
            "work": {name: asdict(part) for name, part in work.items()},
            "rows": rows,
        }
        first = {name: pictures[min(pictures)][0] for name, pictures in kept.items() if pictures}
        return results, first

    def _end_early(self) -> None:
        """Keep what was drawn before the run was stopped. Raises ContenderFailed if nothing was."""
        for record in self.records.values():
            if not record.turns:
                record.failure = record.failure or "the run was stopped before it drew in turn"
        with contextlib.suppress(Stopped):
            self._require_reference()
        self._say("stopped early: the rows are of the turns that were drawn")

    def _limits(self) -> tuple[dict[str, Work], dict[str, float]]:
        self._say("measuring this machine's limits")
        seat = Seat(self.records[self.reference].contender, self.scene)
        try:
            answer = seat.ask(
                "limits",
                device=self.scene.device,
                threads=self.scene.threads,
                model=self.scene.model,
                size=self.scene.size,
                batch=self.scene.batch,
                evaluations=evaluations(self.scene),
                guided=self.scene.guided,
            )
        finally:
            seat.close()
        return {name: Work(**part) for name, part in answer["work"].items()}, answer["ceilings"]

    def _leave_out_missing(self) -> None:
        for record in self.records.values():
            if missing := record.contender.missing:
                record.failure = f"not installed: {', '.join(missing)}; {record.contender.install}"

    def _prepare(self) -> None:
        """Make what contenders need once; each alone, for it may take all memory."""
        for record in self.records.values():
            contender = record.contender
            folder = contender.folder(self.scene) if not record.failure else None
            if folder is None or folder.exists():
                continue
            self._say(f"preparing {contender.name}, once: this can take minutes")
            seat = Seat(contender, self.scene)
            try:
                answer = seat.ask(
                    "prepare",
                    limit_s=PREPARE_S,
                    scene=asdict(self.scene),
                    prepares=contender.prepares,
                    options=_options(contender, self.scene),
                )
                self._say(f"  prepared in {answer['seconds']:.0f} s")
            except ContenderFailed as error:
                record.failure = f"could not be prepared: {error}"
            finally:
                seat.close()

    def _draw_all(self, folder: Path) -> None:
        taking_part = {n: r.contender for n, r in self.records.items() if not r.failure}
        self._require_reference()
        needs = {name: memory_need(c, self.scene) for name, c in taking_part.items()}
        plan = plan_rounds(needs, self.reference, self._available)
        self._alone = plan.alone
        if self.repeats is None and len(plan.groups) == 1:
            self._open(plan.groups[0], folder)
            self.repeats = self._fitting_repeats()
        self.repeats = self.repeats or FEWEST_PAIRS  # what needs rounds is slow
        self.rounds = plan.rounds(self.repeats)
        for index, (names, turns) in enumerate(self.rounds):
            if len(self.rounds) > 1:
                self._say(f"round {index + 1} of {len(self.rounds)}: {', '.join(names)}")
            for name in set(self._seats) - set(names):
                self._seats.pop(name).close()
            self._open(names, folder)
            seats = {name: self._seats[name] for name in names if name in self._seats}
            for turn in tqdm(turns, unit="turn", disable=None, leave=False):
                drawing = {n: seat for n, seat in seats.items() if self._draws(n, turn)}
                take_turns(
                    drawing,
                    [turn],
                    self.records,
                    lambda name, draw: self._keep(folder, name, draw),
                    draws=self.repeats,
                )
                self._require_reference()
            for name, seat in seats.items():
                self._further_scenarios(name, seat)
            if plan.alone:
                self._close_all()

    def _draws(self, name: str, turn: int) -> bool:
        """Whether a contender takes part in a turn: of many, all but ours in a few, spread."""
        assert self.repeats is not None
        few = self.repeats <= MOST_REPEATS
        few = few or turn * OTHERS_TURNS % self.repeats < OTHERS_TURNS
        contenders_ = [record.contender for record in self.records.values()]
        return few or not any(map(_is_ours, contenders_)) or _is_ours(self.records[name].contender)

    def _require_reference(self) -> None:
        """Raise ContenderFailed where the reference failed, Stopped where it had drawn in turn."""
        record = self.records[self.reference]
        if record.failure and record.turns:
            raise Stopped
        if record.failure:
            raise ContenderFailed(f"the reference {self.reference} cannot draw: {record.failure}")

    def _open(self, names: Sequence[str], folder: Path) -> None:
        """Open seats one after the other, so that a cold start has the machine to itself."""
        for name in names:
            record = self.records[name]
            if name in self._seats or record.failure:
                continue
            seat = Seat(record.contender, self.scene)
            try:
                record.cold_starts.append(seat.open())
                self._say(f"{name}: first picture after {record.cold_starts[-1]['total_s']:.1f} s")
                latents = _latents_file(folder, name)
                if not latents.exists():  # a second draw to warm up, and of use
                    seat.ask("latents", draw=0, keep=str(latents))
                if self.scene.device.startswith("cuda") and name != self._spared:
                    seat.draw(0, None)  # graphs are made for a whole picture
            except ContenderFailed as error:
                seat.close()
                record.failure = str(error)
                self._say(f"{name}: {error}")
            except BaseException:
                seat.close()
                raise
            else:
                self._seats[name] = seat
        self._require_reference()

    def _fitting_repeats(self) -> int:
        """As many turns as AUTO_SECONDS hold, by one turn of each, which is not counted.

        Who takes many times as long as the reference (half precision on some CPUs) has to be asked
        for by name.
        """
        trial = {name: Record(self.records[name].contender) for name in self._seats}
        take_turns(self._seats, [0], trial, lambda name, turn: None)
        seconds = {name: record.turns[0] for name, record in trial.items() if record.turns}
        for name in slow_ones(seconds, self.reference) if self._only_quick else ():
            times = seconds.pop(name) / seconds[self.reference]
            self.records[name].failure = f"took {times:.0f} times as long as the reference; {ASK}"
            self._seats.pop(name).close()
        total = sum(seconds.values()) + SETTLE_S * len(seconds)
        return max(FEWEST_PAIRS, min(MOST_REPEATS, int(AUTO_SECONDS / total)))

    def _keep(self, folder: Path, name: str, turn: int) -> Path | None:
        size = 3 * self.scene.size**2 * self.scene.batch
        return folder / f"{_file_name(name)}-{turn}.npy" if turn * size < KEPT_BYTES else None

    def _further_scenarios(self, name: str, seat: Seat) -> None:
        record = self.records[name]
        try:
            if not record.failure and not record.explained:
                record.explained = seat.ask("explain")["lines"]
            if "Parts" in self.scenarios and not record.failure and record.parts_ms is None:
                slow = record.turns and min(record.turns.values()) > 5
                record.parts_ms = seat.ask("parts", repeats=1 if slow else 3)["parts_ms"]
            alone = len(self.records) == 1
            offline = "Offline" in self.scenarios and (alone or name != self._spared)
            if offline and not record.failure and record.offline is None:
                record.offline = _offline(seat)
        except ContenderFailed as error:
            self._say(f"{name}: {error}")
            self._seats.pop(name).close()

    def _close_all(self) -> None:
        while self._seats:
            self._seats.popitem()[1].close()

    def _row(
        self,
        name: str,
        kept: judge.Pictures,
        truth: Truth,
        folder: Path,
        work: dict[str, Work],
        ceilings: dict[str, float],
    ) -> dict[str, Any]:
        record, base = self.records[name], self.records[self.reference]
        row: dict[str, Any] = {"name": name, "precision": record.contender.precision}
        paired = self._alone or record.turns.keys() & base.turns.keys()
        if not paired or not kept.keys() & truth.pictures.keys():
            return row | {"status": "not measured", "reason": record.failure or "drew nothing"}
        quality = judge.judge(
            kept, truth.pictures, np.load(_latents_file(folder, name)), truth.latents
        )
        if self.scene.model == "builtin":
            quality["score"] = judge.score(kept)
        latency = Latency.of(list(record.turns.values()))
        ratio, samples = self._ratio(record, base)
        row |= {"status": "measured", "quality": quality}
        if record.failure:
            turns = f"failed after {latency.count} of its turns"
            row |= {"status": "failed", "reason": f"{turns}: {record.failure}"}
        if "SingleStream" in self.scenarios:
            row["latency_s"] = {
                **asdict(latency),
                "samples": list(latency.samples),
                "n": latency.count,
            }
            row["ratio"] = {**asdict(ratio), "verdict": ratio.verdict, "samples": samples}
            best = limit(work, ceilings, record.contender.precision)
            if best:
                row["limit"] = {**asdict(best), "share": best.seconds / latency.p50}
        if "ColdStart" in self.scenarios:
            row["cold_start_s"] = record.cold_starts
        row["memory_bytes"] = record.memory_bytes
        row["explained"] = record.explained
        row["parts_ms"] = record.parts_ms
        row["offline"] = record.offline
        return row

    def _ratio(self, record: Record, base: Record) -> tuple[Ratio, list[float]]:
        """Compare with the reference: turn by turn, or by medians where each draws alone."""
        if self._alone:
            times, others = list(record.turns.values()), list(base.turns.values())
            usual = float(np.median(others))
            return unpaired_ratio(times, others), [time / usual for time in times]
        common = [turn for turn in record.turns if turn in base.turns]
        times, others = ([r.turns[turn] for turn in common] for r in (record, base))
        samples = [time / other for time, other in zip(times, others, strict=True)]
        return paired_ratio(times, others), samples


def slow_ones(seconds: Mapping[str, float], reference: str) -> list[str]:
    """Name those that take more than SLOWEST times as long as the reference."""
    return [name for name, time_ in seconds.items() if time_ > SLOWEST * seconds[reference]]


def _offline(seat: Seat) -> dict[str, Any]:
    """Raise the batch while that draws more pictures a second; say what each batch gave.

    A batch that ends the contender, as one too large for the memory does, is the last.
    """
    tried: dict[int, float] = {}
    for size in BATCHES:
        try:
            seconds = seat.ask("batch", size=size, repeats=2)["seconds"]
        except ContenderFailed:
            if not tried:
                raise
            break
        if not seconds:
            continue
        tried[size] = size / min(seconds)
        if tried[size] < 1.02 * max([0.0, *list(tried.values())[:-1]]):
            break
    if not tried:
        raise ContenderFailed(f"it draws none of the batches {', '.join(map(str, BATCHES))}")
    best = max(tried, key=lambda size: tried[size])
    named = {str(size): speed for size, speed in tried.items()}  # as JSON has it
    return {"pictures_per_s": tried[best], "batch": best, "tried": named}


def _is_ours(contender: Contender) -> bool:
    return contender.opens.startswith(OURS)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else f"_{ord(c)}_" for c in name)


def _latents_file(folder: Path, name: str) -> Path:
    return folder / f"{_file_name(name)}-latents.npy"


def _pictures(folder: Path, name: str, draws: Iterable[int]) -> dict[int, NDArray[np.uint8]]:
    """Read the pictures of these draws, as far as they were kept."""
    files = {draw: folder / f"{_file_name(name)}-{draw}.npy" for draw in draws}
    return {draw: np.load(file) for draw, file in files.items() if file.exists()}


def evaluations(scene: Scene) -> int:
    """How often the UNet is asked for one draw of the scene."""
    schedule = open_checkpoint(scene.model).config.schedule
    return build_table(schedule, scene.steps, sampler=scene.sampler or schedule.sampler).rows


def commit() -> str | None:
    """The commit that runs, with a + where our code differs from it; None outside a checkout.

    FASTSD_COMMIT says it where only the files were copied to.
    """
    if told := os.environ.get("FASTSD_COMMIT"):
        return told
    root = Path(fastsd.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        ours = (f"{folder}/*.py" for folder in _FOLDERS)
        new = _git(root, "ls-files", "--others", "--exclude-standard", *ours)
        return f"{head}+" if changed or new else head
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


def scene_of(
    model: str,
    *,
    size: int | None = None,
    steps: int = 20,
    guidance: float | None = None,
    batch: int = 1,
    sampler: str | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> Scene:
    """Fill in what was not asked for: the model's own size, guidance and sampler, this machine's
    GPU if there is one, and as many threads as torch would take. Raises UsageError."""
    import torch

    config = open_checkpoint(model).config
    size = config.default_size if size is None else size
    if size % config.vae.downscale or size < 1:
        raise UsageError(f"--size must be a multiple of {config.vae.downscale}, not {size}")
    scene = Scene(
        model=model,
        size=size,
        steps=steps,
        guidance=config.usual_guidance if guidance is None else guidance,
        prompts=judge.builtin_prompts() if model == "builtin" else PROMPTS,
        batch=batch,
        sampler=sampler,
        device=measured_device(device),
        threads=threads or torch.get_num_threads(),
    )
    evaluations(scene)  # an unknown sampler or an impossible step count is refused here
    return scene


def bench(
    scene: Scene,
    patterns: Sequence[str] = (),
    *,
    repeats: int | None = None,
    scenarios: Sequence[str] = DEFAULT_SCENARIOS,
    environment: Mapping[str, Any],
    say: Say,
    truth: Path | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the contenders that `patterns` name, or those that need not compile first.

    truth: a folder of kept pictures. Those of this scene stand for the reference, whose place as
    the base of speeds the first contender named takes; where there are none yet, they are kept.
    Returns the results, plain data, and each contender's first picture, (H, W, 3) uint8.
    """
    known = contenders(scene.device.partition(":")[0])
    reference = reference_among(known)
    left_out: dict[str, str] = {}
    if patterns:
        chosen = choose(known, patterns, scene)
    else:
        chosen, left_out = by_default(known, scene)
    kept = None if truth is None else Truth.kept(truth, scene, repeats or FEWEST_PAIRS)
    held_to = kept if patterns else None
    if held_to is not None:
        reference = chosen[0]
    elif reference.name not in {contender.name for contender in chosen}:
        chosen = [reference, *chosen]
    run = Run(
        scene,
        chosen,
        reference=reference.name,
        repeats=repeats,
        scenarios=scenarios,
        left_out=left_out,
        only_quick=not patterns,
        say=say,
        truth=held_to,
    )
    results, first_pictures = run.measure(environment)
    if truth is not None and kept is None and run.truth is not None and not results["stopped"]:
        try:
            run.truth.keep(truth, scene)
        except (OSError, FastsdError) as error:  # the results are worth more
            say(f"the pictures in fp32 were not kept: {error}")
    return results, first_pictures
