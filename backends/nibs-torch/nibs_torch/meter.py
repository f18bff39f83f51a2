"""What a call holds at most of a GPU's memory, as PyTorch's allocator counts it, for the suite's memory law."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["peak"]


def peak(call: Callable[[], Any]) -> int:
    """Peak of the bytes in tensors on the current GPU during `call`, beyond those in tensors before it."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    highest = torch.cuda.max_memory_allocated()
    del result
    return int(highest - before)
