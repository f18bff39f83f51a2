"""The GPU benchmark does all of its work on a CPU, at tiny sizes: on the day there is a GPU it must not fail."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--device", "cpu", "--n", "48", "--d", "16", "--rows", "24", "--copies", "2", "--repeats", "1"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


def test_every_part_runs_is_right_and_is_kept(gpu, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    gpu.main([*SMALL, "--parts", "check", "speed", "--output", str(out)])
    gpu.main([*SMALL, "--parts", "tune", "ring", "large", "--output", str(out)])
    report = json.loads(out.read_text())
    assert set(report) == set(gpu.PARTS)
    rows = [row for part in ("check", "speed", "ring", "large") for row in report[part]["rows"]]
    mine = [row for row in rows if row.get("contender", "nibs") in ("nibs", "nibs plain")]
    assert len(mine) == 9
    assert all(row.get("right", True) and "failed" not in row for row in mine)
    assert "| InfoNCE | 48 | 16 |" in capsys.readouterr().out


def test_a_peer_that_cannot_run_is_a_row_with_its_reason(gpu, monkeypatch, tmp_path):
    def broken(objective, where):
        raise RuntimeError("it is not here")

    monkeypatch.setattr(gpu, "CONTENDERS", {name: {"nibs": gpu.ours, "a peer": broken} for name in gpu.OBJECTIVES})
    gpu.main([*SMALL, "--parts", "speed", "--output", str(tmp_path / "gpu.json")])
    rows = json.loads((tmp_path / "gpu.json").read_text())["speed"]["rows"]
    assert {row.get("failed") for row in rows if row["contender"] == "a peer"} == {"RuntimeError: it is not here"}


def test_rows_before_a_failure_are_kept_and_other_parts_have_their_turn(gpu, monkeypatch, tmp_path, capsys):
    def breaks(run):
        yield {"contender": "ceilings", "product_tflops": 1.0, "copy_tb_s": 1.0}
        raise MemoryError("no more")

    monkeypatch.setattr(gpu.Run, "speed", breaks)
    gpu.main([*SMALL, "--parts", "speed", "large", "--output", str(tmp_path / "gpu.json")])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [row.get("failed") for row in report["speed"]["rows"]] == [None, "MemoryError: no more"]
    assert report["large"]["rows"][0]["right"]
    assert "MemoryError: no more" in capsys.readouterr().out


def test_what_is_asked_of_a_gpu_stands_beside_what_was_found(gpu):
    size = {"n": 65_536, "d": 768}
    nibs = {"contender": "nibs", "objective": "InfoNCE", "median_ms": 40.0, "plan_workspace": 2**28}
    nibs |= {"copies": 5.0, "copies_beyond_inputs": 6.0}
    peers = [
        {"contender": "inf-cl", "objective": "InfoNCE", "median_ms": 200.0},
        {"contender": "memeff", "objective": "InfoNCE", "failed": "it is not here"},
    ]
    rows = [{**row, **size} for row in (nibs, *peers)]
    large = [{"n": 4_194_304, "seconds": 150.0, "right": False}]
    found = {one["what"]: one["verdict"] for one in gpu.verdicts({"speed": rows, "large": large})}
    assert found == {
        "InfoNCE, d = 768: ms": "met",
        "InfoNCE, d = 768: workspace MiB": "met",
        "InfoNCE, d = 768: float32 copies": "missed by 20%",
        "InfoNCE, d = 768: times as fast as inf-cl": "missed by 50%",
        "InfoNCE, d = 768: times as fast as memeff": "not measured: it is not here",
        "4,194,304 rows of 768: seconds": "wrong",
    }


def test_a_reason_is_its_first_sentence(gpu, monkeypatch, tmp_path):
    def broken(objective, where):
        raise MemoryError("CUDA out of memory. Tried to allocate 16.00 GiB. GPU 0 has a total capacity of 79.18 GiB.")

    monkeypatch.setattr(gpu, "CONTENDERS", {name: {"a peer": broken} for name in gpu.OBJECTIVES})
    gpu.main([*SMALL, "--parts", "speed", "--output", str(tmp_path / "gpu.json")])
    rows = json.loads((tmp_path / "gpu.json").read_text())["speed"]["rows"]
    assert {row["failed"] for row in rows[1:]} == {"MemoryError: CUDA out of memory"}


@pytest.mark.parametrize("tuned", [False, True])
def test_a_report_says_whether_tiles_were_tuned(gpu, monkeypatch, tmp_path, tuned):
    monkeypatch.setenv("NIBS_TUNING", str(tmp_path / "tuning.json"))
    if tuned:
        (tmp_path / "tuning.json").write_text("{}")
    assert gpu.report_of("speed", [], gpu.Where("cpu"))["tuned"] == tuned


def test_a_loss_that_is_wrong_fails_the_run(gpu, monkeypatch):
    def wrong(objective, where, **options):
        right = gpu.ours(objective, where, **options)
        return lambda queries, keys, scale: right(queries, keys, scale) * 1.01

    monkeypatch.setattr(gpu, "CONTENDERS", {name: {"nibs": wrong} for name in gpu.OBJECTIVES})
    with pytest.raises(SystemExit, match="WRONG"):
        gpu.main([*SMALL, "--parts", "speed"])


def test_other_bits_from_run_to_run_fail_the_run(gpu, monkeypatch):
    factors = iter([1 + 1e-6, 1 + 2e-6] * 4)
    right = gpu.ours

    def restless(objective, where, **options):
        loss = right(objective, where, **options)
        return lambda queries, keys, scale: loss(queries, keys, scale) * next(factors)

    monkeypatch.setattr(gpu, "ours", restless)
    with pytest.raises(SystemExit, match="WRONG"):
        gpu.main([*SMALL, "--parts", "check"])


def test_a_peer_that_breaks_the_device_is_named(gpu, monkeypatch, tmp_path):
    def broken(objective, where):
        monkeypatch.setattr(gpu.Where, "forget", broken_device)
        raise RuntimeError("an illegal address")

    def broken_device(where):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(gpu, "CONTENDERS", {name: {"nibs": gpu.ours, "a peer": broken} for name in gpu.OBJECTIVES})
    gpu.main([*SMALL, "--parts", "speed", "--output", str(tmp_path / "gpu.json")])
    rows = json.loads((tmp_path / "gpu.json").read_text())["speed"]["rows"]
    assert [row.get("contender") for row in rows] == ["ceilings", "nibs", "a peer", None]
    assert [row.get("failed") for row in rows[2:]] == [
        "RuntimeError: an illegal address",
        "RuntimeError: the device is gone",
    ]


def test_a_profile_that_fails_loses_no_time(gpu, monkeypatch, tmp_path):
    def forbidden(*_):
        raise RuntimeError("no counters for you")

    monkeypatch.setattr(gpu, "profile", forbidden)
    gpu.main([*SMALL, "--parts", "speed", "--only", "nibs", "--output", str(tmp_path / "gpu.json")])
    rows = json.loads((tmp_path / "gpu.json").read_text())["speed"]["rows"]
    mine = [row for row in rows if row["contender"] == "nibs"]
    assert [row["failed"] for row in mine] == ["RuntimeError: no counters for you"] * 2
    assert all(row["median_ms"] > 0 for row in mine)


def test_contenders_can_be_named(gpu, tmp_path):
    gpu.main([*SMALL, "--parts", "speed", "--only", "nibs plain", "--output", str(tmp_path / "gpu.json")])
    rows = json.loads((tmp_path / "gpu.json").read_text())["speed"]["rows"]
    assert {row["contender"] for row in rows} == {"ceilings", "nibs plain"}


def test_nothing_begins_after_the_time_is_up(gpu, tmp_path):
    gpu.main([*SMALL, "--parts", "speed", "large", "--seconds", "-1", "--output", str(tmp_path / "gpu.json")])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [report[part]["rows"] for part in ("speed", "large")] == [[{"failed": "no time was left"}]] * 2
