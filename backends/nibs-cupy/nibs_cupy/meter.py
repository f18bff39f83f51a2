"""What a call holds at most of CuPy's memory pool, for the suite's memory law. Needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["peak"]


def peak(call: Callable[[], Any]) -> int:
    """Peak of the bytes that CuPy's pool handed out during `call`, beyond what it had handed out before.

    Counted as they were asked for: the pool itself rounds up to 512.
    """
    from cupy.cuda import MemoryHook

    class Watch(MemoryHook):  # type: ignore[misc, valid-type]
        name = "nibs"
        held = highest = 0

        def __init__(self) -> None:
            self.sizes: dict[int, int] = {}

        def malloc_postprocess(self, **what: Any) -> None:
            self.sizes[what["pmem_id"]] = what["size"]
            self.held += what["size"]
            self.highest = max(self.highest, self.held)

        def free_postprocess(self, **what: Any) -> None:
            self.held -= self.sizes.pop(what["pmem_id"], 0)  # 0: it was there before

    watch = Watch()
    with watch:
        result = call()
    del result
    return int(watch.highest)
