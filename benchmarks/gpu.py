"""Everything that waits for a GPU, in one command: `fastsd bench gpu`, or
`python -m fastsd.benchmarks.gpu`.

Each stage is a command of its own that ends within nine minutes; what a stage has finished is not
done again, so that the whole can be run in pieces, on machines that come and go. A new measurement
is a new row of STAGES. Nothing here needs a GPU to be imported or tested.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
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
GRACE_S = 45.0  # before a stage is killed: a benchmark that is told to end writes what it has
REASON = 100  # characters of a row that says why it has no time
NEEDS = ("diffusers", "transformers", "pytest")  # without them stages would end with empty rows
RUN = (sys.executable, "-m")


@dataclass(frozen=True)
class Stage:
    """One measurement. command: what `python -m` runs; "{folder}" in it is the stage's own folder,
    "{truth}" one for all, of pictures in fp32, which are drawn once a scene.

    results: the file under that folder in which its rows are; None: it has none, only an outcome.
    takes_s: about how long; it is not begun with less time left.
    """

    name: str
    what: str
    command: tuple[str, ...]
    results: str | None = None
    takes_s: float = 120.0


def _bench(name: str, what: str, *options: str, takes_s: float = 150.0) -> Stage:
    command = ("fastsd", "bench", *options, "--truth", "{truth}", "--report", "{folder}/report")
    return Stage(name, what, command, "report/results.json", takes_s)


_EAGER = ("--contenders", "fastsd/eager/*", "--contenders", "diffusers/*")
_HALF = tuple(
    word
    for name in ("fastsd/eager/fp16", "diffusers/fp16", "fastsd-fp8/fp16")
    for word in ("--contenders", name)
)
_TURNS = ("--scenario", "SingleStream")
_QUICKLY = (
    "quickly",
    "against diffusers as it is compiled by default",
    "diffusers-reduce-overhead/fp16",
)
_COMPILE_S = 500.0  # tries out kernels for every product


def _own(model: str, steps: str, *names: str) -> tuple[str, ...]:
    """Our own contenders of these names, against fp16 as it comes."""
    asked = ("fastsd/eager/fp16", *(f"fastsd{n}" if n[0] == "/" else f"fastsd-{n}" for n in names))
    return ("--model", model, "--steps", steps, *(w for n in asked for w in ("--contenders", n)))


def _against(
    model: str, steps: str, name: str, what: str, contender: str, *, takes_s: float
) -> Stage:
    """One that compiles first, beside ours as it comes."""
    return _bench(
        f"{model}-{name}",
        what,
        *("--model", f"random:{model}", "--steps", steps, *_TURNS),
        *("--contenders", "fastsd/eager/fp16", "--contenders", contender),
        takes_s=takes_s,
    )


def _profile(model: str, *, fp8: bool = False) -> Stage:
    command = ["fastsd.benchmarks.step_profile", "--model", f"random:{model}"]
    command += ["--precision", "fp16", "--output", "{folder}/profile.md"]
    command += ["--weights", "fp8", "--batch", "1", "8"] if fp8 else []
    what = "where a step's time goes, kernel by kernel"
    return Stage(f"{model}-profile{'-fp8' * fp8}", what, tuple(command), takes_s=80.0)


# What is least known comes first: a machine may be lent for minutes only. A profile loads a model
# for the first time there, so that kernels are tried in it and not in a cold start that is a row. A
# step takes as long at 10 steps as at 20, so that is what settings of SDXL are compared at. What a
# stage takes was timed on an H200 beside 16 cores: loading, mostly, and trying kernels.
STAGES = (
    Stage("env", "what this machine is", ("fastsd", "env"), takes_s=20.0),
    _profile("sd15"),
    _profile("sdxl", fp8=True),
    _bench(
        "sd15-p99",
        "SD1.5 at 512, a hundred pictures",
        *("--model", "random:sd15", "--steps", "20", "--repeats", "100", *_TURNS),
        *("--contenders", "fastsd/eager/fp16"),
        takes_s=120,
    ),
    Stage(
        "tests",
        "kernels, graphs and half precision, on the GPU",
        ("pytest", "-q", "-W", "default", "tests/kernels/test_triton.py")
        + ("tests/kernels/test_attention.py::test_every_candidate_equals_the_formula",)
        + ("tests/backends/test_cuda.py",),
        takes_s=180.0,  # Triton compiles
    ),
    _profile("sdxl"),
    _bench(
        "sdxl-4-steps",
        "SDXL at 1024 in four steps, without guidance",
        *("--model", "random:sdxl", "--steps", "4", "--guidance", "1", *_HALF, *_TURNS),
        takes_s=220,
    ),
    _bench(
        "sdxl-offline",
        "SDXL at 1024 in 20 steps, pictures a second",
        *("--model", "random:sdxl", "--steps", "20", "--scenario", "Offline", *_TURNS),
        *("--contenders", "fastsd/eager/fp16", "--contenders", "fastsd-fp8/fp16"),
        # Kernels are chosen at one guidance pair; whether that holds for more of them shows here.
        *("--contenders", "fastsd-linear-library/fp16"),
        takes_s=330,
    ),
    Stage(
        "ops-fp16",
        "every op, half precision",
        ("fastsd", "bench", "ops", "--precision", "fp16", "--output", "{folder}/ops.json"),
        "ops.json",
    ),
    *(
        _bench(
            f"{model}-memory",
            "settings that save memory",
            *_own(f"random:{model}", steps, "int8-weights/fp16", "low-memory*/fp16"),
            *_TURNS,
            takes_s=seconds,
        )
        for model, steps, seconds in (("sdxl", "10", 260.0), ("sd15", "20", 160.0))
    ),
    Stage(
        "tilings",
        "what the 3x3 convolution takes, cut every way",
        ("fastsd.benchmarks.tilings", "measure", "{folder}/times.json"),
    ),
    _bench("sd15", "SD1.5 at 512", "--model", "random:sd15", "--steps", "20", *_HALF, takes_s=170),
    _bench("sdxl", "SDXL at 1024", "--model", "random:sdxl", "--steps", "20", *_HALF, takes_s=340),
    *(
        _bench(
            f"{model}-{name}",
            what,
            *_own(f"random:{model}", steps, *names),
            *_TURNS,
            takes_s=seconds if model == "sdxl" else 0.6 * seconds,
        )
        for model, steps in (("sdxl", "10"), ("sd15", "20"))
        for name, what, seconds, *names in (
            ("kernels", "our kernels and the library's", 280, "*-library/fp16", "*-triton/fp16"),
            ("graphs", "graphs, captured less or more", 220, "graph-*/fp16", "cached/fp16"),
            ("attention", "one attention against the measured ones", 280, "attention-*/fp16"),
        )
    ),
    _against("sd15", "20", *_QUICKLY, takes_s=270),
    _against("sdxl", "10", *_QUICKLY, takes_s=330),
    _bench(
        "builtin",
        "the built-in model",
        *(*_EAGER, "--contenders", "fastsd-fp8/fp16"),
        takes_s=300,
    ),
    _bench(
        "sd15-offline",
        "SD1.5 at 512, pictures a second",
        *("--model", "random:sd15", "--steps", "20", "--scenario", "Offline", *_TURNS),
        *("--contenders", "fastsd/eager/fp16"),
    ),
    *(
        _against(model, steps, name, what, contender, takes_s=_COMPILE_S)
        for model, steps in (("sd15", "20"), ("sdxl", "10"))
        for name, what, contender in (
            ("compiled", "against diffusers compiled for the most speed", "diffusers-compile/fp16"),
            ("inductor", "torch.compile's code in our graph", "fastsd/inductor/fp16"),
            ("aoti", "that code compiled ahead of time", "fastsd/aoti-cuda/fp16"),
            ("aoti-fp8", "that with linear layers in fp8", "fastsd/aoti-cuda/fp8"),
        )
    ),
    _bench("sd21", "SD2.1 at 768", "--model", "random:sd21", "--steps", "20", *_HALF),
    Stage(
        "ops-bf16",
        "every op, bfloat16",
        ("fastsd", "bench", "ops", "--precision", "bf16", "--output", "{folder}/ops.json"),
        "ops.json",
    ),
)


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    *,
    budget_s: float = STAGE_S,
    again: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run the stages that `folder` does not have yet, as long as `budget_s` lasts.

    A stage that is not expected to end in time waits for the next; one that does not is stopped
    when the budget ends, and begun again; one that had the whole budget and more counts as failed.
    again: begin failed ones anew too. What compilers made is kept beside `folder` for them, and
    which kernels were the fastest in it.
    Returns each stage's outcome: done, failed, stopped or pending.
    """
    end = time.monotonic() + budget_s
    for stage in stages:
        place = folder / stage.name
        left = end - time.monotonic()
        needed = max(1.0, min(stage.takes_s, 0.95 * budget_s))
        over = ("done",) if again else ("done", "failed")
        if outcome_of(place)["outcome"] in over or left < needed:
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
    places = {"{folder}": str(fresh), "{truth}": str(place.parent / "truth")}
    command = [*RUN, *(_filled(word, places) for word in stage.command)]
    start = time.monotonic()
    compiled = place.parent.with_name(f"{place.parent.name}-compiled").resolve()
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str(compiled),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
        "FASTSD_CACHE": str(place.parent.resolve() / "cache"),  # which kernels were the fastest
        "FASTSD_MEASURE": "1",  # here and now, not where the table that ships was made
        **os.environ,
    }
    with (fresh / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            outcome = {"outcome": "done" if _ended(process, seconds) == 0 else "failed"}
        except subprocess.TimeoutExpired:
            outcome = {"outcome": "stopped"}
        finally:
            if process.poll() is None:  # its contenders too: they hold the GPU
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if outcome["outcome"] == "done" and _results_of(stage, fresh).get("stopped"):
        outcome = {"outcome": "stopped"}  # begun again another time; what it has is shown meanwhile
    lines = (fresh / "log.txt").read_text("utf-8", "replace").strip().splitlines()
    if outcome["outcome"] == "failed":
        failed = [line for line in lines if line.startswith("FAILED ")]  # as pytest names them
        outcome["reason"] = "; ".join(failed or lines[-1:]) or "no output"
    return {**outcome, "seconds": round(time.monotonic() - start, 1), "attempt": fresh.name}


def _results_of(stage: Stage, attempt: Path) -> dict[str, Any]:
    """Read what an attempt at a stage found, empty where there is nothing."""
    file = attempt / stage.results if stage.results else attempt
    if not file.is_file():
        return {}
    results: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return results


def _filled(word: str, places: Mapping[str, str]) -> str:
    for name, place in places.items():
        word = word.replace(name, place)
    return word


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Wait for a process, which is told to end when time runs out. Raises TimeoutExpired."""
    grace = min(GRACE_S, 0.2 * seconds)
    try:
        return process.wait(seconds - grace)
    except subprocess.TimeoutExpired:
        process.terminate()
        code = process.wait(grace)
        if code == -signal.SIGTERM:  # it is none that ends in order
            raise
        return code


def stages_table(
    stages: Sequence[Stage], folder: Path, outcomes: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """A row a measurement: the stage, and of each of its rows the time, the ratio and the share."""
    table = [["stage", "row", "p50", "speed vs reference", "share of limit"]]
    for stage, outcome in zip(stages, outcomes, strict=True):
        rows = []
        if "attempt" in outcome:
            rows = _results_of(stage, folder / stage.name / outcome["attempt"]).get("rows", [])
        if outcome["outcome"] != "done":
            reason = f": {outcome['reason']}" if "reason" in outcome else ""
            table.append([stage.name, f"{outcome['outcome']}{reason}"[: 4 * REASON], "", "", ""])
        elif not rows:
            table.append([stage.name, "done", duration(outcome["seconds"]), "", ""])
        table += [[stage.name, *_measurement(row)] for row in rows]
    return table


def _measurement(row: Mapping[str, Any]) -> list[str]:
    name = row.get("name") or f"{row['op']} {row['shape']} {row['implementation']}"
    p50 = row.get("p50_s") or row.get("latency_s", {}).get("p50")
    if p50 is None:
        return [f"{name}: {row.get('reason', 'no speed')}"[:REASON], "", "", ""]
    share = row.get("share") or row.get("limit", {}).get("share")
    return [
        name,
        duration(p50),
        ratio_text(row["ratio"]),
        "" if share is None else f"{100 * share:.0f}%",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is pending, write the table, print it but for ops, last a JSON of outcomes."""
    import torch

    from fastsd.benchmarks.report import aligned

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="what is done")
    parser.add_argument("--seconds", type=float, default=STAGE_S, help="to end within")
    parser.add_argument("--again", action="store_true", help="begin what failed anew")
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
    lacking = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if lacking:
        parser.error(f"{', '.join(lacking)} is not installed; run pip install 'fastsd[bench]'")
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU; `fastsd env` says why")
    options.output.mkdir(parents=True, exist_ok=True)
    outcomes = run_stages(
        stages, options.output, budget_s=options.seconds, again=options.again, say=_to_stderr
    )
    table = stages_table(stages, options.output, outcomes)
    (options.output / "table.txt").write_text("\n".join(aligned(table)) + "\n", "utf-8")
    # Of a hundred rows an op the table has all; the terminal, which may be short, the others.
    print("\n".join(aligned([row for row in table if not row[0].startswith("ops-")])))
    pending = [outcome["stage"] for outcome in outcomes if outcome["outcome"] != "done"]
    print(json.dumps({"output": str(options.output), "not_done": pending}))


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
