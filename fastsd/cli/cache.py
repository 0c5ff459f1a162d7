"""`fastsd cache`: list, check and remove the engines that are kept."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastsd.cli.app import Json, app, print_table, say
from fastsd.errors import ArtifactError, UsageError

cache = typer.Typer(
    help="Look after your own engines: what `fastsd export` made without --output.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cache, name="cache")


@cache.command("ls")
def list_engines(as_json: Json = False) -> None:
    """List them: path, model, target, precision, size, megabytes, worst picture's PSNR."""
    rows = [_engine(path) for path in _kept()]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        print_table([list(rows[0]), *([str(v) for v in row.values()] for row in rows)])
    else:
        say("no engines are kept; `fastsd export MODEL` without --output makes one")


def _kept() -> list[Path]:
    from fastsd.artifact import kept_engines

    return kept_engines()


def _engine(path: Path) -> dict[str, Any]:
    from fastsd.artifact import read_manifest

    try:
        manifest = read_manifest(path)
    except ArtifactError as error:
        return {"path": str(path), "model": f"unusable: {error}"}
    height, width = manifest.size
    pictures = (manifest.receipt or {}).get("pictures") or {}
    return {
        "path": str(path),
        "model": manifest.model,
        "target": manifest.target,
        "precision": manifest.precision,
        "size": "any" if manifest.dynamic else f"{width}x{height}",
        "MB": round(sum(file.size_bytes for file in manifest.files.values()) / 1e6, 1),
        "PSNR_dB": pictures.get("psnr_db", {}).get("worst", "-"),
    }


@cache.command("verify")
def verify_engines(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Engines anywhere. [default: all your own]"),
    ] = None,
) -> None:
    """Check every file of every engine against its digest; exit code 1 if one is damaged."""
    from fastsd.artifact import Artifact, unfinished_engines

    for unfinished in unfinished_engines() if not paths else ():
        say(
            f"{unfinished}: being written, or left by an export that was killed: the same export "
            "goes on from it, `fastsd cache rm --unfinished` removes it"
        )
    good = True
    for path in paths or _kept():
        try:
            artifact = Artifact.open(path, trust_native=True)  # only read: nothing in it is run
            if artifact.manifest.native:
                from fastsd.backends.aoti import PACKAGE  # torch, which others do not need

                for part in artifact.manifest.parts:
                    artifact.check_folder(f"{part}/{PACKAGE}")
        except ArtifactError as error:
            good = False
            print(f"{path}: {error}")
        else:
            print(f"{path}: good")
    if not good:
        raise typer.Exit(1)


@cache.command("rm")
def remove_engines(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="As `fastsd cache ls` has them.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every one.")] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="What exports that were killed left.")
    ] = False,
) -> None:
    """Remove engines; print each one's path."""
    from fastsd.artifact import engines_folder, remove_engine, sweep_engines

    if bool(paths) + everything + unfinished != 1:
        raise UsageError(
            "say which engines to remove, as `fastsd cache ls` has them, or --all, or --unfinished"
        )
    for path in sweep_engines() if unfinished else ():
        print(path)
    for path in _kept() if everything else [engines_folder() / p for p in paths or ()]:
        remove_engine(path)
        print(path)
