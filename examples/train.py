"""Train two encoders on pairs, with the batch that the loss sees set apart from what a step holds in memory.

    python examples/train.py --data emoji --batch 256 --epochs 10              a standard batch, held whole
    python examples/train.py --data emoji --batch all --micro-batch 256        every pair in one batch, 256 held at once
    python examples/train.py --data fashion --batch 4096 --micro-batch 512     SimCLR's views, judged by a linear layer
    python examples/train.py --data text --batch 1024 --micro-batch 64         German and English phrases, a MiniLM
    python examples/train.py --data text --frozen --batch all                  the same, MiniLM frozen and run once
    torchrun --nproc-per-node 4 examples/train.py --data emoji --batch all     one batch over four processes

A batch above `--micro-batch` goes through `nibs_torch.DecoupledStep`: the same gradients, one more forward, and the
memory of a micro-batch. Under torchrun every process encodes its share, the loss is that of all, and DDP averages.

A run writes into `--output`: log.jsonl (one line a step), result.json (what it was worth, and what ran), and
checkpoint.pt, at the end and every `--checkpoint-every` steps. `--resume` goes on from there as if it had never
stopped, to the bit: whatever is random in a step is drawn from the seed and the step's number, and nothing else. Data
and packages: examples/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tasks import Task, make_task
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from two_tower import parameter_groups

import nibs

WARM_UP = 0.1  # share of training in which the rate grows
EVERYTHING = "all"
# What may differ between a checkpoint's run and the one that resumes it.
FREE = {"output", "resume", "checkpoint_every", "stop_after", "data_path", "timeout"}


@dataclass
class Seen:
    """What one step showed: the loss, the scale, and nibs's statistics of the whole batch."""

    step: int
    epoch: int
    loss: float
    scale: float
    top1: float
    mean_positive: float
    mean_negative: float
    hardest_negative: float
    mean_lse: float
    seconds: float


class Trainer:
    """A task, a batch, and the steps that are to be taken.

    options: as `parser` has them. group: the processes that share the batch, None for one.
    """

    def __init__(self, task: Task, options: argparse.Namespace, group: Any = None) -> None:
        self.task, self.options = task, options
        self.device = torch.device(options.device)
        task.model.to(self.device)
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        self.batch = min(task.pairs, task.pairs if options.batch == EVERYTHING else int(options.batch))
        # The tail of an epoch that does not fill a batch is left out; every epoch has another tail.
        self.per_epoch = task.pairs // self.batch
        self.steps = options.steps or math.ceil(options.epochs * self.per_epoch)
        rate = options.rate or task.rate * math.sqrt(self.batch / task.rate_batch)
        self.optimizer = torch.optim.AdamW(parameter_groups(task.model, rate), lr=rate, betas=(0.9, 0.98))
        self.rate = rate
        self.done = 0
        self.rows = torch.empty(0, dtype=torch.int64)
        self.stats: Any = None
        self.fixed: dict[str, Any] = {"backend": options.backend, "stats": True}
        self.query_encoder, self.key_encoder = task.query_encoder, task.key_encoder
        if group is not None:
            import nibs_torch

            self.fixed |= {"ring": nibs_torch.Ring(group, timeout=options.timeout), "grad_reduction": "mean"}
            self.query_encoder = DistributedDataParallel(task.query_encoder)
            tied = task.key_encoder is task.query_encoder
            self.key_encoder = self.query_encoder if tied else DistributedDataParallel(task.key_encoder)
        # Every process's share is of this size, or one smaller.
        self.decoupled = math.ceil(self.batch / self.size) > options.micro_batch
        if self.decoupled:
            import nibs_torch

            self.decoupled_step = nibs_torch.DecoupledStep(
                self.query_encoder,
                self.key_encoder,
                loss=self.loss,
                micro_batch=options.micro_batch,
                ring=self.fixed.get("ring"),
            )

    def loss(self, queries: Tensor, keys: Tensor, scale: Any = 1.0, bias: Any = None) -> Tensor:
        """Return the loss of the step's rows, and keep what else it tells."""
        value, self.stats = self.task.loss(queries, keys, scale, self.rows, **self.fixed)
        return value

    def plain_step(self, query_inputs: Any, key_inputs: Any) -> Tensor:
        """Take the gradient of the whole batch at once, as every tutorial does."""
        (queries, _), (keys, scale) = split(self.query_encoder(query_inputs)), split(self.key_encoder(key_inputs))
        loss = self.loss(queries, keys, scale)
        loss.backward()
        return loss.detach()

    def step(self) -> Seen:
        """Take one step; what is random in it comes from the seed, the step and the rank."""
        start = time.perf_counter()
        epoch, place = divmod(self.done, self.per_epoch)
        order = torch.randperm(
            self.task.pairs, generator=torch.Generator().manual_seed(mixed(self.options.seed, epoch))
        )
        batch = order[place * self.batch : (place + 1) * self.batch]
        self.rows = batch[self.rank :: self.size]
        torch.manual_seed(mixed(self.options.seed, epoch, place, self.rank + 1))
        done = self.done / self.steps
        share = min(1, (self.done + 1) / self.steps / WARM_UP) * math.cos(math.pi / 2 * done) ** 2
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_rate"] * share
        self.optimizer.zero_grad()
        inputs = self.task.inputs(self.rows)  # on the CPU: a decoupled step takes one micro-batch after the other
        loss = self.decoupled_step(*inputs) if self.decoupled else self.plain_step(*placed(inputs, self.device))
        self.optimizer.step()
        self.done += 1
        return Seen(
            self.done,
            epoch,
            loss.item(),
            float(self.task.model.log_scale.detach().exp()),
            self.stats.top1,
            self.stats.mean_positive,
            self.stats.mean_negative,
            self.stats.hardest_negative,
            self.stats.mean_lse,
            time.perf_counter() - start,
        )

    def save(self, path: Path) -> None:
        """Write all that the next step depends on; a run that is killed meanwhile leaves the last one whole."""
        state = {
            "step": self.done,
            "size": self.size,
            "options": {name: value for name, value in vars(self.options).items() if name not in FREE},
            "model": self.task.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        """Go back to a checkpoint, which must be of this very run."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        options = {name: value for name, value in vars(self.options).items() if name not in FREE}
        for name, value in [*state["options"].items(), ("processes", state["size"])]:
            here = {**options, "processes": self.size}.get(name)
            if here != value:
                raise SystemExit(
                    f"{path} is of a run with {name} = {value}, and this one has {here}: it would not go on to the "
                    f"bit. Give the same options, or another --output."
                )
        self.task.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["step"]


def placed(inputs: Any, device: torch.device) -> Any:
    """Return tensors, and tuples and dicts of them, on the device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {name: one.to(device) for name, one in inputs.items()}
    return tuple(placed(one, device) for one in inputs)


def split(encoded: Any) -> tuple[Tensor, Any]:
    """Return rows and scale of what an encoder returned."""
    return (encoded[0], encoded[1]) if isinstance(encoded, tuple) else (encoded, 1.0)


def mixed(*numbers: int) -> int:
    """Make one seed of several numbers, so that no two steps, epochs or ranks share theirs."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number * 1442695040888963407 + 1) % 2**63
    return seed


def run(options: argparse.Namespace, group: Any = None) -> dict[str, Any]:
    """Train, judge, and write down what came of it; returns what stands in result.json."""
    task = make_task(options)
    trainer = Trainer(task, options, group)
    first = trainer.rank == 0
    checkpoint, log = options.output / "checkpoint.pt", options.output / "log.jsonl"
    seen: list[dict[str, Any]] = []
    if options.resume:
        if not checkpoint.exists():
            raise SystemExit(f"--resume: there is no {checkpoint}. Leave --resume out to start from the beginning.")
        trainer.load(checkpoint)
        seen = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()][: trainer.done]
    if first:
        options.output.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(json.dumps(one) + "\n" for one in seen), encoding="utf-8")
        how = f"in micro-batches of {options.micro_batch}" if trainer.decoupled else "held whole"
        shares = f" over {trainer.size} processes" if trainer.size > 1 else ""
        print(f"{task.pairs:,} pairs, {trainer.steps} steps of {trainer.batch:,}{shares}, {how}", flush=True)
    end = min(trainer.steps, options.stop_after or trainer.steps)
    while trainer.done < end:
        one = trainer.step()
        seen.append(asdict(one))
        if not first:
            continue
        with log.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(seen[-1]) + "\n")
        last = one.step == end
        if one.step == 1 or last or one.step % max(1, trainer.steps // 20) == 0:
            print(f"step {one.step:>4}  loss {one.loss:.4f}  scale {one.scale:.1f}  top-1 {one.top1:.1%}", flush=True)
        if last or (options.checkpoint_every and one.step % options.checkpoint_every == 0):
            trainer.save(checkpoint)
    result = {
        "data": options.data,
        "seed": options.seed,
        "pairs": task.pairs,
        "batch": trainer.batch,
        "micro_batch": options.micro_batch if trainer.decoupled else None,
        "processes": trainer.size,
        "steps": trainer.done,
        "epochs": trainer.done / trainer.per_epoch,
        "rate": trainer.rate,
        "loss": seen[-1]["loss"] if seen else None,
        "seconds": sum(one["seconds"] for one in seen),
        "machine": machine(),
    }
    if trainer.done < trainer.steps:
        if first:
            print(f"stopped after {trainer.done} of {trainer.steps} steps, as asked")
        return result
    if first:
        task.model.to("cpu")  # judging is on the CPU, wherever it was trained
        result["found"] = task.evaluate()
        (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for name, share in result["found"].items():
            print(f"{name}: {share:.1%}")
        if options.data == "emoji":
            from emoji_data import ATTRIBUTION

            print(ATTRIBUTION)
    return result


def machine() -> dict[str, Any]:
    """Name what ran this: no figure goes without it."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": " ".join(["python", "examples/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def parser() -> argparse.ArgumentParser:
    """Describe the options."""
    words = argparse.ArgumentParser(description="Train two encoders on pairs; a large batch costs no memory.")
    words.add_argument("--data", choices=("emoji", "fashion", "text"), required=True)
    words.add_argument("--data-path", type=Path, help="where fashion or text lies, if not where Debian puts it")
    words.add_argument("--pairs", type=int, help="train on the first so many pairs only (default: all)")
    words.add_argument("--frozen", action="store_true", help="text: train heads on MiniLM's embeddings, not MiniLM")
    words.add_argument("--batch", default="256", help="pairs that the loss sees at once, or 'all' (default: 256)")
    words.add_argument("--micro-batch", type=int, default=256, help="pairs held at once with a graph (default: 256)")
    words.add_argument("--epochs", type=float, default=10, help="(default: 10)")
    words.add_argument("--steps", type=int, help="in the place of --epochs")
    words.add_argument("--rate", type=float, help="learning rate (default: the task's, by the root of the batch)")
    words.add_argument("--backend", help="of nibs, any that trains (default: the owner of the tensors)")
    words.add_argument("--device", default="cpu", help="'cuda' under torchrun: one for each process (default: cpu)")
    words.add_argument("--seed", type=int, default=0, help="of parameters, order, dropout and views (default: 0)")
    words.add_argument("--output", type=Path, default=Path("out/train"), help="folder (default: out/train)")
    words.add_argument("--checkpoint-every", type=int, default=0, help="steps; 0: at the end alone (default)")
    words.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    words.add_argument("--stop-after", type=int, help="end at this step without judging; the rate is that of all steps")
    words.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for a process (default: 120)")
    return words


def check(options: argparse.Namespace, words: argparse.ArgumentParser) -> None:
    """Refuse what cannot be meant."""
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        words.error(f"--device {options.device}: expected one that PyTorch has here ({why})")
    if options.batch != EVERYTHING and not (options.batch.isdigit() and int(options.batch) >= 2):
        words.error(f"--batch {options.batch}: expected a number of pairs from 2, or '{EVERYTHING}'")
    if options.frozen and options.data != "text":
        words.error(f"--frozen with --data {options.data}: expected text, whose encoder was trained before")
    for name in ("pairs", "micro_batch", "steps", "stop_after", "rate", "epochs"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            words.error(f"--{name.replace('_', '-')} {value}: expected a number above zero")


def main() -> int:
    """Read the options, join the other processes if there are any, and run."""
    words = parser()
    options = words.parse_args()
    check(options, words)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if several:
        dist.init_process_group("gloo" if options.device == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        run(options, dist.group.WORLD if several else None)
    except nibs.errors.NibsError as error:
        rank = f"rank {dist.get_rank()}: " if several else ""
        print(f"{rank}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if several:
            os._exit(1)  # not through destructors, which would wait for a peer that is gone
        return 2
    if several:
        dist.barrier()  # the first process judges
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
