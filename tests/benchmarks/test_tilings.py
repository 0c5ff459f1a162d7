"""The convolution's tilings say what was measured, and a fit finds what times were made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastsd.benchmarks import tilings
from fastsd.benchmarks.tilings import Timed, fit, losses, products
from fastsd.kernels.tilings import TILINGS, Tiling

TIMES = Path(tilings.__file__).parent / "results" / "tilings-h200" / "times.json"


def test_the_tilings_are_those_that_an_h200_was_fastest_with() -> None:
    times, multiprocessors = tilings.read(TIMES)
    assert {timed.product for timed in times} <= set(products())
    lost = losses(times, TILINGS, multiprocessors).values()
    assert sum(lost) / len(lost) < 0.03 and max(lost) < 0.25
    worse = [replace(tiling, fixed_us=50.0 * tiling.fixed_us) for tiling in TILINGS]
    assert max(losses(times, worse, multiprocessors).values()) > 0.25


def made_of(wanted: Sequence[Tiling]) -> list[Timed]:
    return [
        Timed(product, i, splits, product.us(tiling, splits, 132))
        for product in list(products())[:12]
        for i, tiling in enumerate(wanted)
        for splits in (1, 2)
    ]


def test_a_fit_finds_what_times_were_made_of() -> None:
    wanted = [
        replace(tiling, block_us=0.3 + 0.1 * i, fixed_us=2.0 + i)
        for i, tiling in enumerate(TILINGS)
    ]
    for found, tiling in zip(fit(made_of(wanted), 132), wanted, strict=True):
        assert found.block_us == pytest.approx(tiling.block_us, rel=0.02)
        assert found.fixed_us == pytest.approx(tiling.fixed_us, rel=0.05)


def test_every_cut_of_every_product_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With a GPU's part played by names: what is timed is what a launch would be told."""
    few = list(products())[:3]
    monkeypatch.setattr(tilings, "products", lambda: iter(few))
    monkeypatch.setattr(tilings, "_convolution", lambda product, device: print)
    monkeypatch.setattr(tilings, "time_ms", lambda calls: {name: 0.5 for name in calls})
    sizes = {"multi_processor_count": 132, "shared_memory_per_block_optin": 232_448}
    gpu = SimpleNamespace(name="NVIDIA Test", **sizes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    file = tmp_path / "times.json"
    tilings.main(["measure", str(file)])
    times, multiprocessors = tilings.read(file)
    assert multiprocessors == 132 and {timed.product for timed in times} == set(few)
    assert {timed.tiling for timed in times} == set(range(len(TILINGS)))
    assert {timed.us for timed in times} == {500.0}
    tilings.main(["fit", str(file)])
    assert "lost in the mean of 3 products" in capsys.readouterr().out
