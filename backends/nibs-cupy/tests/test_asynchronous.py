"""The host twins of asynchronous instructions: right bits for right kernels, and each planted fault is seen.

`faulty/asynchronous.cu` holds pipelines that are right, or wrong in one chosen way. A fault counts as seen where the
runner names it, or where the numbers are wrong under one of the two clocks; which of the two is said beside each.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from vectors import aligned, attempt, replay

from nibs_cupy.host import KERNELS, KernelFault, Runner
from nibs_cupy.plain import plain_pack

FOLDER = Path(__file__).parent / "faulty"
CLOCKS = ("earliest", "latest")
# In the order of the enum in faulty/asynchronous.cu.
FAULTS = re.findall(r"[A-Z_]+(?=,)", (FOLDER / "asynchronous.cu").read_text().split("enum Fault {")[1].split("};")[0])
ARGUMENTS = np.dtype([(name, np.int64) for name in ("a", "b", "out", "slabs", "fault")])


@pytest.fixture(scope="module")
def random() -> np.random.Generator:
    return np.random.default_rng(20)


def run(clock: str, kernel: str, threads: int, shared: int, fault: str, a: Any, b: Any, out: Any, slabs: int) -> Any:
    arguments = np.zeros(1, ARGUMENTS)
    for name, value in (("a", a), ("b", b), ("out", out)):
        arguments[name] = 0 if value is None else value.ctypes.data
    arguments["slabs"], arguments["fault"] = slabs, FAULTS.index(fault)
    Runner(clock=clock, folder=FOLDER).kernel("asynchronous.cu", kernel)(1, threads, arguments, shared)
    return out


def by_thread(product: Any) -> Any:
    """`[64, 256]` as the 128 sums of each of 128 threads."""
    out = np.empty((128, 128), np.float32)
    for thread in range(128):
        rows = thread // 32 * 16 + thread % 32 // 4 + np.array([0, 0, 8, 8])
        columns = thread % 4 * 2 + np.array([0, 1, 0, 1])
        for fragment in range(32):
            out[thread, fragment * 4 : fragment * 4 + 4] = product[rows, fragment * 8 + columns]
    return out


def panels(random: np.random.Generator, slabs: int) -> tuple[Any, Any, Any]:
    """Packed `a`, packed `b`, and the product as `by_thread` has it; small integers, so that sums are exact."""
    a = random.integers(-4, 5, (64, 64 * slabs)).astype(ml_dtypes.bfloat16)
    b = random.integers(-4, 5, (256, 64 * slabs)).astype(ml_dtypes.bfloat16)
    product = by_thread(a.astype(np.float32) @ b.astype(np.float32).T)
    pack = [aligned(plain_pack(x.view(np.uint16), None, rows, slabs)) for x, rows in ((a, 128), (b, 256))]
    return pack[0], pack[1], product


def products(clock: str, fault: str, random: np.random.Generator, slabs: int = 5) -> bool:
    """Whether the numbers are right."""
    a, b, wanted = panels(random, slabs)
    out = np.zeros((128, 128), np.float32)
    run(clock, "faulty_products", 384, 2 * 3 * 16384 + 32, fault, a, b, out, slabs)
    return bool((out == wanted).all())


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_right_pipeline_of_bulk_copies_and_wgmma_gives_exact_products(clock: str, random: Any) -> None:
    assert products(clock, "NONE", random)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("FULL_PARITY", ""),  # a wait that passes at once reads what has not come; or it never passes
        ("EMPTY_PARITY", "no thread can go on"),
        ("TOO_FEW_BYTES", "more have come than were expected"),
        ("TOO_MANY_BYTES", "no thread can go on"),
        ("TOO_MANY_ARRIVALS", "all 1 of this phase have arrived"),
        ("NO_GROUP_FENCE", "group_fence is missing"),
        ("NO_SIGNALS_READY", "without signals_ready"),
        ("NOT_WAITED_FOR", ""),
        ("SIGNAL_OVERWRITTEN", "overwritten by an ordinary store"),
        ("TOO_MANY_REGISTERS", "setmaxnreg: the warpgroups ask for 520 registers a thread in all, and have 504"),
        ("STAGE_FREED_EARLY", ""),
    ],
)
def test_a_fault_in_the_pipeline_is_seen_under_the_latest_clock(fault: str, complaint: str, random: Any) -> None:
    try:
        right = products("latest", fault, random)
    except KernelFault as caught:
        assert complaint in str(caught)
    else:
        assert not complaint
        assert not right


@pytest.mark.parametrize("fault", ["WRONG_SWIZZLE", "WRONG_STRIDE"])
@pytest.mark.parametrize("clock", CLOCKS)
def test_a_descriptor_with_wrong_bits_gives_wrong_products(clock: str, fault: str, random: Any) -> None:
    assert not products(clock, fault, random)


def test_sums_read_before_they_are_waited_for_are_seen_by_the_latest_clock_alone(random: Any) -> None:
    assert products("earliest", "SUMS_READ_EARLY", random)
    assert not products("latest", "SUMS_READ_EARLY", random)


@pytest.mark.parametrize("clock", CLOCKS)
def test_ordinary_stores_reach_wgmma_only_through_the_proxy_fence(clock: str, random: Any) -> None:
    a, b, wanted = panels(random, 1)
    out = np.zeros((128, 128), np.float32)
    assert (run(clock, "faulty_shown", 128, 3 * 16384, "NONE", a, b, out, 1) == wanted).all()
    with pytest.raises(KernelFault, match="not shown"):
        run(clock, "faulty_shown", 128, 3 * 16384, "NO_SHOW", a, b, out, 1)


def copies(clock: str, fault: str, random: np.random.Generator) -> bool:
    values = aligned(random.standard_normal((4, 64)).astype(np.float32))
    out = np.zeros((4, 64), np.float32)
    run(clock, "faulty_copies", 64, 512, fault, values, None, out, 4)
    return bool((out == values[:, ::-1]).all())


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_right_pipeline_of_cp_async_delivers(clock: str, random: Any) -> None:
    assert copies(clock, "NONE", random)


def test_cp_async_read_without_a_wait_is_seen_by_the_latest_clock(random: Any) -> None:
    with pytest.raises(KernelFault, match="never waited for"):
        copies("latest", "NO_WAIT", random)


def test_cp_async_never_committed_is_an_error(random: Any) -> None:
    with pytest.raises(KernelFault, match="never committed"):
        copies("latest", "NO_COMMIT", random)


def test_another_threads_cp_async_needs_a_barrier(random: Any) -> None:
    assert not copies("latest", "NO_BARRIER", random)


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_misaligned_cp_async_is_an_error(clock: str, random: Any) -> None:
    with pytest.raises(KernelFault, match="multiples of 16 bytes"):
        copies(clock, "MISALIGNED", random)


# -- one instruction at a time ------------------------------------------------------------------------


DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "tf32": np.float32}


@pytest.mark.parametrize("name", DTYPES)
def test_mma_sync_multiplies_fragments_as_the_manual_lays_them_out(name: str, random: Any) -> None:
    each = 4 // np.dtype(DTYPES[name]).itemsize  # numbers in a word
    depth = 8 * each
    a, b = (random.integers(-8, 9, shape).astype(DTYPES[name]) for shape in ((16, depth), (8, depth)))
    c = random.integers(-8, 9, (16, 8)).astype(np.float32)
    words_a, words_b = (x.copy().view(np.uint32) for x in (a, b))
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    left = np.stack([words_a[g, t], words_a[g + 8, t], words_a[g, t + 4], words_a[g + 8, t + 4]], 1)
    right = np.stack([words_b[g, t], words_b[g, t + 4]], 1)

    def sums(x: Any) -> Any:
        return np.stack([x[g, 2 * t], x[g, 2 * t + 1], x[g + 8, 2 * t], x[g + 8, 2 * t + 1]], 1)

    out = attempt(f"nibs_try_multiply_{name}", 32, left.copy(), right.copy(), np.ascontiguousarray(sums(c)))
    assert (out == sums(c + a.astype(np.float32) @ b.astype(np.float32).T)).all()


def test_ldmatrix_hands_each_lane_its_word_of_each_matrix(random: Any) -> None:
    memory = random.integers(0, 2**32, 256, dtype=np.uint32)
    offsets = (random.permutation(64)[:32] * 16).astype(np.int32)
    out = attempt("nibs_try_fragments", 32, memory, offsets, np.zeros((32, 4), np.uint32), shared=1024)
    lane = np.arange(32)
    for matrix in range(4):
        assert (out[:, matrix] == memory[offsets[8 * matrix + lane // 4] // 4 + lane % 4]).all()


@pytest.mark.parametrize("name", DTYPES)
def test_wgmma_reads_swizzled_panels(name: str, random: Any) -> None:
    dtype = np.dtype(DTYPES[name])
    a, b = (random.integers(-4, 5, (rows, 128 // dtype.itemsize)).astype(dtype) for rows in (64, 256))
    bits = np.dtype(f"u{dtype.itemsize}")
    left, right = (aligned(plain_pack(x.view(bits), None, rows, 1)) for x, rows in ((a, 128), (b, 256)))
    out = attempt(f"nibs_try_group_{name}", 128, left, right, np.zeros((128, 128), np.float32), shared=3 * 16384 + 8)
    assert (out == by_thread(a.astype(np.float32) @ b.astype(np.float32).T)).all()


def test_exp2_flushes_what_is_below_the_smallest_normal_number(random: Any) -> None:
    x = np.concatenate([random.uniform(-160, 120, 252), [0.0, -np.inf, np.inf, np.nan]]).astype(np.float32)
    out = attempt("nibs_try_exp2", 256, x, None, np.zeros(256, np.float32), 256)
    wanted = np.exp2(x.astype(np.float64))
    wanted[wanted < 2.0**-126] = 0
    np.testing.assert_allclose(out, wanted, rtol=2**-21)


def test_tf32_rounds_ties_away_from_zero() -> None:
    x = np.array([0x3F801000, 0x3F800FFF, 0xBF801000, 0x7F800000, 0x00000000], np.uint32)
    out = attempt("nibs_try_round_tf32", 256, x, None, np.zeros(5, np.uint32), 5)
    assert [hex(bits) for bits in out] == ["0x3f802000", "0x3f800000", "0xbf802000", "0x7f800000", "0x0"]


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_pairs_are_rounded_to_nearest_even_and_packed_low_half_first(name: str, random: Any) -> None:
    low, high = (random.standard_normal(256).astype(np.float32) * 100 for _ in range(2))
    out = attempt(f"nibs_try_pack_{name}", 256, low, high, np.zeros(256, np.uint32), 256)
    halves = out.view(np.uint16).reshape(256, 2)
    for column, values in enumerate((low, high)):
        assert (halves[:, column] == values.astype(DTYPES[name]).view(np.uint16)).all()


# -- what a GPU said ----------------------------------------------------------------------------------


def test_recorded_instructions_replay_on_the_twins() -> None:
    """kernels/vectors/ has what a GPU gave for each kernel of instructions.cu, once one has been at hand."""
    folder = KERNELS / "vectors"
    assert replay(folder) == []
    assert any(folder.glob("*.npz")) or not folder.exists()  # an empty folder would look like a record
