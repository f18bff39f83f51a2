"""What the PyTorch backend declares. Nothing is imported here but nibs: this runs whenever nibs looks around."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nibs import BackendInfo, Capabilities, hookimpl

if TYPE_CHECKING:
    from nibs.spec import Backend

CAPABILITIES = Capabilities(
    devices=frozenset({"cpu", "cuda", "mps", "xpu"}),
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
            "streaming",
            "targets",
            "traced",
            "uneven_shards",
            "weights",
        }
    ),
    collectives=frozenset(
        {
            "nibs.ring.Ring",
            "torch.distributed.device_mesh.DeviceMesh",
            "torch.distributed.distributed_c10d.ProcessGroup",  # or, by version:
            "torch._C._distributed_c10d.ProcessGroup",
        }
    ),
)

# Imported once, before the suite's ranks are forked off; the last is what autograd looks for when it is first used.
PRELOAD = ("torch", "torch.distributed", "nibs_torch.backend", "torch._dynamo")


def load() -> Backend:
    """Import PyTorch and the backend, on first use."""
    from nibs_torch.backend import TorchBackend

    return TorchBackend()


@hookimpl
def nibs_backends() -> Iterator[BackendInfo]:
    """One backend: `torch`."""
    yield BackendInfo(
        name="torch",
        arrays=("torch.Tensor",),
        capabilities=CAPABILITIES,
        load=load,
        install="pip install nibs-torch",
    )


@hookimpl
def nibs_conformance_world(backend: str, size: int) -> Any:
    """Ranks for the conformance suite: processes that meet over gloo."""
    if backend != "torch":
        return None
    from nibs_conformance.worlds import ProcessWorld

    return ProcessWorld(size, "nibs_torch.ring:open_ring", preload=PRELOAD)


@hookimpl
def nibs_conformance_memory(backend: str, device: str) -> Any:
    """On a GPU the process does not see its memory; PyTorch's allocator does."""
    if backend != "torch" or not device.startswith("cuda"):
        return None
    from nibs_torch.meter import peak

    return peak


@hookimpl
def nibs_conformance_pullback(backend: str) -> Any:
    """Autograd, as the conformance suite asks for it."""
    if backend != "torch":
        return None
    import torch

    def pullback(function: Any, inputs: Any, upstream: Any) -> Any:
        leaves = [one.detach().requires_grad_() for one in inputs]
        loss = function(*leaves)
        return loss.detach(), torch.autograd.grad(loss, leaves, upstream.reshape(loss.shape), materialize_grads=True)

    return pullback


@hookimpl
def nibs_conformance_trace(backend: str) -> Any:
    """`torch.compile`, as the conformance suite asks for it: as a whole or not at all, and without a C++ compiler."""
    if backend != "torch":
        return None
    import torch

    def trace(function: Any) -> Any:
        torch.compiler.reset()  # the suite compiles one function for many problems; a program would not
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    return trace
