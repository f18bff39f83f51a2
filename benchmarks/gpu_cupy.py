"""The CUDA kernels of nibs-cupy on a GPU, in the order in which answers are worth having.

    export PYTHONPATH=.:backends/nibs-cupy:conformance
    python benchmarks/gpu_cupy.py            # all of it, 570 seconds at most
    python benchmarks/gpu_cupy.py speed      # or by name, one or several
    python benchmarks/gpu_cupy.py --dry      # here, tiny, without a GPU

    ceilings    cuBLAS at the shapes of macro tiles: both gradient products (beta 0 and 1, float32 out), and K = d
    check       every fast kernel against plain NumPy; what comes after is not run where one is wrong
    suite       the conformance suite, by the general kernels and by each family
    record      kernels/vectors/: inputs, bits and outputs of each wrapped instruction, which tests replay
    speed       whole calls at 65,536 rows, several tile shapes, and what share of the ceiling they reach
    kernels     milliseconds of each kernel alone, at a macro tile of 11,264 rows
    sanitize    compute-sanitizer, memcheck and racecheck, on small sizes, where it is installed
    rings       the suite's ring level over the GPUs that are here, as threads and over NCCL; by name only

What is measured goes to out/gpu-cupy.json too, with machine, versions and date. A step that no time is left for is
named, and can be asked for alone. Needs CuPy and an NVIDIA GPU from sm_80 on; the hopper family runs on 9.0 alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from on_gpu import WORKERS

import nibs
from nibs.verbs import Weights
from nibs_cupy.backend import CupyBackend
from nibs_cupy.device import Cuda, Host
from nibs_cupy.fast import FastKernels, Pairs
from nibs_cupy.host import KERNELS
from nibs_cupy.plain import plain_lse, plain_sigmoid, plain_weights

FORMATS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "tf32x3": np.float32}
WARP = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "tf32": np.float32}
SHAPES = [(1000, 1300, 200), (128, 256, 64), (1, 1, 1)]
# Rows, columns and width of macro tiles: (rows / 128) * ceil(d / 256) near a multiple of 132 multiprocessors.
TILES = {512: (8448, 16896), 768: (11264, 11264), 1024: (12672, 12672)}
ROWS = 65536
SCALE = 14.3
SECONDS = 570


class Bench:
    """A GPU, or the host runner in its place with everything tiny; and what has been found so far."""

    def __init__(self, dry: bool) -> None:
        self.dry, self.device = dry, Host() if dry else Cuda()
        self.xp = self.device.xp
        self.tiles = {16: (40, 56)} if dry else TILES
        self.capability = "90" if dry else self.xp.cuda.Device().compute_capability
        self.until, self.alone = time.monotonic() + SECONDS, False
        self.vectors = Path(tempfile.mkdtemp()) if dry else KERNELS / "vectors"
        self.ceilings: dict[tuple[str, int], float] = {}
        self.found: list[dict[str, Any]] = []

    def families(self) -> list[str]:
        return ["ampere", "hopper"] if self.capability == "90" else ["ampere"]

    def kernels(self, family: str, name: str) -> FastKernels:
        return FastKernels(self.device, name, family, processors=self.device.processors())

    def array(self, values: Any) -> Any:
        return self.xp.asarray(values)

    def milliseconds(self, work: Callable[[], Any], repeats: int = 10) -> float:
        """The median of `work`, by events on the current stream; three runs before it do not count."""
        if self.dry:
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        cuda, times = self.xp.cuda, []
        for _ in range(3 + repeats):
            begin, end = cuda.Event(), cuda.Event()
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(cuda.get_elapsed_time(begin, end))
        return float(np.median(times[3:]))

    def say(self, step: str, flops: float = 0.0, **what: Any) -> None:
        """Print one finding, and keep it; flops: of what took `ms`."""
        if flops and "ms" in what:
            what["tflops"] = round(1e-9 * flops / what["ms"], 1)
        self.found.append({"step": step, **what})
        shown = (f"{key}={value:.3f}" if isinstance(value, float) else f"{key}={value}" for key, value in what.items())
        print(step, *shown, flush=True)

    def keep(self) -> None:
        """Write what was found, with where and by what."""
        machine = {"machine": "host runner, dry", "versions": {"numpy": np.__version__}}
        if not self.dry:
            runtime = self.xp.cuda.runtime
            name = runtime.getDeviceProperties(self.xp.cuda.Device().id)["name"].decode()
            versions = {"cupy": self.xp.__version__, "cuda": runtime.runtimeGetVersion()}
            machine = {"machine": name, "versions": {**versions, "driver": runtime.driverGetVersion()}}
        about = {**machine, "python": platform.python_version(), "date": datetime.date.today().isoformat()}
        about["command"] = shlex.join(["python", *sys.argv])
        folder = Path(tempfile.mkdtemp()) if self.dry else Path("out")
        folder.mkdir(exist_ok=True)
        (folder / "gpu-cupy.json").write_text(json.dumps({**about, "found": self.found}, indent=1))


# -- ceilings -----------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """Time the products that the loss is made of; the slower gradient product with beta 1 is the ceiling."""
    for dtype, kind in (("bfloat16", ml_dtypes.bfloat16), ("float32", np.float32)):
        for d, (r, c) in bench.tiles.items():
            g, queries, keys = (bench.xp.zeros(size, kind) for size in ((r, c), (r, d), (c, d)))
            precision = "high"
            outs = [bench.xp.zeros(size, np.float32) for size in ((r, d), (c, d))]
            slowest = 0.0
            for beta in (0, 1):
                for name, into, a, b in (("dq", outs[0], g, keys), ("dk", outs[1], g.T, queries)):
                    run = multiply(bench, into, a, b, precision, keep=bool(beta))
                    ms = bench.milliseconds(run)
                    slowest = max(slowest, ms) if beta else slowest
                    bench.say("ceilings", 2.0 * r * c * d, product=name, dtype=dtype, r=r, c=c, d=d, beta=beta, ms=ms)
            bench.ceilings[dtype, d] = 2.0 * r * c * d / slowest  # flops a millisecond
            logits = bench.xp.zeros((r, c), np.float32)
            ms = bench.milliseconds(multiply(bench, logits, queries, keys.T, precision, keep=False))
            bench.say("ceilings", 2.0 * r * c * d, product="logits", dtype=dtype, r=r, c=c, d=d, beta=0, ms=ms)


def multiply(bench: Bench, into: Any, a: Any, b: Any, precision: str, keep: bool) -> Callable[[], None]:
    """Return the product as a call of no arguments."""
    return lambda: bench.device.add_product(into, a, b, precision, keep=keep)


# -- right, then recorded -------------------------------------------------------------------------------


def check(bench: Bench) -> None:
    """Compare every fast kernel with plain NumPy; ends the program where one is wrong."""
    wrong = 0
    for family, name, shape in cases(bench):
        errors = errors_of(bench, bench.kernels(family, name), name, *shape)
        limits = dict(rows=1e-5, columns=1e-5, positive=1e-5, g=1e-5 if name == "tf32x3" else 2.0**-7, sigmoid=1e-5)
        right = all(errors[what] <= limit for what, limit in limits.items())
        wrong += not right
        shown = {what: f"{error:.1e}" for what, error in errors.items()}
        bench.say("check", verdict="right" if right else "WRONG", family=family, format=name, shape=shape, **shown)
    if wrong:
        raise SystemExit(f"{wrong} wrong: nothing after this is run")


def cases(bench: Bench) -> list[tuple[str, str, tuple[int, int, int]]]:
    """List family, format and shape of what there is to check."""
    shapes = SHAPES[1:] if bench.dry else SHAPES
    kinds = [(family, name) for family in bench.families() for name in FORMATS]
    return [(*kind, shape) for kind in kinds if kind != ("hopper", "tf32x3") for shape in shapes]


def unit_rows(random: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Rows of length 1, as a model's are: of longer ones tiles would be redone, whose rows have logits far apart."""
    rows = random.standard_normal((n, d), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def errors_of(bench: Bench, kernels: FastKernels, name: str, n: int, m: int, d: int) -> dict[str, float]:
    """Return the largest error of each thing that the kernels compute."""
    random, fetch = np.random.default_rng(0), bench.device.fetch
    q, k = (unit_rows(random, rows, d).astype(FORMATS[name]) for rows in (n, m))
    target = np.where(np.arange(n) < m, np.arange(n), -1)
    one = [bench.array(np.full(1, value, np.float32)) for value in (SCALE, -10.0, 1.0)]
    packed = kernels.pack(bench.array(q)), kernels.pack(bench.array(k))
    there = Pairs(target=bench.array(target))
    shift, mass, *rest = map(fetch, kernels.lse(*packed, one[0], there))
    rows, columns, positive = plain_lse(q, k, SCALE, Pairs(target=target))
    errors = {
        "rows": np.abs(shift + np.log(mass.astype(np.float64)) - rows).max(),
        "columns": np.abs(rest[0] + np.log(rest[1].astype(np.float64)) - columns).max(),
        "positive": np.abs(rest[2] - positive).max(),
    }
    sides = []
    for lse in (rows, columns):
        ones = np.ones(len(lse), np.float32)
        sides.append(Weights(ones, lse.astype(np.float32), ones))
    given = [Weights(*(bench.array(v) for v in (s.factor, s.shift, s.target))) for s in sides]
    g, _ = kernels.weights(*packed, one[0], there, *given, one[2])
    got = fetch(bench.xp.ascontiguousarray(g)).view(FORMATS[name]).astype(np.float64)
    errors["g"] = np.abs(got - plain_weights(q, k, SCALE, Pairs(target=target), *sides)).max()
    loss, *_ = kernels.sigmoid(*packed, one[0], one[1], there, None, one[2])
    truth = plain_sigmoid(q, k, SCALE, -10.0, Pairs(target=target))[0]
    errors["sigmoid"] = np.abs(fetch(loss) - truth).max() / np.abs(truth).max()
    return {what: float(error) for what, error in errors.items()}


def suite(bench: Bench) -> None:
    """Run the conformance suite in processes of their own; ends the program where a test fails."""
    for kernels in ("general", *bench.families()):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "nibs_conformance.plugin", "--pyargs"]
        command += ["nibs_conformance", "--nibs-backend", "cupy"]
        command += ["--collect-only"] if bench.dry else WORKERS.split()
        settings = {"NIBS_CUPY_KERNELS": kernels, "NIBS_PLUGINS": "nibs_cupy.plugin"}
        settings |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "NIBS_CUPY_DEVICE": "host" if bench.dry else "cuda"}
        start, done = time.monotonic(), finished(bench, command, **settings)
        said = done.stdout.strip().splitlines()[-1] if done else "not over in its time: ask for `suite` alone"
        bench.say("suite", kernels=kernels, said=said, seconds=round(time.monotonic() - start))


def finished(bench: Bench, command: list[str], **settings: str) -> subprocess.CompletedProcess[str] | None:
    """Run a command, with these variables set; None where its time is up, a third of what is left beside other steps.

    Ends the program where the command fails.
    """
    left = max((bench.until - time.monotonic()) / (1 if bench.alone else 3), 60)
    how = dict(capture_output=True, text=True, env={**os.environ, **settings})
    try:
        done = subprocess.run(command, timeout=left, check=False, **how)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        raise SystemExit(done.stdout[-4000:] + done.stderr[-2000:])
    return done


def record(bench: Bench) -> None:
    """Write inputs, and what this GPU made of them; a word's tolerance is that of float32 sums of normal numbers."""
    random = np.random.default_rng(1)
    bench.vectors.mkdir(exist_ok=True)
    args = np.dtype([(name, np.int64) for name in ("a", "b", "out", "count")])

    def attempt(name: str, threads: int, a: Any, b: Any, start: Any, count: int, shared: int, tolerance: float) -> None:
        there = [None if x is None else bench.array(x).copy() for x in (a, b, start)]
        given = np.zeros(1, args)
        for field, array in zip(("a", "b", "out"), there, strict=True):
            given[field] = bench.device.address(array)
        given["count"] = count
        arch = "sm_90a" if "group" in name else None
        bench.device.kernel("instructions.cu", name, arch=arch)(1, threads, given, shared)
        arrays = {"a": a, "start": start, "out": bench.device.fetch(there[2])} | ({} if b is None else {"b": b})
        how = {"threads": threads, "count": count, "shared": shared, "tolerance": tolerance}
        np.savez_compressed(bench.vectors / f"{name}-{bench.capability}.npz", **arrays, **how)
        bench.say("record", name=name)

    for name, dtype in WARP.items():
        per = 4 // np.dtype(dtype).itemsize
        a = random.standard_normal((32, 4 * per)).astype(dtype).view(np.uint32)
        start = random.standard_normal((32, 4)).astype(np.float32)
        attempt(f"nibs_try_multiply_{name}", 32, a, a[:, :2].copy(), start, 0, 0, 1e-5)
        if bench.capability == "90":
            sides = [random.standard_normal(rows * 32 * per).astype(dtype).view(np.uint8) for rows in (128, 256)]
            start = np.zeros((128, 128), np.float32)
            attempt(f"nibs_try_group_{name}", 128, *sides, start, 0, 3 * 16384 + 8, 1e-4)
    x = random.uniform(-130, 0, 256).astype(np.float32)
    attempt("nibs_try_exp2", 256, x, None, np.zeros(256, np.float32), 256, 0, 1e-6)
    words = random.integers(0, 2**32, 256, dtype=np.uint32)
    offsets = (16 * random.permutation(64)[:32]).astype(np.int32)  # ldmatrix takes rows from anywhere
    attempt("nibs_try_fragments", 32, words, offsets, np.zeros((32, 4), np.uint32), 0, 1024, 0.0)
    low, high = 100 * random.standard_normal((2, 256)).astype(np.float32)
    attempt("nibs_try_round_tf32", 256, low.view(np.uint32), None, np.zeros(256, np.uint32), 256, 0, 0.0)
    for name in ("bfloat16", "float16"):
        attempt(f"nibs_try_pack_{name}", 256, low, high, np.zeros(256, np.uint32), 256, 0, 0.0)


# -- speed ----------------------------------------------------------------------------------------------


def speed(bench: Bench) -> None:
    """Time whole calls, loss and all gradients, by each family and several tile shapes."""
    objectives = {
        "symmetric": (nibs.InfoNCE(), 4, None),
        "sigmoid": (nibs.Sigmoid(), 3, None),  # by the ampere family, where the scale wants a gradient
        "sigmoid-fixed-scale": (nibs.Sigmoid(), 3, ("queries", "keys", "bias")),
    }
    for dtype, kind in (("bfloat16", ml_dtypes.bfloat16), ("float32", np.float32)):
        names = ["general", "ampere"] if dtype == "float32" else bench.families()
        for d, shape in bench.tiles.items():
            n = 48 if bench.dry else ROWS
            random = np.random.default_rng(2)
            queries, keys = (bench.array(unit_rows(random, n, d).astype(kind)) for _ in range(2))
            for name in names:
                backend = CupyBackend(bench.device, name)
                for what, (objective, products, wrt) in objectives.items():
                    if what == ("sigmoid" if name == "hopper" else "sigmoid-fixed-scale"):
                        continue
                    for rows, columns in shapes_of(shape, general=name == "general"):
                        if time.monotonic() > bench.until:
                            return print("speed: no time left; ask for `speed` alone", flush=True)
                        plan = nibs.plan(n, n, d, dtype, objective=objective, query_tile=rows, key_tile=columns)
                        with named(backend):
                            ms = bench.milliseconds(
                                whole(queries, keys, objective, wrt, plan), 3 if name == "general" else 10
                            )
                        flops = 2.0 * n * n * d * products
                        ceiling = bench.ceilings.get((dtype, d))
                        share = round(flops / ms / ceiling, 3) if ceiling else "unknown"
                        about = dict(family=name, dtype=dtype, loss=what, n=n, d=d, tile=(rows, columns))
                        bench.say("speed", flops, **about, ms=ms, share_of_ceiling=share)


def shapes_of(shape: tuple[int, int], *, general: bool) -> list[tuple[int, int]]:
    """Give the tile shapes that are tried: the model's best, half of it, and the plain powers of two."""
    if general:
        return [(8192, 8192)]
    return [shape, (shape[0] // 2, shape[1]), (8192, 8192), (16384, 16384)]


def whole(queries: Any, keys: Any, objective: nibs.Objective, wrt: Any, plan: Any) -> Callable[[], Any]:
    """Return one training step's loss as a call of no arguments."""
    options = dict(scale=SCALE, bias=-5.0, objective=objective, wrt=wrt, precision="high", plan=plan)
    options |= dict(backend="under-test")
    return lambda: nibs.contrastive_loss_and_grad(queries, keys, **options)


class named:
    """The registry with this backend in it, under the name `under-test`."""

    def __init__(self, backend: CupyBackend) -> None:
        self.backend = backend

    def __enter__(self) -> None:
        from nibs.registry import Status, registry
        from nibs_cupy.plugin import ARRAYS, capabilities

        registry.statuses()
        where = "host" if self.backend.device.kind == "cpu" else "cuda"
        info = nibs.BackendInfo("under-test", ARRAYS[where], capabilities(where), lambda: self.backend)
        registry._statuses["under-test"] = Status("under-test", "ready", "", "benchmark", info)
        registry._backends["under-test"] = self.backend

    def __exit__(self, *_: object) -> None:
        from nibs.registry import registry

        del registry._statuses["under-test"], registry._backends["under-test"]


def kernels(bench: Bench) -> None:
    """Time each kernel alone."""
    xp = bench.xp
    for family in bench.families():
        for name in ("bfloat16",) if family == "hopper" else ("bfloat16", "tf32x3"):
            fast = bench.kernels(family, name)
            for d in bench.tiles:
                n = 48 if bench.dry else 11264
                random = np.random.default_rng(2)
                sides = [bench.array(unit_rows(random, n, d).astype(FORMATS[name])) for _ in range(2)]
                side = Weights(xp.ones(n, np.float32), xp.full(n, SCALE, np.float32), xp.ones(n, np.float32))
                runs = jobs(fast, sides, xp.full(1, SCALE, np.float32), Pairs(target=xp.arange(n)), side)
                for what, work in runs.items():
                    bench.say("kernels", 2.0 * n * n * d, name=what, family=family, format=name, n=n, d=d,
                              ms=bench.milliseconds(work))  # fmt: skip


def jobs(fast: FastKernels, sides: list[Any], scale: Any, pairs: Pairs, side: Weights) -> dict[str, Any]:
    """Give what is timed, by name; side: the weights of either."""
    packed = [fast.pack(rows) for rows in sides]
    one = side.factor[:1]
    return {
        "pack": lambda: fast.pack(sides[0]),
        "lse": lambda: fast.lse(*packed, scale, pairs),
        "weights": lambda: fast.weights(*packed, scale, pairs, side, side, one),
        "sigmoid": lambda: fast.sigmoid(*packed, scale, one, pairs, None, one),
    }


# -- under tools ------------------------------------------------------------------------------------------


def sanitize(bench: Bench) -> None:
    """Run `check` under compute-sanitizer, where it is."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return bench.say("sanitize", said="compute-sanitizer is not installed")
    for which in ("memcheck", "racecheck"):
        command = [tool, "--tool", which, "--error-exitcode", "9", sys.executable, __file__, "check"]
        done = finished(bench, command)
        said = done.stdout.strip().splitlines()[-1:] if done else "not over in its time: ask for `sanitize` alone"
        bench.say("sanitize", tool=which, said=said)


def rings(bench: Bench) -> None:
    """Run the suite's ring level over both rings; ends the program where a test fails."""
    here = 1 if bench.dry else bench.xp.cuda.runtime.getDeviceCount()
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


STEPS = {step.__name__: step for step in (ceilings, check, suite, record, speed, kernels, sanitize, rings)}
BY_NAME_ONLY = {"rings"}


def main(given: list[str] | None = None) -> None:
    """Run the steps that were asked for, as far as the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--dry", action="store_true", help="tiny, by the host runner; for tests of this file")
    asked = parser.parse_args(given)
    if unknown := [step for step in asked.steps if step not in STEPS]:
        parser.error(f"no step {unknown[0]!r}: expected some of {', '.join(STEPS)}")
    bench, steps = Bench(asked.dry), asked.steps or [name for name in STEPS if name not in BY_NAME_ONLY]
    bench.alone = len(steps) == 1
    try:
        for step in steps:
            if time.monotonic() > bench.until:
                print(f"{step}: no time left; ask for it alone", flush=True)
                continue
            STEPS[step](bench)
    finally:
        bench.keep()


if __name__ == "__main__":
    main()
