"""A small two-tower model trained on the ranks of a ring, and the same model trained in one piece.

Every rank returns its parameters after the last step, and those of the single device, which it computes
itself from the same seed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import nibs
import nibs_torch

STEPS = 4
FEATURES, WIDTH = 10, 6


class Towers(nn.Module):
    """Two encoders and the learnable scale and bias, of shape [1] for FSDP2's sake."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, WIDTH))
        self.right = nn.Linear(FEATURES, WIDTH)
        self.log_scale = nn.Parameter(torch.full((1,), 1.0))
        self.bias = nn.Parameter(torch.full((1,), -0.5))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        queries = functional.normalize(self.left(left), dim=-1)
        keys = functional.normalize(self.right(right), dim=-1)
        return queries, keys, self.log_scale.exp(), self.bias + 0


def towers(dtype: torch.dtype) -> Towers:
    torch.manual_seed(7)
    return Towers().to(dtype)


def data(rows: int, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both sides' features, ids and weights of the whole batch of one step."""
    g = torch.Generator().manual_seed(100 + step)
    left, right = (torch.randn(rows, FEATURES, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    ids = torch.randint(0, max(rows // 2, 1), (rows,), generator=g)
    weights = torch.randint(1, 4, (rows,), generator=g).to(dtype)
    return left, right, ids, weights


OBJECTIVES = {
    "clip": nibs.InfoNCE(),
    "siglip": nibs.Sigmoid(),
    "weights": nibs.InfoNCE("query_to_key"),
    "duplicates": nibs.InfoNCE(same_id="exclude"),
    "supcon": nibs.InfoNCE(same_id="positive"),
}


def options(name: str, ids: Tensor, weights: Tensor) -> dict[str, Any]:
    """What goes with each call of one kind of training."""
    if name == "weights":
        return {"weights": weights}
    return {} if OBJECTIVES[name].same_id == "negative" else {"query_ids": ids, "key_ids": ids}


def alone(rows: int, name: str, dtype: torch.dtype, autocast: bool = False) -> tuple[list[Tensor], list[float]]:
    """The single device: parameters after the last step, and the losses."""
    model, losses = towers(dtype), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        left, right, ids, weights = data(rows, step, dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            queries, keys, scale, bias = model(left, right)
            given = options(name, ids, weights)
            loss = nibs.contrastive_loss(queries, keys, scale=scale, bias=bias, objective=OBJECTIVES[name], **given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return [parameter.detach().clone() for parameter in model.parameters()], losses


def train(
    ring: Any, rank: int, size: int, sizes: tuple[int, ...], name: str, how: str, settings: tuple[str, ...] = ()
) -> tuple[float, float, dict[str, float]]:
    """The largest differences from the single device of parameters and of losses, and how far parameters moved.

    how: `"ddp"`, `"fsdp"`, or a loop of one's own for a value of grad_reduction: `"none"`, `"sum"`, `"mean"`.
    settings: any of `"compile"`, `"autocast"`, `"float32"`, `"mesh"`, `"function"`.
    """
    dtype = torch.float32 if {"float32", "autocast"} & set(settings) else torch.float64
    autocast = "autocast" in settings
    expected, losses = alone(sum(sizes), name, dtype, autocast)
    start = [parameter.detach().clone() for parameter in towers(dtype).parameters()]
    plain = towers(dtype)
    model: Any = plain
    handle: Any = ring
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(plain)
    elif how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (size,))
        handle = mesh if "mesh" in settings else ring
        fully_shard(plain, mesh=mesh)
    wrapped = how in ("ddp", "fsdp")
    fixed = {"objective": OBJECTIVES[name], "ring": handle}
    criterion: Any
    if "function" in settings:
        fixed["grad_reduction"] = "mean" if wrapped else how

        def criterion(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, **given: Any) -> Tensor:
            return nibs.contrastive_loss(queries, keys, scale=scale, bias=bias, **fixed, **given)
    elif wrapped:
        criterion = nibs_torch.ContrastiveLoss(**fixed)  # whose default is what these wrappers do
    else:
        criterion = nibs_torch.ContrastiveLoss(**fixed, grad_reduction=how)
    if "compile" in settings:
        torch._dynamo.reset()
        criterion = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen = []
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for step in range(STEPS):
        left, right, ids, weights = (one[mine] for one in data(sum(sizes), step, dtype))
        given = options(name, ids, weights)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            queries, keys, scale, bias = model(left, right)
            loss = criterion(queries, keys, scale, bias, **given)
        optimizer.zero_grad()
        loss.backward()
        if not wrapped:
            reduce(plain, how, size)
        optimizer.step()
        seen.append(float(loss.detach()))
    found = [_whole(parameter) for parameter in model.parameters()]
    apart = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
    names = [name for name, _ in plain.named_parameters()]
    moved = {name: float((one - other).abs().max()) for name, one, other in zip(names, expected, start, strict=True)}
    return apart, max(abs(one - other) for one, other in zip(seen, losses, strict=True)), moved


def reduce(model: Towers, how: str, size: int) -> None:
    """What a hand-written loop does with gradients: with "none" scale and bias are complete and stay as they are."""
    for name, parameter in model.named_parameters():
        if how == "none" and name in ("log_scale", "bias"):
            continue
        dist.all_reduce(parameter.grad)
        if how == "mean":
            parameter.grad /= size  # type: ignore[operator]


def _whole(parameter: Any) -> Tensor:
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value
