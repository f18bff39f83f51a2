"""Every check of this repository, and its main job, as nox sessions that a fresh machine can run.

    nox                             all checks that need no GPU
    nox -s demo                     the main job: a real contrastive training
    nox -s "conformance(torch)"     the suite against one backend; reports in reports/torch/
    nox -s "conformance(jax)" -- --nibs-dtypes float64,float32,bfloat16,float16
                                    the whole of it, where a backend's pyproject.toml settles for a sample
    nox -s tests -- -k registry     what follows `--` goes to pytest, or to the demo

Each session installs all that it needs, from constraints.txt; none relies on another, nor on what the
caller's shell has set. Refused here: a list of backends to keep up. A folder backends/nibs-NAME is enough
to be built and tested.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
# uv makes an environment with torch in seconds; where it cannot be had, virtualenv does the same slowly.
nox.options.default_venv_backend = "uv|virtualenv"
# A second run starts at once. Installing again is nearly free and keeps it in step with the pins.
nox.options.reuse_venv = "yes"
# The quick ones first. The demo is not a check, and is asked for by name.
nox.options.sessions = ["lint", "types", "build", "conformance", "jax", "tests", "integrations"]

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
BACKENDS = sorted(folder.parent.name.removeprefix("nibs-") for folder in ROOT.glob("backends/nibs-*/pyproject.toml"))
DISTRIBUTIONS = [".", *(f"backends/nibs-{name}" for name in BACKENDS), "conformance"]

# pip is told by PIP_FIND_LINKS of a folder of ready wheels; uv reads another name, and fails where the
# folder is missing.
WHEEL_FOLDERS = [place for place in os.environ.get("PIP_FIND_LINKS", "").split() if Path(place).is_dir()]
if WHEEL_FOLDERS:
    os.environ.setdefault("UV_FIND_LINKS", ",".join(WHEEL_FOLDERS))
# The pins hold for what builds the distributions as well.
for variable in ("UV_BUILD_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
    os.environ[variable] = str(ROOT / "constraints.txt")
# What a shell has set must not change what is checked: modules from elsewhere, another backend, more plugins.
for variable in ("PYTHONPATH", "NIBS_BACKEND", "NIBS_PLUGINS", "NIBS_CUPY_DEVICE", "PYTEST_ADDOPTS"):
    os.environ.pop(variable, None)


def install(session: nox.Session, *requirements: str, editable: list[str] | None = None) -> None:
    """Install under the pins; `editable` names folders of this repository."""
    folders = [argument for folder in editable or [] for argument in ("-e", folder)]
    session.install("-c", "constraints.txt", *folders, *requirements)


def group(name: str) -> list[str]:
    """Name the requirements of a dependency group in pyproject.toml."""
    return nox.project.dependency_groups(PYPROJECT, name)


# For two processes on two cores: threads of theirs that wait for one another do so busily. The suite has all threads.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def side_by_side(session: nox.Session, *commands: Sequence[str], env: dict[str, str] | None = None) -> None:
    """Run commands two at a time, in this order, and show what each printed once it has ended; one alone as ever."""
    if len(commands) == 1:
        session.run(*commands[0], env=env)
        return
    with ThreadPoolExecutor(2) as pool:
        for output in pool.map(lambda command: session.run(*command, env=env, silent=True), commands):
            print(output)


@nox.session
def demo(session: nox.Session) -> None:
    """Train an image-text model on emoji through nibs, beside the dense loss."""
    # What it needs, and the backend that `--backend` names.
    named = [name for name in BACKENDS if name in session.posargs or f"--backend={name}" in session.posargs]
    folders = [f"backends/nibs-{name}" for name in dict.fromkeys(["numpy", "torch", *named])]
    needed = [ROOT / "examples" / f"requirements{which}.txt" for which in ("", *(f"-{name}" for name in named))]
    files = [part for file in needed if file.exists() for part in ("-r", str(file))]
    install(session, *files, editable=[".[cli]", *folders])
    # Its fonts are wanted, not the Qt that it draws with.
    install(session, "--no-deps", "qtawesome")
    session.run("python", "examples/demo.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    install(session, *group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the core and the suite, strictly."""
    install(session, *group("types"), editable=[".", "conformance"])
    session.run("mypy")


@nox.session
def build(session: nox.Session) -> None:
    """Build the source distribution and the wheel of each distribution, into dist/."""
    install(session, *group("build"))
    for folder in DISTRIBUTIONS:
        # Not isolated, so that the pins hold and nothing is fetched twice. The wheel is built from the
        # source distribution, which proves that the latter is whole.
        session.run("python", "-m", "build", "--no-isolation", "--outdir", "dist", folder, silent=True)


@nox.session
@nox.parametrize("backend", [nox.param(name, id=name) for name in BACKENDS])
def conformance(session: nox.Session, backend: str) -> None:
    """Run the suite against one backend, with nothing installed but what a vendor has."""
    install(session, editable=[".", f"backends/nibs-{backend}", "conformance"])
    settings = nox.project.load_toml(ROOT / f"backends/nibs-{backend}" / "pyproject.toml").get("tool", {})
    settings = settings.get("nibs", {})
    suite = ["python", "-m", "pytest", "--pyargs", "nibs_conformance", "--nibs-backend", backend]
    runs = [session.posargs] if session.posargs else settings.get("conformance-sample", [[]])
    reports = [f"reports/{backend}" + (f"-{number}" if number > 1 else "") for number in range(1, len(runs) + 1)]
    commands = [[*suite, "--nibs-report", report, *arguments] for report, arguments in zip(reports, runs)]
    side_by_side(session, *commands, env=settings.get("environment", {}))


def interpreter(version: str) -> str | None:
    """Find a Python of this version that starts: on PATH, else one of pyenv's."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    on_path = shutil.which(f"python{version}")
    for found in (on_path, *sorted(map(str, root.glob(f"versions/{version}.*/bin/python{version}")))):
        # A shim of pyenv's is on PATH for every version, and starts none but the active ones.
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return None


# Beside the one that constraints.txt pins for Python 3.11, on which the other sessions run.
NEWER_JAX = "3.12"


@nox.session(python=interpreter(NEWER_JAX) or False)
@nox.parametrize("version", [nox.param(version, id=version) for version in ("0.11.2", "0.12.0.1")])
def jax(session: nox.Session, version: str) -> None:
    """Try the JAX backend on a newer JAX, where a Python that it needs is found."""
    if session.python is False:
        session.skip(f"jax {version} needs Python {NEWER_JAX}, and there is none on PATH nor under pyenv")
    pins = Path(session.create_tmp()) / f"constraints-{version}.txt"
    others = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("jax")]
    pins.write_text("\n".join([*others, f"jax=={version}", f"jaxlib=={version}", ""]))
    folders = [".", "backends/nibs-numpy", "backends/nibs-jax", "conformance"]
    editable = [part for folder in folders for part in ("-e", folder)]
    session.install("-c", str(pins), *editable, "pytest", "pytest-timeout")
    folder = "backends/nibs-jax/tests"
    files = [f"{folder}/test_{name}.py" for name in ("foreign", "lowering", "transforms")]
    tests = ("python", "-m", "pytest", "--timeout=300")
    # Of the decoupled step and the ring, what a newer JAX may see otherwise: transfers, memory, replicated gradients.
    some = "host_memory or complete or dropout or memory_is or inside_are"
    suite = ("python", "-m", "pytest", "--pyargs", "nibs_conformance", "--nibs-backend=jax", "--nibs-dtypes=float32")
    few = ["--nibs-cases=symmetric,sigmoid,everything-symmetric", "-k=test_loss or gradient_of"]
    side_by_side(
        session,
        [*tests, *files, "-k", "not million and not precision"],
        [*tests, f"{folder}/test_decoupled.py", f"{folder}/test_ring.py", "-k", some],
        [*suite, *few],
    )


@nox.session
def tests(session: nox.Session) -> None:
    """Run the core's own tests, the suite's own, packaging, guests, and each backend's own."""
    files = [part for file in sorted(ROOT.glob("examples/requirements*.txt")) for part in ("-r", str(file))]
    install(session, *group("tests"), *files, editable=[".[cli]", *DISTRIBUTIONS[1:]])
    # Wide enough for the slowest test on a slow machine; a hang ends there and says where.
    session.run("python", "-m", "pytest", "--timeout=300", "--ignore=tests/integrations", *session.posargs)


@nox.session
def integrations(session: nox.Session) -> None:
    """Run the loops of docs/integrations.md and docs/rings.md with the trainers that they are written for."""
    folders = [".", "backends/nibs-numpy", "backends/nibs-torch", "conformance"]
    install(session, *group("integrations"), editable=folders)
    # Without torchvision, which it asks for: the ordinary build of that breaks beside a small build of torch.
    install(session, "--no-deps", "open_clip_torch")
    pytest = ("python", "-m", "pytest", "--timeout=300")
    side_by_side(
        session,
        [*pytest, "tests/integrations", *session.posargs],
        [*pytest, "tests/ring/test_docs.py", "-k", "accelerate or lightning"],
        env=ONE_THREAD,
    )
