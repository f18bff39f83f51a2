"""A case dealt out over the ranks of a ring, solved there, and put together again.

Designated positives are local, so a query goes where its key is; apart from that rows may lie anywhere,
and the truth stays that of the whole case: the split must not be seen in any number. What runs on the
ranks are the functions from `solve_shard` on; they may run in other processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nibs
from nibs.spec import InfoNCE
from nibs_conformance.checks import INPUTS, Subject
from nibs_conformance.oracle import Problem

__all__ = ["Deal", "Share", "assemble", "deal"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Deal:
    """What each rank holds. queries, keys: for each rank the rows of the whole problem that it has."""

    shards: tuple[Problem, ...]
    queries: tuple[Array, ...]
    keys: tuple[Array, ...]


@dataclass(frozen=True)
class Share:
    """One rank's answer, in NumPy; gradients None where there are none. sent: bytes, where the ring counts them."""

    loss: Array
    gradients: dict[str, Array | None]
    stats: dict[str, Any]
    sent: int | None


def deal(problem: Problem, proportions: tuple[int, ...]) -> Deal:
    """The problem over `len(proportions)` ranks, keys in about these proportions; 0 leaves a rank empty."""
    n, m = len(problem.queries), len(problem.keys)
    targets = _targets(problem)
    owner = _owners(problem, targets, proportions)
    together = isinstance(problem.objective, InfoNCE) and problem.objective.exclude_self
    filled = [rank for rank, share in enumerate(proportions) if share]
    home = np.array([filled[i % len(filled)] for i in range(n)], int)
    for i in range(n):
        if together:
            home[i] = owner[i]
        elif targets[i] >= 0:
            home[i] = owner[targets[i]]
    queries = tuple(np.flatnonzero(home == rank) for rank in range(len(proportions)))
    keys = tuple(np.flatnonzero(owner == rank) for rank in range(len(proportions)))
    place = np.full(max(m, 1), -1)
    for rows in keys:
        place[rows] = np.arange(len(rows))
    locals_ = [np.where(targets[rows] >= 0, place[targets[rows]], -1) for rows in queries]
    diagonal = problem.targets is None and all(
        len(local) <= len(rows) and (local == np.arange(len(local))).all()
        for local, rows in zip(locals_, keys, strict=True)
    )
    plain = problem.targets is None and problem.objective.same_id == "positive"
    shards = []
    for mine, theirs, local in zip(queries, keys, locals_, strict=True):
        shards.append(
            replace(
                problem,
                queries=problem.queries[mine],
                keys=problem.keys[theirs],
                targets=None if diagonal or plain else local,
                query_ids=_of(problem.query_ids, mine),
                key_ids=_of(problem.key_ids, theirs),
                query_mask=_of(problem.query_mask, mine),
                key_mask=_of(problem.key_mask, theirs),
                weights=_of(problem.weights, mine),
                upstream=_of(problem.upstream, mine),
            )
        )
    return Deal(tuple(shards), queries, keys)


def assemble(dealt: Deal, problem: Problem, shares: list[Share]) -> dict[str, Array]:
    """`loss` and the gradients of the whole problem, from what the ranks gave back.

    Scalars are rank 0's. Whoever's row it is has its gradient; nobody else's is looked at.
    """
    whole: dict[str, Array] = {"loss": shares[0].loss}
    if problem.reduction == "none":
        whole["loss"] = _scatter(dealt.queries, [share.loss for share in shares], (len(problem.queries),))
    for name, rows in (("queries", dealt.queries), ("keys", dealt.keys)):
        parts = [share.gradients.get(name) for share in shares]
        if all(part is not None for part in parts):
            whole[name] = _scatter(rows, parts, getattr(problem, name).shape)
    for name in ("scale", "bias"):
        value = shares[0].gradients.get(name)
        if value is not None:
            whole[name] = value
    return whole


def _scatter(rows: tuple[Array, ...], parts: list[Any], shape: tuple[int, ...]) -> Array:
    out = np.zeros(shape, parts[0].dtype)
    for index, part in zip(rows, parts, strict=True):
        assert len(part) == len(index), f"a rank with {len(index)} rows gave back {len(part)}."
        out[index] = part
    return out


def _targets(problem: Problem) -> Array:
    if problem.targets is not None:
        return np.asarray(problem.targets)
    n = len(problem.queries)
    return np.full(n, -1) if problem.objective.same_id == "positive" else np.arange(n)


def _owners(problem: Problem, targets: Array, proportions: tuple[int, ...]) -> Array:
    """`[m]`: the rank of each key. Rows that must stay together (one set, its rows and their targets) do."""
    m = len(problem.keys)
    group = np.arange(m)
    if isinstance(problem.objective, InfoNCE) and problem.objective.exclude_self:
        for row, target in enumerate(targets):
            if target >= 0:
                group[group == group[target]] = group[row]
    order = np.argsort(group, kind="stable")
    total, cuts = sum(proportions), np.cumsum((0, *proportions))
    owner = np.zeros(m, int)
    for rank, (begin, end) in enumerate(pairwise(cuts)):
        owner[order[begin * m // total : end * m // total]] = rank
    for name in np.unique(group):  # a cut through a group: all of it goes with its first row
        owner[group == name] = owner[group == name][0]
    return owner


def _of(values: Array | None, rows: Array) -> Array | None:
    return None if values is None else values[rows]


# -- on the ranks ----------------------------------------------------------------------------------


@cache
def subject_here(name: str, device: str) -> Subject:
    """The subject in this process."""
    return Subject(name, device)


def solve_shard(
    ring: Any,
    rank: int,
    size: int,
    name: str,
    device: str,
    shards: tuple[Problem, ...],
    dtype: str,
    options: dict[str, Any],
) -> Share:
    """This rank's part of a call. options: those of nibs; or, of ours:

    tiles: `(rows, columns)` of an explicit plan; rank r adds r to both, for plans may differ. host: the
    rows stay in host memory and are fetched.
    scalars: how scale and bias are handed over. pull: differentiate by the framework, with the shard's
    upstream (or 1). scales: one scale for each rank.
    """
    subject, problem, options = subject_here(name, device), shards[rank], dict(options)
    tiles, pull = options.pop("tiles", None), options.pop("pull", False)
    if "scales" in options:
        problem = replace(problem, scale=options.pop("scales")[rank])
    arguments = subject.arguments(problem, dtype, scalars=options.pop("scalars", "float"))
    arguments.update(subject.finest(dtype))
    if options.pop("host", False):
        for side in ("queries", "keys"):
            arguments[side] = subject.backend.asarray(subject.backend.detach(arguments[side]), device="cpu")
        arguments["device"] = device
    arguments.update(ring=ring, **options)
    if tiles is not None:
        arguments["plan"] = nibs.plan(
            len(problem.queries),
            len(problem.keys),
            problem.queries.shape[1],
            dtype,
            objective=problem.objective,
            ring_size=size,
            query_tile=tiles[0] + rank,
            key_tile=tiles[1] + rank,
        )
    before = getattr(ring, "sent", None)
    if pull:
        share = _pulled(subject, problem, arguments, dtype)
    elif problem.reduction == "none":
        outcome = subject.call(problem, arguments)
        share = Share(outcome.loss, {}, {}, None)
    else:
        outcome = subject.loss_and_grad(arguments)
        stats = {} if outcome.stats is None else _figures(subject, outcome.stats)
        share = Share(outcome.loss, {one: getattr(outcome, one) for one in INPUTS}, stats, None)
    return replace(share, sent=None if before is None else ring.sent - before)


def _figures(subject: Subject, stats: Any) -> dict[str, Any]:
    names = ("count", "top1", "mean_positive", "mean_negative", "mean_lse", "hardest_negative")
    return {one: getattr(stats, one) for one in names}


def _pulled(subject: Subject, problem: Problem, arguments: dict[str, Any], dtype: str) -> Share:
    from nibs_conformance.hookspecs import register

    pullback = register().nibs_conformance_pullback(backend=subject.name)
    real = np.float64 if dtype == "float64" else np.float32
    inputs = [arguments.pop("queries"), arguments.pop("keys")]
    for name in ("scale", "bias"):
        arguments.pop(name)
        inputs.append(subject.array(np.full((1,), getattr(problem, name), real)))
    upstream = np.ones((), real)
    if problem.reduction == "none":
        upstream = np.ones(len(problem.queries), real) if problem.upstream is None else problem.upstream.astype(real)

    def function(*given: Any) -> Any:
        return nibs.contrastive_loss(
            given[0], given[1], scale=given[2], bias=given[3], backend=subject.name, **arguments
        )

    loss, gradients = pullback(function, inputs, subject.array(upstream))
    found = dict(zip(INPUTS, [subject.numpy(one) for one in gradients], strict=True))
    return Share(subject.numpy(loss), found, {}, None)  # type: ignore[arg-type]


def refuse(
    ring: Any, rank: int, size: int, name: str, device: str, shards: tuple[Problem, ...], who: int, how: str
) -> Any:
    """Every rank calls; rank `who` with input that is invalid in one way. Then all call again, with good input."""
    subject = subject_here(name, device)
    arguments = subject.arguments(shards[rank], "float32")
    bad = dict(arguments)
    if rank == who:
        spoil: dict[str, Callable[[], dict[str, Any]]] = {
            "shape": lambda: {"keys": arguments["keys"][:, :-1]},
            "targets": lambda: {"targets": subject.array(np.full(len(shards[rank].queries), 1000))},
            "option": lambda: {"reduction": "average"},
            "type": lambda: {"queries": "rows"},
            "memory": lambda: {"memory": 1},
        }
        bad.update(spoil[how]())
    first: Any = None
    try:
        nibs.contrastive_loss_and_grad(backend=name, ring=ring, **bad)
    except Exception as error:
        first = error
    return first, subject.loss_and_grad({**arguments, "ring": ring}).loss


def disagree(
    ring: Any,
    rank: int,
    size: int,
    name: str,
    device: str,
    shards: tuple[Problem, ...],
    every: tuple[dict[str, Any], ...],
) -> Any:
    """Every rank calls with options of its own; `width` narrows its rows, `dtype` changes them. Then all agree."""
    subject, problem, options = subject_here(name, device), shards[rank], dict(every[rank])
    dtype = options.pop("dtype", "float32")
    width = options.pop("width", problem.queries.shape[1])
    narrow = replace(problem, queries=problem.queries[:, :width], keys=problem.keys[:, :width])
    first: Any = None
    try:
        nibs.contrastive_loss_and_grad(backend=name, **{**subject.arguments(narrow, dtype), "ring": ring, **options})
    except Exception as error:
        first = error
    return first, subject.loss_and_grad({**subject.arguments(problem, "float32"), "ring": ring}).loss


def sit_out(ring: Any, rank: int, size: int, name: str, device: str, shards: tuple[Problem, ...], who: int) -> Any:
    """Every rank but one calls; then they try the ring again."""
    if rank == who:
        return None
    arguments = subject_here(name, device).arguments(shards[rank], "float32")
    errors = []
    for _ in range(2):
        try:
            nibs.contrastive_loss_and_grad(backend=name, ring=ring, **arguments)
        except Exception as error:
            errors.append(error)
    return errors
