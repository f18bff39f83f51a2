"""The ring-and-tile schedule for eager backends, once, over the three verbs of `nibs.verbs`.

A backend supplies the verbs in its `tiles.py`; everything that is not a tile is a vector of n or m
numbers and is written here, once, over operators that NumPy, PyTorch and CuPy share.

How a call runs (the ring of one shifts nothing):

    hop      here                    posted before the tiles     after the tiles
    0        own keys                send keys on                send their column statistics on
    1        keys of rank - 1        send keys on                merge what came, send on
    W - 1    keys of rank + 1        -                           merge, send home

and the same once more for the gradient, whose accumulators travel as the statistics did. Sigmoid
needs one rotation: it has no lse to wait for. Formulas are those of `nibs.spec`; `nibs.plan` says
which sweep runs and why.

Requests come validated and capabilities asked, so nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from nibs.agreement import agree
from nibs.arrays import dtype_name
from nibs.pairs import Designated
from nibs.plan import Plan, by_columns
from nibs.request import Request
from nibs.ring import Ring, Solo
from nibs.spec import Gradients, InfoNCE, Stats
from nibs.travel import Keys, Trail, rotate
from nibs.verbs import Lse, Problem, Tile, Tiles, Weights, is_away, like

__all__ = ["Call"]

INFINITY = float("inf")


class Sink:
    """Where one side's gradient gathers, `[rows, d]`.

    Whole: one accumulator for the side, scaled and rounded when the pass is over. In strips: one
    strip's accumulator, rounded into the output as the strip closes; then the factor must be known.
    out: an array to be the output, wherever it lies.
    """

    def __init__(
        self, call: Call, rows: Any, mask: Any, *, strips: bool, product: bool, travels: bool = False, out: Any = None
    ) -> None:
        self.call, self.rows, self.mask, self.product = call, rows, mask, product
        self.strips, self.out = strips, out
        size, width = rows.shape
        if strips and out is None:
            tiles = call.tiles
            self.out = tiles.empty((size, width), call.request.dtype) if call.rounds else tiles.zeros(size, width)
        self.whole: Share | None = None  # what travels comes home, see `Call._visit_all`
        if not strips and not travels:
            self.whole = Share(call, rows, *accumulator(call, rows, size, covered=call.covers))
        self.strip: Any = None

    def at(self, where: slice) -> Any:
        """The accumulator rows for `where`."""
        if self.whole is not None:
            return self.whole.at(where)
        if self.strip is None:
            self.strip = self.call.tiles.zeros(where.stop - where.start, self.rows.shape[1])
        return self.strip

    def begins(self, where: slice) -> bool:
        """Whether the tile that asks is the first to add to these rows, which hold anything so far."""
        return self.whole is not None and self.whole.begins(where)

    def close(self, where: slice) -> None:
        """A strip is complete: scale, round, store."""
        if self.whole is not None:
            self.whole.close(where)
        else:
            self.out[where] = self._scaled(self.at(where), where)
            self.strip = None

    def finish(self) -> Any:
        """The gradient: in the accumulation dtype where the call holds it, else in the input's."""
        if self.whole is None:
            return self.out
        call, whole = self.call, self.whole.array
        out = self.out
        if out is None:
            out = call.tiles.empty(tuple(whole.shape), call.request.dtype) if call.rounds else whole
        here = like(self.rows, whole)
        for where in strips(self.rows.shape[0], call.plan.query_tile):
            part = self._scaled(here[where], where)
            if out is not whole:
                out[where] = part
        return out

    def _scaled(self, part: Any, where: slice) -> Any:
        """Count `<g k, q>` towards the scale's gradient, then apply the factor in place, unless the caller will."""
        call = self.call
        mask = None if self.mask is None else self.mask[where]
        if self.product:
            operand = call.tiles.operand(self.rows[where], mask)
            call.product = call.product + call.tiles.total((part * operand).sum(1))
        if not call.bare:
            part *= call.of_rows()
        if mask is not None:
            part[~mask] = 0  # absent rows stay exactly 0, also beside NaN
        return part


class Share:
    """A gradient `[rows, d]` that gathers for longer than a strip: over the ring, or over both loops.

    rows: whose gradient it is, or of the same kind. Where they lie away from the device, so does the
    array: then a strip gathers on the device, and is added to it as it closes. unset: the array holds anything yet, and
    the first tile of each strip overwrites it.
    """

    def __init__(self, call: Call, rows: Any, array: Any, unset: bool = False) -> None:
        self.call, self.rows, self.array, self.unset = call, rows, array, unset
        self.begun: set[int] = set()
        self.away = is_away(rows)
        self.strip: Any = None

    def at(self, where: slice) -> Any:
        if not self.away:
            return self.array[where]
        if self.strip is None:
            self.strip = self.call.tiles.zeros(where.stop - where.start, self.rows.shape[1])
        return self.strip

    def begins(self, where: slice) -> bool:
        if not self.unset or where.start in self.begun:
            return False
        self.begun.add(where.start)
        return True

    def close(self, where: slice) -> None:
        if self.away:
            self.rows.add(self.array, where, self.at(where))
            self.strip = None


def accumulator(call: Call, rows: Any, size: int, *, covered: bool = False) -> tuple[Any, bool]:
    """`[size, d]` in the accumulation dtype, where `rows` lie, and whether it holds anything: else zeros.

    covered: each of its rows is in some tile. Then tiles that can overwrite it need no zeros to add to.
    """
    unset = getattr(call.tiles, "unset", None)
    if is_away(rows):
        return rows.zeros(size), False
    if covered and unset is not None:
        return unset(size, rows.shape[1]), True
    return call.tiles.zeros(size, rows.shape[1]), False


def strips(size: int, step: int) -> list[slice]:
    """Slices of at most `step` rows that cover `size`."""
    return [slice(begin, min(begin + step, size)) for begin in range(0, size, step)]


class Call:
    """One call on one rank.

    `loss()` or `loss_and_grad()` runs it; after `loss()`, `gradient(upstream)` recomputes the tiles for
    the gradient. With `hold`, gradients stay in the accumulation dtype, for a caller that has an upstream
    factor to apply before they are rounded. With `bare`, too, those of queries and keys lack their factor, `of_rows()`,
    which that caller applies with the other in one pass; not for rows that stream.
    """

    def __init__(
        self,
        request: Request,
        tiles: Tiles,
        plan: Plan,
        ring: Ring | None = None,
        *,
        hold: bool = False,
        bare: bool = False,
    ) -> None:
        self.request, self.tiles, self.plan, self.bare = request, tiles, plan, bare
        self.fused = getattr(tiles, "fused", False)
        rounds_weights = self.fused or getattr(tiles, "rounds_weights", False)
        self.ring: Ring = ring if ring is not None else Solo()
        self.rounds_scalars = not hold
        self.rounds = not hold and tiles.rounds(request.dtype)
        self.early = self.ring.size == 1 and (self.rounds or request.streams)  # a strip leaves when it is complete
        objective = request.objective
        softmax = objective if isinstance(objective, InfoNCE) else None
        self.smoothing = softmax.label_smoothing if softmax else 0.0
        margin = softmax.false_negative_margin if softmax else None
        self.embeddings = request.wants("queries"), request.wants("keys")
        scale_alone = request.wants("scale") and not any(self.embeddings)
        self.covers = self.ring.size == 1 and request.n > 0 and request.m > 0
        self.scale, self.bias = tiles.scalar(request.scale), tiles.scalar(request.bias)
        self.shards = agree(self.ring, request, self.scale, self.bias, grad=plan.sweep != "forward")
        if self.shards.key_mask and request.key_mask is None:  # masks travel: all ranks have one, or none has
            request = self.request = replace(request, key_mask=tiles.indices(0, request.m) >= 0)
        if self.shards.weights and request.weights is None:
            request = self.request = replace(request, weights=tiles.zeros(request.n) + 1)
        self.problem = Problem(
            softmax=softmax is not None,
            rows=softmax.rows if softmax else True,
            columns=softmax.columns if softmax else False,
            scale=self.scale,
            fold=margin is None and not scale_alone and not rounds_weights,
            bias=None if softmax else self.bias,
            multi=objective.same_id == "positive",
            exclude=objective.same_id == "exclude",
            exclude_self=softmax is not None and softmax.exclude_self,
            margin=margin,
            sums=self.smoothing > 0 or request.stats,
            stats=request.stats,
            precision=request.precision,
            total_product=scale_alone or (rounds_weights and request.wants("scale")),
            total_weight=softmax is None and request.wants("bias"),
        )
        self.uncounted = replace(self.problem, total_product=False, total_weight=False)
        self.keys = Keys(request.keys, request.key_ids, request.key_mask)
        self.by_columns = by_columns(objective, queries=self.embeddings[0], keys=self.embeddings[1])
        self._held: dict[str, Any] = {}
        self._designate(margin)
        self._weigh_anchors()
        self.rows = self._statistics(request.n, queries=True)
        self.columns = self._statistics(request.m, queries=False)
        if self.problem.multi:
            self.row_count = self.rows.positive_count
            self.column_count, self.column_weight = self.columns.positive_count, self.columns.weight_sum
        self.product: Any = tiles.total(tiles.zeros(0))
        self.weight = self.product
        self.factor: Any = None
        self._of_rows: Any = None
        self.query_poison: Any = None
        self.column_ratio = tiles.scalar(1.0)
        self.upstream: Any = None
        whole = {"none": 1.0, "sum": 1.0, "mean": float(self.ring.size)}[request.grad_reduction]
        self.share_of_rows = whole
        self.share_of_scalars = 1.0 / self.ring.size if request.grad_reduction == "sum" else 1.0

    # -- what is known before any tile ------------------------------------------------------------

    def _designate(self, margin: float | None) -> None:
        """The designated positives, and the limits that a margin sets from their products."""
        request, tiles, xp = self.request, self.tiles, self.tiles.xp
        self.designated: Designated | None = None
        self.exact: Any = None
        self.query_limit: Any = None
        if not request.designated:
            return
        masks = request.query_mask, request.key_mask
        self.designated = Designated(tiles, request.targets, request.n, request.m, *masks)
        if margin is None:
            return
        self.exact = tiles.zeros(request.n)
        for where in strips(request.n if request.m else 0, self.plan.query_tile):
            mine = self._rows(request.queries, request.query_mask, where)
            index = self.designated.index(where)
            theirs = tiles.operand(request.keys[index], None if request.key_mask is None else request.key_mask[index])
            self.exact[where] = (mine * theirs).sum(1)
        valid = self.designated.valid()
        self.query_limit = xp.where(valid, self.exact + margin, tiles.scalar(INFINITY))
        largest = self.designated.to_keys(self.exact, "max")
        self.keys.limit = xp.where(largest == -INFINITY, tiles.scalar(INFINITY), largest + margin)

    def _weigh_anchors(self) -> None:
        """Anchor weights in units of their global mean, so that a gradient weight is of order 1."""
        request, tiles, xp = self.request, self.tiles, self.tiles.xp
        zero, one = tiles.scalar(0.0), tiles.scalar(1.0)
        ones = tiles.zeros(request.n) + one
        self.present = ones if request.query_mask is None else xp.where(request.query_mask, one, zero)
        self.anchor_weight, self.unit = self.present, one
        if request.weights is not None:
            weights = xp.where(self.present > 0, tiles.cast(request.weights), zero)
            total, count = self._sums(tiles.total(weights), tiles.total(self.present))
            some = total > 0
            self.unit = tiles.cast(xp.where(some, total / xp.where(some, count, 1.0), 1.0))
            self.anchor_weight = weights / self.unit
        # How many positives a row has, and a key. None: one each, for all are there, and the diagonal is the rule.
        self.row_count = self.column_count = None
        if self.designated is not None and not self.problem.multi:
            count, weight = ones, self.anchor_weight
            if self.designated.targets is not None:
                valid = self.designated.valid()
                count, weight = xp.where(valid, one, zero), xp.where(valid, weight, zero)
                self.row_count = count
            if self.designated.targets is not None or request.n < request.m:
                self.column_count = self.designated.to_keys(count)
            self.column_weight = self.designated.to_keys(weight)

    def _look_for_poison(self) -> None:
        """NaN for each present row that is not finite, else 0; an infinite key may hide behind exp(-inf).

        Once in a call; after the tiles where it can be, so that a device has work before the host gets to this.
        """
        if self.query_poison is not None:
            return
        request, tiles = self.request, self.tiles
        vectors = []
        for rows, mask in ((request.queries, request.query_mask), (request.keys, request.key_mask)):
            if self.fused:
                vectors.append(tiles.poison(rows, mask))  # type: ignore[attr-defined]
                continue
            poison = tiles.zeros(rows.shape[0])
            for where in strips(rows.shape[0], self.plan.query_tile):
                poison[where] = self._factor(rows, mask, where).sum(1)
            poison *= 0  # NaN where it was not finite
            if bool((poison != poison).any()):  # or was it only the sum that overflowed?
                for where in strips(rows.shape[0], self.plan.query_tile):
                    poison[where] = (self._factor(rows, mask, where) * 0).sum(1)
            vectors.append(poison)
        self.query_poison, self.key_poison = vectors
        scalars = 0 * self.scale + 0 * self.bias
        self.queries_poison, self.keys_poison = (
            tiles.cast(total) + scalars for total in self._sums(*(tiles.total(vector) for vector in vectors))
        )

    def _statistics(self, size: int, *, queries: bool) -> Lse:
        """Empty statistics with the fields that this call needs."""
        problem, tiles = self.problem, self.tiles
        anchors = problem.rows if queries else problem.columns
        lse = Lse()
        if anchors:
            lse.mass = tiles.zeros(size)
            if problem.softmax:
                lse.shift = tiles.zeros(size) + tiles.lowest
        if queries:
            lse.positive_sum = tiles.zeros(size)
        if problem.multi and (queries or anchors):
            lse.positive_count = tiles.zeros(size)
        if problem.multi and not queries and anchors:
            lse.positive_sum, lse.weight_sum = tiles.zeros(size), tiles.zeros(size)
        if problem.sums and (anchors or (queries and problem.stats)):
            lse.allowed_sum, lse.allowed_count = tiles.zeros(size), tiles.zeros(size)
        if queries and problem.stats:
            lse.positive_max = tiles.zeros(size) - INFINITY
            lse.negative_max = tiles.zeros(size) - INFINITY
        return lse

    # -- tiles ------------------------------------------------------------------------------------

    def _rows(self, rows: Any, mask: Any, where: slice) -> Any:
        return self.tiles.operand(rows[where], None if mask is None else mask[where])

    def _factor(self, rows: Any, mask: Any, where: slice) -> Any:
        """Rows as the verbs multiply them."""
        make = getattr(self.tiles, "factor", self.tiles.operand)
        return make(rows[where], None if mask is None else mask[where])

    def _tile(self, i: slice, keys: Keys, j: slice, home: bool) -> Tile:
        """The tile of query rows `i` and key rows `j`; the last operands are kept at hand."""
        request, held, problem = self.request, self._held, self.problem
        if held.get("i") != i:
            held.update(queries=None, scaled=None)  # the last operands go before the next ones come
            queries = self._factor(request.queries, request.query_mask, i)
            held.update(i=i, queries=queries, scaled=queries * self.scale if problem.fold else queries)
        if held.get("j") != j or held.get("of") is not keys:
            held.update(keys=None, of=None)  # a visitor that has gone leaves its room to the next
            held.update(j=j, of=keys, keys=self._factor(keys.rows, keys.mask, j))
        tile = Tile(held["queries"], held["scaled"], held["keys"], i.start, j.start, home)
        tile.query_mask = None if request.query_mask is None else request.query_mask[i]
        tile.key_mask = None if keys.mask is None else keys.mask[j]
        if keys.ids is not None:
            tile.query_ids, tile.key_ids = request.query_ids[i], keys.ids[j]
        if self.fused:
            return self._fused_tile(tile, i, keys, j, home)
        if home and problem.exclude_self:
            tile.row_index = self.tiles.indices(i.start, i.stop)
            tile.column_index = self.tiles.indices(j.start, j.stop)
        if home and self.designated is not None:
            tile.designated = self.designated.inside(i.start, i.stop - i.start, j.start, j.stop - j.start)
        if problem.margin is not None:
            tile.query_limit, tile.key_limit = self.query_limit[i], keys.limit[j]
            if tile.designated is not None:
                tile.exact = self.exact[i][tile.designated[0]]
        if problem.multi and problem.columns:
            tile.anchor_weights = self.anchor_weight[i]
        return tile

    def _fused_tile(self, tile: Tile, i: slice, keys: Keys, j: slice, home: bool) -> Tile:
        """The rest of a tile for fused kernels: vectors as they are, so that nothing waits for the device."""
        problem = self.problem
        if home and self.designated is not None:
            targets = self.designated.targets
            tile.targets, tile.diagonal = None if targets is None else targets[i], targets is None
        if problem.margin is not None:
            tile.query_limit, tile.key_limit = self.query_limit[i], keys.limit[j]
            tile.exact = self.exact[i] if home else None
        if not problem.softmax or (problem.multi and problem.columns):
            tile.anchor_weights = self.anchor_weight[i]
        return tile

    def _walk(
        self, m: int, *, by_columns: bool, key_tile: int | None = None
    ) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
        """Each outer strip with its tiles `(i, j)`. key_tile: other columns of a tile than the plan's."""
        rows, columns = strips(self.request.n, self.plan.query_tile), strips(m, key_tile or self.plan.key_tile)
        if by_columns:
            for j in columns:
                yield j, [(i, j) for i in rows]
        else:
            for i in rows:
                yield i, [(i, j) for j in columns]

    def _measure(self, tile: Tile, i: slice, j: slice, columns: Lse, *, keep: bool) -> Any:
        """One tile into the statistics; returns its kept logits."""
        row_part, column_part, kept = self.tiles.tile_lse(tile, self.problem, keep)
        self.tiles.merge_lse(self.rows.part(i), row_part)
        if self.problem.columns:
            self.tiles.merge_lse(columns.part(j), column_part)
        return kept

    def _lse_pass(self, kept: dict[tuple[int, int], Any] | None = None) -> None:
        """Rows' and columns' statistics from the same tiles; the columns' come home."""
        travels = self.ring.size > 1 and self.problem.columns
        trail = Trail(self.ring, self.shards.keys, self._new_statistics, self._clear_statistics, self._join_statistics)
        # Tiles that write no logits may be wider, where keys are read as they are.
        as_they_are = kept is None and self.request.key_mask is None and not self.by_columns
        wider = getattr(self.tiles, "lse_columns", None) if as_they_are else None
        wide = None if wider is None else wider(self.plan, self.problem)
        for keys, home in rotate(self.ring, self.shards.keys, self.keys, self._room):
            size = keys.rows.shape[0]
            columns = self._column_lse(trail.share()) if travels else self.columns
            for _, tiles in self._walk(size, by_columns=self.by_columns, key_tile=wide):
                for i, j in tiles:
                    found = self._measure(self._tile(i, keys, j, home), i, j, columns, keep=kept is not None)
                    if kept is not None:
                        kept[i.start, j.start] = found
            if travels:
                trail.hand_on()
        self._held.clear()  # else it keeps the last visitor's arrays
        if travels:
            self._adopt(trail.home())

    def _room(self, like: Any, rows: int) -> Any:
        """An empty array like another, but for its number of rows."""
        shape = (rows, *like.shape[1:])
        if hasattr(like, "new_empty"):
            return like.new_empty(shape)
        return self.tiles.xp.empty(shape, like.dtype)

    def _new_statistics(self, rows: int) -> list[Any]:
        return [array for array in self._statistics(rows, queries=False).arrays() if array is not None]

    def _column_lse(self, arrays: Sequence[Any]) -> Lse:
        return Lse(**dict(zip(self.columns.present(), arrays, strict=True)))

    def _clear_statistics(self, share: list[Any]) -> None:
        for array in share:
            array[...] = 0
        lse = self._column_lse(share)
        if lse.shift is not None:
            lse.shift[...] = self.tiles.lowest

    def _join_statistics(self, share: list[Any], arrived: tuple[Any, ...]) -> None:
        self.tiles.merge_lse(self._column_lse(share), self._column_lse(arrived))

    def _adopt(self, arrays: tuple[Any, ...]) -> None:
        """The columns' statistics, home again."""
        self.columns = self._column_lse(arrays)
        if self.problem.multi:
            self.column_count, self.column_weight = self.columns.positive_count, self.columns.weight_sum

    # -- the loss ---------------------------------------------------------------------------------

    def loss(self) -> Any:
        """The loss (or `[n]` values): one product, no gradient."""
        self._lse_pass()
        return self._close()

    def _close(self) -> Any:
        """Statistics to the loss, equation (1) or (3); also the factor that gradients wait for."""
        tiles, request, problem = self.tiles, self.request, self.problem
        self._look_for_poison()
        values, weights = self._anchors(queries=True) if problem.rows else (None, None)
        numerators = [tiles.total(values)] if problem.rows else []
        denominators = [tiles.total(weights)] if problem.rows else []
        if problem.columns:
            column_values, column_weights = self._anchors(queries=False)
            numerators.append(tiles.total(column_values))
            denominators.append(tiles.total(column_weights))
        sides = len(numerators)
        sums = self._sums(*numerators, *denominators)
        self.values = sums[:sides]
        self._settle(sums[sides:])
        if request.reduction == "none":
            each: list[Any] = []
            if problem.rows:
                each.append(values)
            if problem.columns and self.designated is not None:
                each.append(self.designated.of_keys(column_values, tiles.scalar(0.0)))
            return sum(each[1:], each[0]) * (self.unit / sides)
        if request.reduction == "sum":
            return tiles.cast(sum(self.values[1:], self.values[0]) / sides) * self.unit
        means = [self._quotient(*pair) for pair in zip(self.values, self.denominators, strict=True)]
        return tiles.cast(sum(means[1:], means[0]) / sides)

    def _anchors(self, *, queries: bool) -> tuple[Any, Any]:
        """Weighted values and weights of one side's anchors, 0 for the rest."""
        tiles, xp = self.tiles, self.tiles.xp
        zero, one = tiles.scalar(0.0), tiles.scalar(1.0)
        weights = self._anchor_weights(slice(None), queries=queries)
        counted = weights != 0
        own, others = (self.query_poison, self.keys_poison) if queries else (self.key_poison, self.queries_poison)
        lse = self.rows if queries else self.columns
        if not self.problem.softmax:
            value = lse.mass
        else:
            count = self.row_count if queries else self.column_count
            total = lse.positive_sum
            if total is None:  # columns of designated pairs: their rows' logits, seen from the other side
                total = self.designated.to_keys(self.rows.positive_sum)  # type: ignore[union-attr]
            mean = self._each(total, count)
            # lse - mean, in the order that keeps both the tiny and the huge: mass exp(shift - mean) >= 1 or so
            distance = lse.shift - mean
            near = xp.clip(distance, -60.0, 20.0)
            mass = xp.where(counted, lse.mass * xp.exp(near), one)
            value = xp.log(mass) + (distance - near)
            if self.smoothing:
                allowed = self._each(lse.allowed_sum, lse.allowed_count)
                value = value + self.smoothing * (mean - allowed)
            value = xp.maximum(value, zero)
        return xp.where(counted, weights * (value + own + others), zero), weights

    def _anchor_weights(self, where: slice, *, queries: bool) -> Any:
        """`[rows]`: weight of each anchor, 0 for a row that is none."""
        if not queries:
            return self._each(self.column_weight[where], self.column_count, where)  # the weight of none is 0
        weight = self.anchor_weight[where]
        if not self.problem.softmax or self.row_count is None:
            return weight
        return self.tiles.xp.where(self.row_count[where] > 0, weight, self.tiles.scalar(0.0))

    def _each(self, sums: Any, count: Any, where: slice = slice(None)) -> Any:
        """Means of sums over so many, 0 or more; None: over one. where: the rows that the sums are of."""
        return sums if count is None else sums / self.tiles.xp.maximum(count[where], self.tiles.scalar(1.0))

    def _quotient(self, value: Any, weight: Any) -> Any:
        """`value / weight`, 0-d, 0 where no weight is left."""
        tiles, some = self.tiles, weight > 0
        return tiles.xp.where(some, value / tiles.xp.where(some, weight, tiles.scalar(1.0)), tiles.scalar(0.0))

    def _settle(self, denominators: tuple[Any, ...]) -> None:
        """The factor that every gradient carries, and the columns' weight beside the rows'."""
        tiles = self.tiles
        self.denominators = denominators
        sides = len(denominators)
        self.column_ratio = tiles.scalar(1.0)
        if self.request.reduction == "mean":
            factor = tiles.cast(self._quotient(1.0 / sides, denominators[0]))
            if sides == 2:
                self.column_ratio = tiles.cast(self._quotient(*denominators))
        else:
            factor = self.unit / sides
        self.settled = self.factor = factor * (1 + self.queries_poison + self.keys_poison)

    # -- the gradient -----------------------------------------------------------------------------

    def loss_and_grad(self) -> tuple[Any, Gradients]:
        """The loss and its gradients, by the plan's sweep."""
        sweep = self.plan.sweep
        if sweep == "forward":  # wrt=()
            return self.loss(), Gradients()
        if sweep in ("strip", "single") or not self.problem.softmax:
            return self._at_once()
        kept: dict[tuple[int, int], Any] | None = {} if sweep == "keep" else None
        self._lse_pass(kept)
        loss = self._close()
        return loss, self._gradient_pass(kept)

    def state(self) -> tuple[list[Any], list[Any]]:
        """After `loss()`: the statistics of rows, each `[n]`, and of columns, each `[m]`, that `resume` takes."""
        rows, columns = ([array for array in lse.arrays() if array is not None] for lse in (self.rows, self.columns))
        return rows, columns

    def resume(self, rows: Sequence[Any], columns: Sequence[Any]) -> None:
        """Stand where another call of the same request stood after `loss()`, by what its `state` gave."""
        for lse, arrays in ((self.rows, rows), (self.columns, columns)):
            for name, array in zip(lse.present(), arrays, strict=True):
                getattr(lse, name)[...] = array
        self._close()

    def gradient(self, upstream: Any = None) -> Gradients:
        """After `loss()`: the gradients of `sum_i upstream_i value_i` (`[n]`, reduction "none"), or of
        `upstream * loss` (0-d), from recomputed tiles.
        """
        if upstream is not None:
            upstream = self.tiles.cast(upstream)
            if self.request.reduction == "none":
                self.upstream = upstream
            else:
                self.factor, self._of_rows = self.settled * upstream, None
        return self._gradient_pass(None)

    def of_rows(self) -> Any:
        """The factor of queries' and keys' gradients, 0-d, once the loss is known."""
        if self._of_rows is None:
            self._of_rows = self.factor * self.scale * self.share_of_rows
        return self._of_rows

    def _weights(self, where: slice, *, queries: bool) -> Weights:
        """Gradient weights of rows (columns) `where`, whose statistics are complete."""
        tiles, xp, problem = self.tiles, self.tiles.xp, self.problem
        zero, one = tiles.scalar(0.0), tiles.scalar(1.0)
        anchor = self._anchor_weights(where, queries=queries)
        if self.upstream is not None:
            mine = self.upstream
            if not queries:
                mine = self.designated.to_keys(self.upstream)  # type: ignore[union-attr]
            anchor = anchor * mine[where]
        if not problem.softmax:
            return Weights(anchor)
        if not queries:
            anchor = anchor * self.column_ratio
        lse = (self.rows if queries else self.columns).part(where)
        counted = anchor != 0
        mass = xp.where(counted, lse.mass, one)
        shift = xp.where(counted, lse.shift + xp.log(mass), tiles.scalar(INFINITY))
        mass = mass * xp.exp(xp.where(counted, lse.shift - shift, zero))
        target, smooth = anchor, None
        if self.smoothing:
            target, smooth = anchor * (1 - self.smoothing), self._each(anchor * self.smoothing, lse.allowed_count)
        target = self._each(target, self.row_count if queries else self.column_count, where)
        return Weights(anchor / mass, shift, target, smooth)

    def _sinks(self) -> tuple[Sink | None, Sink | None]:
        """A sink for each side that wants a gradient; only the outer side of one device can round early."""
        request = self.request
        out = request.out or {}
        early = self.early and self.factor is not None
        split = self.plan.sweep == "split"
        scale = request.wants("scale") and not self.problem.total_product
        queries = keys = None
        if self.embeddings[0]:
            outer = split or not self.by_columns
            mine = out.get("queries")
            queries = Sink(self, request.queries, request.query_mask, strips=early and outer, product=scale, out=mine)
        if self.embeddings[1]:
            outer = split or self.by_columns
            product = scale and queries is None
            travels = self.ring.size > 1
            keys = Sink(
                self,
                request.keys,
                request.key_mask,
                strips=early and outer,
                product=product,
                travels=travels,
                out=out.get("keys"),
            )
        return queries, keys

    def _gradient_pass(self, kept: dict[tuple[int, int], Any] | None) -> Gradients:
        """Tiles again, with every lse known."""
        whole = slice(None)
        rows = self._weights(whole, queries=True) if self.problem.rows else None
        columns = self._weights(whole, queries=False) if self.problem.columns else None
        sinks = self._sinks()
        mine = Keys(self.keys.rows, self.keys.ids, self.keys.mask, self.keys.limit, columns)

        def visit(keys: Keys, home: bool, share: Any) -> None:
            for walk, (into, onto, by_column) in enumerate(self._sides(sinks, share)):
                first = walk == 0  # a second walk over the same tiles counts nothing twice
                for outer, tiles in self._walk(keys.rows.shape[0], by_columns=by_column):
                    for i, j in tiles:
                        mine = None if rows is None else rows.part(i)
                        theirs = None if keys.weights is None else keys.weights.part(j)
                        found = None if kept is None else kept.pop((i.start, j.start))
                        tile = self._tile(i, keys, j, home)
                        self._gradient_tile(tile, mine, theirs, i, j, found, into, onto, count=first)
                        del tile, found  # a tile goes before the next one comes
                    self._close_strip(outer, into, onto, by_columns=by_column)

        self._visit_all(mine, sinks, visit)
        return self._gradients(sinks)

    def _at_once(self) -> tuple[Any, Gradients]:
        """Loss and gradient from one walk: a strip's lse is complete before its gradient starts, and the
        sigmoid waits for none.
        """
        problem, tiles = self.problem, self.tiles
        strip = self.plan.sweep == "strip"
        if self.early and not (problem.softmax and problem.multi):  # who is an anchor is known: so are the denominators
            self._look_for_poison()
            sides = [queries for queries, wanted in ((True, problem.rows), (False, problem.columns)) if wanted]
            weights = [tiles.total(self._anchor_weights(slice(None), queries=queries)) for queries in sides]
            self._settle(self._sums(*weights))
        sinks = self._sinks()

        def visit(keys: Keys, home: bool, share: Any) -> None:
            for walk, (into, onto, by_column) in enumerate(self._sides(sinks, share)):
                first = walk == 0  # a second walk over the same tiles counts nothing twice
                for outer, pairs in self._walk(keys.rows.shape[0], by_columns=by_column):
                    kept = []
                    for i, j in pairs:
                        tile = self._tile(i, keys, j, home)
                        found = self._measure(tile, i, j, self.columns, keep=True) if first else None
                        if strip:
                            kept.append(found)
                        else:
                            part = self._weights(i, queries=True)
                            self._gradient_tile(tile, part, None, i, j, found, into, onto, count=first)
                        del tile, found  # a tile goes before the next one comes
                    if strip:
                        weights = self._weights(outer, queries=not by_column)
                        rows, columns = (None, weights) if by_column else (weights, None)
                        for (i, j), found in zip(pairs, kept, strict=True):
                            self._gradient_tile(self._tile(i, keys, j, home), rows, columns, i, j, found, into, onto)
                    self._close_strip(outer, into, onto, by_columns=by_column)

        self._visit_all(self.keys, sinks, visit)
        loss = self._close()
        return loss, self._gradients(sinks)

    def _visit_all(
        self,
        mine: Keys,
        sinks: tuple[Sink | None, Sink | None],
        visit: Callable[[Keys, bool, Any], None],
    ) -> None:
        """Visit every shard of keys; their gradient gathers as they travel and comes home with them."""
        onto, sizes = sinks[1], self.shards.keys
        travels = self.ring.size > 1 and onto is not None
        trail = Trail(self.ring, sizes, lambda size: [accumulator(self, mine.rows, size)[0]], _clear_first, _add_first)
        for keys, home in rotate(self.ring, sizes, mine, self._room):
            visit(keys, home, trail.share()[0] if travels else None)
            if travels:
                trail.hand_on()
        self._held.clear()
        if travels and onto is not None:
            (array,) = trail.home()
            if not self.rounds and onto.out is None and max(sizes) > self.request.m:
                array = array + 0  # a copy: the largest shard's array shall not live on in a small gradient
            onto.whole = Share(self, mine.rows, array)

    def _sides(self, sinks: tuple[Sink | None, Sink | None], share: Any) -> list[tuple[Any, Any, bool]]:
        """The walks of one visit: where queries and keys gather, and whether the outer loop walks the keys."""
        into, onto = sinks
        target = onto if share is None else Share(self, self.keys.rows, share)
        if self.plan.sweep == "split":
            walks = [(into, None, False)] if into is not None else []
            return walks + ([(None, target, True)] if onto is not None else [])
        return [(into, None if onto is None else target, self.by_columns)]

    def _gradient_tile(
        self,
        tile: Tile,
        rows: Weights | None,
        columns: Weights | None,
        i: slice,
        j: slice,
        kept: Any,
        into: Any,
        onto: Any,
        *,
        count: bool = True,
    ) -> None:
        gather = None if into is None else into.at(i)
        spread = None if onto is None else onto.at(j)
        tile.begins = into is not None and into.begins(i), onto is not None and onto.begins(j)
        problem = self.problem if count else self.uncounted
        product, weight = self.tiles.tile_grad(tile, problem, rows, columns, kept, gather, spread)
        if product is not None:
            self.product = self.product + product
        if weight is not None:
            self.weight = self.weight + weight

    def _close_strip(self, outer: slice, into: Any, onto: Any, *, by_columns: bool) -> None:
        sink = onto if by_columns else into
        if sink is not None:
            sink.close(outer)

    def _gradients(self, sinks: tuple[Sink | None, Sink | None]) -> Gradients:
        """Scale, round and collect; scale and bias gradients are complete on every rank."""
        request, tiles = self.request, self.tiles
        queries, keys = (None if sink is None else sink.finish() for sink in sinks)
        scale = bias = None
        if request.wants("scale") or request.wants("bias"):
            totals = getattr(tiles, "totals", None)
            product, weight = self._sums(*((self.product, self.weight) if totals is None else totals()))
            if request.wants("scale"):
                scale = self._like(tiles.cast(product), request.scale)
            if request.wants("bias"):
                bias = self._like(tiles.cast(weight), request.bias)
        return Gradients(queries, keys, scale, bias)

    def _like(self, value: Any, given: Any) -> Any:
        """A scalar's gradient in the shape and dtype it came in (held: in the accumulation dtype)."""
        value = value * self.factor * self.share_of_scalars
        if not hasattr(given, "dtype"):
            return value
        out = self.tiles.empty((1,), dtype_name(given)) if self.rounds_scalars else self.tiles.zeros(1)
        out[0] = value
        return out.reshape(tuple(given.shape))

    def _sums(self, *values: Any) -> tuple[Any, ...]:
        """Sums over the ring, in one exchange."""
        if self.ring.size == 1:
            return values
        sums = tuple(self.ring.sum(self.tiles.xp.stack(list(values))))
        if not self.fused:
            self.ring.settle()  # the host looks into plain tiles, fetches and brings home: not behind a lost peer
        return sums

    # -- stats ------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """What the tiles showed, global; after the loss."""
        tiles, xp, problem = self.tiles, self.tiles.xp, self.problem
        zero, rows = tiles.scalar(0.0), self.rows
        sides = [(True, rows)] * problem.rows + [(False, self.columns)] * problem.columns
        counts, lses = [], []
        for queries, lse in sides:
            counted = self._anchor_weights(slice(None), queries=queries) != 0
            counts.append(tiles.total(xp.where(counted, tiles.scalar(1.0), zero)))
            seen_lse = xp.where(counted, self._lse_of(lse), zero) if problem.softmax else tiles.zeros(0)
            lses.append(tiles.total(seen_lse))
        count = self.present if self.row_count is None else self.row_count
        anchors = xp.where(count > 0, self.present, zero) if problem.softmax else self.present
        hits = xp.where(rows.positive_max > rows.negative_max, anchors, zero)
        vectors = (hits, anchors, rows.positive_sum, count, rows.allowed_sum, rows.allowed_count)
        totals = self._sums(*(tiles.total(vector) for vector in vectors), *counts, *lses)
        largest = tiles.zeros(self.ring.size)
        if self.request.n:
            largest[self.ring.rank] = xp.where(self.present > 0, rows.negative_max, tiles.scalar(-INFINITY)).max()
        else:
            largest[self.ring.rank] = -INFINITY
        largest = self.ring.sum(largest)
        self.ring.settle()  # from here on the host reads numbers
        top, of, positive, positives, total, pairs, *rest = (float(value) for value in totals)
        seen, sums = rest[: len(counts)], rest[len(counts) :]
        hardest = float(largest.max())
        poison = float(self.queries_poison + self.keys_poison)
        bias = float(self.bias) if problem.softmax else 0.0
        return Stats(
            count=round(seen[0]),
            top1=_ratio(top, of),
            mean_positive=_ratio(positive, positives) + bias + poison,
            mean_negative=_ratio(total - positive, pairs - positives) + bias + poison,
            mean_lse=sum(map(_ratio, sums, seen)) / len(seen) + bias + poison if problem.softmax else None,
            hardest_negative=hardest + bias + poison,
            query_lse=self._lse_of(rows) + self.bias if problem.softmax and problem.rows else None,
            key_lse=self._lse_of(self.columns) + self.bias if problem.softmax and problem.columns else None,
            plan=self.plan,
        )

    def _lse_of(self, lse: Lse) -> Any:
        xp, tiles = self.tiles.xp, self.tiles
        some = (lse.mass > 0) | (lse.mass != lse.mass)
        log = xp.log(xp.where(some, lse.mass, tiles.scalar(1.0)))
        return xp.where(some, lse.shift + log, tiles.scalar(-INFINITY))


def _clear_first(share: list[Any]) -> None:
    share[0][...] = 0


def _add_first(share: list[Any], arrived: tuple[Any, ...]) -> None:
    share[0] += arrived[0]


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
