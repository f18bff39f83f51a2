"""nibs beside its peers, in one command, on the machine it stands on: speed, memory and error, as tables and plots.

    python benchmarks/run.py                                        some ten minutes; prints Markdown
    python benchmarks/run.py --n 64 256 --no-memory                 one minute: who can run here?
    python benchmarks/run.py --results benchmarks/results           also cpu.json and cpu.png (cuda.*) there
    python benchmarks/run.py --docs docs/performance.md             also puts the tables into that page
    python benchmarks/run.py --n 2048 8192 --only nibs dense --turns 9
    python benchmarks/run.py --one-thread --no-memory               CPU time: nearly blind to what else runs here

What is measured, for each contender of contenders.py, is a step (loss and gradients) and the forward alone:

    growth over n     both losses, float32 and bfloat16, one width
    growth over d     the symmetric loss, one batch
    memory            of a step, beyond inputs and gradients, in a fresh process (on a CPU: for float32)
    error             of the loss from float64, and of the gradients of some rows
    first step        with what a contender compiles before it, which no other figure counts

A contender that cannot run has a row with its reason; so has one whose first step is not over after `--patience`. A
peer whose step would take longer than `--seconds` is left out of larger batches and widths, which the table says too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, Contender
from measure import (
    ONE_THREAD,
    PATIENCE,
    PRODUCTS,
    batch,
    errors,
    machine,
    one_thread,
    patience,
    peaks,
    product_rates,
    reason,
    seconds,
    truth,
)

DENSE = "dense torch"
EXACT = 16384  # rows at most that are compared with float64, which takes as long as many steps
CPU_SIZES = {
    ("InfoNCE", "float32"): [64, 256, 1024, 4096, 8192],
    ("InfoNCE", "bfloat16"): [256, 1024, 8192],
    ("Sigmoid", "float32"): [256, 1024, 4096],
}
GPU_SIZES = {
    ("InfoNCE", "float32"): [1024, 4096, 16384],
    ("InfoNCE", "bfloat16"): [1024, 4096, 16384, 65536],
    ("Sigmoid", "bfloat16"): [1024, 4096, 16384, 65536],
}
WIDTHS = [64, 256, 1024]
AT = {"cpu": 2048, "cuda": 16384}  # rows, where the width grows
MEMORY_FROM = 1024  # rows: below, a process's pages say more than the loss


@dataclass
class Row:
    """One contender on one batch. of_dense and rate: of a step. first: seconds of its first one, compilers included.

    reason: why there are no figures. over_d: part of the growth over d.
    """

    contender: str
    kind: str
    objective: str
    dtype: str
    n: int
    d: int
    forward: float | None = None
    step: float | None = None
    of_dense: float | None = None
    forward_of_dense: float | None = None
    rate: float | None = None
    first: float | None = None
    peak: int | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    reason: str = ""
    over_d: bool = False


@dataclass
class Run:
    """What the command asks for, and what was found so far."""

    options: argparse.Namespace
    device: str
    rates: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    gone: dict[tuple[str, str, str], str] = field(default_factory=dict)
    keep: Callable[[], None] = lambda: None  # called after each batch and peak

    def chosen(self, objective: str) -> list[Contender]:
        """The contenders of an objective that the command names."""
        words = self.options.only
        return [
            one
            for one in CONTENDERS
            if one.objective == objective and (not words or any(word in one.name for word in words))
        ]

    def grow(self, objective: str, dtype: str, sizes: list[int], d: int) -> None:
        """Batches from small to large, and then their memory."""
        fresh: list[Row] = []
        for n, following in zip(sizes, [*sizes[1:], 0], strict=True):
            fresh += self.measure(objective, dtype, n, d, following)
        for contender in self.chosen(objective):
            mine = {row.n: row for row in fresh if row.contender == contender.name and row.step is not None}
            large = [n for n in mine if n >= MEMORY_FROM]
            if large and not self.options.no_memory and (dtype == "float32" or self.device != "cpu"):
                if self.device != "cpu" and contender.name == "nibs jax":
                    continue  # there PyTorch's allocator is asked, which does not know JAX's
                for n, count in peaks(contender, dtype, d, self.device, large).items():
                    mine[n].peak = count
                self.keep()

    def measure(self, objective: str, dtype: str, n: int, d: int, following: int = 0) -> list[Row]:
        """A row for each contender that is still there, on one batch; following: rows of the next one."""
        one = batch(n, d, dtype, objective, self.device, self.options.memory)
        right = truth(one, objective) if n <= EXACT else None
        rows, steps = [], {}
        for contender in self.chosen(objective):
            row = Row(contender.name, contender.kind, objective, dtype, n, d)
            key = (contender.name, objective, dtype)
            if key in self.gone:
                if self.gone[key]:
                    rows.append(row)
                    row.reason, self.gone[key] = self.gone[key], ""
                continue
            rows.append(row)
            try:
                began = time.perf_counter()
                with patience(self.options.patience):
                    steps[contender.name] = step = contender.make(one)
                    loss = step.both()
                row.first = time.perf_counter() - began
                if right is not None:
                    row.loss_error, row.gradient_error = errors(step, loss, right)
                step.forward()
            except Exception as error:  # a guest may fail in any way
                steps.pop(contender.name, None)
                row.reason, self.gone[key] = reason(error), ""  # said once
                continue
        calls = {(name, what): getattr(step, what) for name, step in steps.items() for what in ("forward", "both")}
        best, failed = seconds(calls, self.options.turns)
        for (name, _), why in failed.items():
            steps.pop(name, None)
            self.gone[name, objective, dtype] = ""
            for row in rows:
                row.reason = why if row.contender == name else row.reason
        limit = self.options.seconds
        for row in rows:
            if row.contender in steps:
                row.forward, row.step = best[row.contender, "forward"], best[row.contender, "both"]
                row.rate = PRODUCTS[objective] * 2 * n * n * d / row.step / self.fastest(dtype)
                if DENSE in steps:
                    row.of_dense = row.step / best[DENSE, "both"]
                    row.forward_of_dense = row.forward / best[DENSE, "forward"]
                if row.kind == "peer" and row.step * (following / n) ** 2 > limit:
                    why = f"{row.step:.2g} s a step at n = {n}: this one would take longer than --seconds {limit:g}"
                    self.gone[row.contender, objective, dtype] = why
        self.rows += rows
        self.keep()
        print(f"{objective} {dtype} n = {n} d = {d}: {len(steps)} contenders", flush=True)
        return rows

    def fastest(self, dtype: str) -> float:
        """The best rate of products in this dtype that any library reaches here."""
        return max(rate for name, rate in self.rates.items() if name.startswith(dtype))


def tables(rows: list[Row], rates: dict[str, float], about: dict[str, Any]) -> str:
    """What was found, as Markdown: seconds of a step over n and over d, then each contender at its largest batch."""
    products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items())
    place = about["gpu"] or f"{about['clock']} of {about['processor']}"
    versions = ", ".join(f"{name} {about[name]}" for name in ("python", "torch", "numpy", "jax") if name in about)
    lines = [
        f"{place}; {versions}; {about['date']}; `{about['command']}`.",
        f"Matrix products, GFLOP/s: {products}.",
        "",
    ]
    width = about["dim"]
    for objective, dtype in dict.fromkeys((row.objective, row.dtype) for row in rows):
        mine = [row for row in rows if (row.objective, row.dtype) == (objective, dtype)]
        over_n = [row for row in mine if row.d == width and not row.over_d]
        lines += [f"{objective}, {dtype}, d = {width}: seconds of a step (of dense)", "", *_growth(over_n, "n"), ""]
        lines += ["Each at its largest batch; errors at the largest that was compared with float64:", ""]
        lines += [*_largest(over_n), ""]
        lines += _reasons(over_n)
        notes = {one.name: one.note for one in CONTENDERS if one.objective == objective and one.note}
        said = [f"{name}: {notes[name]}" for name in dict.fromkeys(row.contender for row in over_n) if name in notes]
        lines += [f"{'; '.join(said)}.", ""] if said else []
        over_d = [row for row in mine if row.over_d]
        if over_d:
            lines += [f"{objective}, {dtype}, n = {over_d[0].n}: seconds of a step (of dense)", ""]
            lines += [*_growth(over_d, "d"), ""]
    return "\n".join(lines)


def _growth(rows: list[Row], across: str) -> list[str]:
    """A line for each size, a column for each contender."""
    found = [row for row in rows if row.step is not None]
    names = list(dict.fromkeys(row.contender for row in found))
    lines = [f"| {across} | " + " | ".join(names) + " |", "| ---: |" + " ---: |" * len(names)]
    for size in sorted({getattr(row, across) for row in found}):
        at = {row.contender: row for row in found if getattr(row, across) == size}
        cells = [_beside_dense(at[name]) if name in at else "" for name in names]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return lines


def _beside_dense(row: Row) -> str:
    """Seconds of a step, and what share of the dense loss's that is, where that one was there."""
    return f"{row.step:.3g}" + (f" ({row.of_dense:.2f})" if row.of_dense is not None else "")


def _largest(rows: list[Row]) -> list[str]:
    """A line for each contender, at its largest batch; a column for each figure that somebody has."""
    last = {row.contender: row for row in rows if row.step is not None}
    columns: dict[str, list[str]] = {}
    for name, row in last.items():
        mine = [one for one in rows if one.contender == name]
        exact = [one for one in mine if one.loss_error is not None][-1:] or [row]
        cells = {
            "loss": name,
            "n": str(row.n),
            "first step s": f"{max(one.first or 0 for one in mine):.2g}",
            "forward s": f"{row.forward:.3g}",
            "step s": f"{row.step:.3g}",
            "forward of dense": _ratio(row.forward_of_dense),
            "step of dense": _ratio(row.of_dense),
            "rate": _ratio(row.rate),
            "peak MB": "" if row.peak is None else f"{row.peak / 1e6:.0f}",
            "loss error": "" if exact[0].loss_error is None else f"{exact[0].loss_error:.0e}",
            "gradient error": "" if exact[0].gradient_error is None else f"{exact[0].gradient_error:.0e}",
        }
        for head, cell in cells.items():
            columns.setdefault(head, []).append(cell)
    shown = {head: cells for head, cells in columns.items() if any(cells)}
    rule = ["---" if head == "loss" else "---:" for head in shown]
    return ["| " + " | ".join(line) + " |" for line in (shown, rule, *zip(*shown.values(), strict=True))]


def _reasons(rows: list[Row]) -> list[str]:
    """A line for each contender that could not run, or not as far as the others."""
    found = [(row.contender, row.n, row.reason.replace("|", "/")) for row in rows if row.reason]
    if not found:
        return []
    lines = [f"| {name} | {n} | {reason} |" for name, n, reason in found]
    return ["| without figures | from n | reason |", "| --- | ---: | --- |", *lines, ""]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def plot(every: list[Row], path: Path) -> None:
    """Time and memory over n, and time over d, of the symmetric loss in float32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mine = [row for row in every if (row.objective, row.dtype) == ("InfoNCE", "float32")]
    over_n, over_d = [row for row in mine if not row.over_d], [row for row in mine if row.over_d]
    panels = (
        (over_n, "n", "step", "seconds of a step"),
        (over_n, "n", "peak", "peak bytes beyond inputs and gradients"),
        (over_d, "d", "step", "seconds of a step"),
    )
    panels = tuple(panel for panel in panels if any(getattr(row, panel[2]) for row in panel[0]))
    if not panels:
        return
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5 * len(panels), 4.5), constrained_layout=True, squeeze=False
    )
    names = dict.fromkeys(row.contender for row in mine if row.step is not None)
    colours = {name: pyplot.get_cmap("tab20")(2 * index % 19) for index, name in enumerate(names)}
    for axis, (rows, across, up, title) in zip(axes[0], panels, strict=True):
        for name, colour in colours.items():
            points = sorted(
                (getattr(row, across), getattr(row, up)) for row in rows if row.contender == name and getattr(row, up)
            )
            if points:
                ours = name.startswith("nibs")
                axis.loglog(*zip(*points), "o-" if ours else "s--", label=name, color=colour, lw=2 if ours else 1)
        fixed = {f"{other} = {getattr(row, other)}" for row in rows for other in "nd" if other != across}
        axis.set(xlabel=across, title=", ".join([title, *fixed]))
        sizes = sorted({getattr(row, across) for row in rows if getattr(row, up)})
        axis.set_xticks(sizes, [f"{size}" for size in sizes])
        axis.set_xticks([], minor=True)
        axis.grid(True, which="major", alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def put_into(page: Path, name: str, text: str) -> None:
    """The tables, in place of those between the page's two marks of this name."""
    begin, end = f"<!-- {name} tables -->\n", f"<!-- end of {name} tables -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} has no marks '{begin.strip()}' and '{end}': nothing was written to it.")
    page.write_text(before + begin + "\n" + text + "\n" + end + after)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", help="batch sizes, for every table; default: by the machine")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="of the growth over d; empty: none")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--objectives", nargs="+", default=["InfoNCE", "Sigmoid"])
    parser.add_argument("--only", nargs="+", help="contenders whose names contain one of these words")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="longest step of a peer")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds for a first step, with its compiler")
    parser.add_argument("--memory", help="budget for nibs, such as 512MiB; default: its own")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks, which take a process each")
    parser.add_argument("--one-thread", action="store_true", help="one thread, and CPU time in the place of a clock's")
    parser.add_argument("--device", help="cpu or cuda; default: what is here")
    parser.add_argument("--results", type=Path, help="a folder for figures (.json) and plots (.png)")
    parser.add_argument("--docs", type=Path, help="a page with marks, whose tables are replaced")
    options = parser.parse_args()
    if options.one_thread and not one_thread():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_THREAD})
    warnings.filterwarnings("ignore")  # of peers; nibs's own tests hold it to none

    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(options, device, product_rates(device))
    about = {**machine(device), "dim": options.dim}
    name = f"{device}-one-thread" if one_thread() else device

    def keep() -> None:
        figures = {"machine": about, "products per second": run.rates, "rows": [vars(row) for row in run.rows]}
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")

    if options.results:
        run.keep = keep
    sizes = CPU_SIZES if device == "cpu" else GPU_SIZES
    cut = False
    try:
        for (objective, dtype), default in sizes.items():
            if objective in options.objectives and dtype in options.dtypes:
                run.grow(objective, dtype, options.n or default, options.dim)
        if options.widths and "InfoNCE" in options.objectives and "float32" in options.dtypes:
            for d in options.widths:
                for row in run.measure("InfoNCE", "float32", AT[device[:4]], d):
                    row.over_d = True
    except KeyboardInterrupt:  # what was measured until then is shown and kept
        cut = True
    again = product_rates(device)  # a neighbour may have slowed the first look
    before = {dtype: run.fastest(dtype) for dtype in {row.dtype for row in run.rows}}
    run.rates = {name: max(rate, again[name]) for name, rate in run.rates.items()}
    for row in run.rows:
        if row.rate is not None:
            row.rate *= before[row.dtype] / run.fastest(row.dtype)
    text = tables(run.rows, run.rates, about)
    print("\n" + text)
    if options.results:
        run.keep()
        if importlib.util.find_spec("matplotlib"):
            plot(run.rows, options.results / f"{name}.png")
        else:
            print("No plot was made: pip install matplotlib")
    if cut:
        raise SystemExit("Interrupted: these are the figures until then; no page was touched.")
    if options.docs:
        if options.results:
            shown = os.path.relpath(options.results / f"{name}.png", options.docs.parent)
            text += f"\n![Time and memory over n, time over d]({shown})\n"
        put_into(options.docs, name, text)


if __name__ == "__main__":
    main()
