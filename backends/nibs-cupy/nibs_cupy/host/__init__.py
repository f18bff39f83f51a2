"""Builds kernel files for the host runner and calls them: the CPU's counterpart of NVRTC and a launch.

    kernels/general.cu -> c++ -x c++ -I host -> general-<hash>.so -> ctypes

The library lies beside the byte code (`__pycache__`), or in the user's cache where that cannot be written, under a
hash of all sources, the compiler and its flags: it is built once. A compiler is searched as CXX, c++, g++,
clang++; without one it raises BackendUnavailable, and nothing else of nibs is touched.

`README.md` says how kernels are written for it, and what it finds and cannot find.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nibs.errors import BackendUnavailable, InvalidInput, NibsError

__all__ = ["KernelFault", "Runner"]

HERE = Path(__file__).parent
KERNELS = HERE.parent / "kernels"
ORDERS = ("forward", "reversed", "shuffled")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fno-exceptions", "-fvisibility=hidden", "-Wno-unknown-pragmas")
SANITIZED = ("-g", "-fsanitize=address", "-fno-omit-frame-pointer")
MESSAGE = 2048


class KernelFault(NibsError, RuntimeError):
    """A kernel did what no kernel may, and the runner saw it: a divergent barrier, a write beyond shared memory."""


class Launch(ctypes.Structure):
    """What a launch needs beside its arguments; cuda_host.hpp has the same, field by field."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic", ctypes.c_uint),
        ("order", ctypes.c_uint),
        ("latest", ctypes.c_uint),
        ("message_size", ctypes.c_uint),
        ("seed", ctypes.c_uint64),
        ("message", ctypes.c_void_p),
    )


class Runner:
    """Kernels of a folder, built and run on this CPU.

    order: how threads follow one another between barriers: `"forward"`, `"reversed"`, or `"shuffled:SEED"`.
    clock: `"earliest"`: asynchronous operations complete at once; `"latest"`: when they are waited for.
    sanitize: build with the address sanitizer; the process must have been started with it preloaded.
    Each is taken from NIBS_CUPY_ORDER, NIBS_CUPY_CLOCK and NIBS_CUPY_SANITIZE=1 where it is not given.
    folder: where the `.cu` files are; kernels/ of this package unless a test brings its own. flags: for the compiler.
    """

    def __init__(
        self,
        order: str | None = None,
        clock: str | None = None,
        sanitize: bool | None = None,
        folder: Path = KERNELS,
        flags: tuple[str, ...] = (),
    ) -> None:
        order = order or os.environ.get("NIBS_CUPY_ORDER") or "forward"
        clock = clock or os.environ.get("NIBS_CUPY_CLOCK") or "earliest"
        kind, _, seed = order.partition(":")
        if kind not in ORDERS or not (seed.isdecimal() if seed else True):
            raise InvalidInput(f"NIBS_CUPY_ORDER={order!r}: expected forward, reversed, or shuffled:SEED.")
        if clock not in ("earliest", "latest"):
            raise InvalidInput(f"NIBS_CUPY_CLOCK={clock!r}: expected earliest or latest.")
        self.order, self.seed, self.clock = ORDERS.index(kind), int(seed or 0), clock
        self.sanitize = os.environ.get("NIBS_CUPY_SANITIZE") == "1" if sanitize is None else sanitize
        self.folder, self.flags = folder, flags
        self._libraries: dict[str, ctypes.CDLL] = {}
        self._kernels: dict[tuple[str, str], Callable[..., None]] = {}
        self._lock = threading.Lock()

    def kernel(self, file: str, name: str) -> Callable[..., None]:
        """`launch(grid, threads, arguments, shared=0)` of one kernel.

        grid: thread blocks, an int or up to three. arguments: a NumPy structured array of one element, laid out as
        the kernel's struct. shared: bytes of dynamic shared memory. Raises KernelFault with the runner's message.
        """
        if (file, name) not in self._kernels:
            self._kernels[file, name] = self._bind(getattr(self.library(file), f"nibs_launch_{name}"))
        return self._kernels[file, name]

    def _bind(self, function: Any) -> Callable[..., None]:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        order, seed, latest = self.order, self.seed, self.clock == "latest"

        def launch(grid: Any, threads: Any, arguments: Any, shared: int = 0) -> None:
            message = Message()
            where = ctypes.addressof(message)
            how = Launch(_three(grid), _three(threads), shared, order, latest, MESSAGE, seed, where)
            if function(arguments.ctypes.data, arguments.nbytes, ctypes.addressof(how)):
                raise KernelFault(message.value.decode(errors="replace"))

        return launch

    def library(self, file: str) -> ctypes.CDLL:
        """The shared library of one kernel file, built if it is not there. Raises BackendUnavailable."""
        with self._lock:
            if file not in self._libraries:
                self._libraries[file] = self._load(self._build(file))
            return self._libraries[file]

    def _build(self, file: str) -> Path:
        command = [*compiler(), *FLAGS, *(SANITIZED if self.sanitize else ()), *self.flags]
        name = f"{Path(file).stem}-{_hash([*command, file], {HERE, KERNELS, self.folder})}.so"
        command += ["-I", str(HERE), "-I", str(KERNELS), "-x", "c++", str(self.folder / file)]
        for folder in _caches():
            if _trusted(folder / name):
                return folder / name
        folder = next((folder for folder in _caches() if _writable(folder)), None)
        if folder is None:
            raise BackendUnavailable(
                f"no folder for built kernels can be written (tried {', '.join(map(str, _caches()))}); "
                "name one by XDG_CACHE_HOME"
            )
        handle, made = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            # The sanitizer is preloaded for this process; in the compiler it would only be slow.
            environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            done = subprocess.run([*command, "-o", made], capture_output=True, text=True, env=environment)
            if done.returncode:
                raise BackendUnavailable(
                    f"the C++ compiler {command[0]!r} does not build {file} (it takes C++17 of GCC or Clang; name "
                    f"another one by CXX): {done.stderr.strip()[-1500:]}"
                )
            os.replace(made, folder / name)  # whole or not at all, whoever else builds it now
        finally:
            Path(made).unlink(missing_ok=True)
        return folder / name

    def _load(self, path: Path) -> ctypes.CDLL:
        if self.sanitize and not hasattr(ctypes.CDLL(None), "__asan_init"):
            raise BackendUnavailable(
                "NIBS_CUPY_SANITIZE=1 needs the address sanitizer in the process from its start: "
                f"LD_PRELOAD=$({compiler()[0]} -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 python ..."
            )
        return ctypes.CDLL(str(path))


def compiler() -> list[str]:
    """The C++ compiler as a command. Raises BackendUnavailable where there is none."""
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        if command and shutil.which(command[0]):
            return command
        raise BackendUnavailable(f"CXX={named!r} is not a command here; name a C++ compiler, or unset it.")
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BackendUnavailable(
        "there is no C++ compiler (looked for CXX, c++, g++, clang++), and NIBS_CUPY_DEVICE=host needs one"
    )


# Made once: a new array type for each launch would be garbage that waits for the collector.
Three = ctypes.c_uint * 3
Message = ctypes.c_char * MESSAGE


def _three(value: Any) -> Any:
    return Three(*(*(value if isinstance(value, tuple) else (value,)), 1, 1)[:3])


def _hash(command: list[str], folders: set[Path]) -> str:
    """Of all that a library is made from, wherever it lies."""
    digest = hashlib.sha256("\0".join([*command, platform.machine()]).encode())
    binary = Path(shutil.which(command[0]) or command[0]).resolve()
    about = binary.stat()
    digest.update(f"{binary} {about.st_size} {about.st_mtime_ns}".encode())
    sources = [source for folder in folders for source in folder.iterdir() if source.suffix in (".cu", ".cuh", ".hpp")]
    for content in sorted(source.name.encode() + b"\0" + source.read_bytes() for source in sources):
        digest.update(content)
    return digest.hexdigest()[:20]


def _caches() -> list[Path]:
    """Where built libraries may lie, the first choice first."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [HERE / "__pycache__", home / "nibs-cupy", Path(tempfile.gettempdir()) / f"nibs-cupy-{os.getuid()}"]


def _trusted(library: Path) -> bool:
    """Whether it is there, put there by us or by who installed this package: in a shared folder anybody might."""
    try:
        return library.stat().st_uid in (os.getuid(), HERE.stat().st_uid)
    except OSError:
        return False


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid()
