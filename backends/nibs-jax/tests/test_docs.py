"""The blocks of docs/jax.md run, one after the other, as they stand there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax_checks import blocks_of_page, close, dense, processes, rows


def test_the_snippets_run_and_give_the_dense_loss(mesh: Any) -> None:
    blocks = blocks_of_page()
    assert list(blocks) == ["jit", "shard_map", "global", "decoupled", "hosts", "local_rows"]
    images, texts = rows(16, 16)
    parameters = {"image": jnp.eye(8), "text": jnp.eye(8) + 0.1, "log_scale": jnp.asarray(0.7)}
    space: dict[str, Any] = {"mesh": mesh(4), "queries": images, "keys": texts}

    exec(blocks["jit"], space)
    value, moved = space["step"](parameters, images, texts)
    queries, keys = images, texts @ parameters["text"]
    queries, keys = (side / jnp.linalg.norm(side, axis=1, keepdims=True) for side in (queries, keys))
    close(value, dense(queries, keys, np.exp(0.7)))
    assert space["step"](moved, images, texts)[0] < value

    exec(blocks["shard_map"], space)
    got = space["sharded"](parameters, images, texts)

    def whole(parameters: Any) -> Any:
        return dense(images @ parameters["image"], texts @ parameters["text"], jnp.exp(parameters["log_scale"]))

    close(got, jax.value_and_grad(whole)(parameters), 1e-5)

    exec(blocks["global"], space)
    close(space["value"], dense(images, texts, 10.0))

    space.update(parameters=parameters, images=images, texts=texts)
    exec(blocks["decoupled"], space)
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), index) for index in range(4)]

    def dropped(parameters: Any) -> Any:
        parts = [space["image_tower"](parameters, images[4 * i : 4 * i + 4], key) for i, key in enumerate(keys)]
        return dense(jnp.concatenate(parts), texts @ parameters["text"], jnp.exp(parameters["log_scale"]))

    close((space["value"], space["gradients"]), jax.value_and_grad(dropped)(parameters), 1e-5)


def test_the_snippet_for_many_hosts_runs_on_two_processes(tmp_path: Path) -> None:
    images, texts = (np.random.default_rng(seed).standard_normal((16, 8)).astype(np.float32) / 2 for seed in (1, 2))
    parameters = {"image": jnp.eye(8), "text": jnp.eye(8) + 0.1, "log_scale": jnp.asarray(0.7)}

    def whole(parameters: Any) -> Any:
        return dense(images @ parameters["image"], texts @ parameters["text"], jnp.exp(parameters["log_scale"]))

    value, gradients = jax.value_and_grad(whole)(parameters)
    for found in processes(2, tmp_path, "page"):
        close({name: found[name] for name in gradients}, gradients, 1e-5)
        close(found["value"], value)
