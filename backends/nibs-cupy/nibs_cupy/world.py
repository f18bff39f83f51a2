"""Ranks for the conformance suite where there are GPUs: threads over the devices, or a process for each over NCCL.

    NIBS_CUPY_WORLD=devices    `nibs_cupy.devices`, ranks dealt out over the devices that are here: default on `cuda`
    NIBS_CUPY_WORLD=nccl       rank r on device r; where there are fewer devices than ranks, every rank says so
    NIBS_CUPY_WORLD=threads    `nibs.threads`: default on `host`, and of use there alone

Nothing of the suite is imported before it asks.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from nibs.errors import BackendUnavailable, InvalidInput, RingError

__all__ = ["DeviceWorld", "open_ring", "world"]

VARIABLE = "NIBS_CUPY_WORLD"


def world(size: int, where: str) -> Any:
    """The world that NIBS_CUPY_WORLD names, or the default of `where`, `"cuda"` or `"host"`."""
    from nibs_conformance.worlds import ProcessWorld, ThreadWorld

    kind = os.environ.get(VARIABLE) or ("devices" if where == "cuda" else "threads")
    if kind == "nccl":
        return ProcessWorld(size, "nibs_cupy.world:open_ring")
    if kind not in ("devices", "threads"):
        raise InvalidInput(f"{VARIABLE}={kind!r}: expected devices, nccl or threads.")
    return DeviceWorld(size) if kind == "devices" else ThreadWorld(size)


class DeviceWorld:
    """Ranks as threads, dealt out over the devices. A fresh ring for every job."""

    def __init__(self, size: int, ring_timeout: float = 20.0) -> None:
        self.size, self.ring_timeout = size, ring_timeout

    def run(self, job: str, *arguments: Any, timeout: float = 60.0) -> list[Any]:
        import cupy

        from nibs_conformance.worlds import resolve
        from nibs_cupy.devices import run

        function, here = resolve(job), cupy.cuda.runtime.getDeviceCount()
        return run(
            [rank % here for rank in range(self.size)],
            lambda ring: function(ring, ring.rank, self.size, *arguments),
            timeout=self.ring_timeout,
            errors=True,
        )

    def __enter__(self) -> DeviceWorld:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""


def open_ring(rank: int, size: int, folder: str, timeout: float) -> Any:
    """Join the ranks of this machine over NCCL, whose name for the group goes through a file in `folder`."""
    import cupy
    from cupy.cuda import nccl

    from nibs_cupy.ring import Ring

    here = cupy.cuda.runtime.getDeviceCount()
    if not nccl.available:
        raise BackendUnavailable("NCCL is not here: pip install nvidia-nccl-cu13 (or -cu12, as your CuPy)")
    if size > here:
        raise BackendUnavailable(f"{size} ranks over NCCL need {size} GPUs, one each, and {here} are here")
    cupy.cuda.Device(rank).use()
    meeting = Path(folder, "nccl")
    if rank == 0:
        fresh = meeting.with_suffix(".new")
        fresh.write_text(json.dumps(nccl.get_unique_id()), encoding="utf-8")
        fresh.rename(meeting)
    deadline = time.monotonic() + timeout
    while not meeting.exists():
        if time.monotonic() > deadline:
            raise RingError(f"rank {rank} of {size} waited {timeout:g} s for rank 0 to name the group, in vain.")
        time.sleep(0.01)
    name = tuple(json.loads(meeting.read_text(encoding="utf-8")))
    return Ring(nccl.NcclCommunicator(size, name, rank), timeout)
