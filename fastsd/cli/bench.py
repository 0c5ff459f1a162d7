"""`fastsd bench`: time fastsd and others, compare runs, time single ops."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastsd.cli.app import app, say
from fastsd.cli.environment import environment
from fastsd.errors import UsageError

bench_app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")


@bench_app.callback(
    invoke_without_command=True,
    epilog="""Examples:

\b
  fastsd bench
  fastsd bench --contenders "fastsd/*" --contenders diffusers/fp32 --report run-1
  fastsd bench --model random:sd15 --size 512 --steps 2 --contenders "*"
  fastsd bench compare run-1 run-2

A contender is named as in the table; * matches any part of a name, and again=NAME enters one twice.
""",
)
def bench(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(help="builtin, a folder, a hub id, random:sd15, random:sd21, random:sdxl."),
    ] = "builtin",
    size: Annotated[
        int | None, typer.Option(help="Pixels a side. [default: the model's own]")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    guidance: Annotated[
        float | None,
        typer.Option(help="As for generate. [default: 7.5, SDXL 5, whatever the model's own is]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 1,
    sampler: Annotated[
        str | None, typer.Option(help="See `fastsd samplers`. [default: the model's own]")
    ] = None,
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            help="Who takes part; may be given often. [default: all that need not compile first]"
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draws of each, in turns; of more than 40, those of other makers draw 12. "
            "[default: what 40 s hold, 6 or more]",
        ),
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            help="SingleStream, ColdStart, Parts or Offline; may be given often. "
            "[default: the first three]"
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. [default: a GPU if there is one]")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="That each may use. [default: as torch would]")
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the fp32 pictures that others are held to, and take them from there when "
            "--contenders draw the scene again: speeds are then those over the first one's.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write tables, plots and pictures to a new folder."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print nothing but the results, one line of JSON.")
    ] = False,
) -> None:
    """Time fastsd and others drawing the same pictures in turns, and compare the pictures.

    The last line on stdout is one JSON object.
    """
    if context.invoked_subcommand:
        return
    from fastsd.benchmarks import report as reports
    from fastsd.benchmarks import run

    if report is not None and report.exists():
        raise UsageError(f"{report} exists already; choose another name or move it away")
    scene = run.scene_of(
        model,
        size=size,
        steps=steps,
        guidance=guidance,
        batch=batch,
        sampler=sampler,
        device=device,
        threads=threads,
    )
    results, first_pictures = run.bench(
        scene,
        contenders or (),
        repeats=repeats,
        scenarios=scenario or run.DEFAULT_SCENARIOS,
        environment=environment(),
        say=say,
        truth=truth,
    )
    with run.undisturbed():
        if report is not None:
            reports.write_report(report, results, first_pictures)
            say(f"report: {report / 'report.md'}")
        if not as_json:
            print("\n".join([*reports.terminal(results), ""]))
        print(reports.to_json_line(results if as_json else reports.summary(results)))


@bench_app.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(help="results.json or the folder of a report.")],
    after: Annotated[Path, typer.Argument(help="The same of a later run.")],
) -> None:
    """Say what changed between two runs beyond the noise."""
    from fastsd.benchmarks import report as reports

    earlier, later = (reports.read_results(path) for path in (before, after))
    print("\n".join(reports.aligned(reports.compare(earlier, later))))
    for difference in reports.different_scenes(earlier, later):
        print(f"differs: {difference}")


@bench_app.command("ops")
def bench_ops(
    ops: Annotated[
        list[str] | None, typer.Argument(help="Which. [default: all]", show_default=False)
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. [default: a GPU if there is one]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the results as JSON, too.")
    ] = None,
) -> None:
    """Time each op's implementations in turns, against the reference and this machine's limits."""
    from fastsd.benchmarks.contenders import measured_device
    from fastsd.benchmarks.ops import measure_ops, ops_table
    from fastsd.benchmarks.report import aligned
    from fastsd.files import write_json

    def keep(results: dict[str, Any]) -> None:
        if output:
            write_json(output, results)

    results = measure_ops(
        ops or (), precision=precision, device=measured_device(device), say=say, keep=keep
    )
    print("\n".join(aligned(ops_table(results))))


@bench_app.command(
    "gpu", context_settings={"ignore_unknown_options": True, "help_option_names": []}
)
def bench_gpu(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[OPTIONS]")] = None,
) -> None:
    """Run whatever still waits for a GPU, in stages that end and go on (see: gpu --help)."""
    from fastsd.benchmarks.gpu import main

    main(arguments or [])


@bench_app.command("readme")
def bench_readme(
    readmes: Annotated[
        list[Path] | None,
        typer.Argument(
            help="The files to update. [default: README.md and the results' own]",
            show_default=False,
        ),
    ] = None,
    results: Annotated[Path, typer.Option(help="The folder of committed runs.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Write rows of committed runs into READMEs, between their two marks, and draw them.

    The first mark names the runs: <!-- bench: rows RUN RUN -->; without a name it has all of them.
    """
    from fastsd.benchmarks import report as reports

    for readme in readmes or (Path("README.md"), results / "README.md"):
        changed = reports.update_readme(readme, results)
        print(f"{readme}: {'updated' if changed else 'up to date'}")
