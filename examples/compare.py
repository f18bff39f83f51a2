"""One loss, nibs beside dense: peak memory, time of a step, and whether the numbers agree. On a CPU.

A step is the symmetric loss with its gradients for both sides and the scale: in PyTorch, or with `--backend jax` in
JAX under jit, dense as well. Each loss runs in a process of its own, and its peak is what the operating system saw
above the inputs and the returned gradients: a figure that no allocator can flatter. To measure by hand, give a file
with `queries` and `keys`:

    python examples/compare.py nibs pairs.npz --backend torch
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ENOUGH_SECONDS = 3.0  # steps are repeated until this much has been measured
MOST_REPEATS = 10
DENSE_MATRICES = 5  # n x m arrays that the dense loss and its gradients need room for: 4 were seen, and some air


@dataclass(frozen=True)
class Measurement:
    """One loss on one batch: its value, the best time of a step, and the peak beyond inputs and gradients.

    peak is in bytes, None where the system does not tell. gradients: queries, keys, scale.
    """

    loss: float
    seconds: float
    peak: int | None
    gradients: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Comparison:
    """Both losses on one batch of n pairs; `dense` is None where it was not run, and `skipped` says why."""

    n: int
    dim: int
    nibs: Measurement
    dense: Measurement | None
    skipped: str = ""

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one dense similarity matrix."""
        return 4 * self.n * self.n

    def disagreement(self) -> float | None:
        """Largest relative difference of loss and gradients (by norm); None without dense."""
        if self.dense is None:
            return None
        differences = [abs(self.nibs.loss - self.dense.loss) / abs(self.dense.loss)]
        for ours, theirs in zip(self.nibs.gradients, self.dense.gradients):
            differences.append(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)))
        return max(differences)


def compare(
    queries: np.ndarray, keys: np.ndarray, scale: float, backend: str | None, dense_seconds: float | None = None
) -> Comparison:
    """Measure both losses on `[n, d]` float32 rows.

    Dense runs where it fits into the free memory, and for `dense_seconds` at the most.
    """
    n, dim = queries.shape
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder, "pairs.npz")
        np.savez(pairs, queries=queries, keys=keys)
        options = ["--scale", repr(scale)]
        ours = measured_elsewhere("nibs", pairs, [*options, "--backend", backend] if backend else options)
        options += ["--backend", backend] if backend == "jax" else []  # dense in the same framework
        needed, free = DENSE_MATRICES * 4 * n * n, free_memory()
        if free is not None and free < needed:
            reason = f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            return Comparison(n, dim, ours, None, reason)
        try:
            return Comparison(n, dim, ours, measured_elsewhere("dense", pairs, options, dense_seconds))
        except subprocess.TimeoutExpired:
            return Comparison(n, dim, ours, None, f"stopped after {dense_seconds:.0f} s")
        except subprocess.CalledProcessError as error:
            # The kernel ends a process that takes too much: a negative code, and nothing of ours is wrong.
            if error.returncode >= 0:
                raise
            return Comparison(n, dim, ours, None, "ended by the system for want of memory")


def measured_elsewhere(loss: str, pairs: Path, options: list[str], timeout: float | None = None) -> Measurement:
    """Run this file as a process of its own and read what it found."""
    found = pairs.with_name(f"{loss}.npz")
    command = [sys.executable, __file__, loss, str(pairs), "--output", str(found), *options]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=timeout)
    answer = json.loads(finished.stdout)
    with np.load(found) as arrays:
        gradients = arrays["queries"], arrays["keys"], arrays["scale"]
    return Measurement(answer["loss"], answer["seconds"], answer["peak"], gradients)


def dense_loss(queries: Any, keys: Any, scale: Any) -> Any:
    """Compute what everyone writes: the similarity matrix, and a cross entropy along each of its sides."""
    import torch
    from torch.nn.functional import cross_entropy

    logits = scale * queries @ keys.T
    positives = torch.arange(len(queries))
    return (cross_entropy(logits, positives) + cross_entropy(logits.T, positives)) / 2


def dense_loss_in_jax(queries: Any, keys: Any, scale: Any) -> Any:
    """Compute the same with arrays of JAX."""
    import jax

    logits = scale * queries @ keys.T
    rows, columns = (jax.numpy.diagonal(jax.nn.log_softmax(logits, axis)).mean() for axis in (1, 0))
    return -(rows + columns) / 2


def nibs_loss(backend: str | None) -> Callable[[Any, Any, Any], Any]:
    """Return the same loss by nibs."""
    import nibs

    return lambda queries, keys, scale: nibs.contrastive_loss(queries, keys, scale=scale, backend=backend)


Step = Callable[[], "tuple[float, tuple[np.ndarray, ...], float]"]  # the loss, its gradients, and seconds


def step_in_torch(loss: Callable[[Any, Any, Any], Any], queries: np.ndarray, keys: np.ndarray, scale: float) -> Step:
    """Return a step in PyTorch, after a small one: libraries and threads are there before anything counts."""
    import torch

    def step(rows: int = len(queries)) -> tuple[float, tuple[np.ndarray, ...], float]:
        inputs = (
            torch.from_numpy(queries[:rows]).requires_grad_(),
            torch.from_numpy(keys[:rows]).requires_grad_(),
            torch.tensor(scale, requires_grad=True),
        )
        start = time.perf_counter()
        value = loss(*inputs)
        value.backward()
        return value.item(), tuple(one.grad.numpy() for one in inputs), time.perf_counter() - start

    step(64)
    return step


def step_in_jax(loss: Callable[[Any, Any, Any], Any], queries: np.ndarray, keys: np.ndarray, scale: float) -> Step:
    """Return a step in JAX, compiled before anything counts."""
    import jax

    inputs = tuple(jax.numpy.asarray(one) for one in (queries, keys, np.float32(scale)))
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*inputs).compile()

    def step() -> tuple[float, tuple[np.ndarray, ...], float]:
        start = time.perf_counter()
        value, gradients = jax.block_until_ready(compiled(*inputs))
        seconds = time.perf_counter() - start
        return float(value), tuple(np.asarray(one) for one in gradients), seconds

    return step


def measure(step: Step) -> Measurement:
    """Take the peak of the first step and the best time of as many as fit into a few seconds."""
    gc.collect()
    before = start_watching_memory()
    value, gradients, seconds = step()
    peak = peak_memory()
    returned = sum(gradient.nbytes for gradient in gradients)
    beyond = None if peak is None or before is None else max(0, peak - before - returned)
    spent, best, repeats = seconds, seconds, 1
    while spent < ENOUGH_SECONDS and repeats < MOST_REPEATS:
        seconds = step()[2]
        spent, best, repeats = spent + seconds, min(best, seconds), repeats + 1
    return Measurement(value, best, beyond, gradients)


def start_watching_memory() -> int | None:
    """Set the high-water mark of this process to what it holds now, and return that in bytes."""
    # Linux: 5 resets the mark that VmHWM reports (proc(5)). Where it may not be written the mark stands at what
    # loading the libraries took, and a smaller peak than that cannot be told.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS") or peak_memory()


def peak_memory() -> int | None:
    """Return the high-water mark of this process in bytes."""
    mark = process_memory("VmHWM")
    if mark is not None:
        return mark
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_memory(field: str) -> int | None:
    """Read a field of /proc/self/status in bytes; None where there is no such file."""
    return memory_field(Path("/proc/self/status"), field)


def memory_field(path: Path, field: str) -> int | None:
    """Read `field: 123 kB` from a file of such lines."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def free_memory() -> int | None:
    """Return the bytes that can be taken without swapping: the machine's, or less in a container. None: unknown."""
    found = [memory_field(Path("/proc/meminfo"), "MemAvailable")]
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except OSError:
        pass
    known = [size for size in found if size is not None]
    return min(known) if known else None


def main() -> None:
    """Measure one loss on a file of pairs and print what was found as JSON."""
    parser = argparse.ArgumentParser(description="Measure one loss on a file with arrays `queries` and `keys`.")
    parser.add_argument("loss", choices=("nibs", "dense"))
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--backend", help="of nibs; jax: a step in JAX, under jit; default: torch")
    parser.add_argument("--output", type=Path, help="a file for the gradients (.npz)")
    options = parser.parse_args()
    with np.load(options.pairs) as arrays:
        queries, keys = arrays["queries"], arrays["keys"]
    dense, step = (dense_loss_in_jax, step_in_jax) if options.backend == "jax" else (dense_loss, step_in_torch)
    loss = dense if options.loss == "dense" else nibs_loss(options.backend)
    found = measure(step(loss, queries, keys, options.scale))
    if options.output:
        np.savez(options.output, **dict(zip(("queries", "keys", "scale"), found.gradients)))
    print(json.dumps({"loss": found.loss, "seconds": found.seconds, "peak": found.peak}))


if __name__ == "__main__":
    main()
