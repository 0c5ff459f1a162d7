"""A run: turns, rounds, workers, quality; and that what is planted is seen."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastsd
from fastsd.backends import BACKENDS
from fastsd.benchmarks import judge, report, worker
from fastsd.benchmarks import run as run_module
from fastsd.benchmarks.contenders import (
    OTHERS,
    Contender,
    Scene,
    by_default,
    choose,
    contenders,
    reference_among,
)
from fastsd.benchmarks.limits import limit
from fastsd.benchmarks.run import (
    SCENARIOS,
    ContenderFailed,
    Record,
    Run,
    Seat,
    Stopped,
    _offline,
    memory_need,
    plan_rounds,
    scene_of,
    slow_ones,
    take_turns,
)
from fastsd.benchmarks.timing import paired_ratio
from fastsd.benchmarks.truth import Truth
from fastsd.benchmarks.worker import Worker
from fastsd.checkpoints import open_checkpoint
from fastsd.errors import CheckpointError, UsageError
from fastsd.export.parts import source_digest
from tests.benchmarks import synthetic

SYNTHETIC = "tests.benchmarks.synthetic"
SCENE = Scene(model="builtin", size=64, steps=2, guidance=7.5, prompts=("a cat", "a dog"))
ENVIRONMENT: dict[str, Any] = {
    "cpu": {"name": "Test CPU", "cores": 2},
    "devices": {"cpu": "usable"},
    "packages": {"torch": "2", "diffusers": "not installed"},
    "system": "Test",
    "python": "3",
}


# --- turns ----------------------------------------------------------------------------------------


class Machine:
    """A seat whose times are drawn from a machine that slows down while the run goes on."""

    def __init__(self, log: list[tuple[str, int]], name: str, slowdown: float, seed: int) -> None:
        self._log, self._name, self._slowdown = log, name, slowdown
        self._generator = np.random.default_rng(seed)

    def draw(self, draw: int, keep: Path | None) -> dict[str, Any]:
        self._log.append((self._name, draw))
        drift = 1 + draw / 20
        noise = self._generator.normal(1, 0.03) + 3 * (self._generator.random() < 0.1)
        return {"seconds": 0.1 * drift * self._slowdown * noise, "memory_bytes": 1}


def simulate(seed: int, turns: int = 20) -> tuple[dict[str, str], list[tuple[str, int]]]:
    log: list[tuple[str, int]] = []
    slowdowns = {"a": 1.0, "a again": 1.0, "slowed": 1.1}
    seats = {n: Machine(log, n, s, 3 * seed + i) for i, (n, s) in enumerate(slowdowns.items())}
    records = {name: Record(Contender(name, "")) for name in seats}
    take_turns(seats, range(turns), records, lambda name, turn: None, settle_s=0)
    times = {name: list(record.turns.values()) for name, record in records.items()}
    return {name: paired_ratio(times[name], times["a"]).verdict for name in times}, log


def test_contenders_draw_in_turns() -> None:
    _, log = simulate(0, turns=2)
    assert log == [(name, turn) for turn in (0, 1) for name in ("a", "a again", "slowed")]


def test_twice_the_same_and_a_planted_slowdown() -> None:
    """In 100 runs on a machine that slows to half its speed: 95 see no difference, 95 a tenth."""
    verdicts = [simulate(seed)[0] for seed in range(100)]
    same = [verdict["a again"] for verdict in verdicts]
    assert same.count("no difference") >= 90  # 95 %, less what a hundred runs may miss
    assert [verdict["slowed"] for verdict in verdicts].count("slower") >= 95


def test_a_seat_that_fails_leaves_and_the_others_go_on() -> None:
    class Failing:
        def draw(self, draw: int, keep: Path | None) -> dict[str, Any]:
            raise ContenderFailed("gone")

    log: list[tuple[str, int]] = []
    seats: dict[str, Any] = {"a": Machine(log, "a", 1, 0), "b": Failing()}
    records = {name: Record(Contender(name, "")) for name in seats}
    take_turns(seats, range(3), records, lambda name, turn: None, settle_s=0)
    assert records["b"].failure == "gone" and len(records["a"].turns) == 3


# --- rounds ---------------------------------------------------------------------------------------


def test_all_that_fits_draws_together() -> None:
    plan = plan_rounds({"ref": 4, "a": 4, "b": 4}, "ref", 12)
    assert plan.groups == (("ref", "a", "b"),)
    assert plan.rounds(3) == [(("ref", "a", "b"), range(3))]


def test_rounds_share_the_reference_and_no_turn() -> None:
    plan = plan_rounds({"a": 5, "ref": 4, "b": 4, "c": 3}, "ref", 12)
    assert plan.groups == (("ref", "a", "c"), ("ref", "b"))
    assert [turns for _, turns in plan.rounds(6)] == [range(6), range(6, 12)]


def test_what_does_not_fit_beside_the_reference_draws_alone_twice() -> None:
    """The second time in reverse order: a drift of 1 % a draw cancels in the means."""
    plan = plan_rounds({"ref": 8, "a": 8}, "ref", 12)
    assert plan.alone
    assert plan.rounds(5) == [
        (("ref",), range(3)),
        (("a",), range(3)),
        (("a",), range(3, 5)),
        (("ref",), range(3, 5)),
    ]
    order = [name for (name,), turns in plan.rounds(6) for _ in turns]
    drift = {name: [i for i, who in enumerate(order) if who == name] for name in ("ref", "a")}
    assert np.mean(drift["ref"]) == np.mean(drift["a"])
    assert plan_rounds({"ref": 8}, "ref", 4).rounds(2) == [(("ref",), range(2))]


def test_the_need_of_sd15_is_some_gigabytes() -> None:
    scene = replace(SCENE, model="random:sd15", size=512)
    need = memory_need(Contender("x", ""), scene)
    assert 5 < need / 2**30 < 7


# --- who takes part -------------------------------------------------------------------------------


def test_a_new_backend_takes_part_by_being_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "other", BACKENDS["eager"])
    known = contenders("cpu")
    assert {"fastsd/eager/fp32", "fastsd/other/bf16", "diffusers/fp32"} <= set(known)
    assert known["fastsd/other/bf16"].options == {"backend": "other", "precision": "bf16"}
    assert "diffusers/fp16" not in known and "diffusers/fp16" in contenders("cuda")
    assert "openvino/fp32" not in contenders("cuda")


def test_choosing() -> None:
    known = contenders("cpu")
    names = [c.name for c in choose(known, ["fastsd/eager/*", "again=fastsd/eager/fp32"], SCENE)]
    assert names == ["fastsd/eager/fp32", "fastsd/eager/fp16", "fastsd/eager/bf16", "again"]
    for wrong, message in (("tensorflow", "no contender"), ("x=fastsd/*", "several")):
        with pytest.raises(UsageError, match=message):
            choose(known, [wrong], SCENE)


def test_an_engine_of_another_model_does_not_take_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = source_digest(open_checkpoint("builtin"))
    manifest = SimpleNamespace(model="builtin", source=source, precision="bf16")
    monkeypatch.setattr("fastsd.benchmarks.contenders.read_manifest", lambda folder: manifest)
    (engine,) = choose({}, [f"mine={tmp_path}"], SCENE)
    assert (engine.name, engine.precision) == ("mine", "bf16")
    with pytest.raises(UsageError, match=r"another model, builtin, than random:sd15; give"):
        choose({}, [f"mine={tmp_path}"], replace(SCENE, model="random:sd15"))


def test_by_default_nobody_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path))
    ready = Contender("ready", "", prepares="x:y", kept="ready")
    folder = ready.folder(SCENE)
    assert folder is not None and folder.is_relative_to(tmp_path)
    folder.mkdir(parents=True)
    known = {
        "quick": Contender("quick", ""),
        "compiled": Contender("compiled", "", compiles=True),
        "exported": Contender("exported", "", prepares="x:y", kept="exported"),
        "ready": ready,
        "absent": Contender("absent", "", packages=("no_such_package",), prepares="x:y"),
    }
    chosen, left_out = by_default(known, SCENE)
    assert [c.name for c in chosen] == ["quick", "ready", "absent"]
    assert set(left_out) == {"compiled", "exported"}
    assert "--contenders" in left_out["compiled"]


def test_an_export_is_kept_by_what_it_depends_on() -> None:
    contender = Contender("x", "", prepares="x:y", kept="x")
    folders = {
        contender.folder(scene)
        for scene in (
            SCENE,
            replace(SCENE, size=128),
            replace(SCENE, guidance=1.0),
            replace(SCENE, batch=2),
            replace(SCENE, model="random:sd15"),
        )
    }
    assert len(folders) == 5
    assert contender.folder(replace(SCENE, steps=7)) in folders
    assert Contender("x", "").folder(SCENE) is None


def test_the_reference_is_diffusers_where_it_is_installed() -> None:
    known = contenders("cpu")
    assert reference_among(known).name == "diffusers/fp32"
    absent = {**known, "diffusers/fp32": Contender("diffusers/fp32", "", packages=("no_such",))}
    assert reference_among(absent).name == "fastsd/eager/fp32"


def test_a_scene_is_filled_in() -> None:
    scene = scene_of("random:sdxl")
    assert (scene.size, scene.guidance, scene.steps) == (1024, 5.0, 20)
    assert scene.texts(1) == [scene.prompts[1]] and scene.seeds(1) == [1]
    builtin = scene_of("builtin", batch=2)
    assert builtin.size == 128 and len(builtin.prompts) == 256 and builtin.seeds(3) == [6, 7]
    for wrong, message in (({"size": 60}, "multiple"), ({"sampler": "eulr"}, "euler")):
        with pytest.raises(UsageError, match=message):
            scene_of("builtin", **wrong)


# --- quality --------------------------------------------------------------------------------------


def test_planted_noise_in_the_pictures_is_seen() -> None:
    generator = np.random.default_rng(0)
    clean = {i: generator.integers(50, 200, (1, 64, 64, 3)).astype(np.uint8) for i in range(3)}
    noise = generator.normal(0, 2.55, (64, 64, 3)).round()  # 1 % of the range: 40 dB
    noisy = {i: (picture + noise).astype(np.uint8) for i, picture in clean.items()}
    latents = generator.standard_normal((1, 4, 8, 8)).astype(np.float32)
    same = judge.judge(clean, clean, latents, latents)
    equal = {"median": 100, "worst": 100, "draws": {"0": 100, "1": 100, "2": 100}}
    assert same["psnr_db"] == equal and same["verdict"] == "same"
    assert report.quality_text(same).startswith("equal of 3")
    speck = np.zeros((1, 1024, 1024, 3), np.uint8)
    speck[0, 0, 0, 0] = 1  # 113 dB
    other = judge.judge({0: speck}, {0: 0 * speck}, latents, latents)
    assert report.quality_text(other).startswith("99.9 dB of 1"), "it is not the same to the bit"
    seen = judge.judge(noisy, clean, latents + np.float32(0.5), latents)
    assert seen["psnr_db"]["worst"] == pytest.approx(40, abs=0.5) and seen["verdict"] == "close"
    assert seen["ssim"]["worst"] < 0.9999
    assert seen["latents"]["largest_error"] == pytest.approx(0.5)
    one_bad = {**clean, 2: noisy[2] // 2}
    assert judge.judge(one_bad, clean, latents, latents)["verdict"] == "different"


def test_the_task_score_counts_what_shows_its_name() -> None:
    from fastsd.quality import builtin_atlas, tasks

    atlas = builtin_atlas()
    task = tasks(atlas)["english"]
    right = {i: atlas.pictures[task.expected[i]][None] for i in range(4)}
    assert judge.score(right) == {"top1": 1, "top5": 1, "pictures": 4, "standard_error": 0}
    wrong = {**right, 0: 255 - right[0]}
    assert judge.score(wrong)["top1"] == 0.75
    pairs = {0: np.concatenate([right[0], right[1]]), 1: np.concatenate([right[2], right[3]])}
    assert judge.score(pairs)["top1"] == 1
    assert judge.builtin_prompts() == task.names


# --- what is kept from run to run -----------------------------------------------------------------


class Here:
    """A seat in this process: as fast as its painter, and as good where no process matters."""

    open, draw = Seat.open, Seat.draw

    def __init__(self, contender: Contender, scene: Scene) -> None:
        self.contender, self.scene = contender, scene
        self._worker, self._spawned = Worker(), time.time()

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._worker.answer(json.loads(json.dumps({"do": do, **fields})))
        return answer

    def close(self) -> None:
        pass


def test_a_library_is_imported_before_it_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also one whose classes come when they are asked for: its time is no loading."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", True)
    lazy = "import time\ndef __getattr__(name):\n    if name == 'Lazy':\n        time.sleep(0.5)\n"
    (tmp_path / "slow_library.py").write_text(f"{lazy}        return 1\n    raise AttributeError\n")
    opener, options = f"{SYNTHETIC}:open_importing", {"module": "slow_library"}
    contender = Contender("slow", opener, options, imports=("slow_library:Lazy",))
    begun = time.time()
    cold = Here(contender, SCENE).open()  # type: ignore[misc]
    assert cold["load_s"] < 0.5 <= time.time() - begun - cold["load_s"]
    for other in OTHERS:
        assert other.imports[0] == "diffusers:StableDiffusionPipeline"
        assert ("onnxruntime" in other.imports) == other.name.startswith("onnxruntime")
        assert ("openvino" in other.imports) == other.name.startswith("openvino")


def test_pictures_in_fp32_are_kept_and_not_drawn_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def painter(name: str, **options: Any) -> Contender:
        return Contender(name, f"{SYNTHETIC}:open_painter", options)

    monkeypatch.setattr(run_module, "Seat", Here)
    monkeypatch.setattr(Run, "_limits", lambda self: ({}, {"copy": 1e9}))
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    # which a worker turns off in its process
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", True)
    known = {c.name: c for c in (painter("exact"), painter("a"), painter("b", noise=0.01))}
    monkeypatch.setattr(run_module, "contenders", lambda device: known)
    monkeypatch.setattr(run_module, "reference_among", lambda known: known["exact"])

    def measured(*patterns: str, steps: int = 2, repeats: int = 6) -> dict[str, Any]:
        results, _ = run_module.bench(
            replace(SCENE, steps=steps),
            patterns,
            repeats=repeats,
            scenarios=["SingleStream"],
            environment=ENVIRONMENT,
            say=lambda line: None,
            truth=tmp_path / "truth",
        )
        return results

    first = measured("b")
    assert first["reference"] == first["truth"] == "exact" and len(first["rows"]) == 2
    second = measured("a", "b")
    assert (second["reference"], second["truth"]) == ("a", "exact")
    rows = rows_of(second)
    assert set(rows) == {"a", "b"}
    assert rows["a"]["quality"]["verdict"] == "same" and rows["a"]["quality"]["pictures"] == 4
    planted = rows_of(first)["b"]["quality"]["latents"]["relative_error"]
    assert rows["b"]["quality"]["latents"]["relative_error"] == pytest.approx(planted)
    (table,) = [t for t in [report.speed_table(second)] if t]
    assert any(line[0] == "a" and "reference" in line for line in table)
    assert "reference" not in [line[table[0].index("worst picture")] for line in table]
    assert measured("b", steps=3)["reference"] == "exact", "another scene has none yet"
    assert measured("exact", "b")["reference"] == "exact"
    few = [measured("b", steps=5, repeats=n) for n in (2, 2, 6, 6)]
    assert [results["reference"] for results in few] == ["exact", "b"] * 2
    assert [rows_of(results)["b"]["quality"]["pictures"] for results in few] == [2, 2, 6, 4]

    # where two fit at a time, the second pair draws the same pictures as the first
    three = [painter(name) for name in "abc"]
    kept = Truth.kept(tmp_path / "truth", SCENE, 6)
    available = int(2.5 * memory_need(three[0], SCENE))
    run = Run(SCENE, three, reference="a", repeats=6, truth=kept, available=available)
    results, _ = run.measure(ENVIRONMENT)
    assert results["rounds"] == [["a", "b"], ["a", "c"]]
    assert [row["quality"]["pictures"] for row in results["rows"]] == [4, 4, 4]

    # where none fits beside another, no turns pair, and nothing is said of chance
    run = Run(SCENE, three, reference="a", repeats=6, truth=kept, available=1)
    results, _ = run.measure(ENVIRONMENT)
    assert results["rounds"] == [["a"], ["b"], ["c"], ["c"], ["b"], ["a"]]
    for row in results["rows"]:
        ratio = row["ratio"]
        assert (ratio["low"], ratio["high"], ratio["verdict"]) == (None, None, "not in turns")
        assert ratio["median"] == pytest.approx(np.median(ratio["samples"]))
    assert {row[-2] for row in report.compare(results, results)[1:]} == {"not in turns"}
    told = "\n".join(report.terminal(results))
    assert "x (not in turns)" in told and "no turns pair: speeds are of medians" in told

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Truth, "keep", full)
    assert measured("b", steps=4)["rows"], "the results are worth more"


# --- a whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run() -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """A run of contenders that are what they say, in real processes."""

    def painter(name: str, **options: Any) -> Contender:
        return Contender(name, f"{SYNTHETIC}:open_painter", options)

    said: list[str] = []
    run = Run(
        SCENE,
        [
            painter("exact"),
            painter("slow", seconds=0.2),
            painter("noisy", noise=0.01),
            Contender("unusable too", f"{SYNTHETIC}:open_nothing"),
            Contender("uninstalled", "", packages=("no_such",), install="pip install no_such"),
            Contender("unusable", f"{SYNTHETIC}:open_nothing"),
            Contender("dying", f"{SYNTHETIC}:open_dying"),
        ],
        reference="exact",
        repeats=7,
        scenarios=SCENARIOS,
        left_out={"compiled": "left out: it compiles"},
        say=said.append,
    )
    results, pictures = run.measure(ENVIRONMENT)
    return results, pictures, said


def rows_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in results["rows"]}


def test_a_run_measures_and_judges(
    whole_run: tuple[dict[str, Any], dict[str, Any], list[str]],
) -> None:
    results, pictures, said = whole_run
    rows = rows_of(results)
    assert json.loads(report.to_json_line(results)) == results
    (together,) = results["rounds"]
    assert together == ["exact", "slow", "noisy", "unusable too", "unusable", "dying"]
    for name in ("exact", "slow", "noisy"):
        assert rows[name]["latency_s"]["n"] == 7 and rows[name]["quality"]["pictures"] == 7
        assert rows[name]["memory_bytes"] > 1 << 20
        cold = rows[name]["cold_start_s"][0]
        steps = cold["process_s"] + cold["import_s"] + cold["load_s"] + cold["first_call_s"]
        assert cold["total_s"] == pytest.approx(steps) and cold["process_s"] > 0
        assert cold["total_s"] - cold["first_call_s"] < cold["first_step_s"] < cold["total_s"]
        assert rows[name]["parts_ms"]["unet"] >= 10 - 1
    assert rows["slow"]["explained"] == ["paints in 0.2 s"]
    assert rows["exact"]["latency_s"]["p50"] >= 0.01 and rows["slow"]["latency_s"]["p50"] >= 0.2
    assert rows["slow"]["ratio"]["verdict"] == "slower"
    assert rows["exact"]["quality"]["verdict"] == rows["slow"]["quality"]["verdict"] == "same"
    assert rows["noisy"]["quality"]["psnr_db"]["worst"] == pytest.approx(40, abs=1)
    assert rows["noisy"]["quality"]["latents"]["largest_error"] == pytest.approx(0.01, abs=1e-4)
    offline = rows["noisy"]["offline"]
    assert offline["pictures_per_s"] == offline["tried"][str(offline["batch"])]
    assert offline["pictures_per_s"] == max(offline["tried"].values())
    assert rows["exact"]["offline"] is None, "the reference's would take the longest"
    assert set(pictures) == {"exact", "slow", "noisy", "dying"}
    assert results["ceilings"]["fp32"] > 1e9 and results["work"]["unet"]["flop"] > 1e8
    assert any("first picture after" in line for line in said)


def test_the_best_batch_draws_the_most_pictures_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a painter's sleep alone moves: more pictures take it no longer."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(synthetic, "time", SimpleNamespace(sleep=sleep))
    for seconds in (0.1, 0.2):
        seat = Here(Contender("painter", ""), SCENE)
        seat._worker.scene, seat._worker.drawer = SCENE, synthetic.open_painter(SCENE, seconds)
        found = _offline(seat)  # type: ignore[arg-type]
        assert found["batch"] == 16 and found["pictures_per_s"] == pytest.approx(16 / seconds)
        speeds = {str(size): pytest.approx(size / seconds) for size in (1, 2, 4, 8, 16)}
        assert found["tried"] == speeds


def test_a_batch_too_large_for_the_memory_is_the_last() -> None:
    class Fragile:
        def ask(self, do: str, *, size: int, repeats: int) -> dict[str, Any]:
            if size > fits:
                raise ContenderFailed("CUDA out of memory")
            return {"seconds": [1.0]}

    fits = 4
    found = _offline(Fragile())  # type: ignore[arg-type]
    assert found["batch"] == 4 and found["tried"] == {"1": 1.0, "2": 2.0, "4": 4.0}
    fits = 0
    with pytest.raises(ContenderFailed, match="out of memory"):
        _offline(Fragile())  # type: ignore[arg-type]


def test_an_engine_of_one_batch_may_have_no_batch_to_try() -> None:
    class Fixed:
        def ask(self, do: str, *, size: int, repeats: int) -> dict[str, Any]:
            return {"seconds": [1.0] if size == 3 else []}

    with pytest.raises(ContenderFailed, match="draws none of the batches 1, 2, 4, 8, 16"):
        _offline(Fixed())  # type: ignore[arg-type]


def test_a_table_of_a_head_alone_is_none() -> None:
    assert report._without_empty_columns([["batch", "pictures a second"]]) == []


def test_a_row_without_quality_is_no_speed(
    whole_run: tuple[dict[str, Any], dict[str, Any], list[str]],
) -> None:
    results, _, _ = whole_run
    rows = rows_of(results)
    reasons = {name: rows[name]["reason"] for name in rows if "reason" in rows[name]}
    assert reasons == {
        "uninstalled": "not installed: no_such; pip install no_such",
        "unusable too": "paint is not installed; run pip install paint",
        "unusable": "paint is not installed; run pip install paint",
        "dying": "failed after 1 of its turns: error: the brush broke",
        "compiled": "left out: it compiles",
    }
    assert rows["dying"]["status"] == "failed" and rows["dying"]["latency_s"]["n"] == 1
    assert rows["dying"]["quality"]["verdict"] == "same", "the turn that it finished counts"
    silent = reasons.keys() - {"dying"}
    assert not any("latency_s" in rows[name] for name in silent)
    speeds = "\n".join(report.aligned(report.speed_table(results)))
    assert not any(name in speeds for name in silent)
    grouped = [line.split(": ")[0] for line in report.unmeasured(results)]
    assert grouped == ["unusable too, unusable", "uninstalled", "dying", "compiled"]


def test_by_default_nobody_who_crawls_here() -> None:
    seconds = {"exact": 1.3, "half": 26.0, "slow": 5.0, "quick": 0.1}
    assert slow_ones(seconds, "exact") == ["half"]


@pytest.mark.slow
def test_what_is_planted_in_a_real_model_is_seen() -> None:
    """The same twice, a tenth slower, 1 % of noise: on a machine that has nothing else to do."""

    def planted(name: str, **options: float) -> Contender:
        return Contender(name, f"{SYNTHETIC}:open_planted", options)

    run = Run(
        scene_of("builtin", steps=6),
        [
            planted("exact"),
            planted("again"),
            planted("slowed", slowdown=0.1),
            planted("noisy", noise=0.01),
        ],
        reference="exact",
        repeats=30,
        scenarios=["SingleStream"],
    )
    rows = rows_of(run.measure(ENVIRONMENT)[0])
    ratios = {name: row["ratio"] for name, row in rows.items()}
    assert ratios["again"]["verdict"] == "no difference", ratios
    assert ratios["slowed"]["verdict"] == "slower" and ratios["slowed"]["low"] > 1, ratios
    assert rows["again"]["quality"]["psnr_db"]["worst"] == 100
    assert rows["noisy"]["quality"]["verdict"] == "close"
    assert 37 < rows["noisy"]["quality"]["psnr_db"]["worst"] < 43


def test_who_does_not_answer_is_given_up_and_told_so() -> None:
    seat = Seat(Contender("asleep", ""), SCENE)
    try:
        with pytest.raises(ContenderFailed, match=r"no answer within 0\.01 s"):
            seat.ask("limits", limit_s=0.01)  # its process takes longer to start
    finally:
        seat.close()


def test_a_run_that_is_told_to_end_keeps_what_was_drawn() -> None:
    chosen = [
        Contender(name, f"{SYNTHETIC}:open_painter", {"seconds": seconds})
        for name, seconds in (("exact", 0.01), ("slow", 0.1))
    ]
    said: list[str] = []
    run = Run(
        SCENE,
        chosen,
        reference="exact",
        repeats=10_000,
        scenarios=["SingleStream"],
        say=said.append,
    )
    run._limits = lambda: ({}, {})  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)

    def end_soon() -> None:
        while len(run.records["slow"].turns) < 7:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_soon, daemon=True).start()
    results, pictures = run.measure(ENVIRONMENT)
    assert signal.getsignal(signal.SIGTERM) == before
    assert results["stopped"] and said[-1].startswith("stopped early")
    rows = rows_of(results)
    assert (
        7 <= rows["slow"]["latency_s"]["n"] < 100 and rows["slow"]["ratio"]["verdict"] == "slower"
    )
    assert rows["slow"]["quality"]["verdict"] == "same" and set(pictures) == {"exact", "slow"}


def test_a_reference_that_dies_in_mid_run_costs_no_finished_turn() -> None:
    chosen = [
        Contender("reference", f"{SYNTHETIC}:open_dying"),
        Contender("other", f"{SYNTHETIC}:open_painter", {"noise": 0.01}),
    ]
    said: list[str] = []
    run = Run(SCENE, chosen, reference="reference", repeats=7, say=said.append)
    run._limits = lambda: ({}, {})  # type: ignore[method-assign]
    results, pictures = run.measure(ENVIRONMENT)
    rows = rows_of(results)
    assert results["stopped"] and said[-1].startswith("stopped early")
    assert rows["reference"]["status"] == "failed" and rows["other"]["status"] == "measured"
    assert rows["reference"]["reason"] == "failed after 1 of its turns: error: the brush broke"
    assert len(rows["other"]["ratio"]["samples"]) == 1
    assert rows["other"]["quality"]["psnr_db"]["worst"] == pytest.approx(40, abs=1)
    assert set(pictures) == {"reference", "other"}


def test_a_commit_knows_of_changed_and_of_new_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FASTSD_COMMIT", raising=False)
    monkeypatch.setattr(fastsd, "__file__", str(tmp_path / "fastsd" / "__init__.py"))
    assert run_module.commit() is None
    (tmp_path / "fastsd" / "models").mkdir(parents=True)
    (tmp_path / "fastsd" / "__init__.py").touch()
    me = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), (*me, "commit", "-q", "-m", "one")):
        run_module._git(tmp_path, *words)
    head = run_module._git(tmp_path, "rev-parse", "--short", "HEAD")
    (tmp_path / "notes.md").touch()
    assert run_module.commit() == head
    new = tmp_path / "fastsd" / "models" / "new.py"
    new.touch()
    assert run_module.commit() == f"{head}+"
    new.unlink()
    (tmp_path / "fastsd" / "__init__.py").write_text("changed = True\n")
    assert run_module.commit() == f"{head}+"


def test_the_commit_is_that_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = ["before"]
    monkeypatch.setattr(run_module, "commit", lambda: now[0])
    run = Run(
        SCENE, [Contender("a", f"{SYNTHETIC}:open_painter")], reference="a", repeats=1, scenarios=()
    )

    def limits() -> tuple[dict[str, Any], dict[str, float]]:
        now[0] = "after"
        return {}, {}

    run._limits = limits  # type: ignore[method-assign]
    assert run.measure(ENVIRONMENT)[0]["commit"] == "before"


def test_of_many_turns_other_makers_draw_a_few_evenly_spread() -> None:
    own = "fastsd.benchmarks.drawing:open_fastsd"
    chosen = [
        Contender("diffusers/fp32", "fastsd.benchmarks.baselines:open_diffusers"),
        Contender("under another name", own),
    ]
    run = Run(SCENE, chosen, reference="diffusers/fp32", repeats=50)
    turns = [turn for turn in range(100) if run._draws("diffusers/fp32", turn)]
    assert len(turns) == 24 and turns[12:] == [50 + turn for turn in turns[:12]], "two rounds alike"
    assert set(np.diff(turns)) == {4, 5}, "no drift is theirs or ours alone"
    assert all(run._draws("under another name", turn) for turn in range(100))
    run.repeats = 40
    assert all(run._draws("diffusers/fp32", turn) for turn in range(40))
    alone = Run(SCENE, chosen[:1], reference="diffusers/fp32", repeats=50)
    assert all(alone._draws("diffusers/fp32", turn) for turn in range(50))


def test_a_run_that_is_ended_before_its_turns_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(SCENE, [Contender("exact", "")], reference="exact")
    run._limits = lambda: ({}, {})  # type: ignore[method-assign]

    def stopped(_: object) -> None:
        raise Stopped

    monkeypatch.setattr(run, "_draw_all", stopped)
    with pytest.raises(ContenderFailed, match="stopped before it drew in turn"):
        run.measure(ENVIRONMENT)


def test_no_reference_no_run() -> None:
    with pytest.raises(UsageError, match="must take part"):
        Run(SCENE, [Contender("a", "")], reference="b")
    with pytest.raises(UsageError, match="SingleStream, ColdStart"):
        Run(SCENE, [Contender("a", "")], reference="a", scenarios=["Serving"])
    gone = Contender("gone", "", packages=("no_such",), install="pip install no_such")
    run = Run(SCENE, [gone], reference="gone")
    run._limits = lambda: ({}, {})  # type: ignore[method-assign]
    with pytest.raises(ContenderFailed, match="pip install no_such"):
        run.measure(ENVIRONMENT)


# --- the report -----------------------------------------------------------------------------------


def test_the_report_holds_what_it_promises(
    whole_run: tuple[dict[str, Any], dict[str, Any], list[str]], tmp_path: Path
) -> None:
    results, pictures, _ = whole_run
    report.write_report(tmp_path / "new" / "run", results, pictures)
    folder = tmp_path / "new" / "run"
    plots = {"latency.png", "quality.png", "limit.png", "parts.png", "contact-sheet.png"}
    assert {file.name for file in folder.iterdir()} == {"results.json", "report.md", *plots}
    assert report.read_results(folder) == report.read_results(folder / "results.json") == results
    text = (folder / "report.md").read_text("utf-8")
    for name in (*plots, "| exact |", "pip install no_such", "guidance 7.5", "Test CPU"):
        assert name in text
    with pytest.raises(UsageError, match="exists already"):
        report.write_report(folder, results, pictures)


def test_every_scenario_is_told_with_its_quality(
    whole_run: tuple[dict[str, Any], dict[str, Any], list[str]],
) -> None:
    """In the tables and in the line of JSON, also where it was the only one."""

    def without_speeds(copy: dict[str, Any]) -> None:
        for row in copy["rows"]:
            row.pop("latency_s", None)
            row["parts_ms"] = None

    results = changed(whole_run[0], without_speeds)
    lines = report.terminal(results)
    assert {"ColdStart", "Offline"} <= {line.split(" ")[0] for line in lines if line}
    told = [line for line in lines if line.startswith("noisy ")]
    assert len(told) == 2 and all("dB of 7" in line for line in told)
    brief = rows_of(report.summary(results))["noisy"]
    assert brief["psnr_db"] == pytest.approx(40, abs=1) and brief["pictures"] == 7
    assert brief["cold_start_s"] > 0 and brief["pictures_per_s"] > 0


def test_a_report_says_that_its_run_was_stopped(
    whole_run: tuple[dict[str, Any], dict[str, Any], list[str]],
) -> None:
    def stopped(copy: dict[str, Any]) -> None:
        copy["stopped"], copy["repeats"] = True, 40

    for results, times in ((whole_run[0], 0), (changed(whole_run[0], stopped), 1)):
        for lines in (report.terminal(results), report._markdown_report(results, [])):
            assert lines.count("stopped early: 7 of 40 turns") == times


def test_parts_have_units_and_colours_of_their_own(
    whole_run: tuple[dict[str, Any], dict[str, Any], list[str]],
) -> None:
    def slower(copy: dict[str, Any]) -> None:
        rows_of(copy)["noisy"]["parts_ms"]["unet"] = 2650.0

    head, *rows = report.parts_table(changed(whole_run[0], slower))
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert cells["noisy"]["UNet, a step"] == "2.65 s"
    assert cells["exact"]["UNet, a step"].endswith(" ms")
    colours = [report._PART_COLOURS[name] for name in report._PART_COLOURS]
    assert len(set(colours)) == len(colours)


def test_few_samples_are_no_distribution(
    whole_run: tuple[dict[str, Any], dict[str, Any], list[str]],
) -> None:
    head, *rows = report.speed_table(whole_run[0])
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert cells["exact"]["n"] == "7" and cells["exact"]["p90"] and cells["exact"]["largest"]
    assert cells["dying"]["n"] == "1" and cells["dying"]["p50"]
    assert cells["dying"]["p90"] == cells["dying"]["largest"] == ""
    lines = report.readme_table({"run": whole_run[0]})
    (line,) = (line for line in lines if "| dying |" in line)
    assert f"| {cells['dying']['p50']} | 1 |" in line
    axes = report._figure(9, 4).subplots()
    report._latency(axes, report._by_speed(whole_run[0]), whole_run[0])
    dotted = [line for line in axes.lines if line.get_marker() == "."]
    assert len(dotted) == 1 and len(dotted[0].get_xdata()) == 1
    assert sum(line.get_marker() == "|" for line in axes.lines) >= 3


def test_a_column_is_what_its_title_says(
    whole_run: tuple[dict[str, Any], dict[str, Any], list[str]],
) -> None:
    def hundred(copy: dict[str, Any]) -> None:
        rows_of(copy)["exact"]["latency_s"] |= {"p99": 0.777, "largest": 0.888, "n": 100}

    def all_hundred(copy: dict[str, Any]) -> None:
        hundred(copy)
        copy["rows"] = [rows_of(copy)["exact"]]

    for change, title, text in ((hundred, "largest", "888 ms"), (all_hundred, "p99", "777 ms")):
        head, *rows = report.speed_table(changed(whole_run[0], change))
        (exact,) = (row for row in rows if row[0] == "exact")
        assert exact[head.index(title)] == text and len({"p99", "largest"} & set(head)) == 1


def test_a_report_of_a_gpu_says_that_fp32_is_without_tf32(
    whole_run: tuple[dict[str, Any], dict[str, Any], list[str]],
) -> None:
    def on_gpu(copy: dict[str, Any]) -> None:
        copy["scene"]["device"] = "cuda"
        copy["environment"]["devices"]["cuda:0"] = "GPU"

    told = [
        "TF32" in " ".join(report._markdown_report(changed(whole_run[0], c), []))
        for c in (on_gpu, lambda copy: None)
    ]
    assert told == [True, False]


def test_the_terminal_shows_speed_and_quality_side_by_side(
    whole_run: tuple[dict[str, Any], dict[str, Any], list[str]],
) -> None:
    results, _, _ = whole_run
    lines = report.terminal(results)
    noisy = next(line for line in lines if line.startswith("noisy ") and "dB" in line)
    assert " ms" in noisy and "close" in noisy
    assert any(line.startswith("Offline") and "pictures/s" in line for line in lines)
    brief = report.summary(results)
    assert "\n" not in report.to_json_line(brief)
    statuses = {row["name"]: row["status"] for row in brief["rows"]}
    assert (statuses["dying"], statuses["unusable"]) == ("failed", "not measured")


def test_fp8_has_no_share_of_another_precisions_limit() -> None:
    fp8 = contenders("cuda")["fastsd-fp8/fp16"]
    assert fp8.options == {"backend": "eager", "precision": "fp16", "weights": "fp8"}
    assert limit({}, {"fp16": 1.0, "copy": 1.0}, fp8.precision) is None
    old = {"name": fp8.name, "precision": "fp16", "limit": {"share": 0.86}}
    assert report._share_text(old) == "", "of a run that held it to fp16"
    assert report._share_text({**old, "precision": "fp8"}) == "86%"
    assert report._share_text({**old, "name": "fastsd/eager/fp16"}) == "86%"


Change = Callable[[dict[str, Any]], None]


def changed(results: dict[str, Any], change: Change) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(results))
    change(copy)
    return copy


def test_compare_says_what_changed_beyond_the_noise(
    whole_run: tuple[dict[str, Any], dict[str, Any], list[str]],
) -> None:
    results, _, _ = whole_run

    def verdicts(after: dict[str, Any]) -> dict[str, tuple[str, str]]:
        return {row[0]: (row[-2], row[-1]) for row in report.compare(results, after)[1:]}

    before = verdicts(results)
    assert before.pop("dying") == ("too few samples", "no change")
    assert set(before.values()) == {("no change", "no change")}

    def degrade(copy: dict[str, Any]) -> None:
        for row in copy["rows"]:
            if row["name"] == "slow":
                row["ratio"]["samples"] = [10 * sample for sample in row["ratio"]["samples"]]
                row["quality"]["psnr_db"]["draws"]["3"] = 35.0

    after = verdicts(changed(results, degrade))
    assert after["slow"] == ("slower", "worse: worst of 7 draws 100.0 -> 35.0 dB")
    assert after["noisy"] == ("no change", "no change")

    def fewer(copy: dict[str, Any]) -> None:
        """The same code, in the first six draws of seven."""
        noisy = rows_of(copy)["noisy"]["quality"]["psnr_db"]
        del noisy["draws"]["6"]
        noisy["worst"] += 5

    assert verdicts(changed(results, fewer))["noisy"] == ("no change", "no change")

    def older(copy: dict[str, Any]) -> None:
        """Of before draws were told apart."""
        for row in copy["rows"]:
            if "quality" in row:
                del row["quality"]["psnr_db"]["draws"]
        rows_of(copy)["noisy"]["quality"]["psnr_db"] = {"median": 30.0, "worst": 30.0}

    (text,) = (t for _, t in verdicts(changed(results, older)).values() if t != "no change")
    assert text == "worse: median 39.9 -> 30.0 dB"

    def another_machine(copy: dict[str, Any]) -> None:
        copy["environment"]["cpu"]["name"] = "Other CPU"
        for row in copy["rows"]:
            if "latency_s" in row:
                row["latency_s"]["samples"] = [3 * s for s in row["latency_s"]["samples"]]

    moved = changed(results, another_machine)
    assert verdicts(moved)["slow"] == ("no change", "no change")
    assert report.different_scenes(results, moved) == ["cpu: name Test CPU -> Other CPU"]
    with pytest.raises(UsageError, match="no contender in common"):
        report.compare(results, changed(results, lambda copy: copy.update(rows=[])))


def test_readmes_show_committed_rows(
    whole_run: tuple[dict[str, Any], dict[str, Any], list[str]], tmp_path: Path
) -> None:
    """One with the rows of all runs; one that names its runs has theirs, and a picture of them."""
    results, pictures, _ = whole_run
    folder = tmp_path / "results"
    for name in ("one", "two"):
        report.write_report(folder / name, results, pictures)
    everything, some = folder / "README.md", tmp_path / "README.md"
    for readme, named in ((everything, ""), (some, " two")):
        mark = f"<!-- bench: rows{named} -->"
        readme.write_text(f"before\n{mark}\nold\n<!-- bench: end -->\nafter\n", "utf-8")
        assert report.update_readme(readme, folder)
        assert (folder / report.SPEEDS).exists() == bool(named)
        assert not report.update_readme(readme, folder)
        lines = readme.read_text("utf-8").splitlines()
        assert lines[:2] == ["before", mark] and lines[-1] == "after" and "old" not in lines
        runs = 1 if named else 2
        assert sum(line.startswith("| builtin, 64, 2 |") for line in lines) == 4 * runs
    assert "(one/report.md)" in everything.read_text("utf-8")
    assert "(results/two/report.md)" in some.read_text("utf-8")
    assert "results/one" not in some.read_text("utf-8")
    some.write_text("<!-- bench: rows three -->\n<!-- bench: end -->\n", "utf-8")
    with pytest.raises(CheckpointError, match="three is missing"):
        report.update_readme(some, folder)
    some.write_text("no marks", "utf-8")
    with pytest.raises(UsageError, match="must hold the lines"):
        report.update_readme(some, folder)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123456, "12.3 ms"),
        (0.9996, "1 s"),
        (0.9994, "999 ms"),
        (12.345, "12.3 s"),
        (1234.5, "1234 s"),
    ],
)
def test_durations_have_three_digits_and_a_unit(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text
