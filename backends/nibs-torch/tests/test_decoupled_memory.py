"""What autograd keeps in a decoupled step: one micro-batch's graph, or the embeddings; never a matrix of pairs."""

from __future__ import annotations

import torch
from torch import nn

import nibs_torch


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
