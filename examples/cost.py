"""What decoupling costs: time and memory of a step, beside plain training and accumulation, with the model of it.

    python examples/cost.py --batches 512 1024 2048 --micro-batches 64 256 --record benchmarks/results/cost.json

Three ways of taking one step over the same pairs, on the emoji model (untrained, on noise: only shapes matter):

    plain          the whole batch encoded with a graph, the loss by nibs, one backward
    accumulation   micro-batches one by one, each with a loss of its own: another loss, for each sees its own negatives
    decoupled      nibs_torch.DecoupledStep: the plain step's gradients, in the memory of a micro-batch

The model. With F, B the seconds of one forward and one backward of the encoders for a pair, L(n) the loss with its
gradients, g the bytes that one pair's graph holds, and c what is held whatever the batch:

    plain          n (F + B) + L(n)          c + n g
    accumulation   n (F + B) + k L(n / k)    c + m g            m = micro-batch, k = n / m
    decoupled      n (2 F + B) + L(n)        c + m g + 4 n d b  embeddings and their gradients of both sides

F, B and L are timed apart, in micro-batches; g and c are the slope and the start of plain's peak between the smallest
and the largest batch, so plain's own prediction says little and the others' much. Every measured step is in a process
of its own; its peak is what the operating system saw beyond what was held before, and its seconds are the processor's.

    python examples/cost.py --ranks 2 --batches 512 --micro-batches 64        bytes that a rank sends in a step

counts what goes over the link where ranks share the batch: the ring's, which nibs.plan predicts, and what DDP reduces,
the parameters once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from compare import peak_memory, start_watching_memory
from emoji_task import DIM, PICTURE_SIZE, TEXT_WIDTH
from torch import Tensor
from two_tower import Encoder, TwoTower

import nibs
import nibs_torch

WAYS = ("plain", "accumulation", "decoupled")


class Step:
    """A model, a batch of noise, and the three ways. group: of ranks that share a batch, this one's part of it."""

    def __init__(self, batch: int, micro_batch: int, group: Any = None) -> None:
        torch.manual_seed(0)
        self.model = TwoTower(TEXT_WIDTH, DIM, norm="group")
        self.queries = Encoder(self.model.encode_pictures, self.model.picture)
        self.keys = Encoder(self.model.encode_texts, self.model.text, log_scale=self.model.log_scale)
        self.pictures = torch.randn(batch, 3, PICTURE_SIZE, PICTURE_SIZE)
        self.pictures = self.pictures.contiguous(memory_format=torch.channels_last)
        self.texts = torch.randn(batch, TEXT_WIDTH) / TEXT_WIDTH**0.5
        self.micro_batch = micro_batch
        self.over: dict[str, Any] = {}
        self.reduced = 0
        self.wrapped: list[Any] = []
        if group is not None:
            self.over = {"ring": nibs_torch.Ring(group), "grad_reduction": "mean"}
            self.wrapped = [torch.nn.parallel.DistributedDataParallel(one) for one in (self.queries, self.keys)]
            self.queries, self.keys = self.wrapped
            for one in self.wrapped:
                one.register_comm_hook(self, counted)
        self.step = nibs_torch.DecoupledStep(self.queries, self.keys, loss=self.loss, micro_batch=micro_batch)

    def loss(self, queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        """Return CLIP's loss."""
        return nibs.contrastive_loss(queries, keys, scale=scale, **self.over)

    def plain(self) -> None:
        """Hold everything."""
        self.loss(self.queries(self.pictures), *self.keys(self.texts)).backward()

    def accumulation(self) -> None:
        """Hold a micro-batch, and see no more than one."""
        parts = list(zip(self.pictures.split(self.micro_batch), self.texts.split(self.micro_batch)))
        for number, (pictures, texts) in enumerate(parts):
            with ExitStack() as silent:
                for one in self.wrapped if number + 1 < len(parts) else []:
                    silent.enter_context(one.no_sync())
                loss = self.loss(self.queries(pictures), *self.keys(texts))
                (loss * (len(pictures) / len(self.pictures))).backward()

    def decoupled(self) -> None:
        """Hold a micro-batch, and see everything."""
        self.step(self.pictures, self.texts)

    def forward(self) -> None:
        """Encode in micro-batches without a graph: pass 1 of the decoupled step."""
        with torch.no_grad():
            for pictures, texts in zip(self.pictures.split(self.micro_batch), self.texts.split(self.micro_batch)):
                self.queries(pictures)
                self.keys(texts)

    def forward_and_backward(self) -> None:
        """Encode in micro-batches and go back, without a loss."""
        for pictures, texts in zip(self.pictures.split(self.micro_batch), self.texts.split(self.micro_batch)):
            rows, scale = self.keys(texts)
            (self.queries(pictures).sum() + rows.sum() + scale).backward()

    def loss_alone(self) -> None:
        """The loss of the whole batch with its gradients, on rows that are there."""
        rows = torch.nn.functional.normalize(torch.randn(2, len(self.texts), DIM), dim=-1)
        queries, keys = (one.clone().requires_grad_() for one in rows)
        self.loss(queries, keys, torch.tensor(14.0, requires_grad=True)).backward()


def best(call: Callable[[], None], repeats: int) -> float:
    """Processor seconds, over all threads, of the best of several calls: waiting for a busy machine does not count."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def measure(way: str, batch: int, micro_batch: int, repeats: int) -> dict[str, float | None]:
    """Take one way's peak and best time in this process."""
    small = Step(8, 4)
    getattr(small, way)()  # libraries and threads are there before anything counts
    step = Step(batch, micro_batch)
    for parameter in step.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = start_watching_memory()
    getattr(step, way)()
    peak = peak_memory()
    beyond = None if peak is None or before is None else max(0, peak - before)
    return {"seconds": best(getattr(step, way), repeats), "peak": beyond}


def elsewhere(way: str, batch: int, micro_batch: int, repeats: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    numbers = ["--batches", str(batch), "--micro-batches", str(micro_batch), "--repeats", str(repeats)]
    command = [sys.executable, __file__, "--way", way, *numbers]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def predicted(way: str, n: int, m: int, parts: dict[str, float], graph: float, fixed: float) -> dict[str, float]:
    """Return seconds and peak bytes by the model at the top.

    parts: seconds of `forward` (F n), `both` (F n + B n), `loss` (L(n)), `small loss` (k L(n/k)). graph: g. fixed: c.
    """
    loss = parts["small loss"] if way == "accumulation" else parts["loss"]
    encoding = parts["both"] + (parts["forward"] if way == "decoupled" else 0.0)
    held = fixed + graph * (n if way == "plain" else min(n, m)) + (4 * n * DIM * 4 if way == "decoupled" else 0)
    return {"seconds": encoding + loss, "peak": held}


def report(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every way at every batch and micro-batch, with its prediction."""
    rows = []
    plain = {n: elsewhere("plain", n, n, options.repeats) for n in options.batches}
    small, large = min(plain), max(plain)
    ends = plain[small]["peak"], plain[large]["peak"]
    known = small < large and None not in ends  # some systems do not tell a process's peak
    graph = (ends[1] - ends[0]) / (large - small) if known else 0.0
    fixed = max(0.0, ends[0] - graph * small) if known else 0.0
    for n in options.batches:
        for m in options.micro_batches:
            step, one = Step(n, m), Step(m, m)
            for warm in (step.forward_and_backward, one.loss_alone):
                warm()
            parts = {
                "forward": best(step.forward, options.repeats),
                "both": best(step.forward_and_backward, options.repeats),
                "loss": best(step.loss_alone, options.repeats),
                "small loss": best(one.loss_alone, options.repeats) * n / m,
            }
            for way in WAYS:
                found = plain[n] if way == "plain" else elsewhere(way, n, m, options.repeats)
                of_plain = found["seconds"] / plain[n]["seconds"]
                row = {"way": way, "batch": n, "micro_batch": m, **found, "of plain": of_plain}
                rows.append({**row, "predicted": predicted(way, n, m, parts, graph, fixed), "parts": parts})
                print(line(rows[-1]), flush=True)
    return rows


def counted(step, bucket):  # DDP looks at annotations, and knows none that are strings
    """Average a bucket of gradients over the ranks, and count its bytes."""
    step.reduced += bucket.buffer().nbytes
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def send(rank: int, ranks: int, batch: int, micro_batch: int, folder: str) -> None:
    """Take a step each way as one of the ranks; the first one writes down what it sent."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    found = {}
    for way in WAYS:
        step = Step(batch // ranks, micro_batch, dist.group.WORLD)
        getattr(step, way)()
        found[way] = {"ring": step.over["ring"].sent, "reduced": step.reduced}
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def report_bytes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Count what a rank sends in each way, beside what the plan says."""
    rows = []
    print("| batch | micro-batch | way | ring kB | planned | reduced kB | planned |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    parameters = sum(one.nbytes for one in Step(2, 1).model.parameters())
    for n in options.batches:
        for m in options.micro_batches:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(send, (options.ranks, n, m, folder), options.ranks)
                found = json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))
            for way in WAYS:
                size = n // options.ranks
                rings, each = (size // m, m) if way == "accumulation" else (1, size)
                planned = rings * nibs.plan(each, each, DIM, ring_size=options.ranks, backend="torch").ring_bytes
                row = {"way": way, "batch": n, "micro_batch": m, "ranks": options.ranks, **found[way]}
                rows.append({**row, "predicted": {"ring": planned, "reduced": parameters}})
                sent = [found[way]["ring"], planned, found[way]["reduced"], parameters]
                print(f"| {n:,} | {m} | {way} | " + " | ".join(f"{one / 1e3:,.0f}" for one in sent) + " |", flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Lay one row out for a Markdown table."""
    peak = "-" if row["peak"] is None else f"{row['peak'] / 1e6:.0f}"
    model = row["predicted"]
    return (
        f"| {row['batch']:,} | {row['micro_batch']} | {row['way']} | {row['seconds']:.2f} | {model['seconds']:.2f} | "
        f"{row['of plain']:.2f} | {peak} | {model['peak'] / 1e6:.0f} |"
    )


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description="Time and memory of plain, accumulated and decoupled steps.")
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--ranks", type=int, default=1, help="count bytes over so many, in the place of time and memory"
    )
    parser.add_argument("--record", type=Path, help="a file for the figures (.json)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.batches[0], options.micro_batches[0], options.repeats)))
        return
    if options.ranks > 1:
        rows = report_bytes(options)
    else:
        print("| batch | micro-batch | way | CPU seconds | predicted | of plain | peak MB | predicted |")
        print("| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
        rows = report(options)
    if options.record:
        from train import machine

        options.record.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten: {options.record}")


if __name__ == "__main__":
    main()
