"""Ops in turns against the reference; a wrong one is seen by its error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsd.benchmarks import ops
from fastsd.benchmarks.ops import attention_case, measure_case, measure_ops, ops_table
from fastsd.errors import MissingDependency, UsageError

CEILINGS = {"fp32": 1e11, "copy": 1e10}


def test_an_ops_row_says_speed_share_and_error(monkeypatch: pytest.MonkeyPatch) -> None:
    small: Any = lambda dtype, device: attention_case(  # noqa: E731
        "small", 1, 2, 64, 77, 8, dtype, device
    )
    monkeypatch.setitem(ops.OPS, "attention", [small, small])
    kept: list[int] = []
    results = measure_ops(
        ["attention"],
        precision="fp32",
        device="cpu",
        turns=6,
        keep=lambda results: kept.append(len(results["rows"])),
    )
    assert kept == [len(results["rows"]) // 2, len(results["rows"])], "each case is kept at once"
    del results["rows"][kept[0] :]
    rows = {row["implementation"]: row for row in results["rows"]}
    sdpa = rows["sdpa"]
    assert sdpa["largest_error"] < 1e-5 and sdpa["ratio"]["verdict"] == "no difference"
    flop = 4 * 1 * 2 * 64 * 77 * 8
    assert sdpa["tflops"] * 1e12 * sdpa["p50_s"] == pytest.approx(flop)
    table = ops_table(results)
    assert len(table) == 1 + len(rows) and all(len(row) == len(table[0]) for row in table)


def test_what_cannot_run_says_why_and_what_is_wrong_is_seen() -> None:
    case = attention_case("small", 1, 2, 16, 16, 8, torch.float32, "cpu")

    def absent() -> torch.Tensor:
        raise MissingDependency("no such package")

    right = case.implementations["sdpa"]
    planted = ops.Case(
        case.op,
        case.shape,
        case.reference,
        {"sdpa": right, "wrong": lambda: right() + 0.1, "absent": absent},
        case.flop,
        case.bytes,
    )
    rows = measure_case(planted, CEILINGS, precision="fp32", device="cpu", turns=6)
    by_name = {row["implementation"]: row for row in rows}
    assert by_name["absent"]["reason"] == "no such package" and "p50_s" not in by_name["absent"]
    assert by_name["wrong"]["largest_error"] > 0.01 > by_name["sdpa"]["largest_error"]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="attention"):
        measure_ops(["attentoin"], precision="fp32", device="cpu")
    with pytest.raises(UsageError, match="fp32"):
        measure_ops([], precision="fp12", device="cpu")


@pytest.mark.parametrize(
    "case",
    [
        ops.group_norm_case("small", 2, 64, 9, torch.float32, "cpu"),
        ops.conv3x3_case("small", 1, 16, 8, 9, False, torch.float32, "cpu"),
        ops.conv3x3_case("small", 1, 16, 8, 9, True, torch.float32, "cpu"),
        ops.sampler_step_case("small", 1, 8, 4, torch.float32, "cpu"),
    ],
    ids=lambda case: case.op,
)
def test_our_kernels_are_held_to_the_librarys(case: ops.Case) -> None:
    rows = measure_case(case, CEILINGS, precision="fp32", device="cpu", turns=6)
    by_name = {row["implementation"]: row for row in rows}
    assert by_name["library"]["largest_error"] < 1e-5 and by_name["library"]["p50_s"] > 0
    assert "runs on GPUs, not on cpu" in by_name["triton"]["reason"]
