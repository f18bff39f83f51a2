"""Wheels of this repository, built once, and fresh environments to install them into, without a network.

What a fresh environment needs of other people (NumPy, pytest, ...) it gets as links to what the running
environment has, distribution by distribution. Nothing of ours can come along with them, so what is tested
there is what is in the wheels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OURS = {
    "nibs": ROOT,
    **{folder.parent.name: folder.parent for folder in sorted(ROOT.glob("backends/*/pyproject.toml"))},
    "nibs-conformance": ROOT / "conformance",
}


def clean_environment() -> dict[str, str]:
    """Return the variables of this process without what would bring modules, plugins or an index along."""
    unwanted = re.compile(r"^(PYTHON|NIBS_|PYTEST_|PIP_|UV_|VIRTUAL_ENV)")
    kept = {name: value for name, value in os.environ.items() if not unwanted.match(name)}
    # A configuration file of pip's may name an index; here there is none.
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def call(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in an environment without surprises."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def must(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command that has to succeed printed."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(source: Path, wheels: Path) -> None:
    """Build one wheel from a source folder, without a network."""
    must(
        call(
            *(sys.executable, "-m", "pip", "wheel", "--quiet"),
            *("--no-build-isolation", "--no-index", "--no-deps"),
            *("--wheel-dir", wheels, source),
            cwd=wheels,
        )
    )


def copy_source(source: Path, target: Path) -> Path:
    """Copy a distribution's folder as a fresh clone has it: setuptools puts leftovers of `build/` into wheels."""
    leave = shutil.ignore_patterns(
        *("build", "dist", "*.egg-info", "__pycache__", ".*", "backends", "conformance", "reports", "out")
    )
    return Path(shutil.copytree(source, target, ignore=leave))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Provide a copy of each of our distributions' folders, by name."""
    folder = tmp_path_factory.mktemp("sources")
    return {name: copy_source(source, folder / name) for name, source in OURS.items()}


@pytest.fixture(scope="session")
def wheels(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a folder with one wheel of each of our distributions."""
    folder = tmp_path_factory.mktemp("wheels")
    for source in sources.values():
        build_wheel(source, folder)
    return folder


@dataclass(frozen=True)
class Fresh:
    """A new environment, and a folder to work in that holds nothing."""

    python: Path
    scripts: Path
    site: Path
    folder: Path

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment."""
        head = self.scripts / command[0] if (self.scripts / command[0]).exists() else Path(command[0])
        return call(head, *command[1:], cwd=self.folder)

    def build_wheel(self, source: Path, wheels: Path) -> None:
        """Build a wheel from a source folder, with what the running environment has."""
        build_wheel(source, wheels)

    def install(self, wheels: Path, *names: str) -> None:
        """Install distributions from a folder of wheels and from nowhere else, and check that nothing is missing."""
        pip = (sys.executable, "-m", "pip", "--python", self.python)
        must(call(*pip, "install", "--quiet", "--no-index", "--find-links", wheels, *names, cwd=self.folder))
        must(call(*pip, "check", cwd=self.folder))


def needed(names: list[str]) -> set[str]:
    """Return the distributions that these need, down to the last, among those that are not ours."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = canonicalize_name(queue.pop())
        if name in found:
            continue
        found.add(name)
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return found


def link(names: set[str], site: Path) -> None:
    """Put links to what these distributions installed into another environment's modules."""
    for name in names:
        there = distribution(name)
        for top in {file.parts[0] for file in there.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            (site / top).symlink_to(Path(str(there.locate_file(top))))


@pytest.fixture(scope="session")
def make_fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Fresh]:
    """Provide a maker of environments that have NumPy, ml_dtypes, pytest, click and rich, and nothing of ours."""

    def make() -> Fresh:
        home = tmp_path_factory.mktemp("environment")
        venv.create(home, symlinks=True, with_pip=False)
        scripts = home / "bin"
        python = scripts / "python"
        site = Path(
            must(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home)).strip()
        )
        link(needed(["numpy", "ml_dtypes", "pytest", "pluggy", "click", "rich"]), site)
        return Fresh(python, scripts, site, tmp_path_factory.mktemp("work"))

    return make
