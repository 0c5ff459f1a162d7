"""Models without files: a true architecture whose weights are seeded random numbers.

For speed random weights are as good as trained ones, and they need no download. `random:sd15`,
`random:sd21` and `random:sdxl` name them wherever a model is asked for. Every part is made in
memory when it is loaded, alone, so that the largest model needs no more memory than its largest
part and what the caller keeps.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsd.checkpoints.weights import empty_module
from fastsd.config import PRESETS, ModelConfig
from fastsd.errors import UsageError

PREFIX = "random:"
NAMES = tuple(f"{PREFIX}{preset}" for preset in PRESETS)
_VECTOR_STD = 0.02  # of biases, and of norms' weights around 1


def preset(model: str) -> ModelConfig:
    """Return the architecture that `model`, such as "random:sd15", names. Raises UsageError."""
    name = model.removeprefix(PREFIX)
    if name not in PRESETS:
        raise UsageError(f"model {model!r} is unknown; random ones are {', '.join(NAMES)}")
    return PRESETS[name]


def random_module(
    part: str,
    build: Callable[[], nn.Module],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> nn.Module:
    """Make a part with random weights, for inference: always the same for one seed and part.

    Matrices and kernels are uniform with variance 1 / fan-in, so that activations keep their size
    through every depth; norms' weights lie around 1 and biases around 0.
    """
    module = empty_module(build)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

    def make(name: str) -> Tensor:
        return torch.from_numpy(_numbers(f"{seed}/{part}/{name}", shapes[name])).to(device, dtype)

    # numpy lets go of the interpreter's lock while it draws
    with ThreadPoolExecutor(min(len(shapes), os.cpu_count() or 1)) as pool:
        weights = dict(zip(shapes, pool.map(make, shapes), strict=True))
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def _numbers(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Draw one tensor's fp32 values, seeded by its name."""
    digest = hashlib.sha256(name.encode()).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
    numbers = generator.random(shape, dtype=np.float32)
    matrix = len(shape) > 1
    std = 1 / math.sqrt(math.prod(shape[1:])) if matrix else _VECTOR_STD
    numbers -= np.float32(0.5)
    numbers *= np.float32(std * math.sqrt(12))  # uniform on [0, 1) has variance 1 / 12
    if not matrix and name.endswith(".weight"):
        numbers += np.float32(1)
    return numbers
