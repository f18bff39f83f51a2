"""Level 1, claims and manners: what is declared works, what is not is refused in a sentence.

The declaration is what users are told and what the rest of the suite skips by, so every entry of it is
tried from both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import nibs
from nibs.arrays import class_names, device_kind, dtype_name
from nibs.capabilities import FEATURES
from nibs.errors import NibsError, Unsupported
from nibs.registry import registry
from nibs.spec import Direction
from nibs_conformance.checks import Judge, Subject
from nibs_conformance.oracle import Problem, solve
from nibs_conformance.tolerances import budget_of, store

SILENT = {"autograd", "deterministic", "traced", "uneven_shards"}
"""Features whose absence a call cannot show; those who claim them are tried where the feature is."""


def small(dtype: str, **options: Any) -> Problem:
    r = np.random.default_rng(1)
    queries, keys = (store(r.standard_normal((9, 6)) / 2, dtype) for _ in range(2))
    return replace(Problem(queries, keys, scale=2.5, objective=nibs.InfoNCE("query_to_key")), **options)


def probes(feature: str, dtype: str, device: str) -> tuple[Problem, dict[str, Any]]:
    """A small call that needs this feature and, as far as may be, no other."""
    ids = np.arange(9) // 2
    way: Direction = "query_to_key"
    r = np.random.default_rng(2)
    weights = r.integers(1, 5, 9).astype(np.float64 if dtype == "float64" else np.float32)
    both = small(dtype)
    found: dict[str, Callable[[], tuple[Problem, dict[str, Any]]]] = {
        "exclude": lambda: (
            small(dtype, objective=nibs.InfoNCE(way, same_id="exclude"), query_ids=ids, key_ids=ids),
            {},
        ),
        "multi_positive": lambda: (
            small(dtype, objective=nibs.InfoNCE(way, same_id="positive"), query_ids=ids, key_ids=ids),
            {},
        ),
        "exclude_self": lambda: (
            replace(
                both, keys=both.queries, objective=nibs.InfoNCE(way, exclude_self=True), targets=(np.arange(9) + 4) % 9
            ),
            {},
        ),
        "false_negative_margin": lambda: (small(dtype, objective=nibs.InfoNCE(way, false_negative_margin=0.3)), {}),
        "label_smoothing": lambda: (small(dtype, objective=nibs.InfoNCE(way, label_smoothing=0.2)), {}),
        "masks": lambda: (small(dtype, query_mask=np.arange(9) != 3, key_mask=np.arange(9) < 7), {}),
        "memory": lambda: (small(dtype), {"memory": 2**26}),
        "precision": lambda: (small(dtype), {"precision": "highest"}),
        "reduction_none": lambda: (small(dtype, reduction="none"), {}),
        "stats": lambda: (small(dtype), {"stats": True}),
        "streaming": lambda: (small(dtype), {"device": device}),
        "targets": lambda: (small(dtype, targets=np.arange(9)[::-1].copy()), {}),
        "weights": lambda: (small(dtype, weights=weights), {}),
    }
    return found[feature]()


def works(subject: Subject, problem: Problem, dtype: str, judge: Judge, **options: Any) -> None:
    """The call gives the true loss and gradients."""
    want = solve(problem)
    options = {**subject.finest(dtype), **options}
    got = subject.call(problem, subject.arguments(problem, dtype), **options)
    judge.outcome(got, want, budget_of(problem, dtype, want, coarse=subject.coarse(dtype)), problem)


def is_refused(subject: Subject, problem: Problem, dtype: str, **options: Any) -> None:
    """The call raises Unsupported with the sentence of the declaration."""
    sentence = subject.why_not(problem, dtype, **options)
    assert sentence, "the declaration has no sentence for this"
    try:
        arguments = subject.arguments(problem, dtype)
    except NibsError:
        return  # the framework has no such arrays at all, and says so
    with pytest.raises(Unsupported) as refused:
        subject.call(problem, arguments, **options)
    message = str(refused.value)
    assert subject.name in message and sentence in message, message


def some_dtype(subject: Subject) -> str:
    claimed = subject.info.capabilities.dtypes
    return next(name for name in ("float32", "float64", "bfloat16", "float16") if name in claimed)


def test_a_dtype_works_exactly_if_it_is_claimed(subject: Subject, dtype: str, judge: Judge) -> None:
    objective: Any = nibs.InfoNCE("query_to_key")
    if "InfoNCE" not in subject.info.capabilities.objectives:
        objective = nibs.Sigmoid()
    problem = small(dtype, objective=objective)
    if dtype in subject.info.capabilities.dtypes:
        works(subject, problem, dtype, judge)
    else:
        is_refused(subject, problem, dtype)


@pytest.mark.parametrize("feature", sorted(FEATURES.keys() - SILENT))
def test_a_feature_works_exactly_if_it_is_claimed(subject: Subject, feature: str, judge: Judge) -> None:
    dtype = some_dtype(subject)
    problem, options = probes(feature, dtype, subject.device)
    if subject.has(feature):
        sentence = subject.why_not(problem, dtype, **options)
        assert sentence is None, f"claims '{feature}' and turns down the plainest use of it: {sentence}"
        works(subject, problem, dtype, judge, **options)
    else:
        is_refused(subject, problem, dtype, **options)


@pytest.mark.parametrize("name", ("InfoNCE", "Sigmoid"))
def test_an_objective_works_exactly_if_it_is_claimed(subject: Subject, name: str, judge: Judge) -> None:
    dtype = some_dtype(subject)
    objective: Any = nibs.InfoNCE() if name == "InfoNCE" else nibs.Sigmoid()
    problem = small(dtype, objective=objective)
    if name in subject.info.capabilities.objectives:
        works(subject, problem, dtype, judge)
    else:
        is_refused(subject, problem, dtype)


@pytest.mark.parametrize("feature", ("autograd", "traced"))
def test_a_claim_that_needs_a_hook_has_it(subject: Subject, feature: str, claimed: Any, hooks: Any) -> None:
    claimed(feature)
    name = {"autograd": "nibs_conformance_pullback", "traced": "nibs_conformance_trace"}[feature]
    assert getattr(hooks, name)(backend=subject.name) is not None, (
        f"'{subject.name}' claims '{feature}' without the hook {name}."
    )


def test_a_ring_of_a_stranger_is_refused(subject: Subject) -> None:
    dtype = some_dtype(subject)
    is_refused(subject, small(dtype), dtype, ring=object())


@pytest.mark.parametrize("kind", ("cpu", "cuda", "tpu"))
def test_a_device_that_is_not_claimed_is_refused(subject: Subject, kind: str) -> None:
    if kind in subject.info.capabilities.devices:
        assert device_kind(subject.device) in subject.info.capabilities.devices
        return
    with pytest.raises((NibsError, RuntimeError)):
        given = subject.backend.asarray(np.ones((3, 2), np.float32), device=kind)
        nibs.contrastive_loss(given, given, backend=subject.name)


def test_the_declaration_is_complete(subject: Subject) -> None:
    info = subject.info
    assert info.capabilities.devices and info.capabilities.dtypes and info.capabilities.objectives
    assert info.install, "users are told what to type when it is missing: BackendInfo(install=...)"
    assert info.arrays, "a backend owns at least one kind of array: BackendInfo(arrays=...)"


def test_the_arrays_it_makes_are_those_it_declares(subject: Subject) -> None:
    made = subject.array(np.ones((3, 2), np.float32))
    assert set(class_names(made)) & set(subject.info.arrays), (
        f"it makes {class_names(made)[0]} and declares {subject.info.arrays}."
    )
    assert registry.owner(made) is not None


def test_rows_survive_the_way_in_and_out(subject: Subject, dtype: str, served: Any) -> None:
    served(small(dtype), dtype)
    rows = store(np.random.default_rng(7).standard_normal((7, 5)), dtype)
    there = subject.array(rows, dtype)
    assert dtype_name(there) == dtype
    assert np.array_equal(subject.numpy(there), rows), (
        "asarray and to_numpy change numbers that the dtype holds exactly"
    )


@pytest.mark.parametrize("dtype_given", ("float64", "int64"))
def test_nothing_is_narrowed_in_silence(subject: Subject, dtype_given: str) -> None:
    values = np.array([1.0 + 2.0**-40, 2.0**40 + 1]).astype(dtype_given)
    try:
        there = subject.array(values)
    except NibsError:
        return  # refused, aloud
    assert dtype_name(there) == dtype_given, f"a {dtype_given} array became {dtype_name(there)}."
    assert np.array_equal(subject.numpy(there), values)


def test_the_default_call_is_the_plain_symmetric_loss(subject: Subject, dtype: str, served: Any, judge: Judge) -> None:
    problem = small(dtype, objective=nibs.InfoNCE(), scale=1.0)
    served(problem, dtype)
    arguments = subject.arguments(problem, dtype)
    want = solve(problem)
    loss = nibs.contrastive_loss(arguments["queries"], arguments["keys"], backend=subject.name)
    allowed = budget_of(problem, dtype, want, coarse=subject.device != "cpu")
    judge.close("loss", subject.numpy(loss), want.loss, allowed.loss)


def test_asking_by_context_manager_gives_the_same(subject: Subject, served: Any) -> None:
    dtype = some_dtype(subject)
    problem = small(dtype)
    arguments = subject.arguments(problem, dtype)
    with nibs.use_backend(subject.name):
        loss = nibs.contrastive_loss(**arguments)
    assert np.array_equal(subject.numpy(loss), subject.loss(arguments))
