"""The CuPy backend of nibs: raw CUDA kernels, which the host runner also executes on a CPU."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nibs_cupy.ring import Ring

__all__ = ["Ring"]


def __getattr__(name: str) -> Any:
    """`Ring`, when it is asked for: plugins must stay light."""
    if name == "Ring":
        from nibs_cupy.ring import Ring

        return Ring
    raise AttributeError(f"module 'nibs_cupy' has no attribute {name!r}")
