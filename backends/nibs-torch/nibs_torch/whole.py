"""A call that one tile holds, on a CPU and without options: what the schedule does, in a tenth of its operators.

A small batch costs its operators, not its flops: each takes microseconds to start, more if it has not run in this
call, and the schedule, which looks after strips, rings, masks and weights, needs hundreds of them. Here are the few
that are left when there is one tile and nothing but queries, keys, a scale and a bias:

    logits        s [n, m] = scale q [n, d] @ k^T [d, m]
    weights       g [n, m] in their place, and the loss
    gradients     g @ k and g^T @ q: three products in all

Up to `FEW` pairs the framework's own log-softmax makes them, one for each side. Beyond, passes over the tile cost
more than operators, and both sides share one exponential:

    exponentials  E = exp(s - u + HEAD), u the largest; masses are E's row and column sums
    loss          lse_i - s_ii = log mass_i + (u - HEAD - s_ii), in float64; E_ii holds the bracket as it was rounded
    weights       g = E (1 / rowmass_i + 1 / columnmass_j), less one for each side on the diagonal

The scale's gradient is `sum g_ij s_ij / scale`: for it the logits stay beside the weights, which a product may round
(`nibs_torch.mkl`).

A mass below `LOW` may have lost terms that count, and NaN or inf in any row shows in a loss, a mass or a sum. Then
`whole` answers None, and the schedule serves the call as it serves everything else. Equations are those of `nibs.spec`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nibs.request import WRT, Request
from nibs.spec import Gradients, InfoNCE
from nibs_torch import mkl
from nibs_torch.precision import of_rows, products
from nibs_torch.tiles import HEAD, LOW, STRIP, logarithms

__all__ = ["whole"]

FEW = 1 << 16  # pairs: 256 by 256
TINY = 1e-6  # a smaller scale, zero too, could take the digits of its own gradient with it, of small rows first


class Found(NamedTuple):
    """Of a tile: its loss, both sides summed; with gradients its weights `[n, m]`, the sum of those, and, where it was
    asked for, of those times the logits.
    """

    loss: float
    weights: Any = None
    weight: float = 0.0
    moment: float = 0.0


def whole(request: Request, *, grad: bool) -> tuple[Tensor, Gradients] | None:
    """The loss, and with `grad` the gradients that `wrt` names, in the accumulation dtype; None: see above."""
    if not _plain(request):
        return None
    scale, bias = _number(request.scale), _number(request.bias)
    if not TINY <= abs(scale) < math.inf or not math.isfinite(bias):
        return None
    n, m, objective = request.n, request.m, request.objective
    of_queries, of_keys, of_scale, of_bias = (grad and request.wants(name) for name in WRT)
    grad = of_queries or of_keys or of_scale or of_bias
    wide = torch.float64 if request.dtype == "float64" else torch.float32
    narrow = mkl.narrows(request.dtype, request.device)
    factor = torch.bfloat16 if narrow else wide
    queries, keys = request.queries.to(factor), request.keys.to(factor)
    nothing = queries.new_empty((), dtype=wide)

    def product(left: Tensor, right: Tensor, alpha: float) -> Tensor:
        if not narrow:
            return torch.addmm(nothing, left, right, beta=0, alpha=alpha)
        out = nothing.new_empty((left.shape[0], right.shape[1]))
        mkl.product(left, right, out, alpha=alpha)
        return out

    # A flag is lent once, for all three: a loan costs as much as an operator.
    flops = 2 * n * m * request.d
    with products(of_rows(request.dtype, request.precision), factor, queries.device, flops):
        logits = product(queries, keys.T, scale)
        if isinstance(objective, InfoNCE):
            softmax = _few if n * m <= FEW else _many
            found, sides = softmax(logits, objective, grad=grad, moment=of_scale), objective.rows + objective.columns
        else:
            found, sides = _sigmoid(logits, bias, grad=grad, moment=of_scale), 1
        if found is None or not math.isfinite(found.moment):
            return None
        share = 1.0 / sides / (n if request.reduction == "mean" else 1)
        into = onto = None
        if of_queries or of_keys:
            weights = found.weights.to(factor)
            into = product(weights, keys, scale * share) if of_queries else None
            onto = product(weights.T, queries, scale * share) if of_keys else None

    def number(value: float, like: Any = None) -> Tensor:
        return nothing.new_full(like.shape if isinstance(like, Tensor) else (), value * share)

    for_scale = number(found.moment / scale, request.scale) if of_scale else None
    for_bias = number(found.weight, request.bias) if of_bias else None
    return number(found.loss), Gradients(into, onto, for_scale, for_bias)


def _plain(request: Request) -> bool:
    """Whether nothing is asked but what is done here."""
    objective = request.objective
    if isinstance(objective, InfoNCE):
        plain = not objective.exclude_self and not objective.label_smoothing
        plain = plain and objective.false_negative_margin is None
    else:
        plain = True
    return (
        plain
        and request.device == "cpu"
        and request.targets is None
        and request.query_mask is None
        and request.key_mask is None
        and request.weights is None
        and request.plan is None
        and request.memory is None  # a budget is counted for the schedule
        and not request.stats
        and request.reduction != "none"
        and objective.same_id == "negative"
        and (request.ring is None or request.ring.size == 1)
        and request.n > 0
        and request.m > 0
    )


def _few(logits: Tensor, objective: InfoNCE, *, grad: bool, moment: bool) -> Found | None:
    """Equations (1) and (2), each side by itself."""
    n, m = logits.shape
    if not _all_show(logits, objective):
        return None
    sides = [torch.log_softmax(logits, 1)] if objective.rows else []
    if objective.columns:
        sides.append(torch.log_softmax(logits, 0))
    loss = 0.0 - sum(torch.trace(side).item() for side in sides)  # row i's positive is that of column i
    if not math.isfinite(loss):
        return None
    if not grad:
        return Found(loss)
    if objective.columns and m > n:
        sides[-1][:, n:] = -math.inf  # a column that is nobody's is no anchor
    weights = sides[0].exp_()
    for side in sides[1:]:
        weights.add_(side.exp_())
    weights.diagonal().sub_(len(sides))
    return Found(loss, weights, moment=logits.mul_(weights).sum().item() if moment else 0.0)


def _many(logits: Tensor, objective: InfoNCE, *, grad: bool, moment: bool) -> Found | None:
    """Equations (1) and (2), both sides by one exponential."""
    n, m = logits.shape
    if not _all_show(logits, objective):
        return None
    tile = torch.empty_like(logits) if moment else logits
    sides = objective.rows + objective.columns
    head = 0.0 if logits.dtype == torch.float64 else HEAD  # float64 reaches down far enough without
    positives = logits.diagonal().clone()
    lifted = logits.amax() - head
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for _, raw, strip in _strips(logits, tile):
        torch.sub(raw, lifted, out=strip).exp_()
        if objective.rows:
            rows.append(strip.sum(1))
        if objective.columns:
            columns.append(strip.sum(0))
    masses = torch.cat([*rows, torch.stack(columns).sum(0)] if columns else rows)
    if not masses.amin().item() >= LOW * math.exp(head - HEAD):  # NaN as well
        return None
    # Each row's positive is that of its column, and a column that is nobody's is no anchor.
    anchors = masses[: sides * n].view(sides, n)
    loss = torch.log(anchors.double()).add_(lifted - positives).clamp_(min=0.0).sum().item()
    if not grad:
        return Found(loss)
    parts = masses.reciprocal_()
    by_row = parts[:n].unsqueeze(1) if objective.rows else parts.new_zeros((n, 1))
    by_column = parts[-m:] if objective.columns else parts.new_zeros(m)
    by_column[n:] = 0.0
    total = 0.0
    for begin, raw, strip, row in _strips(logits, tile, by_row):
        strip.mul_(row + by_column).diagonal(begin).sub_(sides)
        if moment:
            total += raw.mul_(strip).sum().item()
    return Found(loss, tile, moment=total)


def _sigmoid(logits: Tensor, bias: float, *, grad: bool, moment: bool) -> Found | None:
    """Equations (3) and (4); the logits come without the bias."""
    tile = torch.empty_like(logits) if moment else logits
    seen = loss = weight = total = 0.0
    for begin, raw, strip in _strips(logits, tile):
        torch.add(raw, bias, out=strip)
        seen += strip.sum().item()  # -inf, which the loss does not show
        positives = strip.diagonal(begin).neg_()  # -z s
        part = logarithms(strip.exp()).sum().item() if strip.numel() > FEW else math.inf
        if not math.isfinite(part):  # a few pairs, or factors whose product is beyond floats
            part = torch.ops.aten.softplus(strip, 1, 40).sum().item()  # above 40 it is the identity, in float64 too
        loss += part
        if grad:
            strip.sigmoid_()
            positives.neg_()
            weight += strip.sum().item()
            if moment:
                total += raw.mul_(strip).sum().item()
    return Found(loss, tile, weight, total) if math.isfinite(seen + loss) else None


def _all_show(logits: Tensor, objective: InfoNCE) -> bool:
    """Whether rows that are not finite, if there are any, will show in masses and losses.

    One of -inf hides behind exp(-inf) on the other side, and on its own where it is no anchor.
    """
    n, m = logits.shape
    return (objective.rows and objective.columns and n == m) or math.isfinite(logits.sum().item())


def _strips(tile: Tensor, *others: Tensor) -> Iterable[tuple[Any, ...]]:
    """Strips of rows that stay in the cache, of tensors of as many rows: where they begin, and what each has there."""
    n, m = tile.shape
    if n * m <= STRIP:
        return [(0, tile, *others)]
    step = max(1, STRIP // m)
    return zip(range(0, n, step), *(one.split(step) for one in (tile, *others)), strict=True)


def _number(value: Any) -> float:
    """A scale or a bias."""
    return value.detach().item() if isinstance(value, Tensor) else float(value)
