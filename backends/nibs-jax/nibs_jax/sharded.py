"""Globally sharded arrays: `ring="data"` outside of any `shard_map`, where nibs makes its own.

The caller sees whole arrays, `[n, d]` over all devices, and targets are rows of the whole. Rows that do not
divide by the ranks are padded with absent ones and cut off again. The mesh is that of the arrays, or the one
set by `jax.set_mesh`; without either the call is refused. Refused as well: a positive on another rank than
its query, for the ring keeps designated pairs at home.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from nibs.arrays import is_array
from nibs.errors import InvalidInput
from nibs.request import Request
from nibs.spec import Gradients, Stats
from nibs_jax.ring import axis_names, manual

__all__ = ["loss_and_grad_over", "loss_over", "mesh_of"]

ROWS = ("queries", "keys", "targets", "query_ids", "key_ids", "query_mask", "key_mask", "weights")
OF_KEYS = ("keys", "key_ids", "key_mask")
FIGURES = ("count", "top1", "mean_positive", "mean_negative", "mean_lse", "hardest_negative")


def mesh_of(request: Request) -> Any:
    """The mesh to ring over where the call stands outside of a `shard_map`; None where there is no such need.

    Raises InvalidInput where the ring's axes are nowhere to be found.
    """
    if request.ring is None:
        return None
    axes = axis_names(request.ring)
    if manual(axes):
        return None
    found = []
    sharding = None if isinstance(request.queries, jax.core.Tracer) else request.queries.sharding
    for mesh in (getattr(sharding, "mesh", None), jax.sharding.get_abstract_mesh(), _mesh_of_type(request.queries)):
        if mesh is not None and set(axes) <= set(mesh.axis_names):
            return mesh
        found.extend(() if mesh is None else mesh.axis_names)
    here = f"the mesh here has {', '.join(sorted(set(found)))}" if found else "there is no mesh here"
    raise InvalidInput(
        f"ring={request.ring!r}: {here}. Call it inside jax.shard_map over a mesh with that axis, or with arrays that "
        "are sharded over one, or under jax.set_mesh(mesh)."
    )


def _mesh_of_type(array: Any) -> Any:
    return getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)


class Split:
    """A request cut over the ranks of a mesh: what goes in, and what comes out."""

    def __init__(self, mesh: Any, request: Request) -> None:
        self.mesh, self.request = mesh, request
        self.axes = axis_names(request.ring)
        self.size = 1
        for axis in self.axes:
            self.size *= mesh.shape[axis]
        n, m = request.n, request.m
        diagonal = request.targets is None and request.objective.same_id != "positive"
        if diagonal and n != m:  # else query i and key i would lie on different ranks
            n = m
        self.n, self.m = (max(1, -(-rows // self.size)) * self.size for rows in (n, m))  # XLA shards no empty array
        self.rows = PartitionSpec(self.axes)
        self.names = [name for name in (*ROWS, "scale", "bias") if is_array(getattr(request, name))]
        for name, length, given in (("query_mask", self.n, request.n), ("key_mask", self.m, request.m)):
            if length != given and name not in self.names:
                self.names.append(name)

    def arguments(self) -> dict[str, Any]:
        """The whole arrays, padded."""
        found = {}
        for name in self.names:
            value = getattr(self.request, name)
            if name in ROWS:
                length = self.m if name in OF_KEYS else self.n
                given = self.request.m if name in OF_KEYS else self.request.n
                if value is None:
                    value = jnp.ones(given, bool)
                if length != given:
                    value = jnp.pad(value, ((0, length - given), *((0, 0),) * (value.ndim - 1)))
                if name == "targets":
                    value = value if length == given else value.at[given:].set(-1)
                    self._check(value)
            found[name] = value
        return found

    def _check(self, targets: Any) -> None:
        """Positives must be at home; where values cannot be looked at, those that are not become NaN."""
        if isinstance(targets, jax.core.Tracer):
            return
        home = jnp.arange(self.n) // (self.n // self.size)
        away = (targets >= 0) & (targets // max(1, self.m // self.size) != home)
        if bool(away.any()):
            row = int(jnp.argmax(away))
            raise InvalidInput(
                f"targets[{row}] = {int(targets[row])} is a key of rank {int(targets[row]) // (self.m // self.size)}, "
                f"and query {row} is on rank {int(home[row])} of {self.size}: expected designated pairs on one rank. "
                "Order the rows so that they are."
            )

    def local(self, given: dict[str, Any]) -> Request:
        """This rank's own request, inside the `shard_map`."""
        n, m = self.n // self.size, self.m // self.size
        given = dict(given)
        if "targets" in given:
            targets = given["targets"]
            begin = lax.axis_index(self.axes) * m
            here = (targets >= begin) & (targets < begin + m)
            given["targets"] = jnp.where(here, targets - begin, jnp.where(targets == -1, -1, -2))  # -2: a bad row
        return replace(self.request, n=n, m=m, ring=self.axes, **given)

    def over(self, work: Callable[[dict[str, Any]], Any], out: Any) -> Any:
        """`work` on every rank."""
        inside = {name: self.rows if name in ROWS else PartitionSpec() for name in self.names}
        run = jax.jit(jax.shard_map(work, mesh=self.mesh, in_specs=(inside,), out_specs=out, axis_names=set(self.axes)))
        arguments = self.arguments()
        if AxisType.Explicit in self.mesh.axis_types:  # where shardings are part of the types, they must be said
            arguments = {name: jax.sharding.reshard(value, inside[name]) for name, value in arguments.items()}
        return run(arguments)

    def stats_out(self, found: list[Any]) -> tuple[Callable[[Stats], Any], Any]:
        """How statistics leave the `shard_map`, and where to: `found` keeps the plan, which is no array."""

        def leave(stats: Stats) -> Any:
            found.append(stats.plan)
            return [getattr(stats, name) for name in FIGURES], stats.query_lse, stats.key_lse

        return leave, (PartitionSpec(), self.rows, self.rows)

    def stats_of(self, left: Any, found: list[Any]) -> Stats:
        figures, query_lse, key_lse = left
        values = dict(zip(FIGURES, figures, strict=True))
        if not isinstance(values["count"], jax.core.Tracer):
            values = {
                name: None if value is None else int(value) if name == "count" else float(value)
                for name, value in values.items()
            }
        query_lse = None if query_lse is None else query_lse[: self.request.n]
        key_lse = None if key_lse is None else key_lse[: self.request.m]
        return Stats(**values, query_lse=query_lse, key_lse=key_lse, plan=found[0])


def loss_over(mesh: Any, request: Request, loss: Callable[[Request], Any]) -> Any:
    """`loss` of whole arrays, each rank with its own part."""
    split, plans = Split(mesh, request), []  # type: tuple[Split, list[Any]]
    leave, stats_spec = split.stats_out(plans)
    where = split.rows if request.reduction == "none" else PartitionSpec()

    def work(given: dict[str, Any]) -> Any:
        result = loss(split.local(given))
        return (result[0], leave(result[1])) if request.stats else result

    result = split.over(work, (where, stats_spec) if request.stats else where)
    value, left = result if request.stats else (result, None)
    value = value[: request.n] if request.reduction == "none" else value
    return (value, split.stats_of(left, plans)) if request.stats else value


def loss_and_grad_over(mesh: Any, request: Request, loss_and_grad: Callable[[Request], Any]) -> Any:
    """`loss_and_grad` of whole arrays, each rank with its own part."""
    split, plans = Split(mesh, request), []  # type: tuple[Split, list[Any]]
    leave, stats_spec = split.stats_out(plans)
    everywhere = PartitionSpec()

    def work(given: dict[str, Any]) -> Any:
        loss, gradients, *stats = loss_and_grad(split.local(given))
        four = (gradients.queries, gradients.keys, gradients.scale, gradients.bias)
        return (loss, four, leave(stats[0]) if stats else None)

    wants = request.wants
    out = (
        everywhere,
        tuple(
            spec if wants(name) else None
            for name, spec in (
                ("queries", split.rows),
                ("keys", split.rows),
                ("scale", everywhere),
                ("bias", everywhere),
            )
        ),
        stats_spec if request.stats else None,
    )
    loss, (queries, keys, scale, bias), left = split.over(work, out)
    gradients = Gradients(
        queries=None if queries is None else queries[: request.n],
        keys=None if keys is None else keys[: request.m],
        scale=scale,
        bias=bias,
    )
    return (loss, gradients, split.stats_of(left, plans)) if request.stats else (loss, gradients)
