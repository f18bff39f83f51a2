"""Four losses by the names people know, each resolved to `contrastive_loss`. Nothing is normalised."""

from __future__ import annotations

from typing import Any

from nibs.arrays import describe, device_name, dtype_name, is_array
from nibs.dispatch import contrastive_loss
from nibs.errors import InvalidInput
from nibs.registry import registry
from nibs.spec import InfoNCE, Sigmoid

__all__ = ["clip", "ntxent", "siglip", "supcon"]


def clip(image_features: Any, text_features: Any, *, scale: Any, **options: Any) -> Any:
    """CLIP's symmetric InfoNCE of paired rows `[n, d]`. Normalises nothing: pass normalised rows for CLIP's own.

    scale: CLIP's `logit_scale.exp()`, a float or a one-element array. options and errors: `contrastive_loss`.
    Source: arXiv 2103.00020.
    """
    _free("clip", options, "objective")
    return contrastive_loss(image_features, text_features, scale=scale, objective=InfoNCE(), **options)


def siglip(image_features: Any, text_features: Any, *, scale: Any, bias: Any = 0.0, **options: Any) -> Any:
    """SigLIP's pairwise sigmoid loss of paired rows `[n, d]`. Normalises nothing.

    scale, bias: SigLIP's `exp(t')` and `b`. options and errors: `contrastive_loss`.
    Source: arXiv 2303.15343.
    """
    _free("siglip", options, "objective")
    return contrastive_loss(image_features, text_features, scale=scale, bias=bias, objective=Sigmoid(), **options)


def ntxent(z1: Any, z2: Any, *, scale: Any, **options: Any) -> Any:
    """SimCLR's NT-Xent of two views `[n, d]`: each of the 2n rows against all others. Normalises nothing.

    scale: the inverse of NT-Xent's temperature. options and errors: `contrastive_loss`; weights `[2n]`.
    Source: arXiv 2002.05709.
    """
    _free("ntxent", options, "objective", "targets")
    for name, view in (("z1", z1), ("z2", z2)):
        if not is_array(view) or len(view.shape) != 2 or tuple(view.shape) != tuple(z1.shape):
            raise InvalidInput(f"{name} is {describe(view)}: expected two views of one shape [n, d].")
    rows, targets = _two_views(z1, z2)
    objective = InfoNCE(direction="query_to_key", exclude_self=True)
    return contrastive_loss(rows, rows, scale=scale, objective=objective, targets=targets, **options)


def supcon(z: Any, labels: Any, *, scale: Any, **options: Any) -> Any:
    """The supervised contrastive loss (L_out) of rows `z [n, d]` with integer `labels [n]`. Normalises nothing.

    scale: the inverse of the temperature. options and errors: `contrastive_loss`.
    Source: arXiv 2004.11362.
    """
    _free("supcon", options, "objective", "query_ids", "key_ids")
    objective = InfoNCE(direction="query_to_key", same_id="positive", exclude_self=True)
    return contrastive_loss(z, z, scale=scale, objective=objective, query_ids=labels, key_ids=labels, **options)


def _free(name: str, options: dict[str, Any], *fixed: str) -> None:
    """Raise InvalidInput for an option that the loss of this name decides itself."""
    for option in fixed:
        if option in options:
            raise InvalidInput(f"{name}({option}=...): nibs.{name} fixes it. Use nibs.contrastive_loss for another.")


def _two_views(z1: Any, z2: Any) -> tuple[Any, Any]:
    """Both views as one set of rows, and where each row's other view is."""
    from nibs.tracing import tracer_of  # here, as in contrastive_loss

    tracer = tracer_of(z1)
    if tracer is not None:
        return tracer.two_views(z1, z2)
    owner = registry.owner(z1)
    if owner is None:
        raise InvalidInput(f"z1 is {describe(z1)}: expected a [n, d] array. Here: {registry.listing()}.")
    backend = registry.load(owner)
    alike = dtype_name(z1) == dtype_name(z2) or backend.promotes()
    if registry.owner(z2) != owner or not alike or device_name(z1) != device_name(z2):
        raise InvalidInput(
            f"z2 is {describe(z2)} while z1 is {describe(z1)}: expected two views of one framework, dtype and device."
        )
    return backend.two_views(z1, z2)
