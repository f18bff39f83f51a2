"""What a run found, written down: report.json, and report.html to look at and to publish.

JSON holds every measured error beside its budget, the machine and the versions; the page draws from it
alone, is one file without scripts or anything fetched, and can be made again from a JSON file:

    python -m nibs_conformance.report reports/report.json [another.json ...] -o report.html

Several JSON files, of several machines or backends, become one page. JUnit is pytest's own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import pytest

from nibs_conformance.plugin import listed

__all__ = ["Recorder", "machine", "page"]

LEVELS = {
    "test_claims.py": "claims",
    "test_determinism.py": "manners",
    "test_values.py": "values",
    "test_gradients.py": "gradients",
    "test_tiles.py": "tiles",
    "test_memory.py": "memory law",
    "test_ring.py": "ring",
    "test_bad_input.py": "bad input",
}
ORDER = ("float64", "float32", "bfloat16", "float16")


class Recorder:
    """Gathers test reports as pytest makes them (also from xdist's workers), and writes both files at the end."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.tests: dict[str, dict[str, Any]] = {}
        self.machine: dict[str, str] = {}
        self.began = time.time()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: Any) -> None:
        self.machine.update(getattr(node, "workeroutput", {}).get("nibs_machine", {}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        facts = getattr(report, "nibs", None) or self._crashed(report)
        if facts is None:
            return
        entry = self.tests.setdefault(report.nodeid, {**facts, "outcome": "passed", "seconds": 0.0, "reason": ""})
        entry["seconds"] = round(entry["seconds"] + report.duration, 4)
        entry["measured"] = facts["measured"]
        excused = getattr(report, "wasxfail", None)
        if excused is not None:
            entry["outcome"] = "deviates" if report.skipped else "failed"
            entry["reason"] = str(excused) or "deviates"
        elif report.failed:
            entry["outcome"], entry["reason"] = "failed", _last_line(report.longreprtext)
        elif report.skipped:
            entry["outcome"] = "skipped"
            where = report.longrepr
            entry["reason"] = str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")

    def _crashed(self, report: pytest.TestReport) -> dict[str, Any] | None:
        """What its name says of a test of the suite in which one of xdist's workers ended."""
        file, _, name = report.nodeid.rpartition("::")
        if not report.failed or Path(file).name not in LEVELS:
            return None
        backends = listed(self.config, "--nibs-backend")
        return {
            "backend": next((backend for backend in backends if backend in name), backends[0]),
            "file": Path(file).name,
            "test": name.partition("[")[0],
            "dtype": None,
            "case": None,
            "measured": [],
        }

    def pytest_sessionfinish(self) -> None:
        if not self.tests:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in self.tests.values():
            for one in entry["measured"]:
                for key, value in one.items():
                    if isinstance(value, float) and value in (float("inf"), float("-inf")):
                        one[key] = str(value)  # JSON has no infinity
        names = sorted({entry["backend"] for entry in self.tests.values()})
        found = {
            "suite": importlib.metadata.version("nibs-conformance") if _installed("nibs-conformance") else "0.1.0",
            "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime(self.began)),
            "seconds": round(time.time() - self.began, 1),
            "command": " ".join(["pytest", *map(str, self.config.invocation_params.args)]),
            "machine": {**machine(), **self.machine},
            "backends": {name: _declared(name, self.config.getoption("--nibs-device")) for name in names},
            "tests": list(self.tests.values()),
        }
        (self.folder / "report.json").write_text(json.dumps(found, indent=1))
        (self.folder / "report.html").write_text(page([found]))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.tests:
            terminalreporter.write_line(f"nibs: {self.folder / 'report.html'}, report.json and junit.xml written.")


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    found = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
    }
    for name in ("nibs", "numpy", "torch", "jax", "cupy"):
        if name in sys.modules:  # what was not imported by now was not tested
            found[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _declared(name: str, device: str | None) -> dict[str, Any]:
    from nibs.registry import registry

    status = next(status for status in registry.statuses() if status.name == name)
    assert status.info is not None
    claims = status.info.capabilities
    kinds = ("devices", "dtypes", "objectives", "features", "collectives")
    return {
        "distribution": status.distribution,
        "device": device or ("cpu" if "cpu" in claims.devices else "its own"),
        **{kind: sorted(getattr(claims, kind)) for kind in kinds},
    }


def _last_line(text: str) -> str:
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (lines[0] if lines else text.strip().splitlines()[-1] if text.strip() else "failed")[:400]


# -- the page ------------------------------------------------------------------------------------------


def page(runs: list[dict[str, Any]]) -> str:
    """One self-contained HTML page of one or several runs."""
    tests = [{**test, "run": index} for index, run in enumerate(runs) for test in run["tests"]]
    columns = _columns(tests)
    outcome = Counter(test["outcome"] for test in tests)
    names = ", ".join(dict.fromkeys(name for run in runs for name in run["backends"]))
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>nibs conformance: {escape(names)}</title><style>{STYLE}</style></head><body><main>",
        f"<h1>nibs conformance {_verdicts(tests)}</h1>",
        _totals(outcome, runs),
        _claims(runs),
        "<h2>Levels</h2>",
        _levels(tests, columns, len(runs) > 1),
        _failures(tests),
        "<h2>Cases</h2>",
        "<p>Each number is the largest measured error as a share of its budget, over loss, gradients and stats: "
        "100 % would be all of it. Hold the pointer over a cell for what was measured, "
        "and over a name for what the case is for.</p>",
        _legend(),
        _matrix(tests, columns, len(runs) > 1),
        _reasons(tests),
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part)


def _verdicts(tests: list[dict[str, Any]]) -> str:
    failing = {test["backend"] for test in tests if test["outcome"] == "failed"}
    names = dict.fromkeys(test["backend"] for test in tests)
    words = {name: "fails" if name in failing else "passes" for name in names}
    return " ".join(f"<span class='{word}'>{escape(name)} {word}</span>" for name, word in words.items())


def _columns(tests: Iterable[dict[str, Any]]) -> list[tuple[int, str, str]]:
    found = {(test["run"], test["backend"], test["dtype"]) for test in tests if test["dtype"]}
    return sorted(found, key=lambda column: (column[0], column[1], ORDER.index(column[2])))


def _totals(outcome: Counter[str], runs: list[dict[str, Any]]) -> str:
    words = {
        "passed": "passed",
        "failed": "failed",
        "deviates": "known deviations",
        "skipped": "skipped, not claimed",
    }
    boxes = "".join(
        f"<div class='box {key}'><b>{outcome[key]:,}</b>{word}</div>"
        for key, word in words.items()
        if outcome[key] or key == "passed"
    )
    lines = []
    for run in runs:
        facts = " · ".join(
            f"{escape(key)} {escape(value)}"
            for key, value in run["machine"].items()
            if key not in ("system", "processor")
        )
        lines.append(
            f"<p class='machine'>{escape(run['date'])} UTC, {run['seconds']:.0f} s · "
            f"{escape(run['machine']['processor'])} · "
            f"{escape(run['machine']['system'])}<br>{facts}<br><code>{escape(run['command'])}</code></p>"
        )
    return f"<div class='boxes'>{boxes}</div>{''.join(lines)}"


def _claims(runs: list[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        for name, info in run["backends"].items():
            cells = "".join(
                f"<td>{escape(', '.join(info[kind]) or 'none')}</td>" for kind in ("dtypes", "objectives", "features")
            )
            rows.append(
                f"<tr><th>{escape(name)}</th><td>{escape(info['distribution'])}</td><td>{escape(info['device'])}</td>{cells}</tr>"
            )
    head = "".join(f"<th>{word}</th>" for word in ("backend", "from", "on", "dtypes", "objectives", "features"))
    return f"<h2>Claims</h2><table class='plain'><tr>{head}</tr>{''.join(rows)}</table>"


def _levels(tests: list[dict[str, Any]], columns: list[tuple[int, str, str]], several: bool) -> str:
    counts: dict[str, dict[Any, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    backends = list(dict.fromkeys((column[0], column[1]) for column in columns))
    for test in tests:
        counts[test["file"]][(test["run"], test["backend"])][test["outcome"]] += 1
        backends += [key for key in [(test["run"], test["backend"])] if key not in backends]
    head = "".join(f"<th>{escape(name)}{f' ({run + 1})' if several else ''}</th>" for run, name in backends)
    rows = []
    for file, level in LEVELS.items():
        if file not in counts:
            continue
        cells = []
        for key in backends:
            count = counts[file][key]
            kind = (
                "failed"
                if count["failed"]
                else "deviates"
                if count["deviates"]
                else "passed"
                if count["passed"]
                else "skipped"
            )
            words = [f"{count['passed']} passed"] + [
                f"{count[word]} {word}" for word in ("failed", "deviates", "skipped") if count[word]
            ]
            cells.append(f"<td class='{kind}'>{', '.join(words)}</td>")
        rows.append(f"<tr><th>{level}</th>{''.join(cells)}</tr>")
    return f"<table class='plain levels'><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _failures(tests: list[dict[str, Any]]) -> str:
    failed = [test for test in tests if test["outcome"] == "failed"]
    if not failed:
        return ""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for test in failed:
        grouped[(test["backend"], test["test"])].append(test)
    rows = []
    for (backend, name), found in grouped.items():
        lines = "".join(
            f"<li><b>{escape(' '.join(filter(None, (test['case'], test['dtype']))) or test['file'])}</b> "
            f"{escape(test['reason'])}</li>"
            for test in found[:20]
        )
        more = f"<li>and {len(found) - 20} more</li>" if len(found) > 20 else ""
        rows.append(
            f"<details><summary><span class='mark failed'>{len(found)}</span> {escape(backend)}: "
            f"{escape(name.removeprefix('test_').replace('_', ' '))}</summary><ul>{lines}{more}</ul></details>"
        )
    return f"<h2>What fails</h2>{''.join(rows)}"


def _matrix(tests: list[dict[str, Any]], columns: list[tuple[int, str, str]], several: bool) -> str:
    from nibs_conformance.cases import CASES

    cells: dict[tuple[str, tuple[int, str, str]], list[dict[str, Any]]] = defaultdict(list)
    for test in tests:
        if test["case"] and test["dtype"]:
            cells[(test["case"], (test["run"], test["backend"], test["dtype"]))].append(test)
    groups: dict[tuple[int, str], int] = Counter((run, name) for run, name, _ in columns)
    top = "".join(
        f"<th colspan='{size}' class='first'>{escape(name)}{f' ({run + 1})' if several else ''}</th>"
        for (run, name), size in groups.items()
    )
    firsts = {next(column for column in columns if column[:2] == key) for key in groups}
    second = "".join(f"<th class='dtype{' first' if column in firsts else ''}'>{column[2]}</th>" for column in columns)
    rows = []
    for group in ("ordinary", "options", "cruel"):
        members = [
            case
            for case in CASES.values()
            if case.group == group and any((case.name, column) in cells for column in columns)
        ]
        if members:
            rows.append(f"<tr class='group'><th colspan='{len(columns) + 1}'>{group}</th></tr>")
        for case in members:
            line = "".join(_cell(cells.get((case.name, column), []), column in firsts) for column in columns)
            rows.append(f"<tr><th title='{escape(case.fault, quote=True)}'>{escape(case.name)}</th>{line}</tr>")
    head = f"<thead><tr><th rowspan='2'>case</th>{top}</tr><tr>{second}</tr></thead>"
    return f"<table class='matrix'>{head}<tbody>{''.join(rows)}</tbody></table>"


def _cell(tests: list[dict[str, Any]], first: bool) -> str:
    edge = " first" if first else ""
    if not tests:
        return f"<td class='none{edge}'></td>"
    outcomes = {test["outcome"] for test in tests}
    if outcomes == {"skipped"}:
        return f"<td class='skipped{edge}' title='{escape(tests[0]['reason'], quote=True)}'>&ndash;</td>"
    worst: dict[str, dict[str, Any]] = {}
    for test in tests:
        for one in test["measured"]:
            before = worst.get(one["quantity"])
            if before is None or float(one["used"]) > float(before["used"]):
                worst[one["quantity"]] = one
    largest = max((float(one["used"]) for one in worst.values()), default=0.0)
    lines = [
        f"{name}: {float(one['error']):.2g} of {float(one['budget']):.2g}"
        for name, one in sorted(worst.items(), key=lambda pair: -float(pair[1]["used"]))
    ]
    failed = [test for test in tests if test["outcome"] == "failed"]
    lines = [f"{test['test']}: {test['reason']}" for test in failed[:4]] + lines
    kind = "failed" if failed else "deviates" if "deviates" in outcomes else f"used{_shade(largest)}"
    text = "fails" if failed and largest <= 1 else _percent(largest)
    return f"<td class='{kind}{edge}' title='{escape(chr(10).join(lines), quote=True)}'>{text}</td>"


def _shade(used: float) -> int:
    return 0 if used == 0 else 1 if used < 0.1 else 2 if used < 0.25 else 3 if used < 0.5 else 4


def _percent(used: float) -> str:
    if used == 0:
        return "0"
    if used > 10:
        return "&gt; 1000&thinsp;%"
    if used < 0.001:
        return "&lt; 0.1&thinsp;%"
    return f"{100 * used:.1f}&thinsp;%" if used < 0.1 else f"{100 * used:.0f}&thinsp;%"


def _legend() -> str:
    shades = (
        ("used0", "exact"),
        ("used1", "below 10 %"),
        ("used2", "below 25 %"),
        ("used3", "below 50 %"),
        ("used4", "up to 100 %"),
    )
    words = (*shades, ("failed", "fails"), ("deviates", "known deviation"), ("skipped", "not claimed"))
    return "<p class='legend'>" + "".join(f"<span class='{kind}'>{word}</span>" for kind, word in words) + "</p>"


def _reasons(tests: list[dict[str, Any]]) -> str:
    parts = []
    for outcome, title in (("deviates", "Known deviations"), ("skipped", "Not claimed, and so not tested")):
        count = Counter(test["reason"] for test in tests if test["outcome"] == outcome)
        if count:
            lines = "".join(
                f"<tr><td class='count'>{many}</td><td>{escape(reason)}</td></tr>"
                for reason, many in count.most_common()
            )
            parts.append(f"<h2>{title}</h2><table class='plain'>{lines}</table>")
    return "".join(parts)


STYLE = """
:root{color-scheme:light;--ink:#1d2430;--soft:#667085;--line:#e3e7ee;--pass:#1a7f4b;--fail:#b42318;--known:#9a6700}
*{box-sizing:border-box}
body{margin:0;background:#f6f7f9;color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 28px 64px}
h1{font-size:24px;margin:0 0 16px;display:flex;gap:14px;align-items:baseline;flex-wrap:wrap}
h1 span{font-size:14px;font-weight:600;padding:2px 12px;border-radius:999px;color:#fff}
h1 .passes{background:var(--pass)} h1 .fails{background:var(--fail)}
h2{font-size:16px;margin:32px 0 10px}
p{margin:0 0 10px;max-width:76em} code{font:12px/1.4 ui-monospace,"DejaVu Sans Mono",monospace;color:var(--soft)}
.machine{color:var(--soft);font-size:12.5px;margin:12px 0 0}
.boxes{display:flex;gap:10px;flex-wrap:wrap}
.box{background:#fff;border:1px solid var(--line);border-radius:10px;padding:10px 18px;color:var(--soft);
min-width:120px}
.box b{display:block;font-size:22px;line-height:1.2;color:var(--ink)}
.box.passed b{color:var(--pass)} .box.failed b{color:var(--fail)} .box.deviates b{color:var(--known)}
table{border-collapse:separate;border-spacing:0;background:#fff;border:1px solid var(--line);border-radius:10px;
overflow:hidden}
th,td{padding:5px 12px;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child>th,tr:last-child>td{border-bottom:0} th{font-weight:600}
.plain td{color:#3a4354} .count{text-align:right;color:var(--soft)}
.levels td.passed{color:var(--pass)} .levels td.failed{color:var(--fail);font-weight:600}
.levels td.deviates{color:var(--known)}
.levels td.skipped{color:var(--soft)}
.matrix{width:100%;overflow:visible} .matrix thead th{position:sticky;top:0;background:#fff;z-index:1;
text-align:center}
.matrix thead tr:nth-child(2) th{top:31px} .matrix thead th[rowspan]{text-align:left;border-top-left-radius:10px}
.matrix thead tr:first-child th:last-child{border-top-right-radius:10px}
.matrix td{text-align:center;font-variant-numeric:tabular-nums;min-width:84px;border-bottom-color:#fff;
padding:3px 8px}
.matrix tbody th{font-weight:400;padding:3px 12px;white-space:nowrap;width:1%} .matrix .dtype{font-weight:400;
color:var(--soft)}
.matrix .group th{font-weight:600;background:#f0f2f6;padding:6px 12px}
.first{border-left:1px solid var(--line)}
.used0{background:#f4fbf7;color:#5c8f74} .used1{background:#e6f6ec;color:#256b45} .used2{background:#cdecd8;
color:#1d5c3a}
.used3{background:#a9dcbc;color:#134a2c} .used4{background:#f3e3a3;color:#5c4a05}
td.failed,.legend .failed,.mark.failed{background:#f9c9c4;color:#7a160e;font-weight:600}
td.deviates,.legend .deviates{background:#fbe6c2;color:#7a4d00} td.skipped,.legend .skipped{color:#98a2b3;
background:#fafbfc} td.none{background:#fcfcfd}
.levels td{background:#fff!important}
.legend{display:flex;gap:6px;flex-wrap:wrap} .legend span{padding:1px 10px;border-radius:6px;font-size:12px}
details{background:#fff;border:1px solid var(--line);border-radius:8px;margin:6px 0;padding:6px 12px}
summary{cursor:pointer}
details ul{margin:8px 0;padding-left:20px} details li{margin:3px 0;overflow-wrap:anywhere} .mark{padding:0 8px;
border-radius:6px;margin-right:4px}
"""


def main() -> None:
    """Make a page from reports made before."""
    parser = argparse.ArgumentParser(prog="python -m nibs_conformance.report", description=main.__doc__)
    parser.add_argument("reports", nargs="+", type=Path, help="report.json files")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="where to write the page")
    given = parser.parse_args()
    given.output.write_text(page([json.loads(path.read_text()) for path in given.reports]))


if __name__ == "__main__":
    main()
