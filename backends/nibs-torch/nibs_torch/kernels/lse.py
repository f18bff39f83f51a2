"""InfoNCE, first pass: statistics of rows and of columns from the same tile of logits, which is never written.

    queries Q [r, d], keys K [c, d]           one macro tile, cut into tiles of BM x BN
    s = scale * acc, u = max of the tile      (1) of nibs.spec, with one shift for rows and columns
    E = exp2((s - u) log2 e + LIFT)           one exponential an element
    RP [fields, column tiles, r]              E's row sums, and what else the call asks for
    CP [fields, row tiles, c]                 its column sums
    U [row tiles, column tiles]               the shift
    MARK [row tiles, column tiles]            1 where it was not good for every row and column

Plan. `lse` leaves partial sums, one for each tile a row passes through. `repair`, always launched so that the host need
not look, finds the tiles where one shift was not enough, marks them, and redoes them with each row's and each column's
own shift, into `RS`, `CS` beside the sums. `fold` adds the partial sums of a row (column) in the order of the tiles to
what earlier macro tiles left: no atomics, so the same bits each time, and no merge afterwards.

LIFT = 31 keeps entries down to 2^-157 of the maximum; a row or column that sums to less than 2^-120 of it has lost
terms that count. No more than that, for the power is rounded as it is lifted: by 2^-20 here, and by four times that
beyond 64, in each lse that one entry rules. Sums keep the lift until `fold`. Where a row or a column may have no pair
at all, one that is lost leaves as -1: 0 may be right.

The positive's logit is read off the same `s`, by the one tile that holds it.

Cost: 2 r c d flops, r c exponentials; reads (r c / BM + r c / BN) d elements, most from the L2 cache; writes
4 (r c / BN + r c / BM) bytes a field. Two exponentials an element (one with each side's own shift) need a second tile
of registers beside the first, which spills at 128 x 256; hence the guard and the repair.

Twin: `plain_lse`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from nibs_torch.kernels.tile import COUNTS, LOG2E, dots, logit, meets, permitted, place, present, target_of, within

__all__ = ["COLUMN_FIELDS", "LIFT", "LOW", "ROW_FIELDS", "fields", "fold", "lse", "plain_lse", "repair"]

LIFT: tl.constexpr = tl.constexpr(31.0)
LIFTED: tl.constexpr = tl.constexpr(2.0**31)
UNLIFT: tl.constexpr = tl.constexpr(2.0**-31)
LOW: tl.constexpr = tl.constexpr(2.0**-89)
LOWEST: tl.constexpr = tl.constexpr(float(torch.finfo(torch.float32).min))
INFINITY: tl.constexpr = tl.constexpr(float("inf"))

ROW_FIELDS = {
    "mass": (),
    "positive_sum": ("multi",),
    "positive_count": ("multi",),
    "allowed_sum": ("sums",),
    "allowed_count": ("sums",),
    "positive_max": ("stats",),
    "negative_max": ("stats",),
}
COLUMN_FIELDS = {
    "mass": (),
    "positive_sum": ("multi",),
    "positive_count": ("multi",),
    "weight_sum": ("multi",),
    "allowed_sum": ("sums",),
    "allowed_count": ("sums",),
}


def fields(table: dict[str, tuple[str, ...]], *, multi: bool, sums: bool, stats: bool) -> list[str]:
    """The partial statistics that a call asks for, in the order in which kernels store them."""
    asked = {"multi": multi, "sums": sums, "stats": stats}
    return [name for name, needs in table.items() if all(asked[one] for one in needs)]


@triton.jit(do_not_specialize=COUNTS)
def lse(
    Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM, AW, RP, CP, U, PS, KEPT,
    rows, columns, d, offset, row_tiles, column_tiles, programs, sq0, sq1, sk0, sk1, sp,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr,
    SELF: tl.constexpr, SUMS: tl.constexpr, STATS: tl.constexpr, RAGGED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, DESC: tl.constexpr,
    PERSISTENT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile a program, or every `programs`-th one."""
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=True):
            lse_tile(
                tile, Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM, AW, RP, CP, U, PS, KEPT,
                rows, columns, d, offset, row_tiles, column_tiles, sq0, sq1, sk0, sk1, sp,
                ROWS, COLUMNS, DESIGNATED, EXCLUDE, MULTI, SELF, SUMS, STATS, RAGGED,
                BM, BN, BK, GROUP, DESC, PRECISION, UPCAST,
            )  # fmt: skip
    else:
        lse_tile(
            tl.program_id(0), Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM, AW, RP, CP, U, PS, KEPT,
            rows, columns, d, offset, row_tiles, column_tiles, sq0, sq1, sk0, sk1, sp,
            ROWS, COLUMNS, DESIGNATED, EXCLUDE, MULTI, SELF, SUMS, STATS, RAGGED,
            BM, BN, BK, GROUP, DESC, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def lse_tile(
    tile, Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM, AW, RP, CP, U, PS, KEPT,
    rows, columns, d, offset, row_tiles, column_tiles, sq0, sq1, sk0, sk1, sp,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, MULTI: tl.constexpr,
    SELF: tl.constexpr, SUMS: tl.constexpr, STATS: tl.constexpr, RAGGED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, DESC: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Everything about one tile."""
    MARGIN: tl.constexpr = QLIM is not None
    SOME: tl.constexpr = some(QM, KM, QLIM, EXCLUDE, SELF)
    pm, pn = place(tile, row_tiles, column_tiles, GROUP)
    row, column = pm * BM, pn * BN
    acc = dots(Q, K, row, column, rows, columns, d, sq0, sq1, sk0, sk1, BM, BN, BK, DESC, PRECISION, UPCAST)
    om, on = row + tl.arange(0, BM), column + tl.arange(0, BN)
    row_at = RP + pn.to(tl.int64) * rows + om
    column_at = CP + pm.to(tl.int64) * columns + on
    row_field = column_tiles.to(tl.int64) * rows
    column_field = row_tiles.to(tl.int64) * columns
    row_in, column_in = om < rows, on < columns
    target = target_of(T, om, rows, columns, offset, DESIGNATED)
    hit = target[:, None] == on[None, :]
    if EXACT is not None:
        exact = tl.load(EXACT + om, mask=row_in, other=0.0)
        acc = tl.where(hit, exact[:, None], acc)
    if KEPT is not None:
        at = KEPT + om[:, None].to(tl.int64) * sp + on[None, :]
        tl.store(at, acc, mask=row_in[:, None] & column_in[None, :])
    s = logit(acc, tl.load(SCALE), 0.0)
    if DESIGNATED != 0 and not MULTI:
        held = (target >= column) & (target < column + BN)
        if meets(target, row, column, offset, DESIGNATED, BM, BN):
            positive = tl.sum(tl.where(hit, s, 0.0), 1)
            tl.store(PS + om, positive, mask=held)
    if RAGGED or SOME:
        ok = permitted(om, on, rows, columns, offset, hit, QM, KM, QID, KID, RAGGED, EXCLUDE, SELF)
        if MARGIN:
            by_row = within(acc, tl.load(QLIM + om, mask=row_in, other=0.0), hit, ok, 1)
            by_column = within(acc, tl.load(KLIM + on, mask=column_in, other=0.0), hit, ok, 0)
            ok = by_row | by_column
        s = tl.where(ok, s, -INFINITY)
        top = tl.max(s, 1)
        u = tl.max(s)
        u = tl.where(u == -INFINITY, 0.0, u)
    else:
        u = tl.max(s)
    e = tl.exp2((s - u) * LOG2E + LIFT)
    by_row_e, by_column_e = e, e
    if MARGIN:
        by_row_e, by_column_e = tl.where(by_row, e, 0.0), tl.where(by_column, e, 0.0)
    row_mass, column_mass = tl.sum(by_row_e, 1), tl.sum(by_column_e, 0)
    if SOME:
        if MARGIN:
            row_has = tl.max(by_row.to(tl.int32), 1) != 0
            column_has = tl.max(by_column.to(tl.int32), 0) != 0
        else:
            row_has = top > -INFINITY
            if EXCLUDE or SELF:
                column_has = tl.max(s, 0) > -INFINITY
            else:  # masks alone: a column has a pair if it is there, and any row is
                column_has = present(on, columns, KM) & (tl.max(present(om, rows, QM).to(tl.int32), 0) != 0)
        row_mass = tl.where(lost(row_mass) & row_has, -1.0, row_mass)
        column_mass = tl.where(lost(column_mass) & column_has, -1.0, column_mass)
    if ROWS:
        tl.store(row_at, row_mass, mask=row_in)
    if COLUMNS:
        tl.store(column_at, column_mass, mask=column_in)
    tl.store(U + pm * column_tiles + pn, u)
    row_next = row_at + row_field
    column_next = column_at + column_field
    if MULTI or SUMS or STATS:
        ok = permitted(om, on, rows, columns, offset, hit, QM, KM, QID, KID, RAGGED, EXCLUDE, SELF)
        by_row, by_column = ok, ok
        if MARGIN:
            by_row = within(acc, tl.load(QLIM + om, mask=row_in, other=0.0), hit, ok, 1)
            by_column = within(acc, tl.load(KLIM + on, mask=column_in, other=0.0), hit, ok, 0)
        found = hit
        if MULTI:
            mine = tl.load(QID + om, mask=row_in, other=0)
            theirs = tl.load(KID + on, mask=column_in, other=0)
            found = ((mine[:, None] == theirs[None, :]) | hit) & ok
            positives = tl.where(found, s, 0.0)
            tl.store(row_next, tl.sum(positives, 1), mask=row_in)
            tl.store(row_next + row_field, tl.sum(found.to(tl.float32), 1), mask=row_in)
            row_next += 2 * row_field
            if COLUMNS:
                tl.store(column_next, tl.sum(positives, 0), mask=column_in)
                tl.store(column_next + column_field, tl.sum(found.to(tl.float32), 0), mask=column_in)
                weight = tl.load(AW + om, mask=row_in, other=0.0)
                each = tl.sum(tl.where(found, weight[:, None], 0.0), 0)
                tl.store(column_next + 2 * column_field, each, mask=column_in)
                column_next += 3 * column_field
        if SUMS:
            tl.store(row_next, tl.sum(tl.where(by_row, s, 0.0), 1), mask=row_in)
            tl.store(row_next + row_field, tl.sum(by_row.to(tl.float32), 1), mask=row_in)
            row_next += 2 * row_field
            if COLUMNS:
                tl.store(column_next, tl.sum(tl.where(by_column, s, 0.0), 0), mask=column_in)
                tl.store(column_next + column_field, tl.sum(by_column.to(tl.float32), 0), mask=column_in)
        if STATS:
            negative = by_row & (found == 0)
            tl.store(row_next, tl.max(tl.where(found, s, -INFINITY), 1), mask=row_in)
            tl.store(row_next + row_field, tl.max(tl.where(negative, s, -INFINITY), 1), mask=row_in)


@triton.constexpr_function
def some(QM, KM, QLIM, EXCLUDE, SELF):
    """Whether a row or a column may have no pair at all, whose sum is 0 and right."""
    return EXCLUDE or SELF or any(one is not None for one in (QM, KM, QLIM))


@triton.jit
def lost(mass):
    """Where terms that count are lost to a shift; NaN, too."""
    return (mass >= LOW) == 0


@triton.jit
def seen(
    row, column, Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
    rows, columns, d, offset, sq0, sq1, sk0, sk1,
    BY_ROW: tl.constexpr, DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, SELF: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`[BM, BN]` logits of a small tile, -inf where a pair does not count for its row (BY_ROW) or its column."""
    acc = dots(Q, K, row, column, rows, columns, d, sq0, sq1, sk0, sk1, BM, BN, BK, False, PRECISION, UPCAST)
    om, on = row + tl.arange(0, BM), column + tl.arange(0, BN)
    target = target_of(T, om, rows, columns, offset, DESIGNATED)
    hit = target[:, None] == on[None, :]
    if EXACT is not None:
        exact = tl.load(EXACT + om, mask=om < rows, other=0.0)
        acc = tl.where(hit, exact[:, None], acc)
    ok = permitted(om, on, rows, columns, offset, hit, QM, KM, QID, KID, True, EXCLUDE, SELF)
    if QLIM is not None:
        if BY_ROW:
            ok = within(acc, tl.load(QLIM + om, mask=om < rows, other=0.0), hit, ok, 1)
        else:
            ok = within(acc, tl.load(KLIM + on, mask=on < columns, other=0.0), hit, ok, 0)
    return tl.where(ok, logit(acc, tl.load(SCALE), 0.0), -INFINITY)


@triton.jit(do_not_specialize=COUNTS)
def repair(
    Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM, RP, CP, RS, CS, MARK,
    rows, columns, d, offset, row_tiles, column_tiles, sq0, sq1, sk0, sk1,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, SELF: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SM: tl.constexpr, SN: tl.constexpr, BK: tl.constexpr,
    SEVERAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Marks tiles with lost sums, and makes those again. A program looks through SEVERAL tiles of the same rows.

    RS [column tiles, r], CS [row tiles, c]: their rows' and columns' own shifts, read by `fold` where a tile is marked.
    """
    SOME: tl.constexpr = some(QM, KM, QLIM, EXCLUDE, SELF)
    across = tl.cdiv(column_tiles, SEVERAL)
    pm, first = tl.program_id(0) // across, (tl.program_id(0) % across) * SEVERAL
    tiles = first + tl.arange(0, SEVERAL)
    marked = tl.zeros((SEVERAL,), tl.int32)
    if ROWS:
        om = pm * BM + tl.arange(0, BM)
        there = (tiles < column_tiles)[:, None] & (om < rows)[None, :]
        masses = tl.load(RP + tiles[:, None].to(tl.int64) * rows + om[None, :], mask=there, other=1.0)
        marked |= tl.max((masses < 0.0 if SOME else lost(masses)).to(tl.int32), 1)
    if COLUMNS:
        on = first * BN + tl.arange(0, SEVERAL * BN)
        masses = tl.load(CP + pm.to(tl.int64) * columns + on, mask=on < columns, other=1.0)
        found = (masses < 0.0 if SOME else lost(masses)).to(tl.int32)
        marked |= tl.max(tl.reshape(found, (SEVERAL, BN)), 1)
    tl.store(MARK + pm * column_tiles + tiles, marked, mask=tiles < column_tiles)
    if tl.max(marked, 0) != 0:
        for n in range(0, SEVERAL):
            pn = first + n
            if tl.max(tl.where(tiles == pn, marked, 0), 0) != 0:
                repair_tile(
                    pm, pn, Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM, RP, CP, RS, CS,
                    rows, columns, d, offset, sq0, sq1, sk0, sk1,
                    ROWS, COLUMNS, DESIGNATED, EXCLUDE, SELF, BM, BN, SM, SN, BK, PRECISION, UPCAST,
                )  # fmt: skip


@triton.jit
def repair_tile(
    pm, pn, Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM, RP, CP, RS, CS,
    rows, columns, d, offset, sq0, sq1, sk0, sk1,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESIGNATED: tl.constexpr, EXCLUDE: tl.constexpr, SELF: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SM: tl.constexpr, SN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile in small ones of SM x SN: masses by each row's and each column's own running shift."""
    if ROWS:
        for i in range(0, BM // SM):
            row = pm * BM + i * SM
            om = row + tl.arange(0, SM)
            top = tl.full((SM,), LOWEST, tl.float32)
            total = tl.zeros((SM,), tl.float32)
            for j in range(0, BN // SN):
                s = seen(
                    row, pn * BN + j * SN, Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
                    rows, columns, d, offset, sq0, sq1, sk0, sk1,
                    True, DESIGNATED, EXCLUDE, SELF, SM, SN, BK, PRECISION, UPCAST,
                )  # fmt: skip
                top, total = gathered(top, total, s, 1)
            at = pn.to(tl.int64) * rows + om
            tl.store(RP + at, total * LIFTED, mask=om < rows)
            tl.store(RS + at, top, mask=om < rows)
    if COLUMNS:
        for j in range(0, BN // SN):
            column = pn * BN + j * SN
            on = column + tl.arange(0, SN)
            top = tl.full((SN,), LOWEST, tl.float32)
            total = tl.zeros((SN,), tl.float32)
            for i in range(0, BM // SM):
                s = seen(
                    pm * BM + i * SM, column, Q, K, SCALE, QM, KM, QID, KID, T, EXACT, QLIM, KLIM,
                    rows, columns, d, offset, sq0, sq1, sk0, sk1,
                    False, DESIGNATED, EXCLUDE, SELF, SM, SN, BK, PRECISION, UPCAST,
                )  # fmt: skip
                top, total = gathered(top, total, s, 0)
            at = pm.to(tl.int64) * columns + on
            tl.store(CP + at, total * LIFTED, mask=on < columns)
            tl.store(CS + at, top, mask=on < columns)


@triton.jit
def gathered(top, total, s, AXIS: tl.constexpr):
    """A running shift and mass of rows (AXIS 1) or of columns (AXIS 0), with the logits of one more tile in them."""
    new = tl.maximum(top, tl.max(s, AXIS))
    return new, total * tl.exp(top - new) + tl.sum(tl.exp(s - tl.expand_dims(new, AXIS)), AXIS)


@triton.jit(do_not_specialize=COUNTS)
def fold(
    P, S, U, MARK, PS, mass, shift, positive_sum, positive_count, weight_sum, allowed_sum, allowed_count,
    positive_max, negative_max,
    size, parts, u_part, u_tile,
    f_positive: tl.constexpr, f_weight: tl.constexpr, f_allowed: tl.constexpr, f_max: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Partial statistics P [fields, parts, size] into running ones `[size]`, in the order of the parts.

    S [parts, size], U, MARK: shifts, see above; strides u_part between parts and u_tile between tiles of TILE rows.
    PS [size]: designated positives' logits. A pointer is None where the call has no such statistic; f_: the first
    field of each kind.
    """
    block = tl.program_id(0)
    o = block * BLOCK + tl.arange(0, BLOCK)
    inside = o < size
    tile = (block * BLOCK) // TILE
    field = parts.to(tl.int64) * size
    if mass is not None:
        total = tl.load(mass + o, mask=inside, other=0.0)
        if shift is not None:
            top = tl.load(shift + o, mask=inside, other=LOWEST)
        for first in range(0, parts, PARTS):
            p = first + tl.arange(0, PARTS)
            there = p < parts
            at = p[:, None].to(tl.int64) * size + o[None, :]
            both = there[:, None] & inside[None, :]
            part = tl.load(P + at, mask=both, other=0.0)
            if shift is not None:
                u = tl.load(U + p * u_part + tile * u_tile, mask=there, other=0.0)
                marked = tl.load(MARK + p * u_part + tile * u_tile, mask=there, other=0) != 0
                own = tl.load(S + at, mask=both & marked[:, None], other=0.0)
                own = tl.where(marked[:, None], own, u[:, None])
                own = tl.where(part == 0.0, LOWEST, own)
                new = tl.maximum(top, tl.max(own, 0))
                total = total * tl.exp(top - new) + tl.sum(part * UNLIFT * tl.exp(own - new[None, :]), 0)
                top = new
            else:
                total += tl.sum(part, 0)
        tl.store(mass + o, total, mask=inside)
        if shift is not None:
            tl.store(shift + o, top, mask=inside)
    if PS is not None:
        before = tl.load(positive_sum + o, mask=inside, other=0.0)
        tl.store(positive_sum + o, before + tl.load(PS + o, mask=inside, other=0.0), mask=inside)
    elif positive_sum is not None:
        add(P + f_positive * field, positive_sum, o, inside, size, parts, PARTS)
    if positive_count is not None:
        add(P + (f_positive + 1) * field, positive_count, o, inside, size, parts, PARTS)
    if weight_sum is not None:
        add(P + f_weight * field, weight_sum, o, inside, size, parts, PARTS)
    if allowed_sum is not None:
        add(P + f_allowed * field, allowed_sum, o, inside, size, parts, PARTS)
        add(P + (f_allowed + 1) * field, allowed_count, o, inside, size, parts, PARTS)
    if positive_max is not None:
        largest(P + f_max * field, positive_max, o, inside, size, parts, PARTS)
        largest(P + (f_max + 1) * field, negative_max, o, inside, size, parts, PARTS)


@triton.jit
def add(P, out, o, inside, size, parts, PARTS: tl.constexpr):
    """Sums of parts onto `out`."""
    total = tl.load(out + o, mask=inside, other=0.0)
    for first in range(0, parts, PARTS):
        p = first + tl.arange(0, PARTS)
        at = p[:, None].to(tl.int64) * size + o[None, :]
        total += tl.sum(tl.load(P + at, mask=(p < parts)[:, None] & inside[None, :], other=0.0), 0)
    tl.store(out + o, total, mask=inside)


@triton.jit
def largest(P, out, o, inside, size, parts, PARTS: tl.constexpr):
    """Maxima of parts, and of `out`, into `out`."""
    top = tl.load(out + o, mask=inside, other=-INFINITY)
    for first in range(0, parts, PARTS):
        p = first + tl.arange(0, PARTS)
        at = p[:, None].to(tl.int64) * size + o[None, :]
        part = tl.load(P + at, mask=(p < parts)[:, None] & inside[None, :], other=-INFINITY)
        top = tl.maximum(top, tl.max(part, 0))
    tl.store(out + o, top, mask=inside)


def plain_lse(
    queries: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor, tile: tuple[int, int], *, guard: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain twin: lse of rows `[r]` and of columns `[c]`, tile by tile, one exponential each, in float32.

    guard: redo a tile whose shared shift was too far from some row or column.
    """
    logits = scale * (queries.float() @ keys.float().T)
    rows, columns = logits.shape
    masses = torch.zeros(rows), torch.zeros(columns)
    shifts = torch.full((rows,), LOWEST.value), torch.full((columns,), LOWEST.value)
    for i in range(0, rows, tile[0]):
        for j in range(0, columns, tile[1]):
            s = logits[i : i + tile[0], j : j + tile[1]]
            shift = s.max().expand(s.shape[0]), s.max().expand(s.shape[1])
            e = torch.exp2((s - s.max()) * math.log2(math.e) + LIFT.value)
            part = e.sum(1), e.sum(0)
            if guard and not bool((part[0] >= LOW.value).all() & (part[1] >= LOW.value).all()):
                shift = s.amax(1), s.amax(0)
                own = (s - shift[0][:, None]).exp().sum(1), (s - shift[1][None, :]).exp().sum(0)
                part = own[0] * LIFTED.value, own[1] * LIFTED.value
            for axis, where in ((0, slice(i, i + s.shape[0])), (1, slice(j, j + s.shape[1]))):
                new = torch.maximum(shifts[axis][where], shift[axis])
                old = masses[axis][where] * torch.exp(shifts[axis][where] - new)
                masses[axis][where] = old + part[axis] * UNLIFT.value * torch.exp(shift[axis] - new)
                shifts[axis][where] = new
    return shifts[0] + masses[0].log(), shifts[1] + masses[1].log()
