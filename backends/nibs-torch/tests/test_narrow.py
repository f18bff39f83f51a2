"""Products of bfloat16 rows by MKL's function: gradient weights are rounded, as they may be, and nothing else is.

The function works on any x86 processor, and is taken where there are tiles for it. Here every machine takes it; where
PyTorch does not show it, float32 products of the same factors stand in its place.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch

import nibs
from nibs_torch import backend, mkl, precision, tiles, whole

OBJECTIVES = [
    nibs.InfoNCE(),
    nibs.InfoNCE("query_to_key"),
    nibs.InfoNCE("key_to_query"),
    nibs.InfoNCE(label_smoothing=0.1),
    nibs.InfoNCE(false_negative_margin=0.1),
    nibs.Sigmoid(),
]
N, M, D = 90, 110, 24
product, is_exact = mkl.product, mkl._is_exact.__wrapped__  # as they are, not as the tests set them
shown = pytest.mark.skipif(mkl._function() is None, reason="this PyTorch does not show MKL's function")


def stand_in(left, right, out, *, alpha=1.0, beta=0.0):
    assert left.dtype == right.dtype == torch.bfloat16
    assert out.dtype == torch.float32
    torch.addmm(out, left.float(), right.float(), beta=beta, alpha=alpha, out=out)


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    monkeypatch.setattr(mkl, "_has_tiles", lambda: True)
    if mkl._function() is None:
        monkeypatch.setattr(mkl, "_is_exact", lambda: True)
        monkeypatch.setattr(mkl, "product", stand_in)


def inputs(scale=14.3):
    generator = torch.Generator().manual_seed(3)
    queries, keys = (torch.randn(size, D, generator=generator) for size in (N, M))
    keys[:N] += queries
    rows = [torch.nn.functional.normalize(side, dim=-1).bfloat16() for side in (queries, keys)]
    return (*rows, torch.tensor(scale), torch.tensor(-3.0))


def distance(objective, scale=14.3, *, in_tiles=True, **options):
    """How far loss, scale's and bias' gradient are from float64, in units of float32's eps times the largest logit."""
    queries, keys, scale, bias = inputs(scale)
    asked = {"objective": objective, "bias": bias}
    if in_tiles:
        asked["plan"] = nibs.plan(N, M, D, "bfloat16", objective=objective, query_tile=32, key_tile=48, **options)
    exact, right = nibs.contrastive_loss_and_grad(queries.double(), keys.double(), scale=scale.double(), **asked)
    loss, found = nibs.contrastive_loss_and_grad(queries, keys, scale=scale, **asked)
    for name in ("queries", "keys"):
        one, other = getattr(found, name).double(), getattr(right, name)
        assert (one - other).abs().max() <= 2**-7 * other.abs().max()  # weights and the result, each rounded to 8 bits
    apart = [abs(loss - exact), abs(found.scale - right.scale), abs(found.bias - right.bias)]
    return float(torch.stack([one.double() for one in apart]).max()) / (2**-23 * max(1.0, abs(float(scale))))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_loss_and_gradients_of_scalars_are_right_to_the_float32_level(objective):
    assert distance(objective) < 4


@pytest.mark.parametrize("scale", [0.0, -5.0, 100.0])
def test_any_scale_is_as_good(scale):
    assert distance(nibs.InfoNCE(), scale) < 4


@pytest.mark.parametrize("sweep", ["keep", "recompute", "split"])
def test_every_sweep_is_as_good(sweep):
    assert distance(nibs.InfoNCE(), sweep=sweep) < 4


IN_ONE_TILE = [*OBJECTIVES[:3], OBJECTIVES[-1]]


@pytest.fixture(params=[0, N * M], ids=["many", "few"])
def few(request, monkeypatch):
    monkeypatch.setattr(whole, "FEW", request.param)


@pytest.mark.parametrize("objective", IN_ONE_TILE, ids=repr)
@pytest.mark.parametrize("scale", [14.3, -5.0, 100.0])
def test_a_call_that_one_tile_holds_is_as_good(few, objective, scale):
    assert distance(objective, scale, in_tiles=False) < 4


@pytest.mark.parametrize("strip", [1, 1000])
def test_strips_of_weights_are_written_over_no_logits_that_are_still_read(monkeypatch, strip):
    monkeypatch.setattr(tiles, "STRIP", strip)
    for sweep in ("keep", "recompute"):
        assert distance(nibs.InfoNCE(), sweep=sweep) < 4


class Early(tiles.TorchTiles):
    """A fault: the scale's gradient is counted from weights that were rounded."""

    def _softmax_weights(self, *arguments):
        return rounded(super()._softmax_weights(*arguments))

    def _sigmoid_weights(self, *arguments):
        return rounded(super()._sigmoid_weights(*arguments))


class Folded(tiles.TorchTiles):
    """A fault: rows times the scale, which are no bfloat16 values, go into products that round them."""

    def _multiply(self, left, right, problem, out, *, beta=1.0):
        folds = self._narrow and beta == 0.0
        scale = problem.scale.bfloat16()
        super()._multiply(left * scale if folds else left, right, problem, out, beta=beta)
        if folds:
            out /= scale


def rounded(weights):
    return weights if weights.dtype == torch.float64 else weights.bfloat16().float()  # the truth stays what it is


def off(dtype, scale, sweep):
    """The largest weight on rows that are matched far above all others, where it should be 0; unlike keys are far off.

    Products 512 wide and more are summed in parts, to each of which a scale that is MKL's would be applied.
    """
    rows = torch.randn(64, 640, generator=torch.Generator().manual_seed(4))
    rows = torch.nn.functional.normalize(rows, dim=-1).bfloat16().to(dtype)
    plan = nibs.plan(64, 64, 640, str(dtype).removeprefix("torch."), query_tile=32, key_tile=48, sweep=sweep)
    _, found = nibs.contrastive_loss_and_grad(rows, rows, scale=torch.tensor(scale), reduction="sum", plan=plan)
    return float((found.queries.float() / scale).norm(dim=1).max())


@pytest.mark.parametrize("sweep", ["keep", "recompute", "split"])
@pytest.mark.parametrize("scale", [1e3, 1e4, 1e6, 1e7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_logit_is_the_same_number_in_the_lse_and_in_the_weights(dtype, scale, sweep):
    assert off(dtype, scale, sweep) < 40 * 2**-23  # exponents of at most 35, rounded


class Fused(tiles.TorchTiles):
    """A fault: what is taken off a logit is taken off before the logit is rounded."""

    def _values(self, part, problem, strip, *, less=None, again=False):
        values, *permitted = super()._values(part, problem, strip, less=less, again=again)
        if less is not None:
            torch.add(-less, strip, alpha=problem.scale.item(), out=values)
        return values, *permitted


def test_a_logit_that_is_not_rounded_would_be_caught(monkeypatch):
    monkeypatch.setattr(backend, "TorchTiles", Fused)
    assert off(torch.bfloat16, 1e4, "keep") > 400 * 2**-23


def test_the_gradient_of_scale_keeps_its_digits_where_all_pairs_are_alike():
    rows = torch.full((2048, 1), 0.7).bfloat16()
    asked = {"objective": nibs.Sigmoid(), "bias": -1.3, "targets": torch.full((2048,), -1)}
    _, right = nibs.contrastive_loss_and_grad(rows.double(), rows.double(), scale=torch.tensor(1.1).double(), **asked)
    _, found = nibs.contrastive_loss_and_grad(rows, rows, scale=torch.tensor(1.1), **asked)
    assert abs(found.scale - right.scale) < 8 * 2**-23 * right.scale  # a plain running sum loses 1e-5


@pytest.mark.parametrize("fault", [Early, Folded])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_what_must_not_be_rounded_would_be_caught(monkeypatch, objective, fault):
    monkeypatch.setattr(backend, "TorchTiles", fault)
    assert distance(objective, -5.1) > 50


@pytest.mark.parametrize("objective", IN_ONE_TILE, ids=repr)
def test_in_one_tile_a_scale_gradient_from_rounded_weights_would_be_caught(monkeypatch, few, objective):
    def late(find):
        def found(logits, *arguments, **options):
            raw = logits.clone()
            right = find(logits, *arguments, **options)
            return right._replace(moment=(raw * rounded(right.weights)).sum().item())

        return found

    for name in ("_few", "_many", "_sigmoid"):
        monkeypatch.setattr(whole, name, late(getattr(whole, name)))
    assert distance(objective, -5.0, in_tiles=False) > 20


def test_the_plan_says_it():
    queries, keys, *_ = inputs()
    assert nibs.contrastive_loss(queries, keys, stats=True)[1].plan.kernel == "torch, bfloat16 products"
    assert nibs.contrastive_loss(queries.float(), keys.float(), stats=True)[1].plan.kernel == "torch"


def test_other_dtypes_and_processors_do_without(monkeypatch):
    assert mkl.narrows("bfloat16", "cpu")
    assert not mkl.narrows("bfloat16", "cuda:0")
    assert not mkl.narrows("float32", "cpu") and not mkl.narrows("float16", "cpu")
    monkeypatch.setattr(mkl, "_has_tiles", lambda: False)
    assert not mkl.narrows("bfloat16", "cpu")


def test_a_pytorch_that_does_not_show_the_function_does_without(monkeypatch):
    monkeypatch.setattr(mkl, "_function", lambda: None)
    assert not is_exact()


WRONG = {
    "bfloat16 results": lambda out, before: out.bfloat16().float(),
    "NaN": lambda out, before: out * float("nan"),
    "nothing added": lambda out, before: out - before,
}


@shown
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_function_that_is_not_exact_is_not_trusted(monkeypatch, wrong):
    def faulty(left, right, out, **options):
        before = out.clone()
        product(left, right, out, **options)
        out.copy_(wrong(out, before if options["beta"] else 0.0))

    assert is_exact()
    monkeypatch.setattr(mkl, "product", faulty)
    assert not is_exact()


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "another device by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@shown
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())
def test_the_look_at_the_processor_does_not_depend_on_what_is_set_around_it(around):
    with around():
        assert is_exact()


@shown
def test_the_look_at_the_processor_may_come_within_vmap():
    found = []
    torch.func.vmap(lambda row: (found.append(is_exact()), row)[1])(torch.zeros(2, 3))
    assert found == [True]


LAYOUTS = {
    "rows": lambda drawn: drawn,
    "columns": lambda drawn: drawn.T.contiguous().T,
    "every other row": lambda drawn: torch.stack([drawn, drawn], 1).flatten(0, 1)[::2],
    "every other column": lambda drawn: torch.stack([drawn, drawn], 2).flatten(1, 2)[:, ::2],
    "some of the columns": lambda drawn: torch.cat([drawn, drawn], 1)[:, : drawn.shape[1]],
    "one row for all": lambda drawn: drawn[:1].expand(drawn.shape),
}


def drawn(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def right_to_float32(left, right, found, alpha=1.0):
    left, right = left.double(), right.double()
    bound = abs(alpha) * (left.abs() @ right.abs()) * 2**-23 * 4
    return ((found - alpha * (left @ right)).abs() <= bound).all()


@shown
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 1), (1, 70, 9), (33, 1, 65), (70, 129, 50)], ids=str)
@pytest.mark.parametrize("second", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("first", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_matrices_may_lie_as_they_like(first, second, size):
    rows, columns, inner = size
    left, right = first(drawn(rows, inner)), second(drawn(inner, columns, seed=2))
    out = torch.full((rows, columns), float("nan"))
    product(left, right, out)
    assert right_to_float32(left, right, out)
    product(left, right, out, alpha=-0.3, beta=1.0)
    assert right_to_float32(left, right, out, alpha=0.7)


@shown
@pytest.mark.parametrize("size", [(0, 4, 3), (4, 0, 3), (4, 3, 0), (0, 0, 0)], ids=str)
def test_matrices_may_be_empty(size):
    rows, columns, inner = size
    out = torch.ones(rows, columns)
    product(drawn(rows, inner), drawn(inner, columns), out)
    assert not out.any()


@shown
def test_only_the_rows_of_the_result_are_written():
    room = torch.zeros(40, 30)
    product(drawn(10, 8), drawn(8, 20), room[5:15, :20])
    assert room[5:15, :20].any(1).all()
    room[5:15, :20] = 0
    assert not room.any()


def test_sizes_that_the_function_cannot_name_go_through_float32(monkeypatch):
    monkeypatch.setattr(mkl, "_function", lambda: None)  # a call of it would fail
    monkeypatch.setattr(mkl, "LONGEST", 20)
    left, right, out = drawn(8, 21), drawn(21, 6), torch.empty(8, 6)
    product(left, right, out)
    assert right_to_float32(left, right, out)


@shown
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_own_row_alone(bad):
    left, right, out = drawn(40, 33), drawn(33, 50), torch.empty(40, 50)
    left[7, 3] = bad
    product(left, right, out)
    assert torch.equal(out.isfinite().all(1), torch.arange(40) != 7)
    assert not out[7].isfinite().any()


@shown
@pytest.mark.parametrize("side", [0, 1])
def test_a_tensor_that_wraps_another_has_no_memory_to_read(side):
    """Such is what a functional collective gives."""
    from torch.testing._internal.two_tensor import TwoTensor

    factors, out = [drawn(40, 33), drawn(33, 50)], torch.empty(40, 50)
    expected = [one.clone() for one in factors]
    factors[side] = TwoTensor(factors[side], factors[side].clone())
    product(*factors, out)
    assert right_to_float32(*expected, out)


@shown
def test_threads_that_multiply_at_once_get_the_bits_that_one_gets():
    left, right = drawn(200, 100), drawn(100, 150)

    def bits():
        out = torch.empty(200, 150)
        product(left, right, out)
        return out

    alone, found = bits(), []
    threads = [threading.Thread(target=lambda: found.extend(bits() for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and all(torch.equal(one, alone) for one in found)


@shown
def test_no_flag_of_the_process_is_touched(monkeypatch):
    monkeypatch.setattr(precision, "_flag", lambda _: pytest.fail("a flag was asked for"))
    assert distance(nibs.InfoNCE()) < 4
