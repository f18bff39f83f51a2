"""Level 1, manners, continued: the same call gives the same bits, and leaves its inputs alone."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import nibs
from nibs_conformance.cases import CASES
from nibs_conformance.checks import INPUTS, Outcome, Subject

SEVERAL = (
    "symmetric",
    "query-to-key",
    "sigmoid",
    "nothing-divides",
    "duplicate-targets",
    "positive-symmetric",
    "weights-far-apart",
)


def same_bits(one: Outcome, two: Outcome) -> list[str]:
    """Names of what differs."""
    pairs = [("loss", one.loss, two.loss), *((name, getattr(one, name), getattr(two, name)) for name in INPUTS)]
    return [name for name, a, b in pairs if a.tobytes() != b.tobytes()]


@pytest.mark.parametrize("name", SEVERAL)
def test_the_same_call_gives_the_same_bits(subject: Subject, dtype: str, name: str, served: Any, claimed: Any) -> None:
    claimed("deterministic")
    case = CASES[name]
    served(case.problem(dtype), dtype)
    arguments = subject.arguments_of(case, dtype)
    first = subject.loss_and_grad(arguments)
    for _ in range(3):
        assert not same_bits(first, subject.loss_and_grad(arguments)), "other bits the second time"


def test_the_same_values_at_another_address_give_the_same_bits(
    subject: Subject, dtype: str, served: Any, claimed: Any
) -> None:
    claimed("deterministic")
    case = CASES["nothing-divides"]
    served(case.problem(dtype), dtype)
    first = subject.loss_and_grad(subject.arguments_of(case, dtype))
    assert not same_bits(first, subject.loss_and_grad(subject.arguments_of(case, dtype)))


@pytest.mark.parametrize("name", ("symmetric", "sigmoid", "everything-symmetric", "nan-where-masked"))
def test_inputs_are_left_as_they_were(subject: Subject, dtype: str, name: str, served: Any) -> None:
    case = CASES[name]
    served(case.problem(dtype), dtype)
    arguments = subject.arguments(case.problem(dtype), dtype, "plain", "[1]")
    arrays = {key: value for key, value in arguments.items() if hasattr(value, "shape")}
    before = {key: subject.numpy(value).tobytes() for key, value in arrays.items()}
    subject.loss_and_grad(arguments)
    changed = [key for key, value in arrays.items() if subject.numpy(value).tobytes() != before[key]]
    assert not changed, f"the call wrote into {', '.join(changed)}."


def test_results_are_not_views_of_each_other_or_of_the_inputs(subject: Subject, dtype: str, served: Any) -> None:
    case = CASES["symmetric"]
    served(case.problem(dtype), dtype)
    arguments = subject.arguments_of(case, dtype)
    one = nibs.contrastive_loss_and_grad(backend=subject.name, **arguments)[1]
    kept = subject.numpy(one.queries).copy()
    nibs.contrastive_loss_and_grad(backend=subject.name, **{**arguments, "scale": 3.0})
    assert np.array_equal(subject.numpy(one.queries), kept), "a later call wrote into an earlier call's gradient."


def test_threads_do_not_disturb_each_other(subject: Subject, served: Any, claimed: Any) -> None:
    claimed("deterministic")
    cases = [CASES[name] for name in ("symmetric", "query-to-key", "nothing-divides", "duplicate-targets")]
    dtype = "float32"
    for case in cases:
        served(case.problem(dtype), dtype)
    arguments = [subject.arguments_of(case, dtype) for case in cases]
    alone = [subject.loss_and_grad(one) for one in arguments]
    together: list[Outcome | None] = [None] * len(cases)

    def work(index: int) -> None:
        for _ in range(5):
            together[index] = subject.loss_and_grad(arguments[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for case, one, other in zip(cases, alone, together, strict=True):
        assert other is not None, f"{case.name}: the thread raised."
        assert not same_bits(one, other), f"{case.name}: other bits while other threads ran."
