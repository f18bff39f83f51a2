"""The seam between the two places where the kernels run; nothing else in this package knows of it.

    cuda    arrays are CuPy's; kernels are compiled by the NVRTC that CuPy brings, kept in the folder of CuPy's cache,
            and launched on the current stream; products are cuBLAS's
    host    arrays are NumPy's; kernels are compiled by the C++ compiler and run by host/cuda_host.hpp

Both have the same words: `xp`, `address`, `kernel`, `add_product`, `rounds_products`, `processors`, `fetch`, `at` and
`quiet`.

Kernels do not go through `cupy.RawModule(code=...)`. That adds `-ftz=true`, under which float32 has fewer numbers than
the kernels were tested with, and its own `-arch=sm_90` beside our `sm_90a`, of which NVRTC 13.0 happens to take ours.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from nibs.errors import BackendUnavailable, MemoryBudget, Unsupported
from nibs_cupy.host import KERNELS, KernelFault, Runner

__all__ = ["Cuda", "Host", "KernelFault", "flattened", "open_device"]

OPTIONS = ("-std=c++17",)  # beside the architecture; compile.py checks what comes of the same
INCLUDE = re.compile(r'^[ \t]*#include "([^"]+)".*$', re.MULTILINE)


# Of cudaDataType, cublasComputeType_t and cublasGemmAlgo_t.
TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
COMPUTE = {"float32": 68, "float64": 70, "tf32": 77}
CUBLAS_CHOOSES = -1  # the algorithm


def open_device(kind: str) -> Cuda | Host:
    """`"cuda"` or `"host"`. Raises BackendUnavailable, saying what is missing."""
    if kind == "host":
        return Host()
    if kind == "cuda":
        return Cuda()
    raise BackendUnavailable(f"NIBS_CUPY_DEVICE={kind!r}: expected 'cuda' or 'host'")


class Host:
    """NumPy arrays, and the host runner."""

    kind = "cpu"
    xp = np

    def __init__(self, runner: Runner | None = None) -> None:
        self.runner = runner or Runner()
        self.runner.library("general.cu")  # now, so that a machine without a compiler is told at once

    def address(self, array: Any) -> int:
        """Where the array begins, a number for a kernel's arguments; 0 for None."""
        # Not by `__array_interface__`, which interns strings and lets them go: now and then the interpreter would
        # rebuild its table of them, 2 MB that a memory budget knows nothing of.
        return 0 if array is None else array.ctypes.data

    def kernel(self, file: str, name: str, arch: str | None = None) -> Callable[..., None]:
        """`launch(grid, threads, arguments, shared=0)`; see `Runner.kernel`. arch is a GPU's affair."""
        return self.runner.kernel(file, name)

    def add_product(self, into: Any, a: Any, b: Any, precision: str, share: Any = None, *, keep: bool = True) -> None:
        """`into += a @ b / share` in the dtype of `into`, by the BLAS library; half precision widened by squares."""
        if not keep:
            into[...] = 0
        step = max(into.shape[0], a.shape[1]) if a.dtype == b.dtype == into.dtype else 128
        for row in range(0, into.shape[0], step or 1):
            for begin in range(0, a.shape[1], step or 1):
                left = a[row : row + step, begin : begin + step].astype(into.dtype, copy=False)
                part = left @ b[begin : begin + step].astype(into.dtype, copy=False)
                if share is not None:
                    part /= share
                into[row : row + step] += part

    def rounds_products(self) -> bool:
        """Whether float32 products are TF32 where nobody asks for more."""
        return False

    def processors(self) -> int:
        """Multiprocessors; here a number that gives each thread block several tiles."""
        return 3

    def fetch(self, array: Any) -> Any:
        """The same values as a NumPy array."""
        return np.asarray(array)

    def at(self, device: str | None) -> AbstractContextManager[Any]:
        """New arrays are made on this one of several devices."""
        return nullcontext()

    def quiet(self) -> AbstractContextManager[Any]:
        """Infinities and NaN are answers within a call, not accidents."""
        return np.errstate(all="ignore")


class Cuda:
    """CuPy arrays, and a GPU."""

    kind = "cuda"

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as cause:
            raise BackendUnavailable(
                f"CuPy is not here ({cause}); NIBS_CUPY_DEVICE=host runs the same kernels on the CPU, for tests"
            ) from cause
        if not cupy.cuda.is_available():
            raise BackendUnavailable(
                f"CuPy {cupy.__version__} is here and sees no CUDA device (nvidia-smi tells whether the driver does); "
                "NIBS_CUPY_DEVICE=host runs the same kernels on the CPU, for tests"
            )
        self.xp = self.cupy = cupy
        self._modules: dict[tuple[str, str], Any] = {}
        self._functions: dict[tuple[str, str, str], Any] = {}
        self._lock = threading.Lock()

    def address(self, array: Any) -> int:
        return 0 if array is None else array.data.ptr

    def kernel(self, file: str, name: str, arch: str | None = None) -> Callable[..., None]:
        """`launch(grid, threads, arguments, shared=0)` on the current device and stream.

        arch: such as `"sm_90a"`, where the kernel is for one architecture alone. Raises Unsupported on a device that
        has another.
        """
        own = "sm_" + self.cupy.cuda.Device().compute_capability
        if arch is not None and arch.rstrip("af") != own:
            raise Unsupported(
                f"{name} is compiled for {arch}, and this device is {own}; NIBS_CUPY_KERNELS=ampere runs here"
            )
        with self._lock:
            key = file, arch or own
            if key not in self._modules:
                self._modules[key] = self.cupy.RawModule(path=str(self._compiled(*key)))
            if (*key, name) not in self._functions:
                self._functions[(*key, name)] = self._modules[key].get_function(name)
            function = self._functions[(*key, name)]  # which CuPy loads once for each device

        def launch(grid: Any, threads: Any, arguments: Any, shared: int = 0) -> None:
            blocks = grid if isinstance(grid, tuple) else (grid,)
            block = threads if isinstance(threads, tuple) else (threads,)
            if shared > 48 * 1024:  # more than that is given to those who ask, and each device asks for itself
                function.max_dynamic_shared_size_bytes = shared
            function(blocks, block, (arguments,), shared_mem=shared)  # an array of one structure goes by value

        return launch

    def _compiled(self, file: str, arch: str) -> Path:
        """The machine code of a kernel file, compiled if CuPy's folder has it not. Raises BackendUnavailable."""
        from cupy_backends.cuda.libs import nvrtc

        source, options = flattened(file), (*OPTIONS, f"-arch={arch}")
        version = ".".join(map(str, nvrtc.getVersion()))
        made_from = _digest("\0".join((source, *options, version)).encode())
        folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
        # The name says what it was made from and what it holds: a file that has been damaged is made again.
        name = f"nibs-{Path(file).stem}-{arch}-{made_from}"
        for path in folder.glob(f"{name}-*.cubin"):
            if path.stem == f"{name}-{_digest(path.read_bytes())}":
                return path
        program = nvrtc.createProgram(source, file, (), ())
        try:
            nvrtc.compileProgram(program, options)
            code = nvrtc.getCUBIN(program)
        except nvrtc.NVRTCError as cause:
            log = nvrtc.getProgramLog(program)
            raise BackendUnavailable(f"NVRTC {version} does not compile {file} for {arch}: {log[-1500:]}") from cause
        finally:
            nvrtc.destroyProgram(program)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, made = tempfile.mkstemp(suffix=".cubin", dir=folder)
            with os.fdopen(handle, "wb") as out:
                out.write(code)
            path = folder / f"{name}-{_digest(code)}.cubin"
            os.replace(made, path)  # whole or not at all, whoever else compiles it now
        except OSError as cause:
            raise BackendUnavailable(
                f"no compiled kernel can be kept in {folder} ({cause}); name a folder by CUPY_CACHE_DIR"
            ) from cause
        return path

    def add_product(self, into: Any, a: Any, b: Any, precision: str, share: Any = None, *, keep: bool = True) -> None:
        """`into += a @ b / share` by one call of cuBLAS: half precision as it is, sums in the dtype of `into`.

        into `[r, d]`, rows contiguous, float32 or float64; a `[r, k]`, b `[k, d]`: rows or columns contiguous, or they
        are copied. share: one number of the device, of the dtype of `into`; None is 1. precision: of float32 products.
        keep: what `into` held counts.
        """
        (r, d), k = into.shape, a.shape[1]
        if not (r and d and k):
            return
        from cupy_backends.cuda.libs import cublas

        out = str(into.dtype)
        one = self.cupy.ones(1, into.dtype)
        kept = one if keep else self.cupy.zeros(1, into.dtype)
        scale = one if share is None else (one / share).astype(into.dtype, copy=False)
        kind = out if out == "float64" else "float32" if str(a.dtype) != out else self._float32(precision)
        # cuBLAS counts by columns: what it is told is into^T += b^T a^T.
        (b, flip_b, pitch_b), (a, flip_a, pitch_a) = self._operand(b), self._operand(a)
        pitch = max(into.strides[0] // into.itemsize, d) if r > 1 else d
        handle = self.cupy.cuda.device.get_cublas_handle()  # this thread's, for the current device; the current stream
        before = cublas.getPointerMode(handle)
        cublas.setPointerMode(handle, 1)  # both factors lie on the device, so that nobody waits for them
        try:
            cublas.gemmEx(
                *(handle, flip_b, flip_a, d, r, k, scale.data.ptr),
                *(b.data.ptr, TYPES[str(b.dtype)], pitch_b, a.data.ptr, TYPES[str(a.dtype)], pitch_a),
                *(kept.data.ptr, into.data.ptr, TYPES[out], pitch, COMPUTE[kind], CUBLAS_CHOOSES),
            )
        finally:
            cublas.setPointerMode(handle, before)

    def _operand(self, values: Any) -> tuple[Any, int, int]:
        """A matrix as cuBLAS takes it, itself or a copy; whether it lies by columns; how far apart its lines are."""
        (rows, columns), size = values.shape, values.itemsize
        along, across = (stride // size for stride in values.strides)
        if (across == 1 or columns == 1) and (along >= columns or rows == 1):
            return values, 0, max(along, columns) if rows > 1 else columns
        if (along == 1 or rows == 1) and (across >= rows or columns == 1):
            return values, 1, max(across, rows) if columns > 1 else rows
        return self.cupy.ascontiguousarray(values), 0, columns

    def _float32(self, precision: str) -> str:
        return "tf32" if precision == "high" or (precision == "default" and self.rounds_products()) else "float32"

    def rounds_products(self) -> bool:
        """Whether CuPy's own float32 products are TF32: CUPY_TF32=1."""
        linear = self.cupy._core._routines_linalg
        return bool(linear.get_compute_type(np.float32) == linear.COMPUTE_TYPE_TF32)

    def processors(self) -> int:
        return int(self.cupy.cuda.Device().attributes["MultiProcessorCount"])

    def fetch(self, array: Any) -> Any:
        return self.cupy.asnumpy(array)

    def at(self, device: str | None) -> AbstractContextManager[Any]:
        number = (device or "").partition(":")[2]
        return self.cupy.cuda.Device(int(number)) if number else nullcontext()

    @contextmanager
    def quiet(self) -> Any:
        """CuPy warns of nothing; what CUDA refuses becomes an error of nibs."""
        cupy = self.cupy
        try:
            yield
        except cupy.cuda.memory.OutOfMemoryError as cause:
            raise MemoryBudget(f"the device has no memory left ({cause}); name a smaller memory=.") from cause
        except (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError) as cause:
            raise KernelFault(f"CUDA refused a launch or a copy: {cause}") from cause
        except cupy.cuda.compiler.CompileException as cause:  # CuPy's own elementwise kernels
            raise BackendUnavailable(f"NVRTC does not compile CuPy's kernels: {cause}") from cause
        except Exception as cause:
            if type(cause).__name__ != "CUBLASError":  # cuBLAS is loaded when it is first asked
                raise
            raise KernelFault(f"cuBLAS refused a product: {cause}") from cause


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def flattened(file: str) -> str:
    """A kernel file with its own headers put in, once each: what NVRTC gets, and what CuPy's cache hashes."""
    seen: set[str] = set()

    def read(name: str) -> str:
        seen.add(name)
        text = (KERNELS / name).read_text(encoding="utf-8").replace("#pragma once", "")
        parts, at = [f'#line 1 "{name}"\n'], 0
        for found in INCLUDE.finditer(text):
            parts.append(text[at : found.start()])
            at = found.end()
            header = found[1]
            if not (KERNELS / header).is_file() or "/" in header:
                parts.append(found[0])  # of the host runner, behind a condition
            elif header not in seen:
                line = text.count("\n", 0, at) + 1
                parts.append(read(header) + f'\n#line {line} "{name}"')
        return "".join([*parts, text[at:]])

    return read(file)
