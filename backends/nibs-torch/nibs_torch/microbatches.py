"""How a batch is cut into micro-batches, and where they come from the second time.

    a tensor, a tuple or a dict of tensors     cut by rows: `micro_batch` of them, or as many as a `TokenBudget` holds
    anything else that can be iterated         yields micro-batches ready made; never in memory as a whole

What is iterated is needed twice. It is asked again (a list, a DataLoader, an object whose `__iter__` starts anew), with
random states set back before each item, so that shuffling and augmentation repeat; or its items are kept in host
memory, pinned where that helps, for sources that can be walked only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nibs.errors import InvalidInput

__all__ = ["Cut", "Item", "Source", "TokenBudget", "Walked", "emptied", "mapped", "moved", "tensors"]


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """Micro-batches of texts of similar length: as many rows as `rows * longest <= tokens`, and a row at least.

    tokens: of one micro-batch, padding counted. mask: the name (or, in a tuple, the position) of the `[n, length]` mask
    that is nonzero where there is a token; padding on the right is cut off every tensor `[n, length, ...]`. rows: at
    most so many, or None.

    Source: the usual way to batch texts; rows are put back in their own order before the loss sees them.
    """

    tokens: int
    mask: str | int = "attention_mask"
    rows: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("rows", 1 if self.rows is None else self.rows)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInput(f"TokenBudget({name}={value!r}): expected a positive integer.")


@dataclass(frozen=True, slots=True)
class Item:
    """One micro-batch. rows: which of the batch they are, a slice or indices; None where they just follow."""

    inputs: Any
    rows: slice | Tensor | None = None


class Source(Protocol):
    """Where the micro-batches of one side (or of both, in pairs) come from."""

    total: int | None
    """Rows of the batch, or None where that shows only at the end."""

    def count(self) -> int | None:
        """Micro-batches, or None where that shows only at the end."""
        ...

    def walk(self) -> Iterator[Item]:
        """All of them, in the same order each time."""
        ...


class Cut:
    """A batch in one piece. Cutting copies nothing but what indices pick."""

    def __init__(self, side: str, inputs: Any, size: int | TokenBudget) -> None:
        self.inputs = inputs
        held = list(tensors(inputs))
        if not held:
            raise InvalidInput(f"{side}: no tensor among the inputs: nothing to cut into micro-batches.")
        sizes = {tuple(one.shape[:1]) for one in held}
        if len(sizes) != 1 or () in sizes:
            shapes = ", ".join(str(tuple(one.shape)) for one in held)
            raise InvalidInput(f"{side}: tensors of shapes {shapes}: expected one number of rows in all of them.")
        self.total: int | None = int(held[0].shape[0])
        self.parts: list[slice | Tensor]
        self.longest: list[int] = []
        self.width = 0
        if isinstance(size, TokenBudget):
            self._by_tokens(side, size)
        else:
            self.parts = [slice(begin, min(begin + size, self.total)) for begin in range(0, self.total, size)]
        if not self.parts:
            self.parts = [slice(0, 0)]  # an empty batch is one empty micro-batch

    def count(self) -> int | None:
        return len(self.parts)

    def walk(self) -> Iterator[Item]:
        for number, rows in enumerate(self.parts):
            part = mapped(
                self.inputs,
                lambda tensor, rows=rows: tensor[rows.to(tensor.device) if isinstance(rows, Tensor) else rows],
            )
            if self.longest:
                part = mapped(part, lambda tensor, longest=self.longest[number]: self._trimmed(tensor, longest))
            yield Item(part, rows)

    def _by_tokens(self, side: str, budget: TokenBudget) -> None:
        try:
            mask = self.inputs[budget.mask]
        except (KeyError, IndexError, TypeError):
            mask = None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise InvalidInput(
                f"{side}: TokenBudget(mask={budget.mask!r}) names no mask [n, length] among the inputs: expected a "
                "dict with that name, or a tuple and a position in it."
            )
        self.width = mask.shape[1]
        places = torch.arange(1, self.width + 1, device=mask.device)
        lengths = ((mask != 0) * places).amax(1).clamp(min=1).cpu() if mask.numel() else torch.ones(len(mask)).long()
        order = torch.argsort(lengths, stable=True)
        self.parts, begin = [], 0
        ordered = lengths[order].tolist()
        for end, length in enumerate(ordered):
            rows = end - begin + 1
            if rows > 1 and (rows * length > budget.tokens or (budget.rows is not None and rows > budget.rows)):
                self._part(order[begin:end], ordered[end - 1])
                begin = end
        if len(order):
            self._part(order[begin:], ordered[-1])

    def _part(self, rows: Tensor, longest: int) -> None:
        self.parts.append(rows)
        self.longest.append(longest)

    def _trimmed(self, tensor: Tensor, longest: int) -> Tensor:
        return tensor[:, :longest] if tensor.ndim >= 2 and tensor.shape[1] == self.width else tensor


class Walked:
    """Micro-batches from an iterable. keep: its items are held in host memory between the passes, not asked again."""

    def __init__(self, side: str, source: Iterable[Any], *, keep: bool, pin: bool) -> None:
        self.side, self.source, self.keep, self.pin = side, source, keep, pin
        self.total: int | None = None
        self.kept: list[Any] | None = None
        self.seen: int | None = None
        if not keep and isinstance(source, Iterator):
            raise InvalidInput(
                f"{side}: a {type(source).__name__} can be walked once, and a step walks its inputs twice: pass "
                "inputs='keep' to hold its micro-batches in host memory, or something that starts anew when iterated."
            )

    def count(self) -> int | None:
        try:
            return len(self.source)  # type: ignore[arg-type]
        except TypeError:
            return self.seen

    def walk(self) -> Iterator[Item]:
        if self.kept is not None:
            yield from map(Item, self.kept)
            return
        kept: list[Any] = []
        number = 0
        for inputs in self.source:
            number += 1
            if self.keep:
                inputs = mapped(inputs, self._to_host)
                kept.append(inputs)
            yield Item(inputs)
        if self.seen is not None and number != self.seen:
            raise InvalidInput(
                f"{self.side}: {self.seen} micro-batches the first time and {number} the second: expected the same "
                "ones again. Pass inputs='keep' for a source that does not repeat itself."
            )
        self.seen = number
        if self.keep:
            self.kept = kept

    def _to_host(self, tensor: Tensor) -> Tensor:
        host = tensor.cpu()
        return host.pin_memory() if self.pin and not host.is_pinned() else host


def whole(inputs: Any) -> bool:
    """Whether these are a batch in one piece, and not an iterable of micro-batches."""
    return isinstance(inputs, (Tensor, tuple, Mapping)) or type(inputs).__module__ == "numpy"


def tensors(inputs: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists and dicts of them; NumPy arrays count."""
    if _is_array(inputs):
        yield inputs
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from tensors(value)
    elif isinstance(inputs, (tuple, list)):
        for value in inputs:
            yield from tensors(value)


def mapped(inputs: Any, function: Callable[[Any], Any]) -> Any:
    """The same with every tensor put through `function`."""
    if _is_array(inputs):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: mapped(value, function) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        values = [mapped(value, function) for value in inputs]
        if hasattr(inputs, "_fields"):
            return type(inputs)(*values)
        return tuple(values) if isinstance(inputs, tuple) else values
    return inputs


def moved(inputs: Any, device: torch.device) -> Any:
    """The same on the device; copies from pinned memory do not wait."""

    def move(value: Any) -> Any:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)  # a copy: it may be mapped, or read-only
        return tensor if tensor.device == device else tensor.to(device, non_blocking=True)

    return mapped(inputs, move)


def emptied(inputs: Any) -> Any:
    """The same without a row."""
    return mapped(inputs, lambda tensor: tensor[:0])


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        type(value).__module__ == "numpy" and hasattr(value, "shape") and value.ndim > 0
    )


def sizes(micro_batch: Any) -> tuple[int | TokenBudget, int | TokenBudget]:
    """Of queries and of keys, from one for both or a pair."""
    pair: Sequence[Any] = micro_batch if isinstance(micro_batch, tuple) else (micro_batch, micro_batch)
    if len(pair) == 2 and all(
        isinstance(one, TokenBudget) or (isinstance(one, int) and not isinstance(one, bool) and one > 0) for one in pair
    ):
        return pair[0], pair[1]
    raise InvalidInput(
        f"micro_batch={micro_batch!r}: expected a positive number of rows, a TokenBudget(...), or a pair of these for "
        "queries and keys."
    )
