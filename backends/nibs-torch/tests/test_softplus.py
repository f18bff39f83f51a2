"""The sigmoid loss shares one logarithm among several pairs: as exact as one for each, in any range."""

from __future__ import annotations

import pytest
import torch

import nibs
from nibs_torch.tiles import TorchTiles

EVERYWHERE = [-80.0, -30.0, -10.0, -1.0, 0.0, 3.0, 10.0, 15.0, 40.0, 90.0, 300.0]


def error(logits, dtype=torch.float32, *, positives=True):
    """The relative error of the loss of `n` rows, each of whose logits, against `n` keys, are one of these numbers."""
    queries = torch.tensor(logits, dtype=dtype)[:, None]
    n = len(queries)
    targets = None if positives else torch.full((n,), -1)
    sigmoid = nibs.Sigmoid()
    plan = nibs.plan(n, n, 1, str(dtype).removeprefix("torch."), objective=sigmoid, key_tile=64)
    found = nibs.contrastive_loss(
        queries, torch.ones_like(queries), objective=sigmoid, targets=targets, reduction="sum", plan=plan
    )
    signed = queries.double().expand(n, n).clone()
    if positives:
        signed.diagonal().neg_()
    exact = torch.nn.functional.softplus(signed, threshold=1000.0).sum()
    return float(abs(found.double() - exact) / exact.clamp(min=torch.finfo(dtype).tiny))


@pytest.mark.parametrize("logit", EVERYWHERE)
@pytest.mark.parametrize("n", [1, 7, 64, 100])
@pytest.mark.parametrize("positives", [True, False])
def test_equal_logits_whose_roundings_all_agree(n, logit, positives):
    assert error([logit] * n, positives=positives) < 16 * 2**-24


def test_logits_of_all_sizes_at_once():
    assert error(EVERYWHERE * 9) < 16 * 2**-24


@pytest.mark.parametrize("logit", EVERYWHERE)
def test_float64_keeps_its_digits(logit):
    assert error([logit * 0.3] * 33, torch.float64) < 16 * 2**-53


def test_a_factor_that_is_rounded_beside_one_would_be_caught(monkeypatch):
    def bare(self, part, problem, values, permitted):
        factors = self._signed(part, problem, values).exp_().add_(1)
        return factors.log_().sum(1)

    monkeypatch.setattr(TorchTiles, "_softplus", bare)
    assert error([-10.0] * 64, positives=False) > 100 * 2**-24


def test_a_product_that_overflowed_would_be_caught(monkeypatch):
    monkeypatch.setattr(TorchTiles, "_own_softplus", TorchTiles._softplus)
    assert not error([40.0] * 64) < 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_nan_in_its_own_row_alone(bad):
    queries, keys = torch.ones(20, 3), torch.ones(20, 3)
    queries[4, 1] = bad
    plan = nibs.plan(20, 20, 3, objective=nibs.Sigmoid(), key_tile=8)
    values = nibs.contrastive_loss(queries, keys, objective=nibs.Sigmoid(), reduction="none", plan=plan)
    assert torch.equal(values.isnan(), torch.arange(20) == 4)
    assert values[torch.arange(20) != 4].isfinite().all()
