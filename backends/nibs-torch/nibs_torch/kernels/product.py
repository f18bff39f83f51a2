"""`C += factor * A B` with half-precision operands and a float32 C, for where the library has none.

    A [r, k], B [k, c] of any strides (so that A may be a transpose), C [r, c] float32, factor [1] on the device or None

The library's product is faster and is preferred (`nibs_torch.fused` asks it once); this one also takes float16's
inverse lift, which lies on the device, without an array of its own.

Cost: 2 r k c flops; reads A and B once for each row and column of tiles; reads and writes C once. No split of k, so
each element is summed in one fixed order. Twin: `torch.addmm` on float32 operands.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nibs_torch.kernels.tile import COUNTS, dots, place

__all__ = ["product"]


@triton.jit(do_not_specialize=COUNTS)
def product(
    A, B, C, FACTOR, rows, columns, k, row_tiles, column_tiles, sa0, sa1, sb0, sb1, sc,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of C a program. B's strides are given transposed: sb0 between columns, sb1 between rows."""
    pm, pn = place(tl.program_id(0), row_tiles, column_tiles, GROUP)
    row, column = pm * BM, pn * BN
    acc = dots(A, B, row, column, rows, columns, k, sa0, sa1, sb0, sb1, BM, BN, BK, False, PRECISION, UPCAST)
    if FACTOR is not None:
        acc *= tl.load(FACTOR)
    om, on = row + tl.arange(0, BM), column + tl.arange(0, BN)
    at = C + om[:, None].to(tl.int64) * sc + on[None, :]
    inside = (om < rows)[:, None] & (on < columns)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + acc, mask=inside)
