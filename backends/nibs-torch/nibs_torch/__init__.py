"""The PyTorch backend of nibs. Imports torch only when a name is asked for: plugins must stay light."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nibs_torch.modules import ContrastiveLoss
    from nibs_torch.ring import Ring

__all__ = ["ContrastiveLoss", "Ring"]


def __getattr__(name: str) -> Any:
    if name == "ContrastiveLoss":
        from nibs_torch.modules import ContrastiveLoss

        return ContrastiveLoss
    if name == "Ring":
        from nibs_torch.ring import Ring

        return Ring
    raise AttributeError(f"module 'nibs_torch' has no attribute {name!r}")
