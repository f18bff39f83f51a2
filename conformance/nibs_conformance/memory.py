"""What a call holds at most, in bytes, and the law that it grows with n and not with n x m.

Three ways to see it, tried in this order: the backend's own meter (hook `nibs_conformance_memory`),
`tracemalloc` where it sees the framework's arrays (NumPy), and the high-water mark of the process,
which sees everything on a CPU, a little late and in pages. It refuses to guess: with none of the three
the tests that need it fail and say which hook to write.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nibs_conformance.hookspecs import Meter

__all__ = ["high_water", "law", "meter_of", "traced"]

RESET = "5"
"""What /proc/self/clear_refs takes to set the high-water mark down to what is held now."""


def traced(call: Callable[[], Any]) -> int:
    """Peak of what Python's allocators handed out during `call`, beyond what they held before."""
    gc.collect()
    began = tracemalloc.is_tracing()
    if not began:
        tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        result = call()
        peak = tracemalloc.get_traced_memory()[1]
        del result
    finally:
        if not began:
            tracemalloc.stop()
    return max(peak - before, 0)


def high_water(call: Callable[[], Any]) -> int:
    """Rise of the process's resident high-water mark during `call`.

    Memory that was freed but not given back would be used again unseen, so it is given back first.
    """
    gc.collect()
    _trim()
    Path("/proc/self/clear_refs").write_text(RESET)
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(peak - before, 0)


def meter_of(subject: Any, hook: Any) -> tuple[str, Meter, int]:
    """Name, meter, and the bytes by which it may be off, for this backend on this machine."""
    own = hook.nibs_conformance_memory(backend=subject.name, device=subject.device)
    if own is not None:
        return "the backend's own meter", own, 2**20
    probe = subject.array(np.ones((512, 1024), np.float32))
    if traced(lambda: probe + probe) >= 2**21:
        return "tracemalloc", traced, 2**18
    if subject.device == "cpu" and _can_reset():
        return "the process's high-water mark", high_water, 6 * 2**20
    raise AssertionError(
        f"no way to see what '{subject.name}' holds on {subject.device}: "
        "implement the hook nibs_conformance_memory in its plugin."
    )


def law(sizes: Sequence[int], peaks: Sequence[int]) -> float:
    """The share of an n x n float32 array that a parabola through the peaks grows by, at the largest size.

    Least squares of `peak = a + b n + c n^2`; the answer is `c / 4`: 0 for a linear law, 1 for one whole
    array of n x n float32.
    """
    n = np.asarray(sizes, float) / max(sizes)
    basis = np.stack([np.ones_like(n), n, n * n], 1)
    coefficients = np.linalg.lstsq(basis, np.asarray(peaks, float), rcond=None)[0]
    return float(coefficients[2] / (4.0 * max(sizes) ** 2))


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}.")


def _can_reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(RESET)
        return _status("VmHWM") > 0
    except OSError:
        return False


def _trim() -> None:
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
