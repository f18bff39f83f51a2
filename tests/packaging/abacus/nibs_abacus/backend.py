"""InfoNCE by strips of rows, twice over: once for the lse of rows and columns, once for the gradients.

It refuses an array that it cannot make; what it cannot do it does not claim, and is then never asked for.
"""

import numpy as np

from nibs.errors import InvalidInput
from nibs.spec import Backend, Gradients

STRIP = 2


class Beads(np.ndarray):
    """The array of this framework: NumPy's, under another name, so that nobody else owns it."""


class Abacus(Backend):
    """Works in float64 and rounds once, at the end."""

    def loss(self, request):
        """The loss alone."""
        return self.loss_and_grad(request)[0]

    def loss_and_grad(self, request):
        """The loss and the gradients asked for, equations (1), (2) and (5) of `nibs.spec`."""
        with np.errstate(all="ignore"):
            return self._work(request)

    def _work(self, request):
        queries, keys = (np.asarray(side).astype(np.float64) for side in (request.queries, request.keys))
        scale, bias = (np.float64(np.reshape(value, ())) for value in (request.scale, request.bias))
        rows, columns = request.objective.rows, request.objective.columns
        n, m = request.n, request.m
        strips = [slice(begin, min(begin + STRIP, n)) for begin in range(0, n, STRIP)]
        row_lse, column_lse, positive = np.zeros(n), np.full(m, -np.inf), np.zeros(n)
        for strip in strips:
            logits = scale * (queries[strip] @ keys.T)
            row_lse[strip] = lse(logits, axis=1)
            column_lse = np.logaddexp(column_lse, lse(logits, axis=0))
            positive[strip] = np.diagonal(logits[:, strip])

        # Anchors are the rows with a positive: all queries, and the first n keys.
        count = max(n, 1) if request.reduction == "mean" else 1
        share = 1 / (count * (rows + columns))
        loss = 0 * scale + 0 * bias
        if rows:
            loss += share * (row_lse - positive).sum()
        if columns:
            loss += share * (column_lse[:n] - positive).sum()

        into, onto, product = np.zeros_like(queries), np.zeros_like(keys), 0 * scale
        for strip in strips:
            products = queries[strip] @ keys.T
            weight = np.zeros_like(products)
            diagonal = np.arange(strip.stop - strip.start), np.arange(strip.start, strip.stop)
            if rows:
                weight += np.exp(scale * products - row_lse[strip, None])
                weight[diagonal] -= 1
            if columns:
                weight[:, :n] += np.exp(scale * products[:, :n] - column_lse[None, :n])
                weight[diagonal] -= 1
            weight *= share
            into[strip] = scale * (weight @ keys)
            onto += scale * (weight.T @ queries[strip])
            product += (weight * products).sum()

        wide = np.float64 if request.dtype == "float64" else np.float32
        found = {"queries": into, "keys": onto, "scale": product, "bias": np.float64(0)}
        gradients = {}
        for name in filter(request.wants, found):
            given = getattr(request, name)
            dtype = given.dtype if isinstance(given, np.ndarray) else wide
            gradients[name] = beads(found[name].reshape(np.shape(given)), dtype)
        return beads(loss, wide), Gradients(**gradients)

    def asarray(self, values, dtype=None, device=None):
        """Beads of the named dtype, or of what came."""
        if device not in (None, "cpu"):
            raise InvalidInput(f"device={device!r}: the abacus stands on the cpu.")
        if dtype == "bfloat16":
            raise InvalidInput("dtype='bfloat16': the abacus has no such beads; expected 'float64' or 'float32'.")
        array = values if isinstance(values, (np.ndarray, np.generic)) else np.from_dlpack(values)
        return beads(array, dtype)

    def to_numpy(self, array):
        """The same numbers under NumPy's own name."""
        return np.asarray(array)

    def arange(self, n, like):
        """Integers like `like`."""
        return beads(np.arange(n), like.dtype)


def beads(values, dtype):
    """Beads of these numbers, the same memory where the dtype is right already."""
    return np.asarray(values, dtype).view(Beads)


def lse(logits, axis):
    """The log-sum-exp along an axis, under its own maximum."""
    top = logits.max(axis=axis, keepdims=True)
    return (top + np.log(np.exp(logits - top).sum(axis=axis, keepdims=True))).squeeze(axis)
