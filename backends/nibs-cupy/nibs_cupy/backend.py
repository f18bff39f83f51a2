"""The CuPy backend: requests in, arrays out. CuPy has no autograd, so `loss` carries no gradient."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from nibs.arrays import BYTES, describe, dtype_name
from nibs.errors import InvalidInput
from nibs.plan import Job, TileHint, plan_request
from nibs.request import Request
from nibs.schedule import Call
from nibs.spec import Backend, Objective, Sigmoid
from nibs_cupy.device import Cuda, Host, open_device
from nibs_cupy.fast import FAMILIES, SLAB, why_not
from nibs_cupy.fast_tiles import FastTiles
from nibs_cupy.side import check_streams
from nibs_cupy.tiles import DTYPES, CupyTiles

# One tile of weights; beside it the parts of statistics, 18 numbers for each 64 pairs at most, and their sums, which
# small tiles feel.
HINTS = {
    "cpu": TileHint(
        rows=512, columns=1024, buffers=1.4, masked=1.6, fixed=192 * 1024, kernel="general, by the host runner"
    ),
    "cuda": TileHint(rows=8192, columns=8192, buffers=1.4, masked=1.6, fixed=192 * 1024, kernel="general"),
}

KERNELS = "NIBS_CUPY_KERNELS"


class CupyBackend(Backend):
    """Runs every request by the shared schedule over `CupyTiles`, on CuPy's arrays (`"cuda"`) or NumPy's (`"host"`)."""

    def __init__(self, device: str | Cuda | Host = "cuda", kernels: str | None = None) -> None:
        """kernels: `"general"`, or the family that runs what it takes, `"ampere"` or `"hopper"`; NIBS_CUPY_KERNELS."""
        self.device = open_device(device) if isinstance(device, str) else device
        self.kernels = kernels or os.environ.get(KERNELS) or "general"
        if self.kernels not in ("general", *FAMILIES):
            raise InvalidInput(f"{KERNELS}={self.kernels!r}: expected general, {' or '.join(FAMILIES)}.")

    def loss(self, request: Request) -> Any:
        with self.device.at(request.device), self.device.quiet():
            call = self._call(request, grad=False)
            loss = call.loss()
            return (loss, call.stats()) if request.stats else loss

    def loss_and_grad(self, request: Request) -> Any:
        with self.device.at(request.device), self.device.quiet():
            call = self._call(request, grad=True)
            loss, gradients = call.loss_and_grad()
            return (loss, gradients, call.stats()) if request.stats else (loss, gradients)

    def ring(self, handle: Any) -> Any:
        from nibs_cupy.ring import as_ring

        return as_ring(handle, self.device)

    def _call(self, request: Request, *, grad: bool) -> Call:
        check_streams(request.ring, request.device)
        ring, hold = request.ring, request.hold
        size = ring.size if ring is not None else 1
        precision = self._precision(request.precision)
        family = self._family(request.dtype, precision, request.objective, scale=grad and request.wants("scale"))
        plan = plan_request(request, self._hint(request.dtype, family), grad=grad, hold=hold, ring_size=size)
        if family is None:
            return Call(request, CupyTiles(request.dtype, self.device), plan, ring, hold=hold)
        tiles = FastTiles(request.dtype, precision, self.device, family, self.device.processors())
        return Call(request, tiles, plan, ring, hold=hold)

    def _family(self, dtype: str, precision: str, objective: Objective, *, scale: bool) -> str | None:
        """The family of fast kernels that takes such a call, or None: the general ones. scale: with its gradient."""
        if self.kernels == "general" or why_not(dtype, precision, objective) is not None:
            return None
        # No wgmma takes tf32 three times, and it leaves the sigmoid no registers for the sums of the scale's gradient.
        sums = scale and isinstance(objective, Sigmoid)
        return "ampere" if sums or dtype == "float32" else self.kernels

    def _precision(self, precision: str) -> str:
        """`"default"` is CuPy's own setting: IEEE, unless CUPY_TF32 allows TF32."""
        return "high" if precision == "default" and self.device.rounds_products() else precision

    def _hint(self, dtype: str, family: str | None) -> TileHint:
        """Of a fast family: weights in the dtype of the inputs; parts are four numbers for each row and column of a
        tile, at most. Logits are never written, so none are kept.
        """
        if family is None:
            return HINTS[self.device.kind]
        weights = BYTES[dtype] / 4
        return replace(
            HINTS[self.device.kind],
            **{"buffers": weights + 0.1, "masked": weights + 0.15, "fixed": 768 * 1024, "panel": SLAB},
            copies=self.device.kind == "cpu",  # NumPy's products take float32 alone, widened a square at a time
            kernel=family,
            keeps=False,
        )

    def tile_hints(self, job: Job) -> Sequence[TileHint]:
        precision = self._precision("default")
        return (self._hint(job.dtype, self._family(job.dtype, precision, job.objective, scale=job.scale)),)

    def asarray(self, values: Any, dtype: str | None = None, device: str | None = None) -> Any:
        kind = self.device.kind
        if device is not None and device.partition(":")[0] != kind:
            raise InvalidInput(f"device={device!r}: this backend's arrays live on {kind} (NIBS_CUPY_DEVICE).")
        if dtype is not None and dtype not in DTYPES and dtype != "int64":
            raise InvalidInput(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}, int64, for {describe(values)}.")
        with self.device.at(device):
            array = self._here(values)
            return array if dtype is None or str(array.dtype) == dtype else array.astype(DTYPES.get(dtype, dtype))

    def _here(self, values: Any) -> Any:
        """On this device, without a copy where it is there already."""
        xp = self.device.xp
        if isinstance(values, xp.ndarray):
            return values
        if isinstance(values, (np.ndarray, np.generic)):
            return xp.asarray(values)
        if not hasattr(values, "__dlpack__") and hasattr(values, "__cuda_array_interface__"):
            return xp.asarray(values)
        if dtype_name(values) != "bfloat16":
            return xp.from_dlpack(values)
        # DLPack's bfloat16 is known to few: it crosses as its bits.
        framework = sys.modules[type(values).__module__.partition(".")[0]]
        return xp.from_dlpack(values.view(getattr(framework, "int16", np.int16))).view(ml_dtypes.bfloat16)

    def to_numpy(self, array: Any) -> Any:
        array = self.device.fetch(array)
        return array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind in "fV" else array

    def detach(self, array: Any) -> Any:
        array = self.device.xp.asarray(array)  # a scalar does not export
        # A negative stride is no error in those who import it: PyTorch ends the process.
        return array.copy() if any(stride < 0 for stride in array.strides) else array

    def arange(self, n: int, like: Any) -> Any:
        return self.device.xp.arange(n, dtype=like.dtype)

    def two_views(self, z1: Any, z2: Any) -> tuple[Any, Any]:
        n, xp = len(z1), self.device.xp
        return xp.concatenate([z1, z2]), (xp.arange(2 * n) + n) % (2 * n)
