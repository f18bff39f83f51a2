"""The tables of docs/performance.md are those of the committed figures, and say what those say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEP = {"objective": "InfoNCE", "n": 65_536, "dtype": "bfloat16"}


@pytest.fixture
def gpu_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_tables")


def test_the_page_shows_the_figures_that_are_committed(gpu_tables, tmp_path):
    committed = (ROOT / "docs/performance.md").read_text()
    page = tmp_path / "page.md"
    page.write_text(committed)
    gpu_tables.main(["--docs", str(page)])
    assert page.read_text() == committed, "python benchmarks/gpu_tables.py --docs docs/performance.md"


def test_a_step_stands_beside_what_is_asked_and_beside_its_products(gpu_tables):
    ceilings = {"contender": "ceilings", "product_tflops": 800.0, "copy_tb_s": 3.0}
    nibs = {**STEP, "contender": "nibs", "d": 768, "median_ms": 54.0, "products": 4, "right": True}
    (line,) = [one for one in gpu_tables.speed([ceilings, nibs])[2].splitlines() if one.startswith("| InfoNCE")]
    assert line == "| InfoNCE | 65536 | 768 | 54 | 45 | 38 | missed by 20% | 33 |"


def test_kernels_are_gathered_by_kind_and_what_does_not_grow_with_the_width_is_told(gpu_tables):
    def profiled(d, **kernels):
        seen = [{"name": name, "calls": 1, "ms": ms} for name, ms in kernels.items()]
        return {**STEP, "contender": "nibs", "d": d, "median_ms": 20.0, "kernels": seen}

    steps = [profiled(512, lse=5.0, nvjet_a=2.0, nvjet_b=3.0), profiled(1024, lse=7.0, nvjet_a=10.0)]
    assert gpu_tables.profiles(steps)[1].splitlines()[2:] == [
        "| lse | 5 | 7 | 3 |",
        "| the library's products | 5 | 10 | 0 |",
        "| between kernels, and smaller ones | 10 | 3 | 17 |",
        "| the step | 20 | 20 | 20 |",
    ]


def test_who_fails_at_every_width_for_one_reason_has_one_line(gpu_tables):
    rows = [{**STEP, "contender": "memeff", "d": d, "failed": "it is not here"} for d in (512, 768)]
    lines = gpu_tables.contenders(rows, []).splitlines()
    assert lines[2:] == ["| memeff | InfoNCE | 512, 768 | 1.7 | it is not here |"]


def test_a_peer_is_held_to_the_time_of_nibs_in_the_same_run(gpu_tables):
    nibs = {**STEP, "contender": "nibs", "d": 768, "median_ms": 50.0}
    peer = {**STEP, "contender": "inf-cl", "d": 768, "median_ms": 400.0}
    assert gpu_tables.contenders([peer], [nibs]).splitlines()[2:] == [
        "| inf-cl | InfoNCE | 768 | 400 | 8 | 10 | missed by 20% |"
    ]


def test_of_several_tiles_the_fastest_counts(gpu_tables):
    about = {"machine": "a card", "python": "3", "versions": {}, "date": "today"}
    row = {"step": "speed", "dtype": "bfloat16", "family": "hopper", "loss": "sigmoid", "d": 512}
    found = [{**row, "ms": ms, "tflops": 1000 / ms} for ms in (50.0, 40.0, 45.0)]
    assert gpu_tables.cupy({**about, "found": found})[-1].splitlines()[-1] == (
        "| bfloat16 | hopper | sigmoid | 40 (25) |"
    )


def test_another_run_replaces_its_own_parts_alone(gpu_tables, tmp_path):
    card = tmp_path / "card"
    card.mkdir()
    (card / "parts.json").write_text(json.dumps({"large": {"outcome": "done"}, "ring": {"outcome": "failed (1)"}}))
    (card / "large.json").write_text("1")
    taken = tmp_path / "parts.json"
    taken.write_text(json.dumps({"ring": {"outcome": "done", "file": "ring.json", "figures": [2]}}))
    gpu_tables.take(taken, card)
    assert json.loads((card / "parts.json").read_text()) == {"large": {"outcome": "done"}, "ring": {"outcome": "done"}}
    assert [json.loads((card / name).read_text()) for name in ("large.json", "ring.json")] == [1, [2]]
