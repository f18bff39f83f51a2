"""How keys travel: the order of posting and waiting, what is allocated, and what a rank holds."""

from __future__ import annotations

import copy
import threading
import tracemalloc
from collections import defaultdict
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nibs
import nibs_numpy.backend
from nibs.threads import ThreadRing, run
from nibs_numpy.tiles import NumpyTiles

D = 8


def rows(rank: int, count: int = 6, width: int = D, dtype: Any = np.float32) -> Any:
    """A shard of both sides, of its own for each rank."""
    r = np.random.default_rng(rank)
    return r.standard_normal((2, count, width)).astype(dtype)


class Events:
    """What each rank did, in order, by the names of the threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[str, list[str]] = defaultdict(list)
        log = self.add
        post = ThreadRing.shift

        class Pending:
            def __init__(self, pending: Any, what: str) -> None:
                self.pending, self.what = pending, what

            def wait(self) -> Any:
                log(f"wait {self.what}")
                return self.pending.wait()

        def shift(ring: ThreadRing, *arrays: Any, into: Any = None) -> Any:
            what = "".join(str(array.ndim) for array in arrays)
            log(f"post {what}")
            return Pending(post(ring, *arrays, into=into), what)

        class Tiles(NumpyTiles):
            def tile_lse(self, *arguments: Any, **options: Any) -> Any:
                log("tile")
                return super().tile_lse(*arguments, **options)

            def tile_grad(self, *arguments: Any, **options: Any) -> Any:
                log("tile")
                return super().tile_grad(*arguments, **options)

        monkeypatch.setattr(ThreadRing, "shift", shift)
        monkeypatch.setattr(nibs_numpy.backend, "NumpyTiles", Tiles)

    def add(self, event: str) -> None:
        self.of[threading.current_thread().name].append(event)


def travelled(keys: str, trail: str, size: int) -> list[str]:
    """One rotation: keys are posted before the tiles and waited for after them, what gathers goes with them."""
    found = []
    for hop in range(size):
        found += [f"post {keys}"] if hop + 1 < size else []
        found += ["tile"]
        found += [f"wait {trail}"] if hop else []
        found += [f"post {trail}"]
        found += [f"wait {keys}"] if hop + 1 < size else []
    return [*found, f"wait {trail}"]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_shift_is_posted_before_the_tiles_and_waited_for_after_them(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Events(monkeypatch)
    run(size, lambda ring: nibs.contrastive_loss_and_grad(*rows(ring.rank), ring=ring))
    # forward: rows, then mass and shift of columns; backward: rows with factor, shift and target, then gradients
    expected = travelled("2", "11", size) + travelled("2111", "2", size)
    assert events.of["rank 0"] == expected
    assert all(seen == expected for seen in events.of.values())


def test_the_sigmoid_needs_one_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(monkeypatch)
    run(3, lambda ring: nibs.contrastive_loss_and_grad(*rows(ring.rank), objective=nibs.Sigmoid(), ring=ring))
    assert [event for event in events.of["rank 0"] if event != "tile"] == [
        event for event in travelled("2", "2", 3) if event != "tile"
    ]


def test_a_frozen_side_of_keys_gathers_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(monkeypatch)
    run(3, lambda ring: nibs.contrastive_loss_and_grad(*rows(ring.rank), wrt=("queries",), ring=ring))
    assert events.of["rank 0"].count("post 2") == 2  # the forward's keys alone


def test_matrices_are_allocated_twice_and_not_once_a_hop(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[int, int] = {}
    count = [0]

    class Tiles(NumpyTiles):
        def zeros(self, *shape: int) -> Any:
            count[0] += len(shape) == 2
            return super().zeros(*shape)

    monkeypatch.setattr(nibs_numpy.backend, "NumpyTiles", Tiles)
    original = nibs.schedule.Call._room
    monkeypatch.setattr(
        nibs.schedule.Call,
        "_room",
        lambda call, like, n: (count.__setitem__(0, count[0] + (like.ndim == 2)), original(call, like, n))[1],
    )
    for size in (3, 8):
        count[0] = 0
        run(size, lambda ring: nibs.contrastive_loss_and_grad(*rows(ring.rank), ring=ring))
        made[size] = count[0] / size
    # two to receive keys in, in either rotation; three gradients on their way; the queries' own
    assert made == {3: 8, 8: 8}


def test_memory_is_linear_in_the_local_shard_while_the_batch_grows() -> None:
    local, width = 512, 64

    def peak(size: int) -> float:
        shards = [rows(rank, local, width) for rank in range(size)]
        tracemalloc.start()
        run(size, lambda ring: nibs.contrastive_loss_and_grad(*shards[ring.rank], ring=ring, memory="3MB"))
        _, high = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return high / size

    two, four, eight = (peak(size) for size in (2, 4, 8))
    shard = local * width * 4
    assert max(two, four, eight) < 30 * shard
    # threads do not all reach their peak at one time; what must not be is growth with the ring
    assert eight < 1.3 * max(two, four), f"peak per rank: {two:.0f}, {four:.0f}, {eight:.0f} bytes at 2, 4, 8 ranks."


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_a_rank_holds_what_its_plan_says(kind: Any) -> None:
    size, local, width = 4, 512, 64
    shards = [rows(rank, local, width, kind) for rank in range(size)]
    nibs.contrastive_loss_and_grad(*shards[0])  # what the first call imports is not counted
    plan = nibs.plan(local, local, width, np.dtype(kind).name, memory="3MB", ring_size=size, backend="numpy")
    tracemalloc.start()
    run(size, lambda ring: nibs.contrastive_loss_and_grad(*shards[ring.rank], ring=ring, memory="3MB"))
    _, high = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    returned = 2 * local * width * np.dtype(kind).itemsize
    assert high / size <= 1.05 * plan.memory + returned


@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.InfoNCE("query_to_key"), nibs.Sigmoid()], ids=repr)
def test_the_planner_tells_the_plan_that_a_rank_runs_under(objective: Any) -> None:
    size, local, width = 4, 512, 64
    shards = [rows(rank, local, width, ml_dtypes.bfloat16) for rank in range(size)]
    asked = {"objective": objective, "memory": "3MB"}

    def rank(ring: Any) -> Any:
        return nibs.contrastive_loss_and_grad(*shards[ring.rank], ring=ring, stats=True, **asked)[2].plan

    told = nibs.plan(local, local, width, "bfloat16", ring_size=size, backend="numpy", **asked)
    assert run(size, rank) == [told] * size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_bytes_sent_are_what_the_plan_says(size: int, dtype: str) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    m, width = 32, 512
    plan = nibs.plan(m, m, width, dtype, ring_size=size)
    narrow, wide = np.dtype(kind).itemsize, 8 if dtype == "float64" else 4
    assert plan.ring_bytes == m * width * (2 * (size - 1) * narrow + size * wide)

    def rank(ring: Any) -> int:
        nibs.contrastive_loss_and_grad(*rows(ring.rank, m, width, kind), ring=ring)
        return int(ring.sent)

    for sent in run(size, rank):
        assert plan.ring_bytes <= sent <= 1.1 * plan.ring_bytes


def test_what_was_sent_may_be_overwritten_after_the_wait() -> None:
    def rank(ring: Any) -> list[float]:
        seen, mine, into = [], np.full(3, float(ring.rank)), np.empty(3)
        for _ in range(50):
            pending = ring.shift(mine, into=[into])
            (arrived,) = pending.wait()
            seen.append(float(arrived[0]))
            mine[...] = arrived
        return seen

    for index, seen in enumerate(run(4, rank)):
        assert seen == [(index - 1 - hop) % 4 for hop in range(50)]


def test_a_sum_has_the_same_bits_on_every_rank() -> None:
    totals = run(7, lambda ring: ring.sum(np.float32(0.1) * np.arange(5, dtype=np.float32) ** ring.rank))
    assert len({total.tobytes() for total in totals}) == 1


def test_every_rank_hears_every_rank() -> None:
    assert run(3, lambda ring: ring.exchange(f"I am {ring.rank}")) == [["I am 0", "I am 1", "I am 2"]] * 3


def test_ids_of_different_widths_meet_as_the_wider_one():
    shards = [rows(rank, 3, dtype=np.float64) for rank in range(2)]
    ids = [np.array([1, 2, 3], np.int32), np.array([2**32 + 1, 7, 8], np.int64)]  # the first of each: equal in 32 bits
    objective = nibs.InfoNCE(same_id="exclude")

    def rank(ring: ThreadRing) -> Any:
        mine = {"query_ids": ids[ring.rank], "key_ids": ids[ring.rank], "objective": objective}
        return nibs.contrastive_loss(*shards[ring.rank], ring=ring, **mine)

    every = np.concatenate(ids).astype(np.int64)
    queries, keys = np.concatenate(shards, 1)
    whole = nibs.contrastive_loss(queries, keys, query_ids=every, key_ids=every, objective=objective)
    assert [float(loss) for loss in run(2, rank)] == pytest.approx([float(whole)] * 2, rel=1e-12)


def test_a_rank_that_fails_within_a_rotation_finds_its_own_ring_dead():
    def fail(*_: Any, **__: Any) -> Any:
        raise ArithmeticError

    def rank(ring: ThreadRing) -> Any:
        if ring.rank == 1:
            ring.shift = fail  # type: ignore[method-assign]
        with pytest.raises((ArithmeticError, nibs.errors.RingError)):
            nibs.contrastive_loss(*rows(ring.rank), ring=ring)
        return ring.dead

    reasons = run(2, rank, timeout=0.5)
    assert reasons[1] == "rank 1 of 2 raised ArithmeticError in the middle of a call."


def test_the_host_reads_no_sum_that_has_not_been_settled(monkeypatch: pytest.MonkeyPatch):
    # on streams such a read would wait for a lost peer for ever
    unsettled: dict[int, list[str]] = defaultdict(list)

    class OnStreams(np.ndarray):
        """What a sum makes of an array, until it is settled."""

        def __float__(self) -> float:
            assert not unsettled[threading.get_ident()], "read before it was settled."
            return float(np.asarray(self))

        def __bool__(self) -> bool:
            return bool(float(self))

    def summed(ring: ThreadRing, value: Any) -> Any:
        unsettled[threading.get_ident()].append("sum")
        return total(ring, value).view(OnStreams)

    total = ThreadRing.sum
    monkeypatch.setattr(ThreadRing, "sum", summed)
    monkeypatch.setattr(ThreadRing, "settle", lambda ring: unsettled[threading.get_ident()].clear())

    _, one = run(2, lambda ring: nibs.contrastive_loss(*rows(ring.rank), ring=ring, stats=True)[1].count)
    assert one == 12


def test_a_copy_of_a_ring_is_the_ring():
    def rank(ring: ThreadRing) -> bool:
        return copy.deepcopy({"ring": ring})["ring"] is ring

    assert run(2, rank) == [True, True]
