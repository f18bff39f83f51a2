"""Localise and name emoji on a canvas, with a model that was only ever trained on pictures of one emoji.

    scenes(...)      canvases with emoji of several sizes on them, and the box of each
    proposals(...)   boxes that may hold one: windows whose border no ink crosses, drawn tight around their ink
    detect(...)      every proposal cut out, encoded, compared with the names; overlaps go to the surer one
    mean_average_precision(...)   mAP at 0.5 overlap, by pycocotools

Proposals know nothing of emoji: a hat without its head, or two neighbours in one box, are proposed as well, and the
names have to tell. Refused here: learning boxes. The canvas is white, which makes this a test of naming and of
telling a whole from a part, and not of seeing in clutter.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from emoji_data import GLYPH, render
from torch import Tensor
from torch.nn import functional

CANVAS = 96
SIZES = (20, 26, 32, 40)  # pixels that an emoji is drawn in
PLACED = (3, 6)  # emoji on a canvas, at least and below
WINDOWS = (16, 22, 28, 36, 44)
STRIDE = 4
INK = 24  # out of 255 below white
NAMES_TOLD = 5  # names for which a box is told, each with its own score
KEPT = 100  # detections of a canvas, which is where COCO stops


@dataclass(frozen=True)
class Scene:
    """A canvas `[CANVAS, CANVAS, 3]` uint8; boxes `[k, 4]` as left, top, width, height; labels `[k]`."""

    canvas: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def tight(ink: np.ndarray) -> tuple[int, int, int, int] | None:
    """Return left, top, width, height of what is true in `[h, w]`; None where nothing is."""
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1


def is_ink(canvas: np.ndarray) -> np.ndarray:
    """Where `[h, w, 3]` is not white."""
    return canvas.min(-1) < 255 - INK


def scenes(characters: Sequence[str], count: int, seed: int) -> list[Scene]:
    """Draw `count` canvases; a label is the index of a character."""
    rng = np.random.default_rng(seed)
    drawn = {size: render(characters, size) for size in SIZES}
    made = []
    for _ in range(count):
        canvas = np.full((CANVAS, CANVAS, 3), 255, np.uint8)
        taken = np.zeros((CANVAS, CANVAS), bool)
        boxes, labels = [], []
        for label in rng.integers(len(characters), size=int(rng.integers(*PLACED))):
            size = int(rng.choice(SIZES))
            left, top = (int(place) for place in rng.integers(0, CANVAS - size + 1, 2))
            place = slice(top, top + size), slice(left, left + size)
            picture = drawn[size][label]
            box = tight(is_ink(picture))
            if taken[place].any() or box is None:
                continue  # no room here: one emoji fewer
            canvas[place], taken[place] = picture, True
            boxes.append((left + box[0], top + box[1], box[2], box[3]))
            labels.append(int(label))
        made.append(Scene(canvas, np.array(boxes, float).reshape(-1, 4), np.array(labels, np.int64)))
    return made


def proposals(canvas: np.ndarray) -> np.ndarray:
    """Return boxes `[p, 4]`, each once, of the ink in windows whose border is clean."""
    ink = np.pad(is_ink(canvas), 1)
    found = set()
    for size in WINDOWS:
        furthest = ink.shape[0] - size - 1  # where a window touches the far edge
        starts = [*range(0, furthest, STRIDE), furthest]
        for top in starts:
            for left in starts:
                window = ink[top : top + size + 1, left : left + size + 1]
                if window[0].any() or window[-1].any() or window[:, 0].any() or window[:, -1].any():
                    continue
                box = tight(window)
                if box is not None:
                    found.add((left + box[0] - 1, top + box[1] - 1, box[2], box[3]))
    return np.array(sorted(found), float).reshape(-1, 4)


def cut_out(canvas: np.ndarray, boxes: np.ndarray, size: int) -> Tensor:
    """Cut each box out, square and with the margin that training pictures have: `[p, 3, size, size]` in [-1, 1]."""
    cut = torch.empty(len(boxes), 3, size, size)
    for picture, (left, top, width, height) in zip(cut, boxes):
        side = round(max(width, height) / GLYPH)
        square = np.full((side, side, 3), 255, np.uint8)
        down, right = int((side - height) // 2), int((side - width) // 2)
        square[down : down + int(height), right : right + int(width)] = canvas[
            int(top) : int(top + height), int(left) : int(left + width)
        ]
        rows = torch.from_numpy(square).permute(2, 0, 1)[None].float().div_(127.5).sub_(1)
        picture.copy_(functional.interpolate(rows, (size, size), mode="bilinear", antialias=True)[0])
    return cut


def shared(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The share of the smaller one of each two that both cover: `[p]`."""
    width = np.minimum(box[0] + box[2], boxes[:, 0] + boxes[:, 2]) - np.maximum(box[0], boxes[:, 0])
    height = np.minimum(box[1] + box[3], boxes[:, 1] + boxes[:, 3]) - np.maximum(box[1], boxes[:, 1])
    both = np.clip(width, 0, None) * np.clip(height, 0, None)
    return both / np.minimum(box[2] * box[3], boxes[:, 2] * boxes[:, 3])


@dataclass(frozen=True)
class Detection:
    """A box `[4]` of one canvas, a name's index, and how sure the model is."""

    canvas: int
    box: np.ndarray
    label: int
    score: float


def detect(
    made: Sequence[Scene], encode_pictures: Callable[[Tensor], Tensor], names: Tensor, scale: float, size: int
) -> list[Detection]:
    """Find and name what is on the canvases; names: `[c, d]`, of length 1."""
    found = []
    for index, scene in enumerate(made):
        boxes = proposals(scene.canvas)
        if not len(boxes):
            continue
        with torch.no_grad():
            cosines = encode_pictures(cut_out(scene.canvas, boxes, size)) @ names.T
        # The box is kept by how near its best name is, wherever the others are; its names by their odds.
        nearness, odds = cosines.max(1).values.numpy(), (scale * cosines).softmax(1)
        free = np.ones(len(boxes), bool)
        for place in np.argsort(-nearness):
            if not free[place]:
                continue
            free &= shared(boxes[place], boxes) <= 0.5
            best = odds[place].topk(min(NAMES_TOLD, len(names)))
            for score, label in zip(best.values.tolist(), best.indices.tolist()):
                found.append(Detection(index, boxes[place], label, score))
    return found


def mean_average_precision(made: Sequence[Scene], found: Sequence[Detection], *, named: bool = True) -> float:
    """Return mAP at an overlap of 0.5; with `named=False` any name will do, which leaves the boxes alone."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = [
        {"image_id": index, "bbox": box.tolist(), "category_id": int(label) + 1, "area": box[2] * box[3], "iscrowd": 0}
        for index, scene in enumerate(made)
        for box, label in zip(scene.boxes, scene.labels)
    ]
    answers = [
        {"image_id": one.canvas, "bbox": one.box.tolist(), "category_id": one.label + 1, "score": one.score}
        for one in found
    ]
    if not answers:
        return 0.0
    most = max(one["category_id"] for one in [*truth, *answers])
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": index, "width": CANVAS, "height": CANVAS} for index in range(len(made))],
            "annotations": [{"id": number, **one} for number, one in enumerate(truth, 1)],
            "categories": [{"id": label, "name": str(label)} for label in range(1, most + 1)],
        }
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(answers), "bbox")
        judge.params.iouThrs = np.array([0.5])
        judge.params.maxDets = [KEPT]
        judge.params.useCats = int(named)
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"]  # [overlaps, recalls, categories, areas, most]; -1: category not there
    return float(precision[precision > -1].mean()) if (precision > -1).any() else 0.0
