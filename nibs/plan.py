"""Tiles from a memory budget, and what they cost: flops, bytes, bytes on the ring.

The unit of cost is one matrix product of `2 n m d` flops. A plan's `sweep` says how many a call
needs and what it holds meanwhile:

    sweep        products with both gradients      holds beyond vectors
    forward      1 (no gradient)                   one tile
    keep         3  logits once, two gradients     every logit tile
    strip        3  one direction, row by row      one strip of tiles
    recompute    4  logits twice                   one tile
    split        5  logits three times             one tile; no accumulator [m, d] at all
    single       3  sigmoid: no lse to wait for    one tile (split: 4)

A frozen side saves one product. `keep` is taken where the tiles fit the budget, `strip` where a
strip of at least `STRIP` rows does, `split` only where an accumulator does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from nibs.arrays import BYTES, FLOATS, device_kind
from nibs.errors import InvalidInput, MemoryBudget
from nibs.spec import InfoNCE, Objective

if TYPE_CHECKING:
    from nibs.request import Request

__all__ = ["Job", "Plan", "TileHint", "fit", "in_units", "plan", "plan_request"]

Sweep = Literal["forward", "keep", "strip", "recompute", "split", "single"]

MIB = 1024**2
DEFAULT_BUDGET = {"cpu": 64 * MIB}
ACCELERATOR_BUDGET = 256 * MIB
STRIP = 64  # rows: a thinner strip wastes more on narrow products than the saved product is worth
SLOW = 128  # smaller tiles than this cost more time than a saved product is worth
SMALLEST = 16  # rows and columns of the smallest tile that is planned unasked
VECTORS = 15  # accumulator-wide vectors per row of queries and keys that the schedule may hold at once
MASKED_VECTORS = 18  # the same with masks, ids or a margin: explicit targets, limits, counts


@dataclass(frozen=True, slots=True)
class TileHint:
    """What a backend likes: its best tile, and how many tile-sized buffers a step of it holds.

    rows, columns: of the best tile. buffers: accumulator-wide tiles alive at once on the plain path;
    masked: the same where masks, ids, margins or several positives make boolean tiles. Both are upper
    bounds, also of what happens when a shared exponential underflows and the tile is redone. thin: rows of the thinnest
    strip that is worth the product it saves.
    fixed: bytes held at any size. kernel: the name of the path, shown in plans. copies: whether operands
    are copied to the accumulation dtype; fused kernels without masks read them where they are. panel: bytes
    to whose multiples each row of an operand is padded where kernels read it packed, 256 rows together;
    0: they do not. keeps: whether logits can be kept from one pass for the next.
    """

    rows: int = 1024
    columns: int = 1024
    buffers: float = 2.0
    masked: float = 4.0
    fixed: int = 0
    kernel: str = "plain"
    copies: bool = True
    thin: int = STRIP
    panel: int = 0
    keeps: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """How a call is cut into tiles, and what that costs. Made by `nibs.plan(...)`.

    query_tile, key_tile: rows and columns of a tile. sweep: see the module's table.
    products: matrix products of 2 n m d flops. flops: their sum.
    workspace: bytes of tiles, operands and kept tiles. linear: bytes of vectors, accumulators and
    ring buffers, linear in n and m. memory: both, what `memory=` bounds.
    traffic: bytes the tiles read and write in main memory, a floor. ring_bytes: bytes this rank sends.
    kernel: the path that runs it.
    """

    queries: int
    keys: int
    dim: int
    dtype: str
    query_tile: int
    key_tile: int
    sweep: Sweep
    products: int
    flops: int
    workspace: int
    linear: int
    traffic: int
    ring_size: int
    ring_bytes: int
    kernel: str

    @property
    def memory(self) -> int:
        """Bytes beyond inputs and returned gradients."""
        return self.workspace + self.linear


@dataclass(frozen=True, slots=True)
class Job:
    """The part of a request that decides a plan.

    n, m, d: rows of queries and of keys here, and their width. grad: with gradients; queries, keys, scale: of these.
    hold, deferred: see `plan_request`. masked: pairs are left out, or added, one by one. streams, stats: see `Request`.
    """

    n: int
    m: int
    d: int
    dtype: str
    objective: Objective
    grad: bool
    hold: bool
    deferred: bool
    queries: bool
    keys: bool
    masked: bool
    ring_size: int
    device: str
    scale: bool = True
    streams: bool = False
    stats: bool = False

    @property
    def accumulator(self) -> int:
        return 8 if self.dtype == "float64" else 4

    @property
    def softmax(self) -> bool:
        return isinstance(self.objective, InfoNCE)

    @property
    def by_columns(self) -> bool:
        return by_columns(self.objective, queries=self.queries, keys=self.keys)

    @property
    def half(self) -> bool:
        return BYTES[self.dtype] < self.accumulator

    @property
    def multi(self) -> bool:
        return self.objective.same_id == "positive"


Hints = Callable[[Job], Sequence[TileHint]]
"""What `Backend.tile_hints` is: for one job always the same, since what comes of it is remembered."""


def plan(
    queries: int,
    keys: int,
    dim: int,
    dtype: str = "float32",
    *,
    objective: Objective = InfoNCE(),
    grad: bool = True,
    wrt: tuple[str, ...] | None = None,
    memory: int | str | None = None,
    ring_size: int = 1,
    masked: bool = False,
    query_tile: int | None = None,
    key_tile: int | None = None,
    sweep: Sweep | None = None,
    backend: str | None = None,
    device: str = "cpu",
    autograd: bool | None = None,
) -> Plan:
    """The plan for `queries` x `keys` rows of width `dim`, local to a rank; nothing is allocated.

    grad: with gradients (`wrt` names them; None is all). memory: the budget, bytes or `"512MiB"`; None is a modest
    default. masked: masks are in play; ids, margins and `exclude_self` are seen by the objective. query_tile, key_tile,
    sweep: fix them instead of leaving them to the budget. backend, device: whose tiles; None takes the core's defaults.
    autograd: gradients come from `contrastive_loss` by the framework's autograd, which holds them in the accumulation
    dtype until it has their upstream factor; False: from `contrastive_loss_and_grad`. None: the first, where the
    backend has it.

    It is the plan that such a call of the backend runs under, if its sides are of one dtype and lie on the device, its
    precision is the default, its reduction a scalar, and it asks for no stats, which may want smaller tiles. Where the
    gradients wait for the backward, since held ones do not fit `memory` (PyTorch), it is the backward's.

    Raises InvalidInput for impossible numbers, MemoryBudget when nothing fits.
    """
    from nibs.registry import registry
    from nibs.request import check_names, check_objective, parse_memory

    least = {"queries": (queries, 0), "keys": (keys, 0), "dim": (dim, 1), "ring_size": (ring_size, 1)}
    for name, (value, low) in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InvalidInput(f"{name}={value!r}: expected an integer >= {low}.")
    if dtype not in FLOATS:
        raise InvalidInput(f"dtype={dtype!r}: expected one of {', '.join(FLOATS)}.")
    check_objective(objective)
    names = check_names(wrt)
    for name, flag in (("grad", grad), ("masked", masked)):
        if not isinstance(flag, bool):
            raise InvalidInput(f"{name}={flag!r}: expected True or False.")
    if autograd is not None and not isinstance(autograd, bool):
        raise InvalidInput(f"autograd={autograd!r}: expected True, False or None.")
    owner = registry.load(backend) if backend else None
    if autograd is None:
        autograd = backend is not None and "autograd" in registry.info(backend).capabilities.features
    job = Job(
        n=queries,
        m=keys,
        d=dim,
        dtype=dtype,
        objective=objective,
        grad=grad,
        hold=grad and autograd,
        deferred=False,
        queries=grad and (names is None or "queries" in names),
        keys=grad and (names is None or "keys" in names),
        masked=masked or _chooses(objective),
        ring_size=ring_size,
        device=device,
        scale=grad and (names is None or "scale" in names),
    )
    hint = owner.tile_hints if owner else TileHint()
    budget = parse_memory(memory)
    try:
        return fit(job, hint, budget, query_tile, key_tile, sweep)
    except MemoryBudget:
        if not (job.hold and owner and owner.defers and ring_size == 1):
            raise
    return fit(replace(job, hold=False, deferred=True), hint, budget, query_tile, key_tile, sweep)


def plan_request(
    request: Request, hint: TileHint | Hints, *, grad: bool, hold: bool, deferred: bool = False, ring_size: int = 1
) -> Plan:
    """The plan that a request runs under: its own, checked and completed, or one from its budget.

    hint: the backend's, see `fit`. hold: gradients stay in the accumulation dtype (autograd's forward). deferred: the
    gradient comes later, in a second call, so no tile can be kept for it.
    """
    masks = request.query_mask is not None or request.key_mask is not None
    grad = grad and request.wrt != ()
    job = Job(
        n=request.n,
        m=request.m,
        d=request.d,
        dtype=request.dtype,
        objective=request.objective,
        grad=grad,
        hold=hold,
        deferred=deferred,
        queries=grad and request.wants("queries"),
        keys=grad and request.wants("keys"),
        masked=masks or _chooses(request.objective),
        ring_size=ring_size,
        device=request.device,
        scale=grad and request.wants("scale"),
        streams=request.streams,
        stats=request.stats,
    )
    given = request.plan
    if given is None:
        return _remembered(job, hint, request.memory)
    return fit(job, hint, None, given.query_tile, given.key_tile, given.sweep, strict=False)


def _chooses(objective: Objective) -> bool:
    """Whether an objective leaves pairs out, or adds positives, one by one."""
    if objective.same_id != "negative":
        return True
    return isinstance(objective, InfoNCE) and (objective.exclude_self or objective.false_negative_margin is not None)


def fit(
    job: Job,
    hint: TileHint | Hints,
    memory: int | None,
    query_tile: int | None = None,
    key_tile: int | None = None,
    sweep: Sweep | None = None,
    *,
    strict: bool = True,
) -> Plan:
    """The plan of the first hint whose tile the budget holds whole; of the last one, cut, where it holds none.

    Of each: the fewest products, then the largest tiles up to the hint's. hint: one, or a function that has several
    for the job, the best first. strict: refuse a sweep that cannot compute this job, rather than choose another.
    """
    for name, value in (("query_tile", query_tile), ("key_tile", key_tile)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidInput(f"{name}={value!r}: expected a positive integer.")
    hints = (hint,) if isinstance(hint, TileHint) else hint(job)
    for one in hints:
        choices = _sweeps(job, one.keeps)
        if sweep is not None and sweep not in choices:
            if strict:
                raise InvalidInput(f"sweep={sweep!r}: this call can run as {', '.join(map(repr, choices))}.")
            sweep = None
        found = _fit(job, one, memory, query_tile, key_tile, [sweep] if sweep else choices)
        whole = query_tile or one.rows, key_tile or one.columns
        if (found.query_tile, found.key_tile) == (min(whole[0], max(job.n, 1)), min(whole[1], max(job.m, 1))):
            break
    return found


def _fit(
    job: Job,
    hint: TileHint,
    memory: int | None,
    query_tile: int | None,
    key_tile: int | None,
    choices: list[Sweep],
) -> Plan:
    rows = min(query_tile or hint.rows, max(job.n, 1))
    columns = min(key_tile or hint.columns, max(job.m, 1))
    fixed = (query_tile is not None, key_tile is not None)
    for choice in choices:
        for tile in _shrinking(rows, columns, fixed, job, choice, hint.thin, last=choice == choices[-1]):
            candidate = _cost(job, hint, *tile, choice)
            budget = memory if memory is not None else _default_budget(job.device) + candidate.linear
            if candidate.memory <= budget:
                return candidate
    low = _smallest(rows, columns, fixed, SMALLEST)
    least = min((_cost(job, hint, *low, choice) for choice in choices), key=lambda candidate: candidate.memory)
    if memory is None:
        return least
    raise MemoryBudget(
        f"memory={in_units(memory)} is too small for {job.n} x {job.m} rows of {job.d} in {job.dtype}: "
        f"the least that works is {least.memory} bytes ({in_units(least.memory)}), "
        f"of which {in_units(least.linear)} are linear in the batch.",
        least=least.memory,
    )


_remembered = lru_cache(maxsize=256)(fit)  # a training step asks for the same plan each time


def _sweeps(job: Job, keeps: bool) -> list[Sweep]:
    """The sweeps that compute this job, fewest products first; keeps: with those that keep logits."""
    if not job.grad:
        return ["forward"]
    both = job.queries and job.keys
    if job.streams and (job.queries or job.keys):
        return ["split"]  # each side's gradient leaves strip by strip, and nothing of a side's size is held
    if not job.softmax:
        return ["single", "split"] if both else ["single"]
    alone = job.ring_size == 1 and not job.deferred
    objective = job.objective
    one_way = isinstance(objective, InfoNCE) and objective.direction != "symmetric"
    found: list[Sweep] = []
    if alone and keeps:
        found.append("strip" if one_way else "keep")
    found.append("recompute")
    if both:
        found.append("split")
    return found


def _smallest(rows: int, columns: int, fixed: tuple[bool, bool], low: int) -> tuple[int, int]:
    return (rows if fixed[0] else min(low, rows), columns if fixed[1] else min(low, columns))


def _shrinking(
    rows: int, columns: int, fixed: tuple[bool, bool], job: Job, sweep: Sweep, strip: int, *, last: bool
) -> list[tuple[int, int]]:
    """Tiles from the largest down, halving the longer free side; a last resort goes down the furthest."""
    low_rows, low_columns = _smallest(rows, columns, fixed, SMALLEST if last else SLOW)
    if sweep == "strip":
        # As thin as that; its other side as in any sweep, but no narrower.
        thin = min(strip, columns if job.by_columns else rows)
        low_rows, low_columns = max(low_rows, min(strip, rows)), max(low_columns, min(strip, columns))
        low_rows, low_columns = (low_rows, thin) if job.by_columns else (thin, low_columns)
    tiles = [(rows, columns)]
    while (rows, columns) != (low_rows, low_columns):
        if columns > low_columns and (columns >= rows or rows <= low_rows):
            columns = max(low_columns, (columns + 1) // 2)
        else:
            rows = max(low_rows, (rows + 1) // 2)
        tiles.append((rows, columns))
        if rows < low_rows or columns < low_columns:
            break
    return tiles


def by_columns(objective: Objective, *, queries: bool, keys: bool) -> bool:
    """Whether the outer loop walks the keys: for key_to_query strips, and where only keys get a gradient."""
    if isinstance(objective, InfoNCE) and objective.direction != "symmetric":
        return objective.direction == "key_to_query"
    return keys and not queries


def _cost(job: Job, hint: TileHint, rows: int, columns: int, sweep: Sweep) -> Plan:
    a, b, n, m, d = job.accumulator, BYTES[job.dtype], job.n, job.m, job.d
    gradients = job.queries + job.keys
    products = {
        "forward": 1,
        "keep": 1 + gradients,
        "strip": 1 + gradients,
        "recompute": 2 + gradients,
        "split": (1 if job.softmax else 0) + 2 * gradients,
        "single": 1 + gradients,
    }[sweep]
    size = job.ring_size
    # Tiles: logits, weights, and what the backend makes beside them.
    tiles = rows * columns * a * (hint.masked if job.masked else hint.buffers)
    # Operands: the scaled queries, always a copy; queries and keys are copies where they are cast or masked,
    # for a moment beside the masked rows in their own dtype.
    copied = hint.copies or job.masked
    copies = copied and (job.half or job.masked)
    operands = rows * d * a * copied + (rows + columns) * d * a * copies + max(rows, columns) * d * b * job.masked
    if hint.panel:
        operands += sum(-(-count // 256) * 256 for count in (rows, columns)) * (-(-d * b // hint.panel) * hint.panel)
    if gradients:
        # A tile's share of a gradient before it is added, or a strip times its operand for the scale's gradient.
        operands += max(rows, columns) * d * a * (copied + copies)
    if gradients and (job.streams or (job.half and not job.hold)):
        # The strip that is rounded, or sent home, as it closes.
        operands += max(rows, columns) * d * a
    away = job.streams and device_kind(job.device) != "cpu"
    if away:
        # Strips on their way to the device, two for each side in turn.
        operands += 2 * (rows + columns) * d * b
        if size > 1:  # of the keys that visit beside those at home, and of a gradient that is scaled
            operands += 2 * columns * d * b + (2 * max(rows, columns) * d * a if gradients else 0)
    # Kept tiles: logits, and for each direction which pairs are allowed.
    each = a + (2 if job.masked else 0)
    kept = {"keep": n * m * each, "strip": (n * columns if job.by_columns else rows * m) * each}.get(sweep, 0)
    # Vectors: statistics, weights, poison, and the temporaries of the loss.
    linear = (MASKED_VECTORS if job.masked else VECTORS) * a * (n + m)
    # Accumulators that are not themselves the returned gradients.
    if job.grad and job.half and not job.streams:
        both = n * job.queries + m * job.keys
        if job.hold or size > 1 or (job.multi and sweep in ("strip", "single")):
            linear += a * d * both
        elif sweep != "split":  # the outer side is rounded strip by strip
            linear += a * d * (n * job.queries if job.by_columns else m * job.keys)
        elif job.multi and not job.softmax:
            linear += a * d * both
    ring_bytes = 0
    if size > 1:
        passes = 1 if sweep == "forward" or not job.softmax else 2
        if not away:
            # Two sets of buffers, in turn: keys on their way, and their gradient or statistics.
            linear += 2 * m * d * b + (2 * m * d * a if job.keys else 0)
        if job.streams and not away:
            # What gathers beside the arrays that the gradients leave in.
            linear += a * d * (n * job.queries + m * job.keys)
        ring_bytes = m * d * (passes * (size - 1) * b + (size * a if job.keys else 0))
    walks = products
    traffic = walks * ((-(-n // max(rows, 1))) * m * d * b + n * d * b) * size
    return Plan(
        queries=n,
        keys=m,
        dim=d,
        dtype=job.dtype,
        query_tile=rows,
        key_tile=columns,
        sweep=sweep,
        products=products,
        flops=2 * n * m * d * products * size,
        workspace=int(tiles + operands + kept) + hint.fixed,
        linear=int(linear),
        traffic=int(traffic),
        ring_size=size,
        ring_bytes=int(ring_bytes),
        kernel=hint.kernel,
    )


def _default_budget(device: str) -> int:
    return DEFAULT_BUDGET.get(device_kind(device), ACCELERATOR_BUDGET)


def in_units(count: int) -> str:
    """`1.5 MiB`: a count of bytes for people."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"


def with_kernel(plan: Plan, kernel: str) -> Plan:
    """The same plan, run by another path."""
    return replace(plan, kernel=kernel)
