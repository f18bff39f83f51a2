"""The seam between GPU and host, and what users are told of it; what would talk to a GPU is a stand-in."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nibs.errors import BackendUnavailable, InvalidInput, MemoryBudget, Unsupported
from nibs_cupy.backend import CupyBackend
from nibs_cupy.device import Cuda, Host, KernelFault, flattened, open_device

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


def test_numpys_arrays_without_the_variable_are_told_which_one_to_set(python):
    code = """
import numpy as np, nibs
try:
    nibs.contrastive_loss(np.eye(3), np.eye(3), backend="cupy")
except nibs.errors.Unsupported as error:
    print(error)
"""
    done = python(code, NIBS_PLUGINS="nibs_cupy.plugin,nibs_numpy.plugin", NIBS_CUPY_DEVICE=None)

    assert "it runs on cuda, not on cpu (NIBS_CUPY_DEVICE=host, set before nibs looks for backends" in done.stdout


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


class CUBLASError(RuntimeError):
    """In the place of cuBLAS's."""


class CompileFault(Exception):
    """In the place of CuPy's."""


class Module:
    """Records what `cupy.RawModule` is given, and the launches."""

    made: list[Any]

    def __init__(self, *, path: str) -> None:
        self.path, self.launches, self.granted = path, [], {}
        Module.made.append(self)

    def get_function(self, name: str) -> Any:
        module = self

        class Function:
            def __call__(self, grid: Any, block: Any, arguments: Any, *, shared_mem: int) -> None:
                module.launches.append((name, grid, block, arguments, shared_mem))

            def __setattr__(self, attribute: str, value: Any) -> None:
                module.granted[name, attribute] = value

        return Function()


class Nvrtc:
    """In the place of `cupy_backends.cuda.libs.nvrtc`."""

    class NVRTCError(RuntimeError):
        pass

    def __init__(self) -> None:
        self.compiled: list[tuple[str, str, tuple[str, ...]]] = []
        self.programs: dict[int, tuple[str, str]] = {}
        self.refuses = False

    def getVersion(self) -> tuple[int, int]:
        return 13, 0

    def createProgram(self, source: str, name: str, headers: Any, include_names: Any) -> int:
        self.programs[len(self.programs)] = source, name
        return len(self.programs) - 1

    def compileProgram(self, program: int, options: tuple[str, ...]) -> None:
        if self.refuses:
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION (6)")
        self.compiled.append((*self.programs[program], options))

    def getCUBIN(self, program: int) -> bytes:
        return b"machine code"

    def getProgramLog(self, program: int) -> str:
        return "general.cu(1): error: no"

    def destroyProgram(self, program: int) -> None:
        pass


class Cublas:
    """In the place of `cupy_backends.cuda.libs.cublas`: products of arrays of NumPy, by their addresses."""

    def __init__(self) -> None:
        self.elements = {0: np.float32, 1: np.float64, 2: np.float16, 14: ml_dtypes.bfloat16}
        self.mode, self.modes, self.computed = 0, [], []

    def getPointerMode(self, handle: int) -> int:
        return self.mode

    def setPointerMode(self, handle: int, mode: int) -> None:
        self.mode = mode
        self.modes.append(mode)

    def gemmEx(
        self,
        *given: int,
    ) -> None:
        (
            handle,
            flip_a,
            flip_b,
            m,
            n,
            k,
            alpha,
            a,
            type_a,
            pitch_a,
            b,
            type_b,
            pitch_b,
            beta,
            c,
            type_c,
            pitch_c,
            how,
            _,
        ) = given
        assert handle == 77 and self.mode == 1
        self.computed.append(how)

        def matrix(address: int, kind: int, rows: int, columns: int, pitch: int) -> Any:
            """By columns, `pitch` from one to the next; what it reads must be there."""
            dtype = np.dtype(self.elements[kind])
            assert pitch >= rows
            count = pitch * (columns - 1) + rows
            flat = np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype)
            return np.lib.stride_tricks.as_strided(flat, (rows, columns), (dtype.itemsize, pitch * dtype.itemsize))

        wide = np.dtype(self.elements[type_c])
        left = matrix(a, type_a, *((k, m) if flip_a else (m, k)), pitch_a)
        right = matrix(b, type_b, *((n, k) if flip_b else (k, n)), pitch_b)
        left, right = (x.T if flip else x for x, flip in ((left, flip_a), (right, flip_b)))
        out = matrix(c, type_c, m, n, pitch_c)
        factors = [matrix(address, type_c, 1, 1, 1)[0, 0] for address in (alpha, beta)]
        out[...] = factors[0] * (left.astype(wide) @ right.astype(wide)) + factors[1] * out


class OnDevice(np.ndarray):
    """An array of NumPy with CuPy's word for where it lies."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    Module.made = []
    names = SimpleNamespace
    linear = names(COMPUTE_TYPE_TF32=7, get_compute_type=lambda dtype: 1)
    cuda = names(
        is_available=lambda: True,
        Device=lambda: names(compute_capability="90"),
        device=names(get_cublas_handle=lambda: 77),
        memory=names(OutOfMemoryError=OutOfMemory),
        driver=names(CUDADriverError=Refusal),
        runtime=names(CUDARuntimeError=Refusal),
        compiler=names(CompileException=CompileFault),
    )
    stand_in = names(
        __version__="14.2.0",
        cuda=cuda,
        RawModule=Module,
        _core=names(_routines_linalg=linear),
        ones=lambda *how: np.ones(*how).view(OnDevice),
        zeros=lambda *how: np.zeros(*how).view(OnDevice),
        ascontiguousarray=lambda x: np.ascontiguousarray(x).view(OnDevice),
    )
    libs = names(nvrtc=Nvrtc(), cublas=Cublas())
    for name in ("cupy_backends", "cupy_backends.cuda"):
        monkeypatch.setitem(sys.modules, name, names())
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", libs)
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    stand_in.libs = libs
    return stand_in


def test_a_file_is_compiled_once_for_each_architecture_and_kept_with_cupys_own(cupy, tmp_path):
    for device in (Cuda(), Cuda()):
        for name in ("nibs_lse_float32", "nibs_weights_float32"):
            device.kernel("general.cu", name)
        device.kernel("general.cu", "nibs_lse_float32", arch="sm_90a")

    source = flattened("general.cu")
    assert cupy.libs.nvrtc.compiled == [
        (source, "general.cu", ("-std=c++17", "-arch=sm_90")),
        (source, "general.cu", ("-std=c++17", "-arch=sm_90a")),
    ]
    assert len(Module.made) == 4 and all(Path(module.path).read_bytes() == b"machine code" for module in Module.made)
    assert {Path(module.path).parent for module in Module.made} == {tmp_path / "cache"}


@pytest.mark.parametrize("left", [b"", b"machine", b"machine c0de"])
def test_a_damaged_file_in_the_cache_is_compiled_again(cupy, left):
    Cuda().kernel("general.cu", "nibs_lse_float32")
    Path(Module.made[0].path).write_bytes(left)

    Cuda().kernel("general.cu", "nibs_lse_float32")

    assert len(cupy.libs.nvrtc.compiled) == 2
    assert Module.made[1].path == Module.made[0].path and Path(Module.made[1].path).read_bytes() == b"machine code"


def test_a_launch_asks_for_more_than_48_kib_of_shared_memory_and_passes_the_struct_by_value(cupy):
    arguments = np.zeros(1, [("rows", np.int64)])
    Cuda().kernel("general.cu", "nibs_lse_float32")(3, 256, arguments, shared=98304)

    (module,) = Module.made
    assert module.granted == {("nibs_lse_float32", "max_dynamic_shared_size_bytes"): 98304}
    assert module.launches == [("nibs_lse_float32", (3,), (256,), (arguments,), 98304)]


def test_a_kernel_for_another_architecture_is_refused_and_says_what_runs(cupy):
    cupy.cuda.Device = lambda: SimpleNamespace(compute_capability="80")

    with pytest.raises(Unsupported, match=r"sm_90a, and this device is sm_80; NIBS_CUPY_KERNELS=ampere"):
        Cuda().kernel("hopper_lse.cu", "nibs_hopper_lse_bfloat16", arch="sm_90a")


def test_what_nvrtc_says_of_a_kernel_is_passed_on(cupy):
    cupy.libs.nvrtc.refuses = True

    with pytest.raises(BackendUnavailable, match=r"NVRTC 13\.0 does not compile general\.cu for sm_90: .*error: no"):
        Cuda().kernel("general.cu", "nibs_lse_float32")


def test_a_cache_that_cannot_be_written_is_named(cupy, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))

    with pytest.raises(BackendUnavailable, match="name a folder by CUPY_CACHE_DIR"):
        Cuda().kernel("general.cu", "nibs_lse_float32")


DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_added_by_one_call_of_cublas_whatever_lies_where(cupy, dtype, flip):
    random = np.random.default_rng(1)
    r, k, d = 5, 7, 3

    def made(rows: int, columns: int, kind: Any = DTYPES[dtype]) -> Any:
        """Rows further apart than they are long."""
        return random.standard_normal((rows, columns + 2)).astype(kind).view(OnDevice)[:, :columns]

    a, b = made(k, r).T if flip else made(r, k), made(k, d)[::-1] if flip else made(k, d)
    into = made(r, d, np.float64 if dtype == "float64" else np.float32)
    share = np.full(1, 4, into.dtype).view(OnDevice)
    wanted = into + a.astype(np.float64) @ b.astype(np.float64) / 4

    Cuda().add_product(into, a, b, "default", share)

    np.testing.assert_allclose(np.asarray(into), wanted, rtol=1e-5, atol=1e-6)
    assert cupy.libs.cublas.modes == [1, 0] and len(cupy.libs.cublas.computed) == 1


@pytest.mark.parametrize("shape", [(1, 4, 3), (4, 1, 3), (4, 3, 1), (1, 1, 1), (0, 3, 2), (3, 0, 2)])
def test_a_product_of_one_row_or_column_or_none(cupy, shape):
    r, k, d = shape
    a, b = (np.arange(float(x * y)).reshape(x, y).astype(np.float32).view(OnDevice) for x, y in ((r, k), (k, d)))
    for left, right in ((a, b), (np.asfortranarray(a).view(OnDevice), np.asfortranarray(b).view(OnDevice))):
        into = np.ones((r, d), np.float32).view(OnDevice)
        Cuda().add_product(into, left, right, "highest")
        np.testing.assert_array_equal(np.asarray(into), 1 + np.asarray(a) @ np.asarray(b))


def test_a_product_may_take_the_place_of_what_was_there(cupy):
    into, one = np.full((2, 2), 9, np.float32).view(OnDevice), np.ones((2, 2), np.float32).view(OnDevice)

    Cuda().add_product(into, one, one.copy(), "highest", keep=False)

    assert (into == 2).all()


@pytest.mark.parametrize(
    "precision, setting, used", (("default", 1, 68), ("default", 7, 77), ("high", 1, 77), ("highest", 7, 68))
)
def test_float32_products_are_tf32_where_cupy_or_the_caller_says_so(cupy, precision, setting, used):
    cupy._core._routines_linalg.get_compute_type = lambda dtype: setting
    one = np.ones((2, 2), np.float32).view(OnDevice)

    Cuda().add_product(one, one.copy(), one.copy(), precision)

    assert cupy.libs.cublas.computed == [used]


def test_on_the_host_half_precision_is_widened_a_square_at_a_time():
    random = np.random.default_rng(2)
    a, b = (random.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((300, 200), (200, 5)))
    into, share = np.ones((300, 5), np.float32), np.full(1, 2, np.float32)

    Host.add_product(None, into, a, b, "default", share)  # type: ignore[arg-type]

    np.testing.assert_allclose(into, 1 + a.astype(np.float64) @ b.astype(np.float64) / 2, rtol=1e-5, atol=1e-5)


def test_a_gpu_that_is_not_there_is_missed_aloud(cupy):
    cupy.cuda.is_available = lambda: False

    with pytest.raises(BackendUnavailable, match=r"CuPy 14\.2\.0 is here and sees no CUDA device"):
        Cuda()


@pytest.mark.parametrize(
    "theirs, ours",
    (
        (OutOfMemory("2 GiB"), MemoryBudget),
        (Refusal("launch"), KernelFault),
        (CUBLASError("CUBLAS_STATUS_NOT_SUPPORTED"), KernelFault),
        (CompileFault("x"), BackendUnavailable),
    ),
)
def test_what_cuda_refuses_is_an_error_of_nibs(cupy, theirs, ours):
    with pytest.raises(ours), Cuda().quiet():
        raise theirs


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
