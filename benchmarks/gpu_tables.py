"""What was found on a GPU, as Markdown: the figures that on_gpu.py left behind, beside what is asked of one.

    python benchmarks/gpu_tables.py                                       prints the tables of all cards
    python benchmarks/gpu_tables.py --docs docs/performance.md            puts them between the marks of that page
    python benchmarks/gpu_tables.py --take parts.json benchmarks/results/h100 --docs docs/performance.md

The last one first takes over another run: what its `parts.json` holds replaces those parts in that card's folder, and
no others. It needs neither a GPU nor a framework, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from run import Row, put_into
from run import tables as peers_tables

RESULTS = Path(__file__).parent / "results"
# Milliseconds that are asked of an H200 at 65,536 rows: required, and hoped for.
ASKED = {
    ("InfoNCE", 512): (30, 26),
    ("InfoNCE", 768): (45, 38),
    ("InfoNCE", 1024): (60, 51),
    ("Sigmoid", 768): (33, 29),
}
FASTER = {"inf-cl": 10.0, "memeff": 1.7, "siglip-kernel": 1.45}  # times as fast as these, in the same run
WORKSPACE = 512  # MiB, packed copies apart
COPIES = 5  # float32 copies of the local embeddings, beyond inputs: gradients count
LARGE = (180, 160)  # seconds for 4,194,304 rows of 768: required, and hoped for
ERRORS = ("loss error", "gradient error", "scale error")
LIBRARY = ("nvjet", "gemm", "cutlass", "xmma")  # words in the names of the library's products

Rows = list[dict[str, Any]]


# -- what is asked --------------------------------------------------------------------------------


def verdicts(found: dict[str, Rows]) -> Rows:
    """What is asked of one GPU, with what was found there; at the sizes that were asked for alone."""
    rows = [row for row in found.get("speed", []) if row.get("n") == 65_536]
    mine = {(row["objective"], row["d"]): row for row in rows if row["contender"] == "nibs"}
    judged = []
    for row in rows:
        about = f"{row['objective']}, d = {row['d']}"
        if row["contender"] == "nibs":
            required, goal = ASKED.get((row["objective"], row["d"]), (None, None))
            if required is not None:
                judged.append(verdict(f"{about}: ms", row.get("median_ms"), required, goal, row))
            bytes_held = row.get("plan_workspace")
            judged.append(verdict(f"{about}: workspace MiB", bytes_held and bytes_held / 2**20, WORKSPACE, None, row))
            judged.append(verdict(f"{about}: float32 copies", row.get("copies_beyond_inputs"), COPIES, None, row))
        elif row["contender"] in FASTER:
            ratio = times_as_long(row, mine)
            what = f"{about}: times as fast as {row['contender']}"
            judged.append(verdict(what, ratio, FASTER[row["contender"]], None, row, more=True))
    for row in found.get("large", []):
        if row.get("n", 4_194_304) == 4_194_304:
            judged.append(verdict("4,194,304 rows of 768: seconds", row.get("seconds"), *LARGE, row))
    return judged


def verdict(
    what: str, found: float | None, required: float, goal: float | None, row: dict[str, Any], *, more: bool = False
) -> dict[str, Any]:
    """One line. more: as much as is asked is enough; else it is too much. A time that is not right is none."""
    if found is None:
        said = f"not measured: {row.get('failed', '')}"
    elif row.get("right") is False and not more:
        said = "wrong"
    elif found < required if more else found > required:
        said = f"missed by {abs(found / required - 1):.0%}"
    else:
        said = "met" if goal is None or found > goal else "goal met"
    return {"what": what, "found": found, "required": required, "goal": goal, "verdict": said}


def times_as_long(row: dict[str, Any], mine: dict[tuple[str, int], dict[str, Any]]) -> float | None:
    """A contender's time over that of nibs in the same run; None where one of the two is missing."""
    beside = mine.get((row["objective"], row["d"]), {})
    theirs, ours = row.get("median_ms"), beside.get("median_ms")
    return theirs / ours if theirs and ours else None


# -- cells ----------------------------------------------------------------------------------------


def table(heads: list[str], rows: list[list[Any]]) -> str:
    """Markdown, numbers to the right; a column that no row fills is left out."""
    columns = [(head, [shown(row[number]) for row in rows]) for number, head in enumerate(heads)]
    kept = [(head, "---:" if any(cell[:1].isdigit() for cell in cells) else "---", *cells)
            for head, cells in columns if any(cells)]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*kept, strict=True))


def shown(cell: Any) -> str:
    """Three digits of a number, or all before the point; nothing for None."""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return "" if cell is None else str(cell).replace("|", "/")


def named(rows: Rows, *columns: str) -> str:
    """A table of what rows hold under these names."""
    return table([name.replace("_", " ") for name in columns], [[row.get(name) for name in columns] for row in rows])


def about(report: dict[str, Any]) -> str:
    """Where a part ran, by what, and when; and a note that somebody left beside its figures."""
    versions = {"python": report["python"], **report["versions"]}
    versions.pop("nibs", None)
    words = [report["machine"], ", ".join(f"{name} {version}" for name, version in versions.items()), report["date"]]
    if "tuned" in report:
        words.append("tiles tuned on it" if report["tuned"] else "tiles not tuned")
    words += [f"`{report['command']}`"] if "command" in report else []
    return "; ".join([*words, *([report["note"]] if "note" in report else [])]) + "."


# -- benchmarks/gpu.py ----------------------------------------------------------------------------


def check(rows: Rows) -> list[str]:
    """Facts that are no times."""
    names = ("objective", "n", "d", "kernel", "same bits again", "graph")
    lines = [
        [*(row.get(name) for name in names), *error_cells(row), row.get("right"), row.get("failed")] for row in rows
    ]
    return ["Right, and the same bits again:", table(["loss", *names[1:], *ERRORS, "right", "failed"], lines)]


def speed(rows: Rows) -> list[str]:
    """A step of nibs beside what is asked, where its time goes, and everyone else in the same run."""
    out = [row["failed"] for row in rows if "contender" not in row]
    measured = sorted((row for row in rows if "objective" in row), key=lambda row: (row["objective"], row["d"]))
    steps = [row for row in measured if row["contender"] == "nibs"]
    rates = [row.get("kept_up_tflops", row["product_tflops"]) for row in rows if "product_tflops" in row]
    for row in rows:
        if "copy_tb_s" in row:
            reached = f"{shown(row['product_tflops'])} TFLOP/s in a product, {shown(row['copy_tb_s'])} TB/s in a copy"
            kept = f", and keeps up {shown(row['kept_up_tflops'])} TFLOP/s" if "kept_up_tflops" in row else ""
            kept += f" ({shown(row['sm_mhz'])} MHz, {shown(row['watts'])} W)" if "watts" in row else ""
            out.append(f"The library reaches {reached} here{kept}; `products alone` are a step's at the last rate.")
    if steps:
        heads = ["loss", "n", "d", "ms", "required", "goal", "verdict", "products alone", "workspace MiB", "copies"]
        lines = [step_cells(row, rates) for row in steps]
        out += ["Forward and backward of bfloat16 rows:", table([*heads, *ERRORS, "failed"], lines)]
        out += profiles(steps)
    others = sorted((row for row in measured if row["contender"] != "nibs"), key=lambda row: row["contender"])
    return out + (["The others, in the same run:", contenders(others, steps)] if others else [])


def step_cells(row: dict[str, Any], rates: list[float]) -> list[Any]:
    """One line of the table of steps."""
    required, goal = ASKED.get((row["objective"], row["d"]), (None, None)) if row["n"] == 65_536 else (None, None)
    judged = verdict("", row.get("median_ms"), required, goal, row)["verdict"] if required else None
    flops = 2 * row.get("products", 0) * row["n"] ** 2 * row["d"]
    alone = flops / rates[0] / 1e9 if flops and rates else None
    workspace = row["plan_workspace"] / 2**20 if "plan_workspace" in row else None
    place = [row["objective"], row["n"], row["d"], row.get("median_ms"), required, goal, judged, alone]
    return [*place, workspace, row.get("copies_beyond_inputs"), *error_cells(row), row.get("failed")]


def error_cells(row: dict[str, Any]) -> list[Any]:
    """Of the loss, of the queries' gradients, of the scale's."""
    return [row.get("error", {}).get(name) for name in ("loss", "queries", "scale")]


BESIDE = {
    "kernels_ms": "all kernels of one step alone",
    "graph_ms": "the step, replayed from a CUDA graph",
    "host_ms": "the host's part of it",
    "sm_mhz": "the clock meanwhile, MHz",
    "watts": "the card's power meanwhile, W",
}


def profiles(steps: Rows) -> list[str]:
    """Milliseconds of each kind of kernel over d, and by the line through the ends what is left of it at d = 0."""
    out = []
    for objective in dict.fromkeys(row["objective"] for row in steps):
        by_width: dict[int, dict[str, float]] = {}
        for row in steps:
            if row["objective"] == objective and "kernels" in row:
                cells = by_width.setdefault(row["d"], {})
                for one in row["kernels"]:
                    cells[kind(one["name"])] = cells.get(kind(one["name"]), 0.0) + one["ms"]
                cells["between kernels, and smaller ones"] = row["median_ms"] - sum(cells.values())
                cells["the step"] = row["median_ms"]
                for name, what in BESIDE.items():
                    if name in row:
                        cells[what] = row[name]
        widths = sorted(by_width)
        if not widths:
            continue
        low, high = widths[0], widths[-1]
        lines = []
        for name in by_width[high]:
            line: list[Any] = [by_width[d].get(name) for d in widths]
            if low != high:
                first, last = line[0], line[-1]
                bent = name in BESIDE.values() or None in (first, last)  # a clock, or a host, has no such line
                line.append(None if bent else first - (last - first) * low / (high - low))
            lines.append([name, *line])
        heads = ["kernels", *(f"d = {d}" for d in widths), *(["d = 0"] if low != high else [])]
        out += [f"{objective}, where a step's milliseconds go:", table(heads, lines)]
    return out


def kind(kernel: str) -> str:
    """What a kernel is for, by its name: Triton's keep ours."""
    if any(word in kernel for word in LIBRARY):
        return "the library's products"
    return "PyTorch's own" if "at::" in kernel or kernel.startswith(("Memcpy", "Memset")) else kernel


def contenders(rows: Rows, steps: Rows) -> str:
    """A line for each contender, loss and width; one for all widths where none has figures, for the same reason."""
    mine = {(row["objective"], row["d"]): row for row in steps}
    failed: dict[tuple[str, str, str], list[Any]] = {}
    lines = []
    for row in rows:
        name, objective = row["contender"], row["objective"]
        if "failed" in row:
            line = failed.get((name, objective, row["failed"]))
            if line is not None:
                line[2] = f"{line[2]}, {row['d']}"
                continue
        times, asked = times_as_long(row, mine), FASTER.get(name)
        judged = verdict("", times, asked, None, row, more=True)["verdict"] if times and asked else None
        line = [name, objective, row["d"], row.get("median_ms"), times, asked, judged]
        line += [row.get("copies_beyond_inputs"), *error_cells(row), row.get("failed")]
        lines.append(line)
        if "failed" in row:
            failed[name, objective, row["failed"]] = line
    heads = ["contender", "loss", "d", "ms", "times nibs", "asked", "verdict", "copies"]
    return table([*heads, *ERRORS, "failed"], lines)


def ring(rows: Rows) -> list[str]:
    """One rank of several."""
    flat = [{**row, "sent MB": row["bytes"] / 1e6 if "bytes" in row else None} for row in rows]
    names = ("objective", "ranks", "rows", "d", "step_ms", "compute_ms", "exposed_ms", "sent MB", "right", "failed")
    return ["One rank of a ring in one process, with its copies and without them:", named(flat, *names)]


def large(rows: Rows) -> list[str]:
    """Millions of rows in one step."""
    lines = []
    for row in rows:
        asked = LARGE if row.get("n") == 4_194_304 else (None, None)
        judged = verdict("", row.get("seconds"), *asked, row)["verdict"] if asked[0] else None
        cells = [row.get(name) for name in ("copies", "loss_error", "gradient_error", "scale_error", "right", "failed")]
        lines.append([row.get("n"), row.get("d"), row.get("seconds"), *asked, judged, *cells])
    heads = ["n", "d", "seconds", "required", "goal", "verdict", "copies"]
    return ["One step of many rows:", table([*heads, *ERRORS, "right", "failed"], lines)]


def tune(rows: Rows) -> list[str]:
    """Of each kernel the fastest choice, and how far the slowest is from it."""
    lines = []
    for kernel in dict.fromkeys(row.get("kernel") for row in rows):
        mine = sorted((row for row in rows if row.get("kernel") == kernel), key=lambda row: row.get("ms", 0.0))
        best, last = mine[0], mine[-1]
        lines.append([kernel, len(mine), best.get("ms"), best.get("tflops"), last.get("ms"), best.get("config"),
                      best.get("failed")])  # fmt: skip
    heads = ["kernel", "choices", "fastest ms", "TFLOP/s", "slowest ms", "fastest", "failed"]
    return ["Tiles, each choice timed:", table(heads, lines)]


PARTS = {"check": check, "speed": speed, "ring": ring, "large": large, "tune": tune}


def of_parts(reports: dict[str, dict[str, Any]]) -> list[str]:
    """The tables of benchmarks/gpu.py, part by part."""
    out = []
    for name, report in reports.items():
        out += [about(report), *PARTS[name](report["rows"])]
    return out


# -- the other commands ---------------------------------------------------------------------------


def cupy(report: dict[str, Any]) -> list[str]:
    """nibs-cupy: what was checked, and milliseconds over d of whole calls, kernels and the library's products."""
    out = [about(report)]
    steps = {step: [row for row in report["found"] if row["step"] == step] for step in ("check", *CUPY)}
    if steps["check"]:
        wrong = sum(row["verdict"] != "right" for row in steps["check"])
        out.append(f"Of {len(steps['check'])} comparisons of fast kernels with plain NumPy {wrong or 'none'} failed.")
    for step, (title, columns) in CUPY.items():
        best: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
        for row in steps[step]:
            line = best.setdefault(tuple(row.get(name) for name in columns), {})
            if row["d"] not in line or row["ms"] < line[row["d"]]["ms"]:
                line[row["d"]] = row
        widths = sorted({d for line in best.values() for d in line})
        lines = [[*key, *(cupy_cell(line[d]) if d in line else None for d in widths)] for key, line in best.items()]
        if lines:
            out += [title, table([*columns, *(f"d = {d}" for d in widths)], lines)]
    return out


# A step's title, and what its lines are told apart by; of several tiles the fastest counts.
CUPY = {
    "speed": ("Loss and all gradients of 65,536 rows, ms (TFLOP/s; the best macro tile):", ("dtype", "family", "loss")),
    "kernels": ("Kernels alone, at 11,264 rows, ms (TFLOP/s):", ("format", "family", "name")),
    "ceilings": ("The library's products at macro tiles, ms (TFLOP/s):", ("dtype", "product", "beta")),
}


def cupy_cell(row: dict[str, Any]) -> str:
    """Milliseconds, how many flops a second those are (packing has none), and the macro tile."""
    tile = "; " + " x ".join(map(str, row["tile"])) if "tile" in row else ""
    return shown(row["ms"]) + ("" if row.get("name") == "pack" else f" ({row['tflops']:.0f}{tile})")


def jax(report: dict[str, Any]) -> list[str]:
    """The loss under jit, by foreign kernels and by XLA."""
    return [
        about(report),
        "Under JAX's jit:",
        named(report["rows"], "contender", "n", "d", "dtype", "median_ms", "least_ms", "failed"),
        named(report["verdicts"], "what", "ratio", "limit", "held"),
    ]


def peers(report: dict[str, Any]) -> list[str]:
    """What benchmarks/run.py found."""
    return [peers_tables([Row(**row) for row in report["rows"]], report["products per second"], report["machine"])]


def suites(parts: dict[str, dict[str, Any]]) -> list[str]:
    """What the conformance suite said."""
    lines = [[name, part["outcome"], part["seconds"], part["last words"][-1]]
             for name, part in parts.items() if name.endswith("suite") and part["last words"]]  # fmt: skip
    return ["The conformance suite:", table(["part", "outcome", "seconds", "said"], lines)] if lines else []


FILES = {
    "check": of_parts,
    "speed": of_parts,
    "speed-tuned": of_parts,
    "ring": of_parts,
    "large": of_parts,
    "tune": of_parts,
    "parts": suites,
    "cuda": peers,
    "jax": jax,
    "cupy-speed": cupy,
    "cupy-kernels": cupy,
}


def tables(folder: Path) -> str:
    """All that a card's folder holds."""
    out = []
    for name, of_file in FILES.items():
        path = folder / f"{name}.json"
        if path.is_file():
            out += of_file(json.loads(path.read_text()))
    return "\n\n".join(out)


def cards() -> list[Path]:
    """The folders of what is committed, one for each card."""
    return sorted(path.parent for path in RESULTS.glob("*/parts.json"))


def take(record: Path, folder: Path) -> None:
    """Put the parts of one run into a card's folder: figures into files of their own, and how each part ended."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "parts.json"
    parts = json.loads(kept.read_text()) if kept.is_file() else {}
    for name, part in json.loads(record.read_text()).items():
        figures = part.pop("figures", None)
        if figures is not None:
            (folder / part.pop("file")).write_text(json.dumps(figures, indent=1) + "\n")
        parts[name] = part
    kept.write_text(json.dumps(parts, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Take over, print, and put into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of the card that --take is for")
    parser.add_argument("--take", type=Path, metavar="PARTS", help="parts.json of a run, to be put into the folder")
    parser.add_argument("--docs", type=Path, help="a page with marks, whose tables are replaced")
    options = parser.parse_args(arguments)
    if options.take:
        if options.folder is None:
            parser.error("--take needs the card's folder, such as benchmarks/results/h100")
        take(options.take, options.folder)
    text = "\n\n".join(tables(folder) for folder in cards())
    print(text)
    if options.docs:
        put_into(options.docs, "gpu", text + "\n")


if __name__ == "__main__":
    main()
