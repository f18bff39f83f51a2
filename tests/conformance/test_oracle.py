"""The oracle against what is right for other reasons: numbers worked by hand, finite differences, mpmath."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
import pytest

from nibs import InfoNCE, Sigmoid
from nibs_conformance.cases import CASES
from nibs_conformance.checks import finite
from nibs_conformance.oracle import Problem, solve, wide

SMOOTH = [
    name
    for name, case in CASES.items()
    if finite(case.problem("float64"))
    and 0 < case.problem("float64").queries.size <= 64 * 64
    and case.problem("float64").keys.size
    and name != "margin-tie"
]
"""Cases whose loss has a derivative that differences can see: a tie at the margin is a step."""


def by_hand(**options: Any) -> Problem:
    # logits 0, ln 2 / ln 3, 0: exponentials 1, 2 / 3, 1
    ln2, ln3 = math.log(2), math.log(3)
    return Problem(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.0, ln3], [ln2, 0.0]]), **options)


def test_two_by_two_by_hand() -> None:
    answer = solve(by_hand(objective=InfoNCE("query_to_key")))
    rows = [math.log(3) - 0, math.log(4) - 0]
    assert float(answer.loss) == pytest.approx(sum(rows) / 2, rel=1e-15)
    # p - y of row 0: 1/3 - 1, 2/3; of row 1: 3/4, 1/4 - 1; halved by the mean
    want = np.array([[2 / 3 * math.log(2), -2 / 3 * math.log(3)], [-3 / 4 * math.log(2), 3 / 4 * math.log(3)]]) / 2
    np.testing.assert_allclose(answer.queries.astype(float), want, rtol=1e-14)
    assert float(answer.scale) == pytest.approx((2 / 3 * math.log(2) + 3 / 4 * math.log(3)) / 2, rel=1e-14)
    assert float(answer.bias) == 0.0


def test_the_key_direction_by_hand() -> None:
    answer = solve(by_hand(objective=InfoNCE("key_to_query")))
    assert float(answer.loss) == pytest.approx((math.log(1 + 3) + math.log(1 + 2)) / 2, rel=1e-15)


def test_symmetric_is_the_mean_of_both_directions() -> None:
    one, two, both = (
        float(solve(by_hand(objective=InfoNCE(way))).loss) for way in ("query_to_key", "key_to_query", "symmetric")
    )
    assert both == pytest.approx((one + two) / 2, rel=1e-15)


def test_smoothing_by_hand() -> None:
    answer = solve(by_hand(objective=InfoNCE("query_to_key", label_smoothing=0.5)))
    rows = [math.log(3) - 0.25 * math.log(2), math.log(4) - 0.25 * math.log(3)]
    assert float(answer.loss) == pytest.approx(sum(rows) / 2, rel=1e-15)


def test_several_positives_are_averaged_outside_the_logarithm() -> None:
    ids = np.array([7, 7])
    answer = solve(by_hand(objective=InfoNCE("query_to_key", same_id="positive"), query_ids=ids, key_ids=ids))
    rows = [math.log(3) - 0.5 * math.log(2), math.log(4) - 0.5 * math.log(3)]
    assert float(answer.loss) == pytest.approx(sum(rows) / 2, rel=1e-15)


def test_sigmoid_by_hand() -> None:
    answer = solve(by_hand(objective=Sigmoid()))
    # positives have logit 0: log 2 each; negatives have -log sigmoid(-s) = log(1 + e^s)
    assert float(answer.loss) == pytest.approx((2 * math.log(2) + math.log(3) + math.log(4)) / 2, rel=1e-15)
    assert float(answer.bias) == pytest.approx((-0.5 - 0.5 + 2 / 3 + 3 / 4) / 2, rel=1e-14)


def test_a_margin_drops_by_similarity_and_strictly() -> None:
    queries = np.array([[1.0]])
    keys = np.array([[1.0], [1.5], [1.75]])
    kept = solve(Problem(queries, keys, scale=-2.0, objective=InfoNCE("query_to_key", false_negative_margin=0.5)))
    assert kept.rows is not None and kept.rows.allowed.tolist() == [[True, True, False]]


def test_weights_and_absent_rows_by_hand() -> None:
    objective = InfoNCE("query_to_key")
    weighted = solve(by_hand(objective=objective, weights=np.array([3.0, 1.0])))
    assert float(weighted.loss) == pytest.approx((3 * math.log(3) + math.log(4)) / 4, rel=1e-15)
    masked = solve(by_hand(objective=objective, query_mask=np.array([True, False]), weights=np.array([3.0, math.nan])))
    assert float(masked.loss) == pytest.approx(math.log(3), rel=1e-15)
    alone = solve(by_hand(objective=objective, key_mask=np.array([True, False])))
    assert (float(alone.loss), alone.stats.count) == (0.0, 1)


def test_values_of_the_key_direction_stand_with_the_query_that_designates_the_key() -> None:
    problem = by_hand(
        objective=InfoNCE("key_to_query"), targets=np.array([1, 1]), weights=np.array([1.0, 3.0]), reduction="none"
    )
    answer = solve(problem)
    # key 1 has logits ln 2 and 0 with queries 0 and 1, both its positives, and weight (1 + 3) / 2
    value = 2 * (math.log(3) - math.log(2) / 2)
    np.testing.assert_allclose(answer.loss.astype(float), [value, value], rtol=1e-15)


def test_stats_by_hand() -> None:
    stats = solve(by_hand(objective=InfoNCE())).stats
    ln2, ln3 = math.log(2), math.log(3)
    assert stats.count == 2 and (stats.lead > 0).tolist() == [False, False]
    assert float(stats.mean_positive) == 0.0
    assert float(stats.mean_negative) == pytest.approx((ln2 + ln3) / 2)
    assert float(stats.hardest_negative) == pytest.approx(ln3)
    assert stats.query_lse is not None and stats.key_lse is not None and stats.mean_lse is not None
    np.testing.assert_allclose(stats.query_lse.astype(float), [ln3, 2 * ln2])
    assert float(stats.mean_lse) == pytest.approx((ln3 + 2 * ln2) / 2)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    problem = CASES[name].problem("float64")
    g = np.random.default_rng(1).integers(1, 9, len(problem.queries)) / 4.0
    if problem.reduction == "none":
        problem = replace(problem, upstream=g)
    answer = solve(problem)
    r = np.random.default_rng(2)
    step = np.longdouble(2.0) ** -28
    for part in ("queries", "keys", "scale", "bias"):
        point = np.asarray(getattr(problem, part), np.longdouble)
        toward = r.choice([-1.0, 1.0], point.shape).astype(np.longdouble)
        present = {"queries": problem.query_mask, "keys": problem.key_mask}.get(part)
        if present is not None:
            toward = toward * present[:, None]
        both = [_total(problem, part, np.where(toward != 0, point + sign * step * toward, point)) for sign in (1, -1)]
        slope = float((both[0] - both[1]) / (2 * step))
        true = float((getattr(answer, part) * toward).sum())
        size = float(np.abs(getattr(answer, part)).sum()) + abs(float(np.sum(answer.loss)))
        assert slope == pytest.approx(true, abs=1e-8 * size + 1e-12), part


def _total(problem: Problem, part: str, value: Any) -> Any:
    """The weighted sum of values, in longdouble throughout."""
    value = value if value.ndim else value[()]
    answer = solve(replace(problem, **{part: value}), work=np.longdouble)
    upstream = problem.upstream if problem.upstream is not None else 1
    return (answer.loss * upstream).sum()


def _by_mpmath(problem: Problem) -> Any:
    """Rows' InfoNCE of a square problem in 50 digits, written out."""
    with mpmath.workdps(50):
        total = mpmath.mpf(0)
        for i, query in enumerate(problem.queries):
            logits = [
                mpmath.mpf(problem.scale)
                * mpmath.fsum(mpmath.mpf(float(a)) * mpmath.mpf(float(b)) for a, b in zip(query, key))
                for key in problem.keys
            ]
            total += mpmath.log(mpmath.fsum(mpmath.exp(s) for s in logits)) - logits[i]
        return total / len(problem.queries)


@pytest.mark.parametrize("name", ["query-to-key", "temperature-0.005", "far-beyond-exp", "scale-100", "negative-scale"])
def test_the_loss_is_that_of_mpmath(name: str) -> None:
    problem = replace(CASES[name].problem("float64"), objective=InfoNCE("query_to_key"))
    problem = replace(problem, queries=problem.queries[:20], keys=problem.keys[:20])
    want = _by_mpmath(problem)
    got = solve(problem).loss
    assert got.dtype == np.longdouble
    with mpmath.workdps(50):
        exact = mpmath.mpf(float(got)) + mpmath.mpf(float(got - np.longdouble(float(got))))
        logits = abs(problem.scale) * 30
        assert abs(exact - want) < 2.0**-58 * max(1.0, float(abs(want)), logits), (
            "the oracle is wider than what it judges"
        )


@pytest.mark.parametrize("name", ["symmetric", "everything-symmetric", "sigmoid", "duplicate-targets", "scale-200"])
def test_the_oracle_of_float32_agrees_with_a_wider_one(name: str) -> None:
    problem = CASES[name].problem("float32")
    narrow, broad = solve(problem), solve(problem, work=np.longdouble)
    assert wide(problem) is np.float64
    for part in ("loss", "queries", "keys", "scale", "bias"):
        np.testing.assert_allclose(
            getattr(narrow, part).astype(float), getattr(broad, part).astype(float), rtol=1e-9, atol=1e-11, err_msg=part
        )


def test_a_nan_reaches_what_depends_on_it_and_nothing_else() -> None:
    case = CASES["nan-in-keys-none"]
    answer = solve(case.problem("float32"))
    assert np.isnan(answer.loss).all()
    query = solve(CASES["nan-in-queries-none"].problem("float32"))
    assert np.flatnonzero(np.isnan(query.loss)).tolist() == [17]
    assert np.flatnonzero(np.isnan(query.queries).all(1)).tolist() == [17]
    assert np.isnan(query.keys).all()


def test_what_absent_rows_hold_is_never_read() -> None:
    answer = solve(CASES["nan-where-masked"].problem("float32"))
    for part in ("loss", "queries", "keys", "scale", "bias"):
        assert np.isfinite(getattr(answer, part)).all(), part


@pytest.mark.parametrize("name", ["empty", "all-masked", "no-positives-at-all", "weights-all-zero", "no-keys"])
def test_with_nothing_left_all_is_zero(name: str) -> None:
    answer = solve(CASES[name].problem("float32"))
    assert float(answer.loss) == 0.0 and answer.stats.count == 0
    assert not answer.queries.any() and not answer.keys.any() and float(answer.scale) == 0.0
