"""What a ring costs here: compute, communication, how much of it is exposed, and bytes.

    torchrun --nproc-per-node 8 benchmarks/ring.py --rows 8192 --dim 768 --dtype bfloat16      GPUs, NCCL
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 --rdzv-backend c10d benchmarks/ring.py ...
    torchrun --nproc-per-node 2 benchmarks/ring.py --rows 1024 --dim 128                       CPUs, gloo
    python benchmarks/ring.py --threads 8 --rows 8192 --dim 768                                one device, simulated

Each figure is the median over `--repeats` steps of loss and gradient, of the slowest rank:

    step       as it is
    compute    the same step on a ring that moves nothing: the very same tiles, each rank's own keys W times
    exposed    step - compute: communication that hid behind nothing
    alone      the step's shifts by themselves, nothing computed
    hidden     1 - exposed / alone

Threads share one device, so their step is W ranks' work one after another, and only bytes and memory mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import nibs
import nibs_torch
from nibs.ring import Ring
from nibs.threads import run


class Still(Ring):
    """A ring that moves nothing: every hop brings a rank its own arrays again."""

    def __init__(self, ring: Ring) -> None:
        self.ring, self.size, self.rank = ring, ring.size, ring.rank

    def shift(self, *arrays: Any, into: Any = None) -> Any:
        """Lend the caller what it sent."""
        for here, mine in zip(into, arrays, strict=True):
            here[...] = mine
        return _Arrived(tuple(into))

    def sum(self, value: Any) -> Any:
        """Take the other ranks for copies of this one."""
        return value * self.size

    def exchange(self, words: str) -> list[str]:
        """As above."""
        return [words] * self.size


class _Arrived:
    def __init__(self, arrays: tuple[Any, ...]) -> None:
        self.arrays = arrays

    def wait(self) -> tuple[Any, ...]:
        return self.arrays


def shifts_alone(ring: Ring, keys: torch.Tensor, passes: int) -> None:
    """The hops of one step: keys, and the gradient in the last pass."""
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    gradient = torch.zeros(keys.shape, dtype=wide, device=keys.device)
    buffers = [torch.empty_like(keys) for _ in range(2)]
    gradients = [torch.empty_like(gradient) for _ in range(2)]
    for turn in range(passes):
        here, share, last = keys, gradient, turn == passes - 1
        for hop in range(ring.size):
            going = ring.shift(here, into=[buffers[hop % 2]]) if hop + 1 < ring.size else None
            home = ring.shift(share, into=[gradients[hop % 2]]) if last else None
            if home is not None:
                (share,) = home.wait()
            if going is not None:
                (here,) = going.wait()


def timed(step: Callable[[], Any], options: argparse.Namespace, meet: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a step that all ranks begin together."""
    found = []
    for repeat in range(options.warm_up + options.repeats):
        meet()
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= options.warm_up:
            found.append(time.perf_counter() - begun)
    return statistics.median(found)


def measure(ring: Any, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """This rank's figures."""
    g = torch.Generator().manual_seed(ring.rank)
    made = torch.randn(2, options.rows, options.dim, generator=g)
    rows = torch.nn.functional.normalize(made, dim=-1).to(device, getattr(torch, options.dtype))
    objective = nibs.Sigmoid() if options.objective == "sigmoid" else nibs.InfoNCE()
    passes = 1 if options.objective == "sigmoid" else 2

    def step(on: Ring) -> Any:
        return nibs.contrastive_loss_and_grad(rows[0], rows[1], scale=20.0, bias=-10.0, objective=objective, ring=on)

    def meet() -> Any:
        return ring.exchange("ready")

    step(ring)
    before = ring.sent
    step(ring)
    sent = ring.sent - before
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    whole = timed(lambda: step(ring), options, meet, device)
    figures = {"step": whole, "bytes": float(sent)}
    if device.type == "cuda":
        figures["peak"] = float(torch.cuda.max_memory_allocated(device) - held)
    figures["compute"] = timed(lambda: step(Still(ring)), options, meet, device)
    figures["alone"] = timed(lambda: shifts_alone(ring, rows[1], passes), options, meet, device)
    return figures


def report(every: list[dict[str, float]], options: argparse.Namespace, device: torch.device, over: str) -> None:
    """Print what the slowest rank took, and the figures as JSON for those who collect them."""
    size = len(every)
    worst = {name: max(one[name] for one in every) for name in every[0]}
    exposed = max(worst["step"] - worst["compute"], 0.0)
    plan = nibs.plan(
        options.rows,
        options.rows,
        options.dim,
        options.dtype,
        objective=nibs.Sigmoid() if options.objective == "sigmoid" else nibs.InfoNCE(),
        ring_size=size,
        backend="torch",
        device=device.type,
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{size} ranks over {over}, {options.rows} x {options.dim} {options.dtype} each, {options.objective}, {name}")
    for label, seconds in {**{one: worst[one] for one in ("step", "compute", "alone")}, "exposed": exposed}.items():
        print(f"  {label:<8} {seconds * 1e3:10.2f} ms")
    if worst["alone"] > 0 and size > 1:
        print(f"  hidden   {max(0.0, 1 - exposed / worst['alone']):10.0%}")
    print(f"  sent     {worst['bytes'] / 2**20:10.2f} MiB a rank (plan: {plan.ring_bytes / 2**20:.2f})")
    if "peak" in worst:
        print(f"  peak     {worst['peak'] / 2**20:10.2f} MiB beyond inputs (plan: {plan.memory / 2**20:.2f})")
    figures = {
        **{key: value for key, value in vars(options).items() if key != "json"},
        "ranks": size,
        "over": over,
        "device": name,
        "host": platform.platform(),
        "torch": torch.__version__,
        "nibs": nibs.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "exposed": exposed,
        "plan_ring_bytes": plan.ring_bytes,
        "plan_flops": plan.flops,
        **worst,
    }
    if options.json:
        with open(options.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")


def main() -> None:
    """Measure under torchrun, or on threads."""
    parser = argparse.ArgumentParser(description="What a ring costs here.")
    parser.add_argument("--rows", type=int, default=4096, help="queries, and keys, on each rank (default: 4096)")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    parser.add_argument("--objective", default="infonce", choices=["infonce", "sigmoid"])
    parser.add_argument("--threads", type=int, help="so many ranks as threads on one device, without torchrun")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", help="append the figures to this file, a line for each run")
    options = parser.parse_args()
    if options.threads:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        report(run(options.threads, measure, options, device), options, device, "threads of one device")
        return
    if "RANK" not in os.environ:
        parser.error("start it under torchrun, or give --threads")
    use_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if use_gpu else "gloo")
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, measure(nibs_torch.Ring(), options, device))
    if dist.get_rank() == 0:
        report(every, options, device, dist.get_backend())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
