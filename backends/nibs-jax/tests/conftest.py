"""Eight host devices for every test of this folder.

Devices must be forced before JAX first looks for them, and this runs when tests are collected. Where somebody
was faster, tests that need a mesh are skipped, and say so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

DEVICES = 8

sys.path.append(str(Path(__file__).parent))  # `jax_checks`: pytest's importlib mode adds no folder

with suppress(RuntimeError):  # where JAX is up already, `mesh` below says how many devices there are
    jax.config.update("jax_num_cpu_devices", DEVICES)


@pytest.fixture
def mesh() -> Callable[..., Any]:
    """`mesh(4)`, or `mesh(2, 3)` with axes "data" and "model"."""

    def make(*sizes: int, names: tuple[str, ...] = ("data", "model")) -> Any:
        if len(jax.devices()) < int(np.prod(sizes)):
            pytest.skip(f"JAX was up before these tests, with {len(jax.devices())} devices")
        kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
        devices = jax.devices()[: int(np.prod(sizes))]
        return jax.make_mesh(sizes, names[: len(sizes)], axis_types=kinds, devices=devices)

    return make
