"""What is shipped: the list of packages; sdist and wheel, built, installed and run elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from fastsd.images import read_metadata

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "fastsd", "kernels", "export", "benchmarks")
MAPPED = ("kernels", "export", "benchmarks")  # top-level folders shipped as fastsd.<name>


def packaged_files() -> set[str]:
    """Every module of the tree under the name that it must have in a wheel."""
    files = set()
    for folder in ("fastsd", *MAPPED):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).parts
            if folder != "fastsd":
                files.add("/".join(("fastsd", *parts)))
            elif parts[1] not in MAPPED:  # not through the links
                files.add("/".join(parts))
    return files


def test_the_list_of_packages_is_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {name.rpartition("/")[0].replace("/", ".") for name in packaged_files()}
    assert settings["packages"] == sorted(folders)
    for package, folder in settings["package-dir"].items():
        assert (ROOT / folder / "__init__.py").is_file()
        assert package == "fastsd" or package.removeprefix("fastsd.").replace(".", "/") == folder
    mapped = {
        package
        for package in folders
        if package.split(".")[1:2] and package.split(".")[1] in MAPPED
    }
    assert mapped == set(settings["package-dir"]) - {"fastsd"}


def test_the_links_say_what_packaging_says() -> None:
    for name in MAPPED:
        if (ROOT / name).is_dir():
            assert (ROOT / "fastsd" / name).resolve() == ROOT / name


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of the sources and a wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "source"
    copy.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "results", "runs", "out")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_wheel_holds_each_file_once(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert max(Counter(names).values()) == 1
    assert {name for name in names if name.endswith(".py")} == packaged_files()
    assert {name.partition("/")[0] for name in names} == {"fastsd", *_metadata_folder(names)}
    assert "fastsd/py.typed" in names
    shipped = {name.removeprefix("fastsd/builtin/") for name in names if "/builtin/" in name}
    there = {
        path.relative_to(ROOT / "fastsd/builtin").as_posix()
        for path in (ROOT / "fastsd/builtin").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == there
    assert any(name.endswith("LICENSE") for name in names)


def _metadata_folder(names: list[str]) -> set[str]:
    return {name.partition("/")[0] for name in names if ".dist-info/" in name}


def test_the_sdist_holds_each_file_once(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive if not member.isdir()]
    assert max(Counter(names).values()) == 1
    modules = {name for name in names if name.endswith(".py")}
    mapped = {
        name.replace("fastsd/", "", 1) for name in packaged_files() if name.split("/")[1] in MAPPED
    }
    assert modules >= mapped
    assert modules <= mapped | packaged_files(), "nothing but the package, and nothing twice"
    assert not {f"fastsd/{name}" for name in mapped} & modules


@pytest.fixture(scope="module")
def installed(built: Path) -> Path:
    """The wheel, installed without its dependencies into a folder of its own."""
    target = built / "installed"
    (wheel,) = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True, timeout=120)
    return target


def run(installed: Path, cwd: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_bare_names_stay_free(installed: Path) -> None:
    """`kernels`, `export`, `benchmarks` at the top would overwrite other projects' packages."""
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} <= {
        *("fastsd", "bin", "Scripts")
    }


def test_the_installed_wheel_draws(installed: Path, tmp_path: Path) -> None:
    """From another folder, by the installed script, with the installed weights."""
    where = run(installed, tmp_path, sys.executable, "-c", "import fastsd; print(fastsd.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    (script,) = (
        path for path in installed.rglob("fastsd*") if path.parent.name in ("bin", "Scripts")
    )
    names = [
        row["name"]
        for row in json.loads(run(installed, tmp_path, str(script), "samplers", "--json"))
    ]
    assert "euler" in names
    options = ("--steps", "2", "--seed", "0", "-o", "apple.png")
    assert (
        run(installed, tmp_path, str(script), "generate", "a red apple", *options) == "apple.png\n"
    )
    assert read_metadata(tmp_path / "apple.png")["model"] == "builtin"
