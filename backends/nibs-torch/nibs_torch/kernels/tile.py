"""What the kernels share: the walk over a macro tile, the products of one tile, and which of its pairs count.

A launch takes a macro tile: `rows` queries `Q [rows, d]` by `columns` keys `K [columns, d]`. It is cut into tiles of
BM x BN, one for each program, or one after the other in programs that stay (PERSISTENT). The symbols:

    om [BM], on [BN]    rows and columns of a tile, counted within the macro tile
    acc [BM, BN]        products <q_i, k_j>, float32
    offset              where the macro tile's first row begins, less where its first column does, in their shards:
                        key `om + offset` is the diagonal's
    DESIGNATED          0: no positive is designated here; 1: the diagonal; 2: `T [rows]`, -1 for none

Options that a call does not use are None (pointers) or False (flags), known when a kernel is compiled: what they would
cost is not in it. Row offsets are 64 bits wide. Rows beyond the end repeat the last one, and count for nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "COUNTS",
    "LOG2E",
    "dots",
    "halves",
    "joined",
    "logit",
    "meets",
    "part_width",
    "parts",
    "permitted",
    "place",
    "present",
    "quarters",
    "target_of",
    "vector_parts",
    "within",
]

SIZES = ["rows", "columns", "row_tiles", "column_tiles", "programs", "size", "parts", "u_part", "u_tile"]
COUNTS = [*SIZES, "offset", "k"]
"""Sizes that change from macro tile to macro tile: a kernel is not compiled anew where one happens to be 1 or even."""

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile: columns of GROUP tiles high, so that the operands of a wave stay in the L2 cache."""
    width = GROUP * column_tiles
    first = (tile // width) * GROUP
    height = min(row_tiles - first, GROUP)
    return first + (tile % width) % height, (tile % width) // height


@triton.jit
def dots(
    Q, K, row, column, rows, columns, d, sq0, sq1, sk0, sk1,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    DESC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`acc [BM, BN]` for the tile that begins at (row, column). DESC: Q and K are tensor descriptors."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    steps = tl.cdiv(d, BK)
    tl.assume(steps > 0)  # else a loop that is flattened is compiled once more, for rows of no width
    if DESC:
        for k in range(0, steps):
            a = Q.load([row, k * BK])
            b = K.load([column, k * BK])
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        om = tl.minimum(row + tl.arange(0, BM), rows - 1).to(tl.int64)
        on = tl.minimum(column + tl.arange(0, BN), columns - 1).to(tl.int64)
        ok = tl.arange(0, BK)
        qs = Q + om[:, None] * sq0 + ok[None, :].to(tl.int64) * sq1
        ks = K + on[None, :] * sk0 + ok[:, None].to(tl.int64) * sk1
        step = tl.full((), BK, tl.int64)  # transposed rows: sq1 is as large as there are rows
        for k in range(0, steps):
            inside = ok < d - k * BK
            a = tl.load(qs, mask=inside[None, :], other=0.0)
            b = tl.load(ks, mask=inside[:, None], other=0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            qs += step * sq1
            ks += step * sk1
    return acc


@triton.jit
def logit(acc, scale, bias):
    """`s = scale acc + bias`, rounded once, in every kernel alike: a fused product and sum is left as it is written.

    Written `acc * scale`, it is rounded where it is used twice, and fused, unrounded, into the subtraction of a shift
    where it is used once. Then an lse holds one number and its weight another: half a digit apart, exp(0.25) for logits
    in the millions.
    """
    return tl.fma(acc, scale, bias)


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of `x [ROWS, COLUMNS]`."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def quarters(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The four quarters of the columns of `x [ROWS, COLUMNS]`."""
    left, right = halves(x, ROWS, COLUMNS)
    first, second = halves(left, ROWS, COLUMNS // 2)
    third, fourth = halves(right, ROWS, COLUMNS // 2)
    return first, second, third, fourth


@triton.jit
def joined(left, right, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`[ROWS, COLUMNS]` of its two halves."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (ROWS, COLUMNS))


@triton.constexpr_function
def part_width(columns):
    """Columns of a tile that are finished at a time: a quarter, or all of a narrow tile's."""
    return columns // 4 if columns >= 128 else columns


@triton.jit
def parts(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`x [ROWS, COLUMNS]` in parts of `part_width` columns, from the left. Nothing moves from thread to thread.

    A whole tile's products and what is made of them do not fit the registers.
    """
    if part_width(COLUMNS) == COLUMNS:
        return (x,)
    else:
        return quarters(x, ROWS, COLUMNS)


@triton.jit
def vector_parts(x, COLUMNS: tl.constexpr):
    """`x [COLUMNS]` in the same parts."""
    if part_width(COLUMNS) == COLUMNS:
        return (x,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (2, COLUMNS // 2)), (1, 0)))
        first, second = tl.split(tl.permute(tl.reshape(left, (2, COLUMNS // 4)), (1, 0)))
        third, fourth = tl.split(tl.permute(tl.reshape(right, (2, COLUMNS // 4)), (1, 0)))
        return first, second, third, fourth


@triton.jit
def target_of(T, om, rows, columns, offset, DESIGNATED: tl.constexpr):
    """`[BM]` int32: the column of each row's designated positive within the macro tile, -1 for none.

    T comes with the macro tile's first column already taken off.
    """
    target = om.to(tl.int64) + offset
    if DESIGNATED == 2:
        target = tl.load(T + om, mask=om < rows, other=-1).to(tl.int64)
    inside = (target >= 0) & (target < columns) & (om < rows) & (DESIGNATED != 0)
    return tl.where(inside, target, -1).to(tl.int32)


@triton.jit
def meets(target, row, column, offset, DESIGNATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Whether the tile that begins at (row, column) may hold a designated positive: for the diagonal, no value is
    looked at.
    """
    if DESIGNATED == 2:
        return tl.max(((target >= column) & (target < column + BN)).to(tl.int32), 0) != 0
    else:
        return (row + offset < column + BN) & (row + offset + BM > column)


@triton.jit
def present(o, size, M):
    """`[rows]` bool: rows that are there and not masked."""
    found = o < size
    if M is not None:
        found = found & (tl.load(M + o, mask=found, other=0) != 0)
    return found


@triton.jit
def permitted(
    om, on, rows, columns, offset, hit, QM, KM, QID, KID,
    RAGGED: tl.constexpr, EXCLUDE: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """`[BM, BN]` bool: pairs of the tile that count, before any margin. hit: the designated ones."""
    ok = present(om, rows, QM)[:, None] & present(on, columns, KM)[None, :]
    if EXCLUDE:
        mine = tl.load(QID + om, mask=om < rows, other=0)
        theirs = tl.load(KID + on, mask=on < columns, other=0)
        ok = ok & ((mine[:, None] != theirs[None, :]) | hit)
    if SELF:
        ok = ok & ((om.to(tl.int64) + offset)[:, None] != on.to(tl.int64)[None, :])
    return ok


@triton.jit
def within(acc, limit, hit, ok, AXIS: tl.constexpr):
    """`ok` less the negatives whose product exceeds `limit`, of rows (AXIS 1) or of columns (AXIS 0)."""
    keep = (acc > tl.expand_dims(limit, AXIS)) == 0
    return ok & (keep | hit)
