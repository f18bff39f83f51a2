"""What is computed: objectives, results, and the formula, once.

With queries `q [n, d]`, keys `k [m, d]`, logits `s_ij = scale * <q_i, k_j> + bias`, the allowed
pairs `A` (both rows present, minus exclusions) and the positives `P(i)` of row i, always in A:

    InfoNCE   l_i = lse_{j in A(i)} s_ij - sum_j y_ij s_ij                                     (1)
              y_ij = (1 - eps) [j in P(i)] / |P(i)| + eps / |A(i)|
              dl_i / ds_ij = p_ij - y_ij,   p_ij = exp(s_ij - lse_i)                           (2)
    Sigmoid   l_i = sum_{j in A(i)} softplus(-z_ij s_ij),  z = +1 on positives, -1 elsewhere   (3)
              dl_i / ds_ij = -z_ij sigmoid(-z_ij s_ij)                                         (4)

    dq_i = scale * sum_j g_ij k_j        dscale = sum_ij g_ij <q_i, k_j>                       (5)
    dk_j = scale * sum_i g_ij q_i        dbias  = sum_ij g_ij       (InfoNCE: exactly 0)

where `g_ij` is the weighted sum of (2) over the directions taken, or (4). Everything else in nibs
is how to get these numbers without ever holding an `n x m` array. Nothing here normalises: rows
are used as they come.

Sources: InfoNCE, arXiv 1807.03748; several positives, SupCon's L_out, arXiv 2004.11362; sigmoid,
arXiv 2303.15343; the tiled ring, arXiv 2410.17243.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from nibs.errors import InvalidInput

if TYPE_CHECKING:
    from nibs.plan import Job, Plan, TileHint
    from nibs.request import Request

__all__ = ["Backend", "Gradients", "InfoNCE", "Objective", "Sigmoid", "Stats"]

Direction = Literal["symmetric", "query_to_key", "key_to_query"]
SameId = Literal["negative", "exclude", "positive"]

DIRECTIONS: tuple[str, ...] = ("symmetric", "query_to_key", "key_to_query")
SAME_ID: tuple[str, ...] = ("negative", "exclude", "positive")


def _one_of(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        options = ", ".join(repr(choice) for choice in choices)
        raise InvalidInput(f"{owner}({name}={value!r}): expected one of {options}.")


def _real(owner: str, name: str, value: object, expected: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidInput(f"{owner}({name}={value!r}): expected {expected}.")
    return number


@dataclass(frozen=True, slots=True)
class InfoNCE:
    """Softmax cross entropy of each row over its candidates, equation (1).

    direction: `"symmetric"` (the mean of both), `"query_to_key"`, or `"key_to_query"` (the transpose).
    label_smoothing: `eps` in [0, 1], spread evenly over the allowed pairs of a row.
    same_id: what pairs of equal id are: `"negative"` (ids ignored), `"exclude"` (they leave the
        allowed pairs, unless designated), `"positive"` (they are positives, as in SupCon).
    exclude_self: queries and keys are one and the same set; pair (i, i) leaves the allowed pairs.
    false_negative_margin: `t`; drops from A(i) each negative with `<q_i, k_j> > <q_i, k_pos> + t`,
        a similarity, not a logit; the threshold is constant under differentiation.

    Raises InvalidInput for a value outside these.
    """

    direction: Direction = "symmetric"
    label_smoothing: float = 0.0
    same_id: SameId = "negative"
    exclude_self: bool = False
    false_negative_margin: float | None = None

    def __post_init__(self) -> None:
        _one_of("InfoNCE", "direction", self.direction, DIRECTIONS)
        _one_of("InfoNCE", "same_id", self.same_id, SAME_ID)
        smoothing = _real("InfoNCE", "label_smoothing", self.label_smoothing, "a number in [0, 1]")
        if not 0.0 <= smoothing <= 1.0:
            raise InvalidInput(f"InfoNCE(label_smoothing={self.label_smoothing!r}): expected a number in [0, 1].")
        object.__setattr__(self, "label_smoothing", smoothing)  # ranks compare objectives as text: 0 and 0.0 are one
        if not isinstance(self.exclude_self, bool):
            raise InvalidInput(f"InfoNCE(exclude_self={self.exclude_self!r}): expected True or False.")
        if self.false_negative_margin is not None:
            margin = _real("InfoNCE", "false_negative_margin", self.false_negative_margin, "a finite number or None")
            object.__setattr__(self, "false_negative_margin", margin)
            if self.same_id == "positive":
                raise InvalidInput(
                    "InfoNCE(false_negative_margin=..., same_id='positive'): the margin is measured from one "
                    "designated positive. Use same_id='exclude' or 'negative' with it."
                )

    @property
    def rows(self) -> bool:
        """Whether queries are anchors."""
        return self.direction != "key_to_query"

    @property
    def columns(self) -> bool:
        """Whether keys are anchors."""
        return self.direction != "query_to_key"


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """The pairwise sigmoid loss of SigLIP, equation (3): every present query is an anchor.

    same_id: as in `InfoNCE`.

    Raises InvalidInput for another value.
    """

    same_id: SameId = "negative"

    def __post_init__(self) -> None:
        _one_of("Sigmoid", "same_id", self.same_id, SAME_ID)


Objective = InfoNCE | Sigmoid


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients of the loss, each in the shape and dtype of its input; None where `wrt` left it out.

    queries `[n, d]`, keys `[m, d]`; scale and bias in the shape they came in (`[]` for a float).
    """

    queries: Any = None
    keys: Any = None
    scale: Any = None
    bias: Any = None


@dataclass(frozen=True, slots=True)
class Stats:
    """What the tiles showed on the way: detached, global over the ring, free of another product.

    count: anchors of positive weight: queries, or keys for `"key_to_query"`.
    top1: share of anchor queries with a positive strictly above every allowed negative.
    mean_positive, mean_negative: mean logit over the allowed positive and negative pairs.
    mean_lse: mean lse of those anchors; symmetric: the mean of both directions' means. None for Sigmoid.
    hardest_negative: the largest logit of an allowed negative.
    query_lse `[n]`, key_lse `[m]`: the local vectors, natural logarithm; -inf where a row has no
        allowed pair; None for a direction that the objective does not take, and for Sigmoid.
    plan: the plan that ran.

    A figure over an empty set is NaN (count 0; hardest_negative -inf).
    """

    count: int
    top1: float
    mean_positive: float
    mean_negative: float
    mean_lse: float | None
    hardest_negative: float
    query_lse: Any
    key_lse: Any
    plan: Plan


class Backend:
    """What `BackendInfo.load()` returns; a backend derives from it and overrides what it has.

    `request` has been validated and `capabilities.why_not(request)` has said None. The arrays in a
    request are this backend's own: foreign ones have crossed by `asarray`.

    defers: its autograd leaves the gradients to the backward, where held ones do not fit the budget.
    """

    defers = False

    def loss(self, request: Request) -> Any:
        """`loss`, or `(loss, stats)` with `request.stats`; differentiable where the framework is."""
        raise NotImplementedError

    def loss_and_grad(self, request: Request) -> Any:
        """`(loss, Gradients)`, or `(loss, Gradients, Stats)`; no graph is built."""
        raise NotImplementedError

    def differentiable(self, request: Request, loss_and_grad: Callable[[Request], Any]) -> Any:
        """`loss` (and stats) of the owner's arrays, computed by another backend's `loss_and_grad`.

        The owner supplies the autograd around the foreign kernels; a framework without one (NumPy)
        just calls it with `wrt=()`.
        """
        return without_gradient(loss_and_grad(replace(request, wrt=())))

    def asarray(self, values: Any, dtype: str | None = None, device: str | None = None) -> Any:
        """An array of this framework from a NumPy array or any DLPack array, without a copy where possible.

        dtype: a name such as `"bfloat16"` or `"int64"`; None keeps the array's own. device: None keeps its own.
        Raises InvalidInput where the framework would silently narrow the values.
        """
        raise NotImplementedError

    def to_numpy(self, array: Any) -> Any:
        """The array as `numpy.ndarray`; bfloat16 and float16 widen to float32."""
        raise NotImplementedError

    def detach(self, array: Any) -> Any:
        """The same values free of any gradient tape, ready for DLPack."""
        return array

    def arange(self, n: int, like: Any) -> Any:
        """`[0, 1, ..., n - 1]` in the dtype and on the device of `like`."""
        raise NotImplementedError

    def ring(self, handle: Any) -> Any:
        """The `nibs.ring.Ring` that one of this framework's own handles (`capabilities.collectives`) stands for.

        A traced framework, whose schedule speaks to its collectives directly, returns the handle.
        """
        return handle

    def tile_hint(self, device: str, dtype: str) -> TileHint:
        """What tiles this backend likes on a device kind, for `nibs.plan(backend=...)`."""
        from nibs.plan import TileHint

        return TileHint()

    def tile_hints(self, job: Job) -> Sequence[TileHint]:
        """The same where it takes more to know: the width, the objective, what is asked; at least one, the best first.

        The planner takes the first that fits as it is. A backend plans its own calls by what it says here, so that
        `nibs.plan` tells what they will run under.
        """
        return (self.tile_hint(job.device, job.dtype),)

    def two_views(self, z1: Any, z2: Any) -> tuple[Any, Any]:
        """Rows `[2n, d]` of both views, and `[2n]` targets: where each row's other view is."""
        raise NotImplementedError

    def enter(
        self, call: Callable[..., Any], queries: Any, keys: Any, backend: str | None, options: dict[str, Any]
    ) -> Any:
        """Make `call(queries, keys, backend, options)`; asked of a backend with the feature `"traced"`.

        A framework whose compiler reads Python line by line hides from it here what it cannot read.
        """
        return call(queries, keys, backend, options)

    def promotes(self) -> bool:
        """Whether mixed dtypes promote right now (autocast); elsewhere they are an InvalidInput."""
        return False

    def traced(self, request: Request) -> bool:
        """Whether values cannot be looked at now: inside jit, compile, or a graph capture."""
        return False


def without_gradient(result: Any) -> Any:
    """`loss` or `(loss, stats)` of what `loss_and_grad` returned."""
    return result[0] if len(result) == 2 else (result[0], result[2])
