"""Decoupled steps on the ranks of a ring, beside the same model trained in one piece on one device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from training_jobs import OBJECTIVES, STEPS, Towers, alone, data, options, reduce, towers

import nibs
import nibs_torch
from nibs.errors import InvalidInput, RingError


class Sides(Towers):
    """The same model, one side at a time; scale and bias come with the queries."""

    def forward(self, left: Tensor | None = None, right: Tensor | None = None) -> Any:  # type: ignore[override]
        if left is not None:
            return functional.normalize(self.left(left), dim=-1), self.log_scale.exp(), self.bias + 0
        return functional.normalize(self.right(right), dim=-1)


def sides(dtype: torch.dtype = torch.float64) -> Sides:
    model = Sides().to(dtype)
    model.load_state_dict(towers(dtype).state_dict())
    return model


def train(
    ring: Any, rank: int, size: int, sizes: tuple[int, ...], name: str, how: str, settings: tuple[str, ...] = ()
) -> tuple[float, float, dict[str, float], dict[str, int]]:
    """As `training_jobs.train`; and how often each parameter was reduced in all steps together.

    how: `"ddp"`, `"fsdp"`, or a value of grad_reduction. settings: any of `"unused"` (parameters that nobody uses,
    found by DDP), `"two"` (a DDP module for each tower), `"lazy"` (iterables), `"accumulate"` (two steps to one
    reduction), `"host"` (embeddings stay where they are and are fetched).
    """
    accumulate = "accumulate" in settings
    expected, losses = alone(sum(sizes), name, torch.float64)
    start = [parameter.detach().clone() for parameter in towers(torch.float64).parameters()]
    plain = sides()
    reduced: Counter[str] = Counter()
    names = {id(parameter): name for name, parameter in plain.named_parameters()}
    model: Any = plain
    if "unused" in settings:
        plain.register_parameter("unused", nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    if how == "ddp" and "two" in settings:
        plain.left = nn.parallel.DistributedDataParallel(plain.left)
        plain.right = nn.parallel.DistributedDataParallel(plain.right)
        wrapped = [plain.left, plain.right]
    elif how == "ddp":
        model = nn.parallel.DistributedDataParallel(plain, find_unused_parameters="unused" in settings)
        wrapped = [model]
    else:
        wrapped = []
        if how == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (size,))
            fully_shard(plain.left, mesh=mesh)
            fully_shard(plain, mesh=mesh)

    def count(state, bucket):  # DDP reads annotations, and these would be strings
        for parameter in bucket.parameters():
            reduced[names.get(id(parameter), "unused")] += 1
        work = dist.all_reduce(bucket.buffer().div_(size), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    for one in wrapped:
        one.register_comm_hook(None, count)
    criterion = nibs_torch.ContrastiveLoss(
        OBJECTIVES[name], ring=ring, grad_reduction=how if how in ("none", "sum", "mean") else "mean"
    )
    step = nibs_torch.DecoupledStep(
        lambda left: model(left=left), lambda right: model(right=right), loss=criterion, micro_batch=(3, 2)
    )
    if "host" in settings:
        fetched = step
        step = lambda *inputs, **given: fetched(*inputs, device="cpu", **given)  # noqa: E731
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.shape != (3,)], lr=0.5)
    seen = []
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for number in range(STEPS):
        left, right, ids, weights = (one[mine] for one in data(sum(sizes), number, torch.float64))
        inputs: tuple[Any, Any] = left, right
        if "lazy" in settings:
            inputs = left.split(3), right.split(2)
        optimizer.zero_grad()
        for turn in range(2 if accumulate else 1):
            with unreduced(model) if accumulate and not turn else nullcontext():
                seen.append(
                    float(step(*map(list, inputs) if "lazy" in settings else inputs, **options(name, ids, weights)))
                )
        if accumulate:
            seen.pop()
            for parameter in model.parameters():
                parameter.grad /= 2  # type: ignore[operator]
        if how not in ("ddp", "fsdp"):
            reduce(plain, how, size)
        if "two" in settings:  # scale and bias are nobody's, and complete but for what DDP would have done
            for parameter in (plain.log_scale, plain.bias):
                dist.all_reduce(parameter.grad)
                parameter.grad /= size  # type: ignore[operator]
        optimizer.step()
    found = [_whole(parameter) for name, parameter in plain.named_parameters() if name != "unused"]
    apart = max(float((one - other).abs().max()) for one, other in zip(found, order(expected, plain), strict=True))
    truth = {
        key: float((one - other).abs().max())
        for (key, _), one, other in zip(towers(torch.float64).named_parameters(), expected, start, strict=True)
    }
    return apart, max(abs(one - other) for one, other in zip(seen, losses, strict=True)), truth, dict(reduced)


@contextmanager
def unreduced(model: Any) -> Iterator[None]:
    """Gradients add up over steps before they are reduced."""
    if hasattr(model, "no_sync"):
        with model.no_sync():
            yield
        return
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def order(expected: list[Tensor], plain: nn.Module) -> list[Tensor]:
    """The single device's parameters in the order of this model's, whose towers may have been wrapped."""
    known = dict(zip([name for name, _ in towers(torch.float64).named_parameters()], expected, strict=True))
    return [known[name.replace(".module", "")] for name, _ in plain.named_parameters() if name != "unused"]


def _whole(parameter: Any) -> Tensor:
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def frozen(ring: Any, rank: int, size: int, together: bool) -> tuple[float, int]:
    """One tower is frozen, inside the DDP module of both (`together`) or beside that of the other.

    How far gradients are from those of one device, and how often the frozen tower ran.
    """
    sizes = (9, 4)
    left, right, _, _ = data(sum(sizes), 0, torch.float64)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    runs: list[Tensor] = []

    def made() -> Sides:
        model = sides()
        model.right.requires_grad_(False)
        return model

    alone, plain = made(), made()
    rows, scale, bias = alone(left=left)
    nibs.contrastive_loss(rows, alone(right=right), scale=scale, bias=bias, objective=OBJECTIVES["siglip"]).backward()
    plain.right.register_forward_pre_hook(lambda module, inputs: runs.append(inputs[0]))
    model: Any = plain
    if together:
        model = nn.parallel.DistributedDataParallel(plain)
    else:
        plain.left = nn.parallel.DistributedDataParallel(plain.left)
    encoders = (lambda left: model(left=left)), (lambda right: model(right=right))
    loss = nibs_torch.ContrastiveLoss(OBJECTIVES["siglip"], ring=ring)
    nibs_torch.DecoupledStep(*encoders, loss=loss, micro_batch=3)(left[mine], right[mine])
    apart = [
        float((one.grad - other.grad).abs().max())  # type: ignore[operator]
        for one, other in zip(plain.left.parameters(), alone.left.parameters(), strict=True)
    ]
    return max(apart), len(runs)


def fail(ring: Any, rank: int, size: int, how: str, when: int, held: bool) -> tuple[str, bool, bool]:
    """An encoder of rank 1 raises in its call `when`: each rank's error; whether `.grad` and the ring are as before."""
    plain = sides()
    model: Any = nn.parallel.DistributedDataParallel(plain) if how == "ddp" else plain
    calls = []

    def encode(right: Tensor) -> Tensor:
        calls.append(right)
        if rank == 1 and len(calls) == when:
            raise ArithmeticError("the encoder of rank 1 has had enough")
        return model(right=right)

    def loss(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return nibs.contrastive_loss(queries, keys, scale=scale, ring=dist.group.WORLD)

    criterion = loss if how == "function" else nibs_torch.ContrastiveLoss(ring=None if how == "local" else ring)
    step = nibs_torch.DecoupledStep(lambda left: model(left=left), encode, loss=criterion, micro_batch=2, ring=ring)
    if held:
        for parameter in plain.parameters():
            parameter.grad = torch.ones_like(parameter)
    left, right, _, _ = data(5, 0, torch.float64)
    try:
        step(left, right)
        said = "nothing"
    except (ArithmeticError, RingError) as error:
        said = f"{type(error).__name__}: {error}"
    same = all(bool((one.grad == 1).all()) if held else one.grad is None for one in plain.parameters())
    step(left, right)  # the ring has not suffered
    return said, same, ring.dead is None


def unfit(ring: Any, rank: int, size: int) -> tuple[str, bool]:
    """Rank 1 has no inputs, where DDP's first forward exchanges buffers: what is said, and whether the ring lives."""
    plain = sides()
    plain.register_buffer("steps", torch.zeros(1))
    model = nn.parallel.DistributedDataParallel(plain)
    loss = nibs_torch.ContrastiveLoss(ring=ring)
    step = nibs_torch.DecoupledStep(
        lambda left: model(left=left), lambda right: model(right=right), loss=loss, micro_batch=2
    )
    left, right, _, _ = data(5, 0, torch.float64)
    said = []
    for _ in range(2):
        step(left, right)
        try:
            step(left, right if rank == 0 else 5)
        except (InvalidInput, RingError) as error:
            said.append(f"{type(error).__name__}: {error}")
    assert said[0] == said[1]
    return said[0], ring.dead is None


def fail_late(ring: Any, rank: int, size: int, how: str) -> str:
    """Rank 1 fails in the backward that synchronises (`"ddp"`), or in a collective forward (`"fsdp"`)."""
    plain = sides()
    model: Any = plain
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(plain, process_group=ring.group)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(plain, mesh=init_device_mesh("cpu", (size,)))
    backwards = []

    def explode(gradient: Tensor) -> Tensor:
        backwards.append(gradient)
        if rank == 1 and len(backwards) == 3:
            raise ArithmeticError("late")
        return gradient

    def encode(right: Tensor) -> Tensor:
        if how == "fsdp" and rank == 1:
            raise ArithmeticError("in front of a collective")
        rows = model(right=right)
        if rows.requires_grad:
            rows.register_hook(explode)
        return rows

    step = nibs_torch.DecoupledStep(
        lambda left: model(left=left), encode, loss=nibs_torch.ContrastiveLoss(ring=ring), micro_batch=2
    )
    left, right, _, _ = data(6, 0, torch.float64)
    try:
        step(left, right)
    except (ArithmeticError, RingError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def uncounted(ring: Any, rank: int, size: int) -> str:
    """FSDP2 with an iterable that cannot say how long it is on rank 1."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = sides()
    fully_shard(plain, mesh=init_device_mesh("cpu", (size,)))
    step = nibs_torch.DecoupledStep(lambda left: plain(left=left), lambda right: plain(right=right), inputs="keep")
    left, right, _, _ = data(6, 0, torch.float64)
    try:
        step(iter(left.split(2)) if rank == 1 else [left], [right])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
