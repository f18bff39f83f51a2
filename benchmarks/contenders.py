"""Who is measured: nibs by each of its backends, the dense losses, and every peer that can be installed.

A contender turns one batch into a `Step`: a function for the forward alone and one for loss and gradients. It must
compute the very loss of its column (`InfoNCE`: symmetric, mean; `Sigmoid`: SigLIP's, mean), in the batch's dtype, with
the gradients of both sides, and of the scale where it has one. What it cannot do here it says by raising: the first
line of its error stands in the table in place of figures. Nothing is installed by this file, and nobody is patched.

    pip install inf-cl==1.2.1 memeff==0.3.1 siglip-kernel==0.1.2 cut-cross-entropy pykeops sentence-transformers triton
    pip install --no-deps open_clip_torch     # its loss.py is read by path, so that torchvision is not needed
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "CONTENDERS",
    "Batch",
    "Contender",
    "Loss",
    "Step",
    "cut_cross_entropy",
    "inf_cl",
    "memeff",
    "siglip_kernel",
]

Loss = Callable[[Any, Any, Any, Any], Any]
"""Of queries, keys, scale and bias."""


@dataclass(frozen=True)
class Batch:
    """Pairs to be compared: queries and keys `[n, d]`, unit rows, float32 holding exact values of `dtype`."""

    queries: np.ndarray
    keys: np.ndarray
    dtype: str
    device: str
    scale: float
    bias: float
    memory: str | None = None

    @property
    def n(self) -> int:
        """Rows of either side."""
        return len(self.queries)


@dataclass(frozen=True)
class Step:
    """forward: the loss. both: the loss, gradients computed too. gradients: those of queries and keys, after `both`."""

    forward: Callable[[], float]
    both: Callable[[], float]
    gradients: Callable[[], list[np.ndarray]]


@dataclass(frozen=True)
class Contender:
    """name: as the table shows it. objective: its column. kind: ours, dense or peer. note: what a reader must know."""

    name: str
    objective: str
    kind: str
    make: Callable[[Batch], Step]
    note: str = ""


# -- PyTorch --------------------------------------------------------------------------------------


def torch_step(batch: Batch, loss: Callable[..., Any], *, of_scale: bool = True) -> Step:
    """A step of a differentiable function `loss(queries, keys, scale, bias)`, whose scale may be a float."""
    import torch

    dtype = getattr(torch, batch.dtype)
    rows = [torch.from_numpy(side).to(batch.device, dtype).requires_grad_() for side in (batch.queries, batch.keys)]
    scalars = [torch.tensor(value, device=batch.device) for value in (batch.scale, batch.bias)]
    scale = scalars[0].requires_grad_() if of_scale else batch.scale
    bias = scalars[1].requires_grad_()

    def forward() -> float:
        with torch.no_grad():
            return float(loss(*rows, scale, bias))

    def both() -> float:
        for tensor in (*rows, *scalars):
            tensor.grad = None
        value = loss(*rows, scale, bias)
        value.backward()
        return float(value.detach())

    return Step(forward, both, lambda: [side.grad.double().cpu().numpy() for side in rows])


def dense_infonce(queries: Any, keys: Any, scale: Any, bias: Any) -> Any:
    """CLIP's loss as everybody writes it."""
    import torch

    logits = scale.to(queries.dtype) * queries @ keys.T
    positives = torch.arange(len(logits), device=logits.device)
    entropy = torch.nn.functional.cross_entropy
    return (entropy(logits, positives) + entropy(logits.T, positives)) / 2


def dense_sigmoid(queries: Any, keys: Any, scale: Any, bias: Any) -> Any:
    """SigLIP's loss as its paper writes it."""
    import torch

    logits = scale.to(queries.dtype) * queries @ keys.T + bias.to(queries.dtype)
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -torch.nn.functional.logsigmoid(signs * logits).sum() / len(logits)


DENSE = {"InfoNCE": dense_infonce, "Sigmoid": dense_sigmoid}


def dense(objective: str) -> Callable[[Batch], Step]:
    """The dense loss, eager."""
    return lambda batch: torch_step(batch, DENSE[objective])


def compiled(objective: str) -> Callable[[Batch], Step]:
    """The dense loss through torch.compile."""

    def make(batch: Batch) -> Step:
        import torch

        torch._dynamo.config.recompile_limit = 64  # sizes, dtypes and the forward alone: each needs a program
        return torch_step(batch, torch.compile(DENSE[objective]))

    return make


def nibs_torch(objective: str) -> Callable[[Batch], Step]:
    """Nibs over PyTorch, through autograd."""

    def make(batch: Batch) -> Step:
        import nibs

        asked = getattr(nibs, objective)()

        def loss(queries: Any, keys: Any, scale: Any, bias: Any) -> Any:
            extra = {"bias": bias} if objective == "Sigmoid" else {}
            return nibs.contrastive_loss(queries, keys, scale=scale, objective=asked, memory=batch.memory, **extra)

        return torch_step(batch, loss)

    return make


# -- NumPy and JAX --------------------------------------------------------------------------------


def nibs_numpy(objective: str) -> Callable[[Batch], Step]:
    """Nibs over NumPy."""

    def make(batch: Batch) -> Step:
        import nibs
        from nibs.registry import registry

        if batch.device != "cpu":
            raise RuntimeError("NumPy computes on CPUs")
        backend = registry.load("numpy")
        rows = [backend.asarray(side, dtype=batch.dtype) for side in (batch.queries, batch.keys)]
        asked = getattr(nibs, objective)()
        options = {"scale": batch.scale, "bias": batch.bias, "objective": asked, "memory": batch.memory}
        found: list[Any] = []

        def both() -> float:
            loss, gradients = nibs.contrastive_loss_and_grad(*rows, wrt=("queries", "keys", "scale"), **options)
            found[:] = [gradients.queries, gradients.keys]
            return float(loss)

        return Step(
            lambda: float(nibs.contrastive_loss(*rows, **options)),
            both,
            lambda: [np.asarray(one).astype(np.float64) for one in found],
        )

    return make


def nibs_jax(objective: str) -> Callable[[Batch], Step]:
    """Nibs over JAX, under jit."""

    def make(batch: Batch) -> Step:
        import jax
        import jax.numpy as jnp

        import nibs

        device = jax.devices("cpu" if batch.device == "cpu" else "gpu")[0]
        rows = [jax.device_put(jnp.asarray(side, batch.dtype), device) for side in (batch.queries, batch.keys)]
        asked = getattr(nibs, objective)()

        def loss(queries: Any, keys: Any, scale: Any) -> Any:
            options = {"scale": scale, "bias": batch.bias, "objective": asked, "memory": batch.memory}
            return nibs.contrastive_loss(queries, keys, **options)

        forward, both = jax.jit(loss), jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        scale = jnp.float32(batch.scale)
        found: list[Any] = []

        def step() -> float:
            value, gradients = jax.block_until_ready(both(*rows, scale))
            found[:] = gradients[:2]
            return float(value)

        return Step(
            lambda: float(forward(*rows, scale)), step, lambda: [np.asarray(one.astype(jnp.float32)) for one in found]
        )

    return make


# -- peers ----------------------------------------------------------------------------------------


def open_clip(objective: str) -> Callable[[Batch], Step]:
    """open_clip's ClipLoss and SigLipLoss, from its loss.py alone."""

    def make(batch: Batch) -> Step:
        found = importlib.util.find_spec("open_clip")
        if found is None or found.origin is None:
            raise ModuleNotFoundError("No module named 'open_clip'")
        spec = importlib.util.spec_from_file_location("open_clip_loss", Path(found.origin).parent / "loss.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
        spec.loader.exec_module(module)
        if objective == "InfoNCE":
            loss = module.ClipLoss()
            return torch_step(batch, lambda queries, keys, scale, bias: loss(queries, keys, scale.to(queries.dtype)))
        loss = module.SigLipLoss()
        return torch_step(
            batch,
            lambda queries, keys, scale, bias: loss(queries, keys, scale.to(queries.dtype), bias.to(queries.dtype)),
        )

    return make


def peer(make: Callable[[str, float], Loss], *, of_scale: bool = True) -> Callable[[Batch], Step]:
    """A loss of tensors, made for a device and a scale."""
    return lambda batch: torch_step(batch, make(batch.device, batch.scale), of_scale=of_scale)


def inf_cl(device: str, scale: float) -> Loss:
    """Inf-CL's fused loss, once for each direction."""
    from inf_cl import cal_flash_loss

    def loss(queries: Any, keys: Any, scale: Any, bias: Any) -> Any:
        width = queries.shape[1]
        options = {"scale": scale, "head_dim": 256 if width % 256 == 0 else width}
        rows = cal_flash_loss(queries, keys, **options).mean()
        return (rows + cal_flash_loss(keys, queries, **options).mean()) / 2

    return loss


def memeff(device: str, scale: float) -> Loss:
    """Memeff's loss; stable=False, or its gradient is not that of its loss. It has none of the scale."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=1 / scale, normalized_inputs=True, stable=False)
    return lambda queries, keys, scale, bias: loss(queries, keys)


def siglip_kernel(device: str, scale: float) -> Loss:
    """siglip-kernel's fused loss by the kernel that it picks."""
    from siglip_kernel import fused_siglip_loss

    return lambda queries, keys, scale, bias: fused_siglip_loss(queries, keys, scale.log(), bias, backend="auto")


def cut_cross_entropy(device: str, scale: float) -> Loss:
    """Apple's linear cross entropy, once for each direction, with no small gradient left out; its kernels on a GPU, its
    compiled twin elsewhere.
    """
    import torch
    from cut_cross_entropy import linear_cross_entropy

    torch._dynamo.config.recompile_limit = 64
    how = "cce" if device.startswith("cuda") else "torch_compile"

    def loss(queries: Any, keys: Any, scale: Any, bias: Any) -> Any:
        positives = torch.arange(len(queries), device=queries.device)
        scaled = queries * scale.to(queries.dtype)
        rows = linear_cross_entropy(scaled, keys, positives, impl=how, filter_eps=None)
        return (rows + linear_cross_entropy(keys, scaled, positives, impl=how, filter_eps=None)) / 2

    return loss


def keops(batch: Batch) -> Step:
    """KeOps' symbolic log-sum-exp, over rows and over columns."""
    from pykeops.torch import LazyTensor

    def loss(queries: Any, keys: Any, scale: Any, bias: Any) -> Any:
        scaled = queries * scale.to(queries.dtype)
        logits = LazyTensor(scaled[:, None, :]) | LazyTensor(keys[None, :, :])
        lse = logits.logsumexp(dim=1).sum() + logits.logsumexp(dim=0).sum()
        return lse / (2 * len(queries)) - (scaled * keys).sum() / len(queries)

    return torch_step(batch, loss)


def sentence_transformers(batch: Batch) -> Step:
    """The cached ranking loss of sentence-transformers on given embeddings, both directions, 512 rows at a time."""
    import torch
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer import losses

    nobody = torch.nn.Sequential(torch.nn.Identity())  # its encoder, which is not measured
    cached = losses.CachedMultipleNegativesRankingLoss(
        nobody,
        scale=batch.scale,
        similarity_fct=util.dot_score,
        mini_batch_size=512,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    dtype = getattr(torch, batch.dtype)
    rows = [torch.from_numpy(side).to(batch.device, dtype).requires_grad_() for side in (batch.queries, batch.keys)]

    def forward() -> float:
        with torch.no_grad():
            return float(cached.calculate_loss([[rows[0]], [rows[1]]]))

    def both() -> float:
        for tensor in rows:
            tensor.grad = None
        return float(cached.calculate_loss([[rows[0]], [rows[1]]], with_backward=True))

    return Step(forward, both, lambda: [side.grad.double().cpu().numpy() for side in rows])


CONTENDERS = [
    *[
        Contender(name, objective, kind, make(objective))
        for objective in ("InfoNCE", "Sigmoid")
        for name, kind, make in (
            ("dense torch", "dense", dense),
            ("dense torch.compile", "dense", compiled),
            ("open_clip", "peer", open_clip),
            ("nibs torch", "ours", nibs_torch),
            ("nibs numpy", "ours", nibs_numpy),
            ("nibs jax", "ours", nibs_jax),
        )
    ],
    Contender("inf-cl", "InfoNCE", "peer", peer(inf_cl)),
    Contender("memeff", "InfoNCE", "peer", peer(memeff, of_scale=False), "no gradient of the scale"),
    Contender(
        "cut-cross-entropy", "InfoNCE", "peer", peer(cut_cross_entropy), "its torch_compile twin where there is no GPU"
    ),
    Contender("sentence-transformers", "InfoNCE", "peer", sentence_transformers, "no gradient of the scale"),
    Contender("pykeops", "InfoNCE", "peer", keops),
    Contender("siglip-kernel", "Sigmoid", "peer", peer(siglip_kernel)),
]
