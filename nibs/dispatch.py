"""From a call to the backend that serves it.

    the call -> one frozen request -> whose turn -> why_not -> load once -> that backend's loss

Whose turn: `backend=`, else `use_backend(...)` around the call, else `NIBS_BACKEND`, else the owner
of the arrays. A backend that does not own them gets them through DLPack, and the owner supplies the
autograd around it; nobody is ever served by a backend other than the one asked for.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from nibs.agreement import joining
from nibs.arrays import describe, device_name, dtype_name, facts, is_array
from nibs.capabilities import BackendInfo
from nibs.errors import BackendUnavailable, InvalidInput, Unsupported
from nibs.registry import registry
from nibs.request import WRT, Request, check_values, make_request
from nibs.ring import Ring
from nibs.spec import Backend, Gradients, InfoNCE, Sigmoid

__all__ = ["contrastive_loss", "contrastive_loss_and_grad", "use_backend"]

ENVIRONMENT = "NIBS_BACKEND"
FASTEST = "fastest"

_chosen: ContextVar[str | None] = ContextVar("nibs_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls without `backend=` go to this backend; per thread and per task.

    Raises UnknownBackend on entry for a name that is not here.
    """
    if _name("name", name) != FASTEST:
        registry.info(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def contrastive_loss(queries: Any, keys: Any, *, backend: str | None = None, **options: Any) -> Any:
    """The contrastive loss of `queries [n, d]` against `keys [m, d]`, tile by tile. Nothing is normalised.

    Differentiable where the framework differentiates. Returns a 0-d array in the accumulation dtype
    (float32; float64 for float64 inputs), `[n]` values with `reduction="none"`, and `(loss, Stats)`
    with `stats=True`.

    options, defaults in brackets:
        scale [1.0], bias [0.0]: logits are `scale * <q_i, k_j> + bias`; floats, or arrays of shape [] or [1].
        objective [InfoNCE()]: `nibs.InfoNCE(...)` or `nibs.Sigmoid(...)`.
        targets [None]: `[n]` int, row i's positive is local key `targets[i]`, -1 for none; None is `arange(n)`,
            or none designated with `same_id="positive"`.
        query_ids, key_ids [None]: `[n]`, `[m]` int64; the objective's `same_id` says what equal ids do.
        query_mask, key_mask [None]: `[n]`, `[m]` bool; False is absent: never read, gradient zero.
        weights [None]: `[n]` float >= 0, anchor weights.
        reduction ["mean"]: `"mean"`, `"sum"`, `"none"`.
        wrt [None]: names out of queries, keys, scale, bias that get a gradient.
        ring [None]: the ranks that share the batch; the framework's own handle or a `nibs.ring.Ring`.
        grad_reduction ["none"]: `"sum"` or `"mean"` if a wrapper will reduce all gradients so over the ranks.
        precision ["default"]: `"default"`, `"high"`, `"highest"` for products of float32 inputs.
        memory [None]: bound on everything beyond inputs and returned gradients, bytes or `"512MiB"`.
        plan [None]: a `Plan` from `nibs.plan(...)`, in place of `memory`; its tiles and its sweep are taken, and
            what it says of bytes and flops is that of the rows it was made for.
        stats [False]: also return `Stats`.
        device [None]: where to compute, such as `"cuda:0"`, with queries and keys in host memory (memory-mapped, too):
            they are fetched tile by tile, gradients return to where the inputs are, and the batch need not fit.
        backend [None]: a name; else `use_backend`, else NIBS_BACKEND, else the owner of the arrays;
            `"fastest"` asks the plugins' policy.

    Raises InvalidInput, MemoryBudget, Unsupported, UnknownBackend, BackendUnavailable, RingError.
    """
    from nibs.tracing import tracer_of  # here, because it must run where a compiler reads this line by line

    tracer = tracer_of(queries)
    if tracer is not None:
        return tracer.enter(run, queries, keys, backend, options)
    return run(queries, keys, backend, options)


def run(queries: Any, keys: Any, backend: str | None, options: dict[str, Any]) -> Any:
    """`contrastive_loss`, beyond any compiler."""
    return _on_ring(_loss, queries, keys, backend, options)


def _loss(queries: Any, keys: Any, backend: str | None, options: dict[str, Any]) -> Any:
    if options.get("out") is not None:
        raise InvalidInput(
            "out= with contrastive_loss: its gradients are autograd's. Use contrastive_loss_and_grad, which fills them."
        )
    request, name = _ready(queries, keys, backend, options)
    owner = registry.load(request.owner)
    if name == request.owner:
        return owner.loss(request)
    return owner.differentiable(request, _crossing(name, owner))


def contrastive_loss_and_grad(queries: Any, keys: Any, *, backend: str | None = None, **options: Any) -> Any:
    """`(loss, Gradients)` of the same loss and options as `contrastive_loss`; `(loss, Gradients, Stats)`
    with `stats=True`. Nothing is normalised, and no graph is built.

    The gradients are those of the returned loss, each in the shape and dtype of its input, for the names in
    `wrt` (all four unless given). `reduction="none"` has no single gradient and is an InvalidInput.
    out [None]: a dict with arrays for the gradients of "queries", "keys" or both, memory-mapped ones too, of the
    inputs' shape and dtype, apart from them in memory; they are filled strip by strip, as with `device=`.
    """
    if options.get("wrt") is None:
        options["wrt"] = WRT
    return _on_ring(_loss_and_grad, queries, keys, backend, options)


def _loss_and_grad(queries: Any, keys: Any, backend: str | None, options: dict[str, Any]) -> Any:
    reduction = options.get("reduction")
    if isinstance(reduction, str) and reduction == "none":  # whoever would serve it
        raise InvalidInput(
            "reduction='none' with contrastive_loss_and_grad: n values have no one gradient. Use 'mean' or 'sum', "
            "or differentiate contrastive_loss."
        )
    request, name = _ready(queries, keys, backend, options)
    owner = registry.load(request.owner)
    if name == request.owner:
        return owner.loss_and_grad(request)
    return _crossing(name, owner)(request)


def _on_ring(call: Callable[..., Any], queries: Any, keys: Any, backend: str | None, options: dict[str, Any]) -> Any:
    """The call with its ring looked up first: whatever is wrong with this rank's input, its peers must hear of it."""
    handle = options.get("ring")
    if handle is None:
        return call(queries, keys, backend, options)
    ring = options["ring"] = _ring(handle)
    if not isinstance(ring, Ring):  # an axis of a traced framework, which brings a schedule of its own
        return call(queries, keys, backend, options)
    with joining(ring):
        return call(queries, keys, backend, options)


def _ring(handle: Any) -> Any:
    """The ring that a framework's handle stands for; as it is where nobody here takes it (see `why_not`)."""
    if not isinstance(handle, Ring):
        for status in registry.statuses():
            if status.state == "ready" and status.info is not None and status.info.capabilities.takes_ring(handle):
                return registry.load(status.name).ring(handle)
    return handle


def _ready(queries: Any, keys: Any, backend: str | None, options: dict[str, Any]) -> tuple[Request, str]:
    """The checked request, and who serves it.

    A training loop makes one call again and again, and as long as it brings no arrays but queries, keys, scale and
    bias, what is checked are facts of those, not their values. So a call of known facts is that one again, with
    other arrays in it.
    """
    given = {"queries": queries, "keys": keys}
    for name in ("scale", "bias"):
        if name in options:
            given[name] = options[name]
    try:
        key = _facts(given, backend, options)
        known = _calls.get(key)
    except (AttributeError, TypeError, ValueError):  # no array, or what does not hash or compare: never known
        key = known = None
    if known is not None:
        request, name, info = known
        if registry.owner(queries) == request.owner and registry.info(name) is info:
            return request.but(given), name
    request = make_request(queries, keys, registry, **_known(options))
    check_values(request, registry.load(request.owner))
    name = _serve(request, backend)
    if key is not None and queries.dtype == keys.dtype:  # else autocast has its word
        if len(_calls) >= MOST:
            _calls.clear()
        _calls[key] = (request.but(dict.fromkeys(given)), name, registry.info(name))
    return request, name


_calls: dict[tuple[Any, ...] | None, tuple[Request, str, BackendInfo]] = {}
"""By their facts: calls that were checked, without their arrays, and who serves them."""

MOST = 256  # calls that are remembered, for loops whose batches vary in size
PLAIN = frozenset({bool, int, str, tuple, type(None), InfoNCE, Sigmoid})


def _facts(given: dict[str, Any], backend: str | None, options: dict[str, Any]) -> tuple[Any, ...] | None:
    """All that is looked at in a call, the registry apart; None where it brings more than can be compared."""
    chosen = _chosen.get() or os.environ.get(ENVIRONMENT)
    if FASTEST in (backend, chosen):  # a policy may change its mind
        return None
    found: list[Any] = [backend, chosen]
    for name, value in given.items():
        found += (name, float) if type(value) is float else (name, *facts(value))
    for name, value in options.items():
        if name not in given:
            if type(value) not in PLAIN:
                return None
            found += (name, type(value), value)
    return tuple(found)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    unknown = options.keys() - OPTIONS
    if unknown:
        name = sorted(unknown)[0]
        raise InvalidInput(f"{name}= is not an option.{_nearest(name)} Options: {', '.join(sorted(NAMES))}.")
    return options


OPTIONS = frozenset((make_request.__kwdefaults__ or {}).keys())
NAMES = OPTIONS | {"backend"}


def _nearest(name: str) -> str:
    """What somebody who wrote `name=` may have meant."""
    if name in ("temperature", "tau"):
        return " Logits are multiplied by scale: pass scale = 1 / temperature."
    if name in InfoNCE.__dataclass_fields__:
        return f" It belongs to the objective: objective=nibs.InfoNCE({name}=...)."
    near = difflib.get_close_matches(name.lower(), NAMES, n=1)
    return f" Did you mean {near[0]}=?" if near else ""


def _name(argument: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidInput(f"{argument} is {describe(value)}: expected a backend's name, or '{FASTEST}'.")
    return value


def _serve(request: Request, backend: str | None) -> str:
    """The name of the backend that serves this request, which can; raises where it cannot."""
    asked = None if backend is None else _name("backend", backend)
    name = asked or _chosen.get() or os.environ.get(ENVIRONMENT) or request.owner
    if name == FASTEST:
        return _fastest(request)
    info = registry.info(name)
    reason = info.capabilities.why_not(request)
    if reason is not None:
        raise Unsupported(f"backend '{name}' cannot do this: {reason}. {_who_can(request)}")
    return name


def _fastest(request: Request) -> str:
    able = _able(request)
    if not able:
        raise Unsupported(f"no backend here can do this. {_why_nobody(request)}")
    names = [info.name for info in able]
    chosen = registry.select(request, able)
    if chosen is None:
        chosen = request.owner if request.owner in names else names[0]
    try:
        registry.load(chosen)
    except BackendUnavailable:  # it has shown only now that it cannot run here
        return _fastest(request)
    return chosen


def _able(request: Request) -> list[BackendInfo]:
    infos = [status.info for status in registry.statuses() if status.state == "ready" and status.info is not None]
    return [info for info in infos if info.capabilities.why_not(request) is None]


def _who_can(request: Request) -> str:
    names = [info.name for info in _able(request)]
    return f"These can: {', '.join(names)}." if names else "No backend here can."


def _why_nobody(request: Request) -> str:
    return "; ".join(
        f"{status.name}: {status.info.capabilities.why_not(request) if status.info else status.reason}"
        for status in registry.statuses()
    )


def _crossing(name: str, owner: Backend) -> Callable[[Request], Any]:
    """`loss_and_grad` by a backend that does not own the arrays: over by DLPack, and back."""
    foreign = registry.load(name)
    arrays = ("targets", "query_ids", "key_ids", "query_mask", "key_mask", "weights", *WRT)

    def over(value: Any) -> Any:
        if not is_array(value):
            return value
        there = foreign.asarray(owner.detach(value))
        if dtype_name(there) != dtype_name(value):
            raise InvalidInput(
                f"backend '{name}' would narrow a {dtype_name(value)} array to {dtype_name(there)}: "
                "convert it yourself first."
            )
        return there

    def back(value: Any) -> Any:
        return owner.asarray(foreign.detach(value)) if is_array(value) else value

    def loss_and_grad(request: Request) -> Any:
        out = request.out or {}
        moved = replace(request, owner=name, **{field: over(getattr(request, field)) for field in arrays})
        if request.streams:
            moved = replace(moved, out={field: over(array) for field, array in out.items()} or None)
        else:
            moved = replace(moved, device=device_name(moved.queries))
        loss, gradients, *stats = foreign.loss_and_grad(moved)
        gradients = Gradients(*(out[field] if field in out else back(getattr(gradients, field)) for field in WRT))
        stats = [replace(one, query_lse=back(one.query_lse), key_lse=back(one.key_lse)) for one in stats]
        return (back(loss), gradients, *stats)

    return loss_and_grad
