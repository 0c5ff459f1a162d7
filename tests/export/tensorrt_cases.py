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
from fastsd.export.parts import QUANTISED, Request
from tests.export.conftest import flat_spec


def main() -> None:
    results: list[int | str] = []
    for model, part, options in json.load(sys.stdin):
        options["size"] = tuple(options["size"])
        with tempfile.TemporaryDirectory() as folder:
            try:
                checkpoint = open_checkpoint(model)
                exporter = open_exporter(checkpoint, Request(target="tensorrt", **options))
                if exporter.request.precision in QUANTISED:
                    exporter.spec = flat_spec(checkpoint)  # which kernels there are, not how good
                entry = exporter.write(part, Path(folder))
                results.append((Path(folder) / entry.file).stat().st_size)
            except FastsdError as error:
                results.append(str(error))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
