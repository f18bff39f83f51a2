"""The main job: train an image-text model on emoji, the whole training set as one batch, through nibs.

    python examples/demo.py [--backend NAME] [--steps N] [--seconds-limit S] [--output FOLDER]

With `--backend jax` the model, its training and the loss are JAX's, one jitted function; any other backend of nibs
serves the loss of a model in PyTorch. Prints how well pictures and names that were never trained on find each other,
what the loss cost beside the dense one, and the same for 24,610 icons, where a dense similarity matrix takes 2.4 GB.
Writes two pictures and the figures as JSON. About two minutes on two cores; JAX wants `--seconds-limit 180` for all
steps, and four. What it needs is in examples/requirements.txt, and in examples/requirements-jax.txt.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from compare import Comparison, compare
from emoji_data import ATTRIBUTION, EmojiData, TextFeatures, load_data
from emoji_task import (
    DIM,
    ENGLISH,
    PICTURE_SIZE,
    TEXT_WIDTH,
    Side,
    Towers,
    emoji_loss,
    encode,
    moved,
    side_of,
    zero_shot,
)
from evaluate import RANKS, retrieval
from icon_data import icon_embeddings
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from show import (
    Curves,
    accuracy_table,
    comparison_table,
    draw_curves,
    draw_neighbours,
    duration,
    percent,
    retrieval_table,
)
from torch import Tensor
from two_tower import TwoTower, parameter_groups

import nibs

RATE = 3e-3
WARM_UP = 0.1  # share of training in which the rate grows
MICRO_BATCH = 400  # pictures encoded at once: their tensors stay near the processor, and they move together
LOOK_EVERY = 10  # steps between two looks at the held-out set
ICON_SCALE = 20.0
DENSE_SECONDS = 60.0  # what the dense loss on the icons may take of everybody's time
SHOWN = 20  # names in the picture of neighbours
NEAREST = 6


class Learner(Towers, Protocol):
    """What is trained, in either framework."""

    def learn(self, pictures: Tensor, texts: Tensor, ids: Tensor, share: float) -> float:
        """Take one step on the pairs of a batch, `[n, 3, 32, 32]`, `[n, TEXT_WIDTH]` and `[n]`; return its loss.

        share: of the full rate.
        """
        ...

    def scale(self) -> Tensor:
        """Return the learned factor on cosines."""
        ...


class TorchLearner(TwoTower):
    """The model in PyTorch, with its optimizer."""

    def __init__(self, backend: str | None) -> None:
        super().__init__(TEXT_WIDTH, DIM)
        self.backend = backend
        self.optimizer = torch.optim.AdamW(parameter_groups(self, RATE), lr=RATE, betas=(0.9, 0.98))

    def learn(self, pictures: Tensor, texts: Tensor, ids: Tensor, share: float) -> float:
        """Take one step on the pairs of a batch, and return its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_rate"] * share
        queries = torch.cat([self.encode_pictures(rows) for rows in pictures.split(MICRO_BATCH)])
        loss = emoji_loss(queries, self.encode_texts(texts), self.scale(), ids, backend=self.backend)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def learner(backend: str | None, seed: int) -> Learner:
    """Make the model of `--backend`: in JAX for jax, else in PyTorch, and the loss by whom it names."""
    if backend == "jax":
        import two_tower_jax

        return two_tower_jax.TwoTower(TEXT_WIDTH, DIM, RATE, seed)
    check_that_it_trains(backend)
    return TorchLearner(backend)


def check_that_it_trains(backend: str | None) -> None:
    """Try the loss on four rows, so that a backend which cannot train says so before anything is drawn."""
    rows, scale = torch.eye(4, 8).requires_grad_(), torch.tensor(10.0, requires_grad=True)
    loss = emoji_loss(rows, rows.detach().clone().requires_grad_(), scale, torch.arange(4), backend=backend)
    if not loss.requires_grad:
        raise nibs.errors.Unsupported(f"backend {backend!r} returns a loss without gradients: nothing can be trained.")
    loss.backward()


def train(
    model: Learner, side: Side, held_out: Side, options: argparse.Namespace, console: Console
) -> tuple[Curves, float]:
    """Take one step per pass over the whole set; return the curves and the seconds it took.

    The rate follows the share of steps done, or of the time limit used where that is ahead: a slow machine
    takes fewer steps and still ends with a small rate.
    """
    generator = torch.Generator().manual_seed(options.seed)
    curves, start = Curves(), time.perf_counter()
    columns = (
        SpinnerColumn(),
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[seen]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=options.steps, seen="")
        done = 0.0
        while done < 1:
            share = min(1, (done + 1 / options.steps) / WARM_UP) * math.cos(math.pi / 2 * done) ** 2
            order = torch.randperm(len(side.ids), generator=generator)
            pictures = torch.cat([moved(side.pictures[rows], generator) for rows in order.split(MICRO_BATCH)])
            in_english = torch.rand(len(order), 1, generator=generator) < ENGLISH
            texts = torch.where(in_english, side.english, side.texts)[order]
            curves.loss.append(model.learn(pictures, texts, side.ids[order], share))
            curves.scale.append(model.scale().item())
            steps = len(curves.loss)
            done = max(steps / options.steps, (time.perf_counter() - start) / options.seconds_limit)
            if steps % LOOK_EVERY == 0 or steps == 1 or done >= 1:
                pictures, names = encode(model, held_out)[:2]
                found = retrieval(names, pictures, held_out.ids)
                curves.steps.append(steps)
                curves.retrieval.append(found)
                seen = f"loss {curves.loss[-1]:.3f}  held-out R@10 {percent(found[-1])}"
                progress.update(task, seen=seen)
                if not console.is_terminal:
                    console.print(f"step {steps:>3}  {seen}")
            progress.update(task, completed=steps)
        progress.update(task, total=len(curves.loss))
    return curves, time.perf_counter() - start


def neighbours(data: EmojiData, pictures: Tensor, texts: Tensor, seed: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Draw names of held-out bases at random, each of another base, and find the pictures nearest to them."""
    order = np.random.default_rng(seed).permutation(len(data.held_out))
    one_of_base: dict[str, int] = {}
    for place in order:
        one_of_base.setdefault(data.emoji[data.held_out[place]].base, int(place))
    places = list(one_of_base.values())[:SHOWN]
    nearest = (texts[places] @ pictures.T).topk(NEAREST).indices.numpy()
    hits = data.ids[data.held_out[nearest]] == data.ids[data.held_out[places]][:, None]
    return [int(row) for row in data.held_out[places]], data.held_out[nearest], hits


def run(options: argparse.Namespace, console: Console) -> None:
    """Do the job and say what came of it."""
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    model = learner(options.backend, options.seed)

    with console.status("drawing emoji"):
        data = load_data(PICTURE_SIZE, seed=options.seed)
        features = TextFeatures([data.emoji[row].caption for row in data.train], TEXT_WIDTH)
        side, held_out = side_of(data, features, data.train), side_of(data, features, data.held_out)
    bases = len({data.emoji[row].base for row in data.held_out})
    count, tested = len(data.train), len(data.held_out)
    framework = "JAX" if options.backend == "jax" else "PyTorch"
    console.print(f"the model and its training in {framework}, the loss by nibs' backend {options.backend or 'torch'}")
    console.print(
        f"{len(data.emoji):,} emoji: {count:,} trained on as one batch, {tested} of {bases} other bases held out"
    )
    console.print(ATTRIBUTION, style="dim")

    curves, seconds = train(model, side, held_out, options, console)
    steps = len(curves.loss)
    console.print(f"{steps} steps of {count:,} pairs in {seconds:.0f} s, scale {curves.scale[-1]:.1f}\n")

    pictures, names, english = encode(model, held_out)
    found = {
        "picture to name": retrieval(pictures, names, held_out.ids),
        "name to picture": retrieval(names, pictures, held_out.ids),
        "the same, English only": retrieval(english, pictures, held_out.ids),
    }
    console.print(
        retrieval_table(f"Held-out retrieval among {tested} emoji of {bases} bases never seen", found, tested)
    )
    groups = zero_shot(model, data, features, pictures)
    accuracies = {
        "the names of its training emoji": groups.by_names,
        "its own name and its subgroups'": groups.by_prompt,
        f"chance, 1 of {groups.groups}": 1 / groups.groups,
        "chance, always the largest": groups.largest,
    }
    title = f"Zero-shot accuracy on {groups.count} bases never seen"
    console.print(accuracy_table(title, accuracies))

    comparisons = compare_losses(model, side, curves.scale[-1], options.backend, console)
    written = options.output
    written.mkdir(parents=True, exist_ok=True)
    with console.status("pictures"):
        draw_curves(written / "learning_curves.png", curves, math.log(count), comparisons, tested)
        shown = neighbours(data, pictures, names, options.seed)
        draw_neighbours(written / "neighbours.png", data.emoji, *shown)
    taken = time.perf_counter() - start
    report = {
        "backend": options.backend or "torch",
        "steps": steps,
        "training_seconds": seconds,
        "seconds": taken,
        "retrieval": {name: dict(zip((f"R@{rank}" for rank in RANKS), shares)) for name, shares in found.items()},
        "zero_shot": vars(groups),
        "loss": {name: plain(comparison) for name, comparison in comparisons.items()},
    }
    (written / "demo.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name in ("learning_curves.png", "neighbours.png", "demo.json"):
        console.print(str(written / name), highlight=False)
    console.print(f"{duration(taken)} in all")


def compare_losses(
    model: Learner, side: Side, scale: float, backend: str | None, console: Console
) -> dict[str, Comparison]:
    """Measure nibs beside dense on what was trained on, and on the icons; print both."""
    found = {}
    with console.status("the loss, nibs and dense, on the trained embeddings"):
        pictures, texts, _ = encode(model, side)
        found["emoji"] = one = compare(pictures.numpy(), texts.numpy(), scale, backend)
    console.print(comparison_table(f"The loss on {one.n:,} emoji, d = {one.dim}", one))
    with console.status("drawing icons"):
        icons = icon_embeddings()
    with console.status("the loss, nibs and dense, on the icons"):
        found["icons"] = one = compare(*icons, ICON_SCALE, backend, DENSE_SECONDS)
    title = f"The loss on {one.n:,} icons and names, d = {one.dim}: {one.matrix_bytes / 1e9:.1f} GB a dense matrix"
    console.print(comparison_table(title, one))
    return found


def plain(comparison: Comparison) -> dict[str, object]:
    """Name the figures of a comparison for the JSON file."""
    row: dict[str, object] = {"n": comparison.n, "dim": comparison.dim, "disagreement": comparison.disagreement()}
    for name, one in (("nibs", comparison.nibs), ("dense", comparison.dense)):
        row[name] = (
            comparison.skipped
            if one is None
            else {"loss": one.loss, "seconds_per_step": one.seconds, "peak_bytes": one.peak}
        )
    return row


def main() -> int:
    """Read the options and run; an error of nibs is shown as it is, and nothing else is caught."""
    parser = argparse.ArgumentParser(description="Train an image-text model on emoji through nibs.")
    parser.add_argument("--backend", help="of nibs, any that trains; jax trains in JAX (default: torch)")
    parser.add_argument("--steps", type=int, default=100, help="one step is the whole training set (default: 100)")
    parser.add_argument(
        "--seconds-limit", type=float, default=70.0, help="of training; fewer steps if slow (default: 70)"
    )
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the pictures (default: out)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.steps < 1 or options.seconds_limit <= 0:
        parser.error("--steps and --seconds-limit must be above zero")
    try:
        run(options, Console())
    except nibs.errors.NibsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
