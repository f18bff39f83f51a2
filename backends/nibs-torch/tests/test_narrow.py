"""Products of bfloat16 rows on bfloat16 tiles: gradient weights are rounded, as they may be, and nothing else is.

Processors with such tiles are few, so here every machine rounds: the factors of each product of a tile, by hand.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import nibs
from nibs_torch import backend, precision, tiles, whole

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"),
    reason="this PyTorch has no flag for products on a CPU",
)

OBJECTIVES = [
    nibs.InfoNCE(),
    nibs.InfoNCE("query_to_key"),
    nibs.InfoNCE("key_to_query"),
    nibs.InfoNCE(label_smoothing=0.1),
    nibs.InfoNCE(false_negative_margin=0.1),
    nibs.Sigmoid(),
]
N, M, D = 90, 110, 24
HAS_TILES = precision._has_tiles.__wrapped__  # as it is, not as the tests set it


class Rounded(tiles.TorchTiles):
    """Tiles whose products round their factors to bfloat16, as a processor's would."""

    def _multiply(self, left, right, *arguments, **options):
        if self.accumulator == torch.float32:
            left, right = (factor.bfloat16().float() for factor in (left, right))
        super()._multiply(left, right, *arguments, **options)


class RoundedTorch:
    """`torch` for `nibs_torch.whole`, with products that do the same."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def addmm(self, into, left, right, **options):
        if into.dtype == torch.float32:
            left, right = (factor.bfloat16().float() for factor in (left, right))
        return torch.addmm(into, left, right, **options)


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    monkeypatch.setattr(precision, "_has_tiles", lambda: True)
    monkeypatch.setattr(backend, "TorchTiles", Rounded)
    monkeypatch.setattr(whole, "torch", RoundedTorch())
    monkeypatch.setattr(whole, "LARGE", 0)


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
    else:
        asked["bias"] = 0.0
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


@pytest.mark.parametrize("objective", OBJECTIVES[:3], ids=repr)
@pytest.mark.parametrize("scale", [14.3, -5.0, 100.0])
def test_a_call_that_one_tile_holds_is_as_good(objective, scale):
    assert distance(objective, scale, in_tiles=False) < 4


@pytest.mark.parametrize("objective", OBJECTIVES[:3], ids=repr)
def test_in_one_tile_a_scale_gradient_from_rounded_weights_would_be_caught(monkeypatch, objective):
    monkeypatch.setattr(whole, "narrows", lambda *_: False)
    assert distance(objective, -5.0, in_tiles=False) > 100


class Folded(Rounded):
    """A fault: rows times the scale, which are no bfloat16 values, go into products that round."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.rounds_weights = self._narrow = False


class Late(Folded):
    """A fault: logits are exact, but the scale's gradient is read off gradients whose weights were rounded."""

    def _multiply(self, left, right, *arguments, **options):
        tile = right.shape[1] != D
        (tiles.TorchTiles if tile else Rounded)._multiply(self, left, right, *arguments, **options)


@pytest.mark.parametrize("fault", [Folded, Late])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_what_must_not_be_rounded_would_be_caught(monkeypatch, objective, fault):
    monkeypatch.setattr(backend, "TorchTiles", fault)
    assert distance(objective, -5.0) > 100


def test_the_plan_says_it():
    queries, keys, *_ = inputs()
    assert nibs.contrastive_loss(queries, keys, stats=True)[1].plan.kernel == "torch, bfloat16 products"
    assert nibs.contrastive_loss(queries.float(), keys.float(), stats=True)[1].plan.kernel == "torch"


def test_other_dtypes_and_processors_do_without(monkeypatch):
    monkeypatch.setattr(precision, "_has_tiles", lambda: True)
    assert precision.narrows("bfloat16", "cpu")
    assert not precision.narrows("float32", "cpu") and not precision.narrows("float16", "cpu")
    monkeypatch.setattr(precision, "_has_tiles", lambda: False)
    assert not precision.narrows("bfloat16", "cpu")


WRONG = {"bfloat16 results": lambda out: out.bfloat16().float(), "NaN": lambda out: out * float("nan")}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_processor_whose_products_are_not_exact_is_not_trusted(monkeypatch, wrong):
    addmm = torch.addmm
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert HAS_TILES()
    monkeypatch.setattr(torch, "addmm", lambda *factors: wrong(addmm(*factors)))
    assert not HAS_TILES()


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


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())
def test_the_look_at_the_processor_does_not_depend_on_what_is_set_around_it(monkeypatch, around):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    with around():
        assert HAS_TILES()


def test_the_look_at_the_processor_may_come_within_vmap(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    found = []
    torch.func.vmap(lambda row: (found.append(HAS_TILES()), row)[1])(torch.zeros(2, 3))
    assert found == [True]


@pytest.mark.parametrize("wanted", ["default", "high", "highest"])
def test_products_of_bfloat16_values_are_exact_whatever_precision_is_asked_for(wanted):
    generator = torch.Generator().manual_seed(1)
    left, right = ((torch.rand(size, generator=generator) + 1).bfloat16().float() for size in ((300, 200), (200, 150)))
    exact = left.double() @ right.double()
    flag = torch.backends.mkldnn.matmul
    with precision.products(wanted, torch.float32, torch.device("cpu"), 2 * 300 * 200 * 150, narrow=True):
        assert flag.fp32_precision == "bf16"
        found = left @ right
    assert flag.fp32_precision != "bf16"
    assert ((found - exact).abs() < precision.EXACT * exact).all()
