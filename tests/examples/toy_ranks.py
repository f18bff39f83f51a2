"""Run under torchrun by test_train.py: a task without chance, trained over the ranks, its parameters left in a file."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from toy_task import toy_options, trained_on_toys

if __name__ == "__main__":
    folder, micro_batch = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parameters = trained_on_toys(toy_options(folder, micro_batch=micro_batch), dist.group.WORLD)
    if dist.get_rank() == 0:
        torch.save(parameters, folder / f"ranks{micro_batch}.pt")
    dist.barrier()
    dist.destroy_process_group()
