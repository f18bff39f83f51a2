"""The three verbs in NumPy: a tile of logits to statistics, statistics to statistics, a tile to gradients.

    tile          logits s [r, c] = scaled q [r, d] @ k^T [d, c]
    tile_lse      one maximum u and one exponential E = exp(s - u + HEAD) serve rows and columns alike:
                  row masses are E's row sums, column masses its column sums
    tile_grad     g = E' (rows) + E' (columns) - targets, then two products: g @ k and g^T @ q

Sharing the exponential is exact as long as no row or column sinks out of float32's range below the
tile's maximum. Both verbs test for that (`LOW`, `SPREAD`) and redo the tile with each row's and each
column's own shift where it fails.

Products take a whole tile, and all threads that NumPy's library has. Between them a tile is bound by memory, so what is
done to its elements is done in place, strip by strip of rows, which stay in the core's cache from step to step. That is
one thread's work: several were tried, and handed Python's lock back and forth for most of what they gained.

Equations are those of `nibs.spec`; what a tile, its statistics and its weights hold is in `nibs.verbs`. Nothing here
knows of batches, rings or budgets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from nibs import pairs
from nibs.verbs import Lse, Problem, Tile, Weights

HEAD = 30.0  # exponentials are lifted by e^30, to lengthen the way down to the smallest float32
LOW = np.exp(-55.0)  # a smaller row or column sum has lost terms that count
STRIP = 1 << 17  # elements: half a megabyte of float32, beside as much scratch
FAR = 80.0  # above it log(1 + exp(x)) is x, in float64 too, and exp may overflow
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
        logits = self._logits(tile, problem, self._fresh(tile) if keep else self._buffer("logits", _shape(tile)))
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
            rows.mass = self._sigmoids(tile, problem, logits, by_row, keep=keep)
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
            weights = self._logits(tile, problem, self._buffer("logits", _shape(tile)))
            by_row, by_column = _permitted(tile, problem, weights)
            if problem.margin is not None:
                weights *= problem.scale
            if not problem.softmax:
                self._sigmoids(tile, problem, weights, by_row, keep=True)
        else:
            weights, by_row, by_column = kept
        if problem.softmax:
            self._softmax_weights(tile, problem, weights, by_row, by_column, rows, columns)
        else:
            assert rows is not None
            self._sigmoid_weights(tile, problem, weights, by_row, rows)
        if into is not None:
            into += np.matmul(weights, tile.keys, out=self._buffer("share", into.shape))
        if onto is not None:
            onto += np.matmul(weights.T, tile.queries, out=self._buffer("share", onto.shape))
        product = weight = None
        if problem.total_weight:
            weight = weights.sum(dtype=np.float64)
        if problem.total_product:
            weights *= np.matmul(tile.queries, tile.keys.T, out=self._buffer("other", _shape(tile)))
            product = weights.sum(dtype=np.float64)
        return product, weight

    # -- InfoNCE ----------------------------------------------------------------------------------

    def _masses(self, tile: Tile, logits: Any, sides: list[tuple[Lse, int, Any]]) -> None:
        """Masses and shifts of both sides, equation (1): one exponential, or two where that would underflow."""
        if not (len(sides) == 2 and sides[0][2] is sides[1][2] and self._shared_masses(logits, *sides)):
            for side, axis, permitted in sides:
                self._own_masses(logits, side, axis, permitted)

    def _shared_masses(self, logits: Any, rows: Any, columns: Any) -> bool:
        """Masses of both sides by the largest logit so far; whether each of them kept the terms that count."""
        top = self.accumulator.type(-np.inf)
        row_parts, shifts, of_columns = [], [], self.zeros(logits.shape[1])
        for where, scratch in self._strips(logits):
            seen = self._seen(logits, rows[2], where, scratch)
            before, top = top, np.maximum(top, seen.max())
            shift = top if top > -np.inf else self.accumulator.type(0)
            lifted = shift - HEAD
            np.exp(np.subtract(seen, lifted, out=scratch), out=scratch)
            back = np.exp(lifted - shift)  # e^-HEAD, less what the line above rounded away
            row_parts.append(scratch.sum(1) * back)
            shifts.append(np.full(len(seen), shift))
            if top > before:
                of_columns *= np.exp(before - top)
            of_columns += scratch.sum(0) * back
        rows[0].mass, rows[0].shift = np.concatenate(row_parts), np.concatenate(shifts)
        columns[0].mass, columns[0].shift = of_columns, np.full_like(of_columns, shift)
        held = True
        for side, axis, permitted in (rows, columns):
            if permitted is not None:  # who has no allowed pair has nothing to keep
                side.shift[~np.broadcast_to(permitted, logits.shape).any(axis)] = self.lowest
            held = held and bool(((side.mass >= LOW) | (side.shift == self.lowest)).all())
        return held

    def _own_masses(self, logits: Any, side: Lse, axis: int, permitted: Any) -> None:
        """Masses of one side by its own shifts."""
        parts = [self._seen(logits, permitted, *strip).max(axis) for strip in self._strips(logits)]
        highest = np.concatenate(parts) if axis == 1 else np.max(parts, axis=0)
        empty = highest == -np.inf
        side.shift = np.where(empty, self.accumulator.type(self.lowest), highest)
        shifts = np.expand_dims(np.where(empty, self.accumulator.type(0), highest), axis)
        parts = []
        for where, scratch in self._strips(logits):
            seen = self._seen(logits, permitted, where, scratch)
            parts.append(np.exp(np.subtract(seen, _of(shifts, where), out=scratch), out=scratch).sum(axis))
        side.mass = np.concatenate(parts) if axis == 1 else np.sum(parts, axis=0)

    def _softmax_weights(
        self, tile: Tile, problem: Problem, logits: Any, by_row: Any, by_column: Any, rows: Any, columns: Any
    ) -> None:
        """`g_ij` of equation (2), both directions summed, in the place of the logits."""
        sides = [each for each in ((rows, 1, by_row), (columns, 0, by_column)) if each[0] is not None]
        shifts = np.concatenate([side.shift for side, _, _ in sides])
        low, high = shifts.min(), shifts.max()
        middle = (low + high) / 2 if high - low <= SPREAD and by_row is by_column else None
        vectors = [
            (
                np.expand_dims(side.shift if middle is None else side.factor * np.exp(middle - side.shift), axis),
                np.expand_dims(side.factor, axis),
                None if side.smooth is None else np.expand_dims(side.smooth, axis),
                permitted,
            )
            for side, axis, permitted in sides
        ]
        for where, scratch in self._strips(logits):
            values = logits[where]
            of = [tuple(_of(vector, where) for vector in side) for side in vectors]
            if middle is not None:
                np.exp(np.subtract(values, middle, out=values), out=values)
                values *= of[0][0] if len(of) == 1 else np.add(of[0][0], of[1][0], out=scratch)
            else:
                for (shift, factor, _, permitted), out in zip(of, (scratch, values)[-len(of) :]):
                    np.exp(np.subtract(values, shift, out=out), out=out)
                    out *= factor
                    if permitted is not None:
                        np.copyto(out, 0, where=~permitted)
                if len(of) == 2:
                    values += scratch
            for _, _, smooth, permitted in of:
                if smooth is not None:
                    np.subtract(values, smooth, out=values, where=True if permitted is None else permitted)
            if middle is not None and of[0][3] is not None:
                np.copyto(values, 0, where=~of[0][3])
        self._subtract_targets(tile, problem, logits, sides)

    def _subtract_targets(self, tile: Tile, problem: Problem, weights: Any, sides: Any) -> None:
        if problem.multi:
            found = pairs.positive(tile, problem, pairs.allowed(tile, problem))
            for side, axis, _ in sides:
                np.subtract(weights, np.expand_dims(side.target, axis), out=weights, where=found)
        elif tile.designated is not None:
            for side, axis, _ in sides:
                weights[tile.designated] -= side.target[tile.designated[0 if axis == 1 else 1]]

    # -- Sigmoid ----------------------------------------------------------------------------------

    def _sigmoids(self, tile: Tile, problem: Problem, logits: Any, permitted: Any, *, keep: bool) -> Any:
        """Row sums of softplus(-z s), equation (3); if `keep`, by the same exponential, sigmoid(-z s) in the place of
        the logits.
        """
        self._flip(tile, problem, logits)
        parts = []
        for where, scratch in self._strips(logits):
            values = logits[where]
            beyond = None if values.max() <= FAR else np.maximum(values - FAR, 0)  # NaN in one row hides no other
            raised = np.exp(np.minimum(values, FAR, out=scratch), out=scratch)
            if keep:
                np.divide(raised, np.add(raised, 1, out=values), out=values)
            terms = np.log1p(raised, out=scratch)
            if beyond is not None:
                terms += beyond
            if permitted is not None:
                np.copyto(terms, 0, where=~_of(permitted, where))
            parts.append(terms.sum(1))
        return np.concatenate(parts)

    def _sigmoid_weights(self, tile: Tile, problem: Problem, weights: Any, permitted: Any, rows: Weights) -> None:
        """`w_i (-z) sigmoid(-z s)`, equation (4), in the place of the sigmoids."""
        self._flip(tile, problem, weights)
        weights *= rows.factor[:, None]
        if permitted is not None:
            np.copyto(weights, 0, where=~permitted)

    def _flip(self, tile: Tile, problem: Problem, values: Any) -> None:
        """Turn the sign of positives: from `s` to `-z s`, and from there to weights."""
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
        chosen = self._buffer("other", logits.shape)
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
        return _only(logits, permitted, 0, self._buffer("other", logits.shape)).sum(axis), counts

    def _seen(self, logits: Any, permitted: Any, where: slice, scratch: Any) -> Any:
        """A strip's allowed logits, -inf elsewhere."""
        return _only(logits[where], _of(permitted, where), -np.inf, scratch)

    def _strips(self, tile: Any) -> Iterator[tuple[slice, Any]]:
        """The rows of each strip of a tile, and scratch of its shape."""
        rows, columns = tile.shape
        step = max(1, STRIP // max(columns, 1))
        scratch = self._buffer("strip", (min(step, rows), columns))
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            yield slice(begin, end), scratch[: end - begin]

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Any:
        """Scratch, allocated once at the largest size seen."""
        size = math.prod(shape)
        held = self._scratch.get(name)
        if held is None or held.size < size:
            held = self._scratch[name] = np.empty(size, self.accumulator)
        return held[:size].reshape(shape)

    def _fresh(self, tile: Tile) -> Any:
        return np.empty(_shape(tile), self.accumulator)

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


def _shape(tile: Tile) -> tuple[int, int]:
    return len(tile.queries), len(tile.keys)


def _of(values: Any, where: slice) -> Any:
    """The strip's rows of what goes with a tile; a single row goes with them all, and None with any."""
    return values if values is None or len(values) == 1 else values[where]
