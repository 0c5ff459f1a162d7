"""Files are replaced at once or not at all."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastsd.errors import CheckpointError
from fastsd.files import read_json, replaced, write_json


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"n": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"n": object()})
    with pytest.raises(OSError, match="full"), replaced(tmp_path / "a.json") as draft:
        draft.write_bytes(b"half")
        raise OSError("the disk is full")
    assert read_json(tmp_path / "a.json") == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match="is a pipe"):
        read_json(tmp_path / "a.json")


def test_writers_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    long = list(range(5000))

    def write(n: int) -> bool:
        write_json(file, {"n": n, "long": long})
        return bool(read_json(file)["long"] == long)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write, range(40)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_others_may_read_as_the_user_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
    (tmp_path / "a.json").chmod(0o600)
    write_json(tmp_path / "a.json", {"n": 1})
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600


def test_a_long_name_is_written(tmp_path: Path) -> None:
    write_json(file := tmp_path / f"{'a' * 240}.json", {"n": 1})
    assert read_json(file) == {"n": 1}


def test_what_is_no_file_of_its_own_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a.json")
    write_json(tmp_path / "link", {"n": 1})
    assert (tmp_path / "link").is_symlink() and read_json(tmp_path / "a.json") == {"n": 1}
    with replaced(Path(os.devnull)) as draft:
        assert draft == Path(os.devnull)
    assert not Path(os.devnull).is_file()
