"""Boxes and their judgement, on canvases painted by hand and on real emoji."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("pycocotools")

import numpy as np
import torch
from detection import (
    CANVAS,
    Detection,
    Scene,
    cut_out,
    detect,
    mean_average_precision,
    proposals,
    scenes,
    shared,
    tight,
)


def canvas_with(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    canvas = np.full((CANVAS, CANVAS, 3), 255, np.uint8)
    for left, top, width, height in boxes:
        canvas[top : top + height, left : left + width] = 0
    return canvas


def scene(*boxes: tuple[int, int, int, int], labels: tuple[int, ...]) -> Scene:
    return Scene(canvas_with(*boxes), np.array(boxes, float), np.array(labels))


def test_tight_is_the_box_of_the_ink() -> None:
    ink = np.zeros((8, 9), bool)
    assert tight(ink) is None
    ink[2:5, 3:7] = True
    assert tight(ink) == (3, 2, 4, 3)


@pytest.mark.parametrize("box", [(30, 40, 20, 14), (0, 0, 10, 10), (CANVAS - 12, CANVAS - 9, 12, 9)])
def test_a_lonely_thing_is_proposed_once_with_its_own_box(box: tuple[int, int, int, int]) -> None:
    assert proposals(canvas_with(box)).tolist() == [list(map(float, box))]


def test_neighbours_are_proposed_alone_and_together() -> None:
    found = proposals(canvas_with((20, 20, 10, 10), (34, 20, 10, 10))).tolist()
    assert [20.0, 20.0, 10.0, 10.0] in found
    assert [34.0, 20.0, 10.0, 10.0] in found
    assert [20.0, 20.0, 24.0, 10.0] in found


def test_an_empty_canvas_proposes_nothing() -> None:
    made = scene(labels=())
    assert len(proposals(made.canvas)) == 0
    assert detect([made], lambda rows: rows, torch.eye(2), 1.0, 8) == []


def test_cut_out_keeps_the_thing_in_the_middle() -> None:
    cut = cut_out(canvas_with((10, 60, 20, 10)), np.array([[10, 60, 20, 10.0]]), 32)[0, 0]
    assert cut.shape == (32, 32)
    dark = (cut < 0).nonzero().float()
    assert dark.mean(0).tolist() == pytest.approx([15.5, 15.5], abs=1.5)


def test_shared_is_a_share_of_the_smaller_one() -> None:
    boxes = np.array([[0, 0, 10, 10], [2, 2, 4, 4], [20, 20, 5, 5], [5, 0, 10, 10.0]])
    assert shared(boxes[0], boxes).tolist() == [1.0, 1.0, 0.0, 0.5]


def test_map_of_a_perfect_answer_is_one_and_of_wrong_names_zero() -> None:
    made = [scene((10, 10, 20, 20), (50, 50, 20, 20), labels=(0, 1)), scene((30, 30, 16, 16), labels=(1,))]
    right = [
        Detection(index, box, int(label), 0.9)
        for index, one in enumerate(made)
        for box, label in zip(one.boxes, one.labels)
    ]
    assert mean_average_precision(made, right) == pytest.approx(1.0)
    wrong = [Detection(one.canvas, one.box, 2, one.score) for one in right]
    assert mean_average_precision(made, wrong) == 0.0
    assert mean_average_precision(made, wrong, named=False) == pytest.approx(1.0)
    assert mean_average_precision(made, []) == 0.0


def test_map_of_half_the_boxes() -> None:
    # of class 0, one of two is found: precision 1 up to recall 0.5, which COCO reads at 51 of 101 places
    made = [scene((10, 10, 20, 20), (50, 50, 20, 20), labels=(0, 0))]
    found = [Detection(0, made[0].boxes[0], 0, 0.9), Detection(0, made[0].boxes[1] + 15.0, 0, 0.5)]
    assert mean_average_precision(made, found) == pytest.approx(51 / 101)


def test_a_model_that_knows_its_names_finds_them() -> None:
    made = scenes(["😀", "🚲", "🌳"], 4, seed=1)
    sizes = sorted({box[2] for one in made for box in one.boxes})
    assert len(sizes) > 2, "emoji of several sizes"
    # the middle colour of a drawing names it well enough: yellow, blue, green
    names = torch.nn.functional.normalize(torch.eye(3), dim=-1)
    pictures = cut_out(made[0].canvas, made[0].boxes, 16)
    assert pictures.shape == (len(made[0].boxes), 3, 16, 16)
    found = detect(made, lambda rows: torch.nn.functional.normalize(rows.mean((2, 3)) + 1, dim=-1), names, 10.0, 16)
    assert mean_average_precision(made, found, named=False) > 0.5
    assert {one.label for one in found} == {0, 1, 2}
