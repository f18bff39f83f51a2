"""The PyTorch backend: requests in, tensors out, with autograd around them and torch.compile let through.

A call that nobody will differentiate runs the shared schedule and no more. One that somebody may goes through
`nibs_torch.autograd`; one that is being traced goes through it too, with operators in the schedule's place
(`nibs_torch.tracing`). `_call` is where a request becomes a call of the schedule, for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nibs.agreement import joining
from nibs.arrays import describe, dtype_name
from nibs.errors import InvalidInput, MemoryBudget, Unsupported
from nibs.plan import Job, TileHint, plan_request
from nibs.request import WRT, Request
from nibs.ring import Solo
from nibs.schedule import Call
from nibs.spec import Backend, Gradients, Stats
from nibs_torch import tracing
from nibs_torch.autograd import ForeignKernels, differentiable_loss
from nibs_torch.fused import FusedTiles, Macros, hints_on, kernel_for
from nibs_torch.mkl import narrows
from nibs_torch.streaming import Unlocked, mapped, streamed
from nibs_torch.tiles import DTYPES, TorchTiles, capturing
from nibs_torch.whole import whole

CPU_HINT = TileHint(rows=2048, columns=2048, buffers=2.0, masked=5.0, kernel="torch")
NARROW_HINT = replace(CPU_HINT, columns=1024, buffers=4.0, masked=6.0, kernel="torch, bfloat16 products")
DEVICE_HINT = TileHint(rows=4096, columns=4096, buffers=2.0, masked=5.0, kernel="torch")
SOLO = Solo()
ALONE = nullcontext()
AUTOCAST = ("cpu", "cuda", "xpu")


class TorchBackend(Backend):
    """Runs every request by the shared schedule over `TorchTiles`."""

    defers = True

    def loss(self, request: Request) -> Any:
        wrt = self._differentiated(request)
        if tracing.is_symbolic(request.queries):
            if request.streams:
                raise Unsupported("device= inside torch.compile: what is fetched cannot be traced. Call outside it.")
            request = request.but({"wrt": wrt})
            return differentiable_loss(request, COMPILED, deferred=bool(wrt) and tracing.defers(request))
        if wrt or _transformed():
            request = request.but({"wrt": wrt})
            kernels = UNCHECKED if _unseen(request) else KERNELS
            return differentiable_loss(request, kernels, deferred=bool(wrt) and self._defers(request))
        with _plain(request.device):
            request = tracing.poisoned(request) if _unseen(request) else request
            found = _whole(request, grad=False)
            if found is not None:
                return found[0]
            call = _call(request, grad=False)
            loss = call.loss()
            return (loss, call.stats()) if request.stats else loss

    def loss_and_grad(self, request: Request) -> Any:
        with _plain(request.device):
            request = tracing.poisoned(request) if _unseen(request) else request
            found = _whole(request, grad=True)
            if found is not None:
                return found if request.hold else (found[0], _as_inputs(found[1], request))
            call = _call(request, grad=True, hold=request.hold)
            loss, gradients = call.loss_and_grad()
            gradients = gradients if request.hold else _as_inputs(gradients, request)
            return (loss, gradients, call.stats()) if request.stats else (loss, gradients)

    def differentiable(self, request: Request, loss_and_grad: Callable[[Request], Any]) -> Any:
        if tracing.is_symbolic(request.queries):
            raise Unsupported(
                "backend= of another framework inside torch.compile: its kernels cannot be traced. "
                "Leave backend= out there, or call outside the compiled function."
            )
        if _transformed():
            raise Unsupported(
                "backend= of another framework inside torch.func: its kernels see no transformed tensors. "
                "Leave backend= out there, or use backward()."
            )
        request = replace(request, wrt=self._differentiated(request))
        deferred = bool(request.wrt) and request.reduction == "none"
        return differentiable_loss(request, ForeignKernels(loss_and_grad), deferred=deferred)

    def _differentiated(self, request: Request) -> tuple[str, ...]:
        """Names of the inputs that want a gradient, out of those that the caller left in."""
        forward = forward_ad._current_level >= 0  # somebody's tangents: autograd refuses them by name
        if not (torch.is_grad_enabled() or forward):
            return ()
        tensors = [name for name in WRT if request.wants(name) and isinstance(getattr(request, name), Tensor)]
        if forward or _transformed():  # which of them a transform differentiates is not to be seen from inside
            return tuple(tensors)
        return tuple(name for name in tensors if getattr(request, name).requires_grad)

    def _defers(self, request: Request) -> bool:
        """Whether gradients wait for the backward: per-row values, or no room for whole accumulators."""
        if request.reduction == "none":
            return True
        if request.memory is None and request.plan is None:
            return False
        if request.ring is not None and request.ring.size > 1:
            return False  # budgets may differ from rank to rank, and all must go the same way
        try:
            return _plan(request, grad=True, hold=True).sweep == "split"
        except MemoryBudget:
            return True

    def enter(
        self, call: Callable[..., Any], queries: Any, keys: Any, backend: str | None, options: dict[str, Any]
    ) -> Any:
        if not torch.compiler.is_compiling():
            return call(queries, keys, backend, options)
        from nibs_torch import opaque  # Dynamo runs this import, and then knows not to read what it brings

        spelled = {name: tracing.spell(value) for name, value in options.items() if value is not None}
        return opaque.loss(queries, keys, backend or "", spelled)

    def ring(self, handle: Any) -> Any:
        from nibs_torch.ring import as_ring  # torch.distributed is not everywhere

        return as_ring(handle)

    def tile_hints(self, job: Job) -> Sequence[TileHint]:
        try:
            fused = kernel_for(job.device, job.dtype) == "triton"
            return hints_on(job.device, job.dtype)(job) if fused else (_hint(job.device, job.dtype),)
        except Unsupported:
            raise
        except (AssertionError, RuntimeError) as cause:
            raise InvalidInput(
                f"device={job.device!r}: PyTorch finds no such device here ({cause}), and tiles go by the card. Plan "
                "where that card is, or leave backend= out for the core's own tiles."
            ) from cause

    def asarray(self, values: Any, dtype: str | None = None, device: str | None = None) -> Any:
        tensor = values if isinstance(values, Tensor) else _import(values)
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise InvalidInput(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}, int64, for {describe(values)}.")
        return tensor.to(device=device, dtype=None if dtype is None else getattr(torch, dtype))

    def to_numpy(self, array: Any) -> Any:
        array = array.detach().cpu()
        return (array.float() if array.dtype in (torch.bfloat16, torch.float16) else array).numpy()

    def detach(self, array: Any) -> Any:
        return array.detach().resolve_conj().resolve_neg()

    def arange(self, n: int, like: Any) -> Any:
        return torch.arange(n, dtype=like.dtype, device=like.device)

    def two_views(self, z1: Any, z2: Any) -> tuple[Any, Any]:
        alike = isinstance(z2, Tensor) and (z1.dtype == z2.dtype or self.promotes()) and z1.device == z2.device
        if not alike:
            raise InvalidInput(
                f"z2 is {describe(z2)} while z1 is {describe(z1)}: "
                "expected two views of one framework, dtype and device."
            )
        n = z1.shape[0]
        return torch.cat([z1, z2]), torch.arange(2 * n, device=z1.device).roll(-n)

    def promotes(self) -> bool:
        return any(map(torch.is_autocast_enabled, AUTOCAST))

    def traced(self, request: Request) -> bool:
        return tracing.is_symbolic(request.queries) or _unseen(request)


class ScheduleKernels:
    """The shared schedule, as `nibs_torch.autograd` asks for it.

    checked: values were looked at before. Inside torch.func, and while a CUDA graph is captured, they could not be:
    there bad rows become NaN. Each joins the ranks by itself: a backward, and what was compiled, run by themselves.
    """

    def __init__(self, *, checked: bool) -> None:
        self.checked = checked

    def forward(self, request: Request, *, deferred: bool) -> tuple[Tensor, list[Tensor], Stats | None]:
        request = request if self.checked else tracing.poisoned(request)
        with _plain(request.device), _joining(request):
            found = None if deferred else _whole(request, grad=True)
            if found is not None:
                loss, gradients = found
                return loss, [getattr(gradients, name) for name in request.wrt or ()], None
            if deferred:
                _plan(request, grad=True, deferred=True)  # a budget too small for the backward is said now
            call = _call(request, grad=not deferred, hold=True, bare=not deferred)
            if deferred:
                loss = call.loss()
                sizes = (request.n, request.m)
                sides = zip(call.state(), sizes, strict=True)
                saved = [torch.stack(side) if side else loss.new_empty((0, size)) for side, size in sides]
            else:
                loss, gradients = call.loss_and_grad()
                saved = [getattr(gradients, name) for name in request.wrt or ()]
                if call.bare:
                    saved.append(call.of_rows())
            return loss, saved, call.stats() if request.stats else None

    def backward(self, request: Request, saved: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
        if torch._C._functorch.is_batchedtensor(upstream):
            raise Unsupported(
                "the gradient of reduction='none' under torch.func.vmap or jacrev: each upstream gradient takes a walk "
                "over the tiles of its own. Differentiate a weighted sum of the values, one at a time."
            )
        request = request if self.checked else tracing.poisoned(request)
        with _plain(request.device), _joining(request):
            call = _call(request, grad=True, deferred=True)
            rows, columns = (side[: len(mine)].unbind() for side, mine in zip(saved, call.state(), strict=True))
            call.resume(rows, columns)
            gradients = _as_inputs(call.gradient(upstream), request)
            return [getattr(gradients, name) for name in request.wrt or ()]


KERNELS = ScheduleKernels(checked=True)
UNCHECKED = ScheduleKernels(checked=False)
COMPILED = tracing.CompiledKernels()


def _call(request: Request, *, grad: bool, hold: bool = False, deferred: bool = False, bare: bool = False) -> Call:
    """bare: gradients of rows without their factor, where the fused kernels made them: on a GPU that saves a pass. Not
    where rows may be absent, whose 0 a factor that is NaN, for a present row's sake, would not leave.
    """
    if request.streams:
        request = streamed(request, hold=hold)
    plan = _plan(request, grad=grad, hold=hold, deferred=deferred)
    device = request.queries.device
    fused = plan.kernel == "triton"
    tiles = FusedTiles(request.dtype, device, request.precision) if fused else TorchTiles(request.dtype, device)
    all_there = request.query_mask is None and request.key_mask is None
    return Call(request, tiles, plan, request.ring, hold=hold, bare=bare and fused and all_there)


def _whole(request: Request, *, grad: bool) -> tuple[Tensor, Gradients] | None:
    """The call as one tile, where it is one and asks for nothing else."""
    if request.device != "cpu" or request.n > CPU_HINT.rows or request.m > CPU_HINT.columns or request.streams:
        return None
    if kernel_for(request.device, request.dtype, request.plan) != "torch":
        return None
    return whole(request, grad=grad)


def _plan(request: Request, *, grad: bool, hold: bool = False, deferred: bool = False) -> Any:
    size = 1 if request.ring is None else request.ring.size
    fused = not request.streams and kernel_for(request.device, request.dtype, request.plan) == "triton"
    mixed = request.queries.dtype != request.keys.dtype
    where = request.device, request.dtype
    hint: TileHint | Macros = hints_on(*where, mixed=mixed) if fused else _hint(*where)
    return plan_request(request, hint, grad=grad, hold=hold, deferred=deferred, ring_size=size)


def _hint(device: str, dtype: str) -> TileHint:
    """The tiles of the plain path on a device."""
    if not device.startswith("cpu"):
        return DEVICE_HINT
    return NARROW_HINT if narrows(dtype, device) else CPU_HINT


def _as_inputs(gradients: Gradients, request: Request) -> Gradients:
    """Each gradient in its input's own dtype and place: under autocast the two sides may differ in dtype, and
    scale and bias may lie on the CPU beside a batch on a GPU.
    """
    (request.ring or SOLO).settle()  # a copy to the CPU would wait for a lost peer for ever
    found: dict[str, Any] = {}
    for name in WRT:
        gradient, given = getattr(gradients, name), getattr(request, name)
        is_tensor = gradient is not None and isinstance(given, Tensor)
        found[name] = gradient.to(given.device, given.dtype) if is_tensor else gradient
    return Gradients(**found)


def _joining(request: Request) -> AbstractContextManager[Any]:
    """Around a call: what its ranks are told, where there are others."""
    return ALONE if request.ring is None else joining(request.ring)


@contextmanager
def _plain(device: str) -> Iterator[None]:
    """No graph, no autocast (inputs are taken as they come), and no tensor subclass's own ideas of arithmetic."""
    with torch.no_grad() if torch.is_grad_enabled() else ALONE, torch._C.DisableTorchFunctionSubclass():
        kind = device.partition(":")[0]
        if kind in AUTOCAST and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                yield
        else:
            yield


def _unseen(request: Request) -> bool:
    """Whether values cannot be looked at: inside torch.func, and while a CUDA graph is captured."""
    return _transformed() or capturing(request.queries.device)


def _transformed() -> bool:
    """Whether this runs inside torch.func."""
    return bool(torch._C._are_functorch_transforms_active())


def _import(values: Any) -> Tensor:
    """Any framework's array as a tensor, its memory shared where DLPack or NumPy can."""
    if dtype_name(values) == "bfloat16" and not hasattr(values, "__dlpack_device__"):
        raise InvalidInput(f"{describe(values)}: expected an array that speaks DLPack.")
    if type(values).__module__ != "numpy":
        return torch.from_dlpack(values)
    import numpy

    array = numpy.asarray(values)
    if any(stride < 0 for stride in array.strides) or not (array.flags.writeable or mapped(array)):
        array = array.copy()  # a tensor can be neither
    elif not array.flags.writeable:
        array = numpy.asarray(Unlocked(array))
    if str(array.dtype) == "bfloat16":  # an extension of NumPy's, which DLPack does not know
        return torch.from_numpy(array.view(numpy.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
