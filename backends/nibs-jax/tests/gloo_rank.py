"""One process of several over gloo: `gloo_rank.py WORK RANK SIZE FOLDER` writes what it found to FOLDER.

WORK is "ring", the loss with its gradients, or "page", the blocks of docs/jax.md for many hosts as they stand there.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax_checks import blocks_of_page

import nibs


def address(rank: int, folder: Path) -> str:
    """Where rank 0 listens: a free port, left in a file for the others."""
    note = folder / "address"
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (folder / "address.new").write_text(f"127.0.0.1:{port}")
        (folder / "address.new").rename(note)
    deadline = time.monotonic() + 60
    while not note.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("rank 0 never said where it listens")
        time.sleep(0.02)
    return note.read_text()


def ring(rank: int, size: int, folder: Path) -> None:
    """The loss and all its gradients over a ring of the processes."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address(rank, folder), size, rank)
    r = np.random.default_rng(0)
    sides = [(r.standard_normal((24, 8)) / 2).astype(np.float32) for _ in range(2)]
    mesh = jax.make_mesh((size,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec("data"))
    each = 24 // size
    mine = [side[rank * each : (rank + 1) * each] for side in sides]
    queries, keys = (jax.make_array_from_process_local_data(where, side) for side in mine)

    def work(queries: jax.Array, keys: jax.Array, scale: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return jax.value_and_grad(lambda q, k, s: nibs.contrastive_loss(q, k, scale=s, ring="data"), (0, 1, 2))(
            queries, keys, scale
        )

    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    specs = (rows, rows, everywhere)
    step = jax.jit(jax.shard_map(work, mesh=mesh, in_specs=specs, out_specs=(everywhere, specs)))
    loss, gradients = step(queries, keys, np.float32(3.0))
    local = [np.concatenate([part.data for part in one.addressable_shards]) for one in gradients[:2]]
    scale = np.asarray(gradients[2].addressable_data(0))
    np.savez(
        folder / f"{rank}.npz", loss=np.asarray(loss.addressable_data(0)), queries=local[0], keys=local[1], scale=scale
    )


def page(rank: int, size: int, folder: Path) -> None:
    """The page's own words, with this process's rows of 16 and two matrices as parameters."""
    blocks = blocks_of_page()
    images, texts = ((np.random.default_rng(seed).standard_normal((16, 8)) / 2).astype(np.float32) for seed in (1, 2))
    mine = slice(rank * 16 // size, (rank + 1) * 16 // size)
    space = {
        "coordinator_address": address(rank, folder),
        "process_count": size,
        "process_index": rank,
        "local_images": images[mine],
        "local_texts": texts[mine],
        "parameters": {
            "image": np.eye(8, dtype=np.float32),
            "text": np.eye(8, dtype=np.float32) + np.float32(0.1),
            "log_scale": np.float32(0.7),
        },
    }
    for name in ("jit", "hosts", "shard_map", "local_rows"):
        exec(blocks[name], space)
    gradients = {name: np.asarray(one.addressable_data(0)) for name, one in space["gradients"].items()}
    np.savez(folder / f"{rank}.npz", value=np.asarray(space["value"].addressable_data(0)), **gradients)


if __name__ == "__main__":
    os.environ.pop("XLA_FLAGS", None)
    {"ring": ring, "page": page}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
