"""Artifacts: every damage is seen, none is ever half there, native code is not run unasked."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd import artifact
from fastsd.artifact import (
    MANIFEST,
    Artifact,
    Draft,
    FileEntry,
    Manifest,
    PartEntry,
    TensorSpec,
    kept_engines,
    list_files,
    remove_engine,
    require_trust_folder,
    sweep_engines,
    unfinished_engines,
)
from fastsd.backends import open_artifact
from fastsd.config import ModelConfig
from fastsd.errors import (
    ArtifactError,
    DamagedArtifact,
    StaleArtifact,
    UntrustedArtifact,
    UsageError,
)

PART = PartEntry(
    "unet/model.onnx",
    (TensorSpec("sample", "float32", ("rows", 4, 8, 8)), TensorSpec("timestep", "float32", ())),
    (TensorSpec("out_sample", "float32", ("rows", 4, 8, 8)),),
    ("unet/model.onnx.data",),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_part(folder: Path, data: bytes = b"weights" * 50) -> PartEntry:
    (folder / "unet").mkdir(exist_ok=True)
    (folder / PART.file).write_bytes(b"graph" * 20)
    (folder / PART.weights[0]).write_bytes(data)
    return PART


def describe(folder: Path, **changes: object) -> Manifest:
    manifest = Manifest(
        target="onnx",
        model="tiny",
        family="sd1",
        source="0" * 64,
        precision="fp32",
        layout="standard",
        size=(64, 64),
        batch=1,
        dynamic=True,
        native=False,
        parts={"unet": PART},
        files=list_files(folder),
        versions={"fastsd": "0", "torch": "1.0+cpu"},
        receipt={"psnr_median_db": 41.25, "worst": "un château"},
    )
    return replace(manifest, **changes)  # type: ignore[arg-type]


def publish(path: Path, *, force: bool = False, **changes: object) -> Artifact:
    with Draft(path, key="a" * 64, force=force) as draft:
        draft.finish("unet", write_part(draft.folder))
        return draft.publish(describe(draft.folder, **changes))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = publish(tmp_path / "deep/er/engine")
    read = Artifact.open(tmp_path / "deep/er/engine")
    assert read == written
    assert read.manifest.parts["unet"] == PART
    assert read.manifest.size == (64, 64)
    assert [path.name for path in (tmp_path / "deep/er").iterdir()] == ["engine"]


def damaged(path: Path) -> bool:
    try:
        Artifact.open(path)
    except (DamagedArtifact, StaleArtifact):  # a changed format number says another format
        return True
    return False


def test_every_bit_flip_and_truncation_is_seen(tmp_path: Path) -> None:
    """200 of each, over all files, the manifest included; then every byte of the manifest."""
    source = publish(tmp_path / "engine").path
    draw = random.Random(0)
    files = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    assert len(files) == 3
    for round_ in range(400):
        file = source / draw.choice(files)
        good = file.read_bytes()
        if round_ % 2:
            bad = good[: draw.randrange(len(good))]
        else:
            at = draw.randrange(len(good))
            bad = good[:at] + bytes([good[at] ^ 1 << draw.randrange(8)]) + good[at + 1 :]
        file.write_bytes(bad)
        assert damaged(source), (file.name, round_)
        file.write_bytes(good)
    manifest = source / MANIFEST
    good = manifest.read_bytes()
    for at in range(len(good)):
        manifest.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        assert damaged(source), good[max(0, at - 20) : at + 20]
    manifest.write_bytes(good)
    assert not damaged(source)


def test_missing_files_are_named(tmp_path: Path) -> None:
    source = publish(tmp_path / "engine").path
    (source / PART.weights[0]).unlink()
    with pytest.raises(DamagedArtifact, match="lacks unet/model.onnx.data"):
        Artifact.open(source)
    (source / MANIFEST).unlink()
    with pytest.raises(DamagedArtifact, match="manifest.json is missing"):
        Artifact.open(source)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("size", size) for size in (("a", 1), (64,), (64, -64), (64, 64.0))],
        *[("batch", batch) for batch in (0, True, "1")],
        ("precision", 16),
        ("native", "no"),
        ("versions", ["torch"]),
        ("receipt", [1]),
        ("parts", {"unet": replace(PART, file=7)}),  # type: ignore[arg-type]
        ("parts", {"unet": replace(PART, inputs=(TensorSpec("x", "float32", (1.5,)),))}),  # type: ignore[arg-type]
        ("files", {"a": FileEntry("0", 1.5)}),  # type: ignore[arg-type]
    ],
)
def test_a_value_of_the_wrong_kind_is_named(tmp_path: Path, name: str, value: Any) -> None:
    source = publish(tmp_path / "engine", **{name: value}).path
    with pytest.raises(DamagedArtifact, match=f"holds a {name} of the wrong kind"):
        Artifact.open(source)


TEXT = replace(
    PART,
    inputs=(TensorSpec("input_ids", "int64", (1, 77)),),
    outputs=(TensorSpec("last_hidden_state", "float32", (1, 77, 768)),),
)


def part_of(inputs: tuple[str, ...], outputs: tuple[str, ...]) -> PartEntry:
    takes, makes = (tuple(TensorSpec(n, "float32", (1,)) for n in ns) for ns in (inputs, outputs))
    return replace(PART, inputs=takes, outputs=makes)


FAST = {
    "text_encoder": TEXT,
    "unet": part_of(("sample", "row", "k.0", "v.0"), ("out_sample",)),
    "unet_time": part_of(("timesteps",), ("rows",)),
    "unet_context": part_of(("encoder_hidden_states",), ("kv",)),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(parts={"text_encoder": TEXT}), "a part unet"),
        (dict(parts={"unet": PART}), "a part text_encoder"),
        (dict(parts={"unet": replace(PART, inputs=TEXT.inputs)}), "out_sample of sample"),
        (dict(parts={"unet": replace(PART, outputs=())}), "out_sample of sample"),
        (dict(parts={"spare": replace(PART, outputs=(TensorSpec("x", "zz", ()),))}), "dtype 'zz'"),
        (dict(layout="fast"), "out_sample of sample and row"),
        (dict(layout="fast", parts=FAST), "makes kv of a text, which its unet does not read"),
        (dict(layout="zz"), "layout 'zz'"),
        (dict(precision="zz"), "precision 'zz'"),
        (dict(), "cannot load text_encoder of .*; export it again"),
    ],
)
def test_an_engine_that_does_not_hold_together_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Its digests fit. The last one's graphs are no ONNX."""
    pytest.importorskip("onnxruntime", reason="the extra `ort` is not installed")
    whole = {"text_encoder": TEXT, "unet": PART}
    if len(parts := changes.get("parts", {})) == 1 and "a part" not in message:
        changes = {"parts": whole | parts}
    artifact = publish(tmp_path / "engine", **{"parts": whole, **changes})
    with pytest.raises(ArtifactError, match=message):
        open_artifact(Artifact.open(artifact.path), ModelConfig(), device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "unet/../../x", "C:x", "a\\b"])
def test_no_file_outside_the_folder_is_read(name: str, tmp_path: Path) -> None:
    source = publish(tmp_path / "engine").path
    (entry,) = {list_files(source)[PART.file]}
    hostile = describe(source, files={**list_files(source), name: entry})
    (source / MANIFEST).write_bytes(hostile.to_bytes())
    with pytest.raises(DamagedArtifact, match="outside its folder"):
        Artifact.open(source)


def test_a_part_whose_file_has_no_digest_is_refused(tmp_path: Path) -> None:
    source = publish(tmp_path / "engine").path
    files = list_files(source)
    del files[PART.file]
    (source / MANIFEST).write_bytes(describe(source, files=files).to_bytes())
    with pytest.raises(DamagedArtifact, match=r"no digest of unet/model\.onnx"):
        Artifact.open(source)


def test_another_format_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish(tmp_path / "engine").path
    monkeypatch.setattr(artifact, "FORMAT", artifact.FORMAT + 1)
    with pytest.raises(StaleArtifact, match=r"has format \d, this fastsd reads \d; export it"):
        Artifact.open(source)


def test_a_manifest_cannot_hide_native_code(tmp_path: Path, own_cache: Path) -> None:
    """A stranger's says that it holds none, so that nobody asks for trust."""
    stranger = publish(tmp_path / "engine", target="aoti", native=False)
    with pytest.raises(UntrustedArtifact, match="not written by fastsd"):
        open_artifact(stranger, ModelConfig(), device=torch.device("cpu"))


def test_folders_that_are_loaded_whole_hold_what_is_listed(tmp_path: Path) -> None:
    engine = publish(tmp_path / "engine")
    engine.check_folder("unet")
    engine.check_folder("nothing")
    more = engine.path / "unet" / "more.so"
    more.write_bytes(b"code")
    with pytest.raises(DamagedArtifact, match=r"more\.so was not there"):
        engine.check_folder("unet")
    more.unlink()
    (tmp_path / "elsewhere").mkdir()
    more.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(DamagedArtifact, match=r"more\.so was not there"):
        engine.check_folder("unet")


def test_parts_have_plain_names(tmp_path: Path) -> None:
    source = publish(tmp_path / "engine").path
    (source / MANIFEST).write_bytes(describe(source, parts={"../unet": PART}).to_bytes())
    with pytest.raises(DamagedArtifact, match="is no name"):
        Artifact.open(source)


def test_a_draft_of_a_longer_name_is_not_ours(tmp_path: Path) -> None:
    with Draft(tmp_path / "sd2.1", key="b" * 64) as other, Draft(tmp_path / "sd2", key="a" * 64):
        assert other.folder.is_dir()


def test_native_code_needs_trust_or_our_own_export(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "engine"
    digest = publish(path, native=True).digest
    assert Artifact.open(path).digest == digest, "what this user exported is trusted"
    shutil.copytree(path, tmp_path / "moved")
    assert Artifact.open(tmp_path / "moved").digest == digest, "wherever it lies"
    shutil.rmtree(own_cache)
    with pytest.raises(UntrustedArtifact, match="--trust-native"):
        Artifact.open(path)
    assert Artifact.open(path, trust_native=True).manifest.native
    (path / PART.file).write_bytes(b"other")
    with pytest.raises(DamagedArtifact):
        Artifact.open(path, trust_native=True)


def test_another_machine_is_stale(tmp_path: Path) -> None:
    opened = publish(tmp_path / "engine", machine={"gpu": "H200", "tensorrt": "11.4"})
    opened.check_machine({"gpu": "H200", "tensorrt": "11.4", "driver": "1"})
    with pytest.raises(StaleArtifact, match=r"compiled for tensorrt 11\.4 \(here: 11\.5\)"):
        opened.check_machine({"gpu": "H200", "tensorrt": "11.5"})
    with pytest.raises(StaleArtifact, match=r"gpu H200 \(here: none\)"):
        opened.check_machine({"tensorrt": "11.4"})


# --- publication ---------------------------------------------------------------------------------


def test_a_draft_is_where_it_is_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilers run in folders of their own."""
    monkeypatch.chdir(tmp_path)
    with Draft(Path("engine"), key="a" * 64) as draft:
        assert draft.folder.is_absolute() and draft.folder.parent == tmp_path
    with pytest.raises(UsageError, match="give a folder in it"):
        Draft(Path("/"), key="a" * 64)


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    first = publish(tmp_path / "v1").path
    (tmp_path / "current").symlink_to("v1")
    with pytest.raises(UsageError, match="current is a link, to v1; give a folder's own name"):
        publish(tmp_path / "current", force=True)
    assert (tmp_path / "current").is_symlink() and not damaged(first)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["current", "v1"]


def test_trust_that_cannot_be_kept_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ArtifactError, match=r"trusted cannot be written .* set FASTSD_CACHE"):
        require_trust_folder()


def test_a_part_that_is_opened_late_is_checked_again(tmp_path: Path) -> None:
    engine = publish(tmp_path / "engine")
    engine.check_part("unet")
    (engine.path / PART.weights[0]).write_bytes(b"other")
    with pytest.raises(DamagedArtifact):
        engine.check_part("unet")


def test_what_is_unfinished_among_ones_own_engines(own_cache: Path) -> None:
    """Listing leaves all alone; sweeping puts back what was taken aside and spares the rest."""
    folder = own_cache / "engines"
    kept = publish(folder / "kept").path
    taken = publish(folder / "taken").path
    taken.rename(folder / ".taken.old")
    (folder / ".new.0123456789abcdef.draft").mkdir()
    with Draft(folder / "written", key="a" * 64) as draft:
        left = [".new.0123456789abcdef.draft", ".taken.old", draft.folder.name]
        assert [path.name for path in unfinished_engines()] == sorted(left)
        assert kept_engines() == [kept]
        assert [path.name for path in sweep_engines()] == [left[0]]
        assert draft.folder.is_dir()
    assert kept_engines() == [kept, taken] and unfinished_engines() == []
    remove_engine(kept)
    assert [path.name for path in folder.iterdir()] == ["taken"]


def test_what_stands_there_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "engine"
    publish(path)
    with pytest.raises(UsageError, match="exists already; .*--force"):
        publish(path, model="second")
    assert Artifact.open(path).manifest.model == "tiny"
    publish(path, force=True, model="second")
    assert Artifact.open(path).manifest.model == "second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["engine"]
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.png").write_bytes(b"cat")
    with pytest.raises(UsageError, match="--force replaces artifacts only"):
        publish(photos, force=True)
    assert (photos / "cat.png").read_bytes() == b"cat"
    (tmp_path / "empty").mkdir()
    publish(tmp_path / "empty")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), Draft(tmp_path / "engine", key="a" * 64) as draft:
        draft.finish("unet", write_part(draft.folder))
        raise OSError("the disk is full")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "engine"

    def interrupted(key: str, data: bytes) -> bool:
        with pytest.raises(KeyboardInterrupt), Draft(path, key=key * 64) as draft:
            kept = draft.finished("unet") is not None
            draft.finish("unet", write_part(draft.folder, data))
            raise KeyboardInterrupt
        return kept

    assert not interrupted("a", b"first")
    assert interrupted("a", b"first")
    (draft,) = tmp_path.iterdir()
    (draft / PART.weights[0]).write_bytes(b"torn")
    assert not interrupted("a", b"first"), "a part whose files changed is made again"
    assert not interrupted("b", b"other"), "another request starts anew"
    assert [entry.name for entry in tmp_path.iterdir()] == [f".engine.{'b' * 16}.draft"]
    publish(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["engine"]


def test_what_a_kill_left_half_written_is_not_published(tmp_path: Path) -> None:
    path = tmp_path / "engine"
    with Draft(path, key="a" * 64) as draft:
        draft.finish("unet", write_part(draft.folder))
        for half in (".quantisation.json-1-2", "unet/.kernels.so-1-2", ".parts/.unet.json-1-2"):
            (draft.folder / half).write_bytes(b"half")
        draft.publish(describe(draft.folder))
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert there == {PART.file, *PART.weights, MANIFEST}


def test_what_a_kill_between_two_renames_took_is_put_back(tmp_path: Path) -> None:
    path = tmp_path / "engine"
    publish(path)
    path.rename(tmp_path / ".engine.old")
    with pytest.raises(UsageError, match="exists already"), Draft(path, key="a" * 64):
        pass
    assert Artifact.open(path).manifest.model == "tiny"
    assert [entry.name for entry in tmp_path.iterdir()] == ["engine"]


def test_what_a_kill_left_half_removed_is_not_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the replaced artifact is removed; then the user removes the new one."""
    path = tmp_path / "engine"
    publish(path)
    remove = shutil.rmtree

    def killed(folder: Path) -> None:
        if Path(folder).name.startswith(".engine.") and (Path(folder) / PART.file).exists():
            (Path(folder) / PART.file).unlink()
            raise KeyboardInterrupt
        remove(folder)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(path, force=True)
    monkeypatch.undo()
    assert not damaged(path)
    remove(path)
    with Draft(path, key="b" * 64):
        assert not path.exists(), "there is nothing whole to put back"
    assert list(tmp_path.iterdir()) == []


def test_two_exports_to_one_place_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "engine"
    with Draft(path, key="a" * 64) as first:
        with pytest.raises(UsageError, match="another export .* is running"):
            publish(path)
        first.finish("unet", write_part(first.folder))
        first.publish(describe(first.folder))
    assert Artifact.open(path)


def test_the_manifest_is_plain_json_without_local_paths(tmp_path: Path) -> None:
    source = publish(tmp_path / "engine").path
    text = (source / MANIFEST).read_text("utf-8")
    assert str(tmp_path) not in text
    data = json.loads(text)
    assert data["receipt"]["worst"] == "un château"
    assert list(data)[0] == "format" and list(data)[-1] == "digest"
