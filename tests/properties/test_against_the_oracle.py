"""Any call that the options allow agrees with the oracle; found by drawing calls, not by listing them.

Draws are seeded (`derandomize`), so that a failure here fails everywhere and again tomorrow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nibs
from nibs import InfoNCE, Sigmoid
from nibs_conformance.checks import Judge, Subject
from nibs_conformance.oracle import Problem, solve
from nibs_conformance.tolerances import budget_of, store

BACKENDS = ("numpy", "torch")
DRAWN = settings(
    max_examples=60,
    deadline=None,  # the machine may be busy
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JUDGE = Judge(lambda measured: None)


@pytest.fixture(scope="module", params=BACKENDS)
def subject(request: pytest.FixtureRequest) -> Subject:
    pytest.importorskip({"numpy": "nibs_numpy.backend", "torch": "torch"}[request.param])
    return Subject(request.param)


@st.composite
def objectives(draw: Any) -> Any:
    same = draw(st.sampled_from(["negative", "exclude", "positive"]))
    if draw(st.booleans()):
        return Sigmoid(same)
    margin = draw(st.sampled_from([None, None, -0.375, 0.125, 0.625])) if same != "positive" else None
    return InfoNCE(
        draw(st.sampled_from(["symmetric", "query_to_key", "key_to_query"])),
        label_smoothing=draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        same_id=same,
        exclude_self=draw(st.booleans()),
        false_negative_margin=margin,
    )


@st.composite
def problems(draw: Any, dtype: str = "float32") -> Problem:
    """A call with every option drawn; products are exact, so that no margin is decided by rounding."""
    objective = draw(objectives())
    alone = isinstance(objective, InfoNCE) and objective.exclude_self
    n = draw(st.integers(0, 13))
    m = n if alone else draw(st.integers(0, 13))
    d = draw(st.integers(1, 5))
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    queries, keys = (r.integers(-4, 5, (rows, d)) / 4.0 for rows in (n, m))
    if alone:
        keys = queries.copy()
    targets = None
    if (alone and objective.same_id != "positive") or n > m or draw(st.booleans()):
        targets = r.integers(-1, m, n) if m else np.full(n, -1)
        if alone:
            targets = np.where(targets == np.arange(n), -1, targets)
    ids: dict[str, Any] = {}
    if objective.same_id != "negative":
        ids = {"query_ids": r.integers(0, 5, n), "key_ids": r.integers(0, 5, m)}
    one_way = isinstance(objective, Sigmoid) or objective.direction == "query_to_key"
    reductions = ["mean", "sum"]
    if one_way or targets is not None or objective.same_id != "positive":
        reductions.append("none")
    return Problem(
        store(queries, dtype),
        store(keys, dtype),
        scale=draw(st.sampled_from([-7.5, 0.0, 0.25, 1.0, 14.0, 100.0])),
        bias=draw(st.sampled_from([-10.0, 0.0, 0.5])),
        objective=objective,
        targets=targets,
        query_mask=draw(st.sampled_from([None, r.random(n) < 0.7])),
        key_mask=draw(st.sampled_from([None, r.random(m) < 0.7])),
        weights=draw(st.sampled_from([None, (r.integers(0, 4, n) / 2.0).astype(np.float32)])),
        reduction=draw(st.sampled_from(reductions)),
        **ids,
    )


def agrees(subject: Subject, problem: Problem, dtype: str, **options: Any) -> None:
    want = solve(problem)
    got = subject.call(problem, subject.arguments(problem, dtype), **subject.finest(dtype), **options)
    JUDGE.outcome(got, want, budget_of(problem, dtype, want), problem)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(data=st.data())
@DRAWN
def test_any_call_agrees_with_the_oracle(subject: Subject, dtype: str, data: Any) -> None:
    agrees(subject, data.draw(problems(dtype)), dtype)


@given(data=st.data())
@DRAWN
def test_any_call_in_float64_agrees_with_the_oracle(subject: Subject, data: Any) -> None:
    problem = data.draw(problems("float64"))
    if problem.weights is not None:
        problem = replace(problem, weights=problem.weights.astype(np.float64))
    agrees(subject, problem, "float64")


@given(data=st.data())
@DRAWN
def test_any_tiling_agrees_with_the_oracle(subject: Subject, data: Any) -> None:
    problem = data.draw(problems())
    plan = nibs.plan(
        len(problem.queries),
        len(problem.keys),
        problem.queries.shape[1],
        objective=problem.objective,
        masked=True,
        query_tile=data.draw(st.integers(1, 14)),
        key_tile=data.draw(st.integers(1, 14)),
        backend=subject.name,
    )
    agrees(subject, problem, "float32", plan=plan)


@given(data=st.data())
@DRAWN
def test_any_stats_agree_with_the_oracle(subject: Subject, data: Any) -> None:
    problem = data.draw(problems())
    want, allowed = solve(problem), budget_of(problem, "float32", solve(problem))
    got = subject.call(problem, subject.arguments(problem, "float32"), stats=True).stats
    assert int(got.count) == want.stats.count
    for name in ("mean_positive", "mean_negative", "hardest_negative"):
        JUDGE.close(name, float(getattr(got, name)), getattr(want.stats, name), getattr(allowed, name))
    for name in ("query_lse", "key_lse"):
        if getattr(want.stats, name) is not None:
            JUDGE.close(name, subject.numpy(getattr(got, name)), getattr(want.stats, name), getattr(allowed, name))
