"""Memory laws of the decoupled step: autograd keeps one micro-batch's graph or the embeddings, never a matrix of pairs,
and the process holds what is linear in the batch and small beside one micro-batch's activations.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import nibs_torch

# Activations are told from embeddings by size: hidden layers are wide, and embeddings narrow.
PROGRAM = """
import torch, nibs_torch
from torch import nn
from nibs_conformance.memory import high_water

HIDDEN, DIM, FEATURES, MICRO = 2048, 8, 8, 128
towers = [nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM)) for _ in range(2)]
step = nibs_torch.DecoupledStep(*towers, loss=nibs_torch.ContrastiveLoss(memory="16MiB"), micro_batch=MICRO)

def peak(n):
    inputs = [torch.randn(n, FEATURES) for _ in range(2)]
    return high_water(lambda: step(*inputs))

peak(256)
print(*(peak(n) for n in (512, 1024, 4096)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="high-water marks are read from /proc")
def test_a_step_over_a_larger_batch_holds_no_more_than_its_embeddings_beside_one_micro_batch():
    # Each activation in pages of its own, so that the mark is what the step holds: by default glibc cuts activations
    # and the small things that stay from one heap, whose holes come to several times as much, differently each time.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peaks = list(map(int, done.stdout.split()))
    # A pair adds 16 numbers and as many of gradients, the loss's vectors, and a share of a random state; its
    # activations alone would be 32 kB, 100 MB for the last 3072 pairs.
    assert peaks[2] - peaks[1] < 10e6, peaks


def saved(n: int, size: int) -> tuple[int, int]:
    """The most bytes that autograd holds at once in a step over `n` pairs, and in all."""
    towers = [nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 4)) for _ in range(2)]
    held, most, total = 0, 0, 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal held, most, total
            self.tensor = tensor
            held += tensor.nbytes
            total += tensor.nbytes
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.tensor.nbytes

    step = nibs_torch.DecoupledStep(*towers, micro_batch=size)
    inputs = [torch.randn(n, 6) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        step(*inputs)
    return most, total


def test_what_autograd_keeps_is_one_micro_batch_or_the_embeddings_and_never_n_times_m():
    size = 32
    most = {n: saved(n, size)[0] for n in (64, 256, 1024)}
    row = 2 * (4 + 4) * 4 + 64  # both sides' embeddings, their gradients in float32, and vectors
    micro = 2 * size * (6 + 64 + 64 + 4) * 4 + 4 * 6 * 64 * 4 + 4096
    for n, bytes_held in most.items():
        assert bytes_held <= n * row + micro, f"{bytes_held} bytes at n = {n}"
    assert most[1024] < 1024 * 1024 * 4 / 8, "far from a matrix of pairs"
