"""Wrong rings must show: each mutant below breaks one line of the ring, and the checks of test_ring.py must notice."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from jax_checks import dense, rows

import nibs
from nibs_jax import backend, ring, schedule

ROWS, EVERYWHERE = PartitionSpec("data"), PartitionSpec()
SPECS = (ROWS, ROWS, EVERYWHERE)


def mean_of_sums(self: Any, value: Any) -> Any:
    return lax.psum(value, self.axes) / self.size if self.axes else value


def twice(self: Any, value: Any) -> Any:
    return lax.psum(value, self.axes) * self.size if self.axes else value


def backwards(self: Any, arrays: Any) -> Any:
    """Statistics and gradients go on the wrong way, keys the right way: half of the hops are reversed."""
    hop = [(rank, (rank + 1) % self.size) for rank in range(self.size)]
    back = [(there, here) for here, there in hop]
    return jax.tree.map(lambda array: lax.ppermute(array, self.axes, hop if array.ndim == 2 else back), arrays)


def keys_backwards(self: Any, arrays: Any) -> Any:
    """Keys go the wrong way, and their masks, statistics and weights the right way."""
    hop = [(rank, (rank + 1) % self.size) for rank in range(self.size)]
    back = [(there, here) for here, there in hop]
    return jax.tree.map(lambda array: lax.ppermute(array, self.axes, back if array.ndim == 2 else hop), arrays)


def summed(self: Any, weights: Any, real: Any = schedule.Call._settle) -> None:
    """Gradients of the sum of the ranks' means."""
    real(self, weights)
    self.factor = self.factor * self.ring.size


def counted(self: Any, *, queries: bool, real: Any = schedule.Call._anchor_weights) -> Any:
    weights = real(self, queries=queries)
    return jax.numpy.maximum(weights, 1)


MUTANTS = {
    "mean instead of sum over shards": (ring.Ring, "sum", mean_of_sums),
    "psum twice": (ring.Ring, "sum", twice),
    "sum instead of mean over shards": (schedule.Call, "_settle", summed),
    "statistics hop the wrong way": (ring.Ring, "shift", backwards),
    "keys hop the wrong way": (ring.Ring, "shift", keys_backwards),
    "padding counted": (schedule.Call, "_anchor_weights", counted),
}


def distance() -> float:
    """How far loss and gradients of four ranks, one row in four of them padding, are from the dense ones."""
    queries, keys = rows(16, 16)
    mask = np.arange(16) % 4 != 3
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])

    def work(queries: Any, keys: Any, scale: Any, mask: Any) -> Any:
        def loss(*given: Any) -> Any:
            queries, keys, scale = given
            return nibs.contrastive_loss(queries, keys, scale=scale, ring="data", query_mask=mask, key_mask=mask)

        return jax.value_and_grad(loss, (0, 1, 2))(queries, keys, scale)

    run = jax.shard_map(work, mesh=mesh, in_specs=(*SPECS, ROWS), out_specs=(EVERYWHERE, SPECS))
    value, gradients = jax.jit(run)(queries, keys, 3.0, mask)
    got = value, (gradients[0][mask], gradients[1][mask], gradients[2])
    want = jax.value_and_grad(dense, (0, 1, 2))(queries[mask], keys[mask], 3.0)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    worst = [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs]
    return float("inf") if np.isnan(worst).any() else max(worst)


@pytest.fixture(autouse=True)
def fresh(mesh: Any) -> Any:
    """What was compiled for the right ring must not serve a wrong one, nor the other way round."""
    mesh(4)
    caches = (backend._compiled_loss, backend._compiled_loss_and_grad)
    for cache in caches:
        cache.clear_cache()
    yield
    for cache in caches:
        cache.clear_cache()


def test_the_ring_itself_passes() -> None:
    assert distance() < 1e-5


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_ring_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, wrong = MUTANTS[name]
    monkeypatch.setattr(owner, method, wrong)
    assert distance() > 1e-3
