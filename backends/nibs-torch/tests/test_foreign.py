"""Another backend's kernels on PyTorch's tensors, under PyTorch's autograd."""

from __future__ import annotations

import pytest
import torch
from dense_torch import leaves
from torch.testing import assert_close

import nibs
from nibs.errors import Unsupported

pytest.importorskip("nibs_numpy")

OBJECTIVES = [nibs.InfoNCE(), nibs.InfoNCE("query_to_key"), nibs.InfoNCE("key_to_query", 0.1), nibs.Sigmoid()]
SHARED_KEYS = {
    "targets": torch.tensor([3, 3, 1, -1, 0, 0, 0]),
    "weights": torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 3.0, 1.0], dtype=torch.float64),
    "query_mask": torch.tensor([True, True, True, True, True, True, False]),
}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("options", [{}, SHARED_KEYS], ids=["diagonal", "shared keys"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_foreign_kernels_have_the_gradients_of_our_own(objective, options, reduction):
    queries, keys, scale = inputs = leaves()
    factors = torch.linspace(-2, 3, 7, dtype=torch.float64) if reduction == "none" else torch.tensor(1.5).double()
    found = []
    for backend in ("torch", "numpy"):
        loss = nibs.contrastive_loss(
            queries, keys, scale=scale, objective=objective, reduction=reduction, backend=backend, **options
        )
        found.append((loss.detach(), torch.autograd.grad(loss, inputs, factors)))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_crosses_and_is_rounded_once_after_the_upstream_factor(dtype):
    queries, keys, _ = leaves(n=64, dtype=dtype)
    wide = [rows.detach().double().requires_grad_() for rows in (queries, keys)]
    (65536 * nibs.contrastive_loss(queries, keys, scale=0.5, backend="numpy")).backward()
    (65536 * nibs.contrastive_loss(*wide, scale=0.5)).backward()
    assert queries.grad.dtype == dtype
    assert (queries.grad == wide[0].grad.to(dtype)).float().mean() > 0.99


def test_nothing_is_copied_on_the_way_over():
    tensor = leaves(dtype=torch.float32)[0].detach()
    torch_backend, numpy_backend = (nibs.registry.registry.load(name) for name in ("torch", "numpy"))
    there = numpy_backend.asarray(torch_backend.detach(tensor))
    back = torch_backend.asarray(there)
    assert there.__array_interface__["data"][0] == tensor.data_ptr() == back.data_ptr()


def test_stats_come_back_as_tensors():
    queries, keys, _ = leaves()
    loss, stats = nibs.contrastive_loss(queries, keys, stats=True, backend="numpy")
    loss.backward()
    assert isinstance(stats.query_lse, torch.Tensor) and queries.grad is not None


def test_a_transform_cannot_see_into_foreign_kernels_and_says_so():
    queries, keys, _ = leaves()
    with pytest.raises(Unsupported, match=r"inside torch\.func"):
        torch.func.grad(lambda rows: nibs.contrastive_loss(rows, keys.detach(), backend="numpy"))(queries.detach())
