"""The model: one tower for pictures, one for texts, and the scale between them. PyTorch.

Small on purpose: whatever it learns, it learns in a minute on two cores. Nothing here knows of nibs, and
nothing here computes a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LARGEST_SCALE = 100.0


def convolution(channels_in: int, channels_out: int, size: int, stride: int, norm: str = "batch") -> nn.Sequential:
    """Make a convolution with its norm and its bend; `size == stride` cuts the picture into patches.

    norm: "batch" looks at every picture of a forward, so what a picture becomes depends on its company; "group"
    looks at one picture alone, which is what a step in micro-batches asks for.
    """
    padding = 0 if size == stride else size // 2
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, size, stride, padding, bias=False),
        nn.BatchNorm2d(channels_out) if norm == "batch" else nn.GroupNorm(8, channels_out),
        nn.ReLU(inplace=True),
    )


class Encoder(nn.Module):
    """A method of a model as a module of its own, with the parts that it uses: what DDP wraps, and nothing unused."""

    def __init__(
        self, method: Callable[[Any], Tensor], *parts: nn.Module, log_scale: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.method = method
        self.parts = nn.ModuleList(parts)
        self.log_scale = log_scale

    def forward(self, inputs: Any = None, **named: Tensor) -> Any:
        """Return rows, or rows and the scale. A dict comes as it is, or by name, as DecoupledStep hands it."""
        rows = self.method(named if inputs is None else inputs)
        return rows if self.log_scale is None else (rows, learned_scale(self.log_scale))


def learned_scale(log_scale: Tensor) -> Tensor:
    """Return the factor on cosines, at most 100 as in CLIP."""
    return log_scale.exp().clamp(max=LARGEST_SCALE)


class TwoTower(nn.Module):
    """Pictures `[n, 3, 32, 32]` and text features `[n, text_width]` to rows `[n, dim]` of length 1."""

    def __init__(self, text_width: int, dim: int, channels: int = 48, scale: float = 14.0, norm: str = "batch") -> None:
        super().__init__()
        self.picture = nn.Sequential(
            # Patches of 4 x 4 first: most of the time goes where the resolution is.
            convolution(3, channels, 4, 4, norm),
            convolution(channels, 2 * channels, 3, 2, norm),
            convolution(2 * channels, 2 * channels, 3, 1, norm),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(8 * channels, dim),
        ).to(memory_format=torch.channels_last)
        self.text = nn.Sequential(
            nn.Dropout(0.3),
            nn.Linear(text_width, 2 * dim),
            nn.LayerNorm(2 * dim),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(2 * dim, dim),
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Return `[n, dim]`, normalised."""
        return functional.normalize(self.picture(pictures), dim=-1)

    def encode_texts(self, texts: Tensor) -> Tensor:
        """Return `[n, dim]`, normalised."""
        # A row of length 1 over thousands of slots is tiny beside what layers are initialised for.
        return functional.normalize(self.text(texts * math.sqrt(texts.shape[1]) / 8), dim=-1)

    def scale(self) -> Tensor:
        """Return the learned factor on cosines, at most 100 as in CLIP."""
        return learned_scale(self.log_scale)


def parameter_groups(model: nn.Module, rate: float) -> list[dict[str, object]]:
    """Sort parameters for AdamW: matrices decay, vectors do not, and the scale is a logarithm that must move fast.

    model: any with a parameter `log_scale`.
    """
    others = [p for name, p in model.named_parameters() if name != "log_scale" and p.requires_grad]
    return [
        {"params": [p for p in others if p.ndim > 1], "base_rate": rate, "weight_decay": 0.1},
        {"params": [p for p in others if p.ndim == 1], "base_rate": rate, "weight_decay": 0.0},
        {"params": [model.log_scale], "base_rate": 10 * rate, "weight_decay": 0.0},
    ]
