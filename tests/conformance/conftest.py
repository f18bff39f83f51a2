"""Runs the conformance suite inside a test, against a backend that takes the place of another.

In this process, because the oracle's answers are kept in it: a run of some thirty cases takes seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from nibs.registry import registry


@dataclass
class Run:
    """Outcomes of one run: `{test name: {case or dtype or parameters}}` of what failed, and how many passed."""

    code: int = 0
    failed: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    cases: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)
    passed: set[str] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2].partition("[")
        if report.failed:
            facts = getattr(report, "nibs", {})
            self.failed[name[0]].add(name[2].removesuffix("]"))
            self.reasons.append(f"{report.nodeid}: {report.longreprtext[-600:]}")
            if facts.get("case"):
                self.cases.add(facts["case"])
        elif report.skipped:
            self.skipped.append(str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr))
        elif report.when == "call":
            self.passed.add(name[0])


@pytest.fixture
def conform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Run]:
    """`conform(backend, *arguments, name="numpy", claims=...)`: the suite against `backend` in the place of `name`.

    levels: the modules of the suite to collect, else all of them.
    """

    def run(
        backend: Any,
        *arguments: str,
        name: str = "numpy",
        claims: Any = None,
        plugins: Sequence[Any] = (),
        levels: Sequence[str] = ("nibs_conformance",),
    ) -> Run:
        registry.load(name)
        status = registry._statuses[name]
        assert status.info is not None
        if claims is not None:
            monkeypatch.setitem(
                registry._statuses, name, replace(status, info=replace(status.info, capabilities=claims))
            )
        if backend is not None:
            monkeypatch.setitem(registry._backends, name, backend)
        found = Run()
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
        quiet = [
            "-p",
            "nibs_conformance.plugin",
            "-p",
            "no:cacheprovider",
            # Nothing here asks for these, and they take a tenth of the time of tests as short as the suite's.
            *("-p", "no:logging", "-p", "no:unraisableexception", "-p", "no:threadexception"),
            "-qq",
            "--no-header",
            "--no-summary",
            "-c",
            "/dev/null",
            "--tb=line",
        ]
        where = ["--rootdir", str(tmp_path), "--pyargs", *levels, "--nibs-backend", name]
        found.code = int(pytest.main([*quiet, *where, *arguments], plugins=[found, *plugins]))
        return found

    return run
