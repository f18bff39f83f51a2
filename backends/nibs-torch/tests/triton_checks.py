"""Checks of the kernels under Triton's interpreter. Not collected by itself: see test_triton_interpreted.py.

Triton decides how to run kernels when they are defined, so these need a Python started with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import nibs
from nibs.errors import InvalidInput
from nibs_torch.fused import FusedTiles
from nibs_torch.kernels import lse, rows, sigmoid, tuning, weights

CPU = torch.device("cpu")
DESCRIBED = tuning.Config(32, 64, 16, 4, 1, descriptors=True, per_sm=1)
WIDE = [tuning.Config(32, columns, 16, 4, 1) for columns in (128, 256)]
OBJECTIVES = [nibs.InfoNCE(), nibs.InfoNCE(label_smoothing=0.1), nibs.InfoNCE("key_to_query"), nibs.Sigmoid()]


def launch(dtype: str = "float32") -> FusedTiles:
    return FusedTiles(dtype, CPU, "highest")


def batch(n: int = 70, m: int = 70, d: int = 40, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(5)
    queries, keys = (torch.randn(size, d, generator=generator) for size in (n, m))
    return torch.nn.functional.normalize(queries).to(dtype), torch.nn.functional.normalize(keys).to(dtype)


def spread(n: int = 64, d: int = 16) -> tuple[Any, Any]:
    """Rows of very different lengths: their lse values lie hundreds apart, within each tile."""
    queries, keys = batch(n, n, d)
    return queries * torch.logspace(0, 3, n).unsqueeze(1), keys


def truth(queries: Any, keys: Any, **options: Any) -> Any:
    """The same call in float64, by NumPy's backend, which the suite holds to the oracle."""
    given = {
        name: value.double().numpy() if isinstance(value, torch.Tensor) else value for name, value in options.items()
    }
    return nibs.contrastive_loss_and_grad(queries.double().numpy(), keys.double().numpy(), **given)


def test_the_plan_says_that_the_kernels_ran() -> None:
    _, stats = nibs.contrastive_loss(*batch(), stats=True)
    assert stats.plan.kernel == "triton"


def test_an_explicit_plan_for_the_plain_path_is_obeyed() -> None:
    from dataclasses import replace

    plan = replace(nibs.plan(70, 70, 40), kernel="torch")
    _, stats = nibs.contrastive_loss(*batch(), stats=True, plan=plan)
    assert stats.plan.kernel == "torch"


def test_float64_is_refused_and_not_served_by_another_path() -> None:
    with pytest.raises(nibs.errors.Unsupported, match="float64"):
        nibs.contrastive_loss(*batch(dtype=torch.float64))


def test_lse_equals_its_plain_twin() -> None:
    queries, keys = batch()
    _, stats = nibs.contrastive_loss(queries, keys, scale=14.3, stats=True)
    plain = lse.plain_lse(queries, keys, torch.tensor(14.3), (32, 64))
    torch.testing.assert_close(stats.query_lse, plain[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.key_lse, plain[1], rtol=1e-6, atol=1e-6)


def test_an_lse_that_one_entry_rules_keeps_its_digits() -> None:
    logits = torch.linspace(-15.0, 0.0, 1024).unsqueeze(1)
    _, stats = nibs.contrastive_loss(logits, torch.ones(1, 1), targets=torch.zeros(1024, dtype=torch.int64), stats=True)
    # The lifted power is rounded to 2^-20; beside that the exponential, its argument, the logarithm, and their sum.
    assert (stats.query_lse - logits[:, 0]).abs().max() < 2**-20 * math.log(2) + 6 * 2**-24 + 15 * 2**-24


def test_a_tile_whose_lse_values_spread_is_repaired() -> None:
    queries, keys = spread()
    _, stats = nibs.contrastive_loss(queries, keys, stats=True)
    logits = queries.double() @ keys.double().T
    torch.testing.assert_close(stats.query_lse.double(), torch.logsumexp(logits, 1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(stats.key_lse.double(), torch.logsumexp(logits, 0), rtol=1e-6, atol=1e-5)


def test_without_its_repair_a_row_far_below_the_maximum_would_be_lost() -> None:
    queries, keys = spread()
    unguarded = lse.plain_lse(queries, keys, torch.tensor(1.0), (32, 64), guard=False)
    assert torch.isinf(unguarded[0]).any()


def test_gradients_survive_lse_values_that_spread() -> None:
    _, grads = nibs.contrastive_loss_and_grad(*spread())
    assert torch.isfinite(grads.queries).all() and torch.isfinite(grads.keys).all()


def test_without_the_tiles_made_again_the_gradient_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "wide", Idle())
    _, grads = nibs.contrastive_loss_and_grad(*spread())
    assert torch.isnan(grads.queries).any()


class Idle:
    """A kernel that is launched and does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **named: None


def test_plain_weights_need_the_same_guard() -> None:
    queries, keys = spread()
    logits = queries @ keys.T
    sides = torch.logsumexp(logits, 1), torch.logsumexp(logits, 0)
    assert torch.isfinite(weights.plain_weights(logits, *sides, (32, 64))).all()
    assert torch.isnan(weights.plain_weights(logits, *sides, (32, 64), guard=False)).any()


@pytest.mark.parametrize("bias", [-40.0, -20.0, -10.0, 3.0, 20.0])
def test_the_grouped_softplus_keeps_the_digits_of_small_terms(bias: float) -> None:
    queries, keys = batch(64, 64)
    loss = nibs.contrastive_loss(queries, keys, scale=10.0, bias=bias, objective=nibs.Sigmoid(), reduction="none")
    logits = 10.0 * (queries.double() @ keys.double().T) + bias
    expected = torch.nn.functional.softplus(torch.where(torch.eye(64, dtype=torch.bool), -logits, logits)).sum(1)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    mass, slope = sigmoid.plain_sigmoid(logits.float())
    torch.testing.assert_close(mass.double(), torch.nn.functional.softplus(logits).sum(1), rtol=2e-6, atol=0)
    torch.testing.assert_close(slope.double(), torch.sigmoid(logits), rtol=4e-6, atol=1e-12)


def equal_logits(logit: float) -> tuple[float, float]:
    """Relative errors of the loss and of a weight where 256 logits of a row are one number, whose roundings agree."""
    bias, nobody = torch.tensor(logit), torch.full((32,), -1)
    loss, grads = nibs.contrastive_loss_and_grad(
        torch.zeros(32, 16), torch.zeros(256, 16), bias=bias, objective=nibs.Sigmoid(), targets=nobody, reduction="sum"
    )
    pairs, x = 32 * 256, bias.double()
    loss_error = loss.double() / (pairs * torch.logaddexp(x, torch.zeros_like(x))) - 1
    return float(loss_error), float(grads.bias.double() / (pairs * torch.sigmoid(x)) - 1)


@contextmanager
def tiles_of(config: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, kernels are launched with this configuration."""
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "INTERPRETER", (config,))
        tuning.forget()
        yield
    tuning.forget()


@pytest.mark.parametrize("columns", [32, 64, 256])
@pytest.mark.parametrize("logit", [-70.0, -30.0, -10.3, -3.1, -0.01, 0.0, 0.7, 5.0, 80.0, 1000.0])
def test_logits_that_share_a_logarithm_keep_their_digits(
    logit: float, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The exponential's argument is rounded, to 2^-24 of itself; beside that, 64 factors and the sums of 256.
    budget = (16 + (abs(logit) if logit < 0 else 0.0)) * 2**-24
    with tiles_of(tuning.Config(32, columns, 16, 4, 1), monkeypatch):
        assert max(map(abs, equal_logits(logit))) < budget


@pytest.mark.parametrize("logit", [30.0, 3.0, -20.0])
def test_positives_keep_their_digits_on_either_side(logit: float) -> None:
    queries, keys = torch.eye(32), torch.eye(256, 32)  # positives at `logit`, all else at its negative
    bias, scale = torch.tensor(-logit), 2 * logit
    loss, grads = nibs.contrastive_loss_and_grad(
        queries, keys, scale=scale, bias=bias, objective=nibs.Sigmoid(), wrt=("scale", "bias")
    )
    x = bias.double()
    rtol = (16 + abs(logit)) * 2**-24  # the exponential's argument is rounded
    assert abs(loss.double() / (256 * torch.logaddexp(x, torch.zeros_like(x))) - 1) < rtol
    assert abs(grads.bias.double() / (254 * torch.sigmoid(x)) - 1) < rtol
    assert abs(grads.scale.double() / -torch.sigmoid(x) - 1) < rtol


@triton.jit
def bare(w):  # type: ignore[no-untyped-def]
    return tl.log(1.0 + w)


def test_a_sum_that_is_rounded_beside_one_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigmoid, "log1p", bare)
    assert abs(equal_logits(-10.3)[0]) > 100 * 2**-24


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["infonce", "smoothed", "one way", "sigmoid"])
@pytest.mark.parametrize("n, m, d", [(70, 70, 40), (32, 256, 16)], ids=["ragged", "whole"])
@pytest.mark.parametrize("config", [DESCRIBED, *WIDE], ids=["copy engine", "two parts", "four parts"])
def test_the_shape_of_tiles_and_who_fetches_them_change_nothing(
    config: Any, objective: Any, n: int, m: int, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys = batch(n, m, d)
    plain = nibs.contrastive_loss_and_grad(queries, keys, scale=5.0, objective=objective)
    with tiles_of(config, monkeypatch):
        loss, grads = nibs.contrastive_loss_and_grad(queries, keys, scale=5.0, objective=objective)
    torch.testing.assert_close(loss, plain[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(grads.queries, plain[1].queries, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grads.keys, plain[1].keys, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.Sigmoid()], ids=["infonce", "sigmoid"])
def test_macro_tiles_smaller_than_the_batch_fold_to_the_same_bits_each_time(objective: Any) -> None:
    queries, keys = batch()
    plan = nibs.plan(70, 70, 40, objective=objective, query_tile=48, key_tile=33)
    first, again = (
        nibs.contrastive_loss_and_grad(queries, keys, scale=9.0, objective=objective, plan=plan) for _ in range(2)
    )
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].keys, again[1].keys)
    expected = truth(queries, keys, scale=9.0, objective=objective)
    np.testing.assert_allclose(first[0].double(), expected[0], rtol=1e-6)
    np.testing.assert_allclose(first[1].keys.double(), expected[1].keys, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "objective, wrt, dtype",
    [
        (nibs.InfoNCE(), ("queries", "keys"), torch.float32),
        (nibs.InfoNCE(), ("queries",), torch.bfloat16),
        (nibs.InfoNCE("key_to_query"), ("queries", "keys"), torch.float32),
        (nibs.Sigmoid(), ("queries", "keys"), torch.bfloat16),
        (nibs.Sigmoid(), ("keys",), torch.float32),
    ],
    ids=str,
)
def test_what_an_accumulator_held_before_its_first_tile_is_not_read(
    objective: Any, wrt: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys = batch(dtype=dtype)
    plan = nibs.plan(70, 70, 40, objective=objective, query_tile=48, key_tile=33)
    monkeypatch.setattr(FusedTiles, "unset", FusedTiles.zeros)
    inputs = [one.requires_grad_(name in wrt) for name, one in (("queries", queries), ("keys", keys))]
    wanted = [one for one in inputs if one.requires_grad]
    before = torch.autograd.grad(nibs.contrastive_loss(*inputs, objective=objective, plan=plan), wanted)
    monkeypatch.setattr(FusedTiles, "unset", lambda tiles, *shape: torch.full(shape, torch.nan))
    after = torch.autograd.grad(nibs.contrastive_loss(*inputs, objective=objective, plan=plan), wanted)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.Sigmoid()], ids=["infonce", "sigmoid"])
def test_the_scale_gradient_sees_weights_before_they_are_rounded(objective: Any) -> None:
    queries, keys = batch(dtype=torch.bfloat16)
    _, grads = nibs.contrastive_loss_and_grad(queries, keys, scale=torch.tensor(14.3), objective=objective)
    expected = truth(queries, keys, scale=14.3, objective=objective, wrt=("scale",))[1].scale
    np.testing.assert_allclose(float(grads.scale), expected, rtol=2e-6)


@pytest.mark.parametrize("how", ["eager", "compiled", "functional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_applies_the_factor_that_the_forward_left_out(how: str, dtype: torch.dtype) -> None:
    scale = torch.tensor(9.0)

    def loss(queries: Any, keys: Any, scale: Any) -> Any:
        return 512 * nibs.contrastive_loss(queries, keys, scale=scale, reduction="sum")

    inputs = [one.requires_grad_() for one in (*batch(dtype=dtype), scale)]
    if how == "functional":
        found = torch.func.grad(loss, argnums=(0, 1, 2))(*(one.detach() for one in inputs))
    else:
        made = torch.compile(loss, backend="eager", fullgraph=True) if how == "compiled" else loss
        found = torch.autograd.grad(made(*inputs), inputs)
    inputs = [one.detach() for one in inputs]
    _, direct = nibs.contrastive_loss_and_grad(*inputs[:2], scale=inputs[2], reduction="sum")
    for one, expected in zip(found, (direct.queries, direct.keys, direct.scale), strict=True):
        torch.testing.assert_close(one, 512 * expected, rtol=2e-6, atol=0)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # how the interpreter takes a maximum
@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.Sigmoid()], ids=["infonce", "sigmoid"])
@pytest.mark.parametrize("side", [0, 1], ids=["queries", "keys"])
def test_a_backward_leaves_absent_rows_their_zero_beside_a_row_that_is_nan(side: int, objective: Any) -> None:
    inputs, there = batch(), torch.arange(70) % 7 != 0
    inputs[side][:2] = torch.nan  # the first is absent
    inputs = [one.requires_grad_() for one in inputs]
    masks = {("query_mask", "key_mask")[side]: there}
    found = torch.autograd.grad(nibs.contrastive_loss(*inputs, objective=objective, **masks), inputs)
    assert not found[side][~there].any() and found[side][1].isnan().all()


def test_float16_weights_far_below_its_range_survive() -> None:
    queries, keys = batch(70, 70, dtype=torch.float16)
    anchor = torch.full((70,), 1e-9)
    anchor[0] = 1.0
    _, grads = nibs.contrastive_loss_and_grad(queries, keys, scale=5.0, weights=anchor, reduction="sum")
    expected = truth(queries, keys, scale=5.0, weights=anchor, reduction="sum")[1]
    wide = expected.keys
    np.testing.assert_allclose(grads.keys.double(), wide, atol=2e-3 * np.abs(wide).max())


def test_the_lift_is_the_power_of_two_that_its_twin_says() -> None:
    for bound in (1.0, 2.0, 3.7, 1e-6, 70.0):
        found = launch("float16")._lift(torch.tensor([0.1 * bound, -bound, 0.0]))
        assert tuple(found.tolist()) == rows.plain_lift(bound)


def test_rows_are_rounded_to_tf32_and_poison_found_like_their_twins() -> None:
    queries, _ = batch()
    tiles = FusedTiles("float32", CPU, "high")
    assert torch.equal(tiles.factor(queries, None), rows.plain_tf32(queries))
    queries[3, 5], queries[4, 6] = float("nan"), float("inf")
    mask = torch.arange(70) != 3
    assert torch.equal(tiles.poison(queries, mask).isnan(), rows.plain_poison(queries, mask).isnan())
    assert tiles.poison(queries, mask).isnan().nonzero().tolist() == [[4]]


def test_partial_sums_are_tallied_in_float64_onto_those_of_earlier_tiles() -> None:
    tiles, generator = launch(), torch.Generator().manual_seed(3)
    parts = [torch.randn(3, size, generator=generator) + 1e4 for size in (70, 50_001)]
    for one in parts:
        tiles._tally(one, None)
        tiles._tally(one, -one)
    expected = sum(one.double().sum() for one in parts)
    product, weight = tiles.totals()
    torch.testing.assert_close(product, 2 * expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(weight, -expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("lifted", [False, True])
def test_our_own_product_equals_the_librarys(transposed: bool, lifted: bool) -> None:
    g, keys = batch(70, 50, 50, torch.bfloat16)[0], batch(70, 50, 24, torch.bfloat16)[1]
    if transposed:
        g, keys = g.T, batch(70, 50, 24, torch.bfloat16)[0]
    out = torch.ones(g.shape[0], 24)
    factor = torch.tensor([0.5]) if lifted else None
    launch("bfloat16").widening_product(out, g, keys, factor)
    torch.testing.assert_close(out, 1 + (0.5 if lifted else 1.0) * (g.float() @ keys.float()), rtol=1e-5, atol=1e-6)


def test_a_measured_choice_comes_before_the_table(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBS_TUNING", str(tmp_path / "tuning.json"))
    tuning.forget()
    card = tuning.Card("a card", "sm_90", 132, 227 * 1024)
    times = {one: 1.0 for one in tuning.choices("sm_90", "lse", 2)}
    slowest = tuning.choices("sm_90", "lse", 2)[-1]
    times[slowest] = 0.5
    assert next(iter(tuning.tune(card, "lse", 2, times.get))) == slowest
    assert tuning.config(card, "lse", 2) == slowest
    assert tuning.config(card, "weights", 2) == tuning.choices("sm_90", "weights", 2)[0]
    tuning.forget()


@pytest.mark.parametrize("text", ["{", "[]", '{"a card": {"rows": 128, "colour": 3}}', '{"a card": 128}'])
def test_a_file_that_holds_no_choices_is_named(text: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text)
    monkeypatch.setenv("NIBS_TUNING", str(path))
    tuning.forget()
    with pytest.raises(InvalidInput, match=r"tuning\.json holds no tuning results"):
        tuning.config(tuning.Card("a card", "sm_90", 132, 227 * 1024), "lse", 2)


def test_a_card_with_little_shared_memory_gets_a_tile_that_fits() -> None:
    small = tuning.Card("a consumer card", "sm_90", 30, 99 * 1024)
    for kernel in ("lse", "weights", "sigmoid"):
        assert tuning.shared_bytes(tuning.config(small, kernel, 2), 2) <= small.shared


def test_macro_tiles_fill_whole_waves() -> None:
    for side in {side for tile in tuning.macro_tiles(768, 2, 132, 128 << 20) for side in tile}:
        blocks = side // 128 * 3
        assert blocks / 132 / -(-blocks // 132) >= 0.95


def test_a_budget_between_one_wave_and_two_is_filled_by_an_oblong_tile() -> None:
    rows, columns = tuning.macro_tiles(768, 2, 132, 100 << 20)[0]
    assert 0.9 * (100 << 20) <= rows * columns <= 100 << 20
