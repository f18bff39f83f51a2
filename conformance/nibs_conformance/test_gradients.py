"""Level 3, gradients: of every input of every case, of what autograd is asked for, and of nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

import nibs
from nibs.arrays import dtype_name
from nibs_conformance.cases import CASES, Case
from nibs_conformance.checks import INPUTS, Judge, Subject, only, truth
from nibs_conformance.oracle import Answer, Problem, solve
from nibs_conformance.tolerances import Budget, budget_of, store

SOME = (
    "symmetric",
    "query-to-key",
    "key-to-query",
    "sigmoid",
    "scalars-0d",
    "scalars-1d",
    "masks-symmetric",
    "targets-symmetric",
)
NONE = (
    "symmetric-none",
    "query-to-key-none",
    "key-to-query-none",
    "sigmoid-none",
    "none-weights-targets-symmetric",
    "none-weights-targets-query-to-key",
    "none-weights-targets-key-to-query",
    "duplicate-targets-weighted-none",
    "nan-where-masked-none",
)


def has_gradient(case: Case) -> bool:
    return case.problem("float32").reduction != "none"


def one_gradient(name: str, subject: Subject, case: Case, dtype: str, judge: Judge, served: Any) -> None:
    problem = case.problem(dtype)
    served(problem, dtype)
    got = subject.outcome(case, dtype)
    judge.gradient(name, getattr(got, name), truth(case, dtype), subject.budget(case, dtype), problem)


@only(has_gradient)
def test_gradient_of_queries(subject: Subject, case: Case, dtype: str, judge: Judge, served: Any) -> None:
    one_gradient("queries", subject, case, dtype, judge, served)


@only(has_gradient)
def test_gradient_of_keys(subject: Subject, case: Case, dtype: str, judge: Judge, served: Any) -> None:
    one_gradient("keys", subject, case, dtype, judge, served)


@only(has_gradient)
def test_gradient_of_scale(subject: Subject, case: Case, dtype: str, judge: Judge, served: Any) -> None:
    one_gradient("scale", subject, case, dtype, judge, served)


@only(has_gradient)
def test_gradient_of_bias(subject: Subject, case: Case, dtype: str, judge: Judge, served: Any) -> None:
    one_gradient("bias", subject, case, dtype, judge, served)


@only(lambda case: "mask" in case.name and has_gradient(case))
def test_absent_rows_have_no_gradient(subject: Subject, case: Case, dtype: str, served: Any) -> None:
    problem = case.problem(dtype)
    served(problem, dtype)
    got = subject.outcome(case, dtype)
    for name, present in (("queries", problem.query_mask), ("keys", problem.key_mask)):
        if present is not None:
            absent = getattr(got, name)[~present]
            assert (absent == 0).all(), (
                f"absent {name} have gradients up to {np.abs(absent).max()}, expected exactly 0."
            )


@only(lambda case: case.name in SOME)
def test_gradients_come_in_the_shape_and_dtype_of_their_inputs(
    subject: Subject, case: Case, dtype: str, served: Any
) -> None:
    served(case.problem(dtype), dtype)
    arguments = subject.arguments_of(case, dtype)
    loss, gradients = nibs.contrastive_loss_and_grad(backend=subject.name, **arguments)
    wide = "float64" if dtype == "float64" else "float32"
    assert (tuple(loss.shape), dtype_name(loss)) == ((), wide), "the loss leaves in the accumulation dtype"
    for name in ("queries", "keys"):
        got, given = getattr(gradients, name), arguments[name]
        assert (tuple(got.shape), dtype_name(got)) == (tuple(given.shape), dtype), f"gradient of {name}"
        assert type(got) is type(given), f"gradient of {name}"
    for name in ("scale", "bias"):
        shape = (1,) if case.scalars == "[1]" else ()
        got = getattr(gradients, name)
        assert (tuple(got.shape), dtype_name(got)) == (shape, wide), f"gradient of {name}"


@pytest.mark.parametrize("asked", [(), ("queries",), ("keys",), ("scale",), ("bias",), ("keys", "scale")], ids="-".join)
@only(lambda case: case.name in ("symmetric", "query-to-key", "key-to-query", "sigmoid", "scalars-1d"))
def test_only_what_is_asked_for_is_computed(
    subject: Subject, case: Case, dtype: str, asked: tuple[str, ...], judge: Judge, served: Any
) -> None:
    problem = case.problem(dtype)
    served(problem, dtype)
    got = subject.loss_and_grad(subject.arguments_of(case, dtype), wrt=asked, **subject.finest(dtype))
    judge.outcome(got, truth(case, dtype), subject.budget(case, dtype), problem, only=asked)
    for name in INPUTS:
        assert name in asked or getattr(got, name) is None, f"the gradient of {name} was not asked for, and is there."


def test_half_precision_gradients_do_not_vanish(subject: Subject, dtype: str, judge: Judge, served: Any) -> None:
    # Every p - y is near 1/n and is then divided by n: 2^-20 in all, where float16 has 4 bits left.
    problem, want, allowed = _many(dtype, subject.coarse(dtype))
    served(problem, dtype)
    got = subject.loss_and_grad(subject.arguments(problem, dtype), **subject.finest(dtype))
    judge.outcome(got, want, allowed, problem)


@cache
def _many(dtype: str, coarse: bool) -> tuple[Problem, Answer, Budget]:
    r = np.random.default_rng(5)
    n, d = 1280, 4
    rows = [store(r.integers(-2, 3, (n, d)) / 8.0, dtype) for _ in range(2)]
    problem = Problem(rows[0], rows[1], scale=0.5)
    want = solve(problem, work=np.float64)  # its budget is far wider than float64 is from longdouble
    return problem, want, budget_of(problem, dtype, want, coarse=coarse)


# -- through the framework's own differentiation ------------------------------------------------------


def pulled(
    subject: Subject,
    hooks: Any,
    problem: Problem,
    dtype: str,
    layout: str,
    upstream: np.ndarray[Any, Any],
    **options: Any,
) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """The loss and the gradients of `sum(upstream * loss)` by the framework; scale and bias as arrays."""
    pullback = hooks.nibs_conformance_pullback(backend=subject.name)
    assert pullback is not None, (
        f"'{subject.name}' claims 'autograd' and has no hook nibs_conformance_pullback to show it."
    )
    arguments = subject.arguments(problem, dtype, layout, "[1]")
    inputs = [arguments.pop(name) for name in INPUTS]

    def function(*given: Any) -> Any:
        return nibs.contrastive_loss(
            given[0], given[1], scale=given[2], bias=given[3], backend=subject.name, **arguments, **options
        )

    real = np.float64 if dtype == "float64" else np.float32
    loss, gradients = pullback(function, inputs, subject.array(np.asarray(upstream, real)))
    return subject.numpy(loss), dict(zip(INPUTS, [subject.numpy(one) for one in gradients], strict=True))


@only(lambda case: case.name in SOME or (case.group == "cruel" and not case.name.endswith("-none")))
def test_autograd_gives_the_same_gradients(
    subject: Subject, case: Case, dtype: str, judge: Judge, served: Any, claimed: Any, hooks: Any
) -> None:
    claimed("autograd")
    problem = case.problem(dtype)
    served(problem, dtype)
    loss, got = pulled(subject, hooks, problem, dtype, case.layout, np.ones(()), **subject.finest(dtype))
    want, allowed = truth(case, dtype), subject.budget(case, dtype)
    judge.close("loss", loss, want.loss, allowed.loss)
    for name in INPUTS:
        judge.gradient(name, got[name], want, allowed, problem)


@only(lambda case: case.name in ("symmetric", "sigmoid", "query-to-key"))
def test_the_upstream_factor_is_applied_before_rounding(
    subject: Subject, case: Case, dtype: str, judge: Judge, served: Any, claimed: Any, hooks: Any
) -> None:
    # What a gradient scaler does: with float16 a small gradient survives only if it is scaled before it is rounded.
    claimed("autograd")
    problem = case.problem(dtype)
    served(problem, dtype)
    factor = 2.0**-14
    _, small = pulled(subject, hooks, problem, dtype, "plain", np.asarray(factor), **subject.finest(dtype))
    want, allowed = truth(case, dtype), subject.budget(case, dtype)
    for name in INPUTS:
        floor = 2.0**-25 if dtype == "float16" else 0.0
        true = getattr(want, name) * factor
        got = small[name].reshape(true.shape)
        judge.close(f"gradient of {name}", got, true, getattr(allowed, name) * factor + floor)


@only(lambda case: case.name in NONE)
def test_autograd_of_single_values_takes_its_upstream_vector(
    subject: Subject, case: Case, dtype: str, judge: Judge, served: Any, claimed: Any, hooks: Any
) -> None:
    claimed("autograd")
    problem = case.problem(dtype)
    served(problem, dtype)
    g = np.random.default_rng(11).integers(-8, 9, len(problem.queries)) / 4.0
    problem = replace(problem, upstream=g.astype(np.float64 if dtype == "float64" else np.float32))
    want = solve(problem)
    allowed = budget_of(problem, dtype, want, coarse=subject.coarse(dtype))
    loss, got = pulled(subject, hooks, problem, dtype, case.layout, g, **subject.finest(dtype))
    judge.close("loss", loss, want.loss, allowed.loss)
    for name in INPUTS:
        judge.gradient(name, got[name], want, allowed, problem)


@only(lambda case: case.name in ("symmetric", "sigmoid", "masks-symmetric"))  # tracing takes its time
def test_a_traced_call_gives_the_same_loss(
    subject: Subject, case: Case, dtype: str, judge: Judge, served: Any, claimed: Any, hooks: Any
) -> None:
    claimed("traced")
    problem = case.problem(dtype)
    served(problem, dtype)
    trace = hooks.nibs_conformance_trace(backend=subject.name)
    assert trace is not None, f"'{subject.name}' claims 'traced' and has no hook nibs_conformance_trace to show it."
    arguments = subject.arguments_of(case, dtype)
    rows = arguments.pop("queries"), arguments.pop("keys")
    call = trace(
        lambda queries, keys: nibs.contrastive_loss(
            queries, keys, backend=subject.name, **arguments, **subject.finest(dtype)
        )
    )
    judge.close("loss", subject.numpy(call(*rows)), truth(case, dtype).loss, subject.budget(case, dtype).loss)


def test_an_infonce_bias_has_a_gradient_of_exactly_zero(subject: Subject, dtype: str, served: Any) -> None:
    case = CASES["scalars-1d"]
    served(case.problem(dtype), dtype)
    got = subject.outcome(case, dtype)
    assert got.bias is not None and (got.bias == 0).all(), f"a bias gradient of {got.bias}: lse takes it up exactly."
