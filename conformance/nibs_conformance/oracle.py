"""The dense truth in higher precision: every number that nibs may return, from the full n x m matrix.

It exists to judge backends and refuses to serve as one. It is written from the formulas of
`nibs.spec` alone: all pairs at once, closed-form gradients, nothing tiled, merged or folded, so that
it shares no line and no idea with what it judges. It is itself checked against hand-worked values,
finite differences and mpmath by the tests of the repository.

    truth = solve(problem)                        float64 rows in longdouble, all others in float64
    dense = solve(problem, work=np.float32)       the same arithmetic, as narrow as a dense loss would be

What the formulas leave open is settled here, for every backend:

- `reduction="none"`: query i's value is `w_i l_i`; for `"key_to_query"` it is `v_j l'_j` of key
  `j = targets[i]`; for `"symmetric"` `(w_i l_i + v_j l'_j) / 2`. It is 0 where row i is no anchor, and a
  part is 0 where its row is no anchor.
- A value that is not finite in a present row makes every logit of that row NaN.
- Weights of absent rows are not read. An anchor of weight zero does not enter the mean: `count` and
  `mean_lse` leave it out.
- `mean_lse` of `"symmetric"` is the mean of both directions' means.
- Stats over pairs (mean positive, mean and hardest negative, top-1) see the allowed pairs of the query
  direction, whatever the loss takes: it matters where a margin drops negatives per direction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibs.spec import InfoNCE, Objective

__all__ = ["Answer", "Figures", "Problem", "Side", "solve", "wide"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Problem:
    """The numbers of one call. Rows of half precision come widened to float32: the values are exact.

    queries `[n, d]`, keys `[m, d]`; targets `[n]`, query_ids `[n]`, key_ids `[m]`, query_mask `[n]`,
    key_mask `[m]`, weights `[n]` or None; upstream `[n]`: the factors g of `reduction="none"`, None for ones.
    """

    queries: Array
    keys: Array
    scale: float = 1.0
    bias: float = 0.0
    objective: Objective = field(default_factory=InfoNCE)
    targets: Array | None = None
    query_ids: Array | None = None
    key_ids: Array | None = None
    query_mask: Array | None = None
    key_mask: Array | None = None
    weights: Array | None = None
    reduction: str = "mean"
    upstream: Array | None = None


@dataclass(frozen=True)
class Side:
    """One direction of InfoNCE, rows being anchors (the key direction is stored transposed).

    allowed, positive, anchor: the sets. lse `[rows]`: -inf where nothing is allowed. p, y `[rows, others]`:
    softmax and target distribution. loss `[rows]`: l_i, 0 where no anchor. factor `[rows]`: what l_i is
    multiplied by in the total that is differentiated.
    """

    allowed: Array
    positive: Array
    anchor: Array
    lse: Array
    p: Array
    y: Array
    loss: Array
    factor: Array


@dataclass(frozen=True)
class Figures:
    """What `nibs.Stats` must say; instead of top1, from which it follows:

    lead `[n]`: by how much a query's best positive beats its best negative; NaN where it is not counted.
    """

    count: int
    lead: Array
    mean_positive: Array
    mean_negative: Array
    mean_lse: Array | None
    hardest_negative: Array
    query_lse: Array | None
    key_lse: Array | None


@dataclass(frozen=True)
class Answer:
    """loss `[]` or `[n]`; gradients; stats; and the workings from which error budgets are derived."""

    loss: Array
    queries: Array
    keys: Array
    scale: Array
    bias: Array
    stats: Figures
    products: Array
    logits: Array
    weights: Array
    rows: Side | None
    columns: Side | None
    allowed: Array
    positive: Array
    row_factor: Array


def wide(problem: Problem) -> type[Any]:
    """The type that is wider than the problem's rows: longdouble for float64, else float64."""
    return np.longdouble if problem.queries.dtype == np.float64 else np.float64


def solve(problem: Problem, work: Any = None) -> Answer:
    """Loss, gradients and stats of `problem`, every step in `work` (None: wider than the problem's rows)."""
    dtype = np.dtype(work or wide(problem))
    with np.errstate(all="ignore"):
        return _solve(problem, dtype)


def _solve(problem: Problem, dtype: np.dtype[Any]) -> Answer:
    objective = problem.objective
    here, there = _present(problem)
    queries, keys = _rows(problem.queries, here, dtype), _rows(problem.keys, there, dtype)
    scale, bias = dtype.type(problem.scale), dtype.type(problem.bias)
    allowed, positive = _pairs(problem, here, there)

    products = queries @ keys.T
    spoilt = ~np.logical_and.outer(np.isfinite(queries).all(1), np.isfinite(keys).all(1))
    products = np.where(spoilt, np.nan, products).astype(dtype)
    logits = scale * products + bias
    given = np.ones(len(queries)) if problem.weights is None else problem.weights
    weights = np.where(here, given, 0).astype(dtype)

    seen = allowed
    if isinstance(objective, InfoNCE):
        rows, columns, loss, counted = _infonce(problem, objective, products, logits, weights, allowed, positive)
        g = np.zeros_like(logits)
        if rows is not None:
            g = g + _scaled(rows)
        if columns is not None:
            g = g + _scaled(columns).T
        row_factor = np.zeros(len(weights), dtype)
        bias_gradient = dtype.type(0)
        seen = _side(objective, products, logits, allowed, positive).allowed
    else:
        rows = columns = None
        sign = np.where(positive, 1, -1).astype(dtype)
        each = np.where(allowed, np.logaddexp(dtype.type(0), -sign * logits), 0).sum(1)
        row_factor, loss = _reduce(problem, each, weights, here)
        counted = [weights != 0]
        slope = -sign * np.exp(-np.logaddexp(dtype.type(0), sign * logits))
        g = np.where(allowed, _times(row_factor[:, None], slope), 0)
        bias_gradient = g.sum()
    loss = np.asarray(loss, dtype)
    return Answer(
        loss=loss,
        queries=_product(scale * g, keys, here),
        keys=_product(scale * g.T, queries, there),
        scale=np.asarray(np.where(g != 0, g * products, 0).sum(), dtype),
        bias=np.asarray(bias_gradient, dtype),
        stats=_figures(objective, rows, columns, logits, seen, positive, here, counted),
        products=products,
        logits=logits,
        weights=g,
        rows=rows,
        columns=columns,
        allowed=allowed,
        positive=positive,
        row_factor=row_factor,
    )


def _present(problem: Problem) -> tuple[Array, Array]:
    here, there = problem.query_mask, problem.key_mask
    n, m = len(problem.queries), len(problem.keys)
    return (np.ones(n, bool) if here is None else here, np.ones(m, bool) if there is None else there)


def _rows(rows: Array, present: Array, dtype: np.dtype[Any]) -> Array:
    return np.where(present[:, None], rows, 0).astype(dtype)


def _pairs(problem: Problem, here: Array, there: Array) -> tuple[Array, Array]:
    """Allowed and positive pairs, `[n, m]` bool."""
    objective, n, m = problem.objective, len(here), len(there)
    designated = np.zeros((n, m), bool)
    if problem.targets is not None:
        for row, target in enumerate(problem.targets):
            if target >= 0:
                designated[row, target] = True
    elif objective.same_id != "positive":
        designated[np.arange(n), np.arange(n)] = True
    allowed = here[:, None] & there[None, :]
    positive = designated.copy()
    if objective.same_id != "negative":
        assert problem.query_ids is not None and problem.key_ids is not None
        same = problem.query_ids[:, None] == problem.key_ids[None, :]
        if objective.same_id == "exclude":
            allowed &= ~same | designated
        else:
            positive |= same
    if isinstance(objective, InfoNCE) and objective.exclude_self:
        allowed &= ~np.eye(n, m, dtype=bool)
    return allowed, positive & allowed


def _infonce(
    problem: Problem,
    objective: InfoNCE,
    products: Array,
    logits: Array,
    weights: Array,
    allowed: Array,
    positive: Array,
) -> tuple[Side | None, Side | None, Array, list[Array]]:
    """Both sides (None for one not taken), the loss, and which rows of each side taken enter the mean."""
    dtype = logits.dtype
    rows = _side(objective, products, logits, allowed, positive)
    columns = _side(objective, products.T, logits.T, allowed.T, positive.T)
    designate = np.where(columns.positive, weights[None, :], 0).sum(1)
    counts = columns.positive.sum(1)
    key_weights = (designate / np.maximum(counts, 1)).astype(dtype)

    row_factor = np.where(rows.anchor & objective.rows, weights, 0)
    column_factor = np.where(columns.anchor & objective.columns, key_weights, 0)
    counted = [
        factor != 0 for factor, taken in ((row_factor, objective.rows), (column_factor, objective.columns)) if taken
    ]
    share = dtype.type(1) / len(counted)
    if problem.reduction == "none":
        g = np.ones(len(weights), dtype) if problem.upstream is None else problem.upstream.astype(dtype)
        target = _designated_keys(problem)
        loss = np.zeros(len(weights), dtype)
        passed = np.zeros(len(column_factor), dtype)
        for row in np.flatnonzero(rows.anchor):
            loss[row] += _times(share * row_factor[row], rows.loss[row])
            key = target[row]
            if key >= 0 and columns.anchor[key]:
                loss[row] += _times(share * column_factor[key], columns.loss[key])
                passed[key] += g[row]
        row_factor, column_factor = share * row_factor * g, share * column_factor * passed
    else:
        loss = np.zeros((), dtype)
        for side, factor in ((rows, row_factor), (columns, column_factor)):
            total = factor.sum()
            if total != 0:
                factor *= share / (total if problem.reduction == "mean" else 1)
                loss = loss + _times(factor, side.loss).sum()
    return (
        _with(rows, row_factor) if objective.rows else None,
        _with(columns, column_factor) if objective.columns else None,
        loss,
        counted,
    )


def _designated_keys(problem: Problem) -> Array:
    """`[n]`: the key whose value counts for this query in the key direction, -1 for none."""
    n = len(problem.queries)
    if problem.targets is not None:
        return problem.targets
    return np.arange(n) if problem.objective.same_id != "positive" else np.full(n, -1)


def _side(objective: InfoNCE, products: Array, logits: Array, allowed: Array, positive: Array) -> Side:
    """One direction, rows being anchors; the factor is left at zero."""
    dtype = logits.dtype
    if objective.false_negative_margin is not None:
        nearest = np.max(np.where(positive, products, -np.inf), axis=1, initial=-np.inf)
        limit = nearest + dtype.type(objective.false_negative_margin)
        drop = ~positive & np.any(positive, axis=1, keepdims=True) & (products > limit[:, None])
        allowed = allowed & ~drop
    count, size = positive.sum(1), allowed.sum(1)
    anchor = count > 0
    top = np.max(np.where(allowed, logits, -np.inf), axis=1, initial=-np.inf)
    top = np.where(top == -np.inf, 0, top).astype(dtype)
    mass = np.where(allowed, np.exp(logits - top[:, None]), 0).sum(1)
    lse = np.where(size > 0, top + np.log(mass), -np.inf).astype(dtype)
    p = np.where(allowed, np.exp(logits - np.where(size > 0, lse, 0)[:, None]), 0).astype(dtype)
    smoothing = dtype.type(objective.label_smoothing)
    y = (1 - smoothing) * positive / np.maximum(count, 1)[:, None] + smoothing * allowed / np.maximum(size, 1)[:, None]
    y = np.where(anchor[:, None], y, 0).astype(dtype)
    loss = np.where(anchor, lse - np.where(y > 0, y * logits, 0).sum(1), 0).astype(dtype)
    return Side(allowed, positive, anchor, lse, p, y, loss, np.zeros(len(lse), dtype))


def _with(side: Side, factor: Array) -> Side:
    return Side(side.allowed, side.positive, side.anchor, side.lse, side.p, side.y, side.loss, factor)


def _scaled(side: Side) -> Array:
    return np.where(side.allowed, _times(side.factor[:, None], side.p - side.y), 0)


def _times(factor: Array, values: Array) -> Array:
    """`factor * values`, where a factor of zero silences even NaN."""
    return np.where(factor != 0, factor * values, 0)


def _reduce(problem: Problem, each: Array, weights: Array, counted: Array) -> tuple[Array, Array]:
    """Factors of the rows, and the loss, for Sigmoid."""
    factor = np.where(counted, weights, 0)
    total = factor.sum()
    if problem.reduction == "none":
        g = np.ones(len(weights), each.dtype) if problem.upstream is None else problem.upstream.astype(each.dtype)
        return factor * g, _times(factor, each)
    if problem.reduction == "mean" and total != 0:
        factor = factor / total
    return factor, _times(factor, each).sum()


def _product(g: Array, rows: Array, present: Array) -> Array:
    """`g @ rows`; pairs of weight zero take no part, absent rows are zero."""
    clean = np.where(np.isfinite(rows), rows, 0)
    gradient = g @ clean
    if not np.isfinite(rows).all():
        touched = (g != 0).astype(int) @ (~np.isfinite(rows)).astype(int) > 0
        gradient = np.where(touched, np.nan, gradient)
    return np.where(present[:, None], gradient, 0).astype(g.dtype)


def _figures(
    objective: Objective,
    rows: Side | None,
    columns: Side | None,
    logits: Array,
    allowed: Array,
    positive: Array,
    here: Array,
    entered: list[Array],
) -> Figures:
    negative = allowed & ~positive
    best = np.max(np.where(positive, logits, -np.inf), axis=1, initial=-np.inf)
    worst = np.max(np.where(negative, logits, -np.inf), axis=1, initial=-np.inf)
    counted = positive.any(1) if isinstance(objective, InfoNCE) else here
    lead = np.where(positive.any(1), best - worst, -np.inf)
    sides = [side for side in (rows, columns) if side is not None]
    lses = np.asarray([_mean(side.lse[chosen]) for side, chosen in zip(sides, entered)])
    return Figures(
        count=int(entered[0].sum()),
        lead=np.where(counted, lead, np.nan),
        mean_positive=_mean(logits[positive]),
        mean_negative=_mean(logits[negative]),
        mean_lse=_mean(lses) if sides else None,
        hardest_negative=np.asarray(np.max(np.where(negative, logits, -np.inf), initial=-np.inf)),
        query_lse=rows.lse if rows is not None else None,
        key_lse=columns.lse if columns is not None else None,
    )


def _mean(values: Array) -> Array:
    return np.asarray(values.mean() if values.size else np.nan, values.dtype)
