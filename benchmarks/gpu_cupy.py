"""The fast CUDA kernels of nibs-cupy on a GPU: right first, then recorded, then timed. Never yet run on a GPU.

    PYTHONPATH=.:backends/nibs-cupy python benchmarks/gpu_cupy.py              # all three, in this order
    PYTHONPATH=.:backends/nibs-cupy python benchmarks/gpu_cupy.py check        # fast kernels against plain NumPy
    PYTHONPATH=.:backends/nibs-cupy python benchmarks/gpu_cupy.py record       # kernels/vectors/, which tests replay
    PYTHONPATH=.:backends/nibs-cupy python benchmarks/gpu_cupy.py time         # milliseconds of each kernel, TFLOP/s
    PYTHONPATH=.:backends/nibs-cupy:conformance python benchmarks/gpu_cupy.py rings     # by name only, see below

Needs CuPy and an NVIDIA GPU from sm_80 on; the hopper family runs on compute capability 9.0 alone. `rings` runs the
suite's ring level over the GPUs that are here, as threads (sizes 1 to 8, also on one GPU) and over NCCL (up to their
number); it needs pytest too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np

from nibs.verbs import Weights
from nibs_cupy.device import Cuda
from nibs_cupy.fast import FastKernels, Pairs
from nibs_cupy.host import KERNELS
from nibs_cupy.plain import plain_lse, plain_sigmoid, plain_weights

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "tf32x3": np.float32}
SHAPES = [(1000, 1300, 200), (128, 256, 64), (1, 1, 1)]
WARP = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "tf32": np.float32}


def kinds(device: Cuda) -> list[tuple[str, str]]:
    """Name the families and formats that this GPU can run."""
    found = [("ampere", name) for name in DTYPES]
    if device.cupy.cuda.Device().compute_capability == "90":
        found += [("hopper", "bfloat16"), ("hopper", "float16")]
    return found


def to_device(device: Cuda, values: Any) -> Any:
    """bfloat16 goes as its bits, which is all that the kernels look at."""
    return device.cupy.asarray(values.view(np.uint16) if values.dtype.itemsize == 2 else values)


def check(device: Cuda) -> None:
    """Compare every fast kernel with plain NumPy; ends the program where one is wrong."""
    wrong = 0
    random = np.random.default_rng(0)
    for family, name in kinds(device):
        kernels = FastKernels(device, name, family, processors=device.processors())
        for n, m, d in SHAPES:
            q, k = (random.standard_normal((rows, d)) for rows in (n, m))
            q, k = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(DTYPES[name]) for x in (q, k))
            target = np.where(np.arange(n) < m, np.arange(n), -1)
            one = [device.cupy.full(1, value, np.float32) for value in (14.3, -10.0, 1.0)]
            packed = kernels.pack(to_device(device, q)), kernels.pack(to_device(device, k))
            there = Pairs(target=device.cupy.asarray(target))
            shift, mass, *rest = map(device.fetch, kernels.lse(*packed, one[0], there))
            rows, columns, positive = plain_lse(q, k, 14.3, Pairs(target=target))
            errors = [np.abs(shift + np.log(mass.astype(np.float64)) - rows).max()]
            errors.append(np.abs(rest[0] + np.log(rest[1].astype(np.float64)) - columns).max())
            errors.append(np.abs(rest[2] - positive).max())
            sides = []
            for lse in (rows, columns):
                ones = np.ones(len(lse), np.float32)
                sides.append(Weights(ones, lse.astype(np.float32), ones))
            given = [Weights(*(device.cupy.asarray(v) for v in (s.factor, s.shift, s.target))) for s in sides]
            g, _ = kernels.weights(*packed, one[0], there, *given, one[2])
            got = device.fetch(device.cupy.ascontiguousarray(g)).view(DTYPES[name]).astype(np.float64)
            errors.append(np.abs(got - plain_weights(q, k, 14.3, Pairs(target=target), *sides)).max())
            loss, *_ = kernels.sigmoid(*packed, one[0], one[1], there, None, one[2])
            truth = plain_sigmoid(q, k, 14.3, -10.0, Pairs(target=target))[0]
            errors.append(np.abs(device.fetch(loss) - truth).max() / np.abs(truth).max())
            limits = (1e-5, 1e-5, 1e-5, 1e-5 if name == "tf32x3" else 2.0**-7, 1e-5)
            verdict = "right" if all(e <= limit for e, limit in zip(errors, limits, strict=True)) else "WRONG"
            wrong += verdict == "WRONG"
            print(verdict, family, name, (n, m, d), "rows columns positive g sigmoid:", *(f"{e:.1e}" for e in errors))
    if wrong:
        raise SystemExit(f"{wrong} wrong: nothing is recorded or timed")


def record(device: Cuda) -> None:
    """Inputs, and what this GPU made of them; a word's tolerance is that of float32 sums of normal numbers."""
    random = np.random.default_rng(1)
    folder = KERNELS / "vectors"
    folder.mkdir(exist_ok=True)
    args = np.dtype([(name, np.int64) for name in ("a", "b", "out", "count")])

    def attempt(name: str, threads: int, a: Any, b: Any, start: Any, count: int, shared: int, tolerance: float) -> None:
        there = [None if x is None else device.cupy.asarray(x) for x in (a, b, start)]
        given = np.zeros(1, args)
        for field, array in zip(("a", "b", "out"), there, strict=True):
            given[field] = device.address(array)
        given["count"] = count
        arch = "sm_90a" if "group" in name else None
        device.kernel("instructions.cu", name, arch=arch)(1, threads, given, shared)
        arrays = {"a": a, "start": start, "out": device.fetch(there[2])} | ({} if b is None else {"b": b})
        np.savez_compressed(
            folder / f"{name}-{device.cupy.cuda.Device().compute_capability}.npz",
            **arrays,
            **{"threads": threads, "count": count, "shared": shared, "tolerance": tolerance},
        )
        print("recorded", name)

    for name, dtype in WARP.items():
        words = [random.standard_normal((32, 4 * k)).astype(dtype) for k in (4 // np.dtype(dtype).itemsize,)]
        a = words[0].view(np.uint32)
        start = random.standard_normal((32, 4)).astype(np.float32)
        attempt(f"nibs_try_multiply_{name}", 32, a, a[:, :2].copy(), start, 0, 0, 1e-5)
        if device.cupy.cuda.Device().compute_capability == "90":
            per = 4 // np.dtype(dtype).itemsize
            sides = [random.standard_normal(rows * 32 * per).astype(dtype).view(np.uint8) for rows in (128, 256)]
            start = np.zeros((128, 128), np.float32)
            attempt(f"nibs_try_group_{name}", 128, *sides, start, 0, 3 * 16384 + 8, 1e-4)
    x = random.uniform(-130, 0, 256).astype(np.float32)
    attempt("nibs_try_exp2", 256, x, None, np.zeros(256, np.float32), 256, 0, 1e-6)


def jobs(kernels: FastKernels, packed: Any, one: Any, pairs: Pairs, side: Weights) -> dict[str, Any]:
    """Give what is timed, by name."""
    return {
        "lse": lambda: kernels.lse(*packed, one, pairs),
        "weights": lambda: kernels.weights(*packed, one, pairs, side, side, one),
        "sigmoid": lambda: kernels.sigmoid(*packed, one, one, pairs, None, one),
    }


def time(device: Cuda) -> None:
    """Print the median time of each kernel at a macro tile of 11,264 rows."""
    cupy = device.cupy
    for family, name in kinds(device):
        kernels = FastKernels(device, name, family, processors=device.processors())
        for d in (512, 768, 1024):
            n = 11264
            rows = to_device(device, np.random.default_rng(2).standard_normal((n, d)).astype(DTYPES[name]))
            packed = kernels.pack(rows), kernels.pack(rows)
            one, pairs = cupy.ones(1, np.float32), Pairs(target=cupy.arange(n))
            side = Weights(cupy.ones(n, np.float32), cupy.full(n, 2000, np.float32), cupy.ones(n, np.float32))
            runs = jobs(kernels, packed, one, pairs, side)
            for what, work in runs.items():
                times = []
                for _ in range(13):
                    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
                    begin.record()
                    work()
                    end.record()
                    end.synchronize()
                    times.append(cupy.cuda.get_elapsed_time(begin, end))
                best = sorted(times[3:])[5]
                print(f"{family} {name} {what} {n} x {n} x {d}: {best:.3f} ms, {2e-9 * n * n * d / best:.0f} TFLOP/s")


def rings(device: Cuda) -> None:
    """Run the suite's ring level over both rings; ends the program where a test fails."""
    here = device.cupy.cuda.runtime.getDeviceCount()
    suite = ("pytest", "-q", "-p", "nibs_conformance.plugin", "--pyargs", "nibs_conformance.test_ring")
    over_nccl = " or ".join(f"{size}-ranks" for size in (2, 3, 4, 8) if size <= here)
    for world, chosen in (("devices", "ranks"), ("nccl", over_nccl)):
        if not chosen:
            print("over NCCL: not run, it takes a GPU for each rank and one is here")
            continue
        print(f"over {world}: {here} GPUs", flush=True)
        settings = {"NIBS_CUPY_WORLD": world, "NIBS_PLUGINS": "nibs_cupy.plugin", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        command = [sys.executable, "-m", *suite, "--nibs-backend", "cupy", "-k", chosen]
        subprocess.run(command, env={**os.environ, **settings}, check=True)


if __name__ == "__main__":
    steps = {"check": check, "record": record, "time": time, "rings": rings}
    gpu = Cuda()
    for step in sys.argv[1:] or ("check", "record", "time"):
        steps[step](gpu)
