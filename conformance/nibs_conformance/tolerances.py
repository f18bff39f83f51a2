"""How far a backend may be from the truth, and why: error budgets derived from the numbers of the case.

No tolerance here is a constant that somebody tried until it passed. The budget of a quantity is

    budget = DENSE * |dense - truth| + floor

where `dense` is the plain dense computation in the accumulation dtype of the rows (NumPy on the CPU),
so that a case which is hard for everybody is hard for the dense loss too, and `floor` is what
first-order error propagation gives, so that a dense computation which was lucky is no yardstick.

Derivation of the floor. `u` is the unit roundoff of the accumulation (2^-24 for float32, float16 and
bfloat16 rows, 2^-53 for float64), `v` that of the multiplier where it is coarser (TF32: 2^-11, else 0).
Half-precision rows are exact numbers, their products are exact in float32, and so `v` is 0 for them.

1. A product of d terms, summed in some order: rounding errors are independent, so their sum grows with
   sqrt(d), not d; with N_ij = sum_k |q_ik k_jk|

       |dc_ij| <= C_ij = ((sqrt(d) + 2) u + 2 v) N_ij

2. A logit `s = scale c + bias`; three more roundings (the scale itself, the product, a factor log2(e)
   that some fold into exp2), each relative to the terms and not to their sum:

       |ds_ij| <= E_ij = |scale| C_ij + 3 u (|scale c_ij| + |bias|)

3. lse: d lse / d s_ij = p_ij. The sum of m exponentials, each good to a few u (exp itself, rescaling by
   a new maximum), and the final `shift + log(mass)`. The shift need not be the row's own maximum, for a
   tile may share one; but the mass is a float32, so its logarithm is at most that of the largest one,
   W = 88.7, and both roundings are below u (|lse| + W); float64 has no reason to go further from it:

       L_i = sum_j p_ij E_ij + u (2 |lse_i| + 2 W + sqrt(m_i) + 8)

   and l_i = lse_i - sum_j y_ij s_ij adds `sum_j y_ij E_ij + u |sum_j y_ij s_ij|` and, for several terms,
   `sqrt(m) u sum_j y_ij |s_ij|`. For Sigmoid, d l / d s = -z sigmoid(-z s), and m terms of softplus are summed.

4. The loss is `sum_i a_i l_i`: `sum_i a_i dl_i`, and sqrt(n) roundings of its terms.

5. The gradient's weights. With p = exp(s - lse), `dp = p (E_ij + L_i + 8 u)`, and the subtraction of the
   target adds roundings of both terms:

       D_ij = a_i (p_ij (E_ij + L_i + 8 u) + 2 u y_ij)

   for each direction. Where rows are half precision these weights may be rounded to it before the
   product: `h (a_i (p_ij + y_ij))`, h the unit roundoff of the rows' dtype, and float16 has no numbers
   below 2^-24, which costs half of that at most, before `1/n` is applied: `2^-25 a_i`.

6. The gradients: `dq = scale * g k`, a sum of m terms,

       |scale| (D |k| + ((sqrt(m) + 4) u + 2 v) |g| |k|) + r |dq|

   r being the unit roundoff of the dtype in which they leave (and 2^-25 for float16's subnormals), and
   dscale = sum_ij g_ij c_ij, which never leaves the accumulation dtype nor sees rounded weights:

       sum_ij (D_ij |c_ij| + |g_ij| C_ij) + (sqrt(n m) + 8) u sum_ij |g_ij c_ij|

   with sqrt(n m) capped at 256, for sums of millions are taken in parts by everybody.

Sums of absolute values bound errors that in truth cancel; this is what pays for first order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibs.spec import InfoNCE
from nibs_conformance.oracle import Answer, Problem, Side, solve

__all__ = ["DENSE", "Budget", "budget_of", "roundoff", "store"]

Array = NDArray[Any]

DENSE = 4.0
"""How many times the dense computation's own error is allowed beside the floor."""

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
TF32 = 2.0**-11
WINDOW = float(np.log(np.finfo(np.float32).max))
"""Natural logarithm of the largest float32: how far a shift may be from the lse it serves."""


@dataclass(frozen=True)
class Budget:
    """Allowed absolute errors, in the shapes of `Answer`; lead `[n]`: the doubt about who wins top-1."""

    loss: Array
    queries: Array
    keys: Array
    scale: Array
    bias: Array
    query_lse: Array | None
    key_lse: Array | None
    mean_lse: Array | None
    mean_positive: Array
    mean_negative: Array
    hardest_negative: Array
    lead: Array


def roundoff(dtype: str) -> float:
    """Unit roundoff of the accumulation over rows of `dtype`."""
    return UNIT["float64"] if dtype == "float64" else UNIT["float32"]


def store(values: Array, dtype: str) -> Array:
    """`values` rounded to nearest even in `dtype`; half precision comes back as float32 holding the rounded values."""
    if dtype == "float64":
        return np.asarray(values, np.float64)
    single = np.asarray(values, np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return single.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(single).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) & np.uint32(0xFFFF0000)
        return np.where(np.isfinite(single), rounded.view(np.float32), single).reshape(single.shape)
    return single


def budget_of(problem: Problem, dtype: str, truth: Answer, *, coarse: bool = False) -> Budget:
    """The budgets of one case; `coarse`: the multiplier may be of the TF32 class."""
    with np.errstate(all="ignore"):
        return _budget_of(problem, dtype, truth, TF32 if coarse and dtype == "float32" else 0.0)


def _budget_of(problem: Problem, dtype: str, truth: Answer, v: float) -> Budget:
    u, out = roundoff(dtype), UNIT[dtype]
    half = out if out > UNIT["float32"] else 0.0
    tiny = 2.0**-25 if dtype == "float16" else 0.0
    here = problem.query_mask if problem.query_mask is not None else np.ones(len(problem.queries), bool)
    there = problem.key_mask if problem.key_mask is not None else np.ones(len(problem.keys), bool)
    queries = np.abs(np.where(here[:, None], problem.queries, 0)).astype(np.float64)
    keys = np.abs(np.where(there[:, None], problem.keys, 0)).astype(np.float64)
    n, m, d = len(queries), len(keys), queries.shape[1]
    scale, bias = abs(float(problem.scale)), abs(float(problem.bias))
    products, logits = np.abs(truth.products).astype(np.float64), truth.logits.astype(np.float64)

    c = ((np.sqrt(d) + 2) * u + 2 * v) * (queries @ keys.T)  # step 1
    e = scale * c + 3 * u * (scale * products + bias)  # step 2

    g = np.abs(truth.weights).astype(np.float64)
    weights_error, half_error = np.zeros((n, m)), np.zeros((n, m))
    if isinstance(problem.objective, InfoNCE):
        loss, row_lse = _direction(truth.rows, e, logits, u)
        column_loss, column_lse = _direction(truth.columns, e.T, logits.T, u)
        error = _closing(problem, truth, loss, column_loss, u)
        for side, lse, flip in ((truth.rows, row_lse, False), (truth.columns, column_lse, True)):
            if side is None or lse is None:
                continue
            one, rounding = _weights(side, e.T if flip else e, lse, u, half, tiny)  # step 5
            weights_error += one.T if flip else one
            half_error += rounding.T if flip else rounding
    else:
        row_lse = column_lse = None
        factor = np.abs(truth.row_factor).astype(np.float64)[:, None]
        sign = np.where(truth.positive, 1.0, -1.0)
        softplus = np.where(truth.allowed, np.logaddexp(0, -sign * logits), 0)
        slope = np.where(truth.allowed, np.exp(-np.logaddexp(0, sign * logits)), 0)
        each = (slope * e).sum(1) + (np.sqrt(m) + 8) * u * softplus.sum(1)
        if problem.reduction == "none":
            weights = np.where(here, np.ones(n) if problem.weights is None else problem.weights, 0)
            error = weights * each + 4 * u * np.abs(truth.loss.astype(np.float64))
        else:
            error = np.asarray(
                _silent(factor[:, 0], each).sum() + (np.sqrt(n) + 4) * u * _silent(factor, softplus).sum()
            )
        weights_error = np.where(truth.allowed, _silent(factor, slope * (e + 8 * u)), 0)
        half_error = np.where(truth.allowed, _silent(factor, half * slope + tiny), 0)

    rounded = weights_error + half_error
    many = min(np.sqrt(n * m), 256.0)
    floor = Budget(
        loss=error,
        queries=_product(scale * rounded, scale * g, keys, m, u, v)
        + out * np.abs(truth.queries.astype(np.float64))
        + tiny,
        keys=_product(scale * rounded.T, scale * g.T, queries, n, u, v)
        + out * np.abs(truth.keys.astype(np.float64))
        + tiny,
        scale=np.asarray(_sum(weights_error * products + g * c) + (many + 8) * u * _sum(g * products)),
        bias=np.asarray(0.0 if truth.rows or truth.columns else _sum(weights_error) + (many + 8) * u * _sum(g)),
        query_lse=row_lse,
        key_lse=column_lse,
        mean_lse=_mean_lse(truth, row_lse, column_lse, u),
        mean_positive=_mean(e, logits, truth.positive, u),
        mean_negative=_mean(e, logits, truth.allowed & ~truth.positive, u),
        hardest_negative=np.asarray(np.max(np.where(truth.allowed & ~truth.positive, e, 0), initial=0.0)),
        lead=2 * np.max(np.where(truth.allowed, e, 0), axis=1, initial=0.0),
    )
    return _with_dense(problem, dtype, truth, floor)


def _direction(side: Side | None, e: Array, logits: Array, u: float) -> tuple[Array | None, Array | None]:
    """Steps 3: errors of l_i and of lse_i."""
    if side is None:
        return None, None
    p, y = side.p.astype(np.float64), side.y.astype(np.float64)
    size = side.allowed.sum(1)
    lse = np.where(size > 0, _silent(p, e).sum(1) + u * (2 * np.abs(side.lse) + 2 * WINDOW + np.sqrt(size) + 8), 0.0)
    terms = np.where(y > 0, y * np.abs(logits), 0).sum(1)
    many = np.sqrt((y > 0).sum(1))
    loss = np.where(side.anchor, lse + _silent(y, e).sum(1) + u * (many + 1) * terms, 0.0)
    return loss, lse.astype(np.float64)


def _closing(problem: Problem, truth: Answer, loss: Array | None, column_loss: Array | None, u: float) -> Array:
    """Step 4: the error of the loss, or of each of its values."""
    parts = [(truth.rows, loss), (truth.columns, column_loss)]
    if problem.reduction != "none":
        total = 0.0
        for side, each in parts:
            if side is not None and each is not None:
                factor = np.abs(side.factor.astype(np.float64))
                total += float(_silent(factor, each + (np.sqrt(len(factor)) + 4) * u * np.abs(side.loss)).sum())
        return np.asarray(total)
    n = len(problem.queries)
    share = 0.5 if truth.rows is not None and truth.columns is not None else 1.0
    given = np.ones(n) if problem.weights is None else problem.weights.astype(np.float64)
    error = 4 * u * np.abs(truth.loss.astype(np.float64))
    if truth.rows is not None and loss is not None:
        error = error + np.where(truth.rows.anchor, share * given * loss, 0)
    if truth.columns is not None and column_loss is not None:
        targets = problem.targets if problem.targets is not None else np.arange(n)
        counted = (truth.loss != 0) & (targets >= 0)
        largest = np.max(np.where(truth.positive, given[:, None], 0), axis=0, initial=0.0)  # v_j is a mean of these
        index = np.where(counted, targets, 0)
        if len(column_loss):
            error = error + np.where(counted, share * largest[index] * column_loss[index], 0)
    return np.asarray(error)


def _weights(side: Side, e: Array, lse: Array, u: float, half: float, tiny: float) -> tuple[Array, Array]:
    factor = np.abs(side.factor.astype(np.float64))[:, None]
    p, y = side.p.astype(np.float64), side.y.astype(np.float64)
    error = np.where(side.allowed, _silent(factor, p * (e + lse[:, None] + 8 * u) + 2 * u * y), 0)
    return error, np.where(side.allowed, _silent(factor, half * (p + y) + tiny), 0)


def _product(error: Array, g: Array, rows: Array, terms: int, u: float, v: float) -> Array:
    clean = np.where(np.isfinite(rows), rows, 0)
    result: Array = error @ clean + ((np.sqrt(terms) + 4) * u + 2 * v) * (g @ clean)
    return result


def _silent(factor: Array, values: Array) -> Array:
    return np.where(factor != 0, factor * values, 0)


def _sum(values: Array) -> Any:
    return values.sum()


def _mean(e: Array, logits: Array, chosen: Array, u: float) -> Array:
    if not chosen.any():
        return np.asarray(0.0)
    size = np.abs(logits[chosen])
    return np.asarray(e[chosen].mean() + (min(np.sqrt(chosen.sum()), 256.0) + 8) * u * size.mean())


def _mean_lse(truth: Answer, rows: Array | None, columns: Array | None, u: float) -> Array | None:
    parts = []
    for side, error in ((truth.rows, rows), (truth.columns, columns)):
        if side is not None and error is not None:
            parts.append((error + 8 * u * np.abs(side.lse.astype(np.float64)))[side.anchor])
    if not parts:
        return None
    joined = np.concatenate(parts)
    return np.asarray(joined.max() if joined.size else 0.0)


def _with_dense(problem: Problem, dtype: str, truth: Answer, floor: Budget) -> Budget:
    """Add what the dense computation in the accumulation dtype gets wrong: per value, per row for matrices."""
    dense = solve(problem, work=np.float64 if dtype == "float64" else np.float32)

    def share(got: Array, want: Array) -> Array:
        error = np.abs(got.astype(np.float64) - want.astype(np.float64))
        return DENSE * np.where(np.isfinite(error), error, 0)

    def row(got: Array, want: Array) -> Array:
        largest: Array = np.max(share(got, want), axis=1, initial=0.0)
        return largest[:, None]

    def lse(got: Array | None, want: Array | None, error: Array | None) -> Array | None:
        return None if error is None or got is None or want is None else error + share(got, want)

    stats, true = dense.stats, truth.stats
    return Budget(
        loss=floor.loss + share(dense.loss, truth.loss),
        queries=floor.queries + row(dense.queries, truth.queries),
        keys=floor.keys + row(dense.keys, truth.keys),
        scale=floor.scale + share(dense.scale, truth.scale),
        bias=floor.bias + share(dense.bias, truth.bias),
        query_lse=lse(stats.query_lse, true.query_lse, floor.query_lse),
        key_lse=lse(stats.key_lse, true.key_lse, floor.key_lse),
        mean_lse=lse(stats.mean_lse, true.mean_lse, floor.mean_lse),
        mean_positive=floor.mean_positive + share(stats.mean_positive, true.mean_positive),
        mean_negative=floor.mean_negative + share(stats.mean_negative, true.mean_negative),
        hardest_negative=floor.hardest_negative + share(stats.hardest_negative, true.hardest_negative),
        lead=floor.lead,
    )
