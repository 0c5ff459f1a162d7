"""Two clones of fastsd, in different folders, export the same bytes, and no folder's name.

Everything that a build could note lies elsewhere for the second: fastsd, torch, the checkpoint, the
home, the temporary and the cache folders; and Python's hashes are other ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsd.artifact import read_manifest
from tests.export.conftest import layout_of
from tests.export.test_to_aoti import needs_compiler

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
import fastsd, torch
from fastsd.checkpoints import open_checkpoint
from fastsd.export.build import export
from fastsd.export.parts import Request
model, target, layout, out = sys.argv[1:]
request = Request(target=target, size=(64, 64), layout=layout)
export(open_checkpoint(model), "sd1", request, Path(out))
print(Path(fastsd.__file__).parent, Path(torch.__file__).parent, sep="\\n")
"""


def export_in_clone(home: Path, source: Path, target: str, seed: int) -> tuple[Path, list[str]]:
    """Export from a clone below `home`; the artifact, and every folder that took part."""
    clone, packages = home / "clone", home / "packages"
    for folder in ("fastsd", "export", "kernels", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "results")
        shutil.copytree(ROOT / folder, clone / folder, symlinks=True, ignore=ignored)
    packages.symlink_to(Path(torch.__file__).parents[1])
    model = shutil.copytree(source, home / "models" / "sd1")
    (home / "tmp").mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{clone}:{packages}",
        "PYTHONHASHSEED": str(seed),
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "FASTSD_CACHE": str(home / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
    }
    engine = home / "engine"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), target, layout_of(target), str(engine)],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:] == [str(clone / "fastsd"), str(packages / "torch")]
    return engine, [str(home), str(ROOT), str(Path(torch.__file__).parents[1])]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino", pytest.param("aoti", marks=needs_compiler)])
def test_two_clones_export_the_same_files_and_no_path(
    target: str, sd1_folder: Path, tmp_path: Path
) -> None:
    if target == "openvino":
        pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    first, folders = export_in_clone(tmp_path / "a", sd1_folder, target, seed=1)
    second, more = export_in_clone(tmp_path / "another/folder", sd1_folder, target, seed=2)
    files = read_manifest(first).files
    others = read_manifest(second).files
    assert list(files) == list(others)
    assert [name for name in files if files[name] != others[name]] == []
    for file in (path for engine in (first, second) for path in engine.rglob("*")):
        if file.is_file():
            raw = file.read_bytes()
            assert not [folder for folder in {*folders, *more} if folder.encode() in raw], file
