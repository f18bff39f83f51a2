"""German phrases with their English translation, out of the dictionary of TU Chemnitz (GPL, version 2 or later).

Debian and Ubuntu have it as the package trans-de-en: lines of `German :: English`, with variants after `|` and `;` and
remarks in brackets. The first variant of each side is taken, its remarks left out. Every text occurs once: a German
word that means several things, or an English one that several words mean, would be a false negative.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

USUAL_PLACE = Path("/usr/share/trans/de-en")
LONGEST = 60  # characters
REMARK = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|/[^/]*/|<[^>]*>")


def first_variant(side: str) -> str:
    """Return the first of several words or phrases, without its remarks."""
    return " ".join(REMARK.sub(" ", re.split(r"[|;]", side)[0]).split())


def load_phrases(path: Path | None = None) -> list[tuple[str, str]]:
    """List pairs of German and English, in the order of the file."""
    path = path or USUAL_PLACE
    if not path.exists():
        raise SystemExit(
            f"The dictionary is not here: there is no {path}. Install it (Debian, Ubuntu: sudo apt-get install "
            f"trans-de-en), or name a file of lines 'German :: English': --data-path FILE."
        )
    pairs, seen = [], set()
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or " :: " not in line:
            continue
        german, english = (first_variant(side) for side in line.split(" :: ")[:2])
        keys = {("de", german.lower()), ("en", english.lower())}
        short = 2 <= len(german) <= LONGEST and 2 <= len(english) <= LONGEST
        # One spelling in both languages asks for nothing.
        if not short or german.lower() == english.lower() or keys & seen:
            continue
        seen |= keys
        pairs.append((german, english))
    return pairs


def split_phrases(
    pairs: list[tuple[str, str]], held_out: int, seed: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Shuffle, and part `held_out` pairs from the others: (training, held out)."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in order[held_out:]], [pairs[i] for i in order[:held_out]]
