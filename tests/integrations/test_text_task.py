"""examples/train.py on phrases with a real sentence encoder: dropout, tokens by name, one encoder for both sides."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is in a package; nothing is asked of a network

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = {"Baum": "tree", "Hund": "dog", "Haus": "house", "Mond": "moon", "Brot": "bread"}
WORDS |= {"Lampe": "lamp", "Meer": "sea", "Stadt": "town", "Buch": "book", "Tür": "door"}
pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's packages


@pytest.fixture
def phrases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(EXAMPLES)
    lines = [f"{german} {{n}} [x] :: {english}" for german, english in WORDS.items()]
    lines += [f"ein {german} | Plural :: a {english}; the {english}" for german, english in WORDS.items()]
    (tmp_path / "de-en").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "de-en"


def test_phrases_train_in_micro_batches_as_held_whole(phrases: Path, tmp_path: Path) -> None:
    import train
    from text_task import TextTask

    after = []
    for micro_batch in ("256", "4"):
        words = [
            "--data",
            "text",
            "--batch",
            "10",
            "--steps",
            "1",
            "--micro-batch",
            micro_batch,
            "--output",
            str(tmp_path),
        ]
        options = train.parser().parse_args([*words, "--rate", "0.001"])
        torch.manual_seed(0)
        task = TextTask(phrases)
        for module in task.model.modules():  # micro-batches draw their dropout one by one
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        assert task.pairs == 10
        trainer = train.Trainer(task, options)
        loss = trainer.step().loss
        gradients = {name: one.grad for name, one in task.model.named_parameters() if one.grad is not None}
        after.append((loss, gradients))
    (loss, gradients), (other_loss, others) = after
    assert other_loss == pytest.approx(loss, abs=1e-4)
    assert gradients.keys() == others.keys()
    size = torch.cat([one.flatten() for one in gradients.values()]).norm()
    apart = torch.cat([(gradients[name] - others[name]).flatten() for name in gradients]).norm()
    assert size > 0
    assert apart < 1e-3 * size


def test_a_frozen_encoder_runs_once_and_heads_are_trained_on_what_it_gave(
    phrases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import text_task
    import train

    monkeypatch.setattr(text_task, "KEPT", tmp_path / "kept")
    words = ["--data", "text", "--frozen", "--data-path", str(phrases), "--batch", "all", "--steps", "3"]
    arguments = [*words, "--micro-batch", "4", "--rate", "0.01", "--output", str(tmp_path / "out")]
    found = train.run(train.parser().parse_args(arguments))["found"]
    assert found["German to English, R@10"] == 1.0  # ten are held out
    assert len(list((tmp_path / "kept").glob("minilm-10-*.pt"))) == 2  # of phrases to train on, and of those kept
    monkeypatch.setattr(text_task, "minilm", lambda: pytest.fail("the encoder ran again"))
    task = text_task.FrozenTask(phrases)
    one = text_task.FrozenTask(phrases)
    assert all(torch.equal(a, b) for a, b in zip(task.sides, one.sides))
    sentences = task.sides[0]
    assert sentences.shape == (10, text_task.WIDTH)
    assert torch.allclose(sentences.norm(dim=1), torch.ones(10), atol=1e-5)


def test_padding_does_not_show_in_what_a_frozen_encoder_gives(phrases: Path) -> None:
    import text_task

    sentences, tokenizer = text_task.minilm()
    sentences.eval()
    tokens = tokenizer(["tree", "a long walk through the park at night", "sea"])
    with torch.no_grad():
        padded = sentences.rows(tokens)
    assert torch.allclose(text_task.encoded(sentences, tokens), padded, atol=1e-5)


def test_phrases_train_with_dropout_and_are_judged(phrases: Path, tmp_path: Path) -> None:
    import train

    words = ["--data", "text", "--data-path", str(phrases), "--batch", "10", "--steps", "2", "--micro-batch", "4"]
    found = train.run(train.parser().parse_args([*words, "--output", str(tmp_path / "out")]))["found"]
    assert set(found) == {
        f"{way}, R@{rank}" for way in ("German to English", "English to German") for rank in (1, 5, 10)
    }
    assert found["German to English, R@10"] == 1.0  # ten are held out
