"""The hooks by which a backend's plugin helps the suite to try what has no common form.

They live in the pluggy project `nibs`, beside `nibs_backends`, and are implemented in the same plugin
module with the same `nibs.hookimpl`; none is needed before the capability it serves is claimed:

    claimed               hook
    autograd              nibs_conformance_pullback
    traced                nibs_conformance_trace
    any collective        nibs_conformance_world
    (none)                nibs_conformance_prepare, where the framework must be set up for all four dtypes
    (none)                nibs_conformance_memory, where /proc and tracemalloc see nothing of its arrays
    (none)                nibs_conformance_deviations, for failures that are known

    from nibs import hookimpl

    @hookimpl
    def nibs_conformance_deviations(backend):
        if backend == "abacus":
            from nibs_conformance.hookspecs import Deviation

            yield Deviation("test_values.py::test_loss*float16*", "notyet", "beads are too coarse", AssertionError)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from nibs.hookspecs import hookspec

__all__ = ["Deviation", "Meter", "Pullback", "Trace", "World", "register"]

KINDS = {
    "notimpl": "not implemented: the backend could, and does not",
    "notyet": "not yet: it is on the way",
    "never": "never: the hardware or the framework cannot",
}


@dataclass(frozen=True)
class Deviation:
    """One known failure. It is strict: a deviation that passes fails the run, for it is news.

    tests: a pattern (`fnmatch`) over `file.py::test_name[ids]`. kind: one of `KINDS`. reason: a sentence
    for the report. raises: the exception with which it fails, and no other is excused.
    """

    tests: str
    kind: Literal["notimpl", "notyet", "never"]
    reason: str
    raises: type[BaseException] = AssertionError

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Deviation(kind={self.kind!r}): expected one of {', '.join(map(repr, KINDS))}.")
        if not self.reason:
            raise ValueError("Deviation(reason=''): expected a sentence that says why.")


class Pullback(Protocol):
    """The framework's own differentiation, in one call."""

    def __call__(self, function: Callable[..., Any], inputs: Sequence[Any], upstream: Any) -> tuple[Any, Sequence[Any]]:
        """`function(*inputs)` and the gradients of `sum(upstream * function(*inputs))`, one for each input.

        inputs: arrays of the backend, fresh, not yet marked for differentiation. upstream: an array of
        the shape of the result.
        """
        ...


class Trace(Protocol):
    """The framework's tracer: jit, compile, ..."""

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function of arrays, traced as a whole; it fails where it would fall back to running eagerly."""
        ...


class Meter(Protocol):
    """How to see what a call holds at most."""

    def __call__(self, call: Callable[[], Any]) -> int:
        """Bytes that `call()` held at its peak, beyond what was held before; what it returns counts."""
        ...


class World(Protocol):
    """Ranks of one ring. The level that uses it is `test_ring.py`."""

    size: int

    def run(self, job: str, *arguments: Any, timeout: float = 60.0) -> list[Any]:
        """Run `module:function(ring, rank, size, *arguments)` on every rank; its results in rank order.

        A rank that raises gives its exception instead of a result. Arguments and results can be pickled.
        """
        ...


@hookspec
def nibs_conformance_prepare(backend: str) -> None:
    """Set the framework up, before the suite's first array: 64-bit values, say, where they must be turned on."""


@hookspec(firstresult=True)
def nibs_conformance_pullback(backend: str) -> Pullback | None:
    """How this backend's framework differentiates; needed by whoever claims `autograd`."""


@hookspec(firstresult=True)
def nibs_conformance_trace(backend: str) -> Trace | None:
    """How this backend's framework traces; needed by whoever claims `traced`."""


@hookspec(firstresult=True)
def nibs_conformance_memory(backend: str, device: str) -> Meter | None:
    """How to measure peak memory on this device, where the process's own figures do not show it."""


@hookspec(firstresult=True)
def nibs_conformance_world(backend: str, size: int) -> AbstractContextManager[World] | None:
    """How to run `size` ranks of this backend; needed by whoever claims a collective."""


@hookspec
def nibs_conformance_deviations(backend: str) -> Iterable[Deviation]:  # type: ignore[empty-body]
    """Failures of this backend that are known, each with its kind, its reason and its exception."""


def register() -> Any:
    """Teach nibs's plugin manager these hooks, once, and return its hook caller."""
    from nibs.registry import registry

    registry.statuses()
    known = getattr(registry.hooks.hook, "nibs_conformance_world", None)
    if known is None or not known.has_spec():
        registry.hooks.add_hookspecs(sys.modules[__name__])
    return registry.hooks.hook
