"""What a call on a GPU does to the host, and what it launches, seen on a pretended card: see pretended_gpu.py."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from pretended_gpu import CARDS, Operators, Waited, calls, held
from triton.tools.tensor_descriptor import TensorDescriptor

import nibs
from nibs.plan import ACCELERATOR_BUDGET
from nibs_torch import backend, plugin

N, M, D = 1000, 1200, 96
INFONCE = nibs.InfoNCE()


def rows(n: int, dtype: torch.dtype = torch.bfloat16, d: int = D) -> Any:
    return torch.empty(n, d, dtype=dtype, device="cuda", requires_grad=True)


def vector(n: int, dtype: torch.dtype) -> Any:
    return torch.empty(n, dtype=dtype, device="cuda")


CALLS: dict[str, Any] = {
    "symmetric": lambda: {},
    "scale": lambda: {"scale": torch.empty((), device="cuda", requires_grad=True)},
    "scale of one element": lambda: {"scale": torch.empty(1, device="cuda", requires_grad=True)},
    "one way": lambda: {"objective": nibs.InfoNCE("query_to_key")},
    "the other way": lambda: {"objective": nibs.InfoNCE("key_to_query")},
    "smoothing": lambda: {"objective": nibs.InfoNCE(label_smoothing=0.1)},
    "margin": lambda: {"objective": nibs.InfoNCE(false_negative_margin=0.1)},
    "masks": lambda: {"query_mask": vector(N, torch.bool), "key_mask": vector(M, torch.bool)},
    "targets and weights": lambda: {"targets": vector(N, torch.int64), "weights": vector(N, torch.float32)},
    "same id excluded": lambda: {
        "objective": nibs.InfoNCE(same_id="exclude"),
        "query_ids": vector(N, torch.int64),
        "key_ids": vector(M, torch.int64),
    },
    "same id positive": lambda: {
        "objective": nibs.InfoNCE(same_id="positive"),
        "query_ids": vector(N, torch.int64),
        "key_ids": vector(M, torch.int64),
    },
    "sum": lambda: {"reduction": "sum"},
    "none": lambda: {"reduction": "none"},
    "sigmoid": lambda: {"objective": nibs.Sigmoid(), "bias": torch.empty((), device="cuda", requires_grad=True)},
    "sigmoid of masks": lambda: {"objective": nibs.Sigmoid(), "key_mask": vector(M, torch.bool)},
}


OTHERS = [("symmetric", torch.float16), ("masks", torch.float16), ("none", torch.float32), ("sigmoid", torch.float32)]


@pytest.mark.parametrize("name, dtype", [*((name, torch.bfloat16) for name in CALLS), *OTHERS], ids=str)
def test_nothing_in_a_step_waits_for_the_device(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with calls(CARDS["sm_90"], monkeypatch) as launches:
        nibs.contrastive_loss(rows(N, dtype), rows(M, dtype), **CALLS[name]())
    assert {"lse", "sigmoid"} & {one.name for one in launches}


@pytest.mark.parametrize("name", [name for name in CALLS if name != "none"])
def test_nothing_in_loss_and_grad_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with calls(CARDS["sm_90"], monkeypatch), torch.no_grad():
        _, grads = nibs.contrastive_loss_and_grad(rows(N), rows(M), **CALLS[name]())
        assert grads.queries.dtype == torch.bfloat16


def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans of calls from here on, as they come."""
    plans: list[Any] = []
    real = backend.Call

    def call(request: Any, tiles: Any, plan: Any, ring: Any, **options: Any) -> Any:
        plans.append(plan)
        return real(request, tiles, plan, ring, **options)

    monkeypatch.setattr(backend, "Call", call)
    return plans


BUDGETS: dict[str, tuple[int, int, str | None, torch.dtype]] = {
    "large": (65_536, 768, None, torch.bfloat16),
    "cut off": (16_400, 768, None, torch.bfloat16),
    "kept": (4096, 768, None, torch.bfloat16),
    "by a budget": (1536, 64, "2MiB", torch.bfloat16),
    "rounded to tf32": (9000, 2048, "64MiB", torch.float32),
}


@pytest.mark.parametrize(
    "name", ["symmetric", "one way", "smoothing", "masks", "same id excluded", "same id positive", "sigmoid"]
)
@pytest.mark.parametrize("n, d, memory, dtype", list(BUDGETS.values()), ids=list(BUDGETS))
def test_a_call_holds_no_more_than_its_plan_says(
    n: int, d: int, memory: str | None, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = planned(monkeypatch)
    monkeypatch.setattr(sys.modules[__name__], "N", n)
    monkeypatch.setattr(sys.modules[__name__], "M", n)
    with held(CARDS["sm_90"], monkeypatch) as seen, torch.no_grad():
        sides, options = (rows(n, dtype, d), rows(n, dtype, d)), CALLS[name]()
        before = seen.now()
        nibs.contrastive_loss_and_grad(*sides, **options, memory=memory, precision="high")
        gradients = sum(one.nbytes for one in sides)
    (plan,) = plans
    assert seen.peak - before - gradients <= plan.memory
    assert plan.kernel == "triton"


TOLD: dict[str, tuple[bool, int, int, str | None]] = {
    "large": (True, 65_536, 768, None),
    "large, loss and grad": (False, 65_536, 768, None),
    "held by a budget": (True, 16_400, 1024, "200MiB"),
    "gradients that wait": (True, 4000, 768, "20MiB"),
    "gradients that wait, where logits would fit": (True, 300, 1024, "2300KiB"),
    "loss and grad in as little": (False, 4000, 768, "20MiB"),
}


@pytest.mark.parametrize("name", ["symmetric", "smoothing", "masks", "sigmoid"])
@pytest.mark.parametrize("autograd, n, d, memory", list(TOLD.values()), ids=list(TOLD))
def test_the_planner_tells_the_plan_that_a_call_runs_under(
    autograd: bool, n: int, d: int, memory: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = planned(monkeypatch)
    monkeypatch.setattr(sys.modules[__name__], "N", n)
    monkeypatch.setattr(sys.modules[__name__], "M", n)
    call = nibs.contrastive_loss if autograd else nibs.contrastive_loss_and_grad
    with calls(CARDS["sm_90"], monkeypatch) as launches:
        options = CALLS[name]()
        told = nibs.plan(
            *(n, n, d, "bfloat16"),
            objective=options.get("objective", INFONCE),
            memory=memory,
            masked=name == "masks",
            backend="torch",
            device="cuda",
            autograd=None if autograd else False,
        )
        call(
            rows(n, d=d),
            rows(n, d=d),
            scale=torch.ones((), device="cuda", requires_grad=True),
            memory=memory,
            **options,
        )
    tiles = {(one.named["rows"], one.named["columns"]) for one in launches if one.name in ("weights", "sigmoid")}
    assert told == plans[-1]
    assert (told.query_tile, told.key_tile) in tiles


@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.InfoNCE(label_smoothing=0.1), nibs.Sigmoid()], ids=str)
@pytest.mark.parametrize("d", [64, 256])
def test_narrow_rows_whose_products_fill_no_wave_take_most_of_their_budget(
    d: int, objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with calls(CARDS["sm_90"], monkeypatch):
        plan = nibs.plan(65_536, 65_536, d, "bfloat16", objective=objective, backend="torch", device="cuda")
    assert 0.9 < plan.workspace / ACCELERATOR_BUDGET <= 1


@pytest.mark.parametrize("direction", ["symmetric", "query_to_key"])
def test_a_large_batch_takes_few_launches_and_its_lse_no_more_memory(
    direction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with calls(CARDS["sm_90"], monkeypatch) as launches:
        nibs.contrastive_loss(rows(65_536, d=768), rows(65_536, d=768), objective=nibs.InfoNCE(direction))
        found = [one for one in launches if one.name == "lse"]
        sums = [sum(one.nbytes for one in launch.arguments if isinstance(one, torch.Tensor)) for launch in found]
    (weights,) = {one.named["rows"] for one in launches if one.name == "weights"} - {65_536 % 11_008}
    assert weights == 11_008
    assert len(found) == 6
    assert sum(one.name == "weights" for one in launches) == 36
    # A launch is given the rows, which are no workspace, and one set of sums; own shifts are as many again.
    assert 2 * (max(sums) - (65_536 + weights) * 768 * 2) <= weights**2 * 2


PRODUCTS = ["addmm", "addmm"]


@pytest.mark.parametrize(
    "objective, kernels",
    [
        (nibs.InfoNCE(), ["spans", "weights", "wide", *PRODUCTS, "tally"]),
        (nibs.Sigmoid(), ["sigmoid", "fold", *PRODUCTS, "tally"]),
    ],
    ids=["infonce", "sigmoid"],
)
def test_a_macro_tile_of_a_gradient_takes_few_launches(
    objective: Any, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with calls(CARDS["sm_90"], monkeypatch) as launches, Operators(launches) as operators:
        scale, bias = (torch.empty((), device="cuda", requires_grad=True) for _ in range(2))
        nibs.contrastive_loss(rows(65_536, d=768), rows(65_536, d=768), scale=scale, bias=bias, objective=objective)
    first, *_, last = (place for place, name in enumerate(operators.seen) if name == kernels[0])
    assert operators.seen[last : last + len(kernels)] == kernels
    assert last - first == 35 * len(kernels) + 1  # zeros, for the tally to begin with
    assert "mul_" not in operators.seen  # no pass over a gradient but the one that rounds it


@pytest.mark.parametrize("objective, kernel", [(nibs.InfoNCE(), "lse"), (nibs.Sigmoid(), "sigmoid")])
def test_a_step_launches_little_before_its_first_tile(
    objective: Any, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with calls(CARDS["sm_90"], monkeypatch) as launches, Operators(launches) as operators:
        nibs.contrastive_loss(rows(N), rows(N), objective=objective, bias=-10.0)
    assert operators.seen.index(kernel) <= 15  # zeros, mostly


def test_the_suite_has_a_meter_for_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([100, 700])
    for name, found in {"synchronize": None, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(held))
    meter = plugin.nibs_conformance_memory(backend="torch", device="cuda:0")
    assert meter(lambda: None) == 600
    assert plugin.nibs_conformance_memory(backend="torch", device="cpu") is None


VIEWS: dict[str, tuple[Any, bool]] = {
    "rows": (lambda: rows(N), True),
    "rows on 16-byte steps": (lambda: rows(N, d=2 * D)[:, :D], True),
    "rows on odd steps": (lambda: rows(N, d=D + 1), False),
    "rows on odd steps, cut": (lambda: rows(N, d=D + 1)[:, :D], False),
    "every other column": (lambda: rows(N, d=2 * D)[:, ::2], False),
    "transposed": (lambda: rows(D, d=N).T, False),
    "one row again and again": (lambda: rows(1).expand(N, D), False),
}


@pytest.mark.parametrize("name", list(VIEWS))
def test_the_copy_engine_is_given_only_rows_that_it_can_fetch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, fetched = VIEWS[name]
    with calls(CARDS["sm_90"], monkeypatch) as launches, torch.no_grad():
        queries = make()
        nibs.contrastive_loss_and_grad(queries, rows(M, d=queries.shape[1]))
    (first,) = [one for one in launches if one.name == "lse"]
    assert isinstance(first.arguments[0], TensorDescriptor) == first.named["DESC"] == fetched


def test_a_look_at_a_value_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with calls(CARDS["sm_90"], monkeypatch), pytest.raises(Waited):
        bool((vector(3, torch.float32) > 0).any())


def test_a_number_that_is_copied_to_the_device_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with calls(CARDS["sm_90"], monkeypatch), pytest.raises(Waited):
        torch.tensor(1.0, device="cuda")


def test_a_mask_as_an_index_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with calls(CARDS["sm_90"], monkeypatch), pytest.raises(Waited):
        torch.ops.aten.index.Tensor(vector(3, torch.float32), [vector(3, torch.bool)])
