"""torch.compile: a call crosses the compiler as two custom operators, and everything else stays hidden from it.

Dynamo reads `nibs.contrastive_loss` line by line until it comes to `TorchBackend.enter`, which brings it here.
`opaque` is a function it does not read but lets AOTAutograd run, with tensors that have shapes and no values:
there the call is checked and planned as ever, and `CompiledKernels` put the operators in its place. What is no
tensor (objective, plan, ...) crosses as one string, the key of a request without tensors in `TEMPLATES`.

Values cannot be looked at in a compiled call: a target out of range or a wrong weight becomes NaN. An error
found while tracing is raised when the program runs, for only then does it reach the caller as what it is.

Refused: stats, and foreign backends. A ring crosses by its key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from nibs import errors
from nibs.dispatch import run
from nibs.errors import NibsError, Unsupported
from nibs.plan import Plan
from nibs.request import Request, bad_rows
from nibs.ring import Ring
from nibs.spec import InfoNCE, Sigmoid, Stats
from nibs.verbs import LSE_FIELDS
from nibs_torch.autograd import ARRAYS, factors
from nibs_torch.tiles import DTYPES, capturing

__all__ = ["CompiledKernels", "answer", "defers", "is_symbolic", "spell"]

TEMPLATES: dict[str, tuple[Request, str, bool]] = {}
"""By key: a request without tensors or sizes, its ring's key (or ""), and whether its gradients are deferred."""


def is_symbolic(tensor: Tensor) -> bool:
    """Whether a tensor has a shape but no values to look at."""
    if torch.compiler.is_compiling():
        return True
    kind = type(tensor)
    return kind is not Tensor and kind.__module__ in (
        "torch._subclasses.fake_tensor",
        "torch._subclasses.functional_tensor",
    )


def spell(value: Any) -> Any:
    """An option in words that Dynamo can carry: numbers, text, tensors, tuples. Read by Dynamo."""
    if isinstance(value, InfoNCE):
        margin = value.false_negative_margin
        words = (value.direction, value.label_smoothing, value.same_id, value.exclude_self)
        return ("InfoNCE", *words) if margin is None else ("InfoNCE", *words, margin)
    if isinstance(value, Sigmoid):
        return ("Sigmoid", value.same_id)
    if isinstance(value, Plan):
        return ("Plan", *[getattr(value, field) for field in PLAN_FIELDS])
    if isinstance(value, Ring):
        return getattr(value, "key", value)
    return value


PLAN_FIELDS = tuple(one.name for one in fields(Plan))


def unspell(value: Any) -> Any:
    """What `spell` spelled."""
    if isinstance(value, tuple) and value and value[0] in ("InfoNCE", "Sigmoid", "Plan"):
        return {"InfoNCE": InfoNCE, "Sigmoid": Sigmoid, "Plan": Plan}[value[0]](*value[1:])
    return value


def answer(queries: Tensor, keys: Tensor, backend: str, spelled: dict[str, Any]) -> Any:
    """The loss inside a traced program; an error becomes a node that raises it when the program runs."""
    options = {name: unspell(value) for name, value in spelled.items()}
    try:
        if isinstance(options.get("ring"), str):
            from nibs_torch.ring import ring_of

            options["ring"] = ring_of(options["ring"])
        if options.get("stats"):
            raise Unsupported(
                "stats=True inside torch.compile: statistics are numbers, and a traced program has none. "
                "Ask for them outside the compiled function."
            )
        return run(queries, keys, backend or None, options)
    except NibsError as error:
        if not is_symbolic(queries):
            raise
        nothing = torch.ops.nibs_torch.refuse(queries.detach(), type(error).__name__, str(error))
        return (nothing, nothing) if options.get("stats") else nothing  # as many results as the caller unpacks


class CompiledKernels:
    """The schedule behind custom operators."""

    def forward(self, request: Request, *, deferred: bool) -> tuple[Tensor, list[Tensor], Stats | None]:
        key = _key(request, deferred)
        loss, *saved = torch.ops.nibs_torch.forward(_tensors(request), key)
        return loss, saved, None

    def backward(self, request: Request, saved: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
        return list(torch.ops.nibs_torch.backward(upstream, list(saved), _tensors(request), _key(request, True)))


def defers(request: Request) -> bool:
    """Whether gradients wait for the backward: decided by sizes alone, for a plan cannot be made of symbols."""
    if request.reduction == "none":
        return True
    if request.ring is not None and request.ring.size > 1:
        return False  # budgets may differ from rank to rank, and all must go the same way
    if request.plan is not None and request.plan.sweep == "split":
        return True
    if request.memory is None:
        return False
    wide = 8 if request.dtype == "float64" else 4
    held = request.d if request.dtype in ("float16", "bfloat16") else 0
    slack = 1 << 22  # for the smallest tiles and their operands
    return bool((request.n + request.m) * (held + 16) * wide + slack > request.memory)


def _tensors(request: Request) -> list[Tensor | None]:
    return [value if isinstance(value := getattr(request, name), Tensor) else None for name in ARRAYS]


def _key(request: Request, deferred: bool) -> str:
    """Enter the request without its tensors into the table; the same words, the same key, in every process."""
    there = {name: None for name in ARRAYS if isinstance(getattr(request, name), Tensor)}
    ring = request.ring
    if ring is not None and not hasattr(ring, "key"):
        raise Unsupported(
            f"a {type(ring).__name__} inside torch.compile: it has no name to travel by. Use nibs_torch.Ring(group)."
        )
    name = "" if ring is None else ring.key
    template = replace(request, **there, ring=None, n=0, m=0, d=0, dtype="", device="", hold=False)
    key = f"{template!r} ring={name!r} deferred={deferred}"
    TEMPLATES[key] = (template, name, deferred)
    return key


def _restore(tensors: Sequence[Tensor | None], key: str) -> tuple[Request, bool]:
    """The request of `key` about these tensors, where a value that eager mode would refuse has become NaN."""
    template, name, deferred = TEMPLATES[key]
    arrays = {field: tensor for field, tensor in zip(ARRAYS, tensors, strict=True) if tensor is not None}
    queries, keys = arrays["queries"], arrays["keys"]
    dtype = str(torch.promote_types(queries.dtype, keys.dtype)).rpartition(".")[2]
    ring = None
    if name:
        from nibs_torch.ring import ring_of

        ring = ring_of(name)
    (n, d), m = queries.shape, keys.shape[0]
    request = replace(template, **arrays, ring=ring, n=n, m=m, d=d, dtype=dtype, device=str(queries.device))
    return poisoned(request), deferred


def poisoned(request: Request) -> Request:
    """Rows with a target out of range or a wrong weight, NaN: the same loss otherwise."""
    targets, weights = request.targets, request.weights
    bad = bad_rows(request, lambda n, like: torch.arange(n, device=like.device))
    if bad is None:
        return request
    if not capturing(bad.device) and not bool(bad.any()):
        return request
    changed: dict[str, Any] = {"queries": request.queries.masked_fill(bad.unsqueeze(1), float("nan"))}
    if targets is not None:
        first = 1 if getattr(request.objective, "exclude_self", False) else 0
        other = torch.full_like(targets, first if request.m > first else -1)
        if first and request.m > 1:  # row 1 must not point at itself either
            other[1:2] = 0
        changed["targets"] = torch.where(bad, other, targets)
    if weights is not None:
        changed["weights"] = torch.where(bad, 1.0, weights).to(weights.dtype)
    return replace(request, **changed)


# -- the operators --------------------------------------------------------------------------------


@torch.library.custom_op("nibs_torch::forward", mutates_args=(), schema="(Tensor?[] tensors, str key) -> Tensor[]")
def forward(tensors: Sequence[Tensor | None], key: str) -> list[Tensor]:
    """The loss, and what the backward needs: gradients, or packed statistics `[fields, n]` and `[fields, m]`."""
    from nibs_torch.backend import KERNELS

    request, deferred = _restore(tensors, key)
    loss, saved, _ = KERNELS.forward(request, deferred=deferred)
    if deferred:
        return [loss, *_padded(saved, request)]
    names = request.wrt or ()
    if len(saved) > len(names):  # the program knows of gradients alone
        saved = [one.mul_(factor) for one, factor in zip(saved, factors(names, saved, loss.new_ones(())))]
    return [loss, *saved]


@forward.register_fake
def _(tensors: Sequence[Tensor | None], key: str) -> list[Tensor]:
    template, _, deferred = TEMPLATES[key]
    arrays = dict(zip(ARRAYS, tensors, strict=True))
    queries, keys = arrays["queries"], arrays["keys"]
    assert queries is not None and keys is not None
    wide = DTYPES["float64"] if torch.promote_types(queries.dtype, keys.dtype) == torch.float64 else torch.float32
    loss = queries.new_empty(queries.shape[:1] if template.reduction == "none" else (), dtype=wide)
    if deferred:
        return [loss, *(rows.new_empty((len(LSE_FIELDS), rows.shape[0]), dtype=wide) for rows in (queries, keys))]
    found = (arrays[name] for name in template.wrt or ())
    return [loss, *(queries.new_empty(one.shape, dtype=wide) for one in found if one is not None)]


@torch.library.custom_op(
    "nibs_torch::backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor[] saved, Tensor?[] tensors, str key) -> Tensor[]",
)
def backward(upstream: Tensor, saved: Sequence[Tensor], tensors: Sequence[Tensor | None], key: str) -> list[Tensor]:
    """The gradients of a deferred call."""
    from nibs_torch.backend import KERNELS

    request, _ = _restore(tensors, key)
    return KERNELS.backward(request, list(saved), upstream)


@backward.register_fake
def _(upstream: Tensor, saved: Sequence[Tensor], tensors: Sequence[Tensor | None], key: str) -> list[Tensor]:
    arrays = dict(zip(ARRAYS, tensors, strict=True))
    queries = arrays["queries"]
    assert queries is not None
    names = TEMPLATES[key][0].wrt or ()
    return [queries.new_empty(one.shape, dtype=one.dtype) for name in names if (one := arrays[name]) is not None]


@torch.library.custom_op(
    "nibs_torch::refuse", mutates_args=(), schema="(Tensor queries, str kind, str message) -> Tensor"
)
def refuse(queries: Tensor, kind: str, message: str) -> Tensor:
    """Raise the error of `nibs.errors` that was found while this program was traced."""
    if kind == "MemoryBudget":
        raise errors.MemoryBudget(message, least=0)
    raise getattr(errors, kind)(message)


@refuse.register_fake
def _(queries: Tensor, kind: str, message: str) -> Tensor:
    return queries.new_empty((), dtype=torch.float32)


def _padded(saved: Sequence[Tensor], request: Request) -> list[Tensor]:
    """Statistics under a shape that does not depend on the objective."""
    out = []
    for packed, size in zip(saved, (request.n, request.m), strict=True):
        wide = packed.new_zeros((len(LSE_FIELDS), size))
        wide[: packed.shape[0]] = packed
        out.append(wide)
    return out
