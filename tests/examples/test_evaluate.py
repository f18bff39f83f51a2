"""Retrieval, zero-shot and linear evaluation, on rows whose answers can be seen."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from evaluate import linear_evaluation, retrieval, zero_shot_accuracy


def test_retrieval_counts_strictly_nearer_rivals_of_other_ids() -> None:
    queries = torch.eye(4)
    keys = queries.clone()
    keys[0], keys[1] = (
        torch.tensor([0.5, 0, 0, 0]),
        torch.tensor([0.9, 1, 0, 0]),
    )  # key 1 is nearer to query 0 than its own
    assert retrieval(queries, keys, torch.arange(4)) == (0.75, 1.0, 1.0)
    assert retrieval(queries, keys, torch.tensor([7, 7, 2, 3])) == (1.0, 1.0, 1.0)


def test_retrieval_in_strips_is_retrieval_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 50, 3, generator=draw)
    ids = torch.randint(0, 40, (50,), generator=draw)
    whole = retrieval(queries, keys, ids)
    monkeypatch.setattr("evaluate.QUERIES_AT_ONCE", 7)
    assert retrieval(queries, keys, ids) == whole
    assert 0 < whole[0] < whole[2] < 1


def test_zero_shot_takes_the_nearest_class_whatever_its_length() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    classes = torch.tensor([[100.0, 0.0], [0.0, 0.01]])
    assert zero_shot_accuracy(rows, classes, torch.tensor([0, 1, 0])) == pytest.approx(2 / 3)


def test_linear_evaluation_finds_what_is_linear_and_no_more() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, test_rows = torch.randn(400, 5, generator=draw), torch.randn(400, 5, generator=draw)
    labels, test_labels = ((one @ torch.arange(5.0) > 0).long() for one in (rows, test_rows))
    assert linear_evaluation(rows, labels, test_rows, test_labels) > 0.95
    chance = torch.randint(0, 2, (400,), generator=draw)
    assert linear_evaluation(rows, chance, test_rows, test_labels) < 0.7
