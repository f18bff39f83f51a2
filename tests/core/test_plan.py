"""Plans: what a budget buys, what it costs, and that the numbers are those of the specification."""

from __future__ import annotations

import importlib
import itertools

import ml_dtypes
import numpy as np
import pytest

import nibs
from nibs import errors
from nibs.plan import TileHint, plan_request
from nibs.request import parse_memory
from nibs_numpy.backend import NumpyBackend

SHAPES = [(0, 0, 1), (1, 1, 1), (7, 1000, 3), (1000, 7, 64), (5000, 6000, 512), (2**22, 2**22, 768), (2**33, 2**33, 8)]
ONE_WAY = nibs.InfoNCE(direction="query_to_key")
OTHER_WAY = nibs.InfoNCE(direction="key_to_query")


def _least(*shape, **options):
    with pytest.raises(errors.MemoryBudget) as caught:
        nibs.plan(*shape, memory=1, **options)
    return caught.value.least


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("objective", [nibs.InfoNCE(), ONE_WAY, OTHER_WAY, nibs.Sigmoid()], ids=repr)
def test_least_works_and_one_byte_less_does_not(shape, dtype, objective):
    options = {"dtype": dtype, "objective": objective}
    least = _least(*shape, **options)

    assert nibs.plan(*shape, memory=least, **options).memory <= least
    with pytest.raises(errors.MemoryBudget):
        nibs.plan(*shape, memory=least - 1, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("ring_size", [1, 8])
def test_budget_is_respected_and_more_never_costs_more(shape, grad, masked, ring_size):
    options = {"grad": grad, "masked": masked, "ring_size": ring_size, "dtype": "bfloat16"}
    least = _least(*shape, **options)

    budgets = [int(least * factor) for factor in (1, 1.01, 1.5, 4, 64, 10_000)]
    plans = [nibs.plan(*shape, memory=budget, **options) for budget in budgets]

    assert all(plan.memory <= budget for plan, budget in zip(plans, budgets))
    assert all(later.products <= earlier.products for earlier, later in itertools.pairwise(plans))


def test_memory_beyond_tiles_is_linear_in_the_batch():
    sizes = [2**power for power in range(14, 24)]

    per_row = {nibs.plan(size, size, 512, "bfloat16").linear / size for size in sizes}

    assert len(per_row) == 1


@pytest.mark.parametrize(
    ("options", "sweep", "products"),
    [
        ({"grad": False}, "forward", 1),
        ({"memory": "10GiB"}, "keep", 3),
        ({}, "recompute", 4),
        ({"wrt": ("queries",)}, "recompute", 3),
        ({"wrt": ("scale",)}, "recompute", 2),
        ({"objective": ONE_WAY}, "strip", 3),
        ({"objective": OTHER_WAY}, "strip", 3),
        ({"objective": ONE_WAY, "ring_size": 4}, "recompute", 4),
        ({"objective": nibs.Sigmoid()}, "single", 3),
        ({"objective": nibs.Sigmoid(), "wrt": ("queries",)}, "single", 2),
        ({"sweep": "split"}, "split", 5),
    ],
    ids=str,
)
def test_sweep_takes_the_products_that_it_promises(options, sweep, products):
    made = nibs.plan(20_000, 20_000, 64, **options)

    assert (made.sweep, made.products) == (sweep, products)
    assert made.flops == 2 * 20_000 * 20_000 * 64 * products * made.ring_size


def test_without_room_for_an_accumulator_both_sides_are_recomputed():
    shape = (20_000, 20_000, 4096, "bfloat16")

    assert nibs.plan(*shape, memory=_least(*shape)).sweep == "split"


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize(("dtype", "b", "a"), [("bfloat16", 2, 4), ("float32", 4, 4), ("float64", 8, 8)])
def test_bytes_on_the_ring_keep_within_the_bound(size, dtype, b, a):
    m, d = 1000, 64

    made = nibs.plan(900, m, d, dtype, ring_size=size)
    sigmoid = nibs.plan(900, m, d, dtype, ring_size=size, objective=nibs.Sigmoid())

    assert 0 < made.ring_bytes <= m * d * (2 * (size - 1) * b + size * a)
    assert sigmoid.ring_bytes == m * d * ((size - 1) * b + size * a)


def test_ring_of_one_sends_nothing():
    assert nibs.plan(1000, 1000, 64).ring_bytes == 0


def test_tiles_may_be_fixed():
    made = nibs.plan(100, 100, 8, query_tile=7, key_tile=13, sweep="recompute")

    assert (made.query_tile, made.key_tile, made.sweep) == (7, 13, "recompute")


ALIKE = np.arange(1500) // 2
CALLS = {
    "symmetric": {},
    "one way": {"objective": ONE_WAY},
    "sigmoid": {"objective": nibs.Sigmoid()},
    "ids": {"objective": nibs.InfoNCE(same_id="exclude"), "query_ids": ALIKE, "key_ids": ALIKE},
    "not itself": {"objective": nibs.InfoNCE(exclude_self=True), "targets": ALIKE[::-1].copy()},
    "masks": {"key_mask": ALIKE > 30},
}


def _of_numpy(rows, autograd, **options):
    return nibs.contrastive_loss_and_grad(*rows, **options)[2].plan


def _of_torch(rows, autograd, **options):
    torch = pytest.importorskip("torch")
    bits = [torch.tensor(side.view(np.int16)).view(torch.bfloat16).requires_grad_(autograd) for side in rows]
    options = {name: torch.tensor(one) if isinstance(one, np.ndarray) else one for name, one in options.items()}
    call = nibs.contrastive_loss if autograd else nibs.contrastive_loss_and_grad
    return call(*bits, **options)[-1].plan


def _of_jax(rows, autograd, **options):
    jax = pytest.importorskip("jax")
    rows = [jax.numpy.asarray(side) for side in rows]
    options = {name: jax.numpy.asarray(one) if isinstance(one, np.ndarray) else one for name, one in options.items()}
    call = nibs.contrastive_loss if autograd else nibs.contrastive_loss_and_grad
    backend, plans = importlib.import_module("nibs_jax.backend"), []

    def planned(*given, **how):
        plans.append(plan_request(*given, **how))
        return plans[-1]

    def loss(*sides):
        return call(*sides, **options)[0]

    with pytest.MonkeyPatch.context() as patch:  # a trace is enough, for the plan is part of it
        patch.setattr(backend, "plan_request", planned)
        jax.make_jaxpr(jax.grad(loss, (0, 1)) if autograd else loss)(*rows)
    return plans[-1]


@pytest.mark.parametrize("memory", [None, "1200KiB"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("backend", "of_call", "autograd"),
    [
        ("numpy", _of_numpy, False),
        ("torch", _of_torch, False),
        ("torch", _of_torch, True),
        ("jax", _of_jax, False),
        ("jax", _of_jax, True),
    ],
)
def test_it_is_the_plan_that_such_a_call_runs_under(backend, of_call, autograd, name, memory):
    side = np.random.default_rng(0).standard_normal((1500, 8)).astype(ml_dtypes.bfloat16)
    objective = CALLS[name].get("objective", nibs.InfoNCE())
    asked = {"memory": memory, "wrt": ("queries", "keys")}

    told = nibs.plan(
        *(1500, 1500, 8, "bfloat16"),
        **{**asked, "objective": objective, "masked": name == "masks", "backend": backend},
        autograd=None if autograd else False,
    )

    assert told == of_call([side, side], autograd, **CALLS[name], **asked, stats=True)


class Choosy(NumpyBackend):
    """Likes another tile where rows are wide, and has two for the others."""

    def tile_hints(self, job):
        return [TileHint(96, 96)] if job.d > 64 else [TileHint(512, 512), TileHint(300, 200)]


@pytest.mark.parametrize(
    ("width", "memory", "tile"),
    [
        (8, "64MiB", (512, 512)),
        (8, "1500KiB", (300, 200)),
        (8, "500KiB", (150, 200)),
        (65, "64MiB", (96, 96)),
    ],
)
def test_the_first_of_a_backend_s_tiles_that_fits_whole_is_taken_and_the_last_is_cut(here, width, memory, tile):
    here.add("choosy", backend=Choosy())
    options = {"backend": "choosy", "sweep": "recompute", "memory": memory}

    made = nibs.plan(1000, 1000, width, **options)

    assert (made.query_tile, made.key_tile) == tile


def test_plan_for_another_shape_keeps_its_tiles_and_is_completed_for_this_call():
    rows = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    foreign = nibs.plan(10_000, 10_000, 3, "bfloat16", query_tile=9, key_tile=11, sweep="recompute")

    _, stats = nibs.contrastive_loss(rows, rows, plan=foreign, stats=True)

    ran = stats.plan
    assert (ran.queries, ran.keys, ran.dim, ran.dtype) == (50, 50, 8, "float32")
    assert (ran.query_tile, ran.key_tile, ran.sweep) == (9, 11, "forward")


def test_plan_whose_sweep_does_not_apply_never_keeps_every_tile():
    rows = np.zeros((6000, 4), np.float32)
    forward = nibs.plan(6000, 6000, 4, grad=False, query_tile=512, key_tile=512)

    _, _, stats = nibs.contrastive_loss_and_grad(rows, rows, plan=forward, stats=True)

    assert stats.plan.sweep == "recompute"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"queries": -1}, "queries=-1: expected an integer >= 0."),
        ({"keys": 2.0}, "keys=2.0: expected an integer >= 0."),
        ({"dim": 0}, "dim=0: expected an integer >= 1."),
        ({"autograd": 1}, "autograd=1: expected True, False or None."),
        ({"ring_size": True}, "ring_size=True: expected an integer >= 1."),
        ({"dtype": "int8"}, "dtype='int8': expected one of float64, float32, bfloat16, float16."),
        ({"wrt": ("query",)}, "wrt=('query',): expected names out of 'queries', 'keys', 'scale', 'bias'."),
        ({"grad": 1}, "grad=1: expected True or False."),
        ({"query_tile": 0}, "query_tile=0: expected a positive integer."),
        ({"sweep": "single"}, "sweep='single': this call can run as 'keep', 'recompute', 'split'."),
        ({"objective": "infonce"}, "objective is 'infonce' (str): expected nibs.InfoNCE(...) or nibs.Sigmoid(...)."),
    ],
    ids=str,
)
def test_impossible_plan_is_refused_with_the_argument_named(refusal, arguments, expected):
    text = refusal(errors.InvalidInput, nibs.plan, **({"queries": 10, "keys": 10, "dim": 4} | arguments))

    assert text == expected


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (None, None),
        (1, 1),
        (np.int64(2**40), 2**40),
        ("1", 1),
        ("512MiB", 2**29),
        ("5 mib", 5 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("2GB", 2 * 10**9),
        ("3kb", 3000),
        (" 1TiB ", 2**40),
    ],
)
def test_memory_reads_bytes_and_units(text, count):
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", [0, -1, 1.5, True, "", "MiB", "-5MB", "1e9", "inf", "12 parsecs", ".5GB", "0MB", b"1"])
def test_memory_refuses_what_is_no_size(text):
    with pytest.raises(errors.InvalidInput, match="expected bytes as a positive integer"):
        parse_memory(text)
