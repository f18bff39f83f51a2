"""The NumPy backend: requests in, arrays out. NumPy has no autograd, so `loss` carries no gradient."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from nibs.arrays import describe, dtype_name
from nibs.errors import InvalidInput
from nibs.plan import TileHint, plan_request
from nibs.request import Request
from nibs.schedule import Call
from nibs.spec import Backend
from nibs_numpy.tiles import DTYPES, NumpyTiles

# Tiles: logits, another, and strips, which in a small tile are as large; masked, up to six boolean ones beside them, of
# a quarter each. NumPy itself holds the buffers of sums that widen.
HINT = TileHint(rows=1024, columns=2048, buffers=3.3, masked=4.6, fixed=160 * 1024, kernel="numpy")
BUFFER = 1024  # elements


class NumpyBackend(Backend):
    """Runs every request by the shared schedule over `NumpyTiles`."""

    def loss(self, request: Request) -> Any:
        with _settings():
            call = self._call(request, grad=False)
            loss = call.loss()
            return (loss, call.stats()) if request.stats else loss

    def loss_and_grad(self, request: Request) -> Any:
        with _settings():
            call = self._call(request, grad=True)
            loss, gradients = call.loss_and_grad()
            return (loss, gradients, call.stats()) if request.stats else (loss, gradients)

    def _call(self, request: Request, *, grad: bool) -> Call:
        ring = request.ring
        hold = request.hold
        plan = plan_request(request, HINT, grad=grad, hold=hold, ring_size=ring.size if ring is not None else 1)
        return Call(request, NumpyTiles(request.dtype), plan, ring, hold=hold)

    def tile_hint(self, device: str, dtype: str) -> TileHint:
        return HINT

    def asarray(self, values: Any, dtype: str | None = None, device: str | None = None) -> Any:
        if device not in (None, "cpu"):
            raise InvalidInput(f"device={device!r}: NumPy arrays live on the cpu.")
        array = values if isinstance(values, (np.ndarray, np.generic)) else _import(values)
        if dtype is None or str(array.dtype) == dtype:
            return array
        if dtype not in DTYPES and dtype != "int64":
            raise InvalidInput(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}, int64, for {describe(values)}.")
        return array.astype(DTYPES.get(dtype, dtype))

    def to_numpy(self, array: Any) -> Any:
        array = np.asarray(array)
        return array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind in "fV" else array

    def detach(self, array: Any) -> Any:
        array = np.asarray(array)  # a scalar does not export
        # A negative stride is no error in those who import it: PyTorch ends the process.
        return array.copy() if any(stride < 0 for stride in array.strides) else array

    def arange(self, n: int, like: Any) -> Any:
        return np.arange(n, dtype=like.dtype)

    def two_views(self, z1: Any, z2: Any) -> tuple[Any, Any]:
        n = len(z1)
        return np.concatenate([z1, z2]), (np.arange(2 * n) + n) % (2 * n)


@contextmanager
def _settings() -> Iterator[None]:
    """NumPy's settings while it works on tiles.

    Infinities and NaN are answers here, not accidents. And where a row or a column meets a tile, NumPy copies it into
    buffers as often as those hold the tile's rows, which takes three times as long as the sum itself: a small buffer
    holds none.
    """
    with np.errstate(all="ignore"):
        before = np.setbufsize(BUFFER)
        try:
            yield
        finally:
            np.setbufsize(before)


def _import(values: Any) -> Any:
    """An array of another framework, by DLPack, without a copy; bfloat16, which NumPy's does not know, as its bits."""
    if dtype_name(values) != "bfloat16":
        return np.from_dlpack(values)
    framework = sys.modules[type(values).__module__.partition(".")[0]]
    return np.from_dlpack(values.view(getattr(framework, "int16", np.int16))).view(ml_dtypes.bfloat16)
