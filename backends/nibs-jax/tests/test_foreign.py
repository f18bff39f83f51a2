"""An eager backend inside jit: NumPy's on a CPU runs the whole path that CuPy's takes on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_checks import close, dense, equations, rows

import nibs
import nibs_jax
from nibs.errors import BackendUnavailable, InvalidInput, Unsupported
from nibs_jax import foreign


def loss(*given: Any, **options: Any) -> Any:
    queries, keys, scale = given
    return nibs.contrastive_loss(queries, keys, scale=scale, **options)


def test_a_jitted_gradient_is_computed_by_the_eager_backend() -> None:
    given = (*rows(37, 37), 3.0)
    with nibs_jax.kernels("numpy"):
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*given)
        close(step.compile()(*given), jax.value_and_grad(dense, (0, 1, 2))(*given))
    assert foreign.TARGET in step.as_text() and "dot_general" not in step.as_text()


def test_the_plan_says_which_kernels_ran() -> None:
    queries, keys = rows(12, 12)
    ran = {}
    for name in ("xla", "numpy"):
        with nibs_jax.kernels(name):
            ran[name] = jax.jit(lambda q, k: nibs.contrastive_loss(q, k, stats=True))(queries, keys)[1]
    assert ran["xla"].plan.kernel == "xla"
    assert ran["numpy"].plan.kernel == "numpy, through jax.ffi"
    close(ran["numpy"].query_lse, ran["xla"].query_lse)
    close(ran["numpy"].mean_lse, ran["xla"].mean_lse)
    assert int(ran["numpy"].count) == 12


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_rows_keep_their_dtype(dtype: str) -> None:
    queries, keys = rows(20, 20, dtype=dtype)
    with nibs_jax.kernels("numpy"):
        gradient = jax.jit(jax.grad(loss))(queries, keys, 2.0)
    assert gradient.dtype == dtype
    close(gradient.astype("float32"), jax.grad(dense)(queries.astype("float32"), keys.astype("float32"), 2.0), 1e-2)


def test_every_option_travels() -> None:
    queries, keys = rows(20, 20)
    options = {
        "objective": nibs.InfoNCE(label_smoothing=0.1, same_id="exclude"),
        "query_ids": jnp.arange(20) // 2,
        "key_ids": jnp.arange(20) // 2,
        "query_mask": jnp.arange(20) != 3,
        "key_mask": jnp.arange(20) != 5,
        "weights": jnp.linspace(0.5, 2, 20),
        "targets": jnp.arange(20),
        "reduction": "sum",
    }
    found = {}
    for name in ("xla", "numpy"):
        with nibs_jax.kernels(name):
            found[name] = jax.jit(jax.value_and_grad(lambda q: nibs.contrastive_loss(q, keys, scale=2.0, **options)))(
                queries
            )
    close(found["numpy"], found["xla"])


def test_a_bad_value_is_nan_here_too() -> None:
    queries, keys = rows(4, 5)
    with nibs_jax.kernels("numpy"):
        assert np.isnan(jax.jit(lambda t: nibs.contrastive_loss(queries, keys, targets=t))(jnp.asarray([0, 1, 9, 3])))


def test_vmap_calls_once_for_each_problem() -> None:
    queries, keys = (jnp.stack([side, side + 1]) for side in rows(9, 9))
    with nibs_jax.kernels("numpy"):
        got = jax.vmap(lambda q, k: nibs.contrastive_loss(q, k))(queries, keys)
    close(got, jax.vmap(dense)(queries, keys))


def test_what_the_eager_backend_raises_is_said_and_nothing_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = nibs.registry.registry.load("numpy")

    def fail(request: Any) -> Any:
        raise RuntimeError("out of beads")

    queries, keys = rows(7, 7)
    with nibs_jax.kernels("numpy"):
        monkeypatch.setattr(backend, "loss_and_grad", fail)
        with pytest.raises(Exception, match="out of beads"):
            jax.block_until_ready(jax.jit(nibs.contrastive_loss)(queries, keys))
        monkeypatch.undo()
        close(jax.jit(nibs.contrastive_loss)(queries, keys), dense(queries, keys))


def test_values_one_by_one_are_refused_by_name() -> None:
    with nibs_jax.kernels("numpy"), pytest.raises(Unsupported, match="upstream factor"):
        nibs.contrastive_loss(*rows(4, 4), reduction="none")


def test_kernels_of_another_device_are_refused_by_name() -> None:
    with nibs_jax.kernels("cupy"), pytest.raises(Unsupported, match="do not live on cpu"):
        nibs.contrastive_loss(*rows(4, 4))


def test_a_trace_for_another_device_than_the_first_is_planned_for_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    queries, keys = rows(7, 7)
    with nibs_jax.kernels("numpy"), jax.default_device(jax.devices("cpu")[0]):
        close(jax.jit(nibs.contrastive_loss)(queries, keys), dense(queries, keys))


def test_kernels_that_nobody_has_are_refused() -> None:
    with pytest.raises(InvalidInput, match="'xla'"), nibs_jax.kernels("metal"):
        pass


class Pool:
    """What an arena needs of CuPy: pointers into memory of another's, and a pool of its own."""

    def __init__(self) -> None:
        self.cuda, self.beyond = self, []

    def UnownedMemory(self, pointer: int, size: int, owner: Any) -> Any:
        return SimpleNamespace(ptr=pointer, size=size, owner=owner)

    def MemoryPointer(self, memory: Any, offset: int) -> Any:
        return memory

    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(malloc=self.beyond.append)


def test_on_a_gpu_the_eager_backend_works_in_xlas_memory_and_beyond_it_in_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Pool()
    monkeypatch.setitem(sys.modules, "cupy", pool)
    arena = foreign.Arena(SimpleNamespace(nbytes=4096, data=SimpleNamespace(ptr=10_000)))
    first, second, third = (arena.allocate(size) for size in (1, 1000, 2560))
    assert [(one.ptr, one.size) for one in (first, second, third)] == [(10_000, 512), (10_512, 1024), (11_536, 2560)]
    arena.allocate(1)
    assert pool.beyond == [512]
    del first, third  # not neighbours: what lies between them is still held
    arena.allocate(2561)
    assert pool.beyond == [512, 3072]
    del second
    assert arena.allocate(4096).ptr == 10_000  # the pieces are one again


@pytest.mark.parametrize("stats", [False, True])
def test_on_a_gpu_the_workspace_is_a_result_of_the_call(stats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = nibs.registry.registry.load("jax")
    monkeypatch.setattr(type(backend), "_kind", lambda self, request: "cuda")
    monkeypatch.setattr(foreign, "choose", lambda request, *, alone: "numpy")
    monkeypatch.setattr(foreign, "_register", lambda device: None)
    queries, keys = rows(300, 300)
    traced = jax.make_jaxpr(lambda q, k: nibs.contrastive_loss(q, k, stats=stats))(queries, keys)
    (call,) = [one for one, _ in equations(traced.jaxpr) if one.primitive.name == "ffi_call"]
    assert call.outvars[-1].aval.dtype == jnp.uint8 and call.outvars[-1].aval.size > 300 * 300 * 4


def test_the_environment_chooses() -> None:
    program = (
        "import jax, nibs; x = jax.numpy.ones((3, 2)); print(nibs.contrastive_loss(x, x, stats=True)[1].plan.kernel)"
    )
    environment = {**os.environ, foreign.ENVIRONMENT: "numpy"}
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert said.stdout.strip() == "numpy, through jax.ffi"


def test_this_jaxlib_has_the_layout_that_is_written_down() -> None:
    assert foreign.check_layout()[0] == 0


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  int64_t rank;\n", "", "field 4 of XLA_FFI_Buffer is dims"),
        ("  int64_t rank;\n", "  int32_t rank;\n", r"rank \(int32_t\), expected rank \(int64_t\)"),
        ("  XLA_FFI_Args args;\n", "  void* lease;\n  XLA_FFI_Args args;\n", "field 5 of XLA_FFI_CallFrame is lease"),
        ("#define XLA_FFI_API_MAJOR 0", "#define XLA_FFI_API_MAJOR 1", "version"),
        ("struct XLA_FFI_Rets {", "struct XLA_FFI_Results {", "there is no XLA_FFI_Rets"),
    ],
    ids=["field gone", "field narrower", "field inserted", "next major version", "struct renamed"],
)
def test_a_jaxlib_that_moved_a_field_is_refused(old: str, new: str, words: str) -> None:
    text = foreign.header()
    assert old in text
    with pytest.raises(BackendUnavailable, match=words):
        foreign.compare(text.replace(old, new))
