"""Every error nibs raises on purpose.

Each says three things: what happened, what is here, and what to type. They derive from the
built-in a caller would reach for (`ValueError`, `NotImplementedError`, ...), so that code which
knows nothing of nibs still catches them sensibly; `NibsError` catches them all.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "InvalidInput",
    "MemoryBudget",
    "NibsError",
    "NotRepeatable",
    "RingError",
    "UnknownBackend",
    "Unsupported",
]


class NibsError(Exception):
    """The base of all errors that nibs raises on purpose."""


class UnknownBackend(NibsError, LookupError):
    """No backend of that name: lists those that are here, ready or broken, and the nearest name."""


class BackendUnavailable(NibsError, ImportError):
    """The backend is known but cannot run here: says why, and the command that mends it."""


class Unsupported(NibsError, NotImplementedError):
    """A capability that the chosen backend lacks: says which, and who has it."""


class InvalidInput(NibsError, ValueError):
    """A wrong argument: names it, shows its value, shape, dtype or device, and what was expected."""


class MemoryBudget(NibsError, MemoryError):
    """`memory=` is below what the smallest plan needs.

    `least` is the smallest budget, in bytes, that works for the same request.
    """

    def __init__(self, message: str, *, least: int = 0) -> None:  # a default, so that it can be pickled
        super().__init__(message)
        self.least = least


class NotRepeatable(NibsError, RuntimeError):
    """An encoder gave other embeddings when it was asked again: names it, the micro-batch, and how far they are off."""


class RingError(NibsError, RuntimeError):
    """The ranks of a ring disagree, a rank's own input is invalid, or a peer is lost."""
