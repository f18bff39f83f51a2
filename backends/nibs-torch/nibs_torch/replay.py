"""What a decoupled step puts back, so that encoding twice is encoding once: random states, buffers, gradients.

    random states   as they stood before a micro-batch, set again before it is encoded the second time: the same dropout
    buffers         every micro-batch starts from what one forward over the whole batch would have started from
    gradients       `.grad` as it was, if the step does not come to its end; a copy only where there was one

Generators of a caller's own (`torch.Generator`, `numpy.random.Generator`) are not seen here: an encoder that draws from
one gives other embeddings the second time, which the step notices and refuses.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Buffers", "KeptGradients", "RandomState"]


class RandomState:
    """Where the generators stand that an encoder may draw from: PyTorch's, the device's, Python's and NumPy's own."""

    __slots__ = ("device", "numpy", "on_device", "python", "torch")

    def __init__(self, device: torch.device, before: RandomState | None = None) -> None:
        """Take it now. before: an earlier one, whose parts are shared where they are the same."""
        self.device = device
        self.torch = torch.get_rng_state()
        self.on_device = _of_device(device, "get_rng_state")
        self.python = random.getstate()
        if before is not None and self.python == before.python:
            self.python = before.python
        numpy = sys.modules.get("numpy.random")
        self.numpy = None if numpy is None else numpy.get_state(legacy=False)

    def restore(self) -> None:
        """Set all of them back."""
        torch.set_rng_state(self.torch)
        if self.on_device is not None:
            _of_device(self.device, "set_rng_state", self.on_device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy.random"].set_state(self.numpy)


def _of_device(device: torch.device, name: str, *state: Tensor) -> Any:
    """`torch.cuda.get_rng_state(device)` and the like, for whatever accelerator; None on a CPU."""
    if device.type == "cpu":
        return None
    module = getattr(torch, device.type)
    call: Callable[..., Any] = getattr(module, name)
    return call(*state) if device.type == "mps" else call(*state, device)


class Buffers:
    """The buffers of some modules, as they stand when this is made, to be set back as often as needed.

    All of them every time: batch normalisation writes to its own without a trace in the tensor's version.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for module in modules:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self.kept.append((module, name, buffer, buffer.detach().clone()))

    def reset(self, *, but: Callable[[nn.Module, Tensor], bool] | None = None) -> None:
        """Set them back. but: those that are left as they are."""
        for module, name, buffer, copy in self.kept:
            if but is not None and but(module, buffer):
                continue
            module._buffers[name] = buffer
            with torch.no_grad():
                buffer.copy_(copy)


class KeptGradients:
    """`.grad` of some parameters as it is now, to be put back if the step fails."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}

    def keep(self, parameters: Iterable[Tensor]) -> None:
        """Remember these too, those that are known already as they were first."""
        for parameter in parameters:
            if id(parameter) not in self.kept:
                held = parameter.grad
                self.kept[id(parameter)] = (parameter, held, None if held is None else held.detach().clone())

    def restore(self) -> None:
        """Put every `.grad` back: the same tensor with the same values, or None."""
        with torch.no_grad():
            for parameter, held, copy in self.kept.values():
                if held is not None and copy is not None:
                    held.copy_(copy)
                parameter.grad = held
        self.forget()

    def forget(self) -> None:
        """The step has come to its end."""
        self.kept = {}
