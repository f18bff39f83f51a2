"""What autograd may ask of the loss, and what it gets."""

from __future__ import annotations

import pytest
import torch
from dense_torch import leaves, symmetric
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import nibs
from nibs.errors import InvalidInput, MemoryBudget, Unsupported
from nibs_torch import mkl

DERIVED = torch.autograd.grad


def test_a_scalar_loss_has_the_gradients_of_the_dense_one():
    inputs = leaves()
    assert_close(
        DERIVED(nibs.contrastive_loss(*inputs[:2], scale=inputs[2]), inputs), DERIVED(symmetric(*inputs), inputs)
    )


def test_a_gradient_is_asked_for_only_where_it_is_required():
    queries, keys, scale = leaves()
    nibs.contrastive_loss(queries, keys.detach(), scale=scale.detach()).backward()
    assert queries.grad is not None and keys.grad is None and scale.grad is None


def test_wrt_leaves_an_input_out_although_it_requires_a_gradient():
    queries, keys, scale = leaves()
    nibs.contrastive_loss(queries, keys, scale=scale, wrt=("keys",)).backward()
    assert queries.grad is None and keys.grad is not None


def test_a_retained_graph_is_right_for_every_backward():
    inputs = leaves()
    loss = nibs.contrastive_loss(*inputs[:2], scale=inputs[2])
    first, tripled, last = (DERIVED(factor * loss, inputs, retain_graph=True) for factor in (1, 3, 1))
    assert_close(tripled, tuple(3 * one for one in first))
    assert_close(last, first)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_loss_within_a_checkpoint_has_its_gradients(reentrant):
    queries, keys, _ = leaves()
    (expected,) = DERIVED(nibs.contrastive_loss(queries, keys.detach()), queries)
    checkpoint(lambda rows: nibs.contrastive_loss(rows, keys.detach()), queries, use_reentrant=reentrant).backward()
    assert_close(queries.grad, expected)


def test_accumulated_gradients_do_not_share_memory_with_the_graph():
    queries, keys, _ = leaves()
    loss = nibs.contrastive_loss(queries, keys)
    loss.backward(retain_graph=True)
    once = queries.grad.clone()
    loss.backward()
    assert_close(queries.grad, 2 * once)


@pytest.mark.parametrize("direction", ["symmetric", "query_to_key", "key_to_query"])
def test_per_row_values_take_an_upstream_factor_each(direction):
    queries, keys, scale = leaves()
    factors = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, -1.0, 2.0], dtype=torch.float64)
    objective = nibs.InfoNCE(direction)
    values = nibs.contrastive_loss(queries, keys, scale=scale, objective=objective, reduction="none")
    logits = scale * (queries @ keys.T)
    sides = {"query_to_key": [logits], "key_to_query": [logits.T], "symmetric": [logits, logits.T]}[direction]
    dense = sum(side.logsumexp(1) - side.diagonal() for side in sides) / len(sides)
    assert_close(values, dense)
    assert_close(DERIVED(values, (queries, keys, scale), factors), DERIVED(dense, (queries, keys, scale), factors))


def test_changing_an_input_in_place_before_a_deferred_backward_is_noticed():
    queries, keys, _ = leaves()
    keys = keys.clone()
    values = nibs.contrastive_loss(queries, keys, reduction="none")
    keys += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("how", ["backward", "grad", "func"])
def test_a_second_derivative_is_refused_by_name(reduction, how):
    queries, keys, _ = leaves()

    def loss(rows):
        return nibs.contrastive_loss(rows, keys, reduction=reduction).sum()

    def second():
        if how == "func":
            return torch.func.grad(lambda rows: torch.func.grad(loss)(rows).sum())(queries.detach())
        first = DERIVED(loss(queries), queries, create_graph=True)[0].sum()
        return first.backward() if how == "backward" else DERIVED(first, queries)

    with pytest.raises(Unsupported, match="once, not twice"):
        second()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_rounded_once_after_a_grad_scaler(monkeypatch, dtype):
    monkeypatch.setattr(mkl, "_has_tiles", lambda: False)  # whose products would round the weights too
    queries, keys, _ = leaves(n=64, dtype=dtype)
    wide = [rows.detach().double().requires_grad_() for rows in (queries, keys)]
    (65536 * nibs.contrastive_loss(queries, keys, scale=0.5)).backward()
    (65536 * nibs.contrastive_loss(*wide, scale=0.5)).backward()
    assert (queries.grad == wide[0].grad.to(dtype)).float().mean() > 0.99
    assert queries.grad.dtype == dtype


def test_grad_scaler_scales_skips_and_recovers():
    queries = torch.nn.Parameter(leaves(dtype=torch.float32)[0].detach())
    keys = leaves(dtype=torch.float32)[1].detach()
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    optimizer = torch.optim.SGD([queries], lr=0.5)
    before = nibs.contrastive_loss(queries, keys).item()
    scaler.scale(nibs.contrastive_loss(queries, keys)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert nibs.contrastive_loss(queries, keys).item() < before


def test_mixed_dtypes_promote_under_autocast_and_nowhere_else():
    queries, keys, _ = leaves(dtype=torch.float32)
    half = keys.detach().bfloat16().requires_grad_()
    with pytest.raises(InvalidInput, match="mixed dtypes promote under autocast only"):
        nibs.contrastive_loss(queries, half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nibs.contrastive_loss(queries, half)
    assert loss.dtype == torch.float32
    assert loss == nibs.contrastive_loss(queries, half.detach().float())
    loss.backward()
    assert half.grad.dtype == torch.bfloat16


def test_autocast_does_not_round_what_is_float32():
    queries, keys, _ = leaves(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nibs.contrastive_loss(queries, keys)
    assert inside == nibs.contrastive_loss(queries, keys)


def test_no_graph_is_built_where_none_is_wanted():
    queries, keys, _ = leaves()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not nibs.contrastive_loss(queries, keys).requires_grad
    assert not nibs.contrastive_loss(queries, keys, wrt=()).requires_grad


def test_a_call_under_inference_mode_leaves_nothing_that_later_calls_trip_over():
    queries, keys, _ = leaves(n=6)
    with torch.inference_mode():
        nibs.contrastive_loss(queries, keys, scale=1.25)
    nibs.contrastive_loss(queries, keys, scale=1.25).backward()
    assert queries.grad is not None


def test_func_grad_gives_the_gradients_of_backward():
    inputs = leaves()
    loss = lambda queries, keys, scale: nibs.contrastive_loss(queries, keys, scale=scale)  # noqa: E731
    found = torch.func.grad(loss, argnums=(0, 1, 2))(*(one.detach() for one in inputs))
    assert_close(found, DERIVED(symmetric(*inputs), inputs))


def test_vmap_is_a_batch_of_losses():
    keys = leaves()[1].detach()
    batch = torch.stack([leaves(seed=seed)[0].detach() for seed in range(3)])
    loss = lambda queries: nibs.contrastive_loss(queries, keys)  # noqa: E731
    assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(one) for one in batch]))
    per_sample = torch.func.vmap(torch.func.grad(loss))(batch)
    assert_close(per_sample, torch.stack([torch.func.grad(loss)(one) for one in batch]))


@pytest.mark.parametrize("trained", [True, False])
def test_a_tangent_is_refused_by_name_and_not_dropped(trained):
    queries, keys, _ = (leaf.detach().requires_grad_(trained) for leaf in leaves())
    with torch.autograd.forward_ad.dual_level():
        nibs.contrastive_loss(queries.detach(), keys.detach())
        dual = torch.autograd.forward_ad.make_dual(queries, torch.ones_like(queries))
        with pytest.raises(Unsupported, match="no forward-mode derivative"):
            nibs.contrastive_loss(dual, keys)


def test_forward_mode_is_refused_by_name():
    queries, keys, _ = leaves()
    with pytest.raises(Unsupported, match="no forward-mode derivative"):
        torch.func.jvp(
            lambda rows: nibs.contrastive_loss(rows, keys.detach()), (queries.detach(),), (queries.detach(),)
        )


def test_parameters_and_subclasses_are_tensors():
    class Named(torch.Tensor):
        pass

    queries, keys, scale = leaves()
    named = queries.detach().as_subclass(Named).requires_grad_()
    parameter = torch.nn.Parameter(keys.detach())
    loss = nibs.contrastive_loss(named, parameter, scale=scale.detach())
    loss.backward()
    wanted = DERIVED(symmetric(queries, keys, scale.detach()), (queries, keys))
    assert_close(torch.Tensor(named.grad), wanted[0])
    assert_close(parameter.grad, wanted[1])


def test_strided_inputs_give_gradients_in_their_shape():
    queries, keys, _ = leaves()
    wide = torch.stack([queries.detach(), queries.detach()], 2).requires_grad_()
    nibs.contrastive_loss(wide[:, :, 0], keys.detach()).backward()
    nibs.contrastive_loss(queries, keys.detach()).backward()
    assert_close(wide.grad[:, :, 0], queries.grad)
    assert not wide.grad[:, :, 1].any()


def test_accumulators_that_do_not_fit_the_budget_are_not_held():
    inputs = leaves(n=64, d=256, dtype=torch.float16)
    roomy = nibs.contrastive_loss(*inputs[:2], scale=inputs[2])
    with pytest.raises(MemoryBudget) as refused:
        nibs.contrastive_loss(*inputs[:2], scale=inputs[2], memory=1)
    tight = nibs.contrastive_loss(*inputs[:2], scale=inputs[2], memory=refused.value.least)
    assert_close(tight, roomy)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor
    ):
        tight = nibs.contrastive_loss(*inputs[:2], scale=inputs[2], memory=refused.value.least)
    assert sum(kept) < 2 * 64 * 256 * 4, "whole float32 accumulators were kept"
    assert_close(DERIVED(tight, inputs), DERIVED(roomy, inputs), rtol=2e-3, atol=1e-5)


def test_a_budget_too_small_for_the_backward_is_refused_in_the_forward():
    queries, keys, _ = leaves(n=64, d=256, dtype=torch.float16)
    for memory in range(2000, 60000, 2000):
        try:
            loss = nibs.contrastive_loss(queries, keys, memory=memory, reduction="none")
        except MemoryBudget:
            continue
        loss.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_kept_for_the_backward_does_not_grow_with_the_tiles(reduction):
    kept = {}
    for n in (64, 128):
        queries, keys, _ = leaves(n=n, dtype=torch.float32)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            nibs.contrastive_loss(queries, keys, reduction=reduction)
        kept[n] = sum(sizes)
    assert kept[128] <= 2 * kept[64]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bias_gradient_is_counted_once_where_each_side_has_a_walk_of_its_own(reduction):
    queries, keys = (torch.randn(rows, 1, dtype=torch.float64, generator=torch.manual_seed(7)) for rows in (20, 29))

    def bias_gradient(memory):
        bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
        options = {"objective": nibs.Sigmoid(), "reduction": reduction, "memory": memory}
        sides = (queries.requires_grad_(), keys.requires_grad_())
        return DERIVED(nibs.contrastive_loss(*sides, bias=bias, **options).sum(), bias)[0]

    with pytest.raises(MemoryBudget) as short:
        bias_gradient(1)
    assert_close(bias_gradient(short.value.least), bias_gradient(None))


@pytest.mark.parametrize("bad", [{"targets": torch.tensor([99, 1, 2])}, {"weights": torch.tensor([-3.0, 1.0, 1.0])}])
def test_a_bad_row_inside_torch_func_is_nan(bad):
    rows = torch.eye(3)
    _, loss = torch.func.grad_and_value(lambda queries: nibs.contrastive_loss(queries, rows, **bad))(rows)
    assert loss.isnan()


def test_a_jacobian_of_values_is_refused_in_a_sentence():
    rows = torch.eye(3)
    with pytest.raises(Unsupported, match=r"reduction='none' under torch\.func\.vmap or jacrev"):
        torch.func.jacrev(lambda queries: nibs.contrastive_loss(queries, rows, reduction="none"))(rows)


@pytest.mark.parametrize("other", [torch.eye(3, dtype=torch.float64), torch.eye(3).numpy()])
def test_two_views_of_different_kinds_are_refused(other):
    with pytest.raises(InvalidInput, match="expected two views of one framework, dtype and device"):
        nibs.ntxent(torch.eye(3), other, scale=1.0)


def test_a_sparse_tensor_is_refused_with_the_way_out():
    with pytest.raises(InvalidInput, match=r"queries has the layout torch\.sparse_coo.*to_dense"):
        nibs.contrastive_loss(torch.eye(3).to_sparse(), torch.eye(3))
