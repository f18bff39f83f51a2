"""Strips of a tile say what the tile says, and NumPy's settings are left as they were.

The suite's tiles are small: each is one strip.
"""

from __future__ import annotations

import numpy as np
import pytest

import nibs
from nibs_numpy import tiles

N, M, D = 37, 53, 8
PROBLEMS = {
    "symmetric": {},
    "one exponential does not reach": {"scale": 900.0},
    "one direction": {"objective": nibs.InfoNCE(direction="key_to_query")},
    "smoothed, masked": {"objective": nibs.InfoNCE(label_smoothing=0.1), "masks": True},
    "a margin": {"objective": nibs.InfoNCE(false_negative_margin=0.1), "masks": True},
    "several positives": {"objective": nibs.InfoNCE(same_id="positive"), "ids": True},
    "duplicates leave": {"objective": nibs.InfoNCE(same_id="exclude"), "ids": True},
    "sigmoid": {"objective": nibs.Sigmoid(), "bias": -3.0},
    "sigmoid, far out": {"objective": nibs.Sigmoid(), "scale": 400.0, "masks": True},
    "sigmoid, several positives": {"objective": nibs.Sigmoid(same_id="positive"), "ids": True, "bias": -3.0},
}


def outcome(asked, dtype="float32"):
    """The loss, all gradients and some stats of this problem."""
    rng = np.random.default_rng(7)
    queries, keys = (rng.standard_normal((rows, D)).astype(dtype) for rows in (N, M))
    queries, keys = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, keys))
    queries *= np.linspace(0.3, 1, N, dtype=dtype)[:, None]  # the largest logit comes late, and moves the shift
    options = {"scale": 20.0, "bias": 0.0, "plan": nibs.plan(N, M, D, dtype, query_tile=30, key_tile=M), **asked}
    if options.pop("masks", False):
        options.update(query_mask=np.arange(N) % 5 > 0, key_mask=np.arange(M) % 7 > 0)
    if options.pop("ids", False):
        options.update(query_ids=np.arange(N) % 11, key_ids=np.arange(M) % 11)
    loss, gradients, stats = nibs.contrastive_loss_and_grad(queries, keys, stats=True, **options)
    values = [loss, gradients.queries, gradients.keys, gradients.scale, gradients.bias]
    return [np.asarray(value, np.float64) for value in (*values, stats.top1, stats.mean_negative, stats.mean_positive)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_many_strips_say_what_one_says(name, dtype, monkeypatch):
    whole = outcome(PROBLEMS[name], dtype)
    monkeypatch.setattr(tiles, "STRIP", 4 * M)
    for here, there in zip(outcome(PROBLEMS[name], dtype), whole, strict=True):
        # Sums of at most N M terms in another order: their rounding, relative to the largest entry or to 1.
        within = 8 * np.finfo(dtype).eps * np.sqrt(N * M) * max(1.0, np.abs(there).max(initial=0))
        np.testing.assert_allclose(here, there, rtol=0, atol=within)


def test_settings_of_numpy_are_as_they_were():
    before = np.getbufsize(), np.geterr()
    outcome({})
    assert (np.getbufsize(), np.geterr()) == before
