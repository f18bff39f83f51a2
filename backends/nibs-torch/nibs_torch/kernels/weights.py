"""InfoNCE, second pass: gradient weights of both directions, made from the tile again and written once.

    queries Q [r, d], keys K [c, d]             one macro tile, cut into tiles of BM x BN
    g_ij = f_i exp(s_ij - l_i) + f_j exp(s_ij - l_j) - smooth_i - smooth_j - (t_i + t_j) [j positive]     (2)
    G [r, c]                                     lift * g in the input's dtype
    PRODUCT [column tiles, r]                    sums of g_ij <q_i, k_j>, from which the scale's gradient comes

f, l, t, smooth are `nibs.verbs.Weights`: factor, shift, target, smooth. The two products `G K` and `G^T Q` around this
kernel belong to the library; `nibs_torch.fused` calls them.

Plan. Where the shifts of a tile's anchors lie within SPREAD of one another, one exponential around their middle serves
both sides: `exp(s - mid) (f_i exp(mid - l_i) + f_j exp(mid - l_j))`. Unguarded, a wider tile gives inf * 0. There
`weights` returns at once, and `wide`, always launched and returning at once on all other tiles, takes two exponentials
in small tiles. Both judge by the same numbers, so each tile is written exactly once.

A pair of two rows that are no anchors, or one that does not count, is bounded by nobody's lse: logits are cut at mid +
SPREAD, beyond which no weight that is not 0 can lie. Targets are subtracted before rounding, for near convergence
p - y is far smaller than either; the few elements that have one are made again from their products and stored over.
A tile is finished in parts of 64 columns (`tile.parts`): products, weights and what is stored of them, all of a tile
at once, would not fit the registers at 128 x 256. float16 holds nothing below 6e-8: its weights are stored times a
power of two (LIFTED), undone in float32.

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
    PART,
    dots,
    logit,
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


@triton.jit
def span(RS, CS, row, column, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """Middle and width of the anchors' shifts in a tile."""
    low = tl.full((), INFINITY, tl.float32)
    high = tl.full((), -INFINITY, tl.float32)
    if RS is not None:
        om = row + tl.arange(0, BM)
        shift = tl.load(RS + om, mask=om < rows, other=INFINITY)
        low = tl.minimum(low, tl.min(shift, 0))
        high = tl.maximum(high, tl.max(tl.where(shift == INFINITY, -INFINITY, shift), 0))
    if CS is not None:
        on = column + tl.arange(0, BN)
        shift = tl.load(CS + on, mask=on < columns, other=INFINITY)
        low = tl.minimum(low, tl.min(shift, 0))
        high = tl.maximum(high, tl.max(tl.where(shift == INFINITY, -INFINITY, shift), 0))
    none = low == INFINITY
    middle = tl.where(none, 0.0, low + 0.5 * (high - low))
    return middle, tl.where(none, 0.0, high - low)


@triton.jit
def share(F, S, o, inside, middle):
    """`[rows]`: what multiplies the shared exponential, `f exp(middle - shift)`."""
    factor = tl.load(F + o, mask=inside, other=0.0)
    shift = tl.load(S + o, mask=inside, other=INFINITY)
    return factor * tl.exp(middle - shift)


@triton.jit(do_not_specialize=COUNTS)
def weights(
    Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
    RF, RS, RT, RM, CF, CS, CT, CM, LIFTED, G, PRODUCT, KEPT,
    rows, columns, d, offset, row_tiles, column_tiles, programs, sq0, sq1, sk0, sk1, sg, sp,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, SELF: tl.constexpr, RAGGED: tl.constexpr,
    TF32: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    DESC: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    GUARD: tl.constexpr,
):  # fmt: skip
    """One tile a program, or every `programs`-th one. GUARD: False only in the test that shows what it is for."""
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=True):
            weights_tile(
                tile, Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
                RF, RS, RT, RM, CF, CS, CT, CM, LIFTED, G, PRODUCT, KEPT,
                rows, columns, d, offset, row_tiles, column_tiles, sq0, sq1, sk0, sk1, sg, sp,
                DESIGNATED, EXCLUDE, MULTI, SELF, RAGGED, TF32, BM, BN, BK, GROUP, DESC, PRECISION, UPCAST, GUARD,
            )  # fmt: skip
    else:
        weights_tile(
            tl.program_id(0), Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
            RF, RS, RT, RM, CF, CS, CT, CM, LIFTED, G, PRODUCT, KEPT,
            rows, columns, d, offset, row_tiles, column_tiles, sq0, sq1, sk0, sk1, sg, sp,
            DESIGNATED, EXCLUDE, MULTI, SELF, RAGGED, TF32, BM, BN, BK, GROUP, DESC, PRECISION, UPCAST, GUARD,
        )  # fmt: skip


@triton.jit
def weights_tile(
    tile, Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
    RF, RS, RT, RM, CF, CS, CT, CM, LIFTED, G, PRODUCT, KEPT,
    rows, columns, d, offset, row_tiles, column_tiles, sq0, sq1, sk0, sk1, sg, sp,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, SELF: tl.constexpr, RAGGED: tl.constexpr,
    TF32: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    DESC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Everything about one tile whose shifts lie close together."""
    pm, pn = place(tile, row_tiles, column_tiles, GROUP)
    row, column = pm * BM, pn * BN
    om, on = row + tl.arange(0, BM), column + tl.arange(0, BN)
    row_in, column_in = om < rows, on < columns
    WIDTH: tl.constexpr = min(BN, PART)
    inner = tl.arange(0, WIDTH)
    middle, width = span(RS, CS, row, column, rows, columns, BM, BN)
    if (width <= SPREAD) | (GUARD == 0):
        target = target_of(T, om, rows, columns, offset, DESIGNATED)
        hit = target[:, None] == on[None, :]
        if KEPT is not None:
            at = KEPT + om[:, None].to(tl.int64) * sp + on[None, :]
            acc = tl.load(at, mask=row_in[:, None] & column_in[None, :], other=0.0)
        else:
            acc = dots(Q, K, row, column, rows, columns, d, sq0, sq1, sk0, sk1, BM, BN, BK, DESC, PRECISION, UPCAST)
            if EXACT is not None:
                exact = tl.load(EXACT + om, mask=row_in, other=0.0)
                acc = tl.where(hit, exact[:, None], acc)
        here = (target >= column) & (target < column + BN)
        holds = tl.max(here.to(tl.int32), 0) != 0
        pieces = parts(acc, BM, BN)
        product, aim = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
        if DESIGNATED != 0 and not MULTI:  # noqa: SIM102 - known when compiled
            if holds:  # the designated positives' products and targets, while nothing but acc takes registers
                found = tl.zeros(pieces[0].shape, tl.float32)
                for n in tl.static_range(BN // WIDTH):
                    found = tl.where(target[:, None] == (column + n * WIDTH + inner)[None, :], pieces[n], found)
                product = tl.sum(found, 1)
                if CT is not None:
                    aim = tl.load(CT + target, mask=here, other=0.0)
                if RT is not None:
                    aim += tl.load(RT + om, mask=row_in, other=0.0)
        mine, theirs = aim, vector_parts(tl.zeros((BN,), tl.float32), BN)
        if RF is not None:
            mine = share(RF, RS, om, row_in, middle)
        if CF is not None:
            theirs = vector_parts(share(CF, CS, on, column_in, middle), BN)
        total = tl.zeros((BM,), tl.float32)
        for n in tl.static_range(BN // WIDTH):
            total += part_weights(
                pieces[n], mine, theirs[n], column + n * WIDTH, target, om, middle, SCALE, QM, KM, QID, KID, QLIM, KLIM,
                RF, RT, RM, CF, CT, CM, LIFTED, G, PRODUCT, rows, columns, offset, sg,
                DESIGNATED, EXCLUDE, MULTI, SELF, RAGGED, TF32, WIDTH, UPCAST, GUARD,
            )  # fmt: skip
        if PRODUCT is not None:
            # Row by row, where p - y is a small difference of numbers near one.
            tl.store(PRODUCT + pn.to(tl.int64) * rows + om, total - aim * product, mask=row_in)
        if DESIGNATED != 0 and not MULTI:  # noqa: SIM102 - known when compiled
            if holds:  # once more, less their targets: one element a row
                one = shared(product, SCALE, middle, GUARD)
                if RF is not None:
                    part = share(RF, RS, om, row_in, middle)
                    if CF is not None:
                        part += share(CF, CS, target, here, middle)
                else:
                    part = share(CF, CS, target, here, middle)
                one = one * part
                if RM is not None:
                    one -= tl.load(RM + om, mask=row_in, other=0.0)
                if CM is not None:
                    one -= tl.load(CM + target, mask=here, other=0.0)
                one -= aim
                if LIFTED is not None:
                    one = one * tl.load(LIFTED)
                if TF32:
                    one = to_tf32(one)
                tl.debug_barrier()  # after the stores above
                tl.store(G + om.to(tl.int64) * sg + target, narrow(one, G, UPCAST), mask=here)


@triton.jit
def shared(acc, SCALE, middle, GUARD: tl.constexpr):
    """`exp(s - middle)`, the exponential that both sides share; cut where nothing that counts can lie."""
    power = (logit(acc, tl.load(SCALE), 0.0) - middle) * LOG2E
    if GUARD:
        power = tl.minimum(power, SPREAD * LOG2E)
    return tl.exp2(power)


@triton.jit
def part_weights(
    acc, mine, theirs, column, target, om, middle, SCALE, QM, KM, QID, KID, QLIM, KLIM,
    RF, RT, RM, CF, CT, CM, LIFTED, G, PRODUCT, rows, columns, offset, sg,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, SELF: tl.constexpr, RAGGED: tl.constexpr,
    TF32: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """A part's weights into G, not yet less designated targets; returns `[BM]` sums of weight times product."""
    PAIRS: tl.constexpr = RAGGED or EXCLUDE or SELF or (QM is not None) or (KM is not None)
    MARGIN: tl.constexpr = QLIM is not None
    on = column + tl.arange(0, WIDTH)
    row_in, column_in = om < rows, on < columns
    hit = target[:, None] == on[None, :]
    g = shared(acc, SCALE, middle, GUARD)
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
    if MULTI:
        g = less_targets(
            g, hit, target, om, on, rows, columns, offset, column, QM, KM, QID, KID, RT, CT,
            DESIGNATED, EXCLUDE, MULTI, SELF, RAGGED, WIDTH,
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
    g, hit, target, om, on, rows, columns, offset, column, QM, KM, QID, KID, RT, CT,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, SELF: tl.constexpr, RAGGED: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """`g` less the targets of its positives."""
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
    elif DESIGNATED != 0:
        held = (target >= column) & (target < column + BN)
        if tl.max(held.to(tl.int32), 0) != 0:
            if RT is not None:
                g -= tl.where(hit, tl.load(RT + om, mask=row_in, other=0.0)[:, None], 0.0)
            if CT is not None:
                g -= tl.where(hit, tl.load(CT + on, mask=column_in, other=0.0)[None, :], 0.0)
    return g


@triton.jit(do_not_specialize=COUNTS)
def wide(
    Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
    RF, RS, RT, RM, CF, CS, CT, CM, LIFTED, G, PRODUCT,
    rows, columns, d, offset, row_tiles, column_tiles, programs, sq0, sq1, sk0, sk1, sg,
    DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr, SELF: tl.constexpr, TF32: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SM: tl.constexpr, SN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Tiles whose shifts lie too far apart for one exponential, in small ones of SM x SN: one exponential a side."""
    for tile in range(tl.program_id(0), row_tiles * column_tiles, programs):
        pm, pn = tile // column_tiles, tile % column_tiles
        _, width = span(RS, CS, pm * BM, pn * BN, rows, columns, BM, BN)
        if (width <= SPREAD) == 0:
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
                    acc = dots(
                        Q, K, row, column, rows, columns, d, sq0, sq1, sk0, sk1, SM, SN, BK, False, PRECISION, UPCAST
                    )
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
                    g = less_targets(
                        g, hit, target, om, on, rows, columns, offset, column, QM, KM, QID, KID, RT, CT,
                        DESIGNATED, EXCLUDE, MULTI, SELF, True, SN,
                    )  # fmt: skip
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
