"""One command for a GPU: a part that fails or hangs leaves the others their turn, and what was measured is kept."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
WORDS = {
    "breaks": "-c 'print(41); raise SystemExit(3)'",
    "hangs": "-c 'print(42, flush=True)\nwhile True: pass'",
    "works": """-c 'import nibs, sys; open(sys.argv[1], "w").write("43")' {out}""",
    "waits": "-c 'print(44)'",
}


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("on_gpu")
    limits = {"hangs": 1}
    parts = [module.Part(name, limits.get(name, 60), words, words) for name, words in WORDS.items()]
    monkeypatch.setattr(module, "PARTS", parts)
    return module


def test_a_part_that_fails_or_hangs_leaves_the_others_their_turn(on_gpu, tmp_path):
    assert on_gpu.main(["breaks", "hangs", "works", "--results", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "parts.json").read_text())
    outcomes = {name: one["outcome"] for name, one in found.items()}
    assert outcomes == {"breaks": "failed (3)", "hangs": "cut off after 1 s", "works": "done"}
    assert found["breaks"]["last words"] == ["41"]
    assert (tmp_path / "hangs.log").read_text().startswith("42\n")
    assert (tmp_path / "works.json").read_text() == "43"


def test_what_no_time_is_left_for_is_named_and_can_be_asked_for(on_gpu, tmp_path, capsys):
    assert on_gpu.main(["works", "waits", "--minutes", "0", "--results", str(tmp_path)]) == 1
    said = f"no time left; to go on: python benchmarks/on_gpu.py works waits --results {tmp_path}\n"
    assert capsys.readouterr().out == said


def test_a_part_that_would_be_cut_off_is_left_for_another_call_and_a_short_one_is_run(on_gpu, tmp_path, capsys):
    assert on_gpu.main(["waits", "hangs", "--minutes", "0.5", "--results", str(tmp_path)]) == 1
    assert set(json.loads((tmp_path / "parts.json").read_text())) == {"hangs"}
    assert "to go on: python benchmarks/on_gpu.py waits" in capsys.readouterr().out


def test_what_a_part_leaves_elsewhere_is_kept_too_and_nothing_older(on_gpu, monkeypatch, tmp_path):
    (tmp_path / "old.npz").write_text("40")
    os.utime(tmp_path / "old.npz", (1, 1))
    leaves = (("*.npz", "vectors/{name}"), ("no.json", "leaves.json"))
    part = on_gpu.Part("leaves", 60, """-c 'open("new.npz", "w").write("45")'""", "", leaves)
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(on_gpu, "PARTS", [part])
    assert on_gpu.main(["--results", str(tmp_path / "results")]) == 0
    assert [(one.name, one.read_text()) for one in (tmp_path / "results/vectors").iterdir()] == [("new.npz", "45")]


def test_the_record_keeps_parts_of_earlier_calls(on_gpu, tmp_path):
    for name in ("works", "waits"):
        assert on_gpu.main([name, "--results", str(tmp_path)]) == 0
    assert set(json.loads((tmp_path / "parts.json").read_text())) == {"works", "waits"}


def test_the_record_alone_holds_all_figures(on_gpu, tmp_path):
    assert on_gpu.main(["works", "waits", "--results", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "parts.json").read_text())
    assert (record["works"]["file"], record["works"]["figures"]) == ("works.json", 43)
    assert "figures" not in record["waits"]


def test_figures_that_were_cut_off_are_left_out_of_the_record(on_gpu, monkeypatch, tmp_path):
    part = on_gpu.Part("broken", 60, """-c 'import sys; open(sys.argv[1], "w").write("[4")' {out}""", "")
    monkeypatch.setattr(on_gpu, "PARTS", [part])
    assert on_gpu.main(["--results", str(tmp_path)]) == 0
    assert "figures" not in json.loads((tmp_path / "parts.json").read_text())["broken"]


def test_the_list_names_each_part_and_runs_none(on_gpu, tmp_path, capsys):
    assert on_gpu.main(["--list", "--results", str(tmp_path / "none")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if " s  python" in line] == list(WORDS)
    assert not (tmp_path / "none").exists()
