"""Imports run one way, and nobody imports a neighbour: read off the source, so that no test run is needed to tell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "nibs").glob("*.py"))
DISTRIBUTIONS = {
    folder.name: folder
    # By its plugin: an editable install leaves folders of a like name beside the package.
    for folder in [plugin.parent for plugin in ROOT.glob("backends/nibs-*/nibs_*/plugin.py")]
    + [ROOT / "conformance" / "nibs_conformance"]
}
BACKENDS = [name for name in DISTRIBUTIONS if name != "nibs_conformance"]

# Lower may not import higher, and no one its equal in another layer. Files that are not named here stand between
# `spec` and `dispatch` by what they import.
LAYERS = ["errors", "arrays", "spec", "request", "capabilities", "hookspecs", "registry", "dispatch", "losses", "cli"]


def _imports(path: Path, *, lazy: bool = False) -> set[str]:
    """Modules that a file imports when it is imported; `lazy`: also inside functions. Never those for types alone."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not lazy:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def _graph() -> dict[str, set[str]]:
    names = {path.stem for path in CORE}
    return {
        path.stem: {
            module.split(".")[1]
            for module in _imports(path)
            if module.startswith("nibs.") and module.split(".")[1] in names
        }
        - {path.stem}
        for path in CORE
        if path.stem not in ("__init__", "__main__")
    }


def test_core_has_no_circle():
    graph = _graph()
    done: set[str] = set()

    while ready := {name for name, needs in graph.items() if name not in done and needs <= done}:
        done |= ready

    assert set(graph) - done == set()


@pytest.mark.parametrize("low", LAYERS)
def test_core_imports_run_one_way(low):
    graph, above = _graph(), LAYERS[LAYERS.index(low) + 1 :]

    reached, new = set(), {low}
    while new:
        reached |= new
        new = set().union(*(graph[name] for name in new)) - reached

    assert reached & set(above) == set()


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_core_imports_the_standard_library_and_pluggy_only(path):
    import sys

    roots = {module.partition(".")[0] for module in _imports(path, lazy=True)}
    drawn = {"click", "rich"} if path.stem == "cli" else set()

    assert roots - sys.stdlib_module_names - {"nibs", "pluggy"} - drawn == set()


def _uses(name: str, others: set[str]) -> set[tuple[str, str]]:
    return {
        (path.name, root)
        for path in DISTRIBUTIONS[name].rglob("*.py")
        for root in {module.partition(".")[0] for module in _imports(path, lazy=True)}
        if root in others
    }


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_nobody_imports_a_backend_but_itself(name):
    assert _uses(name, set(DISTRIBUTIONS) - {name, "nibs_conformance"}) == set()


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_know_the_suite_only_where_they_answer_its_hooks(name):
    # A hook of the suite is called by the suite alone, and answers with its records.
    answers = {"plugin.py", "world.py"}

    assert {file for file, _ in _uses(name, {"nibs_conformance"})} <= answers
    assert not any(
        module.startswith("nibs_conformance") for path in DISTRIBUTIONS[name].rglob("*.py") for module in _imports(path)
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_plugins_import_nothing_but_nibs(name):
    import sys

    roots = {module.partition(".")[0] for module in _imports(DISTRIBUTIONS[name] / "plugin.py")}

    assert roots - sys.stdlib_module_names - {"nibs"} == set()
