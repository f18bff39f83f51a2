"""The JAX backend of nibs: a traced schedule of its own, so that loss and gradients live inside jit."""

from importlib import import_module
from typing import Any

__all__ = ["decoupled_step", "kernels"]

HOMES = {"decoupled_step": "nibs_jax.decoupled", "kernels": "nibs_jax.foreign"}


def __getattr__(name: str) -> Any:
    if name in HOMES:  # JAX is imported when it is asked for, not when plugins are read
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'nibs_jax' has no attribute {name!r}")
