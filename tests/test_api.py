"""The package's face: the public names, what they cost to import, what a misspelt one says."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import fastsd

ROOT = Path(__file__).parents[1]

# CPU time, not wall time, so that a busy machine does not fail the test.
PROBE = """
import json, sys, time
start = time.process_time()
import fastsd
spent = time.process_time() - start
print(json.dumps({"seconds": spent, "modules": sorted(sys.modules)}))
"""
HELP = """
import contextlib, io, sys, time
with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
    from fastsd.cli import main
    main(sys.argv[1:])
print(time.process_time(), len(page.getvalue()), "torch" in sys.modules)
"""


def run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_quick_and_light() -> None:
    """< 150 ms, and neither torch nor anything else from outside the standard library."""
    probes: list[dict[str, Any]] = [json.loads(run("-c", PROBE)) for _ in range(5)]
    assert min(probe["seconds"] for probe in probes) < 0.150
    outside = {name.partition(".")[0] for name in probes[0]["modules"]} & {
        *("torch", "numpy", "PIL", "typer", "tqdm", "safetensors", "tokenizers", "huggingface_hub")
    }
    assert not outside


@pytest.mark.parametrize("arguments", [("--help",), ("generate", "--help")])
def test_help_is_quick(arguments: tuple[str, ...]) -> None:
    """< 200 ms for the whole process, interpreter and all."""
    answers = [run("-c", HELP, *arguments).split() for _ in range(5)]
    assert min(float(seconds) for seconds, _, _ in answers) < 0.200
    assert all(int(length) > 400 and torch == "False" for _, length, torch in answers)


def test_every_public_name_loads() -> None:
    assert fastsd.__all__ == sorted(fastsd.__all__)
    for name in fastsd.__all__:
        value = getattr(fastsd, name)
        assert value is getattr(fastsd, name)
        assert name in dir(fastsd)
        home = getattr(value, "__module__", None)
        if home:
            assert getattr(sys.modules[home], name) is value
    assert set(vars(fastsd.errors)) & set(fastsd.__all__) == {
        name for name, value in vars(fastsd.errors).items() if isinstance(value, type)
    }, "every error is public"


def test_type_checkers_see_the_public_names() -> None:
    """What stands under TYPE_CHECKING is __all__, __version__ apart."""
    tree = ast.parse(Path(fastsd.__file__).read_text("utf-8"))
    guarded = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    names = [alias.name for node in ast.walk(guarded) for alias in getattr(node, "names", ())]
    assert sorted([*names, "__version__"]) == fastsd.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fastsd' has no attribute 'Pipelin'"):
        fastsd.Pipelin  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        from fastsd import StableDiffusionPipeline  # type: ignore[attr-defined]  # noqa: F401


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert fastsd.__version__ == project["version"]
