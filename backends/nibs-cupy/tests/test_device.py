"""The seam between GPU and host, and what users are told of it; what would talk to a GPU is a stand-in."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nibs.errors import BackendUnavailable, InvalidInput, MemoryBudget
from nibs_cupy.backend import CupyBackend
from nibs_cupy.device import Cuda, KernelFault, flattened, open_device

STATES = """
import contextlib
import nibs
with contextlib.suppress(nibs.errors.BackendUnavailable):
    nibs.registry.registry.load("cupy")
(status,) = [status for status in nibs.backends() if status.name == "cupy"]
print(status.state, "|", sorted(status.info.capabilities.devices), "|", status.reason, "|", status.info.install)
"""


def told(python: Any, **variables: str | None) -> list[str]:
    done = python(STATES, NIBS_PLUGINS="nibs_cupy.plugin", **variables)
    assert done.returncode == 0, done.stderr
    return [part.strip() for part in done.stdout.split("|")]


def test_on_the_host_it_is_ready_and_says_cpu(python):
    assert told(python, NIBS_CUPY_DEVICE="host")[:3] == ["ready", "['cpu']", ""]


def test_without_cupy_it_is_broken_and_names_both_ways_on(python):
    hidden = "import sys; sys.modules['cupy'] = None\n" + STATES
    done = python(hidden, NIBS_PLUGINS="nibs_cupy.plugin", NIBS_CUPY_DEVICE=None)

    state, devices, reason, install = (part.strip() for part in done.stdout.split("|"))
    assert (state, devices) == ("broken", "['cuda']")
    assert reason.startswith("CuPy is not here") and "NIBS_CUPY_DEVICE=host runs the same kernels on the CPU" in reason
    assert install == "pip install 'nibs-cupy[cuda13]'"


def test_an_unknown_device_is_broken_and_says_what_is_known(python):
    state, _, reason, _ = told(python, NIBS_CUPY_DEVICE="tpu")

    assert state == "broken" and reason == "NIBS_CUPY_DEVICE='tpu': expected 'cuda' or 'host'"


def test_on_the_host_without_a_compiler_it_is_broken(python):
    state, _, reason, install = told(python, NIBS_CUPY_DEVICE="host", CXX="no-such-compiler")

    assert state == "broken" and "no-such-compiler" in reason and "g++" in install


def test_without_numpys_backend_it_owns_numpys_arrays_on_the_host(python):
    code = """
import numpy as np, nibs
values = np.eye(3, dtype=np.float32)
print(nibs.registry.registry.owner(values), float(nibs.contrastive_loss(values, values, scale=2.0)))
"""
    done = python(code, NIBS_PLUGINS="nibs_cupy.plugin", NIBS_CUPY_DEVICE="host")
    owner, loss = done.stdout.split()

    assert owner in ("cupy", "numpy")  # NumPy's own, where that is installed
    assert float(loss) == pytest.approx(np.log(np.exp(2) + 2) - 2, rel=1e-6)


@pytest.mark.parametrize("file", ("general.cu",))
def test_a_kernel_file_for_nvrtc_holds_its_headers_once(file):
    text = flattened(file)

    assert text.count("struct TileArgs {") == 1 and text.count("#define NIBS_KERNEL") == 1
    assert '#include "common.cuh"' not in text and '#include "device.cuh"' not in text
    assert '#include "cuda_host.hpp"' in text  # behind a condition that NVRTC never meets


def test_arrays_of_another_device_are_refused(host):
    with pytest.raises(InvalidInput, match="device='cuda:0': this backend's arrays live on cpu"):
        CupyBackend(host).asarray(np.ones(3), device="cuda:0")


def test_a_device_is_opened_by_name():
    with pytest.raises(BackendUnavailable, match="expected 'cuda' or 'host'"):
        open_device("gpu")


# -- a stand-in for CuPy --------------------------------------------------------------------------


class Refusal(RuntimeError):
    """In the place of each of CuPy's errors."""


class OutOfMemory(MemoryError):
    """In the place of CuPy's."""


class CompileFault(Exception):
    """In the place of CuPy's."""


class Module:
    """Records what `cupy.RawModule` is given, and the launches."""

    made: list[dict[str, Any]]

    def __init__(self, **given: Any) -> None:
        self.given, self.launches = given, []
        Module.made.append(given)

    def get_function(self, name: str) -> Any:
        def function(grid: Any, block: Any, arguments: Any, *, shared_mem: int) -> None:
            self.launches.append((name, grid, block, arguments, shared_mem))

        function.module = self  # type: ignore[attr-defined]
        return function


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    Module.made = []
    names = SimpleNamespace
    cuda = names(
        is_available=lambda: True,
        memory=names(OutOfMemoryError=OutOfMemory),
        driver=names(CUDADriverError=Refusal),
        runtime=names(CUDARuntimeError=Refusal),
        compiler=names(CompileException=CompileFault),
    )
    stand_in = names(__version__="14.2.0", cuda=cuda, RawModule=Module)
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    return stand_in


def test_a_module_is_compiled_once_for_each_file_and_architecture(cupy):
    device = Cuda()
    for name in ("nibs_lse_float32", "nibs_weights_float32"):
        device.kernel("general.cu", name)
    device.kernel("general.cu", "nibs_lse_float32", arch="sm_90a")

    assert [given["options"] for given in Module.made] == [("-std=c++17",), ("-std=c++17", "-arch=sm_90a")]
    assert Module.made[0]["backend"] == "nvrtc" and Module.made[0]["code"] == flattened("general.cu")


def test_a_gpu_that_is_not_there_is_missed_aloud(cupy):
    cupy.cuda.is_available = lambda: False

    with pytest.raises(BackendUnavailable, match=r"CuPy 14\.2\.0 is here and sees no CUDA device"):
        Cuda()


@pytest.mark.parametrize(
    "theirs, ours",
    ((OutOfMemory("2 GiB"), MemoryBudget), (Refusal("launch"), KernelFault), (CompileFault("x"), BackendUnavailable)),
)
def test_what_cuda_refuses_is_an_error_of_nibs(cupy, theirs, ours):
    with pytest.raises(ours), Cuda().quiet():
        raise theirs


@pytest.mark.parametrize("precision, used", (("default", 1), ("high", 1), ("highest", 4)))
def test_highest_precision_overrules_tf32_and_puts_it_back(cupy, precision, used):
    state, seen = {np.dtype(np.float32): 1}, []

    class Array(np.ndarray):
        def __matmul__(self, other: Any) -> Any:
            seen.append(state[self.dtype])
            return np.asarray(self) @ other

    cupy._core = SimpleNamespace(
        _routines_linalg=SimpleNamespace(
            COMPUTE_TYPE_FP32=4, get_compute_type=state.__getitem__, set_compute_type=state.__setitem__
        )
    )
    a = np.eye(3, dtype=np.float32)

    out = Cuda().product(a.view(Array), a, precision)

    assert seen == [used] and state == {np.dtype(np.float32): 1} and np.array_equal(out, a)


def test_the_meter_counts_what_is_held_at_once_and_forgets_what_was_there_before(monkeypatch):
    hooks = []

    class MemoryHook:
        """In the place of CuPy's: pushed and popped by `with`."""

        def __enter__(self) -> MemoryHook:
            hooks.append(self)
            return self

        def __exit__(self, *_: object) -> None:
            hooks.remove(self)

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(MemoryHook=MemoryHook))
    from nibs_cupy.meter import peak

    def call() -> None:
        (hook,) = hooks
        hook.free_postprocess(device_id=0, mem_size=512, mem_ptr=1, pmem_id=99)
        for pmem_id in (1, 2):
            hook.malloc_postprocess(device_id=0, size=100, mem_size=512, mem_ptr=1, pmem_id=pmem_id)
        hook.free_postprocess(device_id=0, mem_size=512, mem_ptr=1, pmem_id=1)
        hook.malloc_postprocess(device_id=0, size=50, mem_size=512, mem_ptr=1, pmem_id=3)

    assert peak(call) == 200
