"""Builds engines with TensorRT, in a process whose libraries were found before it started.

Given JSON on stdin: [[model, part, options of a Request], …]. Prints a JSON list of engine sizes
in bytes, or of error messages. Run by test_to_tensorrt.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from fastsd.checkpoints import open_checkpoint
from fastsd.errors import FastsdError
from fastsd.export.build import open_exporter
from fastsd.export.parts import Request


def main() -> None:
    results: list[int | str] = []
    for model, part, options in json.load(sys.stdin):
        options["size"] = tuple(options["size"])
        with tempfile.TemporaryDirectory() as folder:
            try:
                exporter = open_exporter(
                    open_checkpoint(model), Request(target="tensorrt", **options)
                )
                entry = exporter.write(part, Path(folder))
                results.append((Path(folder) / entry.file).stat().st_size)
            except FastsdError as error:
                results.append(str(error))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
