"""One frozen request: every option of a call, checked once, with the facts that follow from it.

Options travel as this one record from `contrastive_loss` down to the kernels, so that they are
spelled out here and nowhere else. Shapes and dtypes are checked always; values (targets in range,
weights not negative) in eager mode, with one synchronisation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from nibs.arrays import BYTES, FLOATS, class_names, describe, device_kind, device_name, dtype_name, is_array, overlap
from nibs.errors import BackendUnavailable, InvalidInput
from nibs.ring import Ring
from nibs.spec import InfoNCE, Objective, Sigmoid

if TYPE_CHECKING:
    from nibs.plan import Plan
    from nibs.registry import Registry
    from nibs.spec import Backend

__all__ = [
    "WRT",
    "Request",
    "bad_rows",
    "check_names",
    "check_objective",
    "check_values",
    "make_request",
    "parse_memory",
]

WRT = ("queries", "keys", "scale", "bias")
REDUCTIONS = ("mean", "sum", "none")
GRAD_REDUCTIONS = ("none", "sum", "mean")
PRECISIONS = ("default", "high", "highest")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")

Reduction = Literal["mean", "sum", "none"]

UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    UNITS[f"{_letter}B"] = 1000**_power
    UNITS[f"{_letter}IB"] = 1024**_power


@dataclass(frozen=True)
class Request:
    """A validated call. Arrays are the owner's own; `m` and `n` are local to this rank.

    queries `[n, d]`, keys `[m, d]`, scale and bias floats or one-element arrays, targets `[n]`,
    query_ids `[n]`, key_ids `[m]`, query_mask `[n]`, key_mask `[m]`, weights `[n]`, or None.

    targets is None for the diagonal and for none designated: `designated` tells which.
    wrt: names in the order of `WRT`; None in `contrastive_loss`, where the framework knows.
    memory: bytes, or None. owner: name of the backend that owns the arrays.
    streams: queries and keys are fetched tile by tile from where they are kept, while `device` is where it is
    computed; then gradients go to `out`, by name, strip by strip, or to new arrays beside the inputs.
    hold: gradients stay in the accumulation dtype, for an owner whose autograd has an upstream factor to
    apply before they are rounded, once.
    """

    queries: Any
    keys: Any
    scale: Any
    bias: Any
    objective: Objective
    targets: Any
    query_ids: Any
    key_ids: Any
    query_mask: Any
    key_mask: Any
    weights: Any
    reduction: Reduction
    wrt: tuple[str, ...] | None
    ring: Any
    grad_reduction: str
    precision: str
    memory: int | None
    plan: Plan | None
    stats: bool
    owner: str
    dtype: str
    device: str
    n: int
    m: int
    d: int
    hold: bool = False
    streams: bool = False
    out: dict[str, Any] | None = None

    @property
    def designated(self) -> bool:
        """Whether rows have a designated positive at all (`targets`, or the diagonal)."""
        return self.targets is not None or self.objective.same_id != "positive"

    def wants(self, name: str) -> bool:
        """Whether the gradient of this input is asked for."""
        return self.wrt is None or name in self.wrt

    def but(self, changes: dict[str, Any]) -> Request:
        """The same request with other values in these fields: `dataclasses.replace`, at a tenth of its time."""
        other = object.__new__(Request)
        other.__dict__.update(self.__dict__, **changes)
        return other


def make_request(
    queries: Any,
    keys: Any,
    registry: Registry,
    *,
    scale: Any = 1.0,
    bias: Any = 0.0,
    objective: Objective = InfoNCE(),
    targets: Any = None,
    query_ids: Any = None,
    key_ids: Any = None,
    query_mask: Any = None,
    key_mask: Any = None,
    weights: Any = None,
    reduction: Reduction = "mean",
    wrt: Any = None,
    ring: Any = None,
    grad_reduction: str = "none",
    precision: str = "default",
    memory: int | str | None = None,
    plan: Plan | None = None,
    stats: bool = False,
    device: Any = None,
    out: Any = None,
) -> Request:
    """Check every argument and freeze the call; names, shapes and the rest are in `Request`.

    Raises InvalidInput naming the argument, what it is and what was expected; BackendUnavailable
    when no backend here owns such arrays.
    """
    owner = _owner_of(queries, registry)
    backend = registry.load(owner)
    n, d = _matrix("queries", queries)
    m, width = _matrix("keys", keys)
    if width != d:
        raise InvalidInput(
            f"keys has {width} columns and queries has {d}: both must be [rows, {d}]; "
            f"queries is {describe(queries)}, keys is {describe(keys)}."
        )
    dtype = _floating("queries", queries)
    other = _floating("keys", keys)
    if other != dtype:
        if not backend.promotes():
            raise InvalidInput(
                f"queries is {dtype} and keys is {other}: expected one dtype. Convert one of them; "
                "mixed dtypes promote under autocast only."
            )
        dtype = _promoted(dtype, other)
    streams = device is not None or out is not None
    place = None if device is None else _place(device)
    device = device_name(queries)
    check_objective(objective)
    for name, value, choices in (
        ("reduction", reduction, REDUCTIONS),
        ("grad_reduction", grad_reduction, GRAD_REDUCTIONS),
        ("precision", precision, PRECISIONS),
    ):
        if not isinstance(value, str) or value not in choices:
            raise InvalidInput(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.")
    if not isinstance(stats, bool):
        raise InvalidInput(f"stats={stats!r}: expected True or False.")

    arrays = [("keys", keys)] if place is None else [("queries", queries), ("keys", keys)]
    for name, value in (("scale", scale), ("bias", bias)):
        if _scalar(name, value):
            arrays.append((name, value))
    for name, value, length, kind in (
        ("targets", targets, n, "integer"),
        ("query_ids", query_ids, n, "integer"),
        ("key_ids", key_ids, m, "integer"),
        ("query_mask", query_mask, n, "bool"),
        ("key_mask", key_mask, m, "bool"),
        ("weights", weights, n, "floating"),
    ):
        if value is not None:
            _vector(name, value, length, kind)
            arrays.append((name, value))
    kind_of = type(queries)
    for name, value in arrays:
        _plain(name, value)
        if type(value) is not kind_of and registry.owner(value) != owner:
            raise InvalidInput(
                f"{name} is {describe(value)} while queries is {describe(queries)}: "
                f"expected arrays of one framework. Convert {name} first."
            )
        where = device_name(value)
        scalar = name in ("scale", "bias")
        if device == "traced" and not scalar:
            device = where
        if place is not None:
            if where != "cpu" and where != place and device_kind(where) != place:
                raise InvalidInput(f"{name} is on {where} with device='{place}': expected it on the cpu, or there.")
            continue
        unknown = {"traced", "sharded"} & {where, device}  # their framework knows better
        if where != device and not unknown and not (scalar and where == "cpu"):
            raise InvalidInput(f"{name} is on {where} and queries on {device}: move them to one device.")

    # Small and unsigned integers cannot hold -1, or every row number; frameworks wrap them round in silence.
    travels = isinstance(ring, Ring) and ring.size > 1  # then every rank's ids must be of one width
    kept = ("int64",) if travels else ("int64", "int32")
    targets, query_ids, key_ids = (_wide(backend, value, kept) for value in (targets, query_ids, key_ids))
    _pairs(objective, targets, query_ids, key_ids, n, m, reduction)
    if plan is not None and memory is not None:
        raise InvalidInput("memory= and plan= are both given: a plan fixes its own memory; pass one of them.")
    names = check_names(wrt)
    if out is not None:
        out = _out(out, {"queries": queries, "keys": keys}, names, registry, owner)
    return Request(
        queries=queries,
        keys=keys,
        scale=scale,
        bias=bias,
        objective=objective,
        targets=targets,
        query_ids=query_ids if objective.same_id != "negative" else None,
        key_ids=key_ids if objective.same_id != "negative" else None,
        query_mask=query_mask,
        key_mask=key_mask,
        weights=weights,
        reduction=reduction,
        wrt=names,
        ring=ring,
        grad_reduction=grad_reduction,
        precision=precision,
        memory=parse_memory(memory),
        plan=_plan(plan),
        stats=stats,
        owner=owner,
        dtype=dtype,
        device=place or device,
        n=n,
        m=m,
        d=d,
        streams=streams,
        out=out,
    )


def check_values(request: Request, backend: Backend) -> None:
    """Raise InvalidInput for targets out of range, or weights that are negative or not finite.

    One synchronisation when all is well; a traced call is not checked (a bad row becomes NaN).
    """
    if backend.traced(request):
        return
    bad = bad_rows(request, backend.arange)
    if bad is None or not bool(bad.any()):
        return
    targets, weights = request.targets, request.weights
    present = request.query_mask.tolist() if request.query_mask is not None else [True] * request.n
    if targets is not None:
        for row, target in enumerate(targets.tolist()):
            if not present[row]:
                continue
            if not -1 <= target < request.m:
                raise InvalidInput(
                    f"targets[{row}] = {target}: expected a row of keys, 0 to {request.m - 1}, or -1 for none."
                )
            if isinstance(request.objective, InfoNCE) and request.objective.exclude_self and target == row:
                raise InvalidInput(
                    f"targets[{row}] = {row} with exclude_self=True: a row cannot be its own positive; "
                    "point it at another row, or -1 for none."
                )
    for row, weight in enumerate(weights.tolist()):
        if present[row] and not 0 <= weight < math.inf:
            raise InvalidInput(f"weights[{row}] = {weight}: expected a finite number >= 0.")


def bad_rows(request: Request, arange: Callable[[int, Any], Any]) -> Any:
    """`[n]` bool: present rows whose target or weight is wrong: out of range, or the row itself with `exclude_self`;
    negative, or not finite.

    arange: row numbers, `(n, like)`. None where there are neither targets nor weights to look at.
    """
    targets, weights = request.targets, request.weights
    bad: Any = None
    if targets is not None and request.n:
        bad = (targets < -1) | (targets >= request.m)
        if isinstance(request.objective, InfoNCE) and request.objective.exclude_self:
            bad = bad | (targets == arange(request.n, targets))
    if weights is not None and request.n:
        wrong = ~((weights >= 0) & (weights < math.inf))
        bad = wrong if bad is None else bad | wrong
    return bad if bad is None or request.query_mask is None else bad & request.query_mask


def parse_memory(memory: int | str | None) -> int | None:
    """Bytes of `268435456`, `"256MiB"`, `"0.5 GB"`; None stays None. Raises InvalidInput."""
    if memory is None:
        return None
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", memory)
        if match and match[2].upper() in UNITS:
            value = float(match[1]) * UNITS[match[2].upper()]
            if 1 <= value < 2**63:
                return int(value)
    elif isinstance(memory, Integral) and not isinstance(memory, bool) and memory > 0:
        return int(memory)
    shown = repr(memory) if len(repr(memory)) <= 60 else repr(memory)[:57] + "..."
    raise InvalidInput(f"memory={shown}: expected bytes as a positive integer, or text like '512MiB' or '2GB'.")


def _owner_of(queries: Any, registry: Registry) -> str:
    owner = registry.owner(queries)
    if owner is not None:
        return owner
    root = type(queries).__module__.partition(".")[0]
    if not is_array(queries):
        raise InvalidInput(
            f"queries is {describe(queries)}: expected a [n, d] array of a framework that a backend here owns. "
            f"Here: {registry.listing()}."
        )
    raise BackendUnavailable(
        f"queries is a {class_names(queries)[0]} array, and no backend here owns those. "
        f"Here: {registry.listing()}. If one exists for {root}: pip install nibs-{root}"
    )


def _matrix(name: str, value: Any) -> tuple[int, int]:
    if not is_array(value):
        raise InvalidInput(f"{name} is {describe(value)}: expected a [rows, d] array.")
    _plain(name, value)
    shape = tuple(value.shape)
    if len(shape) != 2 or shape[1] < 1:
        raise InvalidInput(f"{name} is {describe(value)}: expected shape [rows, d] with d >= 1.")
    return shape[0], shape[1]


def _plain(name: str, value: Any) -> None:
    """Refuse arrays that are more than their values: the rest would be passed over in silence."""
    kind = type(value)
    masked, sharded = TRAITS.get(kind) or _traits(kind)
    if sharded:
        raise InvalidInput(
            f"{name} is a DTensor: pass what this rank holds with .to_local() and ring=, "
            "or the whole with .full_tensor()."
        )
    layout = str(getattr(value, "layout", "torch.strided"))
    if layout.startswith("torch.") and (layout != "torch.strided" or getattr(value, "is_nested", False)):
        raise InvalidInput(f"{name} has the layout {layout}: expected a dense, strided tensor. Call .to_dense() first.")
    if masked:
        raise InvalidInput(
            f"{name} is a masked array, whose own mask would be passed over: pass {name}.data, "
            "and absent rows by query_mask= and key_mask=."
        )


TRAITS: dict[type, tuple[bool, bool]] = {}
"""Of a class of arrays, as far as met: whether it has a mask of its own, and whether it is sharded by itself."""


def _traits(kind: type) -> tuple[bool, bool]:
    names = {cls.__name__ for cls in kind.__mro__}
    return TRAITS.setdefault(kind, ("MaskedArray" in names, "DTensor" in names))


def _floating(name: str, value: Any) -> str:
    dtype = dtype_name(value)
    if dtype not in FLOATS:
        raise InvalidInput(f"{name} is {describe(value)}: expected a floating dtype, one of {', '.join(FLOATS)}.")
    return dtype


def _promoted(one: str, other: str) -> str:
    if BYTES[one] == BYTES[other]:  # bfloat16 with float16: only float32 holds both
        return "float32"
    return max(one, other, key=BYTES.__getitem__)


def _scalar(name: str, value: Any) -> bool:
    """Whether a valid scale or bias is an array; raises for one that is neither array nor number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_array(value):
        try:
            float(value)
        except OverflowError:
            raise InvalidInput(f"{name} is {describe(value)}: expected a number that a float can hold.") from None
        return False
    if not is_array(value) or dtype_name(value) not in FLOATS or tuple(value.shape) not in ((), (1,)):
        raise InvalidInput(
            f"{name} is {describe(value)}: expected a float, or a floating array of one element, shape [] or [1]."
        )
    return True


def _vector(name: str, value: Any, length: int, kind: str) -> None:
    expected = {"integer": "integers (int64)", "bool": "bool", "floating": "floats"}[kind]
    if not is_array(value):
        raise InvalidInput(f"{name} is {describe(value)}: expected an array of {expected}, shape [{length}].")
    dtype = dtype_name(value)
    fits = {"integer": dtype in INTEGERS, "bool": dtype == "bool", "floating": dtype in FLOATS}[kind]
    if tuple(value.shape) != (length,) or not fits:
        raise InvalidInput(f"{name} is {describe(value)}: expected {expected} of shape ({length},).")


def _wide(backend: Backend, value: Any, kept: tuple[str, ...]) -> Any:
    return value if value is None or dtype_name(value) in kept else backend.asarray(value, dtype="int64")


def _place(device: Any) -> str:
    """The name of a device: `"cuda"`, `"cuda:0"`, or a framework's own object that prints as one."""
    name = str(device)
    if not re.fullmatch(r"[a-z]+(:[0-9]+)?", name):
        raise InvalidInput(f"device is {describe(device)}: expected where to compute, such as 'cpu' or 'cuda:0'.")
    return name


def _out(
    out: Any, inputs: dict[str, Any], wrt: tuple[str, ...] | None, registry: Registry, owner: str
) -> dict[str, Any]:
    """Arrays that are to receive gradients, checked against the inputs that they belong to."""
    if not isinstance(out, Mapping) or not out.keys() <= inputs.keys():
        raise InvalidInput(f"out is {describe(out)}: expected a dict with arrays for 'queries', 'keys', or both.")
    for name, array in out.items():
        if wrt is not None and name not in wrt:
            raise InvalidInput(f"out has '{name}' and wrt={wrt!r} does not: no such gradient is computed.")
        like = inputs[name]
        writeable = getattr(getattr(array, "flags", None), "writeable", True)
        alike = is_array(array) and registry.owner(array) == owner and writeable
        if not alike or tuple(array.shape) != tuple(like.shape) or dtype_name(array) != dtype_name(like):
            locked = "" if writeable else ", read-only"
            raise InvalidInput(
                f"out['{name}'] is {describe(array)}{locked}: expected a writeable array of the same framework, "
                f"shape {tuple(like.shape)} and dtype {dtype_name(like)} as {name}."
            )
        _plain(f"out['{name}']", array)
        taken = {**inputs, **{f"out['{other}']": value for other, value in out.items() if other != name}}
        for other, value in taken.items():
            if overlap(array, value):
                raise InvalidInput(
                    f"out['{name}'] shares memory with {other}, which is read after it is written: "
                    "expected memory of its own."
                )
    return dict(out)


def check_objective(objective: Any) -> None:
    """Raise InvalidInput for what is no objective."""
    if not isinstance(objective, (InfoNCE, Sigmoid)):
        hint = " Call it: InfoNCE()." if objective in (InfoNCE, Sigmoid) else ""
        raise InvalidInput(
            f"objective is {describe(objective)}: expected nibs.InfoNCE(...) or nibs.Sigmoid(...).{hint}"
        )


def _pairs(objective: Objective, targets: Any, query_ids: Any, key_ids: Any, n: int, m: int, reduction: str) -> None:
    """The rules that tie targets, ids and shapes together."""
    if objective.same_id != "negative":
        for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
            if ids is None:
                raise InvalidInput(
                    f"{name}=None with same_id={objective.same_id!r}: expected the integer ids of its rows."
                )
    exclude_self = isinstance(objective, InfoNCE) and objective.exclude_self
    if exclude_self and n != m:
        raise InvalidInput(
            f"exclude_self=True with {n} queries and {m} keys: expected one and the same set, row by row, n = m."
        )
    if targets is None and objective.same_id != "positive":
        if exclude_self:
            raise InvalidInput(
                "targets=None with exclude_self=True: the diagonal cannot be the positive. "
                "Pass targets=, or same_id='positive' with ids."
            )
        if n > m:
            raise InvalidInput(
                f"targets=None with {n} queries and {m} keys: query i's positive is key i, so there must be at least "
                "as many keys as queries. Pass targets= (-1 for a row without a positive)."
            )
    one_way = not isinstance(objective, InfoNCE) or objective.direction == "query_to_key"
    if reduction == "none" and targets is None and objective.same_id == "positive" and not one_way:
        raise InvalidInput(
            "reduction='none' with same_id='positive' and no targets: a query's value in the key direction is that of "
            "its designated key. Pass targets=, or direction='query_to_key'."
        )


def check_names(wrt: Any) -> tuple[str, ...] | None:
    """`wrt` as a tuple in the order of `WRT`; None stays None. Raises InvalidInput."""
    if wrt is None:
        return None
    names = [wrt] if isinstance(wrt, str) else list(wrt) if isinstance(wrt, (tuple, list, set, frozenset)) else [wrt]
    if not all(isinstance(name, str) and name in WRT for name in names):
        raise InvalidInput(f"wrt={wrt!r}: expected names out of {', '.join(map(repr, WRT))}.")
    return tuple(name for name in WRT if name in names)


def _plan(plan: Any) -> Any:
    from nibs.plan import Plan

    if plan is not None and not isinstance(plan, Plan):
        raise InvalidInput(f"plan is {describe(plan)}: expected a Plan from nibs.plan(...).")
    return plan
