"""The fused kernels of nibs-torch on a GPU, beside dense PyTorch and whichever peers are installed: never run yet.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json

For each width: correctness first (loss and gradients of a few rows against float64, from the same call), then the
median of CUDA-event times of forward and backward, in turns within one run, and the peak memory beyond inputs and
gradients. One row that fails is a row with its reason. The JSON names machine, versions, command and date; figures
belong in docs/performance.md only with that file beside them.

Refused: a machine without a CUDA device, for there is nothing to say about it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import platform
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import nibs

SCALE = 14.3
BIAS = -10.0
SAMPLE = 64  # rows whose gradients are held against float64
DENSE_BYTES = 3 * 4  # that dense PyTorch holds for each pair, at least


def batch(n: int, d: int) -> tuple[Any, Any, Any]:
    """Normalised bfloat16 rows, keys near their queries, and a learnable scale."""
    generator = torch.Generator("cuda").manual_seed(0)
    queries, noise = (torch.randn(n, d, generator=generator, device="cuda") for _ in range(2))
    keys = queries + noise
    rows = [torch.nn.functional.normalize(one).bfloat16().requires_grad_() for one in (queries, keys)]
    return rows[0], rows[1], torch.tensor(SCALE, device="cuda", requires_grad=True)


# -- contenders -----------------------------------------------------------------------------------


def ours(objective: Any) -> Callable[..., Any]:
    """What a user calls."""
    bias = 0.0 if isinstance(objective, nibs.InfoNCE) else BIAS

    def loss(queries: Any, keys: Any, scale: Any) -> Any:
        return nibs.contrastive_loss(queries, keys, scale=scale, bias=bias, objective=objective)

    return loss


def plain(objective: Any) -> Callable[..., Any]:
    """The same without the fused kernels, by a plan that asks for the plain path."""
    bias = 0.0 if isinstance(objective, nibs.InfoNCE) else BIAS

    def loss(queries: Any, keys: Any, scale: Any) -> Any:
        from dataclasses import replace

        made = nibs.plan(len(queries), len(keys), queries.shape[1], "bfloat16", objective=objective, device="cuda")
        asked = replace(made, query_tile=4096, key_tile=4096, kernel="torch")
        return nibs.contrastive_loss(queries, keys, scale=scale, bias=bias, objective=objective, plan=asked)

    return loss


def dense(objective: Any) -> Callable[..., Any]:
    """PyTorch with the whole matrix."""

    def symmetric(queries: Any, keys: Any, scale: Any) -> Any:
        logits = scale * (queries @ keys.T).float()
        labels = torch.arange(len(queries), device=queries.device)
        cross = torch.nn.functional.cross_entropy
        return (cross(logits, labels) + cross(logits.T, labels)) / 2

    def sigmoid(queries: Any, keys: Any, scale: Any) -> Any:
        logits = scale * (queries @ keys.T).float() + BIAS
        logits.diagonal().neg_()
        return torch.nn.functional.softplus(logits).sum() / len(queries)

    return symmetric if isinstance(objective, nibs.InfoNCE) else sigmoid


def inf_cl(objective: Any) -> Callable[..., Any]:
    """Both directions, as its users call it."""
    flash = importlib.import_module("inf_cl").cal_flash_loss

    def loss(queries: Any, keys: Any, scale: Any) -> Any:
        width = queries.shape[1]
        head = 256 if width % 256 == 0 else width
        rows = flash(queries, keys, scale=scale, head_dim=head).mean()
        return (rows + flash(keys, queries, scale=scale, head_dim=head).mean()) / 2

    return loss


def memeff(objective: Any) -> Callable[..., Any]:
    """Memeff's loss; stable=False, or its gradient is not that of its loss. It has none of the scale."""
    made = importlib.import_module("memeff").MemoryEfficientCLIPLoss
    unscaled = made(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return lambda queries, keys, scale: unscaled(queries, keys)


def siglip_kernel(objective: Any) -> Callable[..., Any]:
    """siglip-kernel's fused loss by the kernel that it picks."""
    fused = importlib.import_module("siglip_kernel").fused_siglip_loss
    bias = torch.tensor(BIAS, device="cuda")
    return lambda queries, keys, scale: fused(queries, keys, scale.log(), bias, backend="auto")


BESIDE = {"dense torch": dense, "nibs plain": plain}
PEERS = {
    nibs.InfoNCE: {"inf-cl": inf_cl, "memeff": memeff},
    nibs.Sigmoid: {"siglip-kernel": siglip_kernel},
}


# -- measuring ------------------------------------------------------------------------------------


def step(loss: Callable[..., Any], queries: Any, keys: Any, scale: Any) -> Any:
    """Forward and backward."""
    value = loss(queries, keys, scale)
    value.backward()
    return value


def clear(*tensors: Any) -> None:
    """Forget gradients."""
    for one in tensors:
        one.grad = None


def milliseconds(loss: Callable[..., Any], inputs: tuple[Any, ...], repeats: int) -> list[float]:
    """CUDA-event times of forward and backward, after two that do not count."""
    times = []
    for turn in range(repeats + 2):
        clear(*inputs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step(loss, *inputs)
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(begin.elapsed_time(end))
    return times


def beyond(loss: Callable[..., Any], inputs: tuple[Any, ...]) -> int:
    """Peak bytes beyond inputs and gradients."""
    clear(*inputs)
    step(loss, *inputs)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    clear(*inputs)
    torch.cuda.reset_peak_memory_stats()
    step(loss, *inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def errors(loss: Callable[..., Any], inputs: tuple[Any, ...], objective: Any) -> dict[str, float | None]:
    """Largest differences from float64: of the loss, of sampled query gradients, of the scale's gradient."""
    clear(*inputs)
    found = float(step(loss, *inputs).detach())
    queries, keys, scale = (one.detach().double() for one in inputs)
    n = len(queries)
    softmax = isinstance(objective, nibs.InfoNCE)
    total = torch.zeros((), dtype=torch.float64, device="cuda")
    slope = torch.zeros_like(total)
    rows = torch.empty(n, dtype=torch.float64, device="cuda")
    columns = torch.full((n,), -torch.inf, dtype=torch.float64, device="cuda")
    strips = [slice(begin, min(begin + 1024, n)) for begin in range(0, n, 1024)]
    if softmax:
        for where in strips:
            logits = scale * (queries[where] @ keys.T)
            rows[where] = logits.logsumexp(1)
            columns = torch.logaddexp(columns, logits.logsumexp(0))
    expected = torch.empty(SAMPLE, queries.shape[1], dtype=torch.float64, device="cuda")
    for where in strips:
        products = queries[where] @ keys.T
        here = torch.arange(where.start, where.stop, device="cuda")
        eye = torch.zeros_like(products).index_put_((here - where.start, here), torch.ones((), device="cuda").double())
        if softmax:
            logits = scale * products
            weights = (logits - rows[where, None]).exp() + (logits - columns[None]).exp() - 2 * eye
            total += (rows[where] + columns[where] - 2 * (logits * eye).sum(1)).sum() / 2
            weights /= 2
        else:
            signed = (scale * products + BIAS) * (1 - 2 * eye)
            weights = torch.sigmoid(signed) * (1 - 2 * eye)
            total += torch.nn.functional.softplus(signed).sum()
        slope += (weights * products).sum() / n
        if where.start == 0:
            expected = scale * (weights[:SAMPLE] @ keys) / n
    gradient = inputs[0].grad[:SAMPLE].double()
    return {
        "loss": abs(found - float(total) / n),
        "queries": float((gradient - expected).abs().max() / expected.abs().max()),
        "scale": None if inputs[2].grad is None else abs(float(inputs[2].grad) - float(slope)),
    }


def measured(name: str, make: Any, objective: Any, inputs: tuple[Any, ...], repeats: int) -> dict[str, Any]:
    """One contender's row; a failure is its reason."""
    kind = type(objective).__name__
    n, d = inputs[0].shape
    row: dict[str, Any] = {"contender": name, "objective": kind, "n": n, "d": d, "dtype": "bfloat16"}
    free = torch.cuda.mem_get_info()[0]
    if name == "dense torch" and DENSE_BYTES * n * n > free:
        return {**row, "failed": f"needs {DENSE_BYTES * n * n} bytes, {free} are free"}
    try:
        loss = make(objective)
        row["error"] = errors(loss, inputs, objective)
        times = milliseconds(loss, inputs, repeats)
        row.update(median_ms=statistics.median(times), least_ms=min(times), beyond_bytes=beyond(loss, inputs))
    except Exception as error:  # a peer may fail in its own way, and the others still want their turn
        row["failed"] = f"{type(error).__name__}: {error}"
    finally:
        clear(*inputs)
        torch.cuda.empty_cache()
    return row


def versions() -> dict[str, str]:
    """Of what was measured and is installed."""
    found = {}
    for name in ("torch", "triton", "nibs", "inf-cl", "memeff", "siglip-kernel"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=65_536)
    parser.add_argument("--d", type=int, nargs="+", default=[512, 768, 1024])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This measures a GPU, and PyTorch sees none here. For a CPU see the other benchmarks.")
    rows = []
    for objective in (nibs.InfoNCE(), nibs.Sigmoid()):
        for d in options.d:
            inputs = batch(options.n, d)
            contenders = {"nibs": ours, **BESIDE, **PEERS[type(objective)]}
            for name, make in contenders.items():
                rows.append(measured(name, make, objective, inputs, options.repeats))
                print(json.dumps(rows[-1]), flush=True)
    kernel = nibs.plan(options.n, options.n, options.d[0], "bfloat16", backend="torch", device="cuda").kernel
    report = {
        "machine": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "versions": versions(),
        "kernel": kernel,
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
