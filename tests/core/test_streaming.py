"""Rows that stay where they are kept: fetched tile by tile, gradients into arrays that the caller names.

The numbers are held to the oracle by the conformance suite; here it is what may be passed, and what is held: a mapped
file is never loaded whole, and a budget holds while both sides and both gradients lie in files.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import nibs
from nibs.errors import InvalidInput

N, M, D = 192, 12_288, 96


def rows(seed, size, dtype=np.float32):
    return (np.random.default_rng(seed).standard_normal((size, D)) / 4).astype(dtype)


def mapped(folder, name, values=None, shape=None, dtype=np.float32):
    """A file as an array: filled and read-only with values, else writeable."""
    path = folder / name
    made = np.memmap(path, dtype, "w+", shape=shape if values is None else values.shape)
    if values is None:
        return made
    made[:] = values
    made.flush()
    return np.memmap(path, dtype, "r", shape=values.shape)


@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.InfoNCE("query_to_key"), nibs.Sigmoid()], ids=str)
def test_a_budget_holds_while_everything_lies_in_files(tmp_path, objective):
    queries, keys = mapped(tmp_path, "q", rows(1, N)), mapped(tmp_path, "k", rows(2, M))
    out = {"queries": mapped(tmp_path, "dq", shape=(N, D)), "keys": mapped(tmp_path, "dk", shape=(M, D))}
    budget = 1_200_000
    assert keys.nbytes > 3 * budget
    call = {"scale": 2.0, "objective": objective, "memory": budget, "device": "cpu"}
    nibs.contrastive_loss_and_grad(queries[:9], keys[:9], scale=2.0)
    gc.collect()
    tracemalloc.start()
    loss, gradients = nibs.contrastive_loss_and_grad(queries, keys, out=out, **call)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= budget, f"{peak} bytes held beside the files"
    assert gradients.queries is out["queries"] and gradients.keys is out["keys"]
    want_loss, want = nibs.contrastive_loss_and_grad(np.array(queries), np.array(keys), scale=2.0, objective=objective)
    # The same tiles in another order of sums: each gradient is a sum of at most N or M terms of float32.
    assert abs(float(loss) - float(want_loss)) <= 8 * 2.0**-24 * abs(float(want_loss))
    for name in ("queries", "keys"):
        found, truth = getattr(gradients, name), getattr(want, name)
        assert np.abs(found - truth).max() <= 64 * 2.0**-24 * np.abs(truth).max()


PROGRAM = """
import resource, sys
import numpy as np, torch
import nibs
folder, rows, d = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
keys = np.memmap(folder + "/k", np.float32, "r", shape=(rows, d))
out = np.memmap(folder + "/dk", np.float32, "w+", shape=(rows, d))
queries = np.ones((64, d), np.float32)
call = dict(scale=0.01, backend=sys.argv[4], memory="6MiB", device="cpu")
nibs.contrastive_loss_and_grad(queries, keys[:64], out={"keys": np.empty((64, d), np.float32)}, **call)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
held = int(status["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + 32 * 2**20,) * 2)  # files that are mapped do not count, copies do
loss, gradients = nibs.contrastive_loss_and_grad(queries, keys, out={"keys": out}, **call)
print(float(loss), float(np.abs(out[-1]).sum()))
try:
    np.array(keys)
    print("loaded")
except MemoryError:
    print("too large to load")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits on data are Linux's")
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_file_larger_than_the_memory_there_is_goes_through(tmp_path, backend):
    if backend == "torch":
        pytest.importorskip("torch")
    size, width = 65_536, 256  # 64 MiB, twice what may be allocated
    made = np.memmap(tmp_path / "k", np.float32, "w+", shape=(size, width))
    made[:] = np.random.default_rng(0).standard_normal((1, width))
    del made
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(size), str(width), backend],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # each thread of a matrix library has buffers of its own
    )
    assert done.returncode == 0, done.stderr[-2000:]
    numbers, loaded = done.stdout.strip().splitlines()
    assert loaded == "too large to load", "the limit proves nothing"
    # all keys alike: a query's loss is log m, a key's log n, and the last key's gradient is not zero
    loss, gradient = map(float, numbers.split())
    assert abs(loss - (np.log(size) + np.log(64)) / 2) < 1e-4 and gradient > 0


def test_one_gradient_may_be_named_and_the_other_made():
    queries, keys = rows(1, 20), rows(2, 30)
    out = np.full((30, D), np.nan, np.float32)
    _, gradients = nibs.contrastive_loss_and_grad(queries, keys, out={"keys": out})
    _, want = nibs.contrastive_loss_and_grad(queries, keys)
    assert gradients.keys is out
    np.testing.assert_allclose(out, want.keys, atol=1e-6)
    np.testing.assert_allclose(gradients.queries, want.queries, atol=1e-6)


def test_arrays_of_numpy_stream_through_another_backend():
    pytest.importorskip("torch")
    queries, keys = rows(1, 20), rows(2, 30)
    out = np.zeros((30, D), np.float32)
    loss, gradients = nibs.contrastive_loss_and_grad(queries, keys, backend="torch", device="cpu", out={"keys": out})
    want, truth = nibs.contrastive_loss_and_grad(queries, keys)
    assert gradients.keys is out and isinstance(gradients.queries, np.ndarray)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(out, truth.keys, atol=1e-6)


LOCKED = np.zeros((8, D), np.float32)
LOCKED.flags.writeable = False
BAD = {
    "device": ({"device": "cuda 0"}, r"device is 'cuda 0'.*such as 'cpu' or 'cuda:0'"),
    "out": ({"out": [1]}, r"out is \[1\].*expected a dict with arrays for 'queries', 'keys'"),
    "name": ({"out": {"scale": np.zeros(1)}}, "expected a dict with arrays for 'queries', 'keys', or both"),
    "shape": ({"out": {"keys": np.zeros((7, D), np.float32)}}, r"out\['keys'\] is .*shape \(8, 96\) and dtype float32"),
    "dtype": ({"out": {"keys": np.zeros((8, D))}}, r"out\['keys'\] is a float64 array.*dtype float32 as keys"),
    "read-only": ({"out": {"keys": LOCKED}}, r"out\['keys'\] is .*, read-only: expected a writeable array"),
    "wrt": ({"out": {"keys": np.zeros((8, D), np.float32)}, "wrt": "queries"}, "out has 'keys' and wrt="),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_named(name):
    options, message = BAD[name]
    with pytest.raises(InvalidInput, match=message):
        nibs.contrastive_loss_and_grad(rows(1, 6), rows(2, 8), **options)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_out_has_memory_of_its_own(framework):
    """Gradients are written while rows are still read: what overlaps would be wrong without a word."""
    whole, keys = rows(1, 20), rows(2, 8)
    if framework == "torch":
        torch = pytest.importorskip("torch")
        whole, keys = torch.tensor(whole), torch.tensor(keys)
    wide = whole[:16].reshape(8, 2 * D)
    for queries, out, other in (
        (whole[:8], {"queries": whole[:8]}, "queries"),
        (whole[:8], {"queries": whole[7:15]}, "queries"),
        (whole[:8], {"queries": keys}, "keys"),
        (wide[:, :D], {"queries": wide[:, D // 2 : D // 2 + D]}, "queries"),
        (whole[:8], {"queries": whole[8:16], "keys": whole[12:20]}, "out"),
    ):
        with pytest.raises(InvalidInput, match=rf"out\['queries'\] shares memory with {other}"):
            nibs.contrastive_loss_and_grad(queries, keys, out=out)
    want = nibs.contrastive_loss_and_grad(wide[:, :D], keys)[1].queries
    out = wide[:, D:]  # the other columns of the same rows
    nibs.contrastive_loss_and_grad(wide[:, :D], keys, out={"queries": out})
    np.testing.assert_allclose(out, want, atol=1e-6)


def test_out_belongs_to_the_call_that_returns_gradients():
    with pytest.raises(InvalidInput, match="Use contrastive_loss_and_grad"):
        nibs.contrastive_loss(rows(1, 6), rows(2, 8), out={})


@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.Sigmoid()], ids=str)
def test_shards_in_files_go_round_a_ring(tmp_path, objective):
    from nibs.threads import run

    sizes = (9, 0, 14)
    shards = [
        (mapped(tmp_path, f"q{i}", rows(i, n)), rows(9 + i, n)) if n else (rows(i, n),) * 2 for i, n in enumerate(sizes)
    ]
    call = {"scale": 2.0, "objective": objective}

    def rank(ring):
        queries, keys = shards[ring.rank]
        out = {"keys": np.full(keys.shape, np.nan, np.float32)}
        loss, found = nibs.contrastive_loss_and_grad(queries, keys, ring=ring, device="cpu", out=out, **call)
        assert found.keys is out["keys"]
        return loss, found.queries, found.keys

    queries, keys = (np.concatenate([np.array(pair[side]) for pair in shards]) for side in (0, 1))
    want, truth = nibs.contrastive_loss_and_grad(queries, keys, **call)
    found = run(len(sizes), rank)
    for loss, _, _ in found:
        assert abs(loss - want) <= 8 * 2.0**-24 * abs(want)
    for side, name in ((1, "queries"), (2, "keys")):
        gradient = np.concatenate([one[side] for one in found])
        assert np.abs(gradient - getattr(truth, name)).max() <= 64 * 2.0**-24 * np.abs(getattr(truth, name)).max()
