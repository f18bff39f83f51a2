"""Autograd around a call, whoever computes it: the schedule here, a compiled program, or a foreign backend.

    loss        gradients are computed                      kept for the backward
    scalar      in the forward, with the tiles at hand      the gradients, in the accumulation dtype
    deferred    in the backward, from tiles made again      rows' and columns' statistics, O(n + m) numbers

A scalar loss is deferred only where its gradients do not fit the memory budget; per-row values always are,
for their upstream factors are one for each row. Either way gradients are rounded once, after the upstream
factor, so that a GradScaler's 65536 reaches float16 before the rounding does; and no tile outlives its call.

Refused: a second derivative, and forward-mode differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from nibs.agreement import joining
from nibs.errors import Unsupported
from nibs.request import WRT, Request
from nibs.ring import Solo
from nibs.spec import InfoNCE, Stats

__all__ = ["ARRAYS", "ForeignKernels", "Job", "Kernels", "differentiable_loss", "factors"]

ARRAYS = (*WRT, "targets", "query_ids", "key_ids", "query_mask", "key_mask", "weights")
"""Fields of a request that hold arrays: those that can carry gradients first."""

STRIP = 1 << 20  # elements that a CPU multiplies and rounds at a time


class Kernels(Protocol):
    """Who computes. `request.wrt` names the inputs that want a gradient; its tensors are detached."""

    def forward(self, request: Request, *, deferred: bool) -> tuple[Tensor, list[Tensor], Stats | None]:
        """The loss; then the gradients named in `wrt`, in the accumulation dtype, or what `backward` asks for.

        After the gradients there may be a factor, 0-d, that those of queries and keys still lack: see `factors`.
        """
        ...

    def backward(self, request: Request, saved: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
        """The gradients named in `wrt` of a deferred call."""
        ...


@dataclass(slots=True, eq=False)
class Job:
    """One differentiable call without its tensors, which travel beside it where autograd sees them.

    request: its array fields are None where a tensor belongs. names: those fields, in the order in which their
    tensors travel. stats: where the forward puts them.
    """

    request: Request
    names: Sequence[str]
    kernels: Kernels
    deferred: bool
    stats: list[Stats] = field(default_factory=list)

    def filled(self, tensors: Sequence[Tensor]) -> Request:
        """The request with its tensors in place, detached."""
        return self.request.but({name: tensor.detach() for name, tensor in zip(self.names, tensors)})


def differentiable_loss(request: Request, kernels: Kernels, *, deferred: bool) -> Any:
    """The loss, or `(loss, stats)`, with a gradient for each input named in `request.wrt`."""
    names, tensors = travellers(request)
    job = Job(request.but(dict.fromkeys(names)), names, kernels, deferred)
    direct = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    loss = _Direct.apply(job, *tensors) if direct else _Loss.apply(job, *tensors)[0]
    return (loss, job.stats[0]) if request.stats else loss


def travellers(request: Request) -> tuple[list[str], list[Tensor]]:
    """The fields of a request that hold tensors, and those."""
    found = [(name, value) for name in ARRAYS if isinstance(value := getattr(request, name), Tensor)]
    return [name for name, _ in found], [value for _, value in found]


class _Loss(torch.autograd.Function):
    """The loss as autograd sees it. Outputs after the first are what the backward needs, and carry no gradient."""

    @staticmethod
    def forward(job: Job, *tensors: Tensor) -> tuple[Tensor, ...]:
        loss, saved, stats = job.kernels.forward(job.filled(tensors), deferred=job.deferred)
        if stats is not None:
            job.stats.append(stats)
        return (loss, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        job, *tensors = inputs
        ctx.set_materialize_grads(False)  # else each kept gradient would get a zero tensor of its size
        ctx.mark_non_differentiable(*output[1:])
        _keep(ctx, job, tensors, output[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        job: Job = ctx.job
        kept = ctx.saved_tensors  # once: each time unpacks them anew, which checkpoint() refuses
        tensors, saved = kept[: len(job.names)], kept[len(job.names) :]
        if upstream is None or not job.request.wrt:
            return (None, *[None] * len(tensors))
        if not torch.is_grad_enabled():
            found = _gradients(job, tensors, saved, upstream)
        else:  # create_graph: the gradients must know where they come from
            with torch.no_grad():
                found = _gradients(job, tensors, saved, upstream)
            inputs = [tensor for name, tensor in zip(job.names, tensors) if name in WRT and tensor is not None]
            found = list(_Once.apply(len(found), *found, upstream, *inputs))
        out = dict(zip(job.request.wrt, found, strict=True))
        return (None, *(out.get(name) for name in job.names))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], job: Job, *tensors: Tensor) -> tuple[Any, Any]:
        """Batches of losses one by one: each is a whole batch of pairs, large enough by itself."""
        if job.request.stats:
            raise Unsupported("stats=True inside torch.func.vmap: statistics are numbers, not tensors. Ask outside it.")
        found = []
        for index in range(info.batch_size):
            part = [
                tensor if dim is None else tensor.select(dim, index)
                for tensor, dim in zip(tensors, in_dims[1:], strict=True)
            ]
            found.append(_Loss.apply(job, *part))
        return tuple(torch.stack(values) for values in zip(*found, strict=True)), tuple(0 for _ in found[0])

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise Unsupported(
            "nibs has no forward-mode derivative (torch.func.jvp, forward_ad): use reverse mode, "
            "backward() or torch.func.grad."
        )


class _Direct(torch.autograd.Function):
    """`_Loss` in the older form, for plain eager calls: the newer one binds signatures anew in each call, and has to
    put out what it keeps.
    """

    @staticmethod
    def forward(ctx: Any, job: Job, *tensors: Tensor) -> Tensor:
        loss, *saved = _Loss.forward(job, *tensors)
        _keep(ctx, job, tensors, saved)
        return loss

    backward = _Loss.backward
    jvp = _Loss.jvp


def _keep(ctx: Any, job: Job, tensors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """What the backward needs. Of inputs whose gradients are known only those that get one: for their dtypes, and as
    the link for a second derivative.
    """
    wrt = job.request.wrt or ()
    ctx.job = job
    needed = [tensor if job.deferred or name in wrt else None for name, tensor in zip(job.names, tensors)]
    ctx.save_for_backward(*needed, *saved)


class _Once(torch.autograd.Function):
    """Gradients as they are, but for a second derivative, which is refused by name."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise Unsupported(
            "the contrastive loss of nibs can be differentiated once, not twice: no backend here has its second "
            "derivative. Detach the first gradients, or use the dense loss for this term."
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], count: int, *tensors: Tensor) -> tuple[Any, Any]:
        return tensors[:count], in_dims[1 : 1 + count]


def _gradients(job: Job, tensors: Sequence[Tensor | None], saved: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """The gradients named in `wrt`, upstream factor in, each in its input's dtype."""
    inputs: dict[str, Any] = dict(zip(job.names, tensors))
    likes = [inputs[name] for name in job.request.wrt or ()]
    if job.deferred:
        found = job.kernels.backward(job.filled(tensors), saved, upstream)
        return [one.to(like.device, like.dtype) for one, like in zip(found, likes, strict=True)]
    each = zip(saved, factors(job.request.wrt or (), saved, upstream), likes)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return [(one * factor).to(like.device, like.dtype) for one, factor, like in each]
    last = _last_backward()
    plain = last and upstream.device.type == "cpu" and upstream.item() == 1.0  # loss.backward(), and nobody in between
    return [_rounded(one, factor, like, last=last, plain=plain and factor is upstream) for one, factor, like in each]


def factors(wrt: Sequence[str], saved: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """What each gradient named in `wrt` is to be multiplied by: the upstream factor, and the one that rows may lack."""
    of_rows = upstream * saved[-1] if len(saved) > len(wrt) else upstream
    return [of_rows if name in ("queries", "keys") else upstream for name in wrt]


def _rounded(gradient: Tensor, upstream: Tensor, like: Tensor, *, last: bool, plain: bool) -> Tensor:
    """`gradient * upstream` in the dtype and on the device of `like`, rounded once.

    last: the gradient is not needed again. plain: the upstream factor is 1.
    """
    alike = gradient.dtype == like.dtype and gradient.device == like.device
    if plain:
        return gradient if alike else gradient.to(like.device, like.dtype)
    upstream = upstream.to(gradient.device)  # gradients of rows that were fetched are where the rows are
    if alike:
        return gradient.mul_(upstream) if last else gradient * upstream
    if gradient.numel() <= STRIP:
        return (gradient * upstream).to(like.device, like.dtype)
    out = torch.empty_like(gradient, dtype=like.dtype)
    # One kernel multiplies and rounds, but on a CPU, which makes a wide copy first: there strip by strip.
    step = max(1, STRIP // gradient.shape[1]) if gradient.device.type == "cpu" else gradient.shape[0]
    for begin in range(0, gradient.shape[0], step):
        torch.mul(gradient[begin : begin + step], upstream, out=out[begin : begin + step])
    return out


def _last_backward() -> bool:
    """Whether the graph is given up in this backward, so that what it kept may be handed out: a copy less."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


class ForeignKernels:
    """Another backend's `loss_and_grad`, which knows no upstream factor.

    A scalar's gradients are asked for wide (`hold`) and multiplied here. Per-row factors enter as anchor weights,
    of which the loss is a linear function: `sum_i g_i value_i` is the "sum" of the same rows with weights
    `w_i g_i`. Weights are not negative, so negative factors take a call of their own.
    """

    def __init__(self, loss_and_grad: Callable[[Request], Any]) -> None:
        self.loss_and_grad = loss_and_grad

    def forward(self, request: Request, *, deferred: bool) -> tuple[Tensor, list[Tensor], Stats | None]:
        asked = replace(request, wrt=()) if deferred else replace(request, hold=True)
        loss, gradients, *stats = self.loss_and_grad(asked)
        names = () if deferred else request.wrt or ()
        return loss, [getattr(gradients, name) for name in names], stats[0] if stats else None

    def backward(self, request: Request, saved: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
        total: list[Tensor] | None = None
        for sign in (1.0, -1.0):
            part = (upstream * sign).clamp(min=0.0)  # NaN stays
            if sign < 0 and not _anywhere(part > 0, request.ring):
                continue
            for asked in _weighed(replace(request, reduction="sum", stats=False, hold=True), part):
                with joining(request.ring or Solo()):
                    _, gradients = self.loss_and_grad(asked)
                found = [getattr(gradients, name) for name in request.wrt or ()]
                found = [one * sign for one in found] if sign < 0 else found
                total = found if total is None else [one + other for one, other in zip(total, found, strict=True)]
        assert total is not None
        return total


def _anywhere(found: Tensor, ring: Any) -> bool:
    """Whether any is True, on any rank: all ranks must make the same calls."""
    if ring is None or ring.size == 1:
        return bool(found.any())
    count = ring.sum(found.sum(dtype=torch.float32))
    ring.settle()
    return bool(count > 0)


def _weighed(request: Request, factors: Tensor) -> list[Request]:
    """Requests of reduction "sum" whose losses add up to `sum_i factors_i value_i`.

    A key's weight is the mean over the queries that designate it, and its value counts once for each of them:
    so where queries may share a key, the two directions need different weights, and a call each.
    """
    weights = factors if request.weights is None else factors * request.weights
    objective = request.objective
    alone = request.ring is None or request.ring.size == 1
    if not isinstance(objective, InfoNCE) or not objective.columns or (request.targets is None and alone):
        return [replace(request, weights=weights)]
    m = request.m
    targets = torch.arange(request.n, device=factors.device) if request.targets is None else request.targets.long()
    valid = (targets >= 0) & (targets < m)
    if request.query_mask is not None:
        valid = valid & request.query_mask
    index = torch.where(valid, targets, 0)

    def of_key(values: Tensor) -> Tensor:
        """Each row's key's sum of `values` over the rows that designate it."""
        values = torch.where(valid, values, 0.0)
        return torch.zeros(max(m, 1), dtype=values.dtype, device=values.device).index_add(0, index, values)[index]

    ones = torch.ones_like(factors)
    own = ones if request.weights is None else request.weights.to(factors.dtype)
    of_columns = torch.where(valid, of_key(factors) * of_key(own) / of_key(ones).clamp(min=1.0), 0.0)
    half = 0.5 if objective.rows else 1.0
    columns = replace(
        request, objective=replace(objective, direction="key_to_query"), weights=of_columns.to(weights.dtype) * half
    )
    if not objective.rows:
        return [columns]
    return [replace(request, objective=replace(objective, direction="query_to_key"), weights=weights * half), columns]
