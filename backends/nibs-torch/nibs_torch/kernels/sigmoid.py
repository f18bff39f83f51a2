"""Sigmoid: loss and gradient weights in one pass, for this loss waits for no lse.

    queries Q [r, d], keys K [c, d]       one macro tile, cut into tiles of BM x BN
    x = -z (scale acc + bias)             z = +1 on positives, -1 elsewhere
    RP [1, column tiles, r]               row sums of softplus(x)                                       (3)
    G [r, c]                              lift * w_i * (-z) sigmoid(x), in the input's dtype            (4)
    PRODUCT, TOTAL [column tiles, r]      sums of g_ij <q_i, k_j> and of g_ij, for scale and bias

Plan. One exponential an element, e = exp(-|x|): softplus(x) = max(x, 0) + log1p(e), and sigmoid(x) is 1 / (1 + e) or
e / (1 + e). Far from the positives e is 1e-5 and less, where log(1 + e) keeps three digits. So four elements are taken
together, as w = (1 + e1)(1 + e2)(1 + e3)(1 + e4) - 1 without ever adding the 1: one log1p and one reciprocal for four.
A tile is finished in parts of 64 columns (`tile.parts`), and the four come from the four quarters of a part, which a
thread holds in its own registers.

A pair that does not count has e = 0. Either of RP and G may be None: no loss, or no gradient.

Cost: 2 r c d flops, r c exponentials, r c / 4 logarithms and reciprocals; writes r c elements of the input's dtype.

Twin: `plain_sigmoid`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nibs_torch.kernels.rows import narrow, to_tf32
from nibs_torch.kernels.tile import (
    COUNTS,
    LOG2E,
    PART,
    dots,
    joined,
    logit,
    parts,
    permitted,
    place,
    quarters,
    target_of,
)

__all__ = ["plain_sigmoid", "sigmoid"]


@triton.jit
def log1p(w):
    """log(1 + w) for w >= 0, to the last digits of small w too: the rounding of 1 + w is divided out again."""
    u = 1.0 + w
    return tl.where(u == 1.0, w, tl.log(u) * (w / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def signed(
    acc, scale, bias, om, on, rows, columns, offset, target, QM, KM, QID, KID,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """x, whether pairs count, and which are positives."""
    hit = target[:, None] == on[None, :]
    ok = permitted(om, on, rows, columns, offset, hit, QM, KM, QID, KID, RAGGED, EXCLUDE, False)
    found = hit
    if MULTI:
        mine = tl.load(QID + om, mask=om < rows, other=0)
        theirs = tl.load(KID + on, mask=on < columns, other=0)
        found = (mine[:, None] == theirs[None, :]) | found
    s = logit(acc, scale, bias)
    return tl.where(found, -s, s), ok, found


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
    pm, pn = place(tile, row_tiles, column_tiles, GROUP)
    row, column = pm * BM, pn * BN
    acc = dots(Q, K, row, column, rows, columns, d, sq0, sq1, sk0, sk1, BM, BN, BK, DESC, PRECISION, UPCAST)
    om = row + tl.arange(0, BM)
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
    WIDTH: tl.constexpr = min(BN, PART)
    pieces = parts(acc, BM, BN)
    mass, product, total = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    for n in tl.static_range(BN // WIDTH):
        m, s1, t1 = sigmoid_part(
            pieces[n], scale, bias, om, column + n * WIDTH, rows, columns, offset, target, QM, KM, QID, KID, W, LIFTED,
            RP, G, PRODUCT, TOTAL, sg, DESIGNATED, EXCLUDE, MULTI, RAGGED, TF32, BM, WIDTH, UPCAST,
        )  # fmt: skip
        mass, product, total = mass + m, product + s1, total + t1
    at = pn.to(tl.int64) * rows + om
    if RP is not None:
        tl.store(RP + at, mass, mask=row_in)
    if PRODUCT is not None:
        tl.store(PRODUCT + at, product, mask=row_in)
    if TOTAL is not None:
        tl.store(TOTAL + at, total, mask=row_in)


@triton.jit
def sigmoid_part(
    acc, scale, bias, om, column, rows, columns, offset, target, QM, KM, QID, KID, W, LIFTED, RP, G, PRODUCT, TOTAL, sg,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, RAGGED: tl.constexpr, TF32: tl.constexpr,
    BM: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A part's weights into G; returns `[BM]` sums of softplus, of weight times product, and of weights."""
    PAIRS: tl.constexpr = RAGGED or EXCLUDE or (QM is not None) or (KM is not None)
    on = column + tl.arange(0, WIDTH)
    x, ok, found = signed(
        acc, scale, bias, om, on, rows, columns, offset, target, QM, KM, QID, KID, DESIGNATED, EXCLUDE, MULTI, RAGGED
    )
    e = tl.exp2(-tl.abs(x) * LOG2E)
    if PAIRS:
        e = tl.where(ok, e, 0.0)
    e1, e2, e3, e4 = quarters(e, BM, WIDTH)
    mass, product, total = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    if RP is not None:
        top = tl.maximum(x, 0.0)
        if PAIRS:
            top = tl.where(ok, top, 0.0)
        w12, w34 = e1 + e2 + e1 * e2, e3 + e4 + e3 * e4
        mass = tl.sum(log1p(w12 + w34 + w12 * w34), 1) + tl.sum(top, 1)
    if G is not None:
        p12, p34 = (1.0 + e1) * (1.0 + e2), (1.0 + e3) * (1.0 + e4)
        every = 1.0 / (p12 * p34)
        i12, i34 = p34 * every, p12 * every  # 1 / p12 and 1 / p34
        left = joined((1.0 + e2) * i12, (1.0 + e1) * i12, BM, WIDTH // 2)
        right = joined((1.0 + e4) * i34, (1.0 + e3) * i34, BM, WIDTH // 2)
        inverse = joined(left, right, BM, WIDTH)
        g = tl.where(x >= 0.0, inverse, e * inverse)
        g = tl.where(found, -g, g) * tl.load(W + om, mask=om < rows, other=0.0)[:, None]
        if PAIRS:
            g = tl.where(ok, g, 0.0)
        if PRODUCT is not None:
            each = g * acc
            if PAIRS:
                each = tl.where(ok, each, 0.0)  # an absent row's product may be NaN
            product = tl.sum(each, 1)
        if TOTAL is not None:
            total = tl.sum(g, 1)
        if LIFTED is not None:
            g = g * tl.load(LIFTED)
        if TF32:
            g = to_tf32(g)
        at = G + om[:, None].to(tl.int64) * sg + on[None, :]
        if RAGGED:
            tl.store(at, narrow(g, G, UPCAST), mask=(om < rows)[:, None] & (on < columns)[None, :])
        else:
            tl.store(at, narrow(g, G, UPCAST))
    return mass, product, total


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
