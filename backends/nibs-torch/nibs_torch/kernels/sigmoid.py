"""Sigmoid: loss and gradient weights in one pass, for this loss waits for no lse.

    queries Q [r, d], keys K [c, d]       one macro tile, cut into tiles of BM x BN
    x = -z (scale acc + bias)             z = +1 on positives, -1 elsewhere
    RP [1, column tiles, r]               row sums of softplus(x)                                       (3)
    G [r, c]                              lift * w_i * (-z) sigmoid(x), in the input's dtype            (4)
    PRODUCT, TOTAL [column tiles, r]      sums of g_ij <q_i, k_j> and of g_ij, for scale and bias

Plan. One exponential an element, e = exp(-|x|): softplus(x) = max(x, 0) + log(1 + e), and sigmoid(x) is 1 / (1 + e) or
e / (1 + e). Far from the positives e is 1e-5 and less, where log(1 + e) keeps three digits. So several elements are
taken together, as w = (1 + e1)(1 + e2)... - 1 without ever adding the 1: from the w of two groups, a and b, comes
a (1 + b) + b, where 1 + b is rounded once, to multiply. Sixteen elements share one reciprocal of 1 + w, eight in tiles
of 128 columns or 32, and up to 64 of a row one logarithm; w stays below 2^64.

A tile is finished in parts of 64 columns or 32 (`tile.parts`), and what shares comes from the eighths of a part (of 32:
the quarters) and from neighbours, which a thread holds in its own registers; sums over rows leave them once, as the
tile ends. Where no pair has to be judged, all are taken for negatives, and in the few tiles that hold designated
positives those are turned afterwards: e is the same for x and -x. That branch stands between a part's exponentials and
its stores, so that the stores of one part are mixed with the exponentials of the next, whose unit is busy for half the
time that a part takes.

A pair that does not count has x = -inf, so e = 0. Either of RP and G may be None: no loss, or no gradient.

Cost: 2 r c d flops, r c exponentials, in the widest tiles r c / 16 reciprocals and r c / 64 logarithms; writes r c
elements of the input's dtype.

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
    dots,
    halves,
    joined,
    logit,
    meets,
    part_width,
    parts,
    permitted,
    place,
    quarters,
    target_of,
)

__all__ = ["plain_sigmoid", "sigmoid"]


@triton.jit
def log1p(w):
    """log(1 + w) for w >= 0, to the last digits of small w too: what the rounding of 1 + w took is added again.

    It is `(w - (u - 1)) / u`, and below 2 the 1 / u changes nothing that float32 holds. Above, log(u) needs no help.
    """
    u = 1.0 + w
    return tl.log(u) + tl.where(u < 2.0, w - (u - 1.0), 0.0)


@triton.jit
def folded(x, BM: tl.constexpr, WIDTH: tl.constexpr):
    """`[BM, WIDTH / 8]` sums of `x [BM, WIDTH]`, over what a thread holds: two neighbours of each eight columns.

    Parts of 32 columns belong to threads with twice the rows, to whom both neighbours' sums would be too many.
    """
    sums = tl.sum(tl.reshape(x, (BM, WIDTH // 8, 8)), 1)
    return tl.sum(tl.reshape(sums, (BM, 4, 2)), 2) if WIDTH == 32 else sums


@triton.jit
def judged(
    om, on, rows, columns, offset, target, QM, KM, QID, KID,
    EXCLUDE: tl.constexpr, MULTI: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Which pairs count, and which of them are positives."""
    hit = target[:, None] == on[None, :]
    ok = permitted(om, on, rows, columns, offset, hit, QM, KM, QID, KID, RAGGED, EXCLUDE, False)
    found = hit
    if MULTI:
        mine = tl.load(QID + om, mask=om < rows, other=0)
        theirs = tl.load(KID + on, mask=on < columns, other=0)
        found = (mine[:, None] == theirs[None, :]) | found
    return ok, found & ok


@triton.jit
def turned(g, acc, scale, bias, hit, factor, BM: tl.constexpr, WIDTH: tl.constexpr):
    """A part's sums of max(x, 0) and its weights, made as if of negatives alone, once its positives are turned: made
    again from their products, one a row. e is the same for x and -x, so w stays.
    """
    s = logit(acc, scale, bias)
    own = tl.sum(tl.where(hit, s, 0.0), 1)
    e = tl.exp2(tl.abs(own) * -LOG2E)
    weight = factor * tl.where(own <= 0.0, -1.0, -e) / (1.0 + e)
    return folded(tl.maximum(tl.where(hit, -s, s), 0.0), BM, WIDTH), tl.where(hit, weight[:, None], g)


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
        ok, found = judged(om, whole, rows, columns, offset, target, QM, KM, QID, KID, EXCLUDE, MULTI, RAGGED)
        s = logit(acc, scale, bias)
        at = SP + pn.to(tl.int64) * rows + om
        field = column_tiles.to(tl.int64) * rows
        tl.store(at, tl.sum(tl.where(found, s, 0.0), 1), mask=row_in)
        tl.store(at + field, tl.sum(found.to(tl.float32), 1), mask=row_in)
        tl.store(at + 2 * field, tl.sum(tl.where(ok, s, 0.0), 1), mask=row_in)
        tl.store(at + 3 * field, tl.sum(ok.to(tl.float32), 1), mask=row_in)
        tl.store(at + 4 * field, tl.max(tl.where(found, s, -float("inf")), 1), mask=row_in)
        negative = ok & (found == 0)
        tl.store(at + 5 * field, tl.max(tl.where(negative, s, -float("inf")), 1), mask=row_in)
    WIDTH: tl.constexpr = part_width(BN)
    pieces = parts(acc, BM, BN)
    holds = meets(target, row, column, offset, DESIGNATED, BM, BN)
    factor = tl.zeros((BM,), tl.float32)
    if G is not None:
        factor = tl.load(W + om, mask=row_in, other=0.0)
    w, top = tl.zeros((BM, 4), tl.float32), tl.zeros((BM, WIDTH // 8), tl.float32)
    product, total = tl.zeros((BM, WIDTH // 8), tl.float32), tl.zeros((BM, WIDTH // 8), tl.float32)
    for n in tl.static_range(BN // WIDTH):
        w, top, product, total = sigmoid_part(
            w, top, product, total, pieces[n], scale, bias, om, column + n * WIDTH, rows, columns, offset, target,
            holds, factor, QM, KM, QID, KID, LIFTED, RP, G, PRODUCT, TOTAL, sg,
            EXCLUDE, MULTI, RAGGED, TF32, BM, WIDTH, UPCAST,
        )  # fmt: skip
    at = pn.to(tl.int64) * rows + om
    if RP is not None:
        tl.store(RP + at, tl.sum(log1p(w), 1) + tl.sum(top, 1), mask=row_in)
    if PRODUCT is not None:
        tl.store(PRODUCT + at, tl.sum(product, 1), mask=row_in)
    if TOTAL is not None:
        tl.store(TOTAL + at, tl.sum(total, 1), mask=row_in)


@triton.jit
def sigmoid_part(
    w, top, product, total, acc, scale, bias, om, column, rows, columns, offset, target, holds, factor,
    QM, KM, QID, KID, LIFTED, RP, G, PRODUCT, TOTAL, sg,
    EXCLUDE: tl.constexpr, MULTI: tl.constexpr, RAGGED: tl.constexpr, TF32: tl.constexpr,
    BM: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A part's weights into G; returns w `[BM, 4]`, and sums `[BM, WIDTH / 8]` of max(x, 0), of weight times product,
    and of weights, with the part's in them.
    """
    MASKED: tl.constexpr = EXCLUDE or (QM is not None) or (KM is not None)  # NaN may be beside what counts
    EACH: tl.constexpr = RAGGED or MASKED or MULTI  # every pair is judged
    on = column + tl.arange(0, WIDTH)
    x = logit(acc, scale, bias)
    if EACH:
        ok, found = judged(om, on, rows, columns, offset, target, QM, KM, QID, KID, EXCLUDE, MULTI, RAGGED)
        x = tl.where(found, -x, x)
    if RAGGED or MASKED:
        x = tl.where(ok, x, -float("inf"))
    e = tl.exp2(tl.abs(x) * -LOG2E)
    over, numerator = folded(tl.maximum(x, 0.0), BM, WIDTH), tl.where(x >= 0.0, 1.0, e)
    if EACH:
        numerator = tl.where(found, -numerator, numerator)
    e1, e2, e3, e4 = quarters(e, BM, WIDTH)
    u1, u2, u3, u4 = 1.0 + e1, 1.0 + e2, 1.0 + e3, 1.0 + e4
    w12, w34 = tl.fma(e1, u2, e2), tl.fma(e3, u4, e4)
    u12, u34 = 1.0 + w12, 1.0 + w34
    w4 = tl.fma(w12, u34, w34)
    HALVED: tl.constexpr = WIDTH > 32  # two eights of columns are left, not one
    if HALVED:
        w_left, w_right = halves(w4, BM, WIDTH // 4)
        u_left, u_right = halves(1.0 + w4, BM, WIDTH // 4)
        w8 = tl.fma(w_left, u_right, w_right)
    else:
        w8 = w4
    w_even, w_odd = tl.split(tl.reshape(w8, (BM, 4, 2)))
    u_even, u_odd = tl.split(tl.reshape(1.0 + w8, (BM, 4, 2)))
    w16 = tl.fma(w_even, u_odd, w_odd)
    u16 = 1.0 + w16
    g = e  # where no weights are asked for, nobody's
    if G is not None:
        every = factor[:, None] / u16  # from here on a reciprocal is a quotient: the row's weight over it
        i4 = tl.reshape(tl.join(u_odd * every, u_even * every), (BM, 8))
        if HALVED:
            i4 = joined(u_right * i4, u_left * i4, BM, WIDTH // 4)
        i12, i34 = u34 * i4, u12 * i4
        left = joined(u2 * i12, u1 * i12, BM, WIDTH // 2)
        right = joined(u4 * i34, u3 * i34, BM, WIDTH // 2)
        g = joined(left, right, BM, WIDTH) * numerator
    if MASKED:
        g = tl.where(ok, g, 0.0)  # what shares with it may be NaN
    if not EACH:  # noqa: SIM102 - known when compiled
        if holds:
            over, g = turned(g, acc, scale, bias, target[:, None] == on[None, :], factor, BM, WIDTH)
    if RP is not None:
        w = tl.fma(w, u16, w16)
        top += over
    if G is not None:
        if PRODUCT is not None:
            each = g * acc
            if MASKED:
                each = tl.where(ok, each, 0.0)  # an absent row's product may be NaN
            product += folded(each, BM, WIDTH)
        if TOTAL is not None:
            total += folded(g, BM, WIDTH)
        if LIFTED is not None:
            g = g * tl.load(LIFTED)
        if TF32:
            g = to_tf32(g)
        at = G + om[:, None].to(tl.int64) * sg + on[None, :]
        if RAGGED:
            tl.store(at, narrow(g, G, UPCAST), mask=(om < rows)[:, None] & (on < columns)[None, :])
        else:
            tl.store(at, narrow(g, G, UPCAST))
    return w, top, product, total


def plain_sigmoid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain twin: row sums of softplus(x), and sigmoid(x), for `x [r, 64 k]` in float32.

    Sixteen share a reciprocal, 64 a logarithm.
    """
    e = torch.exp2(-x.abs() * LOG2E.value)
    w, levels = e.reshape(len(x), 16, -1), []
    while w.shape[1] > 1:
        left, right = w.chunk(2, dim=1)
        levels.append((1 + left, 1 + right))
        w = left * (1 + right) + right
    inverse = 1 / (1 + w)
    for left, right in reversed(levels):
        inverse = torch.cat([right * inverse, left * inverse], dim=1)
    inverse = inverse.reshape(e.shape)
    whole = torch.zeros(())
    for each in w.reshape(len(x), -1, 4).unbind(2):
        whole = whole * (1 + each) + each
    mass = torch.log1p(whole).sum(1) + x.clamp(min=0).sum(1)
    return mass, torch.where(x >= 0, inverse, e * inverse)
