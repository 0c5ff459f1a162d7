"""PSNR, SSIM and the task score: what receipts are made of."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastsd.errors import UsageError
from fastsd.quality import (
    CHINESE_NAMES,
    ENGLISH_NAMES,
    Task,
    builtin_atlas,
    first_by_digest,
    psnr,
    ssim,
    task_score,
    tasks,
)


def noisy(picture: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, picture.shape)
    return np.clip(picture + noise, 0, 1)


@pytest.fixture
def picture() -> np.ndarray:
    y, x = np.mgrid[0:64, 0:64] / 63
    return np.stack([0.3 + 0.4 * x, 0.3 + 0.4 * y, 0.5 + 0 * x], axis=-1)


def test_psnr_is_known_for_known_noise(picture: np.ndarray) -> None:
    """sigma 0.01 is 40 dB, by definition."""
    assert psnr(picture, noisy(picture, 0.01)) == pytest.approx(40, abs=0.2)
    assert psnr(picture, picture) == float("inf")
    grain = np.random.default_rng(0).random((64, 64, 3))  # rounding it errs by 1/12 of a step
    as_bytes = Image.fromarray((grain * 255).round().astype(np.uint8))
    assert psnr(as_bytes, grain) == pytest.approx(-10 * np.log10(1 / 12 / 255**2), abs=0.2)


def test_ssim_falls_with_noise(picture: np.ndarray) -> None:
    assert ssim(picture, picture) == pytest.approx(1)
    assert ssim(picture, noisy(picture, 0.02)) > ssim(picture, noisy(picture, 0.1))


def test_other_shapes_are_refused(picture: np.ndarray) -> None:
    with pytest.raises(UsageError, match="compared"):
        psnr(picture, picture[:32])


def test_the_atlas_scores_itself_fully() -> None:
    """Its own pictures, enlarged as the model draws them, are hits; shuffled, they are not."""
    atlas = builtin_atlas()
    assert len(atlas.english) == len(set(atlas.characters)) == len(atlas.pictures) > 1800
    by_language = tasks(atlas)
    assert [len(by_language[k].names) for k in ("english", "chinese")] == [
        ENGLISH_NAMES,
        CHINESE_NAMES,
    ]
    task = by_language["english"]
    large = [
        Image.fromarray(atlas.pictures[i]).resize((128, 128), Image.Resampling.NEAREST)
        for i in task.expected
    ]
    assert task_score(atlas, task, large).top1 == 1
    turned = task_score(atlas, task, large[1:] + large[:1])
    assert turned.top1 < 0.02 and turned.top1 <= turned.top5 < 0.1
    with pytest.raises(UsageError, match="names"):
        task_score(atlas, Task(("a",), (0,)), [])


def test_the_choice_of_names_is_fixed() -> None:
    assert first_by_digest(["a", "b", "c", "d", "a"], 3) == ["d", "c", "b"]
    assert tasks(builtin_atlas())["english"].names[:1] != ()
