"""The loss with its gradients under JAX's jit, beside the dense loss under jit and the bare matrix products.

    python benchmarks/jax_step.py [--n N] [--dim D] [--turns T]
    python benchmarks/jax_step.py --compile 1024 65536 1000000     only compiles: time, temporaries

CPU time of the process, the best of turns taken one after the other, so that a busy machine disturbs the ratios
little; run it on one core (`taskset -c 0`) for figures that compare. Three products of 2 n^2 d flops are what the
dense loss makes, and nibs where it keeps its tiles; four where it computes them again. Bare, they are measured as the
dense loss makes them, and in the shapes that nibs gives them. NIBS_JAX_KERNELS=numpy has NumPy compute nibs's.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nibs

TILE = 1024


def dense(queries: Any, keys: Any, scale: Any) -> Any:
    """The symmetric loss as everybody writes it."""
    logits = scale * queries @ keys.T
    rows, columns = (jnp.diagonal(jax.nn.log_softmax(logits, axis)).mean() for axis in (1, 0))
    return -(rows + columns) / 2


def products(tile: int, queries: Any, keys: Any, *, turned: bool) -> Any:
    """The bare products of n x n pairs, in tiles of `tile` rows; turned: the last one as `q^T w`, as nibs has it."""
    weights = jnp.ones((tile, tile))
    multiply = [jax.jit(lambda a, b: a @ b.T), jax.jit(lambda a, b: a @ b), jax.jit(lambda a, b: a.T @ b)]
    queries, keys, times = queries[:tile], keys[:tile], (-(-len(queries) // tile)) ** 2
    operands = [(queries, keys), (weights, keys), (queries, weights) if turned else (weights, queries)]

    def call() -> None:
        for _ in range(times):
            jax.block_until_ready([one(*both) for one, both in zip(multiply, operands, strict=True)])

    return call


def program(name: str, loss: Any, n: int, d: int) -> Any:
    """Value and gradients of the loss, compiled for n pairs; prints what that took."""
    rows, scale = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    begun = time.process_time()
    found = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(rows, rows, scale).compile()
    seconds, size = time.process_time() - begun, found.memory_analysis().temp_size_in_bytes
    print(f"{name}, n = {n:,}: compiled in {seconds:.2f} s, {size / 2**20:,.0f} MiB of temporaries", flush=True)
    return found


def main() -> None:
    """Measure and print a line for each."""
    parser = argparse.ArgumentParser(description="CPU time of the loss under JAX.")
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--compile", type=int, nargs="+", metavar="N", help="only compile, for so many pairs")
    options = parser.parse_args()
    n, d = options.n, options.dim
    losses: dict[str, Any] = {"dense": dense, "nibs": lambda q, k, s: nibs.contrastive_loss(q, k, scale=s)}
    if options.compile:
        program("a first one, which does not count", losses["nibs"], 8, d)
        for size in options.compile:
            for name, loss in losses.items():
                program(name, loss, size, d)
        return
    r = np.random.default_rng(0)
    queries = r.standard_normal((n, d)).astype(np.float32)
    sides = [queries, queries + r.standard_normal((n, d)).astype(np.float32)]
    queries, keys = (jnp.asarray(side / np.linalg.norm(side, axis=1, keepdims=True)) for side in sides)
    kept = nibs.plan(n, n, d, query_tile=min(n, TILE), key_tile=min(n, TILE), sweep="keep")
    losses["nibs, tiles kept"] = lambda q, k, s: nibs.contrastive_loss(q, k, scale=s, plan=kept)
    calls: dict[str, Any] = {}
    for name, loss in losses.items():
        compiled = program(name, loss, n, d)
        calls[name] = lambda compiled=compiled: compiled(queries, keys, jnp.float32(14.3))
    calls["three products"] = products(n, queries, keys, turned=False)
    calls["three, in tiles"] = products(min(n, TILE), queries, keys, turned=True)
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(options.turns + 1):
        for name, call in calls.items():
            begun = time.process_time()
            jax.block_until_ready(call())
            if turn:  # the first one warms up
                best[name] = min(best[name], time.process_time() - begun)
    for name, seconds in best.items():
        print(f"{name:18} {seconds:7.3f} s   {seconds / best['dense']:.2f} of dense")


if __name__ == "__main__":
    main()
