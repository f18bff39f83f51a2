"""The README's two commands are the ones that are run here, and nothing that they name is missing."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _commands() -> list[str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for fence in re.findall(r"```sh\n(.*?)```", readme, flags=re.DOTALL) for line in fence.splitlines()]
    return [line for line in lines if line.startswith("python3 -m venv")]


def test_readme_gives_two_commands_the_main_job_first():
    main_job, checks = _commands()

    assert main_job == f"{checks} -s demo"


def test_continuous_integration_runs_the_readme_command_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    own = [line for line in lines if line and not line.startswith("#")]

    assert own == ["set -eu", 'cd "$(dirname "$0")/.."', _commands()[1]]
