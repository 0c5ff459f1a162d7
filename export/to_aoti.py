"""AOTInductor: every part compiled by torch for this CPU, loaded in seconds and with no compiler.

Always the fast layout: what does not depend on the latents is made once by parts of its own, and
what guidance's two rows share is computed once. Weights are frozen in, in the order that oneDNN
wants. int8 layers are the modules of fastsd.quant, whose Q/DQ nodes oneDNN folds into int8
products; attention is our own kernel where the CPU can run it (kernels/native.py).
"""

from __future__ import annotations

import shlex
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

import torch
from torch import nn
from torch._inductor.package.package import package_aoti

from fastsd.artifact import PartEntry, TensorSpec
from fastsd.backends.aoti import LIBRARY, machine
from fastsd.checkpoints import Checkpoint
from fastsd.errors import UsageError
from fastsd.export.build import Exporter
from fastsd.export.parts import GraphPart, Request, load_part
from fastsd.kernels import native
from fastsd.models.layers import TransformerBlock
from fastsd.quant.apply import quantised

CONFIG = {
    "freezing": True,  # constants folded, and packed as oneDNN wants them
    "aot_inductor.package": True,
    # One compilation a library: what would be kept for the next takes longer than it saves.
    "aot_inductor.precompile_headers": False,
    # The same bytes every time: no folder of a header, no address of a function of torch's.
    "aot_inductor.enable_line_tables": False,
    "size_asserts": False,
}


@final
class AotiExporter(Exporter):
    """AOTInductor packages for this CPU, in fp32 or int8."""

    target = "aoti"
    precisions = ("fp32", "int8")
    layouts = ("fast",)
    native = True

    def __init__(self, checkpoint: Checkpoint, request: Request) -> None:
        super().__init__(checkpoint, request)
        if request.dynamic:
            raise UsageError("aoti engines are compiled for one size and batch; drop --dynamic")
        native.compiler()  # missing, it is refused now rather than after the tracing
        self._own_kernels = native.obstacle() is None

    def machine(self) -> dict[str, str]:
        """What the code is bound to."""
        return machine()

    def write(self, part: str, folder: Path) -> PartEntry:
        """Compile one part into `<part>/model.pt2`."""
        home = folder / part
        home.mkdir(exist_ok=True)
        weights: tuple[str, ...] = ()
        if part == "unet" and self._own_kernels:
            native.build(home / LIBRARY)
            native.load(home / LIBRARY)
            weights = (f"{part}/{LIBRARY}",)
        loaded = load_part(self.checkpoint, part, self.request, torch.float32, self._prepared)
        outputs = compile_part(loaded, home / "model.pt2")
        return PartEntry(f"{part}/model.pt2", loaded.inputs, outputs, weights)

    def _prepared(self, part: str, module: nn.Module) -> nn.Module:
        """Put int8 layers and our attention into a freshly loaded model."""
        if self.spec is not None and part in ("unet", "vae_decoder"):
            module = quantised(module, self.spec.only(part.split("_")[0]))
        if part == "unet" and self._own_kernels:
            own_attention_(module, int8=self.spec is not None)
        return module


def own_attention_(module: nn.Module, *, int8: bool) -> None:
    """Let `module` attend by our own kernels: self-attention in int8 if asked, else in fp32."""
    for block in module.modules():
        if isinstance(block, TransformerBlock):
            block.attn1.implementation = "vnni" if int8 else "avx512"
            block.attn2.implementation = "avx512"


def compile_part(part: GraphPart, package: Path) -> tuple[TensorSpec, ...]:
    """Trace a part, compile it into `package`, and return its outputs.

    The package holds the library alone, none of torch's C++, and the same bytes wherever torch, the
    checkpoint and the folders for temporary files lie.
    """
    dims = {
        name: torch.export.Dim(name)
        for spec in part.inputs
        for name in spec.shape
        if isinstance(name, str)
    }
    dynamic = tuple(
        {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in part.inputs
    )
    with _quiet(), torch.no_grad():  # with gradients Inductor would freeze nothing
        program = torch.export.export(
            part.module, part.example, dynamic_shapes=(dynamic,), strict=False
        )
        outputs = _outputs(program, part.outputs)
        with tempfile.TemporaryDirectory(prefix="fastsd-aoti-") as scratch:
            files = compile_program(program, Path(scratch))
            package_aoti(str(package), [f for f in files if not f.endswith(".cpp")])
    return outputs


def compile_program(program: torch.export.ExportedProgram, scratch: Path) -> list[str]:
    """Compile a traced graph; the files that torch made below `scratch`: C++, library, its JSON."""
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule) and program.example_inputs is not None
    options = {
        **CONFIG,
        "aot_inductor.output_path": str(scratch),
        "aot_inductor.model_name_for_generated_files": "part",  # else a hash of this very path
        "cpp.cxx": (None, str(_compiler(scratch))),
    }
    files = torch._inductor.aot_compile(module, *program.example_inputs, options=options)
    assert isinstance(files, list)
    return [str(file) for file in files]


def _compiler(scratch: Path) -> Path:
    """Write a compiler that leaves no folder's name in what it makes; torch takes no such flags."""
    script = scratch / Path(native.compiler()).name
    command = [native.compiler(), *native.nameless(scratch)]
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    script.chmod(0o700)
    return script


def _outputs(
    program: torch.export.ExportedProgram, names: tuple[str, ...]
) -> tuple[TensorSpec, ...]:
    """Read the outputs' types off the traced graph."""
    (node,) = (node for node in program.graph.nodes if node.op == "output")
    tensors = [argument.meta["val"] for argument in node.args[0]]
    return tuple(
        TensorSpec(
            name,
            str(tensor.dtype).removeprefix("torch."),
            tuple(size if isinstance(size, int) else str(size) for size in tensor.shape),
        )
        for name, tensor in zip(names, tensors, strict=True)
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the compiler says of its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
