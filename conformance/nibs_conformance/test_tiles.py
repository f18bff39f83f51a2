"""Level 4, tiles: how a call is cut up is nobody's business but the memory's.

Every explicit plan gives the same answer within the same budgets, ragged last tiles included; a memory
budget is kept or refused with the least that works.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nibs
from nibs.errors import MemoryBudget
from nibs_conformance.cases import Case
from nibs_conformance.checks import Judge, Subject, finite, only, truth
from nibs_conformance.oracle import Problem, solve
from nibs_conformance.tolerances import budget_of, store

TILINGS = ((2, 3), (5, 3), (16, 16), (7, 64), (64, 7), (36, 36), (37, 37), (4096, 4096))
SWEEPS = ("keep", "strip", "recompute", "split", "single")
TILED = (
    "symmetric",
    "query-to-key",
    "key-to-query",
    "sigmoid",
    "wide",
    "sigmoid-none",
    "symmetric-none",
    "everything-symmetric",
    "everything-query-to-key",
    "everything-key-to-query",
    "sigmoid-masks-weights",
    "margin-several-queries",
    "positive-with-targets",
    "smoothing-masked",
    "duplicate-targets",
    "all-far-below-zero",
    "one-row-20-times-longer",
    "one-key-20-times-longer",
    "rows-of-all-lengths",
    "nan-where-masked",
    "transposed",
    "ids-near-2-to-40",
)


def planned(problem: Problem, dtype: str, subject: Subject, **fixed: Any) -> Any:
    masked = any(one is not None for one in (problem.query_mask, problem.key_mask, problem.query_ids, problem.targets))
    return nibs.plan(
        len(problem.queries),
        len(problem.keys),
        problem.queries.shape[1],
        dtype,
        objective=problem.objective,
        masked=masked,
        backend=subject.name,
        device=subject.device,
        **fixed,
    )


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: f"{tiling[0]}x{tiling[1]}")
@only(lambda case: case.name in TILED)
def test_every_tiling_gives_the_same_answer(
    subject: Subject, case: Case, dtype: str, tiling: tuple[int, int], judge: Judge, served: Any
) -> None:
    problem = case.problem(dtype)
    served(problem, dtype)
    plan = planned(problem, dtype, subject, query_tile=tiling[0], key_tile=tiling[1])
    got = subject.call(problem, subject.arguments_of(case, dtype), plan=plan, **subject.finest(dtype))
    judge.outcome(got, truth(case, dtype), subject.budget(case, dtype), problem)


@pytest.mark.parametrize("sweep", SWEEPS)
@only(lambda case: case.name in TILED)
def test_every_sweep_gives_the_same_answer(
    subject: Subject, case: Case, dtype: str, sweep: str, judge: Judge, served: Any
) -> None:
    problem = case.problem(dtype)
    served(problem, dtype)
    try:
        plan = planned(problem, dtype, subject, query_tile=13, key_tile=11, sweep=sweep)
    except nibs.errors.InvalidInput:
        return  # this objective has no such sweep, and the plan says so
    got = subject.call(problem, subject.arguments_of(case, dtype), plan=plan, **subject.finest(dtype))
    judge.outcome(got, truth(case, dtype), subject.budget(case, dtype), problem)


@pytest.mark.parametrize("tiling", ((3, 5), (36, 36)), ids=lambda tiling: f"{tiling[0]}x{tiling[1]}")
@only(lambda case: case.name in TILED and finite(case.problem("float32")))
def test_stats_do_not_depend_on_the_tiling(
    subject: Subject, case: Case, dtype: str, tiling: tuple[int, int], judge: Judge, served: Any
) -> None:
    problem = case.problem(dtype)
    served(problem, dtype, stats=True)
    plan = planned(problem, dtype, subject, query_tile=tiling[0], key_tile=tiling[1])
    got = subject.call(problem, subject.arguments_of(case, dtype), plan=plan, stats=True, **subject.finest(dtype)).stats
    want, allowed = truth(case, dtype).stats, subject.budget(case, dtype)
    assert int(got.count) == want.count
    for name in ("mean_positive", "mean_negative", "hardest_negative"):
        judge.close(name, float(getattr(got, name)), getattr(want, name), getattr(allowed, name))
    for name in ("query_lse", "key_lse"):
        if getattr(want, name) is not None:
            judge.close(name, subject.numpy(getattr(got, name)), getattr(want, name), getattr(allowed, name))


@only(lambda case: case.name in TILED)
def test_rows_fetched_from_host_memory_give_the_same_answer(
    subject: Subject, case: Case, dtype: str, judge: Judge, served: Any, claimed: Any
) -> None:
    claimed("streaming")
    problem = case.problem(dtype)
    served(problem, dtype)
    arguments = subject.arguments_of(case, dtype)
    for name in ("queries", "keys"):
        arguments[name] = subject.backend.asarray(subject.backend.detach(arguments[name]), device="cpu")
    options: dict[str, Any] = {"device": subject.device, **subject.finest(dtype)}
    out = {}
    if problem.reduction != "none":
        garbage = store(np.full(problem.keys.shape, 7.0), dtype)
        out["keys"] = subject.backend.asarray(garbage, dtype=dtype, device="cpu")
        options["out"] = out
    plan = planned(problem, dtype, subject, query_tile=13, key_tile=11)
    got = subject.call(problem, arguments, plan=plan, **options)
    judge.outcome(got, truth(case, dtype), subject.budget(case, dtype), problem)
    if out:
        assert got.raw[1].keys is out["keys"], "the gradient is the array that was given for it"


@pytest.mark.parametrize("side", ("queries", "keys"))
@pytest.mark.parametrize("direction", ("symmetric", "query_to_key", "key_to_query"))
def test_the_last_ragged_tile_is_not_dropped(
    subject: Subject, dtype: str, side: str, direction: Any, judge: Judge, served: Any
) -> None:
    # The one row beyond whole tiles of 16 holds nearly all of every denominator.
    r = np.random.default_rng(3)
    rows = {name: r.standard_normal((33, 8)) / 4 for name in ("queries", "keys")}
    other = "keys" if side == "queries" else "queries"
    rows[side][32] = 4 * rows[other].mean(0) / np.linalg.norm(rows[other].mean(0))
    problem = Problem(
        store(rows["queries"], dtype), store(rows["keys"], dtype), scale=6.0, objective=nibs.InfoNCE(direction)
    )
    served(problem, dtype)
    want = solve(problem)
    plan = planned(problem, dtype, subject, query_tile=16, key_tile=16)
    got = subject.loss_and_grad(subject.arguments(problem, dtype), plan=plan, **subject.finest(dtype))
    judge.outcome(got, want, budget_of(problem, dtype, want, coarse=subject.coarse(dtype)), problem)


def test_a_budget_too_small_names_the_least_that_works(subject: Subject, dtype: str, judge: Judge, served: Any) -> None:
    r = np.random.default_rng(4)
    problem = Problem(store(r.standard_normal((300, 16)), dtype), store(r.standard_normal((300, 16)), dtype), scale=0.5)
    served(problem, dtype, memory=1)
    arguments = subject.arguments(problem, dtype)
    with pytest.raises(MemoryBudget) as refused:
        subject.loss_and_grad(arguments, memory=1)
    least = refused.value.least
    assert str(least) in str(refused.value), "the message names the least budget in bytes"
    want = solve(problem)
    got = subject.loss_and_grad(arguments, memory=least, **subject.finest(dtype))
    judge.outcome(got, want, budget_of(problem, dtype, want, coarse=subject.coarse(dtype)), problem)
    with pytest.raises(MemoryBudget):
        subject.loss_and_grad(arguments, memory=least - 1)


def test_the_plan_that_ran_is_in_the_stats(subject: Subject, dtype: str, served: Any) -> None:
    problem = Problem(store(np.ones((40, 8)), dtype), store(np.ones((40, 8)), dtype))
    served(problem, dtype, stats=True)
    plan = planned(problem, dtype, subject, query_tile=8, key_tile=16)
    ran = subject.loss_and_grad(subject.arguments(problem, dtype), plan=plan, stats=True).stats.plan
    assert (ran.queries, ran.keys, ran.dim) == (40, 40, 8)
    assert ran.products >= 1
