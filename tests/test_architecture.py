"""The import order of the house, held by reading every module's syntax tree.

Imports inside functions and under TYPE_CHECKING count. `faults` is itself tested on trees with
planted faults: a guard that never fires guards nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each row may import the rows above it. Units in one row do not import each other.
ORDER = (
    ("errors", "supported"),
    ("kernels", "files"),
    ("config", "images", "prompts", "tokenizers"),
    ("samplers", "artifact"),
    ("models",),
    ("checkpoints", "quant"),
    ("backends",),
    ("engine", "adapters", "arguments"),
    ("conditioning", "sources"),
    ("tasks",),
    ("call",),
    ("pipeline",),
    ("quality",),
    ("export",),
    ("benchmarks",),
    ("cli", "server"),
    ("__main__",),
)
LEVEL = {unit: level for level, units in enumerate(ORDER) for unit in units}
# The public names that `fastsd` loads lazily -> where they live; the rest are errors.
LAZY = {"Pipeline": "pipeline", "Output": "pipeline", "SAMPLERS": "samplers"}

# A vendor's package -> where it may be imported (a file, or a folder with a slash).
VENDORS = {
    "diffusers": ("benchmarks/baselines.py",),
    "transformers": ("benchmarks/baselines.py", "export/to_openvino.py"),
    "accelerate": ("benchmarks/baselines.py",),
    "peft": ("benchmarks/baselines.py",),
    "torchsde": ("benchmarks/baselines.py",),
    "xformers": ("kernels/attention.py",),
    "flash_attn_interface": ("kernels/attention.py",),
    "triton": ("kernels/",),
    "torchao": ("quant/", "benchmarks/baselines.py"),
    "onnx": ("export/",),
    "onnxscript": ("export/",),
    "onnxruntime": ("backends/ort.py", "export/", "benchmarks/baselines.py"),
    "tensorrt": ("backends/trt.py", "export/to_tensorrt.py", "benchmarks/baselines.py"),
    "tensorrt_bindings": ("export/to_tensorrt.py",),
    "openvino": ("backends/ov.py", "export/to_openvino.py", "benchmarks/baselines.py"),
    "safetensors": ("checkpoints/", "artifact.py", "benchmarks/"),
    "huggingface_hub": ("checkpoints/",),
    "tokenizers": ("tokenizers.py", "benchmarks/"),
    "typer": ("cli/",),
    "fastapi": ("server/",),
    "uvicorn": ("server/",),
    "matplotlib": ("benchmarks/",),
    "emoji": ("benchmarks/emoji/",),
    "skimage": ("quality.py", "benchmarks/"),
    "scipy": ("quality.py", "benchmarks/"),
}
WITHOUT_TORCH = ("__init__", "errors", "supported", "config", "prompts", "samplers", "tokenizers")
# A script beside such a file would import it in its library's place; these two are the house's own
# words, and are only ever imported under `fastsd`.
NAMED_LIKE_THEIR_LIBRARY = ("tokenizers.py", "benchmarks/emoji")


@dataclass(frozen=True)
class Import:
    """One imported name: `module` in full, and the line that asks for it."""

    module: str
    line: int
    relative: bool = False


def imports(source: str) -> Iterator[Import]:
    """Every import statement of a module, wherever it stands; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                base = node.module or ""
                yield Import(f"{base}.{alias.name}", node.lineno, relative=node.level > 0)


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Every module of the package: its path inside `fastsd` and its file, wherever that lies."""
    for folder in ("fastsd", "kernels", "export", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).parts
            if folder == "fastsd":
                if parts[1] in ("kernels", "export", "benchmarks"):
                    continue  # links to the folders that are walked themselves
                parts = parts[1:]
            yield "/".join(parts), path


def faults(root: Path) -> list[str]:
    """Describe every breach of the order under `root`."""
    return [
        f"{place}:{found.line}: {fault}"
        for place, path in modules(root)
        for found in imports(path.read_text("utf-8"))
        if (fault := breach(place, found))
    ]


def breach(place: str, found: Import) -> str | None:
    """Say what is wrong with one import at `place`, or None."""
    top, *rest = found.module.split(".")
    unit = place.split("/")[0].removesuffix(".py")
    if found.relative:
        return f"relative import of {found.module}"
    if top in ("kernels", "export", "benchmarks", "tests"):
        return f"bare import of {top}"
    if top == "fastsd":
        return _wrong_order(unit, rest)
    if top == "torch" and unit in WITHOUT_TORCH:
        return f"{unit} must not import torch"
    if top in VENDORS and not any(_lies_in(place, home) for home in VENDORS[top]):
        return f"{top} belongs in {' or '.join(VENDORS[top])}"
    own_names = {place, place.rpartition("/")[0]} - set(NAMED_LIKE_THEIR_LIBRARY)
    if top in {name.rpartition("/")[2].removesuffix(".py") for name in own_names}:
        return f"named like {top}, which it imports"
    return None


def _wrong_order(unit: str, rest: list[str]) -> str | None:
    if unit == "__init__" or rest in ([], ["__version__"]):
        return None
    target = rest[0] if rest[0] in LEVEL else LAZY.get(rest[0], "errors")
    if rest[0] not in LEVEL and not (rest[0] in LAZY or rest[0][0].isupper()):
        return f"fastsd.{rest[0]} is not in the order"
    if unit == target:
        return None
    if unit not in LEVEL:
        return f"{unit} is not in the order and imports fastsd.{target}"
    if LEVEL[target] >= LEVEL[unit]:
        return f"{unit} must not import fastsd.{target}: imports point down only"
    return None


def _lies_in(place: str, home: str) -> bool:
    return place.startswith(home) if home.endswith("/") else place == home


def test_the_house_is_in_order() -> None:
    assert faults(ROOT) == []


def test_every_module_is_in_the_order() -> None:
    units = {place.split("/")[0].removesuffix(".py") for place, _ in modules(ROOT)}
    assert units - set(LEVEL) <= {"__init__", "builtin"}
    assert len(list(modules(ROOT))) > 15  # the walk sees the house


@pytest.mark.parametrize(
    ("place", "source", "fault"),
    [
        ("fastsd/errors.py", "import fastsd.config", "errors must not import fastsd.config"),
        ("fastsd/config.py", "from fastsd.images import to_pil", "imports point down only"),
        ("fastsd/config.py", "from fastsd import images", "config must not import fastsd.images"),
        ("fastsd/samplers/table.py", "import torch", "samplers must not import torch"),
        ("fastsd/samplers/table.py", "import torch.nn as nn", "samplers must not import torch"),
        ("fastsd/config.py", "def f():\n    from torch import Tensor", "config.py:2"),
        ("fastsd/models/unet.py", "from fastsd.checkpoints import x", "models must not import"),
        ("fastsd/engine.py", "def f():\n  if x:\n    import fastsd.tasks", "engine.py:3"),
        ("fastsd/engine.py", "from fastsd import Pipeline", "engine must not import fastsd.pipe"),
        (
            "fastsd/tasks.py",
            "if TYPE_CHECKING:\n    from fastsd.pipeline import Pipeline",
            "tasks.py:2: tasks must not import fastsd.pipeline",
        ),
        ("fastsd/backends/ort.py", "from fastsd.export import x", "backends must not import"),
        ("fastsd/quality.py", "import fastsd.benchmarks.demo", "quality must not import"),
        ("kernels/dispatch.py", "from fastsd.config import x", "kernels must not import"),
        ("benchmarks/run.py", "from fastsd.cli import main", "benchmarks must not import"),
        ("fastsd/cli/app.py", "import fastsd.server.app", "cli must not import fastsd.server"),
        ("fastsd/extra.py", "import fastsd.config", "extra is not in the order"),
        ("fastsd/engine.py", "from fastsd.util import x", "fastsd.util is not in the order"),
        ("fastsd/pipeline.py", "import diffusers", "diffusers belongs in benchmarks/baselines.py"),
        ("benchmarks/run.py", "import transformers.models", "transformers belongs in"),
        ("fastsd/models/vae.py", "import xformers.ops", "xformers belongs in kernels/attention.py"),
        ("fastsd/engine.py", "from tensorrt import Builder", "tensorrt belongs in"),
        ("fastsd/checkpoints/hub.py", "from .load import x", "relative import of load"),
        ("fastsd/engine.py", "from . import tasks", "relative import"),
        ("fastsd/engine.py", "import kernels", "bare import of kernels"),
        ("kernels/dispatch.py", "from kernels.reference import x", "bare import of kernels"),
        ("fastsd/pipeline.py", "from benchmarks import x", "bare import of benchmarks"),
        ("fastsd/pipeline.py", "from tests.fixtures import x", "bare import of tests"),
        ("export/onnx.py", "import onnx", "named like onnx"),
        ("kernels/triton/op.py", "import triton.language", "named like triton"),
    ],
)
def test_a_planted_fault_is_found(place: str, source: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = faults(tmp_path)
    assert fault in found


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("fastsd/pipeline.py", "import fastsd\nfrom fastsd import tasks\nimport torch"),
        ("fastsd/engine.py", "from fastsd.samplers.table import StepTable"),
        ("fastsd/engine.py", "from fastsd import UsageError, __version__"),
        ("fastsd/checkpoints/load.py", "from fastsd.checkpoints.keys import x, y"),
        ("kernels/attention.py", "def f():\n    import xformers.ops\nimport fastsd.errors"),
        ("benchmarks/baselines.py", "import diffusers, transformers"),
        ("benchmarks/demo.py", "from fastsd import Pipeline"),
        ("fastsd/__main__.py", "from fastsd.cli import main"),
        ("export/to_onnx.py", "import onnx"),
        ("fastsd/tokenizers.py", "import tokenizers"),
    ],
)
def test_what_is_allowed(place: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert faults(tmp_path) == []
