"""Level 2, values: the loss and the stats of every case, within the error budget derived for it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

import nibs
from nibs_conformance.cases import CASES, Case
from nibs_conformance.checks import Judge, Subject, budget, finite, near_ties, only, truth
from nibs_conformance.oracle import Problem


def is_finite(case: Case) -> bool:
    return finite(case.problem("float32"))


def test_loss(subject: Subject, case: Case, dtype: str, judge: Judge, served: Any) -> None:
    served(case.problem(dtype), dtype)
    got = subject.outcome(case, dtype)
    judge.close("loss", got.loss, truth(case, dtype).loss, subject.budget(case, dtype).loss)


def test_loss_without_gradients(subject: Subject, case: Case, dtype: str, judge: Judge, served: Any) -> None:
    served(case.problem(dtype), dtype)
    got = subject.loss(subject.arguments_of(case, dtype), **subject.finest(dtype))
    judge.close("loss", got, truth(case, dtype).loss, subject.budget(case, dtype).loss)


@only(lambda case: case.nonnegative)
def test_loss_is_never_below_zero(subject: Subject, case: Case, dtype: str, served: Any) -> None:
    served(case.problem(dtype), dtype)
    loss = subject.outcome(case, dtype).loss
    assert (loss >= 0).all(), f"a loss of {loss.min()}: the positive and the lse come from different arithmetic."


@only(lambda case: case.name in ("symmetric", "scale-100-near", "sigmoid", "unnormalised-30"))
def test_coarse_products_stay_within_their_class(
    subject: Subject, case: Case, dtype: str, judge: Judge, served: Any
) -> None:
    for precision in ("high", "default"):
        options = {} if precision == "default" else {"precision": precision}
        served(case.problem(dtype), dtype, **options)
        got = subject.loss_and_grad(subject.arguments_of(case, dtype), **options)
        judge.outcome(got, truth(case, dtype), budget(case, dtype, True), case.problem(dtype))
        if case.nonnegative:
            assert (got.loss >= 0).all(), f"precision={precision!r}: a loss of {got.loss.min()}, below zero."


@only(is_finite)
def test_stats_count(subject: Subject, case: Case, dtype: str, served: Any) -> None:
    served(case.problem(dtype), dtype, stats=True)
    assert int(subject.outcome(case, dtype, stats=True).stats.count) == truth(case, dtype).stats.count


@only(is_finite)
def test_stats_top1(subject: Subject, case: Case, dtype: str, served: Any) -> None:
    served(case.problem(dtype), dtype, stats=True)
    got = float(subject.outcome(case, dtype, stats=True).stats.top1)
    low, high = near_ties(truth(case, dtype).stats.lead, subject.budget(case, dtype).lead)
    if math.isnan(low):
        assert math.isnan(got), f"top1 {got} over no counted query, expected NaN."
    else:
        assert low - 1e-6 <= got <= high + 1e-6, f"top1 {got}, the truth is {low} (up to {high} with ties)."


@only(is_finite)
def test_stats_over_pairs(subject: Subject, case: Case, dtype: str, judge: Judge, served: Any) -> None:
    served(case.problem(dtype), dtype, stats=True)
    got = subject.outcome(case, dtype, stats=True).stats
    want, allowed = truth(case, dtype).stats, subject.budget(case, dtype)
    for name in ("mean_positive", "mean_negative", "hardest_negative"):
        judge.close(name, float(getattr(got, name)), getattr(want, name), getattr(allowed, name))


@only(is_finite)
def test_stats_lse(subject: Subject, case: Case, dtype: str, judge: Judge, served: Any) -> None:
    served(case.problem(dtype), dtype, stats=True)
    got = subject.outcome(case, dtype, stats=True).stats
    want, allowed = truth(case, dtype).stats, subject.budget(case, dtype)
    for name in ("query_lse", "key_lse", "mean_lse"):
        true = getattr(want, name)
        value = getattr(got, name)
        if true is None:
            assert value is None, f"{name} is {value!r}, expected None: this objective takes no such lse."
            continue
        assert value is not None, f"{name} is None."
        value = float(value) if name == "mean_lse" else subject.numpy(value)
        judge.close(name, value, true, getattr(allowed, name))


@only(lambda case: case.group == "ordinary")
def test_asking_for_stats_changes_no_number(
    subject: Subject, case: Case, dtype: str, judge: Judge, served: Any
) -> None:
    served(case.problem(dtype), dtype, stats=True)
    judge.outcome(
        subject.outcome(case, dtype, stats=True), truth(case, dtype), subject.budget(case, dtype), case.problem(dtype)
    )


def test_stats_come_with_the_loss_alone(subject: Subject, dtype: str, served: Any, judge: Judge) -> None:
    case = CASES["symmetric"]
    served(case.problem(dtype), dtype, stats=True)
    loss, stats = nibs.contrastive_loss(
        backend=subject.name, stats=True, **subject.arguments_of(case, dtype), **subject.finest(dtype)
    )
    judge.close("loss", subject.numpy(loss), truth(case, dtype).loss, subject.budget(case, dtype).loss)
    assert int(stats.count) == 37


def test_masked_values_never_matter(subject: Subject, dtype: str, served: Any) -> None:
    clean, spoilt = (_masked(value) for value in (0.0, np.nan))
    served(clean, dtype)
    one, two = (subject.loss_and_grad(subject.arguments(problem, dtype)) for problem in (clean, spoilt))
    for name in ("loss", "queries", "keys", "scale"):
        got, want = getattr(two, name), getattr(one, name)
        assert np.array_equal(got, want, equal_nan=True), f"{name} changes with what absent rows hold."


def _masked(value: float) -> Problem:
    problem = CASES["masks-symmetric"].problem("bfloat16")  # numbers that every dtype holds
    queries, keys = problem.queries.copy(), problem.keys.copy()
    assert problem.query_mask is not None and problem.key_mask is not None
    queries[~problem.query_mask] = value
    keys[~problem.key_mask] = value
    return replace(problem, queries=queries, keys=keys)
