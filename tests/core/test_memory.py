"""A budget is a bound: what NumPy really holds at its peak stays under `memory=`, whatever the options."""

from __future__ import annotations

import gc
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import nibs

N, M, D = 160, 200, 16
DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
IDS = {"query_ids": np.arange(N) % 40, "key_ids": np.arange(M) % 40}
MASKS = {"query_mask": np.arange(N) % 7 != 0, "key_mask": np.arange(M) % 5 != 0}
REST = {"targets": np.arange(N), "weights": np.ones(N, np.float32)}
CALLS = {
    "symmetric": {},
    "one way": {"objective": nibs.InfoNCE("query_to_key")},
    "other way": {"objective": nibs.InfoNCE("key_to_query")},
    "everything": {
        "objective": nibs.InfoNCE(label_smoothing=0.1, same_id="exclude", false_negative_margin=0.1),
        "stats": True,
        **IDS,
        **MASKS,
        **REST,
    },
    "positives": {"objective": nibs.InfoNCE("key_to_query", same_id="positive"), "stats": True, **IDS, **MASKS},
    "sigmoid": {"objective": nibs.Sigmoid()},
    "sigmoid masked": {"objective": nibs.Sigmoid("positive"), "stats": True, **IDS, **MASKS},
    "queries alone": {"wrt": "queries"},
    "one way, keys alone": {"objective": nibs.InfoNCE("query_to_key"), "wrt": "keys"},
}


def _peak(call, *arguments, **options):
    """Bytes at the peak beyond what the call returns."""
    call(*arguments, **options)  # what Python and NumPy set up once is nobody's workspace
    gc.collect()
    tracemalloc.start()
    result = call(*arguments, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    parts = result if isinstance(result, tuple) else (result,)
    names = ("queries", "keys", "query_lse", "key_lse")
    return peak - sum(getattr(getattr(part, name, None), "nbytes", 0) for part in parts for name in names)


@pytest.mark.parametrize("scale", [2.0, 300.0], ids=["gentle", "underflowing"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CALLS)
def test_peak_stays_under_the_budget(name, dtype, scale):
    rng = np.random.default_rng(1)
    queries, keys = (rng.standard_normal((rows, D)).astype(DTYPES[dtype]) for rows in (N, M))
    options = CALLS[name] | {"scale": scale}
    with pytest.raises(nibs.errors.MemoryBudget) as caught:
        nibs.contrastive_loss_and_grad(queries, keys, memory=1, **options)
    least = caught.value.least

    for budget in (least, 4 * least):
        assert _peak(nibs.contrastive_loss_and_grad, queries, keys, memory=budget, **options) <= budget


@pytest.mark.parametrize("name", [name for name in CALLS if "wrt" not in CALLS[name]])
def test_loss_alone_stays_under_the_budget(name):
    rng = np.random.default_rng(1)
    queries, keys = (rng.standard_normal((rows, D)).astype(np.float32) for rows in (N, M))
    budget = "600KiB"

    peak = _peak(nibs.contrastive_loss, queries, keys, memory=budget, **CALLS[name])

    assert peak <= 600 * 1024
