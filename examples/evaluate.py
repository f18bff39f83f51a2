"""What a trained encoder is worth: retrieval, zero-shot classification, linear evaluation. PyTorch.

Each function takes embeddings and answers with shares between 0 and 1; none knows where the rows came from.
Localising and naming is in detection.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

RANKS = (1, 5, 10)
QUERIES_AT_ONCE = 1024  # a strip of cosines, so that a large gallery needs no square matrix


def retrieval(queries: Tensor, keys: Tensor, ids: Tensor) -> tuple[float, ...]:
    """Return R@1, R@5, R@10: the share of queries whose own key is among the nearest 1, 5, 10 of all keys.

    queries, keys: `[n, d]`, row i of one belongs to row i of the other. ids: `[n]`; keys of the query's own id
    do not count as rivals.
    """
    rank = torch.empty(len(queries), dtype=torch.int64)
    for rows in torch.arange(len(queries)).split(QUERIES_AT_ONCE):
        cosines = queries[rows] @ keys.T
        # The own cosine from the same product: one computed apart may differ in its last bit, and be its own rival.
        own = cosines[torch.arange(len(rows)), rows]
        rank[rows] = ((cosines > own[:, None]) & (ids[rows, None] != ids[None, :])).sum(1)
    return tuple((rank < most).float().mean().item() for most in RANKS)


def zero_shot_accuracy(rows: Tensor, classes: Tensor, truth: Tensor) -> float:
    """Return the share of rows `[n, d]` nearest to their own class `[c, d]`, by cosine; truth: `[n]`."""
    return ((rows @ functional.normalize(classes, dim=-1).T).argmax(1) == truth).float().mean().item()


def linear_evaluation(
    rows: Tensor, labels: Tensor, test_rows: Tensor, test_labels: Tensor, decay: float = 1e-4, steps: int = 100
) -> float:
    """Train a linear classifier on frozen rows `[n, d]` and return its accuracy on the test rows.

    Multinomial logistic regression on standardised features by L-BFGS, with `decay / 2` times the squared
    weights beside the mean loss. Convex, started at zero: no seed, one answer.
    """
    mean, spread = rows.mean(0), rows.std(0).clamp_min(1e-6)
    rows, test_rows = (rows - mean) / spread, (test_rows - mean) / spread
    classes = int(labels.max()) + 1
    weight = torch.zeros(rows.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = functional.cross_entropy(rows @ weight + bias, labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    with torch.no_grad():
        return ((test_rows @ weight + bias).argmax(1) == test_labels).float().mean().item()
