"""Rings of GPUs, over a stand-in for CuPy's streams and NCCL: see stand_in.py for what it checks.

The shared ring level of the suite runs over both rings; then what it cannot see; then planted faults, each of which
must be found.
"""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from stand_in import CudaError, NcclError, Place, Stream

import nibs
import nibs_cupy.devices
import nibs_cupy.ring
import nibs_cupy.side
from nibs import hookimpl
from nibs.capabilities import Capabilities
from nibs.errors import BackendUnavailable, InvalidInput, RingError
from nibs.registry import registry
from nibs.threads import run_ranks, thread_rings
from nibs_conformance.worlds import ThreadWorld, resolve
from nibs_cupy.device import Cuda, Host, KernelFault
from nibs_cupy.devices import device_rings
from nibs_cupy.plugin import COMMUNICATORS, capabilities
from nibs_cupy.ring import Ring, as_ring
from nibs_cupy.world import open_ring, world

KINDS = ("nccl", "devices")
CLOCKS = ("latest", "earliest")


def rings(place: Place, host: Host, size: int, kind: str, timeout: float = 20.0) -> list[Any]:
    """The ends of one ring, on a device each."""
    numbers = list(range(size))
    if kind == "nccl":
        return [Ring(one, timeout, place.words(host)) for one in place.communicators(numbers)]
    return device_rings(numbers, timeout, place.words(host))


def on_devices(
    place: Place,
    host: Host,
    size: int,
    kind: str,
    function: Callable[..., Any],
    *,
    timeout: float = 20.0,
    **options: Any,
) -> list[Any]:
    """`function(ring)` in a thread for each rank, on its own device and a stream of its own."""
    ends = rings(place, host, size, kind, timeout)

    def rank(thread: Any) -> Any:
        ring = ends[thread.rank]
        place.mine.device = ring.rank
        place.computing_on(ring.rank)
        try:
            return function(ring)
        finally:
            if kind == "devices":
                ring.square.leave(ring.rank, "has ended")

    return run_ranks(thread_rings(size, timeout), rank, **options)


class World(ThreadWorld):
    """For the suite: a fresh place and a fresh ring for each job; what the stand-in finds wrong is an error."""

    def __init__(self, host: Host, size: int, kind: str, clock: str) -> None:
        super().__init__(size)
        self.host, self.kind, self.clock = host, kind, clock

    def run(self, job: str, *arguments: Any, timeout: float = 60.0) -> list[Any]:
        function = resolve(job)
        place = Place(self.size, self.clock, patience=self.ring_timeout)

        def rank(ring: Any) -> Any:
            return function(ring, ring.rank, self.size, *arguments)

        answers = on_devices(place, self.host, self.size, self.kind, rank, timeout=self.ring_timeout, errors=True)
        if not any(isinstance(answer, BaseException) for answer in answers) and job.endswith("solve_shard"):
            place.check()
        return answers


class Outcome:
    """What a run of the suite came to."""

    def __init__(self) -> None:
        self.passed, self.failed, self.reasons = 0, set(), []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid.rpartition("::")[2].partition("[")[0])
            self.reasons.append(f"{report.nodeid}: {report.longreprtext[-600:]}")
        elif report.when == "call" and report.passed:
            self.passed += 1


@pytest.fixture
def conform(host: Host, serve: Callable[[Host], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`conform(kind, clock, *arguments)`: the suite's ring level over that ring."""
    name = serve(host)

    @contextmanager
    def worlds(kind: str, clock: str) -> Iterator[None]:
        class Hooks:
            @hookimpl(tryfirst=True, optionalhook=True)
            def nibs_conformance_world(self, backend: str, size: int) -> Any:
                return World(host, size, kind, clock) if backend == name else None

        hooks = Hooks()
        registry.hooks.register(hooks)
        try:
            yield
        finally:
            registry.hooks.unregister(hooks)

    def run(kind: str, clock: str, *arguments: str) -> Outcome:
        outcome = Outcome()
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        quiet = ("-p", "nibs_conformance.plugin", "-p", "no:cacheprovider", "-qq", "--no-header", "--no-summary")
        where = ("--tb=line", "-c", "/dev/null", "--rootdir", str(tmp_path), "--pyargs", "nibs_conformance.test_ring")
        with worlds(kind, clock):
            pytest.main([*quiet, *where, "--nibs-backend", name, *arguments], plugins=[outcome])
        return outcome

    return run


# -- the suite ------------------------------------------------------------------------------------

FEW = "--nibs-cases=symmetric,everything-symmetric"
# The whole of it passes too, in two minutes: --nibs-cases left out.


@pytest.mark.parametrize("kind", KINDS)
def test_the_ring_level_of_the_suite_passes(conform, kind):
    outcome = conform(kind, "latest", FEW)

    assert not outcome.failed, "\n".join(outcome.reasons)
    assert outcome.passed > 60


# What each fault must be found by; the cases and sizes that find it fastest.
GRADIENTS = "-k=test_gradients_are_complete and 3-ranks"
LOSS = "-k=test_the_loss and 4-ranks"


def nothing(patch: pytest.MonkeyPatch) -> None:
    """The twin that passes where the others fail."""


def no_wait_for_what_is_computed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nibs_cupy.side.Side, "behind", lambda self: None)


def no_wait_for_what_arrives(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nibs_cupy.side.Side, "before", lambda self, event: None)


def _copies_ahead(patch: pytest.MonkeyPatch, late: int) -> None:
    """One of the two hops of a copy (0: the sender's) is taken to be where the other is."""
    copy = nibs_cupy.devices._copy

    def early(*hops: Any) -> Any:
        hops[late].computed = hops[1 - late].computed
        return copy(*hops)

    patch.setattr(nibs_cupy.devices, "_copy", early)


def copies_ahead_of_the_sender(patch: pytest.MonkeyPatch) -> None:
    _copies_ahead(patch, 0)


def copies_ahead_of_the_receiver(patch: pytest.MonkeyPatch) -> None:
    _copies_ahead(patch, 1)


def one_buffer_for_all_hops(patch: pytest.MonkeyPatch) -> None:
    """What is computed with receives the next shard meanwhile."""
    kept: dict[Any, Any] = {}

    def parcel(side: Any, arrays: Any, into: Any) -> Any:
        first = kept.setdefault((id(side), len(into)), [one.base for one in into])
        return make(side, arrays, [buffer[: len(one)] for buffer, one in zip(first, into, strict=True)])

    make = nibs_cupy.side.Parcel
    for module in (nibs_cupy.ring, nibs_cupy.devices):
        patch.setattr(module, "Parcel", parcel)


def to_the_previous_rank(patch: pytest.MonkeyPatch) -> None:
    """The ring turned round: the sizes that ranks expect are those of the wrong neighbour."""
    init = Ring.__init__

    def turned(self: Any, *given: Any, **options: Any) -> None:
        init(self, *given, **options)
        send, recv = self.communicator.send, self.communicator.recv
        other = {(self.rank + 1) % self.size: (self.rank - 1) % self.size}
        other |= {before: after for after, before in other.items()}
        self.communicator.send = lambda *a: send(*a[:3], other[a[3]], a[4])
        self.communicator.recv = lambda *a: recv(*a[:3], other[a[3]], a[4])

    patch.setattr(Ring, "__init__", turned)


def sums_are_not_reduced(patch: pytest.MonkeyPatch) -> None:
    for kind in (Ring, nibs_cupy.devices.DeviceRing):
        patch.setattr(kind, "sum", lambda self, value: value)


@pytest.mark.parametrize(
    "plant, kinds, where",
    [
        (nothing, KINDS, LOSS),
        (nothing, KINDS, GRADIENTS),
        (no_wait_for_what_is_computed, ("nccl",), LOSS),
        (no_wait_for_what_arrives, KINDS, LOSS),
        (copies_ahead_of_the_sender, ("devices",), LOSS),
        (copies_ahead_of_the_receiver, ("devices",), LOSS),
        (one_buffer_for_all_hops, KINDS, GRADIENTS),
        (to_the_previous_rank, ("nccl",), GRADIENTS),
        (sums_are_not_reduced, KINDS, LOSS),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_planted_fault_is_found(conform, monkeypatch, plant, kinds, where):
    if plant is not nothing:
        monkeypatch.setattr(World, "__init__", impatient(World.__init__))
    plant(monkeypatch)
    for kind in kinds:
        outcome = conform(kind, "latest", "--nibs-cases=symmetric", where)

        assert (bool(outcome.failed), bool(outcome.passed)) == (plant is not nothing, plant is nothing), kind


def impatient(init: Any) -> Any:
    """A world whose ranks do not wait for long."""

    def quick(self: Any, *given: Any) -> None:
        init(self, *given)
        self.ring_timeout = 1.0

    return quick


# -- what travels ----------------------------------------------------------------------------------

ROWS = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "bool": np.bool_,
}


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("size", (1, 2, 3))
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_travels_to_the_next_rank(host, kind, size, clock):
    def rank(ring: Any) -> Any:
        arrays = [np.full((2 + ring.rank, 3), ring.rank).astype(dtype) for dtype in ROWS.values()]
        before = (ring.rank - 1) % size
        into = [np.empty((2 + before, 3), dtype) for dtype in ROWS.values()]
        got = ring.shift(*arrays, into=into).wait()
        assert all(one is other for one, other in zip(got, into, strict=True))
        assert all((one == np.full((2 + before, 3), before).astype(one.dtype)).all() for one in got)
        return ring.sent

    place = Place(size, clock)
    sent = on_devices(place, host, size, kind, rank)

    place.check()
    assert sent == [(2 + rank) * 3 * (8 + 4 + 2 + 2 + 8 + 1) for rank in range(size)]


@pytest.mark.parametrize("kind", KINDS)
def test_strided_empty_and_unprepared_arrays_travel(host, kind):
    def rank(ring: Any) -> Any:
        mine = np.arange(24.0).reshape(4, 6) + 100 * ring.rank
        into = np.zeros((3, 4))
        (strided,) = ring.shift(mine[:, ::2], into=[into.T]).wait()
        (fresh, empty) = ring.shift(mine[::-1], np.empty((0, 5), np.float32)).wait()
        other = np.arange(24.0).reshape(4, 6) + 100 * (1 - ring.rank)
        assert (strided == other[:, ::2]).all() and (strided == into.T).all()
        assert (fresh == other[::-1]).all() and empty.shape == (0, 5)

    place = Place(2)
    on_devices(place, host, 2, kind, rank)
    place.check()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_sent_may_be_overwritten_after_wait_however_late_the_other_reads(host, kind):
    overwritten = threading.Event()

    def rank(ring: Any) -> Any:
        mine = np.full(4, float(ring.rank))
        hop = ring.shift(mine, into=[np.empty(4)])
        if ring.rank == 1:
            assert overwritten.wait(20)
        (got,) = hop.wait()
        if ring.rank == 0:
            mine[:] = -1
            overwritten.set()
        assert (got == 1 - ring.rank).all()

    on_devices(Place(2), host, 2, kind, rank)


@pytest.mark.parametrize("kind", KINDS)
def test_several_hops_may_be_under_way_and_a_wait_may_be_repeated(host, kind):
    def rank(ring: Any) -> Any:
        hops = [ring.shift(np.full(3, 10.0 * ring.rank + number)) for number in range(3)]
        before = (ring.rank - 1) % 3
        for number, hop in reversed(list(enumerate(hops))):
            assert (hop.wait()[0] == 10.0 * before + number).all() and hop.wait() is hop.wait()

    on_devices(Place(3), host, 3, kind, rank)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hop_that_is_waited_for_on_another_stream_gives_its_memory_back_behind_both(host, kind):
    place = Place(2, strict=False)

    def rank(ring: Any) -> Any:
        posted_on = place.current
        hop = ring.shift(np.ones((3, 4))[:, ::2])
        place.computing_on(ring.rank)
        hop.wait()
        return [stream.device_id for stream in posted_on.behind if not stream.computes]

    behind = on_devices(place, host, 2, kind, rank)

    assert [sorted(numbers) for numbers in behind] == ([[0], [1]] if kind == "nccl" else [[0, 1], [0, 1]])


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_are_held_until_their_hop_has_come_to_its_end(host, kind):
    def rank(ring: Any) -> Any:
        arrays = np.ones(3), np.ones(3)
        alive = [weakref.ref(array) for array in arrays]
        hop = ring.shift(arrays[0], into=[arrays[1]])
        later = weakref.ref(arrays[0])
        del arrays
        if ring.rank == 0:  # and though nobody asks for the hop any more
            del hop
            gc.collect()
            return [one() is not None for one in alive]
        hop.wait()
        ring.settle()
        del hop
        gc.collect()
        return later() is not None

    assert on_devices(Place(2), host, 2, kind, rank) == [[True, True], False]


def test_nothing_is_under_way_any_more_when_run_raises(host):
    place = Place(2)

    def rank(ring: Any) -> Any:
        place.computing_on(ring.rank)
        ring.shift(np.ones(3))
        ring.exchange("posted")
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        nibs_cupy.devices.run([0, 1], rank, device=place.words(host))
    assert place.peer_copies == 2
    assert all(stream.done == len(stream.work) for stream in place.streams.values())


def test_what_a_rank_has_raised_is_told_and_not_what_the_device_says_after_it(host, monkeypatch):
    def rank(ring: Any) -> Any:
        raise ArithmeticError

    def fails(stream: Any) -> None:
        raise CudaError("cudaErrorIllegalAddress")

    monkeypatch.setattr(Stream, "synchronize", fails)
    with pytest.raises(ArithmeticError):
        nibs_cupy.devices.run([0, 1], rank, device=Place(2).words(host))


def test_shapes_that_do_not_meet_end_both_ranks_of_a_copy(host):
    def rank(ring: Any) -> Any:
        return str(attempt(ring.shift(np.ones(2 + ring.rank), into=[np.empty(2)]).wait))

    for said in on_devices(Place(2), host, 2, "devices", rank):
        assert "rank 0 of 2 expected arrays [((2,), 'float64')] and got [((3,), 'float64')]" in said


def test_nothing_gathers_where_only_sums_are_taken(host):
    # as on a ring of one, whose calls do not settle
    def rank(ring: Any) -> Any:
        for _ in range(20):
            ring.sum(np.ones(2))
        return len(ring._under_way)

    assert on_devices(Place(1), host, 1, "nccl", rank) == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_has_the_same_bits_on_every_rank_and_words_come_whole(host, kind):
    words = "é" * 400

    def rank(ring: Any) -> Any:
        total = ring.sum(np.array([0.1 * 3**ring.rank, 1e16 * (-1) ** ring.rank]))
        assert ring.exchange(f"{ring.rank} {words}") == [f"{rank} {words}" for rank in range(3)]
        return total.tobytes(), ring.sum(np.float32(ring.rank)).shape

    one, *others = on_devices(Place(3), host, 3, kind, rank)

    assert all(other == one for other in others) and one[1] == ()


def test_ranks_may_share_a_device(host):
    place = Place(2, strict=False)

    def rank(ring: Any) -> Any:
        return nibs.contrastive_loss(*both(ring.rank), scale=5.0, ring=ring)

    found = nibs_cupy.devices.run([0, 1, 0, 1], rank, device=place.words(host))

    whole = nibs.contrastive_loss(*(np.concatenate(side) for side in zip(*map(both, range(4)), strict=True)), scale=5.0)
    assert np.allclose(found, whole) and place.peer_copies
    assert place.befriended == {(0, 1), (1, 0)}


def both(rank: int) -> Any:
    return np.random.default_rng(rank).standard_normal((2, 3 + rank, 8)).astype(np.float32)


# -- handles ---------------------------------------------------------------------------------------


def test_a_communicator_is_a_ring_and_so_is_what_cupyx_makes_of_it(host):
    place = Place(1)
    (one,) = place.communicators([0])
    backend = type("NCCLBackend", (), {})()
    backend._comm = one

    for handle in (one, backend):
        ring = as_ring(handle, place.words(host))
        assert (ring.rank, ring.size) == (0, 1) and as_ring(ring, place.words(host)) is ring


def test_what_is_no_communicator_is_refused(host):
    place = Place(1)
    with pytest.raises(InvalidInput, match=r"ring is str: expected a cupy\.cuda\.nccl\.NcclCommunicator"):
        as_ring("world", place.words(host))
    with pytest.raises(InvalidInput, match="seconds above 0"):
        Ring(place.communicators([0])[0], timeout=0, device=place.words(host))
    with pytest.raises(InvalidInput, match=r"devices=\[0, 3\]: expected some of the 2 that this process sees"):
        device_rings([0, 3], device=Place(2).words(host))


def test_communicators_are_claimed_where_there_is_a_gpu_and_by_their_names(host):
    class NcclCommunicator:
        """Of the name alone."""

    NcclCommunicator.__module__, NcclCommunicator.__qualname__ = "cupy_backends.cuda.libs.nccl", "NcclCommunicator"

    claims: Capabilities = capabilities("cuda")
    assert claims.takes_ring(NcclCommunicator()) and not capabilities("host").takes_ring(NcclCommunicator())
    assert claims.takes_ring(thread_rings(1)[0]) and capabilities("host").takes_ring(thread_rings(1)[0])


def test_the_names_and_calls_are_cupys_own():
    cupy = pytest.importorskip("cupy")
    with warnings.catch_warnings(action="ignore"):  # it advises to install NCCL
        from cupy.cuda import nccl
    if not nccl.available:
        pytest.skip("CuPy finds no NCCL")
    import cupyx.distributed

    kinds = (nccl.NcclCommunicator, cupyx.distributed.NCCLBackend)
    assert tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds) == COMMUNICATORS
    place = Place(1)
    theirs, ours = nccl.NcclCommunicator, place.communicators([0])[0]
    for name in ("send", "recv", "allGather"):
        words = theirs.__dict__[name].__doc__.partition("(")[2].partition(")")[0].split(", ")
        assert [word.split()[-1] for word in words[1:]] == list(inspect.signature(getattr(ours, name)).parameters)
    for name in ("abort", "check_async_error", "comm", "device_id", "rank_id", "size"):
        assert hasattr(theirs, name) and hasattr(ours, name)
    for name, mine in vars(place.cupy.cuda.nccl).items():
        assert hasattr(nccl, name) and (not isinstance(mine, int) or getattr(nccl, name) == mine)
    for name in vars(place.cupy.cuda.runtime):
        assert hasattr(cupy.cuda.runtime, name)
    words = cupy.cuda.runtime.memcpyPeerAsync.__doc__.partition("(")[2].partition(")")[0].split(", ")
    assert [word.split()[-1] for word in words] == list(inspect.signature(place._copy).parameters)
    for kind, mine in ((cupy.cuda.Stream, place.nulls[0]), (cupy.cuda.Event, place.cupy.cuda.Event())):
        for name in ("record", "wait_event", "synchronize"):
            assert hasattr(kind, name) or not hasattr(mine, name)


# -- peers that are lost ---------------------------------------------------------------------------


def attempt(call: Callable[[], Any]) -> BaseException:
    with pytest.raises((RingError, InvalidInput)) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("connects", (True, False), ids=("in-the-first-call", "later"))
def test_a_peer_that_never_posts_ends_the_ring_within_its_timeout(host, connects):
    # at first contact NCCL blocks the host, later the device: neither may hold a rank for longer
    place = Place(2, patience=0.1)
    mine, other = place.communicators([0, 1], connects=connects)
    ring = Ring(mine, 0.3, place.words(host))
    error = attempt(lambda: (ring.shift(np.ones(3)).wait(), ring.settle()))

    assert isinstance(error, RingError) and "rank 0 of 2 lost" in str(error) and "timeout 0.3 s" in str(error)
    assert "has been aborted" in str(error) and not mine.comm and other.comm
    assert "this ring is dead" in str(attempt(lambda: ring.sum(np.ones(1))))
    assert "its communicator was aborted" in str(attempt(lambda: as_ring(mine, place.words(host))))


def test_words_that_a_peer_never_says_are_waited_for_no_longer_than_the_timeout(host):
    place = Place(2, patience=0.05)
    ring = Ring(place.communicators([0, 1])[0], 0.2, place.words(host))

    assert "a hop or a sum did not end" in str(attempt(lambda: ring.exchange("here")))


def test_a_hop_that_does_not_end_shows_in_the_next_wait(host):
    place = Place(2, patience=0.05)
    ring = Ring(place.communicators([0, 1], connects=False)[0], 0.2, place.words(host))
    first, second = ring.shift(np.ones(3)), ring.shift(np.ones(3))
    first.wait()

    assert "a hop or a sum did not end" in str(attempt(second.wait))

    with pytest.raises(RingError, match="this ring is dead"):
        second.wait()


def test_arrays_of_a_call_that_does_not_return_are_held(host):
    place = Place(2, patience=0.1)
    mine, _ = place.communicators([0, 1])
    abort, mine.abort = mine.abort, lambda: None  # type: ignore[method-assign]

    def left_behind() -> Any:
        ring, sent = Ring(mine, 0.1, place.words(host)), np.ones(3)
        attempt(lambda: ring.shift(sent))
        return weakref.ref(sent)

    alive = left_behind()
    gc.collect()
    assert alive() is not None

    (caller,) = [thread for thread in threading.enumerate() if thread.name == "NCCL's calls"][-1:]
    abort()
    caller.join(20)
    assert alive() is None


def test_what_nccl_reports_by_itself_ends_the_ring(host):
    place = Place(2, patience=0.05)
    mine, _ = place.communicators([0, 1], connects=False)
    ring = Ring(mine, 20.0, place.words(host))
    hop = ring.shift(np.ones(3))
    mine.trouble = "remote process exited or there was a network error"
    hop.wait()

    assert "network error" in str(attempt(ring.settle))


def test_a_device_that_fails_is_told_at_once_and_not_taken_for_a_lost_peer(host):
    place = Place(2, patience=0.05)
    ring = Ring(place.communicators([0, 1], connects=False)[0], 20.0, place.words(host))
    ring.shift(np.ones(3)).wait()
    place.failed = 700

    with pytest.raises(KernelFault, match=r"the device failed .* CUDA's error 700"):
        ring.settle()


def test_a_call_that_nccl_refuses_ends_the_ring(host):
    place = Place(2)
    mine, _ = place.communicators([0, 1])
    ring = Ring(mine, 20.0, place.words(host))

    def refuse(*_: Any) -> None:
        raise NcclError("invalid usage")

    mine.allGather = refuse  # type: ignore[method-assign]
    assert "invalid usage" in str(attempt(lambda: ring.sum(np.ones(1))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_lost_in_the_very_last_hop_is_told_before_the_call_returns(host, kind):
    # keys alone want a gradient, so that the call ends with a hop and not with a sum: the sixth, two of keys, four of
    # what gathers for them
    def rank(ring: Any) -> Any:
        queries, keys = both(ring.rank)
        hops = iter(range(100))

        def dies(*arrays: Any, into: Any = None) -> Any:
            if ring.rank == 1 and next(hops) == 5:
                raise KeyboardInterrupt
            return type(ring).shift(ring, *arrays, into=into)

        ring.shift = dies
        return nibs.contrastive_loss_and_grad(queries, keys, scale=5.0, wrt=("keys",), ring=ring)

    place = Place(2, patience=0.2)
    left, died = on_devices(place, host, 2, kind, rank, timeout=2.0, errors=True)

    assert isinstance(died, KeyboardInterrupt)
    assert isinstance(left, RingError), left


def test_arrays_of_another_device_are_told_to_all_ranks(host, monkeypatch):
    told, devices = nibs_cupy.side.Side.check, ("cuda:0", "cuda:7")
    monkeypatch.setattr(nibs_cupy.side.Side, "check", lambda self, rows, _, rank: told(self, rows, devices[rank], rank))

    def rank(ring: Any) -> Any:
        return attempt(lambda: nibs.contrastive_loss(*both(ring.rank), ring=ring)), ring.dead

    (here, _), (there, dead) = on_devices(Place(2), host, 2, "nccl", rank)

    assert isinstance(there, InvalidInput) and dead is None
    assert "keys are on cuda:7, and rank 1 of this ring is on cuda:1" in str(there)
    assert isinstance(here, RingError) and "rank 1 of 2 cannot take part: InvalidInput" in str(here)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_another_framework_are_refused_and_the_ring_lives(host, kind):
    torch = pytest.importorskip("torch")

    def rank(ring: Any) -> Any:
        return attempt(lambda: nibs.contrastive_loss(*map(torch.tensor, both(ring.rank)), ring=ring)), ring.dead

    for error, dead in on_devices(Place(2), host, 2, kind, rank):
        assert isinstance(error, InvalidInput) and dead is None
        assert "(torch.Tensor)" in str(error) and "carries CuPy's arrays alone" in str(error)


def test_threads_that_order_no_streams_are_refused_on_gpus_alone(host):
    (ring,) = thread_rings(1)
    (other,) = device_rings([0], device=Place(1).words(host))

    with pytest.raises(InvalidInput, match=r"use nibs_cupy\.devices\.run\(\[0\] \* 1, function\)"):
        nibs_cupy.side.check_streams(ring, "cuda:0")
    nibs_cupy.side.check_streams(ring, "cpu")
    nibs_cupy.side.check_streams(other, "cuda:0")
    nibs_cupy.side.check_streams(None, "cuda:0")


def test_no_thread_outlives_its_ring(host):
    place = Place(1)
    before = set(threading.enumerate())
    ring = Ring(place.communicators([0])[0], device=place.words(host))
    (mine,) = set(threading.enumerate()) - before
    ring.sum(np.ones(2))
    assert mine.is_alive()
    del ring

    mine.join(20)
    assert not mine.is_alive()


# -- the suite's worlds ----------------------------------------------------------------------------


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Place:
    """The stand-in under CuPy's own names, for what imports them; two devices. Arrays are NumPy's."""
    place = Place(2)

    class Module(ModuleType):
        __path__: tuple[str, ...] = ()
        __version__ = "14.2.0"

        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

    cupy, cuda = Module("cupy"), Module("cupy.cuda")
    vars(cuda).update(vars(place.cupy.cuda), is_available=lambda: True)
    cupy.cuda = cuda  # type: ignore[attr-defined]
    groups: dict[Any, list[Any]] = {}

    def join(size: int, name: tuple[int, ...], rank: int) -> Any:
        with place.changed:
            if name not in groups:
                groups[name] = place.communicators(list(range(size)))
        return groups[name][rank]

    names = {"get_unique_id": lambda: tuple(range(-64, 64)), "NcclCommunicator": join}
    vars(place.cupy.cuda.nccl).update(names)
    for name, module in (("cupy", cupy), ("cupy.cuda", cuda), ("cupy.cuda.nccl", place.cupy.cuda.nccl)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Cuda, "address", lambda self, array: array.ctypes.data)
    monkeypatch.setattr(Cuda, "fetch", lambda self, array: np.asarray(array))
    return place


def test_processes_meet_over_nccl_by_a_file(cupy, tmp_path):
    def rank(thread: Any) -> Any:
        ring = open_ring(thread.rank, 2, str(tmp_path), 20.0)
        assert (ring.rank, ring.size, ring.side.number, ring.timeout) == (thread.rank, 2, thread.rank, 20.0)
        return ring.sum(np.array([1.0 + thread.rank])).item()

    assert run_ranks(thread_rings(2), rank) == [3.0, 3.0]


def test_more_ranks_than_devices_are_refused_over_nccl(cupy, tmp_path):
    with pytest.raises(BackendUnavailable, match="3 ranks over NCCL need 3 GPUs, one each, and 2 are here"):
        open_ring(0, 3, str(tmp_path), 20.0)
    with pytest.raises(RingError, match=r"rank 1 of 2 waited 0\.05 s for rank 0 to name the group"):
        open_ring(1, 2, str(tmp_path), 0.05)


def test_ranks_of_a_world_are_dealt_out_over_the_devices(cupy):
    cupy.strict = False

    with world(3, "cuda") as three:
        assert three.run("stand_in:where_am_i") == [(0, 0, 3.0), (1, 1, 3.0), (2, 0, 3.0)]


def test_the_world_is_named_by_a_variable(monkeypatch):
    kinds = {"devices": "DeviceWorld", "threads": "ThreadWorld", "nccl": "ProcessWorld"}
    for kind, name in kinds.items():
        monkeypatch.setenv("NIBS_CUPY_WORLD", kind)
        assert type(world(2, "cuda")).__name__ == name
    monkeypatch.setenv("NIBS_CUPY_WORLD", "mpi")
    with pytest.raises(InvalidInput, match="NIBS_CUPY_WORLD='mpi': expected devices, nccl or threads"):
        world(2, "cuda")
    monkeypatch.delenv("NIBS_CUPY_WORLD")
    assert type(world(2, "host")).__name__ == "ThreadWorld"
