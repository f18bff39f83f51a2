"""Worlds for the tests of rings, kept for as long as the tests need them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

HERE = str(Path(__file__).parent)
if HERE not in sys.path:  # what the ranks run is imported by name, in processes of their own
    sys.path.insert(0, HERE)


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], Any]]:
    """`world(size)`: processes that all tests share, so none may break their ring."""
    pytest.importorskip("torch")
    from ring_worlds import process_world

    with ExitStack() as stack:
        open_worlds: dict[int, Any] = {}

        def get(size: int) -> Any:
            if size not in open_worlds:
                open_worlds[size] = stack.enter_context(process_world(size))
            return open_worlds[size]

        yield get


@pytest.fixture
def fragile() -> Iterator[Callable[..., Any]]:
    """`fragile(size, ring_timeout)`: processes of this test's own, to be killed and stopped."""
    pytest.importorskip("torch")
    from ring_worlds import process_world

    with ExitStack() as stack:
        yield lambda size, ring_timeout: stack.enter_context(process_world(size, ring_timeout))
