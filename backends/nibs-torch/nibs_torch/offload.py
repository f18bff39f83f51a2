"""Embeddings of the whole batch, gathered from micro-batches: on the device, or in host memory.

In host memory they are pinned where there is an accelerator, so that copies run behind its work; on a CPU both are the
same. What is gathered is a copy: an encoder may give the same memory again and again, as sharded and compiled ones do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nibs.errors import InvalidInput
from nibs_torch.microbatches import Item

__all__ = ["Pool"]


class Pool:
    """One output of an encoder, `[rows, ...]`, for all rows of the batch.

    total: rows of the batch, or None where that shows only at the end (then it is put together once more). host: gather
    in host memory.
    """

    def __init__(self, name: str, total: int | None, *, host: bool) -> None:
        self.name, self.total, self.host = name, total, host
        self.parts: list[Tensor] = []
        self.rows: list[slice | Tensor] = []
        self.gathered: Tensor | None = None
        self.kind: tuple[torch.Size, torch.dtype] | None = None
        self.filled = 0

    def add(self, part: Tensor, item: Item) -> None:
        """The next micro-batch's rows."""
        rows: slice | Tensor = slice(self.filled, self.filled + len(part)) if item.rows is None else item.rows
        self.filled += len(part)
        kind = part.shape[1:], part.dtype
        self.kind = self.kind or kind
        if kind != self.kind:
            shape, dtype = self.kind
            raise InvalidInput(
                f"{self.name}: micro-batches of {_rows(*kind)} and of {_rows(shape, dtype)}: expected one width and "
                "one dtype."
            )
        if self.total is None:
            self.parts.append(self._room(len(part), part).copy_(part, non_blocking=True))
        else:
            if self.gathered is None:
                self.gathered = self._room(self.total, part)
            if isinstance(rows, slice):
                self.gathered[rows].copy_(part, non_blocking=True)
            else:
                self.gathered[rows.to(self.gathered.device)] = part.to(self.gathered.device)
        self.rows.append(rows)

    def whole(self) -> Tensor:
        """`[total, ...]`, ready to be read."""
        if self.gathered is None:
            first = self.parts[0]
            self.gathered = self._room(self.filled, first)
            for part, rows in zip(self.parts, self.rows, strict=True):
                self.gathered[rows].copy_(part)
            self.parts = []
        return self.gathered

    def part(self, number: int, of: Tensor, device: torch.device) -> Tensor:
        """The rows of micro-batch `number` out of `of` `[total, ...]`, on the device."""
        rows = self.rows[number]
        found = of[rows] if isinstance(rows, slice) else of[rows.to(of.device)]
        return found.to(device, non_blocking=True)

    def _room(self, rows: int, like: Tensor) -> Tensor:
        shape, there = (rows, *like.shape[1:]), like.device.type
        if not self.host:
            return like.new_empty(shape)
        # What is put together once more stays pinned.
        return torch.empty(
            shape, dtype=like.dtype, pin_memory=like.is_pinned() if there == "cpu" else there in ("cuda", "xpu")
        )


def _rows(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"[{', '.join(map(str, ('rows', *shape)))}] in {dtype}"
