"""Every code block of docs/rings.md that says it runs, runs, and trains what one device trains."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ring_worlds import answers

pytest.importorskip("torch")

PAGE = Path(__file__).parents[2] / "docs" / "rings.md"
BLOCKS = dict(re.findall(r"<!-- runs: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
NEEDS = {"accelerate": "accelerate", "lightning": "lightning"}
# what trainer.fit does around training_step, in processes that are there already
FIT = """
from torch.nn.parallel import DistributedDataParallel

training = Training(model)
training.setup("fit")
training.forward = training.training_step
optimizer = training.configure_optimizers()
wrapped = DistributedDataParallel(training)
for index, batch in enumerate(batches):
    loss = wrapped(batch, index)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_trains_as_on_one_device(world: Callable[[int], Any], name: str) -> None:
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: nox -s integrations has it")
    code = BLOCKS[name] + (FIT if name == "lightning" else "")
    assert max(answers(world(4).run("docs_jobs:run_snippet", code, timeout=180.0))) < 1e-12


def test_the_page_has_them_all() -> None:
    assert set(BLOCKS) == {"ddp", "fsdp2", "mesh", "loop", "compile", "accelerate", "lightning"}
