"""A stream beside the one that computes, and the events that order the two. What both rings of this package stand on.

    behind()      what is posted on the side from now on comes after everything that this thread has computed so far
    mark()        an event behind everything that has been posted on the side
    before(e)     what this thread computes from now on comes after `e`

The stream that computes is CuPy's current one, whichever that is at the moment of the call. None of these waits on the
host. Arrays that are under way on the side must be held until the computing stream comes after them: CuPy's memory
pool orders what it hands out by one stream alone, the one on which it was handed out before.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from nibs.arrays import describe
from nibs.errors import InvalidInput
from nibs.threads import ThreadRing
from nibs_cupy.device import Cuda, KernelFault

__all__ = ["Parcel", "Side", "check_streams"]

NOT_READY = 600
"""CUDA's cudaErrorNotReady."""


def check_streams(ring: Any, device: str) -> None:
    """Raise InvalidInput where arrays are on a GPU and the ring orders no streams."""
    if isinstance(ring, ThreadRing) and not hasattr(ring, "side") and device.startswith("cuda"):
        raise InvalidInput(
            "a ring of nibs.threads orders nothing between devices or streams: on GPUs use nibs_cupy.devices.run([0] * "
            f"{ring.size}, function), whose ranks are threads too; the list says which device each has."
        )


class Side:
    """The side stream of one device. number: the device's."""

    def __init__(self, device: Cuda, number: int) -> None:
        self.device, self.number, self.cuda = device, number, device.cupy.cuda
        with self.here():
            self.stream = self.cuda.Stream(non_blocking=True)  # the legacy default stream would wait for any other kind

    def here(self) -> AbstractContextManager[Any]:
        """Within it, this thread's device is this one: events and arrays are made there."""
        current: AbstractContextManager[Any] = self.cuda.Device(self.number)
        return current

    def check(self, rows: Any, device: str, rank: int) -> None:
        """Raise InvalidInput where a rank's arrays are not CuPy's, or on another device. device: as `cuda:0`."""
        if not isinstance(rows, self.device.xp.ndarray):
            raise InvalidInput(
                f"keys is {describe(rows)}, and this ring carries CuPy's arrays alone: use a ring of their own "
                "framework, or backend='cupy' for those that lie on a GPU."
            )
        if device.partition(":")[2] not in ("", str(self.number)):
            raise InvalidInput(
                f"keys are on {device}, and rank {rank} of this ring is on cuda:{self.number}: "
                f"make its arrays under cupy.cuda.Device({self.number})."
            )

    def current(self) -> Any:
        """The stream that computes."""
        return self.cuda.get_current_stream()

    def computed(self) -> Any:
        """An event behind everything that this thread has computed so far."""
        event = self.cuda.Event(disable_timing=True)
        event.record(self.current())
        return event

    def behind(self) -> None:
        self.stream.wait_event(self.computed())

    def mark(self) -> Any:
        event = self.cuda.Event(disable_timing=True)
        event.record(self.stream)
        return event

    def ended(self, event: Any) -> bool:
        """Whether the device has come to it. Raises KernelFault where it has failed, and never will."""
        status = self.cuda.runtime.eventQuery(event.ptr)  # an event's own `done` takes a failure for a no
        if status not in (0, NOT_READY):
            raise KernelFault(f"the device failed before a hop or a sum had ended: CUDA's error {status}.")
        return bool(status == 0)

    def before(self, event: Any) -> None:
        self.current().wait_event(event)


class Parcel:
    """What one hop sends and where it puts what arrives, both as packed bytes; made by the thread that computes.

    into: as in `nibs.ring.Ring.shift`.
    """

    def __init__(self, side: Side, arrays: Sequence[Any], into: Sequence[Any] | None) -> None:
        xp, self.side, self.made_on = side.device.xp, side, side.current()
        if into is None:
            into = [xp.empty(array.shape, array.dtype) for array in arrays]
        self.into = tuple(into)
        self.outgoing = [xp.ascontiguousarray(array) for array in arrays]
        self.incoming = [one if one.flags.c_contiguous else xp.empty(one.shape, one.dtype) for one in into]

    def sends(self) -> list[tuple[int, int]]:
        """Address and bytes of each array that has any."""
        return self._places(self.outgoing)

    def receives(self) -> list[tuple[int, int]]:
        return self._places(self.incoming)

    def unpack(self) -> tuple[Any, ...]:
        """What has arrived, where it was wanted; for the stream that computes, which comes after it by now."""
        for here, there in zip(self.into, self.incoming, strict=True):
            if here is not there:
                here[...] = there
        if self.made_on != self.side.current():  # it has changed since, and the pool hands out by the old one
            self.made_on.wait_event(self.side.computed())
        return self.into

    def _places(self, arrays: Sequence[Any]) -> list[tuple[int, int]]:
        return [(self.side.device.address(array), array.nbytes) for array in arrays if array.nbytes]
