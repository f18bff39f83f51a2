"""A ring whose ranks are threads of one process, for any eager backend: for tests, and to try a ring on one device.

    def rank(ring):
        return nibs.contrastive_loss_and_grad(queries[ring.rank], keys[ring.rank], ring=ring)

    results = run(4, rank)

It moves arrays by copying them, holds to the contract of `nibs.ring.Ring` as strictly as a network
does (what was sent may be overwritten after `wait()`), and makes nothing faster. PyTorch's autograd has
one worker per GPU, in which ranks that are threads would wait for each other: on one GPU use
`contrastive_loss_and_grad`, which builds no graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from nibs.errors import RingError
from nibs.ring import Pending, Ring

__all__ = ["Square", "ThreadRing", "run", "run_ranks", "thread_rings"]

TIMEOUT = 60.0


class Square:
    """Where the threads of one ring meet: everything posted, under one lock."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout = size, timeout
        self.changed = threading.Condition()
        self.posted: dict[tuple[Any, ...], Any] = {}
        self.left: dict[int, str] = {}

    def post(self, key: tuple[Any, ...], value: Any) -> None:
        with self.changed:
            self.posted[key] = value
            self.changed.notify_all()

    def leave(self, rank: int, why: str) -> None:
        """Rank has ended: whoever waits for it need wait no longer."""
        with self.changed:
            self.left[rank] = why
            self.changed.notify_all()

    def take(self, key: tuple[Any, ...], ring: ThreadRing, source: int) -> Any:
        """What `source` posts under `key`; RingError if it has ended, or does not within the timeout."""
        with self.changed:
            self.changed.wait_for(lambda: key in self.posted or source in self.left, self.timeout)
            if key in self.posted:
                return self.posted.pop(key)
        if source in self.left:
            raise ring.die(f"rank {source} of {self.size} {self.left[source]}, while rank {ring.rank} waited for it.")
        raise ring.die(f"rank {source} of {self.size} did not answer rank {ring.rank} within {self.timeout:g} s.")


class _Hop:
    """One shift of one rank: copy what arrives, then wait until the next rank has copied ours."""

    __slots__ = ("arrays", "into", "number", "ring")

    def __init__(self, ring: ThreadRing, number: int, into: Sequence[Any] | None) -> None:
        self.ring, self.number, self.into = ring, number, into
        self.arrays: tuple[Any, ...] | None = None

    def wait(self) -> tuple[Any, ...]:
        ring = self.ring
        if self.arrays is None:
            ring.alive()
            square, before, after = ring.square, (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size
            arrived = square.take(("shift", before, self.number), ring, before)
            self.arrays = _settle(arrived, self.into, ring)
            square.post(("taken", ring.rank, self.number), True)
            square.take(("taken", after, self.number), ring, after)
        return self.arrays


class ThreadRing(Ring):
    """One rank's end of a ring of threads; made by `thread_rings` or `run`."""

    def __init__(self, square: Square, rank: int) -> None:
        self.square, self.rank, self.size = square, rank, square.size
        self._shifts = self._meetings = 0
        self.sent = 0
        """Bytes that this rank has sent by `shift`."""

    def shift(self, *arrays: Any, into: Sequence[Any] | None = None) -> Pending:
        self.alive()
        hop = _Hop(self, self._shifts, into)
        self.square.post(("shift", self.rank, self._shifts), arrays)
        self._shifts += 1
        self.sent += sum(array.nbytes for array in arrays)
        return hop

    def sum(self, value: Any) -> Any:
        first, *others = self._gather(_copy(value))
        total = _copy(first)
        for other in others:
            total = total + other
        return total

    def exchange(self, words: str) -> list[str]:
        return self._gather(words)

    def _gather(self, value: Any) -> list[Any]:
        self.alive()
        number, self._meetings = self._meetings, self._meetings + 1
        for rank in range(self.size):
            self.square.post(("meet", number, self.rank, rank), value)
        return [self.square.take(("meet", number, rank, self.rank), self, rank) for rank in range(self.size)]


def thread_rings(size: int, timeout: float = TIMEOUT) -> list[ThreadRing]:
    """The `size` ends of one ring, one for each thread. timeout: seconds that a rank waits for another."""
    square = Square(size, timeout)
    return [ThreadRing(square, rank) for rank in range(size)]


def run(
    size: int, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT, errors: bool = False
) -> list[Any]:
    """`function(ring, *arguments)` in `size` threads at once; the results in rank order.

    A rank that raises ends the others with a RingError. Then, with errors=True, exceptions stand in
    the place of results; else the first that is no consequence of another is raised.
    """
    return run_ranks(thread_rings(size, timeout), function, *arguments, errors=errors)


def run_ranks(
    rings: Sequence[ThreadRing], function: Callable[..., Any], *arguments: Any, errors: bool = False
) -> list[Any]:
    """`run` over rings that are there already, all the ends of one, in rank order."""
    results: list[Any] = [None] * len(rings)

    def rank(ring: ThreadRing) -> None:
        try:
            results[ring.rank] = function(ring, *arguments)
            ring.square.leave(ring.rank, "has returned")
        except BaseException as error:
            results[ring.rank] = error
            ring.square.leave(ring.rank, f"has ended with {type(error).__name__}")

    threads = [threading.Thread(target=rank, args=(ring,), name=f"rank {ring.rank}", daemon=True) for ring in rings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [result for result in results if isinstance(result, BaseException)]
    if failed and not errors:
        raise next((error for error in failed if not isinstance(error, RingError)), failed[0])
    return results


def _settle(arrived: tuple[Any, ...], into: Sequence[Any] | None, ring: ThreadRing) -> tuple[Any, ...]:
    """Copies of what the previous rank lent us."""
    if into is None:
        return tuple(_copy(array) for array in arrived)
    expected, got = ([(tuple(one.shape), str(one.dtype)) for one in arrays] for arrays in (into, arrived))
    if expected != got:
        raise ring.die(f"rank {ring.rank} of {ring.size} expected arrays {expected} and got {got}.")
    for here, there in zip(into, arrived, strict=True):
        here[...] = there
    return tuple(into)


def _copy(array: Any) -> Any:
    return array.clone() if hasattr(array, "clone") else array.copy()
