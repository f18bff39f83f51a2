"""How it is measured: batches, the truth in float64, seconds in turns, peak memory in a fresh process, the machine.

Machines are noisy, so nothing here is an absolute promise: contenders take turns in one process, the best of their
turns counts, and what is to be compared is divided within one run. With `--one-thread` the clock is the CPU time of the
process, which neighbours hardly change. Peak memory is that of a second step in a process
of its own, beyond inputs and gradients: the system's high-water mark on a CPU, PyTorch's allocator on a GPU.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from contenders import CONTENDERS, Batch, Contender, Step

SCALE, BIAS = {"InfoNCE": 14.3, "Sigmoid": 10.0}, {"InfoNCE": 0.0, "Sigmoid": -10.0}
PRODUCTS = {"InfoNCE": 4, "Sigmoid": 3}
"""Matrix products of 2 n^2 d flops that a step needs without keeping its tiles: the yardstick of `rate`."""
SIDE = 2048  # of the square product that measures the machine
LONG_ENOUGH = 0.02  # seconds of calls in a turn, so that a clock tick or a page fault does not decide
PATIENCE = 240  # seconds for a process that measures a peak


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


def truth(one: Batch, objective: str) -> tuple[float, list[np.ndarray]]:
    """The dense loss and the gradients of queries and keys, in float64. Logits are small here: no maximum is taken."""
    queries, keys = one.queries.astype(np.float64), one.keys.astype(np.float64)
    logits = one.scale * queries @ keys.T + one.bias
    n = one.n
    eye = np.eye(n)
    if objective == "InfoNCE":
        raised = np.exp(logits)
        rows, columns = raised.sum(1), raised.sum(0)
        loss = (np.log(rows) + np.log(columns) - 2 * np.diag(logits)).sum() / (2 * n)
        weights = (raised / rows[:, None] + raised / columns[None, :] - 2 * eye) / (2 * n)
    else:
        signs = 2 * eye - 1
        loss = np.log1p(np.exp(-signs * logits)).sum() / n
        weights = -signs / (1 + np.exp(signs * logits)) / n
    return float(loss), [one.scale * weights @ keys, one.scale * weights.T @ queries]


def errors(step: Step, loss: float, one: Batch, objective: str) -> tuple[float, float]:
    """Distance from float64: of the loss; of the gradients, relative to their largest entry."""
    exact, gradients = truth(one, objective)
    apart = [
        np.abs(found - right).max() / np.abs(right).max()
        for found, right in zip(step.gradients(), gradients, strict=True)
    ]
    return abs(loss - exact), float(max(apart))


def seconds(calls: dict[Any, Callable[[], Any]], turns: int) -> dict[Any, float]:
    """The best time of each call, which take turns."""
    best = {name: timed(call) for name, call in calls.items()}
    for _ in range(turns):
        for name, call in calls.items():
            for _ in range(max(1, int(LONG_ENOUGH / best[name]))):
                best[name] = min(best[name], timed(call))
    return best


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

    flops = 2 * SIDE**3
    square = torch.randn(SIDE, SIDE, device=device)
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
        "command": " ".join(["python benchmarks/run.py", *sys.argv[1:]]),
    }
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
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
