"""Percentiles and intervals, held to simulated machines whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from fastsd.benchmarks.timing import (
    Latency,
    Ratio,
    changed_ratio,
    median_interval,
    paired_ratio,
)

RUNS = 400


def machine(generator: np.random.Generator, count: int, slowdown: float = 1.0) -> list[float]:
    """Times of 100 ms: 3 % of noise, and now and then an interruption of a fifth of a second."""
    noise = generator.normal(1, 0.03, count)
    interrupted = generator.random(count) < 0.1
    return list(slowdown * 0.1 * noise + interrupted * generator.exponential(0.2, count))


@pytest.mark.parametrize("count", [6, 10, 20, 40])
def test_the_same_twice_is_no_difference(count: int) -> None:
    """In at least 95 of 100 runs, by the definition of the interval; less three standard errors."""
    generator = np.random.default_rng(count)
    verdicts = [
        paired_ratio(machine(generator, count), machine(generator, count)).verdict
        for _ in range(RUNS)
    ]
    assert verdicts.count("no difference") / RUNS > 0.95 - 3 * (0.05 * 0.95 / RUNS) ** 0.5


@pytest.mark.parametrize("drift", [False, True])
def test_a_planted_slowdown_of_a_tenth_is_seen(drift: bool) -> None:
    """With 20 turns, even where the machine slows down to half its speed meanwhile."""
    generator = np.random.default_rng(1)
    slowing = np.linspace(1, 2, 20) if drift else np.ones(20)
    ratios = [
        paired_ratio(
            list(slowing * machine(generator, 20, 1.1)), list(slowing * machine(generator, 20))
        )
        for _ in range(RUNS)
    ]
    assert [ratio.verdict for ratio in ratios].count("slower") / RUNS > 0.95
    assert np.median([ratio.median for ratio in ratios]) == pytest.approx(1.1, abs=0.01)


def test_the_interval_is_that_of_the_binomial_tables() -> None:
    """n = 6: the extremes (96.9 %); 10: the second of each end (97.9 %); 20: the sixth (95.9)."""
    assert median_interval([1, 2, 3, 4, 5]) == (None, None)
    assert median_interval(range(1, 7)) == (1, 6)
    assert median_interval(range(1, 11)) == (2, 9)
    assert median_interval(range(1, 21)) == (6, 15)


def test_verdicts() -> None:
    assert Ratio(0.5, None, None).verdict == "too few samples"
    assert Ratio(0.5, 0.4, 0.6).verdict == "faster"
    assert Ratio(2.0, 1.01, 3.0).verdict == "slower"
    assert Ratio(1.1, 1.0, 1.2).verdict == "no difference"


def test_latency() -> None:
    few, many = Latency.of([3.0, 1.0, 2.0]), Latency.of([float(i) for i in range(101)])
    assert (few.p50, few.p99, few.largest, few.count) == (2.0, None, 3.0, 3)
    assert (many.p20, many.p50, many.p80, many.p90, many.p99) == (20, 50, 80, 90, 99)


def test_two_runs_do_not_pair() -> None:
    generator = np.random.default_rng(2)
    same = [changed_ratio(machine(generator, 20), machine(generator, 20)) for _ in range(100)]
    assert [ratio.verdict for ratio in same].count("no difference") > 85
    slower = [
        changed_ratio(machine(generator, 20, 1.2), machine(generator, 30)) for _ in range(100)
    ]
    assert [ratio.verdict for ratio in slower].count("slower") > 95
    assert changed_ratio([1, 2, 3], [1, 2, 3]).verdict == "too few samples"
