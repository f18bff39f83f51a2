"""A stranger's backend, from a wheel of theirs beside wheels of ours: seen, used, and proved by the suite.

The environment is new, and there is no network. `abacus/` is the stranger's folder.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ABACUS = Path(__file__).parent / "abacus"
SUITE = ("python", "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "--pyargs", "nibs_conformance")


@pytest.fixture(scope="module")
def make_stranger(make_fresh, wheels, tmp_path_factory):
    """Build the stranger's wheel, with a piece of its text replaced, and install all that a vendor has."""

    def make(*replacement: str):
        folder = tmp_path_factory.mktemp("stranger")
        source = Path(shutil.copytree(ABACUS, folder / "source", ignore=shutil.ignore_patterns("__pycache__")))
        if replacement:
            work = source / "nibs_abacus" / "backend.py"
            text = work.read_text(encoding="utf-8")
            assert text.count(replacement[0]) == 1
            work.write_text(text.replace(*replacement), encoding="utf-8")
        theirs = Path(shutil.copytree(wheels, folder / "wheels"))
        fresh = make_fresh()
        fresh.build_wheel(source, theirs)
        fresh.install(theirs, "nibs[cli]", "nibs-numpy", "nibs-conformance", "nibs-abacus")
        return fresh

    return make


@pytest.fixture(scope="module")
def stranger(make_stranger):
    """Provide an environment with the stranger's backend as it is."""
    return make_stranger()


def test_a_stranger_is_listed_as_ready(stranger):
    done = stranger.run("nibs", "backends")

    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("abacus"))
    assert line.split()[1:3] == ["ready", "nibs-abacus"]


def test_nothing_of_this_repository_came_along(stranger):
    done = stranger.run(
        "python",
        "-c",
        "import nibs, nibs_numpy, nibs_abacus, nibs_conformance; from importlib.util import find_spec\n"
        "print(*(m.__file__ for m in (nibs, nibs_numpy, nibs_abacus, nibs_conformance)), sep='\\n')\n"
        "print(find_spec('nibs_torch'))",
    )

    *files, absent = done.stdout.splitlines()
    assert {Path(file).parents[1] for file in files} == {stranger.site}
    assert absent == "None"


def test_a_stranger_serves_calls(stranger):
    program = """
import numpy as np
import nibs
rows = np.eye(3, dtype=np.float32)
ours = nibs.contrastive_loss(rows, rows, scale=2.0)
theirs = nibs.contrastive_loss(rows, rows, scale=2.0, backend="abacus")
print(abs(float(ours) - float(theirs)) < 1e-6)
"""

    done = stranger.run("python", "-c", program)

    assert done.stdout.strip() == "True", done.stderr


def test_a_stranger_that_is_right_passes_the_suite(stranger):
    done = stranger.run(*SUITE, "--nibs-backend", "abacus", "--nibs-report", "report")

    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout.splitlines()[-1]
    assert (stranger.folder / "report" / "report.html").is_file()


def test_a_stranger_that_is_wrong_fails_the_suite(make_stranger):
    right, wrong = "into[strip] = scale * (weight @ keys)", "into[strip] = 2 * scale * (weight @ keys)"
    stranger = make_stranger(right, wrong)

    done = stranger.run(*SUITE, "--nibs-backend", "abacus", "--nibs-dtypes", "float32", "-k", "test_gradients", "-x")

    assert done.returncode == 1, done.stdout
    assert " failed" in done.stdout.splitlines()[-1]
    assert "gradient of queries" in done.stdout
