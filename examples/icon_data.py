"""Pairs of icon and name, by the ten thousand: the twelve icon fonts that the `qtawesome` package carries.

They serve one purpose, a batch of real pairs whose dense similarity matrix is measured in gigabytes, so
their embeddings are made in closed form and not trained: pixels and letters, each projected to where the
two correlate most. The package is looked up and never imported, because that would ask for Qt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from emoji_data import TextFeatures
from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Icon:
    """One icon: the font file, the character in it, and its name in words."""

    font: str
    character: str
    name: str


def load_icons() -> list[Icon]:
    """List every icon of every font, in the order of the files."""
    package = find_spec("qtawesome")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The icon fonts are missing: pip install --no-deps qtawesome")
    fonts = Path(package.submodule_search_locations[0]) / "fonts"
    icons = []
    for charmap in sorted(fonts.glob("*-charmap-*.json")):
        font = str(fonts / charmap.name.replace("-charmap-", "-")).removesuffix(".json") + ".ttf"
        for name, code in json.loads(charmap.read_text(encoding="utf-8")).items():
            icons.append(Icon(font, chr(int(code, 16)), name.replace("-", " ").replace("_", " ")))
    return icons


def render_icons(icons: list[Icon], size: int) -> np.ndarray:
    """Draw each icon: `[n, size, size]` uint8, ink at 255."""
    fonts = {path: ImageFont.truetype(path, size) for path in {icon.font for icon in icons}}
    drawn = np.empty((len(icons), size, size), np.uint8)
    for picture, icon in zip(drawn, icons):
        canvas = Image.new("L", (size, size))
        ImageDraw.Draw(canvas).text((size / 2, size / 2), icon.character, font=fonts[icon.font], fill=255, anchor="mm")
        picture[:] = np.asarray(canvas)
    return drawn


def whiten(rows: np.ndarray, width: int) -> np.ndarray:
    """Project centred rows to their `width` main directions, each of variance 1."""
    centred = rows - rows.mean(0)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(rows))
    variances, directions = variances[-width:], directions[:, -width:]
    return centred @ directions / np.sqrt(variances + 0.01 * variances.mean())


def aligned(pictures: np.ndarray, texts: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Turn two views of the same things so that they correlate, by canonical correlation analysis.

    Returns two `[n, width]` float32 arrays with rows of length 1. (Hotelling, Relations Between Two Sets of
    Variates, 1936.)
    """
    left, right = whiten(pictures, width), whiten(texts, width)
    to_left, correlations, to_right = np.linalg.svd(left.T @ right / len(left))
    sides = left @ to_left * correlations, right @ to_right.T * correlations
    unit = [side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-6) for side in sides]
    return unit[0].astype(np.float32), unit[1].astype(np.float32)


def icon_embeddings(width: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Embed every icon and its name: two `[24610, width]` float32 arrays with rows of length 1."""
    icons = load_icons()
    pictures = render_icons(icons, 24).reshape(len(icons), -1).astype(np.float32) / 255
    names = [icon.name for icon in icons]
    return aligned(pictures, TextFeatures(names, 1024)(names), width)
