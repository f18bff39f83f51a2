"""The demo's model on several processes: one batch over all of them, its loss on a ring, gradients by DDP.

    torchrun --nproc-per-node 4 examples/train_ring.py [--steps N] [--seconds-limit S]

Every process encodes its own share of the training emoji, and the loss is that of the whole set, as if one
process held it. gloo on CPUs; NCCL where every process has a GPU. Shares may differ in size, and do: nothing
is dropped to make them even. What it needs is in examples/requirements.txt; two machines: examples/two_hosts.sh.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from demo import RATE
from emoji_data import ATTRIBUTION, TextFeatures, load_data
from emoji_task import DIM, PICTURE_SIZE, TEXT_WIDTH, encode, side_of
from evaluate import retrieval
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_tower import TwoTower, parameter_groups

import nibs
import nibs_torch


class Pairs(nn.Module):
    """Both towers and the scale behind one forward, which is what DDP wraps."""

    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embeddings of this process's share, and the scale."""
        return self.model.encode_pictures(pictures), self.model.encode_texts(texts), self.model.scale()


def train(options: argparse.Namespace) -> None:
    """Train, and say on the first process what came of it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    use_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    drawn: list[Any] = [None, None]
    if rank == 0:  # one process draws for all
        data = load_data(PICTURE_SIZE, seed=options.seed)
        drawn = [data, TextFeatures([data.emoji[row].caption for row in data.train], TEXT_WIDTH)]
    dist.broadcast_object_list(drawn, 0, device=device)
    data, features = drawn
    rows = data.train[: options.pairs] if options.pairs else data.train
    side = side_of(data, features, rows[rank::size])  # this process's share, a row longer on some than on others
    pictures, texts, ids = (one.to(device) for one in (side.pictures, side.texts, side.ids))

    torch.manual_seed(options.seed)  # DDP starts all processes from the same parameters, too
    model = TwoTower(TEXT_WIDTH, DIM).to(device)
    pairs = DistributedDataParallel(Pairs(model), device_ids=[device] if use_gpu else None)
    optimizer = torch.optim.AdamW(parameter_groups(model, RATE), lr=RATE, betas=(0.9, 0.98))
    ring = nibs_torch.Ring(timeout=options.timeout)
    criterion = nibs_torch.ContrastiveLoss(nibs.InfoNCE(same_id="exclude"), ring=ring)
    torch.manual_seed(options.seed + rank)  # dropout of its own

    start, step, done = time.perf_counter(), 0, False
    loss = torch.zeros(())
    while not done:
        loss = criterion(*pairs(pictures, texts), query_ids=ids, key_ids=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        # One clock for all: a process that stopped on its own would leave the others waiting.
        late = torch.tensor(float(time.perf_counter() - start > options.seconds_limit), device=device)
        dist.broadcast(late, 0)
        done = step >= options.steps or bool(late)
        if rank == 0 and (step % 5 == 0 or step == 1 or done):
            print(f"step {step:>3}  loss {loss.item():.4f}  scale {model.scale().item():.2f}", flush=True)
    seconds = time.perf_counter() - start
    if rank == 0:
        held_out = side_of(data, features, data.held_out)
        found = retrieval(*encode(model.cpu(), held_out)[:2], held_out.ids)
        moved = ring.sent / step / 1024
        print(f"{len(rows):,} pairs on {size} processes, {step} steps in {seconds:.1f} s, {moved:,.0f} KiB sent a step")
        print(f"held-out picture to name, R@10: {found[-1]:.1%} (chance {10 / len(held_out.ids):.1%})")
        print(ATTRIBUTION)


def main() -> int:
    """Join the other processes, train, leave."""
    parser = argparse.ArgumentParser(description="Train on emoji over several processes: run it under torchrun.")
    parser.add_argument("--steps", type=int, default=60, help="one step is the whole training set (default: 60)")
    parser.add_argument("--seconds-limit", type=float, default=60.0, help="of training (default: 60)")
    parser.add_argument("--pairs", type=int, default=0, help="train on the first so many pairs only (default: all)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for a process (default: 120)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        print("Start it under torchrun: torchrun --nproc-per-node 4 examples/train_ring.py", file=sys.stderr)
        return 2
    every_has_a_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("nccl" if torch.cuda.is_available() and every_has_a_gpu else "gloo")
    try:
        train(options)
    except nibs.errors.NibsError as error:
        print(f"rank {dist.get_rank()}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # not through destructors, which would wait for a peer that is gone
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
