"""Standard batches beside large ones, at equal epochs and at equal steps, over several seeds: what does a batch buy?

    python examples/seeds.py --data emoji --batches 64 256 1024 all --epochs 12 144 --steps 144 --seeds 0 1 2

Every run is a process of examples/train.py with a folder of its own under `--output`, and one that is there already,
of the same options, is not run again: a stopped series goes on. A batch above `--micro-batch` goes through the
decoupled step, the others are held whole. Equal epochs cost the same forward and backward passes; equal steps cost the
larger batch as many times more as it is larger. Learning rates follow the root of the batch; nothing is tuned for one
batch alone. The table gives mean and standard deviation over the seeds; `--record` writes every figure as JSON.
`--gather` runs nothing and puts into one table what several such series have left in `--output`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SAME = ("machine", "seconds", "found", "loss", "seed")  # what differs between the seeds of one row


def budgets(batches: list[str], epochs: list[float], steps: list[int]) -> list[tuple[str, list[str]]]:
    """List each batch with the options of its length."""
    lengths = [["--epochs", f"{one:g}"] for one in epochs] + [["--steps", str(one)] for one in steps]
    return [(batch, length) for length in lengths for batch in batches]


def run_once(options: argparse.Namespace, batch: str, length: list[str], seed: int) -> dict[str, Any]:
    """Train, or read what an earlier run of this very command left."""
    kind = options.data + "-frozen" * options.frozen
    folder = options.output / "-".join([kind, batch, *(word.strip("-") for word in length), f"seed{seed}"])
    settings = ["--data", options.data, "--batch", batch, *length, "--seed", str(seed)]
    settings += ["--micro-batch", str(options.micro_batch)]
    for name in ("pairs", "data_path", "rate"):
        value = getattr(options, name)
        if value is not None:
            settings += [f"--{name.replace('_', '-')}", str(value)]
    settings += ["--frozen"] * options.frozen
    result = folder / "result.json"
    command = " ".join(["python", "examples/train.py", *settings])
    if result.exists():
        found = json.loads(result.read_text(encoding="utf-8"))
        if found["machine"]["command"].partition(" --output")[0] == command:
            return found
    print(f"{folder.name} ...", file=sys.stderr, flush=True)
    log = subprocess.run(
        [sys.executable, str(HERE / "train.py"), *settings, "--output", str(folder)], capture_output=True, text=True
    )
    if log.returncode:
        raise SystemExit(f"{command}: ended with {log.returncode}\n{log.stderr[-2000:]}")
    return json.loads(result.read_text(encoding="utf-8"))


def gathered(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bring the seeds of one batch and length together; a length reached in two ways (12 epochs, 144 steps) is one row.

    Each row has `mean` and `spread` (sample standard deviation, 0 for one seed) of every figure, and `runs`.
    """
    rows: dict[tuple[int, int], dict[int, dict[str, Any]]] = {}
    for one in results:
        rows.setdefault((one["steps"], one["batch"]), {})[one["seed"]] = one
    listed = []
    for seeds in (rows[key] for key in sorted(rows)):
        runs = [seeds[seed] for seed in sorted(seeds)]
        figures = {name: [run["found"][name] for run in runs] for name in runs[0]["found"]}
        listed.append(
            {
                **{name: value for name, value in runs[0].items() if name not in SAME},
                "command": runs[0].get("machine", {}).get("command", "").partition(" --output")[0],
                "seeds": [run["seed"] for run in runs],
                "mean": {name: statistics.fmean(values) for name, values in figures.items()},
                "spread": {
                    name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in figures.items()
                },
                "seconds": [round(run["seconds"], 1) for run in runs],
                "runs": figures,
            }
        )
    return listed


def table(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out in Markdown: figures in per cent, mean and standard deviation."""
    names = list(rows[0]["mean"])
    lines = ["| batch | steps | epochs | " + " | ".join(names) + " |"]
    lines.append("| ---: | ---: | ---: |" + " ---: |" * len(names))
    for row in rows:
        figures = [f"{100 * row['mean'][name]:.1f} ± {100 * row['spread'][name]:.1f}" for name in names]
        lines.append(f"| {row['batch']:,} | {row['steps']:,} | {row['epochs']:g} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the series, print the table, and record it where asked."""
    parser = argparse.ArgumentParser(description="Standard batches beside large ones, over several seeds.")
    parser.add_argument("--data", choices=("emoji", "fashion", "text"), default="emoji")
    parser.add_argument("--data-path", type=Path)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--frozen", action="store_true", help="text: train heads on MiniLM's embeddings, not MiniLM")
    parser.add_argument("--rate", type=float, help="of every batch (default: by the root of the batch)")
    parser.add_argument("--batches", nargs="+", default=["64", "256", "1024", "all"])
    parser.add_argument("--epochs", type=float, nargs="*", default=[12])
    parser.add_argument("--steps", type=int, nargs="*", default=[144])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--micro-batch", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("out/seeds"))
    parser.add_argument("--gather", action="store_true", help="run nothing: a table of the runs in --output")
    parser.add_argument("--record", type=Path, help="a file for the figures (.json)")
    options = parser.parse_args()
    if options.gather:
        found = sorted(options.output.glob(f"{options.data}-*/result.json"))
        if not found:
            raise SystemExit(
                f"--gather: {options.output} has no runs on {options.data}. Leave --gather out to make some."
            )
        results = [json.loads(one.read_text(encoding="utf-8")) for one in found]
    else:
        results = [
            run_once(options, batch, length, seed)
            for seed in options.seeds
            for batch, length in budgets(options.batches, options.epochs, options.steps)
        ]
    rows = gathered(results)
    print(table(rows))
    if options.record:
        machine = {**results[-1]["machine"], "command": " ".join(["python", "examples/seeds.py", *sys.argv[1:]])}
        options.record.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten: {options.record}")


if __name__ == "__main__":
    main()
