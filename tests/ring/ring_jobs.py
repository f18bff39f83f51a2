"""What the ranks of the tests run, each in a process of its own; called as `job(ring, rank, size, ...)`."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import nibs
import nibs_torch
import nibs_torch.ring
from nibs.errors import InvalidInput, RingError
from nibs_torch.tiles import TorchTiles

D = 8
SPLIT = (5, 1, 0, 9, 2, 3, 4, 7)


def shard(rank: int, rows: int = 6, width: int = D, dtype: Any = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of one rank."""
    r = np.random.default_rng(rank)
    queries, keys = (torch.from_numpy(r.standard_normal((rows, width))).to(dtype) for _ in range(2))
    return queries, keys


def batch(sizes: tuple[int, ...], **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch of ranks that hold `sizes` rows."""
    parts = [shard(rank, rows, **how) for rank, rows in enumerate(sizes)]
    return torch.cat([one for one, _ in parts]), torch.cat([other for _, other in parts])


def attempt(call: Any) -> tuple[str, str, float]:
    """The error that a call ends with, its text, and the seconds it took."""
    begun = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begun
    return "", "", time.monotonic() - begun


def agrees(ring: Any, rank: int, size: int) -> float:
    """How far a call on this ring is from the whole batch on one device."""
    sizes = SPLIT[:size]
    whole = nibs.contrastive_loss_and_grad(*batch(sizes), scale=2.0)
    loss, gradients = nibs.contrastive_loss_and_grad(*shard(rank, sizes[rank]), scale=2.0, ring=ring)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    apart = [
        loss - whole[0],
        gradients.queries - whole[1].queries[mine],
        gradients.keys - whole[1].keys[mine],
        gradients.scale - whole[1].scale,
    ]
    return max(float(one.abs().max()) for one in apart if one.numel())


# -- losing a peer ---------------------------------------------------------------------------------


def until_it_breaks(ring: Any, rank: int, size: int, folder: str) -> Any:
    """Call until something goes wrong; a file tells when the ring is under way. Then what a dead ring says."""
    begun = time.monotonic()
    for count in range(100_000):
        kind, text, took = attempt(lambda: nibs.contrastive_loss_and_grad(*shard(rank), ring=ring))
        if kind:
            return kind, text, took, attempt(lambda: nibs.contrastive_loss_and_grad(*shard(rank), ring=ring))
        if count == 3:
            (Path(folder) / f"rank-{rank}-is-under-way").touch()
        if time.monotonic() - begun > 60:
            break
    return "", "nothing went wrong", 0.0, ("", "", 0.0)


def raise_within(ring: Any, rank: int, size: int, who: int) -> Any:
    """Rank `who` raises in the middle of a rotation, with its second tile."""
    if rank == who:
        count, tile_lse = [0], TorchTiles.tile_lse

        def broken(self: Any, *arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == 2:
                raise ArithmeticError("this rank's kernel failed")
            return tile_lse(self, *arguments, **options)

        TorchTiles.tile_lse = broken  # type: ignore[method-assign]
        try:
            return attempt(lambda: nibs.contrastive_loss_and_grad(*shard(rank), ring=ring))
        finally:
            TorchTiles.tile_lse = tile_lse  # type: ignore[method-assign]
    return attempt(lambda: nibs.contrastive_loss_and_grad(*shard(rank), ring=ring))


def fresh_group(ring: Any, rank: int, size: int) -> Any:
    """A new group for the same ranks works where the old one is dead."""
    group = dist.new_group(list(range(size)))
    found = agrees(nibs_torch.Ring(group, timeout=20), rank, size)
    dist.destroy_process_group(group)
    return found, attempt(lambda: nibs.contrastive_loss_and_grad(*shard(rank), ring=ring))


def survivors(ring: Any, rank: int, size: int, folder: str, lost: int) -> Any:
    """The ranks that are left start over, without the lost one."""
    begun = time.monotonic()
    dist.destroy_process_group()
    left = [one for one in range(size) if one != lost]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-again", rank=left.index(rank), world_size=len(left)
    )
    return agrees(nibs_torch.Ring(timeout=20), left.index(rank), len(left)), time.monotonic() - begun


# -- groups and handles ----------------------------------------------------------------------------


def groups(ring: Any, rank: int, size: int) -> Any:
    """Two rings side by side, of the even and of the odd ranks."""
    even, odd = dist.new_group(list(range(0, size, 2))), dist.new_group(list(range(1, size, 2)))
    mine = odd if rank % 2 else even
    place, count = rank // 2, dist.get_world_size(mine)
    outside = attempt(lambda: nibs_torch.Ring(even if rank % 2 else odd))
    return agrees(mine, place, count), agrees(nibs_torch.Ring(mine), place, count), outside


def mesh(ring: Any, rank: int, size: int) -> Any:
    """One dimension of a mesh of two."""
    from torch.distributed.device_mesh import init_device_mesh

    both = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replica", "data"))
    found = agrees(both["data"], rank % (size // 2), size // 2)
    return found, attempt(lambda: nibs.contrastive_loss_and_grad(*shard(rank), ring=both))


def numpy_rows(ring: Any, rank: int, size: int) -> float:
    """NumPy's rows on PyTorch's ring."""
    queries, keys = (one.numpy() for one in shard(rank, SPLIT[rank]))
    whole = nibs.contrastive_loss(*(one.numpy() for one in batch(SPLIT[:size])))
    return abs(float(nibs.contrastive_loss(queries, keys, ring=ring)) - float(whole))


def foreign_kernels(ring: Any, rank: int, size: int) -> float:
    """PyTorch's rows and autograd, NumPy's kernels, PyTorch's ring."""
    queries, keys = (one.requires_grad_() for one in shard(rank, SPLIT[rank]))
    nibs.contrastive_loss(queries, keys, ring=ring, backend="numpy").backward()
    again, others = (one.requires_grad_() for one in shard(rank, SPLIT[rank]))
    nibs.contrastive_loss(again, others, ring=ring).backward()
    apart = [queries.grad - again.grad, keys.grad - others.grad]  # type: ignore[operator]
    return max(float(one.abs().max()) for one in apart if one.numel()) if len(queries) else 0.0


def handles(ring: Any, rank: int, size: int) -> Any:
    """What is no ring, and what a ring may not be."""
    call = lambda handle: attempt(lambda: nibs.contrastive_loss(*shard(rank), ring=handle))  # noqa: E731
    return call("world"), call(7), attempt(lambda: nibs_torch.Ring(timeout=0)), attempt(lambda: nibs_torch.Ring("gloo"))


def keys_of_rings(ring: Any, rank: int, size: int) -> Any:
    """A ring is found by its key, also after the object is gone."""
    from nibs_torch.ring import ring_of

    key = nibs_torch.Ring(timeout=7.5).key
    gc.collect()
    found = ring_of(key)
    return ring_of(ring.key) is ring, found.timeout, found.group is ring.group, attempt(lambda: ring_of("5.0 nowhere"))


def no_leak(ring: Any, rank: int, size: int) -> bool:
    """A group is free once its caller lets go of it."""
    group = dist.new_group(list(range(size)))
    found = agrees(group, rank, size)
    watched = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return found < 1e-5 and watched() is None


def wire(ring: Any, rank: int, size: int, dtype: str) -> tuple[int, int]:
    """Bytes sent by one call, and what the plan says."""
    rows, width = 32, 512
    before = ring.sent
    nibs.contrastive_loss_and_grad(*shard(rank, rows, width, getattr(torch, dtype)), ring=ring)
    return ring.sent - before, nibs.plan(rows, rows, width, dtype, ring_size=size).ring_bytes


def strided(ring: Any, rank: int, size: int) -> float:
    """Columns of a wider tensor travel as what they are."""
    queries, keys = shard(rank, 6)
    wide = torch.cat([torch.full_like(queries, torch.nan), queries, keys], 1)
    loss = nibs.contrastive_loss(wide[:, D : 2 * D], wide[:, 2 * D :], ring=ring)
    return float((loss - nibs.contrastive_loss(*batch((6,) * size))).abs())


def peak(ring: Any, rank: int, size: int, rows: int, width: int, memory: str) -> int:
    """Bytes that a call adds to this process's resident memory at its highest."""
    queries, keys = shard(rank, rows, width)
    nibs.contrastive_loss_and_grad(*shard(rank, 4, width), ring=ring)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark
    before = _status("VmRSS")
    nibs.contrastive_loss_and_grad(queries, keys, ring=ring, memory=memory)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


__all__ = ["InvalidInput", "RingError"]


def values_by_foreign_kernels(ring: Any, rank: int, size: int) -> float:
    """Per-row values by NumPy's kernels under PyTorch's autograd; the factors of one rank alone are negative."""
    sizes = SPLIT[:size]
    g = torch.linspace(-2, 2, sum(sizes))
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = []
    for backend in ("numpy", "torch"):
        queries, keys = (one.requires_grad_() for one in shard(rank, sizes[rank]))
        # the others' targets are the diagonal, by default
        targets = torch.arange(sizes[rank]) if rank == 0 else None
        values = nibs.contrastive_loss(queries, keys, ring=ring, reduction="none", backend=backend, targets=targets)
        found.append(torch.autograd.grad(values, (queries, keys), g[mine].to(values.dtype)))
    return max(float((one - other).abs().max()) if len(one) else 0.0 for one, other in zip(*found, strict=True))


def budgets_of_their_own(ring: Any, rank: int, size: int) -> tuple[float, str]:
    """One rank has little memory, the others plenty; then one has too little."""
    rows = 64
    queries, keys = (one.requires_grad_() for one in shard(rank, rows))
    memory = "60KB" if rank == 0 else None
    nibs.contrastive_loss(queries, keys, ring=ring, memory=memory).backward()
    whole = nibs.contrastive_loss_and_grad(*batch((rows,) * size))[1]
    apart = queries.grad - whole.queries[rank * rows : (rank + 1) * rows]  # type: ignore[operator]
    kind, text, took = attempt(
        lambda: nibs.contrastive_loss(queries, keys, ring=ring, memory=10 if rank == 0 else None, reduction="none")
    )
    return float(apart.abs().max()), f"{kind}: {text} ({took:.1f} s)"


def what_shift_allows(ring: Any, rank: int, size: int) -> bool:
    """Targets that are not packed, none at all, and NumPy's arrays; each brings the previous rank's numbers."""
    before = (rank - 1) % size
    mine = torch.arange(6.0).reshape(2, 3) + 10 * rank
    wanted = torch.arange(6.0).reshape(2, 3) + 10 * before
    turned, wide = torch.zeros(3, 2).T, np.zeros((2, 6), np.float32)
    (one,) = ring.shift(mine, into=[turned]).wait()
    (two,) = ring.shift(mine.numpy(), into=[wide[:, ::2]]).wait()
    (three,) = ring.shift(mine.T.contiguous().T).wait()
    (four,) = ring.shift(mine.numpy()[::-1]).wait()
    here = one is turned and bool((turned == wanted).all()) and bool((wide[:, ::2] == wanted.numpy()).all())
    return here and bool(
        (two == wanted.numpy()).all() and (three == wanted).all() and (four[::-1] == wanted.numpy()).all()
    )


def sums_of_others_arrays(ring: Any, rank: int, size: int) -> tuple[float, int]:
    """A sum of another framework's numbers, and how often they were asked for by DLPack, which orders streams."""
    asked = []

    class Others(np.ndarray):
        def __dlpack__(self, **options: Any) -> Any:
            asked.append(options)
            return super().__dlpack__(**options)

    total = ring.sum(np.full(2, 1.0 + rank).view(Others))
    return float(total.sum()), len(asked)


def rows_it_does_not_carry(ring: Any, rank: int, size: int) -> Any:
    """What a ring for GPUs alone says of a CPU's rows, before ranks agree."""
    group = dist.new_group(list(range(size)))
    other = nibs_torch.Ring(group)
    other._kinds = {"cuda": "nccl"}
    said = attempt(lambda: other.check(torch.ones(1), "cpu"))
    dist.barrier(group)  # else a rank closes what the others are still opening
    dist.destroy_process_group(group)
    return said, other.dead


class Work:
    """In the place of NCCL's, over gloo's: a wait without a timeout orders streams, and one with tells of failure."""

    def __init__(self, work: Any, what: str = "") -> None:
        self.work, self.what = work, what

    def wait(self, timeout: Any = None) -> None:
        if timeout is None:
            self.work.wait()
        elif self.what == "fails":
            raise RuntimeError("NCCL: a peer has gone")

    def is_completed(self) -> bool:
        return self.what != "never ends"


@contextmanager
def as_on_nccl(size: int, timeout: float = 20.0, hop: int = 0, what: str = "") -> Iterator[Any]:
    """A ring whose works behave as NCCL's; its hop of this number (from 1 on) fails, or never ends."""
    group = dist.new_group(list(range(size)))
    ring = nibs_torch.Ring(group, timeout=timeout)
    ring._kinds = {"cpu": "nccl"}
    post, gather, hops = dist.batch_isend_irecv, nibs_torch.ring.all_gather, [0]

    def posted(operations: Any) -> Any:
        hops[0] += 1
        return [Work(work, what if hops[0] == hop else "") for work in post(operations)]

    dist.batch_isend_irecv = posted
    nibs_torch.ring.all_gather = lambda *given, **options: Work(gather(*given, **options))
    try:
        yield ring
    finally:
        dist.batch_isend_irecv, nibs_torch.ring.all_gather = post, gather
        dist.destroy_process_group(group)


def last_hop_on_streams(ring: Any, rank: int, size: int, what: str) -> Any:
    """What comes of a call whose very last hop fails, or never ends, and of the next call."""
    with as_on_nccl(size, 0.5, 2 * (size - 1) + size, what) as other:

        def call() -> Any:
            nibs.contrastive_loss_and_grad(*shard(rank), wrt=("keys",), objective=ONE_WAY, ring=other)

        return attempt(call), attempt(call)


ONE_WAY = nibs.InfoNCE("query_to_key")


def as_if_on_streams(ring: Any, rank: int, size: int) -> float:
    """The way that NCCL's work is waited for, over gloo's."""
    with as_on_nccl(size) as other:
        return max(agrees(other, rank, size) for _ in range(3))


# -- rows that lie away from the device ------------------------------------------------------------


class Eager:
    """In the place of copies that run ahead on a GPU: made when they are ordered, into the same two buffers."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.buffers = [torch.empty_like(rows) for _ in range(2)]

    def order(self, where: slice, turn: int) -> tuple[torch.Tensor, None]:
        self.buffers[turn].fill_(float("nan"))
        target = self.buffers[turn][: where.stop - where.start]
        return target.copy_(self.rows[where]), None

    def arrived(self, copy: None) -> None:
        """They always have."""


def fetched(ring: Any, rank: int, size: int, dtype: str, options: dict[str, Any]) -> tuple[float, float, int]:
    """As `agrees`, the shards fetched strip by strip as they would be from a host: how far from the whole batch the
    loss and the gradients are, relative to them; and how many strips of gradients went home.
    """
    from nibs_torch import streaming

    sizes, homeward, plain = SPLIT[:size], [], streaming.Fetched.add
    patched = {
        (streaming, "_here"): lambda rows, device: False,
        (streaming._Ahead, "of"): lambda rows, device: Eager(rows),
        (streaming.Fetched, "add"): lambda self, *where: (homeward.append(where), plain(self, *where)),
    }
    kind, plan = getattr(torch, dtype), {"query_tile": 3, "key_tile": 2}
    exact = [tensor.to(torch.float64) for tensor in batch(sizes, dtype=kind)]
    call = {"scale": 2.0, **options}
    loss, truth = nibs.contrastive_loss_and_grad(*exact, **call)
    kept = {where: getattr(*where) for where in patched}
    for where, value in patched.items():
        setattr(*where, value)
    try:
        queries, keys = shard(rank, sizes[rank], dtype=kind)
        keys_out = torch.full_like(keys, float("nan"))
        made = nibs.plan(max(len(queries), 1), max(len(keys), 1), D, dtype, ring_size=size, backend="torch", **plan)
        found, gradients = nibs.contrastive_loss_and_grad(
            queries, keys, ring=ring, device="cpu", out={"keys": keys_out}, plan=made, **call
        )
        assert gradients.keys is keys_out
    finally:
        for (place, name), value in kept.items():
            setattr(place, name, staticmethod(value) if name == "of" else value)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    apart = [0.0]
    for name in ("queries", "keys"):
        whole, part = getattr(truth, name), getattr(gradients, name)
        if whole is not None:
            apart += ((part.double() - whole[mine]).abs() / whole.abs().max()).flatten().tolist()
    return float((found - loss).abs() / loss.abs()), max(apart), len(homeward)
