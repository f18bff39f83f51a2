"""The JAX backend: requests in, traced calls out, with a gradient rule around them.

A scalar loss computes its gradients in the forward, from tiles already at hand, holds them in the
accumulation dtype, and rounds them once, in the backward, after the upstream factor. Per-row values wait
for their upstream and recompute the tiles then. Only what a gradient is taken of is computed.

Refused: second derivatives (the gradient rule is not itself differentiable), 64-bit values where JAX would
cut them to 32 bits, and, inside a trace, anybody else's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.custom_derivatives import SymbolicZero

from nibs.arrays import describe, dtype_name, is_array
from nibs.errors import InvalidInput, Unsupported
from nibs.plan import Plan, TileHint, plan_request
from nibs.request import WRT, Request
from nibs.spec import Backend, Gradients, Stats, without_gradient
from nibs_jax import foreign
from nibs_jax.ring import Ring, axis_names, manual, varies, vary
from nibs_jax.schedule import Call, Inputs
from nibs_jax.sharded import loss_and_grad_over, loss_over, mesh_of

CPU_HINT = TileHint(rows=1024, columns=1024, buffers=3.0, masked=3.0, kernel="xla")
DEVICE_HINT = TileHint(rows=4096, columns=4096, buffers=3.0, masked=3.0, kernel="xla")
DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}
SMALL = ("int8", "uint8", "int16", "uint16", "int32")

ARRAYS = Inputs._fields

jax.tree_util.register_dataclass(Gradients, data_fields=list(WRT), meta_fields=[])
jax.tree_util.register_dataclass(
    Stats, data_fields=[field.name for field in fields(Stats) if field.name != "plan"], meta_fields=["plan"]
)


@dataclass(frozen=True)
class Job:
    """What is static in a call: the request without its arrays, the ring's axes, and who computes (None: XLA)."""

    request: Request
    axes: tuple[str, ...]
    hint: TileHint
    kernels: str | None = None

    def run(self, inputs: Inputs, *, hold: bool = False) -> tuple[Any, Gradients, Stats | None]:
        """Loss, the gradients named in `wrt`, and stats. Scale and bias gradients are this rank's shares."""
        if self.kernels is not None:
            return foreign.run(self.kernels, self.request, inputs, hold=hold)
        call = self.call(inputs, grad=bool(self.request.wrt), hold=hold)
        loss, gradients = call.loss_and_grad() if self.request.wrt else (call.loss(), Gradients())
        return loss, gradients, call.stats() if self.request.stats else None

    def call(self, inputs: Inputs, *, grad: bool, hold: bool = False, deferred: bool = False) -> Call:
        ring = Ring(self.axes)
        plan = plan_request(self.request, self.hint, grad=grad, hold=hold, deferred=deferred, ring_size=ring.size)
        return Call(self.request, inputs, plan, ring, hold=hold)

    def wanting(self, names: tuple[str, ...]) -> Job:
        return replace(self, request=replace(self.request, wrt=names))


class JaxBackend(Backend):
    """Runs every request by the traced schedule."""

    def loss(self, request: Request) -> Any:
        mesh = mesh_of(request)
        if mesh is not None:
            return loss_over(mesh, request, self.loss)
        job, inputs = self._prepared(request)
        loss, stats = _compiled_loss(job, inputs)
        return (loss, _settled(stats)) if request.stats else loss

    def loss_and_grad(self, request: Request) -> Any:
        mesh = mesh_of(request)
        if mesh is not None:
            return loss_and_grad_over(mesh, request, self.loss_and_grad)
        job, inputs = self._prepared(request)
        loss, found, stats = _compiled_loss_and_grad(job, inputs)
        gradients = Gradients(
            queries=found.queries,
            keys=found.keys,
            scale=_like(found.scale, request.scale, hold=request.hold),
            bias=_like(found.bias, request.bias, hold=request.hold),
        )
        return (loss, gradients, _settled(stats)) if request.stats else (loss, gradients)

    def differentiable(self, request: Request, loss_and_grad: Callable[[Request], Any]) -> Any:
        """Eager calls only, also under an eager `jax.grad`; `detach` refuses what is traced."""
        if not self.traced(request):
            return without_gradient(loss_and_grad(replace(request, wrt=())))
        seen: list[Any] = []

        @jax.custom_vjp
        def loss(*four: Any) -> Any:
            return without_gradient(
                loss_and_grad(replace(request, wrt=(), stats=False, **dict(zip(WRT, four, strict=True))))
            )

        def forward(*four: Any) -> Any:
            if request.reduction == "none":
                raise Unsupported(
                    "reduction='none' has no gradient through another backend's kernels on JAX: they know no upstream "
                    "factors. Leave backend= out, or use 'mean' or 'sum'."
                )
            values = {name: jnp.asarray(one.value) for name, one in zip(WRT, four, strict=True)}
            wanted = tuple(name for name, one in zip(WRT, four, strict=True) if one.perturbed and request.wants(name))
            value, gradients, *stats = loss_and_grad(replace(request, wrt=wanted, hold=True, **values))
            seen.extend(stats)
            return value, (gradients, values)

        def backward(saved: Any, upstream: Any) -> Any:
            gradients, values = saved
            found = []
            for name in WRT:
                value = getattr(gradients, name)
                found.append(None if value is None else (value * upstream).astype(values[name].dtype))
            return tuple(found)

        loss.defvjp(forward, backward, symbolic_zeros=True)
        value = loss(*(getattr(request, name) for name in WRT))
        if not request.stats:
            return value
        return value, seen[0] if seen else loss_and_grad(replace(request, wrt=()))[2]

    def _prepared(self, request: Request) -> tuple[Job, Inputs]:
        """The static part of a request, and its arrays: varying alike, and scalars of the accumulation dtype."""
        axes = () if request.ring is None else axis_names(request.ring)
        _check_ring(request, axes)
        accumulator = jnp.float64 if request.dtype == "float64" else jnp.float32
        found = {name: getattr(request, name) for name in ARRAYS}
        for name in ("scale", "bias"):
            found[name] = jnp.asarray(found[name], accumulator).reshape(())
        inputs = Inputs(**found)
        over = frozenset().union(*(varies(leaf) for leaf in jax.tree.leaves(inputs)))
        static = replace(
            request,
            device=self._kind(request),
            ring=axes or None,
            **{name: _mark(getattr(request, name)) for name in ARRAYS},
        )
        kernels = foreign.choose(static, alone=not axes and not over)
        return Job(static, axes, self.tile_hint(static.device, request.dtype), kernels), vary(over, inputs)

    def _kind(self, request: Request) -> str:
        """The kind of device that will run this: the arrays' own, or JAX's default where they are traced."""
        if request.device in ("traced", "sharded"):
            chosen = jax.config.jax_default_device  # of `with jax.default_device(...)`: a device, or a platform's name
            kind = jax.default_backend() if chosen is None else getattr(chosen, "platform", chosen)
            return {"gpu": "cuda"}.get(kind, kind)
        return request.device.partition(":")[0]

    def tile_hint(self, device: str, dtype: str) -> TileHint:
        """XLA's; a call that another backend's kernels compute runs by their plan."""
        return CPU_HINT if device.startswith("cpu") else DEVICE_HINT

    def asarray(self, values: Any, dtype: str | None = None, device: str | None = None) -> Any:
        if dtype is not None and dtype not in DTYPES:
            raise InvalidInput(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}, for {describe(values)}.")
        given = dtype_name(values)
        if dtype == "int64" and given in SMALL:
            dtype = "int32"  # holds them just as well, with or without 64 bits
        wanted = dtype or given
        if wanted in ("float64", "int64", "uint64", "complex128") and not jax.config.read("jax_enable_x64"):
            raise InvalidInput(
                f"{describe(values)} as {wanted}: JAX holds no 64-bit values here and would narrow them in silence. "
                "Turn them on with jax.config.update('jax_enable_x64', True), or convert the array yourself."
            )
        where = _device(device)
        if isinstance(values, (np.ndarray, np.generic)):
            array = np.asarray(values)
            return jax.device_put(array if dtype is None else array.astype(DTYPES[dtype]), where)
        array = values if isinstance(values, jax.Array) else jax.dlpack.from_dlpack(values)
        array = array if dtype is None else array.astype(DTYPES[dtype])
        return array if where is None else jax.device_put(array, where)

    def to_numpy(self, array: Any) -> Any:
        array = np.asarray(array)
        return array.astype(np.float32) if array.dtype in (ml_dtypes.bfloat16, np.float16) else array

    def detach(self, array: Any) -> Any:
        if isinstance(array, jax.core.Tracer):
            raise Unsupported(
                "another framework's kernels cannot run inside a JAX trace (jit, vmap, shard_map). Leave backend= out, "
                "or make the call outside."
            )
        return array

    def arange(self, n: int, like: Any) -> Any:
        return jnp.arange(n, dtype=like.dtype)

    def two_views(self, z1: Any, z2: Any) -> tuple[Any, Any]:
        n = z1.shape[0]
        return jnp.concatenate([z1, z2]), (jnp.arange(2 * n, dtype=jnp.int32) + n) % (2 * n)

    def traced(self, request: Request) -> bool:
        return any(isinstance(getattr(request, name), jax.core.Tracer) for name in ARRAYS)


# -- compiled once for each static part and each set of shapes --------------------------------------------


@partial(jax.jit, static_argnums=0)
def _compiled_loss(job: Job, inputs: Inputs) -> Any:
    rest = inputs._replace(queries=None, keys=None, scale=None, bias=None)
    loss, stats, ran = _loss(job, *(getattr(inputs, name) for name in WRT), rest)
    return loss, stats and replace(stats, plan=ran.plan)


@partial(jax.jit, static_argnums=0)
def _compiled_loss_and_grad(job: Job, inputs: Inputs) -> Any:
    loss, gradients, stats = job.run(_once(inputs), hold=job.request.hold)
    whole = [None if share is None else Ring(job.axes).sum(share) for share in (gradients.scale, gradients.bias)]
    return loss, replace(gradients, scale=whole[0], bias=whole[1]), stats


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(job: Job, queries: Any, keys: Any, scale: Any, bias: Any, rest: Inputs) -> Any:
    """`(loss, stats, plan)`; no gradient is taken, so none is computed."""
    loss, _, stats = job.wanting(()).run(_joined(queries, keys, scale, bias, rest))
    return loss, *_parted(stats)


def _forward(job: Job, *given: Any) -> Any:
    *four, rest = (jax.tree.map(lambda leaf: leaf.value, one, is_leaf=_is_primal) for one in given)
    wanted = tuple(name for name, one in zip(WRT, given[:4], strict=True) if one.perturbed and job.request.wants(name))
    job = job.wanting(wanted)
    inputs = _once(_joined(*four, rest))
    deferred = job.request.reduction == "none"
    if deferred:
        call = job.call(inputs, grad=True, hold=True, deferred=True)
        loss, stats = call.loss(), call.stats() if job.request.stats else None
        saved: Any = (Wanted(wanted), inputs, call.rows, call.columns)
    else:
        loss, gradients, stats = job.run(inputs, hold=True)
        saved = (Wanted(wanted), gradients, [jnp.zeros((0,), one.dtype) for one in four])
    return (loss, *_parted(stats)), saved


def _backward(job: Job, saved: Any, upstream: Any) -> Any:
    """Each gradient, scaled by the upstream factor, rounded once."""
    wanted, upstream = saved[0].names, upstream[0]
    if isinstance(upstream, SymbolicZero):
        upstream = jnp.zeros(upstream.aval.shape, upstream.aval.dtype)
    if job.request.reduction == "none":
        _, inputs, rows, columns = saved
        call = job.wanting(wanted).call(inputs, grad=True, hold=True, deferred=True)
        call.adopt(rows, columns)
        gradients, upstream = call.gradient(upstream), None
        dtypes = [getattr(inputs, name).dtype for name in WRT]
    else:
        gradients = saved[1]
        dtypes = [one.dtype for one in saved[2]]
    found = []
    for name, dtype in zip(WRT, dtypes, strict=True):
        value = getattr(gradients, name)
        if value is not None:
            value = (value if upstream is None else value * upstream).astype(dtype)
        found.append(value)
    return (*found, None)


_loss.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.tree_util.register_static
class Ran:
    """The plan of a call. The loss alone and the loss with its gradient have different ones, and JAX wants the
    structure of what they return to be the same: so all of these are equal.
    """

    def __init__(self, plan: Plan | None) -> None:
        self.plan = plan

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ran)

    def __hash__(self) -> int:
        return hash(Ran)


def _parted(stats: Stats | None) -> tuple[Stats | None, Ran]:
    return (None, Ran(None)) if stats is None else (replace(stats, plan=None), Ran(stats.plan))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Wanted:
    """Names that travel from the forward to the backward."""

    names: tuple[str, ...]


@jax.custom_jvp
def _once(tree: Any) -> Any:
    """The same values, which refuse to be differentiated once more."""
    return tree


@_once.defjvp
def _twice(primals: Any, tangents: Any) -> Any:
    raise Unsupported(
        "the gradient of a nibs loss cannot be differentiated again on JAX: it comes from a rule of its own, and "
        "autodiff through its tiles would hold all n x m of them. Keep it out of hessian, jvp-of-grad and "
        "grad-of-grad, or wrap it in jax.lax.stop_gradient."
    )


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _joined(queries: Any, keys: Any, scale: Any, bias: Any, rest: Inputs) -> Inputs:
    return rest._replace(queries=queries, keys=keys, scale=scale, bias=bias)


def _mark(value: Any) -> Any:
    """What the static part keeps of an array: that it is there."""
    return True if is_array(value) else value if value is None else 0.0


def _like(value: Any, given: Any, *, hold: bool) -> Any:
    """A scalar's gradient in the shape and dtype that it came in; held: in the accumulation dtype."""
    if value is None or not is_array(given):
        return value
    return value.astype(value.dtype if hold else given.dtype).reshape(given.shape)


def _settled(stats: Stats) -> Stats:
    """Plain numbers where they are known; inside a trace they stay arrays."""
    if isinstance(stats.count, jax.core.Tracer):
        return stats
    plain = {name: None if getattr(stats, name) is None else float(getattr(stats, name)) for name in FIGURES}
    return replace(stats, count=int(stats.count), **plain)


FIGURES = ("top1", "mean_positive", "mean_negative", "mean_lse", "hardest_negative")


def _check_ring(request: Request, axes: tuple[str, ...]) -> None:
    if not axes:
        return
    if request.grad_reduction != "none":
        raise InvalidInput(
            f"grad_reduction={request.grad_reduction!r} with ring={request.ring!r}: shard_map already sums what is "
            "replicated. Leave it 'none'."
        )
    if not manual(axes):
        raise InvalidInput(
            f"ring={request.ring!r}: no such axis here. Call it inside jax.shard_map over a mesh with that axis."
        )
    for name in ("queries", "keys"):
        missing = sorted(set(axes) - varies(getattr(request, name)))
        if missing:
            raise InvalidInput(
                f"{name} does not vary over mesh axis {missing[0]!r} of ring={request.ring!r}: expected each rank's "
                f"own rows, in_specs=P({missing[0]!r}), under jax.shard_map(..., check_vma=True), by which gradients "
                "are right."
            )


def _device(device: str | None) -> Any:
    if device is None:
        return None
    kind, _, index = device.partition(":")
    return jax.devices({"cuda": "gpu"}.get(kind, kind))[int(index or 0)]
