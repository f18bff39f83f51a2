"""The benchmark that waits for a GPU, by the host runner: it must not die of a slip on the day there is one."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vectors import replay

from nibs_cupy.host import KERNELS

FILE = Path(__file__).parents[3] / "benchmarks" / "gpu_cupy.py"


@pytest.fixture(scope="module")
def benchmark_file() -> Any:
    if not FILE.is_file():
        pytest.skip("the benchmarks are not here")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FILE.parent))
        return importlib.import_module(FILE.stem)


def test_every_step_runs_by_the_host_runner(benchmark_file, capsys):
    steps = ["ceilings", "check", "record", "speed", "kernels"]
    benchmark_file.main(["--dry", *steps])

    said = capsys.readouterr().out
    assert {line.split()[0] for line in said.splitlines()} == set(steps)
    assert "WRONG" not in said and said.count("verdict=right") == 10
    assert "family=hopper dtype=bfloat16 loss=sigmoid" in said


def test_every_instruction_is_recorded_and_one_that_changed_is_seen_when_replayed(benchmark_file):
    bench = benchmark_file.Bench(dry=True)
    benchmark_file.record(bench)

    wrapped = set(re.findall(r"NIBS_KERNEL\((\w+),", (KERNELS / "instructions.cu").read_text()))
    assert {path.stem.partition("-")[0] for path in bench.vectors.glob("*.npz")} == wrapped
    assert replay(bench.vectors) == []
    for path in bench.vectors.glob("*.npz"):
        with np.load(path) as vector:
            changed = dict(vector)
        changed["out"].flat[3] += 1
        np.savez(path, **changed)
    assert len(replay(bench.vectors)) == len(wrapped)


def test_a_step_whose_time_is_up_makes_room_for_the_next(benchmark_file, monkeypatch, capsys):
    def run(command: list[str], timeout: float, **how: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout)

    there = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(benchmark_file, "subprocess", there)
    benchmark_file.main(["--dry", "suite", "record"])

    said = capsys.readouterr().out
    assert said.count("not over in its time: ask for `suite` alone") == 3 and "record name=" in said


def test_an_unknown_step_is_refused_with_those_that_are(benchmark_file, capsys):
    with pytest.raises(SystemExit):
        benchmark_file.main(["--dry", "sped"])
    assert "no step 'sped': expected some of ceilings, check" in capsys.readouterr().err
