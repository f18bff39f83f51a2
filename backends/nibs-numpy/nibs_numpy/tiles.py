"""The three verbs in NumPy: a tile of logits to statistics, statistics to statistics, a tile to gradients.

    tile          logits s [r, c] = scaled q [r, d] @ k^T [d, c]
    tile_lse      one maximum u and one exponential E = exp(s - u + HEAD) serve rows and columns alike:
                  row masses are E's row sums, column masses its column sums
    tile_grad     g = E' (rows) + E' (columns) - targets, then two products: g @ k and g^T @ q

Sharing the exponential is exact as long as no row or column sinks out of float32's range below the
tile's maximum. Both verbs test for that (`LOW`, `SPREAD`) and redo the tile with each row's and each
column's own shift where it fails.

Equations are those of `nibs.spec`; what a tile, its statistics and its weights hold is in
`nibs.verbs`. Nothing here knows of batches, rings or budgets.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from nibs import pairs
from nibs.verbs import Lse, Problem, Tile, Weights

HEAD = 30.0  # exponentials are lifted by e^30, to lengthen the way down to the smallest float32
LOW = np.exp(-55.0)  # a smaller row or column sum has lost terms that count
SPREAD = 69.0  # natural-log width of a tile's lse values up to which one exponential serves all

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class NumpyTiles:
    """The verbs for one accumulation dtype, and the scratch tiles that they reuse."""

    xp = np

    def __init__(self, dtype: str) -> None:
        self.accumulator = np.dtype(np.float64 if dtype == "float64" else np.float32)
        self.lowest = float(np.finfo(self.accumulator).min)
        self._scratch: dict[str, Any] = {}

    # -- the verbs --------------------------------------------------------------------------------

    def tile_lse(self, tile: Tile, problem: Problem, keep: bool) -> tuple[Lse, Lse, Any]:
        rows, columns = Lse(), Lse()
        logits = self._logits(tile, problem, self._fresh(tile) if keep else self._buffer("logits", tile))
        by_row, by_column = _permitted(tile, problem, logits)
        if problem.margin is not None:
            logits *= problem.scale
        if problem.multi or problem.stats:
            self._add_positives(tile, problem, logits, by_row, by_column, rows, columns)
        elif tile.designated is not None:
            rows.positive_sum = self.zeros(len(logits))
            rows.positive_sum[tile.designated[0]] = logits[tile.designated]
        if problem.sums:
            rows.allowed_sum, rows.allowed_count = self._sums(tile, logits, by_row, 1)
            columns.allowed_sum, columns.allowed_count = self._sums(tile, logits, by_column, 0)
        if not problem.softmax:
            rows.mass = self._softplus(tile, problem, logits, by_row)
        else:
            sides = [(rows, 1, by_row)] * problem.rows + [(columns, 0, by_column)] * problem.columns
            self._masses(tile, logits, sides)
        return rows, columns, (logits, by_row, by_column) if keep else None

    def merge_lse(self, into: Lse, part: Lse) -> None:
        if into.shift is not None:
            shift = np.maximum(into.shift, part.shift)
            into.mass[...] = into.mass * np.exp(into.shift - shift) + part.mass * np.exp(part.shift - shift)
            into.shift[...] = shift
        elif into.mass is not None:
            into.mass += part.mass
        for name in ("positive_sum", "positive_count", "allowed_sum", "allowed_count", "weight_sum"):
            share = getattr(part, name)
            if getattr(into, name) is not None and share is not None:
                getattr(into, name)[...] += share
        for name in ("positive_max", "negative_max"):
            if getattr(into, name) is not None:
                np.maximum(getattr(into, name), getattr(part, name), out=getattr(into, name))

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
        if kept is None:
            logits = self._logits(tile, problem, self._buffer("logits", tile))
            by_row, by_column = _permitted(tile, problem, logits)
            if problem.margin is not None:
                logits *= problem.scale
        else:
            logits, by_row, by_column = kept
        if problem.softmax:
            weights = self._softmax_weights(tile, problem, logits, by_row, by_column, rows, columns)
        else:
            assert rows is not None
            weights = self._sigmoid_weights(tile, problem, logits, by_row, rows)
        if into is not None:
            into += weights @ tile.keys
        if onto is not None:
            onto += weights.T @ tile.queries
        product = weight = None
        if problem.total_weight:
            weight = weights.sum(dtype=np.float64)
        if problem.total_product:
            weights *= np.matmul(tile.queries, tile.keys.T, out=self._buffer("part", tile))
            product = weights.sum(dtype=np.float64)
        return product, weight

    # -- InfoNCE ----------------------------------------------------------------------------------

    def _masses(self, tile: Tile, logits: Any, sides: list[tuple[Lse, int, Any]]) -> None:
        """Masses and shifts of both sides, equation (1): one exponential, or two where that would underflow."""
        weights = self._buffer("weights", tile)
        if len(sides) == 2 and sides[0][2] is sides[1][2]:
            seen = _only(logits, sides[0][2], -np.inf, weights)
            top = seen.max()
            shift = top if top > -np.inf else self.accumulator.type(0)
            lifted = shift - HEAD
            back = np.exp(lifted - shift)  # e^-HEAD, less what the line above rounded away
            np.exp(np.subtract(seen, lifted, out=weights), out=weights)
            masses = [weights.sum(axis) for _, axis, _ in sides]
            if min(mass.min() for mass in masses) >= LOW:
                for (side, _, _), mass in zip(sides, masses):
                    side.mass, side.shift = mass * back, np.full_like(mass, shift)
                return
        for side, axis, permitted in sides:
            seen = _only(logits, permitted, -np.inf, weights)
            highest = seen.max(axis)
            empty = highest == -np.inf
            side.shift = np.where(empty, self.accumulator.type(self.lowest), highest)
            shifts = np.expand_dims(np.where(empty, self.accumulator.type(0), highest), axis)
            side.mass = np.exp(np.subtract(seen, shifts, out=weights), out=weights).sum(axis)

    def _softmax_weights(
        self, tile: Tile, problem: Problem, logits: Any, by_row: Any, by_column: Any, rows: Any, columns: Any
    ) -> Any:
        """`g_ij` of equation (2), both directions summed; overwrites `logits` where it may."""
        weights = self._buffer("weights", tile)
        sides = [each for each in ((rows, 1, by_row), (columns, 0, by_column)) if each[0] is not None]
        shifts = np.concatenate([side.shift for side, _, _ in sides])
        low, high = shifts.min(), shifts.max()
        if high - low <= SPREAD and by_row is by_column:
            middle = (low + high) / 2
            factors = [np.expand_dims(side.factor * np.exp(middle - side.shift), axis) for side, axis, _ in sides]
            np.add(factors[0], factors[1] if len(factors) == 2 else 0, out=weights)
            weights *= np.exp(np.subtract(logits, middle, out=logits), out=logits)
        else:
            weights[...] = 0
            part = self._buffer("part", tile)
            for side, axis, permitted in sides:
                np.exp(np.subtract(logits, np.expand_dims(side.shift, axis), out=part), out=part)
                part *= np.expand_dims(side.factor, axis)
                np.add(weights, part, out=weights, where=True if permitted is None else permitted)
        for side, axis, permitted in sides:
            if side.smooth is not None:
                smooth = np.expand_dims(side.smooth, axis)
                np.subtract(weights, smooth, out=weights, where=True if permitted is None else permitted)
        if by_row is by_column and by_row is not None:
            np.copyto(weights, 0, where=~by_row)
        self._subtract_targets(tile, problem, weights, sides)
        return weights

    def _subtract_targets(self, tile: Tile, problem: Problem, weights: Any, sides: Any) -> None:
        if problem.multi:
            found = pairs.positive(tile, problem, pairs.allowed(tile, problem))
            for side, axis, _ in sides:
                np.subtract(weights, np.expand_dims(side.target, axis), out=weights, where=found)
        elif tile.designated is not None:
            for side, axis, _ in sides:
                weights[tile.designated] -= side.target[tile.designated[0 if axis == 1 else 1]]

    # -- Sigmoid ----------------------------------------------------------------------------------

    def _softplus(self, tile: Tile, problem: Problem, logits: Any, permitted: Any) -> Any:
        """Row sums of softplus(-z s), equation (3)."""
        signed = self._signed(tile, problem, logits)
        terms = np.abs(signed, out=self._buffer("part", tile))
        np.log1p(np.exp(np.negative(terms, out=terms), out=terms), out=terms)
        terms += np.maximum(signed, 0, out=signed)
        if permitted is not None:
            np.copyto(terms, 0, where=~permitted)
        return terms.sum(1)

    def _sigmoid_weights(self, tile: Tile, problem: Problem, logits: Any, permitted: Any, rows: Weights) -> Any:
        """`w_i (-z) sigmoid(-z s)`, equation (4)."""
        weights = self._signed(tile, problem, logits)
        small = np.abs(weights, out=self._buffer("part", tile))
        np.exp(np.negative(small, out=small), out=small)
        np.copyto(weights, 1, where=weights >= 0)
        np.copyto(weights, small, where=weights < 0)
        weights /= np.add(small, 1, out=small)
        self._flip(tile, problem, weights)
        weights *= rows.factor[:, None]
        if permitted is not None:
            np.copyto(weights, 0, where=~permitted)
        return weights

    def _signed(self, tile: Tile, problem: Problem, logits: Any) -> Any:
        """`-z s`: the logits, positives' sign turned."""
        signed = self._buffer("weights", tile)
        np.copyto(signed, logits)
        self._flip(tile, problem, signed)
        return signed

    def _flip(self, tile: Tile, problem: Problem, values: Any) -> None:
        if problem.multi:
            np.negative(values, out=values, where=pairs.positive(tile, problem, None))
        elif tile.designated is not None:
            values[tile.designated] *= -1

    # -- tiles and pairs --------------------------------------------------------------------------

    def _logits(self, tile: Tile, problem: Problem, out: Any) -> Any:
        """`[r, c]`: logits, or raw products where a margin wants to see them first."""
        np.matmul(tile.scaled, tile.keys.T, out=out)
        if tile.exact is not None and tile.designated is not None:
            out[tile.designated] = tile.exact
        if problem.margin is None and not problem.fold:
            out *= problem.scale
        if problem.bias is not None:
            out += problem.bias
        return out

    def _add_positives(
        self, tile: Tile, problem: Problem, logits: Any, by_row: Any, by_column: Any, rows: Lse, columns: Lse
    ) -> None:
        """Sums, counts and maxima over positives and negatives, where they can be anywhere in the tile."""
        found = np.zeros(logits.shape, bool)
        if problem.multi:
            found = pairs.positive(tile, problem, by_row)
        elif tile.designated is not None:
            found[tile.designated] = True
        chosen = self._buffer("weights", tile)
        positives = _only(logits, found, 0, chosen)
        rows.positive_sum, columns.positive_sum = positives.sum(1), positives.sum(0)
        if problem.multi:
            rows.positive_count = found.sum(1).astype(self.accumulator)
            columns.positive_count = found.sum(0).astype(self.accumulator)
            if tile.anchor_weights is not None:
                columns.weight_sum = _only(tile.anchor_weights[:, None], found, 0, chosen).sum(0)
        if problem.stats:
            negative = ~found if by_row is None else ~found & by_row
            rows.positive_max = _only(logits, found, -np.inf, chosen).max(1)
            rows.negative_max = _only(logits, negative, -np.inf, chosen).max(1)

    def _sums(self, tile: Tile, logits: Any, permitted: Any, axis: int) -> tuple[Any, Any]:
        """Sums and counts of the allowed logits of each row (axis 1) or column (axis 0)."""
        if permitted is None:
            return logits.sum(axis), np.full(logits.shape[1 - axis], logits.shape[axis], logits.dtype)
        counts = np.broadcast_to(permitted, logits.shape).sum(axis).astype(logits.dtype)
        return _only(logits, permitted, 0, self._buffer("weights", tile)).sum(axis), counts

    def _buffer(self, name: str, tile: Tile) -> Any:
        """A scratch tile `[r, c]`, allocated once at the largest size seen."""
        shape = (len(tile.queries), len(tile.keys))
        size = shape[0] * shape[1]
        held = self._scratch.get(name)
        if held is None or held.size < size:
            held = self._scratch[name] = np.empty(size, self.accumulator)
        return held[:size].reshape(shape)

    def _fresh(self, tile: Tile) -> Any:
        return np.empty((len(tile.queries), len(tile.keys)), self.accumulator)

    # -- array words for the schedule -------------------------------------------------------------

    def operand(self, rows: Any, mask: Any) -> Any:
        if mask is not None:
            rows = np.where(mask[:, None], rows, np.zeros((), rows.dtype))
        return self.cast(rows)

    def rounds(self, dtype: str) -> bool:
        return bool(np.dtype(DTYPES[dtype]) != self.accumulator)

    def zeros(self, *shape: int) -> Any:
        return np.zeros(shape, self.accumulator)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return np.empty(shape, DTYPES[dtype])

    def cast(self, values: Any) -> Any:
        return np.asarray(values).astype(self.accumulator, copy=False)

    def scalar(self, value: Any) -> Any:
        return self.cast(value).reshape(())

    def total(self, values: Any) -> Any:
        return values.sum(dtype=np.float64)

    def indices(self, begin: int, end: int) -> Any:
        return np.arange(begin, end)

    def scatter(self, values: Any, index: Any, length: int, how: str) -> Any:
        out = np.full(length, -np.inf if how == "max" else 0, self.accumulator)
        (np.maximum if how == "max" else np.add).at(out, index, values)
        return out


def _permitted(tile: Tile, problem: Problem, products: Any) -> tuple[Any, Any]:
    """Allowed pairs for rows and for columns; one object unless a margin tells them apart."""
    permitted = pairs.allowed(tile, problem)
    if problem.margin is None:
        return permitted, permitted
    by_row = pairs.within_margin(tile, products, tile.query_limit[:, None], permitted)
    return by_row, pairs.within_margin(tile, products, tile.key_limit[None, :], permitted)


def _only(values: Any, where: Any, other: float, out: Any) -> Any:
    """Values in `where`, the other number elsewhere, in `out`; values as they are where that is None."""
    if where is None:
        return values
    np.copyto(out, other)
    np.copyto(out, values, where=where)
    return out
