"""The seam between the two places where the kernels run; nothing else in this package knows of it.

    cuda    arrays are CuPy's; kernels are compiled by NVRTC through cupy.RawModule, cached by CuPy, and launched on
            the current stream
    host    arrays are NumPy's; kernels are compiled by the C++ compiler and run by host/cuda_host.hpp

Both have the same words: `xp`, `address`, `kernel`, `product`, `fetch`, `at` and `quiet`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from nibs.errors import BackendUnavailable, MemoryBudget
from nibs_cupy.host import KERNELS, KernelFault, Runner

__all__ = ["Cuda", "Host", "KernelFault", "flattened", "open_device"]

INCLUDE = re.compile(r'^[ \t]*#include "([^"]+)".*$', re.MULTILINE)


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

    def product(self, a: Any, b: Any, precision: str) -> Any:
        """`a @ b`, by the BLAS library."""
        return a @ b

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
        self._modules: dict[tuple[str, str | None], Any] = {}
        self._lock = threading.Lock()

    def address(self, array: Any) -> int:
        return 0 if array is None else array.data.ptr

    def kernel(self, file: str, name: str, arch: str | None = None) -> Callable[..., None]:
        """arch: such as `"sm_90a"`, where the kernel needs more than CuPy's own choice."""
        with self._lock:
            if (file, arch) not in self._modules:
                options = ("-std=c++17", *((f"-arch={arch}",) if arch else ()))
                self._modules[file, arch] = self.cupy.RawModule(code=flattened(file), options=options, backend="nvrtc")
            function = self._modules[file, arch].get_function(name)

        def launch(grid: Any, threads: Any, arguments: Any, shared: int = 0) -> None:
            blocks = grid if isinstance(grid, tuple) else (grid,)
            block = threads if isinstance(threads, tuple) else (threads,)
            if shared > 48 * 1024:
                function.max_dynamic_shared_size_bytes = shared
            function(blocks, block, (arguments,), shared_mem=shared)

        return launch

    def product(self, a: Any, b: Any, precision: str) -> Any:
        """By cuBLAS. CUPY_TF32 may let it round float32 to TF32; `"highest"` does not."""
        if precision != "highest" or a.dtype != np.float32:
            return a @ b
        linear = self.cupy._core._routines_linalg
        with self._lock:  # the setting is the process's, and ranks may be threads
            before = linear.get_compute_type(a.dtype)
            linear.set_compute_type(a.dtype, linear.COMPUTE_TYPE_FP32)
            try:
                return a @ b
            finally:
                linear.set_compute_type(a.dtype, before)

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
            raise KernelFault(f"CUDA refused a launch: {cause}") from cause
        except cupy.cuda.compiler.CompileException as cause:
            raise BackendUnavailable(f"NVRTC does not compile the kernels: {cause}") from cause


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
