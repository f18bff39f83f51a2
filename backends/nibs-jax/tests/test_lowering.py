"""The program for a GPU and for a TPU, made without either: lowering only; nobody has run the TPU's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import nibs

OBJECTIVES = {
    "symmetric": nibs.InfoNCE(),
    "one-way": nibs.InfoNCE("query_to_key", label_smoothing=0.1),
    "margin": nibs.InfoNCE(false_negative_margin=0.2),
    "sigmoid": nibs.Sigmoid(),
}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_lower(objective: str, dtype: str, platform: str) -> None:
    rows = jax.ShapeDtypeStruct((100_000, 64), dtype)

    def loss(queries: Any, keys: Any, scale: Any) -> Any:
        return nibs.contrastive_loss(queries, keys, scale=scale, objective=OBJECTIVES[objective])

    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(rows, rows, jax.ShapeDtypeStruct((), jnp.float32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.dot_general" in text
    assert "100000x100000" not in text
    assert len(text.splitlines()) < 3000, "the program must not grow with the batch"
