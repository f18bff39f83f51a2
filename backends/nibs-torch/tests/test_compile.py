"""torch.compile(fullgraph=True): one graph, the same numbers, and errors that are still errors."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from dense_torch import leaves
from torch.testing import assert_close

import nibs
import nibs_torch
from nibs.errors import InvalidInput, Unsupported

DERIVED = torch.autograd.grad


@pytest.fixture(autouse=True)
def forget_compiled():
    torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def smoothed(queries, keys, scale):
    return nibs.contrastive_loss(queries, keys, scale=scale, objective=nibs.InfoNCE(label_smoothing=0.1))


def per_row(queries, keys, scale):
    return nibs.contrastive_loss(queries, keys, scale=scale, reduction="none").square().sum()


def pairwise(queries, keys, scale):
    return nibs.contrastive_loss(queries, keys, scale=scale, bias=-2.0, objective=nibs.Sigmoid(), precision="highest")


def masked(queries, keys, scale):
    mask = torch.arange(len(queries)) != 2
    return nibs.contrastive_loss(queries, keys, scale=scale, query_mask=mask, weights=mask.double())


@pytest.mark.parametrize("function", [smoothed, per_row, pairwise, masked])
def test_a_compiled_loss_has_the_eager_value_and_gradients(function):
    inputs = leaves()
    found, eager = compiled(function)(*inputs), function(*inputs)
    assert_close(found, eager)
    assert_close(DERIVED(found, inputs), DERIVED(eager, inputs))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_runs_it():
    inputs = leaves()
    found = torch.compile(lambda *tensors: 2 * smoothed(*tensors), fullgraph=True)(*inputs)
    assert_close(DERIVED(found, inputs), DERIVED(2 * smoothed(*inputs), inputs))


def test_the_first_call_of_a_process_may_be_a_compiled_one():
    program = (
        "import torch, nibs; q = torch.randn(4, 3, requires_grad=True)\n"
        "f = torch.compile(lambda q: nibs.clip(q, q, scale=2.0), fullgraph=True, backend='aot_eager')\n"
        "f(q).backward(); print(q.grad.shape)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([4, 3])", done.stderr[-2000:]


def test_dynamic_shapes_compile_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(smoothed, fullgraph=True, dynamic=True, backend=counter)
    for n in (7, 11, 13):  # none of them d, which Dynamo would take for the same size
        inputs = leaves(n=n)
        assert_close(function(*inputs), smoothed(*inputs))
    assert counter.frame_count == 1


def test_the_module_compiles():
    inputs = leaves(dtype=torch.float32)
    module = nibs_torch.ContrastiveLoss(nibs.InfoNCE("query_to_key"), memory="1MiB")
    found, eager = compiled(module)(*inputs), module(*inputs)
    assert_close(DERIVED(found, inputs), DERIVED(eager, inputs))


def test_a_plan_made_outside_crosses_into_the_graph():
    inputs = leaves(n=64, dtype=torch.float16)
    plan = nibs.plan(64, 64, 5, "float16", sweep="split", query_tile=16, key_tile=32)
    function = lambda queries, keys, scale: nibs.contrastive_loss(queries, keys, scale=scale, plan=plan)  # noqa: E731
    assert_close(DERIVED(compiled(function)(*inputs), inputs), DERIVED(function(*inputs), inputs))


@pytest.mark.parametrize("outside", [True, False])
def test_compile_and_func_grad_nest_either_way(outside):
    inputs = [one.detach() for one in leaves()]
    derivative = torch.func.grad(smoothed, argnums=(0, 1, 2))
    function = compiled(derivative) if outside else compiled(lambda *tensors: derivative(*tensors))
    assert_close(function(*inputs), derivative(*inputs))


@pytest.mark.parametrize("name", ["clip", "siglip", "ntxent", "supcon"])
def test_the_helpers_compile(name):
    queries, keys, scale = leaves()
    labels = torch.arange(7) % 3
    arguments = {"supcon": (queries, labels)}.get(name, (queries, keys))
    function = lambda *tensors: getattr(nibs, name)(*tensors, scale=scale)  # noqa: E731
    assert_close(compiled(function)(*arguments), function(*arguments))


def test_autocast_reaches_a_compiled_call():
    queries, keys, _ = leaves(dtype=torch.float32)
    half = keys.detach().bfloat16()

    def function(queries, keys):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return nibs.contrastive_loss(queries, keys)

    assert compiled(function)(queries, half) == function(queries, half)


@pytest.mark.parametrize("target", [99, -2])
def test_a_bad_target_in_a_compiled_call_is_nan_for_its_row(target):
    queries, keys, _ = leaves()
    targets = torch.arange(7)
    targets[2] = target

    def function(queries, keys, targets):
        objective = nibs.InfoNCE("query_to_key")
        return nibs.contrastive_loss(queries, keys, targets=targets, objective=objective, reduction="none")

    assert compiled(function)(queries, keys, targets).isnan().tolist() == [row == 2 for row in range(7)]


def test_a_bad_weight_in_a_compiled_call_is_nan():
    queries, keys, _ = leaves()
    weights = torch.ones(7)
    weights[3] = -1
    function = lambda queries, keys, weights: nibs.contrastive_loss(queries, keys, weights=weights)  # noqa: E731
    assert compiled(function)(queries, keys, weights).isnan()


def test_wrong_shapes_are_an_invalid_input_in_compiled_calls_too():
    queries = leaves()[0]
    with pytest.raises(InvalidInput, match="keys has 4 columns and queries has 5"):
        compiled(lambda queries, keys: nibs.contrastive_loss(queries, keys))(queries, torch.ones(7, 4))


@pytest.mark.parametrize("options", [{"backend": "numpy"}, {"stats": True}])
def test_what_cannot_be_traced_is_refused_by_name(options):
    queries, keys, _ = leaves()
    pytest.importorskip("nibs_numpy")
    with pytest.raises(Unsupported, match=r"inside torch\.compile"):
        compiled(lambda queries, keys: nibs.contrastive_loss(queries, keys, **options))(queries, keys)
