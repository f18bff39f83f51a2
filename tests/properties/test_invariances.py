"""What must not matter does not, and what must be equal is: laws of the losses, without any oracle's number.

Budgets are still the derived ones: two ways to the same number may each be off by that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibs import InfoNCE, Sigmoid
from nibs_conformance.checks import Judge, Subject
from nibs_conformance.oracle import Problem, solve
from nibs_conformance.tolerances import budget_of, store

DRAWN = settings(max_examples=30, deadline=None, derandomize=True, database=None)
JUDGE = Judge(lambda measured: None)
DIRECTIONS = ("symmetric", "query_to_key", "key_to_query")


@pytest.fixture(scope="module", params=("numpy", "torch"))
def subject(request: pytest.FixtureRequest) -> Subject:
    pytest.importorskip({"numpy": "nibs_numpy.backend", "torch": "torch"}[request.param])
    return Subject(request.param)


@st.composite
def batches(draw: Any, objective: Any = None, least: int = 1) -> Problem:
    n, d = draw(st.integers(least, 17)), draw(st.integers(1, 6))
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [store(r.standard_normal((n, d)), "float32") for _ in range(2)]
    way = draw(st.sampled_from([*(InfoNCE(one) for one in DIRECTIONS), Sigmoid()]))
    scale = draw(st.sampled_from([-2.0, 0.5, 5.0]))
    return Problem(rows[0], rows[1], scale=scale, bias=-1.0, objective=objective or way)


def answers(subject: Subject, problem: Problem) -> Any:
    return subject.call(problem, subject.arguments(problem, "float32"), **subject.finest("float32"))


def same(subject: Subject, one: Problem, two: Problem, names: dict[str, Any]) -> None:
    """Both problems give one loss; `names`: gradient of one, to how it follows from the other outcome."""
    first, second = answers(subject, one), answers(subject, two)
    allowed = budget_of(one, "float32", solve(one))
    also = budget_of(two, "float32", solve(two))
    JUDGE.close("loss", first.loss, second.loss, allowed.loss + also.loss)
    for name, follow in names.items():
        limit = np.max(getattr(allowed, name)) + np.max(np.abs(follow(also)))
        JUDGE.close(
            f"gradient of {name}",
            getattr(first, name),
            follow(second),
            np.full_like(getattr(first, name), limit, float),
        )


@given(problem=batches(), seed=st.integers(0, 2**32 - 1))
@DRAWN
def test_the_order_of_the_pairs_does_not_matter(subject: Subject, problem: Problem, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(problem.queries))
    back = np.argsort(order)
    mixed = replace(problem, queries=problem.queries[order], keys=problem.keys[order])
    same(
        subject,
        problem,
        mixed,
        {
            "queries": lambda other: other.queries[back],
            "keys": lambda other: other.keys[back],
            "scale": lambda other: other.scale,
        },
    )


@given(problem=batches(), seed=st.integers(0, 2**32 - 1))
@DRAWN
def test_targets_follow_their_keys(subject: Subject, problem: Problem, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(problem.keys))
    back = np.argsort(order)
    mixed = replace(problem, keys=problem.keys[order], targets=back)
    same(subject, problem, mixed, {"queries": lambda other: other.queries, "keys": lambda other: other.keys[back]})


@given(problem=batches(InfoNCE("key_to_query")))
@DRAWN
def test_key_to_query_is_the_transpose(subject: Subject, problem: Problem) -> None:
    turned = replace(problem, queries=problem.keys, keys=problem.queries, objective=InfoNCE("query_to_key"))
    same(
        subject,
        problem,
        turned,
        {"queries": lambda other: other.keys, "keys": lambda other: other.queries, "scale": lambda other: other.scale},
    )


@given(problem=batches(InfoNCE()))
@DRAWN
def test_symmetric_is_its_own_transpose(subject: Subject, problem: Problem) -> None:
    turned = replace(problem, queries=problem.keys, keys=problem.queries)
    same(subject, problem, turned, {"queries": lambda other: other.keys, "keys": lambda other: other.queries})


@given(problem=batches(InfoNCE()), bias=st.sampled_from([-100.0, 0.0, 3.0]))
@DRAWN
def test_a_softmax_does_not_see_the_bias(subject: Subject, problem: Problem, bias: float) -> None:
    same(
        subject,
        problem,
        replace(problem, bias=bias),
        {"queries": lambda other: other.queries, "scale": lambda other: other.scale},
    )


@given(problem=batches(), power=st.integers(-4, 4))
@DRAWN
def test_scale_and_length_trade_places(subject: Subject, problem: Problem, power: int) -> None:
    factor = 2.0**power
    moved = replace(problem, queries=problem.queries / np.float32(factor), scale=problem.scale * factor)
    same(
        subject,
        problem,
        moved,
        {
            "queries": lambda other: other.queries / factor,
            "keys": lambda other: other.keys,
            "scale": lambda other: other.scale * factor,
        },
    )


@given(problem=batches(least=2), seed=st.integers(0, 2**32 - 1))
@DRAWN
def test_absent_pairs_are_as_if_they_had_never_been(subject: Subject, problem: Problem, seed: int) -> None:
    present = np.random.default_rng(seed).random(len(problem.queries)) < 0.6
    masked = replace(problem, query_mask=present, key_mask=present)
    fewer = replace(problem, queries=problem.queries[present], keys=problem.keys[present])

    def spread(rows: Any) -> Any:
        full = np.zeros_like(problem.queries, dtype=np.asarray(rows).dtype)
        full[present] = rows
        return full

    same(
        subject,
        masked,
        fewer,
        {
            "queries": lambda other: spread(other.queries),
            "keys": lambda other: spread(other.keys),
            "scale": lambda other: other.scale,
        },
    )


@given(problem=batches(), power=st.integers(-3, 3))
@DRAWN
def test_only_the_ratio_of_weights_matters_to_a_mean(subject: Subject, problem: Problem, power: int) -> None:
    weights = (np.arange(len(problem.queries)) % 3 + 1).astype(np.float32)
    one, two = (replace(problem, weights=weights * np.float32(factor)) for factor in (1.0, 2.0**power))
    same(subject, one, two, {"queries": lambda other: other.queries, "scale": lambda other: other.scale})


@given(problem=batches())
@DRAWN
def test_single_values_add_up_to_the_sum(subject: Subject, problem: Problem) -> None:
    each = replace(problem, reduction="none")
    whole = replace(problem, reduction="sum")
    values = answers(subject, each).loss
    allowed = budget_of(whole, "float32", solve(whole)).loss + budget_of(each, "float32", solve(each)).loss.sum()
    JUDGE.close("sum", values.astype(np.float64).sum(), answers(subject, whole).loss, allowed)


@given(problem=batches(InfoNCE()), smoothing=st.sampled_from([0.1, 0.5]))
@DRAWN
def test_smoothing_is_a_mixture(subject: Subject, problem: Problem, smoothing: float) -> None:
    ends = [replace(problem, objective=InfoNCE(label_smoothing=one)) for one in (0.0, 1.0, smoothing)]
    none, full, between = (float(answers(subject, one).loss) for one in ends)
    allowed = sum(float(budget_of(one, "float32", solve(one)).loss) for one in ends)
    JUDGE.close("loss", between, (1 - smoothing) * none + smoothing * full, allowed)


@given(problem=batches(InfoNCE("query_to_key")), seed=st.integers(0, 2**32 - 1))
@DRAWN
def test_another_negative_never_lowers_the_loss(subject: Subject, problem: Problem, seed: int) -> None:
    more = np.random.default_rng(seed).standard_normal((3, problem.keys.shape[1])).astype(np.float32)
    wider = replace(problem, keys=np.concatenate([problem.keys, more]))
    allowed = float(budget_of(wider, "float32", solve(wider)).loss)
    assert float(answers(subject, wider).loss) >= float(answers(subject, problem).loss) - allowed
