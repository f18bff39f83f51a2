"""What a larger batch changes: figures of the embeddings, of the gradient, and of every step, with plots. PyTorch.

    alignment, uniformity     how near positives are, how evenly rows spread (Wang and Isola, arXiv 2005.10242)
    effective_rank            how many directions the rows use (Roy and Vetterli, EUSIPCO 2007)
    hardest_negative_share    how much of a row's negative mass its one hardest negative holds
    gradient_noise            how much of a batch's gradient is chance (after McCandlish et al., arXiv 1812.06162)
    step_figures              the same story step by step, from the `stats` of the loss

    python examples/diagnostics.py out/small out/large --data emoji --gradients 64 256 1024

reads runs of examples/train.py, prints a table, and draws diagnostics.png into `--output`; `--record` writes every
figure as JSON, each run's steps among them. Every function takes plain tensors, and none builds a matrix of all pairs
at once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NOISE = "gradient noise at "
STRIP = 1024  # rows compared with all others at once


def alignment(queries: Tensor, keys: Tensor, power: float = 2.0) -> float:
    """Return the mean of |q_i - k_i|^power over the pairs of rows `[n, d]`: 0 where every pair is one point."""
    return (queries - keys).norm(dim=1).pow(power).mean().item()


def uniformity(rows: Tensor, t: float = 2.0) -> float:
    """Return log of the mean of exp(-t |x_i - x_j|^2) over pairs of two different rows of `[n, d]`.

    0 where all rows are one point; the lower, the more evenly they spread over the sphere.
    """
    n = len(rows)
    squares, total = rows.square().sum(1), torch.tensor(-math.inf, dtype=rows.dtype)
    for strip in torch.arange(n).split(STRIP):
        distances = (squares[strip, None] + squares[None, :] - 2 * rows[strip] @ rows.T).clamp_min(0)
        distances[torch.arange(len(strip)), strip] = math.inf
        total = torch.logaddexp(total, (-t * distances).flatten().logsumexp(0))
    return total.item() - math.log(n * (n - 1))


def effective_rank(rows: Tensor) -> float:
    """Return exp of the entropy of the singular values of `[n, d]`, taken as shares: 1 for a line, d at the most."""
    shares = torch.linalg.svdvals(rows)
    shares = shares / shares.sum()
    return torch.special.entr(shares).sum().exp().item()


def hardest_negative_share(queries: Tensor, keys: Tensor, scale: float) -> float:
    """Return the mean over queries of the share that the hardest negative has of exp(logit) over all negatives.

    1/(n-1) where all are alike, 1 where one stands out: a batch in which it is near 1 teaches by one pair a row, and a
    larger one only helps where it brings harder ones.
    """
    shares = []
    for strip in torch.arange(len(queries)).split(STRIP):
        logits = scale * queries[strip] @ keys.T
        logits[torch.arange(len(strip)), strip] = -math.inf
        shares.append((logits.max(1).values - logits.logsumexp(1)).exp())
    return torch.cat(shares).mean().item()


@dataclass(frozen=True)
class GradientNoise:
    """Of gradients at one point: |mean|^2 and the sum of variances, both unbiased, and `ratio`, noise over signal.

    Where the ratio is 1, a gradient is as much chance as it is direction; where signal cannot be told from zero, the
    ratio is infinite.
    """

    signal: float
    noise: float
    ratio: float


def gradient_noise(gradients: Tensor) -> GradientNoise:
    """Part the gradients `[k, p]` of k batches of one size, at the same parameters, into what they share and chance.

    A contrastive loss is no mean over independent samples: its batch is part of what it asks. So nothing is
    extrapolated from one batch size to another; measure each.
    """
    k = len(gradients)
    if k < 2:
        raise ValueError(f"{k} gradients: the noise of a gradient shows from two of them.")
    mean = gradients.mean(0)
    noise = (gradients - mean).square().sum().item() / (k - 1)
    signal = mean.square().sum().item() - noise / k  # the mean of k has chance left in it
    return GradientNoise(signal, noise, noise / signal if signal > 0 else math.inf)


def gradients_of(step: Callable[[Tensor], Any], parameters: Sequence[Tensor], batches: Iterable[Tensor]) -> Tensor:
    """Return `[k, p]`: what `step(rows)` adds to `.grad` for each batch, which it finds empty."""
    listed = []
    for rows in batches:
        for parameter in parameters:
            parameter.grad = None
        step(rows)
        listed.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))
    return torch.stack(listed)


@dataclass(frozen=True)
class StepFigures:
    """One step: mean cosines of positives and of negatives, the hardest one of all, and the share of the positive.

    positive_share: exp(mean positive logit - mean lse), the geometric mean of the probabilities that rows give to
    their positives (both directions of a symmetric loss together). temperature: 1 / scale.
    """

    temperature: float
    positive: float
    negative: float
    hardest: float
    positive_share: float
    top1: float


def step_figures(stats: Any, scale: float) -> StepFigures:
    """Read a step from `nibs.Stats`, or from a line of log.jsonl with the same names; bias 0, one positive a row."""
    read = stats.get if isinstance(stats, dict) else lambda name: getattr(stats, name)
    return StepFigures(
        1 / scale,
        read("mean_positive") / scale,
        read("mean_negative") / scale,
        read("hardest_negative") / scale,
        math.exp(read("mean_positive") - read("mean_lse")),
        read("top1"),
    )


def figures_of(queries: Tensor, keys: Tensor, scale: float) -> dict[str, float]:
    """Return the figures of trained embeddings `[n, d]`, pair by pair."""
    return {
        "alignment": alignment(queries, keys),
        "uniformity, queries": uniformity(queries),
        "uniformity, keys": uniformity(keys),
        "effective rank, queries": effective_rank(queries),
        "effective rank, keys": effective_rank(keys),
        "hardest-negative share": hardest_negative_share(queries, keys, scale),
    }


def recorded(
    runs: dict[str, list[StepFigures]], noise: dict[str, dict[int, GradientNoise]], found: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Lay out what was found, run by run, for JSON: which has no infinity, so a ratio without a signal is null there.

    Steps are lists, a number for each step, under the names of StepFigures.
    """
    names = [field.name for field in fields(StepFigures)]
    return {
        run: {
            "figures": {name: value for name, value in found[run].items() if not name.startswith(NOISE)},
            "gradient noise": {
                size: {name: value if math.isfinite(value) else None for name, value in asdict(one).items()}
                for size, one in noise.get(run, {}).items()
            },
            "steps": {name: [float(f"{getattr(one, name):.6g}") for one in runs[run]] for name in names},
        }
        for run in found
    }


def draw(path: Path, runs: dict[str, list[StepFigures]], noise: dict[str, dict[int, GradientNoise]]) -> None:
    """Draw temperature, cosines and the positive's share over the steps, and gradient noise over the batch."""
    import matplotlib

    matplotlib.use("Agg")  # a file is drawn, with or without a screen
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 4))
    for number, (name, steps) in enumerate(runs.items()):
        shade, places = f"C{number}", range(1, len(steps) + 1)
        axes[0].plot(places, [one.temperature for one in steps], color=shade, label=name)
        for field, style in (("positive", "-"), ("hardest", "--"), ("negative", ":")):
            axes[1].plot(places, [getattr(one, field) for one in steps], color=shade, linestyle=style)
        axes[2].plot(places, [one.positive_share for one in steps], color=shade)
        measured = noise.get(name, {})
        axes[3].plot(list(measured), [one.ratio for one in measured.values()], color=shade, marker="o")
    axes[0].set(title="Temperature", xlabel="step")
    axes[0].legend(frameon=False)
    axes[1].set(title="Cosine: positive (line), hardest (dashed), mean (dotted)", xlabel="step")
    axes[2].set(title="Probability of the positive", xlabel="step", ylim=(0, 1))
    axes[3].set(title="Gradient: noise over signal", xlabel="batch")
    if any(noise.values()):
        axes[3].set(xscale="log", yscale="log")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Read runs of train.py, print their figures, draw their steps."""
    from tasks import make_task
    from train import machine, split

    parser = argparse.ArgumentParser(description="Figures of trained runs: embeddings, gradients, steps.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders that examples/train.py wrote")
    parser.add_argument("--data", choices=("emoji", "fashion", "text"), required=True)
    parser.add_argument("--data-path", type=Path)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--frozen", action="store_true", help="runs of --frozen (text)")
    parser.add_argument("--rows", type=int, default=2000, help="pairs whose embeddings are looked at (default: 2000)")
    parser.add_argument(
        "--gradients", type=int, nargs="*", default=[], help="batches to measure the gradient's noise at"
    )
    parser.add_argument("--repeats", type=int, default=8, help="gradients of each batch (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--record", type=Path, help="a file for the figures (.json)")
    options = parser.parse_args()
    options.seed = 0
    task = make_task(options)
    steps: dict[str, list[StepFigures]] = {}
    noise: dict[str, dict[int, GradientNoise]] = {}
    found: dict[str, dict[str, float]] = {}
    for folder in options.runs:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        steps[folder.name] = [step_figures(one, one["scale"]) for one in map(json.loads, lines)]
        task.model.load_state_dict(torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["model"])
        task.model.eval()
        torch.manual_seed(0)
        rows = torch.arange(min(options.rows, task.pairs))
        with torch.no_grad():
            query_inputs, key_inputs = task.inputs(rows)
            (queries, _), (keys, scale) = split(task.query_encoder(query_inputs)), split(task.key_encoder(key_inputs))
        found[folder.name] = figures_of(queries, keys, float(scale))

        def step(rows: Tensor) -> None:
            query_inputs, key_inputs = task.inputs(rows)
            (queries, _), (keys, scale) = split(task.query_encoder(query_inputs)), split(task.key_encoder(key_inputs))
            task.loss(queries, keys, scale, rows).backward()

        parameters = [one for one in task.model.parameters() if one.requires_grad]
        noise[folder.name] = {
            size: gradient_noise(
                gradients_of(step, parameters, (torch.randperm(task.pairs)[:size] for _ in range(options.repeats)))
            )
            for size in options.gradients
        }
        task.model.train()
        found[folder.name] |= {f"{NOISE}{size}": one.ratio for size, one in noise[folder.name].items()}
    print("| | " + " | ".join(found) + " |\n| --- |" + " ---: |" * len(found))
    for name in next(iter(found.values())):
        print(f"| {name} | " + " | ".join(f"{figures[name]:.3g}" for figures in found.values()) + " |")
    options.output.mkdir(parents=True, exist_ok=True)
    draw(options.output / "diagnostics.png", steps, noise)
    print(options.output / "diagnostics.png")
    if options.record:
        ran = {**machine(), "command": " ".join(["python", "examples/diagnostics.py", *sys.argv[1:]])}
        written = {"machine": ran, "data": options.data, "rows": len(rows), "repeats": options.repeats}
        written["runs"] = recorded(steps, noise, found)
        options.record.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"written: {options.record}")


if __name__ == "__main__":
    main()
