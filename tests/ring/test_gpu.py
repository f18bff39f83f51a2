"""Rings on a GPU, where there is one: ranks as threads on one device, and a world of one over NCCL."""

from __future__ import annotations

from typing import Any

import pytest

import nibs
from nibs.threads import ThreadRing, run

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

SHARDS = (5, 1, 0, 9)


def sides(generator_seed: int = 0) -> Any:
    """`[2, 15, 8]` float64 rows on the GPU."""
    generator = torch.Generator().manual_seed(generator_seed)
    return torch.randn(2, sum(SHARDS), 8, dtype=torch.float64, generator=generator).cuda()


def test_ranks_that_are_threads_on_one_gpu_agree_with_one_rank():
    queries, keys = sides()
    shards = list(zip(queries.split(SHARDS), keys.split(SHARDS), strict=True))

    def rank(ring: ThreadRing) -> Any:
        return nibs.contrastive_loss_and_grad(*shards[ring.rank], scale=3.0, ring=ring)

    whole, gradients = nibs.contrastive_loss_and_grad(queries, keys, scale=3.0)
    found = run(len(SHARDS), rank)
    torch.testing.assert_close(torch.stack([loss for loss, _ in found]), whole.expand(len(SHARDS)))
    torch.testing.assert_close(torch.cat([grads.queries for _, grads in found]), gradients.queries)
    torch.testing.assert_close(torch.cat([grads.keys for _, grads in found]), gradients.keys)


def test_a_world_of_one_over_nccl_is_one_device(tmp_path: Any):
    import torch.distributed as dist

    import nibs_torch

    queries, keys = sides()
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        alone = nibs.contrastive_loss(queries, keys, scale=3.0, ring=nibs_torch.Ring(timeout=30))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(alone, nibs.contrastive_loss(queries, keys, scale=3.0))
