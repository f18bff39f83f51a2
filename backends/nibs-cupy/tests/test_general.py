"""The general kernels on the host: beside their plain twins, in every order of threads, and with parts taken out."""

from __future__ import annotations

import gc
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nibs
from nibs_conformance.cases import CASES
from nibs_conformance.checks import Judge, Subject, budget, truth
from nibs_conformance.oracle import Problem, solve
from nibs_conformance.tolerances import budget_of
from nibs_cupy.device import Host
from nibs_cupy.host import KERNELS, Runner
from nibs_cupy.tiles import DIAGONAL, FIELD, LINE, THREADS, TILE, TYPES

ORDERS = ("reversed", "shuffled:1", "shuffled:2")
SIZES = ((1, 1, 1), (5, 3, 2), (64, 64, 16), (65, 63, 17), (130, 70, 33))
MASSES = FIELD["mass"] | FIELD["shift"]
CRUEL = ("symmetric", "rows-of-all-lengths", "one-row-20-times-longer", "far-beyond-exp", "all-far-below-zero")
MIXED = ("everything-symmetric", "margin-symmetric", "supervised", "sigmoid-masks-weights", "nothing-divides")


def rows(r: Any, n: int, d: int, dtype: Any) -> Any:
    return (r.standard_normal((n, d)) / np.sqrt(d)).astype(dtype)


class TileCall:
    """One kernel on one tile, its arguments by name."""

    def __init__(self, device: Host, queries: Any, keys: Any, accumulator: Any, scale: float = 5.0) -> None:
        self.device, self.accumulator = device, np.dtype(accumulator)
        self.record, self.held = np.zeros(1, TILE), []
        self.n, self.m = len(queries), len(keys)
        for name, values in (("query", queries), ("key", keys)):
            for part, stride in zip(("row", "step"), values.strides):
                self.record[f"{name}_{part}"] = stride // values.dtype.itemsize
            self.record[f"{name}_type"] = TYPES.index(str(values.dtype))
        self.record["rows"], self.record["columns"], self.record["width"] = self.n, self.m, queries.shape[1]
        self.record["flags"] = DIAGONAL
        self.give(queries=queries, keys=keys, scale=np.full((), scale, self.accumulator))

    def give(self, **arrays: Any) -> TileCall:
        for name, array in arrays.items():
            self.held.append(array)
            self.record[name] = self.device.address(array)
        return self

    def launch(self, name: str, grid: int, threads: int) -> None:
        self.device.kernel("general.cu", f"nibs_{name}_{self.accumulator}")(grid, threads, self.record)

    def squares(self) -> tuple[int, int]:
        return -(-self.n // 64), -(-self.m // 64)


def lse(device: Host, queries: Any, keys: Any, accumulator: Any, plain: bool = False) -> tuple[Any, Any]:
    """Of rows and of columns, each `[length]`, in float64."""
    call = TileCall(device, queries, keys, accumulator)
    call.record["row_fields"] = call.record["column_fields"] = MASSES
    down, across = (1, 1) if plain else call.squares()
    parts = np.zeros((2, across, call.n), accumulator), np.zeros((2, down, call.m), accumulator)
    call.give(row_parts=parts[0], column_parts=parts[1])
    if plain:
        call.launch("plain_lse", -(-(call.n + call.m) // LINE), LINE)
    else:
        call.launch("lse", down * across, THREADS)
    wide = [part.astype(np.float64) for part in parts]
    return tuple(np.logaddexp.reduce(shift + np.log(mass), axis=0) for mass, shift in wide)


@pytest.mark.parametrize("n, m, d", SIZES)
@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16", "float16"))
def test_lse_agrees_with_its_plain_twin(host, n, m, d, dtype):
    r = np.random.default_rng(n)
    queries, keys = (rows(r, size, d, getattr(ml_dtypes, dtype, dtype)) for size in (n, m))
    accumulator = np.float64 if dtype == "float64" else np.float32

    got, plain = lse(host, queries, keys, accumulator), lse(host, queries, keys, accumulator, plain=True)

    logits = 5 * queries.astype(np.float64) @ keys.astype(np.float64).T
    close = 64 * np.finfo(accumulator).eps  # of logits and lse values below 30
    for axis, mine, twin in zip((1, 0), got, plain):
        want = np.logaddexp.reduce(logits, axis=axis)
        np.testing.assert_allclose(mine, want, atol=close)
        np.testing.assert_allclose(twin, want, atol=close)


@pytest.mark.parametrize("n, m, d", SIZES)
def test_weights_agree_with_their_plain_twin(host, n, m, d):
    r = np.random.default_rng(n)
    queries, keys = rows(r, n, d, np.float32), rows(r, m, d, np.float32)
    vectors = {}
    for side, size, shift in zip(("row", "column"), (n, m), lse(host, queries, keys, np.float32)):
        vectors[f"{side}_factor"] = r.random(size, np.float32)
        vectors[f"{side}_shift"] = shift.astype(np.float32)
        vectors[f"{side}_target"] = r.random(size, np.float32)
    found = {}
    for name, grid, threads in (
        ("weights", -(-n // 64) * -(-m // 64), THREADS),
        ("plain_weights", -(-n * m // LINE), LINE),
    ):
        found[name] = np.full((n, m), np.nan, np.float32)
        TileCall(host, queries, keys, np.float32).give(weights=found[name], **vectors).launch(name, grid, threads)

    np.testing.assert_allclose(found["weights"], found["plain_weights"], atol=1e-5)


@pytest.mark.parametrize("layout", ("transposed", "backwards", "every other", "columns"))
def test_rows_are_read_where_they_lie(host, layout):
    r = np.random.default_rng(0)
    wide = rows(r, 40, 40, np.float32)
    view = {"transposed": wide.T, "backwards": wide[::-1, ::-1], "every other": wide[::2], "columns": wide[:, 7:20]}[
        layout
    ]
    packed = view.copy()

    for mine, same in zip(lse(host, view, view, np.float32), lse(host, packed, packed, np.float32)):
        assert np.array_equal(mine, same)


def test_offsets_beyond_32_bits_are_right(host):
    # Three rows, a gibibyte of elements apart: 8 GiB of addresses, of which three pages are ever touched.
    stride = 2**30
    room = mmap.mmap(-1, (2 * stride + 8) * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    flat = np.frombuffer(room, np.float32)
    far = np.lib.stride_tricks.as_strided(flat, (3, 4), (stride * 4, 4))
    near = rows(np.random.default_rng(1), 3, 4, np.float32)
    far[...] = near

    for mine, same in zip(lse(host, far, near, np.float32), lse(host, near, near, np.float32)):
        assert np.array_equal(mine, same)


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_threads_changes_not_one_bit(host, serve, order):
    cases = [CASES[name] for name in (*CRUEL, *MIXED)]
    serve(host)
    want = [Subject("cupy-on-host").outcome(case, "float32", stats=True) for case in cases]
    serve(Host(Runner(order=order)))

    for case, forward in zip(cases, want):
        got = Subject("cupy-on-host").outcome(case, "float32", stats=True)
        for name in ("loss", "queries", "keys", "scale", "bias"):
            assert np.array_equal(getattr(got, name), getattr(forward, name), equal_nan=True), (case.name, name)


# -- parts taken out ------------------------------------------------------------------------------

LSE_GUARD = ("general.cu", "if (__syncthreads_or(lost)) return false;", "__syncthreads_or(lost);")
WEIGHTS_GUARD = ("general.cu", "= high - low <= guard<T>::spread();", "= true;")
NOTHING = ("general.cu", "nibs", "nibs")
BARRIERS = {
    "before products": ("common.cuh", "__syncthreads();\n        const int depth", "const int depth"),
    "after products": ("common.cuh", "        }\n        __syncthreads();\n    }\n", "        }\n    }\n"),
    "before sums": ("common.cuh", "__syncthreads();\n    T found = Join::", "T found = Join::"),
    "after sums": (
        "common.cuh",
        "__syncthreads();\n    return found;\n}\n\n// The largest",
        "return found;\n}\n\n// The largest",
    ),
}


@pytest.fixture
def mutant(tmp_path: Path) -> Callable[..., Host]:
    """The kernels with one text replaced by another, in float32 alone."""

    def make(file: str, old: str, new: str, order: str = "forward") -> Host:
        for source in KERNELS.glob("*.cu*"):
            shutil.copy(source, tmp_path)
        general = tmp_path / "general.cu"
        kept = [line for line in general.read_text().splitlines() if not ("NIBS_KERNEL" in line and "float64" in line)]
        general.write_text("\n".join(kept))
        text = (tmp_path / file).read_text()
        assert text.count(old) >= 1
        (tmp_path / file).write_text(text.replace(old, new))
        return Host(Runner(order=order, folder=tmp_path))

    return make


def failures(names: tuple[str, ...]) -> set[str]:
    """The cases that the backend under test gets wrong, by the suite's own budgets."""
    subject, judge, found = Subject("cupy-on-host"), Judge(lambda _: None), set()
    for case in (CASES[name] for name in names):
        problem = case.problem("float32")
        got = subject.loss_and_grad(subject.arguments_of(case, "float32"))
        try:
            judge.outcome(got, truth(case, "float32"), budget(case, "float32"), problem)
        except AssertionError:
            found.add(case.name)
    return found


@pytest.mark.parametrize(
    "change, caught",
    (
        (NOTHING, set()),
        (LSE_GUARD, {"rows-of-all-lengths", "one-row-20-times-longer", "far-beyond-exp", "all-far-below-zero"}),
        (WEIGHTS_GUARD, {"rows-of-all-lengths", "one-row-20-times-longer", "far-beyond-exp"}),
    ),
    ids=("unmutated", "without the guard of lse", "without the guard of weights"),
)
def test_each_guard_of_the_one_exponential_is_needed(mutant, serve, change, caught):
    serve(mutant(*change))

    assert failures(CRUEL) == caught


@pytest.mark.parametrize("place", BARRIERS)
def test_every_barrier_is_needed(mutant, serve, place):
    serve(mutant(*BARRIERS[place], order="reversed"))

    assert failures(("nothing-divides",)) == {"nothing-divides"}


# -- whole calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", (nibs.InfoNCE(), nibs.Sigmoid()), ids=("InfoNCE", "Sigmoid"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_many_squares_and_tiles_agree_with_the_oracle(host, serve, objective, dtype):
    r = np.random.default_rng(2)
    made = [rows(r, size, 40, getattr(ml_dtypes, dtype, dtype)).astype(np.float32) for size in (300, 410)]
    problem = Problem(*made, scale=8.0, bias=-2.0, objective=objective)
    serve(host)
    subject = Subject("cupy-on-host")
    plan = nibs.plan(300, 410, 40, dtype, objective=objective, query_tile=200, key_tile=150, backend="cupy-on-host")

    got = subject.loss_and_grad(subject.arguments(problem, dtype), plan=plan)

    want = solve(problem)
    Judge(lambda _: None).outcome(got, want, budget_of(problem, dtype, want), problem)


def test_a_call_leaves_nothing_to_the_garbage_collector(host, serve):
    # What waits for the collector adds to what is held, and a budget is a promise.
    serve(host)
    values = rows(np.random.default_rng(0), 100, 8, np.float32)

    def left_by_a_call() -> int:
        gc.collect()
        gc.disable()
        try:
            nibs.contrastive_loss_and_grad(values, values, objective=nibs.Sigmoid(), backend="cupy-on-host")
            return gc.collect()
        finally:
            gc.enable()

    left_by_a_call()
    # What every call leaves. Other threads of the process, those of a test runner too, may leave something once.
    assert min(left_by_a_call() for _ in range(3)) == 0


def test_the_plan_names_the_kernel(host, serve):
    serve(host)
    values = np.ones((4, 3), np.float32)

    _, stats = nibs.contrastive_loss(values, values, backend="cupy-on-host", stats=True)

    assert stats.plan.kernel == "general, by the host runner"


def test_torch_gets_its_gradients_through_the_kernels(host, serve):
    torch = pytest.importorskip("torch")
    serve(host)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(20, 8, generator=generator, requires_grad=True) for _ in range(2)]
    want = torch.autograd.grad(nibs.contrastive_loss(*given, scale=3.0), given)

    got = torch.autograd.grad(nibs.contrastive_loss(*given, scale=3.0, backend="cupy-on-host"), given)

    for mine, same in zip(got, want):
        torch.testing.assert_close(mine, same, atol=1e-6, rtol=1e-5)
