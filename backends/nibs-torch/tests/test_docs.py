"""Every block of the pages on PyTorch runs, in order, as one program for each page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(("page", "count"), [("pytorch.md", 9), ("decoupled.md", 1)])
def test_the_page_runs_from_top_to_bottom(page, count):
    pytest.importorskip("nibs_numpy")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == count
    names: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
