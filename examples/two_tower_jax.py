"""Two towers trained in plain JAX, loss and gradient under one jit: what `two_tower.py` is for PyTorch, in small.

    python examples/two_tower_jax.py [--steps N] [--batch N]

Pairs are two noisy linear views of the same hidden things, so that it needs no data and ends in seconds. It prints
the loss and how often a query finds its key among held-out ones, and refuses to call it a success below nine in ten.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import nibs

HIDDEN, WIDTH, DIM = 16, 48, 32


def views(key: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Two views `[rows, WIDTH]` of the same hidden rows; the views themselves are always the same two."""
    left, right = jax.random.normal(jax.random.key(7), (2, HIDDEN, WIDTH)) / HIDDEN**0.5
    hidden, noise = jax.random.split(key)
    things = jax.random.normal(hidden, (rows, HIDDEN))
    noises = jax.random.normal(noise, (2, rows, WIDTH)) * 0.2
    return jnp.tanh(things @ left) + noises[0], jnp.tanh(things @ right) + noises[1]


def tower(weights: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    """Rows `[n, DIM]` of length 1."""
    rows = jax.nn.gelu(inputs @ weights["in"]) @ weights["out"]
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def initial(key: jax.Array) -> dict[str, Any]:
    """Both towers, and the logarithm of the scale."""
    sizes = {"in": (WIDTH, 2 * DIM), "out": (2 * DIM, DIM)}
    keys = iter(jax.random.split(key, 4))
    towers = {
        side: {name: jax.random.normal(next(keys), size) / size[0] ** 0.5 for name, size in sizes.items()}
        for side in ("left", "right")
    }
    return {**towers, "log_scale": jnp.log(10.0)}


def loss(parameters: dict[str, Any], left: jax.Array, right: jax.Array) -> jax.Array:
    """CLIP's loss, tile by tile."""
    queries, keys = tower(parameters["left"], left), tower(parameters["right"], right)
    return nibs.clip(queries, keys, scale=jnp.minimum(jnp.exp(parameters["log_scale"]), 100.0))


@partial(jax.jit, donate_argnums=(0, 1))
def step(parameters: Any, momenta: Any, left: jax.Array, right: jax.Array) -> tuple[Any, Any, jax.Array]:
    """One step of gradient descent with momentum."""
    value, gradients = jax.value_and_grad(loss)(parameters, left, right)
    momenta = jax.tree.map(lambda m, g: 0.9 * m + g, momenta, gradients)
    return jax.tree.map(lambda p, m: p - 0.05 * m, parameters, momenta), momenta, value


def found(parameters: Any, left: jax.Array, right: jax.Array) -> float:
    """The share of queries whose nearest key is their own."""
    nearest = (tower(parameters["left"], left) @ tower(parameters["right"], right).T).argmax(1)
    return float((nearest == jnp.arange(len(left))).mean())


def main() -> None:
    """Train, print, and judge."""
    parser = argparse.ArgumentParser(description="Train two towers in JAX through nibs.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1024)
    options = parser.parse_args()
    parameters = initial(jax.random.key(0))
    momenta = jax.tree.map(jnp.zeros_like, parameters)
    held_out = views(jax.random.key(1), 512)
    begun = time.perf_counter()
    for index in range(options.steps):
        parameters, momenta, value = step(parameters, momenta, *views(jax.random.key(100 + index), options.batch))
        if index % 50 == 0 or index == options.steps - 1:
            print(f"step {index:4d}   loss {float(value):.4f}   found {found(parameters, *held_out):.3f}")
    share = found(parameters, *held_out)
    print(f"{share:.1%} of 512 held-out queries find their key, after {time.perf_counter() - begun:.1f} s.")
    if share < 0.9:
        raise SystemExit("that is no success: expected nine in ten.")


if __name__ == "__main__":
    main()
