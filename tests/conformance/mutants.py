"""Wrong backends, each wrong in one way, and what of the suite must catch it.

All are the NumPy backend with one thing broken from outside: what it is asked, what it answers, or what
one of its three verbs does. The faults are those that real losses have had. `MUTANTS` names for each
exactly the tests and exactly the cases that must fail, no more and no less; see `test_mutants.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nibs.capabilities import Capabilities
from nibs.plan import plan_request
from nibs.registry import registry
from nibs.schedule import Call
from nibs.spec import Gradients, InfoNCE
from nibs_conformance.tolerances import store
from nibs_numpy.backend import HINT, NumpyBackend
from nibs_numpy.tiles import NumpyTiles


class Twin(NumpyBackend):
    """The NumPy backend through the same seams as the mutants, and nothing broken."""

    tiles: type[NumpyTiles] = NumpyTiles

    def asked(self, request: Any) -> Any:
        """The request as the backend will see it."""
        return request

    def answered(self, request: Any, loss: Any, gradients: Any, stats: Any) -> tuple[Any, Any, Any]:
        """The answer as the caller will see it; gradients None in `loss`."""
        return loss, gradients, stats

    def loss(self, request: Any) -> Any:
        result = super().loss(self.asked(request))
        loss, stats = result if request.stats else (result, None)
        loss, _, stats = self.answered(request, loss, None, stats)
        return (loss, stats) if request.stats else loss

    def loss_and_grad(self, request: Any) -> Any:
        loss, gradients, *rest = super().loss_and_grad(self.asked(request))
        loss, gradients, stats = self.answered(request, loss, gradients, rest[0] if rest else None)
        return (loss, gradients, stats) if request.stats else (loss, gradients)

    def _call(self, request: Any, *, grad: bool) -> Call:
        plan = plan_request(request, HINT, grad=grad, hold=request.hold, ring_size=1)
        return Call(request, self.tiles(request.dtype), plan, request.ring, hold=request.hold)


def objective(request: Any, **changes: Any) -> Any:
    """The request with other settings of its objective; Sigmoid takes those it has."""
    known = {name: value for name, value in changes.items() if hasattr(request.objective, name)}
    return replace(request, objective=replace(request.objective, **known))


def scaled(gradients: Any, factor: float, *names: str) -> Any:
    """The same times a factor, each in its own array where it has one: the caller may have named that (`out=`)."""
    if gradients is None:
        return None
    found = {name: getattr(gradients, name) for name in ("queries", "keys", "scale", "bias")}
    for name in names or tuple(found):
        if found[name] is not None:
            found[name] *= np.asarray(factor, found[name].dtype)
    return Gradients(**found)


# -- wrong answers -------------------------------------------------------------------------------------


class WrongSign(Twin):
    def answered(self, request, loss, gradients, stats):
        return loss, scaled(gradients, -1, "queries"), stats


class ForgottenScale(Twin):
    def answered(self, request, loss, gradients, stats):
        return loss, scaled(gradients, 0, "scale"), stats


class Twice(Twin):
    def answered(self, request, loss, gradients, stats):
        return loss, scaled(gradients, 2, "queries", "keys"), stats


class KeysForgotten(Twin):
    def answered(self, request, loss, gradients, stats):
        return loss, scaled(gradients, 0, "keys"), stats


class BiasLeaks(Twin):
    def answered(self, request, loss, gradients, stats):
        if gradients is not None and gradients.bias is not None and isinstance(request.objective, InfoNCE):
            gradients = replace(gradients, bias=gradients.bias + np.float32(1e-9))
        return loss, gradients, stats


class WrongCount(Twin):
    """Divides by all queries instead of by those that are anchors."""

    def asked(self, request):
        return replace(request, reduction="sum") if request.reduction == "mean" else request

    def answered(self, request, loss, gradients, stats):
        if request.reduction == "mean" and request.n:
            loss, gradients = (loss / request.n).astype(loss.dtype), scaled(gradients, 1 / request.n)
        return loss, gradients, stats


class SumIsMean(Twin):
    def asked(self, request):
        return replace(request, reduction="mean") if request.reduction == "sum" else request


class CountsEveryRow(Twin):
    def answered(self, request, loss, gradients, stats):
        return loss, gradients, None if stats is None else replace(stats, count=request.n)


class LseInBits(Twin):
    def answered(self, request, loss, gradients, stats):
        if stats is not None and stats.query_lse is not None:
            stats = replace(stats, query_lse=stats.query_lse / np.log(2, dtype=stats.query_lse.dtype))
        return loss, gradients, stats


class NanIsZero(Twin):
    def answered(self, request, loss, gradients, stats):
        return np.nan_to_num(loss), gradients, stats


class Nondeterministic(Twin):
    """Well inside every budget, and never the same twice, as with atomic additions."""

    calls = 0

    def answered(self, request, loss, gradients, stats):
        self.calls += 1
        return loss, scaled(gradients, 1 + self.calls % 7 * 2.0**-23, "queries"), stats


class WideGradients(Twin):
    def answered(self, request, loss, gradients, stats):
        if gradients is not None and gradients.queries is not None and request.dtype == "float16":
            gradients = replace(gradients, queries=gradients.queries.astype(np.float32))
        return loss, gradients, stats


class FlatScale(Twin):
    """The scale's gradient in no shape, whatever shape the scale had."""

    def answered(self, request, loss, gradients, stats):
        if gradients is not None and gradients.scale is not None:
            gradients = replace(gradients, scale=gradients.scale.reshape(()))
        return loss, gradients, stats


class WrtIgnored(Twin):
    def asked(self, request):
        return replace(request, wrt=("queries", "keys", "scale", "bias")) if request.wrt is not None else request


class TinyIsZero(Twin):
    """float16 gradients below its smallest normal number become zero."""

    def answered(self, request, loss, gradients, stats):
        if gradients is not None and request.dtype == "float16":
            kept = {
                name: np.where(np.abs(rows) < 2.0**-12, 0, rows).astype(rows.dtype)
                for name in ("queries", "keys")
                if (rows := getattr(gradients, name)) is not None
            }
            gradients = replace(gradients, **kept)
        return loss, gradients, stats


# -- wrong questions -----------------------------------------------------------------------------------


class OneDirection(Twin):
    def asked(self, request):
        if getattr(request.objective, "direction", "") != "symmetric":
            return request
        return objective(request, direction="query_to_key")


class Transposed(Twin):
    """`key_to_query` and `query_to_key` mixed up."""

    def asked(self, request):
        turned = {"query_to_key": "key_to_query", "key_to_query": "query_to_key"}
        way = getattr(request.objective, "direction", "")
        return objective(request, direction=turned[way]) if way in turned and request.reduction != "none" else request


class IdsIgnored(Twin):
    def asked(self, request):
        return objective(replace(request, query_ids=None, key_ids=None), same_id="negative")


class SelfStays(Twin):
    def asked(self, request):
        return objective(request, exclude_self=False)


class MarginInLogits(Twin):
    def asked(self, request):
        margin = getattr(request.objective, "false_negative_margin", None)
        return (
            request
            if margin is None
            else objective(request, false_negative_margin=margin / float(np.ravel(request.scale)[0]))
        )


class SmoothingIgnored(Twin):
    def asked(self, request):
        return objective(request, label_smoothing=0.0)


class WeightsIgnored(Twin):
    def asked(self, request):
        return replace(request, weights=None)


class NoneIsTheLast(Twin):
    """-1 taken the way Python indexes."""

    def asked(self, request):
        if request.targets is None or not request.m:
            return request
        return replace(request, targets=np.where(request.targets < 0, request.m - 1, request.targets))


class MaskOffByOne(Twin):
    def asked(self, request):
        return request if request.key_mask is None else replace(request, key_mask=np.roll(request.key_mask, 1))


class NarrowIds(Twin):
    def asked(self, request):
        cut = {name: getattr(request, name) for name in ("query_ids", "key_ids")}
        return replace(request, **{name: ids if ids is None else ids.astype(np.int32) for name, ids in cut.items()})


class FloatIds(Twin):
    def asked(self, request):
        cut = {name: getattr(request, name) for name in ("query_ids", "key_ids")}
        return replace(request, **{name: ids if ids is None else ids.astype(np.float32) for name, ids in cut.items()})


class StridesIgnored(Twin):
    """Rows read in the order in which they lie."""

    def asked(self, request):
        packed = {name: getattr(request, name) for name in ("queries", "keys")}
        return replace(request, **{name: rows.ravel(order="K").reshape(rows.shape) for name, rows in packed.items()})


class WritesIntoInputs(Twin):
    def asked(self, request):
        if isinstance(request.scale, np.ndarray):
            request.queries[...] = request.queries * np.float64(0.5)
        return request


class BudgetIgnored(Twin):
    def asked(self, request):
        return replace(request, memory=None)


class Materialised(Twin):
    """A whole array of n x m, of bytes, made for nothing else; it would still fit the budget of the memory level."""

    def asked(self, request):
        np.ones((request.n, request.m), np.int8)
        return request


class ComputesNarrow(Twin):
    """Claims float64 and computes in float32."""

    def asked(self, request):
        if request.dtype != "float64":
            return request
        rows = {name: getattr(request, name).astype(np.float32) for name in ("queries", "keys")}
        return replace(request, **rows, dtype="float32")

    def answered(self, request, loss, gradients, stats):
        if request.dtype == "float64":
            loss = np.asarray(loss, np.float64)
            if gradients is not None:
                kept = {name: getattr(gradients, name) for name in ("queries", "keys", "scale", "bias")}
                gradients = Gradients(
                    **{name: value if value is None else np.asarray(value, np.float64) for name, value in kept.items()}
                )
        return loss, gradients, stats


class NarrowsInSilence(Twin):
    def asarray(self, values, dtype=None, device=None):
        if dtype is None and str(values.dtype) == "int64":
            values = values.astype(np.int32).astype(np.int64)
        return super().asarray(values, dtype, device)


# -- wrong verbs ---------------------------------------------------------------------------------------


def sides(found: tuple[Any, Any, Any]) -> list[Any]:
    return [side for side in found[:2] if side is not None and side.mass is not None and side.shift is not None]


def shifted(side: Any, shift: Any) -> None:
    """The side's masses as if they had been taken with this shift: what underflows or overflows then, does."""
    with np.errstate(all="ignore"):
        side.mass = (side.mass * np.exp((side.shift - shift).astype(side.mass.dtype))).astype(side.mass.dtype)
    side.shift = np.full_like(side.mass, shift)


class FixedMaximumTiles(NumpyTiles):
    def tile_lse(self, tile, problem, keep):
        found = super().tile_lse(tile, problem, keep)
        for side in sides(found):
            shifted(side, np.float64(abs(problem.scale)))
        return found


class NoMaximumTiles(NumpyTiles):
    def tile_lse(self, tile, problem, keep):
        found = super().tile_lse(tile, problem, keep)
        for side in sides(found):
            shifted(side, np.float64(0.0))
        return found


class SharedMaximumTiles(NumpyTiles):
    """One maximum for a whole tile, and nobody looks whether a row has sunk to nothing."""

    def tile_lse(self, tile, problem, keep):
        found = super().tile_lse(tile, problem, keep)
        both = sides(found)
        if both:
            top = max(float(side.shift.max()) for side in both)
            for side in both:
                shifted(side, np.float64(top))
        return found


class RaggedTiles(NumpyTiles):
    """A tile of keys narrower than the first one adds nothing to the lse."""

    widest = 0

    def tile_lse(self, tile, problem, keep):
        self.widest = max(self.widest, len(tile.keys))
        found = super().tile_lse(tile, problem, keep)
        if tile.column and len(tile.keys) < self.widest:
            for side in sides(found)[: 1 if problem.rows else 0]:
                side.mass = np.zeros_like(side.mass)
                side.shift = np.full_like(side.shift, self.lowest)
        return found


class CoarseSumTiles(NumpyTiles):
    """Sums of exponentials kept in bfloat16."""

    def tile_lse(self, tile, problem, keep):
        found = super().tile_lse(tile, problem, keep)
        for side in sides(found):
            side.mass = store(side.mass, "bfloat16").astype(side.mass.dtype)
        return found


class CoarsePositiveTiles(NumpyTiles):
    """The positive's logit from bfloat16, the lse from float32."""

    def tile_lse(self, tile, problem, keep):
        found = super().tile_lse(tile, problem, keep)
        rows = found[0]
        if rows.positive_sum is not None:
            rows.positive_sum = store(rows.positive_sum, "bfloat16").astype(rows.positive_sum.dtype)
        return found


class LeakingTiles(NumpyTiles):
    def operand(self, rows, mask):
        return self.cast(rows) if mask is None else self.cast(rows) * mask[:, None]


class SmoothOverAllTiles(NumpyTiles):
    def tile_lse(self, tile, problem, keep):
        found = super().tile_lse(tile, problem, keep)
        for side, others in zip(found[:2], (tile.keys, tile.queries), strict=True):
            if side is not None and side.allowed_count is not None and not problem.stats:
                side.allowed_count = np.full_like(side.allowed_count, len(others))
        return found


class LastOneWinsTiles(NumpyTiles):
    def scatter(self, values, index, length, how):
        if how != "sum":
            return super().scatter(values, index, length, how)
        out = self.zeros(length)
        out[index] = values
        return out


def with_tiles(kind: type[NumpyTiles]) -> Twin:
    backend = Twin()
    backend.tiles = kind
    return backend


@dataclass(frozen=True)
class Mutant:
    """A wrong backend; tests, cases: exactly those that fail. dtypes: it is run in. memory: with that level too."""

    backend: Any
    tests: frozenset[str]
    cases: frozenset[str] = frozenset()
    dtypes: str = "float32"
    memory: bool = False


def numpy_claims(*more: str) -> Capabilities:
    """What NumPy claims, and more."""
    claims = registry.info("numpy").capabilities
    return replace(claims, features=claims.features | set(more))


CASES = frozenset(
    [
        "symmetric",
        "query-to-key",
        "key-to-query",
        "sigmoid",
        "wide",
        "scalars-1d",
        "symmetric-sum",
        "symmetric-none",
        "smoothing-masked",
        "exclude-symmetric",
        "positive-symmetric",
        "weights-symmetric",
        "masks-symmetric",
        "margin-symmetric",
        "self-excluded",
        "duplicate-targets",
        "a-row-without-positives",
        "nan-where-masked",
        "ids-that-collide-in-32-bits",
        "ids-near-2-to-40",
        "temperature-0.005",
        "far-beyond-exp",
        "one-row-20-times-longer",
        "scale-100-near",
        "transposed",
        "every-other-row",
        "nan-in-keys",
        "no-positives-at-all",
    ]
)
"""What the mutants are run on: every option once, and a cruel case for every fault."""

FLAT = {"nan-in-keys", "no-positives-at-all", "scale-100-near", "symmetric-none"}
"""Cases whose gradients are NaN, zero, or not asked for."""
ONE_WAY = {"query-to-key", "key-to-query", "sigmoid", "self-excluded"}
"""Cases of a single direction."""

# Tests that hold loss and all gradients of some call against the truth: whatever is wrong with all calls fails them.
WHOLE = {
    "test_a_budget_too_small_names_the_least_that_works",
    "test_a_dtype_works_exactly_if_it_is_claimed",
    "test_a_feature_works_exactly_if_it_is_claimed",
    "test_an_objective_works_exactly_if_it_is_claimed",
    "test_asking_for_stats_changes_no_number",
    "test_coarse_products_stay_within_their_class",
    "test_every_sweep_gives_the_same_answer",
    "test_every_tiling_gives_the_same_answer",
    "test_half_precision_gradients_do_not_vanish",
    "test_only_what_is_asked_for_is_computed",
    "test_rows_fetched_from_host_memory_give_the_same_answer",
    "test_the_last_ragged_tile_is_not_dropped",
}
TILES = {
    "test_every_sweep_gives_the_same_answer",
    "test_every_tiling_gives_the_same_answer",
    "test_rows_fetched_from_host_memory_give_the_same_answer",
}
FEATURE = {"test_a_feature_works_exactly_if_it_is_claimed"}
LOSS = {"test_loss", "test_loss_without_gradients"}
GRADIENTS = {"test_gradient_of_queries", "test_gradient_of_keys", "test_gradient_of_scale"}
LSE = {"test_stats_lse"}
PAIRS = {"test_stats_over_pairs"}
TOP1 = {"test_stats_top1"}
COUNT = {"test_stats_count"}
TILED_STATS = {"test_stats_do_not_depend_on_the_tiling"}
PLAIN = {"test_stats_come_with_the_loss_alone", "test_the_default_call_is_the_plain_symmetric_loss"}


def wrong(backend: Any, tests: set[str], cases: Any = (), **how: Any) -> Mutant:
    return Mutant(backend, frozenset(tests), frozenset(cases), **how)


MUTANTS: dict[str, Mutant] = {
    # wrong answers
    "the gradient has the wrong sign": wrong(WrongSign(), WHOLE | {"test_gradient_of_queries"}, CASES - FLAT),
    "the scale has no gradient": wrong(ForgottenScale(), WHOLE | {"test_gradient_of_scale"}, CASES - FLAT),
    "the keys have no gradient": wrong(KeysForgotten(), WHOLE | {"test_gradient_of_keys"}, CASES - FLAT),
    "gradients are twice too large": wrong(
        Twice(), WHOLE | {"test_gradient_of_queries", "test_gradient_of_keys"}, CASES - FLAT
    ),
    "the bias of a softmax has a gradient": wrong(
        BiasLeaks(),
        WHOLE | {"test_gradient_of_bias", "test_an_infonce_bias_has_a_gradient_of_exactly_zero"},
        CASES - {"nan-in-keys", "symmetric-none", "sigmoid"},
    ),
    "the mean is over all queries": wrong(
        WrongCount(),
        FEATURE | TILES | LOSS | GRADIENTS,
        {
            "a-row-without-positives",
            "duplicate-targets",
            "masks-symmetric",
            "nan-where-masked",
            "smoothing-masked",
            "weights-symmetric",
        },
    ),
    "a sum is a mean": wrong(SumIsMean(), LOSS | GRADIENTS, {"symmetric-sum"}),
    "the count is of all rows": wrong(
        CountsEveryRow(),
        COUNT | TILED_STATS,
        {
            "a-row-without-positives",
            "masks-symmetric",
            "nan-where-masked",
            "no-positives-at-all",
            "smoothing-masked",
            "weights-symmetric",
        },
    ),
    "the lse is in bits": wrong(LseInBits(), LSE | TILED_STATS, CASES - {"key-to-query", "sigmoid", "nan-in-keys"}),
    "NaN comes out as a number": wrong(NanIsZero(), LOSS, {"nan-in-keys"}),
    "no two calls give the same bits": wrong(
        Nondeterministic(),
        {
            "test_masked_values_never_matter",
            "test_the_same_call_gives_the_same_bits",
            "test_the_same_values_at_another_address_give_the_same_bits",
            "test_threads_do_not_disturb_each_other",
        },
    ),
    "gradients of float16 leave as float32": wrong(
        WideGradients(),
        {"test_gradients_come_in_the_shape_and_dtype_of_their_inputs"},
        {"key-to-query", "masks-symmetric", "query-to-key", "scalars-1d", "sigmoid", "symmetric"},
        dtypes="float16",
    ),
    "the scale's gradient loses its shape": wrong(
        FlatScale(), {"test_gradients_come_in_the_shape_and_dtype_of_their_inputs"}, {"scalars-1d"}
    ),
    "wrt is ignored": wrong(
        WrtIgnored(),
        {"test_only_what_is_asked_for_is_computed"},
        {"key-to-query", "query-to-key", "scalars-1d", "sigmoid", "symmetric"},
    ),
    "small float16 gradients vanish": wrong(
        TinyIsZero(),
        WHOLE
        - FEATURE
        - {
            "test_a_dtype_works_exactly_if_it_is_claimed",
            "test_an_objective_works_exactly_if_it_is_claimed",
        }
        | {"test_gradient_of_queries", "test_gradient_of_keys"},
        CASES - FLAT - {"far-beyond-exp", "margin-symmetric", "symmetric-sum"},
        dtypes="float16",
    ),
    # wrong questions
    "symmetric is one direction": wrong(
        OneDirection(),
        WHOLE - FEATURE - {"test_a_dtype_works_exactly_if_it_is_claimed"}
        | LOSS
        | GRADIENTS
        | LSE
        | TILED_STATS
        | PLAIN,
        CASES - ONE_WAY - {"nan-in-keys"},
    ),
    "the directions are mixed up": wrong(
        Transposed(),
        FEATURE
        | TILES
        | LOSS
        | GRADIENTS
        | LSE
        | TILED_STATS
        | {
            "test_a_dtype_works_exactly_if_it_is_claimed",
            "test_asking_for_stats_changes_no_number",
            "test_only_what_is_asked_for_is_computed",
            "test_the_last_ragged_tile_is_not_dropped",
        },
        {"key-to-query", "query-to-key", "self-excluded"},
    ),
    "ids are ignored": wrong(
        IdsIgnored(),
        FEATURE | TILES | LOSS | GRADIENTS | LSE | TILED_STATS | PAIRS | TOP1,
        {"exclude-symmetric", "ids-near-2-to-40", "positive-symmetric"},
    ),
    "ids are cut to 32 bits": wrong(
        NarrowIds(), LOSS | GRADIENTS | LSE | PAIRS | TOP1, {"ids-that-collide-in-32-bits"}
    ),
    "ids are compared as float32": wrong(
        FloatIds(),
        TILES | LOSS | GRADIENTS | LSE | TILED_STATS | PAIRS | TOP1,
        {"ids-near-2-to-40", "ids-that-collide-in-32-bits"},
    ),
    "a row is its own negative": wrong(SelfStays(), FEATURE | LOSS | GRADIENTS | LSE | PAIRS | TOP1, {"self-excluded"}),
    "the margin is measured in logits": wrong(
        MarginInLogits(), FEATURE | LOSS | GRADIENTS | LSE | PAIRS, {"margin-symmetric"}
    ),
    "smoothing is ignored": wrong(SmoothingIgnored(), FEATURE | TILES | LOSS | GRADIENTS, {"smoothing-masked"}),
    "weights are ignored": wrong(WeightsIgnored(), FEATURE | LOSS | GRADIENTS | COUNT | LSE, {"weights-symmetric"}),
    "-1 is the last key": wrong(
        NoneIsTheLast(),
        LOSS | GRADIENTS | COUNT | LSE | PAIRS | TOP1,
        {"a-row-without-positives", "no-positives-at-all"},
    ),
    "the mask is off by one": wrong(
        MaskOffByOne(),
        FEATURE
        | TILES
        | LOSS
        | GRADIENTS
        | LSE
        | TILED_STATS
        | PAIRS
        | TOP1
        | COUNT
        | {
            "test_absent_rows_have_no_gradient",
            "test_gradient_of_bias",
            "test_loss_is_never_below_zero",
            "test_masked_values_never_matter",
        },
        {"masks-symmetric", "nan-where-masked", "smoothing-masked"},
    ),
    "strides are ignored": wrong(
        StridesIgnored(), TILES | LOSS | GRADIENTS | LSE | TILED_STATS | PAIRS | TOP1, {"transposed"}
    ),
    "inputs are written into": wrong(
        WritesIntoInputs(),
        LOSS
        | GRADIENTS
        | LSE
        | PAIRS
        | {
            "test_asking_for_stats_changes_no_number",
            "test_inputs_are_left_as_they_were",
            "test_only_what_is_asked_for_is_computed",
        },
        {"scalars-1d"},
    ),
    "the memory budget is ignored": wrong(
        BudgetIgnored(), {"test_a_budget_is_kept", "test_a_budget_too_small_names_the_least_that_works"}, memory=True
    ),
    "an array of n x m is made": wrong(
        Materialised(),
        {"test_no_array_of_n_by_m_is_there", "test_peak_grows_linearly"},
        memory=True,
    ),
    "float64 is computed in float32": wrong(
        ComputesNarrow(),
        WHOLE - FEATURE - {"test_an_objective_works_exactly_if_it_is_claimed"}
        | LOSS
        | GRADIENTS
        | LSE
        | TILED_STATS
        | PAIRS
        | PLAIN
        | {"test_gradient_of_bias"},
        CASES - {"nan-in-keys"},
        dtypes="float64",
    ),
    "int64 is narrowed in silence": wrong(
        NarrowsInSilence(),
        LOSS
        | GRADIENTS
        | LSE
        | PAIRS
        | TOP1
        | {"test_a_wrong_argument_is_named", "test_nothing_is_narrowed_in_silence"},
        {"ids-that-collide-in-32-bits"},
    ),
    # wrong verbs
    "the maximum is fixed at 1/temperature": wrong(
        with_tiles(FixedMaximumTiles),
        TILES | LOSS | GRADIENTS | LSE | TILED_STATS,
        {"far-beyond-exp", "one-row-20-times-longer", "temperature-0.005"},
    ),
    "exponentials are summed without a maximum": wrong(
        with_tiles(NoMaximumTiles),
        TILES | LOSS | GRADIENTS | LSE | TILED_STATS | {"test_coarse_products_stay_within_their_class"},
        {"far-beyond-exp", "one-row-20-times-longer", "scale-100-near"},
    ),
    "a tile shares one maximum and repairs nothing": wrong(
        with_tiles(SharedMaximumTiles),
        TILES | LOSS | GRADIENTS | LSE | TILED_STATS,
        {"far-beyond-exp", "one-row-20-times-longer"},
    ),
    "the last ragged tile is dropped": wrong(
        with_tiles(RaggedTiles),
        TILES
        | TILED_STATS
        | {"test_a_budget_too_small_names_the_least_that_works", "test_the_last_ragged_tile_is_not_dropped"},
        {
            "duplicate-targets",
            "ids-near-2-to-40",
            "nan-where-masked",
            "one-row-20-times-longer",
            "query-to-key",
            "smoothing-masked",
            "symmetric",
            "symmetric-none",
            "transposed",
            "wide",
        },
    ),
    "sums are kept in bfloat16": wrong(
        with_tiles(CoarseSumTiles),
        WHOLE - {"test_coarse_products_stay_within_their_class"} | LOSS | GRADIENTS | LSE | TILED_STATS | PLAIN,
        CASES - {"far-beyond-exp", "nan-in-keys", "sigmoid"},
    ),
    "the positive comes from another precision": wrong(
        with_tiles(CoarsePositiveTiles),
        WHOLE
        - {
            "test_a_budget_too_small_names_the_least_that_works",
            "test_coarse_products_stay_within_their_class",
            "test_half_precision_gradients_do_not_vanish",
        }
        | LOSS
        | TILED_STATS
        | PAIRS
        | PLAIN,
        CASES - {"nan-in-keys", "no-positives-at-all"},
    ),
    "absent rows leak by 0 x NaN": wrong(
        with_tiles(LeakingTiles),
        TILES
        | LOSS
        | GRADIENTS
        | LSE
        | TILED_STATS
        | PAIRS
        | {"test_gradient_of_bias", "test_loss_is_never_below_zero", "test_masked_values_never_matter"},
        {"nan-where-masked"},
    ),
    "smoothing is spread over all rows": wrong(
        with_tiles(SmoothOverAllTiles), TILES | LOSS | GRADIENTS, {"smoothing-masked"}
    ),
    "of several queries of one key the last one wins": wrong(
        with_tiles(LastOneWinsTiles), TILES | LOSS | GRADIENTS, {"duplicate-targets"}
    ),
}
"""By fault: the backend that has it, and exactly what fails."""
