"""The decoupled step: the loss sees the whole batch, the encoders hold one micro-batch at a time.

    pass 1    encode each micro-batch and keep its rows, nothing else              lax.scan
    pass 2    the loss of all rows, with the gradient of every row                 nibs, tile by tile
    pass 3    encode each micro-batch again and pull its rows' gradients back      lax.scan over vjp

What it returns is what `jax.value_and_grad` of the one-batch loss returns, a pure function of (params, batch) to be
jitted, also inside a `shard_map`; it costs one more forward. Rows that do not fill a micro-batch make a shorter
last one: nothing is padded, and no encoder sees a row twice. Parameter gradients gather in float32 or wider, and
leave in the parameters' dtypes; over ranks they are summed once, after the last micro-batch.

Random keys are replayed: micro-batch i of the queries gets `fold_in(fold_in(key, 0), i)` in both passes, of the keys
`fold_in(fold_in(key, 1), i)`. An encoder that draws from anywhere else would be differentiated at other rows than
the loss saw; so each row of pass 3 is compared with that of pass 1, and a stray is an error, or NaN in a trace.

Inputs that lie in host memory (`pinned_host`) are fetched by the micro-batch; `offload=True` lets rows and their
gradients wait there too while the encoders run. The loss itself has them on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nibs.arrays import describe
from nibs.errors import InvalidInput
from nibs_jax.ring import varies, vary

__all__ = ["decoupled_step"]

TOLERANCE = 0.03  # of a row's length: far above rounding, in half precision too, and far below a dropout of 1 %
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def decoupled_step(
    encode_queries: Callable[..., Any],
    encode_keys: Callable[..., Any] | None,
    loss: Callable[..., Any],
    *,
    micro_batch: int | tuple[int, int] = 256,
    offload: bool = False,
    has_aux: bool = False,
    tolerance: float = TOLERANCE,
) -> Callable[..., Any]:
    """Make `step(params, batch, key=None) -> (value, gradients)`, for `jax.jit`; nothing is normalised.

    encode_queries, encode_keys: `(params, inputs)`, or `(params, inputs, key)` where a key is given, to rows `[b, d]`;
        one function may be both. encode_keys None: the batch's second part is rows already, of a frozen tower.
    loss: `(params, queries, keys, *rest)` to a scalar, or with has_aux to `(scalar, aux)`; in it, call nibs.
    batch: `(query_inputs, key_inputs, *rest)`; inputs are arrays, or trees of arrays, `[n, ...]` and `[m, ...]`.
    micro_batch: rows encoded at once; two numbers where the sides differ.
    offload: rows and their gradients wait in host memory between the passes.
    tolerance: how far a row may be off, in parts of its length, when it is encoded again.

    value is the loss, or `(loss, aux)`; gradients are those of params, as `jax.value_and_grad` gives them. Inside a
    `shard_map` pass the ring's axis to nibs in `loss`; the gradients of replicated params are then complete.
    """
    for name, given in (("encode_queries", encode_queries), ("encode_keys", encode_keys), ("loss", loss)):
        if not callable(given) and not (given is None and name == "encode_keys"):
            raise InvalidInput(f"decoupled_step({name}=...) is {describe(given)}: expected a function.")
    sizes = micro_batch if isinstance(micro_batch, tuple) else (micro_batch, micro_batch)
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise InvalidInput(f"decoupled_step(micro_batch={micro_batch!r}): expected a number of rows, or two, above 0.")
    if not tolerance > 0:
        raise InvalidInput(f"decoupled_step(tolerance={tolerance!r}): expected a number above 0.")

    def step(params: Any, batch: tuple[Any, ...], key: Any = None) -> tuple[Any, Any]:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise InvalidInput(f"batch is {describe(batch)}: expected (query_inputs, key_inputs, ...).")
        inputs, rest = batch[:2], batch[2:]
        over = frozenset().union(*(varies(leaf) for leaf in jax.tree.leaves((batch, key))))
        mine = vary(over, params)  # so that their gradients are this rank's shares, summed once at the end
        encoders = [("encode_queries", encode_queries, 0), ("encode_keys", encode_keys, 1)]
        sides = [Side(*one, sizes[one[2]], inputs[one[2]], key) for one in encoders if one[1] is not None]
        rows = [side.encode(mine) for side in sides]
        given = rows if len(rows) == 2 else [*rows, vary(over, inputs[1])]

        def of_all(params: Any, *encoded: Any) -> Any:
            return loss(params, *encoded, *given[len(encoded) :], *rest)

        wanted = tuple(range(len(rows) + 1))
        value, (gradients, *cached) = jax.value_and_grad(of_all, wanted, has_aux=has_aux)(params, *rows)
        if offload:
            rows, cached = jax.device_put((rows, cached), HOST)
        shares, strays = jax.tree.map(_zeros, mine), []
        for side, encoded, gradient in zip(sides, rows, cached, strict=True):
            shares, stray = side.pull(mine, shares, encoded, gradient, tolerance)
            strays.append(lax.psum(stray, tuple(sorted(varies(stray)))) if varies(stray) else stray)
        gradients = jax.tree.map(_completed, gradients, params, shares)
        return _judged(value, gradients, sides, strays)

    return step


class Side:
    """One encoder with its inputs, cut into micro-batches."""

    def __init__(self, name: str, encoder: Any, number: int, size: int, inputs: Any, key: Any) -> None:
        self.name, self.encoder, self.inputs = name, encoder, inputs
        lengths = {leaf.shape[0] if getattr(leaf, "ndim", 0) else None for leaf in jax.tree.leaves(inputs)}
        if len(lengths) != 1 or None in lengths:
            found = ", ".join(describe(leaf) for leaf in jax.tree.leaves(inputs)) or "nothing"
            raise InvalidInput(f"the inputs of {name} are {found}: expected arrays of one length, their rows first.")
        self.rows = lengths.pop()
        self.size, self.whole = size, self.rows // size
        self.last = self.rows - self.whole * size
        self.key = None if key is None else jax.random.fold_in(key, number)

    def micro_batch(self, index: Any, size: int) -> tuple[Any, ...]:
        """What the encoder is given beside its parameters; fetched where it lies in host memory."""
        inputs = jax.tree.map(lambda leaf: _fetched(_cut(leaf, index * self.size, size)), self.inputs)
        return (inputs,) if self.key is None else (inputs, jax.random.fold_in(self.key, index))

    def encode(self, params: Any) -> Any:
        """`[n, d]`: all rows."""
        found = []
        if self.whole:
            _, rows = lax.scan(
                lambda _, index: (None, self.encoder(params, *self.micro_batch(index, self.size))),
                None,
                jnp.arange(self.whole),
            )
            found.append(rows.reshape(-1, *rows.shape[2:]))
        if self.last or not self.whole:
            found.append(self.encoder(params, *self.micro_batch(self.whole, self.last)))
        for rows in found:
            if rows.ndim != 2:
                raise InvalidInput(f"{self.name} gave {describe(rows)}: expected rows [b, d].")
        return found[0] if len(found) == 1 else jnp.concatenate(found)

    def pull(self, params: Any, shares: Any, encoded: Any, gradient: Any, tolerance: float) -> tuple[Any, Any]:
        """`shares` with this side's part of the parameters' gradients, and how many rows came back elsewhere."""

        def one(state: Any, index: Any, size: int) -> Any:
            shares, stray = state
            given = self.micro_batch(index, size)
            rows, pullback = jax.vjp(lambda params: self.encoder(params, *given), params)
            mine, before = (_fetched(_cut(array, index * self.size, size)) for array in (gradient, encoded))
            (part,) = pullback(mine)
            shares = jax.tree.map(lambda share, new: share + new.astype(share.dtype), shares, part)
            wide = before.astype(jnp.promote_types(before.dtype, jnp.float32))
            apart = jnp.linalg.norm(rows - wide, axis=1) > tolerance * jnp.linalg.norm(wide, axis=1)
            return shares, stray + apart.sum(dtype=jnp.int32)

        state = shares, vary(varies(encoded), jnp.zeros((), jnp.int32))
        if self.whole:
            indices = jnp.arange(self.whole)
            state, _ = lax.scan(lambda state, index: (one(state, index, self.size), None), state, indices)
        if self.last:
            state = one(state, self.whole, self.last)
        return state  # type: ignore[no-any-return]


def _cut(array: Any, begin: Any, size: int) -> Any:
    return lax.dynamic_slice_in_dim(array, begin, size)


def _fetched(array: Any) -> Any:
    """On the device, wherever it was."""
    return jax.device_put(array, DEVICE) if getattr(jax.typeof(array), "memory_space", DEVICE) == HOST else array


def _zeros(leaf: Any) -> Any:
    """Where gradients of a parameter gather."""
    return vary(varies(leaf), jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)))


def _completed(direct: Any, leaf: Any, share: Any) -> Any:
    """One parameter's gradient: the encoders' part, summed over the ranks that it is replicated on, and the loss's."""
    over = tuple(sorted(varies(share) - varies(leaf)))
    whole = lax.psum(share, over) if over else share
    return (whole + direct.astype(share.dtype)).astype(leaf.dtype)


def _judged(value: Any, gradients: Any, sides: list[Side], strays: list[Any]) -> tuple[Any, Any]:
    """The answer; where rows came back elsewhere an error, or NaN in a trace."""
    for side, stray in zip(sides, strays, strict=True):
        if not isinstance(stray, jax.core.Tracer) and stray > 0:
            raise InvalidInput(
                f"{int(stray)} of {side.rows} rows of {side.name} changed when they were encoded again, so that the "
                "gradient would be of other rows than the loss saw. Draw random numbers from the key that the encoder "
                "is given, step(params, batch, key), or name a larger tolerance= if so much is rounding."
            )
    spoilt = sum(strays) > 0
    loss, *aux = value if isinstance(value, tuple) else (value,)
    loss = jnp.where(spoilt, jnp.nan, loss)
    gradients = jax.tree.map(lambda leaf: jnp.where(spoilt, jnp.nan, leaf).astype(leaf.dtype), gradients)
    return ((loss, *aux) if aux else loss), gradients
