"""The dense losses in PyTorch, for tests that ask about autograd and not about the mathematics: that is the suite's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["leaves", "symmetric"]


def leaves(
    n: int = 7, m: int | None = None, d: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Queries `[n, d]`, keys `[m, d]` and a scale `[1]` that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(size, d, dtype=torch.float64, generator=generator) for size in (n, m or n)]
    return [value.to(dtype).requires_grad_() for value in (*rows, torch.tensor([3.0], dtype=torch.float64))]


def symmetric(queries: Tensor, keys: Tensor, scale: Tensor, reduction: str = "mean") -> Tensor:
    """CLIP's loss of paired rows."""
    logits = scale * (queries @ keys.T)
    positives = torch.arange(len(logits))
    entropies = [cross_entropy(side, positives, reduction=reduction) for side in (logits, logits.T)]
    return (entropies[0] + entropies[1]) / 2
