"""The JAX backend of nibs: a traced schedule of its own, so that loss and gradients live inside jit."""

from typing import Any

__all__ = ["kernels"]


def __getattr__(name: str) -> Any:
    if name == "kernels":  # JAX is imported when it is asked for, not when plugins are read
        from nibs_jax.foreign import kernels

        return kernels
    raise AttributeError(f"module 'nibs_jax' has no attribute {name!r}")
