"""Every kernel through NVIDIA's compiler for every architecture, without a GPU, and a table that it must keep to.

    python -m nibs_cupy.compile                 all architectures; prints the table, exits 1 on a fault
    python -m nibs_cupy.compile sm_90a          one of them

NVRTC, the compiler that CuPy calls, comes as the wheel nvidia-cuda-nvrtc and is loaded by ctypes; where it is not
installed, nvcc is called. Of each kernel the compiler's report gives registers, stack and spills; which instructions
it became is counted in the machine code itself (128 bits each from sm_70 on, the operation in the lowest nine).

A kernel keeps to the table when it spills nothing, uses no more registers than `LIMITS` grants it, has the
tensor-core instructions that it is for, and no wgmma was serialised: the compiler says so in a remark (C7510 to
C7519) and otherwise makes slow code. What it cannot tell: whether the numbers are right, and how fast.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from nibs.errors import BackendUnavailable
from nibs_cupy.device import OPTIONS, flattened
from nibs_cupy.fast import FAMILIES
from nibs_cupy.host import KERNELS

__all__ = ["ARCHITECTURES", "LIMITS", "Kernel", "Limit", "compile_file", "compile_source", "faults", "files_for"]

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_100a": 227, "sm_120": 99}  # KiB for a thread block

# The lowest nine bits of an instruction, on sm_80 to sm_120.
OPERATIONS = {
    0x03C: "HMMA",  # mma.sync
    0x1F0: "HGMMA",  # wgmma
    0x03B: "LDSM",  # ldmatrix
    0x1AE: "LDGSTS",  # cp.async
    0x1BA: "UBLKCP",  # cp.async.bulk
    0x1C8: "USETMAXREG",  # setmaxnreg
    0x187: "STL",  # a store to local memory
    0x183: "LDL",  # a load from it
}
SERIALISED = re.compile(r"\(C75\d\d\).*", re.IGNORECASE)


@dataclass(frozen=True)
class Limit:
    """What kernels whose names match may use, at most, and must use.

    shared: dynamic bytes, as launched. Nothing may be spilled, and no array may lie in local memory.
    """

    kernels: str
    registers: int
    shared: int = 0
    needs: tuple[str, ...] = ()


# The first that matches. 255 is the hardware's end; 168 what 384 threads leave each; 128 lets two thread blocks of 256
# threads share a multiprocessor. Where registers go from one warpgroup to another, the number is also the least.
LIMITS = (
    Limit("nibs_ampere_lse_tf32x3", 168, FAMILIES["ampere"].shared, ("HMMA", "LDSM", "LDGSTS")),
    Limit("nibs_ampere_lse_*", 128, FAMILIES["ampere"].shared, ("HMMA", "LDSM", "LDGSTS")),
    Limit("nibs_ampere_redo_*", 168, FAMILIES["ampere"].shared, ("HMMA", "LDSM", "LDGSTS")),
    Limit("nibs_ampere_weights_*", 168, FAMILIES["ampere"].shared, ("HMMA", "LDSM", "LDGSTS")),
    Limit("nibs_ampere_sigmoid_*", 168, FAMILIES["ampere"].shared, ("HMMA", "LDSM", "LDGSTS")),
    Limit("nibs_hopper_*", 168, FAMILIES["hopper"].shared, ("HGMMA", "UBLKCP", "USETMAXREG")),
    Limit("nibs_try_group_*", 255, 3 * 16384 + 8, ("HGMMA", "UBLKCP")),
    Limit("nibs_try_multiply_*", 64, 0, ("HMMA",)),
    Limit("nibs_pack_*", 40),
    Limit("nibs_try_*", 40),
    Limit("*", 128),  # the general kernels, which are for any hardware and not for speed
)


@dataclass
class Kernel:
    """What became of one kernel. stack, spills, static: bytes. counts: of the instructions in OPERATIONS."""

    name: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    static: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    @property
    def limit(self) -> Limit:
        return next(limit for limit in LIMITS if fnmatch(self.name, limit.kernels))


def files_for(architecture: str) -> list[str]:
    """Kernel files that are compiled for an architecture; wgmma is Hopper's alone."""
    files = sorted(path.name for path in KERNELS.glob("*.cu"))
    return [name for name in files if architecture == "sm_90a" or not name.startswith("hopper")]


def compile_file(file: str, architecture: str) -> list[Kernel]:
    """Kernels of one file of kernels/ for one architecture. Raises BackendUnavailable where no compiler is."""
    return compile_source(flattened(file), architecture)


def compile_source(source: str, architecture: str) -> list[Kernel]:
    """Kernels of a source with its headers put in."""
    nvrtc = _nvrtc()
    cubin, log = _by_nvrtc(nvrtc, source, architecture) if nvrtc else _by_nvcc(source, architecture)
    kernels: dict[str, Kernel] = {}
    for name, code in _texts(cubin):
        counts = Counter(
            OPERATIONS[operation]
            for (word,) in struct.iter_unpack("<Q8x", code)
            if (operation := word & 0x1FF) in OPERATIONS
        )
        kernels[name] = Kernel(name, counts=counts)
    current = None
    for line in log.splitlines():
        if found := re.search(r"Function properties for '?(\w+)'?", line):
            current = kernels.get(found[1])
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if current:
                current.stack, current.spills = int(found[1]), int(found[2]) + int(found[3])
        elif (found := re.search(r"Used (\d+) registers", line)) and current:
            current.registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.static = int(shared[1]) if shared else 0
        elif found := SERIALISED.search(line):
            named = re.search(r"function '(\w+)'", line)
            for kernel in kernels.values():
                if named is None or named[1] == kernel.name:
                    kernel.remarks.append(found[0])
    return sorted(kernels.values(), key=lambda kernel: kernel.name)


def faults(kernel: Kernel, architecture: str) -> list[str]:
    """What a kernel does that the table does not grant, as sentences."""
    limit, found = kernel.limit, list(kernel.remarks)
    if not kernel.registers:
        found.append("the compiler did not report its registers")
    if kernel.registers > limit.registers:
        found.append(f"{kernel.registers} registers, of which it may use {limit.registers}")
    if kernel.counts["USETMAXREG"] and kernel.registers < limit.registers:
        found.append(f"{kernel.registers} registers at launch: warpgroups that share {limit.registers} wait for ever")
    if kernel.spills or kernel.stack or kernel.counts["STL"]:
        found.append(f"{kernel.spills} bytes spilled, {kernel.stack} bytes of stack")
    shared = kernel.static + limit.shared
    if shared > SHARED[architecture] * 1024:
        found.append(f"{shared} bytes of shared memory; {architecture} has {SHARED[architecture]} KiB")
    found += [f"no {operation} in the machine code" for operation in limit.needs if not kernel.counts[operation]]
    return [f"{kernel.name} for {architecture}: {fault}" for fault in found]


# -- compilers ------------------------------------------------------------------------------------


def _nvrtc() -> ctypes.CDLL | None:
    """The NVRTC of the wheel, if it is installed."""
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}:
        for path in sorted(Path(folder or ".").glob("nvidia/cu*/lib/libnvrtc.so.*")):
            for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))  # NVRTC asks for it by name, and finds it only where it is loaded already
            return ctypes.CDLL(str(path))
    return None


def _by_nvrtc(nvrtc: ctypes.CDLL, source: str, architecture: str) -> tuple[bytes, str]:
    program = ctypes.c_void_p()
    options = [option.encode() for option in (*OPTIONS, f"-arch={architecture}", "--ptxas-options=-v")]

    def check(status: int) -> None:
        if status:
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise BackendUnavailable(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}\n{log()}")

    def log() -> str:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, text)
        return text.value.decode(errors="replace")

    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        check(nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)))
        size = ctypes.c_size_t()
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin.raw, log()
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _by_nvcc(source: str, architecture: str) -> tuple[bytes, str]:
    if not shutil.which("nvcc"):
        raise BackendUnavailable("no compiler for GPUs here: pip install nvidia-cuda-nvrtc, or put nvcc on the path")
    with tempfile.TemporaryDirectory() as folder:
        made, out = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
        made.write_text(source, encoding="utf-8")
        target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
        command = ["nvcc", *OPTIONS, target, "-cubin", "-Xptxas", "-v", "-o", str(out), str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BackendUnavailable(f"nvcc: {done.stderr}")
        return out.read_bytes(), done.stderr


def _texts(cubin: bytes) -> list[tuple[str, bytes]]:
    """Name and machine code of each kernel in an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(count)]
    strings = headers[names][4]
    found = []
    for name_at, _, _, _, offset, length in headers:
        name = cubin[strings + name_at : cubin.index(b"\0", strings + name_at)].decode()
        if name.startswith(".text."):
            found.append((name.removeprefix(".text."), cubin[offset : offset + length]))
    return found


def main(architectures: list[str]) -> int:
    bad = []
    print(f"{'kernel':34} {'arch':8} {'registers':>9} {'limit':>6} {'shared':>7}  instructions")
    for architecture in architectures or ARCHITECTURES:
        for file in files_for(architecture):
            for kernel in compile_file(file, architecture):
                counts = ", ".join(f"{count} {name}" for name, count in sorted(kernel.counts.items()))
                shared = kernel.static + kernel.limit.shared
                row = f"{kernel.registers:9} {kernel.limit.registers:6} {shared:7}  {counts}"
                print(f"{kernel.name:34} {architecture:8} {row}")
                bad += faults(kernel, architecture)
    for fault in bad:
        print(fault)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
