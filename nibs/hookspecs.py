"""The hooks that a plugin may implement; pluggy project name and entry-point group: `nibs`.

    from nibs import BackendInfo, Capabilities, hookimpl

    @hookimpl
    def nibs_backends():
        yield BackendInfo(
            name="abacus",
            arrays=("numpy.ndarray",),
            capabilities=Capabilities(devices={"cpu"}, dtypes={"float32"}, objectives={"InfoNCE"}),
            load=lambda: __import__("nibs_abacus.backend", fromlist=["Backend"]).Backend(),
            install="pip install nibs-abacus",
        )

and in its pyproject.toml

    [project.entry-points.nibs]
    abacus = "nibs_abacus.plugin"

The conformance suite adds hooks of its own, for backends that bring rings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from nibs.capabilities import BackendInfo
    from nibs.request import Request

__all__ = ["hookimpl", "hookspec", "nibs_backends", "nibs_select"]

hookspec = pluggy.HookspecMarker("nibs")
hookimpl = pluggy.HookimplMarker("nibs")


@hookspec
def nibs_backends() -> Iterable[BackendInfo]:  # type: ignore[empty-body]
    """Declare backends. Import nothing heavy: this runs when nibs first looks around."""


@hookspec(firstresult=True)
def nibs_select(request: Request, candidates: Sequence[BackendInfo]) -> str | None:
    """Choose among the backends that can serve `request`, for `backend="fastest"`.

    `candidates` holds at least one; answer one of their names, or None to leave it to others.
    """
