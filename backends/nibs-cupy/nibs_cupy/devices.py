"""A ring of devices in one process: a thread for each rank, copies from device to device.

    def rank(ring):
        return nibs.contrastive_loss_and_grad(queries[ring.rank], keys[ring.rank], ring=ring)

    results = run([0, 1, 2, 3], rank)      # queries[r], keys[r]: on device r
    results = run([0] * 8, rank)           # eight ranks on one device, to try a ring

A hop is copied as soon as both neighbours have posted it, by whichever came second, on the receiver's side stream:
behind what the sender had computed by its `shift` and what the receiver had. Both neighbours' computing streams wait
for it in `wait`. Threads meet as those of `nibs.threads` do: words and sums go through the host.

Within `run` a thread's current device is its rank's. Its current stream is CuPy's default, unless the function makes
another one current.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from nibs.errors import InvalidInput
from nibs.threads import Square, ThreadRing, run_ranks
from nibs_cupy.device import Cuda
from nibs_cupy.side import Parcel, Side

__all__ = ["DeviceRing", "device_rings", "run"]

TIMEOUT = 60.0


class DeviceRing(ThreadRing):
    """One rank's end of a ring of devices; made by `device_rings` or `run`. number: its device's."""

    def __init__(self, square: Square, rank: int, device: Cuda, number: int) -> None:
        super().__init__(square, rank)
        self.device, self.side = device, Side(device, number)
        self.under_way: dict[int, Any] = {}
        """The hops that have been posted and not waited for: their arrays must not be let go."""

    def check(self, rows: Any, device: str) -> None:
        self.side.check(rows, device, self.rank)

    def shift(self, *arrays: Any, into: Sequence[Any] | None = None) -> _Hop:
        self.alive()
        with self.side.here():
            hop = _Hop(self, self._shifts, Parcel(self.side, arrays, into))
        self.under_way[self._shifts] = hop
        self._shifts += 1
        self.sent += sum(size for _, size in hop.parcel.sends())
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        self._offer(("hop", self.rank, after, hop.number), hop, sends=True)
        self._offer(("hop", before, self.rank, hop.number), hop, sends=False)
        return hop

    def sum(self, value: Any) -> Any:
        with self.side.here():
            return self.device.xp.asarray(super().sum(self.device.fetch(value)))

    def _offer(self, pair: tuple[Any, ...], hop: _Hop, *, sends: bool) -> None:
        """One of the two that a copy needs; the second one makes it, and both find its event."""
        square = self.square
        with square.changed:
            other = square.posted.pop((*pair, not sends), None)
            if other is None:
                square.post((*pair, sends), hop)
                return
            done = _copy(hop, other) if sends else _copy(other, hop)
            square.post((*pair, "sent"), done)
            square.post((*pair, "arrived"), done)


class _Hop:
    """One shift of one rank. computed: the event behind what its rank had computed when it was posted."""

    def __init__(self, ring: DeviceRing, number: int, parcel: Parcel) -> None:
        self.ring, self.number, self.parcel = ring, number, parcel
        self.computed = ring.side.computed()
        self.arrived: tuple[Any, ...] | None = None

    def wait(self) -> tuple[Any, ...]:
        ring = self.ring
        if self.arrived is None:
            ring.alive()
            before, after = (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size
            coming = ring.square.take(("hop", before, ring.rank, self.number, "arrived"), ring, before)
            going = ring.square.take(("hop", ring.rank, after, self.number, "sent"), ring, after)
            for done in (coming, going):
                if isinstance(done, str):
                    raise ring.die(done)
            with ring.side.here():
                ring.side.before(coming)
                ring.side.before(going)
                self.arrived = self.parcel.unpack()
            ring.under_way.pop(self.number, None)
        return self.arrived


def _copy(sender: _Hop, receiver: _Hop) -> Any:
    """Post the copies on the receiver's side stream; the event of their end, or what is wrong with them."""
    here, there = receiver.ring, sender.ring
    expected, got = (
        [(tuple(one.shape), str(one.dtype)) for one in arrays]
        for arrays in (receiver.parcel.incoming, sender.parcel.outgoing)
    )
    if expected != got:
        return f"rank {here.rank} of {here.size} expected arrays {expected} and got {got}."
    side = here.side
    with side.here():
        side.stream.wait_event(sender.computed)
        side.stream.wait_event(receiver.computed)
        for (to, size), (source, _) in zip(receiver.parcel.receives(), sender.parcel.sends(), strict=True):
            side.cuda.runtime.memcpyPeerAsync(to, side.number, source, there.side.number, size, side.stream.ptr)
        return side.mark()


def device_rings(devices: Sequence[int], timeout: float = TIMEOUT, device: Cuda | None = None) -> list[DeviceRing]:
    """The ends of one ring, one for each thread, in the order of `devices`, which may name one several times.

    timeout: seconds that a rank waits for another. device: for tests. Raises InvalidInput for a device not here.
    """
    device = device or Cuda()
    here = device.cupy.cuda.runtime.getDeviceCount()
    if not devices or not all(0 <= number < here for number in devices):
        raise InvalidInput(f"devices={list(devices)}: expected some of the {here} that this process sees, from 0 on.")
    _befriend(device, devices)
    square = Square(len(devices), timeout)
    return [DeviceRing(square, rank, device, number) for rank, number in enumerate(devices)]


def run(
    devices: Sequence[int],
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = TIMEOUT,
    errors: bool = False,
    device: Cuda | None = None,
) -> list[Any]:
    """`function(ring, *arguments)` in a thread for each of `devices`, at once; the results in rank order.

    As `nibs.threads.run`, whose words on errors hold here too. Raises InvalidInput as `device_rings`.
    """

    def rank(ring: DeviceRing, *given: Any) -> Any:
        with ring.side.here():
            return function(ring, *given)

    rings = device_rings(devices, timeout, device)
    try:
        return run_ranks(rings, rank, *arguments, errors=errors)
    finally:
        for ring in rings:  # after an error copies may be left, and rings hold their arrays until here
            with suppress(ring.side.cuda.runtime.CUDARuntimeError):  # what a rank has raised says more
                ring.side.stream.synchronize()


def _befriend(device: Cuda, devices: Sequence[int]) -> None:
    """Let neighbours copy directly where their hardware can; others copy by way of the host, which CUDA sees to."""
    runtime = device.cupy.cuda.runtime
    for one, other in zip(devices, [*devices[1:], devices[0]], strict=True):
        for near, far in ((one, other), (other, one)):
            if near != far and runtime.deviceCanAccessPeer(near, far):
                # Refused where it is on already.
                with device.cupy.cuda.Device(near), suppress(runtime.CUDARuntimeError):
                    runtime.deviceEnablePeerAccess(far)
