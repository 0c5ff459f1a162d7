"""The app that commands join, `main` that runs it, and the options and words that they share."""

import io
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import fastsd
from fastsd.errors import FastsdError, UsageError

app = typer.Typer(
    help="Stable Diffusion as fast as the hardware allows.",
    epilog="Start with: fastsd generate 'a red apple' -o apple.png",
    rich_markup_mode=None,  # rich would double the time that --help takes
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
# What says how to read a model, in every command that reads one.
Prediction = Annotated[
    str | None, typer.Option(help="eps or v, for a file that does not say: SD 2.x.")
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="How a model distilled to few steps is sampled, where it does not say: "
        "lightning-4, hyper-8, sdxl-turbo, lcm, ..."
    ),
]
Vae = Annotated[
    str | None, typer.Option(help="Another VAE, or a tiny one (TAESD): a folder or a file.")
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:WEIGHT]",
        help="A LoRA to use, builtin-lcm for the built-in model's own; may be given again.",
    ),
]
Variant = Annotated[
    str | None, typer.Option(help="fp16: a folder's files that have this in their names.")
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Its folder, for a file whose vocabulary is not CLIP's.")
]


INTERRUPTED = 130  # the exit code of a shell's Ctrl-C
# What the library's messages call what has another name here.
_OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "mask_image": "--mask",
    "mask_feather": "--feather",
    "as image": "as --image",
    "give image": "give --image",
    "low_memory=True": "--low-memory",
}
_KEYWORDS = (
    "backend",
    "precision",
    "weights",
    "prediction",
    "preset",
    "vae",
    "tokenizer",
    "variant",
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; a user's mistake is one line on stderr, never a traceback."""
    _listen()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a legacy code page must not break on a prompt
            stream.reconfigure(errors="backslashreplace")
    try:
        app(_checked(sys.argv[1:] if arguments is None else arguments), prog_name="fastsd")
    except UsageError as error:
        _fail(error, 2)
    except FastsdError as error:
        _fail(error, 1)
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(INTERRUPTED)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # what typer makes of it
            say("interrupted")
        raise
    sys.exit(0)


class _Line(logging.Formatter):
    """A line as it is, and a warning as such."""

    def format(self, record: logging.LogRecord) -> str:
        return ("warning: " if record.levelno >= logging.WARNING else "") + super().format(record)


def _listen() -> None:
    """Show warnings, whoever gives them, and what fastsd says of its choices, on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("fastsd").setLevel(logging.INFO)


def _checked(arguments: Sequence[str]) -> list[str]:
    """Refuse text that no file or tokenizer could hold."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the argument {argument!r} is not text: {argument[error.start]!r} is not a "
                "character; check the terminal's encoding"
            ) from None
    return list(arguments)


def _fail(error: object, code: int) -> NoReturn:
    say(f"error: {_as_options(str(error))}")
    sys.exit(code)


def _as_options(text: str) -> str:
    """Say options where the library's messages say arguments: --steps for num_inference_steps."""
    for argument, option in _OPTIONS.items():
        text = re.sub(rf"\b{argument}\b", option, text)
    keyword = rf"\b({'|'.join(_KEYWORDS)})=(?:'([\w-]*)')?"
    return re.sub(keyword, lambda found: f"--{found[1]} {found[2] or ''}".rstrip(), text)


def say(line: str) -> None:
    if sys.stderr is not None:  # print would take stdout, which is the program's answer
        print(line, file=sys.stderr, flush=True)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def weighted_files(given: Sequence[str]) -> list[tuple[str, float]]:
    """Read FILE:WEIGHT, or FILE alone, each."""
    read = []
    for text in given:
        file, _, weight = text.rpartition(":")
        try:
            read.append((file, float(weight)) if file else (text, 1.0))
        except ValueError:
            if Path(file).is_file() and not Path(text).exists():
                raise UsageError(f"the weight {weight!r} of {file} is not a number") from None
            read.append((text, 1.0))  # a colon of the path's own
    return read


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fastsd {fastsd.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass
