"""A decoupled step on a ring trains as one device does: DDP, FSDP2, loops of one's own; shards even, uneven, empty.

And when an encoder fails on one rank, all ranks hear of it, and no `.grad` has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ring_worlds import answers

pytest.importorskip("torch")

World = Callable[..., Any]
STEPS = 4
SPLITS = [(2, (8, 8)), (2, (3, 10)), (3, (7, 1, 5)), (4, (5, 1, 0, 9))]
each_split = pytest.mark.parametrize(("size", "sizes"), SPLITS, ids=lambda value: str(value).replace(", ", "-"))


def check(results: list[Any], still: tuple[str, ...] = (), budget: float = 1e-12) -> list[dict[str, int]]:
    counts = []
    for parameters, losses, moved, reduced in answers(results):
        assert {name for name, by in moved.items() if by < 1e-4} == set(still), "what does not move proves nothing."
        assert parameters <= budget, f"parameters differ by {parameters:.3g}."
        assert losses <= budget, f"losses differ by {losses:.3g}."
        counts.append(reduced)
    return counts


@each_split
def test_under_ddp_each_parameter_is_reduced_once_and_trains_as_on_one_device(
    world: World, size: int, sizes: tuple[int, ...]
) -> None:
    for reduced in check(world(size).run("decoupled_jobs:train", sizes, "siglip", "ddp")):
        assert len(reduced) == 8 and set(reduced.values()) == {STEPS}, reduced


@each_split
def test_under_fsdp2_it_trains_as_on_one_device(world: World, size: int, sizes: tuple[int, ...]) -> None:
    check(world(size).run("decoupled_jobs:train", sizes, "siglip", "fsdp"))


@pytest.mark.parametrize("how", ["none", "sum", "mean"])
def test_a_loop_of_ones_own_trains_as_on_one_device(world: World, how: str) -> None:
    check(world(4).run("decoupled_jobs:train", (5, 1, 0, 9), "siglip", how))


@pytest.mark.parametrize("name", ["clip", "supcon"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_other_losses_train_as_on_one_device(world: World, how: str, name: str) -> None:
    check(world(3).run("decoupled_jobs:train", (7, 1, 5), name, how), still=("bias",))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_lazy_inputs_train_as_on_one_device(world: World, how: str) -> None:
    check(world(3).run("decoupled_jobs:train", (7, 1, 5), "siglip", how, ("lazy",)))


def test_parameters_that_nobody_uses_do_not_disturb_ddp(world: World) -> None:
    for reduced in check(world(3).run("decoupled_jobs:train", (7, 1, 5), "siglip", "ddp", ("unused",))):
        assert set(reduced.values()) == {STEPS}, reduced


def test_a_ddp_module_for_each_tower(world: World) -> None:
    for reduced in check(world(2).run("decoupled_jobs:train", (3, 10), "siglip", "ddp", ("two",))):
        assert sum(reduced.values()) == 6 * STEPS, reduced


def test_steps_under_no_sync_add_up_and_are_reduced_once(world: World) -> None:
    for reduced in check(world(2).run("decoupled_jobs:train", (3, 10), "siglip", "ddp", ("accumulate",))):
        assert set(reduced.values()) == {STEPS}, reduced


@pytest.mark.parametrize("how", ["ddp", "fsdp", "mean"])
def test_embeddings_that_stay_in_host_memory_train_as_on_one_device(world: World, how: str) -> None:
    check(world(3).run("decoupled_jobs:train", (7, 1, 5), "siglip", how, ("host",)))


@pytest.mark.parametrize("together", [True, False])
def test_a_frozen_tower_on_a_ring_is_encoded_without_a_graph(world: World, together: bool) -> None:
    for rank, (apart, runs) in enumerate(answers(world(2).run("decoupled_jobs:frozen", together))):
        assert apart <= 1e-12
        once = (3, 2)[rank]  # micro-batches of 3
        # Inside a module that is trained it is found out when it is encoded again: the first and the last, no more.
        assert runs <= once + 2


def test_steps_add_up_unreduced_under_fsdp2(world: World) -> None:
    check(world(3).run("decoupled_jobs:train", (7, 1, 5), "siglip", "fsdp", ("accumulate",)))


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("when", [1, 3, 4, 6], ids=["first", "end of pass 1", "pass 3", "last forward"])
@pytest.mark.parametrize("how", ["ddp", "ring", "function", "local"])
def test_an_encoder_that_fails_is_heard_of_everywhere_and_no_grad_changes(
    world: World, how: str, when: int, held: bool
) -> None:
    results = answers(world(3).run("decoupled_jobs:fail", how, when, held))
    for rank, (said, same, alive) in enumerate(results):
        assert same and alive
        kind = "ArithmeticError" if rank == 1 else "RingError: rank 1 of 3 can"
        assert said.startswith(kind) and "the encoder of rank 1 has had enough" in said


def test_inputs_that_do_not_fit_on_one_rank_are_heard_of_before_ddp_exchanges_buffers(world: World) -> None:
    (first, lives), (second, too) = answers(world(2).run("decoupled_jobs:unfit"))
    assert first.startswith("RingError: rank 1 of 2 cannot go on: InvalidInput: keys: ")
    assert second.startswith("InvalidInput: keys: ")
    assert lives and too


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_rank_that_fails_where_others_wait_in_a_collective_ends_them_with_a_ring_error(
    fragile: Callable[..., Any], how: str
) -> None:
    said = answers(fragile(2, 4.0).run("decoupled_jobs:fail_late", how))
    assert said[0].startswith("RingError") and said[1].startswith("ArithmeticError")


def test_fsdp2_asks_for_the_number_of_micro_batches(world: World) -> None:
    said = answers(world(2).run("decoupled_jobs:uncounted"))
    assert said[0].startswith("RingError: rank 1 of 2 cannot go on")
    assert said[1].startswith("InvalidInput: queries: an iterable without len() under FSDP2")
