"""Where one step's time goes, kernel by kernel: `python -m fastsd.benchmarks.step_profile`.

What to do next is chosen by this table, so it is kept with the results. Steps run uncaptured here:
a graph's launches have no names.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastsd import Pipeline

KINDS = ("kernel", "gpu_memcpy", "gpu_memset")  # of a trace's events, what a GPU does


def profile_steps(
    pipeline: Pipeline, *, batch: int = 1, steps: int = 5, rows: int = 80
) -> list[list[str]]:
    """Sample `steps` steps of `batch` pictures and return a table: on a GPU a row for each kernel
    and grid, on a CPU one for each operator, with calls, ms and share of the whole, the sum first.

    The text encoders' few kernels are among them, the decoder's are not.
    """

    def draw(steps: int) -> None:
        pipeline(
            "a red apple",
            num_images_per_prompt=batch,
            num_inference_steps=steps,
            seed=0,
            output_type="latent",
        )

    draw(1)
    on_gpu = pipeline.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        draw(steps)
    spent: dict[tuple[str, str], tuple[int, float]] = {}
    if on_gpu:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "trace.json")
            profiled.export_chrome_trace(str(file))
            events = json.loads(file.read_text("utf-8"))["traceEvents"]
        for event in events:
            if event.get("cat") in KINDS:
                grid = "x".join(map(str, event["args"].get("grid", ())))
                calls, ms = spent.get((event["name"], grid), (0, 0.0))
                spent[event["name"], grid] = (calls + 1, ms + event["dur"] / 1000)
    else:
        for of_op in profiled.key_averages():
            spent[of_op.key, ""] = (of_op.count, of_op.self_cpu_time_total / 1000)
    calls, total = (sum(column) for column in zip(*spent.values(), strict=True))
    largest = sorted(spent.items(), key=lambda item: -item[1][1])[:rows]
    named = [((f"all, in {steps} steps", ""), (calls, total)), *largest]
    return [
        ["kernel", "grid", "calls", "ms", "share"],
        *(
            [name[:90], grid, str(n), f"{ms:.3f}", f"{100 * ms / total:.1f}%"]
            for (name, grid), (n, ms) in named
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a table for each batch as Markdown."""
    from fastsd.benchmarks.report import markdown

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--weights", help="fp8: with the UNet's layers in it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="pictures at once")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    pipeline = Pipeline.from_pretrained(
        given.model,
        precision=given.precision,
        device=given.device,
        weights=given.weights,
        graph="none",
    )
    pipeline.set_progress_bar_config(disable=True)
    lines = []
    for batch in given.batch:
        table = profile_steps(pipeline, batch=batch)
        lines += [f"## {batch} at once", "", *markdown(table), ""]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text("\n".join(lines[:-1]) + "\n", "utf-8")
    print(given.output)


if __name__ == "__main__":
    main()
