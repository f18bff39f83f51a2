"""Sigmoid: loss and gradient weights in one pass, for this loss waits for no lse.

    queries Q [r, d], keys K [c, d]       one macro tile, cut into tiles of BM x BN
    x = -z (scale acc + bias)             z = +1 on positives, -1 elsewhere
    RP [1, column tiles, r]               row sums of softplus(x)                                       (3)
    G [r, c]                              lift * w_i * (-z) sigmoid(x), in the input's dtype            (4)
    PRODUCT, TOTAL [column tiles, r]      sums of g_ij <q_i, k_j> and of g_ij, for scale and bias

Plan. One exponential an element, e = exp(-|x|): softplus(x) = max(x, 0) + log1p(e), and sigmoid(x) is 1 / (1 + e) or
e / (1 + e). Far from the positives e is 1e-5 and less, where log(1 + e) keeps three digits. So four elements are taken
together, as w = (1 + e1)(1 + e2)(1 + e3)(1 + e4) - 1 without ever adding the 1: one log1p and one reciprocal for four.
The four come from the four quarters of a tile's columns, which a thread holds in its own registers.

A pair that does not count has e = 0. Either of RP and G may be None: no loss, or no gradient.

Cost: 2 r c d flops, r c exponentials, r c / 4 logarithms and reciprocals; writes r c elements of the input's dtype.

Twin: `plain_sigmoid`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nibs_torch.kernels.rows import narrow, to_tf32
from nibs_torch.kernels.tile import COUNTS, LOG2E, dots, permitted, place, target_of

__all__ = ["plain_sigmoid", "sigmoid"]


@triton.jit
def log1p(w):
    """log(1 + w) for w >= 0, to the last digits of small w too: the rounding of 1 + w is divided out again."""
    u = 1.0 + w
    return tl.where(u == 1.0, w, tl.log(u) * (w / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of `x [BM, BN]`."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def signed(
    acc, scale, bias, om, on, rows, columns, offset, target, QM, KM, QID, KID,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """x, |x| of a quarter, whether pairs count, and which are positives."""
    hit = target[:, None] == on[None, :]
    ok = permitted(om, on, rows, columns, offset, hit, QM, KM, QID, KID, RAGGED, EXCLUDE, False)
    found = hit
    if MULTI:
        mine = tl.load(QID + om, mask=om < rows, other=0)
        theirs = tl.load(KID + on, mask=on < columns, other=0)
        found = (mine[:, None] == theirs[None, :]) | found
    s = acc * scale + bias
    return tl.where(found, -s, s), ok, found


@triton.jit
def softplus_parts(x, ok, PAIRS: tl.constexpr):
    """`e = exp(-|x|)` and max(x, 0), 0 where a pair does not count; and e with the sign of x, which then can go."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    top = tl.maximum(x, 0.0)
    if PAIRS:
        e = tl.where(ok, e, 0.0)
        top = tl.where(ok, top, 0.0)
    return e, top, tl.where(x >= 0.0, e, -e)


@triton.jit
def write(
    acc, e, inverse, ok, found, factor, LIFTED, G, om, on, rows, columns, sg,
    PRODUCT: tl.constexpr, TOTAL: tl.constexpr, PAIRS: tl.constexpr, RAGGED: tl.constexpr, TF32: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The weights of a quarter into G; returns the sums of weight times product, and of weights."""
    above = e.to(tl.int32, bitcast=True) >= 0  # the sign of zero counts
    g = tl.where(above, inverse, -e * inverse)
    g = tl.where(found, -g, g) * factor[:, None]
    if PAIRS:
        g = tl.where(ok, g, 0.0)
    product = tl.zeros(om.shape, tl.float32)
    total = product
    if PRODUCT:
        each = g * acc
        if PAIRS:
            each = tl.where(ok, each, 0.0)
        product = tl.sum(each, 1)
    if TOTAL:
        total = tl.sum(g, 1)
    if LIFTED is not None:
        g = g * tl.load(LIFTED)
    if TF32:
        g = to_tf32(g)
    at = G + om[:, None].to(tl.int64) * sg + on[None, :]
    if RAGGED:
        tl.store(at, narrow(g, G, INTERPRETED), mask=(om < rows)[:, None] & (on < columns)[None, :])
    else:
        tl.store(at, narrow(g, G, INTERPRETED))
    return product, total


@triton.jit(do_not_specialize=COUNTS)
def sigmoid(
    Q, K, SCALE, BIAS, QM, KM, QID, KID, T, W, LIFTED, RP, G, PRODUCT, TOTAL, SP,
    rows, columns, d, offset, row_tiles, column_tiles, programs, sq0, sq1, sk0, sk1, sg,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, RAGGED: tl.constexpr, TF32: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, DESC: tl.constexpr,
    PERSISTENT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile a program, or every `programs`-th one."""
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=True):
            sigmoid_tile(
                tile, Q, K, SCALE, BIAS, QM, KM, QID, KID, T, W, LIFTED, RP, G, PRODUCT, TOTAL, SP,
                rows, columns, d, offset, row_tiles, column_tiles, sq0, sq1, sk0, sk1, sg,
                DESIGNATED, EXCLUDE, MULTI, RAGGED, TF32, BM, BN, BK, GROUP, DESC, PRECISION, UPCAST,
            )  # fmt: skip
    else:
        sigmoid_tile(
            tl.program_id(0), Q, K, SCALE, BIAS, QM, KM, QID, KID, T, W, LIFTED, RP, G, PRODUCT, TOTAL, SP,
            rows, columns, d, offset, row_tiles, column_tiles, sq0, sq1, sk0, sk1, sg,
            DESIGNATED, EXCLUDE, MULTI, RAGGED, TF32, BM, BN, BK, GROUP, DESC, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def sigmoid_tile(
    tile, Q, K, SCALE, BIAS, QM, KM, QID, KID, T, W, LIFTED, RP, G, PRODUCT, TOTAL, SP,
    rows, columns, d, offset, row_tiles, column_tiles, sq0, sq1, sk0, sk1, sg,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, RAGGED: tl.constexpr, TF32: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, DESC: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Everything about one tile.

    SP [6, column tiles, r], or None: sums and counts of positives and of allowed logits, the largest positive and
    negative, as `lse` stores them.
    """
    PAIRS: tl.constexpr = RAGGED or EXCLUDE or (QM is not None) or (KM is not None)
    QUARTER: tl.constexpr = BN // 4
    pm, pn = place(tile, row_tiles, column_tiles, GROUP)
    row, column = pm * BM, pn * BN
    acc = dots(Q, K, row, column, rows, columns, d, sq0, sq1, sk0, sk1, BM, BN, BK, DESC, PRECISION, UPCAST)
    om, on = row + tl.arange(0, BM), column + tl.arange(0, QUARTER)
    row_in = om < rows
    scale, bias = tl.load(SCALE), tl.load(BIAS)
    target = target_of(T, om, rows, columns, offset, DESIGNATED)
    if SP is not None:
        whole = column + tl.arange(0, BN)
        x, ok, found = signed(
            acc, scale, bias, om, whole, rows, columns, offset, target, QM, KM, QID, KID,
            DESIGNATED, EXCLUDE, MULTI, RAGGED,
        )  # fmt: skip
        s = tl.where(found, -x, x)
        found = found & ok
        at = SP + pn.to(tl.int64) * rows + om
        field = column_tiles.to(tl.int64) * rows
        tl.store(at, tl.sum(tl.where(found, s, 0.0), 1), mask=row_in)
        tl.store(at + field, tl.sum(found.to(tl.float32), 1), mask=row_in)
        tl.store(at + 2 * field, tl.sum(tl.where(ok, s, 0.0), 1), mask=row_in)
        tl.store(at + 3 * field, tl.sum(ok.to(tl.float32), 1), mask=row_in)
        tl.store(at + 4 * field, tl.max(tl.where(found, s, -float("inf")), 1), mask=row_in)
        negative = ok & (found == 0)
        tl.store(at + 5 * field, tl.max(tl.where(negative, s, -float("inf")), 1), mask=row_in)
    left, right = halves(acc, BM, BN)
    a1, a2 = halves(left, BM, BN // 2)
    a3, a4 = halves(right, BM, BN // 2)
    n1, n2, n3, n4 = on, on + QUARTER, on + 2 * QUARTER, on + 3 * QUARTER
    x1, ok1, f1 = signed(a1, scale, bias, om, n1, rows, columns, offset, target, QM, KM, QID, KID,
                         DESIGNATED, EXCLUDE, MULTI, RAGGED)  # fmt: skip
    x2, ok2, f2 = signed(a2, scale, bias, om, n2, rows, columns, offset, target, QM, KM, QID, KID,
                         DESIGNATED, EXCLUDE, MULTI, RAGGED)  # fmt: skip
    x3, ok3, f3 = signed(a3, scale, bias, om, n3, rows, columns, offset, target, QM, KM, QID, KID,
                         DESIGNATED, EXCLUDE, MULTI, RAGGED)  # fmt: skip
    x4, ok4, f4 = signed(a4, scale, bias, om, n4, rows, columns, offset, target, QM, KM, QID, KID,
                         DESIGNATED, EXCLUDE, MULTI, RAGGED)  # fmt: skip
    e1, top1, z1 = softplus_parts(x1, ok1, PAIRS)
    e2, top2, z2 = softplus_parts(x2, ok2, PAIRS)
    e3, top3, z3 = softplus_parts(x3, ok3, PAIRS)
    e4, top4, z4 = softplus_parts(x4, ok4, PAIRS)
    if RP is not None:
        w12 = e1 + e2 + e1 * e2
        w34 = e3 + e4 + e3 * e4
        each = log1p(w12 + w34 + w12 * w34) + (top1 + top2) + (top3 + top4)
        tl.store(RP + pn.to(tl.int64) * rows + om, tl.sum(each, 1), mask=row_in)
    if G is not None:
        factor = tl.load(W + om, mask=row_in, other=0.0)
        p12, p34 = (1.0 + e1) * (1.0 + e2), (1.0 + e3) * (1.0 + e4)
        every = 1.0 / (p12 * p34)
        i12, i34 = p34 * every, p12 * every  # 1 / p12 and 1 / p34
        WITH_PRODUCT: tl.constexpr = PRODUCT is not None
        WITH_TOTAL: tl.constexpr = TOTAL is not None
        s1, t1 = write(a1, z1, (1.0 + e2) * i12, ok1, f1, factor, LIFTED, G, om, n1, rows, columns, sg,
                       WITH_PRODUCT, WITH_TOTAL, PAIRS, RAGGED, TF32, UPCAST)  # fmt: skip
        s2, t2 = write(a2, z2, (1.0 + e1) * i12, ok2, f2, factor, LIFTED, G, om, n2, rows, columns, sg,
                       WITH_PRODUCT, WITH_TOTAL, PAIRS, RAGGED, TF32, UPCAST)  # fmt: skip
        s3, t3 = write(a3, z3, (1.0 + e4) * i34, ok3, f3, factor, LIFTED, G, om, n3, rows, columns, sg,
                       WITH_PRODUCT, WITH_TOTAL, PAIRS, RAGGED, TF32, UPCAST)  # fmt: skip
        s4, t4 = write(a4, z4, (1.0 + e3) * i34, ok4, f4, factor, LIFTED, G, om, n4, rows, columns, sg,
                       WITH_PRODUCT, WITH_TOTAL, PAIRS, RAGGED, TF32, UPCAST)  # fmt: skip
        if PRODUCT is not None:
            tl.store(PRODUCT + pn.to(tl.int64) * rows + om, (s1 + s2) + (s3 + s4), mask=row_in)
        if TOTAL is not None:
            tl.store(TOTAL + pn.to(tl.int64) * rows + om, (t1 + t2) + (t3 + t4), mask=row_in)


def plain_sigmoid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain twin: row sums of softplus(x), and sigmoid(x), for `x [r, 4 k]` in float32, four at a time."""
    e = torch.exp2(-x.abs() * LOG2E.value)
    e1, e2, e3, e4 = e.chunk(4, dim=1)
    w12, w34 = e1 + e2 + e1 * e2, e3 + e4 + e3 * e4
    mass = torch.log1p(w12 + w34 + w12 * w34).sum(1) + x.clamp(min=0).sum(1)
    p12, p34 = (1 + e1) * (1 + e2), (1 + e3) * (1 + e4)
    every = 1 / (p12 * p34)
    inverse = torch.cat([(1 + e2) * p34, (1 + e1) * p34, (1 + e4) * p12, (1 + e3) * p12], dim=1) * every.repeat(1, 4)
    return mass, torch.where(x >= 0, inverse, e * inverse)
