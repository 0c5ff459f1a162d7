"""`fastsd samplers`, `models`, `inspect`, `env`: say what there is, and what is in a model."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastsd.cli.app import Json, Variant, app, print_table
from fastsd.cli.environment import environment


@app.command("samplers")
def list_samplers(as_json: Json = False) -> None:
    """List the samplers and their other names."""
    from fastsd.config import SIGMA_SPACINGS
    from fastsd.samplers import SAMPLERS

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "title": sampler.title,
            "order": sampler.order,
            "evaluations": sampler.evaluations,
            "stochastic": sampler.stochastic,
            "sigma_spacings": [*SIGMA_SPACINGS] if "sigma_spacing" in sampler.accepts else [],
            "aliases": [*sampler.aliases],
            "diffusers": sampler.scheduler,
        }
        for name, sampler in SAMPLERS.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = [["name", "title", "order", "calls a step", "draws noise", "diffusers", "other names"]]
    for row in rows:
        title = row["title"] + "*" * bool(row["sigma_spacings"])
        facts = [str(row["order"]), str(row["evaluations"]), "yes" if row["stochastic"] else "no"]
        table.append([row["name"], title, *facts, row["diffusers"], ", ".join(row["aliases"])])
    print_table(table)
    print('* takes Karras or Exponential after its name, as in --sampler "DPM++ 2M Karras"')


@app.command("models")
def list_models(as_json: Json = False) -> None:
    """List which models, files, adapters and tasks are supported, and how each was verified."""
    from dataclasses import asdict

    from fastsd.supported import ROWS

    if as_json:
        print(json.dumps([asdict(row) for row in ROWS], indent=2))
        return
    rows = [[r.kind, r.name, r.note, r.held_to, " ".join(r.engines)] for r in ROWS]
    print_table([["kind", "name", "how", "held to", "engines run on it"], *rows])
    print("each row is held by a test of the suite; --json names it")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="builtin, a folder, a hub id, or random:sd15.")],
    variant: Variant = None,
    as_json: Json = False,
) -> None:
    """Say what a model holds: family, parts, parameter counts, sizes, dtypes, sampler.

    Of an exported engine: how it was made, what goes in and out, and its receipt.
    """
    from fastsd.artifact import is_artifact
    from fastsd.checkpoints import describe, open_checkpoint

    if is_artifact(model):
        _inspect_engine(Path(model), as_json)
        return
    facts = describe(open_checkpoint(model, variant=variant))
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    schedule = facts["schedule"]
    print(f"{facts['path']}: family {facts['family']}, {facts['default_size']} pixels a side,")
    print(f"sampler {facts['sampler']}, predicts {schedule['prediction']}")
    print()
    table = [["part", "parameters", "MB", "dtypes", "files"]]
    for name, part in facts["parts"].items():
        size = f"{part['size_bytes'] / 1e6:.1f}"
        dtypes, files = ", ".join(part["dtypes"]), ", ".join(part["files"])
        table.append([name, f"{part['parameters']:,}", size, dtypes, files])
    print_table(table)
    if facts["passed_over"]:
        names = facts["passed_over"]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        print(f"passed over: {', '.join(names[:5])}{more}")


def _inspect_engine(path: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from fastsd.artifact import read_manifest

    facts = asdict(read_manifest(path))
    if as_json:
        print(json.dumps({"path": str(path), **facts}, indent=2))
        return
    parts = facts.pop("parts")
    files = facts.pop("files")
    print("\n".join(_lines({"path": path, **facts})))
    print()
    table = [["part", "MB", "takes", "gives"]]
    for name, part in parts.items():
        held = sum(files[file]["size_bytes"] for file in (part["file"], *part["weights"]))
        takes, gives = (
            ", ".join(f"{t['name']} {t['dtype']} {list(t['shape'])}" for t in part[side][:4])
            + ", ..." * (len(part[side]) > 4)
            for side in ("inputs", "outputs")
        )
        table.append([name, f"{held / 1e6:.1f}", takes, gives])
    print_table(table)


@app.command()
def env(as_json: Json = False) -> None:
    """Describe this machine and which backends it can use: paste it into a bug report."""
    facts = environment()
    print(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))


def _lines(data: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Write nested data as indented `name: value` lines."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {value}"
