"""The fused kernels on a CPU, under Triton's interpreter: their own checks, and the conformance suite over them.

Each runs in a Python of its own, started with TRITON_INTERPRET=1: Triton reads it when kernels are defined. The suite
is sampled here; `TRITON_INTERPRET=1 NIBS_TORCH_KERNEL=triton python -m pytest --pyargs nibs_conformance --nibs-backend
torch --nibs-dtypes float32,bfloat16,float16` runs all of it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton's wheels are for Linux")

HERE = Path(__file__).parent
CASES = {
    "float32": "symmetric,key-to-query,everything-symmetric,everything-query-to-key,sigmoid-masks-weights,"
    "sigmoid-positive,margin-several-queries,positive-with-targets,smoothing-masked,self-excluded-symmetric,nan-where-masked,"
    "rows-of-all-lengths,far-beyond-exp,negative-scale,transposed,ids-near-2-to-40,one-dimension",
    "bfloat16": "symmetric,sigmoid,everything-symmetric,temperature-0.005,weights-far-apart",
    "float16": "symmetric,sigmoid-masks-weights,temperature-0.005,weights-far-apart",
}
CHOSEN = "(test_loss or test_gradient_of or test_stats_over) and not ranks"


def run(*arguments: str) -> str:
    """What pytest says, in a Python that interprets kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "NIBS_TORCH_KERNEL": "triton", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def passed(output: str) -> int:
    found = re.search(r"(\d+) passed", output)
    return int(found[1]) if found else 0


def test_the_kernels_own_checks_pass() -> None:
    assert passed(run(str(HERE / "triton_checks.py"))) >= 100


@pytest.mark.parametrize("dtype", list(CASES))
def test_the_suite_passes_over_the_kernels(dtype: str) -> None:
    chosen = ("--nibs-dtypes", dtype, "--nibs-cases", CASES[dtype], "-k", CHOSEN)
    assert passed(run("--pyargs", "nibs_conformance", "--nibs-backend", "torch", *chosen)) >= 20
