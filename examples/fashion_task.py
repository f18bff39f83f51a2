"""Fashion-MNIST without its labels: two views of one photograph are a pair, and a linear layer judges. PyTorch.

SimCLR (Chen et al., arXiv 2002.05709) in small: crops, mirror images and changes of contrast make the views, one
encoder sees both, a head that is thrown away afterwards carries the loss, and the loss is NT-Xent.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate import linear_evaluation
from fashion_data import load_fashion
from torch import Tensor, nn
from torch.nn import functional
from two_tower import Encoder, convolution

import nibs

FEATURES, DIM = 128, 64
SMALLEST_CROP = 0.3  # share of the picture's area
ENCODED_AT_ONCE = 1000
JUDGED_ON = 10_000  # training pictures for the linear layer


class Garments(nn.Module):
    """Pictures `[n, 1, 28, 28]` to features `[n, FEATURES]`, and these to rows `[n, DIM]` of length 1."""

    def __init__(self, channels: int = 32, scale: float = 5.0) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            convolution(1, channels, 4, 2, "group"),
            convolution(channels, 2 * channels, 3, 2, "group"),
            convolution(2 * channels, 4 * channels, 3, 2, "group"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * channels, FEATURES),
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, DIM))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def rows(self, pictures: Tensor) -> Tensor:
        """Return what the loss compares."""
        return functional.normalize(self.head(self.backbone(pictures)), dim=-1)


def views(pictures: Tensor) -> Tensor:
    """Crop, mirror, and change contrast and brightness, each picture by itself: `[n, 1, 28, 28]` in [0, 1]."""
    n = len(pictures)
    side = torch.empty(n, 2).uniform_(SMALLEST_CROP**0.5, 1.0)  # width and height of the crop, as shares
    centre = (1 - side) * torch.empty(n, 2).uniform_(-1, 1)
    mirror = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    grid = torch.zeros(n, 2, 3)
    grid[:, 0, 0], grid[:, 1, 1] = side[:, 0] * mirror, side[:, 1]
    grid[:, :, 2] = centre
    seen = functional.grid_sample(
        pictures, functional.affine_grid(grid, list(pictures.shape), align_corners=False), align_corners=False
    )
    contrast, brightness = torch.empty(2, n, 1, 1, 1).uniform_(-0.4, 0.4)
    return (seen * (1 + contrast) + brightness * 0.5).clamp(0, 1)


class FashionTask:
    """Two views of a garment for examples/train.py; see tasks.Task."""

    rate, rate_batch = 1e-3, 256

    def __init__(self, folder: Path | None = None, pairs: int | None = None) -> None:
        self.data = load_fashion(folder)
        self.pictures = torch.from_numpy(self.data.pictures[:pairs].copy())[:, None]
        self.pairs = len(self.pictures)
        self.model = Garments()
        # One encoder for both sides, and one object for it.
        parts = (self.model.backbone, self.model.head)
        self.query_encoder = Encoder(self.model.rows, *parts, log_scale=self.model.log_scale)
        self.key_encoder = self.query_encoder

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return two views `[n, 1, 28, 28]` of each picture."""
        pictures = self.pictures[rows].float().div_(255)
        return views(pictures), views(pictures)

    def loss(self, queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, **options: Any) -> Any:
        """Return NT-Xent: each of the 2n views against all others."""
        return nibs.ntxent(queries, keys, scale=scale, **options)

    @torch.no_grad()
    def features(self, pictures: np.ndarray) -> Tensor:
        """Return `[n, FEATURES]` of pictures as they are, from below the head."""
        batches = torch.from_numpy(pictures.copy())[:, None].split(ENCODED_AT_ONCE)
        return torch.cat([self.model.backbone(batch.float().div(255)) for batch in batches])

    def evaluate(self) -> dict[str, float]:
        """Judge by a linear layer on the frozen features."""
        train, labels = self.data.pictures[:JUDGED_ON], torch.from_numpy(self.data.labels[:JUDGED_ON])
        test, test_labels = self.data.test_pictures, torch.from_numpy(self.data.test_labels)
        self.model.eval()
        found = linear_evaluation(self.features(train), labels, self.features(test), test_labels)
        self.model.train()
        return {"linear evaluation": found}
