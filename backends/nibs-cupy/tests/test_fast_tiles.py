"""The fast kernels as a backend: which calls they take, what the plan says of it, and the oracle's answers."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

import nibs
from nibs.errors import InvalidInput
from nibs_conformance import memory
from nibs_conformance.cases import CASES
from nibs_conformance.checks import budget, truth
from nibs_cupy.backend import CupyBackend
from nibs_cupy.device import Host
from nibs_cupy.fast import FastKernels, why_not
from nibs_cupy.fast_tiles import FastTiles

TAKEN = [nibs.InfoNCE(), nibs.InfoNCE(direction="query_to_key"), nibs.Sigmoid()]
LEFT = [nibs.InfoNCE(label_smoothing=0.1), nibs.InfoNCE(false_negative_margin=0.1)]
VECTORS = ("targets", "query_ids", "key_ids", "query_mask", "key_mask", "weights")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def serve(monkeypatch: pytest.MonkeyPatch, kernels: str) -> str:
    from nibs.capabilities import BackendInfo
    from nibs.registry import Status, registry
    from nibs_cupy.plugin import capabilities

    registry.statuses()
    name, backend = "cupy-on-host", CupyBackend(Host(), kernels)
    info = BackendInfo(name, (), capabilities("host"), lambda: backend)
    monkeypatch.setitem(registry._statuses, name, Status(name, "ready", "", "tests", info))
    monkeypatch.setitem(registry._backends, name, backend)
    return name


def rows(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    queries = random.standard_normal((150, 40))
    keys = queries + 0.5 * random.standard_normal((150, 40))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, keys)]
    return unit[0].astype(DTYPES[dtype]), unit[1].astype(DTYPES[dtype])


@pytest.mark.parametrize("kernels", ["ampere", "hopper"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", TAKEN)
def test_a_fast_family_agrees_with_the_general_kernels(
    kernels: str, dtype: str, objective: nibs.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys = rows(dtype)
    random = np.random.default_rng(4)
    options = dict(scale=14.3, bias=-5.0, objective=objective, precision="high", weights=random.random(150))
    options |= dict(query_mask=random.random(150) > 0.1, plan=nibs.plan(150, 150, 40, query_tile=100, key_tile=90))
    want, wanted = nibs.contrastive_loss_and_grad(queries, keys, **options, backend=serve(monkeypatch, "general"))
    got, given = nibs.contrastive_loss_and_grad(queries, keys, **options, backend=serve(monkeypatch, kernels))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(given.scale, wanted.scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(given.bias, wanted.bias, rtol=1e-5, atol=1e-6)
    for name in ("queries", "keys"):
        one, other = (np.asarray(getattr(each, name), np.float64) for each in (given, wanted))
        assert np.abs(one - other).max() <= 2.0**-7 * np.abs(other).max()


@pytest.mark.parametrize("kernels", ["general", "ampere", "hopper"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("objective", [*TAKEN, LEFT[0], nibs.InfoNCE(same_id="exclude")], ids=repr)
@pytest.mark.parametrize("memory", [None, "2MiB"])
def test_the_planner_tells_the_plan_that_a_call_runs_under(
    kernels: str, dtype: str, objective: nibs.Objective, memory: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = serve(monkeypatch, kernels)
    options = {"objective": objective, "memory": memory, "backend": backend}
    ids = {}
    if objective.same_id == "exclude":
        ids = dict(query_ids=np.arange(150) // 3, key_ids=np.arange(150) // 3)
    told = nibs.plan(150, 150, 40, dtype, **options)
    _, _, stats = nibs.contrastive_loss_and_grad(*rows(dtype), **options, **ids, stats=True)
    assert told == stats.plan
    assert told.kernel not in ("ampere", "hopper") or told.sweep in ("recompute", "single")  # which keep no logits


@pytest.mark.parametrize("kernels", ["ampere", "hopper"])
@pytest.mark.parametrize("objective", [*TAKEN, nibs.InfoNCE(same_id="exclude")])
def test_stats_come_from_the_same_tiles(
    kernels: str, objective: nibs.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys = rows("bfloat16")
    random, ids = np.random.default_rng(4), {}
    if objective.same_id == "exclude":
        ids = dict(query_ids=np.arange(150) // 3, key_ids=np.arange(150) // 3)
    options = dict(scale=14.3, bias=-5.0, objective=objective, query_mask=random.random(150) > 0.1, stats=True, **ids)
    options |= dict(key_mask=random.random(150) > 0.1, plan=nibs.plan(150, 150, 40, query_tile=100, key_tile=140))
    options |= dict(wrt=("queries", "keys", "bias"))  # hopper's own sigmoid, too
    *_, want = nibs.contrastive_loss_and_grad(queries, keys, **options, backend=serve(monkeypatch, "general"))
    *_, got = nibs.contrastive_loss_and_grad(queries, keys, **options, backend=serve(monkeypatch, kernels))
    assert got.plan.kernel == kernels and (got.count, got.top1) == (want.count, want.top1)
    for name in ("mean_positive", "mean_negative", "hardest_negative", "mean_lse"):
        if (right := getattr(want, name)) is not None:
            assert getattr(got, name) == pytest.approx(right, rel=2e-6, abs=2e-6), name


def kernel_of(
    monkeypatch: pytest.MonkeyPatch, kernels: str, dtype: str, objective: nibs.Objective, **options: object
) -> str:
    """The name of the kernels that ran, from the plan of a call."""
    ran = []
    made = CupyBackend._call

    def call(self, request, **how):
        ran.append(made(self, request, **how))
        return ran[-1]

    monkeypatch.setattr(CupyBackend, "_call", call)
    nibs.contrastive_loss_and_grad(*rows(dtype), objective=objective, backend=serve(monkeypatch, kernels), **options)
    return ran[0].plan.kernel


@pytest.mark.parametrize("objective", TAKEN)
def test_the_plan_names_the_family_that_ran(objective: nibs.Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_of(monkeypatch, "ampere", "bfloat16", objective) == "ampere"


@pytest.mark.parametrize("wrt, ran", [(None, "ampere"), (("queries", "keys", "bias"), "hopper")])
def test_where_the_sigmoids_scale_wants_a_gradient_the_plan_names_the_family_that_sums_for_it(
    wrt: tuple[str, ...] | None, ran: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernel_of(monkeypatch, "hopper", "bfloat16", nibs.Sigmoid(), wrt=wrt) == ran


@pytest.mark.parametrize(
    "precision, setting, ran",
    [
        ("default", False, "general"),
        ("default", True, "ampere"),  # CUPY_TF32=1
        ("high", False, "ampere"),
        ("highest", True, "general"),
    ],
)
def test_float32_goes_to_tensor_cores_where_tf32_is_allowed(
    precision: str, setting: bool, ran: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Host, "rounds_products", lambda self: setting)
    found = kernel_of(monkeypatch, "hopper", "float32", nibs.InfoNCE(), precision=precision)
    assert found.partition(",")[0] == ran


@pytest.mark.parametrize("objective", LEFT)
def test_what_a_family_does_not_take_goes_by_the_general_kernels_and_says_so(
    objective: nibs.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernel_of(monkeypatch, "ampere", "bfloat16", objective).startswith("general")


def test_without_being_asked_for_no_fast_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NIBS_CUPY_KERNELS", raising=False)
    assert CupyBackend(Host()).kernels == "general"


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(InvalidInput, match="expected general, ampere or hopper"):
        CupyBackend(Host(), "volta")


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 1.0, 3e38])
def test_what_lifts_float16_weights_and_its_inverse_are_numbers_however_small_the_weights(largest: float) -> None:
    tiles = FastTiles("float16", "default", Host(), "ampere", 2)
    (lift,) = tiles._lift(np.array([largest, 0], np.float32))
    assert np.isfinite([lift, 1 / lift]).all() and largest * float(lift) <= 2.0**12


# -- memory -----------------------------------------------------------------------------------------

SIZES, TILE = (192, 384, 576, 768), 96  # half the suite's, which looks at float32 alone
KINDS = [("ampere", "float32"), ("ampere", "bfloat16"), ("hopper", "float16")]


def peak(call: Callable[[], object]) -> int:
    """Bytes of NumPy's allocator, at most, beyond what was there."""
    gc.collect()
    tracemalloc.start()
    try:
        result = call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        del result


def prepared(
    name: str, dtype: str, n: int, d: int, objective: nibs.Objective, **options: object
) -> Callable[[], object]:
    random = np.random.default_rng(n)
    queries, keys = (random.standard_normal((2, n, d)) / 4).astype(DTYPES[dtype])
    if objective.same_id == "exclude":
        options |= dict(query_ids=np.arange(n) // 2, key_ids=np.arange(n) // 2)
    options |= dict(scale=5.0, objective=objective, precision="high", backend=name)
    return lambda: nibs.contrastive_loss_and_grad(queries, keys, **options)


def quadratic_share(monkeypatch: pytest.MonkeyPatch, kernels: str, dtype: str, objective: nibs.Objective) -> float:
    name, peaks = serve(monkeypatch, kernels), []
    prepared(name, dtype, 8, 16, objective)()  # what is set up once
    for n in SIZES:
        plan = nibs.plan(n, n, 16, dtype, objective=objective, query_tile=TILE, key_tile=TILE)
        peaks.append(peak(prepared(name, dtype, n, 16, objective, plan=plan)))
    assert peaks[-1] < SIZES[-1] ** 2
    return memory.law(SIZES, peaks)


@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.InfoNCE(same_id="exclude"), nibs.Sigmoid()])
@pytest.mark.parametrize(("kernels", "dtype"), KINDS)
def test_what_the_fast_path_holds_grows_linearly(
    kernels: str, dtype: str, objective: nibs.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quadratic_share(monkeypatch, kernels, dtype, objective) < 0.05


def test_weights_that_outlive_their_tile_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    made = FastKernels.weights

    def weights(self, *given, **how):
        held.append(made(self, *given, **how))
        return held[-1]

    monkeypatch.setattr(FastKernels, "weights", weights)
    with pytest.raises(AssertionError):
        assert quadratic_share(monkeypatch, "ampere", "bfloat16", nibs.InfoNCE()) < 0.05


@pytest.mark.parametrize("d", [1, 200])
@pytest.mark.parametrize("objective", [nibs.InfoNCE(same_id="exclude"), nibs.Sigmoid()])
@pytest.mark.parametrize(("kernels", "dtype"), KINDS)
def test_a_budget_holds_for_panels_and_parts_too(
    kernels: str, dtype: str, objective: nibs.Objective, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, n, budget = serve(monkeypatch, kernels), 600, 5 * 2**19 + 600 * d * 8
    prepared(name, dtype, 8, d, objective)()
    found = peak(prepared(name, dtype, n, d, objective, memory=budget))
    returned = 2 * n * d * np.dtype(DTYPES[dtype]).itemsize
    assert found <= budget + returned + 64 * 1024  # the interpreter's own


# -- float32 ------------------------------------------------------------------------------------------


def beyond_ieee(name: str, rounded: Callable[[np.ndarray], np.ndarray]) -> tuple[int, list[str]]:
    """How many of the suite's cases were run in float32, and which left the budgets of IEEE products."""
    count, beyond = 0, []
    for case in CASES.values():
        problem = case.problem("float32")
        taken = why_not("float32", "high", problem.objective) is None and problem.reduction != "none"
        if not taken or len(problem.queries) * len(problem.keys) > 2**16:
            continue
        options = {field: getattr(problem, field) for field in ("objective", "reduction", "scale", "bias", *VECTORS)}
        options = {field: np.array(value) if field in VECTORS and value is not None else value
                   for field, value in options.items()}  # fmt: skip
        sides = (rounded(np.array(side, np.float32)) for side in (problem.queries, problem.keys))
        loss, grads = nibs.contrastive_loss_and_grad(*sides, precision="high", backend=name, **options)
        want, allowed = truth(case, "float32"), budget(case, "float32")
        count += 1
        for what, got in (("loss", loss), ("queries", grads.queries), ("keys", grads.keys), ("scale", grads.scale)):
            right = np.asarray(getattr(want, what), np.float64)
            if np.isfinite(right).all() and (abs(np.asarray(got) - right) > getattr(allowed, what)).any():
                beyond.append(f"{case.name}: {what}")
    return count, beyond


@pytest.mark.filterwarnings("ignore:invalid value")
def test_float32_in_three_products_stays_within_the_budgets_of_ieee_products(monkeypatch: pytest.MonkeyPatch) -> None:
    count, beyond = beyond_ieee(serve(monkeypatch, "ampere"), lambda rows: rows)
    assert count > 80 and beyond == []


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_single_tf32_product_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def tf32(rows: np.ndarray) -> np.ndarray:
        return ((rows.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)

    count, beyond = beyond_ieee(serve(monkeypatch, "general"), tf32)
    assert len(beyond) > count // 2
