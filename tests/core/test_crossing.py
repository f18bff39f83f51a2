"""Arrays of one framework served by the backend of another: by DLPack, without a copy, with gradients, and back."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

import nibs
from nibs import errors
from nibs_torch import plugin as torch_plugin

DTYPES = ["float64", "float32", "bfloat16", "float16"]
CLOSE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


@pytest.fixture
def both(here):
    """Provide the registry with NumPy, PyTorch, and a recorder of NumPy's requests."""
    here.registry.add(torch_plugin, "torch", "nibs-torch 0.1.0")
    here.add("recorder")
    return here


@pytest.fixture
def tensors(batch):
    """Provide queries and keys that want gradients, and a scale of shape [1]."""

    def make(dtype):
        return [
            torch.tensor(values, dtype=getattr(torch, dtype)).requires_grad_() for values in (batch.queries, batch.keys)
        ] + [torch.tensor([2.0], requires_grad=True)]

    return make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tensors_get_numpy_s_loss_with_pytorch_s_autograd(both, tensors, dtype, reduction):
    queries, keys, scale = tensors(dtype)

    def gradients(backend):
        loss = nibs.contrastive_loss(queries, keys, scale=scale, reduction=reduction, backend=backend)
        return loss, *torch.autograd.grad(loss.sum(), (queries, keys, scale))

    for mine, theirs in zip(gradients("numpy"), gradients("torch")):
        assert type(mine) is torch.Tensor and mine.dtype == theirs.dtype and mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_get_pytorch_s_gradients_as_arrays(both, batch, dtype):
    kind = getattr(ml_dtypes, dtype, dtype) if dtype == "bfloat16" else dtype
    queries, keys = batch.queries.astype(kind), batch.keys.astype(kind)

    loss, mine = nibs.contrastive_loss_and_grad(queries, keys, scale=2.0, backend="torch")
    _, theirs = nibs.contrastive_loss_and_grad(queries, keys, scale=2.0)

    assert isinstance(loss, np.ndarray) and mine.queries.dtype == queries.dtype
    np.testing.assert_allclose(
        mine.queries.astype(np.float64), theirs.queries.astype(np.float64), rtol=CLOSE[dtype], atol=CLOSE[dtype]
    )


def test_nothing_is_copied_on_the_way_over(both, tensors):
    queries, keys, scale = tensors("float32")

    nibs.contrastive_loss_and_grad(queries, keys, scale=scale, backend="recorder")

    request = both.served["recorder"].requests[0]
    addresses = [array.__array_interface__["data"][0] for array in (request.queries, request.keys)]
    assert addresses == [queries.data_ptr(), keys.data_ptr()]


def test_bfloat16_crosses_by_its_bits_without_a_copy(both, tensors):
    queries, keys, scale = tensors("bfloat16")

    nibs.contrastive_loss_and_grad(queries, keys, scale=scale, backend="recorder")

    request = both.served["recorder"].requests[0]
    assert request.queries.dtype == ml_dtypes.bfloat16
    assert request.queries.__array_interface__["data"][0] == queries.data_ptr()


def test_everything_that_belongs_to_the_rows_crosses(both, tensors):
    queries, keys, _ = tensors("float32")
    options = {
        "targets": torch.tensor([1, 0, 3, 2, -1, 4]),
        "query_mask": torch.tensor([True] * 5 + [False]),
        "key_mask": torch.tensor([True] * 7 + [False]),
        "weights": torch.linspace(0, 1, 6),
        "query_ids": torch.arange(6) % 4,
        "key_ids": torch.arange(8) % 4,
        "objective": nibs.InfoNCE(same_id="exclude"),
        "stats": True,
    }

    loss, stats = nibs.contrastive_loss(queries, keys, backend="numpy", **options)
    expected, theirs = nibs.contrastive_loss(queries, keys, **options)

    torch.testing.assert_close(loss, expected)
    assert type(stats.query_lse) is torch.Tensor and stats.count == theirs.count


def test_rows_in_reverse_cross(both, batch):
    loss = nibs.contrastive_loss(batch.queries[::-1], batch.keys[:, ::-1], backend="torch")

    np.testing.assert_allclose(loss, nibs.contrastive_loss(batch.queries[::-1], batch.keys[:, ::-1]), rtol=1e-6)


def test_frozen_side_is_not_computed_abroad(both, tensors):
    queries, keys, scale = tensors("float32")

    nibs.contrastive_loss(queries, keys.detach(), scale=scale, backend="recorder")

    assert both.served["recorder"].requests[0].wrt == ("queries", "scale")


def test_mixed_frameworks_are_refused(both, batch, refusal):
    text = refusal(errors.InvalidInput, nibs.contrastive_loss, torch.tensor(batch.queries), batch.keys)

    assert text == (
        "keys is a float32 array of shape (8, 4) on cpu (numpy.ndarray) while queries is a float32 array of shape "
        "(6, 4) on cpu (torch.Tensor): expected arrays of one framework. Convert keys first."
    )


def test_mixed_devices_are_refused(both, batch, refusal):
    keys = torch.empty(8, 4, device="meta")

    text = refusal(errors.InvalidInput, nibs.contrastive_loss, torch.tensor(batch.queries), keys)

    assert text == "keys is on meta and queries on cpu: move them to one device."


def test_narrowing_is_refused_not_done(both, batch, refusal):
    both.served["recorder"].asarray = lambda values, dtype=None, device=None: np.asarray(values, np.float32)

    text = refusal(
        errors.InvalidInput,
        nibs.contrastive_loss_and_grad,
        batch.queries.astype(np.float64),
        batch.keys.astype(np.float64),
        backend="recorder",
    )

    assert text == "backend 'recorder' would narrow a float64 array to float32: convert it yourself first."


def test_second_derivative_through_a_foreign_backend_is_refused(both, tensors):
    queries, keys, _ = tensors("float32")
    loss = nibs.contrastive_loss(queries, keys, backend="numpy")
    (first,) = torch.autograd.grad(loss, queries, create_graph=True)

    with pytest.raises((errors.Unsupported, RuntimeError), match="once"):
        torch.autograd.grad(first.sum(), queries)
