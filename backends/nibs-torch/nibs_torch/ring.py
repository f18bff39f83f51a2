"""A ring over torch.distributed: one process group, its ranks in order.

    ring = nibs_torch.Ring(group, timeout=60)
    loss = nibs.contrastive_loss(queries, keys, scale=scale, ring=ring)

`ring=` also takes the ProcessGroup itself, or one dimension of a DeviceMesh. gloo carries CPU tensors
and NCCL those of GPUs; gloo carries GPU tensors too, by way of the host and slowly, for trying things out.

Every wait is bounded by the ring's timeout. On gloo a lost peer shows in the wait itself. On NCCL a wait
only orders streams, so the host looks once a hop whether the hop before has really come to an end, and
runs at most that far ahead; `settle` looks after the last one. Not bounded by it is NCCL's first contact, which
blocks the host: that of the group in its first collective (`init_process_group(device_id=...)` moves it to the
start), that of two neighbours in their first hop, which the exchange has just found alive. Nothing here makes, joins
or destroys process groups: those are the caller's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.distributed as dist

from nibs.errors import InvalidInput, RingError
from nibs.ring import WORDS
from nibs.ring import Ring as BaseRing

__all__ = ["Ring", "as_ring", "ring_of"]

TIMEOUT = 600.0
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # by version
TAG = 0x6E69  # apart from what callers send on the same group

_alive: WeakValueDictionary[str, Ring] = WeakValueDictionary()
_dead: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


class Ring(BaseRing):
    """The ranks of `group` as a ring.

    group: a ProcessGroup, a DeviceMesh of one dimension (`mesh["data"]`), or None for all ranks.
    timeout: seconds (or a timedelta) that a rank waits for another before it raises RingError.

    Raises InvalidInput where torch.distributed is not initialised or this process is not in the group.
    """

    def __init__(self, group: Any = None, timeout: float | timedelta = TIMEOUT) -> None:
        self.group = _group(group)
        self.timeout = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
        if not self.timeout > 0:
            raise InvalidInput(f"Ring(timeout={timeout!r}): expected seconds above 0.")
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        ranks = dist.get_process_group_ranks(self.group)
        self._next, self._previous = ranks[(self.rank + 1) % self.size], ranks[(self.rank - 1) % self.size]
        self._ranks = ranks
        self._kinds = _kinds(self.group)
        self._unseen: list[list[Any]] = []  # works of hops that have been ordered and not yet seen to end
        self.sent = 0
        """Bytes that this rank has sent by `shift`."""
        self.key = f"{self.timeout!r} {self.group.group_name}"
        """A name by which `ring_of` finds this ring: what travels through compiled code in its place."""
        _alive[self.key] = self

    @property
    def dead(self) -> str | None:  # type: ignore[override]
        """Why the group can no longer be used, or None; every ring over a group shares its fate."""
        return _dead.get(self.group)

    @dead.setter
    def dead(self, reason: str) -> None:
        _dead[self.group] = reason

    def check(self, rows: Any, device: str) -> None:
        if isinstance(rows, torch.Tensor):
            self._kind(rows)

    def shift(self, *arrays: Any, into: Sequence[Any] | None = None) -> _Hop:
        self.alive()
        if into is None:
            into = [_room(array) for array in arrays]
        hop = _Hop(self, [self._wire(array) for array in arrays], into)
        self.sent += sum(array.nbytes for array in arrays)
        return hop

    def sum(self, value: Any) -> Any:
        tensor = value if isinstance(value, torch.Tensor) else _tensor(value)
        every = self._gather(tensor.detach().reshape(-1).contiguous())
        total = every[0].clone()
        for rank in range(1, self.size):  # in rank order, so that every rank gets the same bits
            total += every[rank]
        total = total.reshape(tensor.shape)
        if isinstance(value, torch.Tensor):
            return total
        return total.numpy() if total.device.type == "cpu" else _framework(value).from_dlpack(total)

    def exchange(self, words: str) -> list[str]:
        frame = words.encode()[:WORDS].ljust(WORDS)
        every = self._gather(torch.frombuffer(bytearray(frame), dtype=torch.uint8).to(self._device()))
        self.settle()  # copying from a GPU would wait for a lost peer for ever
        return [bytes(row.tolist()).rstrip().decode(errors="replace") for row in every.cpu()]

    def settle(self) -> None:
        self._see([])

    def _device(self) -> torch.device:
        """Where words are exchanged: the CPU if the group carries its tensors, else this rank's device."""
        if "cpu" in self._kinds:
            return torch.device("cpu")
        bound = getattr(self.group, "bound_device_id", None)  # of init_process_group(device_id=...)
        return bound if bound is not None else _current(next(iter(self._kinds)))

    def _gather(self, mine: torch.Tensor) -> torch.Tensor:
        """`[size, length]`: every rank's vector, all of one length."""
        self.alive()
        kind = self._kind(mine)
        if kind == "nccl":
            every = mine.new_empty(self.size * len(mine))
            work = self._guard(lambda: all_gather(every, mine, group=self.group, async_op=True))
            self._guard(work.wait)
            self._see([work])
            return every.view(self.size, -1)
        # From each to each by messages, not by a collective: gloo's collectives run on threads of their own,
        # which a lost peer would hold for the group's timeout and not for ours.
        here = mine.cpu()
        every = here.new_empty((self.size, len(here)))
        every[self.rank] = here
        works = []
        for away in range(1, self.size):
            to, source = (self.rank + away) % self.size, (self.rank - away) % self.size
            works.append((to, self._post(dist.isend, here, self._ranks[to])))
            works.append((source, self._post(dist.irecv, every[source], self._ranks[source])))
        deadline = time.monotonic() + self.timeout
        for peer, work in works:
            self._wait(work, deadline, f"rank {peer}")
        return every.to(mine.device)

    # -- messages ---------------------------------------------------------------------------------

    def _post(self, operation: Callable[..., Any], tensor: torch.Tensor, peer: int) -> Any:
        return self._guard(lambda: operation(tensor, peer, group=self.group, tag=TAG))

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (RuntimeError, ValueError) as error:
            raise self._lost("a peer", error) from error

    def _wait(self, work: Any, deadline: float, peer: str) -> None:
        left = max(deadline - time.monotonic(), 0.001)
        try:
            work.wait(timedelta(seconds=left))
        except RuntimeError as error:
            raise self._lost(peer, error) from error

    def _see(self, works: list[Any]) -> None:
        """Work that has been ordered on GPU streams: wait until all work before it has come to its end."""
        self._unseen.append(works)
        while len(self._unseen) > 1:
            for work in self._unseen.pop(0):
                self._until(work.is_completed, "the other ranks")
                # NCCL's work is completed too when it has failed, and tells so only who waits with a timeout.
                self._guard(partial(work.wait, timedelta(seconds=self.timeout)))

    def _until(self, done: Callable[[], bool], what: str) -> None:
        """Poll until `done()`; for work on GPU streams."""
        deadline = time.monotonic() + self.timeout
        while not self._guard(done):
            if time.monotonic() > deadline:
                raise self.die(f"rank {self.rank} of {self.size} waited {self.timeout:g} s for {what}, in vain.")
            time.sleep(0)

    def _lost(self, peer: str, error: Exception) -> RingError:
        reason = str(error).strip().partition("\n")[0]
        return self.die(
            f"rank {self.rank} of {self.size} lost {peer} of its ring (timeout {self.timeout:g} s): {reason}."
        )

    def _kind(self, tensor: torch.Tensor) -> str:
        kind = self._kinds.get(tensor.device.type)
        if kind is None and "gloo" not in self._kinds.values():
            raise InvalidInput(
                f"this ring's group carries {', '.join(self._kinds)} tensors, and these are on {tensor.device}: "
                "make the group with a backend for that device, as init_process_group('cpu:gloo,cuda:nccl') does."
            )
        return kind or "gloo"

    def _wire(self, array: Any) -> torch.Tensor:
        """The array's bytes as they go over the wire, in the dtype's own width."""
        if not isinstance(array, torch.Tensor):  # NumPy's rows, or CuPy's, on a ring of PyTorch's
            packed = array.flags.c_contiguous and getattr(array.flags, "writeable", True)
            return torch.from_dlpack((array if packed else array.copy()).reshape(-1).view("u1"))
        flat = array.detach().contiguous().view(-1)
        return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)  # few or no elements have any stride


class _Hop:
    """One shift of one rank: the sends to the next rank and the receives from the previous one."""

    def __init__(self, ring: Ring, outgoing: list[torch.Tensor], into: Sequence[Any]) -> None:
        self.ring, self.into, self.done = ring, tuple(into), False
        self.outgoing = outgoing  # kept until they are sent
        self.landing = [array if _packed(array) else _room(array) for array in into]
        self.incoming = [ring._wire(array) for array in self.landing]
        self.staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        kinds = {ring._kind(tensor) for tensor in outgoing}
        self.streams = kinds == {"nccl"}
        if not self.streams and any(tensor.device.type != "cpu" for tensor in outgoing):
            self.outgoing = [tensor.cpu() for tensor in outgoing]
            incoming, self.incoming = self.incoming, []
            for tensor in incoming:  # rows that lie in host memory arrive where they are to lie
                self.incoming.append(tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu"))
                if tensor.device.type != "cpu":
                    self.staged.append((tensor, self.incoming[-1]))
        operations = []
        for sent, received in zip(self.outgoing, self.incoming, strict=True):
            if sent.numel():
                operations.append(dist.P2POp(dist.isend, sent, ring._next, ring.group, TAG))
            if received.numel():
                operations.append(dist.P2POp(dist.irecv, received, ring._previous, ring.group, TAG))
        self.works = ring._guard(lambda: dist.batch_isend_irecv(operations)) if operations else []

    def wait(self) -> tuple[Any, ...]:
        ring = self.ring
        if self.done:
            return self.into
        ring.alive()
        if self.streams:
            for work in self.works:
                ring._guard(work.wait)
            ring._see(self.works)
            if any(not isinstance(array, torch.Tensor) for array in self.into):
                arrived = torch.cuda.Event()  # the other framework's stream knows nothing of ours
                arrived.record()
                ring._until(arrived.query, "the other ranks")
        else:
            deadline = time.monotonic() + ring.timeout
            for work in self.works:
                ring._wait(work, deadline, "a neighbour")
            for tensor, here in self.staged:
                tensor.copy_(here)
        for array, landed in zip(self.into, self.landing, strict=True):
            if landed is not array:
                array[...] = landed
        self.done, self.outgoing, self.landing, self.incoming, self.staged, self.works = True, [], [], [], [], []
        return self.into


def as_ring(handle: Any) -> Ring:
    """The ring of a ProcessGroup or of a DeviceMesh of one dimension. Raises InvalidInput."""
    return handle if isinstance(handle, Ring) else Ring(handle)


def ring_of(key: str) -> Ring:
    """The ring that `Ring.key` names, in this process. Raises RingError if its group is gone."""
    ring = _alive.get(key)
    if ring is not None:
        return ring
    timeout, _, name = key.partition(" ")
    try:
        group = dist.distributed_c10d._resolve_process_group(name)
    except (RuntimeError, ValueError) as error:
        raise RingError(f"the process group '{name}' that this was compiled for is gone: compile again.") from error
    return Ring(group, float(timeout))


def _group(handle: Any) -> Any:
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidInput(
            "Ring: torch.distributed is not initialised. Call torch.distributed.init_process_group(...) first, "
            "or pass ring=None on a single device."
        )
    if handle is None:
        return dist.group.WORLD
    if isinstance(handle, dist.device_mesh.DeviceMesh):
        if handle.ndim != 1:
            names = ", ".join(f"mesh[{name!r}]" for name in handle.mesh_dim_names or ()) or "mesh['name']"
            raise InvalidInput(f"a DeviceMesh of {handle.ndim} dimensions is no ring: pass one of them, {names}.")
        return handle.get_group()
    if isinstance(handle, dist.ProcessGroup) and dist.get_rank(handle) >= 0:
        return handle
    if isinstance(handle, dist.ProcessGroup) or handle is dist.GroupMember.NON_GROUP_MEMBER:
        raise InvalidInput("Ring(group): this process is not in that group; call only on the ranks that are.")
    raise InvalidInput(
        f"ring is {type(handle).__name__}: expected a ProcessGroup, a DeviceMesh of one dimension, "
        "or nibs_torch.Ring(group)."
    )


def _packed(array: Any) -> bool:
    """Whether its elements lie one behind the other."""
    return bool(array.is_contiguous() if isinstance(array, torch.Tensor) else array.flags.c_contiguous)


def _room(array: Any) -> Any:
    """A packed array like this one, of whatever framework."""
    if isinstance(array, torch.Tensor):
        return torch.empty_like(array, memory_format=torch.contiguous_format)
    return _framework(array).empty(array.shape, array.dtype)


def _tensor(value: Any) -> torch.Tensor:
    """Another framework's array, its memory shared; DLPack orders the streams of the two."""
    return torch.from_dlpack(value) if hasattr(value, "__dlpack__") else torch.as_tensor(value)


def _framework(array: Any) -> Any:
    """The module of an array that is not PyTorch's: it has been imported, for it made the array."""
    return sys.modules[type(array).__module__.partition(".")[0]]


def _kinds(group: Any) -> dict[str, str]:
    """What carries tensors of which device: `{"cpu": "gloo", "cuda": "nccl"}`."""
    config = dist.get_backend_config(group)
    return dict(part.split(":") for part in str(config).split(",") if ":" in part)


def _current(kind: str) -> torch.device:
    module = getattr(torch, kind, None)
    return torch.device(kind, module.current_device()) if module is not None else torch.device(kind)


def open_ring(rank: int, size: int, folder: str, timeout: float) -> Ring:
    """Join the ranks of this machine over gloo by a file in `folder`; for the conformance suite."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    return Ring(timeout=timeout)
