"""Every block of docs/pytorch.md runs, in order, as one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "pytorch.md"


@pytest.mark.filterwarnings("ignore:`torch.jit")  # PyTorch's own
def test_the_page_runs_from_top_to_bottom():
    pytest.importorskip("nibs_numpy")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 9
    names: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
