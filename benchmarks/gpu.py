"""Everything that waits for a GPU, in one command: `fastsd bench gpu`, or
`python -m fastsd.benchmarks.gpu`.

Each stage is a command of its own that ends within nine minutes; what a stage has finished is not
done again, so that the whole can be run in pieces, on machines that come and go. A new measurement
is a new row of STAGES. Nothing here needs a GPU to be imported or tested.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd.benchmarks.report import duration, ratio_text
from fastsd.files import write_json

STAGE_S = 540.0
RUN = (sys.executable, "-m")


@dataclass(frozen=True)
class Stage:
    """One measurement. command: what `python -m` runs; "{folder}" in it is the stage's own folder.

    results: the file under that folder in which its rows are; None: it has none, only an outcome.
    """

    name: str
    what: str
    command: tuple[str, ...]
    results: str | None = None


def _bench(name: str, what: str, *options: str) -> Stage:
    command = ("fastsd", "bench", *options, "--report", "{folder}/report")
    return Stage(name, what, command, "report/results.json")


_EAGER = ("--contenders", "fastsd/eager/*", "--contenders", "diffusers/*")


def _own(model: str, steps: str, *names: str) -> tuple[str, ...]:
    """Our own contenders of these names, against fp16 as it comes."""
    asked = ("fastsd/eager/fp16", *(f"fastsd{n}" if n[0] == "/" else f"fastsd-{n}" for n in names))
    return ("--model", model, "--steps", steps, *(w for n in asked for w in ("--contenders", n)))


STAGES = (
    Stage("env", "what this machine is", ("fastsd", "env")),
    Stage(
        "tests",
        "kernels, graphs and half precision, on the GPU",
        ("pytest", "-q", "tests/kernels", "tests/backends"),
    ),
    Stage(
        "ops-fp16",
        "every op, half precision",
        ("fastsd", "bench", "ops", "--precision", "fp16", "--output", "{folder}/ops.json"),
        "ops.json",
    ),
    Stage(
        "ops-bf16",
        "every op, bfloat16",
        ("fastsd", "bench", "ops", "--precision", "bf16", "--output", "{folder}/ops.json"),
        "ops.json",
    ),
    _bench("builtin", "the built-in model", *_EAGER),
    _bench(
        "sd15",
        "SD1.5 at 512, 20 steps",
        *("--model", "random:sd15", "--steps", "20", *_EAGER),
    ),
    *(
        _bench(f"{model}-{name}", what, *_own(f"random:{model}", steps, *contenders))
        for model, steps in (("sd15", "20"), ("sdxl", "30"))
        for name, what, *contenders in (
            ("graphs", "a step, the whole loop or nothing as one graph", "graph-*/fp16"),
            ("attention", "one attention for all against the measured ones", "attention-*/fp16"),
            ("kernels", "our kernels against the library's", "*-triton/fp16"),
            ("memory", "what low memory costs", "low-memory/fp16"),
            ("inductor", "torch.compile's code in our graph", "/inductor/fp16"),
        )
    ),
    *(
        Stage(
            f"{model}-profile",
            "where a step's time goes, kernel by kernel",
            ("fastsd.benchmarks.step_profile", "--model", f"random:{model}", "--precision", "fp16")
            + ("--output", "{folder}/profile.md"),
        )
        for model in ("sd15", "sdxl")
    ),
    _bench(
        "sd15-offline",
        "SD1.5 at 512, pictures a second",
        *("--model", "random:sd15", "--steps", "20", "--scenario", "Offline"),
        *("--scenario", "SingleStream", "--contenders", "fastsd/eager/fp16"),
    ),
    _bench(
        "sd15-compiled",
        "SD1.5 against diffusers compiled for the most speed",
        *("--model", "random:sd15", "--steps", "20", "--contenders", "fastsd/eager/fp16"),
        *("--contenders", "diffusers-compile/fp16"),
    ),
    _bench("sd21", "SD2.1 at 768, 20 steps", *("--model", "random:sd21", "--steps", "20", *_EAGER)),
    _bench(
        "sdxl",
        "SDXL at 1024, 30 steps",
        *("--model", "random:sdxl", "--steps", "30", *_EAGER),
    ),
    _bench(
        "sdxl-compiled",
        "SDXL against diffusers compiled for the most speed",
        *("--model", "random:sdxl", "--steps", "30", "--contenders", "fastsd/eager/fp16"),
        *("--contenders", "diffusers-compile/fp16"),
    ),
)


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    *,
    budget_s: float = STAGE_S,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run the stages that `folder` does not have yet, as long as `budget_s` lasts.

    The time that a stage takes is not known beforehand: it is stopped when the budget ends, and
    begun again the next time; one that had the whole budget and more counts as failed. Returns each
    stage's outcome: done, failed, stopped or pending.
    """
    end = time.monotonic() + budget_s
    for stage in stages:
        place = folder / stage.name
        left = end - time.monotonic()
        if outcome_of(place)["outcome"] in ("done", "failed") or left < 1:
            continue
        first = left > 0.95 * budget_s
        say(f"{stage.name}: {stage.what}")
        outcome = _run(stage, place, left)
        if outcome["outcome"] == "stopped" and first:
            outcome |= {"outcome": "failed", "reason": f"took more than {budget_s:.0f} s"}
        write_json(place / "outcome.json", outcome)
        say(f"  {outcome['outcome']} after {outcome['seconds']:.0f} s")
    return [{"stage": stage.name, **outcome_of(folder / stage.name)} for stage in stages]


def outcome_of(place: Path) -> dict[str, Any]:
    """What is known of a stage: its outcome, or that it is pending."""
    file = place / "outcome.json"
    if not file.exists():
        return {"outcome": "pending"}
    outcome: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return outcome


def _run(stage: Stage, place: Path, seconds: float) -> dict[str, Any]:
    """Run one stage into a fresh folder; its output goes to log.txt there."""
    attempt = 1
    while (place / f"attempt-{attempt}").exists():
        attempt += 1
    fresh = place / f"attempt-{attempt}"
    fresh.mkdir(parents=True)
    command = [*RUN, *(word.replace("{folder}", str(fresh)) for word in stage.command)]
    start = time.monotonic()
    with (fresh / "log.txt").open("w", encoding="utf-8") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, timeout=seconds).returncode
            outcome = {"outcome": "done" if code == 0 else "failed"}
        except subprocess.TimeoutExpired:
            outcome = {"outcome": "stopped"}
    lines = (fresh / "log.txt").read_text("utf-8", "replace").strip().splitlines()
    if outcome["outcome"] == "failed":
        outcome["reason"] = lines[-1] if lines else "no output"
    return {**outcome, "seconds": round(time.monotonic() - start, 1), "attempt": fresh.name}


def stages_table(
    stages: Sequence[Stage], folder: Path, outcomes: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """A row a measurement: the stage, and of each of its rows the time, the ratio and the share."""
    table = [["stage", "row", "p50", "speed vs reference", "share of limit"]]
    for stage, outcome in zip(stages, outcomes, strict=True):
        if outcome["outcome"] != "done":
            reason = f": {outcome['reason']}" if "reason" in outcome else ""
            table.append([stage.name, f"{outcome['outcome']}{reason}", "", "", ""])
            continue
        rows = []
        if stage.results:
            file = folder / stage.name / outcome["attempt"] / stage.results
            rows = json.loads(file.read_text("utf-8"))["rows"]
        table += [[stage.name, *_measurement(row)] for row in rows] or [
            [stage.name, "done", duration(outcome["seconds"]), "", ""]
        ]
    return table


def _measurement(row: Mapping[str, Any]) -> list[str]:
    name = row.get("name") or f"{row['op']} {row['shape']} {row['implementation']}"
    p50 = row.get("p50_s") or row.get("latency_s", {}).get("p50")
    if p50 is None:
        return [f"{name}: {row.get('reason', 'no speed')}", "", "", ""]
    share = row.get("share") or row.get("limit", {}).get("share")
    return [
        name,
        duration(p50),
        ratio_text(row["ratio"]),
        "" if share is None else f"{100 * share:.0f}%",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is pending and print the table, and last one JSON object of outcomes."""
    from fastsd.benchmarks.report import aligned

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="what is done")
    parser.add_argument("--seconds", type=float, default=STAGE_S, help="to end within")
    parser.add_argument("--stage", action="append", help="only this one; may be given often")
    parser.add_argument("--list", action="store_true", help="print the stages and end")
    options = parser.parse_args(arguments)
    known = {stage.name: stage for stage in STAGES}
    unknown = [name for name in options.stage or () if name not in known]
    if unknown:
        parser.error(f"stage {unknown[0]!r} is unknown; they are {', '.join(known)}")
    stages = [known[name] for name in options.stage or known]
    if options.list:
        print("\n".join(aligned([[stage.name, stage.what] for stage in stages])))
        return
    say = _to_stderr
    outcomes = run_stages(stages, options.output, budget_s=options.seconds, say=say)
    print("\n".join(aligned(stages_table(stages, options.output, outcomes))))
    pending = [outcome["stage"] for outcome in outcomes if outcome["outcome"] != "done"]
    print(json.dumps({"output": str(options.output), "not_done": pending}))


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
