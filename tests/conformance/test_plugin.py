"""The pytest plugin: what it asks for, what it skips, what it excuses, and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nibs
from nibs.registry import registry
from nibs_conformance import hookspecs, report
from nibs_conformance.hookspecs import Deviation

from .mutants import ForgottenScale, Twin, numpy_claims

FEW = (
    "--nibs-dtypes",
    "float32",
    "--nibs-cases",
    "symmetric,sigmoid,weights-symmetric",
    "-k",
    "test_loss or test_gradient_of",
)


def deviations(*found: Any) -> Any:
    """A plugin that confesses these."""

    class Confessor:
        @nibs.hookimpl
        def nibs_conformance_deviations(self, backend: str) -> Any:
            return found if backend == "numpy" else ()

    return Confessor()


@pytest.fixture
def confess() -> Any:
    hookspecs.register()
    held = []

    def confess(*found: Any) -> None:
        plugin = deviations(*found)
        registry.hooks.register(plugin)
        held.append(plugin)

    yield confess
    for plugin in held:
        registry.hooks.unregister(plugin)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # Named by -p where the suite is on the path and not installed; harmless beside its entry point, which is off.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "nibs_conformance.plugin",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        "--rootdir",
        str(cwd),
    ]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_without_a_backend_it_says_what_to_type(tmp_path: Path) -> None:
    result = run("--pyargs", "nibs_conformance", cwd=tmp_path)
    assert result.returncode != 0
    assert "--nibs-backend NAME" in result.stdout + result.stderr and "numpy" in result.stdout + result.stderr


def test_other_peoples_tests_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("def test_mine():\n    import sys\n    assert 'numpy' not in sys.modules\n")
    result = run("test_mine.py", "-q", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_is_not_claimed_is_skipped_in_the_words_of_the_claim(conform: Callable[..., Any]) -> None:
    claims = replace(
        registry.info("numpy").capabilities, features=registry.info("numpy").capabilities.features - {"weights"}
    )
    found = conform(Twin(), *FEW, claims=claims)
    assert not found.failed
    assert any("it lacks weights= ('weights')" in reason for reason in found.skipped)


def test_a_claim_without_its_hook_is_caught(conform: Callable[..., Any]) -> None:
    found = conform(Twin(), "--nibs-dtypes", "float32", "-k", "test_claims", claims=numpy_claims("autograd"))
    assert set(found.failed) == {"test_a_claim_that_needs_a_hook_has_it"}


def test_a_known_failure_is_excused_by_its_exception_alone(conform: Callable[..., Any], confess: Any) -> None:
    confess(
        Deviation("test_gradients.py::test_gradient_of_scale[*", "notyet", "the scale is not trained", AssertionError)
    )
    assert not conform(ForgottenScale(), *FEW).failed


def test_another_exception_is_not_excused(conform: Callable[..., Any], confess: Any) -> None:
    confess(
        Deviation(
            "test_gradients.py::test_gradient_of_scale[*", "notyet", "the scale is not trained", NotImplementedError
        )
    )
    assert set(conform(ForgottenScale(), *FEW).failed) == {"test_gradient_of_scale"}


def test_a_deviation_that_passes_is_news(conform: Callable[..., Any], confess: Any) -> None:
    confess(Deviation("test_values.py::test_loss[*symmetric]", "never", "it was thought impossible", AssertionError))
    found = conform(Twin(), *FEW)
    assert set(found.failed) == {"test_loss"} and found.cases == {"symmetric", "weights-symmetric"}


def test_a_deviation_has_a_kind_and_a_reason() -> None:
    with pytest.raises(ValueError, match="notimpl"):
        Deviation("test_loss*", "someday", "why")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sentence"):
        Deviation("test_loss*", "never", "")


# -- the report ------------------------------------------------------------------------------------------


@pytest.fixture
def written(conform: Callable[..., Any], tmp_path: Path) -> tuple[dict[str, Any], str]:
    folder = tmp_path / "reports"
    conform(ForgottenScale(), *FEW, "--nibs-report", str(folder))
    assert (folder / "junit.xml").read_text().startswith("<?xml")
    return json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text()


def test_the_report_holds_each_error_beside_its_budget(written: tuple[dict[str, Any], str]) -> None:
    found, _ = written
    loss = next(test for test in found["tests"] if (test["test"], test["case"]) == ("test_loss", "symmetric"))
    assert loss["outcome"] == "passed" and loss["dtype"] == "float32" and loss["backend"] == "numpy"
    (measured,) = loss["measured"]
    assert measured["quantity"] == "loss" and measured["error"] <= measured["budget"]
    scale = next(
        test for test in found["tests"] if (test["test"], test["case"]) == ("test_gradient_of_scale", "symmetric")
    )
    assert scale["outcome"] == "failed" and "gradient of scale" in scale["reason"] and scale["measured"][0]["used"] > 1


def test_the_report_says_what_it_was_measured_on(written: tuple[dict[str, Any], str]) -> None:
    found, _ = written
    assert {"system", "processor", "python", "numpy", "cores"} <= found["machine"].keys()
    assert "float32" in found["backends"]["numpy"]["dtypes"]


def test_the_page_stands_alone(written: tuple[dict[str, Any], str]) -> None:
    _, page = written
    assert page.startswith("<!doctype html>")
    for outside in ("<script", "http://", "https://", "src=", "@import", "<link"):
        assert outside not in page, outside


def test_the_page_shows_cases_by_backend_and_what_fails(written: tuple[dict[str, Any], str]) -> None:
    _, page = written
    assert "numpy fails" in page and "weights-symmetric" in page and "gradient of scale" in page


CRASHES = """
import os

def pytest_runtest_setup(item):
    if item.name.startswith("test_loss[") and item.name.endswith("-sigmoid]"):
        os._exit(1)
"""


def test_a_run_by_several_processes_is_written_down_whole_and_one_that_ends_is_a_failure(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "crashes.py").write_text(CRASHES)
    workers = ("-p", "xdist", "-p", "crashes", "-n", "2")
    result = run(
        *workers, "--pyargs", "nibs_conformance", "--nibs-backend", "numpy", *FEW, "--nibs-report", "r", cwd=tmp_path
    )
    assert result.returncode == 1, result.stdout + result.stderr
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert "numpy" in found["machine"]
    failed = [test for test in found["tests"] if test["outcome"] == "failed"]
    assert [(test["test"], test["backend"]) for test in failed] == [("test_loss", "numpy")] and "gw" in failed[0][
        "reason"
    ]
    assert len(found["tests"]) > 12


def test_several_reports_become_one_page(written: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    found, _ = written
    page = report.page([found, found])
    assert "numpy (1)" in page and "numpy (2)" in page
