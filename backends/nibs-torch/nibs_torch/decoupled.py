"""The decoupled step: the loss sees the whole batch, the device holds one micro-batch at a time.

    step = DecoupledStep(encode_images, encode_texts, loss=nibs_torch.ContrastiveLoss(), micro_batch=256)
    loss = step(images, texts)          # every parameter's .grad has gained the one-batch gradient

    pass 1   encode each micro-batch without a graph; pool the embeddings
    pass 2   the loss of the pooled embeddings, and its gradient with respect to them
    pass 3   encode each micro-batch again, with a graph, and feed it its rows of that gradient

By the chain rule that is the gradient of the loss over the whole batch, as long as encoding a micro-batch is a function
of its rows. So random states are replayed, buffers set back, batch normalisation refused, and every embedding of pass 3
compared with that of pass 1. The cost is one more forward.

The last micro-batches of both sides go backward together, with scale and bias and whatever else the loss depends on as
further roots: one backward that synchronises, as in a plain step. Until it begins, `.grad` can still be put back.

Source: gradient caching, arXiv 2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nibs.arrays import describe
from nibs.errors import InvalidInput, NotRepeatable, Unsupported
from nibs.ring import Ring
from nibs_torch import microbatches
from nibs_torch.microbatches import Cut, Item, Source, TokenBudget, Walked
from nibs_torch.modules import ContrastiveLoss
from nibs_torch.offload import Pool
from nibs_torch.ranks import Ranks, modules_behind, submodules
from nibs_torch.replay import Buffers, KeptGradients, RandomState

__all__ = ["DecoupledStep"]

ROUNDOFFS = 64
"""How far a row may be off the second time, in units of its norm times the roundoff of the coarsest dtype in play."""

SCALARS = ("scale", "bias", "logit_scale", "logit_bias")
OFFLOADS = (None, "cpu")
INPUTS = ("again", "keep")
BATCH_NORMS = ("refuse", "frozen", "micro_batch")


class DecoupledStep:
    """One training step, the batch of its loss decoupled from the batch of its memory.

    encode_queries, encode_keys: what turns one micro-batch into rows; the same object for tied towers. A tensor is
        passed as it is, a tuple as positional arguments, a dict by name. They return an embedding `[rows, d]`; or
        `(embedding, scale)` or `(embedding, scale, bias)`; or a dict, whose entries are handed to the loss by name:
        tensors `[rows, ...]`, and 0-d ones (or any under the names scale, bias, logit_scale, logit_bias), which must be
        the same for every micro-batch. Scale and bias may come from either side; the queries' go first.
    loss: `loss(queries, keys[, scale[, bias]])`, or by name where encoders return dicts. It returns a scalar; or a
        tuple whose first is one, the rest handed through; or a dict, whose differentiable values are added up. It may
        be any function of the pooled rows, so several losses on one embedding are one function. None:
        `ContrastiveLoss()`.
    micro_batch: rows at a time, or a `TokenBudget`; a pair of these for queries and keys.
    offload: `"cpu"` pools embeddings and their gradients in host memory, pinned where that helps; None on the device.
    inputs: of iterables that yield micro-batches: `"again"` asks them again for the last pass, `"keep"` holds their
        items in host memory instead.
    scaler: a `torch.amp.GradScaler`: gradients come out scaled, the returned loss does not.
    device: where micro-batches are encoded; None: where the encoders' parameters are.
    ring: over which the ranks agree; None: the loss's own, or that of the DDP or FSDP2 module.
    batch_norm: modules that look at their whole batch see only a micro-batch here. `"refuse"` says so; `"frozen"` runs
        them by their running statistics, as `eval()` does, which equals the one-batch step with them frozen;
        `"micro_batch"` lets each normalise its micro-batch, which equals training on micro-batch statistics.
    modules: whose parameters, buffers and wrappers matter. None: those that the encoders and the loss are or refer to.
    tolerance: how far a row may be off when it is encoded again, relative to its norm; None: 64 roundoffs.

    Raises InvalidInput for arguments that are none of these.
    """

    def __init__(
        self,
        encode_queries: Callable[..., Any],
        encode_keys: Callable[..., Any],
        *,
        loss: Callable[..., Any] | None = None,
        micro_batch: int | TokenBudget | tuple[int | TokenBudget, int | TokenBudget] = 256,
        offload: str | None = None,
        inputs: str = "again",
        scaler: Any = None,
        device: Any = None,
        ring: Any = None,
        batch_norm: str = "refuse",
        modules: Iterable[nn.Module] | None = None,
        tolerance: float | None = None,
    ) -> None:
        for name, value in (("encode_queries", encode_queries), ("encode_keys", encode_keys)):
            if not callable(value):
                raise InvalidInput(f"DecoupledStep({name}=...) is {describe(value)}: expected a module or a function.")
        for name, value, choices in (
            ("offload", offload, OFFLOADS),
            ("inputs", inputs, INPUTS),
            ("batch_norm", batch_norm, BATCH_NORMS),
        ):
            if value not in choices:
                raise InvalidInput(f"DecoupledStep({name}={value!r}): expected one of {', '.join(map(repr, choices))}.")
        if loss is not None and not callable(loss):
            raise InvalidInput(
                f"DecoupledStep(loss=...) is {describe(loss)}: expected a function or a module, or None."
            )
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            raise InvalidInput(
                f"DecoupledStep(scaler=...) is {describe(scaler)}: expected a torch.amp.GradScaler, or None."
            )
        if tolerance is not None and not (isinstance(tolerance, (int, float)) and tolerance >= 0):
            raise InvalidInput(f"DecoupledStep(tolerance={tolerance!r}): expected a number >= 0, or None.")
        self.encoders = encode_queries, encode_keys
        self.loss: Callable[..., Any] = ContrastiveLoss() if loss is None else loss
        self.sizes = microbatches.sizes(micro_batch)
        self.offload, self.inputs, self.scaler = offload, inputs, scaler
        self.batch_norm, self.tolerance = batch_norm, tolerance
        self.modules = None if modules is None else list(modules)
        self.device = None if device is None else _device(device)
        self.ring: Ring | None = _ring(ring if ring is not None else getattr(self.loss, "ring", None))

    def __call__(self, query_inputs: Any, key_inputs: Any = None, **per_call: Any) -> Any:
        """What the loss returned, detached; every parameter's `.grad` has gained the gradient of the one batch.

        query_inputs, key_inputs: a batch in one piece (a tensor, or a tuple or dict of tensors `[n, ...]`), which is
            cut by rows; or an iterable that yields micro-batches. Without key_inputs, an iterable that yields pairs
            `(queries' micro-batch, keys' micro-batch)`.
        per_call: handed to the loss, over whole batches: `targets=`, `query_ids=`, `weights=`, ...

        Without gradients (`torch.no_grad()`) it is the loss alone: passes 1 and 2.

        Raises InvalidInput for inputs, encoders or losses that do not fit; Unsupported for batch normalisation that was
        not opted in; NotRepeatable, naming the encoder, where it gives other embeddings the second time; RingError
        where another rank cannot go on; and whatever an encoder or the loss raises. Where it raises before the backward
        that synchronises, every `.grad` is as it was.
        """
        return _Run(self, query_inputs, key_inputs, per_call).result()


@dataclass
class _Outputs:
    """What an encoder returned: rows `[rows, ...]` and scalars by name. named: they were named by the encoder."""

    rows: dict[str, Tensor]
    scalars: dict[str, Any]
    named: bool


@dataclass
class _Side:
    """One side of one step."""

    name: str
    encode: Callable[..., Any]
    modules: list[nn.Module]
    frozen: bool
    source: Source
    dtypes: set[torch.dtype]
    pools: dict[str, Pool] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    named: bool = False
    count: int = 0
    states: list[RandomState] = field(default_factory=list)
    buffers: Buffers | None = None
    leaves: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    alive: bool = True
    """Whether its embeddings have shown to depend on parameters; False skips all but the last micro-batch."""
    last: Item | None = None


class _Run:
    """One call of a step: its passes, in order."""

    def __init__(self, step: DecoupledStep, query_inputs: Any, key_inputs: Any, per_call: dict[str, Any]) -> None:
        self.step, self.per_call = step, per_call
        self.inputs = query_inputs, key_inputs
        found = [modules_behind(encode) for encode in step.encoders]
        others = modules_behind(step.loss)
        if step.modules is not None:
            found, others = [step.modules, step.modules], step.modules
        self.behind = found
        self.modules = submodules([*found[0], *found[1], *others])
        self.parameters = [one for module in self.modules for one in module.parameters(recurse=False)]
        self.device = step.device or next((one.device for one in self.parameters), torch.device("cpu"))
        self.ranks = Ranks([*found[0], *found[1], *others], step.ring)
        self.grads = KeptGradients()
        self.differences: list[tuple[_Side, str, int, Tensor, float]] = []
        self.request_states: dict[tuple[int, int], RandomState] = {}
        self.sides: list[_Side] = []
        self.sources: list[tuple[list[_Side], Source]] = []
        self.extra: list[tuple[Tensor, Tensor]] = []

    def result(self) -> Any:
        ranks = self.ranks
        training = torch.is_grad_enabled()
        with self._norms():
            with ranks.telling():
                self._open()
            counts = ranks.agree_on({side.name: side.source.count() for side in self.sides})
            ranks.settle()
            try:
                with ranks.silent():
                    with ranks.telling(collective=ranks.sharded):
                        self._encode_all(counts)
                    with ranks.telling():
                        returned = self._differentiate(training)
                    after = RandomState(self.device)  # a loss may have drawn, too
                    if training:
                        with ranks.telling(collective=ranks.sharded):
                            self._encode_again()
                            roots, upstream = self._last_forward()
                            self._compare()
                if training:
                    ranks.ready()
                    with ranks.telling(collective=True):
                        self._last_backward(roots, upstream)
                    after.restore()
            except BaseException:
                self._undo()
                raise
        return returned

    # -- before anything is encoded ---------------------------------------------------------------

    def _open(self) -> None:
        """Sources of both sides, and what is refused."""
        step, (first, second) = self.step, self.inputs
        pin = self.device.type in ("cuda", "xpu")
        names = ("queries", "keys")
        if second is None:
            if microbatches.whole(first):
                raise InvalidInput("key_inputs is missing: with one argument, it must yield pairs of micro-batches.")
            pairs = Walked("pairs", _iterable("pairs", first), keep=step.inputs == "keep", pin=pin)
            sources: list[Source] = [pairs, pairs]
        else:
            sources = [
                Cut(name, inputs, size)
                if microbatches.whole(inputs)
                else Walked(name, _iterable(name, inputs), keep=step.inputs == "keep", pin=pin)
                for name, inputs, size in zip(names, (first, second), step.sizes, strict=True)
            ]
        for name, encode, modules, source in zip(names, step.encoders, self.behind, sources, strict=True):
            parameters = [one for module in modules for one in module.parameters()]
            frozen = bool(parameters) and not any(one.requires_grad for one in parameters)
            dtypes = {one.dtype for one in parameters}
            self.sides.append(_Side(name, encode, submodules(modules), frozen, source, dtypes))
        one, other = self.sides
        self.sources = [(self.sides, sources[0])] if second is None else [([one], sources[0]), ([other], sources[1])]

    @contextmanager
    def _norms(self) -> Iterator[None]:
        """Batch normalisation as the caller wants it."""
        policy, stopped = self.step.batch_norm, []
        names = {
            id(module): path for root in (*self.behind[0], *self.behind[1]) for path, module in root.named_modules()
        }
        for module in self.modules:
            if not _looks_at_its_batch(module) or id(module) not in names:
                continue
            where = f"{type(module).__name__} '{names[id(module)]}'"
            if policy == "refuse" or (policy == "frozen" and module.running_mean is None):
                frozen = "batch_norm='frozen' (by running statistics), " if policy == "refuse" else ""
                raise Unsupported(
                    f"{where} normalises by its batch, and a decoupled step shows it one micro-batch at a time: its "
                    f"output would not be that of the whole batch. Pass {frozen}batch_norm='micro_batch' (each "
                    "micro-batch by itself), or use LayerNorm or GroupNorm."
                )
            if policy == "micro_batch" and self.ranks.several and isinstance(module, nn.SyncBatchNorm):
                raise Unsupported(
                    f"{where} over several ranks with batch_norm='micro_batch': use BatchNorm, or 'frozen'."
                )
            if policy == "frozen":
                module.training = False
                stopped.append(module)
        try:
            yield
        finally:
            for module in stopped:
                module.training = True

    # -- pass 1 -----------------------------------------------------------------------------------

    def _encode_all(self, counts: dict[str, int]) -> None:
        for side, number, item in self._visits(first=True, counts=counts):
            side.states.append(RandomState(self.device, side.states[-1] if side.states else None))
            with torch.no_grad():
                outputs = self._encode(side, item)
            for name, rows in outputs.rows.items():
                if number == 0:
                    host = self.step.offload == "cpu"
                    side.pools[name] = Pool(f"{side.name}: {name}", side.source.total, host=host)
                if name not in side.pools:
                    raise InvalidInput(f"{side.name}: '{name}' came with micro-batch {number} only.")
                side.pools[name].add(rows.detach(), item)
            if number == 0:
                side.scalars, side.named = outputs.scalars, outputs.named
                side.scalars = {
                    name: one.detach().clone() if isinstance(one, Tensor) else one for name, one in side.scalars.items()
                }
            side.count = number + 1
        for side in self.sides:
            if not side.count:
                raise InvalidInput(f"{side.name}: no micro-batch at all. Yield an empty one where a rank has no rows.")
        for side in reversed(self.sides):
            if side.buffers is not None:
                side.buffers.reset()

    def _visits(self, *, first: bool, counts: dict[str, int] | None = None) -> Iterator[tuple[_Side, int, Item]]:
        """Every micro-batch of every side in turn; random states before a request as they were the first time."""
        for index, (sides, source) in enumerate(self.sources):
            if not first and all(side.frozen for side in sides):
                continue
            replays = isinstance(source, Walked) and not source.keep
            iterator, number, item = source.walk(), 0, None
            while True:
                if replays and first:
                    self.request_states[index, number] = RandomState(self.device)
                elif replays and (index, number) in self.request_states:
                    self.request_states[index, number].restore()
                following = next(iterator, None)
                if following is None:
                    break
                item = following
                for side, mine in zip(sides, _split(item, len(sides)), strict=True):
                    yield side, number, mine
                number += 1
            limit = max((counts or {}).get(side.name, 0) for side in sides) if first else max(s.count for s in sides)
            while item is not None and number < limit:  # ranks run equally many: the rest are empty
                nothing = Item(microbatches.emptied(item.inputs), None if item.rows is None else slice(0, 0))
                for side, mine in zip(sides, _split(nothing, len(sides)), strict=True):
                    yield side, number, mine
                number += 1

    def _encode(self, side: _Side, item: Item, *, keep: Callable[[nn.Module, Tensor], bool] | None = None) -> _Outputs:
        """One micro-batch through its encoder, from the buffers that its side started with."""
        if side.buffers is None:
            side.buffers = Buffers(side.modules)
        else:
            side.buffers.reset(but=keep)
        torch.clear_autocast_cache()  # it may hold weights that were cast without a graph
        inputs = microbatches.moved(item.inputs, self.device)
        if isinstance(inputs, Mapping):
            returned = side.encode(**inputs)
        elif isinstance(inputs, (tuple, list)) and any(True for _ in microbatches.tensors(inputs)):
            returned = side.encode(*inputs)
        else:
            returned = side.encode(inputs)
        outputs = _outputs(side.name, returned)
        wanted = (
            next((len(one) for one in microbatches.tensors(inputs)), None) if isinstance(side.source, Cut) else None
        )
        for name, rows in outputs.rows.items():
            wanted = len(rows) if wanted is None else wanted
            if len(rows) != wanted:
                raise InvalidInput(
                    f"the encoder of {side.name} returned '{name}' {describe(rows)} for a micro-batch of {wanted} "
                    "rows: expected a row for each."
                )
        return outputs

    # -- pass 2 -----------------------------------------------------------------------------------

    def _differentiate(self, training: bool) -> Any:
        """The loss of everything pooled; gradients of rows and scalars are left with their sides."""
        if self.step.offload and self.device.type in ("cuda", "xpu"):
            getattr(torch, self.device.type).current_stream(self.device).synchronize()
        for side in self.sides:
            for name, pool in side.pools.items():
                whole = pool.whole()
                side.leaves[name] = whole.requires_grad_(whole.is_floating_point() and training and not side.frozen)
            for name, one in side.scalars.items():
                if isinstance(one, Tensor):
                    side.leaves[name] = one.requires_grad_(one.is_floating_point() and training and not side.frozen)
        returned = self._call_loss()
        total, result = _total(returned)
        if not training:
            return result
        mine = {id(leaf): leaf for side in self.sides for leaf in side.leaves.values() if leaf.requires_grad}
        others = [leaf for leaf in _graph_leaves([total]) if id(leaf) not in mine]
        if not total.requires_grad:
            raise InvalidInput("the loss depends on nothing that wants a gradient: are all encoders frozen?")
        scaled = total if self.step.scaler is None else self.step.scaler.scale(total)
        wanted = [*mine.values(), *others]
        with self._unrounded():
            found = dict(zip(map(id, wanted), torch.autograd.grad(scaled, wanted, allow_unused=True), strict=True))
        for side in self.sides:
            side.gradients = {name: found.get(id(leaf)) for name, leaf in side.leaves.items()}
            for leaf in side.leaves.values():
                leaf.requires_grad_(False)
        self.extra = [(leaf, gradient) for leaf in others if (gradient := found[id(leaf)]) is not None]
        return result

    def _call_loss(self) -> Any:
        queries, keys = self.sides
        given = dict(self.per_call)
        device: torch.device | None = None
        if self.step.offload and self.device.type != "cpu":
            alone = not self.ranks.several  # a ring over NCCL carries nothing from host to host
            if isinstance(self.step.loss, ContrastiveLoss) and (alone or "device" in given):
                given.setdefault("device", str(self.device))  # it fetches rows tile by tile
            else:
                device = self.device  # any other gets them where it computes, and autograd brings gradients back
        if queries.named != keys.named:
            raise InvalidInput("one encoder returns a dict and the other does not: expected both to, or neither.")
        scalars = {name: side.leaves.get(name, side.scalars[name]) for side in (keys, queries) for name in side.scalars}
        if queries.named:
            twice = queries.pools.keys() & keys.pools.keys()
            if twice:
                raise InvalidInput(f"both encoders return '{sorted(twice)[0]}': expected names of their own for rows.")
            rows = {name: side.leaves[name].to(device) for side in self.sides for name in side.pools}
            return self.step.loss(**rows, **scalars, **given)
        both = [side.leaves["embedding"].to(device) for side in self.sides]
        positional = [scalars[name] for name in ("scale", "bias") if name in scalars]
        return self.step.loss(*both, *positional, **given)

    # -- pass 3 -----------------------------------------------------------------------------------

    def _encode_again(self) -> None:
        """All but the last micro-batch of each side, each with a backward of its own."""
        self.grads.keep(one for one in self.parameters if one.requires_grad)
        self.grads.keep(leaf for leaf, _ in self.extra)
        for side, number, item in self._visits(first=False):
            if number >= side.count:
                raise InvalidInput(
                    f"{side.name}: more micro-batches the second time than the {side.count} of the first."
                )
            if number == side.count - 1:
                side.last = item
            elif side.alive and not side.frozen:
                outputs = self._encode_with_graph(side, number, item)
                roots, upstream = self._roots(side, number, outputs)
                if not roots:
                    side.alive = False
                    continue
                if number == 0:
                    self._keep_leaves(roots)
                with self._unrounded():
                    torch.autograd.backward(roots, upstream)

    def _encode_with_graph(self, side: _Side, number: int, item: Item, *, second: bool = False) -> _Outputs:
        """As in pass 1, with a graph; and how far the rows are from those that the loss saw."""
        side.states[number].restore()
        first = self.sides[0].buffers if second else None  # what stands in a graph by now, and has gone on as it should
        theirs = set() if first is None else {id(buffer) for _, _, buffer, _ in first.kept}
        by_batch = self.step.batch_norm == "micro_batch"
        outputs = self._encode(
            side, item, keep=lambda module, buffer: id(buffer) in theirs or (by_batch and _looks_at_its_batch(module))
        )
        for name, pool in side.pools.items():
            if name not in outputs.rows:
                raise NotRepeatable(f"the encoder of {side.name} returned no '{name}' the second time.")
            before = pool.part(number, side.leaves[name], self.device)
            self._note(side, name, number, outputs.rows[name], before)
        for name, one in side.scalars.items():
            if isinstance(one, Tensor):
                self._note(side, name, number, outputs.scalars[name].reshape(1, -1), one.reshape(1, -1))
        return outputs

    def _note(self, side: _Side, name: str, number: int, now: Tensor, before: Tensor) -> None:
        """The largest difference of a row, relative to its norm; looked at later, all at once."""
        now, before = now.detach(), before.to(now.device)
        if now.shape != before.shape:
            raise NotRepeatable(
                f"the encoder of {side.name} gave '{name}' of shape {tuple(before.shape)} for micro-batch {number}, "
                f"and of {tuple(now.shape)} the second time."
            )
        if not now.numel():
            return
        budget = self.step.tolerance
        if budget is None:
            dtypes = {now.dtype, *side.dtypes}
            if torch.is_autocast_enabled(self.device.type):
                dtypes.add(torch.get_autocast_dtype(self.device.type))
            budget = ROUNDOFFS * max((torch.finfo(one).eps for one in dtypes if one.is_floating_point), default=0.0)
        wide = torch.float64 if now.dtype == torch.float64 else torch.float32
        here, there = now.to(wide).flatten(1), before.to(wide).flatten(1)
        apart = torch.where(here.isnan() & there.isnan(), 0.0, here - there)
        apart = torch.where(here == there, 0.0, apart)  # infinities, too
        norms = there.nan_to_num().norm(dim=1).clamp(min=torch.finfo(wide).tiny)
        self.differences.append((side, name, number, (apart.norm(dim=1) / norms).max(), budget))

    def _compare(self) -> None:
        """Raise NotRepeatable for the first micro-batch that came out otherwise the second time."""
        seen, self.differences = self.differences, []
        if not seen:
            return
        for (side, name, number, _, budget), apart in zip(
            seen, torch.stack([one[3].cpu().double() for one in seen]).tolist(), strict=True
        ):
            if not apart <= budget:
                raise NotRepeatable(
                    f"the encoder of {side.name} is not repeatable: '{name}' of micro-batch {number} differs by "
                    f"{apart:.3g} of its norm when encoded again (budget {budget:.3g}). Usual causes: a random "
                    "generator of its own, state that changes with each forward, inputs that differ when asked again, "
                    "atomics on a GPU. Make it repeatable, pass inputs='keep', or tolerance= if so much is rounding."
                )

    def _roots(self, side: _Side, number: int, outputs: _Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """Rows with a graph, and their part of the gradient."""
        roots, upstream = [], []
        for name, pool in side.pools.items():
            gradient, rows = side.gradients.get(name), outputs.rows[name]
            if gradient is not None and rows.requires_grad:
                roots.append(rows)
                upstream.append(pool.part(number, gradient, rows.device))
        return roots, upstream

    def _last_forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """The last micro-batch of each side, scale, bias and the loss's own parameters, with their gradients."""
        roots: list[Tensor] = []
        upstream: list[Tensor] = []
        for second, side in enumerate(self.sides):
            if side.frozen or side.last is None:
                continue
            number = side.count - 1
            outputs = self._encode_with_graph(side, number, side.last, second=bool(second))
            mine, gradients = self._roots(side, number, outputs)
            roots += mine
            upstream += gradients
            for name in side.scalars:
                scalar, gradient = outputs.scalars[name], side.gradients.get(name)
                if isinstance(scalar, Tensor) and scalar.requires_grad and gradient is not None:
                    roots.append(scalar)
                    upstream.append(gradient.to(scalar.device, scalar.dtype).reshape(scalar.shape))
        for leaf, gradient in self.extra:
            roots.append(leaf.view_as(leaf))  # a node for wrappers to find it by
            upstream.append(gradient)
        self._keep_leaves(roots)
        return roots, upstream

    def _last_backward(self, roots: list[Tensor], upstream: list[Tensor]) -> None:
        """The backward that synchronises."""
        if not roots:
            return
        self.ranks.arm(roots)
        with self._unrounded():
            torch.autograd.backward(roots, upstream)
        self.grads.forget()

    def _keep_leaves(self, roots: Sequence[Tensor]) -> None:
        """Parameters that no module was known to hold."""
        if not self.ranks.sharded:
            self.grads.keep(_graph_leaves(roots))

    @contextmanager
    def _unrounded(self) -> Iterator[None]:
        """Backward runs outside autocast, as it does in a plain step."""
        kinds = [kind for kind in {"cpu", self.device.type} if torch.is_autocast_enabled(kind)]
        if not kinds:
            yield
            return
        with torch.autocast(kinds[0], enabled=False):
            if len(kinds) == 1:
                yield
            else:
                with torch.autocast(kinds[1], enabled=False):
                    yield

    def _undo(self) -> None:
        """As it was before the step."""
        self.grads.restore()
        for side in reversed(self.sides):
            if side.buffers is not None:
                side.buffers.reset()


def _looks_at_its_batch(module: nn.Module) -> bool:
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    return module.training or module.running_mean is None


def _split(item: Item, sides: int) -> list[Item]:
    if sides == 1:
        return [item]
    pair = item.inputs
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InvalidInput(
            f"the inputs yielded {describe(pair)}: expected pairs (queries' micro-batch, keys' micro-batch), or pass "
            "key_inputs beside query_inputs."
        )
    return [Item(pair[0]), Item(pair[1])]


def _outputs(side: str, returned: Any) -> _Outputs:
    """An encoder's return value by its parts."""
    if isinstance(returned, Tensor):
        returned = (returned,)
    if isinstance(returned, Mapping):
        rows: dict[str, Tensor] = {}
        scalars: dict[str, Any] = {}
        for name, value in returned.items():
            one = isinstance(value, Tensor) and (value.ndim == 0 or (name in SCALARS and value.numel() == 1))
            if one or (name in SCALARS and isinstance(value, (int, float))):
                scalars[name] = value
            elif isinstance(value, Tensor):
                rows[name] = value
            else:
                raise InvalidInput(
                    f"the encoder of {side} returned '{name}' {describe(value)}: expected tensors [rows, ...] or "
                    "scalars."
                )
        return _Outputs(rows, scalars, named=True)
    if isinstance(returned, (tuple, list)) and 1 <= len(returned) <= 3 and isinstance(returned[0], Tensor):
        embedding, *rest = returned
        scalars = {name: value for name, value in zip(("scale", "bias"), rest) if value is not None}
        right = all(not isinstance(one, Tensor) or one.numel() == 1 for one in scalars.values())
        if embedding.ndim >= 1 and right:
            return _Outputs({"embedding": embedding}, scalars, named=False)
    raise InvalidInput(
        f"the encoder of {side} returned {_shapes(returned)}: expected an embedding [rows, d], (embedding, scale), "
        "(embedding, scale, bias), or a dict of tensors by the loss's own names."
    )


def _shapes(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of " + ", ".join(map(_shapes, value))
    return describe(value)


def _total(returned: Any) -> tuple[Tensor, Any]:
    """The scalar to differentiate, and everything detached."""
    if isinstance(returned, Mapping):
        parts = [one for one in returned.values() if isinstance(one, Tensor) and one.requires_grad]
        parts = parts or [one for one in returned.values() if isinstance(one, Tensor)]
        total: Any = sum(parts[1:], parts[0]) if parts else None
    else:
        total = returned[0] if isinstance(returned, tuple) and returned else returned
    if not isinstance(total, Tensor) or total.numel() != 1:
        raise InvalidInput(
            f"the loss returned {_shapes(returned)}: expected one number, or a tuple or dict that begins so."
        )
    return total.reshape(()), _detached(returned)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {name: _detached(one) for name, one in value.items()}
    return tuple(_detached(one) for one in value) if type(value) is tuple else value


def _graph_leaves(roots: Sequence[Tensor]) -> list[Tensor]:
    """The leaves whose `.grad` a backward from these roots would reach."""
    found: dict[int, Tensor] = {}
    for root in roots:
        if root.requires_grad and root.grad_fn is None:
            found[id(root)] = root
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found[id(leaf)] = leaf
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return list(found.values())


def _iterable(name: str, inputs: Any) -> Iterable[Any]:
    if not hasattr(inputs, "__iter__") or isinstance(inputs, str):
        raise InvalidInput(
            f"{name}: {describe(inputs)}: expected a tensor, a tuple or dict of tensors, or an iterable of "
            "micro-batches."
        )
    return inputs  # type: ignore[no-any-return]


def _device(device: Any) -> torch.device:
    """One that this PyTorch can compute on."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError, TypeError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        raise InvalidInput(f"DecoupledStep(device={device!r}): PyTorch has no such device here ({why}).") from error
    return found


def _ring(handle: Any) -> Ring | None:
    if handle is None or isinstance(handle, Ring):
        return handle
    from nibs_torch.ring import as_ring

    return as_ring(handle)
