"""The three verbs in traced JAX: a tile of products to statistics, statistics to statistics, a tile to gradients.

    products      c [r, c] = q [r, d] @ k^T [d, c], in the accumulation dtype; the logits are s = scale c + bias
    tile_lse      a symmetric loss takes one maximum u and one exponential E = exp(s - u + HEAD): row masses
                  are E's row sums, column masses its column sums
    tile_grad     g = E' (rows) + E' (columns) - targets, with one exponential E' again; then g k, and g^T q or,
                  turned, q^T g

Sharing the exponential is exact as long as no row or column sinks out of float32's range below the
tile's maximum; both verbs test for that (`LOW`, `SPREAD`) and take the other branch of a `lax.cond`,
each row and column with a shift of its own, where it fails.

These are pure functions over arrays: who is present, allowed and positive comes in as vectors of the
tile, and XLA fuses the pairwise comparisons into what reads them, so no boolean tile is ever held.
Equations are those of `nibs.spec`. Nothing here knows of batches, rings or budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

__all__ = ["Lse", "Rules", "Tile", "Weights", "merge_lse", "products", "tile_grad", "tile_lse"]

HEAD = 30.0  # exponentials are lifted by e^30, to lengthen the way down to the smallest float32
# A smaller row or column sum has lost terms that count, or loses them when it is merged: XLA flushes what is below
# e^-87 to zero, and beside a mass of e^-40 e^-HEAD a tile's whose share is e^-17 must still be seen.
LOW = math.exp(-40.0)
SPREAD = 69.0  # natural-log width of a tile's lse values up to which one exponential serves all
TOP = 80.0  # exponents above this belong to pairs of no anchor, whose factor is 0; inf x 0 would be NaN

PRECISION = {"default": None, "high": lax.Precision.HIGH, "highest": lax.Precision.HIGHEST}


class Rules(NamedTuple):
    """The constants of one call that every tile needs: the static part of `nibs.verbs.Problem`, see decision 0007."""

    softmax: bool
    rows: bool
    columns: bool
    multi: bool
    exclude: bool
    exclude_self: bool
    margin: bool
    sums: bool
    stats: bool
    precision: str
    rounded: bool
    total_product: bool
    total_weight: bool


class Tile(NamedTuple):
    """One tile of pairs. queries `[r, d]`, keys `[c, d]`: absent rows zero. Vectors `[r]` or `[c]`, or None.

    columns: `0 .. c - 1`, as an array: compared with a counter of their own, targets cost XLA on a CPU more than
    the exponential. query_mask, key_mask: who takes part in this tile. targets: where in the tile each row's designated
    positive is (outside it: nowhere here), None away from home. self_index: likewise the key that
    `exclude_self` leaves out. exact: products of the designated pairs where a margin had them computed first.
    query_limit, key_limit: the product above which a negative is dropped. anchor_weights `[r]`.
    """

    queries: Any
    keys: Any
    columns: Any
    query_mask: Any = None
    key_mask: Any = None
    query_ids: Any = None
    key_ids: Any = None
    targets: Any = None
    self_index: Any = None
    exact: Any = None
    query_limit: Any = None
    key_limit: Any = None
    anchor_weights: Any = None


class Lse(NamedTuple):
    """Statistics of rows (or columns), each `[rows]`, None where not needed: see `nibs.verbs.Lse`."""

    mass: Any = None
    shift: Any = None
    positive_sum: Any = None
    positive_count: Any = None
    allowed_sum: Any = None
    allowed_count: Any = None
    weight_sum: Any = None
    positive_max: Any = None
    negative_max: Any = None


class Weights(NamedTuple):
    """What turns a tile's logits into gradient weights, each `[rows]`: see `nibs.verbs.Weights`."""

    factor: Any
    shift: Any = None
    target: Any = None
    smooth: Any = None


# -- pairs --------------------------------------------------------------------------------------------


class Pairs:
    """Which pairs of a tile are designated, allowed and positive: `[r, c]` bool, or None for all (or none)."""

    def __init__(self, tile: Tile, rules: Rules) -> None:
        self.tile, self.rules = tile, rules
        self.shape = (tile.queries.shape[0], tile.keys.shape[0])
        columns = tile.columns[None, :]
        self.designated = None if tile.targets is None else tile.targets[:, None] == columns
        self.mine = None if tile.self_index is None else tile.self_index[:, None] == columns
        if rules.multi or rules.exclude:
            self.same = tile.query_ids[:, None] == tile.key_ids[None, :]
        self.allowed = self._allowed()
        self.by_row = self.by_column = self.allowed

    def _allowed(self) -> Any:
        tile, found = self.tile, None
        if tile.query_mask is not None:
            found = tile.query_mask[:, None]
        if tile.key_mask is not None:
            found = _both(found, tile.key_mask[None, :])
        if self.rules.exclude:
            apart = ~self.same
            found = _both(found, apart if self.designated is None else apart | self.designated)
        if self.mine is not None:
            found = _both(found, ~self.mine)
        return None if found is None else jnp.broadcast_to(found, self.shape)

    @property
    def positive(self) -> Any:
        """The positives, inside the allowed pairs."""
        found = self.designated
        if self.rules.multi:
            found = self.same if found is None else found | self.same
        return None if found is None else _both(self.allowed, found)

    def drop_beyond_margin(self, raw: Any) -> None:
        """A margin drops different negatives for rows and for columns."""
        tile = self.tile
        for name, limit in (("by_row", tile.query_limit[:, None]), ("by_column", tile.key_limit[None, :])):
            keep = ~(raw > limit)
            if self.designated is not None:
                keep = keep | self.designated
            setattr(self, name, _both(self.allowed, keep))


def _both(one: Any, other: Any) -> Any:
    return other if one is None else one & other


def _only(permitted: Any, values: Any, other: float) -> Any:
    return values if permitted is None else jnp.where(permitted, values, jnp.asarray(other, values.dtype))


# -- products and logits --------------------------------------------------------------------------------


def products(tile: Tile, rules: Rules, accumulator: Any) -> Any:
    """`[r, c]`: `<q_i, k_j>`, exact products summed in the accumulation dtype."""
    found = lax.dot_general(
        tile.queries,
        tile.keys,
        (((1,), (1,)), ((), ())),
        precision=PRECISION[rules.precision],
        preferred_element_type=accumulator,
    )
    if tile.exact is not None and tile.targets is not None:
        found = jnp.where(tile.targets[:, None] == tile.columns[None, :], tile.exact[:, None], found)
    return found


def _logits(raw: Any, scale: Any, bias: Any) -> Any:
    return raw * scale if bias is None else raw * scale + bias


# -- statistics -----------------------------------------------------------------------------------------


def tile_lse(tile: Tile, rules: Rules, raw: Any, scale: Any, bias: Any) -> tuple[Lse, Lse]:
    """Statistics of the tile's rows and of its columns, from one reading of its logits."""
    pairs = Pairs(tile, rules)
    if rules.margin:
        pairs.drop_beyond_margin(raw)
    logits = _logits(raw, scale, bias)
    rows: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    if rules.multi or rules.stats:
        _add_positives(pairs, logits, rows, columns)
    elif tile.targets is not None:
        rows["positive_sum"] = _of_targets(tile, logits)
    if rules.sums:
        rows["allowed_sum"], rows["allowed_count"] = _sums(logits, pairs.by_row, 1)
        if rules.columns:
            columns["allowed_sum"], columns["allowed_count"] = _sums(logits, pairs.by_column, 0)
    if not rules.softmax:
        terms = _softplus(_flip(pairs, logits))
        rows["mass"] = _only(pairs.allowed, terms, 0).sum(1)
    elif rules.rows and rules.columns and not rules.margin:
        (rows["mass"], rows["shift"]), (columns["mass"], columns["shift"]) = _shared(tile, raw, scale, pairs.allowed)
    else:
        if rules.rows:
            rows["mass"], rows["shift"] = _masses(logits, pairs.by_row, 1)
        if rules.columns:
            columns["mass"], columns["shift"] = _masses(logits, pairs.by_column, 0)
    return Lse(**rows), Lse(**columns)


def _of_targets(tile: Tile, logits: Any) -> Any:
    """`[r]`: the logit of each row's designated positive, read from where the lse reads it; 0 where it is not here."""
    inside = (tile.targets >= 0) & (tile.targets < logits.shape[1])
    index = jnp.clip(tile.targets, 0, logits.shape[1] - 1)
    return jnp.where(inside, jnp.take_along_axis(logits, index[:, None], axis=1)[:, 0], jnp.zeros((), logits.dtype))


def _masses(logits: Any, permitted: Any, axis: int) -> tuple[Any, Any]:
    """Masses and shifts of one side, each row with its own maximum."""
    logits = _only(permitted, logits, -jnp.inf)
    highest = logits.max(axis)
    empty = highest == -jnp.inf
    mass = jnp.exp(logits - jnp.expand_dims(jnp.where(empty, 0, highest), axis)).sum(axis)
    return mass, jnp.where(empty, jnp.finfo(logits.dtype).min, highest)


def _shared(tile: Tile, raw: Any, scale: Any, permitted: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Both sides' masses and shifts from one exponential, or from two where it would underflow."""
    hidden = _only(permitted, raw * scale, -jnp.inf)
    # Reductions stand alone on a CPU: one of the logits would have them written first, one of the products has not.
    top = jnp.where(scale < 0, raw.min(), raw.max()) * scale if permitted is None else hidden.max()
    shift = jnp.where(top == -jnp.inf, 0, top)
    lifted = shift - HEAD
    back = jnp.exp(lifted - shift)  # e^-HEAD, less what the line above rounded away
    exponential = jnp.exp(hidden - lifted)
    row_mass, column_mass = exponential.sum(1), exponential.sum(0)
    least = jnp.concatenate([_of_those(tile.query_mask, row_mass), _of_those(tile.key_mask, column_mass)]).min()
    lowest = jnp.finfo(raw.dtype).min

    def together() -> Any:
        sides = []
        for mass, mask in ((row_mass, tile.query_mask), (column_mass, tile.key_mask)):
            shifts = jnp.broadcast_to(shift, mass.shape)
            sides.append((mass * back, shifts if mask is None else jnp.where(mask, shifts, lowest)))
        return tuple(sides)

    def apart() -> Any:
        logits = raw * scale
        return _masses(logits, permitted, 1), _masses(logits, permitted, 0)

    return lax.cond(least >= LOW, together, apart)


def _of_those(mask: Any, mass: Any) -> Any:
    return mass if mask is None else jnp.where(mask, mass, 1)


def _sums(logits: Any, permitted: Any, axis: int) -> tuple[Any, Any]:
    if permitted is None:
        return logits.sum(axis), jnp.full(logits.shape[1 - axis], logits.shape[axis], logits.dtype)
    return _only(permitted, logits, 0).sum(axis), permitted.sum(axis, dtype=logits.dtype)


def _add_positives(pairs: Pairs, logits: Any, rows: dict[str, Any], columns: dict[str, Any]) -> None:
    """Sums, counts and maxima over positives and negatives, where they can be anywhere in the tile."""
    rules, tile = pairs.rules, pairs.tile
    found = pairs.positive
    if found is None:
        found = jnp.zeros(logits.shape, bool)
    positives = jnp.where(found, logits, 0)
    rows["positive_sum"] = positives.sum(1)
    if rules.multi:
        rows["positive_count"] = found.sum(1, dtype=logits.dtype)
        if rules.columns:
            columns["positive_sum"] = positives.sum(0)
            columns["positive_count"] = found.sum(0, dtype=logits.dtype)
            columns["weight_sum"] = jnp.where(found, tile.anchor_weights[:, None], 0).sum(0)
    if rules.stats:
        negative = _both(pairs.by_row, ~found)
        rows["positive_max"] = jnp.where(found, logits, -jnp.inf).max(1)
        rows["negative_max"] = jnp.where(negative, logits, -jnp.inf).max(1)


def merge_lse(into: Lse, part: Lse) -> Lse:
    """The statistics of both; fields that `into` lacks are left out."""
    found = into._asdict()
    if into.shift is not None:
        shift = jnp.maximum(into.shift, part.shift)
        found["mass"] = into.mass * jnp.exp(into.shift - shift) + part.mass * jnp.exp(part.shift - shift)
        found["shift"] = shift
    elif into.mass is not None:
        found["mass"] = into.mass + part.mass
    for name in ("positive_sum", "positive_count", "allowed_sum", "allowed_count", "weight_sum"):
        if found[name] is not None and getattr(part, name) is not None:
            found[name] = found[name] + getattr(part, name)
    for name in ("positive_max", "negative_max"):
        if found[name] is not None and getattr(part, name) is not None:
            found[name] = jnp.maximum(found[name], getattr(part, name))
    return Lse(**found)


# -- gradients --------------------------------------------------------------------------------------------


def tile_grad(
    tile: Tile,
    rules: Rules,
    raw: Callable[[], Any],
    scale: Any,
    bias: Any,
    rows: Weights | None,
    columns: Weights | None,
    wanted: tuple[bool, bool],
    turned: bool,
) -> tuple[Any, Any, Any, Any]:
    """`g k [r, d]` and `g^T q [c, d]` in the accumulation dtype where wanted, then `sum g c` and `sum g` likewise.

    raw: reads the tile's products. turned: the second as `q^T g [d, c]`, which XLA multiplies faster on a CPU.
    """
    if rules.softmax:
        weights = _softmax_weights(tile, rules, raw, scale, rows, columns)
    else:
        assert rows is not None
        weights = _sigmoid_weights(Pairs(tile, rules), _logits(raw(), scale, bias)) * rows.factor[:, None]
    into = onto = product = weight = None
    if rules.total_weight:
        weight = weights.sum()
    if rules.total_product:
        product = (weights * raw()).sum()
    narrow = weights.astype(tile.keys.dtype) if rules.rounded else weights
    if wanted[0]:
        into = _product(narrow, tile.keys, 1, rules, weights.dtype)
    if wanted[1]:
        both = (tile.queries, narrow) if turned else (narrow, tile.queries)
        onto = _product(*both, 0, rules, weights.dtype)
    return into, onto, product, weight


def _product(left: Any, right: Any, axis: int, rules: Rules, accumulator: Any) -> Any:
    dtype = jnp.promote_types(left.dtype, right.dtype)
    return lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((axis,), (0,)), ((), ())),
        precision=PRECISION[rules.precision],
        preferred_element_type=accumulator,
    )


def _softmax_weights(
    tile: Tile, rules: Rules, raw: Callable[[], Any], scale: Any, rows: Weights | None, columns: Weights | None
) -> Any:
    """`g_ij` of equation (2), both directions summed.

    Each branch reads the products and compares the pairs itself: XLA writes down what it hands to a branch, and
    makes one loop of what it finds there.
    """

    def seen() -> tuple[Any, Pairs, list[tuple[Weights, int, Any]]]:
        """The products, the pairs, and each side with its axis and the pairs that it allows."""
        pairs, products = Pairs(tile, rules), raw()
        if rules.margin:
            pairs.drop_beyond_margin(products)
        sides = ((rows, 1, pairs.by_row), (columns, 0, pairs.by_column))
        return products, pairs, [(side, axis, allowed) for side, axis, allowed in sides if side is not None]

    def apart() -> Any:
        raw, pairs, sides = seen()
        total = 0
        for side, axis, permitted in sides:
            exponent = _only(permitted, raw * scale, -jnp.inf) - jnp.expand_dims(side.shift, axis)
            total = total + jnp.exp(jnp.minimum(exponent, TOP)) * jnp.expand_dims(side.factor, axis)
        return _less_targets(total, pairs, sides)

    if rows is None or columns is None or rules.margin:
        return apart()
    shifts = jnp.concatenate([rows.shift, columns.shift])
    real = jnp.isfinite(shifts)
    low, high = jnp.where(real, jnp.stack([shifts, -shifts]), jnp.inf).min(1)
    high, none = -high, low > -high
    middle = jnp.where(none, 0, (low + high) / 2)

    def together() -> Any:
        raw, pairs, sides = seen()
        exponent = _only(pairs.allowed, raw * scale, -jnp.inf) - middle
        exponential = jnp.exp(jnp.minimum(exponent, TOP))
        factors = [jnp.expand_dims(side.factor * jnp.exp(middle - side.shift), axis) for side, axis, _ in sides]
        return _less_targets(exponential * (factors[0] + factors[1]), pairs, sides)

    return lax.cond(none | (high - low <= SPREAD), together, apart)


def _less_targets(weights: Any, pairs: Pairs, sides: list[tuple[Weights, int, Any]]) -> Any:
    """The softmax less what it aims at: each side's share of its positives, and of all that it allows."""
    for side, axis, permitted in sides:
        if side.smooth is not None:
            smooth = jnp.broadcast_to(jnp.expand_dims(side.smooth, axis), weights.shape)
            weights = weights - _only(permitted, smooth, 0)
    found = pairs.positive
    if found is None:
        return weights
    return weights - jnp.where(found, sum(jnp.expand_dims(side.target, axis) for side, axis, _ in sides), 0)


def _softplus(signed: Any) -> Any:
    return jnp.log1p(jnp.exp(-jnp.abs(signed))) + jnp.maximum(signed, 0)


def _flip(pairs: Pairs, values: Any) -> Any:
    """`-z s`: the logits, positives' sign turned."""
    found = pairs.designated
    if pairs.rules.multi:
        found = pairs.same if found is None else found | pairs.same
    return values if found is None else jnp.where(found, -values, values)


def _sigmoid_weights(pairs: Pairs, logits: Any) -> Any:
    """`-z sigmoid(-z s)`, equation (4)."""
    signed = _flip(pairs, logits)
    small = jnp.exp(-jnp.abs(signed))
    weights = _flip(pairs, jnp.where(signed >= 0, 1, small) / (1 + small))
    return _only(pairs.allowed, weights, 0)


def where_rows(mask: Any, rows: Any) -> Any:
    """`[r, d]` rows, absent ones zero, whatever they held."""
    return rows if mask is None else jnp.where(mask[:, None], rows, jnp.zeros((), rows.dtype))
