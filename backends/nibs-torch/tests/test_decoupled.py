"""The decoupled step gives the gradients of the one batch, whatever encoders are made of; or says why it cannot.

The truth is one graph: every micro-batch encoded with a graph, all rows put together, one loss, one backward, from the
same random state. float64, so that what is left is the order of sums: `BUDGET` roundoffs of a tower's largest gradient.
"""

from __future__ import annotations

import copy
import math
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

import nibs
import nibs_torch
from nibs.errors import InvalidInput, NotRepeatable, Unsupported
from nibs_torch import DecoupledStep, TokenBudget
from nibs_torch.replay import KeptGradients, RandomState

N, SIZE, FEATURES, DIM = 23, 4, 6, 5
BUDGET = 64.0  # roundoffs: two orders of summing some dozen terms of either sign


class Tower(nn.Module):
    """Rows `[n, FEATURES]` to unit rows `[n, DIM]`; scalars: with scale and bias of shape [] behind them."""

    def __init__(self, *, dropout=0.0, scalars=0, middle=None):
        super().__init__()
        self.first = nn.Linear(FEATURES, 12)
        self.middle = middle or nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(12, DIM)
        self.log_scale = nn.Parameter(torch.tensor(1.2)) if scalars else None
        self.bias = nn.Parameter(torch.tensor(-0.5)) if scalars > 1 else None

    def forward(self, x):
        rows = normalize(self.last(self.dropout(torch.tanh(self.middle(self.first(x))))), dim=-1)
        if self.log_scale is None:
            return rows
        scalars = (self.log_scale.exp(),) if self.bias is None else (self.log_scale.exp(), self.bias * 1)
        return rows, *scalars


def towers(seed=0, dtype=torch.float64, **left):
    torch.manual_seed(seed)
    return Tower(**left).to(dtype), Tower(dropout=left.get("dropout", 0.0)).to(dtype)


def batch(n=N, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, FEATURES, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))


def gradients(*modules):
    return [None if p.grad is None else p.grad.clone() for module in modules for p in module.parameters()]


def clear(*modules):
    for module in modules:
        module.zero_grad(set_to_none=True)


def parts(inputs, size=SIZE):
    return inputs.split(size) if isinstance(inputs, torch.Tensor) else inputs


def one_graph(encode_queries, encode_keys, loss, queries, keys, seed=3, scaler=None):
    """The truth: the loss, and gradients left in `.grad`."""
    torch.manual_seed(seed)
    sides, scalars = [], []
    for encode, inputs in ((encode_queries, queries), (encode_keys, keys)):
        found = [encode(part) for part in parts(inputs)]
        found = [one if isinstance(one, tuple) else (one,) for one in found]
        sides.append(torch.cat([one[0] for one in found]))
        scalars = scalars or list(found[0][1:])
    total = loss(*sides, *scalars)
    (total if scaler is None else scaler.scale(total)).backward()
    return total.detach()


def check(found, truth, modules=None, budget=BUDGET * 2.0**-52):
    assert len(found) == len(truth)
    largest = max(float(one.abs().max()) for one in truth if one is not None)
    for mine, theirs in zip(found, truth, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            apart = float((mine - theirs).abs().max())
            assert apart <= budget * largest, f"gradients differ by {apart:.3g} of {largest:.3g}"


def compare(queries_tower, keys_tower, loss=None, modules=None, data=None, **options):
    """One step beside one graph."""
    loss = loss or nibs_torch.ContrastiveLoss()
    modules = modules or (queries_tower, keys_tower)
    queries, keys = data or batch()
    expected = one_graph(queries_tower, keys_tower, loss, queries, keys)
    truth, end = gradients(*modules), torch.get_rng_state()
    clear(*modules)
    torch.manual_seed(3)
    step = DecoupledStep(queries_tower, keys_tower, loss=loss, micro_batch=SIZE, **options)
    found = step(queries, keys)
    assert not found.requires_grad and abs(float(found - expected)) <= 1e-14
    check(gradients(*modules), truth)
    assert torch.equal(torch.get_rng_state(), end), "random numbers go on as after one forward"


# -- what encoders are made of --------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 4, 8, 23])
def test_gradients_are_those_of_the_one_batch(n):
    compare(*towers(scalars=1), data=batch(n))


def test_dropout_falls_the_same_way_twice():
    compare(*towers(dropout=0.4, scalars=1))


def test_without_replay_the_step_refuses_and_gradients_would_be_wrong(monkeypatch):
    monkeypatch.setattr(RandomState, "restore", lambda self: None)
    left, right = towers(dropout=0.4)
    with pytest.raises(NotRepeatable, match=r"the encoder of queries is not repeatable: 'embedding' of micro-batch 0"):
        DecoupledStep(left, right, micro_batch=SIZE)(*batch())
    with pytest.raises(AssertionError, match="gradients differ"):
        compare(left, right, tolerance=math.inf)


def test_scale_and_bias_get_their_gradients_once():
    compare(*towers(scalars=2), loss=nibs_torch.ContrastiveLoss(nibs.Sigmoid()))


def test_scale_and_bias_may_come_with_the_keys():
    left, right = towers(scalars=2)
    compare(right, left, loss=nibs_torch.ContrastiveLoss(nibs.Sigmoid()), modules=(left, right))


def test_a_parameter_that_only_the_loss_knows_is_trained_too():
    left, right = towers()
    log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def loss(queries, keys):
        return nibs.contrastive_loss(queries, keys, scale=log_scale.exp())

    one_graph(left, right, loss, *batch())
    expected = log_scale.grad.clone()
    log_scale.grad = None
    DecoupledStep(left, right, loss=loss, micro_batch=SIZE)(*batch())
    check([log_scale.grad], [expected])


def test_tied_towers():
    tower, _ = towers(dropout=0.2)
    compare(tower, tower, modules=(tower,))


@pytest.mark.parametrize("side", [0, 1])
def test_a_frozen_tower_is_encoded_once_and_without_a_graph(side):
    pair = towers(scalars=0 if side == 0 else 1)
    calls = []
    pair[side].requires_grad_(False)
    pair[side].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    compare(*pair)
    calls.clear()
    DecoupledStep(*pair, micro_batch=SIZE)(*batch())
    assert calls == [False] * 6


def test_a_tower_that_shows_to_be_frozen_only_when_encoded_is_not_encoded_to_the_end():
    left, right = towers()
    calls = []

    def encode(x):  # a part of a model that has trainable parameters elsewhere
        calls.append(torch.is_grad_enabled())
        return left(x).detach()

    compare(encode, right, modules=(left, right))
    calls.clear()
    DecoupledStep(encode, right, micro_batch=SIZE)(*batch())
    assert calls == [False] * 6 + [True] * 2


def test_activation_checkpointing_inside():
    left, right = towers(dropout=0.3)
    compare(lambda x: checkpoint(left, x, use_reentrant=False), right, modules=(left, right))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # PyTorch's, of any pass without a graph
def test_reentrant_checkpointing_inside():
    left, right = towers(dropout=0.3)
    ahead = nn.Linear(FEATURES, FEATURES).double()
    compare(lambda x: checkpoint(left, ahead(x), use_reentrant=True), right, modules=(left, right, ahead))


def test_compiled_encoders():
    torch._dynamo.reset()
    left, right = towers(dropout=0.3, scalars=1)
    compiled = [torch.compile(tower, backend="aot_eager", dynamic=True) for tower in (left, right)]
    compare(*compiled, modules=(left, right))


def test_several_losses_on_one_embedding():
    def loss(queries, keys, scale):
        uniformity = torch.pdist(queries).pow(2).mul(-2).exp().mean().log()
        return nibs.contrastive_loss(queries, keys, scale=scale) + 0.1 * uniformity + 0.01 * keys.pow(4).sum()

    compare(*towers(scalars=1), loss=loss)


def test_buffers_change_as_in_one_forward():
    def make():
        torch.manual_seed(0)
        return nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, DIM).double()), nn.Linear(
            FEATURES, DIM
        ).double()

    left, right = make()
    plain, other = copy.deepcopy(left), copy.deepcopy(right)
    loss = nibs_torch.ContrastiveLoss()
    loss(plain(batch()[0]), other(batch()[1])).backward()  # one power iteration, over the whole batch
    DecoupledStep(left, right, loss=loss, micro_batch=SIZE)(*batch())
    check(gradients(left, right), gradients(plain, other))
    for mine, theirs in zip(left.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_tied_towers_with_buffers_go_through_them_in_the_order_of_a_plain_step():
    torch.manual_seed(0)
    tower = nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, DIM).double())
    plain = copy.deepcopy(tower)
    loss = nibs_torch.ContrastiveLoss()
    loss(plain(batch()[0]), plain(batch()[1])).backward()
    DecoupledStep(tower, tower, loss=loss, micro_batch=SIZE)(*batch())
    check(gradients(tower), gradients(plain))
    for mine, theirs in zip(tower.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_random_numbers_of_the_loss_are_others_in_the_next_step():
    drawn = []

    def loss(queries, keys):
        drawn.append(torch.rand(1).item())
        return nibs.contrastive_loss(queries, keys)

    step = DecoupledStep(*towers(), loss=loss, micro_batch=SIZE)
    torch.manual_seed(3)
    step(*batch())
    step(*batch())
    torch.manual_seed(3)
    assert drawn == [torch.rand(1).item() for _ in range(2)]


def test_python_and_numpy_random_numbers_are_replayed():
    left, right = towers()

    def encode(x):
        return left(x * random.uniform(0.5, 1.5) + np.random.standard_normal())

    random.seed(5)
    np.random.seed(5)
    DecoupledStep(encode, right, micro_batch=SIZE)(*batch())
    assert left.first.weight.grad is not None


# -- batch normalisation --------------------------------------------------------------------------


def test_batch_normalisation_is_refused_by_name():
    left, right = towers(middle=nn.BatchNorm1d(12))
    with pytest.raises(
        Unsupported, match=r"BatchNorm1d 'middle' normalises by its batch.*batch_norm='frozen'.*GroupNorm"
    ):
        DecoupledStep(left, right, micro_batch=SIZE)(*batch())
    assert gradients(left, right) == [None] * 10


def test_batch_normalisation_is_found_behind_objects_and_functions_within_functions():
    left, right = towers(middle=nn.BatchNorm1d(12))

    class Holder:
        def __init__(self):
            self.tower = left

        def encode(self, x):
            return self.tower(x)

    holder = Holder()

    def in_pieces(x):
        return torch.cat([left(rows) for rows in x.split(2)])

    for encode in (holder.encode, lambda x: holder.tower(x), in_pieces, lambda x, *, tower=left: tower(x)):
        with pytest.raises(Unsupported, match="BatchNorm1d 'middle'"):
            DecoupledStep(encode, right, micro_batch=SIZE)(*batch(24))
    names = {"tower": left, "torch": torch}
    exec("def encode(x):\n    return torch.cat([tower(rows) for rows in x.split(2)])", names)  # a global, from within
    with pytest.raises(Unsupported, match="BatchNorm1d 'middle'"):
        DecoupledStep(names["encode"], right, micro_batch=SIZE)(*batch(24))


def test_frozen_batch_normalisation_equals_the_one_batch_by_running_statistics():
    left, right = towers(middle=nn.BatchNorm1d(12))
    left(batch()[0] * 3)  # statistics of their own
    statistics = left.middle.running_mean.clone()
    left.middle.eval()
    one_graph(left, right, nibs_torch.ContrastiveLoss(), *batch())
    truth = gradients(left, right)
    clear(left, right)
    left.middle.train()
    DecoupledStep(left, right, micro_batch=SIZE, batch_norm="frozen")(*batch())
    check(gradients(left, right), truth)
    assert left.middle.training and torch.equal(left.middle.running_mean, statistics)


def test_batch_normalisation_without_statistics_cannot_be_frozen():
    left, right = towers(middle=nn.BatchNorm1d(12, track_running_stats=False))
    with pytest.raises(Unsupported, match="Pass batch_norm='micro_batch'"):
        DecoupledStep(left, right, micro_batch=SIZE, batch_norm="frozen")(*batch())


def test_batch_normalisation_of_micro_batches_equals_one_graph_over_them_and_counts_each_once():
    left, right = towers(middle=nn.BatchNorm1d(12))
    plain = copy.deepcopy(left)
    data = batch(24)
    one_graph(plain, right, nibs_torch.ContrastiveLoss(), *data)
    truth = gradients(plain, right)
    clear(right)
    DecoupledStep(left, right, micro_batch=SIZE, batch_norm="micro_batch")(*data)
    check(gradients(left, right), truth)
    assert int(left.middle.num_batches_tracked) == 6
    torch.testing.assert_close(left.middle.running_mean, plain.middle.running_mean)


# -- mixed precision, accumulation, clipping ------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False], ids=["inside the encoder", "around the step"])
def test_autocast_and_a_scaler(inside):
    left, right = towers(dtype=torch.float32, dropout=0.2, scalars=1)
    data = batch(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def lower(tower):
        def encode(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return tower(x)

        return encode if inside else tower

    with torch.autocast("cpu", dtype=torch.bfloat16):  # one cache for two passes: weights cast without a graph, too
        expected = one_graph(left, right, nibs_torch.ContrastiveLoss(), *data, scaler=scaler)
    truth = gradients(left, right)
    clear(left, right)
    torch.manual_seed(3)
    step = DecoupledStep(lower(left), lower(right), micro_batch=SIZE, scaler=scaler)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        found = step(*data)
    assert abs(float(found - expected)) < 1e-6
    # Weight gradients are bfloat16 products over a micro-batch in place of the batch: a rounding for each.
    check(gradients(left, right), truth, budget=2.0**-8 * math.sqrt(N / SIZE))
    assert max(float(one.abs().max()) for one in truth) > 10, "scaled gradients, and a loss that is not"


def test_float32_is_as_near_to_the_truth_as_the_plain_step():
    exact = towers(dropout=0.0, scalars=1)
    plain, mine = ([copy.deepcopy(tower).float() for tower in exact] for _ in range(2))
    loss, low = nibs_torch.ContrastiveLoss(), batch(dtype=torch.float32)
    for pair, data in ((exact, [one.double() for one in low]), (plain, low)):
        rows, scale = pair[0](data[0])
        loss(rows, pair[1](data[1]), scale).backward()
    DecoupledStep(*mine, loss=loss, micro_batch=SIZE)(*low)
    truth = gradients(*exact)
    largest = max(float(one.abs().max()) for one in truth)
    for want, theirs, ours in zip(truth, gradients(*plain), gradients(*mine), strict=True):
        dense = float((theirs - want).abs().max())
        assert float((ours - want).abs().max()) <= 4 * dense + 8 * 2.0**-24 * largest


def test_accumulation_and_clipping_around_it():
    left, right = towers(scalars=1)
    loss = nibs_torch.ContrastiveLoss()
    first, second = batch(), [one.flip(0) * 2 for one in batch()]
    for data in (first, second):
        one_graph(left, right, loss, *data)
    norm = nn.utils.clip_grad_norm_([*left.parameters(), *right.parameters()], 0.01)
    truth = gradients(left, right)
    clear(left, right)
    step = DecoupledStep(left, right, loss=loss, micro_batch=SIZE)
    for data in (first, second):
        step(*data)
    assert abs(nn.utils.clip_grad_norm_([*left.parameters(), *right.parameters()], 0.01) - norm) <= 1e-14
    check(gradients(left, right), truth)


def test_without_gradients_it_is_the_loss_of_the_whole_batch():
    left, right = towers()
    expected = one_graph(left, right, nibs_torch.ContrastiveLoss(), *batch())
    clear(left, right)
    with torch.no_grad():
        assert abs(float(DecoupledStep(left, right, micro_batch=SIZE)(*batch()) - expected)) <= 1e-14
    assert gradients(left, right) == [None] * 8


# -- inputs and outputs ---------------------------------------------------------------------------


def test_tuple_and_dict_inputs_and_arrays_of_numpy():
    left, right = towers()
    queries, keys = batch()
    one_graph(left, right, nibs_torch.ContrastiveLoss(), queries, keys)
    truth = gradients(left, right)
    clear(left, right)

    def encode_queries(x, shift, *, name="q"):
        return left(x + shift)

    def encode_keys(features, mask):
        return right(features * mask[:, None])

    step = DecoupledStep(encode_queries, encode_keys, micro_batch=(SIZE, 5))
    step((queries - 1, torch.ones(N, 1).double()), {"features": keys.numpy(), "mask": torch.ones(N).double()})
    check(gradients(left, right), truth)


def test_dict_outputs_reach_the_loss_by_name_and_extra_ones_carry_gradients():
    left, right = towers()
    head = nn.Linear(DIM, 2).double()

    def pictures(x):
        rows = left(x)
        return {"image_features": rows, "coarse": head(rows), "logit_scale": head.bias.sum().exp()}

    def loss(image_features, text_features, coarse, logit_scale, weights):
        fine = nibs.contrastive_loss(image_features, text_features, scale=logit_scale, weights=weights)
        return {"fine": fine, "coarse": coarse.pow(2).mean()}

    weights = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    found = [pictures(part) for part in batch()[0].split(SIZE)]
    rows, coarse = (torch.cat([one[name] for one in found]) for name in ("image_features", "coarse"))
    losses = loss(rows, right(batch()[1]), coarse, found[0]["logit_scale"], weights)
    sum(losses.values()).backward()
    truth = gradients(left, right, head)
    clear(left, right, head)
    step = DecoupledStep(pictures, lambda x: {"text_features": right(x)}, loss=loss, micro_batch=SIZE)
    returned = step(*batch(), weights=weights)
    check(gradients(left, right, head), truth)
    assert abs(float(returned["coarse"] - losses["coarse"].detach())) < 1e-14 and not returned["fine"].requires_grad


def test_open_clips_dictionaries_go_through_the_module():
    left, right = towers(scalars=1)
    scale = left.log_scale

    def pictures(x):
        return {"image_features": left(x)[0], "logit_scale": scale.exp()}

    one_graph(left, right, nibs_torch.ContrastiveLoss(), *batch())
    truth = gradients(left, right)
    clear(left, right)
    step = DecoupledStep(pictures, lambda x: {"text_features": right(x), "logit_scale": scale.exp()}, micro_batch=SIZE)
    assert set(step(*batch(), output_dict=True)) == {"contrastive_loss"}
    check(gradients(left, right), truth)


def test_stats_come_beside_the_loss():
    left, right = towers()
    loss, stats = DecoupledStep(left, right, loss=nibs_torch.ContrastiveLoss(stats=True), micro_batch=SIZE)(*batch())
    assert stats.count == N and loss.ndim == 0


class Texts(nn.Module):
    """Token numbers `[n, length]` with a mask to rows: each token sees only its own text."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, DIM).double()
        self.seen = []

    def forward(self, input_ids, attention_mask):
        self.seen.append(tuple(input_ids.shape))
        rows = self.table(input_ids) * attention_mask[..., None]
        return normalize(rows.sum(1) / attention_mask.sum(1, keepdim=True), dim=-1)


def test_texts_of_many_lengths_go_by_a_budget_of_tokens():
    torch.manual_seed(0)
    texts, right = Texts(), towers()[1]
    lengths = torch.randint(1, 31, (N,))
    mask = (torch.arange(30) < lengths[:, None]).long()
    tokens = {"input_ids": torch.randint(0, 50, (N, 30)) * mask, "attention_mask": mask}
    loss = nibs_torch.ContrastiveLoss()
    expected = loss(texts(**tokens), right(batch()[1]))
    expected.backward()
    truth = gradients(texts, right)
    clear(texts, right)
    texts.seen.clear()
    found = DecoupledStep(texts, right, loss=loss, micro_batch=(TokenBudget(60), SIZE))(tokens, batch()[1])
    check(gradients(texts, right), truth)
    assert abs(float(found - expected.detach())) < 1e-14
    assert all(rows * length <= 60 for rows, length in texts.seen)
    assert sum(rows for rows, _ in texts.seen) == 2 * N and max(rows for rows, _ in texts.seen) > 4


def test_texts_padded_on_the_left_keep_their_columns():
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    shapes = []

    def encode(input_ids, attention_mask):
        shapes.append(tuple(input_ids.shape))
        return torch.ones(len(input_ids), 3)

    with torch.no_grad():
        DecoupledStep(encode, encode, micro_batch=TokenBudget(4))(*[{"input_ids": mask, "attention_mask": mask}] * 2)
    assert set(shapes) == {(1, 4)}


# -- lazy inputs ----------------------------------------------------------------------------------


class Asked:
    """Micro-batches made when asked for; counts how often, and how many are alive at once."""

    def __init__(self, *sides):
        self.sides, self.times, self.alive, self.most = sides, 0, 0, 0

    def __iter__(self):
        self.times += 1
        for part in zip(*(side.split(SIZE) for side in self.sides), strict=True):
            made = tuple(one.clone() for one in part)
            for one in made:
                self.alive += 1
                weakref.finalize(one, self._gone)
            self.most = max(self.most, self.alive)
            yield made if len(made) > 1 else made[0]
            del made, one

    def _gone(self):
        self.alive -= 1


def lazily(make, modules=None, **options):
    left, right = towers(dropout=0.2, scalars=1)
    one_graph(left, right, nibs_torch.ContrastiveLoss(), *batch(), seed=3)
    truth = gradients(left, right)
    clear(left, right)
    torch.manual_seed(3)
    DecoupledStep(left, right, micro_batch=1000, **options)(*make(*batch()))
    check(gradients(left, right), truth)


def test_an_iterable_is_asked_again_and_the_batch_is_never_there_as_a_whole():
    made = []
    lazily(lambda *sides: made.extend(Asked(side) for side in sides) or made)
    assert [one.times for one in made] == [2, 2]
    assert max(one.most for one in made) <= 3


def test_an_iterable_that_can_be_walked_once_is_refused_unless_its_items_are_kept():
    with pytest.raises(InvalidInput, match=r"queries: a generator can be walked once.*inputs='keep'"):
        lazily(lambda *sides: [iter(Asked(side)) for side in sides])
    lazily(lambda *sides: [iter(Asked(side)) for side in sides], inputs="keep")


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("change", [lambda rows: rows[:, :1], lambda rows: rows.float()], ids=["width", "dtype"])
def test_micro_batches_of_another_kind_are_refused(change, lazy):
    calls = []

    def encode(x):
        calls.append(x)
        rows = x[:, :DIM]
        return rows if len(calls) < 3 else change(rows)

    inputs, keys = batch()
    message = r"queries: embedding: micro-batches of \[rows, .*one width and one dtype"
    with pytest.raises(InvalidInput, match=message):
        DecoupledStep(encode, encode, micro_batch=SIZE)(list(inputs.split(SIZE)) if lazy else inputs, keys)


def test_pairs_of_micro_batches_come_from_one_iterable():
    left, right = towers(scalars=1)
    one_graph(left, right, nibs_torch.ContrastiveLoss(), *batch())
    truth = gradients(left, right)
    for keep in ("again", "keep"):
        clear(left, right)
        source = Asked(*batch())
        DecoupledStep(left, right, inputs=keep)(source)
        check(gradients(left, right), truth)
        assert source.times == (2 if keep == "again" else 1)


def test_a_loader_that_shuffles_and_augments_gives_the_same_again():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return N

        def __getitem__(self, index):
            return tuple(side[index] + 0.1 * torch.randn(FEATURES, dtype=torch.float64) for side in batch())

    loader = torch.utils.data.DataLoader(Noisy(), batch_size=SIZE, shuffle=True)
    left, right = towers(dropout=0.2)
    torch.manual_seed(11)
    seen = [(left(one), right(other)) for one, other in loader]
    expected = nibs_torch.ContrastiveLoss()(*(torch.cat(side) for side in zip(*seen, strict=True)))
    expected.backward()
    truth = gradients(left, right)
    clear(left, right)
    torch.manual_seed(11)
    found = DecoupledStep(left, right)(loader)
    assert abs(float(found - expected.detach())) < 1e-14
    check(gradients(left, right), truth)


def test_an_iterable_that_does_not_repeat_itself_is_noticed():
    class Fewer(Asked):
        def __iter__(self):
            return iter(list(super().__iter__())[: 6 if self.times == 1 else 5])

    left, right = towers()
    with pytest.raises(InvalidInput, match="queries: 6 micro-batches the first time and 5 the second"):
        DecoupledStep(left, right)(Fewer(batch()[0]), Asked(batch()[1]))

    class Other(Asked):
        def __iter__(self):
            return (one + self.times for one in super().__iter__())

    with pytest.raises(NotRepeatable, match=r"the encoder of keys.*inputs='keep'"):
        DecoupledStep(left, right)(Asked(batch()[0]), Other(batch()[1]))
    assert gradients(left, right) == [None] * 8


# -- encoders that are not functions of their rows ------------------------------------------------


def test_an_encoder_with_a_generator_of_its_own_is_refused_by_name():
    left, right = towers()
    generator = torch.Generator().manual_seed(0)

    def noisy(x):
        return right(x + torch.randn(x.shape, generator=generator, dtype=x.dtype))

    with pytest.raises(NotRepeatable, match="the encoder of keys is not repeatable"):
        DecoupledStep(left, noisy, micro_batch=SIZE)(*batch())
    assert gradients(left, right) == [None] * 8


def test_the_last_micro_batch_is_compared_too():
    left, right = towers()
    calls = []

    def encode(x):
        calls.append(x)
        return right(x * (1.0 if len(calls) < 12 else 1.001))

    with pytest.raises(NotRepeatable, match="micro-batch 5 differs"):
        DecoupledStep(left, encode, micro_batch=SIZE)(*batch())
    assert gradients(left, right) == [None] * 8


def test_a_scale_that_differs_between_micro_batches_is_refused():
    left, right = towers()
    with pytest.raises(NotRepeatable, match="'scale' of micro-batch 1"):
        DecoupledStep(lambda x: (left(x), x.abs().sum()), right, micro_batch=SIZE)(*batch())


def test_tolerance_is_the_callers():
    left, right = towers()
    calls = []

    def encode(x):
        calls.append(x)
        return right(x * (1.0 if len(calls) <= 6 else 1 + 1e-6))

    DecoupledStep(left, encode, micro_batch=SIZE, tolerance=1e-4)(*batch())


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), torch.OutOfMemoryError("full")])
@pytest.mark.parametrize("call", [1, 8, 12], ids=["pass 1", "pass 3", "the last forward"])
@pytest.mark.parametrize("held", [True, False])
def test_an_error_leaves_every_grad_and_buffer_as_it_was(error, call, held):
    left, right = towers(scalars=1, middle=nn.BatchNorm1d(12))
    if held:
        for parameter in (*left.parameters(), *right.parameters()):
            parameter.grad = torch.randn_like(parameter)
    before, tensors = gradients(left, right), [one.grad for one in left.parameters()]
    buffers = [one.clone() for one in left.buffers()]
    calls = []

    def encode(x):
        calls.append(x)
        if len(calls) == call:
            raise error
        return right(x)

    with pytest.raises(type(error)):
        DecoupledStep(left, encode, micro_batch=SIZE, batch_norm="micro_batch")(*batch(24))
    for now, then in zip(gradients(left, right), before, strict=True):
        assert (now is None and then is None) or torch.equal(now, then)
    assert all(one.grad is two for one, two in zip(left.parameters(), tensors, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(left.buffers(), buffers, strict=True))


def test_an_error_in_the_loss_leaves_every_grad_as_it_was():
    left, right = towers()
    with pytest.raises(InvalidInput, match="targets"):
        DecoupledStep(left, right, micro_batch=SIZE)(*batch(), targets=torch.full((N,), N))
    assert gradients(left, right) == [None] * 8


def test_only_grads_that_were_there_are_copied():
    one, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
    one.grad = held = torch.ones(3)
    kept = KeptGradients()
    kept.keep([one, other])
    assert [copy is None for _, _, copy in kept.kept.values()] == [False, True]
    one.grad += 1
    other.grad = torch.ones(3)
    kept.restore()
    assert one.grad is held and one.grad.tolist() == [1.0, 1.0, 1.0] and other.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": 0}, "micro_batch=0: expected a positive number of rows, a TokenBudget"),
        ({"offload": "disk"}, "offload='disk'.*expected one of None, 'cpu'"),
        ({"inputs": "twice"}, "inputs='twice'"),
        ({"batch_norm": "eval"}, "batch_norm='eval'.*'refuse', 'frozen', 'micro_batch'"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"tolerance": "tight"}, "tolerance='tight'.*expected a number >= 0"),
        ({"loss": 3}, r"loss=\.\.\.\) is 3.*expected a function or a module"),
        ({"scaler": 2.0}, r"scaler=\.\.\.\) is 2.0.*expected a torch.amp.GradScaler"),
        ({"device": "toaster"}, "device='toaster'.*PyTorch has no such device here"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(InvalidInput, match=message):
        DecoupledStep(*towers(), **options)


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda x: x[:1], "returned 'embedding'.* for a micro-batch of 4 rows: expected a row for each"),
        (lambda x: "rows", "the encoder of queries returned 'rows'.*expected an embedding"),
        (lambda x: (x, x), r"expected an embedding \[rows, d\], \(embedding, scale\)"),
        (lambda x: {"image_features": x}, "one encoder returns a dict and the other does not"),
        (lambda x: {"image_features": "x"}, "returned 'image_features' 'x'"),
    ],
)
def test_encoders_that_return_something_else_are_told_what_was_expected(encode, message):
    with pytest.raises(InvalidInput, match=message):
        DecoupledStep(encode, towers()[1], micro_batch=SIZE)(*batch())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(3, 2), None), "key_inputs is missing"),
        ((torch.zeros(3, 2), 5), "keys: 5.*expected a tensor, a tuple or dict"),
        (((torch.zeros(3, 2), torch.zeros(4)), torch.zeros(3, 2)), "queries: tensors of shapes.*one number of rows"),
        (([torch.zeros(3, 2)], None), r"expected pairs \(queries' micro-batch, keys' micro-batch\)"),
        (([], []), "queries: no micro-batch at all"),
    ],
)
def test_inputs_that_do_not_fit_are_told_what_was_expected(inputs, message):
    with pytest.raises(InvalidInput, match=message):
        DecoupledStep(nn.Identity(), nn.Identity())(*inputs)


def test_a_loss_of_many_values_is_refused():
    left, right = towers()
    with pytest.raises(InvalidInput, match=r"the loss returned .*expected one number"):
        DecoupledStep(left, right, loss=nibs_torch.ContrastiveLoss(reduction="none"), micro_batch=SIZE)(*batch())


def test_nothing_to_train_is_said():
    left, right = (tower.requires_grad_(False) for tower in towers())
    with pytest.raises(InvalidInput, match="are all encoders frozen"):
        DecoupledStep(left, right, micro_batch=SIZE)(*batch())
