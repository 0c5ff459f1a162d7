"""Where one step's time goes, kernel by kernel: `python -m fastsd.benchmarks.step_profile`.

What to do next is chosen by this table, so it is kept with the results. Steps run uncaptured here:
a graph's launches have no names.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastsd import Pipeline


def profile_steps(
    model: str,
    *,
    precision: str,
    device: str,
    weights: str | None = None,
    steps: int = 5,
    rows: int = 40,
) -> list[list[str]]:
    """Sample `steps` steps and return a table: kernel, calls, ms, share of the whole.

    The text encoders' few kernels are among them, the decoder's are not.
    """
    pipeline = Pipeline.from_pretrained(
        model, precision=precision, device=device, weights=weights, graph="none"
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline("", num_inference_steps=1, seed=0, output_type="latent")
    gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiled:
        pipeline("a red apple", num_inference_steps=steps, seed=0, output_type="latent")
    events = [
        (e.key, e.count, (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1000)
        for e in profiled.key_averages()
        # A GPU's kernels are also told of by the operators that launched them.
        if not gpu or (e.device_type.name == "CUDA" and not e.is_user_annotation)
    ]
    total = sum(ms for _, _, ms in events)
    largest = sorted(events, key=lambda event: -event[2])[:rows]
    return [
        ["kernel", "calls", "ms", "share"],
        *([key[:90], str(n), f"{ms:.3f}", f"{100 * ms / total:.1f}%"] for key, n, ms in largest),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table as Markdown."""
    from fastsd.benchmarks.report import markdown

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--weights", help="fp8: with the UNet's layers in it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    table = profile_steps(
        given.model, precision=given.precision, device=given.device, weights=given.weights
    )
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text("\n".join(markdown(table)) + "\n", "utf-8")
    print(given.output)


if __name__ == "__main__":
    main()
