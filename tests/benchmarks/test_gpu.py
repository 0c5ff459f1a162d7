"""The GPU command's logic: stages that end, go on, and are told in a table. No GPU is needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastsd.benchmarks import gpu
from fastsd.benchmarks.contenders import Scene, choose, contenders
from fastsd.benchmarks.gpu import STAGE_S, STAGES, Stage, run_stages, stages_table


def stage(name: str, code: str, results: str | None = None) -> Stage:
    """A stage that runs a line of Python, as `python -m timeit` does."""
    return Stage(name, name, ("timeit", "-n1", "-r1", code), results, takes_s=0)


def test_stages_are_done_once_and_told(tmp_path: Path) -> None:
    counted = tmp_path / "count"
    code = f"open({str(counted)!r}, 'a').write('x')"
    write = Stage("write", "", ("timeit", "-n1", "-r1", ""), None)
    stages = [stage("first", code), stage("broken", "1 / 0"), write]
    for _ in range(2):
        outcomes = run_stages(stages, tmp_path / "gpu", budget_s=60, say=lambda line: None)
    assert [outcome["outcome"] for outcome in outcomes] == ["done", "failed", "done"]
    assert counted.read_text() == "x"
    assert "ZeroDivisionError" in outcomes[1]["reason"]
    table = stages_table(stages, tmp_path / "gpu", outcomes)
    assert [row[0] for row in table] == ["stage", "first", "broken", "write"]
    assert table[2][1].startswith("failed: ZeroDivisionError")
    (again,) = run_stages(stages[1:2], tmp_path / "gpu", budget_s=60, again=True, say=print)
    assert (again["outcome"], again["attempt"]) == ("failed", "attempt-2")


def test_a_failed_stage_of_tests_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTSD_CACHE", raising=False)
    told = "FAILED tests/a.py::test_one - assert 1 == 2\nFAILED tests/b.py::test_two\n2 failed"
    broken = stage("tests", f"print({told!r}); raise SystemExit(1)")
    (outcome,) = run_stages([broken], tmp_path, budget_s=60, say=lambda line: None)
    assert outcome["reason"] == (
        "FAILED tests/a.py::test_one - assert 1 == 2; FAILED tests/b.py::test_two"
    )
    (seen,) = run_stages(
        [stage("kept", "import os; print('cache: ' + os.environ['FASTSD_CACHE']); 1 / 0")],
        tmp_path,
        budget_s=60,
        say=lambda line: None,
    )
    log = (tmp_path / "kept" / seen["attempt"] / "log.txt").read_text()
    assert f"cache: {tmp_path / 'cache'}" in log, "which kernels were the fastest comes back too"


def test_a_stage_that_outlasts_the_budget_is_stopped_and_begun_again(tmp_path: Path) -> None:
    stages = [
        stage("quick", "import time; time.sleep(0.5)"),
        stage("long", "import time; time.sleep(30)"),
    ]
    outcomes = run_stages(stages, tmp_path, budget_s=3, say=lambda line: None)
    assert [outcome["outcome"] for outcome in outcomes] == ["done", "stopped"]
    # the whole budget is its own now, and does not suffice either
    outcomes = run_stages(stages, tmp_path, budget_s=1.5, say=lambda line: None)
    assert [outcome["outcome"] for outcome in outcomes] == ["done", "failed"]
    assert "more than" in outcomes[1]["reason"]


def test_a_stage_that_ends_in_order_when_told_to_is_done(tmp_path: Path) -> None:
    heeds = (
        "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: os._exit(0)); "
        "time.sleep(30)"
    )
    outcomes = run_stages([stage("long", heeds)], tmp_path, budget_s=4, say=lambda line: None)
    assert [outcome["outcome"] for outcome in outcomes] == ["done"]
    assert outcomes[0]["seconds"] < 4


def test_a_benchmark_cut_short_shows_its_rows_and_is_begun_again(tmp_path: Path) -> None:
    ratio = {"median": 0.5, "low": None, "high": None, "verdict": "too few samples"}
    rows = [{"name": "a", "latency_s": {"p50": 0.1}, "ratio": ratio}]
    results = json.dumps({"stopped": True, "rows": rows})
    code = f"open('{{folder}}/results.json', 'w').write({results!r})"
    stages = [
        stage("quick", "import time; time.sleep(0.7)"),
        stage("cut", code, "results.json"),
    ]
    for _ in range(2):
        outcomes = run_stages(stages, tmp_path, budget_s=10, say=lambda line: None)
        table = stages_table(stages, tmp_path, outcomes)
        (tmp_path / "quick" / "outcome.json").unlink()
    assert table[2:] == [
        ["cut", "stopped", "", "", ""],
        ["cut", "a", "100 ms", "2.00x (too few samples)", ""],
    ]
    assert outcomes[1]["attempt"] == "attempt-2"


def test_a_stage_that_would_not_end_in_time_is_not_begun(tmp_path: Path) -> None:
    quick = stage("quick", "import time; time.sleep(0.5)")
    long = replace(stage("long", ""), takes_s=10.0)
    outcomes = run_stages([quick, long], tmp_path, budget_s=10, say=lambda line: None)
    assert [outcome["outcome"] for outcome in outcomes] == ["done", "pending"]
    outcomes = run_stages([quick, long], tmp_path, budget_s=10, say=lambda line: None)
    assert [outcome["outcome"] for outcome in outcomes] == ["done", "done"]


def test_a_stages_rows_are_told(tmp_path: Path) -> None:
    outcome = {"outcome": "done", "seconds": 1.0, "attempt": "attempt-1"}
    stage_ = Stage("bench", "", (), "results.json")
    place = tmp_path / "bench" / "attempt-1"
    place.mkdir(parents=True)
    ratio = {"median": 0.5, "low": 0.4, "high": 0.6, "verdict": "faster"}
    rows = [
        {"name": "a", "latency_s": {"p50": 0.25}, "ratio": ratio, "limit": {"share": 0.4}},
        {"name": "b", "reason": "not installed"},
    ]
    (place / "results.json").write_text(json.dumps({"rows": rows}))
    assert stages_table([stage_], tmp_path, [outcome])[1:] == [
        ["bench", "a", "250 ms", "2.00x (1.67 to 2.50)", "40%"],
        ["bench", "b: not installed", "", "", ""],
    ]


def test_the_stages_are_well_formed(capsys: pytest.CaptureFixture[str]) -> None:
    assert STAGE_S <= 540 and len({stage.name for stage in STAGES}) == len(STAGES)
    for stage_ in STAGES:
        if stage_.results:
            assert any("{folder}" in word for word in stage_.command)
    gpu.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        stage_.name for stage_ in STAGES
    ]
    with pytest.raises(SystemExit):
        gpu.main(["--stage", "nothing"])
    assert "sd15" in capsys.readouterr().err


def test_the_command_needs_a_gpu_and_makes_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--output", str(tmp_path / "new" / "gpu"), "--seconds", "1"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert "torch sees no GPU" in capsys.readouterr().err and not (tmp_path / "new").exists()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    gpu.main(arguments)
    assert "pending" in (tmp_path / "new" / "gpu" / "table.txt").read_text()


def test_every_stage_names_contenders_that_there_are() -> None:
    known = contenders("cuda")
    scene = Scene(model="builtin", size=64, steps=1, guidance=7.5, prompts=("a cat",))
    asked = 0
    for stage_ in STAGES:
        words = stage_.command
        for option, pattern in zip(words, words[1:], strict=False):
            if option == "--contenders":
                assert choose(known, [pattern], scene), pattern
                asked += 1
    assert asked > 20
    assert not any(contender.only_on == "cuda" for contender in contenders("cpu").values())


def test_a_profile_names_what_takes_the_time(tmp_path: Path) -> None:
    from fastsd.benchmarks import step_profile

    report = tmp_path / "profile.md"
    step_profile.main(["--device", "cpu", "--output", str(report)])
    lines = report.read_text().splitlines()
    assert lines[0] == "## 1 at once" and lines[2].startswith("| kernel") and len(lines) > 10
    assert any("conv" in line for line in lines[:12])
