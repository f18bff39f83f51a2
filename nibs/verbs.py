"""The three verbs that an eager backend supplies, and the records they are given.

    tile_lse     a tile of logits to the lse statistics of its rows and columns
    merge_lse    two such statistics to one
    tile_grad    the same tile to its share of both gradients

A tile is `r` query rows by `c` key rows; a verb may be handed a whole shard as one tile. The symbols
are those of the formulas in `nibs.spec`; `nibs.schedule` calls the verbs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

__all__ = ["Lse", "Problem", "Tile", "Tiles", "Weights"]


@dataclass(slots=True)
class Problem:
    """The constants of one call that every tile needs.

    softmax: InfoNCE, else Sigmoid. rows, columns: which sides are anchors. scale: 0-d accumulator.
    fold: the scale is already in `Tile.scaled`; else it multiplies the raw products (a margin
    compares those). bias: 0-d for Sigmoid; None for InfoNCE, whose loss it leaves alone.
    multi, exclude, exclude_self, margin: the objective's rules. sums: row and column sums of allowed
    logits are needed. stats: so are the largest positive and negative of each row.
    total_product, total_weight: what `tile_grad` returns beside its products.
    """

    softmax: bool
    rows: bool
    columns: bool
    scale: Any
    fold: bool
    bias: Any
    multi: bool
    exclude: bool
    exclude_self: bool
    margin: float | None
    sums: bool
    stats: bool
    precision: str
    total_product: bool
    total_weight: bool


@dataclass(slots=True)
class Tile:
    """One tile of pairs, operands ready: accumulation dtype, or what the tiles' `factor` made; absent rows zero.

    queries `[r, d]`; scaled `[r, d]`: times the scale (the same array where it is not folded in);
    keys `[c, d]`. row, column: where the tile begins in its shards. home: these keys are this rank's
    own, so that designation and self apply; then row_index `[r]` and column_index `[c]` are set if
    `exclude_self` asks for them. designated: `(rows, columns)` indices into the tile, or None.
    exact: the products of those pairs where a margin had them computed first. query_limit `[r]`,
    key_limit `[c]`: similarity above which a negative is dropped. anchor_weights `[r]`.

    Fused tiles get what a kernel can use, and nothing that must be counted first: rows as `factor`
    left them; in the place of `designated`, targets `[r]` (the key of each row in its shard, -1 for
    none) or diagonal; exact `[r]`; anchor_weights for Sigmoid too.

    begins: of tiles that have `unset` (see `Tiles`), whether `into` and `onto` hold anything yet, to be overwritten.
    """

    queries: Any
    scaled: Any
    keys: Any
    row: int
    column: int
    home: bool
    query_ids: Any = None
    key_ids: Any = None
    query_mask: Any = None
    key_mask: Any = None
    row_index: Any = None
    column_index: Any = None
    designated: tuple[Any, Any] | None = None
    exact: Any = None
    query_limit: Any = None
    key_limit: Any = None
    anchor_weights: Any = None
    targets: Any = None
    diagonal: bool = False
    begins: tuple[bool, bool] = (False, False)


@dataclass(slots=True)
class Lse:
    """Statistics of rows (or columns), each `[rows]` in the accumulation dtype, None where not needed.

    shift, mass: `lse = shift + log(mass)`; a row with no allowed pair has mass 0 and the lowest shift.
        For Sigmoid, mass is the sum of softplus terms and there is no shift.
    positive_sum, positive_count: of the logits of positives. allowed_sum, allowed_count: of all allowed.
    weight_sum: anchor weights over a column's positives. positive_max, negative_max: largest logits.

    `merge_lse` adds sums and counts, takes the larger maximum, and rescales masses to one shift.
    """

    mass: Any = None
    shift: Any = None
    positive_sum: Any = None
    positive_count: Any = None
    allowed_sum: Any = None
    allowed_count: Any = None
    weight_sum: Any = None
    positive_max: Any = None
    negative_max: Any = None

    def part(self, where: slice) -> Lse:
        """Views of the rows in `where`."""
        return Lse(*[None if value is None else value[where] for value in self.arrays()])

    def arrays(self) -> list[Any]:
        return [getattr(self, name) for name in LSE_FIELDS]

    def present(self) -> list[str]:
        """Names of the fields that this call needs, in the order in which they travel."""
        return [name for name in LSE_FIELDS if getattr(self, name) is not None]


LSE_FIELDS = tuple(one.name for one in fields(Lse))


@dataclass(slots=True)
class Weights:
    """What turns a tile's logits into gradient weights, each `[rows]` (or `[columns]`).

        g_ij = factor_i exp(s_ij - shift_i) - smooth_i - target_i [j positive]      on allowed pairs

    plus the same over columns. shift is the row's lse, rounded; factor makes up for the rounding. A row
    that is no anchor has shift +inf and the rest 0. For Sigmoid only factor is set: the row's weight.
    """

    factor: Any
    shift: Any = None
    target: Any = None
    smooth: Any = None

    def part(self, where: slice) -> Weights:
        """Views of the rows in `where`."""
        values = (self.factor, self.shift, self.target, self.smooth)
        return Weights(*[None if value is None else value[where] for value in values])


class Away(Protocol):
    """Rows `[n, d]` that lie away from the device, in the place of an array; for backends that stream.

    Slices and indices give arrays on the device. Where a call gathers a gradient for longer than a strip,
    on a ring, it gathers beside the rows.
    """

    shape: tuple[int, ...]
    kept: Any
    """The array itself, where it lies."""

    def __getitem__(self, where: Any) -> Any: ...

    def over(self, array: Any) -> Away:
        """Another array that lies there, as these rows are."""
        ...

    def zeros(self, size: int) -> Any:
        """An array there, `[size, d]` in the accumulation dtype."""
        ...

    def add(self, array: Any, where: slice, part: Any) -> None:
        """Add `part`, on the device, to the rows `where` of an array there; `part` may be reused afterwards."""
        ...


def is_away(rows: Any) -> bool:
    """Whether these rows are an `Away`."""
    return hasattr(rows, "kept")


def lying(rows: Any) -> Any:
    """The array itself, wherever it lies: what a ring carries."""
    return rows.kept if is_away(rows) else rows


def like(rows: Any, array: Any) -> Any:
    """An array that lies where `rows` do, to be sliced as they are."""
    return rows.over(array) if is_away(rows) else array


class Tiles(Protocol):
    """What an eager backend supplies.

    xp: its namespace, for where, log, exp, maximum, clip, stack. lowest: the most negative finite
    number of the accumulation dtype.

    Tiles that multiply rows in another form than the accumulation dtype have a method `factor(rows, mask)`, which
    makes that of what `operand` is given; it stands in `Tile` as queries, scaled and keys.

    Tiles whose products round their factors to half precision set `rounds_weights = True`. They get no scaled
    queries (`problem.fold` is False), for those would not be exact; and they count `sum g_ij <q_i, k_j>` for
    the scale's gradient in `tile_grad`, from weights that were not rounded yet.

    Fused kernels that decide about each pair themselves set `fused = True`, which says that too, and have `factor`,
    and a method more: `poison(rows, mask)`, `[rows]`: 0 for a row that is finite or absent, else NaN. Their `tile_lse`
    may give anything that their `merge_lse` takes. Those that add up what `tile_grad` returns by themselves return None
    there, and have a method `totals()`: both sums over the tiles so far, 0-d and wide.

    Tiles that can overwrite as well as add have a method `unset(rows, width)`: an accumulator that holds anything. They
    are given such, and `Tile.begins` says which tile is the first to write to it.
    """

    xp: Any
    lowest: float

    def operand(self, rows: Any, mask: Any) -> Any:
        """`[r, d]` rows in the accumulation dtype; absent ones zero, whatever they held."""
        ...

    def tile_lse(self, tile: Tile, problem: Problem, keep: bool) -> tuple[Lse, Lse, Any]:
        """Statistics of the tile's rows and columns, and its logits for `tile_grad` if `keep`."""
        ...

    def merge_lse(self, into: Lse, part: Lse) -> None:
        """Merge `part` into `into`, in place; fields that `into` lacks are left out."""
        ...

    def tile_grad(
        self,
        tile: Tile,
        problem: Problem,
        rows: Weights | None,
        columns: Weights | None,
        kept: Any,
        into: Any,
        onto: Any,
    ) -> tuple[Any, Any]:
        """Add `g k` to `into [r, d]` and `g^T q` to `onto [c, d]`, in place; either may be None.

        Returns `sum g_ij <q_i, k_j>` where `problem.total_product`, and `sum g_ij` where
        `problem.total_weight`, 0-d and wide; else None. kept: what `tile_lse` kept, or None.
        """
        ...

    def zeros(self, *shape: int) -> Any:
        """Of the accumulation dtype."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Of the named dtype."""
        ...

    def rounds(self, dtype: str) -> bool:
        """Whether inputs of this dtype are narrower than the accumulators."""
        ...

    def cast(self, values: Any) -> Any:
        """To the accumulation dtype, without a copy where it is that already."""
        ...

    def scalar(self, value: Any) -> Any:
        """A 0-d accumulator from a float or a one-element array."""
        ...

    def total(self, values: Any) -> Any:
        """The sum of a vector, 0-d, in float64 where the device has it."""
        ...

    def indices(self, begin: int, end: int) -> Any:
        """`[begin, ..., end - 1]`, integers fit to index with."""
        ...

    def scatter(self, values: Any, index: Any, length: int, how: str) -> Any:
        """`[length]`: values summed (`"sum"`, from 0) or maximised (`"max"`, from -inf) by index, in a fixed order."""
        ...
