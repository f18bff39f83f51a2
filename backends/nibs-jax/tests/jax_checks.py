"""What the tests share: rows, the loss as everybody writes it, and what a traced program does, counted in its jaxpr."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

PAGE = Path(__file__).parents[3] / "docs" / "jax.md"


def blocks_of_page() -> dict[str, str]:
    """The blocks of docs/jax.md that run, by name."""
    return dict(re.findall(r"<!-- runs: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(), re.S))


def rows(n: int, m: int, d: int = 8, seed: int = 0, dtype: str = "float32") -> tuple[Any, Any]:
    """Queries `[n, d]` and keys `[m, d]`."""
    r = np.random.default_rng(seed)
    queries, keys = r.standard_normal((n, d)), r.standard_normal((m, d))
    return jax.numpy.asarray(queries / 2, dtype), jax.numpy.asarray(keys / 2, dtype)


@jax.jit  # one program, and not one for each operation and shape
def dense(queries: Any, keys: Any, scale: Any = 1.0) -> Any:
    """The symmetric loss as everybody writes it, n x n."""
    logits = scale * queries @ keys.T
    by_row, by_column = (jax.nn.log_softmax(logits, axis) for axis in (1, 0))
    return -(jax.numpy.diagonal(by_row).mean() + jax.numpy.diagonal(by_column).mean()) / 2


def close(one: Any, other: Any, tolerance: float = 2e-6) -> None:
    """Every leaf within `tolerance` of the other's largest number."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.abs(a - b).max(initial=0) <= tolerance * max(1.0, np.abs(b).max(initial=0)), (a, b)


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation with how often it runs; of a `cond`, the first branch."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for name, value in equation.params.items():
            found = value[:1] if name == "branches" else value if isinstance(value, (tuple, list)) else [value]
            for one in found:
                one = getattr(one, "jaxpr", one)
                if hasattr(one, "eqns"):
                    yield from equations(one, inner)


def flops(function: Any, *arguments: Any) -> int:
    """Flops of all matrix products of a call."""
    found = 0
    for equation, times in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            found += (
                times * 2 * int(np.prod(equation.outvars[0].aval.shape)) * int(np.prod([left[i] for i in contracted]))
            )
    return found


def hops(function: Any, *arguments: Any) -> tuple[int, int]:
    """How many times a rank sends rows, and the bytes of everything that it sends."""
    count = size = 0
    for equation, times in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name == "ppermute":
            for variable in equation.outvars:
                count += times * (len(variable.aval.shape) == 2)
                size += times * variable.aval.size * variable.aval.dtype.itemsize
    return count, size


def processes(size: int, folder: Path, work: str) -> list[Any]:
    """What each of `size` processes of `gloo_rank.py` wrote after doing `work` together."""
    script = Path(__file__).with_name("gloo_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), work, str(rank), str(size), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(said)
    return [np.load(folder / f"{rank}.npz") for rank in range(size)]
