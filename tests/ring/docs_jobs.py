"""Runs a code block of the docs on every rank, with what the page says is there, and checks what it trained."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from training_jobs import alone, data, towers

SIZES = (7, 1, 5, 3)


def run_snippet(ring: Any, rank: int, size: int, code: str) -> float:
    """Run a training loop as the docs write it; how far its parameters are from those of the single device."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in places.items()})  # as torchrun and its like set them
    mine = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    model = towers(torch.float64)
    given = {
        "model": model,
        "rank": rank,
        "size": size,
        "torch": torch,
        "dist": dist,
        "group": dist.group.WORLD,
        "batches": [tuple(one[mine] for one in data(sum(SIZES[:size]), step, torch.float64)[:2]) for step in range(4)],
        "make_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    }
    try:
        exec(compile(code, "docs/rings.md", "exec"), given)
    finally:
        for name in places:
            del os.environ[name]
    expected, _ = alone(sum(SIZES[:size]), "clip", torch.float64)
    found = [getattr(one, "full_tensor", lambda one=one: one)() for one in model.state_dict().values()]
    apart = [float((one.detach() - other).abs().max()) for one, other in zip(found, expected, strict=True)]
    return max(apart)
