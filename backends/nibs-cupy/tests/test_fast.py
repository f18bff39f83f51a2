"""The tensor-core kernels on the host runner, against plain NumPy in float64: each family, format, option and clock."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nibs.verbs import Weights
from nibs_cupy.device import Host
from nibs_cupy.fast import FOLD_ARGS, FastKernels, Pairs
from nibs_cupy.host import KERNELS, Runner
from nibs_cupy.plain import plain_allowed, plain_fold, plain_lse, plain_pack, plain_sigmoid, plain_weights

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "tf32x3": np.float32}
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "tf32x3": 0.0}  # of g as it is stored
KINDS = [("ampere", name) for name in DTYPES] + [("hopper", "bfloat16"), ("hopper", "float16")]
# How threads follow one another, and when what is asynchronous happens.
SCHEDULES = [("forward", "earliest"), ("reversed", "latest"), ("shuffled:7", "latest")]
# n, m, d: ragged, several tiles each way and several slabs; and the least there is.
SHAPES = [(200, 300, 150), (1, 1, 1)]


def fast(family: str, name: str, order: str = "forward", clock: str = "earliest") -> FastKernels:
    return FastKernels(Host(Runner(order=order, clock=clock)), name, family, processors=3)


def rows(random: np.random.Generator, shape: tuple[int, int, int], name: str) -> tuple[Any, Any]:
    """Queries and keys of length 1, the positives alike."""
    n, m, d = shape
    queries, keys = random.standard_normal((n, d)), random.standard_normal((m, d))
    both = min(n, m)
    keys[:both] = queries[:both] + 0.5 * keys[:both]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, keys)]
    return unit[0].astype(DTYPES[name]), unit[1].astype(DTYPES[name])


def every_option(random: np.random.Generator, n: int, m: int) -> Pairs:
    """Masks, ids and a diagonal at once; who is absent has no positive and is none."""
    pairs = Pairs(
        query_mask=(random.random(n) > 0.1).astype(np.uint8),
        key_mask=(random.random(m) > 0.1).astype(np.uint8),
        query_ids=random.integers(0, 30, n),
        key_ids=random.integers(0, 30, m),
        diagonal=5,
    )
    target = random.integers(0, m, n)
    here = (pairs.query_mask > 0) & (pairs.key_mask[target] > 0) & (target - np.arange(n) != 5)
    return replace(pairs, target=np.where(here, target, -1))


def designated(n: int, m: int) -> Pairs:
    return Pairs(target=np.where(np.arange(n) < m, np.arange(n), -1))


def one(value: float) -> Any:
    return np.array([value], np.float32)


def slack(logits: float) -> float:
    """What float32 may lose of a logit: two roundings of it, and as many of the sum it comes from."""
    return 2.0**-23 * (4 * logits + 8)


def natural(shift: Any, mass: Any) -> Any:
    with np.errstate(divide="ignore"):
        return np.where(mass == 0, -np.inf, shift + np.log(mass.astype(np.float64)))


def check_lse(kernels: FastKernels, queries: Any, keys: Any, scale: float, pairs: Pairs) -> None:
    packed = kernels.pack(queries, pairs.query_mask), kernels.pack(keys, pairs.key_mask)
    row_shift, row_mass, column_shift, column_mass, positive = kernels.lse(*packed, one(scale), pairs)
    wanted = plain_lse(queries, keys, scale, pairs)
    limit = slack(abs(scale))
    np.testing.assert_allclose(natural(row_shift, row_mass), wanted[0], rtol=0, atol=limit)
    np.testing.assert_allclose(natural(column_shift, column_mass), wanted[1], rtol=0, atol=limit)
    np.testing.assert_allclose(positive, wanted[2], rtol=0, atol=limit)


def numbers(g: Any, name: str, lift: float) -> Any:
    return (g.view(DTYPES[name]) if g.itemsize == 2 else g).astype(np.float64) / lift


def anchors(lse: Any) -> Weights:
    """Weights 1 of every row that has an lse; the others are no anchors."""
    counted = np.isfinite(lse)
    factor = counted.astype(np.float32)
    return Weights(factor, np.where(counted, lse, np.inf).astype(np.float32), factor.copy())


def check_weights(kernels: FastKernels, queries: Any, keys: Any, scale: float, pairs: Pairs) -> None:
    name, lift = kernels.format, 2.0**12
    packed = kernels.pack(queries, pairs.query_mask), kernels.pack(keys, pairs.key_mask)
    row_lse, column_lse, _ = plain_lse(queries, keys, scale, pairs)
    sides = anchors(row_lse), anchors(column_lse)
    for given in (sides, (sides[0], None), (None, sides[1])):
        g, parts = kernels.weights(*packed, one(scale), pairs, *given, one(lift), products=True)
        wanted = plain_weights(queries, keys, scale, pairs, *given)
        limit = 4 * slack(abs(scale))
        np.testing.assert_allclose(numbers(g, name, lift), wanted, rtol=ROUNDING[name], atol=limit)
        products = wanted * (queries.astype(np.float64) @ keys.astype(np.float64).T)
        np.testing.assert_allclose(parts.sum(0, dtype=np.float64), products.sum(1), rtol=0, atol=2 * limit)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("name", DTYPES)
def test_packing_takes_any_stride_and_never_reads_an_absent_row(name: str, random: Any) -> None:
    wide = random.standard_normal((150, 2 * 37)).astype(DTYPES[name])
    mask = (random.random(75) > 0.3).astype(np.uint8)
    for view in (wide[::2, ::2], wide[::-2, 1::2], wide[:37, :75].T):
        absent = mask[: len(view)]
        view = view.copy() if view.strides[1] > view.strides[0] else view
        view[absent == 0] = np.nan
        packed = fast("ampere", name).pack(view, absent)
        bits = np.ascontiguousarray(view).view(f"u{view.itemsize}")
        assert (packed.data == plain_pack(bits, absent, 128, packed.slabs)).all()


@pytest.mark.parametrize(("order", "clock"), SCHEDULES)
@pytest.mark.parametrize(("family", "name"), KINDS)
def test_lse_of_rows_and_columns(family: str, name: str, order: str, clock: str, random: Any) -> None:
    for shape in SHAPES:
        queries, keys = rows(random, shape, name)
        check_lse(fast(family, name, order, clock), queries, keys, 14.3, designated(*shape[:2]))


@pytest.mark.parametrize(("family", "name"), KINDS)
def test_lse_with_masks_ids_and_a_diagonal(family: str, name: str, random: Any) -> None:
    queries, keys = rows(random, (150, 260, 40), name)
    pairs = every_option(random, 150, 260)
    queries[pairs.query_mask == 0] = np.nan
    keys[pairs.key_mask == 0] = np.nan
    plain = [np.where(np.isnan(x), 0, x) for x in (queries, keys)]
    kernels = fast(family, name)
    packed = kernels.pack(queries, pairs.query_mask), kernels.pack(keys, pairs.key_mask)
    found = kernels.lse(*packed, one(30.0), pairs)
    wanted = plain_lse(*plain, 30.0, pairs)
    np.testing.assert_allclose(natural(found[0], found[1]), wanted[0], rtol=0, atol=slack(30))
    np.testing.assert_allclose(natural(found[2], found[3]), wanted[1], rtol=0, atol=slack(30))


@pytest.mark.parametrize(("order", "clock"), SCHEDULES)
@pytest.mark.parametrize(("family", "name"), KINDS)
def test_gradient_weights(family: str, name: str, order: str, clock: str, random: Any) -> None:
    for shape in SHAPES:
        queries, keys = rows(random, shape, name)
        check_weights(fast(family, name, order, clock), queries, keys, 14.3, designated(*shape[:2]))


@pytest.mark.parametrize("scale", [0.0, -20.0])
@pytest.mark.parametrize(("family", "name"), KINDS)
def test_scales_of_zero_and_below_leave_forbidden_pairs_out(family: str, name: str, scale: float, random: Any) -> None:
    queries, keys = rows(random, (40, 70, 24), name)
    pairs = every_option(random, 40, 70)
    kernels = fast(family, name)
    check_lse(kernels, queries, keys, scale, pairs)
    check_weights(kernels, queries, keys, scale, pairs)
    pairs = replace(pairs, diagonal=None)
    packed = kernels.pack(queries, pairs.query_mask), kernels.pack(keys, pairs.key_mask)
    loss, *_ = kernels.sigmoid(*packed, one(scale), one(-1.0), pairs, None, one(1.0))
    np.testing.assert_allclose(loss, plain_sigmoid(queries, keys, scale, -1.0, pairs)[0], rtol=4e-6)


@pytest.mark.parametrize(("family", "name"), KINDS)
def test_gradient_weights_with_masks_ids_and_a_diagonal(family: str, name: str, random: Any) -> None:
    queries, keys = rows(random, (150, 260, 40), name)
    check_weights(fast(family, name), queries, keys, 30.0, every_option(random, 150, 260))


@pytest.mark.parametrize(("order", "clock"), SCHEDULES)
@pytest.mark.parametrize(("family", "name"), KINDS)
def test_sigmoid_loss_and_gradient_in_one_pass(family: str, name: str, order: str, clock: str, random: Any) -> None:
    queries, keys = rows(random, (150, 260, 40), name)
    pairs = replace(every_option(random, 150, 260), diagonal=None)
    kernels = fast(family, name, order, clock)
    packed = kernels.pack(queries, pairs.query_mask), kernels.pack(keys, pairs.key_mask)
    factor = random.random(150).astype(np.float32)
    for weights in (factor, None):
        wanted = plain_sigmoid(queries, keys, 10.0, -10.0, pairs, weights)
        given = one(10.0), one(-10.0), pairs, weights, one(4096.0)
        loss, weight, positive, g, parts = kernels.sigmoid(*packed, *given, products=family == "ampere")
        np.testing.assert_allclose(loss, wanted[0], rtol=4e-6)
        np.testing.assert_allclose(weight, wanted[1], rtol=4e-6, atol=4e-6)
        np.testing.assert_allclose(positive, wanted[2], rtol=0, atol=slack(20))
        np.testing.assert_allclose(numbers(g, name, 4096.0), wanted[3], rtol=ROUNDING[name] + 8e-6, atol=1e-8)
        if parts is not None:
            products = wanted[3] * (queries.astype(np.float64) @ keys.astype(np.float64).T)
            np.testing.assert_allclose(parts.sum(0), products.sum(1), rtol=8e-6, atol=8e-6)


def test_small_softplus_terms_are_not_lost(random: Any) -> None:
    """At bias -20 every term is 2e-9: log(1 + e) would give a loss of 0."""
    queries, keys = rows(random, (8, 300, 16), "bfloat16")
    kernels = fast("ampere", "bfloat16")
    loss, *_ = kernels.sigmoid(kernels.pack(queries), kernels.pack(keys), one(1.0), one(-20.0), Pairs(), grad=False)
    np.testing.assert_allclose(loss, plain_sigmoid(queries, keys, 1.0, -20.0, Pairs())[0], rtol=2e-6)


# -- the guards of the shared exponential -----------------------------------------------------------


def far_apart(name: str) -> tuple[Any, Any]:
    """Rows whose largest logits lie 400 apart within one tile, at scale 200."""
    queries, keys = np.zeros((96, 8)), np.zeros((96, 8))
    queries[:, 0], keys[:, 0] = np.where(np.arange(96) % 2, 1.0, -1.0), 1.0
    queries[:, 1:] = np.linspace(-0.01, 0.01, 96 * 7).reshape(96, 7)
    keys[:, 1] = np.linspace(-1, 1, 96)
    return queries.astype(DTYPES[name]), keys.astype(DTYPES[name])


@pytest.mark.parametrize(("family", "name"), KINDS)
def test_rows_far_below_the_tiles_maximum_are_redone(family: str, name: str) -> None:
    queries, keys = far_apart(name)
    check_lse(fast(family, name), queries, keys, 200.0, designated(96, 96))


@pytest.mark.parametrize(("family", "name"), KINDS)
def test_lse_values_far_apart_take_two_exponentials(family: str, name: str) -> None:
    queries, keys = far_apart(name)
    check_weights(fast(family, name), queries, keys, 200.0, designated(96, 96))


def in_the_millions(name: str) -> tuple[Any, Any]:
    """Logits of 2^22 and -2^22, give or take 6: whole numbers, so that every product and sum is exact in float32."""
    random = np.random.default_rng(5)
    queries, keys = random.integers(-2, 3, (2, 150, 3)).astype(np.float64)
    queries[:, 0], keys[:, 0] = np.where(np.arange(150) % 3, 2048.0, -2048.0), 2048.0
    return queries.astype(DTYPES[name]), keys.astype(DTYPES[name])


@pytest.mark.parametrize(("family", "name"), KINDS)
def test_logits_in_the_millions_keep_what_tells_them_apart(family: str, name: str) -> None:
    """A float32 of that size knows halves, of its log2 not even those: no logit, shift or sum may be rounded twice."""
    queries, keys = in_the_millions(name)
    pairs, kernels = designated(150, 150), fast(family, name)
    packed = kernels.pack(queries), kernels.pack(keys)
    row_shift, row_mass, column_shift, column_mass, positive = kernels.lse(*packed, one(1.0), pairs)
    row_lse, column_lse, logits = plain_lse(queries, keys, 1.0, pairs)
    np.testing.assert_allclose(natural(row_shift, row_mass), row_lse, rtol=0, atol=1e-6)
    np.testing.assert_allclose(natural(column_shift, column_mass), column_lse, rtol=0, atol=1e-6)
    assert (positive == logits).all()
    sides = [rounded_weights(lse) for lse in (row_lse, column_lse)]
    for given in ((*sides,), (sides[0], None), (None, sides[1])):
        g, _ = kernels.weights(*packed, one(1.0), pairs, *given, one(1.0))
        wanted = plain_weights(queries, keys, 1.0, pairs, *given)
        np.testing.assert_allclose(numbers(g, name, 1.0), wanted, rtol=ROUNDING[name] + 4e-6, atol=2e-6)


def rounded_weights(lse: Any) -> Weights:
    """Weights 1 of every row: the shift a float32, the factor making up for its rounding."""
    shift = lse.astype(np.float32)
    return Weights(np.exp(shift - lse).astype(np.float32), shift, np.ones(len(lse), np.float32))


def mutant(folder: Path, file: str, before: str, after: str) -> FastKernels:
    """The kernels with one line of tile.cuh changed; bfloat16 alone, to be quick."""
    for path in KERNELS.iterdir():
        if path.suffix in (".cu", ".cuh"):
            shutil.copy(path, folder)
    tile = (folder / "tile.cuh").read_text()
    assert before in tile
    (folder / "tile.cuh").write_text(tile.replace(before, after))
    kernels = (folder / file).read_text()
    for name in ("float16", "tf32x3"):
        kernels = "\n".join(
            line for line in kernels.splitlines() if not line.startswith("NIBS_") or f"({name}," not in line
        )
    (folder / file).write_text(kernels)
    return FastKernels(Host(Runner(folder=folder)), "bfloat16")


def test_without_the_first_guard_rows_would_be_lost(tmp_path: Path) -> None:
    kernels = mutant(tmp_path, "ampere_lse.cu", "constexpr float LOW = 8.0779357e-28f", "constexpr float LOW = -1.0f")
    with pytest.raises(AssertionError):
        check_lse(kernels, *far_apart("bfloat16"), 200.0, designated(96, 96))


def test_a_shift_rounded_with_its_logit_would_lose_what_tells_large_ones_apart(tmp_path: Path) -> None:
    before, after = "fmaf(logit, LOG2E, -middle)", "logit * LOG2E - middle"
    kernels = mutant(tmp_path, "ampere_weights.cu", before, after)
    queries, keys = np.abs(in_the_millions("bfloat16"))
    side = rounded_weights(plain_lse(queries, keys, 1.0, Pairs())[0])
    g, _ = kernels.weights(kernels.pack(queries), kernels.pack(keys), one(1.0), Pairs(), side, None, one(1.0))
    assert np.abs(numbers(g, "bfloat16", 1.0).sum(1) - 1).max() > 0.05


def test_without_the_second_guard_weights_would_be_wrong(tmp_path: Path) -> None:
    kernels = mutant(tmp_path, "ampere_weights.cu", "constexpr float SPREAD = 100.0f", "constexpr float SPREAD = 1e30f")
    with pytest.raises(AssertionError):
        check_weights(kernels, *far_apart("bfloat16"), 200.0, designated(96, 96))


@pytest.mark.parametrize("family", ["ampere", "hopper"])
def test_a_target_in_the_next_macro_tile_is_none_of_this_one(family: str, random: Any) -> None:
    """Column 75 of 70 lies in the padding of this tile, not beyond it."""
    queries, keys = rows(random, (40, 70, 24), "bfloat16")
    pairs = Pairs(target=np.arange(40) + 35)
    kernels = fast(family, "bfloat16")
    check_lse(kernels, queries, keys, 20.0, pairs)
    check_weights(kernels, queries, keys, 20.0, pairs)
    packed = kernels.pack(queries), kernels.pack(keys)
    loss, _, positive, *_ = kernels.sigmoid(*packed, one(20.0), one(-1.0), pairs, None, one(1.0))
    wanted = plain_sigmoid(queries, keys, 20.0, -1.0, pairs)
    np.testing.assert_allclose(loss, wanted[0], rtol=4e-6)
    np.testing.assert_allclose(positive, wanted[2], rtol=0, atol=slack(20))


def test_rows_that_are_no_anchors_give_no_nan_however_large_their_logits() -> None:
    """No lse bounds a pair of a row and a column that are both no anchors: its weight is 0, not infinity times 0."""
    queries, keys = np.eye(4, dtype=np.float32) * 30, np.eye(4, dtype=np.float32) * 30
    kernels = fast("ampere", "tf32x3")
    nobody = np.array([1, 1, 0, 0], np.float32)
    side = Weights(nobody, np.where(nobody > 0, np.float32(0), np.float32(np.inf)), nobody * 0)
    g, _ = kernels.weights(kernels.pack(queries), kernels.pack(keys), one(1.0), Pairs(), side, side, one(1.0))
    assert (g[2:, 2:] == 0).all()


def test_a_row_in_which_nothing_is_allowed_has_mass_0_and_the_lowest_shift(random: Any) -> None:
    queries, keys = rows(random, (3, 5, 8), "bfloat16")
    pairs = Pairs(query_ids=np.array([1, 2, 1]), key_ids=np.full(5, 2))
    kernels = fast("ampere", "bfloat16")
    shift, mass, *_ = kernels.lse(kernels.pack(queries), kernels.pack(keys), one(5.0), pairs)
    assert (mass[1], shift[1]) == (0, np.finfo(np.float32).min)
    assert plain_allowed(3, 5, pairs)[[0, 2]].all()


def test_nan_in_a_present_row_reaches_its_lse_and_no_other_row(random: Any) -> None:
    queries, keys = rows(random, (40, 50, 16), "bfloat16")
    queries[7] = np.nan
    kernels = fast("ampere", "bfloat16")
    _, row_mass, _, column_mass, _ = kernels.lse(kernels.pack(queries), kernels.pack(keys), one(9.0), Pairs())
    assert np.flatnonzero(np.isnan(row_mass)).tolist() == [7]
    assert np.isnan(column_mass).all()


def test_parts_of_marked_and_unmarked_tiles_fold_in_one_sum(random: Any) -> None:
    logits = (random.standard_normal((6, 40)) * 30).astype(np.float32)
    shift, mark = logits.max(1), np.array([1, 0, 1, 0, 0, 1], np.int32)
    marked = np.broadcast_to(mark[:, None], logits.shape)
    own = logits - 3  # each row's own shift, far from the tile's
    part = np.exp2(logits - np.where(marked, own, shift[:, None]))
    part[:, 3] = 0  # a row in which no tile has anything
    out = np.zeros((2, 40), np.float32)
    arguments = np.zeros(1, FOLD_ARGS)
    given = (("part", part), ("own", own), ("shift", shift), ("mark", mark))
    for name, value in (*given, ("out_shift", out[0]), ("out_mass", out[1])):
        arguments[name] = value.ctypes.data
    for name, number in (("length", 40), ("steps", 6), ("tile", 40), ("base", 1), ("step", 1)):
        arguments[name] = number
    Runner().kernel("fold.cu", "nibs_fold_lse")(1, 128, arguments)
    wanted = plain_fold(part, own, np.broadcast_to(shift[:, None], part.shape), marked)
    assert wanted[3] == -np.inf
    np.testing.assert_allclose(natural(*out), wanted, rtol=0, atol=slack(100))


@pytest.mark.parametrize(("family", "name"), KINDS)
def test_the_same_call_gives_the_same_bits_whatever_the_order_of_threads(family: str, name: str, random: Any) -> None:
    queries, keys = rows(random, (200, 300, 50), name)
    found = []
    for order, clock in SCHEDULES:
        kernels = fast(family, name, order, clock)
        found.append(kernels.lse(kernels.pack(queries), kernels.pack(keys), one(14.3), designated(200, 300)))
    for other in found[1:]:
        for first, again in zip(found[0], other, strict=True):
            assert (first == again).all()
