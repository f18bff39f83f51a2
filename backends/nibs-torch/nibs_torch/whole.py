"""A call that one tile holds, on a CPU and without options: what the schedule does, in a fifth of its operators.

A small batch costs its operators, not its flops: each takes a microsecond or two to start, and the schedule, which
looks after strips, rings, masks and weights, needs hundreds of them. Here are the few that are left when there is
one tile and nothing but queries, keys, a scale and a bias:

    logits        s [n, m] = scale q [n, d] @ k^T [d, m]
    exponentials  E = exp(s - u + HEAD) in place, u the largest; masses are E's row and column sums
    loss          lse_i - s_ii = log(mass_i exp(u - HEAD - s_ii))
    weights       g = E (1 / rowmass_i + 1 / columnmass_j), less one for each side on the diagonal, in place
    gradients     g @ k and g^T @ q: three products in all, and one exponential

The scale's gradient is `sum g_ij <q_i, k_j>`, read off the gradient of the rows. Where products round their factors
(`nibs_torch.mkl`) it comes from the masses instead, and from E's row and column sums of E s beside them.

A mass below `LOW` may have lost terms that count, and NaN or inf in any row shows in a mass or in a sum. Then `whole`
answers None, and the schedule serves the call as it serves everything else. Equations are those of `nibs.spec`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nibs.request import Request
from nibs.spec import Gradients, InfoNCE
from nibs_torch import mkl
from nibs_torch.precision import of_rows, products
from nibs_torch.tiles import HEAD, LOW, STRIP

__all__ = ["whole"]

TINY = 1e-20  # a smaller scale, zero too, would take the digits of its own gradient with it
NEAR = 20.0  # a mass is at most e^(HEAD + log m): times e^NEAR it is far from float32's end


def whole(request: Request, *, grad: bool) -> tuple[Tensor, Gradients] | None:
    """The loss, and with `grad` the gradients that `wrt` names, in the accumulation dtype; None: see above."""
    objective = request.objective
    n, m = request.n, request.m
    wants = [grad and request.wants(name) for name in ("queries", "keys", "scale", "bias")]
    if not _plain(request) or (wants[2] and not wants[0] and not wants[1]):
        return None
    flops = 2 * n * m * request.d
    narrow = mkl.narrows(request.dtype, request.device)
    times = request.scale.detach().item() if isinstance(request.scale, Tensor) else float(request.scale)
    if not TINY <= abs(times) < math.inf or (narrow and not isinstance(objective, InfoNCE)):
        return None
    wide = torch.float64 if request.dtype == "float64" else torch.float32
    factor = torch.bfloat16 if narrow else wide
    queries, keys = request.queries.to(factor), request.keys.to(factor)
    precision = of_rows(request.dtype, request.precision)

    def product(left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
        out = left.new_empty((left.shape[0], right.shape[1]), dtype=wide)
        if narrow:
            mkl.product(left.to(factor), right, out, alpha=alpha)
            return out
        with products(precision, wide, queries.device, flops):
            return torch.addmm(out, left, right, beta=0, alpha=alpha, out=out)

    tile = product(queries, keys.T, times)
    if isinstance(objective, InfoNCE):
        sides = objective.rows + objective.columns
        found = _softmax(tile, objective, grad=any(wants), moments=narrow and wants[2])
    else:
        sides = 1
        found = _sigmoid(tile, request.bias, grad=any(wants))
    if found is None:
        return None
    total, weight, moment = found
    share = 1.0 / sides / (n if request.reduction == "mean" else 1)
    loss = (total * share).to(wide)
    into = product(tile, keys, times * share) if wants[0] else None
    onto = product(tile.T, queries, times * share) if wants[1] else None
    of_scale = None
    if wants[2]:
        if moment is None:
            gradient, rows = (into, queries) if into is not None else (onto, keys)
            moment = (gradient * rows).sum(1).sum(dtype=torch.float64)
        else:
            moment = moment * share
        of_scale = _like(moment / times, request.scale, wide)
    of_bias = None
    if wants[3]:
        of_bias = _like(weight * share if weight is not None else loss.new_zeros(()), request.bias, wide)
    return loss, Gradients(into, onto, of_scale, of_bias)


def _plain(request: Request) -> bool:
    """Whether nothing is asked but what is done here."""
    objective = request.objective
    if isinstance(objective, InfoNCE):
        plain = not objective.exclude_self and not objective.label_smoothing
        plain = plain and objective.false_negative_margin is None and isinstance(request.bias, (int, float))
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
        and (not isinstance(request.bias, (int, float)) or math.isfinite(request.bias))
    )


def _softmax(
    tile: Tensor, objective: InfoNCE, *, grad: bool, moments: bool
) -> tuple[Tensor, None, Tensor | None] | None:
    """The sum of both sides' losses; with `grad` the logits in `tile` become weights, equations (1) and (2); with
    `moments` also the sum of the weights times the logits.
    """
    n, m = tile.shape
    both = objective.rows and objective.columns
    # Only both masses together see an infinite row or key: one of them may hide behind exp(-inf).
    if not both and not math.isfinite(tile.sum().item()):
        return None
    positives = tile.diagonal().clone()
    lifted = tile.max() - HEAD
    sums = tile.new_zeros(n + m)
    of_rows, of_columns = sums[:n], sums[n:]
    weighed = tile.new_zeros(n + m if moments else 0)
    for strip, where in _strips(tile):
        logits = strip.clone() if moments else strip
        strip.sub_(lifted).exp_()
        if moments:
            logits.mul_(strip)
            if objective.rows:
                torch.sum(logits, 1, out=weighed[where])
            if objective.columns:
                weighed[n:].add_(logits.sum(0))
        if objective.rows:
            torch.sum(strip, 1, out=of_rows[where])
        if objective.columns:
            of_columns.add_(strip.sum(0))
    masses = sums if both else of_rows if objective.rows else of_columns
    if not masses.min().item() >= LOW:  # NaN as well
        return None
    # Each row's positive is that of its column, and a column that is nobody's is no anchor.
    distance = lifted - positives
    near = distance.clamp(max=NEAR)
    anchors = sums.view(2, n) if both and n == m else torch.stack([of_rows, of_columns[:n]]) if both else masses[:n]
    values = (anchors * near.exp()).log_().add_(distance.sub_(near)).clamp_(min=0.0)
    total = values.sum(dtype=torch.float64)
    if grad:
        parts = masses.reciprocal_()
        if m > n:
            of_columns[n:] = 0.0
        for strip, where in _strips(tile):
            if both:
                strip.mul_(of_rows[where].unsqueeze(1) + of_columns)
            else:
                strip.mul_(parts[where].unsqueeze(1) if objective.rows else parts)
        tile.diagonal().sub_(2.0 if both else 1.0)
    if not moments:
        return total, None, None
    weighed = weighed if both else weighed[:n] if objective.rows else weighed[n:]
    moment = (weighed * masses).sum(dtype=torch.float64)
    return total, None, moment - positives.sum(dtype=torch.float64) * (2.0 if both else 1.0)


def _sigmoid(tile: Tensor, bias: Any, *, grad: bool) -> tuple[Tensor, Tensor, None] | None:
    """The sum of the losses, and of the weights; with `grad` the products in `tile` become weights, (3) and (4)."""
    tile.add_(bias.detach().to(tile.dtype).reshape(()) if isinstance(bias, Tensor) else bias)
    seen = tile.sum()
    tile.diagonal().neg_()  # -z s
    total = weight = tile.new_zeros((), dtype=torch.float64)
    for strip, _ in _strips(tile):
        terms = torch.ops.aten.softplus(strip, 1, 40)  # above 40 it is the identity, in float64 too
        total = total + terms.sum(1).sum(dtype=torch.float64)
        if grad:
            strip.sigmoid_()
    if not math.isfinite((seen + total).item()):
        return None
    if grad:
        tile.diagonal().neg_()
        weight = tile.sum(1).sum(dtype=torch.float64)
    return total, weight, None


def _strips(tile: Tensor) -> list[tuple[Tensor, slice]]:
    """The tile in strips of rows that stay in the cache, and where they lie."""
    n, m = tile.shape
    if n * m <= STRIP:
        return [(tile, slice(0, n))]
    step = max(1, STRIP // m)
    return [(tile[begin : begin + step], slice(begin, min(begin + step, n))) for begin in range(0, n, step)]


def _like(value: Tensor, given: Any, wide: torch.dtype) -> Tensor:
    """A scalar's gradient in the accumulation dtype and the shape that it came in."""
    value = value.to(wide)
    return value.reshape(given.shape) if isinstance(given, Tensor) else value
