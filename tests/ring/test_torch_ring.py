"""The ring over torch.distributed: groups and handles, what goes over the wire, and peers that are lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from ring_worlds import answers

pytest.importorskip("torch")

import nibs

World = Callable[..., Any]


# -- groups and handles ----------------------------------------------------------------------------


def test_groups_that_are_not_the_world_are_rings_of_their_own(world: World) -> None:
    for by_group, by_ring, outside in answers(world(4).run("ring_jobs:groups")):
        assert by_group < 1e-5
        assert by_ring < 1e-5
        assert outside[0] == "InvalidInput" and "not in that group" in outside[1]


def test_a_dimension_of_a_mesh_is_a_ring(world: World) -> None:
    for found, whole in answers(world(4).run("ring_jobs:mesh")):
        assert found < 1e-5
        assert whole[0] == "InvalidInput" and "mesh['replica'], mesh['data']" in whole[1]


def test_what_is_no_ring_is_refused(world: World) -> None:
    for word, number, timeout, group in answers(world(2).run("ring_jobs:handles")):
        assert word[0] == "Unsupported" and "ProcessGroup" in word[1]
        assert number[0] == "Unsupported"
        assert timeout[0] == "InvalidInput" and "above 0" in timeout[1]
        assert group[0] == "InvalidInput" and "str" in group[1]


def test_numpy_rows_travel_on_torchs_ring(world: World) -> None:
    assert max(answers(world(4).run("ring_jobs:numpy_rows"))) < 1e-5


def test_foreign_kernels_run_on_torchs_ring(world: World) -> None:
    assert max(answers(world(4).run("ring_jobs:foreign_kernels"))) < 1e-5


def test_foreign_kernels_give_the_gradients_of_single_values(world: World) -> None:
    assert max(answers(world(4).run("ring_jobs:values_by_foreign_kernels"))) < 1e-5


def test_ranks_may_have_budgets_of_their_own(world: World) -> None:
    for rank, (apart, error) in enumerate(answers(world(3).run("ring_jobs:budgets_of_their_own"))):
        assert apart < 1e-5
        assert error.startswith("MemoryBudget" if rank == 0 else "RingError: rank 0"), error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_carry_tensors_too(dtype: str) -> None:
    import torch
    from ring_jobs import SPLIT, batch, shard

    import nibs
    from nibs.threads import run

    kind = getattr(torch, dtype)
    sizes = SPLIT[:4]
    whole = nibs.contrastive_loss_and_grad(*batch(sizes, dtype=kind))

    def rank(ring: Any) -> Any:
        return nibs.contrastive_loss_and_grad(*shard(ring.rank, sizes[ring.rank], dtype=kind), ring=ring)

    ranks = run(4, rank)
    keys = torch.cat([gradients.keys for _, gradients in ranks])
    assert all(abs(loss - whole[0]) < 1e-5 for loss, _ in ranks)
    assert (keys - whole[1].keys).abs().max() < (1e-5 if dtype == "float32" else 1e-2)


def per_row(ring: Any, backend: str) -> Any:
    """A loss whose gradients are made in its backward, which goes round the ring by itself."""
    from ring_jobs import shard

    queries, keys = (one.requires_grad_() for one in shard(ring.rank))
    return nibs.contrastive_loss(queries, keys, ring=ring, reduction="none", backend=backend).sum()


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_a_backward_settles_what_it_has_posted(backend: str) -> None:
    from nibs.threads import run

    def rank(ring: Any) -> list[str]:
        loss, shift, events = per_row(ring, backend), ring.shift, []

        def posted(*arrays: Any, into: Any = None) -> Any:
            events.append("shift")
            return shift(*arrays, into=into)

        ring.shift, ring.settle = posted, lambda: events.append("settled")
        loss.backward()
        return events

    for events in run(2, rank):
        assert "shift" in events and events[-1] == "settled"


def test_gradients_go_to_where_their_inputs_lie_once_the_ring_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    # scale may lie on the CPU beside a batch on a GPU
    from ring_jobs import shard

    import nibs_torch.backend
    from nibs.threads import run

    mine, as_inputs = threading.local(), nibs_torch.backend.Gradients

    def rank(ring: Any) -> list[str]:
        mine.events = []
        shift = ring.shift

        def posted(*arrays: Any, into: Any = None) -> Any:
            mine.events.append("shift")
            return shift(*arrays, into=into)

        ring.shift, ring.settle = posted, lambda: mine.events.append("settled")
        nibs.contrastive_loss_and_grad(*shard(ring.rank), ring=ring, wrt=("queries", "keys"))
        return mine.events[-4:]

    def home(**found: Any) -> Any:
        mine.events.append("home")
        return as_inputs(**found)

    monkeypatch.setattr(nibs_torch.backend, "Gradients", home)
    assert run(2, rank) == [["shift", "settled", "home", "settled"]] * 2


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_a_rank_that_fails_within_a_backward_finds_its_own_ring_dead(backend: str) -> None:
    from nibs.threads import run

    def fail(*_: Any, **__: Any) -> Any:
        raise ArithmeticError

    def rank(ring: Any) -> str | None:
        loss = per_row(ring, backend)
        if ring.rank == 1:
            ring.shift = fail
        with pytest.raises((ArithmeticError, nibs.errors.RingError)):
            loss.backward()
        return ring.dead

    assert run(2, rank, timeout=0.5)[1] == "rank 1 of 2 raised ArithmeticError in the middle of a call."


def test_a_ring_is_found_by_its_key(world: World) -> None:
    for same, timeout, group, nowhere in answers(world(2).run("ring_jobs:keys_of_rings")):
        assert same and timeout == 7.5 and group
        assert nowhere[0] == "RingError" and "compile again" in nowhere[1]


def test_no_group_outlives_its_callers_use(world: World) -> None:
    assert all(answers(world(2).run("ring_jobs:no_leak")))


def test_the_way_of_streams_gives_the_same(world: World) -> None:
    # NCCL itself needs several GPUs; that hops are looked after one later must not depend on it
    assert max(answers(world(4).run("ring_jobs:as_if_on_streams"))) < 1e-5


@pytest.mark.parametrize("what", ["fails", "never ends"])
def test_the_last_hop_on_streams_is_looked_after_before_the_call_returns(fragile: World, what: str) -> None:
    for first, again in answers(fragile(2, 20.0).run("ring_jobs:last_hop_on_streams", what)):
        assert first[0] == "RingError" and ("a peer has gone" if what == "fails" else "waited 0.5 s") in first[1], first
        assert again[0] == "RingError" and "dead" in again[1]


def test_a_shift_puts_things_where_they_are_wanted(world: World) -> None:
    assert all(answers(world(3).run("ring_jobs:what_shift_allows")))


def test_others_numbers_are_summed_behind_what_computes_them(world: World) -> None:
    assert answers(world(2).run("ring_jobs:sums_of_others_arrays")) == [(6.0, 1)] * 2


def test_rows_that_the_group_does_not_carry_are_refused_before_anything_moves(world: World) -> None:
    for (kind, text, _), dead in answers(world(2).run("ring_jobs:rows_it_does_not_carry")):
        assert kind == "InvalidInput" and "carries cuda tensors, and these are on cpu" in text
        assert dead is None


# -- over the wire ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_bytes_sent_are_within_a_tenth_of_the_bound(world: World, size: int, dtype: str) -> None:
    for sent, bound in answers(world(size).run("ring_jobs:wire", dtype)):
        assert bound <= sent <= 1.1 * bound


def test_strided_rows_travel_as_what_they_are(world: World) -> None:
    assert max(answers(world(3).run("ring_jobs:strided"))) < 1e-5


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the highest mark of memory cannot be reset"
)
def test_memory_is_linear_in_the_local_shard_while_the_batch_grows(world: World) -> None:
    rows, width = 1024, 128
    highest = {size: max(answers(world(size).run("ring_jobs:peak", rows, width, "4MB"))) for size in (2, 4, 8)}
    # with the global batch 4 times as large: the same, but for what pages round it
    assert highest[8] < 1.25 * highest[2] + 2**21, f"bytes at 2, 4, 8 ranks: {highest}"


# -- rows that lie away from the device ------------------------------------------------------------

STREAMED = {
    "symmetric": {},
    "one way": {"objective": nibs.InfoNCE("key_to_query")},
    "sigmoid": {"objective": nibs.Sigmoid(), "bias": -1.0},
    "sum": {"reduction": "sum"},
    "keys alone": {"wrt": ("keys",)},
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", STREAMED)
def test_shards_fetched_from_host_memory_give_the_loss_of_the_whole_batch(
    world: World, name: str, dtype: str, size: int
) -> None:
    # Half-precision rows are exact numbers: the loss is of float32, and a gradient is rounded once to its dtype.
    of_loss, of_gradients = {"float64": (64 * 2.0**-52,) * 2, "bfloat16": (64 * 2.0**-24, 2.0**-8)}[dtype]
    for loss, gradients, homeward in answers(world(size).run("ring_jobs:fetched", dtype, STREAMED[name])):
        assert loss <= of_loss
        assert gradients <= of_gradients
        assert homeward > 0, "gradients gather where the rows lie"


def test_strips_are_right_whatever_was_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from ring_jobs import Eager

    from nibs_torch import streaming

    monkeypatch.setattr(streaming._Ahead, "of", lambda rows, device: Eager(rows))
    rows = torch.arange(48.0).reshape(12, 4)
    fetched = streaming.Fetched(rows, torch.device("cpu"))
    for begin, end in [(0, 4), (4, 8), (8, 12), (0, 4), (8, 12), (8, 12), (0, 4), (2, 5), (5, 8), (0, 12), (0, 12)]:
        assert torch.equal(fetched[begin:end], rows[begin:end])


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rows on the CPU are fetched as they would be to a GPU; returns the room that is held for it, by thread."""
    from ring_jobs import Eager

    from nibs_torch import streaming

    room: dict[int, WeakSet[Any]] = defaultdict(WeakSet)
    most: dict[int, int] = defaultdict(int)

    class Counted(Eager):
        def order(self, where: slice, turn: int) -> Any:
            me = threading.get_ident()
            room[me].add(self)
            most[me] = max(most[me], len(room[me]))
            return super().order(where, turn)

    monkeypatch.setattr(streaming, "_here", lambda rows, device: False)
    monkeypatch.setattr(streaming._Ahead, "of", lambda rows, device: Counted(rows))
    return most


def fetched_in_threads(ring: Any, **options: Any) -> None:
    from ring_jobs import shard

    queries, keys = shard(ring.rank)
    made = nibs.plan(len(queries), len(keys), queries.shape[1], ring_size=ring.size, query_tile=2, key_tile=2)
    nibs.contrastive_loss_and_grad(queries, keys, ring=ring, device="cpu", plan=made, **options)


def test_a_ring_is_asked_about_rows_as_they_lie(away: Any) -> None:
    import torch

    from nibs.threads import run

    def rank(ring: Any) -> list[Any]:
        asked: list[Any] = []
        ring.check = lambda rows, device: asked.append(type(rows))
        fetched_in_threads(ring)
        return asked

    assert run(2, rank) == [[torch.Tensor]] * 2


def test_a_visitor_that_has_gone_leaves_its_room_to_the_next(away: Any) -> None:
    from nibs.threads import run

    run(4, fetched_in_threads)
    assert set(away.values()) == {3}  # queries, keys at home, and a visitor


@pytest.mark.parametrize("where", ["away", "here"])
def test_the_host_looks_at_nothing_behind_a_sum_that_has_not_been_settled(
    where: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It looks into plain tiles, and at rows that it fetches and brings home: it would wait for a lost peer for ever.
    import torch

    from nibs.threads import run
    from nibs_torch.streaming import Fetched
    from nibs_torch.tiles import TorchTiles

    if where == "away":
        request.getfixturevalue("away")
    mine = threading.local()

    def seen(work: Any) -> Any:
        def call(*given: Any) -> Any:
            assert mine.last == "settled"
            mine.times += 1
            return work(*given)

        return call

    def rank(ring: Any) -> int:
        mine.last, mine.times, plain = "settled", 0, ring.sum

        def total(value: Any) -> Any:
            mine.last = "summed"
            return plain(value)

        ring.sum, ring.settle = total, lambda: setattr(mine, "last", "settled")
        for objective in (nibs.InfoNCE(), nibs.Sigmoid()):
            fetched_in_threads(ring, weights=torch.ones(6), objective=objective)
        return mine.times

    for place, name in ((Fetched, "__getitem__"), (Fetched, "add"), (TorchTiles, "operand"), (TorchTiles, "tile_grad")):
        monkeypatch.setattr(place, name, seen(getattr(place, name)))
    assert min(run(2, rank)) > 0


# -- peers that are lost ---------------------------------------------------------------------------


def under_way(world: Any, folder: Path) -> None:
    """Wait until every rank has made a few calls."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob("rank-*"))) < world.size:
        assert time.monotonic() < deadline, "the ranks did not get under way."
        os.sched_yield()


@pytest.mark.parametrize(
    ("how", "who", "size"), [(signal.SIGKILL, 1, 3), (signal.SIGSTOP, 0, 3), (signal.SIGKILL, 0, 2)]
)
def test_losing_a_peer_ends_the_others_within_the_timeout(
    fragile: World, tmp_path: Path, how: signal.Signals, who: int, size: int
) -> None:
    timeout = 2.0
    world = fragile(size, timeout)
    world.begin("ring_jobs:until_it_breaks", str(tmp_path))
    under_way(world, tmp_path)
    begun = time.monotonic()
    world.signal(who, how)
    others = [rank for rank in range(size) if rank != who]
    for kind, text, took, again in answers(world.results(30.0, others)):
        assert kind == "RingError" and "lost" in text
        assert took < timeout + 3
        assert again[0] == "RingError" and "dead" in again[1] and again[2] < 0.5
    assert time.monotonic() - begun < 2 * timeout + 6


def test_those_who_are_left_can_start_over(fragile: World, tmp_path: Path) -> None:
    world = fragile(3, 2.0)
    world.begin("ring_jobs:until_it_breaks", str(tmp_path))
    under_way(world, tmp_path)
    world.signal(1, signal.SIGKILL)
    answers(world.results(30.0, [0, 2]))
    world.begin("ring_jobs:survivors", str(tmp_path), 1)
    for apart, took in answers(world.results(30.0, [0, 2])):
        assert apart < 1e-5 and took < 20


def test_a_peer_that_raises_within_a_rotation_ends_the_others(fragile: World) -> None:
    timeout, who = 2.0, 1
    world = fragile(3, timeout)
    for rank, (kind, text, took) in enumerate(answers(world.run("ring_jobs:raise_within", who))):
        if rank == who:
            assert (kind, text) == ("ArithmeticError", "this rank's kernel failed")
        else:
            assert kind == "RingError" and took < timeout + 3
    for apart, old in answers(world.run("ring_jobs:fresh_group")):
        assert apart < 1e-5, "a fresh group of the same ranks must work."
        assert old[0] == "RingError", "the old one must not."


def test_no_process_outlives_its_world(fragile: World, tmp_path: Path) -> None:
    world = fragile(2, 2.0)
    world.begin("ring_jobs:until_it_breaks", str(tmp_path))
    under_way(world, tmp_path)
    world.signal(0, signal.SIGSTOP)
    processes = list(world.processes)
    world.close()
    assert not [process for process in processes if Path(f"/proc/{process.pid}").exists()]
