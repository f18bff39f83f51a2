"""The examples are scripts beside each other: their folder goes on the path, as it does when one of them is run."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
for folder in (EXAMPLES, Path(__file__).parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture(scope="session")
def fashion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Garments of two kinds in the four files of Fashion-MNIST: bright above, or bright below."""
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    for part, count in (("train", 120), ("t10k", 40)):
        labels = np.arange(count) % 2
        pictures = rng.integers(0, 60, (count, 28, 28))
        pictures[labels == 0, :14] += 150
        pictures[labels == 1, 14:] += 150
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", pictures)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder
