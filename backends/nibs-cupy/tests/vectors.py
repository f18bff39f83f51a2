"""One instruction at a time by the host twins, and recorded ones again; instructions.cu says what each takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nibs_cupy.host import Runner

TRY = np.dtype([(name, np.int64) for name in ("a", "b", "out", "count")])


def aligned(values: Any) -> Any:
    """A copy that begins at a multiple of 16 bytes, as every allocation on a GPU does."""
    room = np.zeros(values.nbytes + 16, np.uint8)
    begin = -room.ctypes.data % 16
    copy = room[begin : begin + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def attempt(kernel: str, threads: int, a: Any, b: Any, out: Any, count: int = 0, shared: int = 0) -> Any:
    arguments = np.zeros(1, TRY)
    for name, value in (("a", a), ("b", b), ("out", out)):
        arguments[name] = 0 if value is None else value.ctypes.data
    arguments["count"] = count
    Runner().kernel("instructions.cu", kernel)(1, threads, arguments, shared)
    return out


def replay(folder: Path) -> list[str]:
    """The names of those recorded there, by benchmarks/gpu_cupy.py, for which the twins give something else."""
    differ = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as vector:
            a, b = (aligned(vector[name]) if name in vector else None for name in ("a", "b"))
            how = int(vector["count"]), int(vector["shared"])
            out = attempt(path.stem.partition("-")[0], int(vector["threads"]), a, b, vector["start"].copy(), *how)
            distance = np.abs(out.astype(np.float64) - vector["out"]).max()
            if not distance <= float(vector["tolerance"]):
                differ.append(path.stem)
    return differ
