"""The backend under test, how a case is handed to it, and how its answer is held against the truth.

Everything goes through the public functions and through `asarray` and `to_numpy` of the backend's
contract, so that the suite needs no framework of its own. Nothing here knows what is right: that is
the oracle's; or how far off is still right: that is in `tolerances`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nibs
from nibs.capabilities import BackendInfo
from nibs.registry import registry
from nibs.request import Request
from nibs_conformance.cases import Case
from nibs_conformance.oracle import Answer, Problem, solve
from nibs_conformance.tolerances import Budget, budget_of

__all__ = ["Judge", "Outcome", "Subject", "budget", "finite", "lay", "near_ties", "only", "request_of", "truth"]

Array = NDArray[Any]

INPUTS = ("queries", "keys", "scale", "bias")


@dataclass(frozen=True)
class Outcome:
    """What one call gave, as NumPy arrays; gradients None where not asked for."""

    loss: Array
    queries: Array | None
    keys: Array | None
    scale: Array | None
    bias: Array | None
    stats: Any
    raw: Any


class Subject:
    """One backend under test on one device."""

    def __init__(self, name: str, device: str | None = None) -> None:
        self.name = name
        self.info: BackendInfo = registry.info(name)
        self.backend: Any = registry.load(name)
        kinds = self.info.capabilities.devices
        self.device = device or ("cpu" if "cpu" in kinds or not kinds else sorted(kinds)[0])
        self._kept: dict[Any, Any] = {}

    # -- what it claims -----------------------------------------------------------------------------

    def has(self, feature: str) -> bool:
        return feature in self.info.capabilities.features

    def why_not(self, problem: Problem, dtype: str, **options: Any) -> str | None:
        """The sentence with which the backend's declaration turns this call down, or None."""
        streams = options.pop("device", None) is not None
        return self.info.capabilities.why_not(request_of(problem, dtype, self.device, streams=streams, **options))

    # -- calls --------------------------------------------------------------------------------------

    def array(self, values: Array, dtype: str | None = None) -> Any:
        return self.backend.asarray(values, dtype=dtype, device=self.device)

    def numpy(self, array: Any) -> Array:
        return np.asarray(self.backend.to_numpy(array))

    def arguments(self, problem: Problem, dtype: str, layout: str = "plain", scalars: str = "float") -> dict[str, Any]:
        """The keyword arguments of a call, in the backend's own arrays."""
        real = np.float64 if dtype == "float64" else np.float32
        given: dict[str, Any] = {
            "queries": lay(self, problem.queries, dtype, layout),
            "keys": lay(self, problem.keys, dtype, layout),
            "objective": problem.objective,
            "reduction": problem.reduction,
        }
        for name in ("scale", "bias"):
            value: Any = float(getattr(problem, name))
            if scalars != "float":
                value = self.array(np.full((1,) if scalars == "[1]" else (), value, real))
            given[name] = value
        for name in ("targets", "query_ids", "key_ids", "query_mask", "key_mask", "weights"):
            value = getattr(problem, name)
            if value is not None:
                given[name] = self.array(np.array(value))
        return given

    def arguments_of(self, case: Case, dtype: str) -> dict[str, Any]:
        return self.arguments(case.problem(dtype), dtype, case.layout, case.scalars)

    def finest(self, dtype: str) -> dict[str, Any]:
        """The option that asks for IEEE products, where the backend has it and it means anything."""
        return {"precision": "highest"} if dtype == "float32" and self.has("precision") else {}

    def coarse(self, dtype: str) -> bool:
        """Whether products of this dtype may be of the TF32 class although the finest were asked for."""
        return dtype == "float32" and not self.has("precision") and self.device != "cpu"

    def loss_and_grad(self, arguments: dict[str, Any], **options: Any) -> Outcome:
        raw = nibs.contrastive_loss_and_grad(backend=self.name, **{**arguments, **options})
        loss, gradients, stats = raw if len(raw) == 3 else (*raw, None)
        found = {}
        for name in INPUTS:
            value = getattr(gradients, name)
            found[name] = None if value is None else self.numpy(value)
        return Outcome(loss=self.numpy(loss), **found, stats=stats, raw=raw)

    def call(self, problem: Problem, arguments: dict[str, Any], **options: Any) -> Outcome:
        """`loss_and_grad`, or `loss` where the problem asks for n values."""
        if problem.reduction != "none":
            return self.loss_and_grad(arguments, **options)
        raw = nibs.contrastive_loss(backend=self.name, **{**arguments, **options})
        loss, stats = raw if options.get("stats") else (raw, None)
        return Outcome(self.numpy(loss), None, None, None, None, stats, raw)

    def loss(self, arguments: dict[str, Any], **options: Any) -> Array:
        return self.numpy(nibs.contrastive_loss(backend=self.name, **{**arguments, **options}))

    def outcome(self, case: Case, dtype: str, **options: Any) -> Outcome:
        """The case, run once and kept for every test that looks at it.

        Through `contrastive_loss_and_grad`; n values have no one gradient, so those come from `contrastive_loss`.
        """
        key = (case.name, dtype, json.dumps(options, sort_keys=True))
        found: Outcome = self.once(
            key,
            lambda: self.call(case.problem(dtype), self.arguments_of(case, dtype), **self.finest(dtype), **options),
        )
        return found

    def once(self, key: Any, work: Callable[[], Any]) -> Any:
        """What `work()` gave the first time; if it raised, it raises for every test that needs it."""
        if key not in self._kept:
            try:
                self._kept[key] = (work(), None, None)
            except Exception as fault:
                self._kept[key] = (None, fault, fault.__traceback__)
        result, raised, trace = self._kept[key]
        if raised is not None:
            raise raised.with_traceback(trace)
        return result

    def budget(self, case: Case, dtype: str) -> Budget:
        return budget(case, dtype, self.coarse(dtype))


@cache
def truth(case: Case, dtype: str) -> Answer:
    """The oracle's answer to a case, once per process."""
    return solve(case.problem(dtype))


@cache
def budget(case: Case, dtype: str, coarse: bool = False) -> Budget:
    """The case's error budgets, once per process."""
    return budget_of(case.problem(dtype), dtype, truth(case, dtype), coarse=coarse)


def lay(subject: Subject, rows: Array, dtype: str, layout: str) -> Any:
    """Rows in the subject's own array: `"plain"` (packed), or a view of something wider, taller or turned.

    What lies round a view is NaN, so that reading it shows.
    """
    n, d = rows.shape
    if layout == "columns":
        return subject.array(np.concatenate([np.full_like(rows, np.nan), rows, np.full_like(rows, np.nan)], 1), dtype)[
            :, d : 2 * d
        ]
    if layout == "rows":
        tall = np.full((2 * n, d), np.nan, rows.dtype)
        tall[::2] = rows
        return subject.array(tall, dtype)[::2]
    if layout == "transposed":
        return subject.array(np.array(rows.T, order="C"), dtype).T
    assert layout == "plain", layout
    return subject.array(np.array(rows), dtype)  # a copy: the case's own numbers are read-only, and kept


def request_of(problem: Problem, dtype: str, device: str, **options: Any) -> Request:
    """The request that a problem amounts to, without arrays of any framework: for asking capabilities."""
    made = Request(
        queries=None,
        keys=None,
        scale=problem.scale,
        bias=problem.bias,
        objective=problem.objective,
        targets=problem.targets,
        query_ids=problem.query_ids,
        key_ids=problem.key_ids,
        query_mask=problem.query_mask,
        key_mask=problem.key_mask,
        weights=problem.weights,
        reduction=problem.reduction,  # type: ignore[arg-type]
        wrt=None,
        ring=None,
        grad_reduction="none",
        precision="default",
        memory=None,
        plan=None,
        stats=False,
        owner="",
        dtype=dtype,
        device=device,
        n=problem.queries.shape[0],
        m=problem.keys.shape[0],
        d=problem.queries.shape[1],
    )
    return replace(made, **options)


class Judge:
    """Holds answers against the truth and writes down how much of each budget was used."""

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        self._write = write

    def close(self, quantity: str, got: Any, want: Any, allowed: Any, may_be_nan: Any = False) -> None:
        """`|got - want| <= allowed` for every number.

        Where `want` is NaN `got` must be; where it is infinite they must be equal; where `may_be_nan`
        is True `got` may be NaN. Fails naming the worst number.
        """
        got = np.asarray(got)
        want, allowed = np.asarray(want), np.asarray(allowed, np.float64)
        assert got.shape == want.shape, f"{quantity}: shape {got.shape}, expected {want.shape}."
        work = np.result_type(want.dtype, np.float64)
        got, want = got.astype(work), want.astype(work)
        with np.errstate(all="ignore"):
            error = np.abs(got - want)
        error = np.where(np.isinf(want), np.where(got == want, 0, np.inf), error)
        error = np.where(np.isnan(want), np.where(np.isnan(got), 0, np.inf), error)
        error = np.where(np.isnan(error), np.where(np.broadcast_to(may_be_nan, error.shape), 0, np.inf), error)
        allowed = np.broadcast_to(np.where(np.isnan(allowed), 0, allowed), error.shape)
        with np.errstate(all="ignore"):
            used = np.where(error == 0, 0, error / allowed)
        if used.size == 0:
            return
        worst = int(np.argmax(used))
        share = float(used.flat[worst])
        figures = [float(error.flat[worst]), float(allowed.flat[worst]), share]
        self._write({"quantity": quantity, "error": figures[0], "budget": figures[1], "used": figures[2]})
        if share > 1:
            place = tuple(int(index) for index in np.unravel_index(worst, used.shape))
            many = int((used > 1).sum())
            raise AssertionError(
                f"{quantity}{list(place) if place else ''}: got {got.flat[worst]}, the truth is {want.flat[worst]}, "
                f"off by {figures[0]:.3g} where {figures[1]:.3g} is allowed ({share:.3g} times the budget; "
                f"{many} of {used.size} numbers are beyond theirs)."
            )

    def below(self, quantity: str, measured: float, allowed: float, message: str) -> None:
        """`measured <= allowed`; fails with the message."""
        used = max(measured, 0) / allowed
        self._write({"quantity": quantity, "error": measured, "budget": allowed, "used": used})
        assert measured <= allowed, message

    def outcome(
        self, got: Outcome, want: Answer, allowed: Budget, problem: Problem, only: tuple[str, ...] = INPUTS
    ) -> None:
        """The loss and the named gradients of one call; n values come without gradients."""
        self.close("loss", got.loss, want.loss, allowed.loss)
        for name in () if problem.reduction == "none" else only:
            self.gradient(name, getattr(got, name), want, allowed, problem)

    def gradient(self, name: str, got: Any, want: Answer, allowed: Budget, problem: Problem) -> None:
        """One gradient; scale and bias come in the shape of their input.

        Where anything present is not finite, more of the gradient may be NaN than must be; of absent rows nothing.
        """
        assert got is not None, f"the gradient of {name} is None."
        true, limit = getattr(want, name), getattr(allowed, name)
        if name in ("scale", "bias"):
            got = np.asarray(got).reshape(())
            self.close(f"gradient of {name}", got, true, limit, may_be_nan=not finite(problem))
            return
        present = problem.query_mask if name == "queries" else problem.key_mask
        rows = np.ones(len(true), bool) if present is None else present
        self.close(f"gradient of {name}", got, true, limit, may_be_nan=(rows & (not finite(problem)))[:, None])


def finite(problem: Problem) -> bool:
    """Whether all present rows are finite."""
    for rows, present in ((problem.queries, problem.query_mask), (problem.keys, problem.key_mask)):
        good = np.isfinite(rows).all(1)
        if not (good if present is None else good | ~present).all():
            return False
    return True


def only(wanted: Callable[[Case], bool]) -> Callable[[Any], Any]:
    """Restrict a test to the cases for which `wanted(case)` holds."""

    def mark(test: Any) -> Any:
        test.nibs_cases = wanted
        return test

    return mark


def near_ties(lead: Array, doubt: Array) -> tuple[float, float]:
    """The least and the largest top-1 that rounding can explain."""
    counted = ~np.isnan(lead)
    if not counted.any():
        return math.nan, math.nan
    lead, doubt = lead[counted].astype(np.float64), doubt[counted]
    # A tie between equal rows is exact for a backend that computes them alike, but it need not:
    # kernels treat the edge of a matrix differently from its middle.
    return float((lead > doubt).mean()), float((lead > -doubt).mean())
