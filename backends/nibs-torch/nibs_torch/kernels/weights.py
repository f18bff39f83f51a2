"""InfoNCE, second pass: gradient weights of both directions, made from the tile again and written once.

    queries Q [r, d], keys K [c, d]             one macro tile, cut into tiles of BM x BN
    g_ij = f_i exp(s_ij - l_i) + f_j exp(s_ij - l_j) - smooth_i - smooth_j - (t_i + t_j) [j positive]     (2)
    G [r, c]                                     lift * g in the input's dtype
    PRODUCT [column tiles, r]                    sums of g_ij <q_i, k_j>, from which the scale's gradient comes

f, l, t, smooth are `nibs.verbs.Weights`: factor, shift, target, smooth. The two products `G K` and `G^T Q` around this
kernel belong to the library; `nibs_torch.fused` calls them.

Plan. Where the shifts of a tile's anchors lie within SPREAD of one another, one exponential around their middle serves
both sides: `exp(s - mid) (f_i exp(mid - l_i) + f_j exp(mid - l_j))`. `spans` finds the least and the largest shift of
each tile's rows and columns; a wider tile gives inf * 0. So `wide`, always launched and returning at once on all other
tiles, makes such tiles again, with two exponentials, in small ones. That `weights` makes them too, for nothing, leaves
its loop over tiles without a condition: only such loops are fused, to fetch the next tile while one is finished.

A pair of two rows that are no anchors, or one that does not count, is bounded by nobody's lse: logits are cut at mid +
SPREAD, beyond which no weight that is not 0 can lie. Targets are subtracted before rounding, for near convergence
p - y is far smaller than either, and only in tiles that the diagonal or a target meets. A tile is finished by
the quarters of its columns (`tile.parts`): products, weights and what is stored of them, all of a tile at once, would
not fit the registers. float16 holds nothing below 6e-8: its weights are stored times a power of two (LIFTED), undone
in float32.

The scale's gradient is summed here, beside the weights, though `<q_i, dq_i>` after the products would cost nothing:
those were made from rounded weights. Each bfloat16 weight is off by up to 2^-9 of itself, and where one weight of a
row counts most, so is the row's sum; over n rows the mean is off by 2^-9 / sqrt(n), 1e-4 at n = 400 and 8e-6 at
65,536, where float32 has 1e-7.

Cost: 2 r c d flops, r c exponentials; writes r c elements of the input's dtype.

Twin: `plain_weights`.
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
    logit,
    meets,
    part_width,
    parts,
    permitted,
    place,
    target_of,
    vector_parts,
    within,
)

__all__ = ["SPREAD", "plain_weights", "weights", "wide"]

SPREAD: tl.constexpr = tl.constexpr(69.0)  # natural log: 2^50 either side of the middle, whose square float32 holds
INFINITY: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=COUNTS)
def spans(
    RS, CS, SPANS, rows, columns, row_tiles, column_tiles,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """SPANS [2, row tiles + column tiles]: the least and the largest shift of the anchors among a tile's rows, then of
    those among a tile's columns; inf and -inf where there is none.
    """
    tile = tl.program_id(0)
    low = tl.full((), INFINITY, tl.float32)
    high = tl.full((), -INFINITY, tl.float32)
    if RS is not None:  # noqa: SIM102 - known when compiled
        if tile < row_tiles:
            low, high = ends(RS, tile * BM + tl.arange(0, BM), rows)
    if CS is not None:  # noqa: SIM102 - known when compiled
        if tile >= row_tiles:
            low, high = ends(CS, (tile - row_tiles) * BN + tl.arange(0, BN), columns)
    tl.store(SPANS + tile, low)
    tl.store(SPANS + row_tiles + column_tiles + tile, high)


@triton.jit
def ends(S, o, size):
    """The least and the largest of the shifts that are no infinity."""
    shift = tl.load(S + o, mask=o < size, other=INFINITY)
    return tl.min(shift, 0), tl.max(tl.where(shift == INFINITY, -INFINITY, shift), 0)


@triton.jit
def span(SPANS, pm, pn, row_tiles, column_tiles):
    """Middle and width of the anchors' shifts in a tile, or in several: pm, pn are one row and column, or as many."""
    at = row_tiles + pn
    low = tl.minimum(tl.load(SPANS + pm), tl.load(SPANS + at))
    SPANS += row_tiles + column_tiles
    high = tl.maximum(tl.load(SPANS + pm), tl.load(SPANS + at))
    none = low == INFINITY
    return tl.where(none, 0.0, low + 0.5 * (high - low)), tl.where(none, 0.0, high - low)


@triton.jit
def share(F, S, o, inside, middle):
    """`[rows]`: what multiplies the shared exponential, `f exp(middle - shift)`."""
    factor = tl.load(F + o, mask=inside, other=0.0)
    shift = tl.load(S + o, mask=inside, other=INFINITY)
    return factor * tl.exp(middle - shift)


@triton.jit(do_not_specialize=COUNTS)
def weights(
    Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
    RF, RS, RT, RM, CF, CS, CT, CM, SPANS, LIFTED, G, PRODUCT, KEPT,
    rows, columns, d, offset, row_tiles, column_tiles, programs, sq0, sq1, sk0, sk1, sg, sp,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, SELF: tl.constexpr, RAGGED: tl.constexpr,
    TF32: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    DESC: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile a program, or every `programs`-th one."""
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=True):
            weights_tile(
                tile, Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
                RF, RS, RT, RM, CF, CS, CT, CM, SPANS, LIFTED, G, PRODUCT, KEPT,
                rows, columns, d, offset, row_tiles, column_tiles, sq0, sq1, sk0, sk1, sg, sp,
                DESIGNATED, EXCLUDE, MULTI, SELF, RAGGED, TF32, BM, BN, BK, GROUP, DESC, PRECISION, UPCAST,
            )  # fmt: skip
    else:
        weights_tile(
            tl.program_id(0), Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
            RF, RS, RT, RM, CF, CS, CT, CM, SPANS, LIFTED, G, PRODUCT, KEPT,
            rows, columns, d, offset, row_tiles, column_tiles, sq0, sq1, sk0, sk1, sg, sp,
            DESIGNATED, EXCLUDE, MULTI, SELF, RAGGED, TF32, BM, BN, BK, GROUP, DESC, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def weights_tile(
    tile, Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
    RF, RS, RT, RM, CF, CS, CT, CM, SPANS, LIFTED, G, PRODUCT, KEPT,
    rows, columns, d, offset, row_tiles, column_tiles, sq0, sq1, sk0, sk1, sg, sp,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, SELF: tl.constexpr, RAGGED: tl.constexpr,
    TF32: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    DESC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Everything about one tile."""
    pm, pn = place(tile, row_tiles, column_tiles, GROUP)
    row, column = pm * BM, pn * BN
    if KEPT is None:
        acc = dots(Q, K, row, column, rows, columns, d, sq0, sq1, sk0, sk1, BM, BN, BK, DESC, PRECISION, UPCAST)
    om, on = row + tl.arange(0, BM), column + tl.arange(0, BN)
    row_in, column_in = om < rows, on < columns
    WIDTH: tl.constexpr = part_width(BN)
    middle, _ = span(SPANS, pm, pn, row_tiles, column_tiles)
    target = target_of(T, om, rows, columns, offset, DESIGNATED)
    if KEPT is not None:
        at = KEPT + om[:, None].to(tl.int64) * sp + on[None, :]
        acc = tl.load(at, mask=row_in[:, None] & column_in[None, :], other=0.0)
    elif EXACT is not None:
        exact = tl.load(EXACT + om, mask=row_in, other=0.0)
        acc = tl.where(target[:, None] == on[None, :], exact[:, None], acc)
    holds = meets(target, row, column, offset, DESIGNATED, BM, BN)
    pieces = parts(acc, BM, BN)
    mine, theirs = tl.zeros((BM,), tl.float32), vector_parts(tl.zeros((BN,), tl.float32), BN)
    if RF is not None:
        mine = share(RF, RS, om, row_in, middle)
    if CF is not None:
        theirs = vector_parts(share(CF, CS, on, column_in, middle), BN)
    total = tl.zeros((BM,), tl.float32)
    for n in tl.static_range(BN // WIDTH):
        total += part_weights(
            pieces[n], mine, theirs[n], column + n * WIDTH, target, holds, om, middle, SCALE,
            QM, KM, QID, KID, QLIM, KLIM, RF, RT, RM, CF, CT, CM, LIFTED, G, PRODUCT, rows, columns, offset, sg,
            DESIGNATED, EXCLUDE, MULTI, SELF, RAGGED, TF32, WIDTH, UPCAST,
        )  # fmt: skip
    if PRODUCT is not None:
        tl.store(PRODUCT + pn.to(tl.int64) * rows + om, total, mask=row_in)


@triton.jit
def shared(acc, SCALE, middle):
    """`exp(s - middle)`, the exponential that both sides share; cut where nothing that counts can lie."""
    power = (logit(acc, tl.load(SCALE), 0.0) - middle) * LOG2E
    return tl.exp2(tl.minimum(power, SPREAD * LOG2E))


@triton.jit
def part_weights(
    acc, mine, theirs, column, target, holds, om, middle, SCALE, QM, KM, QID, KID, QLIM, KLIM,
    RF, RT, RM, CF, CT, CM, LIFTED, G, PRODUCT, rows, columns, offset, sg,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, SELF: tl.constexpr, RAGGED: tl.constexpr,
    TF32: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A part's weights into G; returns `[BM]` sums of weight times product."""
    PAIRS: tl.constexpr = RAGGED or EXCLUDE or SELF or (QM is not None) or (KM is not None)
    MARGIN: tl.constexpr = QLIM is not None
    on = column + tl.arange(0, WIDTH)
    row_in, column_in = om < rows, on < columns
    hit = target[:, None] == on[None, :]
    g = shared(acc, SCALE, middle)
    if PAIRS or MARGIN:
        ok = permitted(om, on, rows, columns, offset, hit, QM, KM, QID, KID, RAGGED, EXCLUDE, SELF)
    if MARGIN:
        by_row = within(acc, tl.load(QLIM + om, mask=row_in, other=0.0), hit, ok, 1)
        by_column = within(acc, tl.load(KLIM + on, mask=column_in, other=0.0), hit, ok, 0)
        e = g
        g = tl.zeros(acc.shape, tl.float32)
        if RF is not None:
            g += tl.where(by_row, e * mine[:, None], 0.0)
        if CF is not None:
            g += tl.where(by_column, e * theirs[None, :], 0.0)
        if RM is not None:
            g -= tl.where(by_row, tl.load(RM + om, mask=row_in, other=0.0)[:, None], 0.0)
        if CM is not None:
            g -= tl.where(by_column, tl.load(CM + on, mask=column_in, other=0.0)[None, :], 0.0)
    else:
        if RF is not None and CF is not None:
            g = g * (mine[:, None] + theirs[None, :])
        elif RF is not None:
            g = g * mine[:, None]
        else:
            g = g * theirs[None, :]
        if RM is not None:
            g -= tl.load(RM + om, mask=row_in, other=0.0)[:, None]
        if CM is not None:
            g -= tl.load(CM + on, mask=column_in, other=0.0)[None, :]
        if PAIRS:
            g = tl.where(ok, g, 0.0)
    if DESIGNATED != 0 or MULTI:
        g = less_targets(
            g, hit, holds, om, on, rows, columns, offset, QM, KM, QID, KID, RT, CT,
            EXCLUDE, MULTI, SELF, RAGGED,
        )  # fmt: skip
    total = tl.zeros(om.shape, tl.float32)
    if PRODUCT is not None:
        each = g * acc
        if PAIRS or MARGIN:
            each = tl.where(ok, each, 0.0)  # an absent row's product may be NaN
        total = tl.sum(each, 1)
    if LIFTED is not None:
        g = g * tl.load(LIFTED)
    out = to_tf32(g) if TF32 else g
    at = G + om[:, None].to(tl.int64) * sg + on[None, :]
    if RAGGED:
        tl.store(at, narrow(out, G, UPCAST), mask=row_in[:, None] & column_in[None, :])
    else:
        tl.store(at, narrow(out, G, UPCAST))
    return total


@triton.jit
def less_targets(
    g, hit, holds, om, on, rows, columns, offset, QM, KM, QID, KID, RT, CT,
    EXCLUDE: tl.constexpr, MULTI: tl.constexpr, SELF: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """`g` less the targets of its positives. holds: whether a designated one may be among them."""
    row_in, column_in = om < rows, on < columns
    if MULTI:
        ok = permitted(om, on, rows, columns, offset, hit, QM, KM, QID, KID, RAGGED, EXCLUDE, SELF)
        mine = tl.load(QID + om, mask=row_in, other=0)
        theirs = tl.load(KID + on, mask=column_in, other=0)
        found = ((mine[:, None] == theirs[None, :]) | hit) & ok
        if RT is not None:
            g -= tl.where(found, tl.load(RT + om, mask=row_in, other=0.0)[:, None], 0.0)
        if CT is not None:
            g -= tl.where(found, tl.load(CT + on, mask=column_in, other=0.0)[None, :], 0.0)
    elif holds:
        if RT is not None:
            g -= tl.where(hit, tl.load(RT + om, mask=row_in, other=0.0)[:, None], 0.0)
        if CT is not None:
            g -= tl.where(hit, tl.load(CT + on, mask=column_in, other=0.0)[None, :], 0.0)
    return g


@triton.jit(do_not_specialize=COUNTS)
def wide(
    Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
    RF, RS, RT, RM, CF, CS, CT, CM, SPANS, LIFTED, G, PRODUCT,
    rows, columns, d, offset, row_tiles, column_tiles, programs, sq0, sq1, sk0, sk1, sg,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, SELF: tl.constexpr, TF32: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SM: tl.constexpr, SN: tl.constexpr, BK: tl.constexpr,
    SEVERAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Tiles whose shifts lie too far apart for one exponential, once more, found SEVERAL at a time."""
    tiles = row_tiles * column_tiles
    for first in range(tl.program_id(0) * SEVERAL, tiles, programs * SEVERAL):
        each = first + tl.arange(0, SEVERAL)
        here = tl.minimum(each, tiles - 1)
        _, width = span(SPANS, here // column_tiles, here % column_tiles, row_tiles, column_tiles)
        far = (((width <= SPREAD) == 0) & (each < tiles)).to(tl.int32)
        if tl.max(far, 0) != 0:
            for n in range(0, SEVERAL):
                tile = first + n
                if tl.max(tl.where(each == tile, far, 0), 0) != 0:
                    wide_tile(
                        tile // column_tiles, tile % column_tiles, Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
                        RF, RS, RT, RM, CF, CS, CT, CM, LIFTED, G, PRODUCT,
                        rows, columns, d, offset, sq0, sq1, sk0, sk1, sg,
                        DESIGNATED, EXCLUDE, MULTI, SELF, TF32, BM, BN, SM, SN, BK, PRECISION, UPCAST,
                    )  # fmt: skip


@triton.jit
def wide_tile(
    pm, pn, Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
    RF, RS, RT, RM, CF, CS, CT, CM, LIFTED, G, PRODUCT,
    rows, columns, d, offset, sq0, sq1, sk0, sk1, sg,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, SELF: tl.constexpr, TF32: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SM: tl.constexpr, SN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile in small ones of SM x SN: one exponential a side."""
    for i in range(0, BM // SM):
        row = pm * BM + i * SM
        om = row + tl.arange(0, SM)
        row_in = om < rows
        target = target_of(T, om, rows, columns, offset, DESIGNATED)
        total = tl.zeros((SM,), tl.float32)
        for j in range(0, BN // SN):
            column = pn * BN + j * SN
            on = column + tl.arange(0, SN)
            column_in = on < columns
            acc = dots(Q, K, row, column, rows, columns, d, sq0, sq1, sk0, sk1, SM, SN, BK, False, PRECISION, UPCAST)
            hit = target[:, None] == on[None, :]
            if EXACT is not None:
                exact = tl.load(EXACT + om, mask=row_in, other=0.0)
                acc = tl.where(hit, exact[:, None], acc)
            ok = permitted(om, on, rows, columns, offset, hit, QM, KM, QID, KID, True, EXCLUDE, SELF)
            by_row, by_column = ok, ok
            if QLIM is not None:
                by_row = within(acc, tl.load(QLIM + om, mask=row_in, other=0.0), hit, ok, 1)
                by_column = within(acc, tl.load(KLIM + on, mask=column_in, other=0.0), hit, ok, 0)
            s = logit(acc, tl.load(SCALE), 0.0)
            g = tl.zeros((SM, SN), tl.float32)
            if RF is not None:
                shift = tl.load(RS + om, mask=row_in, other=INFINITY)
                e = tl.exp(s - shift[:, None]) * tl.load(RF + om, mask=row_in, other=0.0)[:, None]
                if RM is not None:
                    e -= tl.load(RM + om, mask=row_in, other=0.0)[:, None]
                g += tl.where(by_row, e, 0.0)
            if CF is not None:
                shift = tl.load(CS + on, mask=column_in, other=INFINITY)
                e = tl.exp(s - shift[None, :]) * tl.load(CF + on, mask=column_in, other=0.0)[None, :]
                if CM is not None:
                    e -= tl.load(CM + on, mask=column_in, other=0.0)[None, :]
                g += tl.where(by_column, e, 0.0)
            holds = meets(target, row, column, offset, DESIGNATED, SM, SN)
            g = less_targets(
                g, hit, holds, om, on, rows, columns, offset, QM, KM, QID, KID, RT, CT, EXCLUDE, MULTI, SELF, True
            )
            total += tl.sum(tl.where(ok, g * acc, 0.0), 1)
            if LIFTED is not None:
                g = g * tl.load(LIFTED)
            if TF32:
                g = to_tf32(g)
            at = G + om[:, None].to(tl.int64) * sg + on[None, :]
            tl.store(at, narrow(g, G, UPCAST), mask=row_in[:, None] & column_in[None, :])
        if PRODUCT is not None:
            tl.store(PRODUCT + pn.to(tl.int64) * rows + om, total, mask=row_in)


def plain_weights(
    logits: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, tile: tuple[int, int], *, guard: bool = True
) -> torch.Tensor:
    """The plain twin: `g [r, c]` of the symmetric loss without targets, by one exponential a tile, in float32.

    rows `[r]`, columns `[c]`: lse values. guard: two exponentials where a tile's lse values spread too far.
    """
    g = torch.empty_like(logits)
    for i in range(0, logits.shape[0], tile[0]):
        for j in range(0, logits.shape[1], tile[1]):
            where = slice(i, i + tile[0]), slice(j, j + tile[1])
            s, mine, theirs = logits[where], rows[where[0], None], columns[None, where[1]]
            low, high = min(mine.min(), theirs.min()), max(mine.max(), theirs.max())
            if guard and high - low > SPREAD.value:
                g[where] = torch.exp(s - mine) + torch.exp(s - theirs)
            else:
                middle = low + 0.5 * (high - low)
                g[where] = torch.exp(s - middle) * (torch.exp(middle - mine) + torch.exp(middle - theirs))
    return g
