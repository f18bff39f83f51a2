"""The benchmark measures what it says: each loss is the right one, and who cannot run is shown with the reason."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("run")


def asked(run, *names):
    options = argparse.Namespace(only=list(names), memory=None, turns=0, seconds=8.0, no_memory=True, patience=30.0)
    return run.Run(options, "cpu", {"float32, torch": 1e9})


@pytest.mark.parametrize("objective", ["InfoNCE", "Sigmoid"])
@pytest.mark.parametrize("name", ["dense torch", "nibs torch", "nibs numpy"])
def test_a_contender_computes_the_loss_of_its_column(run, monkeypatch, objective, name):
    monkeypatch.setattr(run, "CONTENDERS", [one for one in run.CONTENDERS if one.name == name])
    (row,) = asked(run).measure(objective, "float32", 150, 8)  # more than are sampled
    assert row.reason == ""
    assert row.loss_error < 1e-5
    assert row.gradient_error < 1e-4


def test_who_cannot_run_has_one_row_with_the_reason(run, monkeypatch):
    def make(batch):
        raise RuntimeError("needs a GPU\nand more words")

    monkeypatch.setattr(run, "CONTENDERS", [run.Contender("a peer", "InfoNCE", "peer", make)])
    here = asked(run)
    for n in (8, 16):
        here.measure("InfoNCE", "float32", n, 4)
    assert [(row.n, row.reason) for row in here.rows] == [(8, "RuntimeError: needs a GPU")]


def test_a_slow_peer_is_left_out_of_larger_batches_and_the_table_says_so(run, monkeypatch):
    step = importlib.import_module("contenders").Step
    monkeypatch.setattr(run, "errors", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(run, "seconds", lambda calls, turns: (dict.fromkeys(calls, 3.0), {}))
    slow = run.Contender("a peer", "InfoNCE", "peer", lambda batch: step(lambda: 0.0, lambda: 0.0, list))
    monkeypatch.setattr(run, "CONTENDERS", [slow])
    here = asked(run)
    here.measure("InfoNCE", "float32", 8, 4, following=16)  # four times as long: 12 seconds
    here.measure("InfoNCE", "float32", 16, 4)
    assert here.rows[0].step is not None
    assert here.rows[1].reason == "3 s a step at n = 8: this one would take longer than --seconds 8"


def test_who_fails_in_a_later_turn_has_a_reason_and_the_others_have_their_turns(run, monkeypatch):
    step = importlib.import_module("contenders").Step
    monkeypatch.setattr(run, "errors", lambda *_: (0.0, 0.0))
    left = [0.0]
    calls = {"dense torch": left.pop, "a peer": lambda: 0.0}
    contenders = [
        run.Contender(name, "InfoNCE", "dense", lambda batch, both=both: step(lambda: 0.0, both, list))
        for name, both in calls.items()
    ]
    monkeypatch.setattr(run, "CONTENDERS", contenders)
    rows = asked(run).measure("InfoNCE", "float32", 8, 4)
    assert [row.reason for row in rows] == ["IndexError: pop from empty list", ""]
    assert [row.step is None for row in rows] == [True, False]


def test_figures_until_an_interruption_are_shown_and_kept(run, monkeypatch, tmp_path, capsys):
    def interrupted(self, *_):
        self.rows.append(run.Row("a peer", "peer", "InfoNCE", "float32", 8, 512, forward=1.0, step=2.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "grow", interrupted)
    monkeypatch.setattr(run, "product_rates", lambda device: {"float32, torch": 1e9})
    monkeypatch.setattr(run, "plot", lambda *_: None)
    page = tmp_path / "page.md"
    words = ["run.py", "--device", "cpu", "--results", str(tmp_path), "--docs", str(page)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="Interrupted"):
        run.main()
    assert "| a peer | 8 |" in capsys.readouterr().out
    assert '"contender": "a peer"' in (tmp_path / "cpu.json").read_text()
    assert not page.exists()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no alarm")
def test_a_first_step_that_is_not_over_in_time_is_broken_off(run, monkeypatch):
    def make(batch):
        while True:
            pass

    monkeypatch.setattr(run, "CONTENDERS", [run.Contender("a peer", "InfoNCE", "peer", make)])
    here = asked(run)
    here.options.patience = 0.01
    (row,) = here.measure("InfoNCE", "float32", 8, 4)
    assert row.reason == "TimeoutError: its first step was not over after 0.01 s"


def test_the_table_says_who_is_missing_and_what_a_reader_must_know(run, monkeypatch):
    row = run.Row("a peer", "peer", "InfoNCE", "float32", 8, 4, forward=1.0, step=2.0, first=30.0)
    late = run.Row("a peer", "peer", "InfoNCE", "float32", 16, 4, reason="2 s a step at n = 8")
    known = run.Contender("a peer", "InfoNCE", "peer", lambda _: None, "no gradient of the scale")
    monkeypatch.setattr(run, "CONTENDERS", [known])
    about = {"gpu": "a card", "date": "today", "command": "this", "dim": 4}
    text = run.tables([row, late], {}, about)
    assert "| loss | n | first step s | forward s | step s |" in text  # and no column that nobody fills
    assert "| a peer | 8 | 30 | 1 | 2 |" in text
    assert "| a peer | 16 | 2 s a step at n = 8 |" in text
    assert "a peer: no gradient of the scale." in text


@pytest.mark.parametrize("name", ["cpu", "cpu-one-thread"])
def test_the_page_shows_the_figures_that_are_committed(run, name):
    found = json.loads((FOLDER / f"results/{name}.json").read_text())
    rows = [run.Row(**row) for row in found["rows"]]
    page = (FOLDER.parent / "docs/performance.md").read_text()
    assert run.tables(rows, found["products per second"], found["machine"]) in page


def test_tables_replace_those_between_the_marks_of_a_page(run, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- cpu tables -->\nold\n<!-- end of cpu tables -->\nafter\n")
    run.put_into(page, "cpu", "new")
    assert page.read_text() == "before\n<!-- cpu tables -->\n\nnew\n<!-- end of cpu tables -->\nafter\n"


def test_a_page_without_marks_is_left_alone(run, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("words\n")
    with pytest.raises(SystemExit, match="no marks"):
        run.put_into(page, "cpu", "new")
    assert page.read_text() == "words\n"


def test_the_gpu_benchmark_of_jax_runs_and_its_contenders_agree(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    bench = importlib.import_module("gpu_jax")
    rows = bench.measure("cpu", 48, 16, turns=1)
    assert [row.get("failed") for row in rows] == [None] * 4
    assert all(one["ratio"] > 0 for one in bench.verdicts(rows))


def test_a_contender_of_the_gpu_benchmark_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    pytest.importorskip("jax")
    bench = importlib.import_module("gpu_jax")
    right = bench.contenders("cpu", *bench.batch(24, 8))
    wrong = {"eager": right["eager"], "jax, xla": lambda: lambda: lambda: [2 * one for one in right["eager"]()()()]}
    monkeypatch.setattr(bench, "contenders", lambda *_: wrong)
    rows = bench.measure("cpu", 24, 8, turns=1)
    assert "differ" in rows[1]["failed"] and "median_ms" not in rows[1]
