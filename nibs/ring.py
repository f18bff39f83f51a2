"""What a ring of ranks owes the schedule: its size, one hop, one sum, and an exchange of words.

Keys and what belongs to them travel; queries stay. After `size` shifts everything is home. The
ring of one below moves nothing, so a single device runs the very same schedule; `nibs.threads` has a
ring of threads, and backends bring those of their frameworks.

A ring knows nothing of losses, and it does not mend: once a peer is lost or a wait has timed out, it
is dead, says so, and stays dead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from nibs.errors import RingError

__all__ = ["Pending", "Ring", "Solo"]


class Pending(Protocol):
    """A shift under way."""

    def wait(self) -> tuple[Any, ...]:
        """The arrays that the previous rank sent, in the order of `shift`. Raises RingError."""
        ...


class Ring:
    """The contract. A backend derives its own; `size` ranks, this one at `rank`.

    Every rank makes the same calls in the same order. Several shifts may be under way at once; they
    arrive in the order in which they were posted. Each wait is bounded by the ring's timeout, after
    which it raises RingError.
    """

    size: int = 1
    rank: int = 0
    dead: str | None = None
    """Why this ring can no longer be used, or None."""
    calling: bool = False
    """A call on this ring is under way in this rank."""
    owes: bool = False
    """A call has begun whose words this rank has not exchanged yet; see `nibs.agreement`."""

    def check(self, rows: Any, device: str) -> None:
        """Before ranks agree: raise InvalidInput where rows like these, on this device, cannot go round this ring."""

    def shift(self, *arrays: Any, into: Sequence[Any] | None = None) -> Pending:
        """Post one hop: send `arrays` to the next rank and receive the previous rank's.

        into: where to put what arrives, an array for each, of the shapes that the previous rank sends
        (shards may differ in length); `wait()` returns these. None: fresh ones, of the shapes sent.

        The caller leaves `arrays` and `into` alone until `wait()` returns, and is free to write to
        `arrays` after it.
        """
        raise NotImplementedError

    def sum(self, value: Any) -> Any:
        """The elementwise sum of `value` over the ranks, the same bits on every rank."""
        raise NotImplementedError

    def exchange(self, words: str) -> list[str]:
        """Every rank's words, in rank order; what exceeds `WORDS` bytes may be cut off."""
        raise NotImplementedError

    def settle(self) -> None:
        """Return once all that was posted has come to its end, or raise RingError.

        For rings whose `wait` and `sum` only order streams of a device. It is due at the end of every call, and before
        the host reads a number that comes after them: neither may hang on a lost peer.
        """

    def __copy__(self) -> Ring:
        return self  # a ring is this process's place among others, and a copy would be in the same place

    def __deepcopy__(self, memo: object) -> Ring:
        return self

    def alive(self) -> None:
        """Raise RingError if the ring is dead."""
        if self.dead is not None:
            raise RingError(
                f"this ring is dead: {self.dead} Make a new group for the ranks that are left, and a new ring."
            )

    def die(self, reason: str) -> RingError:
        """Declare the ring dead; returns the error to raise."""
        if self.dead is None:
            self.dead = reason
        return RingError(reason)


WORDS = 4096
"""Bytes of words that an exchange carries whole."""


class _Home:
    __slots__ = ("arrays",)

    def __init__(self, arrays: tuple[Any, ...]) -> None:
        self.arrays = arrays

    def wait(self) -> tuple[Any, ...]:
        return self.arrays


class Solo(Ring):
    """The ring of one."""

    def shift(self, *arrays: Any, into: Sequence[Any] | None = None) -> Pending:
        return _Home(arrays)

    def sum(self, value: Any) -> Any:
        return value

    def exchange(self, words: str) -> list[str]:
        return [words]
