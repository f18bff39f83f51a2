"""The fast kernels: what they take, how they are launched, and what they hold.

    pack        [n, d] rows of any stride -> panels of 128 rows x 128 bytes, swizzled, zeros where nothing is
    lse         panels of both sides -> shift and mass of rows and of columns, logits of designated pairs
    weights     panels, weights of both sides -> g [r, pitch], in the dtype of the inputs
    sigmoid     panels -> row sums of softplus and of g, and g, in one pass

Two families run the same three. `ampere` (mma.sync, cp.async: every NVIDIA GPU from sm_80 on, and the host runner)
takes bfloat16, float16, and float32 as tf32 with three products. `hopper` (wgmma, bulk copies: sm_90a, and the
host runner) takes bfloat16 and float16. What neither takes, `why_not` says in a sentence, and the general kernels of
tiles.py run it.

Arguments of kernels are structs of 8-byte fields; the dtypes below have them in the kernels' order. The same
computations in plain NumPy are in plain.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nibs.spec import Objective
from nibs.verbs import Weights

__all__ = ["FORMATS", "FastKernels", "Pairs", "Panels", "why_not"]

PANEL_ROWS, SLAB = 128, 128  # rows of a panel; bytes of one of its rows
NO_DIAGONAL = 1 << 62
PACK_THREADS, FOLD_THREADS = 256, 128

# What each dtype is called in kernels' names, by `precision` where it matters.
FORMATS = {
    ("bfloat16", "default"): "bfloat16",
    ("bfloat16", "high"): "bfloat16",
    ("bfloat16", "highest"): "bfloat16",
    ("float16", "default"): "float16",
    ("float16", "high"): "float16",
    ("float16", "highest"): "float16",
    ("float32", "high"): "tf32x3",
}
PACK = {"bfloat16": "nibs_pack_2", "float16": "nibs_pack_2", "tf32x3": "nibs_pack_4"}
BYTES = {"bfloat16": 2, "float16": 2, "tf32x3": 4}


def _struct(*names: str) -> np.dtype[Any]:
    return np.dtype([(name, np.int64) for name in names])


_PAIRS = ("target", "query_mask", "key_mask", "query_ids", "key_ids", "diagonal", "rows", "columns")
PACK_ARGS = _struct("source", "mask", "out", "rows", "dim", "row_stride", "column_stride", "slabs", "padded_rows")
FOLD_ARGS = _struct("part", "own", "shift", "mark", "out_shift", "out_mass", "length", "steps", "tile", "base", "step")
SUM_ARGS = _struct("part", "out", "length", "steps")
LSE_ARGS = _struct(
    *("queries", "keys", "slabs", "scale", *_PAIRS),
    *("row_part", "column_part", "row_shift", "column_shift", "shift", "mark", "row_tiles", "column_tiles"),
    *("positive", "facts"),
)
WEIGHTS_ARGS = _struct(
    *("queries", "keys", "slabs", "scale", *_PAIRS),
    *(f"{side}_{name}" for side in ("row", "column") for name in ("factor", "shift", "target_weight")),
    *("g", "pitch", "lift", "product_part"),
)
SIGMOID_ARGS = _struct(
    *("queries", "keys", "slabs", "scale", "bias", *_PAIRS),
    *("factor", "loss_part", "weight_part", "positive", "g", "pitch", "lift", "product_part", "facts", "column_tiles"),
)


@dataclass(frozen=True)
class Family:
    """How one family cuts a macro tile.

    height, width: of the tiles that have a maximum of their own. block_height: of a thread block's tile. shared:
    bytes of dynamic shared memory. arch: what its kernels are compiled for, None for any. stays: thread blocks
    take tile after tile, one thread block to a multiprocessor.
    """

    name: str
    height: int
    width: int
    block_height: int
    threads: int
    shared: int
    arch: str | None
    stays: bool


def _ring(height: int, width: int, stages: int) -> int:
    return stages * (height + width) * SLAB


# Signals and scratch of kernels/hopper.cuh, behind the stages: SCRATCH floats for each multiplying warpgroup.
_HOPPER_REST = 2 * 4 * 8 + 2 * 4 * (2 * 4 + 2 * (64 + 4 * 256))
FAMILIES = {
    "ampere": Family("ampere", 128, 128, 128, 256, _ring(128, 128, 3), None, False),
    "hopper": Family("hopper", 64, 256, 128, 384, _ring(128, 256, 4) + _HOPPER_REST, "sm_90a", True),
}


@dataclass(frozen=True)
class Panels:
    """One side, packed: `rows` rows of `dim` numbers in `slabs` slabs."""

    data: Any
    rows: int
    dim: int
    slabs: int


@dataclass(frozen=True)
class Pairs:
    """Which pairs of a macro tile are allowed or designated; None is no such rule.

    target `[r]` int64: the designated column, or -1. query_mask `[r]`, key_mask `[c]`: one byte each. query_ids,
    key_ids: int64; pairs of equal id leave, but for the designated. diagonal: pairs `(i, i + diagonal)` leave.
    """

    target: Any = None
    query_mask: Any = None
    key_mask: Any = None
    query_ids: Any = None
    key_ids: Any = None
    diagonal: int | None = None


def why_not(dtype: str, precision: str, objective: Objective) -> str | None:
    """Why the fast kernels do not take a call, or None if they do."""
    if (dtype, precision) not in FORMATS:
        return f"{dtype} at precision={precision!r} has no tensor-core kernel"
    for flag, what in (
        (objective.same_id == "positive", "several positives"),
        (getattr(objective, "false_negative_margin", None) is not None, "a margin"),
        (getattr(objective, "label_smoothing", 0.0) > 0, "label smoothing"),
    ):
        if flag:
            return f"{what} is for the general kernels"
    return None


class FastKernels:
    """One family for one format on one device: `device` is nibs_cupy.device's Cuda or Host."""

    def __init__(self, device: Any, format: str, family: str = "ampere", *, processors: int = 2) -> None:
        """processors: multiprocessors of the device, for kernels that stay."""
        self.device, self.xp, self.format = device, device.xp, format
        self.family, self.processors = FAMILIES[family], processors

    # -- operands ---------------------------------------------------------------------------------

    def slabs(self, dim: int) -> int:
        return -(-dim * BYTES[self.format] // SLAB)

    def bytes_packed(self, rows: int, dim: int) -> int:
        """What `pack` allocates."""
        step = max(PANEL_ROWS, self.family.width)
        return -(-rows // step) * step * self.slabs(dim) * SLAB

    def pack(self, rows: Any, mask: Any = None) -> Panels:
        """Panels of `[n, d]` rows; absent rows are not read and become zeros."""
        count, dim = rows.shape
        size = rows.dtype.itemsize
        assert size == BYTES[self.format]
        step = max(PANEL_ROWS, self.family.width)
        padded, slabs = -(-count // step) * step, self.slabs(dim)
        data = self.xp.empty(padded * slabs * SLAB, self.xp.uint8)
        args = np.zeros(1, PACK_ARGS)
        for name, value in (("source", rows), ("mask", mask), ("out", data)):
            args[name] = self.device.address(value)
        args["rows"], args["dim"], args["slabs"], args["padded_rows"] = count, dim, slabs, padded
        args["row_stride"], args["column_stride"] = (stride // size for stride in rows.strides)
        self._over(padded * slabs * 8, PACK_THREADS, "pack.cu", PACK[self.format], args)
        return Panels(data, count, dim, slabs)

    # -- InfoNCE ----------------------------------------------------------------------------------

    def lse(
        self,
        queries: Panels,
        keys: Panels,
        scale: Any,
        pairs: Pairs,
        *,
        rows: bool = True,
        columns: bool = True,
        facts: bool = False,
    ) -> tuple[Any, ...]:
        """`(row shift, row mass, column shift, column mass, positive)`; a side that is not wanted is None.

        scale: one float32 on the device. positive `[r]`: logits of designated pairs, 0 elsewhere. facts: three more,
        each `[r]`: sum and count of allowed logits, and the largest that is not designated.
        """
        r, c, family = queries.rows, keys.rows, self.family
        down, across = -(-r // family.height), -(-c // family.width)
        args = self._tile(LSE_ARGS, queries, keys, scale, pairs)
        row_part, row_shift = (self._floats(across, r) if rows else None for _ in range(2))
        column_part, column_shift = (self._floats(down, c) if columns else None for _ in range(2))
        shift, mark = self._floats(down, across), self.xp.empty((down, across), self.xp.int32)
        positive = self.xp.zeros(r, self.xp.float32)
        for name, value in (
            *(("row_part", row_part), ("column_part", column_part), ("row_shift", row_shift)),
            *(("column_shift", column_shift), ("shift", shift), ("mark", mark), ("positive", positive)),
        ):
            args[name] = self.device.address(value)
        args["row_tiles"], args["column_tiles"] = down, across
        found = self._facts(args, across, r) if facts else None
        self._tiles("lse", args)
        self._tiles("redo", args)
        out: list[Any] = []
        for part, own, length, steps, tile, base, step in (
            (row_part, row_shift, r, across, family.height, across, 1),
            (column_part, column_shift, c, down, family.width, 1, across),
        ):
            if part is None:
                out += [None, None]
                continue
            out += [self._floats(length), self._floats(length)]
            fold = np.zeros(1, FOLD_ARGS)
            arrays = ("part", part), ("own", own), ("shift", shift), ("mark", mark)
            for name, value in (*arrays, ("out_shift", out[-2]), ("out_mass", out[-1])):
                fold[name] = self.device.address(value)
            numbers = ("length", length), ("steps", steps), ("tile", tile), ("base", base), ("step", step)
            for name, number in numbers:
                fold[name] = number
            self._over(length, FOLD_THREADS, "fold.cu", "nibs_fold_lse", fold)
        return (*out, positive, *self._folded_facts(found))

    def weights(
        self,
        queries: Panels,
        keys: Panels,
        scale: Any,
        pairs: Pairs,
        rows: Weights | None,
        columns: Weights | None,
        lift: Any,
        *,
        products: bool = False,
    ) -> tuple[Any, Any]:
        """Gradient weights `[r, c]` times `lift`, one float32 on the device, a power of two.

        And, with `products`, `[across, r]`: row sums of weights (not rounded, not lifted) times `<q, k>`, in parts.
        """
        args = self._tile(WEIGHTS_ARGS, queries, keys, scale, pairs)
        for side, values in (("row", rows), ("column", columns)):
            if values is None:
                continue
            for name, value in (("factor", values.factor), ("shift", values.shift), ("target_weight", values.target)):
                args[f"{side}_{name}"] = self.device.address(value)
        g = self._output(args, queries.rows, keys.rows, lift)
        parts = self._floats(-(-keys.rows // self.family.width), queries.rows) if products else None
        args["product_part"] = self.device.address(parts)
        self._tiles("weights", args)
        return g, parts

    # -- Sigmoid ----------------------------------------------------------------------------------

    def sigmoid(
        self,
        queries: Panels,
        keys: Panels,
        scale: Any,
        bias: Any,
        pairs: Pairs,
        factor: Any = None,
        lift: Any = None,
        *,
        grad: bool = True,
        products: bool = False,
        facts: bool = False,
    ) -> tuple[Any, ...]:
        """`(loss, weight, positive, g, product)`: row sums of softplus, and of g; g `[r, c]` times `lift`, if `grad`.

        factor `[r]`: weight of each row in g (not in the loss), None for 1. product: as of `weights`; only the
        ampere family has it. facts: three more, as of `lse`.
        """
        assert not products or self.family.name == "ampere"
        across = -(-keys.rows // self.family.width)
        args = self._tile(SIGMOID_ARGS, queries, keys, scale, pairs)
        r = queries.rows
        loss_part, weight_part = self._floats(across, r), self._floats(across, r)
        positive = self.xp.zeros(r, self.xp.float32)
        parts = self._floats(across, r) if products else None
        given = ("bias", bias), ("factor", factor), ("loss_part", loss_part), ("weight_part", weight_part)
        for name, value in (*given, ("positive", positive), ("product_part", parts)):
            args[name] = self.device.address(value)
        g = self._output(args, r, keys.rows, lift) if grad else None
        found = self._facts(args, across, r) if facts else None
        self._tiles("sigmoid", args)
        loss, weight = (self._folded("sum", part) for part in (loss_part, weight_part))
        return loss, weight, positive, g, parts, *self._folded_facts(found)

    # -- parts ------------------------------------------------------------------------------------

    def _facts(self, args: Any, across: int, r: int) -> Any:
        """Room for the kernel's `facts`, `[3, across, r]`."""
        facts = self._floats(3, across, r)
        args["facts"], args["column_tiles"] = self.device.address(facts), across
        return facts

    def _folded_facts(self, facts: Any) -> list[Any]:
        if facts is None:
            return []
        return [self._folded(how, part) for how, part in zip(("sum", "sum", "max"), facts, strict=True)]

    def _folded(self, how: str, part: Any) -> Any:
        """`[steps, r]` to `[r]`."""
        steps, r = part.shape
        out, fold = self._floats(r), np.zeros(1, SUM_ARGS)
        fold["part"], fold["out"] = self.device.address(part), self.device.address(out)
        fold["length"], fold["steps"] = r, steps
        self._over(r, FOLD_THREADS, "fold.cu", f"nibs_fold_{how}", fold)
        return out

    # -- launches ---------------------------------------------------------------------------------

    def _floats(self, *shape: int) -> Any:
        return self.xp.empty(shape, self.xp.float32)

    def _output(self, args: Any, r: int, c: int, lift: Any) -> Any:
        """Rows of g begin at multiples of 16 bytes, and whole runs of 8 columns are written."""
        pitch = -(-c // 8) * 8
        dtype = self.xp.float32 if BYTES[self.format] == 4 else self.xp.uint16
        g = self.xp.empty((r, pitch), dtype)
        args["g"], args["pitch"], args["lift"] = self.device.address(g), pitch, self.device.address(lift)
        return g[:, :c]

    def _tile(self, dtype: np.dtype[Any], queries: Panels, keys: Panels, scale: Any, pairs: Pairs) -> Any:
        args = np.zeros(1, dtype)
        assert queries.slabs == keys.slabs
        args["slabs"] = queries.slabs
        for name, value in (("queries", queries.data), ("keys", keys.data), ("scale", scale)):
            args[name] = self.device.address(value)
        for name in _PAIRS[:5]:
            args[name] = self.device.address(getattr(pairs, name))
        args["diagonal"] = NO_DIAGONAL if pairs.diagonal is None else pairs.diagonal
        args["rows"], args["columns"] = queries.rows, keys.rows
        return args

    def _tiles(self, what: str, args: Any) -> None:
        family = self.family
        tiles = -(-int(args["rows"][0]) // family.block_height) * -(-int(args["columns"][0]) // family.width)
        file = f"{family.name}_{'lse' if what in ('lse', 'redo') else 'weights'}.cu"
        kernel = self.device.kernel(file, f"nibs_{family.name}_{what}_{self.format}", arch=family.arch)
        if tiles:
            kernel(min(tiles, self.processors) if family.stays else tiles, family.threads, args, family.shared)

    def _over(self, items: int, threads: int, file: str, name: str, args: Any) -> None:
        if items:
            self.device.kernel(file, name)(-(-items // threads), threads, args)
