"""What goes round the ring: keys with all that belongs to them, and what gathers along the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nibs.ring import Ring
from nibs.verbs import Weights, like, lying

__all__ = ["Keys", "Trail", "origin", "rotate"]


@dataclass(slots=True)
class Keys:
    """A shard of keys on its way round the ring, with what belongs to it. rows `[m, d]`, the rest `[m]`.

    Rows that lie away from the device (`nibs.verbs.Away`) travel from where they lie to where they lie.
    """

    rows: Any
    ids: Any = None
    mask: Any = None
    limit: Any = None
    weights: Weights | None = None

    def pack(self) -> list[Any]:
        """The arrays that are there, in a fixed order: every rank has the same ones."""
        weights = self.weights or Weights(None)
        every = (
            lying(self.rows),
            self.ids,
            self.mask,
            self.limit,
            weights.factor,
            weights.shift,
            weights.target,
            weights.smooth,
        )
        return [array for array in every if array is not None]

    def unpack(self, arrays: tuple[Any, ...]) -> Keys:
        """Keys like these, made of arrays that arrived in the order of `pack`."""
        left = iter(arrays)

        def take(mine: Any) -> Any:
            return None if mine is None else next(left)

        rows = like(self.rows, take(self.rows))
        ids, mask, limit = take(self.ids), take(self.mask), take(self.limit)
        if self.weights is None:
            return Keys(rows, ids, mask, limit)
        mine = self.weights
        weights = Weights(take(mine.factor), take(mine.shift), take(mine.target), take(mine.smooth))
        return Keys(rows, ids, mask, limit, weights)


class Trail:
    """What gathers along the ring: each hop's share joins what arrived, and goes on until it is home.

    sizes: rows of each rank's shard. make: `rows -> arrays`, a share for so many rows. clear: makes a
    share that was used before as good as new. join: adds what arrived to the share at hand.

    Three sets of arrays serve the whole journey: while one is computed into, one is being sent and one
    received. They hold the largest shard; each hop uses as much of them as its shard has rows.
    """

    def __init__(
        self,
        ring: Ring,
        sizes: Sequence[int],
        make: Callable[[int], list[Any]],
        clear: Callable[[list[Any]], None],
        join: Callable[[list[Any], tuple[Any, ...]], None],
    ) -> None:
        self.ring, self.sizes, self.make, self.clear, self.join = ring, sizes, make, clear, join
        self.sets: list[list[Any]] = []
        self.hop = 0
        self.pending: Any = None
        self.at_hand: list[Any] = []

    def share(self) -> list[Any]:
        """Where the share of the shard that is visiting gathers, cleared."""
        self.at_hand = self._part(self.hop % 2, self.sizes[origin(self.ring, self.hop)])
        self.clear(self.at_hand)
        return self.at_hand

    def hand_on(self) -> None:
        """The share is complete: join what the previous rank made of it, and send it on."""
        if self.pending is not None:
            self.join(self.at_hand, self.pending.wait())
        self.hop += 1
        coming = self._part(2, self.sizes[origin(self.ring, self.hop)])
        self.pending = self.ring.shift(*self.at_hand, into=coming)

    def home(self) -> tuple[Any, ...]:
        """What all ranks gathered for this rank's own shard."""
        home = self.pending.wait()
        self.sets, self.at_hand = [], []
        return tuple(home)

    def _part(self, index: int, rows: int) -> list[Any]:
        while len(self.sets) <= index:
            self.sets.append(self.make(max(self.sizes)))
        return [array[:rows] for array in self.sets[index]]


def origin(ring: Ring, hop: int) -> int:
    """The rank whose shard visits this one at `hop`."""
    return (ring.rank - hop) % ring.size


def rotate(
    ring: Ring, sizes: Sequence[int], keys: Keys, room: Callable[[Any, int], Any]
) -> Iterator[tuple[Keys, bool]]:
    """Each shard of keys as it comes by, the next one under way meanwhile; the first is home.

    sizes: rows of each rank's shard. room: `(like, rows)`, an empty array like another but for its rows.
    Two sets of arrays take turns: one is computed with and sent on while the other receives.
    """
    sets: list[list[Any]] = []
    for hop in range(ring.size):
        pending = None
        if hop + 1 < ring.size:
            mine = keys.pack()
            if len(sets) < 2:
                sets.append([room(array, max(sizes)) for array in mine])
            coming = sizes[origin(ring, hop + 1)]
            pending = ring.shift(*mine, into=[array[:coming] for array in sets[hop % 2]])
        yield keys, hop == 0
        if pending is not None:
            keys = keys.unpack(pending.wait())
