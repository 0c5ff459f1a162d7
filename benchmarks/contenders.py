"""Who takes part: every way of drawing a scene, by name, and what each needs before it can.

A contender is a description only; it is opened, and may fail, in a process of its own (worker.py).
fastsd's own are read from the registry of backends: a new backend takes part by being there.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from fastsd.arguments import chosen_device
from fastsd.artifact import cache_folder, read_manifest
from fastsd.backends import BACKENDS, ENGINES, RUNS_ON
from fastsd.checkpoints import open_checkpoint
from fastsd.errors import UsageError
from fastsd.export import EXPORTERS
from fastsd.export.parts import QUANTISED, source_digest

ASK = "ask for it by --contenders"
BENCH_EXTRA = "pip install 'fastsd[bench]'"


@dataclass(frozen=True)
class Scene:
    """What is drawn, the same for every contender.

    Picture i of a run is drawn from prompts[i % len(prompts)] and seed i. size: pixels a side.
    sampler: fastsd's name, None for the model's own. threads: that each contender may use.
    """

    model: str
    size: int
    steps: int
    guidance: float
    prompts: tuple[str, ...]
    batch: int = 1
    sampler: str | None = None
    device: str = "cpu"
    threads: int = 1

    @property
    def guided(self) -> bool:
        """Whether the UNet is asked twice a step."""
        return self.guidance > 1

    def texts(self, draw: int) -> list[str]:
        """The prompts of draw `draw`, one a picture."""
        return [self.prompts[i % len(self.prompts)] for i in self.seeds(draw)]

    def seeds(self, draw: int) -> list[int]:
        """The seeds of draw `draw`, one a picture."""
        return [draw * self.batch + i for i in range(self.batch)]


@dataclass(frozen=True)
class Contender:
    """One way of drawing a scene.

    opens: "module:function", called as function(scene, **options) and returning a Drawer.
    prepares: the same for what must be made once: it fills the folder that both are given as
    folder=, and that is kept in the user's cache under the name `kept`. code: our own packages
    that made it.
    precision: the ceiling that judges it. packages: what must be installed; install: how.
    imports: what it imports beside our own code before it can load, named as `opens` is.
    compiles: it spends minutes before the first picture, every time.
    copies: the memory it holds, in copies of the fp32 weights.
    """

    name: str
    opens: str
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    packages: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    install: str = BENCH_EXTRA
    prepares: str | None = None
    kept: str = ""
    code: tuple[str, ...] = ()
    compiles: bool = False
    copies: float = 1.0
    only_on: str | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that are not installed."""
        return tuple(name for name in self.packages if importlib.util.find_spec(name) is None)

    def folder(self, scene: Scene) -> Path | None:
        """Where what it prepares is kept: one folder a model, shape and version of its packages."""
        if self.prepares is None:
            return None
        facts = {
            "model": open_checkpoint(scene.model).fingerprint(),
            "shape": (scene.size, scene.batch, scene.guided),
            "versions": {name: version(name) for name in ("torch", *self.packages)},
            "code": [_code_digest(package) for package in self.code],
        }
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        model = "".join(c if c.isalnum() else "-" for c in Path(scene.model).name)
        return cache_folder() / "bench" / f"{self.kept}-{model}-{scene.size}-{digest}"


def measured_device(device: str | None) -> str:
    """Return "cpu" or "cuda"; None: a GPU if there is one. Raises UsageError for any other."""
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device must be cpu or cuda, not {device!r}")
    return chosen_device(device).type


def version(package: str) -> str:
    """The version of a package, whose GPU variant may carry another name, or "not installed"."""
    for name in (package, f"{package}-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def _code_digest(package: str) -> str:
    digest = hashlib.sha256()
    (folder,) = importlib.import_module(package).__path__
    for file in sorted(Path(folder).glob("*.*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


DIFFUSERS = ("diffusers", "transformers")
# Its package imports next to nothing before one of its classes is asked for.
_DIFFUSERS_CLASSES = ("diffusers:StableDiffusionPipeline", "diffusers:StableDiffusionXLPipeline")
_BASELINES = "fastsd.benchmarks.baselines"
_DRAWING = "fastsd.benchmarks.drawing"
# An engine that this code exported is not one that a later state of it would.
_OWN_CODE = ("fastsd.export", "fastsd.kernels", "fastsd.models")
_INT8_CODE = (*_OWN_CODE, "fastsd.quant")
_ONNX = "pip install 'fastsd[bench]' onnx onnxscript onnxruntime"
_OPENVINO = "pip install 'fastsd[bench]' openvino"

OTHERS = (
    Contender(
        "diffusers/fp32",
        f"{_BASELINES}:open_diffusers",
        packages=DIFFUSERS,
        imports=_DIFFUSERS_CLASSES,
    ),
    Contender(
        "diffusers/bf16",
        f"{_BASELINES}:open_diffusers",
        {"precision": "bf16"},
        precision="bf16",
        packages=DIFFUSERS,
        imports=_DIFFUSERS_CLASSES,
        copies=0.5,
    ),
    Contender(
        "diffusers/fp16",
        f"{_BASELINES}:open_diffusers",
        {"precision": "fp16"},
        precision="fp16",
        packages=DIFFUSERS,
        imports=_DIFFUSERS_CLASSES,
        copies=0.5,
        only_on="cuda",
    ),
    Contender(
        "diffusers-compile/fp32",
        f"{_BASELINES}:open_compiled",
        packages=DIFFUSERS,
        imports=_DIFFUSERS_CLASSES,
        compiles=True,
        copies=2.0,
    ),
    Contender(
        "diffusers-compile/fp16",
        f"{_BASELINES}:open_compiled",
        {"precision": "fp16", "mode": "max-autotune"},
        precision="fp16",
        packages=DIFFUSERS,
        imports=_DIFFUSERS_CLASSES,
        compiles=True,
        only_on="cuda",
    ),
    Contender(
        "diffusers-reduce-overhead/fp16",
        f"{_BASELINES}:open_compiled",
        {"precision": "fp16", "mode": "reduce-overhead"},
        precision="fp16",
        packages=DIFFUSERS,
        imports=_DIFFUSERS_CLASSES,
        compiles=True,
        only_on="cuda",
    ),
    Contender(
        "onnxruntime/fp32",
        f"{_BASELINES}:open_onnxruntime",
        packages=(*DIFFUSERS, "onnx", "onnxscript", "onnxruntime"),
        imports=(*_DIFFUSERS_CLASSES, "onnxruntime"),
        install=_ONNX,
        prepares=f"{_BASELINES}:prepare_onnx",
        kept="onnx",
        copies=2.2,
    ),
    Contender(
        "openvino/fp32",
        f"{_BASELINES}:open_openvino",
        packages=(*DIFFUSERS, "openvino"),
        imports=(*_DIFFUSERS_CLASSES, "openvino"),
        install=_OPENVINO,
        prepares=f"{_BASELINES}:prepare_openvino",
        kept="openvino",
        copies=2.2,
        only_on="cpu",
    ),
    Contender(
        "openvino/int8",
        f"{_BASELINES}:open_openvino",
        {"int8": True},
        precision="int8",
        packages=(*DIFFUSERS, "openvino", "nncf"),
        imports=(*_DIFFUSERS_CLASSES, "openvino"),
        install=f"{_OPENVINO} nncf",
        prepares=f"{_BASELINES}:prepare_openvino",
        kept="openvino-int8",
        copies=1.2,
        only_on="cpu",
    ),
    Contender(
        "inductor/int8",
        f"{_BASELINES}:open_inductor",
        precision="int8",
        packages=(*DIFFUSERS, "torchao"),
        imports=_DIFFUSERS_CLASSES,
        install="pip install 'fastsd[bench]' torchao",
        prepares=f"{_BASELINES}:prepare_inductor",
        kept="inductor-int8",
        copies=1.2,
        only_on="cpu",
    ),
)
# The fp32 pictures that all others are held to, the first that is installed.
REFERENCES = ("diffusers/fp32", "fastsd/eager/fp32")


def own_contenders() -> list[Contender]:
    """One for each way that fastsd has here: its backends by precision, and exports by target.

    A target whose package lacks is one that cannot be exported, and will say what to install.
    """
    engines = [_engine(target, p) for target, home in EXPORTERS.items() for p in _precisions(home)]
    return [
        Contender(
            f"fastsd/{backend}/{precision}",
            f"{_DRAWING}:open_fastsd",
            {"backend": backend, "precision": precision},
            precision=precision,
            compiles=backend == "inductor",
            copies=1.0 if precision == "fp32" else 0.5,
        )
        for backend, home in BACKENDS.items()
        if backend not in ENGINES.values()
        for precision in _precisions(home)
    ] + [
        *engines,
        _cached(_engine("aoti", "int8")),
        _setting("int8-weights", {"weights": "int8"}, precision="fp32", only_on=None),
        *(_setting(name, options) for name, options in GPU_SETTINGS.items()),
        replace(_setting("fp8", {"weights": "fp8"}), precision="fp8"),
    ]


# What a GPU must show of the eager backend in fp16: name -> options beside backend and precision.
GPU_SETTINGS: dict[str, dict[str, Any]] = {
    "graph-none": {"graph": "none"},
    "graph-loop": {"graph": "loop"},
    "cached": {"cache_interval": 2},
    "low-memory": {"low_memory": True},
    "int8-weights": {"weights": "int8"},
    "low-memory-int8": {"low_memory": True, "weights": "int8"},
    "attention-sdpa": {"use": {"attention": "sdpa"}},
    "attention-flash": {"use": {"attention": "flash"}},
    "attention-efficient": {"use": {"attention": "efficient"}},
    "attention-cudnn": {"use": {"attention": "cudnn"}},
    "norm-library": {"use": {"group_norm": "library"}},
    "convolution-library": {"use": {"conv3x3": "library"}},
    "linear-library": {"use": {"linear": "library"}},
    "norm-triton": {"use": {"group_norm": "triton"}},
    "between-library": {
        "use": {
            **{"layer_norm": "library", "geglu": "library", "residual": "library"},
            "linear": "library",  # or it would gate
        }
    },
    "step-library": {"use": {"sampler_step": "library"}},
    "step-triton": {"use": {"sampler_step": "triton"}},
}


def _setting(
    name: str, options: Mapping[str, Any], *, precision: str = "fp16", only_on: str | None = "cuda"
) -> Contender:
    return Contender(
        f"fastsd-{name}/{precision}",
        f"{_DRAWING}:open_fastsd",
        {"backend": "eager", "precision": precision, **options},
        precision=precision,
        copies=0.5 if precision == "fp16" else 1.0,
        only_on=only_on,
    )


def _engine(target: str, precision: str) -> Contender:
    return Contender(
        f"fastsd/{ENGINES[target]}/{precision}",
        f"{_DRAWING}:open_engine",
        {"target": target, "precision": precision},
        precision=precision,
        prepares=f"{_DRAWING}:prepare_engine",
        kept=f"fastsd-{target}-{precision}",
        code=_INT8_CODE if precision in QUANTISED else _OWN_CODE,
        copies=2.2 if precision == "fp32" else 1.2,
        only_on=RUNS_ON.get(target),
    )


def _cached(engine: Contender) -> Contender:
    """The same engine, every second step of which uses again what the deeper layers made."""
    options = {**engine.options, "cache_interval": 2}
    return replace(engine, name=f"fastsd-cached/{engine.precision}", options=options)


def _precisions(home: str) -> Sequence[str]:
    """What a backend or exporter can compute in, as far as it can be imported here."""
    try:
        return tuple(resolve_name(home).precisions)
    except ImportError:
        return ("fp32",)


def contenders(device: str) -> dict[str, Contender]:
    """Every contender that there is for a kind of device ("cpu", "cuda"), by name."""
    listed = [*OTHERS, *own_contenders()]
    return {c.name: c for c in listed if c.only_on in (None, device)}


def choose(
    known: Mapping[str, Contender], patterns: Sequence[str], scene: Scene
) -> list[Contender]:
    """Return the contenders that `patterns` name, in their order: names, globs, or alias=name.

    An alias enters a contender again under another name. The folder of an engine that fastsd
    exported of the scene's model is one, too. Raises UsageError for others, and for what names
    nothing.
    """
    chosen: dict[str, Contender] = {}
    for pattern in patterns:
        alias, _, source = pattern.rpartition("=")
        if Path(source).is_dir():
            name = alias or Path(source).name
            chosen[name] = _exported(name, Path(source), scene)
            continue
        names = fnmatch.filter(known, source)
        if not names or (alias and len(names) > 1):
            raise UsageError(
                f"--contenders {pattern!r} names {'several' if names else 'no contender'}; "
                f"they are {', '.join(known)}"
            )
        for name in names:
            chosen[alias or name] = replace(known[name], name=alias or name)
    return list(chosen.values())


def _exported(name: str, folder: Path, scene: Scene) -> Contender:
    """An engine on disk; its manifest says of what it is, and what it computes in."""
    manifest = read_manifest(folder)
    if manifest.source != source_digest(open_checkpoint(scene.model)):
        raise UsageError(
            f"{folder} was exported from another model, {manifest.model}, than {scene.model}; "
            "give that with --model, or export this one"
        )
    options = {"folder": str(folder.resolve())}
    opens, precision = f"{_DRAWING}:open_engine", manifest.precision
    return Contender(name, opens, options, precision=precision, copies=2.2)


def by_default(
    known: Mapping[str, Contender], scene: Scene
) -> tuple[list[Contender], dict[str, str]]:
    """Return who takes part where nobody is named, and who does not, and why.

    Left out are those that would have to compile or convert first.
    """
    chosen, left_out = [], {}
    for name, contender in known.items():
        unprepared = (
            not contender.missing and (folder := contender.folder(scene)) and not folder.exists()
        )
        if contender.compiles or unprepared:
            left_out[name] = f"would have to compile first, for minutes; {ASK}"
        else:
            chosen.append(contender)
    return chosen, left_out


def reference_among(known: Mapping[str, Contender]) -> Contender:
    """The contender whose fp32 pictures the others are held to."""
    return next(known[name] for name in REFERENCES if not known[name].missing)
