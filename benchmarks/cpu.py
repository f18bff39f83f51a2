"""Speed and memory of the loss on a CPU, beside the dense loss and the machine's own matrix products, in one run.

    python benchmarks/cpu.py                              the default sizes, d = 512, float32
    python benchmarks/cpu.py --n 8192 --repeats 5 --output benchmarks/results/cpu.json

Machines are noisy, so nothing here is an absolute promise: contenders take turns in one process, the best of
their turns counts, and what is to be compared stands in one row as a ratio. `rate` is the share of the machine's
matrix-product rate that a call reaches, with the products that its mathematics needs as the yardstick: four of
2 n^2 d flops for the symmetric loss with its gradients (one forward, one recomputed, two gradients), although
nibs may take three where tiles fit the budget. Peak memory is that of a fresh process, beyond inputs and returned
gradients, from the system's high-water mark. `error` is the largest absolute difference of the loss from float64.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

SCALE = 14.3
PRODUCTS = 4
MACHINE_SIDE = 4096  # of the square product that measures the machine
CONTENDERS = ("dense torch", "nibs torch", "nibs numpy")


def pairs(n: int, d: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """`[n, d]` unit queries, and keys that lean towards them; float32 holding exact values of `dtype`."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((n, d)).astype(np.float32)
    keys = queries + rng.standard_normal((n, d)).astype(np.float32)
    for rows in (queries, keys):
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if dtype != "float32":
        import torch

        as_dtype = getattr(torch, dtype)
        queries, keys = (torch.from_numpy(rows).to(as_dtype).float().numpy() for rows in (queries, keys))
    return queries, keys


def step(contender: str, queries: np.ndarray, keys: np.ndarray, dtype: str, memory: str | None) -> Callable[[], float]:
    """One symmetric loss with the gradients of both sides and the scale, ready to be called; returns the loss."""
    import torch

    import nibs

    if contender == "nibs numpy":
        inputs = queries, keys
        if dtype != "float32":
            backend = nibs.registry.registry.load("numpy")
            inputs = tuple(backend.asarray(rows, dtype=dtype) for rows in inputs)

        def run() -> float:
            return float(nibs.contrastive_loss_and_grad(*inputs, scale=SCALE, memory=memory)[0])

        return run
    rows = [torch.from_numpy(side).to(getattr(torch, dtype)).requires_grad_() for side in (queries, keys)]
    scale = torch.tensor(SCALE, requires_grad=True)

    def run() -> float:
        for tensor in (*rows, scale):
            tensor.grad = None
        if contender == "dense torch":
            logits = scale.to(rows[0].dtype) * rows[0] @ rows[1].T
            positives = torch.arange(len(logits))
            entropy = torch.nn.functional.cross_entropy
            loss = (entropy(logits, positives) + entropy(logits.T, positives)) / 2
        else:
            loss = nibs.contrastive_loss(*rows, scale=scale, memory=memory)
        loss.backward()
        return loss.item()

    return run


def truth(queries: np.ndarray, keys: np.ndarray) -> float:
    """The loss in float64, a strip of rows at a time."""
    logits_of = lambda strip: SCALE * queries[strip].astype(np.float64) @ keys.T.astype(np.float64)  # noqa: E731
    rows, columns = 0.0, np.zeros(len(keys))
    top = SCALE * 1.001  # unit rows: no logit is above it, so plain sums are safe here
    for begin in range(0, len(queries), 512):
        strip = slice(begin, begin + 512)
        logits = logits_of(strip)
        own = logits[np.arange(len(logits)), np.arange(begin, begin + len(logits))]
        raised = np.exp(logits - top)
        rows += float((np.log(raised.sum(1)) + top - 2 * own).sum())
        columns += raised.sum(0)
    return (rows + float((np.log(columns) + top).sum())) / (2 * len(queries))


def machine_rate() -> float:
    """float32 matrix products per second, in flops: the best of several."""
    import torch

    square = torch.randn(MACHINE_SIDE, MACHINE_SIDE)
    return 2 * MACHINE_SIDE**3 / min(timed(lambda: square @ square) for _ in range(5))


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_elsewhere(contender: str, n: int, d: int, dtype: str, memory: str | None) -> int | None:
    """Peak bytes beyond inputs and returned gradients, in a process of its own; None where it could not finish."""
    command = [sys.executable, __file__, "--peak", contender, "--n", str(n), "--dim", str(d), "--dtype", dtype]
    finished = subprocess.run([*command, *(["--memory", memory] if memory else [])], stdout=subprocess.PIPE, text=True)
    return int(finished.stdout) if finished.returncode == 0 else None


def peak(contender: str, n: int, d: int, dtype: str, memory: str | None) -> int:
    """Peak bytes of this process during one step, beyond inputs and returned gradients."""
    from nibs_conformance.memory import high_water

    queries, keys = pairs(n, d, dtype)
    step(contender, queries[:64], keys[:64], dtype, memory)()  # libraries and threads are there before anything counts
    call = step(contender, queries, keys, dtype, memory)
    gradients = 2 * n * d * (4 if dtype == "float32" else 2)
    return max(0, high_water(call) - gradients)


def measure(n: int, d: int, dtype: str, repeats: int, memory: str | None, rate: float) -> list[dict[str, Any]]:
    """A row for each contender at one size."""
    queries, keys = pairs(n, d, dtype)
    exact = truth(queries, keys)
    calls = {name: step(name, queries, keys, dtype, memory) for name in CONTENDERS}
    losses = {name: call() for name, call in calls.items()}  # the warm-up
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name] = min(seconds[name], timed(call))
    dense = seconds["dense torch"]
    return [
        {
            "contender": name,
            "n": n,
            "d": d,
            "dtype": dtype,
            "seconds": seconds[name],
            "of dense": seconds[name] / dense,
            "rate": PRODUCTS * 2 * n * n * d / seconds[name] / rate,
            "peak bytes": peak_elsewhere(name, n, d, dtype, memory),
            "error": abs(losses[name] - exact),
        }
        for name in CONTENDERS
    ]


def machine() -> dict[str, Any]:
    """What ran this: never leave a figure without it."""
    import torch

    model = next(
        (line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ":" + platform.processor()
    )
    return {
        "processor": model.partition(":")[2].strip(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "date": date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/cpu.py", *sys.argv[1:]]),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def table(rows: list[dict[str, Any]], rate: float) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"machine: {rate / 1e9:.0f} GFLOP/s in float32 matrix products",
        "",
        "| n | d | dtype | loss | seconds | of dense | rate | peak MB | error |",
        "| ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        held = "-" if row["peak bytes"] is None else f"{row['peak bytes'] / 1e6:.0f}"
        lines.append(
            f"| {row['n']} | {row['d']} | {row['dtype']} | {row['contender']} | {row['seconds']:.4f} | "
            f"{row['of dense']:.2f} | {row['rate']:.2f} | {held} | {row['error']:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description="Speed and memory of the loss on this CPU, beside the dense loss.")
    parser.add_argument("--n", type=int, nargs="+", default=[256, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", help="budget for nibs, such as 512MiB; default: its own")
    parser.add_argument("--output", type=Path, help="a file for the figures (.json)")
    parser.add_argument("--peak", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak, options.n[0], options.dim, options.dtype, options.memory))
        return
    rate = machine_rate()
    rows: list[dict[str, Any]] = []
    for n in options.n:
        rows += measure(n, options.dim, options.dtype, options.repeats, options.memory, rate)
        rate = max(rate, machine_rate())  # a neighbour may have slowed the first look
    print(table(rows, rate))
    if options.output:
        found = {"machine": machine(), "matrix product GFLOP/s": rate / 1e9, "rows": rows}
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\nwritten: {options.output}")


if __name__ == "__main__":
    main()
