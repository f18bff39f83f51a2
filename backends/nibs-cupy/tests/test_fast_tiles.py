"""The fast kernels as a backend: which calls they take, what the plan says of it, and the oracle's answers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import nibs
from nibs.errors import InvalidInput
from nibs_cupy.backend import CupyBackend
from nibs_cupy.device import Host

TAKEN = [nibs.InfoNCE(), nibs.InfoNCE(direction="query_to_key"), nibs.Sigmoid()]
LEFT = [nibs.InfoNCE(label_smoothing=0.1), nibs.InfoNCE(false_negative_margin=0.1)]
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
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("objective", TAKEN)
def test_a_fast_family_agrees_with_the_general_kernels(
    kernels: str, dtype: str, objective: nibs.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys = rows(dtype)
    options = dict(
        scale=14.3, bias=-5.0, objective=objective, plan=nibs.plan(150, 150, 40, query_tile=100, key_tile=90)
    )
    want, wanted = nibs.contrastive_loss_and_grad(queries, keys, **options, backend=serve(monkeypatch, "general"))
    got, given = nibs.contrastive_loss_and_grad(queries, keys, **options, backend=serve(monkeypatch, kernels))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(given.scale, wanted.scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(given.bias, wanted.bias, rtol=1e-5, atol=1e-6)
    for name in ("queries", "keys"):
        one, other = (np.asarray(getattr(each, name), np.float64) for each in (given, wanted))
        assert np.abs(one - other).max() <= 2.0**-7 * np.abs(other).max()


def kernel_of(monkeypatch: pytest.MonkeyPatch, kernels: str, dtype: str, objective: nibs.Objective) -> str:
    """The name of the kernels that ran, from the plan of a call."""
    ran = []
    made = CupyBackend._call

    def call(self, request, **how):
        ran.append(made(self, request, **how))
        return ran[-1]

    monkeypatch.setattr(CupyBackend, "_call", call)
    nibs.contrastive_loss_and_grad(*rows(dtype), objective=objective, backend=serve(monkeypatch, kernels))
    return ran[0].plan.kernel


@pytest.mark.parametrize("objective", TAKEN)
def test_the_plan_names_the_family_that_ran(objective: nibs.Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_of(monkeypatch, "ampere", "bfloat16", objective) == "ampere"


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
