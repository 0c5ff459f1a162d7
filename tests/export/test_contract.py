"""The contract of backends/base.py: every installed engine's parts equal eager fp32's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastsd.artifact import Artifact
from fastsd.backends import ArtifactBackend, Backend, open_artifact, open_backend
from fastsd.checkpoints import open_checkpoint
from fastsd.config import UNetConfig
from tests.distances import relative_l2
from tests.export.conftest import SIZE

BAR = 1e-4
CPU = torch.device("cpu")


@pytest.fixture(params=["sd1_onnx", "sdxl_onnx_fast", "sd1_openvino"])
def backends(request: pytest.FixtureRequest) -> tuple[Backend, Backend]:
    """An engine, and eager on the checkpoint that it was exported from."""
    source: Path = request.getfixturevalue(f"{request.param.split('_')[0]}_folder")
    artifact = Artifact.open(request.getfixturevalue(request.param))
    checkpoint = open_checkpoint(source)
    engine = open_artifact(artifact, checkpoint.config, device=CPU)
    return engine, open_backend("eager", checkpoint, precision="fp32", device=CPU)


def assert_near(ours: Tensor, exact: Tensor) -> None:
    assert ours.dtype == exact.dtype == torch.float32
    assert relative_l2(ours, exact) <= BAR


def predictions(
    backend: Backend, config: UNetConfig, x: Tensor, steps: Tensor, context: Tensor
) -> list[Tensor]:
    """Run a small schedule as the engine loop does: x has half the rows of the context."""
    rows, width = len(context), config.pooled_width
    pooled = size_ids = None
    if width:
        pooled = torch.linspace(-1, 1, rows * width).reshape(rows, width)
        size_ids = torch.tensor([[96.0, 64.0, 0.0, 0.0, 96.0, 64.0]]).repeat(rows, 1)
    table = backend.part("unet_time")(steps, pooled, size_ids, None)
    kv = backend.part("unet_context")(context)
    unet = backend.part("unet")
    return [
        unet(x, table.index_select(0, torch.tensor([i]))[0], kv).clone() for i in range(len(steps))
    ]


@torch.no_grad()
def test_every_part_equals_eager(backends: tuple[Backend, Backend]) -> None:
    engine, eager = backends
    ids = torch.tensor([[5, 9, 3] + [7] * 74, [1] * 77])
    texts = [engine.part("text_encoder")(ids), eager.part("text_encoder")(ids)]
    assert_near(texts[0].last, texts[1].last)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    assert isinstance(engine, ArtifactBackend)
    config = engine.config.unet
    h, w = SIZE[0] // 8, SIZE[1] // 8
    for pictures in (1, 3):
        x, context = draw(pictures, 4, h, w), draw(2 * pictures, 77, config.context_width)
        steps = torch.tensor([901.0, 37.0])
        for ours, exact in zip(
            predictions(engine, config, x, steps, context),
            predictions(eager, config, x, steps, context),
            strict=True,
        ):
            assert_near(ours, exact)
        z, picture = draw(pictures, 4, h, w), draw(pictures, 3, *SIZE)
        assert_near(engine.part("vae_decoder")(z), eager.part("vae_decoder")(z))
        assert_near(engine.part("vae_encoder")(picture), eager.part("vae_encoder")(picture))


@torch.no_grad()
def test_threads_do_not_mix(backends: tuple[Backend, Backend]) -> None:
    """Many calls at once give what they give alone."""
    decode = backends[0].part("vae_decoder")
    h, w = SIZE[0] // 8, SIZE[1] // 8
    inputs = [torch.full((1, 4, h, w), float(i)) for i in range(8)]
    alone = [decode(z).clone() for z in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda z: decode(z).clone(), inputs))
    for a, b in zip(alone, together, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
