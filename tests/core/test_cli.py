"""The command line as people meet it: what it prints at 80 columns, what it refuses, and what it says it lacks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("rich")
testing = pytest.importorskip("click.testing")

PLAN = ["plan", "--queries", "4194304", "--keys", "4194304", "--dim", "768", "--dtype", "bfloat16"]


@pytest.fixture
def run(monkeypatch):
    """Provide a function that runs a command in a terminal of a given width."""
    from nibs.cli import nibs

    def command(*arguments, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        return testing.CliRunner().invoke(nibs, arguments, prog_name="nibs")

    return command


def _figures(output):
    """The first word of each line to the rest of it."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in output.splitlines() if line.strip()}


@pytest.mark.parametrize("columns", [80, 120])
def test_plan_fits_the_terminal_and_gives_every_figure(run, columns):
    done = run(*PLAN, "--tflops", "400", columns=columns)

    figures = _figures(done.output)
    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= columns
    assert figures["products"].startswith("4 ") and figures["flops"].startswith("108.1 Pflop ")
    assert figures["dense"].startswith("32 TiB ") and figures["time"].startswith("4 min 30 s ")
    assert {"tile", "sweep", "workspace", "linear", "memory", "traffic"} <= figures.keys()


def test_plan_on_a_ring_gives_the_bytes_sent(run):
    done = run("plan", "--queries", "1000", "--keys", "1000", "--dim", "64", "--ring-size", "8")

    assert "on each of 8 ranks" in done.output
    assert _figures(done.output)["ring"].endswith("sent by each rank")


def test_plan_as_json_holds_the_plan_s_own_figures(run):
    import nibs

    found = json.loads(run(*PLAN, "--json").output)

    expected = nibs.plan(4194304, 4194304, 768, "bfloat16")
    assert found["memory"] == expected.memory and found["flops"] == expected.flops
    assert found["dense_matrix"] == 4194304**2 * 2 and found["seconds"] is None


@pytest.mark.parametrize(
    ("arguments", "sweep"),
    [
        (["--no-grad"], "forward"),
        (["--objective", "sigmoid"], "single"),
        (["--direction", "query_to_key", "--memory", "20GB"], "strip"),
        (["--wrt", "queries, scale"], "recompute"),
        (["--memory", "20GB"], "recompute"),
        (["--memory", "20000000000"], "recompute"),
        (["--backend", "numpy", "--masked"], "recompute"),
        (["--memory", "20GB", "--no-autograd"], "recompute"),
    ],
    ids=" ".join,
)
def test_plan_takes_the_options_of_a_call(run, arguments, sweep):
    found = json.loads(run(*PLAN, *arguments, "--json").output)

    assert found["sweep"] == sweep


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--queries", "-3"], "nibs: queries=-3: expected an integer >= 0."),
        (["--wrt", "query"], "nibs: wrt=('query',): expected names out of 'queries', 'keys', 'scale', 'bias'."),
        (["--memory", "ten"], "nibs: memory='ten': expected bytes as a positive integer, or text like '512MiB' or"),
        (["--backend", "nump"], "nibs: no backend named 'nump'. Here:"),
        (["--memory", "10"], "nibs: memory=10 B is too small for"),
    ],
    ids=" ".join,
)
def test_what_nibs_refuses_is_one_line_and_exit_code_2(run, arguments, line):
    done = run(*PLAN, *arguments)

    assert done.exit_code == 2
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("columns", [80, 120])
def test_backends_fits_the_terminal(run, columns):
    done = run("backends", columns=columns)

    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= columns
    assert {"numpy", "numpy.ndarray", "ready", "bfloat16", "InfoNCE"} <= set(done.output.split())  # no word is folded


def test_backends_as_json_holds_what_was_declared(run):
    from nibs_numpy.plugin import CAPABILITIES

    found = {row["name"]: row for row in json.loads(run("backends", "--json").output)}

    assert found["numpy"]["state"] == "ready"
    assert set(found["numpy"]["features"]) == CAPABILITIES.features


def test_backends_says_why_one_is_broken_and_what_to_type(run, here, monkeypatch):
    import nibs.cli

    here.add("cupy", load=lambda: 1 / 0, install="pip install nibs-cupy")
    monkeypatch.setattr(nibs.cli, "backends", here.registry.statuses)

    done = run("backends")

    assert "cupy is broken: ZeroDivisionError: division by zero. Try: pip install nibs-cupy" in done.output


def test_backends_without_any_says_what_to_install(run, empty, monkeypatch):
    import nibs.cli

    monkeypatch.setattr(nibs.cli, "backends", empty.registry.statuses)

    assert run("backends").output == "No backend is installed. Start with: pip install nibs-numpy\n"


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_what_it_draws_with_it_says_so_in_one_sentence(missing):
    program = f"import sys, runpy; sys.modules['{missing}'] = None; runpy.run_module('nibs', run_name='__main__')"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 2
    assert done.stderr.startswith(f"The nibs command draws with {missing}")
    assert done.stderr.endswith("which is missing here: pip install 'nibs[cli]'\n") and done.stderr.count("\n") == 1
