"""What the conformance suite needs of JAX before it starts: 64 bits, quick compilations, and an end to what they hold.

The suite makes thousands of programs and runs each once, so XLA is told not to optimise them: a sixth of the time
where fusions may be emitted the old way, half of it elsewhere. The arithmetic stays XLA's; optimised programs are
what this backend's own tests run. `XLA_FLAGS`, empty too, overrules this, and where a GPU's plugin is installed
nothing is set. A compiled program holds memory maps, of which a process has 65,530: after `KEPT` programs they go.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import Any

import jax

from nibs.registry import registry

__all__ = ["prepare"]

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
UNTIL_0_11 = " --xla_cpu_use_fusion_emitters=false"  # later ones know no such flag, and end the process over it
KEPT = 400


def prepare() -> None:
    """Set JAX up for the suite, in this process and those that it starts; once."""
    jax.config.update("jax_enable_x64", True)
    if "XLA_FLAGS" not in os.environ and not entry_points(group="jax_plugins"):
        os.environ["XLA_FLAGS"] = QUICK + (UNTIL_0_11 if jax.__version_info__ < (0, 11) else "")
    backend = registry.load("jax")
    if isinstance(backend.__dict__.get("asarray"), Sweep):
        return
    backend.asarray = Sweep(backend.asarray)  # type: ignore[method-assign]


class Sweep:
    """`asarray`, where nothing is being traced, which lets go of compiled programs when there are many."""

    def __init__(self, asarray: Any) -> None:
        self.asarray, self.programs = asarray, 0
        jax.monitoring.register_event_duration_secs_listener(self.count)

    def count(self, event: str, seconds: float, **_: Any) -> None:
        self.programs += event.endswith("backend_compile_duration")

    def __call__(self, *given: Any, **options: Any) -> Any:
        if self.programs > KEPT:
            jax.clear_caches()
            self.programs = 0
        return self.asarray(*given, **options)
