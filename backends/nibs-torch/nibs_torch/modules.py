"""The loss as a module: options fixed once, called in a training loop.

    loss_function = nibs_torch.ContrastiveLoss(nibs.InfoNCE(label_smoothing=0.1))
    loss = loss_function(image_features, text_features, logit_scale.exp())

Also called by open_clip's keywords, so that it takes the place of its ClipLoss and SigLipLoss as it stands.
Nothing is normalised and nothing is learnt here: scale and bias belong to the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nibs
from nibs.dispatch import NAMES
from nibs.errors import InvalidInput
from nibs.request import GRAD_REDUCTIONS, check_objective
from nibs.spec import InfoNCE, Objective

__all__ = ["ContrastiveLoss"]


class ContrastiveLoss(nn.Module):
    """`nibs.contrastive_loss` with its options fixed. Nothing is normalised.

    objective: `nibs.InfoNCE(...)` or `nibs.Sigmoid(...)`.
    ring: the ranks that share the batch: a ProcessGroup, a DeviceMesh of one dimension, or `nibs_torch.Ring`.
    grad_reduction: what the wrapper of the encoders does to their gradients over the ranks. DDP and FSDP
        average, so `"mean"`; without a ring it changes nothing.
    options: any other option of `nibs.contrastive_loss`; those given in a call go before them.

    Raises InvalidInput for an option that does not exist, and what `nibs.contrastive_loss` raises.
    """

    def __init__(
        self,
        objective: Objective = InfoNCE(),
        *,
        ring: Any = None,
        grad_reduction: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(options.keys() - NAMES)
        if unknown:
            raise InvalidInput(f"ContrastiveLoss({unknown[0]}=): no such option. Options: {', '.join(sorted(NAMES))}.")
        check_objective(objective)
        if grad_reduction not in GRAD_REDUCTIONS:
            expected = ", ".join(map(repr, GRAD_REDUCTIONS))
            raise InvalidInput(f"ContrastiveLoss(grad_reduction={grad_reduction!r}): expected one of {expected}.")
        self.objective = objective
        self.grad_reduction = grad_reduction
        self.ring = _ring(ring)
        # A ring is no tensor and no number: compiled code knows it by its name.
        self._ring_key = getattr(self.ring, "key", None)
        self.options = options

    def forward(
        self,
        queries: Tensor | None = None,
        keys: Tensor | None = None,
        scale: Any = None,
        bias: Any = None,
        *,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        logit_scale: Any = None,
        logit_bias: Any = None,
        output_dict: bool = False,
        **per_call: Any,
    ) -> Any:
        """The loss of queries `[n, d]` against keys `[m, d]`, 0-d (or `[n]` with `reduction="none"`).

        scale, bias: floats, or tensors of shape [] or [1]; left out, they are 1 and 0. per_call: options for
        this call alone, such as `targets=`. image_features, text_features, logit_scale, logit_bias: open_clip's
        names for the first four; logit_scale is what its models return, already exponentiated. output_dict:
        return `{"contrastive_loss": loss}`.

        With `stats=True` returns `(loss, Stats)`; in the dictionary, under `"stats"`.
        """
        queries = _either("queries", queries, "image_features", image_features)
        keys = _either("keys", keys, "text_features", text_features)
        scale = _either("scale", scale, "logit_scale", logit_scale, required=False)
        bias = _either("bias", bias, "logit_bias", logit_bias, required=False)
        options = {"objective": self.objective, "grad_reduction": self.grad_reduction, **self.options}
        if self.ring is not None:
            named = torch.compiler.is_compiling() and self._ring_key is not None
            options["ring"] = self._ring_key if named else self.ring
        if scale is not None:
            options["scale"] = scale
        if bias is not None:
            options["bias"] = bias
        options.update(per_call)
        result = nibs.contrastive_loss(queries, keys, **options)
        if not output_dict:
            return result
        if isinstance(result, tuple):
            return {"contrastive_loss": result[0], "stats": result[1]}
        return {"contrastive_loss": result}

    def extra_repr(self) -> str:
        """What was fixed, as it would be typed."""
        words = [repr(self.objective)]
        if self.ring is not None:
            words.append(f"ring={type(self.ring).__name__} of {getattr(self.ring, 'size', '?')}")
            words.append(f"grad_reduction={self.grad_reduction!r}")
        words += [f"{name}={_short(value)}" for name, value in self.options.items()]
        return ", ".join(words)


def _ring(handle: Any) -> Any:
    """A ring of the handle, made once: compiled code can name a ring, but no process group."""
    if handle is None or isinstance(handle, nibs.ring.Ring):
        return handle
    from nibs_torch.ring import as_ring

    return as_ring(handle)


def _either(name: str, value: Any, other: str, same: Any, *, required: bool = True) -> Any:
    """The one argument of two names."""
    if value is not None and same is not None:
        raise InvalidInput(f"{name}= and {other}= are both given, and are the same argument: pass one of them.")
    if required and value is None and same is None:
        raise InvalidInput(f"{name} is missing: pass {name}=, or {other}= as open_clip does.")
    return same if value is None else value


def _short(value: Any) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
