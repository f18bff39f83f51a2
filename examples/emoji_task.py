"""Emoji: pictures and their names in 14 languages, from the loss to the judgement. Tensors of PyTorch.

What examples/demo.py and examples/train.py have in common: the tensors of one side of the split, the loss in which
equal pictures are no negatives, retrieval, and zero-shot accuracy over groups that training knows nothing of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from detection import detect, mean_average_precision, scenes
from emoji_data import EmojiData, TextFeatures, load_data
from evaluate import RANKS, retrieval, zero_shot_accuracy
from torch import Tensor
from torch.nn import functional
from two_tower import Encoder, TwoTower

import nibs

PICTURE_SIZE = 32
TEXT_WIDTH = 2048
DIM = 128
ENGLISH = 0.5  # share of texts that are the English name alone, and not the names in all languages
SHIFT = 2  # pixels by which a picture may move
ENCODED_AT_ONCE = 400  # pictures: their tensors stay near the processor
SPLIT_SEED = 0  # runs of different seeds are judged on the same emoji
SCENES = 100  # canvases of emoji to find
VOCABULARY = 40  # names that may stand on a canvas


@dataclass(frozen=True)
class Side:
    """Training or held-out set as tensors.

    pictures: `[n, 3, 32, 32]`. texts, english: `[n, TEXT_WIDTH]`, the names in all languages and the English one.
    ids: `[n]`.
    """

    pictures: Tensor
    texts: Tensor
    english: Tensor
    ids: Tensor


class Towers(Protocol):
    """A model that takes and gives tensors, whatever it computes with."""

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """`[n, 3, 32, 32]` to rows `[n, dim]` of length 1."""
        ...

    def encode_texts(self, texts: Tensor) -> Tensor:
        """`[n, TEXT_WIDTH]` to rows `[n, dim]` of length 1."""
        ...

    def train(self) -> object:
        """From here on something is dropped."""
        ...

    def eval(self) -> object:
        """From here on nothing is."""
        ...


def side_of(data: EmojiData, features: TextFeatures, rows: np.ndarray) -> Side:
    """Gather the rows of one side of the split."""
    pictures = torch.from_numpy(data.pictures[rows]).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return Side(
        pictures.contiguous(memory_format=torch.channels_last),
        torch.from_numpy(features([data.emoji[row].caption for row in rows])),
        torch.from_numpy(features([data.emoji[row].name for row in rows])),
        torch.from_numpy(data.ids[rows]),
    )


def pair_loss(queries: Any, keys: Any, scale: Any, ids: Any, **options: Any) -> Any:
    """Compute symmetric InfoNCE in which equal pictures are not each other's negatives, in any framework of nibs."""
    objective = nibs.InfoNCE(same_id="exclude")
    return nibs.contrastive_loss(queries, keys, scale=scale, objective=objective, query_ids=ids, key_ids=ids, **options)


def emoji_loss(queries: Tensor, keys: Tensor, scale: Tensor, ids: Tensor, **options: Any) -> Any:
    """Compute that of tensors; options go to nibs."""
    ids = ids.int().to(queries.device)  # a few thousand: 32 bits do, and JAX holds no 64 unless told to
    return pair_loss(queries, keys, scale, ids, **options)


def moved(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Shift all pictures alike, by up to SHIFT pixels each way; their borders are white."""
    down, right = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
    return torch.roll(pictures, (down, right), (2, 3))


@torch.no_grad()
def encode(model: Towers, side: Side) -> tuple[Tensor, Tensor, Tensor]:
    """Embed pictures, texts and English names as they are used: nothing dropped, nothing moved."""
    model.eval()
    pictures = torch.cat([model.encode_pictures(rows) for rows in side.pictures.split(ENCODED_AT_ONCE)])
    texts, english = model.encode_texts(side.texts), model.encode_texts(side.english)
    model.train()
    return pictures, texts, english


@dataclass(frozen=True)
class ZeroShot:
    """Accuracy over the groups: one picture of each held-out base. `largest` is the share of the commonest group."""

    by_prompt: float
    by_names: float
    groups: int
    largest: float
    count: int


@torch.no_grad()
def zero_shot(model: Towers, data: EmojiData, features: TextFeatures, pictures: Tensor) -> ZeroShot:
    """Sort held-out pictures into the groups of Unicode, of which training was told nothing.

    A group is known by text alone: by prompts (the mean of its own name and those of its subgroups), or by the
    mean of the captions that training has of it.
    """
    one_of_base: dict[str, int] = {}
    for place, row in enumerate(data.held_out):
        if data.emoji[row].group:
            one_of_base.setdefault(data.emoji[row].base, place)
    groups = sorted({one.group for one in data.emoji if one.group})
    places = list(one_of_base.values())
    truth = torch.tensor([groups.index(data.emoji[data.held_out[place]].group) for place in places])

    def mean_of(texts: list[str]) -> Tensor:
        return model.encode_texts(torch.from_numpy(features(texts))).mean(0)

    model.eval()
    prompts, names = [], []
    for group in groups:
        subgroups = sorted({one.subgroup.replace("-", " ") for one in data.emoji if one.group == group})
        prompts.append(mean_of([group, *subgroups]))
        names.append(mean_of([data.emoji[row].caption for row in data.train if data.emoji[row].group == group]))
    model.train()

    largest = torch.bincount(truth).max().item() / len(truth)
    by_prompt, by_names = (zero_shot_accuracy(pictures[places], torch.stack(rows), truth) for rows in (prompts, names))
    return ZeroShot(by_prompt, by_names, len(groups), largest, len(places))


class EmojiTask:
    """The emoji for examples/train.py; see tasks.Task. Norms look at one picture alone, so micro-batches are free."""

    rate, rate_batch = 2e-3, 256

    def __init__(self, seed: int, pairs: int | None = None) -> None:
        self.data = load_data(PICTURE_SIZE, seed=SPLIT_SEED)
        train = self.data.train[:pairs]
        self.features = TextFeatures([self.data.emoji[row].caption for row in train], TEXT_WIDTH)
        self.side = side_of(self.data, self.features, train)
        self.held_out = side_of(self.data, self.features, self.data.held_out)
        self.padded = functional.pad(self.side.pictures, (SHIFT,) * 4, value=1.0)  # white
        self.pairs = len(train)
        torch.manual_seed(seed)
        self.model = TwoTower(TEXT_WIDTH, DIM, norm="group")
        self.query_encoder = Encoder(self.model.encode_pictures, self.model.picture)
        self.key_encoder = Encoder(self.model.encode_texts, self.model.text, log_scale=self.model.log_scale)

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return pictures, each shifted by itself, and texts, some in English alone."""
        down, right = torch.randint(0, 2 * SHIFT + 1, (2, len(rows), 1, 1))
        place = torch.arange(PICTURE_SIZE)
        pictures = self.padded[rows[:, None, None], :, down + place[:, None], right + place].permute(0, 3, 1, 2)
        in_english = torch.rand(len(rows), 1) < ENGLISH
        return pictures, torch.where(in_english, self.side.english[rows], self.side.texts[rows])

    def loss(self, queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, **options: Any) -> Any:
        """Return the loss of the pairs `rows`."""
        return emoji_loss(queries, keys, scale, self.side.ids[rows], **options)

    def evaluate(self) -> dict[str, float]:
        """Judge by retrieval both ways, zero-shot accuracy, and detection, all on bases never seen."""
        pictures, names, _ = encode(self.model, self.held_out)
        found = {}
        for way, sides in (("picture to name", (pictures, names)), ("name to picture", (names, pictures))):
            for rank, share in zip(RANKS, retrieval(*sides, self.held_out.ids)):
                found[f"{way}, R@{rank}"] = share
        groups = zero_shot(self.model, self.data, self.features, pictures)
        found["zero-shot, by the group's own name"] = groups.by_prompt
        found["zero-shot, by names of its kind"] = groups.by_names
        return {**found, **self.detection()}

    @torch.no_grad()
    def detection(self) -> dict[str, float]:
        """Find and name held-out emoji on canvases."""
        one_of_base: dict[str, int] = {}
        for row in self.data.held_out:
            one_of_base.setdefault(self.data.emoji[row].base, int(row))
        rows = np.random.default_rng(SPLIT_SEED).permutation(list(one_of_base.values()))[:VOCABULARY]
        made = scenes([self.data.emoji[row].character for row in rows], SCENES, SPLIT_SEED)
        self.model.eval()
        texts = self.features([self.data.emoji[row].caption for row in rows])
        names = self.model.encode_texts(torch.from_numpy(texts))
        found = detect(made, self.model.encode_pictures, names, float(self.model.scale()), PICTURE_SIZE)
        self.model.train()
        return {
            "detection, mAP@0.5": mean_average_precision(made, found),
            "detection, boxes alone, AP@0.5": mean_average_precision(made, found, named=False),
        }
