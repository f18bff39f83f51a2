"""What is done row by row, beside the tiles. None of it makes the host wait.

    poison     [n]       0 for a finite row, NaN for one that is not; absent rows count as finite
    round_rows [n, d]    float32 rows rounded to TF32's 10 bits, ties away from zero
    lift       [2]       a power of two that brings weights of up to `bound` near float16's largest, and its inverse
    tally      [2, 128]  sums of all partial sums of tiles, in float64, onto what earlier macro tiles left

Tensor cores cut float32 operands off to TF32 without rounding, which makes every product too small and moves the loss
by 0.05 at scale 100. Rounded before, they lose nothing more.

The gradients of scale and bias are sums over all pairs, of which tiles leave one number for each row they hold. Each
program of `tally` adds its own share of those to its own place, in order: no atomics, so the same bits each time.

Bytes: `poison` reads 1 x n d elements; `round_rows` reads and writes n d float32; `lift` reads the weights' vectors;
`tally` reads the partial sums.
Twins: `plain_poison`, `plain_tf32`, `plain_lift`; `tally` is held to PyTorch's own sum.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

__all__ = [
    "LIFTED_TO",
    "TALLIED",
    "lift",
    "narrow",
    "plain_lift",
    "plain_poison",
    "plain_tf32",
    "poison",
    "round_rows",
    "tally",
    "to_tf32",
]

TALLIED = 128  # places that programs of `tally` add to: so many programs at most
LIFTED_TO: tl.constexpr = tl.constexpr(16384.0)  # float16 ends at 65504: room for sums of two sides that round up


@triton.jit
def to_tf32(x):
    """float32 rounded to 10 bits of mantissa, ties away from zero."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, like, INTERPRETED: tl.constexpr):
    """float32 in the element type of the pointer `like`, to nearest even. The interpreter would cut bfloat16 off."""
    if INTERPRETED and like.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(like.dtype.element_ty)


@triton.jit
def poison(X, M, OUT, rows, d, s0, s1, BM: tl.constexpr, BK: tl.constexpr):
    """OUT [rows]: the sum of `x * 0` over each present row of X."""
    o = tl.program_id(0) * BM + tl.arange(0, BM)
    present = o < rows
    if M is not None:
        present = present & (tl.load(M + o, mask=present, other=0) != 0)
    k = tl.arange(0, BK)
    total = tl.zeros((BM,), tl.float32)
    for first in range(0, d, BK):
        at = X + o[:, None].to(tl.int64) * s0 + (first + k)[None, :].to(tl.int64) * s1
        x = tl.load(at, mask=present[:, None] & (first + k < d)[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32) * 0.0, 1)
    tl.store(OUT + o, total, mask=o < rows)


@triton.jit
def round_rows(X, OUT, rows, d, s0, s1, BM: tl.constexpr, BK: tl.constexpr):
    """OUT [rows, d], contiguous: X in TF32."""
    o = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (o < rows)[:, None] & (k < d)[None, :]
    x = tl.load(X + o[:, None].to(tl.int64) * s0 + k[None, :].to(tl.int64) * s1, mask=inside, other=0.0)
    tl.store(OUT + o[:, None].to(tl.int64) * d + k[None, :], to_tf32(x), mask=inside)


@triton.jit
def lift(A, B, OUT, a, b, BLOCK: tl.constexpr):
    """OUT [2]: 2^k and 2^-k, with k the largest for which (max |A| + max |B|) 2^k <= LIFTED_TO. B may be None."""
    o = tl.arange(0, BLOCK)
    top = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, a, BLOCK):
        top = tl.maximum(top, tl.abs(tl.load(A + first + o, mask=first + o < a, other=0.0)))
    bound = tl.max(top, 0)
    if B is not None:
        top = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, b, BLOCK):
            top = tl.maximum(top, tl.abs(tl.load(B + first + o, mask=first + o < b, other=0.0)))
        bound += tl.max(top, 0)
    usable = (bound > 1e-30) & (bound < 1e30)  # all weights zero, or poisoned: any power will do
    power = tl.floor(tl.log2(tl.where(usable, LIFTED_TO, 1.0) / tl.where(usable, bound, 1.0)))
    tl.store(OUT, tl.exp2(power))
    tl.store(OUT + 1, tl.exp2(-power))


@triton.jit(do_not_specialize=["size"])
def tally(P, T, OUT, size, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    """OUT [2, PLACES], float64: the sums of P [size] and of T [size] onto its two rows. Either may be None."""
    place = OUT + tl.program_id(0)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if P is not None:
        tl.store(place, tl.load(place) + share_of(P, first, size, BLOCK))
    if T is not None:
        place += PLACES
        tl.store(place, tl.load(place) + share_of(T, first, size, BLOCK))


@triton.jit
def share_of(P, first, size, BLOCK: tl.constexpr):
    """This program's share of a sum: BLOCK numbers from `first` on, and as many again behind those of all others."""
    o = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(first, size, tl.num_programs(0) * BLOCK):
        total += tl.load(P + begin + o, mask=begin + o < size, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


def plain_poison(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The plain twin of `poison`."""
    found = (rows.float() * 0).sum(1)
    return found if mask is None else torch.where(mask, found, 0.0)


def plain_tf32(rows: torch.Tensor) -> torch.Tensor:
    """The plain twin of `round_rows`."""
    return ((rows.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def plain_lift(bound: float) -> tuple[float, float]:
    """The plain twin of `lift`."""
    power = math.floor(math.log2(LIFTED_TO.value / bound))
    return 2.0**power, 2.0**-power
