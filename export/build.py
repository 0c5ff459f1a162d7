"""The order of an export: check, write each part, describe, measure, publish.

Knows the contract of an exporter and no target's library.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

import fastsd
from fastsd.artifact import (
    CALIBRATION,
    Artifact,
    Draft,
    Manifest,
    PartEntry,
    engines_folder,
    list_files,
    require_trust_folder,
)
from fastsd.backends import engine_class
from fastsd.backends.heap import give_back_freed_memory
from fastsd.checkpoints import Checkpoint, parameters, save_description
from fastsd.config import ModelConfig
from fastsd.errors import ArtifactError, MissingDependency, StaleArtifact, UsageError
from fastsd.export import EXPORTERS, verify
from fastsd.export.parts import Request, part_names, source_digest
from fastsd.files import read_json, write_json
from fastsd.quant.calibrate import INT8
from fastsd.quant.spec import QuantSpec
from fastsd.tokenizers import CLIPTokenizer

LARGE = 2**28  # a model's weights, beyond which a second one beside it is felt


class Exporter(ABC):
    """Writes the parts of one checkpoint for one target. Final subclasses live in to_X.py.

    precisions, layouts: what the target has. native: whether its files hold machine code.
    packages: whose versions are worth knowing.
    """

    target: str
    precisions: tuple[str, ...]
    layouts: tuple[str, ...] = ("standard", "fast")
    native: bool = False
    refits: bool = False  # whether its engines can take other weights later
    packages: tuple[str, ...] = ("torch",)
    spec: QuantSpec | None = None  # what is rounded, and how; set before the first part is written

    def __init__(self, checkpoint: Checkpoint, request: Request) -> None:
        """Refuse, before any work, what the target cannot do or lacks a package for."""
        for what, given, known in (
            ("precision", request.precision, self.precisions),
            ("layout", request.layout, self.layouts),
        ):
            if given not in known:
                raise UsageError(
                    f"{self.target} has no {what} {given!r}; it has {', '.join(known)}"
                )
        if request.refit and not self.refits:
            raise UsageError(f"{self.target} engines take no other weights later; drop --refit")
        self.checkpoint = checkpoint
        self.request = request
        self.form = INT8 if request.precision == "int8" else None  # what layers are rounded to

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts to write, in order."""
        return part_names(self.checkpoint, self.request)

    def begin(self, folder: Path) -> None:  # noqa: B027  (most targets need nothing)
        """Do below `folder` what may fail for want of tools, before a calibration takes long."""

    @abstractmethod
    def write(self, part: str, folder: Path) -> PartEntry:
        """Write one part below `folder` and say what it takes and gives."""

    def described(self) -> ModelConfig:
        """Return the model as the artifact's JSON describes it: not as it is only if tools differ.

        Graphs are always the model's own.
        """
        return self.checkpoint.config

    def write_extras(self, folder: Path) -> None:  # noqa: B027  (most targets have none)
        """Write what other tools look for beside the parts."""

    def machine(self) -> dict[str, str]:
        """What native code is bound to: the same words as its backend's `machine`."""
        return {}

    def choices(self) -> dict[str, str]:
        """What was chosen for this machine, and why, by what it is about."""
        return {}

    def versions(self) -> dict[str, str]:
        """The versions that made the files."""
        return {
            "fastsd": fastsd.__version__,
            **{package: metadata.version(package) for package in self.packages},
        }


def export(
    checkpoint: Checkpoint,
    name: str,
    request: Request,
    path: Path | None = None,
    *,
    force: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Artifact:
    """Write an artifact to `path` (None: among the user's own engines), whole or not at all.

    name: what the model is called. force: replace an artifact that stands there.
    tell: called with a line about each thing done.
    Raises UsageError for what cannot be asked, MissingDependency, ArtifactError.
    """
    exporter = open_exporter(checkpoint, request)
    prompts = verify.receipt_prompts(checkpoint, request)
    if request.floor is not None and not prompts:
        raise UsageError("--floor needs pictures to measure; give prompts with --prompts FILE")
    if exporter.native:
        require_trust_folder()
    source = source_digest(checkpoint)
    key = _key(source, request, exporter)
    path = _own_path(name, request, key) if path is None else path
    with (
        _explained(path),
        Draft(path, key=key, force=force) as draft,
        torch.no_grad(),
    ):
        choices = exporter.choices()
        for what, choice in choices.items():
            tell(f"{what}: {choice}")
        exporter.begin(draft.folder)
        _require_backend(request)
        exporter.spec = _spec(draft.folder, exporter, tell)
        large = parameters(checkpoint) > LARGE
        parts: dict[str, PartEntry] = {}
        for part in exporter.parts:
            entry = draft.finished(part)
            if entry is not None:
                tell(f"{part}: finished by an interrupted export, kept")
            else:
                if large:
                    _let_go()
                start = time.perf_counter()
                entry = exporter.write(part, draft.folder)
                draft.finish(part, entry)
                size = sum(
                    (draft.folder / file).stat().st_size for file in (entry.file, *entry.weights)
                )
                tell(f"{part}: {size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s")
            parts[part] = entry
        _describe(draft.folder, exporter.described(), checkpoint.tokenizers)
        exporter.write_extras(draft.folder)
        manifest = Manifest(
            target=request.target,
            model=" + ".join([name, *(f"{lora.title}:{w:g}" for lora, w in checkpoint.merged)]),
            family=checkpoint.config.family,
            source=source,
            precision=request.precision,
            layout=request.layout,
            size=request.size,
            batch=request.batch,
            dynamic=request.dynamic,
            native=exporter.native,
            parts=parts,
            files=list_files(draft.folder),
            versions=exporter.versions(),
            machine=exporter.machine(),
            choices=choices,
        )
        receipt = _measure(Artifact(draft.folder, manifest, ""), checkpoint, request, prompts, tell)
        return draft.publish(replace(manifest, receipt=receipt))


def _let_go() -> None:
    """Free the last model: pipelines and traced graphs are cyclic, and a large one fits once."""
    gc.collect()
    give_back_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def own_engine(checkpoint: Checkpoint, name: str, request: Request) -> Path:
    """Return where `export` puts this request among the user's own engines, there or not."""
    exporter = open_exporter(checkpoint, request)
    return _own_path(name, request, _key(source_digest(checkpoint), request, exporter))


def _own_path(name: str, request: Request, key: str) -> Path:
    plain = re.sub(r"[^\w.]+", "-", name).lstrip(".") or "model"  # a hub id has a slash
    return engines_folder() / f"{plain}-{request.target}-{key[:12]}"


def _describe(folder: Path, config: ModelConfig, tokenizers: Sequence[CLIPTokenizer]) -> None:
    """Write the checkpoint's JSON, the VAE's where other tools look for it."""
    save_description(folder, config, tokenizers)
    for part in ("vae_decoder", "vae_encoder"):
        shutil.copy(folder / "vae" / "config.json", folder / part / "config.json")


def _require_backend(request: Request) -> None:
    """Raise ArtifactError where a floor is asked and nothing here can draw with the engine."""
    if request.floor is None:
        return
    try:
        engine_class(request.target)
    except MissingDependency as error:
        raise ArtifactError(f"the floor cannot be checked on this machine: {error}") from None


def _measure(
    artifact: Artifact,
    checkpoint: Checkpoint,
    request: Request,
    prompts: tuple[str, ...],
    tell: Callable[[str], None],
) -> dict[str, Any] | None:
    """Return the receipt, held to the floor; None where this machine cannot run the engine."""
    try:
        receipt = verify.measure(artifact, checkpoint, request, prompts, tell)
    except (MissingDependency, StaleArtifact) as error:
        if request.floor is not None:
            raise ArtifactError(f"the floor cannot be checked on this machine: {error}") from None
        tell(f"not measured: {error}")
        return None
    if request.floor is not None:
        verify.check_floor(receipt, request.floor)
    return receipt


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a full or failing disk into ArtifactError; the draft is gone by then."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{path} could not be written: {error.strerror or error}; nothing was left there: free "
            "some space, or choose another folder"
        ) from error


def _spec(folder: Path, exporter: Exporter, tell: Callable[[str], None]) -> QuantSpec | None:
    """Return what runs quantised, from an interrupted export or by calibrating; None for floats.

    It stays in the artifact, with what every layer costs.
    """
    if exporter.form is None:
        return None
    file = folder / CALIBRATION
    if not file.exists():
        from fastsd.export.calibration import (
            calibrate_checkpoint,
            default_prompts,
            exact_device,
        )

        request = exporter.request
        calibration = calibrate_checkpoint(
            exporter.checkpoint,
            request.prompts or default_prompts(exporter.checkpoint),
            size=request.size,
            form=exporter.form,
            device=exact_device(exporter.checkpoint, request.target),
            floor=request.floor,
            tell=tell,
        )
        write_json(file, calibration.to_json())
    return QuantSpec.from_json(read_json(file)["spec"])


def open_exporter(checkpoint: Checkpoint, request: Request) -> Exporter:
    """Return the exporter of a request. Raises UsageError, MissingDependency."""
    if request.target not in EXPORTERS:
        raise UsageError(
            f"target {request.target!r} is unknown; it is one of {', '.join(EXPORTERS)}"
        )
    exporter: Exporter = resolve_name(EXPORTERS[request.target])(checkpoint, request)
    return exporter


def _key(source: str, request: Request, exporter: Exporter) -> str:
    """Name an export by all that decides its bytes."""
    facts: dict[str, Any] = {
        "source": source,
        "request": asdict(request),
        "versions": exporter.versions(),
        "machine": exporter.machine(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
