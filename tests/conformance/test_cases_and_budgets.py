"""The cases are what the suite promises, and the budgets are neither generous nor mean."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nibs.capabilities import FEATURES
from nibs_conformance.cases import CASES, DTYPES
from nibs_conformance.checks import budget, finite, truth
from nibs_conformance.oracle import solve
from nibs_conformance.tolerances import budget_of, store

PROMISED = {
    "one-pair",
    "nothing-divides",
    "equal-rows",
    "zero-rows",
    "scale-100-near",
    "scale-200",
    "one-row-20-times-longer",
    "unnormalised-30",
    "far-beyond-exp",
    "negative-scale",
    "temperature-0.005",
    "all-but-one-masked",
    "nan-where-masked",
    "every-other-row",
    "transposed",
    "a-row-without-positives",
    "duplicate-targets",
    "ids-that-collide-in-32-bits",
    "ids-near-2-to-40",
    "nan-in-queries",
    "inf-in-keys",
    "empty",
}

TELLING = [
    name for name, case in CASES.items() if case.group in ("ordinary", "options") and finite(case.problem("float32"))
]


def test_the_promised_cases_are_there() -> None:
    assert CASES.keys() >= PROMISED


@pytest.mark.parametrize("name", CASES)
def test_a_cruel_case_says_which_fault_it_was_made_against(name: str) -> None:
    case = CASES[name]
    assert case.group in ("ordinary", "options", "cruel")
    assert case.fault or case.group != "cruel"


def test_every_feature_of_a_call_is_needed_by_some_case() -> None:
    elsewhere = {"autograd", "deterministic", "memory", "precision", "stats", "streaming", "traced", "uneven_shards"}
    assert set().union(*(case.features() for case in CASES.values())) == FEATURES.keys() - elsewhere


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_numbers_of_their_dtype(dtype: str) -> None:
    kinds = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    for case in CASES.values():
        rows = case.problem(dtype).queries
        with np.errstate(all="ignore"):
            assert np.array_equal(rows.astype(kinds[dtype]).astype(rows.dtype), rows, equal_nan=True), case.name


def test_a_case_is_drawn_alike_every_time_and_cannot_be_written_to() -> None:
    problem = CASES["symmetric"].problem("float32")
    assert problem is CASES["symmetric"].problem("float32")
    with pytest.raises(ValueError):
        problem.queries[0, 0] = 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_to_nearest_even(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(20000).astype(np.float32) * 2.0 ** np.arange(-10, 10).repeat(
        1000
    ).astype(np.float32)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    assert np.array_equal(store(values, dtype), values.astype(kind).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if finite(case.problem("float32"))])
def test_the_dense_loss_of_the_same_dtype_is_within_its_floor(name: str, dtype: str) -> None:
    # The floor alone, without the share that the dense computation's own error adds: the derivation holds.
    case = CASES[name]
    problem = case.problem(dtype)
    dense = solve(problem, work=np.float64 if dtype == "float64" else np.float32)
    want, allowed = truth(case, dtype), budget(case, dtype)
    for part in ("loss", "queries", "keys", "scale", "bias"):
        error = np.abs(getattr(dense, part).astype(float) - getattr(want, part).astype(float))
        limit = getattr(allowed, part)
        share = error.max(axis=1, keepdims=True, initial=0) if error.ndim == 2 else error
        assert (error <= np.maximum(limit - 4 * share, 0) + 1e-300).all(), part


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", TELLING)
def test_budgets_are_small_beside_what_they_judge(name: str, dtype: str) -> None:
    case = CASES[name]
    want, allowed = truth(case, dtype), budget(case, dtype)
    unit = 2.0**-53 if dtype == "float64" else 2.0**-24
    out = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype, unit)
    size = float(np.abs(want.loss).max())
    assert float(np.max(allowed.loss)) < 2000 * unit * max(size, 1.0)
    for part in ("queries", "keys"):
        largest = np.abs(getattr(want, part)).max()
        assert getattr(allowed, part).max() < (2000 * unit + 8 * (out > unit) * out) * largest, part
    assert float(allowed.scale) < 20000 * unit * max(abs(float(want.scale)), size, 1.0), (
        "the scale's gradient never sees half precision"
    )


def test_half_precision_rows_leave_the_loss_at_the_level_of_float32() -> None:
    case = CASES["symmetric"]
    assert float(budget(case, "bfloat16").loss) < 2 * float(budget(case, "float32").loss)


def test_a_coarse_multiplier_widens_the_budget_of_float32_alone() -> None:
    case = CASES["symmetric"]
    for dtype, wider in (("float32", True), ("float64", False), ("bfloat16", False)):
        fine, coarse = (
            budget_of(case.problem(dtype), dtype, truth(case, dtype), coarse=flag) for flag in (False, True)
        )
        assert (float(coarse.loss) > 10 * float(fine.loss)) is wider, dtype
