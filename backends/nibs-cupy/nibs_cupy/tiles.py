"""The three verbs over the kernels of kernels/general.cu: arguments in, statistics and gradients out.

    tile_lse      one launch over squares of 64 x 64 logits, one that folds what the squares of a row (a column) found
    merge_lse     one launch
    tile_grad     one launch that writes the tile's gradient weights, then two products of the BLAS library
    Sigmoid       one launch for the loss and the weights, which lack only their row's factor

What happens to an element is said in the kernels; which arrays they get is said here. `nibs.verbs` has the contract.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from nibs.verbs import LSE_FIELDS, Lse, Problem, Tile, Weights
from nibs_cupy.device import Cuda, Host

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

FILE = "general.cu"
SQUARE, THREADS, LINE = 64, 256, 128  # kernels/common.cuh; threads of the kernels over vectors

# kernels/common.cuh, bit by bit and field by field.
MULTI, EXCLUDE, SELF, MARGIN, KEPT, KEEP, PRODUCT_SUM, STATISTICS, WEIGHTS, DIAGONAL = (1 << bit for bit in range(10))
TYPES = ("float64", "float32", "bfloat16", "float16")
SIDES = [f"{side}_{name}" for side in ("row", "column") for name in ("factor", "shift", "target", "smooth")]
TILE = np.dtype(
    [
        *((name, np.int64) for name in ("rows", "columns", "width", "row", "column")),
        *((name, np.uint64) for name in ("queries", "keys")),
        *((name, np.int64) for name in ("query_row", "query_step", "key_row", "key_step")),
        *((name, np.uint64) for name in ("scale", "bias", "target", "exact", "query_ids", "key_ids")),
        *((name, np.uint64) for name in ("query_mask", "key_mask")),
        *((name, np.uint64) for name in ("query_limit", "key_limit", "anchor_weights", *SIDES)),
        *((name, np.uint64) for name in ("products", "weights", "row_parts", "column_parts")),
        *((name, np.uint64) for name in ("product_parts", "weight_parts")),
        *((name, np.int32) for name in ("row_fields", "column_fields")),
        *((name, np.int32) for name in ("query_type", "key_type", "flags", "unused")),
    ]
)
FOLD = np.dtype(
    [
        *((name, np.uint64) for name in ("parts", "out")),
        *((name, np.int64) for name in ("count", "length")),
        *((name, np.int32) for name in ("fields", "unused")),
    ]
)
MERGE = np.dtype([("into", np.uint64, 9), ("part", np.uint64, 9), ("length", np.int64)])
SCATTER = np.dtype(
    [
        *((name, np.uint64) for name in ("values", "order", "starts", "out")),
        ("length", np.int64),
        *((name, np.int32) for name in ("largest", "unused")),
    ]
)
POISON = np.dtype(
    [
        *((name, np.uint64) for name in ("values", "mask", "out")),
        *((name, np.int64) for name in ("rows", "width", "row", "step")),
        *((name, np.int32) for name in ("type", "unused")),
    ]
)
FIELD = {name: 1 << LSE_FIELDS.index(name) for name in LSE_FIELDS}
ALLOWED = FIELD["allowed_sum"] | FIELD["allowed_count"]
MASSES = FIELD["mass"] | FIELD["shift"]
MAXIMA = FIELD["positive_max"] | FIELD["negative_max"]


class Rows:
    """Rows of a tile as they came, `[r, d]` of any stride, and which are present; wide only where a product asks.

    panels: the same rows as fast_tiles.py has packed them, once it has.
    """

    def __init__(self, tiles: CupyTiles, values: Any, mask: Any) -> None:
        size = values.dtype.itemsize
        if any(stride % size for stride in values.strides):  # a field of a record
            values = tiles.xp.ascontiguousarray(values)
        self.tiles, self.values = tiles, values
        self.mask = None if mask is None else tiles.xp.ascontiguousarray(mask)
        self.shape = values.shape
        self._wide: Any = None
        self.panels: Any = None

    def wide(self) -> Any:
        """In the accumulation dtype, absent rows zero; made once."""
        if self._wide is None:
            self._wide = self.tiles.operand(self.values, self.mask)
        return self._wide

    def present(self) -> Any:
        """As they came, absent rows zero."""
        if self.mask is None:
            return self.values
        return self.tiles.xp.where(self.mask[:, None], self.values, self.tiles.xp.zeros((), self.values.dtype))

    def strides(self) -> tuple[int, int]:
        """In elements."""
        row, step = (stride // self.values.dtype.itemsize for stride in self.values.strides)
        return row, step

    def type(self) -> int:
        return TYPES.index(str(self.values.dtype))


class CupyTiles:
    """The verbs for one accumulation dtype on one device, and the scratch that they reuse."""

    fused = True

    def __init__(self, dtype: str, device: Cuda | Host) -> None:
        self.device, self.xp = device, device.xp
        self.accumulator = np.dtype(np.float64 if dtype == "float64" else np.float32)
        self.lowest = float(np.finfo(self.accumulator).min)
        self._scratch: Any = None

    # -- the verbs --------------------------------------------------------------------------------

    def tile_lse(self, tile: Tile, problem: Problem, keep: bool) -> tuple[Lse, Lse, Any]:
        call = Arguments(self, tile, problem)
        row_fields, column_fields = _fields(problem)
        down, across = call.squares
        row_parts = self._empty(row_fields.bit_count(), across, call.rows)
        column_parts = self._empty(column_fields.bit_count(), down, call.columns)
        call.give(row_parts=row_parts, column_parts=column_parts)
        call.number(row_fields=row_fields, column_fields=column_fields)
        kept = None
        if problem.softmax:
            if keep:
                kept = self._empty(call.rows, call.columns)
                call.give(products=kept)
                call.flags |= KEEP
            call.launch("lse")
        else:
            call.flags |= STATISTICS
            kept = self._sigmoid(call, problem, keep)
        rows = self._folded(row_fields, row_parts)
        columns = self._folded(column_fields, column_parts)
        return rows, columns, kept

    def merge_lse(self, into: Lse, part: Lse) -> None:
        arguments = np.zeros(1, MERGE)
        held = []
        length = 0
        for slot, name in enumerate(LSE_FIELDS):
            mine, theirs = getattr(into, name), getattr(part, name)
            if mine is None or theirs is None:
                continue
            theirs = self.xp.ascontiguousarray(theirs)
            held.append(theirs)
            length = len(mine)
            arguments["into"][0, slot], arguments["part"][0, slot] = map(self.device.address, (mine, theirs))
        if length:
            arguments["length"] = length
            self._line("merge", length, arguments)

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
        call = Arguments(self, tile, problem)
        if not problem.softmax:
            assert rows is not None
            return self._sigmoid_grad(tile, problem, call, rows, kept, into, onto)
        weights = self._tile_buffer(call) if kept is None else kept
        if kept is not None:
            call.flags |= KEPT
        call.give(products=kept, weights=weights)
        for side, values in (("row", rows), ("column", columns)):
            if values is not None:
                for name in ("factor", "shift", "target", "smooth"):
                    call.give_vectors(**{f"{side}_{name}": getattr(values, name)})
        products = self._sums(call, "product_parts", PRODUCT_SUM) if problem.total_product else None
        call.launch("weights")
        if into is not None:
            self.device.add_product(into, weights, tile.keys.wide(), problem.precision)
        if onto is not None:
            self.device.add_product(onto, weights.T, tile.queries.wide(), problem.precision)
        return None if products is None else self.total(products), None

    # -- Sigmoid ----------------------------------------------------------------------------------

    def _sigmoid(self, call: Arguments, problem: Problem, grad: bool) -> Any:
        """Launch; with `grad`, the weights `[r, c]` but for their row's factor, and their sums: `[across, r]` of
        weights, and of weights times products where those are wanted.
        """
        if not grad:
            call.launch("sigmoid")
            return None
        weights = self._tile_buffer(call)
        call.give(weights=weights)
        call.flags |= WEIGHTS
        sums = self._sums(call, "weight_parts", 0)
        products = self._sums(call, "product_parts", PRODUCT_SUM) if problem.total_product else None
        call.launch("sigmoid")
        return weights, sums, products

    def _sigmoid_grad(
        self, tile: Tile, problem: Problem, call: Arguments, rows: Weights, kept: Any, into: Any, onto: Any
    ) -> tuple[Any, Any]:
        weights, sums, products = self._sigmoid(call, problem, grad=True) if kept is None else kept
        factor = rows.factor[:, None]
        if into is not None:
            part = self.zeros(*into.shape)
            self.device.add_product(part, weights, tile.keys.wide(), problem.precision)
            part *= factor
            into += part
        if onto is not None:
            self.device.add_product(onto, weights.T, tile.queries.wide() * factor, problem.precision)
        product = weight = None
        if problem.total_weight:
            weight = self.total((sums * rows.factor).ravel())
        if products is not None:
            product = self.total((products * rows.factor).ravel())
        return product, weight

    # -- launches ---------------------------------------------------------------------------------

    def _sums(self, call: Arguments, name: str, flag: int) -> Any:
        """Room for the sums of each row within each square, `[across, r]`."""
        parts = self._empty(call.squares[1], call.rows)
        call.give(**{name: parts})
        call.flags |= flag
        return parts

    def _folded(self, fields: int, parts: Any) -> Lse:
        """Parts `[fields, count, length]` to statistics, each `[length]`."""
        slots, count, length = parts.shape
        out = parts.reshape(slots, length) if count == 1 else self._empty(slots, length)
        if count != 1 and slots and length:
            address = self.device.address
            arguments = np.array([(address(parts), address(out), count, length, fields, 0)], FOLD)
            self._line("fold", length, arguments)
        present = [name for name in LSE_FIELDS if fields & FIELD[name]]
        return Lse(**dict(zip(present, out)))

    def _line(self, name: str, length: int, arguments: Any) -> None:
        """A kernel with one thread for each of `length` numbers."""
        self.kernel(name)(-(-length // LINE), LINE, arguments)

    def kernel(self, name: str) -> Any:
        return self.device.kernel(FILE, f"nibs_{name}_{self.accumulator}")

    def _empty(self, *shape: int) -> Any:
        return self.xp.empty(shape, self.accumulator)

    def _tile_buffer(self, call: Arguments) -> Any:
        """A scratch tile `[r, c]`, allocated once at the largest size seen."""
        size = call.rows * call.columns
        if self._scratch is None or self._scratch.size < size:
            self._scratch = self._empty(size)
        return self._scratch[:size].reshape(call.rows, call.columns)

    # -- array words for the schedule -------------------------------------------------------------

    def operand(self, rows: Any, mask: Any) -> Any:
        return self.cast(Rows(self, rows, mask).present())

    def factor(self, rows: Any, mask: Any) -> Rows:
        return Rows(self, rows, mask)

    def poison(self, rows: Any, mask: Any) -> Any:
        """`[n]`: 0 for a row that is finite or absent, else NaN."""
        out = self.zeros(len(rows))
        if len(rows):
            given = Rows(self, rows, mask)
            address = self.device.address
            places = address(given.values), address(given.mask), address(out)
            self._line(
                "poison", len(rows), np.array([(*places, *rows.shape, *given.strides(), given.type(), 0)], POISON)
            )
        return out

    def rounds(self, dtype: str) -> bool:
        return bool(np.dtype(DTYPES[dtype]) != self.accumulator)

    def zeros(self, *shape: int) -> Any:
        return self.xp.zeros(shape, self.accumulator)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self.xp.empty(shape, DTYPES[dtype])

    def cast(self, values: Any) -> Any:
        return self.xp.asarray(values).astype(self.accumulator, copy=False)

    def scalar(self, value: Any) -> Any:
        return self.cast(value).reshape(())

    def total(self, values: Any) -> Any:
        return values.sum(dtype=np.float64)

    def indices(self, begin: int, end: int) -> Any:
        return self.xp.arange(begin, end)

    def scatter(self, values: Any, index: Any, length: int, how: str) -> Any:
        """Values in the order of their index, and by place where that is equal: the same sum each time."""
        xp, address = self.xp, self.device.address
        out = self._empty(length)
        if length:
            values = self.xp.ascontiguousarray(self.cast(values))
            order = xp.argsort(index, kind="stable").astype(np.int64, copy=False)
            starts = xp.searchsorted(index[order], xp.arange(length + 1)).astype(np.int64, copy=False)
            given = (*map(address, (values, order, starts, out)), length, how == "max", 0)
            self._line("scatter", length, np.array([given], SCATTER))
        return out


class Arguments:
    """The arguments of a kernel on one tile, filled by name; holds the arrays until the launch."""

    def __init__(self, tiles: CupyTiles, tile: Tile, problem: Problem) -> None:
        self.tiles, self.xp, self.flags = tiles, tiles.xp, 0
        self.record = np.zeros(1, TILE)
        self.held: list[Any] = []
        self.rows, self.columns = tile.queries.shape[0], tile.keys.shape[0]
        self.squares = -(-self.rows // SQUARE), -(-self.columns // SQUARE)
        self.number(rows=self.rows, columns=self.columns, width=tile.keys.shape[1], row=tile.row, column=tile.column)
        queries, keys = tile.queries, tile.keys
        self.give(queries=queries.values, keys=keys.values, query_mask=queries.mask, key_mask=keys.mask)
        for name, rows in (("query", queries), ("key", keys)):
            row, step = rows.strides()
            self.number(**{f"{name}_row": row, f"{name}_step": step, f"{name}_type": rows.type()})
        self.give(scale=problem.scale, bias=problem.bias)
        self._pairs(tile, problem)

    def give(self, **arrays: Any) -> None:
        """Arrays that are packed already; None stays null."""
        for name, array in arrays.items():
            if array is not None:
                self.held.append(array)
                self.record[name] = self.tiles.device.address(array)

    def give_vectors(self, dtype: Any = None, **arrays: Any) -> None:
        """Vectors of any stride, in `dtype` or the accumulation dtype."""
        for name, array in arrays.items():
            if array is not None:
                self.give(**{name: self.xp.ascontiguousarray(array, dtype or self.tiles.accumulator)})

    def number(self, **numbers: int) -> None:
        for name, value in numbers.items():
            self.record[name] = value

    def launch(self, name: str) -> None:
        down, across = self.squares
        self.record["flags"] = self.flags
        self.tiles.kernel(name)(down * across, THREADS, self.record)

    def _pairs(self, tile: Tile, problem: Problem) -> None:
        """Which pairs are allowed and which positive, as far as this tile has such rules."""
        if tile.diagonal:
            self.flags |= DIAGONAL
        self.give_vectors(np.int64, target=tile.targets)
        self.give_vectors(exact=tile.exact)
        if problem.multi or problem.exclude:
            self.flags |= MULTI if problem.multi else EXCLUDE
            self.give_vectors(np.int64, query_ids=tile.query_ids, key_ids=tile.key_ids)
        if problem.exclude_self and tile.home:
            self.flags |= SELF
        if problem.margin is not None:
            self.flags |= MARGIN
            self.give_vectors(query_limit=tile.query_limit, key_limit=tile.key_limit)
        self.give_vectors(anchor_weights=tile.anchor_weights)


def _fields(problem: Problem) -> tuple[int, int]:
    """The statistics that rows and columns need, as bits."""
    rows = FIELD["positive_sum"]
    columns = 0
    if problem.rows:
        rows |= MASSES if problem.softmax else FIELD["mass"]
    if problem.multi:
        rows |= FIELD["positive_count"]
    if problem.sums and (problem.rows or problem.stats):
        rows |= ALLOWED
    if problem.stats:
        rows |= MAXIMA
    if problem.columns:
        columns |= MASSES
        if problem.multi:
            columns |= FIELD["positive_sum"] | FIELD["positive_count"] | FIELD["weight_sum"]
        if problem.sums:
            columns |= ALLOWED
    return rows, columns
