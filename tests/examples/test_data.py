"""The files of data that examples read, and what they say where there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fashion_data import load_fashion, read_idx
from text_data import first_variant, load_phrases, split_phrases


def test_the_four_files_are_read(fashion_folder: Path) -> None:
    data = load_fashion(fashion_folder)
    assert data.pictures.shape == (120, 28, 28)
    assert data.test_pictures.shape == (40, 28, 28)
    assert data.labels.tolist()[:4] == [0, 1, 0, 1]
    assert data.pictures[0, :14].mean() > data.pictures[0, 14:].mean() + 100


def test_missing_garments_say_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"apt-get install dataset-fashion-mnist.*--data-path"):
        load_fashion(tmp_path)


def test_a_file_that_is_cut_off_is_refused(fashion_folder: Path, tmp_path: Path) -> None:
    import gzip

    raw = gzip.decompress((fashion_folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    (tmp_path / "short.gz").write_bytes(gzip.compress(raw[:-1]))
    with pytest.raises(SystemExit, match="cut off"):
        read_idx(tmp_path / "short.gz")
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"PK\3\4"))
    with pytest.raises(SystemExit, match="IDX"):
        read_idx(tmp_path / "other.gz")


def test_the_first_variant_goes_without_remarks() -> None:
    assert first_variant("Sonnenbrand {m} [med.] | Sonnenbrand bekommen") == "Sonnenbrand"
    assert first_variant("sunglasses; shades [coll.]; sunnies") == "sunglasses"
    assert first_variant("Eel (on a menu) | Eel au bleu") == "Eel"


def test_each_text_stands_in_one_pair(tmp_path: Path) -> None:
    lines = [
        "# a comment :: no",
        "Baum {m} :: tree",
        "Hund :: dog",
        "Köter :: dog",
        "Hund :: hound",
        "Radio :: radio",
        "x",
    ]
    (tmp_path / "de-en").write_text("\n".join(lines), encoding="utf-8")
    assert load_phrases(tmp_path / "de-en") == [("Baum", "tree"), ("Hund", "dog")]


def test_a_missing_dictionary_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="apt-get install trans-de-en"):
        load_phrases(tmp_path / "none")


def test_held_out_phrases_are_not_trained_on() -> None:
    pairs = [(str(i), str(-i)) for i in range(100)]
    train, kept = split_phrases(pairs, 20, seed=3)
    assert len(kept) == 20
    assert sorted(train + kept) == sorted(pairs)
    assert split_phrases(pairs, 20, seed=3) == (train, kept)
    assert np.mean([pair in pairs[:20] for pair in kept]) < 1
