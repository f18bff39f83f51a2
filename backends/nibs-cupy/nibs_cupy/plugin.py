"""What the CuPy backend declares. Nothing is imported here but nibs: this runs whenever nibs looks around.

NIBS_CUPY_DEVICE says where the kernels run: `cuda` (the default) on CuPy's arrays, `host` on NumPy's, by the host
runner. Neither stands in for the other in silence: a GPU that is missed is missed aloud.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nibs import BackendInfo, Capabilities, hookimpl

if TYPE_CHECKING:
    from nibs.spec import Backend

VARIABLE = "NIBS_CUPY_DEVICE"
INSTALL = {
    "cuda": "pip install 'nibs-cupy[cuda13]'",
    "host": "apt-get install g++ (or name your C++ compiler by CXX)",
}
ARRAYS = {"cuda": ("cupy.ndarray",), "host": ("numpy.ndarray", "numpy.generic", "cupy.ndarray")}
KINDS = {"cuda": {"cuda"}, "host": {"cpu"}}
ELSEWHERE = {
    "cuda": f"{VARIABLE}=host, set before nibs looks for backends, runs its kernels on the CPU, for tests",
    "host": f"{VARIABLE}=cuda, set before nibs looks for backends, runs its kernels on the GPU",
}
COMMUNICATORS = ("cupy_backends.cuda.libs.nccl.NcclCommunicator", "cupyx.distributed._nccl_comm.NCCLBackend")


def capabilities(where: str) -> Capabilities:
    """What the kernels serve, there."""
    return Capabilities(
        devices=frozenset(KINDS.get(where, {"cuda", "cpu"})),  # an unknown name gets as far as `load`, which says so
        dtypes=frozenset({"float64", "float32", "bfloat16", "float16"}),
        objectives=frozenset({"InfoNCE", "Sigmoid"}),
        features=frozenset(
            {
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
                "uneven_shards",
                "weights",
            }
        ),
        collectives=frozenset({"nibs.ring.Ring", *(COMMUNICATORS if where == "cuda" else ())}),
        elsewhere=ELSEWHERE.get(where, ""),
    )


@hookimpl
def nibs_backends() -> Iterator[BackendInfo]:
    """One backend: `cupy`, on the device that NIBS_CUPY_DEVICE names."""
    where = os.environ.get(VARIABLE) or "cuda"

    def load() -> Backend:
        """Import CuPy, or build the kernels for the host, on first use."""
        from nibs_cupy.backend import CupyBackend

        return CupyBackend(where)

    yield BackendInfo(
        name="cupy",
        arrays=ARRAYS.get(where, ()),
        capabilities=capabilities(where),
        load=load,
        install=INSTALL.get(where, f"{VARIABLE}=cuda or {VARIABLE}=host"),
    )


@hookimpl(optionalhook=True)
def nibs_conformance_memory(backend: str, device: str) -> Any:
    """On a GPU the process does not see its memory; CuPy's pool does."""
    if backend != "cupy" or not device.startswith("cuda"):
        return None
    from nibs_cupy.meter import peak

    return peak


@hookimpl(optionalhook=True)
def nibs_conformance_world(backend: str, size: int) -> Any:
    """Ranks as threads, on the CPU or over the GPUs, or over NCCL: as NIBS_CUPY_WORLD says."""
    if backend != "cupy":
        return None
    from nibs_cupy.world import world

    return world(size, os.environ.get(VARIABLE) or "cuda")
