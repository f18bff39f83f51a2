"""Peak memory of a step with autograd, in a process of its own, by the system's high-water mark."""

from __future__ import annotations

import subprocess
import sys

import pytest

memory = pytest.importorskip("nibs_conformance.memory")

PROGRAM = """
import torch, nibs
from nibs_conformance.memory import high_water

def step(n, d=128):
    queries, keys = (torch.randn(n, d, requires_grad=True) for _ in range(2))
    def call():
        nibs.contrastive_loss(queries, keys, scale=2.0, memory="8MiB").backward()
    return call

step(64)()
print(*(high_water(step(n)) - 2 * n * 128 * 4 for n in (2048, 4096)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="high-water marks are read from /proc")
def test_a_step_keeps_its_budget_beyond_inputs_and_gradients():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    small, large = map(int, done.stdout.split())
    # The budget, and what the allocator and the threads take; a single float32 matrix would be 67 MB.
    assert large < 24e6, f"{large} bytes beyond inputs and gradients"
    assert large - small < 12e6, f"grew by {large - small} bytes when n doubled"
