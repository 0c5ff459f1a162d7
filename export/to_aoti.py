"""AOTInductor: every part compiled by torch for this CPU, loaded in seconds and with no compiler.

Always the fast layout: what does not depend on the latents is made once by parts of its own, and
what guidance's two rows share is computed once. Weights are frozen in, in the order that oneDNN
wants. int8 layers are the modules of fastsd.quant, whose Q/DQ nodes oneDNN folds into int8
products; attention is our own kernel where the CPU can run it (kernels/native.py).
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.wrapper import codegen_reinterpret_view_helper
from torch._inductor.exc import InductorError

from fastsd.artifact import PartEntry, TensorSpec
from fastsd.backends.aoti import INSIDE, LIBRARY, PACKAGE, machine
from fastsd.backends.heap import give_back_freed_memory
from fastsd.checkpoints import Checkpoint
from fastsd.errors import ArtifactError, MissingDependency, UsageError
from fastsd.export.build import Exporter
from fastsd.export.for_cpu import bf16_pays, for_cpu, in_bf16
from fastsd.export.parts import GraphPart, Request, dtype_name, load_part, quiet, traced
from fastsd.files import replaced
from fastsd.kernels import native

COMMON = {
    "freezing": True,  # constants folded, and laid out as their readers want them
    "aot_inductor.package": True,
    # One compilation a library: what would be kept for the next takes longer than it saves.
    "aot_inductor.precompile_headers": False,
    "size_asserts": False,
}
NEWEST = "enable_line_tables"  # the setting that came last
CONFIG = {
    **COMMON,
    # The same bytes every time: no folder of a header, no address of a function of torch's.
    f"aot_inductor.{NEWEST}": False,
    # Weights in a file of their own, which an engine finds wherever it was moved to.
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "binary_blob",
}

# Torch writes the description that oneDNN has of a packed weight byte for byte. Behind two fields
# (ints at 104 and 312) lie four bytes that nobody sets: half of an address on the stack, another
# one in every process. Zeros, in sed's words.
_PADDING = (
    r"s/(opaque_metadata = \{([0-9]+L, ){108})([0-9]+L, ){4}(([0-9]+L, ){204})([0-9]+L, ){4}/"
    r"\10L, 0L, 0L, 0L, \40L, 0L, 0L, 0L, /"
)

# By for_cpu; the first holds our kernels' library.
_REWRITTEN = ("unet", "unet_shallow", "vae_decoder")


@final
class AotiExporter(Exporter):
    """AOTInductor packages for this CPU, in fp32, with bf16 products or with int8 ones."""

    target = "aoti"
    precisions = ("fp32", "bf16", "int8")
    layouts = ("fast",)
    native = True

    def __init__(self, checkpoint: Checkpoint, request: Request) -> None:
        super().__init__(checkpoint, request)
        if request.dynamic:
            raise UsageError("aoti engines are compiled for one size and batch; drop --dynamic")
        if request.precision == "int8" and native.overflows():
            raise UsageError(
                "int8 products overflow on this CPU, which has no VNNI; "
                "export with --precision fp32"
            )
        if not hasattr(torch._inductor.config.aot_inductor, NEWEST):
            raise MissingDependency(
                "exporting to aoti needs torch 2.13 or newer, which loads folders as packages; "
                f"this is {torch.__version__}: run pip install 'torch>=2.13'"
            )
        native.compiler()  # missing, it is refused now rather than after the tracing
        self._obstacle = native.obstacle()  # to our own kernels
        self._bf16 = request.precision == "bf16" or (request.precision == "int8" and bf16_pays())

    def machine(self) -> dict[str, str]:
        """What the code is bound to."""
        return machine()

    def choices(self) -> dict[str, str]:
        """Which kernels run, and in what the layers that stay out of int8 multiply."""
        kernels = (
            f"torch's, without fastsd's: {self._obstacle}" if self._obstacle else "fastsd's own"
        )
        if self.request.precision != "int8":
            return {"kernels": kernels}
        floats = "bf16, clearly faster than fp32" if self._bf16 else "fp32, as bf16 is no faster"
        return {"kernels": kernels, "layers out of int8": f"{floats} on this CPU"}

    def begin(self, folder: Path) -> None:
        """Compile our own kernels."""
        library = folder / _REWRITTEN[0] / LIBRARY
        if self._obstacle is None and not library.exists():
            library.parent.mkdir(exist_ok=True)
            with replaced(library) as draft:
                native.build(draft)

    def write(self, part: str, folder: Path) -> PartEntry:
        """Compile one part into `<part>/package/`."""
        home = folder / part
        home.mkdir(exist_ok=True)
        weights: tuple[str, ...] = ()
        if part in _REWRITTEN and self._obstacle is None:
            library = folder / _REWRITTEN[0] / LIBRARY
            if part == _REWRITTEN[0]:
                weights = (f"{part}/{LIBRARY}",)
            native.load(library)
        loaded = load_part(self.checkpoint, part, self.request, torch.float32, self._prepared)
        give_back_freed_memory()  # weights that narrower ones replaced: of SDXL's UNet, 14 GB
        outputs, (code, *beside) = compile_part(loaded, home / PACKAGE)
        weights += tuple(file.relative_to(folder).as_posix() for file in beside)
        return PartEntry(code.relative_to(folder).as_posix(), loaded.inputs, outputs, weights)

    def _prepared(self, part: str, module: nn.Module) -> nn.Module:
        """Rewrite what runs every step, and the decoder; of the rest halve the weights."""
        if part not in _REWRITTEN:
            return in_bf16(module) if self._bf16 else module
        roundings = None if self.spec is None else self.spec.only(part.split("_")[0])
        return for_cpu(module, roundings, bf16=self._bf16, own_kernels=self._obstacle is None)


def compile_part(part: GraphPart, package: Path) -> tuple[tuple[TensorSpec, ...], list[Path]]:
    """Trace a part, compile it into the folder `package`; return its outputs and files, code first.

    The package holds the library, its weights and what describes them, none of torch's C++, and the
    same bytes wherever torch, the checkpoint and the folders for temporary files lie. It is not
    packed into one file: every process that loads such a one writes it out anew.
    """
    program, outputs = trace(part)
    with tempfile.TemporaryDirectory(prefix=".", dir=package.parents[1]) as scratch:
        with quiet(), torch.no_grad(), _releasing():
            files = compile_program(program, Path(scratch), CONFIG)
        return outputs, moved(files, package, INSIDE)


def trace(part: GraphPart) -> tuple[torch.export.ExportedProgram, tuple[TensorSpec, ...]]:
    """Trace a part; return its graph and what it gives."""
    program = traced(part)
    return program, _outputs(program, part.outputs)


def moved(files: Sequence[Path], package: Path, inside: str = "") -> list[Path]:
    """Move what was compiled, but for the C++, to a new folder; return it, the code first."""
    folder = package / inside
    shutil.rmtree(package, ignore_errors=True)
    folder.mkdir(parents=True)
    kept = [file.rename(folder / file.name) for file in files if file.suffix != ".cpp"]
    return sorted(kept, key=lambda file: (file.suffix != ".so", file.name))


def compile_program(
    program: torch.export.ExportedProgram,
    scratch: Path,
    config: Mapping[str, Any],
    flags: Sequence[str] = (),
) -> list[Path]:
    """Compile a traced graph; the files that torch made below `scratch`: C++, library, its JSON.

    config: torch's settings, as in COMMON. flags: more of the C++ compiler's.
    """
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule) and program.example_inputs is not None
    # The tracer's checks of types beside every conversion hide int8 products from the compiler.
    for node in module.graph.find_nodes(
        op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
    ):
        module.graph.erase_node(node)
    module.recompile()
    options = {
        **config,
        "aot_inductor.output_path": str(scratch),
        "aot_inductor.model_name_for_generated_files": "part",  # else a hash of this very path
        "cpp.cxx": (None, str(_compiler(scratch, flags))),
    }
    try:
        files = torch._inductor.aot_compile(module, *program.example_inputs, options=options)
    except InductorError as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtifactError(
            f"torch {torch.__version__} could not compile a part ({reason}); another version of "
            "torch or of the C++ compiler ($CXX) may"
        ) from error
    assert isinstance(files, list)
    return [Path(str(file)) for file in files]


_torchs = CppWrapperCpu.codegen_reinterpret_view


@contextmanager
def _releasing() -> Iterator[None]:
    """Have torch write code that releases all that it makes."""
    CppWrapperCpu.codegen_reinterpret_view = _reinterpreted  # type: ignore[method-assign]
    try:
        yield
    finally:
        CppWrapperCpu.codegen_reinterpret_view = _torchs  # type: ignore[method-assign]


def _reinterpreted(
    self: CppWrapperCpu,
    data: Any,
    size: Any,
    stride: Any,
    offset: Any,
    writeline: Callable[[str], None],
    dtype: torch.dtype | None = None,
) -> str:
    """Write a tensor seen with a size and strides as an expression, whatever they are.

    For those that it has already, torch writes a new handle as a statement of its own, and for an
    int8 product that adds to what another made it does so twice, using one: the other was never
    released, so that every call kept some of its activations for good (180 MB in SD1.5's UNet).
    """
    base = codegen_reinterpret_view_helper(data)[3]  # type: ignore[no-untyped-call]
    if base != data.dtype or dtype not in (None, base):
        return _torchs(self, data, size, stride, offset, writeline, dtype)
    sizes, strides = (
        self.codegen_int_array_var(
            self.codegen_shape_tuple(numbers),
            writeline,
            known_statically=self.is_statically_known_list_of_ints(numbers),  # type: ignore[no-untyped-call]
            graph=self.get_codegened_graph(),  # type: ignore[no-untyped-call]
        )
        for numbers in (size, stride)
    )
    view = f"{data.get_name()}, {len(size)}, {sizes}, {strides}, {self.codegen_sizevar(offset)}"
    return f"wrap_with_raii_handle_if_needed(reinterpret_tensor_wrapper({view}))"


def _compiler(scratch: Path, flags: Sequence[str]) -> Path:
    """Write a compiler that leaves no folder's name and no stray byte in what it makes."""
    script = scratch / Path(native.compiler()).name
    command = [native.compiler(), *native.nameless(scratch), *flags]
    script.write_text(
        "#!/bin/sh\n"
        "for file; do case $file in *.cpp)\n"  # not sed -i, which is not the same everywhere
        f"sed -E -e {shlex.quote(_PADDING)} -e {shlex.quote(f's|{scratch}/||g')} "
        '"$file" >"$file.new" && mv "$file.new" "$file" || exit 1;;\n'
        "esac; done\n"
        f'exec {shlex.join(command)} "$@"\n'
    )
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
            dtype_name(tensor.dtype),
            tuple(size if isinstance(size, int) else str(size) for size in tensor.shape),
        )
        for name, tensor in zip(names, tensors, strict=True)
    )
