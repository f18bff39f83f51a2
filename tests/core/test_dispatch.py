"""Whose turn it is: backend=, use_backend, NIBS_BACKEND, the owner; per thread and per task; and the policy."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import nibs
from nibs import errors


def _call(batch, **options):
    return nibs.contrastive_loss_and_grad(batch.queries, batch.keys, **options)


def _served(here):
    return [name for name, toy in here.served.items() if toy.requests]


def test_owner_of_the_arrays_serves_unless_told_otherwise(here, batch):
    here.add("one")

    _call(batch)

    assert _served(here) == []


def test_environment_goes_before_the_owner(here, batch, monkeypatch):
    here.add("one")
    monkeypatch.setenv("NIBS_BACKEND", "one")

    _call(batch)

    assert _served(here) == ["one"]


def test_use_backend_goes_before_the_environment(here, batch, monkeypatch):
    here.add("one"), here.add("two")
    monkeypatch.setenv("NIBS_BACKEND", "one")

    with nibs.use_backend("two"):
        _call(batch)

    assert _served(here) == ["two"]


def test_argument_goes_before_use_backend(here, batch):
    here.add("one"), here.add("two")

    with nibs.use_backend("two"):
        _call(batch, backend="one")

    assert _served(here) == ["one"]


def test_inner_use_backend_goes_before_the_outer(here, batch):
    here.add("one"), here.add("two")

    with nibs.use_backend("one"), nibs.use_backend("two"):
        _call(batch)

    assert _served(here) == ["two"]


def test_use_backend_ends_with_its_block_also_by_an_exception(here, batch):
    here.add("one")

    with pytest.raises(KeyError), nibs.use_backend("one"):
        raise KeyError
    _call(batch)

    assert _served(here) == []


def test_use_backend_refuses_an_unknown_name_at_once(here):
    with pytest.raises(errors.UnknownBackend), nibs.use_backend("nobody"):
        pytest.fail("the block must not be entered")


def test_nobody_is_served_by_another_backend_than_the_one_asked_for(here, batch):
    here.add("one", dtypes={"float64"})

    with pytest.raises(errors.Unsupported):
        _call(batch, backend="one")

    assert _served(here) == []


def test_use_backend_is_a_thread_s_own(here, batch):
    toys = {name: here.add(name) for name in ("one", "two")}
    together = threading.Barrier(2)

    def work(name):
        with nibs.use_backend(name):
            together.wait(timeout=30)
            for _ in range(20):
                _call(batch)
            together.wait(timeout=30)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, toys))

    assert [len(toy.requests) for toy in toys.values()] == [20, 20]


def test_use_backend_is_not_seen_by_a_thread_that_began_elsewhere(here, batch):
    here.add("one")
    begin, ended = threading.Event(), threading.Event()

    def work():
        begin.wait(timeout=30)
        _call(batch)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    with nibs.use_backend("one"):
        begin.set()
        ended.wait(timeout=30)
    thread.join()

    assert _served(here) == []


def test_use_backend_is_a_task_s_own(here, batch):
    toys = {name: here.add(name) for name in ("one", "two")}

    async def work(name):
        with nibs.use_backend(name):
            for _ in range(5):
                await asyncio.sleep(0)
                _call(batch)

    async def both():
        await asyncio.gather(*map(work, toys))

    asyncio.run(both())

    assert [len(toy.requests) for toy in toys.values()] == [5, 5]


def test_newcomer_with_the_same_arrays_does_not_take_them_over(here, batch):
    here.add("abacus", arrays=("numpy.ndarray",))

    _call(batch)

    assert _served(here) == []


# -- "fastest" ------------------------------------------------------------------------------------


def test_policy_chooses_by_what_it_sees_of_the_request(here, batch):
    here.add("small")
    here.add("large", select=lambda request, candidates: "large" if request.n > 4 else "small")

    _call(batch, backend="fastest")

    assert _served(here) == ["large"]


def test_policy_sees_only_those_that_can(here, batch):
    seen = []
    here.add("narrow", dtypes={"float64"})
    here.add("wide", select=lambda request, candidates: seen.extend(info.name for info in candidates))

    _call(batch, backend="fastest")

    assert sorted(seen) == ["numpy", "wide"]


def test_without_a_policy_s_answer_the_owner_serves(here, batch):
    here.add("one", select=lambda request, candidates: None)

    _call(batch, backend="fastest")

    assert _served(here) == []


def test_policy_that_leaves_it_to_others_is_followed_by_the_next(here, batch):
    here.add("one", select=lambda request, candidates: "one")
    here.add("two", select=lambda request, candidates: None)

    _call(batch, backend="fastest")

    assert _served(here) == ["one"]


@pytest.mark.parametrize("answer", [lambda *_: 1 / 0, lambda *_: "nobody"])
def test_rude_policy_is_passed_over_with_a_warning(here, batch, answer):
    here.add("one", select=lambda request, candidates: "one")
    here.add("rude", select=answer)

    with pytest.warns(RuntimeWarning, match="nibs_select of rude .* is passed over"):
        _call(batch, backend="fastest")

    assert _served(here) == ["one"]


def test_choice_that_cannot_run_after_all_is_made_again(here, batch):
    here.add("one")
    here.add("lame", load=lambda: 1 / 0, select=lambda request, candidates: candidates[0].name)

    _call(batch, backend="fastest")

    assert _served(here) == []


def test_fastest_that_nobody_can_serve_says_why_for_each(here, batch):
    here.add("one", objectives={"Sigmoid"})

    with pytest.raises(errors.Unsupported) as caught:
        _call(batch, backend="fastest", ring=object())

    assert str(caught.value) == (
        "no backend here can do this. numpy: it rings over nibs.ring.Ring, not over object; "
        "one: it has Sigmoid, not InfoNCE"
    )


def test_use_backend_takes_fastest(here, batch):
    here.add("one", select=lambda request, candidates: "one")

    with nibs.use_backend("fastest"):
        _call(batch)

    assert _served(here) == ["one"]


# -- what is here ---------------------------------------------------------------------------------


def test_backends_reports_ready_and_broken_by_name(here):
    here.add("cupy", load=lambda: 1 / 0)

    found = {status.name: (status.state, status.reason) for status in nibs.backends(probe=True)}

    assert found == {"numpy": ("ready", ""), "cupy": ("broken", "ZeroDivisionError: division by zero")}


def test_backend_loads_once(here, batch):
    loads = []
    here.add("one", load=lambda: loads.append(1) or here.served["one"])

    for _ in range(3):
        _call(batch, backend="one")

    assert len(loads) == 1


def test_declaring_loads_nothing(here):
    here.add("one", load=lambda: pytest.fail("loaded before it was used"))

    nibs.backends()
