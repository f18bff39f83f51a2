"""Matrix products in the precision that a call asks for, whatever the framework is set to.

    "default"   as the framework is set: nothing is touched
    "high"      TF32 class: 10 bits of mantissa or more into each product, where the device has such products
    "highest"   IEEE float32

PyTorch keeps this in flags of the whole process. They are set under a lock, for the one product that is being
computed (on a GPU: launched), and put back at once; where a flag stands right already, nothing is locked. Another
thread's products may see it meanwhile, and get more or less precision than they asked for, but no wrong numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

__all__ = ["products"]

_lock = threading.RLock()
_NOTHING = nullcontext()


def products(precision: str, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """A context for one matrix product of `dtype` on `device`."""
    if precision == "default" or dtype != torch.float32:
        return _NOTHING
    flag = _flag(device.type, precision == "high")
    if flag is None or getattr(*flag[:2]) == flag[2]:
        return _NOTHING
    return _set(*flag)


def _flag(device: str, fast: bool) -> tuple[Any, str, Any] | None:
    """Where PyTorch keeps the flag of a kind of device, and what it should be; None where there is none."""
    holder = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul if _mkldnn() else None
    if holder is None or device not in ("cpu", "cuda", "xpu"):
        return None
    if hasattr(holder, "fp32_precision"):
        return holder, "fp32_precision", "tf32" if fast else "ieee"
    if device == "cuda":  # before 2.9
        return holder, "allow_tf32", fast
    return None


def _mkldnn() -> bool:
    return hasattr(torch.backends.mkldnn, "matmul")


@contextmanager
def _set(holder: Any, name: str, value: Any) -> Iterator[None]:
    with _lock:
        before = getattr(holder, name)
        setattr(holder, name, value)
        try:
            yield
        finally:
            setattr(holder, name, before)
