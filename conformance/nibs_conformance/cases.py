"""The named inputs that every backend must get right: ordinary ones, one for each option, and cruel ones.

A case says what it is for, and a cruel one which fault it was made against, in real losses and in
sketches of ours. Sizes are small: it is the shape of the trouble that counts, not the amount. Rows are
drawn from a seed that is the case's own name, and rounded to the dtype under test, so that the oracle
and the backend see the very same numbers. Nothing here knows a backend or asks for a tolerance.

    case = CASES["scale-100-near"]
    problem = case.problem("bfloat16")
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibs.spec import Direction, InfoNCE, Objective, Sigmoid
from nibs_conformance.oracle import Problem
from nibs_conformance.tolerances import store

__all__ = ["CASES", "DTYPES", "Case", "pairs"]

Array = NDArray[Any]
Generator = np.random.Generator

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One named input.

    group: `"ordinary"`, `"options"` or `"cruel"`. make: draws the problem, in float64. fault: what a cruel
    case catches, empty for the others. layout: how the rows lie in memory, see `checks.lay`. scalars: how
    scale and bias are handed over, `"float"`, `"[]"` or `"[1]"`.
    nonnegative: whether the exact loss has one positive per row and so can't be below zero, not by rounding.
    """

    name: str
    group: str
    make: Callable[[Generator], Problem] = field(repr=False)
    fault: str = ""
    layout: str = "plain"
    scalars: str = "float"
    nonnegative: bool = False

    def problem(self, dtype: str) -> Problem:
        """The case's numbers as rows of `dtype` hold them; half precision widened to float32."""
        return _drawn(self, dtype)

    def features(self) -> tuple[str, ...]:
        """What a backend needs for it, in the words of `nibs.capabilities.FEATURES`."""
        from nibs.capabilities import needs
        from nibs_conformance.checks import request_of

        return tuple(needs(request_of(self.problem("float32"), "float32", "cpu")))


@cache
def _drawn(case: Case, dtype: str) -> Problem:
    problem = case.make(np.random.default_rng(zlib.crc32(case.name.encode())))
    real = np.float64 if dtype == "float64" else np.float32
    scale, bias = float(problem.scale), float(problem.bias)
    if case.scalars != "float":
        scale, bias = float(real(scale)), float(real(bias))
    return replace(
        problem,
        queries=_frozen(store(problem.queries, dtype)),
        keys=_frozen(store(problem.keys, dtype)),
        scale=scale,
        bias=bias,
        weights=None if problem.weights is None else _frozen(problem.weights.astype(real)),
        upstream=None if problem.upstream is None else _frozen(problem.upstream.astype(real)),
    )


def _frozen(values: Array) -> Array:
    values = np.array(values)
    values.setflags(write=False)
    return values


CASES: dict[str, Case] = {}


def _case(name: str, group: str, make: Callable[[Generator], Problem], fault: str = "", **how: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(name, group, make, fault, **how)


# -- rows --------------------------------------------------------------------------------------------


def units(r: Generator, rows: int, d: int) -> Array:
    """Rows of length one, in random directions."""
    values = r.standard_normal((rows, d))
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / lengths)


def near(r: Generator, rows: Array, cosine: float) -> Array:
    """Rows of length one at (about) this cosine to the given ones."""
    return np.asarray(cosine * rows + np.sqrt(1 - cosine * cosine) * units(r, *rows.shape))


def pairs(r: Generator, n: int = 37, d: int = 24, cosine: float = 0.5) -> tuple[Array, Array]:
    """Queries and keys of length one, n of each, row by row at (about) this cosine."""
    keys = units(r, n, d)
    return near(r, keys, cosine), keys


def grid(r: Generator, rows: int, d: int) -> Array:
    """Halves between -1.5 and 1.5: their products are exact in every dtype, multiples of a quarter."""
    return r.integers(-3, 4, (rows, d)) / 2.0


def square(
    r: Generator, n: int = 37, d: int = 24, *, cosine: float = 0.5, scale: float = 14.3, **options: Any
) -> Problem:
    queries, keys = pairs(r, n, d, cosine)
    return Problem(queries, keys, scale=scale, **options)


def rectangle(r: Generator, n: int, m: int, d: int = 24, *, scale: float = 14.3, **options: Any) -> Problem:
    return Problem(units(r, n, d), units(r, m, d), scale=scale, **options)


def both(r: Generator, rows: int = 40, d: int = 24, *, scale: float = 10.0, **options: Any) -> Problem:
    """Two views of rows/2 things, stacked, as one set that is both queries and keys."""
    one, two = pairs(r, rows // 2, d)
    z = np.concatenate([one, two])
    return Problem(z, z, scale=scale, **options)


def other_view(rows: int = 40) -> Array:
    return (np.arange(rows) + rows // 2) % rows


def mask(r: Generator, rows: int, share: float = 0.7) -> Array:
    present: Array = r.random(rows) < share
    present[rows // 2] = True
    return present


WAYS: tuple[Direction, ...] = ("symmetric", "query_to_key", "key_to_query")


# -- ordinary ----------------------------------------------------------------------------------------


def _plain(way: Direction) -> None:
    name, objective = way.replace("_", "-"), InfoNCE(way)
    _case(name, "ordinary", lambda r: square(r, objective=objective), nonnegative=True)
    _case(f"{name}-sum", "options", lambda r: square(r, objective=objective, reduction="sum"))
    _case(f"{name}-none", "options", lambda r: square(r, objective=objective, reduction="none"), nonnegative=True)


for _way in WAYS:
    _plain(_way)
_case("sigmoid", "ordinary", lambda r: square(r, objective=Sigmoid(), scale=10.0, bias=-10.0))
_case("sigmoid-sum", "options", lambda r: square(r, objective=Sigmoid(), scale=10.0, bias=-3.0, reduction="sum"))
_case("sigmoid-none", "options", lambda r: square(r, objective=Sigmoid(), scale=10.0, bias=-3.0, reduction="none"))
_case("sigmoid-wide", "ordinary", lambda r: rectangle(r, 19, 53, objective=Sigmoid(), scale=8.0, bias=-4.0))
_case("wide", "ordinary", lambda r: rectangle(r, 19, 53), nonnegative=True)
_case("scalars-0d", "ordinary", lambda r: square(r, objective=Sigmoid(), scale=9.7, bias=-2.3), scalars="[]")
_case("scalars-1d", "ordinary", lambda r: square(r, scale=9.7, bias=0.4), scalars="[1]")

# -- one option each ---------------------------------------------------------------------------------


def _with_ids(r: Generator, objective: Objective) -> Problem:
    ids = r.integers(0, 12, 37)
    return square(r, objective=objective, query_ids=ids, key_ids=ids.copy())


def _optioned(way: Direction) -> None:
    name = way.replace("_", "-")

    _case(f"smoothing-{name}", "options", lambda r: square(r, objective=InfoNCE(way, label_smoothing=0.1)))
    _case(f"exclude-{name}", "options", lambda r: _with_ids(r, InfoNCE(way, same_id="exclude")), nonnegative=True)
    _case(f"positive-{name}", "options", lambda r: _with_ids(r, InfoNCE(way, same_id="positive")))
    _case(
        f"weights-{name}",
        "options",
        lambda r: square(r, objective=InfoNCE(way), weights=r.integers(0, 5, 37) / 2.0 + (np.arange(37) == 0)),
        nonnegative=True,
    )
    _case(
        f"targets-{name}",
        "options",
        lambda r: rectangle(r, 23, 61, objective=InfoNCE(way), targets=r.permutation(61)[:23]),
        nonnegative=True,
    )
    _case(
        f"masks-{name}",
        "options",
        lambda r: square(r, objective=InfoNCE(way), query_mask=mask(r, 37), key_mask=mask(r, 37)),
        nonnegative=True,
    )
    _case(
        f"margin-{name}",
        "options",
        lambda r: Problem(
            grid(r, 37, 6), grid(r, 37, 6), scale=1.7, objective=InfoNCE(way, false_negative_margin=0.625)
        ),
        nonnegative=True,
    )
    _case(
        f"everything-{name}",
        "options",
        lambda r: Problem(
            (z := grid(r, 40, 6)),
            z.copy(),
            scale=0.9,
            bias=0.3,
            objective=InfoNCE(
                way, label_smoothing=0.05, same_id="exclude", exclude_self=True, false_negative_margin=1.125
            ),
            targets=np.where(r.random(40) < 0.2, -1, other_view()),
            query_ids=(ids := r.integers(0, 15, 40)),
            key_ids=ids.copy(),
            query_mask=mask(r, 40, 0.8),
            key_mask=mask(r, 40, 0.8),
            weights=r.integers(1, 5, 40) / 2.0,
        ),
    )
    _case(
        f"none-weights-targets-{name}",
        "options",
        lambda r: rectangle(
            r,
            31,
            17,
            objective=InfoNCE(way),
            reduction="none",
            targets=r.integers(-1, 17, 31),
            weights=r.integers(1, 5, 31) / 2.0,
            query_mask=mask(r, 31),
            key_mask=mask(r, 17),
        ),
        nonnegative=True,
    )


for _way in WAYS:
    _optioned(_way)

_case("smoothing-wide", "options", lambda r: rectangle(r, 19, 53, objective=InfoNCE(label_smoothing=0.2)))
_case("smoothing-one", "options", lambda r: square(r, objective=InfoNCE(label_smoothing=1.0)))
_case(
    "smoothing-masked",
    "options",
    lambda r: square(r, objective=InfoNCE(label_smoothing=0.2), query_mask=mask(r, 37), key_mask=mask(r, 37)),
    fault="smoothing spread over all keys instead of those allowed",
)
_case(
    "self-excluded",
    "options",
    lambda r: both(r, objective=InfoNCE("query_to_key", exclude_self=True), targets=other_view()),
    fault="a row is its own hardest negative: the loss of two views of one set",
    nonnegative=True,
)
_case(
    "self-excluded-symmetric",
    "options",
    lambda r: both(r, objective=InfoNCE(exclude_self=True), targets=other_view()),
    nonnegative=True,
)
_case(
    "supervised",
    "options",
    lambda r: both(
        r,
        objective=InfoNCE("query_to_key", same_id="positive", exclude_self=True),
        query_ids=(ids := r.integers(0, 6, 40)),
        key_ids=ids.copy(),
    ),
    fault="several positives averaged inside the logarithm instead of outside; a row counted as its own positive",
)
_case(
    "positive-with-targets",
    "options",
    lambda r: rectangle(
        r,
        23,
        31,
        objective=InfoNCE(same_id="positive"),
        query_ids=r.integers(0, 9, 23),
        key_ids=r.integers(0, 9, 31),
        targets=r.integers(-1, 31, 23),
    ),
)
_case(
    "positive-none-with-targets",
    "options",
    lambda r: rectangle(
        r,
        23,
        31,
        objective=InfoNCE(same_id="positive"),
        query_ids=r.integers(0, 9, 23),
        key_ids=r.integers(0, 9, 31),
        targets=r.integers(-1, 31, 23),
        reduction="none",
    ),
)
_case(
    "margin-tie",
    "options",
    lambda r: Problem(grid(r, 37, 6), grid(r, 37, 6), scale=1.3, objective=InfoNCE(false_negative_margin=0.5)),
    fault="a negative exactly at the threshold is dropped: the comparison is strict",
)
_case(
    "margin-negative",
    "options",
    lambda r: Problem(grid(r, 37, 6), grid(r, 37, 6), scale=1.3, objective=InfoNCE(false_negative_margin=-1.125)),
)
_case(
    "margin-negative-scale",
    "options",
    lambda r: Problem(grid(r, 37, 6), grid(r, 37, 6), scale=-1.3, objective=InfoNCE(false_negative_margin=0.625)),
    fault="the margin measured in logits: the scale, or its sign, moves the threshold",
)
_case(
    "margin-several-queries",
    "options",
    lambda r: Problem(
        grid(r, 31, 6),
        grid(r, 11, 6),
        scale=0.8,
        objective=InfoNCE(false_negative_margin=0.125),
        targets=r.integers(-1, 11, 31),
    ),
    fault="a key with several positives must measure from its largest",
)
_case(
    "sigmoid-exclude",
    "options",
    lambda r: square(
        r,
        objective=Sigmoid("exclude"),
        scale=8.0,
        bias=-3.0,
        query_ids=(ids := r.integers(0, 12, 37)),
        key_ids=ids.copy(),
    ),
)
_case(
    "sigmoid-positive",
    "options",
    lambda r: rectangle(
        r,
        23,
        31,
        objective=Sigmoid("positive"),
        scale=8.0,
        bias=-3.0,
        query_ids=r.integers(0, 9, 23),
        key_ids=r.integers(0, 9, 31),
    ),
)
_case(
    "sigmoid-masks-weights",
    "options",
    lambda r: rectangle(
        r,
        23,
        31,
        objective=Sigmoid(),
        scale=8.0,
        bias=-3.0,
        targets=r.integers(-1, 31, 23),
        query_mask=mask(r, 23),
        key_mask=mask(r, 31),
        weights=r.integers(0, 5, 23) / 2.0 + 0.5,
    ),
)
_case("query-mask-alone", "options", lambda r: square(r, query_mask=mask(r, 37)), nonnegative=True)
_case("key-mask-alone", "options", lambda r: square(r, key_mask=mask(r, 37)), nonnegative=True)

# -- cruel: sizes and layouts --------------------------------------------------------------------------

_case("one-pair", "cruel", lambda r: square(r, 1, 5), "a batch of one: the loss is exactly 0", nonnegative=True)
_case("one-pair-sigmoid", "cruel", lambda r: square(r, 1, 5, objective=Sigmoid(), bias=-1.0), "a batch of one")
_case("one-query", "cruel", lambda r: rectangle(r, 1, 29), "a single row beside many", nonnegative=True)
_case(
    "one-key",
    "cruel",
    lambda r: rectangle(r, 29, 1, targets=np.zeros(29, np.int64)),
    "a single key, the positive of all",
    nonnegative=True,
)
_case(
    "one-dimension",
    "cruel",
    lambda r: Problem(r.standard_normal((33, 1)), r.standard_normal((33, 1)), scale=2.0),
    "d = 1",
)
_case(
    "nothing-divides",
    "cruel",
    lambda r: rectangle(r, 131, 211, 67),
    "the last tile reads or writes past the end, or is dropped: 131, 211 and 67 are primes",
    nonnegative=True,
)
_case(
    "just-past-a-tile",
    "cruel",
    lambda r: square(r, 129, 65),
    "one row past a power of two: a tail kernel reads the row statistics of the tile before it",
    nonnegative=True,
)
_case(
    "width-96",
    "cruel",
    lambda r: square(r, 40, 96),
    "row stride rounded up to a power of two: every row but the first is read from the wrong place",
)
_case(
    "width-384",
    "cruel",
    lambda r: square(r, 40, 384),
    "widths that are no multiple of 256 crash or are cut",
    nonnegative=True,
)
_case(
    "columns-of-a-wider-array",
    "cruel",
    lambda r: square(r, 41, 20),
    "rows taken as packed: two halves of one array, split along its columns, are read interleaved",
    layout="columns",
)
_case(
    "every-other-row",
    "cruel",
    lambda r: square(r, 41, 20),
    "the stride between rows ignored; what lies between is NaN",
    layout="rows",
)
_case(
    "transposed",
    "cruel",
    lambda r: square(r, 41, 20),
    "column-major rows read as row-major, or only in one of the two passes",
    layout="transposed",
)
_case(
    "transposed-sigmoid",
    "cruel",
    lambda r: square(r, 41, 20, objective=Sigmoid(), scale=5.0, bias=-2.0),
    "column-major rows read as row-major",
    layout="transposed",
)
_case("empty", "cruel", lambda r: rectangle(r, 0, 0), "an empty batch: loss 0, gradients of no rows, count 0")
_case("no-queries", "cruel", lambda r: rectangle(r, 0, 9), "keys without a single query")
_case(
    "no-keys",
    "cruel",
    lambda r: rectangle(r, 9, 0, targets=np.full(9, -1)),
    "queries without a single key: maximum over nothing",
)
_case(
    "no-keys-sigmoid",
    "cruel",
    lambda r: rectangle(r, 9, 0, targets=np.full(9, -1), objective=Sigmoid()),
    "no key at all",
)
_case(
    "weights-far-apart",
    "cruel",
    lambda r: square(r, 300, 8, weights=np.where(np.arange(300) == 5, 60000.0, 1.0)),
    "the mean's 1/n multiplied in before the product: weights below half precision's smallest number vanish",
)

# -- cruel: numbers ------------------------------------------------------------------------------------

_case(
    "equal-rows",
    "cruel",
    lambda r: Problem(np.repeat(grid(r, 1, 16), 30, 0), np.repeat(grid(r, 1, 16), 30, 0), scale=3.0),
    "all logits tie: the loss is log(n) and no row is ahead",
)
_case(
    "zero-rows",
    "cruel",
    lambda r: replace(square(r, 30, 16), queries=np.zeros((30, 16))),
    "rows of zeros: nothing may be divided by their length",
)
_case("all-zero", "cruel", lambda r: Problem(np.zeros((17, 8)), np.zeros((17, 8)), scale=10.0), "every logit is 0")


def _converging(name: str, scale: float, cosine: float) -> None:
    _case(
        name,
        "cruel",
        lambda r: square(r, 96, 64, cosine=cosine, scale=scale),
        "positive and lse from different arithmetic: near convergence the loss comes out negative",
        nonnegative=True,
    )


_converging("scale-100-near", 100.0, 0.99)
_converging("scale-200", 200.0, 0.9)
_converging("scale-100", 100.0, 0.7)
_case(
    "temperature-0.005",
    "cruel",
    lambda r: rectangle(r, 80, 80, 256, scale=1 / 0.005),
    "a fixed maximum of 1/temperature: where no row is that similar every exponential underflows",
    nonnegative=True,
)
_case(
    "temperature-0.005-sigmoid",
    "cruel",
    lambda r: square(r, 60, 64, objective=Sigmoid(), scale=1 / 0.005, bias=-100.0),
    "log(sigmoid) taken as written: infinite where the sigmoid underflows",
)
_case(
    "unnormalised-30",
    "cruel",
    lambda r: replace((p := square(r, 60, 32, scale=2.0)), queries=30 * p.queries, keys=30 * p.keys),
    "rows assumed to have length one: exponentials overflow",
    nonnegative=True,
)
_case(
    "one-row-20-times-longer",
    "cruel",
    lambda r: replace(
        (p := square(r, 60, 32, scale=100.0)), queries=p.queries * np.where(np.arange(60) == 7, 20.0, 1.0)[:, None]
    ),
    "one maximum for a whole tile: the other rows underflow to nothing",
    nonnegative=True,
)
_case(
    "one-key-20-times-longer",
    "cruel",
    lambda r: replace(
        (p := square(r, 60, 32, scale=100.0)), keys=p.keys * np.where(np.arange(60) == 7, 20.0, 1.0)[:, None]
    ),
    "one maximum for a whole tile: the other columns underflow to nothing",
    nonnegative=True,
)
_case(
    "rows-of-all-lengths",
    "cruel",
    lambda r: replace(
        (p := square(r, 64, 32, scale=50.0)), queries=p.queries * (2.0 ** r.integers(-8, 5, 64))[:, None]
    ),
    "one exponential shared by rows and columns without repairing what underflows",
    nonnegative=True,
)
_case(
    "far-beyond-exp",
    "cruel",
    lambda r: square(r, 50, 32, scale=5000.0),
    "log(sum(exp)) without a maximum: infinite from a logit of 89 on",
    nonnegative=True,
)
_case(
    "all-far-below-zero",
    "cruel",
    lambda r: Problem((u := near(r, np.repeat(units(r, 1, 32), 70, 0), 0.95)), near(r, -u, 0.95), scale=300.0),
    "padding enters the maximum as a logit of 0: where all true ones are below -87 the sum underflows",
    nonnegative=True,
)
_case(
    "sigmoid-bias-far-out",
    "cruel",
    lambda r: square(r, 40, 16, objective=Sigmoid(), scale=10.0, bias=-300.0),
    "softplus of large arguments; a bias gradient that only the positives carry",
)
_case(
    "negative-scale",
    "cruel",
    lambda r: square(r, scale=-14.3),
    "the maximum taken before the sign of the scale",
    nonnegative=True,
)
_case(
    "negative-scale-sigmoid", "cruel", lambda r: square(r, objective=Sigmoid(), scale=-6.0, bias=1.0), "scale and sign"
)
_case("zero-scale", "cruel", lambda r: square(r, scale=0.0), "the scale's gradient got by dividing by the scale")
_case(
    "zero-scale-sigmoid",
    "cruel",
    lambda r: square(r, objective=Sigmoid(), scale=0.0, bias=-1.0),
    "dividing by the scale",
)
_case(
    "tiny-rows",
    "cruel",
    lambda r: replace((p := square(r)), queries=p.queries * 2.0**-7, scale=1000.0),
    "small rows, large scale",
)

# -- cruel: sets ---------------------------------------------------------------------------------------


def _all_but_one(r: Generator) -> Problem:
    return square(r, 30, 16, query_mask=np.arange(30) == 11, key_mask=np.arange(30) == 11)


def _spoiled_where_masked(r: Generator, **options: Any) -> Problem:
    p = square(r, 40, 16, query_mask=mask(r, 40), key_mask=mask(r, 40), **options)
    queries, keys = p.queries.copy(), p.keys.copy()
    queries[~p.query_mask] = np.nan  # type: ignore[operator]
    keys[~p.key_mask] = np.where(np.arange(16) % 2, np.nan, np.inf)  # type: ignore[operator]
    return replace(p, queries=queries, keys=keys)


def _with_value(r: Generator, side: str, value: float, **options: Any) -> Problem:
    p = square(r, 30, 16, **options)
    rows = getattr(p, side).copy()
    rows[17, 3] = value
    return replace(p, **{side: rows})


_case("all-but-one-masked", "cruel", _all_but_one, "a batch of padding round a single pair", nonnegative=True)
_case(
    "all-masked",
    "cruel",
    lambda r: square(r, 12, 8, query_mask=np.zeros(12, bool), key_mask=np.zeros(12, bool)),
    "nothing left: 0/0 instead of loss 0",
)
_case(
    "all-masked-sigmoid",
    "cruel",
    lambda r: square(r, 12, 8, objective=Sigmoid(), query_mask=np.zeros(12, bool)),
    "nothing left: 0/0 instead of loss 0",
)
_case(
    "nan-where-masked",
    "cruel",
    _spoiled_where_masked,
    "0 x NaN: what padding holds leaks into the products",
    nonnegative=True,
)
_case(
    "nan-where-masked-sigmoid",
    "cruel",
    lambda r: _spoiled_where_masked(r, objective=Sigmoid(), bias=-2.0),
    "0 x NaN: what padding holds leaks into the products",
)
_case(
    "nan-where-masked-none",
    "cruel",
    lambda r: _spoiled_where_masked(r, reduction="none"),
    "0 x NaN: what padding holds leaks into the values",
    nonnegative=True,
)
_case(
    "nan-weight-where-masked",
    "cruel",
    lambda r: square(r, 20, 8, query_mask=(here := mask(r, 20)), weights=np.where(here, 1.5, np.nan)),
    "the weight of an absent row is read",
)
_case(
    "negatives-all-excluded",
    "cruel",
    lambda r: square(r, 20, 8, objective=InfoNCE(same_id="exclude"), query_ids=np.full(20, 3), key_ids=np.full(20, 3)),
    "only the positive is left: the loss is exactly 0",
    nonnegative=True,
)
_case(
    "a-row-without-positives",
    "cruel",
    lambda r: square(r, 30, 16, targets=np.where(np.arange(30) == 4, -1, np.arange(30))),
    "-1 taken as the last key; the mean taken over all rows",
    nonnegative=True,
)
_case(
    "no-positives-at-all",
    "cruel",
    lambda r: square(r, 30, 16, targets=np.full(30, -1)),
    "no anchor: loss 0, gradients 0, count 0, not 0/0",
)
_case(
    "no-positives-at-all-sigmoid",
    "cruel",
    lambda r: square(r, 30, 16, targets=np.full(30, -1), objective=Sigmoid(), bias=-1.0),
    "every pair is negative, and every query still counts",
)
_case(
    "positive-is-masked",
    "cruel",
    lambda r: square(r, 30, 16, key_mask=np.arange(30) % 3 != 0),
    "a positive outside the denominator: the row is no anchor, and stays a candidate",
    nonnegative=True,
)
_case(
    "duplicate-targets",
    "cruel",
    lambda r: rectangle(r, 40, 12, targets=r.integers(0, 5, 40)),
    "several queries of one key: the last one wins, or the key's loss counts several times",
    nonnegative=True,
)
_case(
    "duplicate-targets-weighted-none",
    "cruel",
    lambda r: rectangle(r, 40, 12, targets=r.integers(0, 5, 40), weights=r.integers(1, 9, 40) / 4.0, reduction="none"),
    "several queries of one key, each with its own weight and its own value",
    nonnegative=True,
)
_case(
    "ids-that-collide-in-32-bits",
    "cruel",
    lambda r: square(
        r,
        24,
        16,
        objective=InfoNCE(same_id="exclude"),
        query_ids=(ids := (np.arange(24) % 4) * 2**32 + np.arange(24) // 4),
        key_ids=ids.copy(),
    ),
    "ids cut to 32 bits: different things become the same",
    nonnegative=True,
)
_case(
    "ids-near-2-to-40",
    "cruel",
    lambda r: square(
        r,
        24,
        16,
        objective=InfoNCE(same_id="positive"),
        query_ids=(ids := 2**40 + np.arange(24) // 3 - 4),
        key_ids=ids.copy(),
    ),
    "ids compared as float32: neighbours near 2^40 are equal",
)
_case(
    "ids-below-zero",
    "cruel",
    lambda r: square(
        r, 24, 16, objective=InfoNCE(same_id="exclude"), query_ids=(ids := -1 - np.arange(24) // 3), key_ids=ids.copy()
    ),
    "-1 taken as 'no id'",
    nonnegative=True,
)
_case(
    "weights-all-zero",
    "cruel",
    lambda r: square(r, 20, 8, weights=np.zeros(20)),
    "no weight left: 0/0 instead of loss 0",
)
_case(
    "weights-all-zero-sigmoid",
    "cruel",
    lambda r: square(r, 20, 8, weights=np.zeros(20), objective=Sigmoid(), bias=-1.0),
    "no weight left: 0/0 instead of loss 0",
)


def _spoilt(name: str, side: str, value: float) -> None:
    _case(
        name,
        "cruel",
        lambda r: _with_value(r, side, value),
        "a value that is not finite in a present row comes out as a finite number",
    )
    _case(
        f"{name}-none",
        "cruel",
        lambda r: _with_value(r, side, value, objective=InfoNCE("query_to_key"), reduction="none"),
        "NaN where nothing depends on it, or a number where something does",
    )
    _case(
        f"{name}-sigmoid",
        "cruel",
        lambda r: _with_value(r, side, value, objective=Sigmoid(), bias=-1.0),
        "softplus(-inf) is a finite 0: a row that is not finite passes unseen",
    )


_case(
    "nan-beside-far-sigmoid-none",
    "cruel",
    lambda r: _with_value(r, "queries", np.nan, objective=Sigmoid(), scale=900.0, reduction="none"),
    "the largest logit, which says what to do with logits beyond exp, is NaN for a whole tile",
)
_spoilt("nan-in-queries", "queries", np.nan)
_spoilt("nan-in-keys", "keys", np.nan)
_spoilt("inf-in-queries", "queries", np.inf)
_spoilt("inf-in-keys", "keys", -np.inf)
