"""The fast kernels in plain NumPy, float64: what each computes, without how.

Each function takes what the kernel of the same name takes, before any packing, and the tests hold one to the other.
Operands are numbers that the kernel's format holds exactly; nothing is rounded on the way but `g`, by the caller.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["plain_allowed", "plain_fold", "plain_lse", "plain_pack", "plain_sigmoid", "plain_weights"]


def plain_pack(rows: Any, mask: Any, padded_rows: int, slabs: int) -> Any:
    """Panels of 128 rows x 128 bytes, `[padded_rows * slabs * 128]`: chunk c of 16 bytes of row r at `c ^ (r % 8)`."""
    count, dim = rows.shape
    size = rows.dtype.itemsize
    wide = np.zeros((padded_rows, slabs * 128 // size), rows.dtype)
    wide[:count, :dim] = rows if mask is None else np.where(np.asarray(mask, bool)[:, None], rows, 0)
    chunks = wide.view(np.uint8).reshape(padded_rows // 128, 128, slabs, 8, 16).transpose(0, 2, 1, 3, 4)
    out = np.empty_like(chunks)
    for row in range(128):
        out[:, :, row, np.arange(8) ^ (row % 8)] = chunks[:, :, row]
    return np.ascontiguousarray(out).reshape(-1)


def plain_allowed(r: int, c: int, pairs: Any) -> Any:
    """`[r, c]`: which pairs are allowed."""
    allowed = np.ones((r, c), bool)
    if pairs.query_mask is not None:
        allowed &= np.asarray(pairs.query_mask, bool)[:, None]
    if pairs.key_mask is not None:
        allowed &= np.asarray(pairs.key_mask, bool)[None, :]
    if pairs.query_ids is not None:
        equal = pairs.query_ids[:, None] == pairs.key_ids[None, :]
        allowed &= ~equal | _designated(r, c, pairs)
    if pairs.diagonal is not None:
        allowed &= np.arange(c)[None, :] - np.arange(r)[:, None] != pairs.diagonal
    return allowed


def _designated(r: int, c: int, pairs: Any) -> Any:
    if pairs.target is None:
        return np.zeros((r, c), bool)
    return np.arange(c)[None, :] == np.asarray(pairs.target)[:, None]


def _logits(queries: Any, keys: Any, scale: float, pairs: Any, bias: float = 0.0) -> Any:
    logits = queries.astype(np.float64) @ keys.astype(np.float64).T * scale + bias
    return np.where(plain_allowed(*logits.shape, pairs), logits, -np.inf)


def plain_lse(queries: Any, keys: Any, scale: float, pairs: Any) -> tuple[Any, Any, Any]:
    """`(lse of rows, lse of columns, positive)`, natural; -inf where nothing is allowed, 0 where no positive is."""
    logits = _logits(queries, keys, scale, pairs)
    found = _designated(*logits.shape, pairs)
    return np.logaddexp.reduce(logits, 1), np.logaddexp.reduce(logits, 0), np.where(found, logits, 0).sum(1)


def plain_fold(part: Any, own: Any, shift: Any, mark: Any) -> Any:
    """Log-sum-exp of `[steps, length]` parts, whose tiles' shift and mark are `[steps, length]` too."""
    with np.errstate(divide="ignore"):
        each = np.where(mark != 0, own, shift) + np.log2(part.astype(np.float64))
    return np.logaddexp2.reduce(each, 0) * np.log(2.0)


def plain_weights(queries: Any, keys: Any, scale: float, pairs: Any, rows: Any, columns: Any) -> Any:
    """`g [r, c]` of nibs.verbs.Weights; either side may be None."""
    logits = _logits(queries, keys, scale, pairs)
    g = np.zeros_like(logits)
    for side, axis in ((rows, 1), (columns, 0)):
        if side is None:
            continue
        factor, shift, target = (
            np.expand_dims(np.asarray(value, np.float64), axis) for value in (side.factor, side.shift, side.target)
        )
        exponent = np.where(np.isfinite(shift), logits - np.where(np.isfinite(shift), shift, 0), -np.inf)
        g += factor * np.exp(exponent) - np.where(_designated(*logits.shape, pairs), target, 0)
    return g


def plain_sigmoid(
    queries: Any, keys: Any, scale: float, bias: float, pairs: Any, factor: Any = None
) -> tuple[Any, Any, Any, Any]:
    """`(loss, weight, positive, g)`: row sums of softplus (no factor in it) and of g, positives' logits, g `[r, c]`."""
    logits = _logits(queries, keys, scale, pairs, bias)
    found = _designated(*logits.shape, pairs)
    signed = np.where(found, -logits, logits)
    loss = np.logaddexp(0, signed).sum(1)
    with np.errstate(over="ignore"):
        g = np.where(found, -1.0, 1.0) / (1 + np.exp(-signed))
    if factor is not None:
        g = g * np.asarray(factor, np.float64)[:, None]
    return loss, g.sum(1), np.where(found, logits, 0).sum(1), g
