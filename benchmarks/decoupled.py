"""What one decoupled step takes: seconds and peak memory, as the batch grows and the micro-batch stays. PyTorch.

    python benchmarks/decoupled.py                          batches of 1, 4, 16 and 64 times 1,024 pairs
    python benchmarks/decoupled.py --batches 262144         one step over 262,144 pairs
    python benchmarks/decoupled.py --plain                  a plain step beside each: the whole batch in one graph
    python benchmarks/decoupled.py --device cuda --batches 1048576 --micro 4096 --dim 512 --output million.json
                                                            a million pairs in one step on a GPU

Pairs are synthetic: a row of noise, and the same row with noise upon it. Each batch runs in a process of its own.
`peak` is the rise of the resident high-water mark during a step, beyond the inputs and what one tiny step had left
behind; `embeddings` is both sides' rows and their gradients in float32, linear in the batch and part of the peak.
Large blocks get pages of their own (glibc's MALLOC_MMAP_THRESHOLD_), so that the mark is not that of a heap's holes.
On a GPU `peak` is what its allocator has handed out beyond parameters; inputs, embeddings and their gradients lie in
pinned host memory and are fetched (`host` is the rise of the resident mark there, embeddings part of it). `--offload`
takes the same way on a CPU, where host memory is all there is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

FEATURES = 64


def measure(
    batch: int, micro: int, dim: int, hidden: int, *, plain: bool, device: str, offload: bool
) -> dict[str, Any]:
    """Run one step over `batch` pairs in this process."""
    import torch
    from torch import nn
    from torch.nn.functional import normalize

    import nibs_torch
    from nibs_conformance.memory import high_water

    torch.manual_seed(0)

    class Tower(nn.Module):
        """Two hidden layers of dropout and GELU."""

        def __init__(self) -> None:
            super().__init__()
            layers: list[nn.Module] = []
            for width in (FEATURES, hidden):
                layers += [nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(0.1)]
            self.layers = nn.Sequential(*layers, nn.Linear(hidden, dim))

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            """Return unit rows `[n, dim]`."""
            return normalize(self.layers(rows), dim=-1)

    on_gpu = device != "cpu"
    towers = Tower().to(device), Tower().to(device)
    log_scale = nn.Parameter(torch.tensor(2.5, device=device))

    def encode(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return towers[0](rows), log_scale.exp()

    loss = nibs_torch.ContrastiveLoss()
    decoupled = nibs_torch.DecoupledStep(
        encode, towers[1], loss=loss, micro_batch=micro, offload="cpu" if offload or on_gpu else None
    )
    left = torch.randn(batch, FEATURES, pin_memory=on_gpu)
    right = torch.randn(batch, FEATURES, pin_memory=on_gpu).add_(left)

    def step(queries: torch.Tensor, keys: torch.Tensor) -> float:
        if not plain:
            return float(decoupled(queries, keys))
        total = loss(towers[0](queries.to(device)), towers[1](keys.to(device)), log_scale.exp())
        total.backward()
        return float(total.detach())

    step(left[: 2 * micro], right[: 2 * micro])
    found: dict[str, Any] = {}

    def run() -> None:
        begin = time.perf_counter()
        found["loss"] = step(left, right)
        found["seconds"] = time.perf_counter() - begin

    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        found["host"] = high_water(run)
        found["peak"] = torch.cuda.max_memory_allocated(device) - before
        found["processor"] = torch.cuda.get_device_name(device)
    else:
        found["peak"] = high_water(run)
    return {"batch": batch, "plain": plain, "embeddings": 4 * batch * dim * 4, **found}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--micro", type=int, default=512)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--plain", action="store_true", help="a plain step beside each")
    parser.add_argument("--device", default="cpu", help="'cuda' fetches embeddings from host memory (default: cpu)")
    parser.add_argument("--offload", action="store_true", help="pool embeddings in host memory on a CPU, too")
    parser.add_argument("--output", type=Path, help="write JSON there, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        batch, plain = json.loads(options.one)
        sizes = options.micro, options.dim, options.hidden
        print(json.dumps(measure(batch, *sizes, plain=plain, device=options.device, offload=options.offload)))
        return
    import torch

    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        parser.error(f"--device {options.device}: expected one that PyTorch has here ({why})")
    rows = []
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    print(f"{'batch':>9} {'step':>10} {'seconds':>9} {'peak MiB':>9} {'embeddings MiB':>15} {'loss':>9}")
    for batch in options.batches:
        for plain in (False, True) if options.plain else (False,):
            sizes = [f"--{name}={getattr(options, name)}" for name in ("micro", "dim", "hidden", "device")]
            sizes += ["--offload"] * options.offload
            done = subprocess.run(
                [sys.executable, __file__, f"--one={json.dumps([batch, plain])}", *sizes],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=environment,
            )
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            kind = "plain" if plain else "decoupled"
            print(
                f"{batch:>9} {kind:>10} {row['seconds']:>9.2f} {row['peak'] / 2**20:>9.1f} "
                f"{row['embeddings'] / 2**20:>15.1f} {row['loss']:>9.4f}",
                flush=True,
            )
    if options.output:
        from measure import processor

        found = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", "benchmarks/decoupled.py", *sys.argv[1:]]),
            "machine": {"processor": processor(), "threads": torch.get_num_threads()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "sizes": {name: getattr(options, name) for name in ("micro", "dim", "hidden", "device", "offload")},
            "rows": rows,
        }
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
