"""Other people's tools open our engines: Optimum the ONNX, openvino-genai the OpenVINO folder.

Their pins are not ours, so each runs in an environment of its own, made on first use (minutes and
gigabytes) in the system's temporary folder and kept for the next run.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from fastsd.checkpoints import open_checkpoint
from fastsd.export.build import export
from fastsd.export.parts import Request
from fastsd.quality import psnr
from tests.export.test_to_onnx import draw

pytestmark = pytest.mark.slow

PROMPT, SEED, STEPS, GUIDANCE = "a red apple", 1, 8, 7.5
OPTIMUM = ("optimum-onnx[onnxruntime]==0.1.0", "diffusers", "torch")  # whose pipeline it wraps
GENAI = ("openvino-genai==2026.4.*", "torch", "numpy")  # torch draws its noise

OPTIMUM_SCRIPT = """
import sys, numpy, torch
from optimum.onnxruntime import ORTStableDiffusionPipeline
folder, out, prompt, *numbers = sys.argv[1:]
seed, steps, side, guidance = map(float, numbers)
pipe = ORTStableDiffusionPipeline.from_pretrained(folder, provider="CPUExecutionProvider")
images = pipe(
    prompt, num_inference_steps=int(steps), guidance_scale=guidance, height=int(side),
    width=int(side), generator=torch.Generator("cpu").manual_seed(int(seed)), output_type="np",
).images
numpy.save(out, images[0])
"""
GENAI_SCRIPT = """
import sys, numpy, openvino_genai
folder, out, prompt, *numbers = sys.argv[1:]
seed, steps, side, guidance = map(float, numbers)
pipe = openvino_genai.Text2ImagePipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32")
tensor = pipe.generate(
    prompt, num_inference_steps=int(steps), guidance_scale=guidance, height=int(side),
    width=int(side), generator=openvino_genai.TorchGenerator(int(seed)),
)
numpy.save(out, numpy.array(tensor.data)[0])
"""


def environment(requirements: tuple[str, ...]) -> Path:
    """Return the Python of a virtual environment that holds `requirements`."""
    key = hashlib.sha256(" ".join((sys.version, *requirements)).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"fastsd-interop-{key}"
    python, done = folder / "bin/python", folder / "complete"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *requirements]
        subprocess.run(command, check=True, timeout=3600)
        done.touch()
    return python


def drawn_by(python: Path, script: str, engine: Path, out: Path, side: int) -> np.ndarray:
    arguments = [str(engine), str(out), PROMPT, str(SEED), str(STEPS), str(side), str(GUIDANCE)]
    result = subprocess.run(
        [str(python), "-c", script, *arguments], capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 0, result.stderr[-3000:]
    picture: np.ndarray = np.load(out)
    return picture


def exported(target: str, path: Path) -> tuple[Path, int]:
    checkpoint = open_checkpoint("builtin")
    side = checkpoint.config.default_size
    return export(checkpoint, "builtin", Request(target=target, size=(side, side)), path).path, side


def drawn_by_us(engine: Path, side: int) -> np.ndarray:
    options = {"seed": SEED, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    picture: np.ndarray = draw(engine, PROMPT, (side, side), **options)[0]
    return picture


def test_optimum_draws_our_picture(tmp_path: Path) -> None:
    engine, side = exported("onnx", tmp_path / "engine")
    theirs = drawn_by(environment(OPTIMUM), OPTIMUM_SCRIPT, engine, tmp_path / "out.npy", side)
    ours = drawn_by_us(engine, side)
    assert theirs.std() > 0.01
    assert psnr(ours, theirs) >= 60


def test_genai_draws_our_picture(tmp_path: Path) -> None:
    engine, side = exported("openvino", tmp_path / "engine")
    theirs = drawn_by(environment(GENAI), GENAI_SCRIPT, engine, tmp_path / "out.npy", side)
    ours = drawn_by_us(engine, side)
    assert theirs.std() > 2
    assert psnr((ours * 255).round().astype(np.uint8), theirs) >= 40
