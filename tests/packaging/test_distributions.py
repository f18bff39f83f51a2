"""What is built is what a user needs: the modules, the marker of types, the entry points, the licence."""

from __future__ import annotations

import configparser
import email
import email.message
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BACKENDS = sorted(folder.parent.name for folder in ROOT.glob("backends/*/pyproject.toml"))
FOLDERS = {"nibs": ".", **{name: f"backends/{name}" for name in BACKENDS}, "nibs-conformance": "conformance"}
ENTRY_POINTS = {
    "nibs": {"console_scripts": {"nibs": "nibs.__main__:main"}},
    **{name: {"nibs": {name.removeprefix("nibs-"): f"{name.replace('-', '_')}.plugin"}} for name in BACKENDS},
    "nibs-conformance": {"pytest11": {"nibs_conformance": "nibs_conformance.plugin"}},
}


def _package(name: str) -> str:
    return name.replace("-", "_")


def _wheel(wheels: Path, name: str) -> zipfile.ZipFile:
    (path,) = wheels.glob(f"{_package(name)}-*.whl")
    return zipfile.ZipFile(path)


def _information(wheel: zipfile.ZipFile, file: str) -> str:
    (path,) = (entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{file}"))
    return wheel.read(path).decode()


def _metadata(wheels: Path, name: str) -> email.message.Message:
    return email.message_from_string(_information(_wheel(wheels, name), "METADATA"))


@pytest.mark.parametrize("name", FOLDERS)
def test_wheel_holds_every_file_of_the_package(wheels, name):
    package = ROOT / FOLDERS[name] / _package(name)
    sources = {
        str(path.relative_to(package.parent))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    found = set(_wheel(wheels, name).namelist())

    assert sources - found == set()


@pytest.mark.parametrize("name", FOLDERS)
def test_wheel_holds_nothing_beside_the_package(wheels, name):
    tops = {path.split("/")[0] for path in _wheel(wheels, name).namelist()}

    assert {top for top in tops if not top.endswith(".dist-info")} == {_package(name)}


@pytest.mark.parametrize("name", FOLDERS)
def test_wheel_says_that_it_is_typed(wheels, name):
    assert f"{_package(name)}/py.typed" in _wheel(wheels, name).namelist()


@pytest.mark.parametrize("name", FOLDERS)
def test_wheel_has_its_entry_points_and_no_others(wheels, name):
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.read_string(_information(_wheel(wheels, name), "entry_points.txt"))

    assert {section: dict(parser[section]) for section in parser.sections()} == ENTRY_POINTS[name]


@pytest.mark.parametrize("name", FOLDERS)
def test_every_entry_point_names_something_that_is_there(wheels, name):
    files = _wheel(wheels, name).namelist()

    for targets in ENTRY_POINTS[name].values():
        for target in targets.values():
            module = target.partition(":")[0].replace(".", "/")
            assert f"{module}.py" in files


@pytest.mark.parametrize("name", FOLDERS)
def test_wheel_carries_the_licence(wheels, name):
    assert "Apache License" in _information(_wheel(wheels, name), "licenses/LICENSE")
    assert _metadata(wheels, name)["License-Expression"] == "Apache-2.0"


def test_all_distributions_carry_one_version(wheels):
    assert len({_metadata(wheels, name)["Version"] for name in FOLDERS}) == 1


def test_the_core_needs_pluggy_only(wheels):
    required = _metadata(wheels, "nibs").get_all("Requires-Dist") or []

    assert [line for line in required if "extra ==" not in line] == ["pluggy>=1.5"]


def test_the_suite_needs_pytest_pluggy_and_numpy_only(wheels):
    required = _metadata(wheels, "nibs-conformance").get_all("Requires-Dist") or []

    assert {line.partition(">")[0].partition("<")[0] for line in required} == {"nibs", "numpy", "pluggy", "pytest"}


@pytest.mark.parametrize("name", FOLDERS)
def test_source_distribution_builds_and_holds_the_package(sources, tmp_path, name):
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=sources[name], capture_output=True, check=True, timeout=120)

    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        files = {entry.partition("/")[2] for entry in opened.getnames()}

    assert {"pyproject.toml", "README.md", "LICENSE", f"{_package(name)}/__init__.py"} <= files


def test_the_licence_is_one_text_everywhere():
    assert len({(ROOT / folder / "LICENSE").read_bytes() for folder in FOLDERS.values()}) == 1
