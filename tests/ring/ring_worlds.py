"""Worlds of the tests of rings, real processes over gloo, and how their answers are read."""

from __future__ import annotations

from typing import Any

from nibs.errors import RingError
from nibs_conformance.worlds import ProcessWorld

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch._dynamo",  # what optimizers and wrappers import when they are first used
    "torch.optim",
    "nibs_torch.backend",
    "nibs_torch.modules",
    "nibs_torch.opaque",
    "nibs_torch.decoupled",
    "training_jobs",
    "decoupled_jobs",
)


def process_world(size: int, ring_timeout: float = 30.0) -> ProcessWorld:
    """`size` processes that have joined over gloo."""
    return ProcessWorld(size, "nibs_torch.ring:open_ring", preload=PRELOAD, ring_timeout=ring_timeout)


def answers(results: list[Any]) -> list[Any]:
    """The results, none of which may be an exception; a RingError is shown only where nothing else went wrong."""
    failed = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(failed, key=lambda one: isinstance(one, RingError)):
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    return results
