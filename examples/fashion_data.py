"""Fashion-MNIST: 70,000 photographs of garments, 28 x 28, in ten classes (Xiao, Rasul, Vollgraf, arXiv 1708.07747).

Read from the four files in which it is published. Nothing is downloaded: Debian and Ubuntu have it as the package
dataset-fashion-mnist.
"""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

USUAL_PLACE = Path("/usr/share/datasets/fashion-mnist")
SIDE, CLASSES = 28, 10


@dataclass(frozen=True)
class FashionData:
    """pictures: `[n, 28, 28]` uint8. labels: `[n]` int64 of 0 to 9. The same for the 10,000 kept for testing."""

    pictures: np.ndarray
    labels: np.ndarray
    test_pictures: np.ndarray
    test_labels: np.ndarray


def read_idx(path: Path) -> np.ndarray:
    """Read a file of unsigned bytes: two zeros, 8 for bytes, the number of axes, each axis's length, the values."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is no file of bytes in the IDX format: it begins with {raw[:4]!r}.")
    shape = np.frombuffer(raw, ">u4", raw[3], 4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if len(values) != math.prod(shape.tolist()):
        raise SystemExit(f"{path} holds {len(values)} values and announces {shape.tolist()}: it is cut off.")
    return values.reshape(shape)


def load_fashion(folder: Path | None = None) -> FashionData:
    """Read the four files of `folder`; where they are missing, say where to get them."""
    folder = folder or USUAL_PLACE
    parts = []
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            path = folder / f"{part}-{kind}-ubyte.gz"
            if not path.exists():
                raise SystemExit(
                    f"Fashion-MNIST is not here: there is no {path}. Install it (Debian, Ubuntu: sudo apt-get install "
                    f"dataset-fashion-mnist), or name the folder that has its four files: --data-path FOLDER."
                )
            parts.append(read_idx(path))
    return FashionData(parts[0], parts[1].astype(np.int64), parts[2], parts[3].astype(np.int64))
