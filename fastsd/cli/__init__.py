"""The command line, a file for each family of commands:

app          what they share: the app and `main`, options, what is said and how errors end
generate     generate
export       export, tune
cache        cache ls, verify, rm
bench        bench, and its compare, ops, gpu, readme
convert      convert
about        samplers, models, inspect, env
environment  what this machine is, for env and bench

Results go to stdout (paths, tables, JSON), everything else to stderr. Exit codes: 0 done, 1 could
not, 2 wrong usage, 130 interrupted. Heavy imports stand inside the commands: `--help` is quick.
Annotations are evaluated where they stand: typer would compile each as text, twice.
"""

from fastsd.cli.app import main

# Each adds its commands to the app, in the order that --help lists them.
from fastsd.cli import generate, export, cache, bench, convert, about  # noqa: F401  # isort: skip

__all__ = ["main"]
