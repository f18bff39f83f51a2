"""The four helpers beside their formulas, written densely and without haste."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import nibs
from nibs import errors

SCALE = 3.0


@pytest.fixture
def views():
    """Provide two views of nine normalised rows."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((2, 9, 6))
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _cross_entropy(logits, targets):
    """Mean of `-log softmax(logits)[i, targets[i]]`."""
    return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), targets])


def test_clip_is_the_mean_of_two_cross_entropies(views):
    logits, targets = SCALE * views[0] @ views[1].T, np.arange(9)

    expected = (_cross_entropy(logits, targets) + _cross_entropy(logits.T, targets)) / 2

    np.testing.assert_allclose(nibs.clip(*views, scale=SCALE), expected, rtol=1e-12)


def test_siglip_is_a_logistic_loss_of_every_pair(views):
    logits = SCALE * views[0] @ views[1].T - 2
    signs = 2 * np.eye(9) - 1

    expected = np.log1p(np.exp(-signs * logits)).sum() / 9

    np.testing.assert_allclose(nibs.siglip(*views, scale=SCALE, bias=-2.0), expected, rtol=1e-12)


def test_ntxent_sets_each_row_against_all_others_of_both_views(views):
    rows = np.concatenate(views)
    logits = SCALE * rows @ rows.T
    np.fill_diagonal(logits, -np.inf)

    expected = _cross_entropy(logits, (np.arange(18) + 9) % 18)

    np.testing.assert_allclose(nibs.ntxent(*views, scale=SCALE), expected, rtol=1e-12)


def test_supcon_takes_the_mean_over_positives_outside_the_logarithm(views):
    rows, labels = np.concatenate(views), np.arange(18) % 4
    labels[0] = 99  # alone of its kind: a candidate, no anchor
    logits = SCALE * rows @ rows.T
    np.fill_diagonal(logits, -np.inf)
    lse = np.log(np.exp(logits).sum(1))
    positives = (labels[:, None] == labels) & ~np.eye(18, dtype=bool)
    terms = [np.mean(lse[i] - logits[i, positives[i]]) for i in range(18) if positives[i].any()]

    np.testing.assert_allclose(nibs.supcon(rows, labels, scale=SCALE), np.mean(terms), rtol=1e-12)


def test_ntxent_of_tensors_carries_gradients(views):
    torch = pytest.importorskip("torch")
    first, second = (torch.tensor(view, requires_grad=True) for view in views)

    nibs.ntxent(first, second, scale=SCALE).backward()

    assert first.grad.shape == first.shape and torch.isfinite(second.grad).all()


@pytest.mark.parametrize("helper", [nibs.clip, nibs.siglip, nibs.ntxent, nibs.supcon])
def test_helper_requires_a_scale(helper):
    assert inspect.signature(helper).parameters["scale"].default is inspect.Parameter.empty


@pytest.mark.parametrize(
    ("second", "shown"),
    [(np.zeros((8, 6)), "a float64 array of shape (8, 6)"), (None, "None (NoneType)"), ([[1.0]], "[[1.0]] (list)")],
)
def test_views_of_two_shapes_are_refused(views, refusal, second, shown):
    text = refusal(errors.InvalidInput, nibs.ntxent, views[0], second, scale=SCALE)

    assert text.startswith(f"z2 is {shown}") and text.endswith(": expected two views of one shape [n, d].")


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_views_of_two_frameworks_or_dtypes_are_refused(views, framework):
    second = pytest.importorskip("torch").tensor(views[1]) if framework == "torch" else views[1].astype(np.float32)

    with pytest.raises(errors.InvalidInput, match="expected two views of one framework, dtype and device"):
        nibs.ntxent(views[0], second, scale=SCALE)


def test_typo_in_a_helper_s_option_is_named(views):
    with pytest.raises(errors.InvalidInput, match="Did you mean reduction="):
        nibs.clip(*views, scale=SCALE, reductoin="sum")
