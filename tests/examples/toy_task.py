"""A task in which nothing is drawn at random, in float64: whatever is computed in two ways must agree."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from train import Trainer, parser
from two_tower import Encoder

import nibs

PAIRS, WIDTH, DIM = 37, 6, 4


class Toys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Linear(WIDTH, DIM, dtype=torch.float64) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(math.log(5.0), dtype=torch.float64))

    def lefts(self, rows: Tensor) -> Tensor:
        return normalize(self.left(rows), dim=-1)

    def rights(self, rows: Tensor) -> Tensor:
        return normalize(self.right(rows), dim=-1)


class ToyTask:
    """37 pairs of random vectors, always the same."""

    rate, rate_batch, pairs = 0.05, 32, PAIRS

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.sides = torch.randn(2, PAIRS, WIDTH, generator=draw, dtype=torch.float64)
        torch.manual_seed(0)
        self.model = Toys()
        self.query_encoder = Encoder(self.model.lefts, self.model.left)
        self.key_encoder = Encoder(self.model.rights, self.model.right, log_scale=self.model.log_scale)

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.sides[0][rows], self.sides[1][rows]

    def loss(self, queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, **options: Any) -> Any:
        return nibs.contrastive_loss(queries, keys, scale=scale, **options)

    def evaluate(self) -> dict[str, float]:
        return {"sum": float(sum(p.detach().sum() for p in self.model.parameters()))}


def toy_options(folder: Path, *words: str, micro_batch: int = 256, steps: int = 5) -> argparse.Namespace:
    shared = ["--data", "emoji", "--batch", "17", "--steps", str(steps), "--output", str(folder)]
    return parser().parse_args([*shared, "--micro-batch", str(micro_batch), *words])


def trained_on_toys(options: argparse.Namespace, group: Any = None) -> list[Tensor]:
    task = ToyTask()
    trainer = Trainer(task, options, group)
    for _ in range(options.steps):
        trainer.step()
    return [parameter.detach() for parameter in task.model.parameters()]
