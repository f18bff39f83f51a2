"""Every error of the core, read as a user reads it: what happened, what is here, what to type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nibs
from nibs import errors
from nibs.capabilities import FEATURES

OPTIONS = (
    "Options: backend, bias, device, grad_reduction, key_ids, key_mask, memory, objective, out, plan, precision, "
    "query_ids, query_mask, reduction, ring, scale, stats, targets, weights, wrt."
)
I64 = "int64 array of shape"
NUMPY = "on cpu (numpy.ndarray)"


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.UnknownBackend, LookupError),
        (errors.BackendUnavailable, ImportError),
        (errors.Unsupported, NotImplementedError),
        (errors.InvalidInput, ValueError),
        (errors.MemoryBudget, MemoryError),
        (errors.NotRepeatable, RuntimeError),
        (errors.RingError, RuntimeError),
    ],
)
def test_each_error_is_also_the_builtin_that_a_caller_reaches_for(error, builtin):
    assert issubclass(error, builtin) and issubclass(error, errors.NibsError)


# -- UnknownBackend, BackendUnavailable -----------------------------------------------------------


def test_unknown_backend_lists_ready_and_broken_and_the_nearest_name(here, batch, refusal):
    here.add("torch")
    here.add("cupy", load=lambda: 1 / 0)
    nibs.registry.registry.statuses(probe=True)

    text = refusal(errors.UnknownBackend, nibs.contrastive_loss, batch.queries, batch.keys, backend="torhc")

    assert text == (
        "no backend named 'torhc'. Here: numpy, torch (ready); cupy (broken: ZeroDivisionError: division by zero). "
        "Did you mean 'torch'? 'nibs backends' shows all."
    )


def test_unknown_backend_guesses_nothing_when_no_name_is_near(here, refusal):
    text = refusal(errors.UnknownBackend, here.registry.load, "zzz")

    assert text == "no backend named 'zzz'. Here: numpy (not tried yet). 'nibs backends' shows all."


def test_an_error_neither_loads_a_backend_nor_calls_it_ready(here, batch, refusal):
    here.add("cupy", load=lambda: 1 / 0)

    text = refusal(errors.UnknownBackend, nibs.contrastive_loss, batch.queries, batch.keys, backend="torhc")

    assert "Here: numpy (ready); cupy (not tried yet)." in text


def test_unavailable_backend_gives_the_cause_and_the_command(here, batch):
    def load() -> Any:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    here.add("cupy", load=load, install="pip install nibs-cupy")

    with pytest.raises(errors.BackendUnavailable) as caught:
        nibs.contrastive_loss(batch.queries, batch.keys, backend="cupy")

    assert str(caught.value) == (
        "backend 'cupy' cannot run here: ImportError: libcudart.so.13: cannot open shared object file. "
        "Try: pip install nibs-cupy"
    )
    assert isinstance(caught.value.__cause__, ImportError)


def test_backend_that_two_plugins_bring_names_both(here, refusal):
    here.add("twin", distribution="nibs-first 1.0")
    here.add("twin", distribution="nibs-second 2.0")

    text = refusal(errors.BackendUnavailable, here.registry.load, "twin")

    assert "2 plugins bring it: nibs-first 1.0 and nibs-second 2.0; uninstall all but one" in text


def test_without_any_backend_a_name_says_what_to_install(empty, refusal):
    text = refusal(errors.BackendUnavailable, empty.registry.load, "numpy")

    assert text == (
        "backend 'numpy' cannot run here: no backend is installed at all. Start with: pip install nibs-numpy"
    )


def test_without_any_backend_a_call_says_what_to_install(empty, batch, refusal):
    text = refusal(errors.BackendUnavailable, nibs.contrastive_loss, batch.queries, batch.keys)

    assert text == (
        "queries is a numpy.ndarray array, and no backend here owns those. Here: none. "
        "If one exists for numpy: pip install nibs-numpy"
    )


# -- Unsupported ----------------------------------------------------------------------------------

IDS = {"query_ids": np.arange(6), "key_ids": np.arange(6)}
USES = {
    "exclude": {"objective": nibs.InfoNCE(same_id="exclude"), **IDS},
    "exclude_self": {"objective": nibs.InfoNCE(exclude_self=True), "targets": np.array([1, 0, 3, 2, 5, 4])},
    "false_negative_margin": {"objective": nibs.InfoNCE(false_negative_margin=0.1)},
    "label_smoothing": {"objective": nibs.InfoNCE(label_smoothing=0.1)},
    "masks": {"key_mask": np.ones(6, bool)},
    "memory": {"memory": "1GiB"},
    "multi_positive": {"objective": nibs.InfoNCE(same_id="positive"), **IDS},
    "precision": {"precision": "highest"},
    "stats": {"stats": True},
    "streaming": {"device": "cpu"},
    "targets": {"targets": np.arange(6)},
    "weights": {"weights": np.ones(6)},
}


@pytest.mark.parametrize("feature", USES)
def test_missing_feature_is_named_with_who_has_it(here, batch, refusal, feature):
    here.add("narrow", features=frozenset(FEATURES) - {feature})

    text = refusal(
        errors.Unsupported,
        nibs.contrastive_loss_and_grad,
        batch.queries,
        batch.queries,
        backend="narrow",
        **USES[feature],
    )

    assert text == (f"backend 'narrow' cannot do this: it lacks {FEATURES[feature]} ('{feature}'). These can: numpy.")


def test_missing_per_row_values_are_named(here, batch, refusal):
    here.add("narrow", features=frozenset(FEATURES) - {"reduction_none"})

    text = refusal(
        errors.Unsupported, nibs.contrastive_loss, batch.queries, batch.keys, backend="narrow", reduction="none"
    )

    assert "it lacks reduction='none' ('reduction_none')" in text


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"dtypes": {"float64"}}, "it takes float64, not float32"),
        ({"devices": {"cuda"}}, "it runs on cuda, not on cpu"),
        ({"objectives": {"Sigmoid"}}, "it has Sigmoid, not InfoNCE"),
        ({"devices": set()}, "it runs on nothing, not on cpu"),
    ],
)
def test_missing_claim_is_named(here, batch, refusal, claims, reason):
    here.add("narrow", **claims)

    text = refusal(errors.Unsupported, nibs.contrastive_loss, batch.queries, batch.keys, backend="narrow")

    assert text == f"backend 'narrow' cannot do this: {reason}. These can: numpy."


def test_ring_that_nobody_takes_is_unsupported(here, batch, refusal):
    text = refusal(errors.Unsupported, nibs.contrastive_loss, batch.queries, batch.keys, ring=object())

    assert text == (
        "backend 'numpy' cannot do this: it rings over nibs.ring.Ring, not over object. No backend here can."
    )


# -- InvalidInput ---------------------------------------------------------------------------------


class DTensor(np.ndarray):
    """Named as PyTorch's sharded tensor is."""


def _arrays() -> dict[str, tuple[dict[str, Any], str]]:
    q, k = np.zeros((6, 4), np.float32), np.zeros((8, 4), np.float32)
    f32 = "float32 array of shape"
    floats = "expected a floating dtype, one of float64, float32, bfloat16, float16."
    rows = "expected shape [rows, d] with d >= 1."
    return {
        "one dimension": ({"queries": q[0]}, f"queries is a {f32} (4,) {NUMPY}: {rows}"),
        "no columns": ({"keys": k[:, :0]}, f"keys is a {f32} (8, 0) {NUMPY}: {rows}"),
        "three dimensions": ({"keys": k[None]}, f"keys is a {f32} (1, 8, 4) {NUMPY}: {rows}"),
        "integers": ({"queries": q.astype(int)}, f"queries is a {I64} (6, 4) {NUMPY}: {floats}"),
        "objects": ({"keys": k.astype(object)}, f"keys is a object array of shape (8, 4) {NUMPY}: {floats}"),
        "complex": ({"keys": k.astype("c8")}, f"keys is a complex64 array of shape (8, 4) {NUMPY}: {floats}"),
        "other byte order": ({"queries": q.astype(">f4")}, f"queries is a >f4 array of shape (6, 4) {NUMPY}: {floats}"),
        "a list": (
            {"queries": [[1.0]]},
            "queries is [[1.0]] (list): expected a [n, d] array of a framework that a backend here owns. "
            "Here: numpy (not tried yet).",
        ),
        "keys as a list": ({"keys": [[1.0]]}, "keys is [[1.0]] (list): expected a [rows, d] array."),
        "other width": (
            {"keys": k[:, :3]},
            f"keys has 3 columns and queries has 4: both must be [rows, 4]; queries is a {f32} (6, 4) {NUMPY}, "
            f"keys is a {f32} (8, 3) {NUMPY}.",
        ),
        "mixed dtypes": (
            {"keys": k.astype(np.float64)},
            "queries is float32 and keys is float64: expected one dtype. Convert one of them; "
            "mixed dtypes promote under autocast only.",
        ),
        "sharded": (
            {"queries": q.view(DTensor)},
            "queries is a DTensor: pass what this rank holds with .to_local() and ring=, "
            "or the whole with .full_tensor().",
        ),
        "sharded weights": (
            {"weights": np.ones(6).view(DTensor)},
            "weights is a DTensor: pass what this rank holds with .to_local() and ring=, "
            "or the whole with .full_tensor().",
        ),
        "masked array": (
            {"keys": np.ma.array(k)},
            "keys is a masked array, whose own mask would be passed over: pass keys.data, "
            "and absent rows by query_mask= and key_mask=.",
        ),
        "more queries than keys": (
            {"queries": k, "keys": q},
            "targets=None with 8 queries and 6 keys: query i's positive is key i, so there must be at least as many "
            "keys as queries. Pass targets= (-1 for a row without a positive).",
        ),
    }


def _options() -> dict[str, tuple[dict[str, Any], str]]:
    six = np.arange(6)
    scalar = "expected a float, or a floating array of one element, shape [] or [1]."
    budget = "expected bytes as a positive integer, or text like '512MiB' or '2GB'."
    names = "expected names out of 'queries', 'keys', 'scale', 'bias'."
    exclude, self_out = nibs.InfoNCE(same_id="exclude"), nibs.InfoNCE(exclude_self=True)
    return {
        "scale as text": ({"scale": "3"}, f"scale is '3' (str): {scalar}"),
        "scale as a list": ({"scale": [3.0]}, f"scale is [3.0] (list): {scalar}"),
        "scale as a flag": ({"scale": True}, f"scale is True (bool): {scalar}"),
        "scale of two": ({"scale": np.ones(2)}, f"scale is a float64 array of shape (2,) {NUMPY}: {scalar}"),
        "scale of integers": ({"scale": np.array(3)}, f"scale is a {I64} () {NUMPY}: {scalar}"),
        "bias as None": ({"bias": None}, f"bias is None (NoneType): {scalar}"),
        "bias too large": (
            {"bias": 10**400},
            f"bias is 1{'0' * 56}... (int): expected a number that a float can hold.",
        ),
        "objective as text": (
            {"objective": "infonce"},
            "objective is 'infonce' (str): expected nibs.InfoNCE(...) or nibs.Sigmoid(...).",
        ),
        "objective uncalled": (
            {"objective": nibs.InfoNCE},
            "objective is <class 'nibs.spec.InfoNCE'> (type): expected nibs.InfoNCE(...) or nibs.Sigmoid(...). "
            "Call it: InfoNCE().",
        ),
        "targets as a list": (
            {"targets": [0, 1]},
            "targets is [0, 1] (list): expected an array of integers (int64), shape [6].",
        ),
        "targets too few": (
            {"targets": six[:5]},
            f"targets is a {I64} (5,) {NUMPY}: expected integers (int64) of shape (6,).",
        ),
        "targets of floats": (
            {"targets": six.astype(np.float32)},
            f"targets is a float32 array of shape (6,) {NUMPY}: expected integers (int64) of shape (6,).",
        ),
        "targets that 64 bits cannot sign": (
            {"targets": six.astype(np.uint64)},
            f"targets is a uint64 array of shape (6,) {NUMPY}: expected integers (int64) of shape (6,).",
        ),
        "targets too large": (
            {"targets": six + 5},
            "targets[3] = 8: expected a row of keys, 0 to 7, or -1 for none.",
        ),
        "targets too small": (
            {"targets": six - 2},
            "targets[0] = -2: expected a row of keys, 0 to 7, or -1 for none.",
        ),
        "own positive": (
            {"objective": self_out, "keys": np.zeros((6, 4), np.float32), "targets": six[::-1].copy() * 0},
            "targets[0] = 0 with exclude_self=True: a row cannot be its own positive; "
            "point it at another row, or -1 for none.",
        ),
        "self without targets": (
            {"objective": self_out, "keys": np.zeros((6, 4), np.float32)},
            "targets=None with exclude_self=True: the diagonal cannot be the positive. "
            "Pass targets=, or same_id='positive' with ids.",
        ),
        "self of two sets": (
            {"objective": self_out},
            "exclude_self=True with 6 queries and 8 keys: expected one and the same set, row by row, n = m.",
        ),
        "ids missing": (
            {"objective": exclude, "query_ids": six},
            "key_ids=None with same_id='exclude': expected the integer ids of its rows.",
        ),
        "ids too few": (
            {"objective": exclude, "query_ids": six[:3]},
            f"query_ids is a {I64} (3,) {NUMPY}: expected integers (int64) of shape (6,).",
        ),
        "mask of integers": (
            {"query_mask": six},
            f"query_mask is a {I64} (6,) {NUMPY}: expected bool of shape (6,).",
        ),
        "mask too short": (
            {"key_mask": np.ones(6, bool)},
            f"key_mask is a bool array of shape (6,) {NUMPY}: expected bool of shape (8,).",
        ),
        "weights negative": ({"weights": -np.ones(6)}, "weights[0] = -1.0: expected a finite number >= 0."),
        "weights not finite": ({"weights": np.full(6, np.nan)}, "weights[0] = nan: expected a finite number >= 0."),
        "weights as one number": (
            {"weights": 1.0},
            "weights is 1.0 (float): expected an array of floats, shape [6].",
        ),
        "reduction": ({"reduction": "avg"}, "reduction='avg': expected one of 'mean', 'sum', 'none'."),
        "precision": ({"precision": "tf32"}, "precision='tf32': expected one of 'default', 'high', 'highest'."),
        "grad_reduction": ({"grad_reduction": []}, "grad_reduction=[]: expected one of 'none', 'sum', 'mean'."),
        "stats": ({"stats": 1}, "stats=1: expected True or False."),
        "wrt": ({"wrt": "query"}, f"wrt='query': {names}"),
        "wrt of lists": ({"wrt": [[]]}, f"wrt=[[]]: {names}"),
        "memory of nothing": ({"memory": 0}, f"memory=0: {budget}"),
        "memory in furlongs": ({"memory": "3 furlongs"}, f"memory='3 furlongs': {budget}"),
        "memory twice": (
            {"memory": 1, "plan": nibs.plan(6, 8, 4)},
            "memory= and plan= are both given: a plan fixes its own memory; pass one of them.",
        ),
        "plan by name": ({"plan": "best"}, "plan is 'best' (str): expected a Plan from nibs.plan(...)."),
        "backend by number": ({"backend": 3}, "backend is 3 (int): expected a backend's name, or 'fastest'."),
        "backend of no name": ({"backend": ""}, "backend is '' (str): expected a backend's name, or 'fastest'."),
        "typo": ({"target": None}, f"target= is not an option. Did you mean targets=? {OPTIONS}"),
        "no such option": ({"zzz": None}, f"zzz= is not an option. {OPTIONS}"),
        "temperature": (
            {"temperature": 0.07},
            f"temperature= is not an option. Logits are multiplied by scale: pass scale = 1 / temperature. {OPTIONS}",
        ),
        "an option of the objective": (
            {"label_smoothing": 0.1},
            "label_smoothing= is not an option. It belongs to the objective: "
            f"objective=nibs.InfoNCE(label_smoothing=...). {OPTIONS}",
        ),
    }


WRONG = _arrays() | _options()


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("call", [nibs.contrastive_loss, nibs.contrastive_loss_and_grad])
def test_wrong_argument_is_named_with_what_it_is_and_what_was_expected(here, batch, refusal, call, case):
    wrong, expected = WRONG[case]
    arguments = {"queries": batch.queries, "keys": batch.keys} | wrong

    text = refusal(errors.InvalidInput, call, **arguments)

    assert text == expected


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: nibs.InfoNCE("both"),
            "InfoNCE(direction='both'): expected one of 'symmetric', 'query_to_key', 'key_to_query'.",
        ),
        (
            lambda: nibs.InfoNCE(np.array(["a", "b"])),
            "InfoNCE(direction=array(['a', 'b'], dtype='<U1')): "
            "expected one of 'symmetric', 'query_to_key', 'key_to_query'.",
        ),
        (
            lambda: nibs.InfoNCE(label_smoothing=2),
            "InfoNCE(label_smoothing=2): expected a number in [0, 1].",
        ),
        (
            lambda: nibs.InfoNCE(false_negative_margin=float("nan")),
            "InfoNCE(false_negative_margin=nan): expected a finite number or None.",
        ),
        (lambda: nibs.InfoNCE(exclude_self=1), "InfoNCE(exclude_self=1): expected True or False."),
        (
            lambda: nibs.InfoNCE(same_id="positive", false_negative_margin=0.1),
            "InfoNCE(false_negative_margin=..., same_id='positive'): the margin is measured from one designated "
            "positive. Use same_id='exclude' or 'negative' with it.",
        ),
        (
            lambda: nibs.Sigmoid(same_id=None),
            "Sigmoid(same_id=None): expected one of 'negative', 'exclude', 'positive'.",
        ),
    ],
)
def test_wrong_objective_is_named(refusal, make, expected):
    assert refusal(errors.InvalidInput, make) == expected


def test_objectives_that_mean_the_same_read_the_same():
    assert repr(nibs.InfoNCE(label_smoothing=0)) == repr(nibs.InfoNCE(label_smoothing=np.float32(0)))


def test_per_row_values_have_no_one_gradient(here, batch, refusal):
    text = refusal(errors.InvalidInput, nibs.contrastive_loss_and_grad, batch.queries, batch.keys, reduction="none")

    assert text == (
        "reduction='none' with contrastive_loss_and_grad: n values have no one gradient. Use 'mean' or 'sum', "
        "or differentiate contrastive_loss."
    )


def test_absent_rows_may_hold_any_target_and_weight(here, batch):
    mask = np.array([True, True, True, True, True, False])
    targets, weights = np.arange(6), np.ones(6)
    targets[5], weights[5] = -100, np.nan

    loss = nibs.contrastive_loss(batch.queries, batch.keys, targets=targets, weights=weights, query_mask=mask)

    assert loss == nibs.contrastive_loss(batch.queries, batch.keys, query_mask=mask)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint16", "uint32"])
def test_small_integers_mean_the_same_targets(here, dtype):
    rows = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    targets, mask = np.arange(300) % 100, np.arange(300) % 7 != 0
    options = {"query_mask": mask, "objective": nibs.InfoNCE(false_negative_margin=0.1)}

    loss = nibs.contrastive_loss(rows, rows, targets=targets.astype(dtype), **options)

    assert loss == nibs.contrastive_loss(rows, rows, targets=targets, **options)


# -- MemoryBudget ---------------------------------------------------------------------------------


def test_small_budget_names_the_least_that_works(here, batch):
    with pytest.raises(errors.MemoryBudget) as caught:
        nibs.contrastive_loss_and_grad(batch.queries, batch.keys, memory=10)

    text, least = str(caught.value), caught.value.least
    assert text.startswith(
        f"memory=10 B is too small for 6 x 8 rows of 4 in float32: the least that works is {least} bytes ("
    )
    assert text.endswith("are linear in the batch.")


def test_least_budget_works_and_one_byte_less_does_not(here, batch):
    with pytest.raises(errors.MemoryBudget) as caught:
        nibs.contrastive_loss_and_grad(batch.queries, batch.keys, memory=10)
    least = caught.value.least

    nibs.contrastive_loss_and_grad(batch.queries, batch.keys, memory=least)

    with pytest.raises(errors.MemoryBudget):
        nibs.contrastive_loss_and_grad(batch.queries, batch.keys, memory=least - 1)
