"""What the tests of this folder share: the backend on the host runner, under a name of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nibs.capabilities import BackendInfo
from nibs.registry import Status, registry
from nibs_cupy.backend import CupyBackend
from nibs_cupy.device import Host
from nibs_cupy.plugin import capabilities

sys.path.append(str(Path(__file__).parent))  # `stand_in`: pytest's importlib mode adds no folder

NAME = "cupy-on-host"  # NIBS_CUPY_DEVICE was read when nibs first looked around, maybe by another test


@pytest.fixture(scope="session")
def host() -> Host:
    return Host()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Host], str]:
    """Put a backend over this device into the registry for one test; the name to call it by."""

    def put(device: Host) -> str:
        registry.statuses()
        backend = CupyBackend(device)
        info = BackendInfo(NAME, (), capabilities("host"), lambda: backend)
        monkeypatch.setitem(registry._statuses, NAME, Status(NAME, "ready", "", "tests", info))
        monkeypatch.setitem(registry._backends, NAME, backend)
        return NAME

    return put


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a process of its own, with these variables set (None: unset)."""

    def run(code: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])}
        for name, value in variables.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
        )

    return run


@pytest.fixture(scope="session")
def sanitizer() -> str:
    """The address sanitizer's library, to be preloaded."""
    compiler = os.environ.get("CXX", "").split()[:1] or [shutil.which("c++") or "g++"]
    found = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True)
    if found.returncode or not Path(found.stdout.strip()).is_absolute():
        pytest.skip(f"{compiler[0]} has no address sanitizer here")
    return found.stdout.strip()
