"""The loss inside JAX's transformations, what it costs there, and what is refused."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_checks import close, dense, flops, rows

import nibs
from nibs.errors import InvalidInput, Unsupported

TILED = nibs.plan(37, 37, 8, query_tile=16, key_tile=11, sweep="recompute")
IDS = np.arange(37) // 2


def loss(queries: Any, keys: Any, scale: Any = 1.0, **options: Any) -> Any:
    return nibs.contrastive_loss(queries, keys, scale=scale, **options)


@pytest.mark.parametrize("plan", [None, TILED], ids=["one tile", "ragged tiles"])
def test_value_and_grad_under_jit_are_those_of_dense_jax(plan: Any) -> None:
    queries, keys = rows(37, 37)
    got = jax.jit(jax.value_and_grad(lambda *x: loss(*x, plan=plan), (0, 1, 2)))(queries, keys, 3.0)
    close(got, jax.value_and_grad(dense, (0, 1, 2))(queries, keys, 3.0))


def test_vmap_is_one_loss_for_each_problem() -> None:
    one, two = rows(12, 12), rows(12, 12, seed=1)
    stacked = [jnp.stack(pair) for pair in zip(one, two, strict=True)]
    got = jax.vmap(jax.value_and_grad(loss, (0, 1)))(*stacked)
    want = [jax.value_and_grad(dense, (0, 1))(*pair) for pair in (one, two)]
    close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *want))


def test_checkpoint_gives_the_same_gradient() -> None:
    queries, keys = rows(12, 12)
    close(
        jax.grad(jax.checkpoint(lambda q: loss(jnp.tanh(q), keys)))(queries),
        jax.grad(lambda q: dense(jnp.tanh(q), keys))(queries),
    )


def test_donated_inputs_are_used_up_and_the_result_is_right() -> None:
    queries, keys = rows(64, 64)
    want = jax.grad(dense)(queries, keys)
    step = jax.jit(lambda q, k: q - jax.grad(loss)(q, k), donate_argnums=0)
    kept = np.asarray(queries).copy()
    close(step(queries, keys), kept - np.asarray(want))
    assert queries.is_deleted()


def test_gradients_of_what_is_not_differentiated_cost_nothing() -> None:
    queries, keys = rows(37, 37)
    product = 2 * 37 * 37 * 8
    assert flops(lambda q: jax.grad(lambda q: loss(q, keys))(q), queries) == 2 * product
    assert flops(loss, queries, keys) == product


@pytest.mark.parametrize(
    ("objective", "sweep", "products"),
    [
        (nibs.InfoNCE(), "recompute", 4),
        (nibs.InfoNCE(), "keep", 3),
        (nibs.InfoNCE(), "split", 5),
        (nibs.InfoNCE("query_to_key"), "strip", 3),
        (nibs.InfoNCE("key_to_query"), "strip", 3),
        (nibs.Sigmoid(), "single", 3),
        (nibs.Sigmoid(), "split", 4),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, (str, int)) else str(value),
)
def test_a_sweep_makes_no_more_matrix_products_than_its_plan_says(objective: Any, sweep: Any, products: int) -> None:
    queries, keys = rows(64, 64)
    plan = nibs.plan(64, 64, 8, objective=objective, query_tile=16, key_tile=32, sweep=sweep)
    count = flops(
        lambda *x: jax.value_and_grad(lambda *x: loss(*x, objective=objective, plan=plan), (0, 1, 2))(*x),
        queries,
        keys,
        2.0,
    )
    assert count == products * 2 * 64 * 64 * 8 == plan.products * 2 * 64 * 64 * 8


@pytest.mark.parametrize(("n", "m"), [(1025, 1025), (3000, 1100), (40, 2049)])
def test_rows_just_beyond_a_tile_cost_hardly_more_than_the_plan_says(n: int, m: int) -> None:
    sides = [jax.ShapeDtypeStruct((size, 8), jnp.float32) for size in (n, m)]
    plan = nibs.plan(n, m, 8, query_tile=1024, key_tile=1024, sweep="keep")
    targets = jnp.where(jnp.arange(n) < m, jnp.arange(n), -1)
    made = flops(lambda *x: jax.value_and_grad(lambda *x: loss(*x, targets=targets, plan=plan), (0, 1))(*x), *sides)
    assert 3 <= made / (2 * n * m * 8) < 3.2


def test_values_take_four_products_under_differentiation() -> None:
    queries, keys = rows(32, 32)

    def summed(queries: Any, keys: Any) -> Any:
        return loss(queries, keys, reduction="none").sum()

    assert flops(lambda *x: jax.grad(summed, (0, 1))(*x), queries, keys) == 4 * 2 * 32 * 32 * 8


def test_a_million_rows_compile_in_seconds_and_hold_no_million_squared() -> None:
    shape = jax.ShapeDtypeStruct((1_000_000, 64), jnp.float32)
    begun = time.process_time()
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(shape, shape).compile()
    took = time.process_time() - begun
    assert took < 5, f"{took:.1f} s of processors' time"  # which others on the machine do not lengthen much
    assert compiled.memory_analysis().temp_size_in_bytes < 300 * 2**20


@pytest.mark.parametrize(
    "objective", [nibs.InfoNCE(), nibs.Sigmoid(), nibs.InfoNCE("query_to_key")], ids=["symmetric", "sigmoid", "one-way"]
)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
def test_temporary_memory_does_not_depend_on_pairs(objective: Any, grad: bool) -> None:
    def temporary(n: int, m: int) -> int:
        plan = nibs.plan(
            n,
            m,
            8,
            objective=objective,
            query_tile=128,
            key_tile=128,
            sweep="single" if isinstance(objective, nibs.Sigmoid) else "recompute",
        )
        shapes = [jax.ShapeDtypeStruct((size, 8), jnp.float32) for size in (n, m)]

        def forward(*sides: Any) -> Any:
            return loss(*sides, objective=objective, plan=plan)

        call = jax.value_and_grad(forward, (0, 1)) if grad else forward
        return int(jax.jit(call).lower(*shapes).compile().memory_analysis().temp_size_in_bytes)

    small, large = temporary(2048, 2048), temporary(8192, 8192)
    linear = 6144 * (8 * 4 * 4 + 20 * 4 * 2)  # rows added, times a few copies and vectors of each side
    assert large - small < linear, f"{small} bytes at 2048 x 2048, {large} at 8192 x 8192"


def test_a_memory_budget_holds_for_the_compiled_program() -> None:
    shape = jax.ShapeDtypeStruct((4096, 32), jnp.float32)
    call = jax.value_and_grad(lambda q, k: loss(q, k, memory="8MiB"), (0, 1))
    analysis = jax.jit(call).lower(shape, shape).compile().memory_analysis()
    assert analysis.temp_size_in_bytes <= 8 * 2**20


@pytest.mark.parametrize(("precision", "words"), [("highest", "HIGHEST"), ("high", "HIGH"), ("default", "DEFAULT")])
def test_precision_reaches_every_product(precision: Any, words: str) -> None:
    queries, keys = rows(8, 8)
    text = jax.jit(jax.grad(lambda q: loss(q, keys, precision=precision))).lower(queries).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all(f"precision = [{words}, {words}]" in line for line in products) or (
        words == "DEFAULT" and "HIGH" not in "".join(products)
    )


def test_the_default_precision_is_jaxs_own() -> None:
    queries, keys = rows(8, 8)
    with jax.default_matmul_precision("highest"):
        text = jax.jit(loss).lower(queries, keys).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in text


def test_a_second_derivative_is_refused_by_name() -> None:
    queries, keys = rows(4, 4)
    for twice in (jax.hessian(loss), jax.grad(lambda q, k: jax.grad(loss)(q, k).sum())):
        with pytest.raises(Unsupported, match="differentiated again"):
            twice(queries, keys)


def test_forward_mode_is_refused() -> None:
    queries, keys = rows(4, 4)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: loss(q, keys), (queries,), (queries,))


def test_another_frameworks_kernels_are_refused_inside_a_trace() -> None:
    queries, keys = rows(4, 4)
    with pytest.raises(Unsupported, match="inside a JAX trace"):
        jax.jit(lambda q, k: loss(q, k, backend="numpy"))(queries, keys)


def test_another_frameworks_kernels_serve_an_eager_gradient() -> None:
    queries, keys = rows(9, 9)
    got = jax.value_and_grad(lambda *x: loss(*x, backend="numpy"), (0, 1, 2))(queries, keys, 2.0)
    close(got, jax.value_and_grad(dense, (0, 1, 2))(queries, keys, 2.0))


@pytest.mark.parametrize(
    "bad",
    [
        {"targets": jnp.asarray([0, 1, 9, 3])},
        {"targets": jnp.asarray([0, 1, -2, 3])},
        {"weights": jnp.asarray([1.0, -1.0, 1.0, 1.0])},
        {"weights": jnp.asarray([1.0, jnp.nan, 1.0, 1.0])},
    ],
    ids=["target too large", "target too small", "weight below zero", "weight nan"],
)
def test_a_bad_value_is_refused_eagerly_and_nan_in_a_trace(bad: dict[str, Any]) -> None:
    queries, keys = rows(4, 5)
    given = {"targets": jnp.arange(4), **bad}
    with pytest.raises(InvalidInput):
        loss(queries, keys, **given)
    assert np.isnan(jax.jit(lambda q, k, given: loss(q, k, **given))(queries, keys, given))


def test_a_bad_row_is_nan_alone() -> None:
    queries, keys = rows(4, 5)
    objective = nibs.InfoNCE("query_to_key")
    values = jax.jit(lambda t: loss(queries, keys, targets=t, reduction="none", objective=objective))(
        jnp.asarray([0, 7, -1, 3])
    )
    assert np.isnan(values[1]) and values[2] == 0 and np.isfinite(values[jnp.asarray([0, 3])]).all()


@pytest.mark.parametrize("kind", [np.float64, np.int64])
def test_nothing_is_narrowed_in_silence(kind: Any) -> None:
    with pytest.raises(InvalidInput, match="jax_enable_x64"):
        nibs.registry.registry.load("jax").asarray(np.ones(3, kind))


def test_sixty_four_bits_are_kept_where_they_are_turned_on() -> None:
    with jax.enable_x64(True):
        queries, keys = rows(21, 21, dtype="float64")
        got = jax.value_and_grad(loss, (0, 1))(queries, keys)
        close(got, jax.value_and_grad(dense, (0, 1))(queries, keys), 1e-14)
        assert got[0].dtype == jnp.float64


def test_stats_leave_a_jitted_function() -> None:
    queries, keys = rows(37, 37)
    _, stats = jax.jit(lambda q, k: loss(q, k, stats=True))(queries, keys)
    logits = np.asarray(queries @ keys.T)
    assert int(stats.count) == 37
    close(stats.query_lse, jax.nn.logsumexp(queries @ keys.T, axis=1))
    close(stats.mean_positive, np.diagonal(logits).mean())
    assert stats.plan.kernel == "xla"


def test_stats_come_along_as_aux_of_a_gradient() -> None:
    queries, keys = rows(37, 37)
    call = jax.value_and_grad(lambda q: loss(q, keys, stats=True), has_aux=True)
    for run in (call, jax.jit(call)):
        (value, stats), gradient = run(queries)
        close((value, gradient), jax.value_and_grad(dense)(queries, keys))
        assert int(stats.count) == 37 and stats.plan.kernel == "xla"


def test_rows_that_are_absent_are_never_read() -> None:
    queries, keys = rows(20, 20)
    mask = jnp.arange(20) % 3 != 1
    spoilt = [jnp.where(mask[:, None], side, jnp.nan) for side in (queries, keys)]
    plan = nibs.plan(20, 20, 8, query_tile=8, key_tile=8, masked=True)
    call = jax.value_and_grad(lambda q, k: loss(q, k, query_mask=mask, key_mask=mask, plan=plan), (0, 1))
    clean = call(queries, keys)
    close(call(*spoilt), clean, 0)
    close(clean[0], dense(queries[mask], keys[mask]))


def test_ids_that_would_be_cut_to_be_compared_are_refused() -> None:
    queries, keys = rows(3, 3)
    with pytest.raises(InvalidInput, match="narrow them in silence"):
        loss(
            queries,
            keys,
            objective=nibs.InfoNCE(same_id="exclude"),
            query_ids=jnp.arange(3),
            key_ids=jnp.arange(3, dtype=jnp.uint32),
        )


def test_a_training_step_with_half_rows_and_a_loss_scale_keeps_small_gradients() -> None:
    queries, keys = rows(256, 256, dtype="float16")

    def scaled(queries: Any) -> Any:
        return loss(queries, keys) * 2.0**15

    got = np.asarray(jax.jit(jax.grad(scaled))(queries), np.float64) / 2.0**15
    want = np.asarray(jax.grad(dense)(queries.astype(jnp.float32), keys.astype(jnp.float32)), np.float64)
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()
