"""The modules behind an encoder, what wraps them over ranks, and what the ranks of a decoupled step tell each other.

    DDP      silent (`no_sync`) until the last backward, in which each parameter is reduced once
    FSDP2    reduces each micro-batch, for unreduced gradients would be whole ones; its forwards are collective, so
             ranks run equally many micro-batches, empty ones where they have no more
    none     gradients are the caller's to reduce; a ring of the loss is all that the ranks share

Before the backward that synchronises the ranks say that they are ready, or why not: an encoder that fails on one of
them is an error on all, and no rank has reduced anything.
"""

from __future__ import annotations

import functools
import inspect
import json
import types
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from nibs.errors import InvalidInput, RingError, Unsupported
from nibs.ring import WORDS, Ring, Solo

__all__ = ["Ranks", "modules_behind"]


def modules_behind(encoder: Any) -> list[nn.Module]:
    """The modules that a callable is or refers to: itself, its `self`, closures, partial arguments, globals."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()

    def look(value: Any, depth: int) -> None:
        if id(value) in seen or depth > 4:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif isinstance(value, functools.partial):
            for one in (value.func, *value.args, *value.keywords.values()):
                look(one, depth + 1)
        elif inspect.ismethod(value):
            look(value.__self__, depth + 1)
            look(value.__func__, depth + 1)
        elif inspect.isfunction(value):
            for one in (*_referred(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                look(one, depth + 1)
            for name in ("__wrapped__", "_torchdynamo_orig_callable"):
                look(getattr(value, name, None), depth + 1)
        elif isinstance(value, (list, tuple)):
            for one in value:
                look(one, depth + 1)
        elif isinstance(value, dict):
            for one in value.values():
                look(one, depth + 1)
        elif not isinstance(value, (type, types.ModuleType, Tensor)) and not inspect.isbuiltin(value):
            for one in list(getattr(value, "__dict__", {}).values()):  # towers of a trainer or a namespace
                look(one, depth + 1)

    look(encoder, 0)
    return list(found.values())


def _referred(function: types.FunctionType) -> list[Any]:
    """What a function's closure and globals give it, and the functions and comprehensions within it."""
    found = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not bound yet
            found.append(cell.cell_contents)
    codes = [function.__code__]
    for code in codes:
        found += [function.__globals__[name] for name in code.co_names if name in function.__globals__]
        codes += [one for one in code.co_consts if isinstance(one, types.CodeType)]
    return found


def submodules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """All of them and all within, each once."""
    found: dict[int, nn.Module] = {}
    for module in modules:
        for one in module.modules():
            found[id(one)] = one
    return list(found.values())


class Ranks:
    """What wraps the encoders' modules, and the ring over which their ranks agree.

    ring: of the loss, or given; None: that of the wrapper, and no ring at all without one.
    """

    def __init__(self, modules: Iterable[nn.Module], ring: Ring | None) -> None:
        every = submodules(modules)
        ddp = nn.parallel.DistributedDataParallel
        self.replicated: list[Any] = [module for module in every if isinstance(module, ddp)]
        self.sharded = any(_is_sharded(module) for module in every)
        for module in every:
            if type(module).__name__ == "FullyShardedDataParallel":
                raise Unsupported("a decoupled step over FullyShardedDataParallel: shard with fully_shard (FSDP2).")
            if isinstance(module, ddp) and getattr(module, "static_graph", False):
                raise Unsupported(
                    "a decoupled step over DistributedDataParallel(static_graph=True): a step runs many forwards and "
                    "backwards, of which one reduces. Leave static_graph out."
                )
        if ring is None and (self.replicated or self.sharded):
            from nibs_torch.ring import as_ring

            ring = (
                as_ring(self.replicated[0].process_group) if self.replicated else as_ring(torch.distributed.group.WORLD)
            )
        self.ring: Ring = Solo() if ring is None else ring

    @property
    def several(self) -> bool:
        return self.ring.size > 1

    def settle(self) -> None:
        """What the first forwards of DDP exchange, now and in one order: ranks may differ in which comes first.

        Where there is such a thing, all ranks say first that they are there for it.
        """
        grad = torch.is_grad_enabled()
        if any(one.will_sync_module_buffers() or (grad and not one._has_rebuilt_buckets) for one in self.replicated):
            self.ready()
        for module in self.replicated:
            if grad and module.reducer._rebuild_buckets():
                module._has_rebuilt_buckets = True
            if module.will_sync_module_buffers():
                module._sync_buffers()
                module.require_forward_param_sync = False

    @contextmanager
    def silent(self) -> Iterator[None]:
        """No reduction by DDP within."""
        with ExitStack() as stack:
            for module in self.replicated:
                stack.enter_context(module.no_sync())
            yield

    def arm(self, roots: list[Tensor]) -> None:
        """Let DDP reduce in the backward that follows, whose roots these are.

        Its own forwards would arm it one by one, before anybody knows whether the backward comes, and each for its own
        outputs alone; armed and not followed by a backward, it would be of no use any more.
        """
        for module in self.replicated:
            if module.require_backward_grad_sync:
                module.require_forward_param_sync = True
                module.reducer.prepare_for_backward(roots if module.find_unused_parameters else [])

    def agree_on(self, counts: dict[str, int | None]) -> dict[str, int]:
        """The largest number of micro-batches of each side, where ranks must run equally many; else this rank's own."""
        if not (self.sharded and self.several):
            return {side: 0 for side in counts}
        unknown = [side for side, count in counts.items() if count is None]
        words: dict[str, Any] = {"counts": counts}
        if unknown:
            words = {"invalid": f"InvalidInput: {unknown[0]} have no len(), and FSDP2's ranks must run equally many"}
        every = self._exchange(words)
        if unknown:
            raise InvalidInput(
                f"{unknown[0]}: an iterable without len() under FSDP2, whose ranks must run equally many "
                "micro-batches: give it __len__, or pass a list."
            )
        return {side: max(words["counts"][side] for words in every) for side in counts}

    def ready(self) -> None:
        """Everything is in place for a collective, here and on all ranks. Raises RingError."""
        if self.several:
            self._exchange({"ready": True})

    @contextmanager
    def telling(self, *, collective: bool = False) -> Iterator[None]:
        """Around work that the others wait for in `ready`: an error here is said there, and raised here.

        collective: the others may stand in the middle of a collective by now, where nothing can be said.
        """
        if not self.several:
            yield
            return
        try:
            yield
        except RingError:
            raise
        except BaseException as error:
            if getattr(error, "told", False):  # a call of the loss has, on a ring over the same ranks
                raise
            name = type(error).__name__
            lost = lost_peer(error)
            if lost or collective or not isinstance(error, Exception) or self.ring.dead is not None:
                found = self.ring.die(
                    f"rank {self.ring.rank} of {self.ring.size} raised {name} in a decoupled step: {error}"
                )
                if lost:
                    raise found from error
            else:
                self.ring.exchange(json.dumps({"invalid": f"{name}: {error}"[: WORDS // 8]}))
            raise

    def _exchange(self, words: dict[str, Any]) -> list[dict[str, Any]]:
        every = [json.loads(text) for text in self.ring.exchange(json.dumps(words))]
        refused = [(rank, said["invalid"]) for rank, said in enumerate(every) if "invalid" in said]
        if refused and "invalid" not in words:
            raise RingError(
                "; ".join(f"rank {rank} of {self.ring.size} cannot go on: {why}" for rank, why in refused)
                + ". No gradient was reduced, and .grad is as it was."
            )
        return every


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed, and not this rank's own work."""
    kinds = tuple(
        kind
        for name in ("DistError", "DistBackendError")
        if isinstance(kind := getattr(torch.distributed, name, None), type)
    )
    if isinstance(error, kinds):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "nccl", "connection closed by peer")
    )


def _is_sharded(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)
