"""Before the first shift of a call the ranks of a ring say what they are about to do, and compare.

A rank that would do something else, or cannot do anything because its own input is invalid, must not
leave its peers waiting in the middle of a rotation. So every call opens with one exchange of words,
which also tells each rank how many rows the others hold. `joining` goes round a whole call and makes
sure that a rank whose call fails early still says so; `agree` is the exchange itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from nibs.arrays import dtype_name
from nibs.errors import RingError
from nibs.request import WRT, Request
from nibs.ring import WORDS, Ring
from nibs.verbs import lying

__all__ = ["Shards", "agree", "joining"]

CLOSE = 1e-6
"""Largest difference of scale or bias between ranks, relative to the larger of their size and 1."""

ALIKE = (
    "d",
    "dtype",
    "dtype of keys",
    "objective",
    "reduction",
    "grad_reduction",
    "precision",
    "stats",
    "gradients of",
)


@dataclass(frozen=True, slots=True)
class Shards:
    """What the ranks hold, in rank order: rows of queries and of keys; whether any has a key mask, or weights."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    key_mask: bool = False
    weights: bool = False


@contextmanager
def joining(ring: Ring) -> Iterator[None]:
    """Around one call: an error from before `agree` joins the exchange in its place, and is raised here.

    Within another of the same ring it does nothing: an error is told once, by the outermost.
    """
    if ring.size == 1 or ring.calling:
        yield
        return
    ring.alive()
    ring.owes = ring.calling = True
    try:
        yield
        ring.settle()
    except RingError:
        raise
    except BaseException as error:
        if not ring.owes or not isinstance(error, Exception):
            # In the middle of a rotation: what this rank sent next would be taken for what its peers wait for.
            ring.die(f"rank {ring.rank} of {ring.size} raised {type(error).__name__} in the middle of a call.")
        else:
            _exchange(ring, {"invalid": f"{type(error).__name__}: {error}"[: WORDS // 8]})
        with suppress(AttributeError):  # for whoever has a ring of their own over the same ranks
            error.told = True  # type: ignore[attr-defined]
        raise
    finally:
        ring.owes = ring.calling = False


def agree(ring: Ring, request: Request, scale: Any, bias: Any, *, grad: bool) -> Shards:
    """Compare this call with that of the other ranks.

    scale, bias: 0-d. grad: whether gradients are computed now; those of a later backward stand in the
    request's `wrt`. Raises RingError, on every rank, where the ranks disagree; and where one has refused,
    naming it. InvalidInput where the ring does not carry this rank's rows.
    """
    ring.check(lying(request.keys), request.device)
    if ring.size == 1:
        return Shards((request.n,), (request.m,), request.key_mask is not None, request.weights is not None)
    mine = {
        "n": request.n,
        "m": request.m,
        "d": request.d,
        "dtype": request.dtype,
        "dtype of keys": dtype_name(request.keys),
        "objective": repr(request.objective),
        "reduction": request.reduction,
        "grad_reduction": request.grad_reduction,
        "precision": request.precision,
        "stats": request.stats,
        "gradients of": [name for name in WRT if request.wants(name)] if grad or request.wrt else [],
        "scale": float(scale),
        "bias": float(bias),
        "key_mask": request.key_mask is not None,
        "weights": request.weights is not None,
    }
    every = _exchange(ring, mine)
    refused = [(rank, words["invalid"]) for rank, words in enumerate(every) if "invalid" in words]
    if refused:
        raise RingError("; ".join(f"rank {rank} of {ring.size} cannot take part: {why}" for rank, why in refused))
    for name in ALIKE:
        if any(words[name] != every[0][name] for words in every):
            raise RingError(_differ(name, [words[name] for words in every]))
    for name in ("scale", "bias"):
        values = [words[name] for words in every]
        if not all(_close(value, values[0]) for value in values):
            raise RingError(_differ(name, values))
    return Shards(
        tuple(words["n"] for words in every),
        tuple(words["m"] for words in every),
        any(words["key_mask"] for words in every),
        any(words["weights"] for words in every),
    )


def _exchange(ring: Ring, mine: dict[str, Any]) -> list[dict[str, Any]]:
    ring.owes = False
    return [json.loads(words) for words in ring.exchange(json.dumps(mine))]


def _close(one: float, other: float) -> bool:
    if one != one or other != other:
        return one != one and other != other
    return one == other or abs(one - other) <= CLOSE * max(1.0, abs(one), abs(other))


def _differ(name: str, values: list[Any]) -> str:
    """`the ranks of this ring disagree: d is 512 on rank 0 and 768 on ranks 1, 2. ...`"""
    holders: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        text = ", ".join(value) or "nothing" if isinstance(value, list) else str(value)
        holders.setdefault(text, []).append(str(rank))
    parts = [f"{text} on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}" for text, ranks in holders.items()]
    return f"the ranks of this ring disagree: {name} is {' and '.join(parts)}. Pass the same on every rank."
