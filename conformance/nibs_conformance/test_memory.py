"""Level 5, the memory law: what a call holds grows with n + m, and no n x m array is ever there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nibs
from nibs_conformance import memory
from nibs_conformance.checks import Judge, Subject
from nibs_conformance.oracle import Problem
from nibs_conformance.tolerances import store

COARSE = (1024, 2048, 3072, 4096)
FINE = (384, 768, 1152, 1536)
"""Rows, for a meter that is off by megabytes (the whole process), and for one that is not."""
WIDTH = 16
TILES = {FINE: 96, COARSE: 256}
SHARE = 0.05
"""Of an n x n float32 array: more than this at the largest size is no longer called linear."""

OBJECTIVES = {
    "symmetric": nibs.InfoNCE(),
    "query-to-key": nibs.InfoNCE("query_to_key"),
    "key-to-query": nibs.InfoNCE("key_to_query"),
    "ids": nibs.InfoNCE(same_id="exclude"),
    "margin": nibs.InfoNCE(false_negative_margin=0.5),
    "sigmoid": nibs.Sigmoid(),
}


def problem_of(n: int, objective: Any, dtype: str) -> Problem:
    r = np.random.default_rng(n)
    rows = [store(r.standard_normal((n, WIDTH)) / 4, dtype) for _ in range(2)]
    ids = np.arange(n) // 2 if objective.same_id != "negative" else None
    return Problem(rows[0], rows[1], scale=5.0, objective=objective, query_ids=ids, key_ids=ids)


def prepared(subject: Subject, n: int, objective: Any, dtype: str, **options: Any) -> Any:
    """A call of no arguments, ready to be measured."""
    problem = problem_of(n, objective, dtype)
    arguments = subject.arguments(problem, dtype)
    if "plan" in options:
        tile = options["plan"]
        options["plan"] = nibs.plan(
            n,
            n,
            WIDTH,
            dtype,
            objective=objective,
            query_tile=tile,
            key_tile=tile,
            sweep="recompute" if isinstance(objective, nibs.InfoNCE) else "single",
            masked=problem.query_ids is not None,
            backend=subject.name,
            device=subject.device,
        )
    return lambda: nibs.contrastive_loss_and_grad(backend=subject.name, **arguments, **options)


def measure(meter: Any, call: Any) -> int:
    call()  # what a framework sets up once is not the loss's
    return int(meter(call))


def peaks_of(subject: Subject, hooks: Any, objective: str) -> tuple[str, tuple[int, ...], list[int], int]:
    """The meter's name, the sizes, the peaks at them, and the meter's doubt; measured once."""

    def take() -> Any:
        name, meter, noise = memory.meter_of(subject, hooks)
        sizes = FINE if noise <= 2**20 else COARSE
        calls = [prepared(subject, n, OBJECTIVES[objective], "float32", plan=TILES[sizes]) for n in sizes]
        return name, sizes, [measure(meter, call) for call in calls], noise

    found: tuple[str, tuple[int, ...], list[int], int] = subject.once(("peaks", objective), take)
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_peak_grows_linearly(subject: Subject, objective: str, served: Any, hooks: Any, judge: Judge) -> None:
    served(problem_of(8, OBJECTIVES[objective], "float32"), "float32")
    meter, sizes, peaks, noise = peaks_of(subject, hooks, objective)
    share = memory.law(sizes, peaks)
    allowed = SHARE + noise / (4 * sizes[-1] ** 2)
    judge.below(
        "quadratic share",
        share,
        allowed,
        f"by {meter} the peaks at n = {sizes} are {peaks} bytes: they bend upwards by {share:.2f} of an n x n array.",
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_array_of_n_by_m_is_there(subject: Subject, objective: str, served: Any, hooks: Any, judge: Judge) -> None:
    # The smallest such array has one byte a pair: masks may not be whole. Half of it is far above what is linear.
    served(problem_of(8, OBJECTIVES[objective], "float32"), "float32")
    meter, sizes, peaks, noise = peaks_of(subject, hooks, objective)
    smallest = sizes[-1] ** 2 // 2
    judge.below(
        "peak",
        peaks[-1],
        smallest + noise,
        f"by {meter} the call held {peaks[-1]} bytes; half of n x m bytes is {smallest}.",
    )


@pytest.mark.parametrize("objective", ("symmetric", "query-to-key", "key-to-query", "ids", "sigmoid"))
def test_a_budget_is_kept(subject: Subject, objective: str, dtype: str, served: Any, hooks: Any, judge: Judge) -> None:
    kind = OBJECTIVES[objective]
    served(problem_of(8, kind, dtype), dtype, memory=1)
    meter, sees, noise = memory.meter_of(subject, hooks)
    n, budget = (1536, 2**21) if noise <= 2**20 else (4096, 6 * 2**20)
    peak = measure(sees, prepared(subject, n, kind, dtype, memory=budget))
    returned = 2 * n * WIDTH * {"float64": 8, "float32": 4}.get(dtype, 2)
    judge.below(
        "peak",
        peak,
        budget + returned + noise,
        f"by {meter} the call held {peak} bytes: {peak - returned} beyond its gradients; memory={budget}.",
    )


def test_autograd_keeps_no_tile_alive(subject: Subject, served: Any, claimed: Any, hooks: Any, judge: Judge) -> None:
    claimed("autograd")
    served(problem_of(8, nibs.InfoNCE(), "float32"), "float32")
    pullback = hooks.nibs_conformance_pullback(backend=subject.name)
    assert pullback is not None, (
        f"'{subject.name}' claims 'autograd' and has no hook nibs_conformance_pullback to show it."
    )
    meter, sees, noise = memory.meter_of(subject, hooks)
    sizes = FINE if noise <= 2**20 else COARSE
    n, tile = sizes[-1], TILES[sizes]
    arguments = subject.arguments(problem_of(n, nibs.InfoNCE(), "float32"), "float32")
    plan = nibs.plan(n, n, WIDTH, "float32", query_tile=tile, key_tile=tile, sweep="recompute", backend=subject.name)

    def call() -> Any:
        return pullback(
            lambda queries, keys: nibs.contrastive_loss(queries, keys, scale=5.0, plan=plan, backend=subject.name),
            [arguments["queries"], arguments["keys"]],
            subject.array(np.ones((), np.float32)),
        )

    peak, smallest = measure(sees, call), n * n // 2
    judge.below(
        "peak",
        peak,
        smallest + noise,
        f"by {meter} forward and backward held {peak} bytes; half of n x m bytes is {smallest}.",
    )
