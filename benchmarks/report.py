"""Results for people: tables, plots, the contact sheet, what changed between two runs, READMEs'
rows. Reads nothing but a run's results; knows no contender and no process."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastsd.benchmarks.timing import FEWEST_SPREAD, Ratio, changed_ratio, unpaired_ratio
from fastsd.errors import MissingDependency, UsageError
from fastsd.files import published_folder, read_json, write_json
from fastsd.images import contact_sheet, save_png

Results = Mapping[str, Any]
Row = Mapping[str, Any]
Table = list[list[str]]

QUALITY_DROP_DB = 1.0
PART_TITLES = {
    "text_encoder": "text encoder",
    "context": "keys, values, time rows",
    "unet": "UNet",
    "step_rest": "guidance + scheduler",
    "step": "whole steps",
    "vae": "VAE decoder",
    "other": "the rest",
    "png": "PNG",
}


# --- words ----------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Write a time with three digits and the unit that suits it."""
    if seconds >= 0.9995:
        return f"{_digits(seconds)} s"
    return f"{_digits(1000 * seconds)} ms"


def _digits(number: float) -> str:
    """Write three digits, or all those before the point."""
    return f"{number:.0f}" if abs(number) >= 999.5 else f"{number:.3g}"


def ratio_text(ratio: Mapping[str, Any]) -> str:
    """Write how many times the reference's speed, with the interval: above 1 is faster."""
    if ratio["low"] is None:
        return f"{1 / ratio['median']:.2f}x ({ratio['verdict']})"
    low, high = 1 / ratio["high"], 1 / ratio["low"]
    note = ", no difference" if ratio["verdict"] == "no difference" else ""
    return f"{1 / ratio['median']:.2f}x ({low:.2f} to {high:.2f}{note})"


def quality_text(quality: Mapping[str, Any]) -> str:
    """Write the worst PSNR and SSIM of how many pictures, and the word for them."""
    worst = quality["psnr_db"]["worst"]
    text = "equal" if worst >= 100 else f"{worst:.1f} dB"
    text += f" of {quality['pictures']}"
    if quality["ssim"]:
        text += f", SSIM {quality['ssim']['worst']:.4f}"
    return f"{text}, {quality['verdict']}"


def score_text(quality: Mapping[str, Any]) -> str:
    """Write the share of pictures that show what was named."""
    score = quality.get("score")
    return f"{100 * score['top1']:.0f}% of {score['pictures']}" if score else ""


def scene_text(results: Results) -> str:
    """Write what was drawn and on what."""
    scene, environment = results["scene"], results["environment"]
    cpu = environment["cpu"]
    device = environment["devices"].get("cuda:0") if scene["device"] != "cpu" else cpu["name"]
    sampler = f", {scene['sampler']}" if scene["sampler"] else ""
    batch = f", {scene['batch']} at once" if scene["batch"] > 1 else ""
    return (
        f"{scene['model']}, {scene['size']}x{scene['size']}, {scene['steps']} steps{sampler}, "
        f"guidance {scene['guidance']:g}{batch}; {device}, {scene['threads']} threads"
    )


# --- tables ---------------------------------------------------------------------------------------


def speed_table(results: Results) -> Table:
    """A row a contender, in order of speed; those without one come last, with the reason."""
    tail = tail_title(results)
    head = ["contender", "p50", "p90", tail, "n", "speed vs reference"]
    head += ["worst picture", "task score", "share of limit", "cold start", "memory"]
    table = [head]
    for row in _by_speed(results):
        latency, spread = row["latency_s"], _spreads(row)
        reference = row["name"] == results["reference"]
        table.append(
            [
                row["name"],
                duration(latency["p50"]),
                duration(latency["p90"]) if spread else "",
                duration(latency[tail]) if spread else "",
                str(latency["n"]),
                "reference" if reference else ratio_text(row["ratio"]),
                _quality_or_reference(row, results),
                score_text(row["quality"]),
                _share_text(row),
                duration(row["cold_start_s"][0]["total_s"]) if "cold_start_s" in row else "",
                f"{row['memory_bytes'] / 2**30:.1f} GiB" if row["memory_bytes"] else "",
            ]
        )
    return _without_empty_columns(table)


def _quality_or_reference(row: Row, results: Results) -> str:
    return "reference" if row["name"] == truth_of(results) else quality_text(row["quality"])


def _tables(results: Results) -> list[Table]:
    """All that a run measured; tables without a row are left out."""
    made = (speed_table, parts_table, cold_start_table, offline_table)
    return [table for make in made if (table := make(results))]


def _stopped_text(results: Results) -> list[str]:
    """Say how far a run came that was stopped; nothing of one that was not."""
    if not results.get("stopped"):
        return []
    drawn = max((row["latency_s"]["n"] for row in _by_speed(results)), default=0)
    turns = results["repeats"] * (1 if results.get("alone") else len(results["rounds"]))
    return [f"stopped early: {drawn} of {turns} turns"]


def _spreads(row: Row) -> bool:
    """Whether a row has samples enough to speak of more than their median."""
    return int(row["latency_s"]["n"]) >= FEWEST_SPREAD


def _share_text(row: Row) -> str:
    """Write the share of the limit; none where it is that of products that the row does not do.

    Rows of weights="fp8" were held to fp16 once.
    """
    held_to_another = "fp8" in row["name"] and row["precision"] != "fp8"
    known = "limit" in row and not held_to_another
    return f"{100 * row['limit']['share']:.0f}%" if known else ""


def truth_of(results: Results) -> str:
    """Who drew the pictures that the others are held to: a run's reference, if not kept ones."""
    name: str = results.get("truth", results["reference"])
    return name


def tail_title(results: Results) -> str:
    """p99 where there are samples enough for it, else the largest."""
    rows = [row["latency_s"] for row in results["rows"] if "latency_s" in row]
    return "p99" if rows and all(row["p99"] is not None for row in rows) else "largest"


def unmeasured(results: Results) -> list[str]:
    """Name those that have no speed, or failed later, and why; a line a reason."""
    names: dict[str, list[str]] = {}
    for row in results["rows"]:
        if "reason" in row:
            names.setdefault(row["reason"], []).append(row["name"])
    return [f"{', '.join(who)}: {reason}" for reason, who in names.items()]


def parts_table(results: Results) -> Table:
    """Where a picture's time goes; empty without any."""
    rows = [row for row in results["rows"] if row.get("parts_ms")]
    names = [name for name in PART_TITLES if any(name in row["parts_ms"] for row in rows)]
    titles = {"unet": "UNet, a step", "step_rest": "guidance + scheduler, a step", "step": "a step"}
    head = [titles.get(name, PART_TITLES[name]) for name in names]
    table = [["Parts", *head]] if rows else []
    for row in rows:
        parts = row["parts_ms"]
        times = (duration(parts[n] / 1000) if n in parts else "" for n in names)
        table.append([row["name"], *times])
    return table


def offline_table(results: Results) -> Table:
    """Pictures a second at the best batch; empty without any."""
    rows = [row for row in results["rows"] if row.get("offline")]
    table = [["Offline", "pictures/s", "best batch", "worst picture", "tried"]] if rows else []
    for row in rows:
        offline = row["offline"]
        tried = ", ".join(f"{size}: {_digits(speed)}" for size, speed in offline["tried"].items())
        best = [_digits(offline["pictures_per_s"]), str(offline["batch"])]
        table.append([row["name"], *best, _quality_or_reference(row, results), tried])
    return table


def cold_start_table(results: Results) -> Table:
    """From the process's start to the first step and picture; empty without any."""
    rows = [row for row in results["rows"] if row.get("cold_start_s")]
    names = {"process_s": "process", "import_s": "import", "load_s": "load"}
    names |= {"first_call_s": "first call", "first_step_s": "until a step", "total_s": "total"}
    table = [["ColdStart", *names.values(), "worst picture"]] if rows else []
    for row in rows:
        first = row["cold_start_s"][0]
        times = (duration(first[name]) if name in first else "" for name in names)
        table.append([row["name"], *times, _quality_or_reference(row, results)])
    return table


def limits_text(results: Results) -> list[str]:
    """This machine's ceilings and a picture's work, a line each."""
    ceilings, work = results["ceilings"], results["work"]
    products = ", ".join(
        f"{name} {ceilings[name] / 1e9:,.0f}" for name in ceilings if name != "copy"
    )
    flops = ", ".join(
        f"{PART_TITLES[name]} {_digits(part['flop'] / 1e12)}" for name, part in work.items()
    )
    return [
        f"matrix product, GFLOP/s (int8: GOP/s): {products}; "
        f"copy, read + write: {ceilings['copy'] / 1e9:.1f} GB/s",
        f"work of a draw, TFLOP: {flops}",
    ]


def _rounds_title(results: Results) -> str:
    if results.get("alone"):
        return (
            "Each alone in memory, so that no turns pair: speeds are of medians; loaded in rounds"
        )
    return "Not in memory together; loaded anew in rounds"


def aligned(table: Table) -> list[str]:
    """Lay a table out for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def markdown(table: Table) -> list[str]:
    """Lay a table out as Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in table]
    return [lines[0], "|" + "---|" * len(table[0]), *lines[1:]] if lines else []


def terminal(results: Results) -> list[str]:
    """The tables that a run prints."""
    lines = [scene_text(results), *limits_text(results), *_stopped_text(results), ""]
    for table in _tables(results):
        lines += [*aligned(table), ""]
    if len(results["rounds"]) > 1:
        lines += [f"{_rounds_title(results)}:"]
        lines += [f"  {', '.join(names)}" for names in results["rounds"]]
    return [*lines, *unmeasured(results)]


def summary(results: Results) -> dict[str, Any]:
    """The one JSON line: what a program would look for."""
    rows = []
    for row in results["rows"]:
        brief = {"name": row["name"], "status": row["status"]}
        if "latency_s" in row:
            brief |= {name: row["latency_s"][name] for name in ("p50", "p90", "n")}
            brief["ratio"] = {k: v for k, v in row["ratio"].items() if k != "samples"}
        if "quality" in row:
            brief["psnr_db"] = row["quality"]["psnr_db"]["worst"]
            brief["pictures"] = row["quality"]["pictures"]
        if "cold_start_s" in row:
            brief["cold_start_s"] = row["cold_start_s"][0]["total_s"]
        if row.get("offline"):
            brief["pictures_per_s"] = row["offline"]["pictures_per_s"]
        rows.append(brief)
    names = ("schema", "created", "fastsd", "commit", "reference", "scene")
    facts = {name: results[name] for name in names}
    facts["scene"] = {k: v for k, v in results["scene"].items() if k != "prompts"}
    return {**facts, "rows": rows}


def _without_empty_columns(table: Table) -> Table:
    if len(table) == 1:  # a head and no rows
        return []
    kept = [i for i, column in enumerate(zip(*table, strict=True)) if any(column[1:])]
    return [[row[i] for i in kept] for row in table]


# --- the report -----------------------------------------------------------------------------------


def write_report(
    folder: Path, results: Results, first_pictures: Mapping[str, NDArray[np.uint8]]
) -> None:
    """Write results.json, report.md, the plots and the contact sheet; `folder` must not exist.

    Raises UsageError where it does, MissingDependency without matplotlib.
    """
    with published_folder(folder) as draft:
        write_json(draft / "results.json", results)
        names = [row["name"] for row in results["rows"] if row["name"] in first_pictures]
        sheet = contact_sheet(
            [Image.fromarray(first_pictures[name]) for name in names],
            names,
            columns=min(4, len(names)),
            side=256,
        )
        save_png(sheet, draft / "contact-sheet.png")
        plots = _plots(draft, results)
        (draft / "report.md").write_text("\n".join(_markdown_report(results, plots)), "utf-8")


def _markdown_report(results: Results, plots: Sequence[str]) -> list[str]:
    scene, environment = results["scene"], results["environment"]
    lines = [f"# fastsd bench: {scene['model']}", "", scene_text(results), ""]
    lines += [f"{results['created']}, fastsd {results['fastsd']}, commit {results['commit']}", ""]
    lines += [line for stopped in _stopped_text(results) for line in (stopped, "")]
    lines += ["Times are of one draw. The speed is that of the reference's turns over the"]
    lines += [
        "contender's, paired, with the 95 % interval of their median; the worst picture is that"
    ]
    lines += [f"farthest from {truth_of(results)} drawn from the same seed."]
    lines += ["On a GPU, fp32 is without TF32."] if scene["device"] != "cpu" else []
    lines += [""]
    for table in _tables(results):
        lines += [*markdown(table), ""]
    if len(results["rounds"]) > 1:
        lines += [f"{_rounds_title(results)}:", ""]
        lines += [f"{i}. {', '.join(names)}" for i, names in enumerate(results["rounds"], 1)]
        lines += [""]
    reasons = unmeasured(results)
    lines += (
        ["Not measured, or not to the end:", "", *(f"- {reason}" for reason in reasons), ""]
        if reasons
        else []
    )
    lines += [*(f"{line}  " for line in limits_text(results)), ""]
    for name in (*plots, "contact-sheet.png"):
        lines += [f"![{name.removesuffix('.png')}]({name})", ""]
    versions = environment["packages"].items()
    lines += ["Versions: " + ", ".join(f"{k} {v}" for k, v in versions if v != "not installed")]
    return [*lines, f"{environment['system']}, Python {environment['python']}", ""]


# --- plots ----------------------------------------------------------------------------------------

_COLOURS = {
    "fastsd": "#1b6ca8",
    "diffusers": "#8a8f98",
    "diffusers-compile": "#5c6370",
    "diffusers-reduce-overhead": "#5c6370",
}
_OTHER = "#c98b2b"
_PART_COLOURS = {
    "text_encoder": "#7fb069",
    "context": "#c3d898",
    "unet": "#1b6ca8",
    "step_rest": "#e07a5f",
    "step": "#6a4c93",
    "vae": "#c98b2b",
    "other": "#b8bcc4",
}


def _colour(name: str) -> str:
    tool = name.split("/")[0]
    return _COLOURS.get(tool) or _COLOURS.get(tool.split("-")[0], _OTHER)  # fastsd-cached: ours


def _plots(folder: Path, results: Results) -> list[str]:
    """Draw every plot that the results have numbers for; return the files' names."""
    rows = _by_speed(results)
    drawn = []
    for name, draw, wanted in (
        ("latency.png", _latency, rows),
        ("quality.png", _speed_against_quality, rows),
        ("limit.png", _share_of_limit, [row for row in rows if _share_text(row)]),
        ("parts.png", _where_time_goes, [row for row in rows if row["parts_ms"]]),
    ):
        if wanted:
            tall = 2.2 + 0.42 * len(wanted)
            figure = _figure(9, max(4.5, tall) if name == "quality.png" else tall)
            draw(figure.subplots(), wanted, results)
            figure.supxlabel(scene_text(results), fontsize=8, color="#5c6370")
            figure.savefig(folder / name, dpi=130)
            drawn.append(name)
    return drawn


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("plots need matplotlib; run pip install 'fastsd[bench]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _bars(axes: Any, rows: Sequence[Row], title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel(label)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _unit(rows: Sequence[Row]) -> tuple[float, str]:
    return (1, "s") if max(row["latency_s"]["p50"] for row in rows) >= 1 else (1000, "ms")


def _latency(axes: Any, rows: Sequence[Row], results: Results) -> None:
    factor, unit = _unit(rows)
    farthest = 0.0
    for i, row in enumerate(rows):
        latency = row["latency_s"]
        p20, p50, p80, p90 = (factor * latency[p] for p in ("p20", "p50", "p80", "p90"))
        axes.barh(i, p50, color=_colour(row["name"]), height=0.6)
        end = p90
        if _spreads(row):
            spread = ([p50 - p20], [p80 - p50])
            axes.errorbar(p50, i, xerr=spread, fmt="none", ecolor="black", capsize=4)
            axes.plot(p90, i, "|", color="black", markersize=10)
        else:
            times = [factor * time for time in latency["samples"]]
            axes.plot(times, [i] * len(times), ".", color="black")
            end = max(times)
        farthest = max(farthest, end)
        axes.annotate(
            f" {duration(latency['p50'])}",
            (end, i),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    what = "a picture" if results["scene"]["batch"] == 1 else "a batch"
    marks = "bar: p50; whiskers: p20 to p80; tick: p90; dots: all, where there are few"
    _bars(axes, rows, f"Latency of {what}", f"{unit} ({marks})")
    axes.set_xlim(0, 1.15 * farthest)


def _speed_against_quality(axes: Any, rows: Sequence[Row], results: Results) -> None:
    batch = results["scene"]["batch"]
    others = [row for row in rows if row["name"] != results["reference"]]
    for row in rows:
        reference = row["name"] == results["reference"]
        point = (batch / row["latency_s"]["p50"], row["quality"]["psnr_db"]["worst"])
        axes.plot(*point, "*" if reference else "o", color=_colour(row["name"]), markersize=10)
    _label_points(axes, rows, batch)
    axes.set_title("Speed against quality", loc="left", fontsize=12)
    axes.set_xlabel("pictures a second")
    axes.set_ylabel(f"worst PSNR against {truth_of(results)}, dB (100: equal)")
    axes.set_xlim(0, 1.05 * max(batch / row["latency_s"]["p50"] for row in rows))
    axes.set_ylim(0, 110)
    for height, word in ((50, "the same picture"), (30, "close")):
        axes.axhline(height, color="#b8bcc4", linewidth=1, linestyle="--")
        axes.text(0.005, height + 1, word, transform=axes.get_yaxis_transform(), fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if not others:
        axes.text(0.5, 0.5, "only the reference was drawn", transform=axes.transAxes, ha="center")


def _label_points(axes: Any, rows: Sequence[Row], batch: int) -> None:
    """Write the names in a column on the right, in the order of the points, with lines to them."""
    spacing = min(5.5, 105 / len(rows))
    points = [(batch / row["latency_s"]["p50"], row["quality"]["psnr_db"]["worst"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-points[i][1], -points[i][0]))
    height = 107.0
    for place, i in enumerate(order):
        below = (len(order) - place - 1) * spacing + 2  # what those still to come need
        height = max(min(height - spacing, points[i][1]), below)
        axes.annotate(
            rows[i]["name"],
            points[i],
            xytext=(1.02, height),
            textcoords=axes.get_yaxis_transform(),
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#c9ccd2", "linewidth": 0.8, "shrinkB": 5},
        )


def _share_of_limit(axes: Any, rows: Sequence[Row], results: Results) -> None:
    shares = [100 * row["limit"]["share"] for row in rows]
    axes.barh(range(len(rows)), shares, color=[_colour(row["name"]) for row in rows], height=0.6)
    for i, (row, share) in enumerate(zip(rows, shares, strict=True)):
        text = f" {share:.0f}% of {row['precision']}"
        axes.text(share, i, text, va="center", fontsize=9)
    _bars(axes, rows, "Share of this machine's limit", "% (measured products and copies: 100)")
    axes.set_xlim(0, max(100, 1.2 * max(shares)))


def _where_time_goes(axes: Any, rows: Sequence[Row], results: Results) -> None:
    totals = [_part_totals(row["parts_ms"]) for row in rows]
    factor, unit = (0.001, "s") if max(sum(t.values()) for t in totals) >= 2000 else (1, "ms")
    left = np.zeros(len(rows))
    for part in (p for p in PART_TITLES if any(p in total for total in totals)):
        widths = np.array([factor * max(0.0, total.get(part, 0.0)) for total in totals])
        axes.barh(
            range(len(rows)),
            widths,
            left=left,
            height=0.6,
            color=_PART_COLOURS.get(part, "#444444"),
            label=PART_TITLES[part],
        )
        left += widths
    _bars(axes, rows, "Where a picture's time goes", f"{unit} (medians of draws, PNG included)")
    axes.set_xlim(0, 1.05 * max(left))
    axes.set_title("Where a picture's time goes", loc="left", fontsize=12, pad=42)
    axes.legend(ncols=4, fontsize=8, loc="lower left", bbox_to_anchor=(-0.01, 1), frameon=False)


def _part_totals(parts: Mapping[str, float]) -> dict[str, float]:
    """Sums over a whole draw: what is given a step is multiplied out."""
    sums = {n: parts[n] for n in ("text_encoder", "context", "vae", "other", "png") if n in parts}
    loop = parts["total"] - sum(sums[n] for n in sums if n != "png")
    if "unet" in parts and parts.get("step"):
        sums["unet"] = loop * parts["unet"] / parts["step"]
        sums["step_rest"] = loop - sums["unet"]
    elif "step" in parts:
        sums["step"] = loop
    return sums


# --- two runs -------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[str, Any]:
    """Read a run's results.json, or that in a report's folder; raises FastsdError for others."""
    results = read_json(path / "results.json" if path.is_dir() else path)
    if "rows" not in results or "scene" not in results:
        raise UsageError(f"{path} holds no results of fastsd bench")
    return results


def compare(before: Results, after: Results) -> Table:
    """Say what changed between two runs, beyond the noise; a row a contender of both.

    Where both runs drew the same reference, speeds are taken in its turns, so that a faster or
    slower machine does not count as a change; the reference's own row is of plain times.
    """
    earlier = {row["name"]: row for row in before["rows"] if "latency_s" in row}
    later = {row["name"]: row for row in after["rows"] if "latency_s" in row}
    shared_reference = before["reference"] == after["reference"]
    alone = before.get("alone") or after.get("alone")
    change = unpaired_ratio if alone else changed_ratio
    table = [
        ["contender", "before", "after", "change of time", "95 % interval", "verdict", "quality"]
    ]
    for name in (name for name in later if name in earlier):
        old, new = earlier[name], later[name]
        relative = shared_reference and name != after["reference"]
        ratio = change(
            _series(new, after if relative else None), _series(old, before if relative else None)
        )
        interval = "" if ratio.low is None else f"{_percent(ratio.low)} to {_percent(ratio.high)}"
        table.append(
            [
                name,
                duration(old["latency_s"]["p50"]),
                duration(new["latency_s"]["p50"]),
                _percent(ratio.median) + (" against the reference" if relative else ""),
                interval,
                _changed(ratio),
                _quality_change(old["quality"], new["quality"]),
            ]
        )
    if len(table) == 1:
        raise UsageError("the two runs have no contender in common")
    return table


def different_scenes(before: Results, after: Results) -> list[str]:
    """Name what differs between the runs besides the code: then a change may come from there."""
    facts = {
        "scene": [{k: v for k, v in r["scene"].items() if k != "prompts"} for r in (before, after)],
        "cpu": [r["environment"]["cpu"] for r in (before, after)],
        "devices": [r["environment"]["devices"] for r in (before, after)],
        "packages": [r["environment"]["packages"] for r in (before, after)],
    }
    return [
        f"{fact}: {key} {a.get(key)} -> {b.get(key)}"
        for fact, (a, b) in facts.items()
        for key in sorted({*a, *b})
        if a.get(key) != b.get(key)
    ]


def _series(row: Row, in_turns_of: Results | None) -> list[float]:
    samples = list(row["latency_s"]["samples"])
    if in_turns_of is None:
        return samples
    return list(row["ratio"]["samples"])


def _percent(ratio: float | None) -> str:
    return "" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def _changed(ratio: Ratio) -> str:
    return {"no difference": "no change"}.get(ratio.verdict, ratio.verdict)


def _quality_change(before: Row, after: Row) -> str:
    """Compare the worst of the draws that both have, or the medians where draws are not known.

    The worst of more pictures is worse, whatever drew them.
    """
    old, new = before["psnr_db"], after["psnr_db"]
    common = old.get("draws", {}).keys() & new.get("draws", {}).keys()
    what = f"worst of {len(common)} draws" if common else "median"
    was, is_ = (min(e["draws"][d] for d in common) if common else e["median"] for e in (old, new))
    if abs(was - is_) < QUALITY_DROP_DB:
        return "no change"
    return f"{'worse' if is_ < was else 'better'}: {what} {was:.1f} -> {is_:.1f} dB"


# --- the READMEs' rows ----------------------------------------------------------------------------

_MARKED = re.compile(r"(<!-- bench: rows( [^>]*)? -->\n).*?(<!-- bench: end -->)", re.DOTALL)
SPEEDS = "speeds.png"


def readme_table(runs: Mapping[str, Results]) -> list[str]:
    """The rows of committed runs, by the folder that a README links to, as Markdown."""
    table = [["model, size, steps", "contender", "hardware", "p20 / p50 / p80", "n", "speed"]]
    table[0] += ["quality", "share of limit", "run"]
    for folder, results in runs.items():
        scene = results["scene"]
        for row in _by_speed(results):
            latency, reference = row["latency_s"], row["name"] == results["reference"]
            score = score_text(row["quality"])
            percentiles = ("p20", "p50", "p80") if _spreads(row) else ("p50",)
            table.append(
                [
                    f"{scene['model']}, {scene['size']}, {scene['steps']}",
                    row["name"],
                    _hardware(results),
                    " / ".join(duration(latency[p]) for p in percentiles),
                    str(latency["n"]),
                    "reference" if reference else ratio_text(row["ratio"]),
                    _quality_or_reference(row, results)
                    + (f"; {score} named right" if score else ""),
                    _share_text(row),
                    f"[{results['created'][:10]}]({folder}/report.md)",
                ]
            )
    return markdown(table)


def update_readme(readme: Path, results: Path) -> bool:
    """Put rows of `results` between a README's two marks; say whether that changed it.

    The first mark names the runs, `<!-- bench: rows A B -->`, which are also drawn into the
    results' speeds.png; one that names none has the rows of all, and no picture.
    """
    text = readme.read_text("utf-8")
    marks = list(_MARKED.finditer(text))
    if len(marks) != 1:
        raise UsageError(
            f"{readme} must hold the lines <!-- bench: rows --> and <!-- bench: end -->, once each"
        )
    start, named, end = marks[0].groups()
    folders = [path.parent for path in sorted(results.rglob("results.json"))]
    if named:
        folders = [results / name for name in named.split()]
    runs = {
        Path(os.path.relpath(folder, readme.parent)).as_posix(): read_results(folder)
        for folder in folders
    }
    rows = "\n".join([*readme_table(runs), ""])
    new = text[: marks[0].start()] + start + rows + end + text[marks[0].end() :]
    if new != text:
        if named:
            _draw_speeds(results / SPEEDS, list(runs.values()))
        readme.write_text(new, "utf-8")
    return new != text


def _draw_speeds(path: Path, runs: Sequence[Results]) -> None:
    """Draw the latencies of several runs side by side, each with its quality."""
    figure = _figure(11, 0.5 + sum(0.75 + 0.3 * len(_by_speed(run)) for run in runs[::2]))
    grid = figure.subplots(-(-len(runs) // 2), 2, squeeze=False).flat
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    for axes, run in zip(grid, runs, strict=False):
        scene, rows = run["scene"], _by_speed(run)
        times = [row["latency_s"]["p50"] for row in rows]
        _bars(axes, rows, "", "")
        axes.barh(range(len(rows)), times, color=[_colour(row["name"]) for row in rows], height=0.7)
        for i, row in enumerate(rows):
            worst = row["quality"]["psnr_db"]["worst"]
            near = "reference" if row["name"] == truth_of(run) else f"{worst:.0f} dB"
            axes.text(times[i], i, f"  {duration(times[i])}, {near}", va="center", fontsize=9)
        axes.set_title(
            f"{scene['model'].removeprefix('random:')}, {scene['size']}x{scene['size']}, "
            f"{scene['steps']} steps; {_hardware(run)}",
            loc="left",
            fontsize=10,
        )
        axes.set_xlim(0, 1.5 * max(times))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    figure.savefig(path, dpi=130)


def _by_speed(results: Results) -> list[Row]:
    """The rows that have a speed, the fastest first."""
    rows = [row for row in results["rows"] if "latency_s" in row]
    return sorted(rows, key=lambda row: row["latency_s"]["p50"])


def _hardware(results: Results) -> str:
    scene, environment = results["scene"], results["environment"]
    if scene["device"] == "cpu":
        return f"{environment['cpu']['name']}, {scene['threads']} threads"
    name: str = environment["devices"]["cuda:0"]
    return name.split(",")[0]


def to_json_line(data: object) -> str:
    """One line of JSON."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False)
