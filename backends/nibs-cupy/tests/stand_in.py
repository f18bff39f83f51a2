"""In the place of CuPy and NCCL, for rings: streams, events, copies between devices, and communicators, over NumPy.

What computes here is NumPy and the host runner, at once, in a thread for each rank. What a side stream carries is
asynchronous, and runs under one of two clocks, the earliest and the latest that CUDA allows:

    earliest   a copy is made as soon as it can be: whoever still reads what it overwrites gets the new bytes
    latest     a copy is made when an event behind it is waited for, by the stream that computes or by the host; its
               destination holds 0xff until then, and what it sends is read as late as that

What is wrong is a `Fault`, raised in the rank that does it where that is known, else by `Place.check`:

- a copy or a message behind no new event of the stream that computes: it may run before what it sends is there
- an event recorded on a stream of another device than its own
- messages of unlike sizes, or of none; a message that nobody receives
- a communicator of one device on a stream of another

Two ranks that first exchange messages block in `groupEnd` until both are there, as NCCL connects them; all that was
posted for an aborted communicator ends without moving anything.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from nibs_cupy.device import Host

__all__ = ["CudaError", "Fault", "NcclError", "Place", "Stream", "where_am_i"]


class Fault(Exception):
    """What CUDA or NCCL would let pass, and punish later."""


class CudaError(RuntimeError):
    """In the place of CUDARuntimeError."""


class NcclError(RuntimeError):
    """In the place of NCCL's."""


class Place:
    """A machine with `devices` GPUs, as far as rings see one.

    patience: seconds that a stream waits for a peer. strict: every copy is behind a new event of each stream that
    computes; not where ranks compute on one and the same. failed: CUDA's error, from when there is one.
    """

    def __init__(self, devices: int, clock: str = "latest", patience: float = 20.0, strict: bool = True) -> None:
        self.clock, self.patience, self.strict = clock, patience, strict
        self.changed = threading.Condition()
        self.mine = threading.local()
        self.numbers = itertools.count(1)
        self.streams: dict[int, Stream] = {}
        self.nulls = [Stream(self, number, computes=True) for number in range(devices)]
        self.computing = list(self.nulls)
        self.befriended: set[tuple[int, int]] = set()
        self.groups: list[Group] = []
        self.events: dict[int, Event] = {}
        self.failed = 0
        self.peer_copies = 0
        place = self
        nccl = SimpleNamespace(
            available=True,
            NCCL_UINT8=1,
            NcclError=NcclError,
            groupStart=self._group_start,
            groupEnd=self._group_end,
        )
        runtime = SimpleNamespace(
            CUDARuntimeError=CudaError,
            eventQuery=self._query,
            getDeviceCount=lambda: devices,
            memcpyPeerAsync=self._copy,
            deviceCanAccessPeer=lambda device, peerDevice: 1,
            deviceEnablePeerAccess=self._befriend,
        )
        self.cupy = SimpleNamespace(
            cuda=SimpleNamespace(
                Device=lambda number: Current(place, number),
                Stream=lambda non_blocking=False: Stream(place, place.device, computes=not non_blocking),
                Event=lambda disable_timing=False: Event(place),
                get_current_stream=lambda: place.current,
                nccl=nccl,
                runtime=runtime,
            )
        )

    # -- what a thread stands on -------------------------------------------------------------------

    @property
    def device(self) -> int:
        return getattr(self.mine, "device", 0)

    @property
    def current(self) -> Stream:
        return getattr(self.mine, "streams", {}).get(self.device, self.nulls[self.device])

    def computing_on(self, number: int) -> Stream:
        """Make the stream that this thread computes with on a device: not the default one."""
        with Current(self, number):
            stream = Stream(self, number, computes=True)
        self.mine.streams = {**getattr(self.mine, "streams", {}), number: stream}
        self.computing[number] = stream
        return stream

    def words(self, host: Host) -> Any:
        """`Host` with the words that rings ask `Cuda` for."""
        device = Host(host.runner)
        device.cupy = self.cupy  # type: ignore[attr-defined]
        return device

    def communicators(self, devices: list[int], connects: bool = True) -> list[Communicator]:
        """Rank r of one group on `devices[r]`. connects: the first messages of two ranks block until both are there."""
        group = Group(self, devices, connects)
        self.groups.append(group)
        return group.ranks

    def check(self) -> None:
        """Raise Fault if something was sent that nobody has received, or the other way round."""
        for group in self.groups:
            for (source, to), channel in group.channels.items():
                if len(channel.sent) != len(channel.received):
                    sent, received = len(channel.sent), len(channel.received)
                    raise Fault(f"rank {source} sent {sent} messages to rank {to}, which received {received}.")

    def _query(self, event: int) -> int:
        return self.failed or (0 if self.events[event].done else 600)

    # -- copies from device to device ----------------------------------------------------------------

    def _befriend(self, peerDevice: int) -> None:
        pair = self.device, peerDevice
        if pair in self.befriended:
            raise CudaError("cudaErrorPeerAccessAlreadyEnabled")
        self.befriended.add(pair)

    def _copy(self, dst: int, dstDevice: int, src: int, srcDevice: int, size: int, stream: int) -> None:
        side = self.streams[stream]
        side.must_be_behind(self.computing[srcDevice], "what it copies may not be there yet")
        side.must_be_behind(self.computing[dstDevice], "what it overwrites may still be read")
        self.peer_copies += 1
        side.post(Copy(dst, src, size, poison=self.clock == "latest"))

    # -- NCCL ----------------------------------------------------------------------------------------

    def _group_start(self) -> None:
        self.mine.group = []

    def _group_end(self) -> None:
        posted, self.mine.group = self.mine.group, None
        if posted:
            communicator = posted[0][1]
            communicator.messages(posted)


class Current:
    """A device, made this thread's own by `with` or `use`."""

    def __init__(self, place: Place, number: int) -> None:
        self.place, self.id, self.before = place, number, []

    def use(self) -> None:
        self.place.mine.device = self.id

    def __enter__(self) -> Current:
        self.before.append(self.place.device)
        self.use()
        return self

    def __exit__(self, *_: object) -> None:
        self.place.mine.device = self.before.pop()


class Stream:
    """Work in order. What computes is done at once; a side stream holds what was posted until somebody waits."""

    def __init__(self, place: Place, number: int, *, computes: bool) -> None:
        self.place, self.device_id, self.computes = place, number, computes
        self.ptr = next(place.numbers)
        place.streams[self.ptr] = self
        self.work: list[Any] = []
        self.done = 0
        self.recorded = 0
        self.behind: dict[Stream, int] = {}
        self.used: dict[Stream, int] = {}
        self.running = threading.RLock()

    def post(self, work: Any, wakes: Sequence[Stream] = ()) -> None:
        """wakes: other streams whose work may have waited for this."""
        self.work.append(work)
        if self.place.clock == "earliest":
            for stream in (self, *wakes):
                stream.run(len(stream.work), patience=0.0)

    def must_be_behind(self, other: Stream, else_: str) -> None:
        """Since the last mark on this side, it must have come behind a new event of `other`."""
        if self.place.strict and self.behind.get(other, 0) <= self.used.get(other, 0):
            raise Fault(
                f"device {self.device_id}'s side goes ahead of what device {other.device_id} computes: {else_}."
            )

    def marked(self) -> None:
        self.used = dict(self.behind)

    def wait_event(self, event: Event) -> None:
        if event.stream is None:
            return
        for stream, serial in event.behind.items():
            self.behind[stream] = max(self.behind.get(stream, 0), serial)
        if self.computes:
            event.stream.run(event.position, self.place.patience)
        else:
            self.work.append(event)

    def synchronize(self) -> None:
        self.run(len(self.work), self.place.patience)

    def run(self, position: int, patience: float) -> bool:
        """Do what was posted before `position`; False where a peer does not come within `patience`."""
        if not self.running.acquire(blocking=patience > 0):
            return False
        try:
            while self.done < position:
                if not self.work[self.done].run(self.place, patience):
                    return False
                self.work[self.done] = None
                self.done += 1
        finally:
            self.running.release()
        return True


class Event:
    """A place in a stream's order."""

    def __init__(self, place: Place) -> None:
        self.place, self.made_on, self.ptr = place, place.device, next(place.numbers)
        place.events[self.ptr] = self
        self.stream: Stream | None = None
        self.position, self.asked = 0, 0
        self.behind: dict[Stream, int] = {}

    def record(self, stream: Stream) -> None:
        if stream.device_id != self.made_on:
            raise Fault(f"an event of device {self.made_on} is recorded on a stream of device {stream.device_id}.")
        if stream.ptr in [null.ptr for null in self.place.nulls] and self.place.device != stream.device_id:
            raise Fault("the default stream is recorded under another device.")
        stream.recorded += 1
        self.stream, self.position = stream, len(stream.work)
        self.behind = {**stream.behind, stream: stream.recorded}
        if not stream.computes:
            stream.marked()

    @property
    def done(self) -> bool:
        """The first question is answered with no where anything is left to do."""
        if self.stream is None or self.stream.done >= self.position:
            return True
        self.asked += 1
        return self.asked > 1 and self.stream.run(self.position, 0.0)

    def run(self, place: Place, patience: float) -> bool:
        return self.stream is None or self.stream.run(self.position, patience)


class Copy:
    """Bytes from one address to another."""

    def __init__(self, to: int, source: int, size: int, *, poison: bool) -> None:
        self.to, self.source, self.size = to, source, size
        if poison:
            ctypes.memset(to, 0xFF, size)

    def run(self, place: Place, patience: float) -> bool:
        ctypes.memmove(self.to, self.source, self.size)
        return True


class Message:
    """One end of a message: bytes at an address, and for the sender what they were when they were read."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size
        self.data: bytes | None = None
        self.reading = threading.Lock()

    def read(self) -> bytes:
        with self.reading:
            if self.data is None:
                self.data = ctypes.string_at(self.address, self.size)
            return self.data


class Channel:
    """Messages from one rank to another, in order."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.received: list[Message] = []


class Group:
    """The ranks of one communicator."""

    def __init__(self, place: Place, devices: list[int], connects: bool) -> None:
        self.place, self.connects = place, connects
        self.channels: dict[tuple[int, int], Channel] = defaultdict(Channel)
        self.gathers: dict[int, dict[int, Message]] = defaultdict(dict)
        self.ranks = [Communicator(self, rank, number) for rank, number in enumerate(devices)]


class Communicator:
    """In the place of NcclCommunicator: blocking, one device."""

    def __init__(self, group: Group, rank: int, number: int) -> None:
        self.group, self.rank, self.number = group, rank, number
        self.comm = 0x1000 + rank
        self.gathers = 0
        self.messaged = False
        self.trouble: str | None = None
        self.known: set[int] = set()
        self.sides: list[Stream] = []

    def rank_id(self) -> int:
        return self.rank

    def size(self) -> int:
        return len(self.group.ranks)

    def device_id(self) -> int:
        return self.number

    def check_async_error(self) -> None:
        if self.trouble:
            raise NcclError(self.trouble)

    def abort(self) -> None:
        with self.group.place.changed:
            self.comm = 0
            self.group.place.changed.notify_all()

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self.group.place.mine.group.append(("send", self, sendbuf, count, peer, stream))

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self.group.place.mine.group.append(("recv", self, recvbuf, count, peer, stream))

    def messages(self, posted: list[Any]) -> None:
        """What `groupEnd` does."""
        place, work = self.group.place, Exchange(self)
        side = self._side(posted[0][5])
        with place.changed:
            self.messaged = True
            for what, _, address, size, peer, stream in posted:
                if not size:
                    raise NcclError("invalid argument")  # NCCL's answer has changed over its versions
                if self._side(stream) is not side:
                    raise Fault("one group on two streams.")
                pair = (self.rank, peer) if what == "send" else (peer, self.rank)
                channel = self.group.channels[pair]
                mine = channel.sent if what == "send" else channel.received
                message = Message(address, size)
                (work.sends if what == "send" else work.receives).append((channel, len(mine), message))
                mine.append(message)
                if what == "recv" and place.clock == "latest":
                    ctypes.memset(address, 0xFF, size)
            place.changed.notify_all()
            peers = {peer for _, _, _, _, peer, _ in posted} - self.known
            if self.group.connects and peers:
                ranks = self.group.ranks
                place.changed.wait_for(lambda: not self.comm or all(ranks[peer].messaged for peer in peers))
                if not self.comm:
                    raise NcclError("the communicator was aborted")
                self.known |= peers
        side.post(work, self._others())

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        place = self.group.place
        side = self._side(stream)
        with place.changed:
            number = self.gathers
            self.gathers += 1
            self.group.gathers[number][self.rank] = Message(sendbuf, count)
            place.changed.notify_all()
        if place.clock == "latest":
            ctypes.memset(recvbuf, 0xFF, count * self.size())
        side.post(Gather(self, number, recvbuf, count), self._others())

    def _side(self, stream: int) -> Stream:
        side = self.group.place.streams[stream]
        if side.device_id != self.number:
            raise Fault(f"a stream of device {side.device_id} for the communicator of device {self.number}.")
        side.must_be_behind(self.group.place.computing[self.number], "what it sends may not be there yet")
        if side not in self.sides:
            self.sides.append(side)
        return side

    def _others(self) -> list[Stream]:
        return [side for other in self.group.ranks if other is not self for side in other.sides]

    def until(self, there: Any, patience: float) -> bool:
        """Wait for a peer, as a kernel does; True as well when the communicator has been aborted."""
        changed = self.group.place.changed
        with changed:
            return bool(changed.wait_for(lambda: not self.comm or there(), patience))


class Exchange:
    """The messages of one group. Sends are read when somebody needs them, at the latest when this ends."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.sends: list[tuple[Channel, int, Message]] = []
        self.receives: list[tuple[Channel, int, Message]] = []

    def run(self, place: Place, patience: float) -> bool:
        one = self.communicator
        there = lambda: (  # noqa: E731
            all(len(channel.sent) > at for channel, at, _ in self.receives)
            and all(len(channel.received) > at for channel, at, _ in self.sends)
        )
        if not one.until(there, patience):
            return False
        if not one.comm:
            return True
        for _, _, message in self.sends:
            message.read()
        for channel, at, message in self.receives:
            theirs = channel.sent[at]
            if theirs.size != message.size:
                raise Fault(f"rank {one.rank} receives {message.size} bytes and {theirs.size} are sent.")
            ctypes.memmove(message.address, theirs.read(), message.size)
        return True


class Gather:
    """An all-gather's part in one rank."""

    def __init__(self, communicator: Communicator, number: int, to: int, size: int) -> None:
        self.communicator, self.number, self.to, self.size = communicator, number, to, size

    def run(self, place: Place, patience: float) -> bool:
        one, parts = self.communicator, self.communicator.group.gathers[self.number]
        if not one.until(lambda: len(parts) == one.size(), patience):
            return False
        if not one.comm:
            return True
        for rank in range(one.size()):
            if parts[rank].size != self.size:
                raise Fault(
                    f"rank {one.rank} gathers {self.size} bytes each, and rank {rank} gives {parts[rank].size}."
                )
            ctypes.memmove(self.to + rank * self.size, parts[rank].read(), self.size)
        return True


def where_am_i(ring: Any, rank: int, size: int) -> Any:
    """A job for a world: rank, device, and a sum over the ring."""
    return rank, ring.side.number, float(ring.sum(np.float64(rank)))
