"""A ring over NCCL: the ranks of one communicator, each with a device of its own, in one process or in many.

    ring = nibs_cupy.Ring(communicator, timeout=60)
    loss, gradients = nibs.contrastive_loss_and_grad(queries, keys, scale=scale, ring=ring)

`ring=` also takes the communicator itself: a `cupy.cuda.nccl.NcclCommunicator`, or what
`cupyx.distributed.init_process_group` returns. Everything goes by its own bytes (uint8, which every NCCL has), on one
side stream: hops by send and receive in a group, words and sums by all-gather. Sums are added up in rank order, so that
every rank has the same bits.

NCCL waits for a lost peer for ever, on the device and on the host, so nothing here waits for NCCL:

- its calls are made by a thread of the ring's own. The first one between two ranks blocks until both are there.
- a `wait` and a `sum` order streams only; the host looks one later whether those before have come to an end, and
  `settle`, at the end of a call, whether all have.
- what is overdue, or what NCCL reports by itself, ends the ring: the communicator is aborted, which frees the device
  of the kernels that wait. It was the caller's, and is of no use to anybody then.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from weakref import finalize

import numpy as np

from nibs.errors import InvalidInput, RingError
from nibs.ring import WORDS
from nibs.ring import Ring as BaseRing
from nibs_cupy.device import Cuda
from nibs_cupy.side import Parcel, Side

__all__ = ["Ring", "as_ring"]

TIMEOUT = 600.0
ABORT = 5.0
"""Seconds that an abort may take before it is left to itself."""


class Ring(BaseRing):
    """The ranks of `communicator` as a ring.

    communicator: an NcclCommunicator, or an NCCLBackend of `cupyx.distributed`; blocking, as CuPy makes them.
    timeout: seconds that a rank waits for another before it raises RingError. device: for tests.

    Raises InvalidInput for anything else, and RingError for a communicator that was aborted or destroyed.
    """

    def __init__(self, communicator: Any, timeout: float = TIMEOUT, device: Cuda | None = None) -> None:
        self.timeout = float(timeout)
        if not self.timeout > 0:
            raise InvalidInput(f"Ring(timeout={timeout!r}): expected seconds above 0.")
        self.communicator = getattr(communicator, "_comm", communicator)
        if not all(hasattr(self.communicator, name) for name in ("comm", "rank_id", "allGather")):
            raise InvalidInput(
                f"ring is {type(communicator).__name__}: expected a cupy.cuda.nccl.NcclCommunicator, what "
                "cupyx.distributed.init_process_group returns, or nibs_cupy.Ring(communicator)."
            )
        if not self.communicator.comm:
            raise RingError(
                "this ring is dead: its communicator was aborted, after a peer was lost, or destroyed. "
                "Make a new one for the ranks that are left."
            )
        device = device or Cuda()
        self.nccl = device.cupy.cuda.nccl
        self.rank, self.size = self.communicator.rank_id(), self.communicator.size()
        self.device, self.side = device, Side(device, self.communicator.device_id())
        self.sent = 0
        """Bytes that this rank has sent by `shift`."""
        self._caller = _Caller(self.side)
        self._posts = 0
        self._under_way: deque[tuple[int, Any, Any]] = deque()  # as posted: number, event, and arrays to be held
        finalize(self, self._caller.stop)

    def check(self, rows: Any, device: str) -> None:
        self.side.check(rows, device, self.rank)

    def shift(self, *arrays: Any, into: Sequence[Any] | None = None) -> _Hop:
        self.alive()
        with self.side.here():
            parcel = Parcel(self.side, arrays, into)
            sends, receives = parcel.sends(), parcel.receives()
            after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
            communicator, nccl, stream = self.communicator, self.nccl, self.side.stream.ptr

            def post() -> None:
                nccl.groupStart()
                try:
                    for address, size in sends:
                        communicator.send(address, size, nccl.NCCL_UINT8, after, stream)
                    for address, size in receives:
                        communicator.recv(address, size, nccl.NCCL_UINT8, before, stream)
                finally:
                    nccl.groupEnd()

            done = self._post(post, parcel, "its neighbours")
        self.sent += sum(size for _, size in sends)
        return _Hop(self, self._posts, parcel, done)

    def sum(self, value: Any) -> Any:
        with self.side.here():
            values = self.device.xp.asarray(value)
            every = self._gather(values)
            total = every[0].copy()
            for rank in range(1, self.size):
                total += every[rank]
            return total.reshape(values.shape)

    def exchange(self, words: str) -> list[str]:
        frame = np.frombuffer(words.encode()[:WORDS].ljust(WORDS), np.uint8)
        with self.side.here():
            every = self._gather(self.device.xp.asarray(frame))
            self.settle()  # fetching would wait for a lost peer for ever
            return [bytes(row).rstrip().decode(errors="replace") for row in self.device.fetch(every)]

    def settle(self) -> None:
        self._see(self._posts + 1)

    def die(self, reason: str) -> RingError:
        """The ring is dead, and so is its communicator: kernels that wait for a peer would hold the device for ever."""
        if self.dead is None:
            abort = threading.Thread(target=self._abort, name=f"abort of rank {self.rank}", daemon=True)
            abort.start()
            abort.join(ABORT)  # NCCL before 2.19 may hang in it, and then nobody shall hang with it
        return super().die(reason)

    # -- posting, and looking after what was posted ------------------------------------------------

    def _gather(self, mine: Any) -> Any:
        """`[size, length]`: every rank's vector, all of one length; for the stream that computes."""
        self.alive()
        xp, address = self.device.xp, self.device.address
        mine = xp.ascontiguousarray(mine).reshape(-1)
        every = xp.empty((self.size, len(mine)), mine.dtype)
        where, stream, kind = (address(mine), address(every), mine.nbytes), self.side.stream.ptr, self.nccl.NCCL_UINT8
        done = self._post(lambda: self.communicator.allGather(*where, kind, stream), (mine, every), "the other ranks")
        self.side.before(done)
        self._see(self._posts)
        return every

    def _post(self, call: Callable[[], None], held: Any, whom: str) -> Any:
        """NCCL's call, behind what has been computed so far; the event of its end. held: what it reads and writes."""
        self.side.behind()
        self._guard(lambda: self._caller.make(call, held, self.timeout), whom)
        done = self.side.mark()
        self._posts += 1
        self._under_way.append((self._posts, done, held))
        return done

    def _see(self, before: int) -> None:
        """Wait until all that was posted before the post of this number has come to its end."""
        deadline = time.monotonic() + self.timeout
        while self._under_way and self._under_way[0][0] < before:
            _, done, _ = self._under_way[0]
            while not self.side.ended(done):
                self._guard(self.communicator.check_async_error, "a peer")
                if time.monotonic() > deadline:
                    raise self._lost("the other ranks", "a hop or a sum did not end")
                time.sleep(1e-4)
            self._under_way.popleft()

    def _guard(self, call: Callable[[], Any], whom: str) -> Any:
        try:
            return call()
        except TimeoutError as error:
            raise self._lost(whom, "NCCL's call did not return") from error
        except self.nccl.NcclError as error:
            raise self._lost(whom, str(error)) from error

    def _lost(self, whom: str, why: str) -> RingError:
        return self.die(
            f"rank {self.rank} of {self.size} lost {whom} of its ring (timeout {self.timeout:g} s): {why}. "
            "Its communicator has been aborted."
        )

    def _abort(self) -> None:
        with suppress(self.nccl.NcclError):
            self.communicator.abort()


class _Hop:
    """One shift of one rank, under way on the side stream."""

    __slots__ = ("arrived", "done", "number", "parcel", "ring")

    def __init__(self, ring: Ring, number: int, parcel: Parcel, done: Any) -> None:
        self.ring, self.number, self.parcel, self.done = ring, number, parcel, done
        self.arrived: tuple[Any, ...] | None = None

    def wait(self) -> tuple[Any, ...]:
        ring = self.ring
        if self.arrived is None:
            ring.alive()
            with ring.side.here():
                ring.side.before(self.done)
                arrived = self.parcel.unpack()
            ring._see(self.number)
            self.arrived = arrived
        return self.arrived


class _Caller:
    """A thread that makes calls which may never return. One that does not takes the thread with it, and nobody else."""

    def __init__(self, side: Side) -> None:
        self.calls: queue.SimpleQueue[tuple[Callable[[], Any], Any, _Answer] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(self.calls, side), name="NCCL's calls", daemon=True).start()

    def make(self, call: Callable[[], Any], held: Any, seconds: float) -> Any:
        """`call()`; TimeoutError where it has not returned by then. held: what must stay until it has, if ever."""
        answer = _Answer()
        self.calls.put((call, held, answer))
        if not answer.there.wait(seconds):
            raise TimeoutError
        if answer.error is not None:
            raise answer.error
        return answer.value

    def stop(self) -> None:
        self.calls.put(None)

    @staticmethod
    def _run(calls: queue.SimpleQueue[Any], side: Side) -> None:
        """Static, so that the thread does not keep its ring alive."""
        with side.here():
            while (given := calls.get()) is not None:
                call, _, answer = given
                try:
                    answer.value = call()
                except BaseException as error:
                    answer.error = error
                answer.there.set()
                del given, call, _, answer  # from here on arrays are held by whoever still needs them


class _Answer:
    """What became of a call."""

    def __init__(self) -> None:
        self.there = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None


def as_ring(handle: Any, device: Cuda) -> Ring:
    """The ring of a communicator. Raises InvalidInput, and RingError where it is dead."""
    return handle if isinstance(handle, Ring) else Ring(handle, device=device)
