"""A call that is known from one before gives what it would have given; what is wrong is refused after it as before."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

import nibs
from nibs import dispatch
from nibs.errors import InvalidInput, UnknownBackend, Unsupported
from nibs.registry import registry


def rows(n=6, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 4)).astype(dtype)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(dispatch, "_calls", {})


@pytest.fixture
def checks(monkeypatch):
    """How often a request was made from the start."""
    made = []
    real = dispatch.make_request
    monkeypatch.setattr(dispatch, "make_request", lambda *args, **options: made.append(1) or real(*args, **options))
    return made


def test_a_call_like_one_before_is_not_checked_again_and_has_its_own_values(checks):
    for seed, scale in ((1, 2.0), (2, 3.0)):
        queries, keys = rows(seed=seed), rows(seed=seed + 10)
        logits = scale * queries.astype(float) @ keys.T
        dense = np.log(np.exp(logits).sum(1)) + np.log(np.exp(logits).sum(0)) - 2 * np.diag(logits)
        assert nibs.contrastive_loss(queries, keys, scale=scale) == pytest.approx(dense.mean() / 2, rel=1e-6)
    assert len(checks) == 1


OTHERS = {
    "rows": lambda: nibs.contrastive_loss(rows(7), rows(7)),
    "keys": lambda: nibs.contrastive_loss(rows(), rows(7)),
    "dtype": lambda: nibs.contrastive_loss(rows(dtype=np.float64), rows(dtype=np.float64)),
    "class": lambda: nibs.contrastive_loss(torch.tensor(rows()), torch.tensor(rows())),
    "option": lambda: nibs.contrastive_loss(rows(), rows(), reduction="sum"),
    "objective": lambda: nibs.contrastive_loss(rows(), rows(), objective=nibs.Sigmoid()),
    "backend": lambda: nibs.contrastive_loss(rows(), rows(), backend="numpy"),
    "scale": lambda: nibs.contrastive_loss(rows(), rows(), scale=np.ones(1, np.float32)),
    "integer": lambda: nibs.contrastive_loss(rows(), rows(), scale=2),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_a_call_with_another_fact_is_checked(checks, other):
    nibs.contrastive_loss(rows(), rows())
    other()
    assert len(checks) == 2


WRONG = {
    "keys of another width": ({}, (rows(), rows()[:, :3])),
    "1 where True is right": ({"stats": 1}, None),
    "an option that there is not": ({"temperature": 1.0}, None),
    "True for a scale": ({"scale": True}, None),
    "too large a number": ({"scale": 10**400}, None),
    "a list": ({}, (rows().tolist(), rows())),
    "two classes": ({}, (rows(), torch.tensor(rows()))),
    "two dtypes": ({}, (rows(), rows(dtype=np.float64))),
    "what does not hash": ({"wrt": (["queries"],)}, None),
    "no name": ({"backend": ""}, None),
    "an array for a name": ({"backend": np.ones(3)}, None),
}


@pytest.mark.parametrize(("options", "arrays"), WRONG.values(), ids=WRONG.keys())
def test_what_is_refused_is_refused_after_a_call_that_was_right(options, arrays):
    for right in ({}, {"stats": True}, {"scale": 1.0}, {"scale": 1}):
        nibs.contrastive_loss(rows(), rows(), **right)
    for _ in range(2):
        with pytest.raises(InvalidInput):
            nibs.contrastive_loss(*(arrays or (rows(), rows())), **options)


def test_values_are_checked_in_every_call_that_brings_some():
    targets = np.arange(6)
    nibs.contrastive_loss(rows(), rows(), targets=targets)
    with pytest.raises(InvalidInput, match=r"targets\[0\] = 9"):
        nibs.contrastive_loss(rows(), rows(), targets=np.where(targets == 0, 9, targets))


def test_a_backend_that_is_chosen_around_the_call_is_asked(monkeypatch):
    nibs.contrastive_loss(rows(), rows())
    monkeypatch.setenv("NIBS_BACKEND", "nobody")
    with pytest.raises(UnknownBackend):
        nibs.contrastive_loss(rows(), rows())


def test_what_a_backend_claims_now_counts(monkeypatch):
    nibs.contrastive_loss(rows(), rows())
    status = registry._statuses["numpy"]
    claims = replace(status.info.capabilities, dtypes=frozenset({"float64"}))
    info = replace(status.info, capabilities=claims)
    monkeypatch.setitem(registry._statuses, "numpy", replace(status, info=info))
    with pytest.raises(Unsupported):
        nibs.contrastive_loss(rows(), rows())


def test_mixed_dtypes_are_refused_again_outside_autocast():
    half, single = torch.tensor(rows()).bfloat16(), torch.tensor(rows())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nibs.contrastive_loss(half, single)
    with pytest.raises(InvalidInput, match="under autocast only"):
        nibs.contrastive_loss(half, single)


def test_no_array_is_kept_and_no_more_calls_than_are_said(monkeypatch):
    monkeypatch.setattr(dispatch, "MOST", 3)
    queries, keys, scale = torch.tensor(rows()), torch.tensor(rows()), torch.tensor(2.0)
    gone = [weakref.ref(one) for one in (queries, keys, scale)]
    nibs.contrastive_loss(queries, keys, scale=scale)
    del queries, keys, scale
    gc.collect()
    assert not any(one() is not None for one in gone)
    for n in range(1, 9):
        nibs.contrastive_loss(rows(n), rows(n))
    assert 1 <= len(dispatch._calls) <= 3
