"""The three verbs over fused Triton kernels, for GPUs; and who may use them.

    verb         launches, for one macro tile (r queries by c keys)
    tile_lse     lse, repair: partial statistics of rows and columns; logits are never written unless they are kept
    merge_lse    fold: partial statistics into the running ones, in the order of the tiles
    tile_grad    weights, wide: `G [r, c]` in the input's dtype; then the library's `G K` and `G^T Q`
    Sigmoid      sigmoid: loss and G from one pass, kept from tile_lse for tile_grad
    totals       tally, in each tile_grad: partial sums of weights and products into running ones, as `fold`

The rows come as they are, in their own dtype and strides; scale and masks are applied in the kernels. Only absent rows
(zero, for the products), mixed dtypes and TF32 (rounded) make copies. Nothing here waits for the device, so a call
can be captured in a CUDA graph; the tests hold it to that on a card that is pretended.

`why_not` says in a sentence why a call cannot run here; `asked` reads what the caller wants: NIBS_TORCH_KERNEL=triton
(or torch), or the `kernel` of an explicit plan. What was asked for is done or refused, never replaced. On CPU tensors
the kernels run under Triton's interpreter (TRITON_INTERPRET=1), when asked for: slow, exact, and what the tests use.

Refused: float64, which the plain path computes on any device.
"""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch

from nibs.errors import InvalidInput, Unsupported
from nibs.plan import Job, Plan, TileHint
from nibs.verbs import Lse, Problem, Tile, Weights
from nibs_torch.precision import products
from nibs_torch.tiles import DTYPES, TorchTiles

__all__ = ["FusedTiles", "Macros", "asked", "hints_on", "kernel_for", "why_not"]

KERNELS = ("torch", "triton")
OLDEST = (8, 0)  # compute capability: bfloat16, and 10-bit float32 products
FOLD = 64  # rows of a program that folds
SEVERAL = 16  # tiles that a program looks through at a time for those that are to be made again
WHOLE = 256  # a multiple of every tile's rows and columns


def asked(plan: Any) -> str | None:
    """The kernel that the caller names: by an explicit plan, else by NIBS_TORCH_KERNEL; None leaves it to us."""
    name = plan.kernel if plan is not None and plan.kernel in KERNELS else os.environ.get("NIBS_TORCH_KERNEL", "")
    if not name:
        return None
    if name not in KERNELS:
        raise InvalidInput(f"NIBS_TORCH_KERNEL={name!r}: expected one of {', '.join(KERNELS)}.")
    return name


def kernel_for(device: str, dtype: str, plan: Any = None) -> str:
    """`"triton"` or `"torch"`: who computes the tiles. On a GPU the fused kernels where they can, if nobody says else.

    Raises Unsupported where `"triton"` was asked for and cannot serve.
    """
    name = asked(plan)
    if name == "torch" or (name is None and not device.startswith("cuda")):
        return "torch"
    sentence = why_not(device, dtype)
    if sentence is None:
        return "triton"
    if name is None:
        return "torch"
    where = "plan.kernel" if plan is not None and plan.kernel in KERNELS else "NIBS_TORCH_KERNEL"
    raise Unsupported(
        f"the fused Triton kernels were asked for ({where}='triton'), and cannot serve this call: {sentence}. "
        "Leave it out to let the plain path serve."
    )


def why_not(device: str, dtype: str) -> str | None:
    """Why the fused kernels cannot serve this dtype on this device, in a sentence; None if they can."""
    if dtype == "float64":
        return "they take float32, bfloat16 and float16, and this call is in float64"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed here (it comes with PyTorch's CUDA builds; else: pip install triton)"
    if not _is_new():
        return f"Triton {metadata.version('triton')} is here, and they need 3.6 or later"
    kind = device.partition(":")[0]
    if kind == "cpu":
        if interpreted():
            return None
        return "on a CPU they run only under Triton's interpreter: start Python with TRITON_INTERPRET=1"
    if kind != "cuda":
        return f"they run on CUDA and ROCm devices, and this call is on {device!r}"
    return _too_old(device)


@lru_cache(maxsize=1)
def _is_new() -> bool:
    """Whether Triton is one that the kernels were compiled with."""
    return tuple(map(int, metadata.version("triton").split(".")[:2])) >= (3, 6)


@lru_cache(maxsize=64)
def _too_old(device: str) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST:
        return f"they need compute capability 8.0, and {device} has {capability[0]}.{capability[1]}"
    return None


def interpreted() -> bool:
    """Whether Triton interprets kernels here. Triton reads this when kernels are defined: set it before the start."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def hints_on(device: str, dtype: str, *, mixed: bool = False) -> Macros:
    """For the planner: macro tiles for rows of this dtype. mixed: the two sides differ in dtype, and are copied."""
    from nibs_torch.kernels import tuning

    card, item = tuning.card_of(torch.device(device)), DTYPES[dtype].itemsize
    least = tuning.narrowest(card, item, ("", "ragged", "loose"))
    least_busy = tuning.narrowest(card, item, ("busy", "sums", "full", "least"))
    return Macros(card, item, least, least_busy, copies=mixed or item == 4)


@dataclass(frozen=True, slots=True)
class Macros:
    """`macros(job)`: macro tiles, the best first: whole waves of the card, of weights up to AREA.

    item: bytes of an element of a row, and of a weight. least: the fewest rows or columns of a tile of the kernels;
    least_busy: with statistics or smoothing. copies: rows must be copied before the kernels can read them.
    """

    card: Any
    item: int
    least: int
    least_busy: int
    copies: bool

    def __call__(self, job: Job) -> list[TileHint]:
        from nibs_torch.kernels import tuning

        card, item = self.card, self.item
        # G, its rows on 16-byte steps; then sums for each tile that a row or a column passes through: three fields of
        # rows for Sigmoid, four of both in tiles twice as wide for InfoNCE; with all statistics eight and seven.
        plain, full = item / 4 + 3 / self.least + 2**-10, item / 4 + 16 / self.least_busy + 2**-10
        busy = job.stats or getattr(job.objective, "label_smoothing", 0.0) > 0
        sides = ((4096, 4096),)
        if card.arch != "interpreter":
            sides = tuning.macro_tiles(job.d, item, card.sms, AREA // item)
        return [
            # A strip of small tiles would wait for its launches: it is taken where its tiles are whole.
            TileHint(rows, columns, full if busy else plain, full, kernel="triton", copies=self.copies, thin=rows)
            for rows, columns in sides
        ]


AREA = 384 << 20  # bytes of the largest weights that are planned


@dataclass(slots=True)
class Partial:
    """Statistics of a macro tile's rows (or columns), a sum for each tile they pass through. See `kernels.lse`.

    names: of the fields in `sums [fields, parts, size]`. positives [size]: logits of designated ones, or None. own
    [parts, size], shifts, marks: of tiles; `strides` between parts and between tiles of `tile` rows.
    """

    names: list[str]
    sums: Any
    size: int
    parts: int
    positives: Any = None
    own: Any = None
    shifts: Any = None
    marks: Any = None
    strides: tuple[int, int] = (0, 0)
    tile: int = FOLD


@dataclass(slots=True)
class Made:
    """Weights that the sigmoid made beside its loss: G, the lift of float16, and sums of its tiles."""

    g: Any
    lift: Any
    product: Any
    total: Any


class FusedTiles(TorchTiles):
    """The verbs for one call: `TorchTiles` where whole vectors are concerned, kernels where tiles are."""

    fused = True

    def __init__(self, dtype: str, device: torch.device, precision: str) -> None:
        super().__init__(dtype, device)
        from nibs_torch.kernels import tuning

        self.tuning, self.dtype, self.card = tuning, DTYPES[dtype], tuning.card_of(device)
        half = self.dtype != torch.float32
        self.tf32 = not half and _is_tf32(precision, device)
        self.ieee = not half and not self.tf32
        self.item = self.dtype.itemsize
        self.upcast = self.card.arch == "interpreter"  # whose bfloat16 products are wrong
        self.lifts = self.dtype == torch.float16
        self.fixed: dict[str, Any] = {}  # by kernel: a configuration to use instead of the table's
        self._tallied: Any = None  # [2, TALLIED]: of `tally`
        self._here = torch.cuda.device(device) if device.type == "cuda" else None

    # -- rows -------------------------------------------------------------------------------------

    def factor(self, rows: Any, mask: Any) -> Any:
        """`[r, d]` rows for the kernels: as they are, but for absent rows (zero), a promoted dtype, and TF32."""
        rows = rows.to(self.dtype)
        if mask is not None:
            rows = rows.masked_fill(~mask.unsqueeze(1), 0.0)
        if not self.tf32:
            return rows
        from nibs_torch.kernels.rows import round_rows

        out = torch.empty(rows.shape, dtype=self.dtype, device=self.device)
        size, d = rows.shape
        grid = (-(-size // 32), -(-d // 128))
        self._run(round_rows, grid, rows, out, size, d, *rows.stride(), BM=32, BK=128)
        return out

    def poison(self, rows: Any, mask: Any) -> Any:
        """`[n]`: 0 for a finite or absent row, NaN for one that is not finite."""
        from nibs_torch.kernels.rows import poison

        size, d = rows.shape
        out = self._room(size)
        if size:
            self._run(poison, (-(-size // 16),), rows, mask, out, size, d, *rows.stride(), BM=16, BK=256)
        return out

    def unset(self, rows: int, width: int) -> Any:
        """An accumulator for gradients, whose first tile overwrites what it holds."""
        return self._room(rows, width)

    def lse_columns(self, plan: Plan, problem: Problem) -> int:
        """Columns of a tile in a pass that keeps no logits: few launches in place of many, for as many bytes.

        The lse leaves two sums for each tile that a row or a column passes through, where weights leave every pair.
        """
        if self.dtype == torch.float32 or problem.multi or problem.sums or problem.margin is not None:
            return plan.key_tile
        kinds = ("busy", "least") if problem.exclude or problem.exclude_self else ("", "ragged", "loose")
        each = [self.tuning.config(self.card, "lse", self.item, kind=kind) for kind in kinds]
        sums = max(8 / one.rows + 8 / one.columns for one in each)  # bytes a pair
        return plan.key_tile * max(1, int(self.item / sums))

    # -- the verbs --------------------------------------------------------------------------------

    def tile_lse(self, tile: Tile, problem: Problem, keep: bool) -> tuple[Any, Any, Any]:
        if not problem.softmax:
            rows, made = self._sigmoid(tile, problem, tile.anchor_weights if keep else None, loss=True)
            return rows, Lse(), made
        from nibs_torch.kernels import lse as kernels

        size, width = tile.queries.shape[0], tile.keys.shape[0]
        config = self._config("lse", tile, problem, kept=keep)
        counts = self._counts(tile, config)
        tiles = counts["row_tiles"], counts["column_tiles"]
        asked = {"multi": problem.multi, "sums": problem.sums, "stats": problem.stats}
        row_names = kernels.fields(kernels.ROW_FIELDS, **asked)
        column_names = kernels.fields(kernels.COLUMN_FIELDS, **asked)
        rows = Partial(row_names, self._room(len(row_names), tiles[1], size), size, tiles[1], tile=config.rows)
        columns = Partial(column_names, self._room(len(column_names), tiles[0], width), width, tiles[0])
        columns.tile = config.columns
        rows.own, columns.own = self._room(tiles[1], size), self._room(tiles[0], width)
        rows.shifts = columns.shifts = self._room(*tiles)
        rows.marks = columns.marks = torch.empty(tiles, dtype=torch.int32, device=self.device)
        rows.strides, columns.strides = (1, tiles[1]), (tiles[1], 1)
        if tile.home and (tile.diagonal or tile.targets is not None) and not problem.multi:
            rows.positives = self.zeros(size)
        kept = self._room(size, width) if keep else None
        pairs, flags = self._pairs(tile, problem), self._flags(tile, problem)
        self._run(
            kernels.lse,
            self._grid(config, counts),
            *self._operands(config, tile),
            problem.scale,
            *pairs,
            tile.anchor_weights,
            rows.sums,
            columns.sums,
            rows.shifts,
            rows.positives,
            kept,
            **counts,
            sp=width,
            ROWS=problem.rows,
            COLUMNS=problem.columns,
            **flags,
            MULTI=problem.multi,
            SUMS=problem.sums,
            STATS=problem.stats,
            **self._shape(config, tile),
            config=config,
        )
        self._run(
            kernels.repair,
            (tiles[0] * -(-tiles[1] // SEVERAL),),
            tile.queries,
            tile.keys,
            problem.scale,
            *pairs,
            rows.sums,
            columns.sums,
            rows.own,
            columns.own,
            rows.marks,
            **{name: count for name, count in counts.items() if name != "programs"},
            ROWS=problem.rows,
            COLUMNS=problem.columns,
            **flags,
            SEVERAL=SEVERAL,
            **self._small("repair", config),
        )
        return rows, columns, kept

    def merge_lse(self, into: Lse, part: Any) -> None:
        if not isinstance(part, Partial):
            super().merge_lse(into, part)
            return
        from nibs_torch.kernels.lse import fold

        def held(name: str) -> Any:
            return getattr(into, name) if name in part.names else None

        def at(name: str) -> int:
            return part.names.index(name) if name in part.names else 0

        positive = into.positive_sum if part.positives is not None else held("positive_sum")
        self._run(
            fold,
            (-(-part.size // math.gcd(FOLD, part.tile)),),
            part.sums,
            part.own,
            part.shifts,
            part.marks,
            part.positives,
            into.mass,
            into.shift,
            positive,
            held("positive_count"),
            held("weight_sum"),
            held("allowed_sum"),
            held("allowed_count"),
            held("positive_max"),
            held("negative_max"),
            part.size,
            part.parts,
            *part.strides,
            f_positive=at("positive_sum"),
            f_weight=at("weight_sum"),
            f_allowed=at("allowed_sum"),
            f_max=at("positive_max"),
            TILE=part.tile,
            BLOCK=math.gcd(FOLD, part.tile),
            PARTS=16,
        )

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
        if problem.softmax:
            made = self._weights(tile, problem, rows, columns, kept)
        else:
            made = kept or self._sigmoid(tile, problem, rows.factor, loss=False)[1]  # type: ignore[union-attr]
        inverse = None if made.lift is None else made.lift[1:]
        if into is not None:
            self._product(into, made.g, tile.keys, inverse, problem.precision, begins=tile.begins[0])
        if onto is not None:
            self._product(onto, made.g.T, tile.queries, inverse, problem.precision, begins=tile.begins[1])
        self._tally(made.product if problem.total_product else None, made.total if problem.total_weight else None)
        return None, None

    def totals(self) -> tuple[Any, Any]:
        """`sum g_ij <q_i, k_j>` and `sum g_ij` over the tiles of which `tile_grad` was to count them, 0-d."""
        if self._tallied is None:
            return self.total(self.zeros(0)), self.total(self.zeros(0))
        product, weight = self._tallied.sum(1).unbind()
        return product, weight

    # -- launches ---------------------------------------------------------------------------------

    def _weights(self, tile: Tile, problem: Problem, rows: Any, columns: Any, kept: Any) -> Made:
        from nibs_torch.kernels import weights as kernels

        config = self._config("weights", tile, problem, kept=kept is not None)
        counts = self._counts(tile, config)
        sides = [side for side in (rows, columns) if side is not None]
        made = Made(self._made(tile), self._lift(*(side.factor for side in sides)), None, None)
        if problem.total_product:
            made.product = self._room(counts["column_tiles"], tile.queries.shape[0])
        each = []
        for side in (rows, columns):
            each += [None] * 4 if side is None else [side.factor, side.shift, side.target, side.smooth]
        pairs, flags = self._pairs(tile, problem), self._flags(tile, problem)
        tiles = counts["row_tiles"] + counts["column_tiles"]
        ends = self._room(2, tiles)
        self._run(
            kernels.spans,
            (tiles,),
            each[1],
            each[5],
            ends,
            *(counts[name] for name in ("rows", "columns", "row_tiles", "column_tiles")),
            BM=config.rows,
            BN=config.columns,
        )
        self._run(
            kernels.weights,
            self._grid(config, counts),
            *self._operands(config, tile),
            problem.scale,
            *pairs,
            *each,
            ends,
            made.lift,
            made.g,
            made.product,
            kept,
            **counts,
            sg=made.g.stride(0),
            sp=tile.keys.shape[0],
            **flags,
            MULTI=problem.multi,
            TF32=self.tf32,
            **self._shape(config, tile),
            config=config,
        )
        programs = min(-(-counts["row_tiles"] * counts["column_tiles"] // SEVERAL), 8 * self.card.sms)
        self._run(
            kernels.wide,
            (programs,),
            tile.queries,
            tile.keys,
            problem.scale,
            *pairs,
            *each,
            ends,
            made.lift,
            made.g,
            made.product,
            **{**counts, "programs": programs},
            sg=made.g.stride(0),
            **flags,
            MULTI=problem.multi,
            TF32=self.tf32,
            SEVERAL=SEVERAL,
            **self._small("wide", config),
        )
        return made

    def _sigmoid(self, tile: Tile, problem: Problem, factor: Any, *, loss: bool) -> tuple[Any, Made | None]:
        """Row statistics if `loss`, and weights if there is a `factor [r]` for them."""
        from nibs_torch.kernels.lse import ROW_FIELDS
        from nibs_torch.kernels.sigmoid import sigmoid

        config = self._config("sigmoid", tile, problem)
        counts = self._counts(tile, config)
        tiles = counts["row_tiles"], counts["column_tiles"]
        size = tile.queries.shape[0]
        made = rows = None
        if factor is not None:
            made = Made(self._made(tile), self._lift(factor), None, None)
            made.product = self._room(tiles[1], size) if problem.total_product else None
            made.total = self._room(tiles[1], size) if problem.total_weight else None
        if loss:
            names = list(ROW_FIELDS) if problem.stats else ["mass"]
            rows = Partial(names, self._room(len(names), tiles[1], size), size, tiles[1])
        flags = self._flags(tile, problem)
        del flags["SELF"]
        self._run(
            sigmoid,
            self._grid(config, counts),
            *self._operands(config, tile),
            problem.scale,
            problem.bias,
            *self._pairs(tile, problem)[:5],
            factor,
            None if made is None else made.lift,
            None if rows is None else rows.sums,
            None if made is None else made.g,
            None if made is None else made.product,
            None if made is None else made.total,
            rows.sums[1:] if rows is not None and problem.stats else None,
            **counts,
            sg=0 if made is None else made.g.stride(0),
            **flags,
            MULTI=problem.multi,
            TF32=self.tf32,
            **self._shape(config, tile),
            config=config,
        )
        return rows, made

    def _lift(self, *factors: Any) -> Any:
        """`[2]`: the power of two that float16 weights are stored times, and its inverse; None for other dtypes."""
        if not self.lifts:
            return None
        from nibs_torch.kernels.rows import lift

        first, second = (*factors, None)[:2]
        out = self._room(2)
        sizes = first.numel(), 0 if second is None else second.numel()
        self._run(lift, (1,), first, second, out, *sizes, BLOCK=1024)
        return out

    def _tally(self, product: Any, weight: Any) -> None:
        """Partial sums of one macro tile, or None, into those of the call."""
        some = product if product is not None else weight
        if some is None:
            return
        from nibs_torch.kernels.rows import TALLIED, tally

        if self._tallied is None:
            self._tallied = torch.zeros(2, TALLIED, dtype=torch.float64, device=self.device)
        size, block = some.numel(), 1024
        grid = (min(TALLIED, -(-size // block)),)
        self._run(tally, grid, product, weight, self._tallied, size, PLACES=TALLIED, BLOCK=block)

    def _product(self, out: Any, g: Any, rows: Any, inverse: Any, precision: str, *, begins: bool) -> None:
        """`out += inverse g rows`, accumulated in float32. begins: `out` holds anything, and is overwritten."""
        beta = 0 if begins else 1  # with which nothing is read
        if self.dtype == torch.float32:
            with products(precision, torch.float32, self.device):
                out.addmm_(g, rows, beta=beta)
        elif inverse is None and self.device.type != "cpu" and _library_widens(self.device, self.dtype):
            torch.ops.aten.addmm.dtype_out(out, g, rows, torch.float32, beta=beta, out=out)
        else:
            if begins:
                out.zero_()
            if self.device.type == "cpu":
                wide = g.float() @ rows.float()
                out.add_(wide if inverse is None else wide.mul_(inverse))
            else:
                self.widening_product(out, g, rows, inverse)

    def widening_product(self, out: Any, g: Any, rows: Any, inverse: Any) -> None:
        """The same by our own kernel."""
        from nibs_torch.kernels.product import product

        config = self.tuning.config(self.card, "product", self.item)
        size, width = out.shape
        tiles = -(-size // config.rows), -(-width // config.columns)
        self._run(
            product,
            (tiles[0] * tiles[1],),
            g,
            rows,
            out,
            inverse,
            size,
            width,
            g.shape[1],
            *tiles,
            *g.stride(),
            rows.stride(1),
            rows.stride(0),
            out.stride(0),
            BM=config.rows,
            BN=config.columns,
            BK=config.width,
            GROUP=config.group,
            PRECISION="ieee",
            UPCAST=self.upcast,
            config=config,
        )

    # -- arguments --------------------------------------------------------------------------------

    def _config(self, kernel: str, tile: Tile, problem: Problem, *, kept: bool = False) -> Any:
        """How to launch it; with `descriptors` only where the copy engine can fetch these rows."""
        kind = self._kind(kernel, tile, problem)
        plain = kind in ("", "ragged")
        if kept:
            kind = "kept" if plain else "least"
        fixed = self.fixed.get(kernel)
        found = fixed or self.tuning.config(self.card, kernel, self.item, ieee=self.ieee, kind=kind)
        if found.descriptors and not self._described(tile):
            loose = self.tuning.config(self.card, kernel, self.item, kind="loose" if plain else "least")
            return replace(fixed or loose, descriptors=False)
        return found

    def _kind(self, kernel: str, tile: Tile, problem: Problem) -> str:
        """What takes registers beside the tile: see `kernels.tuning`."""
        busy = problem.multi or problem.exclude or problem.exclude_self or problem.margin is not None
        sums = problem.sums or problem.stats
        if kernel == "lse" and problem.multi:  # whose positives are summed, too
            return "full" if sums else "sums"
        if busy:
            return "full" if sums else "busy"
        if sums and kernel != "weights":
            return "sums"
        ragged = tile.queries.shape[0] % WHOLE != 0 or tile.keys.shape[0] % WHOLE != 0
        if kernel == "sigmoid":  # where masks take as many registers as edges do
            ragged = ragged or tile.query_mask is not None or tile.key_mask is not None
        return "ragged" if ragged else ""

    def _counts(self, tile: Tile, config: Any) -> dict[str, int]:
        rows, columns = tile.queries.shape[0], tile.keys.shape[0]
        row_tiles, column_tiles = -(-rows // config.rows), -(-columns // config.columns)
        tiles = row_tiles * column_tiles
        return {
            "rows": rows,
            "columns": columns,
            "d": tile.queries.shape[1],
            "offset": tile.row - tile.column,
            "row_tiles": row_tiles,
            "column_tiles": column_tiles,
            "programs": min(tiles, config.per_sm * self.card.sms) if config.per_sm else tiles,
            "sq0": tile.queries.stride(0),
            "sq1": tile.queries.stride(1),
            "sk0": tile.keys.stride(0),
            "sk1": tile.keys.stride(1),
        }

    def _grid(self, config: Any, counts: dict[str, int]) -> tuple[int]:
        return (counts["programs"],)

    def _operands(self, config: Any, tile: Tile) -> tuple[Any, Any]:
        if not config.descriptors:
            return tile.queries, tile.keys
        from triton.tools.tensor_descriptor import TensorDescriptor

        return (
            TensorDescriptor.from_tensor(tile.queries, [config.rows, config.width]),
            TensorDescriptor.from_tensor(tile.keys, [config.columns, config.width]),
        )

    def _described(self, tile: Tile) -> bool:
        """Whether the copy engine can fetch these rows: contiguous, on 16-byte steps, and none of them twice."""
        return all(
            rows.stride(1) == 1
            and rows.stride(0) >= rows.shape[1]
            and rows.stride(0) * self.item % 16 == 0
            and rows.data_ptr() % 16 == 0
            for rows in (tile.queries, tile.keys)
        )

    def _pairs(self, tile: Tile, problem: Problem) -> tuple[Any, ...]:
        """QM, KM, QID, KID, T, EXACT, QLIM, KLIM: None where the call has no such thing."""
        ids = problem.multi or problem.exclude
        targets = None
        if tile.home and tile.targets is not None:
            targets = tile.targets - tile.column
        return (
            tile.query_mask,
            tile.key_mask,
            tile.query_ids if ids else None,
            tile.key_ids if ids else None,
            targets,
            tile.exact,
            tile.query_limit,
            tile.key_limit,
        )

    def _flags(self, tile: Tile, problem: Problem) -> dict[str, Any]:
        designated = 0
        if tile.home:
            designated = 2 if tile.targets is not None else int(tile.diagonal)
        return {
            "DESIGNATED": designated,
            "EXCLUDE": problem.exclude,
            "SELF": problem.exclude_self and tile.home,
        }

    def _shape(self, config: Any, tile: Tile) -> dict[str, Any]:
        rows, columns = tile.queries.shape[0], tile.keys.shape[0]
        return {
            "RAGGED": rows % config.rows != 0 or columns % config.columns != 0,
            "BM": config.rows,
            "BN": config.columns,
            "BK": config.width,
            "GROUP": config.group,
            "DESC": config.descriptors,
            "PERSISTENT": config.per_sm > 0,
            "PRECISION": "tf32" if self.tf32 else "ieee",
            "UPCAST": self.upcast,
        }

    def _small(self, kernel: str, config: Any) -> dict[str, Any]:
        """The small tiles in which a kernel goes through tiles of `config`."""
        small = self.tuning.small(kernel, config)
        return {
            "BM": config.rows,
            "BN": config.columns,
            "SM": small.rows,
            "SN": small.columns,
            "BK": small.width,
            "PRECISION": "tf32" if self.tf32 else "ieee",
            "UPCAST": self.upcast,
            "config": small,
        }

    def _made(self, tile: Tile) -> Any:
        """Room for G [r, c], its rows on 16-byte steps; one array serves the whole call."""
        rows, columns = tile.queries.shape[0], tile.keys.shape[0]
        step = 16 // self.item
        padded = -(-columns // step) * step
        held = self._scratch.get("weights")
        if held is None or held.numel() < rows * padded:
            self._scratch.pop("weights", None)
            held = self._scratch["weights"] = torch.empty(rows * padded, dtype=self.dtype, device=self.device)
        return held[: rows * padded].view(rows, padded)[:, :columns]

    def _room(self, *shape: int) -> Any:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _run(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Any = None, **named: Any) -> None:
        """Launch on this device's current stream."""
        options = options_of(config, self.card)
        if self._here is not None:
            with self._here:
                kernel[grid](*arguments, **named, **options)
        else:
            import numpy

            with numpy.errstate(all="ignore"):  # a GPU does not say when a pair that counts for nothing overflows
                kernel[grid](*arguments, **named, **options)


def options_of(config: Any, card: Any) -> dict[str, Any]:
    """Triton's options for a launch by a configuration; None: for the kernels over vectors."""
    options = {"num_warps": 4, "num_stages": 2}
    if config is not None:
        options = {"num_warps": config.warps, "num_stages": config.stages}
    if card.arch != "interpreter":
        options["enable_fp_fusion"] = True
    return options


def _is_tf32(precision: str, device: torch.device) -> bool:
    """Whether float32 products here are of the TF32 class: by the call, or as PyTorch is set."""
    if torch.version.hip or precision == "highest":
        return False
    if precision == "high":
        return True
    holder = torch.backends.cuda.matmul
    if device.type == "cpu":
        return False
    return bool(holder.fp32_precision == "tf32" if hasattr(holder, "fp32_precision") else holder.allow_tf32)


@lru_cache(maxsize=16)
def _library_widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch here multiplies halves into a float32 accumulator, in place; asked once, by looking at a product.

    A version that takes the arguments and forgets the addend, or rounds it, is one that cannot; nor can one that reads
    what it was to overwrite.
    """
    overload = getattr(torch.ops.aten.addmm, "dtype_out", None)
    if overload is None:
        return False
    g = torch.arange(64.0, device=device).sub_(32).view(8, 8)  # small integers: the product is exact in any order
    out = torch.full((8, 8), 2.0**-12, device=device)  # which no half holds beside them
    expected = g.T @ g + out
    half = g.to(dtype)
    try:
        overload(out, half.T, half, torch.float32, out=out)
        fresh = torch.full_like(out, torch.nan)
        overload(fresh, half.T, half, torch.float32, beta=0, out=fresh)
    except (RuntimeError, NotImplementedError):  # before 2.10 the addend had to be half, too
        return False
    return bool((out == expected).all() and (fresh == g.T @ g).all())


def time_config(kernel: str, config: Any, device: torch.device, options: Any) -> float | None:
    """Milliseconds that a kernel takes with `config` on a card that is warm; None where it cannot run."""
    from triton.runtime.errors import OutOfResources

    rows, d, dtype = options.rows, options.dim, DTYPES[options.dtype]
    queries, keys = (torch.randn(rows, d, device=device).div(d**0.5).to(dtype) for _ in range(2))
    softmax = kernel != "sigmoid"
    tiles = FusedTiles(options.dtype, device, "high")
    tiles.fixed = {kernel: config}
    plain = dict.fromkeys(("multi", "exclude", "exclude_self", "sums", "stats", "fold"), False)
    problem = Problem(
        softmax=softmax,
        rows=True,
        columns=softmax,
        scale=tiles.scalar(14.3),
        bias=None if softmax else tiles.scalar(-10.0),
        margin=None,
        precision="high",
        total_product=True,
        total_weight=not softmax,
        **plain,
    )
    tile = Tile(queries, queries, keys, 0, 0, True, diagonal=True)
    ones = tiles.zeros(rows) + 1
    side = Weights(ones, ones * 20, ones)
    call = {
        "lse": lambda: tiles.tile_lse(tile, problem, False),
        "weights": lambda: tiles._weights(tile, problem, side, side, None),
        "sigmoid": lambda: tiles._sigmoid(tile, problem, ones, loss=True),
    }[kernel]
    try:
        call()
    except OutOfResources:
        return None
    one = _milliseconds(call, 1)[0]
    return statistics.median(_milliseconds(call, max(10, int(WARM / max(one, 1e-3))))[-10:])


WARM = 500.0  # milliseconds of such work, after which a card has found the clock that its power allows


def _milliseconds(call: Any, count: int) -> list[float]:
    """Of each of so many calls, one after the other."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    events[-1][1].synchronize()
    return [begin.elapsed_time(end) for begin, end in events]
