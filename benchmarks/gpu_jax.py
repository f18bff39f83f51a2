"""The loss under JAX's jit on a GPU, by CuPy's kernels and by XLA, beside nibs-cupy and nibs-torch: not run on one yet.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/gpu_jax.py --output benchmarks/results/gpu-jax.json

Loss and all gradients of one batch of bfloat16 rows, 65,536 x 768 unless told otherwise: the median of the clock,
after two that do not count, in turns within one run. What is held to: through `jax.ffi` at most 1.15 of nibs-cupy
alone, XLA at most 2.0 of nibs-torch. First, every contender's loss and gradients are compared with the first one's.
The answer is printed and written with machine, versions, date and command; one that fails is a row with its reason,
and the command ends with 1 if a limit is broken or could not be looked at.

Where JAX sees no GPU the same runs on the CPU, with NumPy in CuPy's place: that shows the script, and judges nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from measure import installed

import nibs
import nibs_jax

SCALE = 14.3
EAGER = {"gpu": "cupy", "cpu": "numpy"}
LIMITS = {("jax, through ffi", "eager"): 1.15, ("jax, xla", "torch"): 2.0}
# Loss; gradients of queries and keys, which are bfloat16: within a few of its steps, of the largest; of the scale.
WITHIN = (1e-4, 2e-2, 2e-2, 1e-3)

Call = Callable[[], Callable[[], tuple[Any, ...]]]  # runs to the end; what it gives fetches loss and gradients


def batch(n: int, d: int) -> tuple[Any, Any]:
    """Normalised bfloat16 rows, keys near their queries."""
    random = np.random.default_rng(0)
    queries = random.standard_normal((n, d), np.float32)
    sides = [queries, queries + random.standard_normal((n, d), np.float32)]
    queries, keys = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(ml_dtypes.bfloat16) for x in sides)
    return queries, keys


def in_jax(kernels: str, queries: Any, keys: Any) -> Call:
    """Value and gradients in one jitted function, by these kernels; refused by nibs where they cannot."""

    def loss(queries: Any, keys: Any, scale: Any) -> Any:
        return nibs.contrastive_loss(queries, keys, scale=scale)

    given = jnp.asarray(queries), jnp.asarray(keys), jnp.float32(SCALE)
    with nibs_jax.kernels(kernels):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*given).compile()

    def call() -> Any:
        value, gradients = jax.block_until_ready(compiled(*given))
        return lambda: (value, *gradients)

    return call


def eager(name: str, queries: Any, keys: Any) -> Call:
    """The same kernels without JAX."""
    backend = nibs.registry.registry.load(name)
    queries, keys = backend.asarray(queries), backend.asarray(keys)

    def call() -> Any:
        loss, gradients = nibs.contrastive_loss_and_grad(queries, keys, scale=SCALE, backend=name)
        if name == "cupy":
            import cupy

            cupy.cuda.get_current_stream().synchronize()
        arrays = loss, gradients.queries, gradients.keys
        return lambda: (*(backend.to_numpy(one) for one in arrays), float(gradients.scale))

    return call


def in_torch(device: str, queries: Any, keys: Any) -> Call:
    """Forward and backward in PyTorch."""
    import torch

    where = {"gpu": "cuda"}.get(device, device)
    sides = [torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(where) for x in (queries, keys)]
    queries, keys = (x.requires_grad_() for x in sides)
    scale = torch.tensor(SCALE, device=where, requires_grad=True)

    def call() -> Any:
        for one in (queries, keys, scale):
            one.grad = None
        loss = nibs.contrastive_loss(queries, keys, scale=scale)
        loss.backward()
        if where == "cuda":
            torch.cuda.synchronize()
        return lambda: tuple(x.detach().float().cpu().numpy() for x in (loss, queries.grad, keys.grad, scale.grad))

    return call


def contenders(device: str, queries: Any, keys: Any) -> dict[str, Callable[[], Call]]:
    """What is measured, by name; made one by one, for one may be missing."""
    name = EAGER[device]
    return {
        "eager": lambda: eager(name, queries, keys),
        "torch": lambda: in_torch(device, queries, keys),
        "jax, through ffi": lambda: in_jax(name, queries, keys),
        "jax, xla": lambda: in_jax("xla", queries, keys),
    }


def measure(device: str, n: int, d: int, turns: int) -> list[dict[str, Any]]:
    """A row for each contender."""
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    first: list[Any] = []
    for name, make in contenders(device, *batch(n, d)).items():
        rows[name] = {"contender": name, "n": n, "d": d, "dtype": "bfloat16"}
        try:
            call = make()
            answer = [np.asarray(one, np.float64) for one in call()()]
            first = first or answer
            differences = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(answer, first, strict=True)]
            rows[name]["differences"] = differences
            if not all(one <= limit for one, limit in zip(differences, WITHIN, strict=True)):  # NaN is not
                raise ArithmeticError(f"loss and gradients differ from the first contender's by {differences}")
            calls[name] = call
        except Exception as error:  # a framework may be missing, and the others still want their turn
            rows[name]["failed"] = f"{type(error).__name__}: {error}"
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 2):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if turn >= 2:
                times[name].append(time.perf_counter() - begun)
    for name, found in times.items():
        rows[name].update(median_ms=1e3 * statistics.median(found), least_ms=1e3 * min(found))
    return list(rows.values())


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each limit with what was found; None where one of the two is missing."""
    medians = {row["contender"]: row.get("median_ms") for row in rows}
    found = []
    for (ours, beside), limit in LIMITS.items():
        both = medians[ours], medians[beside]
        ratio = None if None in both else both[0] / both[1]
        found.append({"what": f"{ours} / {beside}", "ratio": ratio, "limit": limit, "held": ratio and ratio <= limit})
    return found


def main() -> int:
    """Measure, judge, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=65_536)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = jax.default_backend()
    rows = measure(device, options.n, options.d, options.turns)
    for row in (*rows, *(judged := verdicts(rows))):
        print(json.dumps(row), flush=True)
    report = {
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
        "versions": installed("jax", "jaxlib", "cupy-cuda13x", "cupy-cuda12x", "torch", "triton", "nibs"),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(("python", *sys.argv)),
        "rows": rows,
        "verdicts": judged,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if device == "cpu" or all(one["held"] for one in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
