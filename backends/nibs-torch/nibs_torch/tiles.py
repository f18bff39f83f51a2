"""The three verbs in plain PyTorch operations, for any torch device.

    tile          logits s [r, c] = scaled q [r, d] @ k^T [d, c]
    tile_lse      one maximum u and one exponential E = exp(s - u + HEAD) serve rows and columns alike:
                  row masses are E's row sums, column masses its column sums
    tile_grad     g = E' (rows) + E' (columns) - targets, then two products: g @ k and g^T @ q

Sharing the exponential is exact as long as no row or column sinks out of float32's range below the
maximum. Both verbs test for that (`LOW`, `SPREAD`) and redo the tile with each row's and each column's own
shift where it fails. The sigmoid's losses share logarithms, and are redone without where a product of theirs overflows.

Between its products a tile is bound by memory traffic, so what is done to its elements is done strip by
strip of rows, which stay in the cache from step to step, in place, with scratch strips made once per call.
Rows of bfloat16 stay what they are where a processor multiplies them (`nibs_torch.mkl`); their weights are rounded to
bfloat16 strip by strip, over logits that are done with and take twice the room.
Equations are those of `nibs.spec`; what a tile, its statistics and its weights hold is in `nibs.verbs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from nibs import pairs
from nibs.verbs import Lse, Problem, Tile, Weights
from nibs_torch import mkl
from nibs_torch.precision import of_rows, products

HEAD = 30.0  # exponentials are lifted by e^30, to lengthen the way down to the smallest float32
LOW = math.exp(HEAD - 80.0)  # a smaller row or column sum of lifted exponentials has lost terms that count
GROUP = 8  # factors 1 + E of softplus under one logarithm: in range up to a mean exponent of 11
SPREAD = 69.0  # natural-log width of a tile's lse values up to which one exponential serves all
INFINITY = float("inf")
STRIP = 1 << 18  # elements of a strip on a CPU: a megabyte of float32,
SHARE = 1 << 17  # or less, where a thread's share would not stay in its cache beside two scratch strips
DEVICE_STRIP = 1 << 24  # elsewhere launches cost more than cache misses

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TorchTiles:
    """The verbs for one accumulation dtype on one device, and the scratch that they reuse."""

    xp = torch

    def __init__(self, dtype: str, device: torch.device) -> None:
        self.accumulator = torch.float64 if dtype == "float64" else torch.float32
        self.wide = self.accumulator if device.type == "mps" else torch.float64
        self.device = device
        self.lowest = torch.finfo(self.accumulator).min
        self.rounds_weights = self._narrow = mkl.narrows(dtype, device.type)
        self._rows = dtype
        self._strip = min(STRIP, SHARE * torch.get_num_threads()) if device.type == "cpu" else DEVICE_STRIP
        self._scratch: dict[str, torch.Tensor] = {}
        self._spare: torch.Tensor | None = None
        self._captured: dict[float, torch.Tensor] = {}

    # -- the verbs --------------------------------------------------------------------------------

    def tile_lse(self, tile: Tile, problem: Problem, keep: bool) -> tuple[Lse, Lse, Any]:
        logits = self._products(tile, problem, keep=keep)
        row_parts, column_parts = [], []
        shared = problem.softmax and problem.rows and problem.columns and problem.margin is None
        for part, raw in self._parts(tile, logits):
            values, by_row, by_column = self._values(part, problem, raw)
            rows, columns = Lse(), Lse()
            if problem.multi or problem.stats:
                self._add_positives(part, problem, values, by_row, rows, columns)
            elif tile.designated is not None:
                rows.positive_sum = self.zeros(values.shape[0])
                if part.designated is not None:
                    rows.positive_sum[part.designated[0]] = values[part.designated]
            if problem.sums:
                rows.allowed_sum, rows.allowed_count = self._sums(values, by_row, 1)
                columns.allowed_sum, columns.allowed_count = self._sums(values, by_column, 0)
            if not problem.softmax:
                rows.mass = self._softplus(part, problem, values, by_row)
            elif shared:
                out = self._buffer("scratch", values.shape) if keep else values
                self._shared_masses(values, by_row, rows, columns, out)
            else:
                self._own_masses(
                    values, [(rows, 1, by_row)] * problem.rows + [(columns, 0, by_column)] * problem.columns
                )
            row_parts.append(rows)
            column_parts.append(columns)
        rows, columns = _joined(row_parts), self._merged(column_parts)
        if not problem.softmax and not bool(rows.mass.isfinite().all()):
            masses = []
            for part, raw in self._parts(tile, logits):
                values, by_row, _ = self._values(part, problem, raw, again=True)
                masses.append(self._own_softplus(part, problem, values, by_row))
            rows.mass = torch.cat(masses)
        if shared and not self._held(rows, columns):
            row_parts, column_parts = [], []
            logits = logits if keep else self._products(tile, problem, keep=False)  # they were overwritten
            for part, raw in self._parts(tile, logits):
                values, by_row, _ = self._values(part, problem, raw)
                row_parts.append(Lse())
                column_parts.append(Lse())
                self._own_masses(values, [(row_parts[-1], 1, by_row), (column_parts[-1], 0, by_row)])
            again, columns_again = _joined(row_parts), self._merged(column_parts)
            rows.mass, rows.shift = again.mass, again.shift
            columns.mass, columns.shift = columns_again.mass, columns_again.shift
        return rows, columns, logits if keep else None

    def merge_lse(self, into: Lse, part: Lse) -> None:
        if into.shift is not None:
            shift = torch.maximum(into.shift, part.shift)
            into.mass.mul_(torch.exp(into.shift - shift)).add_(part.mass * torch.exp(part.shift - shift))
            into.shift.copy_(shift)
        elif into.mass is not None:
            into.mass.add_(part.mass)
        for name in ADDED:
            share = getattr(part, name)
            if getattr(into, name) is not None and share is not None:
                getattr(into, name).add_(share)
        for name in LARGEST:
            if getattr(into, name) is not None:
                torch.maximum(getattr(into, name), getattr(part, name), out=getattr(into, name))

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
        logits = self._products(tile, problem, keep=False) if kept is None else kept
        written = self._for_weights(logits)
        middle, clamp = self._middle(problem, rows, columns)
        if middle is not None:
            rows, columns = (self._brought_to(middle, side) for side in (rows, columns))
        less = middle if isinstance(middle, torch.Tensor) else None
        even = not problem.softmax and bool((rows.factor == 1).all())
        product = self.total(self.zeros(0)) if problem.total_product else None
        weight = self.total(self.zeros(0)) if problem.total_weight else None
        for part, raw in self._parts(tile, logits):
            values, by_row, by_column = self._values(part, problem, raw, less=less, again=kept is not None)
            where = slice(part.row - tile.row, part.row - tile.row + values.shape[0])
            mine = None if rows is None else rows.part(where)
            if problem.softmax:
                sides = [each for each in ((mine, 1, by_row), (columns, 0, by_column)) if each[0] is not None]
                weights = self._softmax_weights(part, problem, values, sides, middle, clamp)
            else:
                weights = self._sigmoid_weights(part, problem, values, by_row, None if even else mine.factor)
            if weight is not None:
                weight = weight + self.total(weights.sum(1))
            if product is not None:
                product = product + self.total(raw.mul_(weights).sum(1))
            if weights is not raw and (into is not None or onto is not None):
                written[where].copy_(weights)
        if into is not None:
            self._multiply(written, tile.keys, problem, into)
        if onto is not None:
            self._multiply(written.T, tile.queries, problem, onto)
        if kept is not None:
            self._spare = kept
        return product, weight

    # -- InfoNCE ----------------------------------------------------------------------------------

    def _shared_masses(self, values: Any, permitted: Any, rows: Lse, columns: Lse, out: Any) -> None:
        """Masses of both sides, equation (1), by one exponential and one shift, the largest logit less `HEAD`.

        out: where the exponentials go; it may be `values`.
        """
        if permitted is not None:
            values = torch.where(permitted, values, self.scalar(-INFINITY), out=out)
        top = values.amax()
        shift = (top if permitted is None else torch.where(top == -INFINITY, 0.0, top)) - HEAD
        torch.sub(values, shift, out=out).exp_()
        for side, axis in ((rows, 1), (columns, 0)):
            side.mass, side.shift = out.sum(axis), shift.expand(out.shape[1 - axis])
            if permitted is not None:
                side.shift = side.shift.masked_fill(~permitted.any(axis), self.lowest)

    def _held(self, rows: Lse, columns: Lse) -> bool:
        """Whether one shift was enough: every row and column that has an allowed pair kept its terms."""
        kept = [(side.mass >= LOW) | (side.shift == self.lowest) for side in (rows, columns)]
        return bool(kept[0].all() & kept[1].all())

    def _own_masses(self, values: Any, sides: list[tuple[Lse, int, Any]]) -> None:
        """Masses of each side by its own shifts."""
        scratch = self._buffer("scratch", values.shape)
        for side, axis, permitted in sides:
            seen = values if permitted is None else torch.where(permitted, values, self.scalar(-INFINITY), out=scratch)
            highest = seen.amax(axis)
            empty = highest == -INFINITY
            side.shift = highest.masked_fill(empty, self.lowest)
            torch.sub(seen, highest.masked_fill(empty, 0.0).unsqueeze(axis), out=scratch)
            side.mass = scratch.exp_().sum(axis)

    def _middle(self, problem: Problem, rows: Weights | None, columns: Weights | None) -> tuple[Any, bool]:
        """The one shift that serves a whole tile's weights, or None; and whether logits may lie far above it.

        It is the number 0 where that is near enough: then nothing needs to be taken off the logits.
        """
        if not problem.softmax or problem.margin is not None:
            return None, False
        sides = [side.shift for side in (rows, columns) if side is not None]
        far = [side == INFINITY for side in sides]  # rows that are no anchors
        low = torch.stack([side.min() for side in sides]).min()
        low = torch.where(low == INFINITY, 0.0, low)
        high = torch.stack([torch.where(none, low, side).max() for none, side in zip(far, sides)]).max()
        # A pair of two that are no anchors is bounded by nobody's lse.
        clamp = torch.stack([none.any() for none in far]).all()
        near = torch.maximum(high, -low) <= SPREAD / 2
        fits, near, clamps = torch.stack([high - low <= SPREAD, near, clamp]).tolist()
        return (0.0 if near else (low + high) / 2 if fits else None), clamps

    def _brought_to(self, middle: Any, side: Weights | None) -> Weights | None:
        """Weights whose factor goes with exponentials that are shifted by `middle`."""
        return None if side is None else replace(side, factor=side.factor * torch.exp(middle - side.shift))

    def _softmax_weights(
        self, part: Tile, problem: Problem, values: Any, sides: list[Any], middle: Any, clamp: bool
    ) -> Any:
        """`g_ij` of equation (2), both directions summed; overwrites `values` where it may.

        With a middle, that is off the values already.
        """
        scratch = self._buffer("scratch", values.shape)
        permitted = sides[0][2]
        if middle is not None:
            weights = (values.clamp_(max=SPREAD) if clamp else values).exp_()
            factors = [side.factor.unsqueeze(axis) for side, axis, _ in sides]
            weights.mul_(factors[0] if len(factors) == 1 else torch.add(*factors, out=scratch))
        else:
            weights = scratch.zero_()
            other = self._buffer("other", values.shape)
            for side, axis, ok in sides:
                torch.sub(values, side.shift.unsqueeze(axis), out=other).exp_().mul_(side.factor.unsqueeze(axis))
                weights.add_(other if ok is None else other.masked_fill_(~ok, 0.0))
        for side, axis, ok in sides:
            if side.smooth is not None:
                smooth = side.smooth.unsqueeze(axis)
                weights.sub_(smooth if ok is None else smooth * ok)
        if permitted is not None and middle is not None:
            weights.masked_fill_(~permitted, 0.0)
        if problem.multi:
            found = pairs.positive(part, problem, pairs.allowed(part, problem))
            for side, axis, _ in sides:
                weights.sub_(side.target.unsqueeze(axis) * found)
        elif part.designated is not None:
            for side, axis, _ in sides:
                weights[part.designated] -= side.target[part.designated[0 if axis == 1 else 1]]
        return weights

    # -- Sigmoid ----------------------------------------------------------------------------------

    def _softplus(self, part: Tile, problem: Problem, values: Any, permitted: Any) -> Any:
        """Row sums of softplus(-z s) = log(1 + E), E = exp(-z s), equation (3)."""
        terms = self._signed(part, problem, values).exp_()
        return logarithms(terms if permitted is None else terms.masked_fill_(~permitted, 0.0))

    def _own_softplus(self, part: Tile, problem: Problem, values: Any, permitted: Any) -> Any:
        """The same by a logarithm for each pair, which no logit is too large for."""
        terms = self._signed(part, problem, values)
        torch.ops.aten.softplus.out(terms, 1, 40, out=terms)  # above 40 it is the identity, in float64 too
        return (terms if permitted is None else terms.masked_fill_(~permitted, 0.0)).sum(1)

    def _sigmoid_weights(self, part: Tile, problem: Problem, values: Any, permitted: Any, factor: Any) -> Any:
        """`w_i (-z) sigmoid(-z s)`, equation (4); overwrites `values`. factor: None where each `w_i` is 1."""
        weights = self._flipped(part, problem, self._flipped(part, problem, values).sigmoid_())
        if factor is not None:
            weights.mul_(factor.unsqueeze(1))
        return weights if permitted is None else weights.masked_fill_(~permitted, 0.0)

    def _signed(self, part: Tile, problem: Problem, values: Any) -> Any:
        """`-z s`: a copy of the logits, positives' sign turned."""
        return self._flipped(part, problem, self._buffer("scratch", values.shape).copy_(values))

    def _flipped(self, part: Tile, problem: Problem, values: Any) -> Any:
        """The same values, positives' sign turned in place."""
        if problem.multi:
            found = pairs.positive(part, problem, None)
            values.copy_(torch.where(found, -values, values))
        elif part.designated is not None:
            values[part.designated] *= -1
        return values

    # -- tiles and pairs --------------------------------------------------------------------------

    def _products(self, tile: Tile, problem: Problem, *, keep: bool) -> Any:
        """`[r, c]`: products, times the scale where it is folded in."""
        shape = (tile.queries.shape[0], tile.keys.shape[0])
        out = self._fresh(shape) if keep else self._buffer("tile", shape)
        self._multiply(tile.scaled, tile.keys.T, problem, out, beta=0.0)
        if tile.exact is not None and tile.designated is not None:
            out[tile.designated] = tile.exact
        return out

    def _multiply(self, left: Any, right: Any, problem: Problem, out: Any, *, beta: float = 1.0) -> None:
        """`out = beta out + left @ right`: every product of a tile."""
        if self._narrow:
            mkl.product(left, right, out, beta=beta)
            return
        flops = 2 * left.numel() * right.shape[1]
        with products(of_rows(self._rows, problem.precision), self.accumulator, self.device, flops):
            torch.addmm(out, left, right, beta=beta, out=out)

    def _for_weights(self, logits: Any) -> Any:
        """`[r, c]`: where weights go that are made of these logits, strip by strip, to be multiplied."""
        if not self._narrow:
            return logits
        # Half as wide, they reach into strips that are done with, and never into those that come.
        return logits.view(torch.bfloat16).flatten()[: logits.numel()].view(logits.shape)

    def _parts(self, tile: Tile, logits: Any) -> Iterator[tuple[Tile, Any]]:
        """The tile in strips of rows, each a tile of its own, with its rows of `logits`."""
        size, width = logits.shape
        step = max(1, self._strip // max(width, 1))
        if step >= size:
            yield tile, logits
            return
        begins = range(0, size, step)
        held = [0] * (len(begins) + 1)
        if tile.designated is not None:
            edges = torch.arange(0, size + step, step, device=self.device)
            held = torch.searchsorted(tile.designated[0], edges).tolist()
        for number, begin in enumerate(begins):
            end = min(begin + step, size)
            first, last = held[number], held[number + 1]
            part = replace(tile, row=tile.row + begin, designated=None, exact=None)
            for name in BY_ROW:
                value = getattr(tile, name)
                if value is not None:
                    setattr(part, name, value[begin:end])
            if tile.designated is not None and last > first:
                part.designated = tile.designated[0][first:last] - begin, tile.designated[1][first:last]
            yield part, logits[begin:end]

    def _values(
        self, part: Tile, problem: Problem, strip: Any, *, less: Any = None, again: bool = False
    ) -> tuple[Any, Any, Any]:
        """Logits of a strip, and the pairs allowed to its rows and to its columns: one object but for a margin.

        Folded logits are finished in place, once: not `again`. Raw products stay, beside the logits.
        less: what is taken off the logits.
        """
        permitted = pairs.allowed(part, problem)
        by_row = by_column = permitted
        if problem.margin is not None:
            by_row = pairs.within_margin(part, strip, part.query_limit[:, None], permitted)
            by_column = pairs.within_margin(part, strip, part.key_limit[None, :], permitted)
        if not problem.fold:  # then `again` finds the products as they were
            out = self._buffer("logits", strip.shape)
            if problem.bias is not None:
                return torch.add(problem.bias, strip, alpha=problem.scale.item(), out=out), by_row, by_column
            strip = torch.mul(strip, problem.scale, out=out)  # rounded, as the lse saw it, before anything is taken off
        if less is not None:
            strip.sub_(less)
        elif problem.bias is not None and not again:
            strip.add_(problem.bias)
        return strip, by_row, by_column

    def _add_positives(self, part: Tile, problem: Problem, values: Any, by_row: Any, rows: Lse, columns: Lse) -> None:
        """Sums, counts and maxima over positives and negatives, where they can be anywhere."""
        if problem.multi:
            found = pairs.positive(part, problem, by_row)
        else:
            found = torch.zeros(values.shape, dtype=torch.bool, device=self.device)
            if part.designated is not None:
                found[part.designated] = True
        scratch = self._buffer("scratch", values.shape)
        positives = torch.where(found, values, self.scalar(0.0), out=scratch)
        rows.positive_sum, columns.positive_sum = positives.sum(1), positives.sum(0)
        if problem.multi:
            rows.positive_count, columns.positive_count = self.cast(found.sum(1)), self.cast(found.sum(0))
            if part.anchor_weights is not None:
                columns.weight_sum = torch.where(
                    found, part.anchor_weights.unsqueeze(1), self.scalar(0.0), out=scratch
                ).sum(0)
        if problem.stats:
            negative = ~found if by_row is None else ~found & by_row
            rows.positive_max = torch.where(found, values, self.scalar(-INFINITY), out=scratch).amax(1)
            rows.negative_max = torch.where(negative, values, self.scalar(-INFINITY), out=scratch).amax(1)

    def _sums(self, values: Any, permitted: Any, axis: int) -> tuple[Any, Any]:
        """Sums and counts of the allowed logits of each row (axis 1) or column (axis 0)."""
        if permitted is None:
            total = values.sum(axis)
            return total, torch.full_like(total, values.shape[axis])
        counts = self.cast(permitted.expand(values.shape).sum(axis))
        return torch.where(permitted, values, self.scalar(0.0), out=self._buffer("scratch", values.shape)).sum(
            axis
        ), counts

    def _merged(self, parts: list[Lse]) -> Lse:
        """Column statistics of a tile from those of its strips."""
        if len(parts) == 1:
            return parts[0]
        out = Lse()
        if parts[0].shift is not None:
            shifts = torch.stack([part.shift for part in parts])
            out.shift = shifts.amax(0)
            out.mass = torch.stack([part.mass for part in parts]).mul_(torch.exp(shifts - out.shift)).sum(0)
        for name in ADDED:
            if getattr(parts[0], name) is not None:
                setattr(out, name, torch.stack([getattr(part, name) for part in parts]).sum(0))
        return out

    def _fresh(self, shape: tuple[int, int]) -> torch.Tensor:
        """A tile to keep: the one that was used up last, if it fits, for new memory is slow to touch."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.shape == shape:
            return spare
        return torch.empty(shape, dtype=self.accumulator, device=self.device)

    def _buffer(self, name: str, shape: Any) -> torch.Tensor:
        """Scratch `[r, c]`, allocated once at the largest size seen."""
        size = shape[0] * shape[1]
        held = self._scratch.get(name)
        if held is None or held.numel() < size:
            held = self._scratch[name] = torch.empty(size, dtype=self.accumulator, device=self.device)
        return held[:size].view(shape)

    # -- array words for the schedule -------------------------------------------------------------

    def operand(self, rows: Any, mask: Any) -> Any:
        if mask is not None:
            rows = rows.masked_fill(~mask.unsqueeze(1), 0.0)
        return rows.to(self.accumulator)

    def factor(self, rows: Any, mask: Any) -> Any:
        """`[r, d]` rows as products take them."""
        if not self._narrow:
            return self.operand(rows, mask)
        rows = rows.to(torch.bfloat16)
        return rows if mask is None else rows.masked_fill(~mask.unsqueeze(1), 0.0)

    def rounds(self, dtype: str) -> bool:
        return DTYPES[dtype] != self.accumulator

    def zeros(self, *shape: int) -> Any:
        return torch.zeros(shape, dtype=self.accumulator, device=self.device)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return torch.empty(shape, dtype=DTYPES[dtype], device=self.device)

    def cast(self, values: Any) -> Any:
        return values.to(self.accumulator)

    def scalar(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().to(self.device, self.accumulator).reshape(())
        value = float(value)
        if not capturing(self.device):
            return _constant(value, self.accumulator, self.device)
        # Its memory is the graph's own, and filled when the graph runs: for this call, and no others.
        found = self._captured.get(value)
        if found is None:
            found = self._captured[value] = _constant.__wrapped__(value, self.accumulator, self.device)
        return found

    def total(self, values: Any) -> Any:
        return values.sum(dtype=self.wide)

    def indices(self, begin: int, end: int) -> Any:
        return torch.arange(begin, end, device=self.device)

    def scatter(self, values: Any, index: Any, length: int, how: str) -> Any:
        if how == "max":
            out = torch.full((length,), -INFINITY, dtype=values.dtype, device=self.device)
            return out.scatter_reduce_(0, index, values, "amax")
        out = torch.zeros(length, dtype=values.dtype, device=self.device)
        return out.index_put_((index,), values, accumulate=True)


@lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A 0-d constant; the schedule asks for the same few in every call, and writes to none."""
    with torch.inference_mode(False):  # made under inference mode it could not be used outside it
        return torch.full((), value, dtype=dtype, device=device)  # `torch.tensor` would copy, and wait for the copy


def logarithms(terms: torch.Tensor) -> torch.Tensor:
    """Row sums of log(1 + E) of `terms`, which hold E and are overwritten: one logarithm for `GROUP` factors.

    Factors are multiplied as `(1 + a) (1 + b) - 1 = a + b + a b`, which keeps the digits of the smallest E: three
    roundings a time, of positive numbers, so at most 9 half eps of each sum's value. A product beyond the largest
    float is infinite, and so is the sum.
    """
    width = terms.shape[1]
    for _ in range(GROUP.bit_length() - 1):
        half = width // 2
        width -= half
        ones, others = terms[:, :half], terms[:, width : width + half]
        ones.addcmul_(ones, others).add_(others)
    return terms[:, :width].log1p_().sum(1)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


ADDED = ("positive_sum", "positive_count", "allowed_sum", "allowed_count", "weight_sum")
LARGEST = ("positive_max", "negative_max")
BY_ROW = ("query_ids", "query_mask", "row_index", "query_limit", "anchor_weights")


def _joined(parts: list[Lse]) -> Lse:
    """Row statistics of a tile from those of its strips."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(part.arrays() for part in parts), strict=True)
    return Lse(*(None if values[0] is None else torch.cat(values) for values in columns))
