"""What a backend can do, and the sentence that says why it can't.

Dispatch and the conformance suite read the same object: what is declared here is what users get,
and the suite tests every claim both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nibs.arrays import device_kind
from nibs.spec import InfoNCE

if TYPE_CHECKING:
    from nibs.request import Request
    from nibs.spec import Backend

__all__ = ["FEATURES", "BackendInfo", "Capabilities", "needs"]

FEATURES: dict[str, str] = {
    "autograd": "contrastive_loss carries gradients",
    "deterministic": "same inputs, same plan, same device: same bits",
    "exclude": "same_id='exclude'",
    "exclude_self": "exclude_self=True",
    "false_negative_margin": "false_negative_margin=",
    "label_smoothing": "label_smoothing=",
    "masks": "query_mask= and key_mask=",
    "memory": "memory= bounds the workspace",
    "multi_positive": "same_id='positive'",
    "precision": "precision='high' and 'highest'",
    "reduction_none": "reduction='none'",
    "stats": "stats=True",
    "streaming": "device= and out=: queries and keys fetched tile by tile from where they are kept",
    "targets": "targets=",
    "traced": "runs inside a traced function (jit, compile)",
    "uneven_shards": "ranks of a ring may hold shards of different sizes",
    "weights": "weights=",
}
"""Every feature a backend may claim, with what it means for the caller."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Frozen sets of what a backend serves.

    devices: kinds, such as `"cpu"`, `"cuda"`.
    dtypes: of queries and keys: `"float64"`, `"float32"`, `"bfloat16"`, `"float16"`.
    objectives: `"InfoNCE"`, `"Sigmoid"`.
    features: keys of `FEATURES`.
    collectives: full class names of the ring handles it takes; `"nibs.ring.Ring"` is the core's own.
    elsewhere: what a user types to have it run on other devices, if there is such a thing.
    """

    devices: frozenset[str] = frozenset()
    dtypes: frozenset[str] = frozenset()
    objectives: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()
    collectives: frozenset[str] = frozenset()
    elsewhere: str = ""

    def __post_init__(self) -> None:
        for name in ("devices", "dtypes", "objectives", "features", "collectives"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"Capabilities({name}={value!r}): expected a set of strings, not one string.")
            object.__setattr__(self, name, frozenset(value))
        unknown = self.features - FEATURES.keys()
        if unknown:
            raise ValueError(f"Capabilities(features=...): unknown {sorted(unknown)}; known: {sorted(FEATURES)}.")

    def why_not(self, request: Request) -> str | None:
        """The sentence that tells a user why this request cannot be served, or None when it can."""
        if request.dtype not in self.dtypes:
            return f"it takes {_list(self.dtypes)}, not {request.dtype}"
        kind = device_kind(request.device)
        if kind not in self.devices and kind not in ("sharded", "traced"):
            return f"it runs on {_list(self.devices)}, not on {kind}" + (
                f" ({self.elsewhere})" if self.elsewhere else ""
            )
        objective = type(request.objective).__name__
        if objective not in self.objectives:
            return f"it has {_list(self.objectives)}, not {objective}"
        for feature in needs(request):
            if feature not in self.features:
                return f"it lacks {FEATURES[feature]} ('{feature}')"
        if request.ring is not None and not self.takes_ring(request.ring):
            return f"it rings over {_list(self.collectives)}, not over {type(request.ring).__name__}"
        return None

    def takes_ring(self, ring: object) -> bool:
        """Whether `ring` is a handle that this backend understands."""
        names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(ring).__mro__}
        return bool(names & self.collectives)


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What a plugin declares of one backend; nothing heavy has been imported when it does.

    name: what users type, as in `backend="numpy"`.
    arrays: full class names of the arrays it owns, such as `("torch.Tensor",)`.
    capabilities: what it serves.
    load: called once, on first use; imports the framework and returns the `Backend`. It raises
        ImportError or `BackendUnavailable` when it cannot run here.
    install: the command that installs what it needs, shown to users.
    """

    name: str
    arrays: tuple[str, ...]
    capabilities: Capabilities
    load: Callable[[], Backend]
    install: str = ""

    def __post_init__(self) -> None:
        one_string = isinstance(self.arrays, str)
        if one_string or not all(isinstance(kind, str) for kind in self.arrays):
            raise TypeError(f"BackendInfo(arrays={self.arrays!r}): expected a tuple of full class names.")
        object.__setattr__(self, "arrays", tuple(self.arrays))
        if not isinstance(self.name, str) or not self.name.strip():
            raise TypeError(f"BackendInfo(name={self.name!r}): expected a name that users type.")
        if not isinstance(self.capabilities, Capabilities):
            raise TypeError(f"BackendInfo(capabilities={self.capabilities!r}): expected Capabilities(...).")
        if not callable(self.load):
            raise TypeError(f"BackendInfo(load={self.load!r}): expected a function that returns the backend.")
        if not isinstance(self.install, str):
            raise TypeError(f"BackendInfo(install={self.install!r}): expected the command that installs it.")


def needs(request: Request) -> list[str]:
    """The features that this request uses, in a fixed order."""
    objective: Any = request.objective
    found = []
    if objective.same_id == "exclude":
        found.append("exclude")
    if objective.same_id == "positive":
        found.append("multi_positive")
    if isinstance(objective, InfoNCE):
        if objective.exclude_self:
            found.append("exclude_self")
        if objective.false_negative_margin is not None:
            found.append("false_negative_margin")
        if objective.label_smoothing:
            found.append("label_smoothing")
    if request.query_mask is not None or request.key_mask is not None:
        found.append("masks")
    if request.memory is not None:
        found.append("memory")
    if request.precision != "default":
        found.append("precision")
    if request.reduction == "none":
        found.append("reduction_none")
    if request.stats:
        found.append("stats")
    if request.streams:
        found.append("streaming")
    if request.targets is not None:
        found.append("targets")
    if request.weights is not None:
        found.append("weights")
    return found


def _list(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
