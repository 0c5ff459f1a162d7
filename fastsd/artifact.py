"""An exported engine on disk: what it says of itself, how it is checked, how it is published.

An artifact is a folder with a `manifest.json`, the graphs or engines of a model's parts, and the
JSON of a checkpoint (configs, tokenizers, scheduler), so that it needs nothing else to draw. It
holds no local path and no pickle. Every file's SHA-256 stands in the manifest, whose own digest
stands in its last line; `Artifact.open` checks them all.

Graphs and weights are data. A native engine (TensorRT, AOTInductor) is code for this machine: it
loads only if this user's own exports recorded it (`remember`), or with trust_native.

Knows no target, vendor or model: exporters write artifacts, backends read them.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self, final

import platformdirs
from filelock import FileLock, Timeout

from fastsd.errors import (
    ArtifactError,
    CheckpointError,
    DamagedArtifact,
    StaleArtifact,
    UntrustedArtifact,
    UsageError,
)
from fastsd.files import check_free, read_json, sync, write_json

MANIFEST = "manifest.json"
CALIBRATION = "quantisation.json"  # what is rounded, and what that costs
FORMAT = 2  # raised when a manifest holds other fields, or means something else by them
_BLOCK = 1 << 22  # bytes hashed at once

AGAIN = "export it again with `fastsd export`"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. dtype: numpy's name. shape: a word stands for a size that may vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class PartEntry:
    """One part: its graph or engine, and what goes in and out, in order.

    file: relative to the artifact. weights: files that hold tensors the graph refers to.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileEntry:
    """What a file must be."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that an artifact says of itself.

    target: what it was exported to (onnx, openvino, tensorrt, aoti, aoti-cuda), which decides the
    backend.
    model, source: the checkpoint's name, and the digest of its weights and configs.
    size: height, width in pixels; batch: pictures. dynamic: both are only what it was traced with.
    native: holds machine code. machine: what that code is bound to (versions, processor), else {}.
    choices: what the exporter chose for the machine it ran on, in words.
    receipt: the measured distance from the exact path; None where it was not measured.
    """

    target: str
    model: str
    family: str
    source: str
    precision: str
    layout: str
    size: tuple[int, int]
    batch: int
    dynamic: bool
    native: bool
    parts: Mapping[str, PartEntry]
    files: Mapping[str, FileEntry]
    versions: Mapping[str, str]
    machine: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    receipt: Mapping[str, Any] | None = None

    def to_bytes(self) -> bytes:
        """Write it down, the digest of everything else last. The only form that is read back."""
        data = {"format": FORMAT, **asdict(self)}
        digest = hashlib.sha256(_json(data)).hexdigest()
        return _json({**data, "digest": digest})

    @classmethod
    def from_bytes(cls, raw: bytes, data: Mapping[str, Any], path: Path) -> Manifest:
        """Read `raw`, whose JSON is `data`. Raises DamagedArtifact, or StaleArtifact if too new."""
        if data.get("format") != FORMAT:
            raise StaleArtifact(
                f"{path} has format {data.get('format')!r}, this fastsd reads {FORMAT}; {AGAIN}"
            )
        values = {name: value for name, value in data.items() if name not in ("format", "digest")}
        try:
            values["size"] = tuple(values["size"])
            values["parts"] = {name: _part(entry) for name, entry in values["parts"].items()}
            values["files"] = {name: FileEntry(**entry) for name, entry in values["files"].items()}
            manifest = cls(**values)
            intact = manifest.to_bytes() == raw
        except (AttributeError, KeyError, TypeError, ValueError):
            intact = False
        if not intact:
            raise DamagedArtifact(f"{path} was changed or cut after it was written; {AGAIN}")
        if wrong := _misfit(manifest):
            raise DamagedArtifact(
                f"{path} holds a {wrong} of the wrong kind, {values[wrong]!r}: fastsd did not "
                f"write it; {AGAIN}"
            )
        for name in manifest.files:
            inside = PurePosixPath(name)
            if inside.is_absolute() or ".." in inside.parts or "\\" in name or ":" in name:
                raise DamagedArtifact(f"{path} names {name!r}, which lies outside its folder")
        for name in manifest.parts:
            if not name.isidentifier():
                raise DamagedArtifact(f"{path} names a part {name!r}, which is no name")
        named = {file for part in manifest.parts.values() for file in (part.file, *part.weights)}
        if lacking := named - set(manifest.files):
            raise DamagedArtifact(f"{path} lists no digest of {', '.join(sorted(lacking))}")
        return manifest


def _misfit(manifest: Manifest) -> str | None:
    """Name a field that holds what no exporter writes; None if all are well."""
    tensors = [t for part in manifest.parts.values() for t in (*part.inputs, *part.outputs)]
    words = [word for t in tensors for word in (t.name, t.dtype)]
    words += [file for part in manifest.parts.values() for file in (part.file, *part.weights)]
    kinds = {
        **dict.fromkeys(("target", "model", "family", "source", "precision", "layout"), str),
        **dict.fromkeys(("dynamic", "native"), bool),
        **dict.fromkeys(("versions", "machine", "choices"), dict),
        "receipt": dict | None,
    }
    fits = {
        **{name: isinstance(getattr(manifest, name), kind) for name, kind in kinds.items()},
        "size": len(manifest.size) == 2 and all(type(n) is int and n > 0 for n in manifest.size),
        "batch": type(manifest.batch) is int and manifest.batch > 0,
        "parts": all(isinstance(word, str) for word in words)
        and all(type(n) in (int, str) for t in tensors for n in t.shape),
        "files": all(
            isinstance(file.sha256, str) and type(file.size_bytes) is int
            for file in manifest.files.values()
        ),
    }
    return next((name for name, good in fits.items() if not good), None)


def _part(entry: Mapping[str, Any]) -> PartEntry:
    def tensors(specs: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in specs)

    return PartEntry(
        entry["file"], tensors(entry["inputs"]), tensors(entry["outputs"]), tuple(entry["weights"])
    )


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


@final
@dataclass(frozen=True)
class Artifact:
    """An artifact whose files were checked. path: its folder; digest: its manifest's SHA-256."""

    path: Path
    manifest: Manifest
    digest: str

    @classmethod
    def open(cls, path: str | Path, *, trust_native: bool = False) -> Artifact:
        """Read the manifest and check every file against it.

        Raises DamagedArtifact, StaleArtifact for another format, UntrustedArtifact for native code
        that neither this user's exports recorded nor trust_native vouches for.
        """
        folder = Path(path).absolute()  # parts are opened later, too
        manifest = read_manifest(folder)
        digest = digest_of(folder / MANIFEST)
        if manifest.native and not trust_native and not _remembered(digest).is_file():
            raise UntrustedArtifact(
                f"{folder} holds native code ({manifest.target}) that was not exported by you on "
                "this machine, and running it can do anything that you can; if you trust where it "
                "comes from, pass --trust-native (trust_native=True), else " + AGAIN
            )
        check_files(folder, manifest.files)
        return cls(folder, manifest, digest)

    def check_machine(self, here: Mapping[str, str]) -> None:
        """Raise StaleArtifact unless the machine and versions are those it was compiled for."""
        differences = [
            f"{name} {value} (here: {here.get(name, 'none')})"
            for name, value in self.manifest.machine.items()
            if here.get(name) != value
        ]
        if differences:
            raise StaleArtifact(
                f"{self.path} was compiled for {', '.join(differences)}; {AGAIN} on this machine"
            )

    def check_part(self, part: str) -> None:
        """Raise DamagedArtifact unless a part's files are still what they were when it was opened.

        For code that is loaded later.
        """
        entry = self.manifest.parts[part]
        names = (entry.file, *entry.weights)
        check_files(self.path, {name: self.manifest.files[name] for name in names})

    def check_folder(self, name: str) -> None:
        """Raise DamagedArtifact if a folder of it, by name, holds what the manifest does not list.

        For folders that are loaded whole.
        """
        for folder, inside, files in os.walk(self.path / name):
            here = Path(folder)
            linked = [path for path in inside if (here / path).is_symlink()]
            listed = self.manifest.files
            for path in (*linked, *files):
                if (here / path).relative_to(self.path).as_posix() not in listed:
                    raise DamagedArtifact(
                        f"{here / path} was not there when the engine was exported; remove it, or "
                        + AGAIN
                    )


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest, checked by itself; no other file. Raises DamagedArtifact, StaleArtifact."""
    file = folder / MANIFEST
    data = read_json(file, DamagedArtifact)
    return Manifest.from_bytes(file.read_bytes(), data, file)


def is_artifact(path: str | Path) -> bool:
    """Whether a folder is, or was meant to be, an artifact."""
    try:
        return (Path(path) / MANIFEST).is_file()
    except (OSError, ValueError):  # no path at all
        return False


def check_files(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Raise DamagedArtifact unless every file in `folder` is as listed."""
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise DamagedArtifact(f"{folder} lacks {name}; {AGAIN}") from None
        if size != entry.size_bytes:
            raise DamagedArtifact(
                f"{folder / name} has {size} bytes, not {entry.size_bytes}; {AGAIN}"
            )
    names = sorted(files, key=lambda name: -files[name].size_bytes)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing lets go of the GIL
        for name, digest in zip(
            names, pool.map(lambda name: digest_of(folder / name), names), strict=True
        ):
            if digest != files[name].sha256:
                raise DamagedArtifact(
                    f"{folder / name} was changed after the export (its SHA-256 differs); {AGAIN}"
                )


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Hash every file below `folder` but the manifest and what is hidden, by name."""
    return {name: FileEntry(digest_of(path), path.stat().st_size) for name, path in _walk(folder)}


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and name != Path(MANIFEST) and not hidden:
            yield name.as_posix(), path


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes. Raises DamagedArtifact if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise DamagedArtifact(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


# --- writing one --------------------------------------------------------------------------------


@final
class Draft:
    """An artifact being written, in a hidden folder beside the place where it will stand.

        with Draft(path, key="…") as draft:
            entry = draft.finished("unet") or write(draft.folder)
            draft.finish("unet", entry)
            draft.publish(manifest)

    key: says what is being written. If the process is killed, or interrupted by the user, parts
    that were finished stay, and so does the calibration; the next draft of the same path and key
    goes on from them, one of another key sweeps them away. Any other failure leaves nothing behind.
    """

    def __init__(self, path: Path, *, key: str, force: bool = False) -> None:
        path = path.absolute()  # compilers have working folders of their own
        if not path.name:
            raise UsageError(f"{path} cannot be an engine; give a folder in it")
        self.path = path
        self.force = force
        self.folder = path.with_name(f".{path.name}.{key[:16]}.draft")
        self._aside = path.with_name(f".{path.name}.old")
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))

    def __enter__(self) -> Self:
        """Raise UsageError if the path is taken and force is not set, or another export runs."""
        self._check_path()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise UsageError(f"another export to {self.path} is running; wait for it") from None
        try:
            self._sweep()
            self._check_path()
            self.folder.mkdir(exist_ok=True)
            (self.folder / ".parts").mkdir(exist_ok=True)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        found = (f for kept in (".parts/*.json", CALIBRATION) for f in self.folder.glob(kept))
        if self.folder.exists() and not (interrupted and any(found)):
            shutil.rmtree(self.folder)
        self._release()

    def finished(self, name: str) -> PartEntry | None:
        """Return a part that an interrupted export finished, if its files are still intact."""
        record = self.folder / ".parts" / f"{name}.json"
        try:
            data = read_json(record)
            check_files(self.folder, {f: FileEntry(**e) for f, e in data["files"].items()})
            return _part(data["part"])
        except (ArtifactError, CheckpointError, KeyError, TypeError):
            return None

    def finish(self, name: str, entry: PartEntry) -> None:
        """Record that a part's files are written, once they are on the disk."""
        sync(self.folder)
        files = {
            file: FileEntry(digest_of(self.folder / file), (self.folder / file).stat().st_size)
            for file in (entry.file, *entry.weights)
        }
        record = self.folder / ".parts" / f"{name}.json"
        write_json(
            record,
            {"part": asdict(entry), "files": {file: asdict(e) for file, e in files.items()}},
        )

    def publish(self, manifest: Manifest) -> Artifact:
        """Write the manifest and put the folder in its place, whole; record native code as ours."""
        for scratch in sorted(self.folder.rglob(".*"), reverse=True):  # what is inside comes first
            if scratch.is_dir():
                shutil.rmtree(scratch)
            else:
                scratch.unlink()
        raw = manifest.to_bytes()
        (self.folder / MANIFEST).write_bytes(raw)
        sync(self.folder)
        digest = hashlib.sha256(raw).hexdigest()
        if manifest.native:
            remember(digest)
        self._check_path()
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()
        elif self.path.exists():
            self.path.rename(self._aside)  # if we are killed here, the next export puts it back
        self.folder.rename(self.path)
        with suppress(OSError):  # it is published; the next export removes what stays
            self._forget_aside()
        return Artifact(self.path, manifest, digest)

    def _check_path(self) -> None:
        if self.path.is_symlink():
            raise UsageError(
                f"{self.path} is a link, to {os.readlink(self.path)}; give a folder's own name"
            )
        if not self.force:
            check_free(self.path, "choose another folder, or replace it with --force")
        elif self.path.exists() and not is_artifact(self.path):
            check_free(self.path, "--force replaces artifacts only, and this is none; move it away")

    def _sweep(self) -> None:
        """Remove what exports to this path left when they were killed; put back what one took."""
        if self._aside.exists() and not self.path.exists():
            self._aside.rename(self.path)
        self._forget_aside()
        for folder in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.draft"):
            between = folder.name[len(self.path.name) + 2 : -len(".draft")]
            if folder != self.folder and "." not in between:  # else the draft of a longer name
                _remove(folder)

    def _forget_aside(self) -> None:
        """Remove what was replaced, under another name: half removed, it must not be put back."""
        if self._aside.exists():
            doomed = self.path.with_name(f".{self.path.name}.replaced.draft")
            _remove(doomed)
            self._aside.rename(doomed)
            _remove(doomed)

    def _release(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


# --- what this user keeps ------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of this user's own engines: $FASTSD_CACHE, or the system's cache folder."""
    chosen = os.environ.get("FASTSD_CACHE")
    return Path(chosen).absolute() if chosen else Path(platformdirs.user_cache_path("fastsd"))


def engines_folder() -> Path:
    """Return where exports without a folder of their own are kept."""
    return cache_folder() / "engines"


def _trusted() -> Path:
    return cache_folder() / "trusted"


def _remembered(digest: str) -> Path:
    return _trusted() / digest


def remember(digest: str) -> None:
    """Record that this user built the artifact whose manifest has this digest."""
    with _trust_folder() as folder:
        (folder / digest).touch(mode=0o600)


def require_trust_folder() -> None:
    """Raise ArtifactError unless `remember` can record what a native export makes."""
    with _trust_folder() as folder, tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def _trust_folder() -> Iterator[Path]:
    folder = _trusted()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        yield folder
    except OSError as error:
        raise ArtifactError(
            f"{folder} cannot be written ({error.strerror}), so that nobody would trust the native "
            "engine; set FASTSD_CACHE to a folder of your own"
        ) from None


def kept_engines() -> list[Path]:
    """Return the folders of this user's own engines, by name."""
    folder = engines_folder()
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if is_artifact(path) and not path.name.startswith("."))


def remove_engine(path: Path) -> None:
    """Remove one of this user's own engines, and the record that trusts its native code."""
    manifest = path / MANIFEST
    if path.parent != engines_folder() or not manifest.is_file():
        raise UsageError(f"{path} is none of your own engines; see `fastsd cache ls`")
    record = _remembered(digest_of(manifest))
    doomed = path.with_name(f".{path.name}.removed.draft")  # what a kill leaves is no engine
    _remove(doomed)
    path.rename(doomed)
    record.unlink(missing_ok=True)
    _remove(doomed)


# What a draft, or an engine that one took aside, is called until it stands in its place.
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.(old|[^.]+\.draft)")


def unfinished_engines() -> list[Path]:
    """Return what killed exports left among this user's engines, and what exports are writing."""
    folder = engines_folder()
    found = folder.glob(".*") if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and _UNFINISHED.fullmatch(path.name))


def sweep_engines() -> list[Path]:
    """Remove what killed exports left among this user's engines, and return it.

    An engine that one had taken aside comes back. Drafts being written stay.
    """
    swept = []
    for path in unfinished_engines():
        matched = _UNFINISHED.fullmatch(path.name)
        assert matched is not None
        place = path.with_name(matched["name"])
        lock = FileLock(path.with_name(f".{place.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        try:
            if matched[2] == "old" and not place.exists():
                path.rename(place)
            else:
                _remove(path)
                swept.append(path)
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
    return swept
