"""The ring level has teeth: each wrong ring, or wrong use of one, fails the tests named for it; the right one passes.

Each mutant breaks one thing from outside, in this process, where NumPy's ranks are threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import nibs.schedule
import nibs.threads
import nibs.travel
from nibs.schedule import Call
from nibs.threads import ThreadRing
from nibs_conformance.worlds import ThreadWorld

CASES = "symmetric,weights-key-to-query,exclude-symmetric,masks-symmetric,sigmoid"
Patch = pytest.MonkeyPatch


def shift_reversed(patch: Patch) -> None:
    """Sends to the previous rank."""

    def wait(self: Any) -> Any:
        ring = self.ring
        if self.arrays is None:
            before, after = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
            arrived = ring.square.take(("shift", before, self.number), ring, before)
            # it has no idea of shapes: rows are cut or repeated to fit
            self.arrays = tuple(_fit(there, here) for there, here in zip(arrived, self.into, strict=True))
            ring.square.post(("taken", ring.rank, self.number), True)
            ring.square.take(("taken", after, self.number), ring, after)
        return self.arrays

    patch.setattr(nibs.threads._Hop, "wait", wait)


def _fit(there: Any, here: Any) -> Any:
    here[...] = 0
    rows = min(len(there), len(here))
    here[:rows] = there[:rows]
    return here


def last_hop_dropped(patch: Patch) -> None:
    """The keys of the next rank are never visited."""
    rotate = nibs.schedule.rotate

    def short(ring: Any, sizes: Sequence[int], keys: Any, room: Any) -> Any:
        for hop, (visiting, home) in enumerate(rotate(ring, sizes, keys, room)):
            if hop and hop == ring.size - 1:
                visiting.rows = visiting.rows * 0
            yield visiting, home

    patch.setattr(nibs.schedule, "rotate", short)


def scale_gradient_times_the_ranks(patch: Patch) -> None:
    """Summed over ranks where it was complete already."""
    like = Call._like
    patch.setattr(Call, "_like", lambda self, value, given: like(self, value * self.ring.size, given))


def mean_of_means(patch: Patch) -> None:
    """Each rank divides by its own weight, and the ranks are averaged."""
    sums = Call._sums

    def local(self: Any, *values: Any) -> Any:
        if len(values) in (2, 4) and self.ring.size > 1:
            half = len(values) // 2
            means = [v / w if w else 0 * v for v, w in zip(values[:half], values[half:], strict=True)]
            return sums(self, *(mean / self.ring.size for mean in means), *(w * 0 + 1 / self.ring.size for w in means))
        return sums(self, *values)

    patch.setattr(Call, "_sums", local)


def local_lse_only(patch: Patch) -> None:
    """The columns' statistics of other ranks are not merged."""
    patch.setattr(Call, "_join_statistics", lambda self, share, arrived: None)


def gradient_to_the_wrong_owner(patch: Patch) -> None:
    """One hop short: keys' gradients end with the rank before their owner."""
    home = nibs.travel.Trail.home

    def astray(self: Any) -> Any:
        arrays = home(self)
        if arrays[0].ndim == 2 and self.ring.size > 1:
            every = self.ring._gather([array.copy() for array in arrays])
            arrays = tuple(
                _fit(there, here)
                for there, here in zip(every[(self.ring.rank + 1) % self.ring.size], arrays, strict=True)
            )
        return arrays

    patch.setattr(nibs.travel.Trail, "home", astray)


def stale_buffer(patch: Patch) -> None:
    """Reads the buffer before what it waits for has arrived: the last hop's rows are there still."""
    settle = nibs.threads._settle

    def late(arrived: Any, into: Any, ring: Any) -> Any:
        old = [here.copy() for here in into]
        settle(arrived, into, ring)
        seen = ring.__dict__.setdefault("seen", 0)
        ring.seen = seen + 1
        if seen >= 2:
            for here, there in zip(into, old, strict=True):
                here[...] = there
        return tuple(into)

    patch.setattr(nibs.threads, "_settle", late)


def ids_stay_at_home(patch: Patch) -> None:
    """Rows travel, and the ids of the rank's own keys are compared with."""
    pack = nibs.travel.Keys.pack

    def without(self: Any) -> Any:
        arrays = pack(self)
        if self.ids is not None:
            arrays[1] = arrays[1] * 0 - 7
        return arrays

    patch.setattr(nibs.travel.Keys, "pack", without)


def masks_stay_at_home(patch: Patch) -> None:
    """Absent keys of other ranks are candidates."""
    pack = nibs.travel.Keys.pack

    def without(self: Any) -> Any:
        return [array | True if array.dtype == bool else array for array in pack(self)]

    patch.setattr(nibs.travel.Keys, "pack", without)


def one_ranks_loss_only(patch: Patch) -> None:
    """Every rank returns its own part of the loss."""
    patch.setattr(ThreadRing, "sum", lambda self, value: value)


def gradients_of_the_mean_over_ranks(patch: Patch) -> None:
    """1/W: the gradient of a loss that was averaged once more."""
    original = Call._settle

    def settle(self: Any, denominators: Any) -> None:
        original(self, denominators)
        self.settled = self.factor = self.factor / self.ring.size

    patch.setattr(Call, "_settle", settle)


def remote_gradients_dropped(patch: Patch) -> None:
    """Gathered without a gradient: keys hear of their own rank's queries only."""
    patch.setattr(nibs.schedule, "_add_first", lambda share, arrived: None)


def averaging_taken_for_summing(patch: Patch) -> None:
    """grad_reduction="mean" without its factor W."""
    init = Call.__init__

    def plain(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        self.share_of_rows = 1.0

    patch.setattr(Call, "__init__", plain)


def scalars_summed_twice(patch: Patch) -> None:
    """grad_reduction="sum" with complete scalars on every rank."""
    init = Call.__init__

    def plain(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        self.share_of_scalars = 1.0

    patch.setattr(Call, "__init__", plain)


def rank_order_of_sums(patch: Patch) -> None:
    """Every rank adds in an order of its own, and gets bits of its own."""

    def own(self: Any, value: Any) -> Any:
        every = self._gather(value.copy())
        every = every[self.rank :] + every[: self.rank]
        total = every[0].copy()
        for other in every[1:]:
            total = total + other
        return total + 1e-6 * self.rank

    patch.setattr(ThreadRing, "sum", own)


def no_agreement(patch: Patch) -> None:
    """Ranks start without asking what the others are about to do."""
    agree = nibs.schedule.agree

    def trusting(ring: Any, request: Any, scale: Any, bias: Any, *, grad: bool) -> Any:
        shards = agree(nibs.ring.Solo(), request, scale, bias, grad=grad)
        every = ring._gather((request.n, request.m))
        ring.owes = False
        return type(shards)(*zip(*every, strict=True), shards.key_mask, shards.weights)

    patch.setattr(nibs.schedule, "agree", trusting)


def refusal_kept_to_itself(patch: Patch) -> None:
    """A rank with invalid input raises, and tells nobody."""
    import contextlib

    import nibs.dispatch

    patch.setattr(nibs.dispatch, "joining", lambda ring: contextlib.nullcontext())


LOSS = "test_the_loss_is_that_of_the_whole_batch_on_every_rank"
GRADIENTS = "test_gradients_are_complete_as_returned"
STATS = "test_stats_are_global"
FETCHED = "test_shards_in_host_memory_travel_and_are_fetched"
MEAN = "test_mean_undoes_what_an_averaging_wrapper_does"
SUM = "test_sum_undoes_what_a_summing_wrapper_does"
UNLIKE = "test_ranks_that_disagree_all_hear_of_both_sides"
INVALID = "test_a_rank_with_invalid_input_tells_the_others"

MUTANTS: dict[Callable[[Patch], None], tuple[str, ...]] = {
    shift_reversed: (LOSS, GRADIENTS),
    last_hop_dropped: (LOSS, GRADIENTS),
    scale_gradient_times_the_ranks: (GRADIENTS,),
    mean_of_means: (LOSS,),
    local_lse_only: (LOSS, GRADIENTS),
    gradient_to_the_wrong_owner: (GRADIENTS,),
    stale_buffer: (LOSS, GRADIENTS),
    ids_stay_at_home: (LOSS, GRADIENTS),
    masks_stay_at_home: (LOSS, GRADIENTS),
    one_ranks_loss_only: (LOSS, GRADIENTS, STATS),
    gradients_of_the_mean_over_ranks: (GRADIENTS,),
    remote_gradients_dropped: (GRADIENTS, FETCHED),
    averaging_taken_for_summing: (MEAN,),
    scalars_summed_twice: (SUM,),
    rank_order_of_sums: (LOSS,),
    no_agreement: (UNLIKE,),
    refusal_kept_to_itself: (INVALID,),
}


class Outcomes:
    """Names of the tests that failed, and how many passed."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed[report.nodeid.rpartition("::")[2].partition("[")[0]] = report.longreprtext[-400:]
        self.passed += report.passed and report.when == "call"


def ring_level(tmp_path: Path, patch: Patch, tests: tuple[str, ...] = ()) -> Outcomes:
    """The ring level against NumPy at 3 ranks (4 for what travels), the tests named or all."""
    patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    patch.delenv("PYTEST_ADDOPTS", raising=False)
    patch.setattr(ThreadWorld.__init__, "__defaults__", (1.0,))  # who waits in vain does not wait for long
    found = Outcomes()
    plain = [
        "-p",
        "nibs_conformance.plugin",
        "-p",
        "no:cacheprovider",
        "-qq",
        "--no-header",
        "--no-summary",
        "--tb=line",
    ]
    where = ["-c", "/dev/null", "--rootdir", str(tmp_path), "--pyargs", "nibs_conformance.test_ring"]
    wanted = " or ".join(tests) if tests else "test_"
    chosen = ["--nibs-backend", "numpy", "--nibs-dtypes", "float32", "--nibs-cases", CASES]
    pytest.main([*plain, *where, *chosen, "-k", f"({wanted}) and not 8-ranks and not never_comes"], plugins=[found])
    return found


def test_the_right_ring_passes(tmp_path: Path, monkeypatch: Patch) -> None:
    found = ring_level(tmp_path, monkeypatch)
    assert found.failed == {}
    assert found.passed > 60


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_wrong_ring_is_caught(tmp_path: Path, monkeypatch: Patch, mutant: Callable[[Patch], None]) -> None:
    mutant(monkeypatch)
    found = ring_level(tmp_path, monkeypatch, MUTANTS[mutant])
    assert set(found.failed) == set(MUTANTS[mutant])


def test_there_are_enough_mutants() -> None:
    assert len(MUTANTS) >= 10
