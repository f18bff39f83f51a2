"""Level 6, bad input: every wrong argument is an InvalidInput that names it, shows it, and says what was expected.

Shapes and dtypes are refused always, values (targets in range, weights) in eager calls. A refusal comes
before any work: what was given is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nibs
from nibs.errors import BackendUnavailable, InvalidInput
from nibs_conformance.checks import Subject

N, M, D = 6, 8, 5


class Given:
    """What the bad calls are made of: good arguments, and arrays of the backend."""

    def __init__(self, subject: Subject) -> None:
        claimed = subject.info.capabilities.dtypes
        self.subject = subject
        self.dtypes = [name for name in ("float32", "float64", "bfloat16", "float16") if name in claimed]
        r = np.random.default_rng(0)
        self.queries = self.rows(r.standard_normal((N, D)))
        self.keys = self.rows(r.standard_normal((M, D)))

    def rows(self, values: Any, dtype: str | None = None) -> Any:
        return self.subject.array(np.asarray(values, np.float32), dtype or self.dtypes[0])

    def real(self, values: Any) -> Any:
        return self.subject.array(np.asarray(values, np.float32))

    def whole(self, values: Any) -> Any:
        return self.subject.array(np.asarray(values, np.int64))

    def flags(self, values: Any) -> Any:
        return self.subject.array(np.asarray(values, bool))

    def stranger(self) -> Any:
        """An array of a framework that nobody here knows."""
        return type(
            "Stranger", (), {"__module__": "strange", "shape": (M, D), "dtype": self.dtypes[0], "device": "cpu"}
        )()

    def elsewhere(self) -> Any:
        """An array of this very framework on a device that is not this one."""
        kind = type(self.keys)
        where = "cuda:7" if self.subject.device != "cuda:7" else "cuda:6"
        facts = {"__module__": kind.__module__, "shape": (M, D), "dtype": self.dtypes[0], "device": where}
        return type(kind.__name__, (), facts)()


Bad = Callable[[Given], dict[str, Any]]

BAD: dict[str, tuple[Bad, tuple[str, ...]]] = {
    "queries-of-one-dimension": (lambda g: {"queries": g.rows(np.ones(N))}, ("queries", "(6,)", "[rows, d]")),
    "queries-of-three-dimensions": (lambda g: {"queries": g.rows(np.ones((N, D, 1)))}, ("queries", "(6, 5, 1)")),
    "queries-without-columns": (
        lambda g: {"queries": g.rows(np.ones((N, 0))), "keys": g.rows(np.ones((M, 0)))},
        ("queries", "(6, 0)", "d >= 1"),
    ),
    "queries-of-integers": (lambda g: {"queries": g.whole(np.ones((N, D)))}, ("queries", "int64", "float32")),
    "keys-of-another-width": (lambda g: {"keys": g.rows(np.ones((M, D + 1)))}, ("keys", "(8, 6)", "queries", "(6, 5)")),
    "keys-of-integers": (lambda g: {"keys": g.whole(np.ones((M, D)))}, ("keys", "int64")),
    "keys-a-list": (lambda g: {"keys": [[1.0] * D] * M}, ("keys", "list")),
    "keys-of-another-framework": (lambda g: {"keys": g.stranger()}, ("keys", "Stranger", "one framework")),
    "keys-on-another-device": (lambda g: {"keys": g.elsewhere()}, ("keys", "cuda:", "one device")),
    "targets-of-another-framework": (lambda g: {"targets": _strange_targets()}, ("targets", "Stranger")),
    "scale-of-two-elements": (lambda g: {"scale": g.real([1.0, 2.0])}, ("scale", "(2,)", "one element")),
    "scale-of-text": (lambda g: {"scale": "large"}, ("scale", "large")),
    "scale-none": (lambda g: {"scale": None}, ("scale", "None")),
    "scale-of-integers": (lambda g: {"scale": g.whole([1])}, ("scale", "int64")),
    "bias-a-matrix": (lambda g: {"bias": g.real([[1.0]])}, ("bias", "(1, 1)")),
    "objective-a-name": (lambda g: {"objective": "InfoNCE"}, ("objective", "InfoNCE")),
    "objective-not-called": (lambda g: {"objective": nibs.InfoNCE}, ("objective", "InfoNCE()")),
    "targets-too-short": (lambda g: {"targets": g.whole(np.zeros(N - 1))}, ("targets", "(5,)", "(6,)")),
    "targets-of-floats": (lambda g: {"targets": g.real(np.zeros(N))}, ("targets", "float32", "integers")),
    "targets-a-list": (lambda g: {"targets": [0] * N}, ("targets", "list")),
    "targets-too-large": (lambda g: {"targets": g.whole([0, 1, 2, M, 4, 5])}, ("targets[3]", "8", "0 to 7", "-1")),
    "targets-too-small": (lambda g: {"targets": g.whole([0, 1, -2, 3, 4, 5])}, ("targets[2]", "-2")),
    "targets-far-out": (lambda g: {"targets": g.whole([0, 1, 2, 3, 4, 2**40])}, ("targets[5]", str(2**40))),
    "no-targets-and-too-few-keys": (lambda g: {"keys": g.rows(np.ones((N - 1, D)))}, ("targets=None", "6", "5")),
    "ids-missing": (lambda g: {"objective": nibs.InfoNCE(same_id="exclude")}, ("query_ids", "None", "exclude")),
    "key-ids-missing": (
        lambda g: {"objective": nibs.Sigmoid("positive"), "query_ids": g.whole(np.zeros(N))},
        ("key_ids", "None", "positive"),
    ),
    "query-ids-too-long": (
        lambda g: {
            "objective": nibs.InfoNCE(same_id="exclude"),
            "query_ids": g.whole(np.zeros(M)),
            "key_ids": g.whole(np.zeros(M)),
        },
        ("query_ids", "(8,)", "(6,)"),
    ),
    "key-ids-of-floats": (
        lambda g: {
            "objective": nibs.InfoNCE(same_id="exclude"),
            "query_ids": g.whole(np.zeros(N)),
            "key_ids": g.real(np.zeros(M)),
        },
        ("key_ids", "float32", "integers"),
    ),
    "query-mask-of-integers": (lambda g: {"query_mask": g.whole(np.ones(N))}, ("query_mask", "int64", "bool")),
    "key-mask-of-floats": (lambda g: {"key_mask": g.real(np.ones(M))}, ("key_mask", "float32", "bool")),
    "query-mask-too-long": (lambda g: {"query_mask": g.flags(np.ones(M))}, ("query_mask", "(8,)", "(6,)")),
    "key-mask-a-matrix": (lambda g: {"key_mask": g.flags(np.ones((N, M)))}, ("key_mask", "(6, 8)", "(8,)")),
    "weights-below-zero": (lambda g: {"weights": g.real([1, 1, -0.5, 1, 1, 1])}, ("weights[2]", "-0.5", ">= 0")),
    "weights-nan": (lambda g: {"weights": g.real([1, np.nan, 1, 1, 1, 1])}, ("weights[1]", "nan")),
    "weights-infinite": (lambda g: {"weights": g.real([np.inf, 1, 1, 1, 1, 1])}, ("weights[0]", "inf")),
    "weights-of-integers": (lambda g: {"weights": g.whole(np.ones(N))}, ("weights", "int64", "floats")),
    "weights-too-long": (lambda g: {"weights": g.real(np.ones(M))}, ("weights", "(8,)", "(6,)")),
    "reduction-unknown": (lambda g: {"reduction": "average"}, ("reduction='average'", "'mean'", "'sum'", "'none'")),
    "reduction-a-list": (lambda g: {"reduction": ["mean"]}, ("reduction",)),
    "grad-reduction-unknown": (lambda g: {"grad_reduction": "avg"}, ("grad_reduction='avg'", "'mean'")),
    "precision-unknown": (lambda g: {"precision": "tf32"}, ("precision='tf32'", "'high'", "'highest'")),
    "wrt-unknown": (lambda g: {"wrt": ("queries", "kyes")}, ("wrt", "kyes", "'keys'")),
    "wrt-a-number": (lambda g: {"wrt": 3}, ("wrt", "3")),
    "memory-of-text": (lambda g: {"memory": "plenty"}, ("memory='plenty'", "512MiB")),
    "memory-below-zero": (lambda g: {"memory": -5}, ("memory=-5", "positive")),
    "memory-true": (lambda g: {"memory": True}, ("memory=True",)),
    "plan-of-numbers": (lambda g: {"plan": (64, 64)}, ("plan", "nibs.plan")),
    "plan-and-memory": (
        lambda g: {"memory": "1GiB", "plan": nibs.plan(N, M, D)},
        ("memory=", "plan=", "one of them"),
    ),
    "stats-of-text": (lambda g: {"stats": "yes"}, ("stats='yes'", "True or False")),
    "option-unknown": (lambda g: {"temperature": 0.07}, ("temperature", "scale")),
    "exclude-self-of-two-sets": (
        lambda g: {"objective": nibs.InfoNCE(exclude_self=True), "targets": g.whole([1, 2, 3, 4, 5, 0])},
        ("exclude_self", "6", "8"),
    ),
    "exclude-self-without-targets": (
        lambda g: {"objective": nibs.InfoNCE(exclude_self=True), "keys": g.queries},
        ("targets=None", "exclude_self"),
    ),
    "exclude-self-and-own-positive": (
        lambda g: {
            "objective": nibs.InfoNCE(exclude_self=True),
            "keys": g.queries,
            "targets": g.whole([1, 2, 3, 4, 4, 0]),
        },
        ("targets[4]", "exclude_self"),
    ),
    "none-without-designated-positives": (
        lambda g: {
            "objective": nibs.InfoNCE(same_id="positive"),
            "query_ids": g.whole(np.zeros(N)),
            "key_ids": g.whole(np.zeros(M)),
            "reduction": "none",
        },
        ("reduction='none'", "targets"),
    ),
}


def _strange_targets() -> Any:
    return type("Stranger", (), {"__module__": "strange", "shape": (N,), "dtype": "int64", "device": "cpu"})()


def read(error: BaseException, words: tuple[str, ...]) -> None:
    message = str(error)
    missing = [word for word in words if word not in message]
    assert not missing, f"the message does not say {missing}: {message}"


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_argument_is_named(subject: Subject, name: str) -> None:
    given = Given(subject)
    change, words = BAD[name]
    arguments = {"queries": given.queries, "keys": given.keys, **change(given)}
    with pytest.raises(InvalidInput) as refused:
        nibs.contrastive_loss(backend=subject.name, **arguments)
    read(refused.value, words)
    if name != "none-without-designated-positives":
        with pytest.raises(InvalidInput):
            nibs.contrastive_loss_and_grad(backend=subject.name, **arguments)


def test_mixed_dtypes_are_named(subject: Subject) -> None:
    given = Given(subject)
    if len(given.dtypes) < 2:
        pytest.skip(f"{subject.name}: it takes {given.dtypes[0]} alone")
    keys = given.rows(np.ones((M, D)), given.dtypes[1])
    with pytest.raises(InvalidInput) as refused:
        nibs.contrastive_loss(given.queries, keys, backend=subject.name)
    read(refused.value, ("queries", given.dtypes[0], "keys", given.dtypes[1], "one dtype"))


def test_queries_of_no_framework_are_named(subject: Subject) -> None:
    given = Given(subject)
    with pytest.raises(InvalidInput) as refused:
        nibs.contrastive_loss([[1.0] * D] * N, given.keys, backend=subject.name)
    read(refused.value, ("queries", "list"))
    with pytest.raises(BackendUnavailable) as unknown:
        nibs.contrastive_loss(given.stranger(), given.keys, backend=subject.name)
    read(unknown.value, ("queries", "strange.Stranger"))


def test_n_values_have_no_one_gradient(subject: Subject) -> None:
    given = Given(subject)
    with pytest.raises(InvalidInput) as refused:
        nibs.contrastive_loss_and_grad(given.queries, given.keys, reduction="none", backend=subject.name)
    read(refused.value, ("reduction='none'", "contrastive_loss"))


@pytest.mark.parametrize(
    ("change", "words"),
    (
        ({"direction": "both"}, ("direction='both'", "'symmetric'")),
        ({"label_smoothing": 1.5}, ("label_smoothing=1.5", "[0, 1]")),
        ({"label_smoothing": float("nan")}, ("label_smoothing",)),
        ({"same_id": "drop"}, ("same_id='drop'", "'exclude'")),
        ({"exclude_self": 1}, ("exclude_self=1", "True or False")),
        ({"false_negative_margin": float("inf")}, ("false_negative_margin",)),
        ({"false_negative_margin": 0.1, "same_id": "positive"}, ("false_negative_margin", "same_id='positive'")),
    ),
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_objective_is_named(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput) as refused:
        nibs.InfoNCE(**change)
    read(refused.value, words)


def test_a_wrong_sigmoid_is_named() -> None:
    with pytest.raises(InvalidInput) as refused:
        nibs.Sigmoid("drop")  # type: ignore[arg-type]
    read(refused.value, ("Sigmoid", "same_id='drop'", "'exclude'"))


def test_a_refused_call_leaves_its_inputs_alone(subject: Subject) -> None:
    given = Given(subject)
    before = subject.numpy(given.queries).tobytes()
    with pytest.raises(InvalidInput):
        nibs.contrastive_loss(given.queries, given.keys, weights=given.real([-1.0] * N), backend=subject.name)
    assert subject.numpy(given.queries).tobytes() == before
