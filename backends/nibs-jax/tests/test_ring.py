"""The ring of a `shard_map`: one loss, complete gradients wherever they are taken, what is sent, what is refused.

Meaning of the gradients, tested below. The loss is one global number, the same on all ranks. Taken inside the
`shard_map`, gradients of a rank's own rows are those of that global loss (so no further sum belongs to them), and
of what is replicated (scale, encoder parameters) they are summed over ranks by JAX, so complete as well. Taken
outside, of the whole function, they are the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax_checks import close, dense, hops, processes, rows

import nibs
from nibs.errors import InvalidInput

ROWS, EVERYWHERE = PartitionSpec("data"), PartitionSpec()
FOUR = (ROWS, ROWS, EVERYWHERE)


def loss(queries: Any, keys: Any, scale: Any, **options: Any) -> Any:
    return nibs.contrastive_loss(queries, keys, scale=scale, **{"ring": "data", **options})


def over(mesh: Any, work: Any, out: Any, ins: Any = FOUR) -> Any:
    return jax.jit(jax.shard_map(work, mesh=mesh, in_specs=ins, out_specs=out))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_gradients_inside_are_those_of_the_global_loss(mesh: Any, size: int) -> None:
    given = (*rows(24, 24), 3.0)
    inside = over(mesh(size), lambda *x: jax.value_and_grad(loss, (0, 1, 2))(*x), (EVERYWHERE, FOUR))
    close(inside(*given), jax.value_and_grad(dense, (0, 1, 2))(*given))


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_outside_are_the_same(mesh: Any, size: int) -> None:
    given = (*rows(24, 24), 3.0)
    outside = jax.value_and_grad(over(mesh(size), loss, EVERYWHERE), (0, 1, 2))
    close(outside(*given), jax.value_and_grad(dense, (0, 1, 2))(*given))


def test_encoder_parameters_get_the_whole_gradient_without_another_sum(mesh: Any) -> None:
    queries, keys = rows(24, 24)
    weights = jnp.linspace(-1, 1, 64).reshape(8, 8)

    def trained(weights: Any, queries: Any, keys: Any, scale: Any, loss: Any = loss) -> Any:
        return loss(jnp.tanh(queries @ weights), keys, scale)

    inside = over(mesh(4), lambda *x: jax.grad(trained, (0, 3))(*x), EVERYWHERE, (EVERYWHERE, *FOUR))
    want = jax.grad(lambda *x: trained(*x, loss=dense), (0, 3))(weights, queries, keys, 3.0)
    close(inside(weights, queries, keys, 3.0), want)


def test_several_axes_are_one_ring(mesh: Any) -> None:
    given = (*rows(24, 24), 3.0)
    specs = (PartitionSpec(("data", "model")), PartitionSpec(("data", "model")), EVERYWHERE)
    both = over(
        mesh(2, 3),
        lambda *x: jax.value_and_grad(lambda *y: loss(*y, ring=("data", "model")), (0, 1, 2))(*x),
        (EVERYWHERE, specs),
        specs,
    )
    close(both(*given), jax.value_and_grad(dense, (0, 1, 2))(*given))


def test_a_ring_over_one_axis_leaves_the_other_to_its_own_problems(mesh: Any) -> None:
    one, two = rows(12, 12), rows(12, 12, seed=1)
    stacked = [jnp.stack(pair) for pair in zip(one, two, strict=True)]
    specs = (PartitionSpec("model", "data"),) * 2

    def work(queries: Any, keys: Any) -> Any:
        value, gradients = jax.value_and_grad(loss, (0, 1))(queries[0], keys[0], 3.0)
        return value[None], tuple(one[None] for one in gradients)

    got = over(mesh(3, 2), work, (PartitionSpec("model"), specs), specs)(*stacked)
    want = [jax.value_and_grad(lambda q, k: dense(q, k, 3.0), (0, 1))(*pair) for pair in (one, two)]
    close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *want))


@pytest.mark.parametrize("lengths", [(5, 3), (0, 8), (4, 1, 3)], ids=str)
def test_uneven_shards_are_padded_and_masked(mesh: Any, lengths: tuple[int, ...]) -> None:
    queries, keys = rows(8, 8)
    size, longest, begin = len(lengths), max(lengths), 0
    padded, mask = [np.full((size * longest, 8), np.nan, np.float32) for _ in range(2)], np.zeros(size * longest, bool)
    for rank, length in enumerate(lengths):
        for side, values in zip(padded, (queries, keys), strict=True):
            side[rank * longest : rank * longest + length] = values[begin : begin + length]
        mask[rank * longest : rank * longest + length] = True
        begin += length

    def work(queries: Any, keys: Any, scale: Any, mask: Any) -> Any:
        return jax.value_and_grad(lambda *x: loss(*x, query_mask=mask, key_mask=mask), (0, 1, 2))(queries, keys, scale)

    value, gradients = over(mesh(size), work, (EVERYWHERE, FOUR), (*FOUR, ROWS))(*padded, 3.0, mask)
    got = value, (gradients[0][mask], gradients[1][mask], gradients[2])
    close(got, jax.value_and_grad(dense, (0, 1, 2))(queries, keys, 3.0))
    assert (gradients[0][~mask] == 0).all() and (gradients[1][~mask] == 0).all()


@pytest.mark.parametrize("n", [24, 23])
def test_globally_sharded_arrays_need_no_shard_map(mesh: Any, n: int) -> None:
    there = mesh(4)
    where = NamedSharding(there, ROWS if n % 4 == 0 else EVERYWHERE)
    queries, keys = (jax.device_put(side, where) for side in rows(n, n))
    with jax.set_mesh(there):
        got = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(queries, keys, 3.0)
    want = jax.value_and_grad(dense, (0, 1, 2))(*rows(n, n), 3.0)
    close(got, want)
    value, gradients, stats = nibs.contrastive_loss_and_grad(queries, keys, scale=3.0, ring="data", stats=True)
    close((value, (gradients.queries, gradients.keys, gradients.scale)), want)
    assert stats.count == n and stats.query_lse.shape == (n,) and stats.plan.ring_size == 4


def test_no_rows_at_all_are_a_loss_of_zero_on_a_mesh_too(mesh: Any) -> None:
    queries, keys = (jax.device_put(side, NamedSharding(mesh(2), ROWS)) for side in rows(0, 0))
    value, gradients = nibs.contrastive_loss_and_grad(queries, keys, ring="data")
    assert value == 0 and gradients.queries.shape == gradients.keys.shape == (0, 8) and gradients.scale == 0


def test_targets_of_whole_arrays_are_rows_of_the_whole(mesh: Any) -> None:
    queries, keys = rows(8, 8)
    targets = jnp.asarray([1, 0, 3, 2, 5, 4, 7, 6])
    where = NamedSharding(mesh(2), ROWS)
    got = loss(jax.device_put(queries, where), jax.device_put(keys, where), 3.0, targets=jax.device_put(targets, where))
    close(got, dense(queries, keys[targets], 3.0))
    with pytest.raises(InvalidInput, match=r"targets\[3\] = 6 is a key of rank 1"):
        loss(
            jax.device_put(queries, where),
            jax.device_put(keys, where),
            3.0,
            targets=jax.device_put(targets.at[3].set(6), where),
        )


def test_stats_are_global(mesh: Any) -> None:
    queries, keys = rows(24, 24)

    def work(*x: Any) -> Any:
        stats = loss(*x, stats=True)[1]
        return stats.count, stats.mean_positive, stats.hardest_negative

    count, mean, hardest = over(mesh(4), work, EVERYWHERE)(queries, keys, 1.0)
    logits = np.asarray(queries @ keys.T)
    assert int(count) == 24
    close((mean, hardest), (np.diagonal(logits).mean(), logits[~np.eye(24, dtype=bool)].max()))


@pytest.mark.parametrize(
    ("objective", "dtype", "passes"),
    [(nibs.InfoNCE(), "float32", 2), (nibs.InfoNCE(), "bfloat16", 2), (nibs.Sigmoid(), "float32", 1)],
    ids=["symmetric", "half", "sigmoid"],
)
def test_no_more_is_sent_than_the_bound(mesh: Any, objective: Any, dtype: str, passes: int) -> None:
    size, m, d = 4, 16, 64
    queries, keys = rows(size * m, size * m, d, dtype=dtype)
    call = over(
        mesh(size),
        lambda *x: jax.value_and_grad(lambda *y: loss(*y, objective=objective), (0, 1, 2))(*x),
        (EVERYWHERE, FOUR),
    )
    count, sent = hops(call, queries, keys, 3.0)
    assert count == passes * (size - 1) + size
    assert sent <= m * d * (passes * (size - 1) * keys.dtype.itemsize + size * 4) + size * m * 4 * 6


def test_a_ring_of_one_sends_nothing(mesh: Any) -> None:
    call = over(mesh(1), lambda *x: jax.grad(loss)(*x), ROWS)
    assert hops(call, *rows(8, 8), 3.0) == (0, 0)


def test_the_next_shard_is_under_way_while_a_tile_is_computed(mesh: Any) -> None:
    # What a hop moves must not depend on what is computed beside it: keys hop straight from where they arrived.
    call = over(mesh(2), loss, EVERYWHERE)
    text = str(jax.make_jaxpr(call)(*rows(8, 8), 3.0))
    assert text.index("ppermute") < text.index("dot_general")


def test_queries_that_do_not_vary_over_the_axis_are_refused(mesh: Any) -> None:
    queries, keys = rows(8, 8)
    with pytest.raises(InvalidInput, match=r"queries does not vary over mesh axis 'data'.*check_vma=True"):
        over(mesh(2), loss, EVERYWHERE, (EVERYWHERE, EVERYWHERE, EVERYWHERE))(queries, keys, 1.0)


def test_an_unchecked_shard_map_is_refused(mesh: Any) -> None:
    call = jax.shard_map(loss, mesh=mesh(2), in_specs=FOUR, out_specs=EVERYWHERE, check_vma=False)
    with pytest.raises(InvalidInput, match="check_vma=True"):
        jax.jit(call)(*rows(8, 8), 1.0)


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_a_gradient_reduction_is_refused(mesh: Any, how: Any) -> None:
    with pytest.raises(InvalidInput, match="already sums"):
        over(mesh(2), lambda *x: loss(*x, grad_reduction=how), EVERYWHERE)(*rows(8, 8), 1.0)


def test_an_axis_that_is_nowhere_is_refused() -> None:
    with pytest.raises(InvalidInput, match="there is no mesh here"):
        loss(*rows(8, 8), 1.0)


@pytest.mark.parametrize("ring", [("data", "data"), (), ("data", 3)], ids=str)
def test_a_ring_that_is_no_axis_is_refused(ring: Any) -> None:
    with pytest.raises(InvalidInput, match="mesh axis name"):
        loss(*rows(8, 8), 1.0, ring=ring)


def test_processes_that_meet_over_gloo_give_the_same(tmp_path: Path) -> None:
    found = processes(3, tmp_path, "ring")  # the least that tell one way round from the other
    queries, keys = rows(24, 24)
    want = jax.value_and_grad(dense, (0, 1, 2))(queries, keys, 3.0)
    for one in found:
        close((one["loss"], one["scale"]), (want[0], want[1][2]))
    close(np.concatenate([one["queries"] for one in found]), want[1][0])
    close(np.concatenate([one["keys"] for one in found]), want[1][1])
