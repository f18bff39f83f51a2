"""What the core's tests share: a small batch, and a registry of their own with toy backends in it.

Nothing is installed for a toy: it is a plugin object handed to a fresh registry, which takes the place of
the process's own. What pip leaves behind is the business of `tests/guests`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nibs.dispatch
import nibs.losses
import nibs.registry
from nibs import BackendInfo, Capabilities, hookimpl
from nibs_numpy import plugin as numpy_plugin
from nibs_numpy.backend import NumpyBackend


@pytest.fixture
def batch() -> SimpleNamespace:
    """Provide six queries and eight keys of four numbers."""
    rng = np.random.default_rng(7)
    return SimpleNamespace(
        queries=rng.standard_normal((6, 4)).astype(np.float32), keys=rng.standard_normal((8, 4)).astype(np.float32)
    )


class Recorder(NumpyBackend):
    """NumPy's backend, which writes down each request that it serves."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def loss_and_grad(self, request: Any) -> Any:
        self.requests.append(request)
        return super().loss_and_grad(request)


@dataclass
class Here:
    """The registry of a test, and the toys in it."""

    registry: nibs.registry.Registry
    served: dict[str, Recorder] = field(default_factory=dict)

    def add(
        self, name: str, *, distribution: str = "", backend: Any = None, select: Any = None, **declared: Any
    ) -> Any:
        """Bring in a plugin with one backend that can do all that NumPy's can, unless declared otherwise."""
        toy = self.served[name] = backend or Recorder()
        claims = {kind: getattr(numpy_plugin.CAPABILITIES, kind) for kind in Capabilities.__dataclass_fields__}
        claims |= {kind: declared.pop(kind) for kind in list(declared) if kind in claims}
        info = BackendInfo(
            **{"name": name, "arrays": (), "capabilities": Capabilities(**claims), "load": lambda: toy} | declared
        )

        class Plugin:
            @hookimpl
            def nibs_backends(self) -> list[BackendInfo]:
                return [info]

        class Chooser(Plugin):
            @hookimpl
            def nibs_select(self, request: Any, candidates: Any) -> Any:
                return select(request, candidates)

        self.registry.add((Chooser if select else Plugin)(), name, distribution or f"nibs-{name} 1.0")
        return toy


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> Here:
    """Provide a registry that finds nothing, in the place of the process's own."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    for variable in ("NIBS_PLUGINS", "NIBS_BACKEND"):
        monkeypatch.delenv(variable, raising=False)
    fresh = nibs.registry.Registry()
    for module in (nibs.registry, nibs.dispatch, nibs.losses):
        monkeypatch.setattr(module, "registry", fresh)
    return Here(fresh)


@pytest.fixture
def here(empty: Here) -> Here:
    """Provide a registry that holds the NumPy backend; toys are added by the test."""
    empty.registry.add(numpy_plugin, "numpy", "nibs-numpy 0.1.0")
    return empty


@pytest.fixture
def refusal() -> Callable[..., str]:
    """Provide a function that makes a call and returns the text of the error that it must raise."""

    def text(error: type[Exception], call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        with pytest.raises(error) as caught:
            call(*arguments, **options)
        assert type(caught.value) is error
        return str(caught.value)

    return text
