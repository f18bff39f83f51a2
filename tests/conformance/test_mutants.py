"""The suite has teeth: each wrong backend fails exactly the tests named for it, and its unbroken twin passes.

Left out of these runs are the ring level, whose ranks are other processes, and the memory level but for
the mutants that are about memory. The suite's own plugin tests are in `test_plugin.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nibs_conformance.report import LEVELS

from .mutants import CASES, MUTANTS, Mutant, Twin


def arguments(dtypes: str) -> list[str]:
    return ["--nibs-dtypes", dtypes, "--nibs-cases", ",".join(sorted(CASES))]


def levels(memory: bool) -> list[str]:
    left_out = {"test_ring.py"} if memory else {"test_ring.py", "test_memory.py"}
    return [f"nibs_conformance.{file.removesuffix('.py')}" for file in LEVELS if file not in left_out]


def test_there_are_enough_of_them() -> None:
    assert len(MUTANTS) >= 20


@pytest.mark.parametrize(("dtypes", "memory"), [("float32", True), ("float16", False), ("float64", False)])
def test_the_unbroken_twin_passes(conform: Callable[..., Any], dtypes: str, memory: bool) -> None:
    found = conform(Twin(), *arguments(dtypes), levels=levels(memory))
    assert (found.code, dict(found.failed)) == (0, {}), found.reasons[:3]
    assert len(found.passed) > 45


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_mutant_fails_exactly_what_is_named_for_it(conform: Callable[..., Any], fault: str) -> None:
    mutant: Mutant = MUTANTS[fault]
    found = conform(mutant.backend, *arguments(mutant.dtypes), levels=levels(mutant.memory))
    assert set(found.failed) == mutant.tests, found.reasons[:3]
    assert found.cases == mutant.cases


def test_tiles_kept_alive_through_autograd_are_seen(conform: Callable[..., Any]) -> None:
    torch = pytest.importorskip("torch")
    backend = pytest.importorskip("nibs_torch.backend")

    class KeepsTiles(backend.TorchBackend):  # type: ignore[misc, name-defined]
        """Cut into tiles, and each of them left for the backward to find."""

        def loss(self, request: Any) -> Any:
            rows = torch.as_tensor(request.scale) * request.queries
            parts = [rows @ keys.T for keys in request.keys.split(64)]
            by_row = torch.logsumexp(torch.stack([part.logsumexp(1) for part in parts], 1), 1)
            by_column = torch.cat([part.logsumexp(0) for part in parts])
            positive = (rows * request.keys).sum(1)
            return ((by_row + by_column) / 2 - positive).mean()

    chosen = ["--nibs-dtypes", "float32", "-k", "test_autograd_keeps_no_tile_alive"]
    kept = conform(KeepsTiles(), *chosen, name="torch")
    assert set(kept.failed) == {"test_autograd_keeps_no_tile_alive"}
