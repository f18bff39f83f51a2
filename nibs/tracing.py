"""How a call gets past a compiler that reads Python line by line.

`torch.compile` reads the body of every function it meets, and cannot read a registry that looks for
plugins. It does run imports, though. So `contrastive_loss` imports this module as its first act, which
loads the backends whose framework is there and which can be traced; each of them then takes the call in
by its own `enter`, and knows what its compiler may see. Outside a compiler `enter` just makes the call.

Nothing is imported here on behalf of a framework that the program has not imported itself.
"""

from __future__ import annotations

import sys
from typing import Any

from nibs.errors import BackendUnavailable
from nibs.registry import registry
from nibs.spec import Backend

__all__ = ["tracer_of"]

TRACERS: list[tuple[type, Backend]] = []
"""Array types, and the backend that takes their calls in."""


def _load() -> None:
    for status in registry.statuses():
        if status.state != "ready" or status.info is None or "traced" not in status.info.capabilities.features:
            continue
        for name in status.info.arrays:
            module, _, kind = name.rpartition(".")
            if module in sys.modules and isinstance(getattr(sys.modules[module], kind, None), type):
                try:
                    TRACERS.append((getattr(sys.modules[module], kind), registry.load(status.name)))
                except BackendUnavailable:
                    continue  # whoever asks for it by name is told why


def tracer_of(array: Any) -> Backend | None:
    """The backend that takes in calls on such arrays, or None."""
    for kind, backend in TRACERS:
        if isinstance(array, kind):
            return backend
    return None


_load()
