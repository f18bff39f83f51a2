"""How it is measured: batches, the truth in float64, seconds in turns, peak memory in a fresh process, the machine.

Machines are noisy, so nothing here is an absolute promise: contenders take turns in one process, the best of their
turns counts, and what is to be compared is divided within one run. With `--one-thread` the clock is the CPU time of the
process, which neighbours hardly change. Peak memory is that of a second step in a process
of its own, beyond inputs and gradients: the system's high-water mark on a CPU, PyTorch's allocator on a GPU.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from contenders import CONTENDERS, Batch, Contender, Step

SCALE, BIAS = {"InfoNCE": 14.3, "Sigmoid": 10.0}, {"InfoNCE": 0.0, "Sigmoid": -10.0}
PRODUCTS = {"InfoNCE": 4, "Sigmoid": 3}
"""Matrix products of 2 n^2 d flops that a step needs without keeping its tiles: the yardstick of `rate`."""
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square product that measures the machine, and must outlast its start
LONG_ENOUGH = 0.02  # seconds of calls in a turn, so that a clock tick or a page fault does not decide
SAMPLE = 64  # rows of each side whose gradients are compared with float64
PATIENCE = 240  # seconds for a process that measures a peak, and for a first step unless told otherwise


def batch(n: int, d: int, dtype: str, objective: str, device: str, memory: str | None = None) -> Batch:
    """`[n, d]` unit queries, and keys that lean towards them."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((n, d)).astype(np.float32)
    keys = queries + rng.standard_normal((n, d)).astype(np.float32)
    for rows in (queries, keys):
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if dtype != "float32":
        import torch

        exact = getattr(torch, dtype)
        queries, keys = (torch.from_numpy(rows).to(exact).float().numpy() for rows in (queries, keys))
    return Batch(queries, keys, dtype, device, SCALE[objective], BIAS[objective], memory)


@dataclass(frozen=True)
class Truth:
    """In float64: the loss of a batch, and of the rows `sample` of each side its gradient."""

    loss: float
    sample: np.ndarray
    gradients: list[np.ndarray]


def truth(one: Batch, objective: str) -> Truth:
    """Strip by strip. Logits are small here: no maximum is taken."""
    queries, keys, n = one.queries.astype(np.float64), one.keys.astype(np.float64), one.n
    positives = one.scale * (queries * keys).sum(1) + one.bias
    sample = np.arange(0, n, -(-n // SAMPLE))

    def logits(rows: Any, columns: Any) -> np.ndarray:
        return one.scale * queries[rows] @ keys[columns].T + one.bias

    strips = [slice(begin, begin + 1024) for begin in range(0, n, 1024)]
    if objective == "InfoNCE":
        rows, columns = np.zeros(n), np.zeros(n)
        for where in strips:
            raised = np.exp(logits(where, slice(None)))
            rows[where] = raised.sum(1)
            columns += raised.sum(0)
        loss = (np.log(rows) + np.log(columns) - 2 * positives).sum() / (2 * n)

        def weights(i: Any, j: Any) -> np.ndarray:
            raised = np.exp(logits(i, j))
            return (raised / rows[i][:, None] + raised / columns[j] - 2 * same(i, j)) / (2 * n)
    else:
        loss = np.sum([np.log1p(np.exp(logits(where, slice(None)))).sum() for where in strips])
        loss = (loss - positives.sum()) / n  # log(1 + e^-s) = log(1 + e^s) - s

        def weights(i: Any, j: Any) -> np.ndarray:
            return (1 / (1 + np.exp(-logits(i, j))) - same(i, j)) / n

    def same(i: Any, j: Any) -> np.ndarray:
        return np.arange(n)[i][:, None] == np.arange(n)[j]

    every = slice(None)
    of_queries, of_keys = weights(sample, every) @ keys, weights(every, sample).T @ queries
    return Truth(float(loss), sample, [one.scale * of_queries, one.scale * of_keys])


def errors(step: Step, loss: float, right: Truth) -> tuple[float, float]:
    """Distance from float64: of the loss; of the sampled gradients, relative to their largest entry."""
    apart = [
        np.abs(found[right.sample] - exact).max() / np.abs(exact).max()
        for found, exact in zip(step.gradients(), right.gradients, strict=True)
    ]
    return abs(loss - right.loss), float(max(apart))


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Break off what takes longer, with a TimeoutError, as soon as Python has a say; not where there is no alarm."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"its first step was not over after {seconds:g} s")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def seconds(calls: dict[Any, Callable[[], Any]], turns: int) -> tuple[dict[Any, float], dict[Any, str]]:
    """The best time of each call, which take turns; and of those that failed in theirs, why."""
    best: dict[Any, float] = {}
    failed: dict[Any, str] = {}
    for _ in range(1 + turns):
        for name, call in calls.items():
            if name in failed:
                continue
            before = best.get(name, math.inf)
            try:
                best[name] = min(before, *(timed(call) for _ in range(max(1, int(LONG_ENOUGH / before)))))
            except Exception as error:  # as when a neighbour of it has taken the GPU's memory
                failed[name] = reason(error)
    return best, failed


def reason(error: Exception) -> str:
    """Why a contender cannot run: its error's first sentence, or the line that raised where it says nothing."""
    words = str(error).strip().splitlines()
    if not words:
        words = [traceback.extract_tb(error.__traceback__)[-1].line or ""]
    return f"{type(error).__name__}: {words[0].partition('. ')[0]}"[:100]


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call; each returns a number, so that a device has finished."""
    clock = time.process_time if one_thread() else time.perf_counter
    start = clock()
    call()
    return clock() - start


ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
"""The environment that keeps every library to one thread; it must stand before they are loaded."""


def one_thread() -> bool:
    """Whether this process was started under `ONE_THREAD`."""
    return all(os.environ.get(name) == value for name, value in ONE_THREAD.items())


def product_rates(device: str) -> dict[str, float]:
    """Matrix products per second of what this machine has, in flops: the best of several."""
    import torch

    side = SIDE[device.partition(":")[0]]
    flops = 2 * side**3
    square = torch.randn(side, side, device=device)
    half = square.bfloat16()
    calls: dict[str, Callable[[], Any]] = {
        "float32, torch": lambda: float((square @ square)[0, 0]),
        "bfloat16, torch": lambda: float((half @ half)[0, 0]),
    }
    if device == "cpu":
        array = square.numpy()
        calls["float32, numpy"] = lambda: array @ array
        if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            calls["float32, oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(square, square, None, "none", [], "")
    rates = {}
    for name, call in calls.items():
        call()
        rates[name] = flops / min(timed(call) for _ in range(4))
    return rates


def peaks(contender: Contender, dtype: str, d: int, device: str, sizes: Iterable[int]) -> dict[int, int]:
    """Peak bytes at each size beyond inputs and gradients, from a fresh process; those that it came to measure."""
    what = json.dumps([contender.name, contender.objective, dtype, d, device, list(sizes)])
    found: dict[int, int] = {}
    try:
        finished = subprocess.run(
            [sys.executable, str(Path(__file__)), what], stdout=subprocess.PIPE, text=True, timeout=PATIENCE
        ).stdout
    except subprocess.TimeoutExpired as late:
        finished = (late.stdout or b"").decode()
    for line in finished.splitlines():
        word, _, rest = line.partition(" ")
        if word == "peak":
            n, count = rest.split()
            found[int(n)] = int(count)
    return found


def _peaks_here(name: str, objective: str, dtype: str, d: int, device: str, sizes: list[int]) -> None:
    (contender,) = (one for one in CONTENDERS if (one.name, one.objective) == (name, objective))
    for n in sizes:
        step = contender.make(batch(n, d, dtype, objective, device))
        step.both()  # compilers and libraries hold what they hold
        print("peak", n, _peak(step.both, device), flush=True)


def _peak(call: Callable[[], Any], device: str) -> int:
    if device == "cpu":
        from nibs_conformance.memory import high_water

        return high_water(call)
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return max(0, torch.cuda.max_memory_allocated() - before)


def processor() -> str:
    """The CPU by its own name, where the system tells it."""
    model = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ":")
    return model.partition(":")[2].strip() or platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    """What ran this: never leave a figure without it."""
    import torch

    found: dict[str, Any] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "clock": "one thread, CPU time," if one_thread() else f"{torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
    }
    return {**found, **installed(*VERSIONS)}


def installed(*names: str) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


VERSIONS = (
    "torch",
    "numpy",
    "jax",
    "open_clip_torch",
    "inf-cl",
    "memeff",
    "siglip-kernel",
    "cut-cross-entropy",
    "pykeops",
    "sentence-transformers",
    "triton",
)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    _peaks_here(*json.loads(sys.argv[1]))
