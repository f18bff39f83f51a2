"""The ring-and-tile schedule, traced: what `nibs.schedule` does eagerly, as loops that XLA compiles once.

    outer loop over tiles of one side          lax.scan, so the program's size does not grow with the batch
        inner loop over tiles of the other     lax.scan
    hops of the ring                           the first (home) and the last traced apart, lax.scan between

The last tile of a side begins early enough to be whole, and masks the rows that it shares with the tile
before it: nothing is padded, copied or divided. Those rows are computed twice, so tiles are as planned or
smaller, such that they share few. A single tile runs without any loop.

How a call runs, step by step, is the table in `nibs.schedule`; which sweep, `nibs.plan`. The formulas are
those of `nibs.spec`. Requests come validated. Values cannot be looked at in a trace, so a bad row (a target
out of range, a negative weight) becomes NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nibs.plan import Plan, by_columns
from nibs.request import Request
from nibs.spec import Gradients, InfoNCE, Stats
from nibs_jax.ring import Ring, varies, vary
from nibs_jax.tiles import Lse, Rules, Tile, Weights, merge_lse, products, tile_grad, tile_lse, where_rows

__all__ = ["Call", "Inputs"]

GRAIN = 16  # tiles are multiples of so many rows, which processors multiply best


class Inputs(NamedTuple):
    """The arrays of a request; None where there is none. scale and bias are of the accumulation dtype, 0-d."""

    queries: Any
    keys: Any
    scale: Any
    bias: Any
    targets: Any = None
    query_ids: Any = None
    key_ids: Any = None
    query_mask: Any = None
    key_mask: Any = None
    weights: Any = None


class Keys(NamedTuple):
    """A shard of keys on its way round the ring, with what belongs to it."""

    rows: Any
    ids: Any = None
    mask: Any = None
    limit: Any = None
    weights: Weights | None = None


class Place(NamedTuple):
    """Where a tile lies along one side. begin: its nominal start; start: where it is read from, never past the
    end; fresh `[size]`: rows that are this tile's own, None for all.
    """

    begin: Any
    start: Any
    size: int
    fresh: Any


class Found(NamedTuple):
    """What a walk gathers."""

    rows: Lse
    columns: Lse
    queries: Any
    keys: Any
    product: Any
    weight: Any


def even(step: int, length: int) -> int:
    """Rows of a tile: at most `step`, cut so that as many tiles as that makes share few of the `length` rows."""
    whole = -(-length // -(-length // step))
    return min(step, -(-whole // GRAIN) * GRAIN, length)


def place(index: Any, step: int, length: int) -> Place:
    """The tile `index` of `length` rows cut into tiles of `step` (which is at most `length`)."""
    if step == length:
        return Place(0, 0, step, None)
    begin = index * step
    if length % step == 0:
        return Place(begin, begin, step, None)
    start = jnp.minimum(begin, length - step)
    return Place(begin, start, step, start + jnp.arange(step, dtype=jnp.int32) >= begin)


def cut(array: Any, where: Place) -> Any:
    """The rows of a tile."""
    if array is None or array.shape[0] == where.size:
        return array
    return lax.dynamic_slice_in_dim(array, where.start, where.size)


def put(array: Any, part: Any, where: Place) -> Any:
    """The array with the rows of a tile replaced."""
    if array.shape[0] == where.size:
        return part
    return lax.dynamic_update_slice_in_dim(array, part, where.start, 0)


def parts(tree: Any, where: Place) -> Any:
    return jax.tree.map(lambda array: cut(array, where), tree)


def loop(length: int, body: Any, carry: Any) -> Any:
    """`carry = body(carry, index)` for each index, compiled once; no loop at all for one turn."""
    if length == 0:
        return carry
    if length == 1:
        return body(carry, 0)
    return lax.scan(lambda state, index: (body(state, index), None), carry, jnp.arange(length, dtype=jnp.int32))[0]


def totals(*vectors: Any) -> Any:
    """`[k]`: the sum of each vector. Stacked into one: a sum of its own is what takes longest to compile."""
    width = max(vector.shape[0] for vector in vectors)
    return jnp.stack([jnp.pad(vector, (0, width - vector.shape[0])) for vector in vectors]).sum(1)


class Call:
    """One call on one rank, while it is traced. `request` has no arrays: they are in `inputs`.

    hold: gradients stay in the accumulation dtype, for a caller that has an upstream factor to apply.
    """

    def __init__(self, request: Request, inputs: Inputs, plan: Plan, ring: Ring, *, hold: bool = False) -> None:
        self.request, self.plan, self.ring, self.hold = request, plan, ring, hold
        self.over = frozenset().union(*(varies(leaf) for leaf in jax.tree.leaves(inputs)))
        self.inputs = inputs = vary(self.over, inputs)
        self.accumulator = jnp.dtype(jnp.float64 if request.dtype == "float64" else jnp.float32)
        self.out_dtype = self.accumulator if hold else jnp.dtype(request.dtype)
        objective = request.objective
        softmax = objective if isinstance(objective, InfoNCE) else None
        self.smoothing = softmax.label_smoothing if softmax else 0.0
        margin = softmax.false_negative_margin if softmax else None
        self.wanted = request.wants("queries"), request.wants("keys")
        self.scale, self.bias = inputs.scale, inputs.bias
        rounded = request.dtype == "bfloat16"
        self.rules = Rules(
            softmax=softmax is not None,
            rows=softmax.rows if softmax else True,
            columns=softmax.columns if softmax else False,
            multi=objective.same_id == "positive",
            exclude=objective.same_id == "exclude",
            exclude_self=softmax is not None and softmax.exclude_self,
            margin=margin is not None,
            sums=self.smoothing > 0 or request.stats,
            stats=request.stats,
            precision=request.precision,
            rounded=rounded,
            total_product=request.wants("scale") and (rounded or not any(self.wanted)),
            total_weight=softmax is None and request.wants("bias"),
        )
        self.by_columns = self._outer()
        n, m = request.n, request.m
        self.steps = even(plan.query_tile, max(1, n)), even(plan.key_tile, max(1, m))
        self.counts = (-(-n // self.steps[0]), -(-m // self.steps[1])) if n and m else (0, 0)
        self.tile_columns = vary(self.over, jnp.arange(self.steps[1], dtype=jnp.int32))  # before any loop: see Tile
        self._look_for_poison()
        self.keys = Keys(inputs.keys, inputs.key_ids, inputs.key_mask)
        self._designate(margin)
        self._weigh_anchors()
        self.rows: Lse = self._statistics(queries=True)
        self.columns: Lse = self._statistics(queries=False)
        if self.rules.multi:
            self.row_count, self.column_count, self.column_weight = self.rows.positive_count, None, None
        self.factor: Any = None
        self.upstream: Any = None

    def _outer(self) -> bool:
        """Whether the outer loop walks the keys, whose gradient then gathers turned, which is faster (`tile_grad`).

        As planned where the plan has a say: a strip is kept, or is rounded as it closes.
        """
        free = self.rules.softmax and self.plan.sweep in ("keep", "recompute") and self.out_dtype == self.accumulator
        planned = by_columns(self.request.objective, queries=self.wanted[0], keys=self.wanted[1])
        return planned or (free and self.wanted[1])

    # -- what is known before any tile ------------------------------------------------------------------

    def _zeros(self, *shape: int, fill: float = 0.0, dtype: Any = None) -> Any:
        return vary(self.over, jnp.full(shape, fill, dtype or self.accumulator))

    def _look_for_poison(self) -> None:
        """NaN for each present row that is not finite, else 0: an infinite key may hide behind exp(-inf)."""
        inputs = self.inputs
        poisons = []
        for rows, mask in ((inputs.queries, inputs.query_mask), (inputs.keys, inputs.key_mask)):
            poisons.append((where_rows(mask, rows).astype(self.accumulator) * 0).sum(1))
        self.query_poison, self.key_poison = poisons

    def _designate(self, margin: float | None) -> None:
        """The designated positives (-1 for none), and the limits that a margin sets from their products."""
        request, inputs = self.request, self.inputs
        n, m = request.n, request.m
        self.diagonal = inputs.targets is None
        self.designates = request.designated
        self.targets = self.valid = self.exact = self.query_limit = None
        if not self.designates:
            return
        index = vary(self.over, jnp.arange(n, dtype=jnp.int32))
        if self.diagonal:
            targets = index
            valid = jnp.broadcast_to(targets < m, (n,))
        else:
            given = inputs.targets
            valid = (given >= 0) & (given < m)
            targets = jnp.where(valid, given, 0).astype(jnp.int32)
            wrong = ~valid & (given != -1)
            if self.rules.exclude_self:
                wrong = wrong | (valid & (targets == index))
            if inputs.query_mask is not None:
                wrong = wrong & inputs.query_mask
            self.query_poison = jnp.where(wrong, jnp.nan, self.query_poison)
        if inputs.query_mask is not None:
            valid = valid & inputs.query_mask
        if inputs.key_mask is not None and m:
            valid = valid & (inputs.key_mask[:n] if self.diagonal else inputs.key_mask[targets])
        self.valid, self.targets = valid, jnp.where(valid, targets, -1)
        if margin is None:
            return
        self.exact = self._exact_products()
        self.query_limit = jnp.where(valid, self.exact + margin, jnp.inf)
        largest = self._to_keys(self.exact, "max")
        self.keys = self.keys._replace(limit=jnp.where(largest == -jnp.inf, jnp.inf, largest + margin))

    def _exact_products(self) -> Any:
        """`[n]`: `<q_i, k_targets[i]>`, computed once, for the threshold and for the tile that holds the pair."""
        inputs, step, n = self.inputs, self.steps[0], self.request.n
        if not (n and self.request.m):
            return self._zeros(n)

        def body(exact: Any, index: Any) -> Any:
            where = place(index, step, n)
            there = jnp.maximum(cut(self.targets, where), 0)
            mine = where_rows(cut(inputs.query_mask, where), cut(inputs.queries, where)).astype(self.accumulator)
            theirs = where_rows(None if inputs.key_mask is None else inputs.key_mask[there], inputs.keys[there])
            return put(exact, (mine * theirs.astype(self.accumulator)).sum(1), where)

        return loop(-(-n // step), body, self._zeros(n))

    def _to_keys(self, values: Any, how: str = "sum") -> Any:
        """`[m]`: row values summed (or maximised) over the rows that designate each key."""
        m, empty = self.request.m, 0.0 if how == "sum" else -jnp.inf
        if self.diagonal:
            short = m - values.shape[0]
            return jnp.concatenate([jnp.where(self.valid, values, empty), self._zeros(short, fill=empty)])
        index = jnp.where(self.valid, self.targets, m)
        into = self._zeros(m, fill=empty).at[index]
        return into.add(values, mode="drop") if how == "sum" else into.max(values, mode="drop")

    def _of_keys(self, values: Any) -> Any:
        """`[n]`: the value of each row's key, 0 where it has none."""
        if not self.request.m:
            return self._zeros(self.request.n)
        found = values[: self.request.n] if self.diagonal else values[jnp.maximum(self.targets, 0)]
        return jnp.where(self.valid, found, 0)

    def _weigh_anchors(self) -> None:
        """Anchor weights in units of their global mean, so that a gradient weight is of order 1."""
        inputs, n = self.inputs, self.request.n
        ones = self._zeros(n, fill=1.0)
        self.present = ones if inputs.query_mask is None else jnp.where(inputs.query_mask, ones, 0)
        self.anchor_weight, self.unit = self.present, self._zeros(fill=1.0)
        if inputs.weights is not None:
            given = inputs.weights.astype(self.accumulator)
            right = (given >= 0) & (given < jnp.inf)
            self.query_poison = jnp.where((self.present > 0) & ~right, jnp.nan, self.query_poison)
            weights = jnp.where(self.present > 0, jnp.where(right, given, 1), 0)
            weight, count = self._sums(weights, self.present)
            self.unit = jnp.where(weight > 0, weight / jnp.where(weight > 0, count, 1), 1)
            self.anchor_weight = weights / self.unit
        if self.designates and not self.rules.multi:
            self.row_count = jnp.where(self.valid, ones, 0)
            self.column_count = self._to_keys(self.row_count)
            self.column_weight = self._to_keys(jnp.where(self.valid, self.anchor_weight, 0))
        scalars = 0 * self.scale + 0 * self.bias
        poisons = self._sums(self.query_poison, self.key_poison)
        self.queries_poison, self.keys_poison = (poison + scalars for poison in poisons)

    def _statistics(self, *, queries: bool) -> Lse:
        """Empty statistics with the fields that this call needs."""
        rules = self.rules
        size = self.request.n if queries else self.request.m
        anchors = rules.rows if queries else rules.columns
        found: dict[str, Any] = {}
        if anchors:
            found["mass"] = self._zeros(size)
            if rules.softmax:
                found["shift"] = self._zeros(size, fill=float(jnp.finfo(self.accumulator).min))
        if queries:
            found["positive_sum"] = self._zeros(size)
        if rules.multi and (queries or anchors):
            found["positive_count"] = self._zeros(size)
        if rules.multi and not queries and anchors:
            found["positive_sum"], found["weight_sum"] = self._zeros(size), self._zeros(size)
        if rules.sums and (anchors or (queries and rules.stats)):
            found["allowed_sum"], found["allowed_count"] = self._zeros(size), self._zeros(size)
        if queries and rules.stats:
            found["positive_max"] = self._zeros(size, fill=-jnp.inf)
            found["negative_max"] = self._zeros(size, fill=-jnp.inf)
        return Lse(**found)

    # -- tiles ------------------------------------------------------------------------------------------

    def _tile(self, i: Place, j: Place, keys: Keys, home: bool) -> Tile:
        """The tile of query rows `i` and key rows `j`."""
        inputs, rules = self.inputs, self.rules
        query_mask, key_mask = cut(inputs.query_mask, i), cut(keys.mask, j)
        rows = where_rows(query_mask, cut(inputs.queries, i)), where_rows(key_mask, cut(keys.rows, j))
        tile = Tile(*rows, self.tile_columns)
        facts: dict[str, Any] = {
            "query_mask": _and(query_mask, i.fresh),
            "key_mask": _and(key_mask, j.fresh),
        }
        if keys.ids is not None:
            facts.update(query_ids=cut(inputs.query_ids, i), key_ids=cut(keys.ids, j))
        if home and rules.exclude_self:
            facts["self_index"] = i.start + jnp.arange(i.size, dtype=jnp.int32) - j.start
        if home and self.targets is not None:
            targets = cut(self.targets, i)
            here = _and(targets >= j.begin, i.fresh)
            facts["targets"] = jnp.where(here, targets - j.start, -1)
        if rules.margin:
            facts.update(exact=cut(self.exact, i), query_limit=cut(self.query_limit, i), key_limit=cut(keys.limit, j))
        if rules.multi and rules.columns:
            facts["anchor_weights"] = cut(self.anchor_weight, i)
        return tile._replace(**facts)

    def _measure(self, tile: Tile, raw: Any, i: Place, j: Place, rows: Lse, columns: Lse) -> tuple[Lse, Lse]:
        """One tile into the statistics."""
        bias = None if self.rules.softmax else self.bias
        row_part, column_part = tile_lse(tile, self.rules, raw, self.scale, bias)
        rows = _merge_at(rows, row_part, i)
        return rows, _merge_at(columns, column_part, j) if self.rules.columns else columns

    def _places(self, i: Any, j: Any) -> tuple[Place, Place]:
        return place(i, self.steps[0], self.request.n), place(j, self.steps[1], self.request.m)

    def _each_tile(self, keys: Keys, home: bool, rows: Lse, columns: Lse, kept: Any) -> tuple[Lse, Lse, Any]:
        """Every tile into the statistics, and into `kept` where there is such."""
        count = self.counts

        def body(state: Any, index: Any) -> Any:
            rows, columns, kept = state
            i, j = self._places(index // count[1], index % count[1])
            tile = self._tile(i, j, keys, home)
            raw = products(tile, self.rules, self.accumulator)
            if kept is not None:
                kept = lax.dynamic_update_index_in_dim(kept, raw, index, 0)
            return (*self._measure(tile, raw, i, j, rows, columns), kept)

        found: tuple[Lse, Lse, Any] = loop(count[0] * count[1], body, (rows, columns, kept))
        return found

    # -- the ring ---------------------------------------------------------------------------------------

    def _rotate(self, keys: Keys, carry: Any, visit: Any, join: Any) -> tuple[Any, Any]:
        """`carry, share = visit(keys, home, carry)` at each shard of keys; shares travel with their keys and
        join on the way. Each hop is posted before the visit that it passes by.
        """
        size = self.ring.size
        if size == 1:
            return visit(keys, True, carry)  # type: ignore[no-any-return]
        following = self.ring.shift(keys)
        carry, sent = visit(keys, True, carry)
        keys = following

        def body(state: Any, _: Any) -> Any:
            keys, sent, carry = state
            following, arrived = self.ring.shift((keys, sent))
            carry, share = visit(keys, False, carry)
            return (following, join(arrived, share), carry), None

        if size > 2:
            (keys, sent, carry), _ = lax.scan(body, vary(self.over, (keys, sent, carry)), None, length=size - 2)
        arrived = self.ring.shift(sent)
        carry, share = visit(keys, False, carry)
        return carry, self.ring.shift(join(arrived, share))

    def _sums(self, *vectors: Any) -> tuple[Any, ...]:
        """The sum of each vector over all ranks, in one exchange."""
        found = totals(*vectors)
        if self.ring.axes:
            found = vary(self.over, self.ring.sum(found))
        return tuple(found[index] for index in range(len(vectors)))

    # -- the loss -----------------------------------------------------------------------------------------

    def _lse_pass(self, *, keep: bool = False) -> Any:
        """Rows' and columns' statistics from the same tiles; returns the kept products."""
        kept = self._zeros(self.counts[0] * self.counts[1], *self.steps) if keep else None
        empty = self.columns

        def visit(keys: Keys, home: bool, carry: Any) -> Any:
            rows, kept = carry
            rows, columns, kept = self._each_tile(keys, home, rows, empty, kept)
            return (rows, kept), columns

        (self.rows, kept), self.columns = self._rotate(self.keys, (self.rows, kept), visit, merge_lse)
        return kept

    def adopt(self, rows: Lse, columns: Lse) -> None:
        """Statistics of an earlier trace of the same call."""
        self.rows, self.columns = rows, columns
        self._close()

    def loss(self) -> Any:
        """The loss (or `[n]` values): one product, no gradient."""
        self._lse_pass()
        return self._close()

    def _close(self) -> Any:
        """Statistics to the loss, equation (1) or (3); also the factor that gradients wait for."""
        request, rules = self.request, self.rules
        if rules.multi:
            self.row_count = self.rows.positive_count
            self.column_count, self.column_weight = self.columns.positive_count, self.columns.weight_sum
        sides = [queries for queries, wanted in ((True, rules.rows), (False, rules.columns)) if wanted]
        pairs = [self._anchors(queries=queries) for queries in sides]
        sums = self._sums(*(value for value, _ in pairs), *(weight for _, weight in pairs))
        values, weights = sums[: len(sides)], sums[len(sides) :]
        self._settle(weights)
        if request.reduction == "none":
            each = [
                value if queries else self._of_keys(value)
                for queries, (value, _) in zip(sides, pairs, strict=True)
                if queries or self.designates
            ]
            return sum(each[1:], each[0]) * (self.unit / len(sides))
        if request.reduction == "sum":
            return self._global(sum(values[1:], values[0]) / len(sides) * self.unit)
        means = [jnp.where(w > 0, v / jnp.where(w > 0, w, 1), 0) + 0 * v for v, w in zip(values, weights, strict=True)]
        return self._global(sum(means[1:], means[0]) / len(sides))

    def _global(self, value: Any) -> Any:
        """A value that is the same on all ranks, as one that `shard_map` knows to be so."""
        if not self.ring.axes:
            return value
        first = lax.axis_index(self.ring.axes) == 0
        return self.ring.sum(jnp.where(first, value, 0))

    def _anchors(self, *, queries: bool) -> tuple[Any, Any]:
        """Weighted values and weights of one side's anchors, 0 for the rest."""
        weights = self._anchor_weights(queries=queries)
        counted = weights != 0
        own, others = (self.query_poison, self.keys_poison) if queries else (self.key_poison, self.queries_poison)
        lse = self.rows if queries else self.columns
        if not self.rules.softmax:
            value = lse.mass
        else:
            count = self.row_count if queries else self.column_count
            sums = lse.positive_sum
            if sums is None:  # columns of designated pairs: their rows' logits, seen from the other side
                sums = self._to_keys(self.rows.positive_sum)
            mean = sums / jnp.where(count > 0, count, 1)
            # lse - mean, in the order that keeps both the tiny and the huge
            distance = lse.shift - mean
            near = jnp.clip(distance, -60, 20)
            mass = jnp.where(counted, lse.mass * jnp.exp(jnp.where(counted, near, 0)), 1)
            value = jnp.log(mass) + (distance - near)
            if self.smoothing:
                allowed = lse.allowed_sum / jnp.where(lse.allowed_count > 0, lse.allowed_count, 1)
                value = value + self.smoothing * (mean - allowed)
            value = jnp.maximum(value, 0)
        return jnp.where(counted, weights * (value + own + others), 0), weights

    def _anchor_weights(self, *, queries: bool) -> Any:
        """`[rows]`: weight of each anchor, 0 for a row that is none. A bad row counts, so that it shows."""
        if queries:
            if not self.rules.softmax:
                return self.anchor_weight
            counted = (self.row_count > 0) | (jnp.isnan(self.query_poison) & (self.present > 0))
            return jnp.where(counted, self.anchor_weight, 0)
        count = self.column_count
        return jnp.where(count > 0, self.column_weight / jnp.where(count > 0, count, 1), 0)

    def _settle(self, weights: tuple[Any, ...]) -> None:
        """The factor that every gradient carries, and the columns' weight beside the rows'."""
        sides = len(weights)
        self.column_ratio = self._zeros(fill=1.0)
        if self.request.reduction == "mean":
            first = weights[0]
            factor = jnp.where(first > 0, 1 / (sides * jnp.where(first > 0, first, 1)), 0)
            if sides == 2:
                second = weights[1]
                self.column_ratio = jnp.where(second > 0, first / jnp.where(second > 0, second, 1), 0)
        else:
            factor = self.unit / sides
        self.factor = factor * (1 + self.queries_poison + self.keys_poison)

    # -- the gradient ---------------------------------------------------------------------------------------

    def loss_and_grad(self) -> tuple[Any, Gradients]:
        """The loss and its gradients, by the plan's sweep."""
        wants = self.request.wants
        if not any(self.wanted) and not wants("scale") and (self.rules.softmax or not wants("bias")):
            loss = self.loss()
            return loss, Gradients(bias=0 * self.factor if wants("bias") else None)
        if self.plan.sweep in ("strip", "single") or not self.rules.softmax:
            return self._at_once()
        kept = self._lse_pass(keep=self.plan.sweep == "keep")
        loss = self._close()
        return loss, self._gradient_pass(kept)

    def gradient(self, upstream: Any) -> Gradients:
        """After `adopt`: the gradients of `sum_i upstream_i value_i`, from recomputed tiles. upstream `[n]`."""
        self.upstream = upstream.astype(self.accumulator)
        return self._gradient_pass(None)

    def _weights(self, *, queries: bool) -> Weights:
        """Gradient weights of a side whose statistics are complete."""
        anchor = self._anchor_weights(queries=queries)
        if self.upstream is not None:
            anchor = anchor * (self.upstream if queries else self._to_keys(self.upstream))
        if not self.rules.softmax:
            return Weights(anchor)
        if not queries:
            anchor = anchor * self.column_ratio
        return self._weigh(
            anchor, self.rows if queries else self.columns, self.row_count if queries else self.column_count
        )

    def _weigh(self, anchor: Any, lse: Lse, count: Any) -> Weights:
        """`Weights` of anchors with these statistics: the lse rounded, and a factor that makes up for it."""
        counted = (anchor != 0) & (lse.mass > 0)
        mass = jnp.where(counted, lse.mass, 1)
        shift = jnp.where(counted, lse.shift + jnp.log(mass), jnp.inf)
        mass = mass * jnp.exp(jnp.where(counted, lse.shift - shift, 0))
        target = anchor * (1 - self.smoothing) / jnp.where(count > 0, count, 1)
        smooth = None
        if self.smoothing:
            smooth = anchor * self.smoothing / jnp.where(lse.allowed_count > 0, lse.allowed_count, 1)
        return Weights(jnp.where(counted, anchor / mass, 0), shift, target, smooth)

    def _gradient_pass(self, kept: Any) -> Gradients:
        """Tiles again, with every lse known."""
        rows = self._weights(queries=True) if self.rules.rows else None
        columns = self._weights(queries=False) if self.rules.columns else None
        return self._gradients(*self._visits(self.keys._replace(weights=columns), rows, kept=kept, measure=False))

    def _at_once(self) -> tuple[Any, Gradients]:
        """Loss and gradient from one walk: a strip's lse is complete before its gradient starts, and the
        sigmoid waits for none.
        """
        rules = self.rules
        known = not (rules.softmax and rules.multi)
        if known:  # who is an anchor is known, and so are the denominators
            sides = [queries for queries, wanted in ((True, rules.rows), (False, rules.columns)) if wanted]
            self._settle(self._sums(*(self._anchor_weights(queries=queries) for queries in sides)))
        rows = None if rules.softmax else self._weights(queries=True)
        found, onto = self._visits(self.keys, rows, kept=None, measure=True)
        loss = self._close()
        return loss, self._gradients(found, onto)

    def _visits(self, mine: Keys, rows: Weights | None, *, kept: Any, measure: bool) -> tuple[Found, Any]:
        """Visit every shard of keys; their gradient gathers as they travel and comes home with them."""
        request, d = self.request, self.request.d
        split = self.plan.sweep == "split"
        # Only the outer side of one device can be rounded strip by strip, and only once the factor is known.
        early = self.factor is not None and self.ring.size == 1
        self.early = (
            early and self.wanted[0] and (split or not self.by_columns),
            early and self.wanted[1] and (split or self.by_columns),
        )
        dtypes = [self.out_dtype if one else self.accumulator for one in self.early]
        start = Found(
            rows=self.rows,
            columns=self.columns,
            queries=self._zeros(request.n, d, dtype=dtypes[0]) if self.wanted[0] else None,
            keys=None,
            product=self._zeros(),
            weight=self._zeros(),
        )

        def visit(keys: Keys, home: bool, found: Found) -> Any:
            onto = self._zeros(request.m, d, dtype=dtypes[1]) if self.wanted[1] else None
            found = found._replace(keys=onto)
            if split:
                found = self._walk(keys, home, rows, found, (True, False), by_columns=False, kept=None, measure=measure)
                found = self._walk(keys, home, rows, found, (False, True), by_columns=True, kept=None, measure=False)
            else:
                found = self._walk(
                    keys, home, rows, found, self.wanted, by_columns=self.by_columns, kept=kept, measure=measure
                )
            return found._replace(keys=None), found.keys

        found, onto = self._rotate(mine, start, visit, lambda one, other: jax.tree.map(jnp.add, one, other))
        self.rows, self.columns = found.rows, found.columns
        return found, onto

    def _walk(
        self,
        keys: Keys,
        home: bool,
        rows: Weights | None,
        found: Found,
        wanted: tuple[bool, bool],
        *,
        by_columns: bool,
        kept: Any,
        measure: bool,
    ) -> Found:
        """All tiles of one shard, the outer side strip by strip. measure: the statistics are gathered on the way."""
        strip = measure and self.plan.sweep == "strip"
        counts = self.counts[::-1] if by_columns else self.counts
        outer, inner = ("keys", "queries") if by_columns else ("queries", "keys")
        outer_wanted, inner_wanted = wanted[::-1] if by_columns else wanted
        totals = measure or wanted != (False, True) or self.plan.sweep != "split"

        def places(o: Any, t: Any) -> tuple[Place, Place, Any]:
            i, j = (t, o) if by_columns else (o, t)
            return (*self._places(i, j), i * self.counts[1] + j)

        def before(found: Found, o: Any) -> tuple[Found, Any]:
            """A strip's statistics and products."""

            def body(state: Any, t: Any) -> Any:
                found, held = state
                i, j, _ = places(o, t)
                tile = self._tile(i, j, keys, home)
                raw = products(tile, self.rules, self.accumulator)
                held = lax.dynamic_update_index_in_dim(held, raw, t, 0)
                measured = self._measure(tile, raw, i, j, found.rows, found.columns)
                return found._replace(rows=measured[0], columns=measured[1]), held

            return loop(counts[1], body, (found, self._zeros(counts[1], *self.steps)))  # type: ignore[no-any-return]

        def strip_weights(found: Found, o: Any) -> tuple[Weights | None, Weights | None]:
            i, j, _ = places(o, 0)
            if by_columns:
                lse = parts(found.columns, j)
                count = lse.positive_count if self.rules.multi else cut(self.column_count, j)
                weight = lse.weight_sum if self.rules.multi else cut(self.column_weight, j)
                anchor = jnp.where(count > 0, weight / jnp.where(count > 0, count, 1), 0)
                return None, self._weigh(anchor, lse, count)
            lse = parts(found.rows, i)
            count = lse.positive_count if self.rules.multi else cut(self.row_count, i)
            anchor = jnp.where(count > 0, cut(self.anchor_weight, i), 0)
            return self._weigh(anchor, lse, count), None

        def one_strip(found: Found, o: Any) -> Found:
            held, here = kept, None
            if strip:
                found, held = before(found, o)
                here = strip_weights(found, o)
            d = self.request.d
            shape = (d, self.steps[1]) if by_columns else (self.steps[0], d)
            gathered = self._zeros(*shape) if outer_wanted else None

            def body(state: Any, t: Any) -> Any:
                found, gathered = state
                i, j, flat = places(o, t)
                tile = self._tile(i, j, keys, home)
                raw = self._reader(tile, held, t if strip else flat)
                if measure and not strip:
                    measured = self._measure(tile, raw(), i, j, found.rows, found.columns)
                    found = found._replace(rows=measured[0], columns=measured[1])
                if here is not None:
                    by_row, by_column = here
                else:
                    by_row = None if rows is None else parts(rows, i)
                    by_column = None if keys.weights is None else parts(keys.weights, j)
                bias = None if self.rules.softmax else self.bias
                rules = self.rules if totals else self.rules._replace(total_product=False, total_weight=False)
                *both, product, weight = tile_grad(
                    tile, rules, raw, self.scale, bias, by_row, by_column, wanted, turned=by_columns
                )
                mine, theirs = both[::-1] if by_columns else both
                if outer_wanted:
                    gathered = gathered + mine
                if inner_wanted:
                    where = i if by_columns else j
                    whole = getattr(found, inner)
                    found = found._replace(**{inner: put(whole, cut(whole, where) + theirs, where)})
                if product is not None:
                    found = found._replace(product=found.product + product)
                if weight is not None:
                    found = found._replace(weight=found.weight + weight)
                return found, gathered

            found, gathered = loop(counts[1], body, (found, gathered))
            if outer_wanted:
                i, j, _ = places(o, 0)
                where = j if by_columns else i
                found = self._store(found, outer, gathered.T if by_columns else gathered, where)
            return found

        return loop(counts[0], one_strip, found)  # type: ignore[no-any-return]

    def _reader(self, tile: Tile, held: Any, index: Any) -> Callable[[], Any]:
        """What gives a tile's products: computed here, once; or, if they are held, read where it is called."""
        if held is not None:
            return lambda: lax.dynamic_index_in_dim(held, index, 0, keepdims=False)
        raw = products(tile, self.rules, self.accumulator)
        return lambda: raw

    def _store(self, found: Found, side: str, gathered: Any, where: Place) -> Found:
        """A strip is complete: count, scale, round and store it, or add it to the whole."""
        whole = getattr(found, side)
        before = cut(whole, where)
        if not self.early[side == "keys"]:
            return found._replace(**{side: put(whole, before + gathered, where)})
        mask = cut(self._mask(side), where)
        if self._counts_product(side):
            rows = where_rows(mask, cut(getattr(self.inputs, side), where)).astype(self.accumulator)
            found = found._replace(product=found.product + (gathered * rows).sum())
        scaled = where_rows(mask, gathered * (self.factor * self.scale)).astype(self.out_dtype)
        if where.fresh is not None:
            scaled = jnp.where(where.fresh[:, None], scaled, before)
        return found._replace(**{side: put(whole, scaled, where)})

    def _mask(self, side: str) -> Any:
        return self.inputs.query_mask if side == "queries" else self.inputs.key_mask

    def _counts_product(self, side: str) -> bool:
        """Whether the scale's gradient is read off this side's: `sum_i <dq_i, q_i>`, before the factors."""
        if not self.request.wants("scale") or self.rules.total_product:
            return False
        return side == "queries" if self.wanted[0] else side == "keys"

    def _gradients(self, found: Found, onto: Any) -> Gradients:
        """Scale, round and collect; scale and bias gradients are this rank's shares."""
        sides = {"queries": found.queries, "keys": onto}
        product = found.product
        for side, values in sides.items():
            if values is None or self.early[side == "keys"]:
                continue
            mask = self._mask(side)
            if self._counts_product(side):
                rows = where_rows(mask, getattr(self.inputs, side)).astype(self.accumulator)
                product = product + (values * rows).sum()
            sides[side] = where_rows(mask, values * (self.factor * self.scale)).astype(self.out_dtype)
        wants = self.request.wants
        return Gradients(
            queries=sides["queries"],
            keys=sides["keys"],
            scale=product * self.factor if wants("scale") else None,
            bias=found.weight * self.factor if wants("bias") else None,
        )

    # -- stats ----------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """What the tiles showed, global; after the loss."""
        rules, rows, one = self.rules, self.rows, self._zeros(fill=1.0)
        anchors = self.present > 0
        if rules.softmax:
            anchors = anchors & (self.row_count > 0)
        hits = anchors & (rows.positive_max > rows.negative_max)
        counted, lses = [], []
        for queries, lse in ((True, rows), (False, self.columns)):
            if rules.rows if queries else rules.columns:
                weighty = self._anchor_weights(queries=queries) != 0
                counted.append(jnp.where(weighty, one, 0))
                lses.append(jnp.where(weighty, _lse_of(lse), 0) if rules.softmax else 0 * counted[-1])
        sums = self._sums(
            jnp.where(hits, one, 0),
            jnp.where(anchors, one, 0),
            rows.positive_sum,
            rows.positive_count if rules.multi else self._positives(),
            rows.allowed_sum,
            rows.allowed_count,
            *counted,
            *lses,
        )
        top, of, positive, positives, every, pairs, *rest = sums
        counts, lse_sums = rest[: len(counted)], rest[len(counted) :]
        hardest = vary(self.over, self.ring.largest(rows.negative_max.max(initial=-jnp.inf)))
        lean = self.queries_poison + self.keys_poison + (self.bias if rules.softmax else 0)
        mean_lse = sum(_ratio(lse, count) for lse, count in zip(lse_sums, counts, strict=True)) / len(counts) + lean
        figures = {
            "count": counts[0],
            "top1": _ratio(top, of),
            "mean_positive": _ratio(positive, positives) + lean,
            "mean_negative": _ratio(every - positive, pairs - positives) + lean,
            "mean_lse": mean_lse,
            "hardest_negative": hardest + lean,
        }
        found = self._global(jnp.stack(list(figures.values())))
        figures = {name: found[index] for index, name in enumerate(figures)}
        figures["count"] = figures["count"].astype(jnp.int32)
        if not rules.softmax:
            figures["mean_lse"] = None
        return Stats(
            **figures,
            query_lse=_lse_of(rows) + self.bias if rules.softmax and rules.rows else None,
            key_lse=_lse_of(self.columns) + self.bias if rules.softmax and rules.columns else None,
            plan=self.plan,
        )

    def _positives(self) -> Any:
        """`[n]`: how many allowed positives each row has, where they are designated."""
        return jnp.where(self.valid, self._zeros(fill=1.0), 0) if self.designates else self._zeros(self.request.n)


def _and(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _merge_at(whole: Lse, part: Lse, where: Place) -> Lse:
    """The statistics of a tile into those of its side."""
    merged = merge_lse(parts(whole, where), part)
    return jax.tree.map(lambda array, new: put(array, new, where), whole, merged)


def _lse_of(lse: Lse) -> Any:
    """The lse itself; -inf where no pair is allowed."""
    some = (lse.mass > 0) | jnp.isnan(lse.mass)
    return jnp.where(some, lse.shift + jnp.log(jnp.where(some, lse.mass, 1)), -jnp.inf)


def _ratio(sums: Any, count: Any) -> Any:
    return jnp.where(count > 0, sums / jnp.where(count > 0, count, 1), jnp.nan)
