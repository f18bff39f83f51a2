"""A call that one tile holds gives what the schedule gives, and leaves to it whatever it cannot do."""

from __future__ import annotations

import pytest
import torch
from dense_torch import leaves

import nibs
from nibs.registry import registry
from nibs.request import make_request
from nibs_torch import whole as one_tile
from nibs_torch.whole import whole

OBJECTIVES = [nibs.InfoNCE(), nibs.InfoNCE("query_to_key"), nibs.InfoNCE("key_to_query"), nibs.Sigmoid()]
ROWS, KEYS, WIDTH = 40, 56, 12
WAYS = ["few", "many, in one strip", "many, in strips"]


def take(way, monkeypatch):
    monkeypatch.setattr(one_tile, "FEW", ROWS * KEYS if way == "few" else 0)
    monkeypatch.setattr(one_tile, "STRIP", 300 if way == "many, in strips" else ROWS * KEYS)


def asked(queries, keys, **options):
    return make_request(queries, keys, registry, **options)


def inputs(dtype=torch.float64):
    queries, keys, _ = (one.detach() for one in leaves(ROWS, KEYS, WIDTH, dtype))
    return queries, keys


def through_the_schedule(queries, keys, **options):
    plan = nibs.plan(ROWS, KEYS, WIDTH, str(queries.dtype).rpartition(".")[2], objective=options["objective"])
    return nibs.contrastive_loss_and_grad(queries, keys, plan=plan, **options)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("way", WAYS)
def test_it_gives_what_the_schedule_gives(monkeypatch, objective, reduction, way):
    take(way, monkeypatch)
    queries, keys = inputs()
    options = {"scale": 7.0, "bias": -2.0, "objective": objective, "reduction": reduction}
    expected, gradients = through_the_schedule(queries, keys, **options)
    found = whole(asked(queries, keys, **options), grad=True)
    assert found is not None
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)
    for name in ("queries", "keys", "scale", "bias"):
        torch.testing.assert_close(getattr(found[1], name), getattr(gradients, name), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wrt", [("queries",), ("keys", "scale"), ("scale",), ()], ids=repr)
@pytest.mark.parametrize("way", WAYS)
def test_it_computes_the_gradients_that_are_asked_for_and_no_other(monkeypatch, wrt, way):
    take(way, monkeypatch)
    queries, keys = inputs()
    _, gradients = whole(asked(queries, keys, scale=3.0, wrt=wrt), grad=True)
    assert tuple(name for name in ("queries", "keys", "scale", "bias") if getattr(gradients, name) is not None) == wrt


OPTIONS = {
    "targets": {"targets": torch.arange(ROWS)},
    "ids": {
        "query_ids": torch.arange(ROWS),
        "key_ids": torch.arange(KEYS),
        "objective": nibs.InfoNCE(same_id="exclude"),
    },
    "query_mask": {"query_mask": torch.ones(ROWS, dtype=torch.bool)},
    "key_mask": {"key_mask": torch.ones(KEYS, dtype=torch.bool)},
    "weights": {"weights": torch.ones(ROWS)},
    "reduction": {"reduction": "none"},
    "memory": {"memory": "64MiB"},
    "plan": {"plan": nibs.plan(ROWS, KEYS, WIDTH)},
    "stats": {"stats": True},
    "label_smoothing": {"objective": nibs.InfoNCE(label_smoothing=0.1)},
    "margin": {"objective": nibs.InfoNCE(false_negative_margin=0.1)},
    "same_id of the sigmoid": {
        "query_ids": torch.arange(ROWS),
        "key_ids": torch.arange(KEYS),
        "objective": nibs.Sigmoid(same_id="exclude"),
    },
    "a scale of zero": {"scale": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_it_leaves_every_option_to_the_schedule(options):
    assert whole(asked(*inputs(), **options), grad=True) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", [3, -1])  # the last key is nobody's
def test_a_row_that_is_not_finite_is_the_schedules(monkeypatch, objective, side, value, way, row):
    take(way, monkeypatch)
    rows = inputs(torch.float32)
    rows[0].abs_(), rows[1].abs_()
    rows[side][row, 2] = value  # with -inf all of its logits are -inf, and hide behind exp
    assert whole(asked(*rows, objective=objective), grad=True) is None


@pytest.mark.parametrize("objective", OBJECTIVES[:3], ids=repr)
def test_a_row_that_sinks_out_of_reach_of_a_shared_exponential_is_the_schedules(monkeypatch, objective):
    take("many, in one strip", monkeypatch)
    queries, keys = inputs(torch.float32)
    queries[5] *= 1000
    assert whole(asked(queries, keys, scale=50.0, objective=objective), grad=True) is None
    loss, gradients = nibs.contrastive_loss_and_grad(queries, keys, scale=50.0, objective=objective)
    exact, _ = nibs.contrastive_loss_and_grad(queries.double(), keys.double(), scale=50.0, objective=objective)
    assert abs(loss - exact) < 1e-5 * abs(exact)
    assert gradients.queries.isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES[:3], ids=repr)
def test_few_pairs_have_a_shift_for_each_row_and_none_sinks(objective):
    queries, keys = inputs(torch.float32)
    queries[5] *= 1000
    found = whole(asked(queries, keys, scale=50.0, objective=objective), grad=True)
    exact = whole(asked(queries.double(), keys.double(), scale=50.0, objective=objective), grad=True)
    assert abs(found[0] - exact[0]) < 1e-5 * abs(exact[0])
    assert abs(found[1].scale - exact[1].scale) < 1e-5 * abs(exact[1].scale)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("way", WAYS)
def test_a_logit_beyond_float32_is_the_schedules(monkeypatch, objective, way):
    take(way, monkeypatch)
    queries, keys = inputs(torch.float32)
    queries[3], keys[4] = 1e20, -1e20  # a product of -inf: no gradient but that of the scale would show it
    assert whole(asked(queries, keys, objective=objective), grad=True) is None


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_of_pairs_that_match_is_not_below_zero(monkeypatch, way):
    take(way, monkeypatch)
    rows = torch.nn.functional.normalize(inputs(torch.float32)[0], dim=-1)
    loss, _ = whole(asked(rows, rows, scale=1000.0), grad=True)
    assert 0.0 <= loss < 1e-6 and not loss.signbit()


@pytest.mark.parametrize("scale", [10.0, 300.0])
@pytest.mark.parametrize("way", WAYS)
def test_sigmoids_whose_exponentials_overflow_are_served(monkeypatch, way, scale):
    take(way, monkeypatch)
    queries, keys = (torch.nn.functional.normalize(rows, dim=-1) for rows in inputs(torch.float32))
    options = {"scale": scale, "bias": -1.0, "objective": nibs.Sigmoid()}
    loss, gradients = whole(asked(queries, keys, **options), grad=True)
    exact, right = through_the_schedule(queries.double(), keys.double(), **options)
    assert abs(loss - exact) < 1e-6 * exact
    torch.testing.assert_close(gradients.scale.double(), right.scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("way", WAYS)
def test_a_loss_of_nothing_has_no_sign(monkeypatch, objective, way):
    take(way, monkeypatch)
    rows = torch.eye(9)
    loss, _ = whole(asked(rows, rows, objective=objective, scale=2000.0, bias=-1000.0), grad=True)
    assert loss == 0.0 and not torch.signbit(loss)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("scale", [1e-5, 1e-12, 1e-19])
def test_a_tiny_scale_of_tiny_rows_has_its_gradient(objective, scale):
    queries, keys = (rows * 1e-12 for rows in inputs(torch.float32))
    _, found = nibs.contrastive_loss_and_grad(queries, keys, scale=torch.tensor(scale), objective=objective)
    exact = torch.tensor(scale).double()
    _, right = nibs.contrastive_loss_and_grad(queries.double(), keys.double(), scale=exact, objective=objective)
    largest = (queries.double() @ keys.double().T).abs().max()
    assert abs(found.scale - right.scale) < 8 * 2**-23 * largest


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_another_device_by_default_changes_nothing(objective):
    queries, keys = inputs()
    expected = whole(asked(queries, keys, objective=objective), grad=True)
    with torch.device("meta"):
        found = whole(asked(queries, keys, objective=objective), grad=True)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1].keys, expected[1].keys)
