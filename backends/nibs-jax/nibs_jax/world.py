"""Ranks for the conformance suite: forced host devices in a process of their own, one program for all.

The suite's worlds are many programs that meet on a ring; a `shard_map` is one program over many devices. So
its job `solve_shard` is played here by one call: every rank's rows are padded to the longest with absent
ones, stacked, sharded, and cut again. Jobs about ranks that disagree or drop out have no counterpart, for one
program cannot disagree with itself; they raise `NotOneProgram`, which `plugin.py` declares as a deviation.
"""

from __future__ import annotations

import multiprocessing
import os
from functools import cache
from types import TracebackType
from typing import Any

__all__ = ["DeviceWorld", "NotOneProgram"]

DEVICES = 8
FIGURES = ("count", "top1", "mean_positive", "mean_negative", "mean_lse", "hardest_negative")


class NotOneProgram(Exception):
    """A job in which ranks do different things."""


class DeviceWorld:
    """`size` host devices in a process of their own, for many jobs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.process: Any = None
        self.pipe: Any = None

    def __enter__(self) -> DeviceWorld:
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, self.size, dict(os.environ)), daemon=True)
        self.process.start()
        there.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def run(self, job: str, *arguments: Any, timeout: float = 300.0) -> list[Any]:
        """What the job gives on each rank, in rank order."""
        if not job.endswith(":solve_shard"):
            raise NotOneProgram(
                f"{job}: the ranks of a shard_map are one program, and can neither disagree nor drop out."
            )
        self.pipe.send(arguments)
        if not self.pipe.poll(timeout):
            raise TimeoutError(f"{job}: no answer in {timeout:g} s.")
        answer: Any = self.pipe.recv()
        return answer if isinstance(answer, list) else [answer] * self.size


def _serve(pipe: Any, size: int, environment: dict[str, str]) -> None:
    """The process: bring up the devices, then answer until the pipe closes."""
    os.environ.update(environment)
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_enable_x64", True)
    while True:
        try:
            arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: Any = _solve(size, *arguments)
        except Exception as error:
            answer = error
        try:
            pipe.send(answer)
        except OSError:
            return
        except Exception as error:  # what cannot be pickled
            pipe.send(RuntimeError(f"{type(answer).__name__}: {answer} ({error})"))


def _solve(size: int, name: str, device: str, shards: Any, dtype: str, options: dict[str, Any]) -> list[Any]:
    """All ranks' shares of one call."""
    import jax
    import numpy as np

    import nibs
    from nibs_conformance.checks import INPUTS, Subject
    from nibs_conformance.shards import Share

    options = dict(options)
    tiles, pull = options.pop("tiles", None), options.pop("pull", False)
    scalars, scales = options.pop("scalars", "float"), options.pop("scales", None)
    subject = Subject(name, device)
    whole, sizes = padded(shards)
    real = np.float64 if dtype == "float64" else np.float32
    given = subject.arguments(whole, dtype, scalars="[1]" if pull else scalars)
    common = {key: given.pop(key) for key in ("objective", "reduction")} | subject.finest(dtype) | options
    if scales is not None:
        given["scale"] = scales[0]
    if tiles is not None:
        n, m, d = len(whole.queries) // size, len(whole.keys) // size, whole.queries.shape[1]
        common["plan"] = nibs.plan(
            n, m, d, dtype, objective=whole.objective, ring_size=size, query_tile=tiles[0], key_tile=tiles[1]
        )
    for key in ("scale", "bias"):
        if isinstance(given[key], float):
            given[key] = jax.numpy.asarray(given[key], real)
    upstream = np.ones((), real)
    if whole.reduction == "none" and pull:
        upstream = np.ones(len(whole.queries), real) if whole.upstream is None else whole.upstream.astype(real)
    call, where = program(size, tuple(given), tuple(sorted(common.items())), pull)
    loss, gradients, stats = call(*jax.device_put((given, upstream), where))
    stats = {key: None if value is None else subject.numpy(value) for key, value in stats.items()}
    loss = subject.numpy(loss)
    found = {} if gradients is None else {key: subject.numpy(one) for key, one in zip(INPUTS, gradients, strict=True)}

    def part(values: Any, rank: int, length: int) -> Any:
        begin = rank * (len(values) // size)
        return values[begin : begin + length]

    shares = []
    for rank, (n, m) in enumerate(sizes):
        mine = {key: found[key] for key in ("scale", "bias") if key in found}
        for key, length in (("queries", n), ("keys", m)):
            if key in found:
                mine[key] = part(found[key], rank, length)
        shares.append(Share(loss if loss.ndim == 0 else part(loss, rank, n), mine, stats, None))
    return shares


@cache
def program(size: int, names: tuple[str, ...], options: tuple[tuple[str, Any], ...], pull: bool) -> tuple[Any, Any]:
    """`(arguments, upstream) -> (loss, gradients, figures)` over all ranks, jitted, and the shardings it takes.

    Made once for the same names and options, so that cases which differ in their numbers alone are compiled once.
    """
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import nibs
    from nibs_conformance.checks import INPUTS

    common = dict(options)
    mesh = jax.make_mesh((size,), ("ranks",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])
    rows, everywhere = PartitionSpec("ranks"), PartitionSpec()
    values = rows if common["reduction"] == "none" else everywhere
    ins = {name: everywhere if name in ("scale", "bias") else rows for name in names}, values if pull else everywhere
    four: Any = (rows, rows, everywhere, everywhere)

    def pulled(given: Any, upstream: Any) -> Any:
        rest = {key: value for key, value in given.items() if key not in INPUTS}

        def loss(queries: Any, keys: Any, scale: Any, bias: Any) -> Any:
            return nibs.contrastive_loss(queries, keys, scale=scale, bias=bias, ring="ranks", **rest, **common)

        value, back = jax.vjp(loss, *(given[key] for key in INPUTS))
        return value, back(upstream), {}

    def single(given: Any, upstream: Any) -> Any:
        return nibs.contrastive_loss(ring="ranks", **given, **common), None, {}

    def direct(given: Any, upstream: Any) -> Any:
        loss, gradients, *stats = nibs.contrastive_loss_and_grad(ring="ranks", **given, **common)
        figures = {name: getattr(stats[0], name) for name in FIGURES} if stats else {}
        return loss, tuple(getattr(gradients, key) for key in INPUTS), figures

    if pull:
        work, out = pulled, (values, four, everywhere)
    elif common["reduction"] == "none":
        work, out = single, (values, None, everywhere)
    else:
        work, out = direct, (everywhere, four, everywhere)
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), ins)
    return jax.jit(jax.shard_map(work, mesh=mesh, in_specs=ins, out_specs=out)), where


def padded(shards: Any) -> tuple[Any, list[tuple[int, int]]]:
    """One problem of equal shards in rank order, absent rows at the end of each; and how long they were.

    Targets stay local, as inside a `shard_map`.
    """
    from dataclasses import replace

    import numpy as np

    sizes = [(len(shard.queries), len(shard.keys)) for shard in shards]
    n, m = max(size[0] for size in sizes), max(size[1] for size in sizes)
    first = shards[0]
    diagonal = first.targets is None and first.objective.same_id != "positive"
    if diagonal or getattr(first.objective, "exclude_self", False):
        m = max(n, m)
        n = m if getattr(first.objective, "exclude_self", False) else n
    ragged = any(size != (n, m) for size in sizes)

    def joined(name: str, length: int, fill: Any) -> Any:
        parts = [getattr(shard, name) for shard in shards]
        if parts[0] is None:
            return None
        return np.concatenate(
            [np.concatenate([one, np.full((length - len(one), *one.shape[1:]), fill, one.dtype)]) for one in parts]
        )

    def mask(name: str, lengths: list[int], length: int) -> Any:
        parts = [getattr(shard, name) for shard in shards]
        if parts[0] is None and not ragged:
            return None
        parts = [np.ones(rows, bool) if one is None else one for one, rows in zip(parts, lengths, strict=True)]
        return np.concatenate([np.concatenate([one, np.zeros(length - len(one), bool)]) for one in parts])

    whole = replace(
        first,
        queries=joined("queries", n, np.nan),  # what is absent is never read
        keys=joined("keys", m, np.nan),
        targets=joined("targets", n, -1),
        query_ids=joined("query_ids", n, 0),
        key_ids=joined("key_ids", m, 0),
        query_mask=mask("query_mask", [size[0] for size in sizes], n),
        key_mask=mask("key_mask", [size[1] for size in sizes], m),
        weights=joined("weights", n, 0),
        upstream=joined("upstream", n, 0),
    )
    return whole, sizes
