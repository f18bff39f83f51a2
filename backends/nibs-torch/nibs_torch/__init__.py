"""The PyTorch backend of nibs. Imports torch only when a name is asked for: plugins must stay light."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nibs_torch.decoupled import DecoupledStep
    from nibs_torch.microbatches import TokenBudget
    from nibs_torch.modules import ContrastiveLoss
    from nibs_torch.ring import Ring

__all__ = ["ContrastiveLoss", "DecoupledStep", "Ring", "TokenBudget"]

HOMES = {"ContrastiveLoss": "modules", "DecoupledStep": "decoupled", "Ring": "ring", "TokenBudget": "microbatches"}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"nibs_torch.{HOMES[name]}"), name)
    raise AttributeError(f"module 'nibs_torch' has no attribute {name!r}")
