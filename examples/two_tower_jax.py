"""The model of two_tower.py in plain JAX, and its training with optax: one step is one jitted function.

Pictures come as `[n, 3, 32, 32]` and text features as `[n, text_width]`, tensors of PyTorch or arrays, and embeddings
leave as tensors: what draws, judges and shows is one for both frameworks. Batch normalisation looks at the whole
batch here, and keeps its running means beside the parameters.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from emoji_task import pair_loss
from jax import lax
from two_tower import LARGEST_SCALE

MOMENTUM = 0.1  # of the running means, as in PyTorch
EPSILON = 1e-5

Tree = dict[str, Any]


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """PyTorch's start of a layer."""
    return jax.random.uniform(key, shape, minval=-1, maxval=1) / fan_in**0.5


@partial(jax.jit, static_argnums=(1, 2))
def initial(key: jax.Array, text_width: int, dim: int, channels: int = 48, scale: float = 14.0) -> tuple[Tree, Tree]:
    """Return the parameters of both towers and the scale, and the running means of the norms."""
    wide = 2 * channels
    layers = {
        "patches": (4, 4, 3, channels),
        "narrower": (3, 3, channels, wide),
        "deeper": (3, 3, wide, wide),
        "picture": (4 * wide, dim),
        "hidden": (text_width, 2 * dim),
        "text": (2 * dim, dim),
    }
    # A dtype of its own: a weak one would have the second step compiled again.
    parameters: Tree = {"log_scale": jnp.asarray(np.log(scale), jnp.float32)}
    running: Tree = {}
    for (name, shape), one in zip(layers.items(), jax.random.split(key, 2 * len(layers)).reshape(-1, 2), strict=True):
        fan_in, out = int(np.prod(shape[:-1])), shape[-1]
        parameters[name] = {"weight": uniform(one[0], shape, fan_in)}
        if len(shape) == 4:
            parameters[name] |= {"gain": jnp.ones(out), "shift": jnp.zeros(out)}
            running[name] = {"mean": jnp.zeros(out), "variance": jnp.ones(out)}
        else:
            parameters[name]["bias"] = uniform(one[1], (out,), fan_in)
    parameters["norm"] = {"gain": jnp.ones(2 * dim), "shift": jnp.zeros(2 * dim)}
    return parameters, running


def linear(layer: Tree, rows: jax.Array) -> jax.Array:
    """Return `[n, out]`."""
    return rows @ layer["weight"] + layer["bias"]


def dropout(key: jax.Array | None, share: float, rows: jax.Array) -> jax.Array:
    """Return the rows with a share of them dropped; all of them without a key."""
    if key is None:
        return rows
    return jnp.where(jax.random.bernoulli(key, 1 - share, rows.shape), rows / (1 - share), 0)


def convolution(layer: Tree, running: Tree, pictures: jax.Array, stride: int, *, train: bool) -> tuple[jax.Array, Tree]:
    """A convolution with its batch norm and its bend; the running means after it. `[n, height, width, channels]`."""
    size = layer["weight"].shape[0]
    padding = 0 if size == stride else size // 2
    rows = lax.conv_general_dilated(
        pictures,
        layer["weight"],
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    mean, variance = running["mean"], running["variance"]
    if train:
        count = rows.size // rows.shape[-1]
        mean, variance = rows.mean((0, 1, 2)), rows.var((0, 1, 2))
        seen = {"mean": mean, "variance": variance * count / (count - 1)}
        running = jax.tree.map(lambda old, new: old + MOMENTUM * (new - old), running, lax.stop_gradient(seen))
    rows = (rows - mean) * lax.rsqrt(variance + EPSILON) * layer["gain"] + layer["shift"]
    return jax.nn.relu(rows), running


def normalised(rows: jax.Array) -> jax.Array:
    """Return rows of length 1."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def picture_tower(
    parameters: Tree, running: Tree, pictures: jax.Array, key: jax.Array | None = None
) -> tuple[jax.Array, Tree]:
    """`[n, 3, 32, 32]` to rows `[n, dim]` of length 1, and the running means; with a key, as in training."""
    rows, after = pictures.transpose(0, 2, 3, 1), {}
    for name, stride in (("patches", 4), ("narrower", 2), ("deeper", 1)):
        rows, after[name] = convolution(parameters[name], running[name], rows, stride, train=key is not None)
    n, side, _, channels = rows.shape
    rows = rows.reshape(n, 2, side // 2, 2, side // 2, channels).mean((2, 4)).reshape(n, -1)
    return normalised(linear(parameters["picture"], dropout(key, 0.1, rows))), after


def text_tower(parameters: Tree, texts: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """`[n, text_width]` to rows `[n, dim]` of length 1; with a key, as in training."""
    first, second = (None, None) if key is None else jax.random.split(key)
    # A row of length 1 over thousands of slots is tiny beside what layers are initialised for.
    rows = linear(parameters["hidden"], dropout(first, 0.3, texts * (texts.shape[1] ** 0.5 / 8)))
    mean, variance = rows.mean(1, keepdims=True), rows.var(1, keepdims=True)
    rows = (rows - mean) * lax.rsqrt(variance + EPSILON) * parameters["norm"]["gain"] + parameters["norm"]["shift"]
    rows = dropout(second, 0.1, jax.nn.gelu(rows, approximate=False))
    return normalised(linear(parameters["text"], rows))


def learned_scale(parameters: Tree) -> jax.Array:
    """Return the factor on cosines, at most 100 as in CLIP."""
    return jnp.minimum(jnp.exp(parameters["log_scale"]), LARGEST_SCALE)


# AdamW, its rate left to the step: matrices decay, vectors do not, and neither does the scale.
ADAM = optax.chain(
    optax.scale_by_adam(b1=0.9, b2=0.98),
    optax.add_decayed_weights(0.1, mask=partial(jax.tree.map, lambda leaf: leaf.ndim > 1)),
)


@partial(jax.jit, donate_argnums=(0, 1, 2))
def step(
    parameters: Tree,
    running: Tree,
    state: Any,
    pictures: jax.Array,
    texts: jax.Array,
    ids: jax.Array,
    key: Any,
    rate: Any,
) -> tuple[Tree, Tree, Any, jax.Array]:
    """One step: towers, nibs's loss, its gradients and AdamW, compiled together. Returns the loss as well."""

    def loss(parameters: Tree) -> tuple[jax.Array, Tree]:
        of_pictures, of_texts = jax.random.split(key)
        queries, after = picture_tower(parameters, running, pictures, of_pictures)
        keys = text_tower(parameters, texts, of_texts)
        return pair_loss(queries, keys, learned_scale(parameters), ids), after

    (value, running), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
    updates, state = ADAM.update(gradients, state, parameters)
    updates["log_scale"] *= 10  # a logarithm that must move fast
    return optax.apply_updates(parameters, jax.tree.map(lambda update: -rate * update, updates)), running, state, value


class TwoTower:
    """The model with the state of its training: what the demo trains, and asks for embeddings."""

    def __init__(self, text_width: int, dim: int, rate: float, seed: int = 0) -> None:
        self.rate = rate
        start, self.key = jax.random.split(jax.random.key(seed))
        self.parameters, self.running = initial(start, text_width, dim)
        self.state = ADAM.init(self.parameters)
        self._pictures = jax.jit(lambda *given: picture_tower(*given)[0])
        self._texts = jax.jit(text_tower)

    def learn(self, pictures: Any, texts: Any, ids: Any, share: float) -> float:
        """Take one step on the pairs of a batch at a share of the rate, and return its loss."""
        self.key, key = jax.random.split(self.key)
        arrays = (jnp.asarray(np.asarray(one)) for one in (pictures, texts, ids.int()))
        state = self.parameters, self.running, self.state
        self.parameters, self.running, self.state, value = step(*state, *arrays, key, share * self.rate)
        return float(value)

    def encode_pictures(self, pictures: Any) -> torch.Tensor:
        """Return `[n, dim]`, normalised."""
        return tensor(self._pictures(self.parameters, self.running, np.asarray(pictures)))

    def encode_texts(self, texts: Any) -> torch.Tensor:
        """Return `[n, dim]`, normalised."""
        return tensor(self._texts(self.parameters, np.asarray(texts)))

    def scale(self) -> torch.Tensor:
        """Return the learned factor on cosines."""
        return tensor(learned_scale(self.parameters))

    def train(self) -> None:
        """Nothing to do: how a tower runs is an argument of each call here."""

    eval = train


def tensor(array: jax.Array) -> torch.Tensor:
    """Return a copy as a tensor."""
    return torch.from_numpy(np.array(array))
