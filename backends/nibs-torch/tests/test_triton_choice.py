"""Who computes the tiles: the fused kernels or the plain path; by the device, the environment or the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import nibs
from nibs.errors import InvalidInput, Unsupported
from nibs_torch import fused


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(2, 8, 4, generator=generator).to(dtype)
    return rows[0], rows[1]


def kernel_of(**options: Any) -> str:
    _, stats = nibs.contrastive_loss(*batch(), stats=True, **options)
    return stats.plan.kernel


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NIBS_TORCH_KERNEL", raising=False)


def test_a_cpu_takes_the_plain_path() -> None:
    assert kernel_of() == "torch"


def test_the_kernels_are_refused_by_name_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "interpreted", lambda: False)
    monkeypatch.setenv("NIBS_TORCH_KERNEL", "triton")
    with pytest.raises(Unsupported, match="NIBS_TORCH_KERNEL='triton'"):
        nibs.contrastive_loss(*batch())


def test_a_plan_that_names_the_kernels_is_refused_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "interpreted", lambda: False)
    plan = replace(nibs.plan(8, 8, 4), kernel="triton")
    with pytest.raises(Unsupported, match=r"plan\.kernel='triton'"):
        nibs.contrastive_loss(*batch(), plan=plan)


def test_a_plan_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBS_TORCH_KERNEL", "triton")
    assert kernel_of(plan=replace(nibs.plan(8, 8, 4), kernel="torch")) == "torch"


def test_no_plan_is_told_for_a_card_that_is_not_here() -> None:
    pytest.importorskip("triton", reason="without it every device takes the plain path's tiles")
    with pytest.raises(InvalidInput, match=r"device='cuda:63': PyTorch finds no such device here"):
        nibs.plan(8, 8, 4, backend="torch", device="cuda:63")


def test_a_name_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBS_TORCH_KERNEL", "trition")
    with pytest.raises(InvalidInput, match="expected one of torch, triton"):
        nibs.contrastive_loss(*batch())


def test_a_gpu_without_triton_keeps_the_plain_path_and_says_why_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    assert fused.kernel_for("cuda:0", "bfloat16") == "torch"
    monkeypatch.setenv("NIBS_TORCH_KERNEL", "triton")
    with pytest.raises(Unsupported, match="Triton is not installed"):
        fused.kernel_for("cuda:0", "bfloat16")


def test_float64_on_a_gpu_keeps_the_plain_path() -> None:
    assert fused.kernel_for("cuda:0", "float64") == "torch"


def test_a_gpu_that_is_too_old_keeps_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton's wheels are for Linux")
    monkeypatch.setattr(fused, "_too_old", lambda device: "it is too old")
    assert fused.kernel_for("cuda:0", "float16") == "torch"
    monkeypatch.setattr(fused, "_too_old", lambda device: None)
    assert fused.kernel_for("cuda:0", "float16") == "triton"
