"""Guests as they really come: a module and a `.dist-info` on the path of a process of its own.

Nothing is installed, and no registry is filled by hand: what nibs reads here is what pip would have left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

WELL_BEHAVED = """
    from nibs.capabilities import BackendInfo, Capabilities
    from nibs.hookspecs import hookimpl

    @hookimpl
    def nibs_backends():
        yield BackendInfo(name="{name}", arrays=(), capabilities=Capabilities(), load=lambda: None, install="{install}")
"""
"""A plugin that declares one backend and does nothing else."""

REPORT = """
    import json
    import nibs
    statuses = nibs.backends()
    print(json.dumps({s.name: [s.state, s.reason, s.distribution] for s in statuses}))
"""


@dataclass
class Answer:
    """What a process that met the guests said."""

    code: int
    out: str
    err: str
    backends: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass
class Guests:
    """A folder on the path, to which guests are added one by one."""

    folder: Path
    environment: dict[str, str]

    def add(self, distribution: str, source: str, *, entry: str, module: str, metadata: bool = True) -> None:
        """Leave what `pip install` of this distribution would leave."""
        (self.folder / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        info = self.folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "entry_points.txt").write_text(f"[nibs]\n{entry} = {module}\n", encoding="utf-8")
        if metadata:
            text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
            (info / "METADATA").write_text(text, encoding="utf-8")

    def run(self, program: str, **variables: str) -> Answer:
        """Run a program in a process that meets the guests."""
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env=self.environment | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def look(self, **variables: str) -> dict[str, dict[str, Any]]:
        """Return what `nibs.backends()` reports, by name."""
        answer = self.run(REPORT, **variables)
        assert answer.code == 0, answer.err
        found = json.loads(answer.out.splitlines()[-1])
        return {name: dict(zip(("state", "reason", "distribution"), row)) for name, row in found.items()}


@pytest.fixture
def guests(tmp_path: Path) -> Guests:
    """Provide an empty folder that the next process has on its path, first."""
    environment = dict(os.environ)
    path = [str(tmp_path), *filter(None, [environment.get("PYTHONPATH", "")])]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NIBS_BACKEND", None)
    return Guests(tmp_path, environment)


@pytest.fixture
def well_behaved() -> Callable[..., str]:
    """Provide the source of a plugin that declares one backend of the given name."""

    def source(name: str, install: str = "") -> str:
        return textwrap.dedent(WELL_BEHAVED).format(name=name, install=install)

    return source
