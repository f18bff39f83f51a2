"""nibs: contrastive losses without the memory wall. The public names, and no logic.

    loss = nibs.contrastive_loss(queries, keys, scale=scale)
    loss, grads = nibs.contrastive_loss_and_grad(queries, keys, scale=scale)

Backends are plugins; none is imported until a call needs it.
"""

from nibs import errors
from nibs.capabilities import BackendInfo, Capabilities
from nibs.dispatch import contrastive_loss, contrastive_loss_and_grad, use_backend
from nibs.hookspecs import hookimpl
from nibs.losses import clip, ntxent, siglip, supcon
from nibs.plan import Plan, plan
from nibs.registry import Status, backends
from nibs.spec import Gradients, InfoNCE, Sigmoid, Stats

__version__ = "0.1.0"

__all__ = [
    "BackendInfo",
    "Capabilities",
    "Gradients",
    "InfoNCE",
    "Plan",
    "Sigmoid",
    "Stats",
    "Status",
    "__version__",
    "backends",
    "clip",
    "contrastive_loss",
    "contrastive_loss_and_grad",
    "errors",
    "hookimpl",
    "ntxent",
    "plan",
    "siglip",
    "supcon",
    "use_backend",
]
