"""Rows that stay in host memory and come to the device tile by tile, copies behind compute.

    walk        fetch strip j     the device computes with j          meanwhile, on a stream of its own
                                                                      strip j + 1 goes into the other buffer

The shared schedule asks for `rows[where]` and hands that to `TorchTiles.operand`; `Fetched` stands in the place of the
rows and answers with device memory. It guesses that the strip after this one comes next, the first after the last: so
walks go. Pinned rows are copied as they lie. Others, memory-mapped files among them, pass through pinned staging on a
thread, so that reading them does not hold up the launches. Two buffers for each side take turns.

On a CPU nothing is fetched: a strip is a view, and a mapped file is read as far as it is used.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from nibs.errors import InvalidInput
from nibs.request import Request
from nibs_torch.tiles import DTYPES

__all__ = ["Fetched", "streamed"]

VECTORS = ("targets", "query_ids", "key_ids", "query_mask", "key_mask", "weights")


class Fetched:
    """Rows `[n, d]` elsewhere, as rows on the device (`nibs.verbs.Away`): slices and indices give tensors there.

    A tensor that a slice gave holds until another slice is asked for; what was launched by then still reads it. On a
    ring the rows go from host to host, and each shard that comes by is fetched in turn; what gathers for the keys
    travels beside them.
    """

    def __init__(self, rows: Tensor, device: torch.device) -> None:
        self.kept, self.device = rows.detach(), device
        self.shape, self.dtype = rows.shape, rows.dtype
        self.here: tuple[slice, Tensor] | None = None
        self.coming: tuple[slice, Tensor, Any] | None = None
        self.turn = 0
        self.ahead = _Ahead.of(self.kept, device)

    def __getitem__(self, where: Any) -> Tensor:
        if not isinstance(where, slice):
            return self.kept[where.to(self.kept.device)].to(self.device)
        where = slice(*where.indices(self.shape[0])[:2])
        if self.here is not None and self.here[0] == where:
            return self.here[1]
        if self.ahead is None:
            self.here = (where, self.kept[where].to(self.device))
            return self.here[1]
        coming, self.coming = self.coming, None
        if coming is None or coming[0] != where:
            coming = self._order(where)
        found = coming[1]
        self.ahead.arrived(coming[2])
        self.here = (where, found)
        begin = where.stop if where.stop < self.shape[0] else 0
        following = slice(begin, min(begin + where.stop - where.start, self.shape[0]))
        if following != where:
            self.coming = self._order(following)
        return found

    def over(self, array: Tensor) -> Fetched:
        return Fetched(array, self.device)

    def zeros(self, size: int) -> Tensor:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.zeros((size, *self.shape[1:]), dtype=wide, device=self.kept.device)

    def add(self, array: Tensor, where: slice, part: Tensor) -> None:
        array[where] += part.to(array.device)

    def _order(self, where: slice) -> tuple[slice, Tensor, Any]:
        assert self.ahead is not None
        self.turn = 1 - self.turn
        return where, *self.ahead.order(where, self.turn)


class _Ahead:
    """Copies to a CUDA device that run ahead of the walk: two buffers, and a stream of their own."""

    @classmethod
    def of(cls, rows: Tensor, device: torch.device) -> _Ahead | None:
        return cls(rows, device) if device.type == "cuda" else None

    def __init__(self, rows: Tensor, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.stream = torch.cuda.Stream(device)
        self.buffers: list[Tensor | None] = [None, None]
        self.staging: list[Tensor | None] = [None, None]
        self.copied: list[Any] = [None, None]
        self.reader = None if rows.is_pinned() else ThreadPoolExecutor(1, "nibs reader")

    def order(self, where: slice, turn: int) -> tuple[Tensor, Any]:
        """Begin to copy these rows into buffer `turn`, once all that was launched so far has read it."""
        size, width = where.stop - where.start, self.rows.shape[1]
        buffer = self.buffers[turn]
        if buffer is None or len(buffer) < size:
            # Of the computing stream's memory, which every call has in common, and not to be given to another
            # before a copy that is under way has ended, also one that nobody has waited for.
            buffer = self.buffers[turn] = self.rows.new_empty((size, width), device=self.device)
            buffer.record_stream(self.stream)
        free = torch.cuda.current_stream(self.device).record_event()
        target = buffer[:size]
        if self.reader is None:
            return target, self._copy(self.rows[where], target, free)
        return target, self.reader.submit(self._read, where, turn, target, free)

    def arrived(self, copy: Any) -> None:
        """Let what is launched from now on wait for a copy."""
        event = copy.result() if isinstance(copy, Future) else copy
        torch.cuda.current_stream(self.device).wait_event(event)

    def _copy(self, rows: Tensor, target: Tensor, free: Any) -> Any:
        with torch.no_grad(), torch.cuda.stream(self.stream):
            self.stream.wait_event(free)
            target.copy_(rows, non_blocking=True)
            return self.stream.record_event()

    def _read(self, where: slice, turn: int, target: Tensor, free: Any) -> Any:
        """On the reader's thread: from wherever the rows are into pinned memory, and from there on its way."""
        with torch.cuda.device(self.device):  # a thread begins on the first one, and would open that for pinned memory
            if self.copied[turn] is not None:
                self.copied[turn].synchronize()  # the last copy out of this staging memory
            staging = self.staging[turn]
            if staging is None or len(staging) < len(target):
                staging = self.staging[turn] = torch.empty(target.shape, dtype=target.dtype, pin_memory=True)
            staging[: len(target)].copy_(self.rows[where])
            self.copied[turn] = self._copy(staging[: len(target)], target, free)
            return self.copied[turn]


def streamed(request: Request, *, hold: bool) -> Request:
    """The request as the schedule takes it: rows to be fetched, vectors on the device, arrays ready for gradients.

    hold: gradients stay in the accumulation dtype. Raises InvalidInput for a device that is not here.
    """
    device = _device(request.device)
    changes: dict[str, Any] = {"device": str(device)}
    for name in VECTORS:
        value = getattr(request, name)
        if value is not None:
            changes[name] = value.to(device)
    out = dict(request.out or {})
    for name in ("queries", "keys"):
        rows = getattr(request, name)
        if _here(rows, device):
            continue
        changes[name] = Fetched(rows, device)
        if name not in out and request.wants(name):
            wide = torch.float64 if request.dtype == "float64" else torch.float32
            dtype = wide if hold else DTYPES[request.dtype]
            out[name] = torch.empty(rows.shape, dtype=dtype, pin_memory=rows.is_pinned())
    changes["out"] = out or None
    return request.but(changes)


def _here(rows: Tensor, device: torch.device) -> bool:
    return rows.device == device


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidInput(f"device='{name}': PyTorch has no such device here ({reason}).") from error


class Unlocked:
    """A read-only NumPy array without its lock and without a copy: what is mapped from a file must not be loaded whole.

    Nothing here writes to inputs; PyTorch knows no read-only tensors.
    """

    def __init__(self, array: Any) -> None:
        self.array = array  # keeps the mapping alive
        self.__array_interface__ = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}


def mapped(array: Any) -> bool:
    """Whether a NumPy array's memory is a mapped file's."""
    while array is not None:
        if type(array).__name__ in ("memmap", "mmap"):
            return True
        array = getattr(array, "base", None)
    return False
