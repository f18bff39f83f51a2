"""The three verbs over the fast kernels of fast.py: what they do not take never comes here.

    tile_lse      both sides packed (once a tile), statistics and positives' logits from one launch, its redo and folds
    tile_grad     the weights in the dtype of the inputs, then two products with float32 sums
    Sigmoid       one launch for the loss and the weights

Chosen by NIBS_CUPY_KERNELS=ampere or hopper, and not without: the suite has not run over them on a GPU yet. Nothing is
kept from one verb to the other but Sigmoid's weights: logits are never written, so a softmax recomputes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nibs.verbs import Lse, Problem, Tile, Weights
from nibs_cupy.device import Cuda, Host
from nibs_cupy.fast import FORMATS, FastKernels, Pairs, Panels
from nibs_cupy.tiles import DTYPES, CupyTiles, Rows

__all__ = ["FastTiles"]

LIFT = {"float16": 12}  # the power of two to which the largest weight is lifted, where a dtype needs it


class FastTiles(CupyTiles):
    """The verbs for one dtype, at one precision, by one family of kernels."""

    def __init__(self, dtype: str, precision: str, device: Cuda | Host, family: str, processors: int) -> None:
        super().__init__(dtype, device)
        self.dtype = dtype
        self.fast = FastKernels(device, FORMATS[dtype, precision], family, processors=processors)

    def tile_lse(self, tile: Tile, problem: Problem, keep: bool) -> tuple[Lse, Lse, Any]:
        pairs = self._pairs(tile, problem)
        if not problem.softmax:
            lift, found = self._fast_sigmoid(tile, problem, pairs, tile.anchor_weights, grad=keep)
            loss, _, positive, _, _, *facts = found
            kept = (lift, found[:5]) if keep else None
            return self._rows(tile, pairs, positive, facts, mass=loss), Lse(), kept
        queries, keys = self._packed(tile.queries), self._packed(tile.keys)
        row_shift, row_mass, column_shift, column_mass, positive, *facts = self.fast.lse(
            *(queries, keys, self._one(problem.scale), pairs),
            rows=problem.rows,
            columns=problem.columns,
            facts=problem.stats,
        )
        rows = self._rows(tile, pairs, positive, facts, mass=row_mass, shift=row_shift)
        return rows, Lse(column_mass, column_shift), None

    def tile_grad(
        self,
        tile: Tile,
        problem: Problem,
        rows: Weights | None,
        columns: Weights | None,
        kept: Any,
        into: Any,
        onto: Any,
    ) -> tuple[Any, Any]:
        weight = None
        if problem.softmax:
            sides = [None if side is None else self._contiguous(side) for side in (rows, columns)]
            lift = self._lift(*(side.factor for side in sides if side is not None))
            queries, keys = self._packed(tile.queries), self._packed(tile.keys)
            g, products = self.fast.weights(
                *(queries, keys, self._one(problem.scale), self._pairs(tile, problem), *sides, lift),
                products=problem.total_product,
            )
        else:
            assert rows is not None
            lift, found = kept or self._fast_sigmoid(tile, problem, self._pairs(tile, problem), rows.factor, grad=True)
            _, weight, _, g, products, *_ = found
        share = lift if self.dtype in LIFT else None
        g = g.view(DTYPES[self.dtype])
        if into is not None:
            self.device.add_product(into, g, tile.keys.present(), problem.precision, share)
        if onto is not None:
            self.device.add_product(onto, g.T, tile.queries.present(), problem.precision, share)
        product = None if products is None else self.total(products.ravel())
        return product, self.total(weight) if problem.total_weight else None

    def _fast_sigmoid(self, tile: Tile, problem: Problem, pairs: Pairs, factor: Any, *, grad: bool) -> tuple[Any, Any]:
        """The lift, and what the kernel gives; factor `[r]`: of each row, in all but the loss and the positives."""
        queries, keys = self._packed(tile.queries), self._packed(tile.keys)
        scalars = self._one(problem.scale), self._one(problem.bias)
        factor = self.xp.ascontiguousarray(self.cast(factor))
        lift = self._lift(factor)
        found = self.fast.sigmoid(
            *(queries, keys, *scalars, pairs, factor, lift),
            grad=grad,
            products=grad and problem.total_product,
            facts=problem.stats,
        )
        return lift, found

    def _rows(self, tile: Tile, pairs: Pairs, positive: Any, facts: list[Any], **sums: Any) -> Lse:
        """Statistics of the tile's rows; facts: what `stats=True` asks for, or none."""
        if not facts:
            return Lse(positive_sum=positive, **sums)
        xp, lowest = self.xp, self.scalar(-np.inf)
        here = xp.zeros(len(positive), bool)
        if pairs.target is not None:
            here = (pairs.target >= 0) & (pairs.target < tile.keys.shape[0])
        # A designated pair that is not allowed is no positive, and adds nothing.
        positive = xp.where(positive == lowest, self.scalar(0.0), positive)
        largest = xp.where(here, positive, lowest)
        total, count, negative = facts
        return Lse(
            **sums,
            positive_sum=positive,
            allowed_sum=total,
            allowed_count=count,
            positive_max=largest,
            negative_max=negative,
        )

    # -- operands ---------------------------------------------------------------------------------

    def _packed(self, rows: Rows) -> Panels:
        """Panels of these rows, made once."""
        if rows.panels is None:
            mask = None if rows.mask is None else rows.mask.view(np.uint8)
            rows.panels = self.fast.pack(rows.values, mask)
        return rows.panels

    def _pairs(self, tile: Tile, problem: Problem) -> Pairs:
        xp = self.xp
        target = None
        if tile.diagonal:
            target = xp.arange(tile.queries.shape[0], dtype=np.int64) + (tile.row - tile.column)
        elif tile.targets is not None:
            target = xp.where(tile.targets < 0, -1, tile.targets - tile.column).astype(np.int64, copy=False)
        masks = (None if rows.mask is None else rows.mask.view(np.uint8) for rows in (tile.queries, tile.keys))
        ids: tuple[Any, Any] = (None, None)
        if problem.exclude:
            ids = tuple(xp.ascontiguousarray(array, dtype=np.int64) for array in (tile.query_ids, tile.key_ids))
        diagonal = tile.row - tile.column if problem.exclude_self and tile.home else None
        return Pairs(target, *masks, *ids, diagonal)

    def _one(self, value: Any) -> Any:
        return self.xp.ascontiguousarray(self.cast(value).reshape(1))

    def _contiguous(self, side: Weights) -> Weights:
        vectors = (side.factor, side.shift, side.target)
        return Weights(*(self.xp.ascontiguousarray(self.cast(vector)) for vector in vectors))

    def _lift(self, *factors: Any) -> Any:
        """`[1]`: the power of two that takes the largest factor to 2^12: float16 then holds large and small weights."""
        if self.dtype not in LIFT:
            return self.zeros(1) + 1
        top = self.xp.stack([abs(factor).max() if len(factor) else self.scalar(1.0) for factor in factors]).max()
        exponent = LIFT[self.dtype] - self.xp.ceil(self.xp.log2(self.xp.where(top > 0, top, 1.0)))
        exponent = self.xp.minimum(exponent, 126)  # beyond, neither it nor its inverse is a normal float32
        return self.xp.exp2(exponent).astype(np.float32).reshape(1)
