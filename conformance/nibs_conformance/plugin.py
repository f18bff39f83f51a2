"""The pytest plugin: options, fixtures, which tests run for which backend, and what is written down.

    python -m pytest --pyargs nibs_conformance --nibs-backend numpy --nibs-report reports

Every pytest run of an environment that has the suite installed loads this file, so it imports nothing
beyond pytest until tests of the suite itself are collected, and leaves all other tests alone. Skips
come from declared capabilities only, in the words of the declaration.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

__all__: list[str] = []

HERE = Path(__file__).parent
FACTS = pytest.StashKey[dict[str, Any]]()
MEASURED = pytest.StashKey[list[dict[str, Any]]]()
DTYPES = ("float64", "float32", "bfloat16", "float16")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The suite's options."""
    group = parser.getgroup("nibs", "conformance of nibs backends")
    group.addoption(
        "--nibs-backend",
        action="append",
        metavar="NAME",
        help="the backend to test; give it again, or separate names by commas, to test several side by side",
    )
    group.addoption(
        "--nibs-device",
        metavar="DEVICE",
        help="where its arrays live, such as cuda:0; else what it declares, the CPU first",
    )
    group.addoption("--nibs-dtypes", metavar="NAMES", help="only these dtypes, separated by commas; else all four")
    group.addoption(
        "--nibs-cases", metavar="PATTERNS", help="only cases that match one of these patterns, separated by commas"
    )
    group.addoption("--nibs-report", metavar="DIR", help="write report.json, report.html and junit.xml there")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Ask for pytest's own JUnit file where a report is wanted; collect what the tests measure."""
    folder = config.getoption("--nibs-report")
    if folder and not hasattr(config, "workerinput"):
        from nibs_conformance.report import Recorder

        if not config.option.xmlpath:
            # read by pytest's own JUnit plugin, which is configured after this one
            config.option.xmlpath = str(Path(folder) / "junit.xml")
        config.pluginmanager.register(Recorder(config, Path(folder)), "nibs_conformance_recorder")


def _ours(path: Path) -> bool:
    return path.parent == HERE


def listed(config: pytest.Config, option: str) -> list[str]:
    value = config.getoption(option)
    parts = [value] if isinstance(value, str) else value or []
    return [name.strip() for part in parts for name in part.split(",") if name.strip()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Multiply the suite's tests by backend, dtype and case; nobody else's."""
    if not _ours(Path(str(metafunc.definition.path))):
        return
    config, fixtures = metafunc.config, metafunc.fixturenames
    if "subject" in fixtures:
        metafunc.parametrize("subject", _backends(config), indirect=True, scope="session")
    if "dtype" in fixtures:
        tried = getattr(metafunc.function, "nibs_dtypes", DTYPES)
        metafunc.parametrize("dtype", [name for name in _dtypes(config) if name in tried], scope="session")
    if "case" in fixtures:
        from nibs_conformance.cases import CASES

        patterns = listed(config, "--nibs-cases") or ["*"]
        wanted = getattr(metafunc.function, "nibs_cases", None)
        found = [
            case
            for case in CASES.values()
            if any(fnmatch(case.name, pattern) for pattern in patterns) and (wanted is None or wanted(case))
        ]
        metafunc.parametrize("case", found, ids=[case.name for case in found], scope="session")


def _backends(config: pytest.Config) -> list[str]:
    names = listed(config, "--nibs-backend")
    if not names:
        from nibs.registry import registry

        raise pytest.UsageError(f"name the backend to test: --nibs-backend NAME. Here: {registry.listing()}.")
    return names


def _dtypes(config: pytest.Config) -> list[str]:
    names = listed(config, "--nibs-dtypes") or list(DTYPES)
    for name in names:
        if name not in DTYPES:
            raise pytest.UsageError(f"--nibs-dtypes {name}: expected names out of {', '.join(DTYPES)}.")
    return names


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what a backend's plugin says is known to fail."""
    ours = [item for item in items if _ours(item.path) and hasattr(item, "callspec")]
    known: dict[str, list[Any]] = {}
    for item in ours:
        parameters = item.callspec.params
        name = parameters.get("subject")
        if name is None:
            continue
        case = parameters.get("case")
        facts = {
            "backend": name,
            "file": item.path.name,
            "test": getattr(item, "originalname", item.name),
            "dtype": parameters.get("dtype"),
            "case": case.name if case is not None else None,
        }
        item.stash[FACTS] = facts
        if name not in known:
            known[name] = _deviations(name)
        for deviation in known[name]:
            if fnmatch(_short(item), deviation.tests.replace("[", "[[]")):
                item.add_marker(
                    pytest.mark.xfail(
                        reason=f"{deviation.kind}: {deviation.reason}", raises=deviation.raises, strict=True
                    )
                )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Send what a test is about and what it measured along with its report; also from xdist's workers."""
    report = yield
    facts = item.stash.get(FACTS, None)
    if facts is not None:
        report.nibs = {**facts, "measured": item.stash.get(MEASURED, [])}
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that writes the report what one of xdist's workers ran on: it has imported no framework."""
    if hasattr(session.config, "workeroutput") and session.config.getoption("--nibs-report"):
        from nibs_conformance.report import machine

        session.config.workeroutput["nibs_machine"] = machine()


def _short(item: pytest.Item) -> str:
    return f"{item.path.name}::{item.name}"


def _deviations(name: str) -> list[Any]:
    from nibs_conformance.hookspecs import Deviation, register

    found = [one for answer in register().nibs_conformance_deviations(backend=name) for one in answer or ()]
    for one in found:
        if not isinstance(one, Deviation):
            raise pytest.UsageError(
                f"nibs_conformance_deviations('{name}') gave a {type(one).__name__}, expected a Deviation."
            )
    return found


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> Any:
    """The backend under test."""
    from nibs_conformance.checks import Subject
    from nibs_conformance.hookspecs import register

    register().nibs_conformance_prepare(backend=request.param)
    return Subject(request.param, request.config.getoption("--nibs-device"))


@pytest.fixture(scope="session")
def hooks() -> Any:
    """The suite's own hooks, see `hookspecs`."""
    from nibs_conformance.hookspecs import register

    return register()


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Any:
    """Holds numbers against the truth, and writes down what it measured."""
    from nibs_conformance.checks import Judge

    return Judge(request.node.stash.setdefault(MEASURED, []).append)


@pytest.fixture
def served(subject: Any, request: pytest.FixtureRequest) -> Any:
    """`served(problem, dtype, **options)`: skips, in the declaration's own words, what the backend does not claim."""

    def ask(problem: Any, dtype: str, **options: Any) -> None:
        sentence = subject.why_not(problem, dtype, **options)
        if sentence is not None:
            pytest.skip(f"{subject.name}: {sentence}")

    return ask


@pytest.fixture
def claimed(subject: Any) -> Any:
    """`claimed(feature)`: skips what the backend does not claim."""

    def ask(feature: str) -> None:
        from nibs.capabilities import FEATURES

        if not subject.has(feature):
            pytest.skip(f"{subject.name}: it does not claim '{feature}' ({FEATURES[feature]})")

    return ask
