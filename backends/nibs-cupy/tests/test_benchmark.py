"""The benchmark that waits for a GPU, by the host runner: it must not die of a slip on the day there is one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[3] / "benchmarks" / "gpu_cupy.py"


@pytest.fixture(scope="module")
def benchmark_file() -> Any:
    if not FILE.is_file():
        pytest.skip("the benchmarks are not here")
    spec = importlib.util.spec_from_file_location("gpu_cupy", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_step_runs_by_the_host_runner(benchmark_file, capsys):
    steps = ["ceilings", "check", "record", "speed", "kernels"]
    benchmark_file.main(["--dry", *steps])

    said = capsys.readouterr().out
    assert {line.split()[0] for line in said.splitlines()} == set(steps)
    assert "WRONG" not in said and said.count("verdict=right") == 10
    assert "family=hopper dtype=bfloat16 loss=sigmoid" in said


def test_an_unknown_step_is_refused_with_those_that_are(benchmark_file, capsys):
    with pytest.raises(SystemExit):
        benchmark_file.main(["--dry", "sped"])
    assert "no step 'sped': expected some of ceilings, check" in capsys.readouterr().err
