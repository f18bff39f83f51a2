"""The fused kernels of nibs-torch on a GPU, beside dense PyTorch and whichever peers are installed.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json                     tune, check, speed: some minutes
    python benchmarks/gpu.py --parts ring large --output benchmarks/results/gpu.json  4,194,304 rows: some minutes more
    python benchmarks/gpu.py --device cpu --n 96 --d 16 --rows 32 --copies 2          what it does, where there is none

    part     what
    tune     the tuning table's choices timed, the fastest kept for the other parts (`nibs_torch.kernels.tuning`)
    check    bits from run to run, a CUDA graph's replay against the eager step, who computes
    speed    forward and backward of `--n` rows at each `--d`, one contender after the other within one run: first the
             distance of loss and gradients from float64, then memory beyond inputs and gradients (`copies`: as many
             times as the queries take in float32), then the median of `--repeats` steps, one after the other
             and none waited for. Of nibs, too: `sm_mhz` and `watts` in the midst of them; `host_ms`, until a step
             returns without waiting; `kernels_ms`, the sum of one step's kernels, on a card that is cool; `graph_ms`,
             the step replayed from a CUDA graph
    ring     one rank of eight in one process: a step whose shards are copied by another stream, as a link would,
             against the same step on a ring that moves nothing. The difference is what was exposed
    large    `--copies` times the batch, the same rows again and again: its loss is the small one's and log(copies),
             each gradient the small one's over copies, the scale's the same; so every row can be checked

A contender that fails is a row with its reason; where one breaks the device, `--only nibs memeff` goes on without it.
`--output` keeps each row as it comes, with machine, versions, command and date, in a file where other parts may stand
already; tables go to the screen, and last, beside what is asked of an H200, what was found. Nothing is begun after
`--seconds`. `benchmarks/on_gpu.py` runs this among all that wants a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contenders import Loss, cut_cross_entropy, inf_cl, memeff, siglip_kernel
from gpu_tables import of_parts, table, verdicts
from measure import installed, reason

import nibs
from nibs.ring import Ring
from nibs_torch.kernels.tuning import cache_path

SCALE = 14.3
BIAS = -10.0
SAMPLE = 64  # rows whose gradients are held against float64
DENSE_BYTES = 3 * 4  # that dense PyTorch holds for each pair, at least
RANKS = 8
PARTS = ("tune", "check", "speed", "ring", "large")
MEASURED = ("torch", "triton", "inf-cl", "memeff", "siglip-kernel", "cut-cross-entropy")
# Of the largest gradient: a stored bfloat16 is off by 2^-9 of itself, and its weights by as much again.
GRADIENT = 2.0**-7
GRAPHS = ("same bits", "needs a GPU")  # what may be said of a replay
FLOAT32 = 1e-5  # of losses and scale gradients, relative: sums of n n terms, each right to 1e-7


class Where:
    """A device, its clock and its memory; on a CPU there is no memory to tell, and the clock is the host's."""

    def __init__(self, name: str) -> None:
        self.name, self.gpu = name, name == "cuda"

    def wait(self) -> None:
        """Until all is done."""
        if self.gpu:
            torch.cuda.synchronize()

    def times(self, work: Callable[[], Any], repeats: int) -> list[float]:
        """Milliseconds of each run, by events of the device. None is waited for: the host is ahead, as in training."""
        if not self.gpu:
            found = []
            for _ in range(repeats):
                begin = time.perf_counter()
                work()
                found.append(1e3 * (time.perf_counter() - begin))
            return found
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin_event, end_event in events:
            begin_event.record()
            work()
            end_event.record()
        self.wait()
        return [begin_event.elapsed_time(end_event) for begin_event, end_event in events]

    def median(self, work: Callable[[], Any], repeats: int, warm: int = 2) -> float:
        """After some that do not count."""
        return statistics.median(self.times(work, repeats + warm)[warm:])

    def pulse(self, work: Callable[[], Any], repeats: int) -> dict[str, float]:
        """The card's clock and power in the midst of so many runs; nothing where no tool tells."""
        if not self.gpu or (tool := shutil.which("nvidia-smi")) is None:
            return {}
        self.wait()
        for _ in range(repeats):
            work()
        asked = [tool, "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--id=0"]
        said = subprocess.run(asked, capture_output=True, text=True)
        self.wait()
        try:
            clock, power = map(float, said.stdout.split(","))
        except ValueError:
            return {}
        return {"sm_mhz": clock, "watts": power}

    def host_median(self, work: Callable[[], Any], repeats: int) -> float:
        """Milliseconds until the work is handed over to an idle device, whose end is not waited for."""
        found = []
        for _ in range(repeats):
            self.wait()
            begin = time.perf_counter()
            work()
            found.append(1e3 * (time.perf_counter() - begin))
        self.wait()
        return statistics.median(found)

    def held(self) -> int:
        """Bytes of live tensors."""
        return torch.cuda.memory_allocated() if self.gpu else 0

    def peak(self, work: Callable[[], Any]) -> int:
        """The most bytes of live tensors while it works."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        work()
        self.wait()
        return torch.cuda.max_memory_allocated() if self.gpu else 0

    def forget(self) -> None:
        """Give cached memory back."""
        if self.gpu:
            torch.cuda.empty_cache()

    def describe(self) -> str:
        """The machine, in words."""
        return torch.cuda.get_device_name() if self.gpu else f"a CPU, {platform.machine()}"


def batch(where: Where, n: int, d: int) -> tuple[Any, Any, Any]:
    """Normalised bfloat16 rows, keys near their queries, and a learnable scale."""
    generator = torch.Generator(where.name).manual_seed(0)
    queries, noise = (torch.randn(n, d, generator=generator, device=where.name) for _ in range(2))
    keys = queries + noise
    rows = [torch.nn.functional.normalize(one).bfloat16().requires_grad_() for one in (queries, keys)]
    return rows[0], rows[1], torch.tensor(SCALE, device=where.name, requires_grad=True)


# -- contenders -----------------------------------------------------------------------------------


def ours(objective: Any, where: Where, **options: Any) -> Callable[..., Any]:
    """What a user calls."""
    bias = 0.0 if isinstance(objective, nibs.InfoNCE) else BIAS

    def loss(queries: Any, keys: Any, scale: Any) -> Any:
        return nibs.contrastive_loss(queries, keys, scale=scale, bias=bias, objective=objective, **options)

    return loss


def plain(objective: Any, where: Where) -> Callable[..., Any]:
    """The same without the fused kernels, by a plan that asks for the plain path."""

    def loss(queries: Any, keys: Any, scale: Any) -> Any:
        made = nibs.plan(*queries.shape[:1], *keys.shape, "bfloat16", objective=objective, device=where.name)
        asked = replace(made, query_tile=4096, key_tile=4096, kernel="torch")
        return ours(objective, where, plan=asked)(queries, keys, scale)

    return loss


def dense(objective: Any, where: Where) -> Callable[..., Any]:
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


def peer(make: Callable[[str, float], Loss]) -> Callable[..., Callable[..., Any]]:
    """One of contenders.py."""

    def made(objective: Any, where: Where) -> Callable[..., Any]:
        loss, bias = make(where.name, SCALE), torch.tensor(BIAS, device=where.name)
        return lambda queries, keys, scale: loss(queries, keys, scale, bias)

    return made


CONTENDERS: dict[str, dict[str, Callable[..., Any]]] = {
    "InfoNCE": {
        "nibs": ours,
        "nibs plain": plain,
        "dense torch": dense,
        "inf-cl": peer(inf_cl),
        "memeff": peer(memeff),
        "cut-cross-entropy": peer(cut_cross_entropy),
    },
    "Sigmoid": {"nibs": ours, "nibs plain": plain, "dense torch": dense, "siglip-kernel": peer(siglip_kernel)},
}
OBJECTIVES = {"InfoNCE": nibs.InfoNCE(), "Sigmoid": nibs.Sigmoid()}


# -- what is right --------------------------------------------------------------------------------


def step(loss: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """Forward and backward."""
    for one in inputs:
        one.grad = None
    value = loss(*inputs)
    value.backward()
    return value.detach()


def captured(loss: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """A CUDA graph of a step, and the loss that each replay of it writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(loss, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step(loss, inputs)
    return graph, value


def truth(inputs: tuple[Any, ...], objective: Any) -> tuple[float, Any, float]:
    """In float64, strip by strip: the loss, gradients of the first queries, and the scale's gradient."""
    queries, keys, scale = (one.detach().double() for one in inputs)
    n = len(queries)
    softmax = isinstance(objective, nibs.InfoNCE)
    total, slope = queries.new_zeros(()), queries.new_zeros(())
    rows, columns = queries.new_empty(n), queries.new_full((n,), -torch.inf)
    strips = [slice(begin, min(begin + 1024, n)) for begin in range(0, n, 1024)]
    if softmax:
        for where in strips:
            logits = scale * (queries[where] @ keys.T)
            rows[where] = logits.logsumexp(1)
            columns = torch.logaddexp(columns, logits.logsumexp(0))
    expected = queries.new_empty(0)
    for where in strips:
        products = queries[where] @ keys.T
        positives = products.diagonal(where.start)[: len(products)].clone()
        if softmax:
            weights = (scale * products - rows[where, None]).exp_()
            weights += (scale * products - columns[None]).exp_()
            weights.diagonal(where.start).sub_(2)
            total += (rows[where] + columns[where] - 2 * scale * positives).sum() / 2
            weights /= 2
        else:
            signed = scale * products + BIAS
            signed.diagonal(where.start).neg_()
            weights = torch.sigmoid(signed)
            weights.diagonal(where.start).neg_()
            total += torch.nn.functional.softplus(signed).sum()
        slope += (weights * products).sum() / n
        if where.start == 0:
            expected = scale * (weights[:SAMPLE] @ keys) / n
    return float(total) / n, expected, float(slope)


def errors(value: Any, inputs: tuple[Any, ...], right: tuple[float, Any, float]) -> dict[str, float | None]:
    """Distances from the truth: of the loss and of the scale's gradient, relative to the larger of it and 1; of query
    gradients, relative to the largest.
    """
    loss, gradient, slope = right
    found = inputs[0].grad[:SAMPLE].double()
    of_scale = None if inputs[2].grad is None else abs(float(inputs[2].grad) - slope) / max(abs(slope), 1.0)
    return {
        "loss": abs(float(value) - loss) / max(abs(loss), 1.0),
        "queries": float((found - gradient).abs().max() / gradient.abs().max()),
        "scale": of_scale,
    }


def is_right(found: dict[str, float | None]) -> bool:
    """As right as nibs has to be. NaN is not."""
    limits = {"loss": FLOAT32, "queries": GRADIENT, "scale": FLOAT32}
    return all(value is None or value <= limits[name] for name, value in found.items())


# -- the parts ------------------------------------------------------------------------------------


class Run:
    """One run: its options, its device and its deadline."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.where = options, Where(options.device)
        self.until = time.monotonic() + options.seconds

    def late(self) -> bool:
        """Whether nothing more may begin."""
        return time.monotonic() > self.until

    def tune(self) -> Iterator[dict[str, Any]]:
        """Each choice of the tuning table, timed on this card; the fastest is kept."""
        if not self.where.gpu:
            yield {"failed": "tuning times kernels on a GPU"}
            return
        from nibs_torch.fused import time_config
        from nibs_torch.kernels import tuning

        device = torch.device("cuda", torch.cuda.current_device())
        card = tuning.card_of(device)
        asked = argparse.Namespace(rows=min(self.options.n, 11_264), dim=768, dtype="bfloat16")
        for kernel in ("lse", "weights", "sigmoid"):
            times = tuning.tune(card, kernel, 2, lambda one, name=kernel: time_config(name, one, device, asked))
            flops = 2 * asked.rows**2 * asked.dim
            for config, taken in times.items():
                yield {"kernel": kernel, "config": str(config), "ms": taken, "tflops": flops / taken / 1e9}
            self.where.forget()

    def check(self) -> Iterator[dict[str, Any]]:
        """Facts that are no times."""
        n, d = min(self.options.n, 16_384), self.options.d[0]
        for name, objective in OBJECTIVES.items():
            inputs = batch(self.where, n, d)
            loss = ours(objective, self.where)
            kernel = nibs.contrastive_loss(*inputs[:2], objective=objective, stats=True)[1].plan.kernel
            first = [step(loss, inputs), *(one.grad.clone() for one in inputs)]
            again = [step(loss, inputs), *(one.grad for one in inputs)]
            row = {"objective": name, "n": n, "d": d, "kernel": kernel}
            row["same bits again"] = all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
            row["error"] = errors(first[0], inputs, truth(inputs, objective))
            row["graph"] = self._replayed(loss, inputs, first) if self.where.gpu else "needs a GPU"
            row["right"] = is_right(row["error"]) and row["same bits again"] and row["graph"] in GRAPHS
            yield row

    def _replayed(self, loss: Callable[..., Any], inputs: tuple[Any, ...], expected: list[Any]) -> str:
        """Whether a captured step gives the same bits."""
        try:
            graph, value = captured(loss, inputs)
            for one in inputs:
                one.grad.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            found = [value, *(one.grad for one in inputs)]
            alike = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
            return GRAPHS[0] if alike else "other bits"
        except Exception as error:  # said in its row: the rest of the run does not need it
            traceback.print_exc()
            return reason(error)

    def speed(self) -> Iterator[dict[str, Any]]:
        """Forward and backward of every contender."""
        yield self._ceilings()
        for d in self.options.d:
            for name, objective in OBJECTIVES.items():
                inputs = batch(self.where, self.options.n, d)
                right = None if self.late() else truth(inputs, objective)
                for contender, make in CONTENDERS[name].items():
                    if self.options.only and contender not in self.options.only:
                        continue
                    row = {"contender": contender, "objective": name, "n": self.options.n, "d": d, "dtype": "bfloat16"}
                    if right is None or self.late():
                        row["failed"] = "no time was left"
                    else:
                        row.update(self._measured(contender, make, objective, inputs, right))
                    yield row
                    self.where.forget()  # not before: where a kernel broke the device, this raises
                del inputs, right
                self.where.forget()

    def _ceilings(self) -> dict[str, Any]:
        """What the library's product and a copy reach here, on random numbers."""
        side = 8192 if self.where.gpu else 128
        one, other = (torch.randn(side, side, device=self.where.name, dtype=torch.bfloat16) for _ in range(2))
        product, flops = self.where.median(lambda: one @ other, 10), 2 * side**3 / 1e9
        row = {"contender": "ceilings", "product_tflops": flops / product}
        if self.where.gpu:
            # A card that may not draw what a product at its full clock takes lowers the clock: after a second it has.
            second = int(1e3 / product)
            kept_up = statistics.median(self.where.times(lambda: one @ other, second)[second // 2 :])
            row.update(kept_up_tflops=flops / kept_up, **self.where.pulse(lambda: one @ other, second))
        wide = torch.empty((1 << 30) if self.where.gpu else 1 << 16, device=self.where.name)
        into = torch.empty_like(wide)
        copy = self.where.median(lambda: into.copy_(wide), 10)
        return {**row, "copy_tb_s": 2 * wide.numel() * 4 / copy / 1e9}

    def _measured(self, name: str, make: Any, objective: Any, inputs: Any, right: Any) -> dict[str, Any]:
        where, n = self.where, len(inputs[0])
        if name == "dense torch" and where.gpu and DENSE_BYTES * n * n > torch.cuda.mem_get_info()[0]:
            return {"failed": f"needs {DENSE_BYTES * n * n} bytes"}
        row: dict[str, Any] = {}
        try:
            loss = make(objective, where)
            found = errors(step(loss, inputs), inputs, right)
            held = where.held()
            for one in inputs:
                one.grad = None
            beyond = where.peak(lambda: step(loss, inputs)) - held
            row.update(error=found, right=is_right(found), beyond_bytes=beyond)
            whole = 4 * inputs[0].numel()
            gradients = sum(one.numel() * one.element_size() for one in inputs)
            row.update(copies=beyond / whole, copies_beyond_inputs=(beyond + gradients) / whole)
            row["median_ms"] = self._of_steps(loss, inputs)
            if name == "nibs":
                row["host_ms"] = where.host_median(lambda: step(loss, inputs), self.options.repeats)
                row.update(where.pulse(lambda: step(loss, inputs), self.options.repeats))
                row["kernels"], row["kernels_ms"] = profile(where, lambda: step(loss, inputs))
                made = nibs.plan(
                    n, *inputs[1].shape, "bfloat16", objective=objective, backend="torch", device=where.name
                )
                row.update(plan_workspace=made.workspace, kernel=made.kernel, products=made.products)
            if name == "nibs" and where.gpu:  # last: what is known stays, should it fail
                graph, _ = captured(loss, inputs)
                row["graph_ms"] = where.median(graph.replay, self.options.repeats)
            return row
        except Exception as error:  # a peer may fail in its own way, and the others still want their turn
            traceback.print_exc()
            return {**row, "failed": reason(error)}
        finally:
            for one in inputs:
                one.grad = None

    def ring(self) -> Iterator[dict[str, Any]]:
        """One rank of eight, whose peers hold what it holds."""
        for name, objective in OBJECTIVES.items():
            for local in self.options.rows:
                d = 768 if self.where.gpu else self.options.d[0]
                row: dict[str, Any] = {"objective": name, "ranks": RANKS, "rows": local, "d": d}
                if self.late():
                    yield {**row, "failed": "no time was left"}
                    continue
                inputs = batch(self.where, local, d)
                small = step(ours(objective, self.where), inputs)
                moving, still = Emulated(self.where, RANKS, moves=True), Emulated(self.where, RANKS, moves=False)
                found = step(ours(objective, self.where, ring=moving), inputs)
                if name == "InfoNCE":  # eight copies of each key: every lse is larger by log 8
                    row["right"] = abs(float(found - small) - math.log(RANKS)) <= FLOAT32 * float(found)
                row["bytes"] = moving.sent
                for label, ring in (("step", moving), ("compute", still)):
                    row[f"{label}_ms"] = self._of_steps(ours(objective, self.where, ring=ring), inputs)
                row["exposed_ms"] = row["step_ms"] - row["compute_ms"]
                yield row
                self.where.forget()

    def _of_steps(self, loss: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
        """Milliseconds of a step, the median."""
        return self.where.median(lambda: step(loss, inputs), self.options.repeats)

    def large(self) -> Iterator[dict[str, Any]]:
        """The batch many times over, in one step."""
        copies, d = self.options.copies, 768 if self.where.gpu else self.options.d[0]
        loss = ours(nibs.InfoNCE(), self.where)
        small = batch(self.where, self.options.n, d)
        value = step(loss, small)
        inputs = tuple(one.detach().repeat(copies, 1).requires_grad_() for one in small[:2])
        inputs = (*inputs, small[2].detach().clone().requires_grad_())
        row: dict[str, Any] = {"objective": "InfoNCE", "n": copies * self.options.n, "d": d}
        held, begin = self.where.held(), time.perf_counter()
        found: list[Any] = []
        peak = self.where.peak(lambda: found.append(step(loss, inputs)))
        row["seconds"] = time.perf_counter() - begin
        row["beyond_bytes"] = peak - held - sum(one.numel() * one.element_size() for one in inputs)
        row["copies"] = row["beyond_bytes"] / (4 * inputs[0].numel())
        expected = float(value) + math.log(copies)
        row["loss_error"] = abs(float(found[0]) - expected) / expected
        worst = 0.0
        for mine, theirs in zip(inputs[:2], small[:2], strict=True):
            for part in mine.grad.split(len(theirs)):
                distance = (part.float() * copies - theirs.grad.float()).abs().max() / theirs.grad.float().abs().max()
                worst = max(worst, float(distance))
        row["gradient_error"] = worst
        slope = float(small[2].grad)
        row["scale_error"] = abs(float(inputs[2].grad) - slope) / max(abs(slope), 1.0)
        row["right"] = row["loss_error"] <= FLOAT32 and worst <= GRADIENT and row["scale_error"] <= FLOAT32
        yield row


class Emulated(Ring):
    """One rank of several in one process: the previous rank sends what this one holds.

    moves: arrays are copied by a stream of their own while others compute, as a link would; else they are lent. A copy
    within a card is faster than a link between two: `sent` bytes over the link's rate is what must hide behind compute.
    """

    def __init__(self, where: Where, size: int, *, moves: bool) -> None:
        self.size, self.rank, self.moves, self.sent = size, 0, moves, 0
        self.stream = torch.cuda.Stream() if where.gpu else None

    def shift(self, *arrays: Any, into: Any = None) -> Any:
        """Copy beside the stream that computes."""
        self.sent += sum(one.numel() * one.element_size() for one in arrays)
        if not self.moves:
            return Arrived(arrays)
        into = [torch.empty_like(one) for one in arrays] if into is None else into
        if self.stream is None:
            for here, mine in zip(into, arrays, strict=True):
                here.copy_(mine)
            return Arrived(tuple(into))
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for here, mine in zip(into, arrays, strict=True):
                here.copy_(mine)
        return Arrived(tuple(into), self.stream.record_event())

    def sum(self, value: Any) -> Any:
        """Take the other ranks for copies of this one."""
        return value * self.size

    def exchange(self, words: str) -> list[str]:
        """As above."""
        return [words] * self.size


class Arrived:
    """What came, once the stream that copied it is done."""

    def __init__(self, arrays: tuple[Any, ...], event: Any = None) -> None:
        self.arrays, self.event = arrays, event

    def wait(self) -> tuple[Any, ...]:
        """The stream that computes waits; the host does not."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)
        return self.arrays


def profile(where: Where, work: Callable[[], Any], most: int = 24) -> tuple[list[dict[str, Any]], float]:
    """Where the time of one run goes: kernels by their time on the device, the largest first; and that of them all."""
    kind = torch.profiler.ProfilerActivity.CUDA if where.gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as seen:
        work()
        where.wait()
    name = "self_device_time_total" if where.gpu else "self_cpu_time_total"
    found = sorted(seen.key_averages(), key=lambda one: -getattr(one, name))
    largest = [{"name": one.key[:60], "calls": one.count, "ms": getattr(one, name) / 1e3} for one in found[:most]]
    return largest, sum(getattr(one, name) for one in found) / 1e3


# -- the report ----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["tune", "check", "speed"])
    parser.add_argument("--n", type=int, default=65_536)
    parser.add_argument("--d", type=int, nargs="+", default=[768, 512, 1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 32_768], help="of a rank, in the ring")
    parser.add_argument("--copies", type=int, default=64, help="of the batch, in the large one")
    parser.add_argument("--repeats", type=int, default=20)
    names = sorted({name for contenders in CONTENDERS.values() for name in contenders})
    parser.add_argument("--only", nargs="+", choices=names, help="contenders; all of them")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU here. --device cpu with small sizes shows what would be done.")
    run = Run(options)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in options.parts:
        print(f"-- {name}", file=sys.stderr, flush=True)
        rows = found[name] = []
        for row in of_part(run, name):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            if options.output:
                keep(options.output, name, report_of(name, rows, run.where))
    print("\n\n".join(of_parts({name: report_of(name, rows, run.where) for name, rows in found.items()})))
    judged = verdicts(found)
    if judged:
        heads = ["what", "found", "required", "goal", "verdict"]
        print(f"\nAsked of an H200, found on {run.where.describe()}\n")
        print(table(heads, [list(one.values()) for one in judged]))
    mine = [row for rows in found.values() for row in rows if row.get("contender", "nibs") == "nibs"]
    if any(row.get("right") is False for row in mine):
        raise SystemExit(
            "WRONG: nibs is further from the truth than it may be, or has other bits again: see the tables."
        )
    if run.where.gpu and any("failed" in row for row in mine):
        raise SystemExit("FAILED: some of what nibs was to do has no figures, and its reason in their place.")


def of_part(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Its rows as they come; one that says why, where there are no more."""
    if run.late():
        yield {"failed": "no time was left"}
        return
    try:
        yield from getattr(run, name)()
    except Exception as error:  # what was measured before it is kept, and other parts want their turn
        traceback.print_exc()
        yield {"failed": reason(error)}


def report_of(part: str, rows: list[dict[str, Any]], where: Where) -> dict[str, Any]:
    """What was found, with machine, versions, command and date."""
    return {
        "machine": where.describe(),
        "python": platform.python_version(),
        "versions": {"nibs": nibs.__version__, **installed(*MEASURED)},
        "tuned": cache_path().is_file(),  # else tiles are the table's first choices
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
        "verdicts": verdicts({part: rows}),
    }


def keep(path: Path, part: str, report: dict[str, Any]) -> None:
    """One part into the file, beside those that other runs left there."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    found[part] = report
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
