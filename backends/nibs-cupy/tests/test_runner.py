"""The host runner finds the faults that are planted for it, and lets their faultless twins pass."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nibs.errors import BackendUnavailable, InvalidInput
from nibs_cupy.host import KernelFault, Runner

PLANTED = Path(__file__).parent / "planted"
ARGS = np.dtype([("out", np.uint64), ("count", np.int64)])
ORDERS = ("forward", "reversed", "shuffled:1", "shuffled:2")


def run(
    name: str, size: int = 64, count: int = 0, order: str = "forward", grid: Any = 1, threads: Any = 64, **how: Any
) -> Any:
    """The kernel's output, `[size]`."""
    shared = how.pop("shared", 0)
    out = np.zeros(size, np.float32)
    arguments = np.array([(out.ctypes.data, count)], ARGS)
    Runner(order=order, folder=PLANTED, **how).kernel("planted.cu", name)(grid, threads, arguments, shared)
    return out


def fault(name: str, **how: Any) -> str:
    with pytest.raises(KernelFault) as found:
        run(name, **how)
    return str(found.value)


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_barrier_orders_does_not_depend_on_the_order_of_threads(order):
    assert (run("neighbour", order=order) == (np.arange(64) + 1) % 64).all()


def test_a_missing_barrier_shows_in_another_order_of_threads():
    outputs = {run("neighbour_without_a_barrier", order=order).tobytes() for order in ORDERS}

    assert len(outputs) > 1


@pytest.mark.parametrize("order", ("forward", "reversed"))
def test_a_missing_second_barrier_shows(order):
    right = sum(63 - np.arange(64.0) + 100 * step for step in range(2))

    assert not np.array_equal(run("two_rounds_and_one_barrier", order=order), right)


def test_shared_memory_that_nobody_wrote_is_nan():
    out = run("unwritten")

    assert (out[:63] == 1).all() and np.isnan(out[63])


@pytest.mark.parametrize("order", ORDERS)
def test_a_write_past_a_shared_array_names_the_array(order):
    assert "shared array 'values'" in fault("overrun", count=1, order=order)


def test_a_write_before_a_shared_array_names_the_array():
    assert "shared array 'values'" in fault("overrun", count=-1)


def test_a_write_past_dynamic_shared_memory_is_seen():
    assert (run("dynamic_overrun", shared=256) == 1).all()
    assert "dynamic shared memory" in fault("dynamic_overrun", shared=256, count=1)


@pytest.mark.parametrize("kernel", ("overrun", "write_beyond", "read_shared_beyond"))
def test_the_address_sanitizer_stops_at_an_access_outside(kernel, python, sanitizer):
    code = f"""
import numpy as np
from pathlib import Path
from nibs_cupy.host import Runner
out = np.zeros(64, np.float32)
launch = Runner(sanitize=True, folder=Path({str(PLANTED)!r})).kernel("planted.cu", {kernel!r})
for count in (0, 1):
    launch(1, 64, np.array([(out.ctypes.data, count)], [("out", np.uint64), ("count", np.int64)]))
    print("passed", count, flush=True)
"""
    # NumPy keeps a cache of small blocks, in which an overrun would go unseen: PYTHONMALLOC does not reach it.
    code = code.replace("np.zeros(64, np.float32)", "np.zeros(4096, np.float32)[-64:]")
    done = python(code, LD_PRELOAD=sanitizer, ASAN_OPTIONS="detect_leaks=0")

    assert done.stdout.split() == ["passed", "0"]
    assert "AddressSanitizer" in done.stderr and "planted.cu" in done.stderr


def test_a_sanitized_build_says_how_the_process_must_be_started():
    with pytest.raises(BackendUnavailable, match="LD_PRELOAD"):
        Runner(sanitize=True, folder=PLANTED).kernel("planted.cu", "neighbour")


def test_threads_that_returned_before_a_barrier_are_named():
    text = fault("some_return_early", count=40)

    assert "threads 0-39 at barrier 0" in text and "threads 40-63 returned" in text


def test_no_thread_returns_early_and_the_same_kernel_passes():
    assert (run("some_return_early", count=64) == 1).all()


@pytest.mark.parametrize("order", ORDERS)
def test_two_barriers_reached_by_parts_of_a_thread_block_are_a_fault(order):
    assert "divergent barrier" in fault("two_barriers", order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_beside_a_warp_collective_is_a_fault_and_no_hang(order):
    text = fault("barrier_and_shuffle", order=order)

    assert "at barrier 0" in text and "in a warp collective" in text


def test_a_lane_that_its_mask_leaves_out_is_a_fault():
    assert "mask leaves it out" in fault("wrong_mask")


def test_more_static_shared_memory_than_a_device_gives_is_a_fault():
    assert "65536 bytes of static shared memory" in fault("too_much_shared")


def test_more_dynamic_shared_memory_than_a_device_has_is_a_fault():
    assert "more dynamic shared memory" in fault("dynamic_overrun", shared=300_000)


def test_more_threads_than_declared_are_a_fault():
    assert "more threads than NIBS_KERNEL declares" in fault("neighbour", threads=128)


def test_arguments_of_another_size_are_a_fault():
    with pytest.raises(KernelFault, match="16 bytes here and 8 there"):
        Runner(folder=PLANTED).kernel("planted.cu", "neighbour")(1, 64, np.zeros(1, np.int64))


def test_a_loop_that_only_tries_is_a_fault_and_no_hang():
    assert "tries for ever" in fault("tries_for_ever", count=1)


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_and_votes_do_as_a_warp_does(order):
    out = run("shuffles", size=512, order=order).reshape(64, 8)

    lane, first = np.arange(64) % 32, np.arange(64) // 32 * 32
    assert (out[:, 0] == first + 5).all()
    assert (out[:, 1] == first + (lane ^ 6)).all()
    assert (out[:, 2] == first + np.where(lane < 3, lane, lane - 3)).all()
    assert (out[:, 3] == first + np.where(lane + 3 > 31, lane, lane + 3)).all()
    assert (out[:, 4] == first + lane // 8 * 8 + 2).all()
    assert (out[:, 5] == np.where(first == 0, 11, 11)).all()
    assert (out[:, 6] == (first == 32)).all()
    assert (out[:, 7] == (first == 0)).all()


@pytest.mark.parametrize("order", ORDERS)
def test_parts_of_a_warp_may_meet_on_their_own(order):
    t = np.arange(64)

    assert (run("half_warps", order=order) == np.where(t % 32 < 16, t ^ 1, t ^ 2)).all()


@pytest.mark.parametrize("order", ORDERS)
def test_every_thread_knows_its_place(order):
    out = run("places", size=24 * 24, order=order, grid=(2, 3, 4), threads=(4, 2, 3))

    assert (out == np.arange(24 * 24) + 9000).all()


def test_votes_of_a_thread_block():
    assert (run("votes") == 11032).all()


@pytest.mark.parametrize("order", ORDERS)
def test_named_barriers_and_conditions(order):
    assert (run("named", order=order)[:32] == 32 + np.arange(32)).all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_collective_of_a_whole_thread_block(order):
    assert (run("together", order=order) == 64 * 63 / 2).all()


def test_portable_switching_gives_the_same():
    out = run("shuffles", size=512, flags=("-DNIBS_HOST_UCONTEXT",))

    assert (out == run("shuffles", size=512)).all()


def test_launches_of_several_threads_do_not_disturb_each_other():
    runner = Runner(folder=PLANTED)
    launch = runner.kernel("planted.cu", "shuffles")
    want, failed = run("shuffles", size=512), []

    def work() -> None:
        for _ in range(50):
            out = np.zeros(512, np.float32)
            launch(1, 64, np.array([(out.ctypes.data, 0)], ARGS))
            if not np.array_equal(out, want):
                failed.append(out)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failed


def test_a_kernel_that_does_not_compile_shows_what_the_compiler_said(tmp_path):
    (tmp_path / "broken.cu").write_text('#include "device.cuh"\nNIBS_KERNEL(broken, int, 1) { no such thing; }\n')

    with pytest.raises(BackendUnavailable, match=r"does not build broken\.cu"):
        Runner(folder=tmp_path).library("broken.cu")


def test_a_plain_shared_array_is_refused(tmp_path):
    (tmp_path / "plain.cu").write_text('#include "device.cuh"\nNIBS_KERNEL(plain, int, 1) { __shared__ float a[4]; }\n')

    with pytest.raises(BackendUnavailable, match="__shared__"):
        Runner(folder=tmp_path).library("plain.cu")


def test_without_a_compiler_it_says_what_it_looked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler \(looked for CXX, c\+\+, g\+\+, clang\+\+\)"):
        Runner(folder=PLANTED).library("planted.cu")


def test_a_compiler_named_by_cxx_must_be_there(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")

    with pytest.raises(BackendUnavailable, match="CXX='no-such-compiler -O3' is not a command"):
        Runner(folder=PLANTED).library("planted.cu")


def test_a_build_is_done_once(monkeypatch, tmp_path):
    Runner(folder=PLANTED).library("planted.cu")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("built again"))

    Runner(folder=PLANTED).library("planted.cu")


@pytest.mark.parametrize("name, value", (("order", "backwards"), ("order", "shuffled:x"), ("clock", "now")))
def test_a_wrong_setting_is_named(name, value):
    with pytest.raises(InvalidInput, match=f"NIBS_CUPY_{name.upper()}='{value}'"):
        Runner(**{name: value})
