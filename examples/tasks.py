"""What examples/train.py can train: a task is data, two encoders, and a way to judge them.

    emoji     pictures and their names                          emoji_task.py
    fashion   two views of one photograph of a garment          fashion_task.py
    text      a German phrase and its English translation       text_task.py

To train on your own pairs, write a class with what `Task` has, and name it in `make_task`.
"""

from __future__ import annotations

import argparse
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Task(Protocol):
    """Data, model and judgement. Encoders normalise their rows; the key encoder also returns the scale.

    pairs: how many there are to train on. model: all parameters, of which `log_scale` is one; what a checkpoint holds.
    query_encoder, key_encoder: modules, a batch of inputs to rows `[n, d]`, or to (rows, scale); one and the same
        object where both sides share an encoder.
    rate: a learning rate that suits the batch `rate_batch`.
    """

    pairs: int
    model: nn.Module
    query_encoder: nn.Module
    key_encoder: nn.Module
    rate: float
    rate_batch: int

    def inputs(self, rows: Tensor) -> tuple[Any, Any]:
        """Return both sides' inputs of the pairs `rows`; what is random in them comes from torch's generator."""

    def loss(self, queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, **options: Any) -> Any:
        """Return the loss of the pairs `rows`; options go to nibs."""

    def evaluate(self) -> dict[str, float]:
        """Judge the model as it stands, on what it was not trained on; leaves it in training mode."""


def make_task(options: argparse.Namespace) -> Task:
    """Load the data that `options.data` names; what is missing ends the program with what to install."""
    torch.manual_seed(options.seed)  # the parameters to start from
    if options.data == "emoji":
        from emoji_task import EmojiTask

        return EmojiTask(options.seed, options.pairs)
    if options.data == "fashion":
        from fashion_task import FashionTask

        return FashionTask(options.data_path, options.pairs)
    from text_task import FrozenTask, TextTask

    return (FrozenTask if options.frozen else TextTask)(options.data_path, options.pairs)
