"""Which pairs of a tile are allowed and which are positive, written once for plain array code.

Fused kernels decide this per element; backends that work with whole arrays call these functions.
They use only operators and indexing that NumPy, PyTorch and CuPy share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nibs.verbs import Problem, Tile, Tiles

__all__ = ["Designated", "allowed", "positive", "within_margin"]

INFINITY = float("inf")


class Designated:
    """Row i's designated positive, key `targets[i]`, on the home shard.

    The diagonal stays a rule (`targets` None) as long as every row has its key; absent rows and keys
    turn it into explicit targets with -1 for none.
    """

    def __init__(self, tiles: Tiles, targets: Any, n: int, m: int, query_mask: Any, key_mask: Any) -> None:
        xp = tiles.xp
        if targets is None and (query_mask is not None or key_mask is not None):
            targets = tiles.indices(0, n)
        if targets is not None and n:
            valid = (targets >= 0) & (targets < m)
            targets = xp.where(valid, targets, 0) if m else targets
            if query_mask is not None:
                valid = valid & query_mask
            if key_mask is not None and m:
                valid = valid & key_mask[targets]
            targets = xp.where(valid, targets, -1)
        self.tiles, self.targets, self.n, self.m = tiles, targets, n, m

    def valid(self) -> Any:
        """`[n]` bool: rows that have one."""
        targets = self.tiles.indices(0, self.n) if self.targets is None else self.targets
        return targets >= 0

    def index(self, where: slice) -> Any:
        """`[rows]`: the key of each row in `where`; 0 for a row that has none."""
        targets = self.tiles.indices(where.start, where.stop) if self.targets is None else self.targets[where]
        return self.tiles.xp.where(targets >= 0, targets, 0)

    def inside(self, row: int, rows: int, column: int, columns: int) -> tuple[Any, Any] | None:
        """Indices `(rows, columns)` into a tile of the designated pairs it holds, or None."""
        if self.targets is None:
            begin, end = max(row, column), min(row + rows, column + columns)
            if begin >= end:
                return None
            return self.tiles.indices(begin - row, end - row), self.tiles.indices(begin - column, end - column)
        targets = self.targets[row : row + rows]
        found = self.tiles.xp.where((targets >= column) & (targets < column + columns))[0]
        return found, targets[found] - column

    def of_keys(self, values: Any, missing: Any) -> Any:
        """`[n]`: the value of each row's key; `missing` where it has none."""
        if self.targets is None:
            return values[: self.n]
        if not self.m:
            return self.tiles.zeros(self.n) + missing
        has = self.targets >= 0
        return self.tiles.xp.where(has, values[self.tiles.xp.where(has, self.targets, 0)], missing)

    def to_keys(self, values: Any, how: str = "sum") -> Any:
        """`[m]`: row values summed (or maximised) over the rows that designate each key."""
        if self.targets is None:  # key i has row i, and no other
            if self.n == self.m:
                return values
            out = self.tiles.zeros(self.m) if how == "sum" else self.tiles.zeros(self.m) - INFINITY
            out[: self.n] = values
            return out
        # Rows that have none go to a place of their own beyond the end: to count them would wait for the device.
        index = self.tiles.xp.where(self.targets >= 0, self.targets, self.m)
        return self.tiles.scatter(values, index, self.m + 1, how)[: self.m]


def allowed(tile: Tile, problem: Problem) -> Any:
    """`[r, c]` bool of the allowed pairs before any margin, or None where all are."""
    found: Any = None
    if tile.query_mask is not None:
        found = tile.query_mask[:, None]
    if tile.key_mask is not None:
        found = tile.key_mask[None, :] if found is None else found & tile.key_mask[None, :]
    if problem.exclude:
        apart = tile.query_ids[:, None] != tile.key_ids[None, :]
        if tile.designated is not None:
            apart[tile.designated] = True
        found = apart if found is None else found & apart
    if problem.exclude_self and tile.home:
        other = tile.row_index[:, None] != tile.column_index[None, :]
        found = other if found is None else found & other
    return found


def positive(tile: Tile, problem: Problem, permitted: Any) -> Any:
    """`[r, c]` bool of the positives when equal ids make them (`same_id="positive"`), inside `permitted`."""
    found = tile.query_ids[:, None] == tile.key_ids[None, :]
    if tile.designated is not None:
        found[tile.designated] = True
    return found if permitted is None else found & permitted


def within_margin(tile: Tile, products: Any, limit: Any, permitted: Any) -> Any:
    """`permitted` less the negatives whose product exceeds `limit` (`[r, 1]` or `[1, c]`)."""
    keep = ~(products > limit)
    if tile.designated is not None:
        keep[tile.designated] = True
    return keep if permitted is None else keep & permitted
