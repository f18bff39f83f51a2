"""The schedule: however a call is cut into tiles, and whichever sweep runs, the answer is the same."""

from __future__ import annotations

import numpy as np
import pytest

import nibs

N, M, D = 11, 13, 5
TILES = [(1, 1), (1, M), (N, 1), (2, 3), (5, 4), (N, M), (100, 100)]
IDS = {"query_ids": np.arange(N) % 4, "key_ids": np.arange(M) % 4}
MASKS = {"query_mask": np.arange(N) % 5 != 1, "key_mask": np.arange(M) % 6 != 2}
CALLS = {
    "symmetric": {},
    "one way": {"objective": nibs.InfoNCE("query_to_key")},
    "other way": {"objective": nibs.InfoNCE("key_to_query"), "targets": np.arange(N) % 3},
    "smoothed": {"objective": nibs.InfoNCE(label_smoothing=0.2), **MASKS},
    "excluded": {"objective": nibs.InfoNCE(same_id="exclude"), **IDS},
    "positives": {"objective": nibs.InfoNCE(same_id="positive"), **IDS, **MASKS},
    "positives other way": {"objective": nibs.InfoNCE("key_to_query", same_id="positive"), **IDS},
    "margin": {"objective": nibs.InfoNCE(false_negative_margin=0.3), "targets": np.arange(N) % 7 - 1},
    "weights": {"weights": np.linspace(0, 2, N), **MASKS},
    "sum": {"reduction": "sum"},
    "sigmoid": {"objective": nibs.Sigmoid(), "bias": -3.0},
    "sigmoid positives": {"objective": nibs.Sigmoid("positive"), "bias": -3.0, **IDS, **MASKS},
    "queries alone": {"wrt": "queries"},
    "keys alone": {"wrt": "keys"},
    "scale alone": {"wrt": ("scale", "bias")},
}
SWEEPS = ["keep", "strip", "recompute", "split", "single"]


@pytest.fixture(scope="module")
def rows():
    """Provide queries and keys in float64, so that only a wrong answer differs."""
    rng = np.random.default_rng(3)
    return rng.standard_normal((N, D)), rng.standard_normal((M, D))


def _answer(rows, options, plan):
    loss, gradients, stats = nibs.contrastive_loss_and_grad(*rows, scale=2.0, plan=plan, stats=True, **options)
    figures = [stats.count, stats.top1, stats.mean_positive, stats.mean_negative, stats.hardest_negative]
    vectors = [stats.query_lse, stats.key_lse, gradients.queries, gradients.keys, gradients.scale, gradients.bias]
    return [loss, *figures, *(vector for vector in vectors if vector is not None)]


@pytest.mark.parametrize("name", CALLS)
def test_any_tiles_and_any_sweep_give_the_same_answer(rows, name):
    options = CALLS[name]
    objective, wrt = options.get("objective", nibs.InfoNCE()), options.get("wrt")
    whole = _answer(rows, options, None)

    for tile in TILES:
        for sweep in SWEEPS:
            try:
                plan = nibs.plan(
                    N, M, D, "float64", objective=objective, wrt=wrt, query_tile=tile[0], key_tile=tile[1], sweep=sweep
                )
            except nibs.errors.InvalidInput:  # this objective does not run so
                continue
            for got, expected in zip(_answer(rows, options, plan), whole, strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12, err_msg=f"{tile} {sweep}")


@pytest.mark.parametrize("name", [name for name in CALLS if not {"wrt", "reduction"} & CALLS[name].keys()])
def test_per_row_values_are_the_same_in_any_tiles(rows, name):
    options = dict(CALLS[name], reduction="none")
    if name == "positives other way":
        options["targets"] = np.arange(N)
    if name == "positives":
        options["targets"] = np.full(N, -1)
    whole = nibs.contrastive_loss(*rows, **options)

    for query_tile, key_tile in TILES:
        plan = nibs.plan(N, M, D, "float64", grad=False, query_tile=query_tile, key_tile=key_tile)
        np.testing.assert_allclose(nibs.contrastive_loss(*rows, plan=plan, **options), whole, rtol=1e-11, atol=1e-12)


def test_last_ragged_tile_is_not_dropped(rows):
    queries, keys = rows
    changed = keys.copy()
    changed[-1] += 1
    plan = nibs.plan(N, M, D, "float64", query_tile=4, key_tile=4)

    assert nibs.contrastive_loss(queries, keys, plan=plan) != nibs.contrastive_loss(queries, changed, plan=plan)


@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.InfoNCE(false_negative_margin=0.1), nibs.Sigmoid()])
@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (3, 0)])
def test_nothing_to_compare_is_zero_and_no_crash(objective, n, m):
    queries, keys = np.zeros((n, D), np.float32), np.zeros((m, D), np.float32)

    loss, gradients, stats = nibs.contrastive_loss_and_grad(
        queries, keys, objective=objective, targets=np.full(n, -1), stats=True
    )

    assert loss == 0 and gradients.scale == 0 and gradients.queries.shape == (n, D)
    assert stats.count == (n if isinstance(objective, nibs.Sigmoid) else 0)


@pytest.mark.parametrize(
    "absent",
    [{"query_mask": np.zeros(N, bool)}, {"key_mask": np.zeros(M, bool)}, {"weights": np.zeros(N)}],
    ids=lambda absent: next(iter(absent)),
)
@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.InfoNCE("key_to_query"), nibs.Sigmoid()], ids=repr)
def test_batch_without_an_anchor_has_loss_and_gradients_of_zero(rows, absent, objective):
    loss, gradients = nibs.contrastive_loss_and_grad(*rows, objective=objective, **absent)

    assert loss == 0
    assert not any(np.any(gradient) for gradient in (gradients.queries, gradients.keys, gradients.scale))


@pytest.mark.parametrize("scale", [0, -3.0, 1, np.float32(2), np.array([2.0], np.float16)], ids=repr)
def test_any_finite_scale_is_legal_and_its_gradient_has_its_shape(rows, scale):
    _, gradients = nibs.contrastive_loss_and_grad(*rows, scale=scale)

    assert np.isfinite(gradients.scale) and np.shape(gradients.scale) == np.shape(scale)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_that_is_not_finite_shows(rows, scale):
    loss, gradients = nibs.contrastive_loss_and_grad(*rows, scale=scale)

    assert np.isnan(loss) and np.isnan(gradients.queries).all()


def test_rows_may_be_read_only_strided_or_a_subclass(rows):
    queries, keys = rows
    expected = nibs.contrastive_loss(queries, keys)
    frozen = queries.copy()
    frozen.flags.writeable = False

    for same in (frozen, np.asfortranarray(queries), np.repeat(queries, 2, 1)[:, ::2], queries.view(np.recarray)):
        np.testing.assert_allclose(nibs.contrastive_loss(same, keys), expected, rtol=1e-13)


def test_inputs_are_left_as_they_were(rows):
    queries, keys = rows[0].copy(), rows[1].copy()
    queries[1], mask = np.nan, np.arange(N) != 1

    nibs.contrastive_loss_and_grad(queries, keys, query_mask=mask, scale=3.0)

    np.testing.assert_array_equal(keys, rows[1])
    assert np.isnan(queries[1]).all() and np.array_equal(queries[mask], rows[0][mask])
