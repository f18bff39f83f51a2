"""What the JAX backend declares. Nothing is imported here but nibs: this runs whenever nibs looks around."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nibs import BackendInfo, Capabilities, hookimpl

if TYPE_CHECKING:
    from nibs.spec import Backend

CAPABILITIES = Capabilities(
    devices=frozenset({"cpu", "cuda", "rocm", "tpu"}),
    dtypes=frozenset({"float64", "float32", "bfloat16", "float16"}),
    objectives=frozenset({"InfoNCE", "Sigmoid"}),
    features=frozenset(
        {
            "autograd",
            "deterministic",
            "exclude",
            "exclude_self",
            "false_negative_margin",
            "label_smoothing",
            "masks",
            "memory",
            "multi_positive",
            "precision",
            "reduction_none",
            "stats",
            "targets",
            "traced",
            "weights",
        }
    ),
    collectives=frozenset({"builtins.str", "builtins.tuple"}),
)


def load() -> Backend:
    """Import JAX and the backend, on first use."""
    from nibs_jax.backend import JaxBackend

    return JaxBackend()


@hookimpl
def nibs_backends() -> Iterator[BackendInfo]:
    """One backend: `jax`."""
    yield BackendInfo(
        name="jax",
        # Concrete arrays, and whatever stands for one inside jit, grad, vmap, shard_map.
        arrays=("jaxlib._jax.ArrayImpl", "jaxlib.xla_extension.ArrayImpl", "jax._src.core.Tracer"),
        capabilities=CAPABILITIES,
        load=load,
        install="pip install nibs-jax",
    )


@hookimpl
def nibs_conformance_pullback(backend: str) -> Any:
    """`jax.vjp`, for the suite."""
    if backend != "jax":
        return None
    import jax

    def pullback(function: Any, inputs: Any, upstream: Any) -> Any:
        value, back = jax.vjp(function, *inputs)
        return value, back(upstream.astype(value.dtype).reshape(value.shape))

    return pullback


@hookimpl
def nibs_conformance_trace(backend: str) -> Any:
    """`jax.jit`, for the suite."""
    if backend != "jax":
        return None
    import jax

    return jax.jit


@hookimpl
def nibs_conformance_prepare(backend: str) -> None:
    """64 bits, and programs that are quickly compiled: see `nibs_jax.suite`."""
    if backend == "jax":
        from nibs_jax.suite import prepare

        prepare()


@hookimpl
def nibs_conformance_world(backend: str, size: int) -> Any:
    """Forced host devices in a process of their own."""
    if backend != "jax":
        return None
    from nibs_jax.world import DeviceWorld

    return DeviceWorld(size)


@hookimpl
def nibs_conformance_deviations(backend: str) -> Iterator[Any]:
    """What a ring of one program cannot be asked."""
    if backend != "jax":
        return
    from nibs_conformance.hookspecs import Deviation
    from nibs_jax.world import NotOneProgram

    one = "the ranks of a shard_map are one program: they cannot disagree, nor drop out, and make no exchange"
    for test in ("ranks_that_disagree*", "a_rank_with_invalid_input*"):
        yield Deviation(f"test_ring.py::test_{test}", "never", one, NotOneProgram)
    sums = "shard_map sums the gradients of what is replicated by itself, so that 'none' is all there is"
    for test in ("mean_undoes*", "sum_undoes*"):
        yield Deviation(f"test_ring.py::test_{test}", "never", sums, AssertionError)
