"""A GPU that is not there: whole calls of the fused path on tensors that have a CUDA device, shapes and no values.

    calls(card)     a context in which nibs takes such tensors for real ones; yields every launch of a kernel
    Waited          what an operation raises in it that would make the host wait for the device, or copy to it
    held(card)      the same, but launches are forgotten; yields what tensors on the card hold at most
    Operators       names of PyTorch's operators that would launch a kernel, as they come; kernels' own beside them
    compiled        a launch as Triton would compile it for a card

PyTorch's fake tensors say where an operation would run and what would come of it; two modes over them watch. What waits
for a device is known by name: the value of a scalar, indices of what is not zero, and any copy between host and device
(from memory that is not pinned, both ways wait). So a call that passes here can be captured in a CUDA graph, as far as
operators decide it. A launch is recorded instead of made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nibs_torch import autograd, backend, fused, tracing
from nibs_torch.kernels import tuning

KIB = 1024
CARDS = {
    "sm_80": tuning.Card("an A100", "sm_80", 108, 163 * KIB),
    "sm_89": tuning.Card("a consumer card", "sm_89", 128, 99 * KIB),
    "sm_90": tuning.Card("an H200", "sm_90", 132, 227 * KIB),
    "sm_100": tuning.Card("a B200", "sm_100", 148, 227 * KIB),
    "sm_120": tuning.Card("a newer consumer card", "sm_120", 170, 99 * KIB),
    "gfx942": tuning.Card("an MI300X", "gfx942", 304, 64 * KIB),
}
WAITS = (
    "aten._local_scalar_dense",
    "aten.is_nonzero",
    "aten.equal",
    "aten.nonzero",
    "aten.masked_select",
    "aten.unique_dim",
    "aten._unique2",
    "aten.repeat_interleave.Tensor",
)


class Waited(AssertionError):
    """The host would wait for the device here."""


@dataclass
class Launch:
    """One launch of a kernel: `kernel[grid](*arguments, **named, **options)`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


class Memory(TorchDispatchMode):
    """Counts the bytes of tensors that live on the card: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def now(self) -> int:
        """Bytes of storages that somebody still holds."""
        self.storages = {key: one for key, one in self.storages.items() if not one[0].expired()}
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and one.device.type == "cuda":
                storage = one.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return out


class Operators(TorchDispatchMode):
    """In `seen`, what would be launched: operators, but for views and empty room, and our kernels, by their names.

    launches: the record of `calls`, read as it grows.
    """

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches, self.told, self.seen = launches, 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += [one.name for one in self.launches[self.told :]]
        self.told = len(self.launches)
        returned = [one.alias_info for one in func._schema.returns]
        is_view = any(one is not None and not one.is_write for one in returned)
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not is_view and not name.startswith("empty"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Host(TorchDispatchMode):
    """Raises at what would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        places = {one.device.type for one in given}
        if name.startswith(WAITS) and "cuda" in places:
            raise Waited(f"{name} looks at values")
        moved = {"aten._to_copy.default": kwargs.get("device"), "aten.copy_.default": None}
        if name in moved:
            target = moved[name]
            if len(places | ({torch.device(target).type} if target is not None else set())) > 1:
                raise Waited(f"{name} copies between {sorted(places)} and {target}")
        indices = args[1] if name in ("aten.index.Tensor", "aten.index_put_.default") else ()
        if any(one is not None and one.dtype == torch.bool for one in indices):
            raise Waited(f"{name} counts the elements of a mask")
        if name == "aten.addmm.dtype_out":  # fake tensors do not know it
            return kwargs["out"]
        return func(*args, **kwargs)


class Python(TorchFunctionMode):
    """Indexing and the like, by the operators that they stand for: Python's own want a CUDA library to be there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return indexed(*args)
        if func is torch.Tensor.__setitem__:
            tensor, index, value = args
            if isinstance(index, torch.Tensor):
                # CUDA fills by a mask where a number is assigned, and does not wait.
                assert index.dtype == torch.bool and not isinstance(value, torch.Tensor)
                where = index.reshape(*index.shape, *[1] * (tensor.dim() - index.dim()))
                tensor.masked_fill_(where, value)
            elif isinstance(value, torch.Tensor):
                torch.ops.aten.copy_.default(indexed(tensor, index), value)
            else:
                indexed(tensor, index).fill_(value)
            return None
        return SPELLED.get(func, func)(*args, **(kwargs or {}))


SPELLED = {torch.Tensor.__invert__: torch.bitwise_not, torch.Tensor.copy_: torch.ops.aten.copy_.default}


def indexed(tensor: Any, index: Any) -> Any:
    """`tensor[index]`, for one or several of: slices, numbers, None, `...`, and a tensor as the last."""
    index = index if isinstance(index, tuple) else (index,)
    if index and index[0] is Ellipsis:
        index = (*[slice(None)] * (tensor.dim() - len(index) + 1), *index[1:])
    dim = 0
    for one in index:
        if one is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(one, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, one.start, one.stop, one.step or 1)
        elif isinstance(one, int):
            tensor, dim = tensor.select(dim, one), dim - 1
        else:
            tensor = torch.ops.aten.index.Tensor(tensor, [*[None] * dim, one])
        dim += 1
    return tensor


def step(request: Any, kernels: Any, *, deferred: bool) -> Any:
    """Forward and backward as autograd makes them, but not by it: it has no threads for a GPU that is not there."""
    names, tensors = autograd.travellers(request)
    job = autograd.Job(request.but(dict.fromkeys(names)), names, kernels, deferred)
    loss, saved, _ = kernels.forward(job.filled(tensors), deferred=deferred)
    autograd._gradients(job, tensors, saved, torch.empty_like(loss))
    return loss


@contextmanager
def calls(card: tuning.Card, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Within it, tensors made with `device="cuda"` are fake, nibs serves them as a card's, and PyTorch says that a CUDA
    graph is being captured: so nothing that is fake is kept for other calls either.
    """
    launches: list[Launch] = []

    def record(tiles: Any, kernel: Any, grid: Any, *arguments: Any, config: Any = None, **named: Any) -> None:
        named.update(fused.options_of(config, tiles.card))
        launches.append(Launch(kernel, grid, arguments, named))

    monkeypatch.setattr(tracing, "is_symbolic", lambda tensor: False)
    monkeypatch.setattr(backend, "differentiable_loss", step)
    monkeypatch.setattr(fused, "_too_old", lambda device: None)
    monkeypatch.setattr(fused, "_library_widens", lambda device, dtype: True)
    monkeypatch.setattr(tuning, "card_of", lambda device: card)
    monkeypatch.setattr(tuning, "_cache", dict)
    monkeypatch.setattr(fused.FusedTiles, "_run", record)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(), Host(), Python():
        yield launches


@contextmanager
def held(card: tuning.Card, monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """`calls`, counting memory: a record of launches would keep their arguments alive."""
    with calls(card, monkeypatch), Memory() as memory:
        monkeypatch.setattr(fused.FusedTiles, "_run", lambda *_, **__: None)
        yield memory


class Driver:
    """As much of a driver as Triton asks for when it compiles: which GPU it is for."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # under which Triton keeps what it compiled

    def get_current_stream(self, device: Any) -> int:
        return 0


def compiled(launch: Launch, target: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel that a launch would load on a GPU of this kind, its arguments and options as Triton reads them."""
    from triton.runtime import driver

    with monkeypatch.context() as patch:
        patch.setattr(driver, "_active", Driver(target))
        return launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.named)
