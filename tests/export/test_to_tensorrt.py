"""TensorRT engines, built for real and without a GPU; profiles and estimates by themselves.

TensorRT-RTX builds engines where no GPU is, and comes in a public wheel; the bindings of TensorRT
load it when its libraries carry the names they look for. Running an engine needs a GPU: not here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LINKS = {
    "libnvinfer.so.11": "libtensorrt_rtx.so",
    "libtensorrt_rtx.so.1": "libtensorrt_rtx.so",
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so",
}
# The bindings ask it to register plugins; there are none to register.
PLUGINS = "int initLibNvInferPlugins(void* a, const char* b) { (void)a; (void)b; return 1; }"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of TensorRT's libraries under the names that its bindings look for."""
    missing = [
        name
        for name in ("tensorrt_bindings", "onnxruntime_ep_nv_tensorrt_rtx")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: pip install 'fastsd[tensorrt-check]'")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler, which the two-line plugin library needs")
    spec = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    assert spec is not None and spec.origin is not None
    wheel = Path(spec.origin).parent
    folder = tmp_path_factory.mktemp("tensorrt")
    for link, stem in LINKS.items():
        (library,) = wheel.glob(f"{stem}.*")
        (folder / link).symlink_to(library)
    (folder / "plugins.c").write_text(PLUGINS)
    command = [compiler, "-shared", "-fPIC", "-o", "libnvinfer_plugin.so.11", "plugins.c"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    return folder


def build(libraries: Path, cache: Path, *cases: tuple[str, str, dict[str, Any]]) -> list[Any]:
    """Build one engine a case; return sizes or error messages."""
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{libraries}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "FASTSD_CACHE": str(cache),
    }
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "tests.export.tensorrt_cases"],
        input=json.dumps(cases),
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answer: list[Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def test_real_engines_are_built(libraries: Path, sd1_folder: Path, tmp_path: Path) -> None:
    """A small UNet in fp16, int8 and fp8; kernel timings are kept for later builds."""
    options: dict[str, Any] = {"size": (64, 96)}
    answers = build(
        libraries,
        tmp_path,
        *(
            (str(sd1_folder), "unet", {"precision": precision, **options})
            for precision in ("fp16", "int8", "fp8", "int4")
        ),
    )
    assert all(isinstance(size, int) and size > 5_000_000 for size in answers[:3]), answers
    assert answers[3].startswith("tensorrt has no precision 'int4'; it has fp32, fp16")
    (timings,) = tmp_path.glob("tensorrt-*-timings")
    assert timings.stat().st_size > 0


@pytest.mark.slow
def test_the_builtin_model_in_every_precision(libraries: Path, tmp_path: Path) -> None:
    parts = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    cases = [
        ("builtin", part, {"size": (64, 64), "precision": precision, "dynamic": dynamic})
        for part in parts
        for precision, dynamic in (("fp32", False), ("fp16", False), ("fp16", True))
    ]
    cases += [
        ("builtin", part, {"size": (64, 64), "precision": precision})
        for part in ("unet", "vae_decoder")
        for precision in ("int8", "fp8")
    ]
    cases += [
        ("builtin", part, {"size": (64, 64), "precision": "bf16", "layout": "fast"})
        for part in ("unet_time", "unet_context", "unet")
    ]
    answers = build(libraries, tmp_path, *cases)
    assert all(isinstance(size, int) and size > 50_000 for size in answers), answers


@pytest.mark.slow
@pytest.mark.parametrize(("model", "side"), [("random:sd15", 512), ("random:sdxl", 1024)])
def test_true_size(model: str, side: int, libraries: Path, tmp_path: Path) -> None:
    (size,) = build(
        libraries, tmp_path, (model, "unet", {"size": (side, side), "precision": "fp16"})
    )
    assert isinstance(size, int) and size > 1_600_000_000, size


def test_without_tensorrt_it_says_what_to_install() -> None:
    probe = (
        "import sys; sys.modules['tensorrt'] = sys.modules['tensorrt_bindings'] = None\n"
        "from fastsd.cli import main; main(['export', 'builtin', '--to', 'tensorrt'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1 and result.stdout == ""
    assert "pip install tensorrt 'fastsd[export]'" in result.stderr
    assert result.stderr.count("\n") == 1
