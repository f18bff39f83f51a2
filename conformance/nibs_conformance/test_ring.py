"""Level 7, ring: many ranks, the same numbers; and an end in bounded time where a rank drops out.

The truth is that of the whole case, solved in one piece; a ring of any size, over any split, must not be
seen in the loss, in a gradient or in a figure. Rings are tried at world sizes 1, 2, 3, 4 and 8, on
threads, or on what `nibs_conformance_world` of the backend brings.

Faults of published losses that have a case here, beside those of `cases` that every ring runs:

    crashes on one process with a learnable scale                 a ring of one, scalars as arrays
    scale's gradient W times too large, embeddings' right         test_gradients_are_complete_as_returned
    embeddings' gradient 1/W after the wrapper's mean             test_mean_undoes_what_an_averaging_wrapper_does
    mean over ranks of local means                                every uneven split with weights
    shards of unequal size read beyond the end, or hang           every uneven split
    no maximum in the ring's own log-sum-exp                      scale-100 and far-beyond-exp
    cross-rank gradient missing (gather without a gradient)       test_gradients_are_complete_as_returned
    a margin measured from the wrong positive on ranks > 0        the margin cases
    a key's own hard negatives taken for its positive             wide: more keys than queries on a rank
    duplicates on other ranks not seen                            the exclude and positive cases
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from nibs.errors import InvalidInput, RingError
from nibs.spec import InfoNCE
from nibs_conformance.cases import CASES, Case
from nibs_conformance.checks import INPUTS, Judge, Subject, finite, near_ties, only, truth
from nibs_conformance.shards import Share, assemble, deal
from nibs_conformance.tolerances import budget_of
from nibs_conformance.worlds import ThreadWorld

SPLITS = {
    1: (1,),
    2: (1, 1),
    3: (3, 0, 4),
    4: (5, 1, 0, 9),
    8: (2, 1, 0, 3, 1, 1, 0, 5),
}
EVEN = {size: (1,) * size for size in SPLITS}

RINGED = (
    "symmetric", "query-to-key", "key-to-query", "sigmoid", "sigmoid-wide", "wide", "scalars-0d", "scalars-1d",
    "symmetric-sum", "key-to-query-sum", "sigmoid-sum",
    "smoothing-symmetric", "smoothing-masked",
    "exclude-symmetric", "exclude-key-to-query", "positive-symmetric", "positive-query-to-key", "positive-with-targets",
    "sigmoid-exclude", "sigmoid-positive", "sigmoid-masks-weights",
    "weights-symmetric", "weights-query-to-key", "weights-key-to-query", "targets-symmetric", "targets-key-to-query",
    "masks-symmetric", "masks-key-to-query", "query-mask-alone", "key-mask-alone",
    "margin-symmetric", "margin-key-to-query", "margin-several-queries", "margin-negative-scale",
    "everything-symmetric", "everything-query-to-key", "everything-key-to-query",
    "self-excluded-symmetric", "supervised",
    "one-pair", "empty", "no-queries", "one-key", "scale-100", "far-beyond-exp", "all-far-below-zero",
    "one-key-20-times-longer", "negative-scale", "zero-scale",
    "all-masked", "nan-where-masked", "negatives-all-excluded", "a-row-without-positives", "no-positives-at-all",
    "duplicate-targets", "ids-near-2-to-40", "ids-that-collide-in-32-bits", "weights-all-zero",
    "nan-in-queries", "nan-in-keys", "inf-in-keys", "nan-in-keys-sigmoid",
)  # fmt: skip
VALUES = (
    "symmetric-none",
    "key-to-query-none",
    "sigmoid-none",
    "none-weights-targets-symmetric",
    "duplicate-targets-weighted-none",
)
EVERY_DTYPE = ("symmetric", "sigmoid", "weights-key-to-query")


def dtypes(*names: str) -> Callable[[Any], Any]:
    """Try a test with rows of these dtypes only: what travels is the same whatever the rows are made of."""

    def mark(test: Any) -> Any:
        test.nibs_dtypes = names
        return test

    return mark


ringed = only(lambda case: case.name in RINGED)
few = only(lambda case: case.name in ("symmetric", "sigmoid", "weights-symmetric"))


class Rings:
    """The worlds of this run, opened when they are first asked for, and what was solved on them."""

    def __init__(self, hooks: Any, stack: ExitStack) -> None:
        self.hooks, self.stack = hooks, stack
        self.worlds: dict[Any, Any] = {}
        self.kept: dict[Any, list[Share]] = {}

    def fresh(self, subject: Subject, size: int) -> Any:
        """A world that is the caller's to enter."""
        if not subject.info.capabilities.collectives:
            pytest.skip(f"{subject.name}: it claims no collective")
        world = self.hooks.nibs_conformance_world(backend=subject.name, size=size)
        if world is None and "nibs.ring.Ring" in subject.info.capabilities.collectives:
            world = ThreadWorld(size)
        if world is None:
            pytest.skip(f"{subject.name}: no world to run {size} ranks in")
        return world

    def world(self, subject: Subject, size: int) -> Any:
        if (subject.name, size) not in self.worlds:
            self.worlds[subject.name, size] = self.stack.enter_context(self.fresh(subject, size))
        return self.worlds[subject.name, size]

    def run(self, job: str, subject: Subject, size: int, *arguments: Any) -> list[Any]:
        return list(
            self.world(subject, size).run(f"nibs_conformance.shards:{job}", subject.name, subject.device, *arguments)
        )

    def solve(
        self, subject: Subject, case: Case, dtype: str, proportions: tuple[int, ...], **options: Any
    ) -> list[Share]:
        """Every rank's share of a case; run once and kept."""
        key = subject.name, case.name, dtype, proportions, repr(options)
        if key not in self.kept:
            dealt = deal(case.problem(dtype), proportions)
            shares = self.run("solve_shard", subject, len(proportions), dealt.shards, dtype, options)
            failed = [(rank, share) for rank, share in enumerate(shares) if isinstance(share, BaseException)]
            for rank, error in sorted(failed, key=lambda one: isinstance(one[1], RingError)):  # causes first
                raise AssertionError(f"rank {rank} of {len(proportions)}: {type(error).__name__}: {error}") from error
            self.kept[key] = shares
        return self.kept[key]


@pytest.fixture(scope="session")
def rings(hooks: Any) -> Iterator[Rings]:
    """The worlds of this run."""
    with ExitStack() as stack:
        yield Rings(hooks, stack)


@pytest.fixture
def split(subject: Subject, size: int) -> tuple[int, ...]:
    """An uneven split where the backend claims it, else an even one."""
    return (SPLITS if subject.has("uneven_shards") else EVEN)[size]


sizes = pytest.mark.parametrize("size", list(SPLITS), ids=lambda size: f"{size}-ranks")


# -- values ----------------------------------------------------------------------------------------


@sizes
@dtypes("float32")
@ringed
def test_the_loss_is_that_of_the_whole_batch_on_every_rank(
    subject: Subject, case: Case, dtype: str, size: int, split: Any, judge: Judge, served: Any, rings: Rings
) -> None:
    served(case.problem(dtype), dtype)
    shares = rings.solve(subject, case, dtype, split)
    for share in shares:
        judge.close("loss", share.loss, truth(case, dtype).loss, subject.budget(case, dtype).loss)
        assert share.loss.tobytes() == shares[0].loss.tobytes(), "two ranks have different bits of one loss."


@sizes
@dtypes("float32")
@ringed
def test_gradients_are_complete_as_returned(
    subject: Subject, case: Case, dtype: str, size: int, split: Any, judge: Judge, served: Any, rings: Rings
) -> None:
    served(case.problem(dtype), dtype)
    problem = case.problem(dtype)
    shares = rings.solve(subject, case, dtype, split)
    whole = assemble(deal(problem, split), problem, shares)
    for name in INPUTS:
        judge.gradient(name, whole[name], truth(case, dtype), subject.budget(case, dtype), problem)
    for share in shares:
        for name in ("scale", "bias"):
            judge.gradient(name, share.gradients[name], truth(case, dtype), subject.budget(case, dtype), problem)


@sizes
@only(lambda case: case.name in EVERY_DTYPE)
def test_rows_of_every_dtype_travel(
    subject: Subject, case: Case, dtype: str, size: int, split: Any, judge: Judge, served: Any, rings: Rings
) -> None:
    problem = case.problem(dtype)
    served(problem, dtype)
    whole = assemble(deal(problem, split), problem, rings.solve(subject, case, dtype, split))
    judge.close("loss", whole["loss"], truth(case, dtype).loss, subject.budget(case, dtype).loss)
    for name in INPUTS:
        judge.gradient(name, whole[name], truth(case, dtype), subject.budget(case, dtype), problem)


@sizes
@dtypes("float32")
@only(lambda case: case.name in RINGED and finite(case.problem("float32")))
def test_stats_are_global(
    subject: Subject, case: Case, dtype: str, size: int, split: Any, judge: Judge, served: Any, rings: Rings
) -> None:
    served(case.problem(dtype), dtype)
    served(case.problem(dtype), dtype, stats=True)
    want, allowed = truth(case, dtype).stats, subject.budget(case, dtype)
    for share in rings.solve(subject, case, dtype, split, stats=True):
        got = share.stats
        assert got["count"] == want.count
        low, high = near_ties(want.lead, allowed.lead)
        assert (np.isnan(low) and np.isnan(got["top1"])) or low - 1e-6 <= got["top1"] <= high + 1e-6
        for name in ("mean_positive", "mean_negative", "hardest_negative"):
            judge.close(name, got[name], getattr(want, name), getattr(allowed, name))
        if want.mean_lse is not None:
            judge.close("mean_lse", got["mean_lse"], want.mean_lse, allowed.mean_lse)


@sizes
@dtypes("float32", "float64")
@only(lambda case: case.name in VALUES)
def test_single_values_stay_with_their_rows(
    subject: Subject, case: Case, dtype: str, size: int, split: Any, judge: Judge, served: Any, rings: Rings
) -> None:
    served(case.problem(dtype), dtype)
    problem = case.problem(dtype)
    whole = assemble(deal(problem, split), problem, rings.solve(subject, case, dtype, split))
    judge.close("loss", whole["loss"], truth(case, dtype).loss, subject.budget(case, dtype).loss)


@pytest.mark.parametrize("proportions", [(1, 1, 1), (0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 7, 2), (9, 0, 1)], ids=str)
@dtypes("float32")
@only(lambda case: case.name in ("symmetric", "weights-key-to-query", "positive-symmetric", "sigmoid-masks-weights"))
def test_any_split_gives_the_same(
    subject: Subject, case: Case, dtype: str, proportions: Any, judge: Judge, served: Any, claimed: Any, rings: Rings
) -> None:
    claimed("uneven_shards")
    problem = case.problem(dtype)
    served(problem, dtype)
    whole = assemble(deal(problem, proportions), problem, rings.solve(subject, case, dtype, proportions))
    judge.close("loss", whole["loss"], truth(case, dtype).loss, subject.budget(case, dtype).loss)
    for name in INPUTS:
        judge.gradient(name, whole[name], truth(case, dtype), subject.budget(case, dtype), problem)


@sizes
@dtypes("float32")
@only(lambda case: case.name in ("symmetric", "key-to-query", "sigmoid-wide", "everything-symmetric", "scale-100"))
def test_ranks_may_plan_differently(
    subject: Subject, case: Case, dtype: str, size: int, split: Any, judge: Judge, served: Any, rings: Rings
) -> None:
    problem = case.problem(dtype)
    served(problem, dtype)
    whole = assemble(deal(problem, split), problem, rings.solve(subject, case, dtype, split, tiles=(3, 5)))
    judge.close("loss", whole["loss"], truth(case, dtype).loss, subject.budget(case, dtype).loss)
    for name in INPUTS:
        judge.gradient(name, whole[name], truth(case, dtype), subject.budget(case, dtype), problem)


@pytest.mark.parametrize("size", (2, 3), ids=lambda size: f"{size}-ranks")
@dtypes("float32", "bfloat16")
@only(lambda case: case.name in ("symmetric", "key-to-query", "sigmoid", "everything-symmetric", "margin-symmetric"))
def test_shards_in_host_memory_travel_and_are_fetched(
    subject: Subject, case: Case, dtype: str, size: int, split: Any, judge: Judge, served: Any, claimed: Any, rings: Any
) -> None:
    claimed("streaming")
    problem = case.problem(dtype)
    served(problem, dtype)
    whole = assemble(deal(problem, split), problem, rings.solve(subject, case, dtype, split, tiles=(3, 5), host=True))
    judge.close("loss", whole["loss"], truth(case, dtype).loss, subject.budget(case, dtype).loss)
    for name in INPUTS:
        judge.gradient(name, whole[name], truth(case, dtype), subject.budget(case, dtype), problem)


# -- what a wrapper does to gradients ----------------------------------------------------------------


def reduced(subject: Subject, case: Case, dtype: str, split: Any, rings: Rings, how: str, judge: Judge) -> None:
    """What encoder parameters and scalars get once every rank's gradients are summed or averaged."""
    problem, want, allowed = case.problem(dtype), truth(case, dtype), subject.budget(case, dtype)
    shares = rings.solve(subject, case, dtype, split, grad_reduction=how)
    whole = assemble(deal(problem, split), problem, shares)
    share = len(shares) if how == "mean" else 1
    for name in ("queries", "keys"):  # a parameter's gradient sums over rows, and a mean divides by the ranks
        judge.gradient(name, whole[name].astype(np.float64) / share, want, allowed, problem)
    for name in ("scale", "bias"):
        every: Any = [one.gradients[name] for one in shares]
        total = np.sum(every, axis=0, dtype=np.float64) / share
        judge.gradient(name, total, want, allowed, problem)
    for one in shares:
        judge.close("loss", one.loss, want.loss, allowed.loss)


@sizes
@dtypes("float32", "bfloat16")
@few
def test_mean_undoes_what_an_averaging_wrapper_does(
    subject: Subject, case: Case, dtype: str, size: int, split: Any, judge: Judge, served: Any, rings: Rings
) -> None:
    served(case.problem(dtype), dtype)
    reduced(subject, case, dtype, split, rings, "mean", judge)


@sizes
@dtypes("float32", "bfloat16")
@few
def test_sum_undoes_what_a_summing_wrapper_does(
    subject: Subject, case: Case, dtype: str, size: int, split: Any, judge: Judge, served: Any, rings: Rings
) -> None:
    served(case.problem(dtype), dtype)
    reduced(subject, case, dtype, split, rings, "sum", judge)


# -- through the framework's own differentiation -------------------------------------------------------


@sizes
@dtypes("float32", "bfloat16")
@only(
    lambda case: (
        case.name in ("symmetric", "key-to-query", "sigmoid", "weights-symmetric", "positive-symmetric", *VALUES)
    )
)
def test_autograd_on_a_ring_gives_the_same_gradients(
    subject: Subject,
    case: Case,
    dtype: str,
    size: int,
    split: Any,
    judge: Judge,
    served: Any,
    claimed: Any,
    rings: Rings,
    hooks: Any,
) -> None:
    claimed("autograd")
    problem = case.problem(dtype)
    served(problem, dtype)
    assert hooks.nibs_conformance_pullback(backend=subject.name) is not None, "needs nibs_conformance_pullback."
    whole = assemble(deal(problem, split), problem, rings.solve(subject, case, dtype, split, pull=True))
    want = truth(case, dtype)
    allowed = budget_of(problem, dtype, want, coarse=subject.coarse(dtype))
    judge.close("loss", whole["loss"], want.loss, allowed.loss)
    for name in INPUTS:
        judge.gradient(name, whole[name], want, allowed, problem)


# -- what goes over the wire ---------------------------------------------------------------------------


@sizes
@only(lambda case: case.name in ("width-384", "sigmoid"))
def test_bytes_on_the_wire_stay_within_the_bound(
    subject: Subject, case: Case, dtype: str, size: int, served: Any, rings: Rings
) -> None:
    problem = case.problem(dtype)
    served(problem, dtype)
    proportions = EVEN[size]
    m, d = max(len(shard.keys) for shard in deal(problem, proportions).shards), problem.keys.shape[1]
    width = {"float64": 8, "float32": 4}.get(dtype, 2)
    passes = 2 if isinstance(problem.objective, InfoNCE) else 1
    rows = m * d * (passes * (size - 1) * width + size * (8 if dtype == "float64" else 4)) if size > 1 else 0
    vectors = size * m * (8 if dtype == "float64" else 4) * 6
    for share in rings.solve(subject, case, dtype, proportions):
        if share.sent is None:
            pytest.skip(f"{subject.name}: its ring counts no bytes")
        assert share.sent <= 1.1 * rows + vectors, (
            f"{share.sent} bytes sent, the bound is {rows} and {vectors} of vectors."
        )


# -- ranks that cannot, or will not, or do not ---------------------------------------------------------

UNLIKE: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, str]]] = {
    "width": ({}, {"width": 23}, ("24", "23")),
    "dtype": ({}, {"dtype": "float64"}, ("float32", "float64")),
    "objective": ({}, {"objective": InfoNCE("query_to_key")}, ("symmetric", "query_to_key")),
    "reduction": ({}, {"reduction": "sum"}, ("mean", "sum")),
    "grad_reduction": ({}, {"grad_reduction": "mean"}, ("none", "mean")),
    "wrt": ({}, {"wrt": ("queries",)}, ("queries, keys, scale, bias", "queries")),
    "scale": ({}, {"scale": 14.31}, ("14.3", "14.31")),
    "bias": ({}, {"bias": 0.5}, ("0.0", "0.5")),
}


@pytest.mark.parametrize("what", list(UNLIKE))
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_disagree_all_hear_of_both_sides(
    subject: Subject, size: int, what: str, served: Any, rings: Rings
) -> None:
    case = CASES["symmetric"]
    problem = case.problem("float32")
    served(problem, "float32")
    most, last, words = UNLIKE[what]
    if what == "dtype":
        served(problem, "float64")
    answers = rings.run("disagree", subject, size, deal(problem, EVEN[size]).shards, (most,) * (size - 1) + (last,))
    for error, again in answers:
        assert isinstance(error, RingError), f"expected a RingError, got {error!r}."
        assert all(word in str(error) for word in words), f"'{error}' does not name both of {words}."
        assert abs(float(again) - float(truth(case, "float32").loss)) < 1e-4, (
            "the ring is of no use after a disagreement."
        )


def test_scales_may_differ_by_rounding(subject: Subject, served: Any, rings: Rings) -> None:
    case = CASES["symmetric"]
    served(case.problem("float32"), "float32")
    shares = rings.run(
        "solve_shard",
        subject,
        2,
        deal(case.problem("float32"), EVEN[2]).shards,
        "float32",
        {"scales": (14.3, 14.3 * (1 + 5e-7))},
    )
    assert not [share for share in shares if isinstance(share, BaseException)]


@pytest.mark.parametrize("how", ["shape", "targets", "option", "type", "memory"])
@pytest.mark.parametrize(("size", "who"), [(2, 0), (3, 1)])
def test_a_rank_with_invalid_input_tells_the_others(
    subject: Subject, size: int, who: int, how: str, served: Any, rings: Rings
) -> None:
    case = CASES["symmetric"]
    problem = case.problem("float32")
    served(problem, "float32")
    if how == "memory" and not subject.has("memory"):
        pytest.skip(f"{subject.name}: it does not claim 'memory'")
    answers = rings.run("refuse", subject, size, deal(problem, EVEN[size]).shards, who, how)
    for rank, (error, again) in enumerate(answers):
        if rank == who:
            kind: Any = MemoryError if how == "memory" else InvalidInput
            assert isinstance(error, kind), f"rank {rank}, whose input is invalid, got {error!r}."
        else:
            assert isinstance(error, RingError) and f"rank {who}" in str(error), f"rank {rank} got {error!r}."
        assert abs(float(again) - float(truth(case, "float32").loss)) < 1e-4, "the ring is of no use afterwards."


@pytest.mark.parametrize(("size", "who"), [(2, 1), (3, 0), (4, 2)])
def test_a_rank_that_never_comes_ends_the_others_in_time(
    subject: Subject, size: int, who: int, served: Any, rings: Rings
) -> None:
    problem = CASES["symmetric"].problem("float32")
    served(problem, "float32")
    world = rings.fresh(subject, size)
    if not hasattr(world, "ring_timeout"):
        pytest.skip(f"{subject.name}: the timeout of its world's rings cannot be set")
    world.ring_timeout = 1.5
    with world:
        begun = time.monotonic()
        answers = world.run(
            "nibs_conformance.shards:sit_out",
            subject.name,
            subject.device,
            deal(problem, EVEN[size]).shards,
            who,
            timeout=30.0,
        )
        took = time.monotonic() - begun
    assert took < 15, f"the others ended after {took:.1f} s, their timeout was 1.5 s."
    for rank, errors in enumerate(answers):
        if rank == who:
            continue
        assert isinstance(errors, list) and len(errors) == 2, f"rank {rank} got {errors!r}."
        assert all(isinstance(error, RingError) for error in errors), f"rank {rank} got {errors!r}."
        assert "dead" in str(errors[1]), f"a dead ring must say so, and says '{errors[1]}'."
