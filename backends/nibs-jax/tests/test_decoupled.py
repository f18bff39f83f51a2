"""The decoupled step gives what value_and_grad of the one-batch loss gives, in memory of one micro-batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jax_checks import close, dense, equations, rows

import nibs
import nibs_jax
from nibs.errors import InvalidInput, Unsupported

ROWS, EVERYWHERE = PartitionSpec("data"), PartitionSpec()


def parameters(dtype: str = "float32") -> dict[str, Any]:
    r = np.random.default_rng(7)
    towers = {name: jnp.asarray(r.standard_normal((8, 8)) / 3, dtype) for name in ("queries", "keys")}
    return {**towers, "log_scale": jnp.asarray(0.7)}


def tower(name: str) -> Any:
    return lambda params, inputs: jnp.tanh(inputs @ params[name])


def with_dropout(name: str) -> Any:
    def encode(params: Any, inputs: Any, key: Any) -> Any:
        kept = jax.random.bernoulli(key, 0.8, inputs.shape)
        return jnp.tanh(jnp.where(kept, inputs / 0.8, 0) @ params[name])

    return encode


def loss(params: Any, queries: Any, keys: Any, **options: Any) -> Any:
    return nibs.contrastive_loss(queries, keys, scale=jnp.exp(params["log_scale"]), **options)


def ringed(params: Any, queries: Any, keys: Any) -> Any:
    return loss(params, queries, keys, ring="data")


def one_batch(params: Any, queries: Any, keys: Any) -> Any:
    encoded = tower("queries")(params, queries), tower("keys")(params, keys)
    return dense(*encoded, jnp.exp(params["log_scale"]))


def step_of(micro_batch: Any, **options: Any) -> Any:
    return nibs_jax.decoupled_step(tower("queries"), tower("keys"), loss, micro_batch=micro_batch, **options)


@pytest.mark.parametrize("micro_batch", [1, 37, 64, (5, 16)], ids=str)
def test_value_and_gradients_are_those_of_one_batch(micro_batch: Any) -> None:
    given = parameters(), *rows(37, 37)
    got = jax.jit(step_of(micro_batch))(given[0], given[1:])
    close(got, jax.value_and_grad(one_batch)(*given))


def test_dropout_is_replayed() -> None:
    params, key, size = parameters(), jax.random.key(3), 5
    batch = rows(12, 12)
    encoders = [with_dropout("queries"), with_dropout("keys")]

    def whole(params: Any) -> Any:
        sides = []
        for number, (encode, inputs) in enumerate(zip(encoders, batch, strict=True)):
            keys = [jax.random.fold_in(jax.random.fold_in(key, number), index) for index in range(3)]
            parts = [encode(params, inputs[i * size : (i + 1) * size], keys[i]) for i in range(3)]
            sides.append(jnp.concatenate(parts))
        return dense(*sides, jnp.exp(params["log_scale"]))

    step = nibs_jax.decoupled_step(*encoders, loss, micro_batch=size)
    got = jax.jit(step)(params, batch, key)
    close(got, jax.value_and_grad(whole)(params))
    other = jax.jit(step)(params, batch, jax.random.key(4))
    assert abs(float(other[0] - got[0])) > 1e-3


def drawn_elsewhere() -> Any:
    """An encoder with dropout that nobody can replay."""
    r = np.random.default_rng(0)

    def draw(shape: Any) -> Any:
        return (r.random(shape) < 0.8).astype(np.float32)

    def encode(params: Any, inputs: Any) -> Any:
        kind = jax.ShapeDtypeStruct(inputs.shape, jnp.float32)
        kept = io_callback(lambda: draw(inputs.shape), kind)
        return jnp.tanh((inputs * kept) @ params["queries"])

    return encode


def test_an_encoder_that_cannot_be_replayed_is_an_error_and_nan_in_a_trace() -> None:
    params, batch = parameters(), rows(12, 12)
    step = nibs_jax.decoupled_step(drawn_elsewhere(), tower("keys"), loss, micro_batch=4)
    with pytest.raises(InvalidInput, match=r"\d+ of 12 rows of encode_queries changed.*step\(params, batch, key\)"):
        step(params, batch)
    value, gradients = jax.jit(step)(params, batch)
    assert np.isnan(value) and all(np.isnan(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_one_tower_for_both_sides() -> None:
    params, batch = parameters(), rows(12, 12)
    tied = tower("queries")
    got = jax.jit(nibs_jax.decoupled_step(tied, tied, loss, micro_batch=5))(params, batch)
    encoded = jax.value_and_grad(lambda p: dense(tied(p, batch[0]), tied(p, batch[1]), jnp.exp(p["log_scale"])))
    close(got, encoded(params))


def test_a_frozen_towers_rows_are_taken_as_they_are_and_cost_no_gradient() -> None:
    params, batch = parameters(), rows(12, 12)
    step = nibs_jax.decoupled_step(tower("queries"), None, loss, micro_batch=5)
    got = jax.jit(step)(params, batch)
    want = jax.value_and_grad(lambda p: dense(tower("queries")(p, batch[0]), batch[1], jnp.exp(p["log_scale"])))
    close(got, want(params))
    pairs = [one for one, _ in equations(jax.make_jaxpr(step)(params, batch).jaxpr) if is_product_of_pairs(one)]
    assert len(pairs) == 2  # the logits, and their gradient to the queries


def is_product_of_pairs(equation: Any) -> bool:
    return equation.primitive.name == "dot_general" and 12 in equation.outvars[0].aval.shape


def test_trees_of_inputs_masks_and_aux_travel() -> None:
    params, (queries, keys) = parameters(), rows(12, 12)
    mask = jnp.arange(12) % 4 != 3

    def masked(params: Any, queries: Any, keys: Any, mask: Any) -> Any:
        return loss(params, queries, keys, query_mask=mask, key_mask=mask, stats=True)

    step = nibs_jax.decoupled_step(
        lambda params, inputs: tower("queries")(params, inputs["pixels"] + inputs["shift"][:, None]),
        tower("keys"),
        masked,
        micro_batch=5,
        has_aux=True,
    )
    spoilt = jnp.where(mask[:, None], queries, 1e3)
    (value, stats), gradients = jax.jit(step)(params, ({"pixels": spoilt, "shift": jnp.zeros(12)}, keys, mask))
    close((value, gradients), jax.value_and_grad(one_batch)(params, queries[mask], keys[mask]))
    assert int(stats.count) == 9


def test_narrow_parameters_gather_in_float32_and_leave_narrow() -> None:
    params, batch = parameters("bfloat16"), rows(1024, 1024, dtype="bfloat16")
    got = jax.jit(step_of(4))(params, batch)
    want = jax.value_and_grad(one_batch)(jax.tree.map(lambda p: p.astype("float32"), params), *[
        side.astype("float32") for side in batch
    ])  # fmt: skip
    assert got[1]["queries"].dtype == jnp.bfloat16
    for name in ("queries", "keys"):
        error = np.abs(np.asarray(got[1][name], np.float32) - want[1][name]).max()
        assert error < 0.02 * np.abs(want[1][name]).max()  # summed in bfloat16, 256 parts are off by far more


@pytest.mark.parametrize("size", [1, 3, 4])
def test_on_a_ring_gradients_are_complete(mesh: Any, size: int) -> None:
    params, batch = parameters(), rows(24, 24)
    step = nibs_jax.decoupled_step(tower("queries"), tower("keys"), ringed, micro_batch=5)
    run = jax.shard_map(step, mesh=mesh(size), in_specs=(EVERYWHERE, (ROWS, ROWS)), out_specs=EVERYWHERE)
    close(jax.jit(run)(params, batch), jax.value_and_grad(one_batch)(params, *batch))


def test_parameters_are_summed_over_ranks_once(mesh: Any) -> None:
    params, batch = parameters(), rows(24, 24)
    step = nibs_jax.decoupled_step(tower("queries"), tower("keys"), ringed, micro_batch=2)
    run = jax.shard_map(step, mesh=mesh(4), in_specs=(EVERYWHERE, (ROWS, ROWS)), out_specs=EVERYWHERE)
    found = equations(jax.make_jaxpr(jax.jit(run))(params, batch).jaxpr)
    shapes = [
        (variable.aval.shape, times)
        for equation, times in found
        if "psum" in equation.primitive.name
        for variable in equation.outvars
        if variable.aval.shape == (8, 8)
    ]
    assert shapes == [((8, 8), 1)] * 2


def temporary(n: int, **options: Any) -> int:
    """Bytes of temporaries of a step over `n` pairs, through towers that are wide inside."""
    wide = {"in": jax.ShapeDtypeStruct((16, 2048), "float32"), "out": jax.ShapeDtypeStruct((2048, 8), "float32")}

    def encode(params: Any, inputs: Any) -> Any:
        return jnp.tanh(inputs @ params["in"]) @ params["out"]

    step = nibs_jax.decoupled_step(encode, encode, lambda p, q, k: tiled(q, k), micro_batch=64, **options)

    def tiled(queries: Any, keys: Any) -> Any:
        plan = nibs.plan(n, n, 8, query_tile=128, key_tile=128, sweep="recompute")
        return nibs.contrastive_loss(queries, keys, plan=plan)

    inputs = jax.ShapeDtypeStruct((n, 16), "float32")
    compiled = jax.jit(step).lower(wide, (inputs, inputs)).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def test_memory_is_that_of_a_micro_batch_and_linear_embeddings() -> None:
    found = {n: temporary(n) for n in (1024, 4096, 16384)}
    row = 2 * (8 * 4) * 6 + 2 * 20 * 4  # both sides: embeddings, their gradients and copies; vectors of statistics
    for small, large in ((1024, 4096), (4096, 16384)):
        grown = found[large] - found[small]
        assert grown <= (large - small) * row, found
    assert found[16384] - found[1024] < 15360 * 2048 * 4 / 8, "a tower's inner rows, kept, would be many times this"


def test_inputs_in_host_memory_are_fetched_by_the_micro_batch() -> None:
    params, batch = parameters(), rows(37, 37)
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    there = jax.device_put(batch, host)
    step = jax.jit(step_of(8, offload=True))
    close(step(params, there), jax.value_and_grad(one_batch)(params, *batch))
    for platform in ("cuda", "tpu"):
        text = step.trace(params, there).lower(lowering_platforms=(platform,)).as_text()
        placed = [line for line in text.splitlines() if "annotate_device_placement" in line]
        assert any("tensor<8x8xf32>" in line and '"device"' in line for line in placed)
        assert any("tensor<37x8xf32>" in line and '"pinned_host"' in line for line in placed)


def test_sharded_inputs_in_host_memory_work_on_a_ring(mesh: Any) -> None:
    params, batch, there = parameters(), rows(24, 24), mesh(2)
    step = nibs_jax.decoupled_step(tower("queries"), tower("keys"), ringed, micro_batch=5, offload=True)
    run = jax.shard_map(step, mesh=there, in_specs=(EVERYWHERE, (ROWS, ROWS)), out_specs=EVERYWHERE)
    on_host = jax.device_put(batch, NamedSharding(there, ROWS, memory_kind="pinned_host"))
    close(jax.jit(run)(params, on_host), jax.value_and_grad(one_batch)(params, *batch))


def test_it_is_not_differentiated_again() -> None:
    params, batch = parameters(), rows(8, 8)
    with pytest.raises(Unsupported, match="differentiated again"):
        jax.grad(lambda p: step_of(4)(p, batch)[1]["queries"].sum())(params)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: step_of(0), "above 0"),
        (lambda: step_of((4, 4, 4)), "above 0"),
        (lambda: step_of(4, tolerance=0), "tolerance=0"),
        (lambda: nibs_jax.decoupled_step(None, tower("keys"), loss), "encode_queries"),
        (lambda: step_of(4)(parameters(), rows(4, 4)[0]), "query_inputs, key_inputs"),
        (lambda: step_of(4)(parameters(), ({}, jnp.ones((4, 8)))), "nothing"),
        (lambda: step_of(4)(parameters(), ((jnp.ones((3, 8)), jnp.ones((4, 8))), jnp.ones((4, 8)))), "one length"),
        (
            lambda: nibs_jax.decoupled_step(lambda p, x: x.sum(1), tower("keys"), loss)(parameters(), rows(4, 4)),
            "rows",
        ),
    ],
)
def test_what_is_wrong_is_said(make: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        make()
