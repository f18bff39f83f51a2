"""The ring of a `shard_map`, by axis name: a hop is `ppermute`, a sum is `psum`. It never moves what is at home.

A tuple of axes is one ring in row-major order. Traced rings make no exchange of words: shapes and options are
one program's, so the ranks cannot disagree. What would silently give wrong gradients is refused when the ring
is made: an axis that the queries do not vary over (`varies`).
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from nibs.errors import InvalidInput

__all__ = ["Ring", "axis_names", "cast_to", "manual", "varies", "vary"]


class Ring:
    """Ranks along mesh axes; `axes=()` is the ring of one, which moves nothing."""

    def __init__(self, axes: tuple[str, ...]) -> None:
        self.axes = axes
        self.size = 1
        for axis in axes:
            self.size *= lax.axis_size(axis)

    def shift(self, arrays: Any) -> Any:
        """One hop: what the previous rank had; None leaves stay None."""
        hop = [(rank, (rank + 1) % self.size) for rank in range(self.size)]
        return jax.tree.map(lambda array: lax.ppermute(array, self.axes, hop), arrays)

    def sum(self, value: Any) -> Any:
        """The elementwise sum over the ranks, the same on each."""
        return lax.psum(value, self.axes) if self.axes else value

    def largest(self, value: Any) -> Any:
        """The elementwise maximum over the ranks, the same on each."""
        return lax.pmax(value, self.axes) if self.axes else value


def axis_names(ring: Any) -> tuple[str, ...]:
    """The axes of `ring=`: a name, or names. Raises InvalidInput for anything else."""
    axes = (ring,) if isinstance(ring, str) else ring
    if (
        not isinstance(axes, tuple)
        or not axes
        or not all(isinstance(axis, str) for axis in axes)
        or len(set(axes)) != len(axes)
    ):
        raise InvalidInput(f"ring={ring!r}: expected a mesh axis name, such as 'data', or a tuple of names.")
    return axes


def varies(value: Any) -> frozenset[str]:
    """The manual axes that a value varies over, as `shard_map` tracks them."""
    aval = jax.typeof(value)
    kind = getattr(aval, "mat", aval)  # `mat.varying` since 0.10, `vma` before
    return frozenset(getattr(kind, "varying", None) or getattr(kind, "vma", None) or ())


def cast_to(axes: frozenset[str], value: Any) -> Any:
    """The value as one that varies over all of `axes`."""
    missing = tuple(sorted(axes - varies(value)))
    return lax.pcast(value, missing, to="varying") if missing else value


def vary(axes: frozenset[str], tree: Any) -> Any:
    """`cast_to` for each leaf: a loop's carry must vary alike from its first turn to its last."""
    return jax.tree.map(lambda leaf: cast_to(axes, leaf), tree) if axes else tree


def manual(axes: tuple[str, ...]) -> bool:
    """Whether all of these axes are those of a `shard_map` that we are in."""
    try:
        for axis in axes:
            lax.axis_size(axis)
    except (NameError, KeyError, ValueError):
        return False
    return True
