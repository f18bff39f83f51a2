"""What the demo says at the end: tables for the terminal, two pictures for the eye.

Nothing is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # a file is drawn, with or without a screen

import matplotlib.pyplot as plt
from emoji_data import ATTRIBUTION, render
from evaluate import RANKS
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import numpy as np
    from compare import Comparison
    from emoji_data import Emoji
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY, GREEN = "#2563a8", "#d9772b", "#8a8f98", "#2f9e57"
PICTURE_SIZE = 72
plt.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.grid": True,
        "grid.color": "#e6e8eb",
        "axes.axisbelow": True,
        "figure.dpi": 130,
    }
)


@dataclass
class Curves:
    """What was seen while training.

    loss, scale: one value a step. steps, retrieval: where the held-out set was looked at, and R@1, 5, 10 there.
    """

    loss: list[float] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    retrieval: list[tuple[float, ...]] = field(default_factory=list)


def percent(share: float) -> str:
    """Write a share with two or three figures."""
    return f"{100 * share:.1f} %" if share >= 0.0095 else f"{100 * share:.2f} %"


def size(count: float | None) -> str:
    """Write bytes, decimal."""
    if count is None:
        return "unknown"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Write a time."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def titled(title: str, table: Table, note: str = "") -> Group:
    """Set a title above a table and a note below it, neither bound to its width."""
    below = [Text(f"  {note}", style="dim")] if note else []
    return Group(Text(title, style="bold"), table, *below, "")


def table_of(first: str, *others: str) -> Table:
    """Start a plain table: words on the left, figures on the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True, header_style="")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def retrieval_table(title: str, rows: dict[str, tuple[float, ...]], count: int) -> Group:
    """Lay out R@1, R@5 and R@10 of each direction above what guessing gives."""
    table = table_of("", *(f"R@{rank}" for rank in RANKS))
    for name, shares in rows.items():
        table.add_row(name, *(percent(share) for share in shares))
    table.add_row("chance", *(percent(rank / count) for rank in RANKS), style="dim")
    return titled(title, table)


def accuracy_table(title: str, rows: dict[str, float]) -> Group:
    """Lay out accuracies, one a row."""
    table = table_of("a group is known by", "accuracy")
    for name, share in rows.items():
        table.add_row(name, percent(share), style="dim" if name.startswith("chance") else "")
    return titled(title, table)


def comparison_table(title: str, comparison: Comparison) -> Group:
    """Lay out one loss beside the other."""
    table = table_of("", "peak memory", "time per step", "loss")
    for name, one in (("nibs", comparison.nibs), ("dense", comparison.dense)):
        if one is None:
            table.add_row(name, "not run", style="dim")
        else:
            table.add_row(name, size(one.peak), duration(one.seconds), f"{one.loss:.5f}")
    difference = comparison.disagreement()
    if difference is None:
        return titled(title, table, f"dense was not run: {comparison.skipped}")
    return titled(title, table, f"loss and gradients agree to {difference:.0e} of their size")


def draw_curves(path: Path, curves: Curves, floor: float, comparisons: dict[str, Comparison], count: int) -> None:
    """Draw loss, held-out retrieval and the memory of both losses side by side; `floor` is the loss of guessing."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), width_ratios=(1, 1, 0.9))
    steps = range(1, len(curves.loss) + 1)
    left.plot(steps, curves.loss, color=BLUE, linewidth=2)
    left.axhline(floor, color=GREY, linestyle="--", linewidth=1)
    left.annotate("guessing", (len(curves.loss), floor), ha="right", va="bottom", color=GREY)
    left.set(title="Training loss, all pairs in one batch", xlabel="step", ylim=(0, 1.08 * max(floor, *curves.loss)))

    shades = (BLUE, ORANGE, GREEN)
    for rank, shade, shares in zip(RANKS, shades, zip(*curves.retrieval)):
        middle.plot(curves.steps, [100 * share for share in shares], color=shade, linewidth=2)
        middle.annotate(
            f" R@{rank}", (curves.steps[-1], 100 * shares[-1]), color=shade, va="center", annotation_clip=False
        )
        middle.axhline(100 * rank / count, color=shade, linestyle="--", linewidth=0.8)
    middle.set(title="Retrieval among emoji never seen, %", xlabel="step (dashed: chance)", ylim=(0, None))

    draw_memory(right, comparisons)
    figure.tight_layout(w_pad=3)
    figure.savefig(path)
    plt.close(figure)


def draw_memory(axes: Axes, comparisons: dict[str, Comparison]) -> None:
    """Draw the peak memory of both losses as bars, on a logarithmic axis, with the times beside them."""
    labels, place = [], 0.0
    for name, comparison in comparisons.items():
        for loss, one, shade in (("dense", comparison.dense, GREY), ("nibs", comparison.nibs, BLUE)):
            labels.append((place, f"{loss}\n{name}" if loss == "nibs" else loss))
            if one is not None and one.peak:
                axes.barh(place, one.peak / 1e6, color=shade, height=0.8)
                axes.annotate(f" {size(one.peak)}, {duration(one.seconds)}", (one.peak / 1e6, place), va="center")
            else:
                axes.annotate(" not measured", (1, place), va="center", color=GREY)
            place -= 1
        place -= 0.6
    axes.set_xscale("log")
    axes.set_yticks([place for place, _ in labels], [label for _, label in labels])
    largest = max((one.peak or 1) for c in comparisons.values() for one in (c.nibs, c.dense) if one is not None)
    axes.set(
        title="Loss: peak memory, time of a step", xlabel="MB beyond inputs and gradients", xlim=(1, largest / 1e4)
    )
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def draw_neighbours(path: Path, emoji: list[Emoji], rows: list[int], nearest: np.ndarray, hits: np.ndarray) -> None:
    """Draw each asked name, its own picture, and the pictures found nearest; a hit has a green frame.

    rows: the emoji asked for. nearest, hits: `[len(rows), k]`, emoji found and whether they are the one asked for.
    """
    halves, count = 2, nearest.shape[1]
    per_half = -(-len(rows) // halves)
    figure = plt.figure(figsize=(15, 0.98 * per_half + 1.2))
    outer = figure.add_gridspec(
        1, halves, wspace=0.06, left=0.01, right=0.99, top=1 - 0.85 / (0.98 * per_half + 1.2), bottom=0.04
    )
    for half in range(halves):
        grid = outer[half].subgridspec(
            per_half, count + 2, width_ratios=(2.6, 1.1, *[1] * count), wspace=0.08, hspace=0.12
        )
        for line, place in enumerate(range(half * per_half, min((half + 1) * per_half, len(rows)))):
            row = rows[place]
            name = figure.add_subplot(grid[line, 0])
            name.axis("off")
            name.text(0.98, 0.5, wrapped(emoji[row].name), ha="right", va="center", fontsize=11)
            pictures = render([emoji[i].character for i in (row, *nearest[place])], PICTURE_SIZE)
            for column, picture in enumerate(pictures):
                axes = figure.add_subplot(grid[line, column + 1])
                axes.imshow(picture, interpolation="lanczos")
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
                hit = column > 0 and bool(hits[place, column - 1])
                for spine in axes.spines.values():
                    spine.set(visible=column > 0, color=GREEN if hit else "#dfe2e6", linewidth=3 if hit else 1)
                if line == 0:
                    axes.set_title("truth" if column == 0 else str(column), loc="center", fontsize=9, color=GREY)
    figure.suptitle(
        "Names never seen in training, and the pictures found nearest (among all held-out emoji; drawn at random)",
        x=0.01, ha="left", fontsize=13, fontweight="bold",
    )  # fmt: skip
    figure.text(0.99, 0.012, ATTRIBUTION, ha="right", fontsize=8, color=GREY)
    figure.savefig(path)
    plt.close(figure)


def wrapped(text: str, width: int = 22) -> str:
    """Break a name into lines that fit its column."""
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:4])
