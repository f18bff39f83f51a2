"""Whose precision products have, and that nobody else's changes."""

from __future__ import annotations

import threading

import pytest
import torch
from dense_torch import leaves

import nibs
from nibs_torch import mkl, precision

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"),
    reason="this PyTorch has no flag for products on a CPU",
)


@pytest.mark.parametrize(("wanted", "flag"), [("high", "tf32"), ("highest", "ieee")])
def test_the_flag_stands_during_a_product_and_is_put_back(wanted, flag):
    holder = torch.backends.mkldnn.matmul
    before = holder.fp32_precision
    with precision.products(wanted, torch.float32, CPU):
        assert holder.fp32_precision == flag
    assert holder.fp32_precision == before


def test_an_error_in_a_product_puts_the_flag_back():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), precision.products("high", torch.float32, CPU):
        _ = 1 / 0
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize(("wanted", "dtype"), [("default", torch.float32), ("highest", torch.float64)])
def test_nothing_is_touched_where_nothing_was_asked(wanted, dtype):
    before = torch.backends.mkldnn.matmul.fp32_precision
    with precision.products(wanted, dtype, CPU):
        assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_product_as_the_framework_is_set_waits_until_another_thread_has_put_the_flag_back(monkeypatch):
    lent = precision._Lent(torch.backends.mkldnn.matmul, "fp32_precision")
    monkeypatch.setattr(precision, "_flag", lambda _: lent)
    before, waits, seen = lent.stands(), threading.Event(), []

    def wait_for(predicate):
        waits.set()
        return threading.Condition.wait_for(lent.free, predicate)

    monkeypatch.setattr(lent.free, "wait_for", wait_for)

    def work():
        with precision.products("default", torch.float32, CPU):
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)

    thread = threading.Thread(target=work)
    with lent.to("bf16"):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        thread.start()
        assert waits.wait(60)
    thread.join()
    assert seen == [before]


def test_a_flag_that_followed_a_wider_setting_follows_it_afterwards():
    flag, wider = torch.backends.mkldnn.matmul, torch.backends
    before, wider.fp32_precision = wider.fp32_precision, "tf32"
    try:
        with precision.products("highest", torch.float32, CPU):
            assert flag.fp32_precision == "ieee"
        assert flag.fp32_precision == "tf32"
        wider.fp32_precision = "ieee"
        assert flag.fp32_precision == "ieee"
    finally:
        wider.fp32_precision = before


@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
@pytest.mark.parametrize("wanted", ["default", "highest"])
def test_large_products_on_a_cpu_are_float32_whoever_computes_them(wanted, layout):
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.rand(size, generator=generator) + 1 for size in ((300, 200), (200, 150)))
    exact = left.double() @ right.double()
    if layout == "nt":
        right = right.T.contiguous().T
    elif layout == "tn":
        left = left.T.contiguous().T
    with precision.products(wanted, torch.float32, CPU, 2 * 300 * 200 * 150):
        found = left @ right
    assert ((found - exact).abs() < 1e-5 * exact).all()


@pytest.mark.parametrize("exact", [True, False])
def test_one_dnn_is_let_in_only_where_its_products_are_float32(monkeypatch, exact):
    monkeypatch.setattr(precision, "_one_dnn_is_exact", lambda: exact)
    holder = torch.backends.mkldnn.matmul
    before = holder.fp32_precision
    with precision.products("default", torch.float32, CPU, precision.LARGE):
        assert holder.fp32_precision == ("bf16" if exact else before)
    assert holder.fp32_precision == before


def test_a_user_who_allows_coarser_products_gets_them(monkeypatch):
    monkeypatch.setattr(precision, "_one_dnn_is_exact", lambda: True)
    holder = torch.backends.mkldnn.matmul
    before, holder.fp32_precision = holder.fp32_precision, "tf32"
    try:
        with precision.products("default", torch.float32, CPU, precision.LARGE):
            assert holder.fp32_precision == "tf32"
    finally:
        holder.fp32_precision = before


def test_the_last_of_those_who_share_a_flag_puts_it_back():
    holder = torch.backends.mkldnn.matmul
    before = holder.fp32_precision
    first, second = (precision.products("highest", torch.float32, CPU) for _ in range(2))
    with first:
        with second:
            pass
        assert holder.fp32_precision == "ieee"
    assert holder.fp32_precision == before


def test_two_threads_do_not_leave_each_others_flag_behind():
    before = torch.backends.mkldnn.matmul.fp32_precision
    queries, keys, _ = (one.detach() for one in leaves(dtype=torch.float32))

    def work(wanted):
        for _ in range(20):
            nibs.contrastive_loss(queries, keys, precision=wanted)

    threads = [threading.Thread(target=work, args=(wanted,)) for wanted in ("high", "highest")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_highest_is_at_least_as_close_to_float64_as_float32_can_be():
    queries, keys, scale = leaves(n=64, d=32, dtype=torch.float32)
    exact = nibs.contrastive_loss(queries.double(), keys.double(), scale=scale.double())
    found = nibs.contrastive_loss(queries, keys, scale=scale, precision="highest")
    assert abs(found.double() - exact) < 1e-5 * abs(exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"memory": "1MiB"}], ids=["in one tile", "by the schedule"])
@pytest.mark.parametrize("wanted", ["default", "high"])
def test_half_precision_rows_take_no_coarser_products_whatever_is_set(monkeypatch, dtype, options, wanted):
    holder = torch.backends.mkldnn.matmul
    before, holder.fp32_precision = holder.fp32_precision, "bf16"
    seen, addmm = set(), torch.addmm
    monkeypatch.setattr(mkl, "_has_tiles", lambda: False)

    def look(*factors, **named):
        seen.add(holder.fp32_precision)
        return addmm(*factors, **named)

    monkeypatch.setattr(torch, "addmm", look)
    try:
        queries, keys, scale = leaves(n=16, d=8, dtype=dtype)
        nibs.contrastive_loss(queries, keys, scale=scale, precision=wanted, **options).backward()
    finally:
        holder.fp32_precision = before
    assert seen == {"ieee"}
