"""How many matrix products a call costs, counted by the profiler: the yardstick of its speed."""

from __future__ import annotations

import pytest
import torch
from dense_torch import leaves

import nibs

N, M, D = 96, 128, 24  # rows of queries and keys, and their width
FACTORS = {"aten::mm": slice(0, 2), "aten::addmm": slice(1, 3), "aten::addmm_": slice(1, 3)}
"""Operators of matrix products, and which of their arguments are the factors."""


def products(call) -> float:
    """Products of 2 n m d flops in `call`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    flops = 0
    for event in profile.events():
        if event.name in FACTORS:
            left, right = event.input_shapes[FACTORS[event.name]]
            flops += 2 * left[0] * left[1] * right[1]
    return flops / (2 * N * M * D)


def step(*, objective=None, dtype=torch.float32, frozen=(), **options):
    """A forward and a backward over tiles of 32 x 48, or by `options`."""
    queries, keys, scale = leaves(N, M, D, dtype)
    for name, tensor in (("queries", queries), ("keys", keys)):
        tensor.requires_grad_(name not in frozen)
    objective = objective or nibs.InfoNCE()

    def call():
        loss = nibs.contrastive_loss(queries, keys, scale=scale, objective=objective, **options)
        loss.sum().backward()

    return call


def planned(sweep, objective=None, dtype="float32"):
    return nibs.plan(N, M, D, dtype, objective=objective or nibs.InfoNCE(), sweep=sweep, query_tile=32, key_tile=48)


ONE_WAY = [nibs.InfoNCE("query_to_key"), nibs.InfoNCE("key_to_query")]


def test_the_symmetric_loss_costs_four_products():
    assert products(step(plan=planned("recompute"))) == 4


def test_the_symmetric_loss_costs_three_where_its_tiles_are_kept():
    assert products(step(plan=planned("keep"))) == 3


def test_a_budget_that_holds_the_tiles_keeps_them_unasked():
    assert products(step(memory="64MiB")) == 3


@pytest.mark.parametrize("objective", ONE_WAY, ids=lambda objective: objective.direction)
def test_one_direction_costs_three_products_where_a_strip_fits(objective):
    assert products(step(objective=objective, plan=planned("strip", objective))) == 3


@pytest.mark.parametrize("objective", ONE_WAY, ids=lambda objective: objective.direction)
def test_one_direction_costs_four_products_where_no_strip_fits(objective):
    assert products(step(objective=objective, plan=planned("recompute", objective))) == 4


def test_the_sigmoid_loss_costs_three_products():
    assert products(step(objective=nibs.Sigmoid(), plan=planned("single", nibs.Sigmoid()))) == 3


@pytest.mark.parametrize("frozen", ["queries", "keys"])
@pytest.mark.parametrize(("sweep", "full"), [("recompute", 4), ("keep", 3)])
def test_a_frozen_side_saves_a_product(frozen, sweep, full):
    assert products(step(frozen=(frozen,), plan=planned(sweep))) == full - 1


def test_a_scale_alone_costs_no_gradient_product():
    assert products(step(frozen=("queries", "keys"), plan=planned("recompute"))) == 2


@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.Sigmoid()], ids=["InfoNCE", "Sigmoid"])
def test_per_row_values_cost_four_products(objective):
    assert products(step(objective=objective, reduction="none")) == 4


def test_accumulators_that_do_not_fit_cost_a_fifth_product():
    assert products(step(dtype=torch.float16, plan=planned("split", dtype="float16"))) == 5


def test_a_loss_that_nobody_differentiates_costs_one_product():
    queries, keys, scale = leaves(N, M, D, torch.float32)
    with torch.no_grad():
        assert products(lambda: nibs.contrastive_loss(queries, keys, scale=scale)) == 1


def test_a_compiled_step_costs_as_much_as_an_eager_one():
    torch._dynamo.reset()
    plan = planned("recompute")
    function = torch.compile(
        lambda queries, keys: nibs.contrastive_loss(queries, keys, plan=plan), fullgraph=True, backend="aot_eager"
    )
    queries, keys, _ = leaves(N, M, D, torch.float32)
    function(queries, keys)  # traced here
    assert products(lambda: function(queries, keys).backward()) == 4
