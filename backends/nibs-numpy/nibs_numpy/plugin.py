"""What the NumPy backend declares. Nothing is imported here but nibs: this runs whenever nibs looks around."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nibs import BackendInfo, Capabilities, hookimpl

if TYPE_CHECKING:
    from nibs.spec import Backend

CAPABILITIES = Capabilities(
    devices=frozenset({"cpu"}),
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
            "streaming",
            "targets",
            "uneven_shards",
            "weights",
        }
    ),
    collectives=frozenset({"nibs.ring.Ring"}),
)


def load() -> Backend:
    """Import NumPy and the backend, on first use."""
    from nibs_numpy.backend import NumpyBackend

    return NumpyBackend()


@hookimpl
def nibs_backends() -> Iterator[BackendInfo]:
    """One backend: `numpy`."""
    yield BackendInfo(
        name="numpy",
        arrays=("numpy.ndarray", "numpy.generic"),
        capabilities=CAPABILITIES,
        load=load,
        install="pip install nibs-numpy",
    )
