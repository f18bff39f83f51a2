"""Training on a ring is training on one device: the same parameters after several steps, scale and bias included.

Under DDP and FSDP2, which average gradients over ranks, and in hand-written loops for each value of
`grad_reduction`. float64 throughout where nothing else is said, so that equal means equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ring_worlds import answers

pytest.importorskip("torch")

World = Callable[..., Any]

SPLITS = {
    1: [(12,)],
    2: [(8, 8), (3, 10)],
    3: [(4, 4, 4), (7, 1, 5)],
    4: [(4, 4, 4, 4), (5, 1, 0, 9)],
    8: [(2,) * 8, (2, 1, 0, 3, 1, 1, 0, 5)],
}
EVERY = [(size, split) for size, splits in SPLITS.items() for split in splits]
each_split = pytest.mark.parametrize(("size", "sizes"), EVERY, ids=lambda value: str(value).replace(", ", "-"))


def check(results: list[Any], budget: float = 1e-12, still: tuple[str, ...] = ()) -> None:
    for parameters, losses, moved in answers(results):
        assert {name for name, by in moved.items() if by < 1e-4} == set(still), "what does not move proves nothing."
        assert parameters <= budget, f"parameters differ by {parameters:.3g}."
        assert losses <= budget, f"losses differ by {losses:.3g}."


@each_split
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_wrapped_model_trains_as_on_one_device(world: World, size: int, sizes: tuple[int, ...], how: str) -> None:
    check(world(size).run("training_jobs:train", sizes, "siglip", how))


@each_split
@pytest.mark.parametrize("how", ["none", "sum", "mean"])
def test_a_loop_of_ones_own_trains_as_on_one_device(world: World, size: int, sizes: tuple[int, ...], how: str) -> None:
    check(world(size).run("training_jobs:train", sizes, "siglip", how))


@pytest.mark.parametrize("how", ["ddp", "fsdp", "none"])
@pytest.mark.parametrize("name", ["clip", "weights", "duplicates", "supcon"])
def test_every_loss_trains_as_on_one_device(world: World, name: str, how: str) -> None:
    # InfoNCE's bias has no gradient, and so does not move
    check(world(4).run("training_jobs:train", (5, 1, 0, 9), name, how), still=("bias",))


@pytest.mark.parametrize("how", ["ddp", "none"])
def test_the_function_trains_as_the_module_does(world: World, how: str) -> None:
    check(world(3).run("training_jobs:train", (7, 1, 5), "siglip", how, ("function",)))


def test_a_mesh_is_a_ring_for_the_model_that_it_shards(world: World) -> None:
    check(world(4).run("training_jobs:train", (5, 1, 0, 9), "siglip", "fsdp", ("mesh",)))


@pytest.mark.parametrize("how", ["ddp", "fsdp", "sum"])
@pytest.mark.parametrize("form", [("compile",), ("compile", "function")], ids=["module", "function"])
def test_a_compiled_loss_trains_as_on_one_device(world: World, how: str, form: tuple[str, ...]) -> None:
    check(world(3).run("training_jobs:train", (7, 1, 5), "siglip", how, form, timeout=120.0))


@pytest.mark.parametrize("how", ["ddp", "fsdp", "none"])
def test_float32_trains_as_on_one_device(world: World, how: str) -> None:
    check(world(4).run("training_jobs:train", (5, 1, 0, 9), "siglip", how, ("float32",)), 1e-5)


@pytest.mark.parametrize("how", ["ddp", "fsdp", "none"])
def test_autocast_trains_as_on_one_device(world: World, how: str) -> None:
    # bfloat16 encoders round by themselves, the same way in either case, but gradients leave in bfloat16
    check(world(4).run("training_jobs:train", (5, 1, 0, 9), "siglip", how, ("autocast",)), 2e-2)
